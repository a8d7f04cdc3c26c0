"""The model alone, measured on this machine: appending audio, time to first token, decode steps, memory of rows. Where
transformers is installed, its model is measured in the same run with the same weights. Neither is compiled.

Contenders take turns, round by round, and a ratio is the median over rounds, so that a busy machine slows all alike.
Weights, audio and pictures are random, which does not change the time. transformers is called as a bare module, without
generate(), and takes the likeliest token without suppressing any; both are in its favour.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from agent.bench import contention, machine, reference
from agent.bench.figures import Figure, line
from agent.bench.shapes import SHAPES
from model import weights
from model.cache import SLACK, Cache, Row
from model.config import CheckpointError, GemmaConfig
from model.gemma import Gemma
from model.sampling import SamplingParams, sample_one
from model.threads import Threads
from streams.frames import RATE

SPEECH, PICTURE = (2, 10, 30), (14, 20)  # seconds; lines and columns of patches: 280 positions
OPENING, CLOSING = 8, 10  # positions before the picture, and between the end of the audio and the answer
LENGTH, ROWS = 4096, len(SPEECH) + 1  # of the cache for prompts; the last row is for forks
CHUNKS, BATCH, DEPTH = (1, 4, 16), (1, 4, 16), 512  # frames at a time; rows of one step, positions in each
GREEDY = SamplingParams(stop=frozenset(), suppressed=(0,), greedy=True)

Times = Mapping[str, list[float]]  # seconds of each contender, by round


@dataclass(frozen=True)
class Effort:
    """A comparison runs for `seconds`, but at least `min_rounds` and at most `max_rounds` rounds."""

    seconds: float = 3.0
    min_rounds: int = 2
    max_rounds: int = 50


@dataclass(frozen=True)
class BenchPrompt:
    """Opening, picture, audio, closing; `ids` has placeholders for the media."""

    ids: Tensor
    patches: Tensor
    places: Tensor
    frames: Tensor


@dataclass(frozen=True)
class BenchSetup:
    """What a shape is measured with; `prompts` and `rows` by seconds of speech. `reference`: transformers' model, or None."""

    model: Gemma
    transformers: Any
    reference: Any
    cache: Cache
    rows: Mapping[int, Row]
    prompts: Mapping[int, BenchPrompt]
    effort: Effort


def model(
    shapes: list[str] | None,
    device: str,
    say: Callable[[str], None],
    effort: Effort | None = None,
    threads: int | None = None,
    busy: bool = False,
) -> dict[str, Any]:
    """Measures `shapes` (None: nano, mid, and 12b on a GPU), passes the lines of a table to `say`, and returns all figures. With
    `busy` it measures passes beside busy processes instead.

    Raises CheckpointError for a device that does not exist and for a shape that does not fit on it."""
    place, meter = weights.find_device(device, math.inf), machine.Meter()
    if busy:
        result = {}
        for name in shapes or ["nano"]:
            say(f"\n{name} on {place}, torch {torch.__version__}: medians / p99 in milliseconds")
            result[name] = contention.table(_random(name, place), say)
        return {"device": str(place), "torch": torch.__version__, "busy": result}
    transformers = reference.transformers(say)
    version = transformers.__version__ if transformers else None
    say(f"on {place}, torch {torch.__version__}; medians of contenders taking turns, with the same threads")
    say(f"beside transformers {version}" if transformers else "transformers is not installed here: attend's column alone")
    result = {}
    for name in shapes or ["nano", "mid", *(["12b"] if place.type == "cuda" else [])]:
        with torch.inference_mode():
            s = _prepare(name, place, transformers, effort or Effort(), Threads(threads))
            result[name] = _measure(name, s, say)
    load = meter.read()
    if load:
        say(f"\n{load}")
    there = {"device": str(place), "torch": torch.__version__, "transformers": version, "load": load and asdict(load)}
    return {**there, "shapes": result}


def _measure(name: str, s: BenchSetup, say: Callable[[str], None]) -> dict[str, Any]:
    config, size, dtype = s.model.config, sum(p.numel() for p in s.model.parameters()), str(s.model.dtype).removeprefix("torch.")
    shape = f"hidden {config.hidden_size}, {len(config.layers)} layers, vocabulary {config.vocab_size:,}"
    counts = [s.model.threads.count(s.model.product, positions) for positions in (1, BATCH[-1])]
    counts.append(s.model.threads.count(s.model.vision.dense.weight.numel(), math.prod(PICTURE)))
    say(f"\n{name}: {shape}, {size / 1e6:,.1f} M parameters, {dtype}")
    if s.model.device.type == "cpu":
        say("threads of a step {}, of one of {} rows {}, of a picture's embedding {}".format(counts[0], BATCH[-1], *counts[1:]))
    differ = None
    if s.reference:
        # Both get the picture without its block: transformers 5.23 as a bare module lets its positions see one another on full
        # layers too, which the model was not trained with.
        theirs = _reference_prompt(s, SPEECH[0], seen=False).logits[0, -1].float()
        differ = float((_whole_prompt(s, SPEECH[0], seen=False) - theirs).abs().max())
        same = differ < (1e-2 if s.model.dtype == torch.float32 else 0.5)
        say(f"both give the same logits to {differ:.0e}" if same else f"NOT COMPARABLE: their logits differ by {differ:.2g}")
    elif s.transformers:
        say("transformers' copy of the weights does not fit beside: attend's column alone")
    say(f"{'':44}{'attend':>14}{'transformers':>14}{'ratio':>8}")
    figures = {}
    _whole_prompt(s, 10)  # audio is appended and steps are run after that
    for measure in (_append, _step, _first_token, _batched_steps, _step_beside_busy, _rows):
        for figure in measure(s):
            say(line(figure))
            figures[figure.key] = asdict(figure)
    return {"parameters": size, "dtype": dtype, "threads": counts, "logits_differ_by": differ, "figures": figures}


def _prepare(name: str, device: torch.device, transformers: Any, effort: Effort, threads: Threads) -> BenchSetup:
    raw = SHAPES[name]()
    gemma, config = _random(name, device), GemmaConfig.from_json(raw)
    gemma.threads = threads
    size, free = sum(p.nbytes for p in gemma.parameters()), weights.free_memory(device)
    # On a CPU transformers uses the same tensors; on a GPU it makes a copy, through host memory.
    room = min(weights.free_memory(torch.device("cpu")) or 0, (free or 0) - _rows_bytes(config, gemma.dtype))
    copy = _reference_model(gemma, raw, transformers) if transformers and (device.type == "cpu" or room > 1.1 * size) else None
    cache = Cache(config, ROWS, LENGTH, device=device, dtype=gemma.dtype)
    generator = torch.Generator(device).manual_seed(1)
    prompts = {seconds: _prompt(config, seconds, generator) for seconds in SPEECH}
    return BenchSetup(gemma, transformers, copy, cache, {seconds: cache.claim() for seconds in SPEECH}, prompts, effort)


def _rows_bytes(config: GemmaConfig, dtype: torch.dtype) -> int:
    """Bytes of all rows."""
    prompt, batched = (Cache.bytes_per_row(config, *x, dtype) for x in ((LENGTH, SLACK), (2 * DEPTH, 0)))
    return ROWS * prompt + BATCH[-1] * batched


def _random(name: str, device: torch.device) -> Gemma:
    """A model of this shape with random weights. Raises CheckpointError if it and its rows do not fit."""
    config, dtype = GemmaConfig.from_json(SHAPES[name]()), torch.float32 if device.type == "cpu" else torch.bfloat16
    free, needed = weights.free_memory(device), weights.size(config) * dtype.itemsize + _rows_bytes(config, dtype)
    if free is not None and needed > free:
        raise CheckpointError(f"measuring {name} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} free on {device}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return random_model(config, device, dtype)


def random_model(config: GemmaConfig, device: torch.device, dtype: torch.dtype) -> Gemma:
    """A model with random weights that gives finite, varied logits."""
    with torch.device("meta"):
        gemma = Gemma(config).to(dtype)
    gemma.to_empty(device=device).eval().requires_grad_(False)
    weights.lay_out(gemma)
    generator = torch.Generator(device).manual_seed(0)
    for key, p in gemma.named_parameters():
        if p.ndim > 1:
            p.uniform_(-1, 1, generator=generator).mul_(math.sqrt(3 / p.shape[-1]))
        else:  # attention has no other scale: without a small q_norm, random heads would attend to one position
            p.fill_(0 if key.endswith("bias") else p.numel() ** -0.5 if key.endswith("q_norm") else 1)
    return gemma


def _reference_model(gemma: Gemma, raw: dict[str, Any], transformers: Any) -> Any:
    own, config = dict(gemma.named_parameters()), transformers.Gemma4UnifiedConfig.from_dict(raw)
    state = {key: own[place.parameter][place.start : place.stop] for key, place in weights.layout(gemma.config).items()}
    kind = transformers.Gemma4UnifiedForConditionalGeneration
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=gemma.dtype).to(gemma.device).eval()


def _prompt(config: GemmaConfig, seconds: int, generator: torch.Generator) -> BenchPrompt:
    device, media, patches, count = generator.device, config.media, math.prod(PICTURE), seconds * RATE // config.frame
    words = torch.randint(20, 1000, (OPENING + CLOSING - 1,), generator=generator, device=device).tolist()
    sound = [media.boa, *[media.audio] * count, media.eoa]
    ids = [*words[:OPENING], media.boi, *[media.image] * patches, media.eoi, *sound, *words[OPENING:]]
    pixels = torch.rand(patches, 3 * config.patch**2, generator=generator, device=device)
    places = torch.cartesian_prod(*map(torch.arange, PICTURE)).flip(-1).to(device)
    frames = 0.1 * torch.randn(count, config.frame, generator=generator, device=device)
    return BenchPrompt(torch.tensor(ids, device=device), pixels, places, frames)


def _rounds(s: BenchSetup, contenders: Mapping[str, Callable[[], object]], warm: bool = True) -> Times:
    """Runs the contenders in turn, round by round. With `warm`, the first round does not count."""
    settle: Callable[[], None] = (lambda: None) if s.model.device.type == "cpu" else torch.accelerator.synchronize
    times: dict[str, list[float]] = {name: [] for name in contenders}
    rounds, begun = -int(warm), perf_counter()
    while rounds < s.effort.min_rounds or (rounds < s.effort.max_rounds and perf_counter() - begun < s.effort.seconds):
        for name, run in contenders.items():
            settle()
            start = perf_counter()
            run()
            settle()
            if rounds >= 0:
                times[name].append(perf_counter() - start)
        rounds += 1
    return times


def _figure(key: str, what: str, times: Times, ours: str, theirs: str = "", note: str = "", *, of: int = 0) -> Figure:
    """Milliseconds, or positions per second if a run appends `of`; without `theirs`, one column."""
    a, b = median(times[ours]), median(times.get(theirs, [0.0]))
    ratio = median(y / x for x, y in zip(times[ours], times[theirs], strict=True)) if b else None
    unit = "/s" if of else "ms"
    return Figure(key, what, unit, of / a if of else 1000 * a, (of / b if of else 1000 * b) if b else None, ratio, note)


def _ratio(key: str, what: str, times: Times, a: str, b: str) -> Figure:
    return Figure(key, what, "×", median(x / y for x, y in zip(times[a], times[b], strict=True)))


def _extend(s: BenchSetup, row: Row, x: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Appends x [T, H] to a row; returns the logits of the last position."""
    hidden = s.model.extend(s.cache, [row], x[None], blocks=blocks, wanted=1)
    assert hidden is not None
    return s.model.logits(hidden[0, -1])


def _whole_prompt(s: BenchSetup, seconds: int, seen: bool = True) -> Tensor:
    """Empties a row and appends the whole prompt in one chunk; returns the last logits. `seen`: the picture is one block."""
    prompt, media = s.prompts[seconds], s.model.config.media
    s.cache.truncate(s.rows[seconds], 0)
    looking = prompt.ids == media.image
    x = s.model.embed_text(prompt.ids)
    x[looking] = s.model.embed_image(prompt.patches, prompt.places)
    x[prompt.ids == media.audio] = s.model.embed_audio(prompt.frames)
    return _extend(s, s.rows[seconds], x, torch.where(looking, 0, -1)[None] if seen else None)


def _reference_prompt(s: BenchSetup, seconds: int, seen: bool = True, past: Any = None) -> Any:
    """The same with transformers; returns its output, with logits and a cache."""
    prompt, media = s.prompts[seconds], s.model.config.media
    kinds = ((prompt.ids == media.image) * 1 + (prompt.ids == media.audio) * 3)[None] if seen else None
    pixels = {"pixel_values": prompt.patches[None], "image_position_ids": prompt.places[None], "mm_token_type_ids": kinds}
    rest = {"past_key_values": past, "use_cache": True, "logits_to_keep": 1}
    with s.model.threads.running(s.model.product, len(prompt.ids)):
        return s.reference(input_ids=prompt.ids[None], **pixels, **_audio_inputs(prompt.frames), **rest)


def _audio_inputs(frames: Tensor) -> dict[str, Tensor]:
    return {"input_features": frames[None], "input_features_mask": torch.ones_like(frames[None, :, 0], dtype=torch.bool)}


def _append(s: BenchSetup) -> Iterator[Figure]:
    """Appending audio, after a picture and 10 s of audio; neither side computes logits."""
    row, frames, config = s.cache.fork(s.rows[10]), s.prompts[30].frames, s.model.config
    past = _reference_prompt(s, 10).past_key_values if s.reference else None

    def append(count: int) -> None:
        s.model.extend(s.cache, [row], s.model.embed_audio(frames[:count])[None], wanted=0)

    def their_append(count: int) -> None:
        ids = torch.full((1, count), config.media.audio, device=s.model.device)
        with s.model.threads.running(s.model.product, count):
            s.reference.model(input_ids=ids, **_audio_inputs(frames[:count]), past_key_values=past, use_cache=True)

    feeders = {"attend": append} | ({"theirs": their_append} if s.reference else {})
    runs = {f"{who} {count}": partial(feed, count) for count in CHUNKS for who, feed in feeders.items()}
    times = _rounds(s, runs)
    s.cache.release(row)
    for count in CHUNKS:
        what = f"sound appended {count} at a time"
        yield (figure := _figure(f"append_{count}", what, times, f"attend {count}", f"theirs {count}", of=count))
        pace, their_pace = (x and x * config.frame / RATE for x in (figure.attend, figure.transformers))
        assert pace
        yield Figure(f"real_time_{count}", "  times real time", "×", pace, their_pace)


def _step(s: BenchSetup) -> Iterator[Figure]:
    """A decode step: one token in, the next one sampled, after a picture and 10 s of audio."""
    row, token = s.cache.fork(s.rows[10]), torch.tensor([20], device=s.model.device)
    needed = [p for name, p in s.model.named_parameters() if not name.startswith(("vision.", "audio."))]
    pasts = {}
    if s.reference:  # a static cache is read whole: it is no longer than needed
        length = row.length + s.effort.max_rounds + s.effort.min_rounds + 1
        static = s.transformers.StaticCache(config=s.reference.config, max_cache_len=length)
        pasts = {
            kind: _reference_prompt(s, 10, past=past).past_key_values for kind, past in (("dynamic", None), ("static", static))
        }

    def step() -> None:
        sample_one(_extend(s, row, s.model.embed_text(token)), GREEDY)

    def their_step(past: Any) -> None:
        with s.model.threads.running(s.model.product, 1):
            int(s.reference(input_ids=token[None], past_key_values=past, use_cache=True).logits[0, -1].argmax())

    def read() -> list[Tensor]:
        with s.model.threads.running(s.model.product, 1):
            return [p.sum() for p in needed]

    runs: dict[str, Callable[[], object]] = {"attend": step, "read": read}
    runs |= {kind: partial(their_step, past) for kind, past in pasts.items()}
    times = _rounds(s, runs)
    s.cache.release(row)
    best = min(pasts, key=lambda kind: median(times[kind]), default="")
    note = f"beside its {best} cache, the faster one" if best else ""
    yield _figure("step", "decode step", times, "attend", best, note)
    yield _figure("read", "reading the weights once", times, "read", note="sum() of every tensor that a step reads")
    yield _ratio("step_over_read", "  a step over that", times, "attend", "read")


def _first_token(s: BenchSetup) -> Iterator[Figure]:
    """Time to first token. Streamed: all but the last frame is in the row; timed are it, the closing and sampling."""

    def streamed(seconds: int) -> None:
        row, prompt = s.rows[seconds], s.prompts[seconds]
        s.cache.truncate(row, len(prompt.ids) - CLOSING - 1)
        last, closing = s.model.embed_audio(prompt.frames[-1:]), s.model.embed_text(prompt.ids[-CLOSING:])
        sample_one(_extend(s, row, torch.cat((last, closing))), GREEDY)

    for seconds in SPEECH:
        runs: dict[str, Callable[[], object]] = {
            "whole": partial(_whole_prompt, s, seconds),
            "streamed": partial(streamed, seconds),
        }
        if s.reference:
            runs["theirs"] = partial(_reference_prompt, s, seconds)
        times = _rounds(s, runs, warm=False)
        what, note = f"first token, picture + {seconds} s, streamed", "beside its whole prompt" if s.reference else ""
        yield _figure(f"first_token_{seconds}", what, times, "streamed", "theirs", note)
        yield _figure(f"whole_{seconds}", "  whole prompt at once", times, "whole", "theirs")
    ends = _rounds(s, {"short": partial(streamed, SPEECH[0]), "long": partial(streamed, SPEECH[-1])})
    yield _ratio("flat", f"  streamed, {SPEECH[-1]} s over {SPEECH[0]} s", ends, "long", "short")


def _batched_steps(s: BenchSetup) -> Iterator[Figure]:
    """A decode step of several rows. Their keys are a constant, which does not change the time; untouched memory would."""
    cache = Cache(s.model.config, BATCH[-1], 2 * DEPTH, slack=0, device=s.model.device, dtype=s.model.dtype)
    rows = [cache.claim() for _ in range(BATCH[-1])]
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(0.01)
    for row in rows:
        row.length = row.high = DEPTH

    def step(count: int) -> None:
        hidden = s.model.extend(cache, rows[:count], s.model.embed_text(torch.full((count, 1), 20, device=s.model.device)))
        assert hidden is not None
        s.model.logits(hidden).argmax(-1).tolist()

    times = _rounds(s, {f"{count}": partial(step, count) for count in BATCH})
    for count in BATCH:
        yield _figure(f"rows_{count}", f"step of {count} row{'s' if count > 1 else ''} together", times, f"{count}")
        if count > 1:
            yield _ratio(f"rows_{count}_over_1", "  over one alone", times, f"{count}", "1")


def _step_beside_busy(s: BenchSetup) -> Iterator[Figure]:
    """A decode step beside a busy process: on a CPU every matrix product ends at a barrier for its threads."""
    row, token = s.cache.fork(s.rows[10]), torch.tensor([20], device=s.model.device)
    runs = {"step": lambda: sample_one(_extend(s, row, s.model.embed_text(token)), GREEDY)}
    alone = _rounds(s, runs)
    with machine.busy(0):
        times = _rounds(s, runs)
    s.cache.release(row)
    yield _figure(
        "busy", "decode step beside one busy process", times, "step", note=f"{1000 * max(times['step']):.3g} ms at most"
    )
    yield Figure("busy_over_alone", "  over one alone", "×", median(times["step"]) / median(alone["step"]))


def _rows(s: BenchSetup) -> Iterator[Figure]:
    row = s.rows[SPEECH[-1]]
    end = row.length

    def truncate() -> None:
        row.length = end
        s.cache.truncate(row, end - CLOSING)

    times = _rounds(s, {"fork": lambda: s.cache.release(s.cache.fork(row)), "truncate": truncate})
    yield _figure("fork", f"fork of {end:,} positions", times, "fork")
    yield _figure("truncate", f"truncate by {CLOSING}", times, "truncate")
    yield Figure("weights", "weights", "MiB", sum(p.nbytes for p in s.model.parameters()) / 2**20)
    row_bytes = Cache.bytes_per_row(s.model.config, LENGTH, SLACK, s.model.dtype)
    yield Figure("row", f"a row of {LENGTH:,} positions", "MiB", row_bytes / 2**20)
    peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "by this process so far, whatever it ran"
    if s.model.device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated() / 2**20, "on the device"
    yield Figure("peak", "most memory taken", "MiB", peak, note=where)
