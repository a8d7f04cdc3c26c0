"""A tiny float32 model with nano's words, for an engine and sessions over it, the plain verbs to compare with, and a door."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Self, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from agent import checkpoint, events, script
from agent.checkpoint import LoadedModel
from agent.engine import SequenceHandle
from agent.prompt import Prompt
from agent.segments import Picture, Segment, View
from agent.session import Session
from agent.tape import Sound
from model.config import GemmaConfig
from model.gemma import Gemma
from model.sampling import SamplingParams, sample
from streams.pictures import decode_picture
from streams.voice import SpeechChunk, Word
from tests.tiny import FRAME, Recipe
from tests.vocabulary import media, tokenizer

TOKENIZER = tokenizer("nano")
PROMPT = Prompt(TOKENIZER, media(TOKENIZER))
END = TOKENIZER.special("<turn|>")
WINDOW = 8

T = TypeVar("T")


@cache
def tiny(frame: int = FRAME) -> LoadedModel:
    raw = Recipe(hub=True, layers="ssfs", window=WINDOW).hub_json()
    raw["text_config"] |= {"vocab_size": TOKENIZER.vocab_size, "max_position_embeddings": 8192}
    raw["audio_config"]["audio_embed_dim"] = frame
    torch.manual_seed(0)
    model = Gemma(replace(GemmaConfig.from_json(raw), media=PROMPT.media))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1 if name == "vision.places" else p.shape[-1] ** -0.5)
    m = PROMPT.media
    sampling = SamplingParams(frozenset({END}), (m.boi, m.eoi, m.boa, m.eoa, m.image, m.audio))
    return LoadedModel(model.eval(), TOKENIZER, PROMPT, sampling, 70)


def greedy(loaded: LoadedModel) -> SamplingParams:
    return replace(loaded.generation, greedy=True, stop=frozenset())


@cache
def jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def picture(loaded: LoadedModel, seed: int = 0) -> Picture:
    pieces, _ = checkpoint.patchify(loaded, decode_picture(jpeg(seed), "it"), loaded.budget)
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

    def __init__(self, loaded: LoadedModel, segments: Iterable[Segment], length: int = 2000) -> None:
        self.loaded, self.cache = loaded, checkpoint.new_cache(loaded, 1, length)
        self.row = self.cache.claim()
        self.hidden: Tensor | None = None
        for segment in segments:
            self.append(segment)

    @torch.inference_mode()
    def append(self, segment: Segment) -> None:
        match segment:
            case Picture():
                pieces, places = checkpoint.patchify(self.loaded, decode_picture(segment.data, "it"), segment.budget)
                checkpoint.append_picture(self.loaded, self.cache, self.row, pieces, places)
            case Sound():
                for frame in segment.samples:
                    checkpoint.append_frame(self.loaded, self.cache, self.row, frame)
            case _:
                self.hidden = checkpoint.append_ids(self.loaded, self.cache, self.row, list(segment), wanted=True)

    def generate(self, sampling: SamplingParams, max_tokens: int) -> list[tuple[int, float]]:
        assert self.hidden is not None
        return list(checkpoint.generate(self.loaded, self.cache, self.row, self.hidden, sampling, max_tokens))

    @torch.inference_mode()
    def logits(self, ids: Iterable[int]) -> Tensor:
        """[n, V] after each of these ids."""
        out = []
        for id in ids:
            self.append((id,))
            assert self.hidden is not None
            out.append(self.loaded.model.logits(self.hidden))
        return torch.stack(out)


async def settled(feed: SequenceHandle) -> None:
    """Until everything is in the row."""
    async with asyncio.timeout(60):
        while feed.waiting:
            await asyncio.sleep(0)


async def written(
    feed: SequenceHandle, *closing: Segment, sampling: SamplingParams, max_tokens: int = 12
) -> list[tuple[int, float]]:
    async with asyncio.timeout(60):
        return [drawn async for drawn in feed.generate(*closing, sampling=sampling, max_tokens=max_tokens)]


def same(mine: list[tuple[int, float]], its: list[tuple[int, float]]) -> bool:
    """The same tokens with the same log-probabilities."""
    return [token for token, _ in mine] == [token for token, _ in its] and np.allclose(
        [logp for _, logp in mine], [logp for _, logp in its], atol=1e-4
    )


# ---- sessions


class Mind:
    """A sampler: what the tiny model says, instead of what it would draw; `PROBE` draws as ever, and keeps the logits."""

    PROBE = replace(greedy(tiny(640)), top_k=63)  # a Generation of its own

    def __init__(self) -> None:
        self._answer, self._captions = deque[int](), deque[int]()
        self._go = threading.Event()
        self._left: int | None = None
        self.logits: list[Tensor] = []
        self.steps, self.thinks = 0, False  # tokens of answers; whether it takes its time
        self.go_on()

    def says(self, *texts: str) -> None:
        """The next answers, or stretches of one; what it was about to say is forgotten."""
        self._answer = deque(id for text in texts for id in (*ids(text), *([] if text.endswith("|>") else [END])))

    def hears(self, *texts: str) -> None:
        self._captions = deque(id for text in texts for id in (*ids(text), END))

    def stop_after(self, tokens: int) -> None:
        """Then the model takes its time, until `go_on`."""
        self._left = tokens
        self._go.clear()

    def go_on(self) -> None:
        self._left = None
        self._go.set()

    def __call__(self, logits: Tensor, generations: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        return torch.cat([self._next(*row) for row in zip(logits.split(1), generations, uniforms, strict=True)], 1)

    def _next(self, logits: Tensor, sampling: SamplingParams, uniform: float) -> Tensor:
        if sampling is self.PROBE:
            self.logits.append(logits[0].clone())
            return sample(logits, [sampling], [uniform])
        return torch.tensor([[float(self._says(sampling))], [0.0]])

    def _says(self, sampling: SamplingParams) -> int:
        if sampling.greedy:
            return self._captions.popleft() if self._captions else END
        id = self._answer.popleft() if self._answer else END
        if self._left == 0:
            self.thinks = True
            assert self._go.wait(30)
            self.thinks = False
        elif self._left:
            self._left -= 1
        self.steps += 1
        return id


class Door(script.Performance):
    """A door whose inputs are put in one by one; it plays what it is sent, and time stands still while the model works."""

    def __init__(self, session: Session) -> None:
        super().__init__([])
        self.session, self.keeps_up = session, True  # every frame is in the row before the next one comes
        self._queue: asyncio.Queue[events.Input | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.run(self.session))
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        assert self._task
        if kind:
            self._task.cancel()
            return
        await self.put(None)
        async with asyncio.timeout(60):
            await self._task

    async def _inputs(self) -> AsyncIterator[events.Input]:
        while (item := await self._queue.get()) is not None:
            yield item
            self._queue.task_done()
        self._queue.task_done()

    async def put(self, *items: events.Input | None) -> None:
        """Returns when the session has taken them, or is over."""
        assert self._task
        for item in items:
            self._queue.put_nowait(item)
        taken = asyncio.create_task(self._queue.join())
        async with asyncio.timeout(60):
            await asyncio.wait({taken, self._task}, return_when=asyncio.FIRST_COMPLETED)
        taken.cancel()

    async def hear(self, pcm: np.ndarray) -> None:
        for frame in np.pad(pcm, (0, -len(pcm) % 640)).reshape(-1, 640):
            async for item in self._frame(frame.astype(np.float32)):
                await self.put(item)
            if self.keeps_up:
                await settled(self.session.record.row)

    async def quiet(self, milliseconds: int) -> None:
        await self.hear(np.zeros(milliseconds * 16, np.float32))

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, kind: type, count: int = 1) -> None:
        """Waits without time passing."""
        async with asyncio.timeout(60):
            while len(self.of(kind)) < count:
                self._changed.clear()
                await self._changed.wait()

    async def answered(self, count: int) -> None:
        """Time passes until so many answers are over, and all captions are there."""
        async with asyncio.timeout(60):
            while len(self.of(events.AnswerDone)) < count or self.session.record.captions:
                await self.quiet(40)
        await settled(self.session.record.row)

    @property
    def sound(self) -> np.ndarray:
        """Of the last answer, laid down where it belongs; what was sent twice must be the same."""
        said = [event for event in self.of(events.AudioDelta) if event.answer == self.of(events.AudioDelta)[-1].answer]
        track = np.full(max(event.sample + len(event.pcm) for event in said), np.nan, np.float32)
        for event in said:
            old = track[event.sample : event.sample + len(event.pcm)]
            assert (np.isnan(old) | (old == event.pcm)).all()
            old[:] = event.pcm
        assert not np.isnan(track).any()
        return track


class Beeps:
    """A voice that takes 300 ms for each word; every sample of it is another."""

    rate = 8000

    def __init__(self, words: int | None = None, trouble: Exception | None = None, stalls: threading.Event | None = None) -> None:
        self._made, self._left, self._trouble, self._stalls = 0, words, trouble, stalls

    def speak(self, text: str, before: str = "") -> Any:
        return _Beep(self._speak(text))

    def _speak(self, text: str) -> Iterator[SpeechChunk]:
        at = 0
        for match in re.finditer(r"\w+", text):
            if self._left == 0:
                if self._stalls:
                    assert self._stalls.wait(30)
                raise self._trouble or RuntimeError("the voice broke")
            self._left = None if self._left is None else self._left - 1
            pcm = (np.arange(2400) + self._made).astype(np.float32) / (1 << 20)
            yield SpeechChunk(pcm, at, (Word(*match.span(), at),))
            self._made, at = self._made + 2400, at + 2400


class _Beep:
    def __init__(self, chunks: Iterator[SpeechChunk]) -> None:
        self._chunks = chunks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __next__(self) -> SpeechChunk:
        return next(self._chunks)
