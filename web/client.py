"""One client of the server and its session.

Four tasks: the session, what comes in, what goes out, and the clock of what was played. The first that ends is the end of
all four. Every queue is bounded; who does not read or sends too much waits alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from agent import events
from agent.events import Event
from agent.session import DoorStuck, Session
from web.inbox import Inbox
from web.protocol import Conversation
from web.socket import Allowance

if TYPE_CHECKING:
    from web.server import Door

EVENTS = 500  # of a client in a second; who sends more waits, and
SHARE = 16 << 10  # bytes count as one more
UNSENT = 256  # events
BEHIND = 400  # positions that may wait for the model before more sound is taken
TICK = 0.02  # seconds
CLOSING = 2.0  # seconds

log = logging.getLogger("attend.serve")


class Client:
    """One client and its session."""

    def __init__(self, door: Door, connection: ServerConnection, session: Session, name: str, asked: frozenset[str]) -> None:
        self.door, self.connection, self.session, self.name = door, connection, session, name
        o = door.options
        system = o.settings.setting.system or ""
        voice = o.voice if door.voice else None
        self.conversation = Conversation(name, o.model, voice, asked, o.settings.manners, system)
        self._inbox = Inbox(lambda: session.record.row.behind > BEHIND, lambda: session.full)
        self._unsent: asyncio.Queue[str] = asyncio.Queue(UNSENT)
        self._order = asyncio.Lock()
        self._failed: str | None = None
        raw = connection.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # else the system takes a minute of sound at once

    async def run(self) -> tuple[int, str]:
        """Close code, and why."""
        door, run = self.door, asyncio.create_task(self.session.run(self._inbox.inputs(), self._emit))
        write, going = asyncio.create_task(self._write()), asyncio.create_task(door.stopping.wait())
        tasks = [run, write, going, asyncio.create_task(self._read()), asyncio.create_task(self._play())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        stopping = going.done()
        if run.done() and not write.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSING):
                    await self._unsent.join()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        trouble = next((end for end in ends if isinstance(end, Exception) and not isinstance(end, ConnectionClosed)), None)
        if isinstance(trouble, DoorStuck):
            door.metrics.errors.labels("unread").inc()
            return await hang_up(self.connection, 1013, str(trouble))
        if trouble is not None:
            door.metrics.errors.labels("fault").inc()
            log.error("%s fault", self.name, exc_info=trouble)
            return await hang_up(self.connection, 1011, "something is wrong with the server; this conversation is over", "fault")
        if self._failed is not None:
            return await hang_up(self.connection, 1011, self._failed)
        if stopping:
            return await hang_up(self.connection, 1012, "the server is going")
        return self.connection.close_code or 1000, "the client has gone"

    async def _read(self) -> None:
        allowance = Allowance(EVENTS)
        async for message in self.connection:
            await asyncio.sleep(allowance.take(1 + len(message) / SHARE))  # be it 0: hundreds of messages may have come at once
            self.conversation.receive(message, self.door.options.clock())
            await self._hand_on()
            await self._inbox.room()

    async def _emit(self, event: Event) -> None:
        self.door.metrics.count(event)
        self._say(event)
        if isinstance(event, events.Failed):
            self._failed = event.message
        self.conversation.tell(event, self.door.options.clock())
        await self._hand_on()

    async def _play(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self.conversation.played(self.door.options.clock())
            await self._hand_on()

    async def _hand_on(self) -> None:
        """To the session and to the client, in order: those that wait for a slow reader do so in a line."""
        async with self._order:
            out, inputs = self.conversation.out[:], self.conversation.inputs[:]
            self.conversation.out.clear()
            self.conversation.inputs.clear()
            self._inbox.put(inputs)
            for event in out:
                await self._unsent.put(json.dumps(event))

    async def _write(self) -> None:
        while True:
            await self.connection.send(await self._unsent.get())
            self._unsent.task_done()

    def _say(self, event: Event) -> None:
        door = self.door
        match event:
            case events.Stopped():
                door.say("turn", self.name, turn=event.turn, ms=(event.end * 1000) // 16_000, by=event.why)
            case events.Captioned():
                door.say("caption", self.name, event.text, turn=event.turn)
            case events.Answered():
                door.say("answer", self.name, event.text, answer=event.answer, finish=event.finish, tokens=event.tokens)
            case events.Timed():
                door.say("times", self.name, answer=event.answer, ms={key: round(ms) for key, ms in event.stages.items()})
            case events.LetGo():
                door.say("let go", self.name, of=[f"{gone.what} {gone.of}" for gone in event.gone])
            case events.Noted() | events.Failed():
                door.say("trouble", self.name, message=event.message)


async def hang_up(connection: ServerConnection, code: int, why: str, error: str | None = None) -> tuple[int, str]:
    """`error`: said in an event of this code first."""
    if error:
        wrong = {"type": "server_error", "code": error, "message": why, "param": None, "event_id": None}
        event = json.dumps({"type": "error", "event_id": f"event_{secrets.token_hex(4)}", "error": wrong})
        with suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(CLOSING):
                await connection.send(event)
    await connection.close(code, why.encode()[:120].decode(errors="ignore"))
    return code, why
