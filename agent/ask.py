"""One question from files, by the way that live frames take: sound goes into the row frame by frame, in the order given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent import checkpoint
from agent.answer import Answer as Written
from agent.answer import Piece
from agent.checkpoint import Loaded
from agent.marks import Mark
from agent.prompt import Thought
from model.cache import RowFull
from streams import files
from streams.frames import RATE, Framer

if TYPE_CHECKING:
    from torch import Tensor

    from model.sampling import Generation

LENGTH = 8192  # positions of the row; 128 MiB beside the rings for the 12B
VIDEO_BUDGET = 70


@dataclass(frozen=True)
class Part:
    """A piece of the question; `value` is text or a file's path."""

    kind: Literal["text", "image", "audio", "video"]
    value: str


@dataclass(frozen=True)
class Medium:
    """A part that has been read: text, samples, or pictures with their seconds."""

    kind: str
    text: str = ""
    samples: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    pictures: Sequence[tuple[float, NDArray[np.uint8]]] = ()


@dataclass
class Answer:
    """What was asked, in ids (soft tokens as placeholders), and what came. Times in milliseconds."""

    text: str = ""
    thought: str = ""
    marks: list[Mark] = field(default_factory=list)
    heard: str | None = None
    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "length"
    timings_ms: dict[str, float] = field(default_factory=dict)
    audio_seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        marks = [{"box_2d": list(mark.box), "label": mark.label} for mark in self.marks]
        return {**vars(self), "marks": marks}


def read(parts: Sequence[Part]) -> list[Medium]:
    """Reads every file of the question, so that a bad one is found before a model is loaded. Raises MediaError."""
    media = []
    for part in parts:
        path = Path(part.value)
        match part.kind:
            case "text":
                media.append(Medium("text", text=part.value))
            case "audio":
                media.append(Medium("audio", samples=files.read_audio(path)))
            case "image":
                media.append(Medium("image", pictures=[(0.0, files.read_picture(path))]))
            case "video":
                media.append(Medium("video", pictures=files.read_video(path)))
    return media


async def ask(
    loaded: Loaded,
    media: Sequence[Medium],
    *,
    how: Generation,
    system: str | None = None,
    budget: int | None = None,
    most: int = 256,
    seed: int | None = None,
    thinking: bool = False,
    real_time: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Feeds the question and generates. `say` is told the answer's text as it comes. Raises RowFull if it does not fit."""
    prompt, answer = loaded.prompt, Answer()
    cache = checkpoint.new_cache(loaded, 2, LENGTH)  # the second row is for the transcript
    row = cache.claim()
    begun = perf_counter()

    def write(ids: list[int], wanted: bool = False) -> Tensor | None:
        answer.prompt_ids += ids
        return checkpoint.append_ids(loaded, cache, row, ids, wanted=wanted)

    cuts = [_cut(loaded, medium, budget or loaded.budget) for medium in media]
    opening = prompt.begin(system, thinking=thinking) + prompt.open_turn()
    closing = prompt.close_turn(thinking)
    _check_room(loaded, media, cuts, len(opening) + len(closing), cache.length)
    write(opening)
    for medium, cut in zip(media, cuts, strict=True):
        match medium.kind:
            case "text":
                write(prompt.text(medium.text))
            case "audio":
                write([prompt.boa])
                framer = Framer(loaded.model.config.frame)
                async for sound in files.play(medium.samples, real_time=real_time):
                    for frame in framer.push(sound.samples):
                        checkpoint.append_frame(loaded, cache, row, frame)
                        answer.prompt_ids.append(prompt.media.audio)
                assert not framer.flush(), "a frame of the checkpoint divides 640 samples"
                answer.audio_seconds += len(medium.samples) / RATE
                write([prompt.eoa])
            case _:
                for number, ((seconds, _), (pieces, places)) in enumerate(zip(medium.pictures, cut, strict=True)):
                    if medium.kind == "video":
                        write(prompt.timestamp(seconds, first=number == 0))
                    write([prompt.boi])
                    checkpoint.append_picture(loaded, cache, row, pieces, places)
                    answer.prompt_ids += [prompt.media.video if medium.kind == "video" else prompt.media.image] * len(pieces)
                    write([prompt.eoi])
    asked = perf_counter()
    listened = row.length
    hidden = write(closing, wanted=True)
    assert hidden is not None
    _read_answer(loaded, answer, checkpoint.generate(loaded, cache, row, hidden, how, most, seed), say, asked)
    answer.timings_ms["append"] = (asked - begun) * 1000
    if answer.audio_seconds and listened >= cache.earliest(row):
        cache.truncate(row, listened)
        answer.heard = checkpoint.transcribe(loaded, cache, row)
    return answer


def _cut(loaded: Loaded, medium: Medium, budget: int) -> list[tuple[Tensor, Tensor]]:
    return [checkpoint.cut(loaded, picture, VIDEO_BUDGET if medium.kind == "video" else budget) for _, picture in medium.pictures]


def _check_room(loaded: Loaded, media: Sequence[Medium], cuts: list[list[tuple[Tensor, Tensor]]], around: int, room: int) -> None:
    """Before anything is fed: a prompt that cannot fit should not first take minutes."""
    needed = around
    for medium, cut in zip(media, cuts, strict=True):
        needed += len(loaded.prompt.text(medium.text)) if medium.text else 0
        needed += -(-len(medium.samples) // loaded.model.config.frame) + 2 if medium.kind == "audio" else 0
        needed += sum(len(pieces) + 2 for pieces, _ in cut)
    if needed >= room:
        raise RowFull(
            f"the prompt takes {needed} positions and a row holds {room}; give it less sound, fewer pictures or a smaller budget"
        )


def _read_answer(loaded: Loaded, answer: Answer, tokens: Any, say: Callable[[str], None], asked: float) -> None:
    written = Written(loaded.tokenizer)
    first = last = asked

    def take(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            match piece:
                case str():
                    say(piece)
                case Mark():
                    answer.marks.append(piece)
                case Thought():
                    answer.thought += piece.text
                case _:
                    answer.finish = "tool_call"

    for token, logp in tokens:
        last = perf_counter()
        first = last if first == asked else first
        answer.answer_ids.append(token)
        answer.logprobs.append(logp)
        if token in loaded.generation.stop:
            answer.finish = "stop"
        take(written.push(token))
    take(written.flush())
    answer.text = written.text.strip()
    count = len(answer.answer_ids)
    answer.timings_ms["last_frame_to_first_token"] = (first - asked) * 1000
    answer.timings_ms["per_token"] = (last - first) * 1000 / max(1, count - 1)
