"""Passes of the model beside busy processes, with the number of threads that attend chooses and with one thread per core. Medians
and p99 in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch

from agent.bench import machine
from model.cache import Cache
from model.gemma import Gemma
from model.threads import Threads, cores

ROWS, CHUNK, PICTURE, DEPTH = 8, 128, (14, 20), 512  # rows of a step, positions, patches, positions in a row before
COMPANY: Mapping[str, tuple[int, ...]] = {
    "alone": (),
    "one at nice 19": (19,),
    "two at nice 19": (19, 19),
    "one ordinary": (0,),
    "two ordinary": (0, 0),
}


def table(model: Gemma, say: Callable[[str], None], seconds: float = 1.0, company: Sequence[str] = (*COMPANY,)) -> dict[str, Any]:
    """Repeats each pass for `seconds`, passes the lines of a table to `say`, and returns milliseconds by busy processes, threads
    and pass."""
    runs = _passes(model)
    say(f"{'beside':<16}{'threads':>10}{''.join(f'{name:>20}' for name in runs)}")
    result: dict[str, Any] = {}
    for name in company:
        with machine.busy(*COMPANY[name]):
            meter = machine.Meter()
            result[name] = {}
            for label, threads in (("chosen", Threads()), (f"{cores()}", Threads(cores()))):
                model.threads = threads
                found = {key: _spread(run, seconds) for key, run in runs.items()}
                result[name][label] = {key: {"median": middle, "p99": far} for key, (middle, far) in found.items()}
                cells = "".join(f"{f'{middle:.1f} / {far:.1f}':>20}" for middle, far in found.values())
                say(f"{name:<16}{label:>10}{cells}")
            if load := meter.read():
                say(f"{'':<16}{load}")
    model.threads = Threads()
    return result


def _passes(model: Gemma) -> dict[str, Callable[[], object]]:
    config = model.config
    cache = Cache(config, ROWS, 2 * DEPTH, slack=CHUNK, device=model.device, dtype=model.dtype)
    rows = [cache.claim() for _ in range(ROWS)]
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(0.01)  # untouched memory would be read faster
    steps, chunk = torch.randn(ROWS, 1, config.hidden_size).to(cache.keys[0]), torch.randn(1, CHUNK, config.hidden_size)
    patches = torch.rand(math.prod(PICTURE), 3 * config.patch**2, device=model.device)
    places = torch.cartesian_prod(*map(torch.arange, PICTURE)).flip(-1).to(model.device)

    def extend(count: int, x: torch.Tensor) -> None:
        for row in rows:
            row.length = row.high = DEPTH
        hidden = model.extend(cache, rows[:count], x.to(cache.keys[0]), wanted=1)
        assert hidden is not None
        hidden[0, 0, 0].item()  # waits for a GPU

    return {
        "step of one row": lambda: extend(1, steps[:1]),
        "of eight": lambda: extend(ROWS, steps),
        "chunk of 128": lambda: extend(1, chunk),
        "picture embedded": lambda: model.embed_image(patches, places)[0, 0].item(),
    }


@torch.inference_mode()
def _spread(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    run()
    times, begun = list[float](), perf_counter()
    while not times or perf_counter() - begun < seconds:
        start = perf_counter()
        run()
        times.append(1000 * (perf_counter() - start))
    return median(times), sorted(times)[math.ceil(0.99 * len(times)) - 1]
