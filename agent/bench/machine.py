"""How busy the machine is during a measurement, and processes that keep it busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

from agent.bench.figures import Figure

STAT = Path("/proc/stat")
# Ends when its parent does, even if that was killed.
BUSY = """
import os, sys
parent = os.getppid()
os.nice(int(sys.argv[1]))
print(flush=True)
number = 0
while os.getppid() == parent:
    for _ in range(100_000):
        number += 1
"""


@contextmanager
def busy(*niceness: int) -> Iterator[None]:
    """Runs one busy process for each niceness: 0 is an ordinary process, 19 has the lowest priority."""
    with ExitStack() as stack:
        for nice in niceness:
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY, str(nice)], stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout
            process.stdout.readline()
        yield


@dataclass(frozen=True)
class Load:
    """How busy the machine was during a measurement."""

    others: float  # cores that other processes kept busy
    steal: float  # share of the time of all cores that the host of a virtual machine took
    cores: int

    def __str__(self) -> str:
        return f"other processes kept {self.others:.2f} of {self.cores} cores busy, the host took {100 * self.steal:.0f} %"

    def figures(self) -> list[Figure]:
        return [
            Figure("others", f"cores busy with other processes, of {self.cores}", "%", 100 * self.others / self.cores),
            Figure("steal", "time of all cores that the host took", "%", 100 * self.steal),
        ]


class Meter:
    """Measures the load since it was created."""

    def __init__(self) -> None:
        self._begun, self._own, self._ticks = perf_counter(), process_time(), _ticks()

    def read(self) -> Load | None:
        """The load so far; None where the system does not tell."""
        if self._ticks is None or (now := _ticks()) is None:
            return None
        seconds, cores = max(perf_counter() - self._begun, 1e-3), os.cpu_count() or 1
        worked, stolen = ((after - before) / os.sysconf("SC_CLK_TCK") for before, after in zip(self._ticks, now, strict=True))
        others = max(0.0, worked - (process_time() - self._own)) / seconds
        return Load(others, stolen / seconds / cores, cores)


def _ticks() -> tuple[int, int] | None:
    """Clock ticks of all cores since boot: busy, and taken by the host. None where the system does not tell."""
    try:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text(encoding="ascii").split("\n")[0].split()[1:])
    except (OSError, ValueError):
        return None
    return user + nice + system + irq + softirq, steal
