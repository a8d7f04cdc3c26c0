"""A bounded queue from any thread to one consumer on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Channel(Generic[T]):
    """Holds at most `bound` items; when full, the oldest is dropped and counted in `dropped`. Made on the consumer's loop."""

    def __init__(self, bound: int) -> None:
        assert bound > 0, bound
        self.bound, self.dropped = bound, 0
        self._items: deque[T] = deque()
        self._lock = threading.Lock()
        self._there, self._loop = asyncio.Event(), asyncio.get_running_loop()

    def put(self, item: T) -> None:
        """Never blocks; may be called from any thread."""
        with self._lock:
            if len(self._items) == self.bound:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            first = len(self._items) == 1
        if first:
            with suppress(RuntimeError):  # the loop is closed: nobody takes any more
                self._loop.call_soon_threadsafe(self._there.set)

    async def get(self) -> T:
        """The oldest item, as soon as there is one. For one consumer."""
        while True:
            with self._lock:
                if self._items:
                    return self._items.popleft()
            self._there.clear()  # a put from here on sets it on the loop, which is after this
            await self._there.wait()
