"""How many threads a pass on a CPU takes.

Every product with a matrix ends at a barrier, where all threads wait for the one that the system has taken away: beside one
busy process on two cores nano's step took 3.1 ms with one thread and with two 7.2 in the median, 173 at worst. So a thread
must have work enough that a barrier is little beside it, and one core is always left to the rest of the process: its event
loop, the sound, the camera and the voice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores together in a period, and that period
USUAL = torch.get_num_threads()  # what torch found as it started: OMP_NUM_THREADS, or the physical cores
# What one thread of an AMD EPYC reads and multiplies, numbers a microsecond, and the least milliseconds of a product that a
# thread is taken for. Two threads gained nothing in nano's steps (0.05 ms a product, whether of one row or eight), at best a
# third in its chunk of 128 (0.49 ms), and half in a picture's embedding (10 ms).
READ, MULTIPLIED, LEAST = 4_000, 50_000, 0.25


class Threads:
    """`given`: as many for every pass. None: OMP_NUM_THREADS where it is set, else by the work of each pass."""

    def __init__(self, given: int | None = None) -> None:
        self.given = given or (USUAL if os.environ.get("OMP_NUM_THREADS") else None)
        self.most = self.given or max(1, min(USUAL, cores() - 1))

    def count(self, weights: int, positions: int) -> int:
        """For a pass of that many positions whose products have matrices of `weights` numbers."""
        if self.given:
            return self.given
        milliseconds = weights * max(1 / READ, positions / MULTIPLIED) / 1000
        return max(1, min(self.most, int(milliseconds / LEAST)))

    @contextmanager
    def running(self, weights: int, positions: int) -> Iterator[None]:
        """Sets torch's threads for the calling thread, which takes 0.2 µs."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.count(weights, positions))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def cores() -> int:
    """That this process may use: of the machine, of its affinity and of its container."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return max(1, min(there, int(quota) // int(period)))
    except (OSError, ValueError):  # there is none, or it is "max"
        return there
