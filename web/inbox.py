"""What a client has sent and its session has not taken yet: bounded, and in small pieces, so that nobody waits for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from agent.events import Input, weight
from streams.frames import RATE, Audio

SOUND = 60 * RATE  # samples that may wait; whoever sends more than is heard waits too
COUNT = 1024  # inputs
BYTES = 16 << 20  # of words and pictures
PIECE = RATE // 10  # samples that are taken at once
POLL = 0.02  # seconds


class Inbox:
    """`behind` says whether the model has enough to do, `full` whether the session has."""

    def __init__(self, behind: Callable[[], bool], full: Callable[[], bool] = lambda: False) -> None:
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
            await asyncio.sleep(POLL)

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

    async def inputs(self) -> AsyncIterator[Input]:
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
                await asyncio.sleep(POLL)
            piece = sound.samples[start : start + PIECE]
            yield Audio(piece, sound.at + start)
            self._samples -= len(piece)
            await asyncio.sleep(0)  # others' turn: a minute of sound may have come at once
