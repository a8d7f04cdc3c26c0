"""Estimates what a machine can run before anything is loaded: memory of weights and rows, and milliseconds a step.

A step reads the layers' weights once for all its rows, and for each row the keys and values that it attends to. Decoding is bound
by memory bandwidth, so bytes over bandwidth is the least time a step can take. On a CPU a chunk of several positions is bound by
arithmetic, whose speed is measured if the machine is this one. All of this is an estimate until `attend bench model` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

import torch
import torch.nn.functional as F

from agent.engine import total_rows
from model import weights
from model.cache import Room
from model.config import GemmaConfig
from model.quantized import Form, QuantizedLinear, quantize

GIB = 1 << 30
CONTEXT = int(0.9 * GIB)  # bytes of a GPU beside weights and rows: CUDA's context, activations and graphs
OVERHEAD = 1.25  # a step's time over the least possible: the aim on a GPU, not measured there
FRAME_MS = 40.0  # each listener sends a frame so often
SHARE = 0.8  # the share of that time that frames may take: the rest is for answers, pictures and delays
MOST_ROWS = 64
LENGTHS = (8192, 4096, 2048, 1024)  # of a row; the first that fits is used
TYPICAL = 1100  # positions in a row: the policy "transcripts" keeps 400 ahead of a live turn
PICTURE = 280  # soft tokens of the largest picture, unless another is asked for
CHUNK = 8  # frames that a CPU processes at once: 320 ms of sound


@dataclass(frozen=True)
class Machine:
    """A machine: `memory` in bytes that are free for the model, `bandwidth` in bytes a second, `kind` "cuda", "cpu" or "mps".
    `position_ms`, for a CPU: milliseconds for one position of a chunk per thousand million weights, on all cores, by form of the
    weights (None: bfloat16)."""

    name: str
    kind: str
    memory: int
    bandwidth: float
    position_ms: dict[Form | None, float] | None = None


@dataclass(frozen=True)
class Plan:
    """What a machine runs: `rows` conversations of `length` positions each; 0 rows where it does not fit. `one_ms` and `all_ms`:
    milliseconds of a step of one row, and of all rows."""

    machine: Machine
    form: Form | None
    weights: int  # bytes
    row: int  # bytes
    rows: int
    spares: int
    length: int
    one_ms: float
    all_ms: float
    listen_ms: float  # time for 40 ms of sound from all listeners: a step on a GPU, frames in chunks of eight on a CPU

    @property
    def total(self) -> int:
        """Bytes of weights, rows and overhead together."""
        return self.weights + (self.rows + self.spares) * self.row + (CONTEXT if self.machine.kind == "cuda" else 0)

    @property
    def keeps_up(self) -> bool:
        """Whether the sound of all listeners is processed as fast as it comes."""
        return self.rows > 0 and self.listen_ms <= SHARE * FRAME_MS


def step_bytes(config: GemmaConfig, form: Form | None, dtype: torch.dtype, rows: int = 1, positions: int = TYPICAL) -> int:
    """Bytes that a decode step of `rows` rows of `positions` each reads: layers and head once, and each row's keys and values."""
    seen = sum(
        2 * (min(positions, config.window) if layer.sliding else positions) * layer.kv_heads * layer.head_dim
        for layer in config.layers
    )
    head = config.vocab_size * config.hidden_size * dtype.itemsize
    return weights.layer_bytes(config, form, dtype) + head + rows * seen * dtype.itemsize


def make(
    config: GemmaConfig,
    machine: Machine,
    form: Form | None,
    *,
    budget: int = PICTURE,
    rows: int | None = None,
    length: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """The plan for a form of the weights, with pictures of up to `budget` soft tokens. `rows` None: as many as fit and keep up,
    at most 64. `length` None: the longest of `LENGTHS` with which at least one row fits."""
    held = weights.weight_bytes(config, form, dtype)
    room = machine.memory - held - (CONTEXT if machine.kind == "cuda" else 0)
    choice, size, count = LENGTHS[-1], 0, 0
    for choice in (length,) if length else LENGTHS:
        size = Room(1, choice, budget).bytes_per_row(config, dtype)
        count = next((n for n in range(rows or MOST_ROWS, 0, -1) if total_rows(n) * size <= room), 0)
        if count and (rows is None or count == rows):
            break
    if rows is not None and count < rows:
        count = 0
    plan = Plan(machine, form, held, size, count, total_rows(count) - count if count else 0, choice, 0, 0, 0)
    plan = _timed(plan, config, dtype)
    while rows is None and plan.rows > 1 and not plan.keeps_up:
        plan = _timed(replace(plan, rows=plan.rows - 1, spares=total_rows(plan.rows - 1) - plan.rows + 1), config, dtype)
    return plan


def _timed(plan: Plan, config: GemmaConfig, dtype: torch.dtype) -> Plan:
    machine = plan.machine

    def step(rows: int) -> float:
        return 1000 * OVERHEAD * step_bytes(config, plan.form, dtype, rows) / machine.bandwidth

    listen = step(max(1, plan.rows))
    if machine.position_ms is not None:  # on a CPU each row's frames are a chunk of their own
        alone = max(step(1) / CHUNK, machine.position_ms[plan.form] * _matrix_numbers(config) / 1e9)
        listen = alone * max(1, plan.rows)
    return replace(plan, one_ms=step(1), all_ms=step(max(1, plan.rows)), listen_ms=listen)


def _matrix_numbers(config: GemmaConfig) -> int:
    shapes = [place.shape for place in weights.layout(config).values() if place.parameter.startswith("blocks.")]
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


# ---- this machine


def measure(device: torch.device, threads: int) -> Machine:
    """Measures this machine, in about a second: its free memory now, and its bandwidth in reading 256 MiB repeatedly."""
    free = weights.free_memory(device) or 0
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return Machine(name, "cuda", free, _bandwidth(device))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        speeds: dict[Form | None, float] = {form: _position_ms(form) for form in (None, "int8", "int4")}
        return Machine(f"this machine, {threads} threads", device.type, free, _bandwidth(device), speeds)
    finally:
        torch.set_num_threads(before)


def _bandwidth(device: torch.device) -> float:
    numbers = torch.zeros(1 << 26, device=device)  # 256 MiB
    return 4 * numbers.numel() / _fastest(lambda: numbers.sum().item())


def _position_ms(form: Form | None, outputs: int = 2048, inputs: int = 4096) -> float:
    """Milliseconds of one position in a chunk of `CHUNK` per thousand million weights, with a matrix too large for the caches."""
    weight, x = torch.randn(outputs, inputs), torch.randn(CHUNK, inputs, dtype=torch.bfloat16)
    held = QuantizedLinear(quantize(weight, form), torch.device("cpu")) if form else weight.to(torch.bfloat16)
    seconds = _fastest(lambda: held(x) if isinstance(held, QuantizedLinear) else F.linear(x, held))
    return 1000 * seconds / CHUNK * 1e9 / (outputs * inputs)


def _fastest(run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several runs."""
    took = []
    for _ in range(times):
        begun = perf_counter()
        run()
        took.append(perf_counter() - begun)
    return min(took)


# ---- what is printed

FORMS: tuple[Form | None, ...] = (None, "int8", "int4")

# Memory in GiB and bandwidth in GB/s as the manufacturers state them, not measured.
KNOWN = (
    ("H100, 80 GB", "cuda", 79, 3350),
    ("L40S or A6000, 48 GB", "cuda", 47, 768),
    ("RTX 5090, 32 GB", "cuda", 31, 1792),
    ("RTX 4090 or 3090, 24 GB", "cuda", 23, 936),
    ("RTX 4080 or 5080, 16 GB", "cuda", 15, 717),
    ("RTX 4070 or 3060, 12 GB", "cuda", 11.3, 360),
)
# A thread of a server's CPU with AVX512-bf16 took, for a position of the 12B (10.9 thousand million numbers in its layers'
# matrices), 287 ms with int4 in chunks of eight and 127 ms with bfloat16 in chunks of 64. Here divided by eight cores, and by
# 1.6 for a desktop's higher clock, which is an estimate.
DESKTOP = Machine("desktop CPU, 8 cores, 64 GB", "cpu", 56 * GIB, 80e9, {None: 0.9, "int8": 2.4, "int4": 2.1})


def known() -> list[Machine]:
    return [Machine(name, kind, int(gib * GIB), 1e9 * speed) for name, kind, gib, speed in KNOWN]


def line(plan: Plan) -> str:
    """One line of the table."""
    start = f"{plan.form or 'bf16':<7}{plan.weights / GIB:>9.1f} GiB"
    if not plan.rows:
        return f"{start}   does not fit: {_instead(plan)}"
    memory = f"{plan.row / GIB:>9.2f} GiB{f'{plan.rows} × {plan.length:,}':>12}{plan.total / GIB:>9.1f} GiB"
    times = f"{plan.one_ms:>10.1f} ms{plan.all_ms:>9.1f} ms{plan.listen_ms:>9.1f} ms"
    return f"{start}{memory}{times}{'' if plan.keeps_up else '   cannot keep up with one listener'}"


def _instead(plan: Plan) -> str:
    needed = plan.weights + 2 * plan.row + (CONTEXT if plan.machine.kind == "cuda" else 0)
    return f"one conversation of {plan.length:,} positions needs {needed / GIB:.1f} GiB, {plan.machine.memory / GIB:.1f} are free"


HEADER = f"{'weights':<7}{'':>13}{'a row':>13}{'rows':>12}{'in all':>13}{'step of one':>13}{'of all':>12}{'listening':>12}"


def table(config: GemmaConfig, machine: Machine, rows: int | None = None, length: int | None = None) -> list[str]:
    """What one machine can run: a line for each form of the weights, and a recommendation."""
    plans = [make(config, machine, form, rows=rows, length=length) for form in FORMS]
    chosen = best(plans)
    if chosen is None:
        advice = "none of these keeps up with one listener; take a smaller model, or a faster machine"
    elif chosen.form is None:
        advice = f"take it as it is: {_conversations(chosen.rows)}"
    else:
        advice = f"take --weights {chosen.form} --rows {chosen.rows}: {_conversations(chosen.rows)}"
    what = f"{machine.name}: {machine.memory / GIB:.1f} GiB free, {machine.bandwidth / 1e9:,.0f} GB/s"
    return [what, HEADER, *map(line, plans), advice]


def _conversations(rows: int) -> str:
    return "one conversation" if rows == 1 else f"{rows} conversations at once"


def best(plans: list[Plan]) -> Plan | None:
    """The plan to recommend: the most exact form of the weights that keeps up, or None."""
    return next((plan for plan in plans if plan.keeps_up), None)
