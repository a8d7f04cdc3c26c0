"""Latencies on this machine: decode steps while another conversation shows pictures, and the first token by length of speech."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from agent.bench import chart
from agent.bench.figures import Figure, line
from agent.checkpoint import LoadedModel, new_cache, patchify
from agent.engine import Engine, SequenceHandle
from agent.segments import Picture, Segment, View
from agent.tape import Sound
from model.cache import Room
from model.config import CheckpointError
from model.sampling import SamplingParams, sample_one
from model.weights import free_memory
from streams.frames import FRAME, RATE, MediaError
from streams.pictures import decode_picture

LENGTH = 4096  # positions in a row
PICTURES, LARGE, STEPS = 8, 280, 40  # number shown while another is answered; most positions of each; steps before the first
SPEECH, ROUNDS = (2, 5, 10, 20, 30), 5  # seconds of audio after a picture; measurements of each
EMPTY = View((), 0, 0)

Say = Callable[[str], None]


def room(loaded: LoadedModel, rows: int, who: str) -> None:
    """Raises CheckpointError if rows of LENGTH do not fit into free memory."""
    model = loaded.model
    needed = rows * Room(rows, LENGTH, loaded.budget).bytes_per_row(model.config, model.dtype)
    free = free_memory(model.device)
    if free is not None and needed > free:
        raise CheckpointError(f"{who} need {needed / 2**30:.1f} GiB for their rows, {free / 2**30:.1f} free on {model.device}")


# ---- pictures in one conversation during an answer in another


async def pictures(loaded: LoadedModel, picture: bytes, say: Say, count: int = PICTURES) -> dict[str, Any]:
    """The gaps between the steps of an answer while another conversation shows pictures, compared with the bound that they should
    keep: the time of one picture alone, and of one step. Passes lines to `say`, returns all figures."""
    room(loaded, 3, "two speakers")
    prompt, segment = loaded.prompt, _picture(loaded, picture, LARGE)
    sampling = replace(_without_stop(loaded), suppressed=(*loaded.generation.suppressed, *loaded.generation.stop))
    stamps: list[float] = []

    with Engine(loaded, 2, LENGTH) as engine:
        talker, viewer = engine.claim(_ignore), engine.claim(_ignore)

        async def talk() -> None:
            tokens = talker.generate((*prompt.begin(), *prompt.close_turn()), sampling=sampling, max_tokens=LENGTH // 2)
            async for _ in tokens:
                now = perf_counter()
                stamps.append(now)

        async def show() -> tuple[float, float]:
            viewer.rewrite(0, EMPTY)
            begin = perf_counter()
            await _await_first_token(viewer, sampling, segment, (prompt.eoi,))
            return begin, perf_counter()

        await show()
        task = asyncio.create_task(talk())
        while len(stamps) < STEPS and not task.done():
            await asyncio.sleep(0.001)
        if task.done():  # it failed: raises why
            await task
        while_talking = [await show() for _ in range(count)]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        alone = [end - begin for begin, end in [await show() for _ in range(count)]]

    gaps = [(a, b, 1000 * (b - a)) for a, b in pairwise(stamps)]
    undisturbed = median(gap for _, b, gap in gaps if b < while_talking[0][0])
    largest = max((gap for a, b, gap in gaps if any(b > begin and a < end for begin, end in while_talking)), default=0.0)
    bound = 1000 * median(alone) + undisturbed
    size = segment.positions
    figures = [
        Figure("step", "a step of one who talks", "ms", undisturbed),
        Figure("picture", f"a picture of {size} positions, nobody talks", "ms", 1000 * median(alone)),
        Figure("gap", f"largest gap between steps, {count} such pictures", "ms", largest),
        Figure("over_bound", "  over one picture and one step", "×", largest / bound),
    ]
    say("\none talks, another shows pictures")
    for figure in figures:
        say(line(figure))
    return {figure.key: asdict(figure) for figure in figures}


# ---- first token against length of speech


async def first_token(
    loaded: LoadedModel, picture: bytes, say: Say, lengths: Sequence[int] = SPEECH, rounds: int = ROUNDS
) -> list[dict[str, float]]:
    """Milliseconds to the first token by seconds of speech after a picture. Streamed: frames are already in the row; timed are
    the last one, the closing and sampling. Sent again: the whole prompt goes into an emptied row in one pass."""
    room(loaded, len(lengths) + 1, "conversations of several lengths")
    prompt, rng, sampling = loaded.prompt, np.random.default_rng(0), _without_stop(loaded)
    closing = (prompt.eoa, *prompt.close_turn())
    opening, after = (*prompt.begin(), *prompt.open_turn(), prompt.boi), (prompt.eoi, prompt.boa)
    head: tuple[Segment, ...] = (opening, _picture(loaded, picture, loaded.budget), after)
    cache = new_cache(loaded, 1, LENGTH)
    emptied = cache.claim()

    @torch.inference_mode()
    def again(sound: Sound) -> None:
        model = loaded.model
        cache.truncate(emptied, 0)
        pieces, places = (x.to(model.device) for x in patchify(loaded, decode_picture(picture, "the picture"), loaded.budget))
        before, between, end = (model.embed_text(torch.tensor(ids, device=model.device)) for ids in (opening, after, closing))
        heard = model.embed_audio(torch.from_numpy(sound.samples).to(model.device))
        x = torch.cat((before, model.embed_image(pieces, places), between, heard, end))
        blocks = torch.full((1, len(x)), -1)
        blocks[0, len(before) : len(before) + len(pieces)] = 0
        hidden = model.extend(cache, [emptied], x[None], blocks=blocks, wanted=1)
        assert hidden is not None
        sample_one(model.logits(hidden[0, -1]), sampling)

    ours: dict[int, list[float]] = {seconds: [] for seconds in lengths}
    theirs: dict[int, list[float]] = {seconds: [] for seconds in lengths}
    with Engine(loaded, len(lengths), LENGTH, spares=0) as engine:
        kept = {}
        for seconds in lengths:
            sound = Sound.of((0.1 * rng.standard_normal((seconds * RATE // FRAME, FRAME))).clip(-1, 1).astype(np.float32))
            frames = [Sound(sound.data[at : at + 2 * FRAME]) for at in range(0, len(sound.data), 2 * FRAME)]
            row = engine.claim(_ignore)
            row.append(*head)
            for frame in frames[:-1]:
                row.append(frame)
                while row.waiting:
                    await asyncio.sleep(0.001)
            kept[seconds] = row, View((*head, Sound(sound.data[: -2 * FRAME])), 0, 0), frames[-1], sound
        for number in range(-1, rounds):
            for seconds, (row, said, last, sound) in kept.items():
                row.rewrite(said.positions, said)
                begin = perf_counter()
                await _await_first_token(row, sampling, last, closing)
                middle = perf_counter()
                again(sound)
                if number >= 0:
                    ours[seconds].append(1000 * (middle - begin))
                    theirs[seconds].append(1000 * (perf_counter() - middle))
    say(f"\n{'first token after a picture and speech of':<44}{'streamed':>14}{'sent again':>14}{'ratio':>8}")
    found = []
    for seconds in lengths:
        a, b = median(ours[seconds]), median(theirs[seconds])
        ratio = median(y / x for x, y in zip(ours[seconds], theirs[seconds], strict=True))
        found.append({"seconds": seconds, "streamed": a, "sent_again": b, "ratio": ratio})
        say(line(Figure("", f"  {seconds} s", "ms", a, b, ratio)))
    return found


def write(path: Path, found: Sequence[Mapping[str, float]], where: str) -> None:
    """Writes the chart of the figures of `first_token`. Raises MediaError if it cannot be written."""
    series = {
        "streamed while it was spoken": [(x["seconds"], x["streamed"]) for x in found],
        "the whole prompt sent again": [(x["seconds"], x["sent_again"]) for x in found],
    }
    axes = ("length of speech, after one picture", "s"), ("time to first token", "ms")
    try:
        path.write_text(chart.lines(f"First token after the last frame: {where}", *axes, series), encoding="utf-8")
    except OSError as error:
        raise MediaError(f"{path} cannot be written: {error.strerror}") from error


def _picture(loaded: LoadedModel, data: bytes, budget: int) -> Picture:
    height, width = decode_picture(data, "the picture").shape[:2]
    return Picture.of(data, height, width, budget, loaded.model.config.patch)


def _without_stop(loaded: LoadedModel) -> SamplingParams:
    return replace(loaded.generation, greedy=True, stop=frozenset())


async def _await_first_token(row: SequenceHandle, sampling: SamplingParams, *segments: Segment) -> None:
    """Appends the segments, and waits for the first token after them."""
    async for _ in row.generate(*segments, sampling=sampling, max_tokens=1):
        pass


def _ignore(error: Exception) -> None:
    """A lost row is also raised where its tokens are awaited."""
