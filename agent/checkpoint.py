"""A checkpoint that is loaded, and the verbs on its rows: append (ids, frames, a picture), generate, transcribe.

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
from model.gemma import CheckpointError, Gemma
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
    model: Gemma
    tokenizer: Tokenizer
    prompt: Prompt
    generation: SamplingParams
    budget: int  # soft tokens of a picture, unless the user asks for another
    suggestions: Suggestions | None = None  # for people who try it


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
    """A checkpoint by folder, hub id or "nano".

    `threads` for each pass on a CPU (None: by its work). There must be memory for `rows` of `length` positions too, with pictures
    of up to `budget` soft tokens (None: the checkpoint's). `quantized`: the form in which the layers' matrices are held, `head`
    that of the head (model/weights.py). `config_from`: the folder or hub id with config.json and tokenizer.json, for GGUF files
    that come without. Raises CheckpointError or TokenizerError."""
    files: Path = weights.locate(name)
    folder = weights.locate(config_from, weights.CONFIG_FILES) if config_from else files
    if not (folder / "config.json").exists() and list(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} holds GGUF files without config.json and tokenizer.json; name a checkpoint that has them, for example "
            "--config-from google/gemma-4-12B-it"
        )
    tokenizer = Tokenizer.load(folder)  # first: it is quick to find missing
    config = weights.read_config(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}/tokenizer.json has ids up to {tokenizer.vocab_size - 1}; the model's table ends at {config.vocab_size - 1}"
        )
    generation = weights.read_generation(folder, config)
    usual, place = weights.read_budget(folder), weights.find_device(device, weights.size(config))
    number, room = None if dtype == "auto" else getattr(torch, dtype), Room(rows, length, budget or usual)
    model = weights.load(files, place, number, progress, room, weights=quantized, head=head, config=folder)
    model.threads = Threads(threads)
    return LoadedModel(model, tokenizer, Prompt(tokenizer, config.media), generation, usual, read_suggestions(folder))


def new_cache(loaded: LoadedModel, rows: int, length: int, budget: int | None = None) -> Cache:
    """Rows that take pictures of up to `budget` soft tokens (None: the checkpoint's). Raises CheckpointError where they do not
    fit."""
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
    """A CPU's allocator has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def append_ids(loaded: LoadedModel, cache: Cache, row: Row, ids: list[int], *, wanted: bool = False) -> Tensor | None:
    """Text and control tokens. Returns the hidden state [H] of the last one if it is wanted."""
    hidden = None
    for start in range(0, len(ids), cache.slack + 1):
        part = torch.tensor(ids[start : start + cache.slack + 1], device=loaded.model.device)
        hidden = loaded.model.extend(cache, [row], loaded.model.embed_text(part)[None], wanted=int(wanted))
    return None if hidden is None else hidden[0, -1]


def append_frame(loaded: LoadedModel, cache: Cache, row: Row, frame: NDArray[np.float32]) -> None:
    """One frame of sound, as many samples as the checkpoint's config says."""
    samples = torch.as_tensor(frame, device=loaded.model.device)
    loaded.model.extend(cache, [row], loaded.model.embed_audio(samples)[None, None], wanted=0)


def append_picture(loaded: LoadedModel, cache: Cache, row: Row, picture: Tensor, places: Tensor) -> None:
    """Patches [n, 3 * patch^2] and their places [n, 2]: one block in one call."""
    device = loaded.model.device
    x = loaded.model.embed_image(picture.to(device), places.to(device))[None]
    loaded.model.extend(cache, [row], x, blocks=torch.zeros(x.shape[:2], dtype=torch.long), wanted=0)


def patchify(loaded: LoadedModel, picture: NDArray[np.uint8], budget: int) -> tuple[Tensor, Tensor]:
    """A picture uint8 [H, W, 3] as patches and places. Raises CheckpointError where the position table is too short."""
    config = loaded.model.config
    pieces, places = patches(picture, budget, config.patch)
    if int(places.max()) >= config.grid:
        raise CheckpointError(
            f"a picture of {int(places.max()) + 1} patches in a line is longer than the model's {config.grid} places"
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
    """Tokens and their log-probabilities from the hidden state [H] of the last position, the stop token included.

    Each token but the last is in the row when the next one is asked for; ends also where the row is full."""
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
    """The words of the speech in an open turn. The row is forked; itself it stays as it is."""
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
