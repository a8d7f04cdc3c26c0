"""One client and its session, over whatever carries its messages: a websocket here, another server elsewhere.

Five tasks: the session, what comes in, what goes out, the clock of what was played, and the server's end. The first that ends is
the end of all. Every queue is bounded; who does not read or sends too much waits alone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from agent import events
from agent.events import Event, Input, weight
from agent.session import ConsumerStalled, Session
from streams.frames import RATE, Audio
from web.protocol import RealtimeProtocol

EVENTS = 500  # of a client in a second; who sends more waits, and
SHARE = 16 << 10  # bytes count as one more
UNSENT = 256  # events
BEHIND = 400  # positions that may wait for the model before more sound is taken
TICK = 0.02  # seconds
CLOSING = 2.0  # seconds

SOUND = 60 * RATE  # samples that may wait for the session; whoever sends more than is heard waits too
COUNT = 1024  # inputs
BYTES = 16 << 20  # of words, pictures and recordings
PIECE = RATE // 10  # samples that are taken at once


class ClientGone(ConnectionError):
    """Nothing can be sent any more."""


@dataclass(frozen=True)
class End:
    """Of a conversation: the close code of RFC 6455, one sentence, and what raised, where that is a fault of ours."""

    code: int
    why: str
    fault: BaseException | None = None


class Connection:
    """`messages` end as the client goes; `send` waits for a slow one, or raises ClientGone. `stopping`: the server goes.
    `observe` is told what the session tells; `clock` is the one by which the client plays."""

    def __init__(
        self,
        session: Session,
        protocol: RealtimeProtocol,
        messages: AsyncIterator[str | bytes],
        send: Callable[[str], Awaitable[None]],
        stopping: asyncio.Event,
        observe: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self._session, self._protocol, self._clock, self._observe = session, protocol, clock, observe
        self._messages, self._send, self._stopping = messages, send, stopping
        self._inputs = Inputs(lambda: session.record.row.behind > BEHIND, lambda: session.full)
        self._unsent: asyncio.Queue[str] = asyncio.Queue(UNSENT)
        self._order = asyncio.Lock()
        self._failed: str | None = None

    async def run(self) -> End:
        work = (
            self._session.run(self._inputs.read(), self._emit),
            self._write(),
            self._stopping.wait(),
            self._read(),
            self._play(),
        )
        tasks = [asyncio.ensure_future(part) for part in work]
        session, write, stopping, *_ = tasks
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            stopped = stopping.done()
            if session.done() and not write.done():
                with suppress(TimeoutError):
                    async with asyncio.timeout(CLOSING):
                        await self._unsent.join()
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        return self._end([end for end in ends if isinstance(end, Exception) and not isinstance(end, ClientGone)], stopped)

    def _end(self, raised: list[Exception], stopped: bool) -> End:
        match raised:
            case [ConsumerStalled() as stuck, *_]:
                return End(1013, str(stuck))
            case [fault, *_]:
                return End(1011, "something is wrong with the server; this conversation is over", fault)
        if self._failed is not None:
            return End(1011, self._failed)
        return End(1012, "the server is going") if stopped else End(1000, "the client has gone")

    async def _read(self) -> None:
        allowance = Allowance(EVENTS)
        async for message in self._messages:
            await asyncio.sleep(allowance.take(1 + len(message) / SHARE))  # be it 0: hundreds of messages may have come at once
            self._protocol.receive(message, self._clock())
            await self._hand_on()
            await self._inputs.room()

    async def _emit(self, event: Event) -> None:
        self._observe(event)
        if isinstance(event, events.SessionFailed):
            self._failed = event.message
        self._protocol.tell(event, self._clock())
        await self._hand_on()

    async def _play(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._protocol.played(self._clock())
            await self._hand_on()

    async def _hand_on(self) -> None:
        """To the session and to the client, in order: those that wait for a slow reader do so in a line."""
        async with self._order:
            out, inputs = self._protocol.out.take()
            self._inputs.put(inputs)
            for event in out:
                await self._unsent.put(json.dumps(event))

    async def _write(self) -> None:
        while True:
            await self._send(await self._unsent.get())
            self._unsent.task_done()


class Allowance:
    """A token bucket of one second: `take` says how many seconds there are to wait before more is taken."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._left, self._last = float(rate), clock()

    def take(self, count: float) -> float:
        now = self._clock()
        self._left = min(self._rate, self._left + (now - self._last) * self._rate) - count
        self._last = now
        return max(0.0, -self._left / self._rate)


class Inputs:
    """What a client has sent and its session has not taken yet: bounded, and in small pieces, so that nobody waits for it.
    `behind` says whether the model has enough to do, `full` whether the session has."""

    def __init__(self, behind: Callable[[], bool], full: Callable[[], bool]) -> None:
        self._behind, self._full = behind, full
        self._queue: deque[Input] = deque()
        self._samples = self._bytes = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def room(self) -> None:
        """Until more may come: whoever sends waits at his own socket, and nothing of it is lost."""
        await self._room.wait()
        while self._full():
            await asyncio.sleep(TICK)

    def put(self, inputs: Iterable[Input]) -> None:
        for input in inputs:
            self._queue.append(input)
            self._samples += len(input.samples) if isinstance(input, Audio) else 0
            self._bytes += weight(input)
        self._changed.set()
        self._look()

    def _look(self) -> None:
        if self._samples > SOUND or len(self._queue) > COUNT or self._bytes > BYTES:
            self._room.clear()
        else:
            self._room.set()

    async def read(self) -> AsyncIterator[Input]:
        while True:
            self._changed.clear()
            while self._queue:
                input = self._queue.popleft()
                if isinstance(input, Audio):
                    async for piece in self._pieces(input):
                        yield piece
                else:
                    yield input
                    await asyncio.sleep(0)  # others' turn: a thousand items may have come at once
                self._bytes -= weight(input)
                self._look()
            await self._changed.wait()

    async def _pieces(self, sound: Audio) -> AsyncIterator[Audio]:
        for start in range(0, len(sound.samples), PIECE):
            while self._behind():
                await asyncio.sleep(TICK)
            piece = sound.samples[start : start + PIECE]
            yield Audio(piece, sound.at + start)
            self._samples -= len(piece)
            await asyncio.sleep(0)  # others' turn: a minute of sound may have come at once
