"""Loads a checkpoint, and works on its rows without the engine: append ids, frames or a picture, generate, transcribe.

Everything here runs on the thread that calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agent.answer_parser import AnswerParser
from agent.prompt import Prompt
from agent.suggestions import Suggestions, read_suggestions
from model import weights
from model.cache import Cache, Room, Row
from model.config import CheckpointError
from model.gemma import Gemma
from model.pixels import patches
from model.quantized import Form
from model.sampling import SamplingParams, sample_one
from model.threads import Threads
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

LENGTH = 8192  # positions of a row, unless the user asks for another
TRANSCRIBE = "Transcribe the speech."


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory: the model, its tokenizer and its defaults."""

    model: Gemma
    tokenizer: Tokenizer
    prompt: Prompt
    generation: SamplingParams
    budget: int  # soft tokens of a picture, unless the user asks for another
    suggestions: Suggestions | None = None  # what to try with it, from its folder


def load(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int | None = None,
    rows: int = 0,
    length: int = LENGTH,
    budget: int | None = None,
    *,
    quantized: Form | None = None,
    head: Form | None = None,
    config_from: str | None = None,
) -> LoadedModel:
    """Loads a checkpoint by folder, hub id or "nano".

    `threads`: of each pass on a CPU (None: chosen by its work). `rows`, `length`, `budget`: rows of so many positions, with
    pictures of up to `budget` soft tokens (None: the checkpoint's), for which there must be memory too. `quantized`: the form in
    which the layers' matrices are held; `head`: that of the head (model/weights.py). `config_from`: the folder or hub id with
    config.json and tokenizer.json, for GGUF files that come without. `progress` receives bytes done and in all. Raises
    CheckpointError or TokenizerError."""
    files: Path = weights.locate(name)
    folder = weights.locate(config_from, weights.CONFIG_FILES) if config_from else files
    if not (folder / "config.json").exists() and list(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} holds GGUF files without config.json and tokenizer.json; name a checkpoint that has them, for example "
            "--config-from google/gemma-4-12B-it"
        )
    tokenizer = Tokenizer.load(folder)  # first, since it is quick to fail
    config = weights.read_config(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}/tokenizer.json has ids up to {tokenizer.vocab_size - 1}; the model's table ends at {config.vocab_size - 1}"
        )
    generation = weights.read_generation(folder, config)
    default_budget, target = weights.read_budget(folder), weights.find_device(device, weights.size(config))
    held_as, room = None if dtype == "auto" else getattr(torch, dtype), Room(rows, length, budget or default_budget)
    model = weights.load(files, target, held_as, progress, room, weights=quantized, head=head, config=folder)
    model.threads = Threads(threads)
    return LoadedModel(model, tokenizer, Prompt(tokenizer, config.media), generation, default_budget, read_suggestions(folder))


def new_cache(loaded: LoadedModel, rows: int, length: int, budget: int | None = None) -> Cache:
    """A cache of `rows` rows of up to `length` positions, for pictures of up to `budget` soft tokens (None: the checkpoint's).
    Raises CheckpointError where it does not fit."""
    model, config = loaded.model, loaded.model.config
    length = min(length, config.max_positions)
    slack = Room(rows, length, budget or loaded.budget).slack(config, model.dtype, weights.free_memory(model.device))
    try:
        return Cache(config, rows, length, slack=slack, device=model.device, dtype=model.dtype)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise CheckpointError(f"{rows} rows of {length:,} positions do not fit on {model.device}; ask for fewer") from error


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; the CPU allocator has no exception class of its own, so its message counts."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def append_ids(loaded: LoadedModel, cache: Cache, row: Row, ids: list[int], *, wanted: bool = False) -> Tensor | None:
    """Appends text and control tokens. Returns the hidden state [H] of the last one if `wanted`, otherwise None."""
    hidden = None
    for start in range(0, len(ids), cache.slack + 1):
        part = torch.tensor(ids[start : start + cache.slack + 1], device=loaded.model.device)
        hidden = loaded.model.extend(cache, [row], loaded.model.embed_text(part)[None], wanted=int(wanted))
    return None if hidden is None else hidden[0, -1]


def append_frame(loaded: LoadedModel, cache: Cache, row: Row, frame: NDArray[np.float32]) -> None:
    """Appends one frame of sound: float32 samples, as many as the checkpoint's config says."""
    samples = torch.as_tensor(frame, device=loaded.model.device)
    loaded.model.extend(cache, [row], loaded.model.embed_audio(samples)[None, None], wanted=0)


def append_picture(loaded: LoadedModel, cache: Cache, row: Row, picture: Tensor, places: Tensor) -> None:
    """Appends a picture in one block: patches [n, 3 * patch^2] and their positions [n, 2] (column, row)."""
    device = loaded.model.device
    x = loaded.model.embed_image(picture.to(device), places.to(device))[None]
    loaded.model.extend(cache, [row], x, blocks=torch.zeros(x.shape[:2], dtype=torch.long), wanted=0)


def patchify(loaded: LoadedModel, picture: NDArray[np.uint8], budget: int) -> tuple[Tensor, Tensor]:
    """A picture uint8 [H, W, 3] as patches and their positions, for `append_picture`. Raises CheckpointError where the model's
    position table is too short."""
    config = loaded.model.config
    pieces, places = patches(picture, budget, config.patch)
    if int(places.max()) >= config.grid:
        raise CheckpointError(
            f"a picture of {int(places.max()) + 1} patches in a line is longer than the model's {config.grid} positions"
        )
    return pieces, places


def generate(
    loaded: LoadedModel,
    cache: Cache,
    row: Row,
    hidden: Tensor,
    sampling: SamplingParams,
    max_tokens: int,
    seed: int | None = None,
) -> Iterator[tuple[int, float]]:
    """Yields tokens with their log-probabilities, the stop token included, from the hidden state [H] of the last position. Each
    token but the last is in the row when the next one is asked for. Also ends where the row is full."""
    generator = Random(seed)
    for number in range(max_tokens):
        with torch.inference_mode():
            token, logp = sample_one(loaded.model.logits(hidden), sampling, generator)
        yield token, logp
        if token in sampling.stop or number + 1 == max_tokens or row.length == cache.length:
            return
        step = append_ids(loaded, cache, row, [token], wanted=True)
        assert step is not None
        hidden = step


def transcribe(loaded: LoadedModel, cache: Cache, row: Row, max_tokens: int = 200) -> str:
    """Transcribes the speech in an open turn, in a fork of the row; the row itself does not change."""
    fork = cache.fork(row)
    try:
        closing = loaded.prompt.text(TRANSCRIBE) + loaded.prompt.close_turn()
        if fork.length + len(closing) > cache.length:
            return ""
        hidden = append_ids(loaded, cache, fork, closing, wanted=True)
        assert hidden is not None
        answer = AnswerParser(loaded.tokenizer)
        for token, _ in generate(loaded, cache, fork, hidden, replace(loaded.generation, greedy=True), max_tokens):
            answer.push(token)
        answer.flush()
        return answer.text.strip()
    finally:
        cache.release(fork)
