"""One client and its session, over any transport of messages: a websocket in our server, or another server's.

Five tasks: the session, the reader, the writer, the playback clock, and the wait for the server's end. When the first of them
ends, all are ended. Every queue is bounded; a client that does not read or sends too much delays only itself.
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

EVENTS = 500  # of a client per second: its rate limit
SHARE = 16 << 10  # bytes of a message that count as one more event
UNSENT = 256  # events that may wait to be sent
BEHIND = 400  # positions that may wait for the model before more audio is taken
TICK = 0.02  # seconds between two looks at the playback clock
CLOSING = 2.0  # seconds that closing may take

SOUND = 60 * RATE  # samples that may wait for the session; reading pauses beyond that
COUNT = 1024  # inputs that may wait
BYTES = 16 << 20  # of text, pictures and recorded audio that may wait
PIECE = RATE // 10  # samples that the session gets at once


class ClientGone(ConnectionError):
    """The client is gone: nothing can be sent any more."""


@dataclass(frozen=True)
class End:
    """How a conversation ended: the close code (RFC 6455), one sentence, and the exception if the fault is ours."""

    code: int
    why: str
    fault: BaseException | None = None


class Connection:
    """Runs a client and its session. `messages` ends when the client goes. `send` waits for a slow client, or raises ClientGone.
    `stopping`: set when the server stops. `observe` is called with each event. `clock`: seconds, for playback."""

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
        self._flushing = asyncio.Lock()
        self._failed: str | None = None

    async def run(self) -> End:
        """Until the client goes, the session ends or the server stops. Returns how it ended."""
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
            case [ConsumerStalled() as stalled, *_]:
                return End(1013, str(stalled))
            case [fault, *_]:
                return End(1011, "something is wrong with the server; this conversation is over", fault)
        if self._failed is not None:
            return End(1011, self._failed)
        return End(1012, "the server is going") if stopped else End(1000, "the client has gone")

    async def _read(self) -> None:
        allowance = Allowance(EVENTS)
        async for message in self._messages:
            await asyncio.sleep(
                allowance.take(1 + len(message) / SHARE)
            )  # also if it is 0: hundreds of messages may have come at once
            self._protocol.receive(message, self._clock())
            await self._flush()
            await self._inputs.room()

    async def _emit(self, event: Event) -> None:
        self._observe(event)
        if isinstance(event, events.SessionFailed):
            self._failed = event.message
        self._protocol.handle_event(event, self._clock())
        await self._flush()

    async def _play(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._protocol.played(self._clock())
            await self._flush()

    async def _flush(self) -> None:
        """Passes on the protocol's output in order: tasks that wait for a slow reader wait one after the other."""
        async with self._flushing:
            out, inputs = self._protocol.out.take()
            self._inputs.put(inputs)
            for event in out:
                await self._unsent.put(json.dumps(event))

    async def _write(self) -> None:
        while True:
            await self._send(await self._unsent.get())
            self._unsent.task_done()


class Allowance:
    """A rate limit: a token bucket of one second. `take` returns the seconds to wait before going on."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._left, self._last = float(rate), clock()

    def take(self, count: float) -> float:
        now = self._clock()
        self._left = min(self._rate, self._left + (now - self._last) * self._rate) - count
        self._last = now
        return max(0.0, -self._left / self._rate)


class Inputs:
    """The queue of inputs for the session: bounded, and audio is split into small pieces, so that nobody waits long for it.
    `behind`: whether the model has enough to do. `full`: whether the session has."""

    def __init__(self, behind: Callable[[], bool], full: Callable[[], bool]) -> None:
        self._behind, self._full = behind, full
        self._queue: deque[Input] = deque()
        self._samples = self._bytes = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def room(self) -> None:
        """Waits until there is room. The sender waits at its own socket meanwhile, and nothing is lost."""
        await self._room.wait()
        while self._full():
            await asyncio.sleep(TICK)

    def put(self, inputs: Iterable[Input]) -> None:
        for input in inputs:
            self._queue.append(input)
            self._samples += len(input.samples) if isinstance(input, Audio) else 0
            self._bytes += weight(input)
        self._changed.set()
        self._update_room()

    def _update_room(self) -> None:
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
                    await asyncio.sleep(0)  # lets other tasks run: a thousand items may have come at once
                self._bytes -= weight(input)
                self._update_room()
            await self._changed.wait()

    async def _pieces(self, sound: Audio) -> AsyncIterator[Audio]:
        for start in range(0, len(sound.samples), PIECE):
            while self._behind():
                await asyncio.sleep(TICK)
            piece = sound.samples[start : start + PIECE]
            yield Audio(piece, sound.at + start)
            self._samples -= len(piece)
            await asyncio.sleep(0)  # lets other tasks run: a minute of audio may have come at once
