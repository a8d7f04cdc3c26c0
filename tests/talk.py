"""A tiny float32 model with nano's words, for an engine and sessions over it, and the plain verbs to compare with."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import cv2
import numpy as np
import torch
from torch import Tensor

from agent import checkpoint
from agent.checkpoint import Loaded
from agent.engine import Feed
from agent.prompt import Prompt
from agent.segments import Picture, Segment, View
from agent.tape import Sound
from model.gemma import Config, Gemma
from model.sampling import Generation
from streams.files import decode_picture
from tests.tiny import FRAME, Recipe
from tests.vocabulary import media, tokenizer

TOKENIZER = tokenizer("nano")
PROMPT = Prompt(TOKENIZER, media(TOKENIZER))
END = TOKENIZER.special("<turn|>")
WINDOW = 8


@cache
def tiny(frame: int = FRAME) -> Loaded:
    raw = Recipe(hub=True, layers="ssfs", window=WINDOW).hub_json()
    raw["text_config"] |= {"vocab_size": TOKENIZER.vocab_size, "max_position_embeddings": 8192}
    raw["audio_config"]["audio_embed_dim"] = frame
    torch.manual_seed(0)
    model = Gemma(replace(Config.from_json(raw), media=PROMPT.media))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1 if name == "vision.places" else p.shape[-1] ** -0.5)
    m = PROMPT.media
    how = Generation(frozenset({END}), (m.boi, m.eoi, m.boa, m.eoa, m.image, m.audio))
    return Loaded(model.eval(), TOKENIZER, PROMPT, how, 70)


def greedy(loaded: Loaded) -> Generation:
    return replace(loaded.generation, greedy=True, stop=frozenset())


@cache
def jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def picture(loaded: Loaded, seed: int = 0) -> Picture:
    pieces, _ = checkpoint.cut(loaded, decode_picture(jpeg(seed), "it"), loaded.budget)
    return Picture(jpeg(seed), loaded.budget, len(pieces))


def sound(frames: int, seed: int = 0, frame: int = FRAME) -> Sound:
    return Sound.of((0.3 * np.random.default_rng(seed).uniform(-1, 1, (frames, frame))).astype(np.float32))


def ids(text: str) -> tuple[int, ...]:
    """Control tokens by name."""
    out: list[int] = []
    for piece in re.split(r"(<[|a-z_]+>|<\|\"\|>)", text):
        out += [TOKENIZER.special(piece)] if TOKENIZER.has(piece) else TOKENIZER.encode(piece)
    return tuple(out)


def words(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 200, count).tolist())


def viewed(*segments: Segment) -> View:
    return View((), 0, 0).then(*segments)


class Plain:
    """A row of its own cache that holds these segments, by the verbs that need no engine."""

    def __init__(self, loaded: Loaded, segments: Iterable[Segment], length: int = 2000) -> None:
        self.loaded, self.cache = loaded, checkpoint.new_cache(loaded, 1, length)
        self.row = self.cache.claim()
        self.hidden: Tensor | None = None
        for segment in segments:
            self.append(segment)

    @torch.inference_mode()
    def append(self, segment: Segment) -> None:
        match segment:
            case Picture():
                pieces, places = checkpoint.cut(self.loaded, decode_picture(segment.data, "it"), segment.budget)
                checkpoint.append_picture(self.loaded, self.cache, self.row, pieces, places)
            case Sound():
                for frame in segment.samples:
                    checkpoint.append_frame(self.loaded, self.cache, self.row, frame)
            case _:
                self.hidden = checkpoint.append_ids(self.loaded, self.cache, self.row, list(segment), wanted=True)

    def generate(self, how: Generation, most: int) -> list[tuple[int, float]]:
        assert self.hidden is not None
        return list(checkpoint.generate(self.loaded, self.cache, self.row, self.hidden, how, most))

    @torch.inference_mode()
    def logits(self, ids: Iterable[int]) -> Tensor:
        """[n, V] after each of these ids."""
        out = []
        for id in ids:
            self.append((id,))
            assert self.hidden is not None
            out.append(self.loaded.model.logits(self.hidden))
        return torch.stack(out)


async def settled(feed: Feed) -> None:
    """Until everything is in the row."""
    async with asyncio.timeout(30):
        while feed.waiting:
            await asyncio.sleep(0)


async def written(feed: Feed, *closing: Segment, how: Generation, most: int = 12) -> list[tuple[int, float]]:
    async with asyncio.timeout(30):
        return [drawn async for drawn in feed.generate(*closing, how=how, most=most)]


def same(mine: list[tuple[int, float]], its: list[tuple[int, float]]) -> bool:
    """The same tokens with the same log-probabilities."""
    return [token for token, _ in mine] == [token for token, _ in its] and np.allclose(
        [logp for _, logp in mine], [logp for _, logp in its], atol=1e-4
    )
