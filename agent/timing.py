"""When what was launched was done: on a GPU a pass returns long before it has been computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

Tell = Callable[[float], None]
PENDING = 256  # marks that wait for a GPU; who marks more waits for the oldest


class Timing:
    """Marks in what one thread launches. Each is told the time (of `perf_counter`) at which the device came past it: on a CPU at
    once, on a GPU by one of the next calls of `poll`."""

    def __init__(self, device: torch.device, event: Callable[[], Any] | None = None) -> None:
        """`event` makes CUDA events that keep times; None: for this device, where it has them."""
        if event is None and device.type == "cuda":
            event = lambda: torch.cuda.Event(enable_timing=True)  # noqa: E731
        self._event = event
        self._last: tuple[Any, float] | None = None  # the last event that is known to be past, and its time
        self._pending: deque[tuple[Any, Tell]] = deque()

    def wait(self) -> None:
        """Until the device has come past the last mark."""
        if self._pending:
            self._pending[-1][0].synchronize()
            self.poll()

    def begin(self) -> float:
        """Before something is launched. Returns the time."""
        self.poll()
        now = perf_counter()
        if self._event and not self._pending:  # the device has nothing to do and comes past it at once: clocks drift no further
            self._last = self._record(), now
        return now

    def mark(self, tell: Tell) -> None:
        if not self._event:
            tell(perf_counter())
            return
        assert self._last, "nothing has begun"
        if len(self._pending) == PENDING:
            self._pending[0][0].synchronize()
            self.poll()
        self._pending.append((self._record(), tell))

    def poll(self) -> None:
        while self._pending and self._pending[0][0].query():
            event, tell = self._pending.popleft()
            assert self._last
            before, at = self._last
            self._last = event, min(at + before.elapsed_time(event) / 1000, perf_counter())
            tell(self._last[1])

    def _record(self) -> Any:
        assert self._event
        event = self._event()
        event.record()
        return event
