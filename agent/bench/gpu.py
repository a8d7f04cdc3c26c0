"""Everything about the model that only a GPU can tell, in order of worth, within 400 seconds: `make gpu`.

Each stage runs in a process of its own, so that one that fails or hangs costs the others nothing, and what it has measured
until then is kept: figures come as lines of JSON, and the file is written after each of them. Weights are random, which does
not change the time; no checkpoint, no network, no test library and no particular release of torch is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.bench import alone
from agent.bench.shapes import SHAPES
from agent.checkpoint import LoadedModel
from agent.engine import Engine, SequenceHandle
from agent.tape import Sound
from model import reference
from model.batch import RowChunk
from model.cache import Cache, Row
from model.config import CheckpointError, GemmaConfig
from model.forward import BUCKETS, ForwardPass
from model.gemma import Gemma
from model.quantized import Form, QuantizedLinear, quantize
from model.sampling import SamplingParams, sample
from streams.frames import RATE

SECONDS = 400  # for all of it
HOW = SamplingParams(stop=frozenset(), suppressed=(0,), temperature=0.7)
Figures = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Size:
    """What is measured: the 12B on a GPU, or in a dry run nano on a CPU, so that this script cannot rot."""

    device: torch.device
    shape: str = "12b"
    block: int = 8 << 30  # bytes that are copied and read for the floors
    rows: tuple[int, ...] = (1, 8, 32, 64)
    lengths: tuple[int, ...] = (300, 1100, 4000)
    length: int = 4608  # of a row
    slack: int = 320
    buckets: tuple[int, ...] = BUCKETS
    picture: tuple[int, int] = (14, 20)
    listeners: tuple[int, ...] = (16, 32, 64, 96)
    seconds: float = 12.0  # of each crowd of listeners
    rounds: int = 20


DRY = Size(torch.device("cpu"), "nano", 1 << 20, (1, 2), (30, 60), 512, 64, (1, 4), (3, 4), (2,), 0.4, 1)


# ---- stages


def floors(size: Size) -> Figures:
    """What is here, and what its memory can do."""
    yield "python", platform.python_version()
    for name in ("torch", "triton", "transformers"):
        yield name, _version(name)
    if size.device.type == "cuda":
        properties = torch.cuda.get_device_properties(size.device)
        yield "device", properties.name
        yield "cuda", torch.version.cuda
        yield "memory_gib", properties.total_memory / 2**30
        yield "multiprocessors", properties.multi_processor_count
    block = torch.zeros(size.block // 2, dtype=torch.bfloat16, device=size.device)
    copy = torch.empty_like(block).copy_
    yield "copy_gb_s", 2 * size.block / 1e6 / _ms(size, lambda: copy(block))
    yield "read_gb_s", size.block / 1e6 / _ms(size, block.view(torch.int32).max)


def agreement(size: Size) -> Figures:
    """The kernels, eager and as captured graphs, against their references, in float32 and bfloat16."""
    raw = SHAPES[size.shape]()
    raw["text_config"] |= {"num_hidden_layers": 6, "layer_types": raw["text_config"]["layer_types"][:6], "sliding_window": 40}
    for dtype in (torch.float32, torch.bfloat16):
        model = alone.random_model(GemmaConfig.from_json(raw), size.device, dtype)
        for name, captured in (("eager", False), ("captured", True)):
            caches = [Cache(model.config, 4, 300, slack=60, device=size.device, dtype=dtype) for _ in range(2)]
            ours, theirs = ForwardPass(model, caches[0]), ForwardPass(model, caches[1], reference)
            if captured:
                ours.capture((1, 4, 16, 64))
            yield f"{name}_{str(dtype).removeprefix('torch.')}", _difference(model, ours, theirs)


def passes(size: Size) -> Figures:
    """Steps, chunks, closings and pictures, beside one read of the weights."""
    model = _model(size)
    cache = Cache(model.config, max(size.rows) + 1, size.length, slack=size.slack, device=size.device, dtype=model.dtype)
    for memory in (*cache.keys, *cache.values):
        memory.fill_(0.01)  # what was never written reads faster
    rows = [cache.claim() for _ in range(max(size.rows))]
    forward = ForwardPass(model, cache)
    needed = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith(("vision.", "audio.")))
    yield "weights_gib", needed / 2**30
    yield "one_read_ms", _read_ms(size, needed)

    def take(*chunks: tuple[Row, int, int], length: int) -> Callable[[], None]:
        """A pass over (row, positions, pictures' positions at its start), each wanting a token, from rows of this length."""
        count = sum(n for _, n, _ in chunks)
        ids = np.full(count, 20)

        def run() -> None:
            for row, *_ in chunks:
                row.length = row.high = length
            batch = [RowChunk(row, n, ((0, seen),) if seen else (), wanted=1) for row, n, seen in chunks]
            hidden = forward(batch, model.embed([ids]))
            assert hidden is not None
            sample(model.logits(hidden), [HOW] * len(batch), [0.5] * len(batch)).tolist()

        return run

    middle = size.lengths[len(size.lengths) // 2]
    yield "eager_step_ms", _ms(size, take((rows[0], 1, 0), length=middle))
    yield "eager_step_profile", _profile(take((rows[0], 1, 0), length=middle))
    before, begun = _allocated(size), perf_counter()
    forward.capture(size.buckets)
    yield "capture_seconds", perf_counter() - begun
    yield "capture_mib", (_allocated(size) - before) / 2**20
    yield "step_profile", _profile(take((rows[0], 1, 0), length=middle))
    for length in size.lengths:
        for count in size.rows:
            steps = [(row, 1, 0) for row in rows[:count]]
            yield f"step_{count}x{length}_ms", _ms(size, take(*steps, length=length))
    frames = min(30 * RATE // model.config.frame, size.length - 100)
    yield "closing_after_30_s_ms", _ms(size, take((rows[0], 11, 0), length=frames))
    yield "chunk_128_ms", _ms(size, take((rows[0], min(128, size.slack), 0), length=middle))
    columns, lines = size.picture
    shown = columns * lines
    pieces = torch.rand(shown, 3 * model.config.patch**2)
    places = torch.cartesian_prod(torch.arange(lines), torch.arange(columns)).flip(-1)
    yield "picture_embedding_ms", _ms(size, lambda: model.embed([(pieces, places)]))
    yield "picture_ms", _ms(size, take((rows[0], shown, shown), length=middle))
    beside = [(row, 1, 0) for row in rows[1 : size.rows[-2] + 1]]
    yield "picture_beside_steps_ms", _ms(size, take((rows[0], shown, shown), *beside, length=middle))
    yield "fork_ms", _ms(size, lambda: cache.release(cache.fork(rows[0])))
    yield "peak_gib", _peak(size) / 2**30


def listening(size: Size) -> Figures:
    """Rows that hear 25 frames a second, and beside eight of them one that writes without end."""
    model = _model(size)
    loaded = LoadedModel(model, None, None, HOW, 280)  # type: ignore[arg-type]  # an engine asks for no words
    for count in size.listeners:
        try:
            lags, steps, tokens = asyncio.run(_crowd(loaded, count, size.seconds))
        except CheckpointError as full:
            yield f"listeners_{count}", str(full)
            return
        yield f"lag_{count}_ms", _spread(lags)
        yield f"pass_{count}_ms", _spread(steps)
        yield f"tokens_s_each_{count}", tokens / max(1, count // 8) / size.seconds


def small_weights(size: Size) -> Figures:
    """Steps with int8 and int4 weights, beside one read of them."""
    forms: tuple[Form, ...] = ("int8", "int4")
    for form in forms:
        model = _model(size)
        for block in model.blocks:
            for part, name in ((block.attention, "qkv"), (block.attention, "out"), (block.mlp, "gate_up"), (block.mlp, "down")):
                held = QuantizedLinear(quantize(getattr(part, name).detach(), form), size.device)
                delattr(part, name)
                setattr(part, name, held)
        cache = Cache(model.config, 8, size.length, slack=size.slack, device=size.device, dtype=model.dtype)
        forward, rows = ForwardPass(model, cache), [cache.claim() for _ in range(8)]
        forward.capture([bucket for bucket in size.buckets if bucket <= 8])
        needed = sum(t.nbytes for t in (*model.blocks.parameters(), *model.blocks.buffers(), model.embedding))
        yield f"{form}_gib", needed / 2**30
        yield f"{form}_one_read_ms", _read_ms(size, needed)

        def step(count: int, forward: ForwardPass = forward, rows: list[Row] = rows, model: Gemma = model) -> None:
            for row in rows:
                row.length = row.high = size.lengths[0]
            hidden = forward([RowChunk(row, wanted=1) for row in rows[:count]], model.embed([np.full(count, 20)]))
            assert hidden is not None
            sample(model.logits(hidden), [HOW] * count, [0.5] * count).tolist()

        for count in (1, 8):
            yield f"{form}_step_{count}_ms", _ms(size, lambda count=count: step(count))  # type: ignore[misc]
        del model, cache, forward, rows


def beside(size: Size) -> Figures:
    """transformers, over weights of the same shape. (On a CPU that is what `attend bench model` measures.)"""
    if size.device.type == "cpu":
        return
    once = alone.Effort(seconds=1, min_rounds=1, max_rounds=5)
    said = alone.model([size.shape], str(size.device), lambda line: print(line, file=sys.stderr), once)
    yield "beside", said["shapes"][size.shape]["figures"]


STAGES: dict[str, tuple[Callable[[Size], Figures], float]] = {  # and the seconds it may take
    "floors": (floors, 40),
    "agreement": (agreement, 70),
    "passes": (passes, 120),
    "listening": (listening, 100),
    "small_weights": (small_weights, 60),
    "beside": (beside, 60),
}


# ---- how it is measured


def _model(size: Size) -> Gemma:
    dtype = torch.float32 if size.device.type == "cpu" else torch.bfloat16
    return alone.random_model(GemmaConfig.from_json(SHAPES[size.shape]()), size.device, dtype)


def _ms(size: Size, run: Callable[[], object]) -> float:
    """Milliseconds from the call until the device is done, the median of some rounds after three that do not count."""
    settle: Callable[[], object] = torch.cuda.synchronize if size.device.type == "cuda" else lambda: None
    times = []
    for number in range(-3, size.rounds):
        settle()
        begun = perf_counter()
        run()
        settle()
        if number >= 0:
            times.append(1000 * (perf_counter() - begun))
    return median(times)


def _read_ms(size: Size, count: int) -> float:
    """Of so many bytes, read once in one piece."""
    block = torch.zeros(min(count, size.block) // 4, dtype=torch.int32, device=size.device)
    return _ms(size, block.max) * count / block.nbytes


def _profile(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """The kernels of one call: names, how many, milliseconds of all; the longest first."""
    run()
    with torch.profiler.profile() as profile:
        run()
    found = [
        (event.key[:60], event.count, (event.self_device_time_total or event.self_cpu_time_total) / 1000)
        for event in profile.key_averages()
    ]
    return sorted(found, key=lambda event: -event[2])[:12]


def _difference(model: Gemma, ours: ForwardPass, theirs: ForwardPass) -> float:
    """The largest relative difference of hidden states over passes that mix steps, chunks and pictures, round the rings."""
    rows = [[forward.cache.claim() for _ in range(4)] for forward in (ours, theirs)]
    generator, worst = torch.Generator(model.device).manual_seed(0), 0.0
    for counts in [(1, 20, 7, 1), (60, 0, 0, 3), (1, 1, 1, 1), (0, 0, 30, 1), (5, 0, 0, 0)] * 4:
        x = torch.randn(sum(counts), model.config.hidden_size, device=model.device, generator=generator).to(model.dtype)
        found: list[Tensor] = []
        for forward, places in zip((ours, theirs), rows, strict=True):
            each = zip(places, counts, strict=True)
            hidden = forward([RowChunk(row, n, ((2, n - 1),) if n > 4 else (), min(n, 2)) for row, n in each if n], x)
            assert hidden is not None
            found.append(hidden.float())
        worst = max(worst, float((found[0] - found[1]).norm() / found[1].norm()))
    return worst


async def _crowd(loaded: LoadedModel, listeners: int, seconds: float) -> tuple[list[float], list[float], int]:
    """Milliseconds from a frame's arrival until it was in its row, milliseconds of passes, and tokens that were written."""
    frame, writers = loaded.model.config.frame, max(1, listeners // 8)
    period = frame / RATE
    noise = (0.1 * np.random.default_rng(0).standard_normal((1, frame))).clip(-1, 1).astype(np.float32)
    with Engine(loaded, listeners + writers, 2048, spares=0) as engine:
        written, begun = 0, perf_counter() + 0.2

        async def listen(feed: SequenceHandle, number: int) -> None:
            for count in range(int(seconds / period)):
                await asyncio.sleep(begun + (count + number / listeners) * period - perf_counter())
                feed.append(Sound.of(noise))

        async def write(feed: SequenceHandle) -> None:
            nonlocal written
            async for _ in feed.generate(tuple(range(20, 30)), sampling=HOW, max_tokens=10**6, seed=0):
                written += 1

        writing = [asyncio.create_task(write(engine.claim(_ignore))) for _ in range(writers)]
        await asyncio.gather(*(listen(engine.claim(_ignore), number) for number in range(listeners)))
        for task in writing:
            task.cancel()
        await asyncio.gather(*writing, return_exceptions=True)
        return [1000 * lag for lag in engine.lags], [1000 * step for step in engine.steps], written


def _ignore(error: Exception) -> None:
    """A row that is lost shows in what is missing."""


def _spread(values: list[float]) -> dict[str, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return {"median": cuts[49], "p95": cuts[94], "p99": cuts[98], "count": len(values)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _allocated(size: Size) -> int:
    return torch.cuda.memory_reserved() if size.device.type == "cuda" else 0


def _peak(size: Size) -> int:
    if size.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(import_module("resource").getrusage(0).ru_maxrss) * 1024


# ---- all of it


def _stage(name: str, size: Size) -> None:
    """Prints each figure as a line of JSON."""
    with torch.inference_mode():
        for key, value in STAGES[name][0](size):
            print(json.dumps([key, value]), flush=True)


def run_all(out: Path, dry: bool) -> bool:
    """Runs the stages, and writes the file after each figure. False where one failed."""
    begun, commit = perf_counter(), subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip(), "dry": dry}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, (_, most) in STAGES.items():
        figures = found[name] = dict[str, Any]()
        limit = min(most, SECONDS - (perf_counter() - begun))
        if limit < 10:
            figures["error"] = "no time was left for it"
            continue
        command = [sys.executable, "-m", "agent.bench.gpu", "--stage", name, *(["--dry-run"] if dry else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            killer = threading.Timer(limit, process.kill)
            killer.start()
            other = deque[str](maxlen=12)
            for text in process.stdout or ():
                print(f"{name}: {text}", end="", flush=True)
                if text.startswith('["'):
                    key, value = json.loads(text)
                    figures[key] = value
                    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                else:
                    other.append(text)
            killer.cancel()
        if process.returncode:
            figures["error"] = f"ended after {limit:.0f} s" if process.returncode == -9 else "".join(other)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{perf_counter() - begun:.0f} s; all of it is in {out}")
    return not any(isinstance(stage, dict) and "error" in stage for stage in found.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m agent.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="where the figures go (default: build/gpu.json)")
    parser.add_argument("--dry-run", action="store_true", help="everything in little on a CPU: figures that say nothing")
    parser.add_argument("--stage", choices=STAGES, help="this one alone, in this process, its figures to standard output")
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device here; --dry-run tries the script on a CPU", file=sys.stderr)
        return 2
    if given.stage:
        _stage(given.stage, DRY if given.dry_run else Size(torch.device("cuda", 0)))
        return 0
    return 0 if run_all(given.out, given.dry_run) else 1


if __name__ == "__main__":
    sys.exit(main())
