"""Measures when launched work is done: on a GPU a forward pass returns long before it has been computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

PENDING = 256  # marks that may wait for a GPU; one more waits until the oldest is passed


class Timing:
    """Marks in the work that one thread launches on `device`. The callback of each gets the time (of `perf_counter`) at which the
    device passed it: on a CPU at once, on a GPU in one of the next calls of `poll`."""

    def __init__(self, device: torch.device, event: Callable[[], Any] | None = None) -> None:
        """`event` makes a CUDA event with timing; None: those of torch on a CUDA device, and none elsewhere."""
        if event is None and device.type == "cuda":
            event = lambda: torch.cuda.Event(enable_timing=True)  # noqa: E731
        self._event = event
        self._last: tuple[Any, float] | None = None  # the last event that the device is known to have passed, and its time
        self._pending: deque[tuple[Any, Callable[[float], None]]] = deque()

    def wait(self) -> None:
        """Waits until the device has passed the last mark."""
        if self._pending:
            self._pending[-1][0].synchronize()
            self.poll()

    def begin(self) -> float:
        """Call it before launching work. Returns the time in seconds."""
        self.poll()
        now = perf_counter()
        if self._event and not self._pending:  # the device is idle and passes it at once, so the two clocks agree again
            self._last = self._record(), now
        return now

    def mark(self, callback: Callable[[float], None]) -> None:
        """Marks the end of what was launched so far; `callback` gets the time at which the device passed it."""
        if not self._event:
            callback(perf_counter())
            return
        assert self._last, "mark before begin"
        if len(self._pending) == PENDING:
            self._pending[0][0].synchronize()
            self.poll()
        self._pending.append((self._record(), callback))

    def poll(self) -> None:
        """Calls back for the marks that the device has passed."""
        while self._pending and self._pending[0][0].query():
            event, callback = self._pending.popleft()
            assert self._last
            before, at = self._last
            self._last = event, min(at + before.elapsed_time(event) / 1000, perf_counter())
            callback(self._last[1])

    def _record(self) -> Any:
        assert self._event
        event = self._event()
        event.record()
        return event
