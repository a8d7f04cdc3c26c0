"""A client's conversation over whatever carries its messages: no socket is needed, and its ends are told apart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from agent import events
from agent.engine import Engine
from agent.session import Session
from tests.serving import SETTINGS, VAD, fast, free, text
from tests.talk import Beeps, Mind
from web.connection import ClientGone, Connection, End
from web.protocol import RealtimeProtocol


class Pipe:
    """A transport of two queues."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages: asyncio.Queue[str | None] = asyncio.Queue()
        self.gone = False

    def say(self, type: str, **fields: Any) -> None:
        self._messages.put_nowait(json.dumps({"type": type, **fields}))

    def hang_up(self) -> None:
        self._messages.put_nowait(None)

    async def messages(self) -> AsyncIterator[str]:
        while (message := await self._messages.get()) is not None:
            yield message

    async def send(self, event: str) -> None:
        if self.gone:
            raise ClientGone
        self.sent.put_nowait(json.loads(event))

    async def until(self, type: str) -> dict[str, Any]:
        while (event := await self.sent.get())["type"] != type:
            pass
        return event


def connected(engine: Engine, pipe: Pipe, stopping: asyncio.Event, told: list[events.Event]) -> asyncio.Task[End]:
    session = Session(engine, VAD, Beeps(), SETTINGS)
    protocol = RealtimeProtocol("x", "nano", "beeps")
    connection = Connection(session, protocol, pipe.messages(), pipe.send, stopping, told.append, fast)
    return asyncio.create_task(connection.run())


async def test_a_conversation_without_a_socket(engine: Engine, mind: Mind) -> None:
    mind.says("Yes.")
    pipe, told = Pipe(), list[events.Event]()
    async with asyncio.timeout(60):
        ends = connected(engine, pipe, asyncio.Event(), told)
        pipe.say("conversation.item.create", item=text("Well?"))
        pipe.say("response.create", response={"output_modalities": ["text"]})
        done = (await pipe.until("response.done"))["response"]
        assert done["status"] == "completed" and done["output"][0]["content"][0]["text"] == "Yes."
        pipe.hang_up()
        assert await ends == End(1000, "the client has gone")
        await free(engine)
    assert any(isinstance(event, events.AnswerDone) for event in told)


async def test_how_a_conversation_ends(engine: Engine, mind: Mind) -> None:
    async with asyncio.timeout(60):
        pipe, stopping = Pipe(), asyncio.Event()
        ends = connected(engine, pipe, stopping, [])
        await pipe.until("session.created")
        stopping.set()
        assert await ends == End(1012, "the server is going")
        await free(engine)

        pipe = Pipe()
        ends = connected(engine, pipe, asyncio.Event(), [])
        await pipe.until("session.created")
        pipe.gone = True
        pipe.say("input_audio_buffer.clear")
        assert await ends == End(1000, "the client has gone")
        await free(engine)


async def test_a_fault_of_ours_ends_its_conversation_and_says_what_it_was(engine: Engine, mind: Mind) -> None:
    async with asyncio.timeout(60):
        pipe = Pipe()
        session, protocol = Session(engine, VAD, Beeps(), SETTINGS), RealtimeProtocol("x", "nano", "beeps")

        def broken(event: events.Event) -> None:
            raise ZeroDivisionError("a secret of ours")

        connection = Connection(session, protocol, pipe.messages(), pipe.send, asyncio.Event(), broken, fast)
        ends = asyncio.create_task(connection.run())
        pipe.say("conversation.item.create", item=text("Well?"))
        pipe.say("response.create")
        end = await ends
        assert end.code == 1011 and "secret" not in end.why and isinstance(end.fault, ZeroDivisionError)
        await free(engine)


async def test_a_cancelled_conversation_gives_its_row_back(engine: Engine, mind: Mind) -> None:
    async with asyncio.timeout(60):
        pipe = Pipe()
        ends = connected(engine, pipe, asyncio.Event(), [])
        await pipe.until("session.created")
        ends.cancel()
        await asyncio.wait({ends})
        assert ends.cancelled()
        await free(engine)
