"""One question from files, by the way that a live turn takes: the tape, the engine and its row, sound frame by frame, in the
order given. Only nobody has to tell when the turn ends, and the answer is read and not spoken."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.answer import Answer as Written
from agent.answer import Piece
from agent.checkpoint import Loaded
from agent.engine import Engine
from agent.marks import Mark
from agent.prompt import Thought
from agent.record import Record
from agent.segments import Picture, Segment
from agent.tape import Asked, Entry, Opened, Seen, Setting, Sound, Tape, Typed
from agent.view import Budget, view
from model.cache import RowFull
from streams import media_files, pictures
from streams.frames import FRAME, RATE

if TYPE_CHECKING:
    from model.sampling import Generation

LENGTH = 8192  # positions of the row; 128 MiB beside the rings for the 12B
VIDEO_BUDGET = 70


@dataclass(frozen=True)
class Part:
    """A piece of the question; `value` is text or a file's path."""

    kind: Literal["text", "image", "audio", "video"]
    value: str


@dataclass(frozen=True)
class Shown:
    """A picture: its file, what is in it, and its seconds where it is one of a video."""

    data: bytes
    pixels: NDArray[np.uint8]
    seconds: float | None = None


@dataclass(frozen=True)
class Medium:
    """A part that has been read: text, samples, or pictures."""

    text: str = ""
    samples: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    pictures: Sequence[Shown] = ()


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
                media.append(Medium(text=part.value))
            case "audio":
                media.append(Medium(samples=media_files.read_audio(path)))
            case "image":
                pixels = pictures.read_picture(path)
                media.append(Medium(pictures=[Shown(path.read_bytes(), pixels)]))
            case "video":
                media.append(Medium(pictures=[Shown(_png(pixels), pixels, at) for at, pixels in media_files.read_video(path)]))
    return media


def _png(pixels: NDArray[np.uint8]) -> bytes:
    return bytes(cv2.imencode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])


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
    answer, setting = Answer(), Setting(system, thinking=thinking)
    answer.audio_seconds = sum(len(medium.samples) for medium in media) / RATE
    parts = [part for medium in media for part in _parts(medium, budget or loaded.budget)]
    with Engine(loaded, length=LENGTH) as engine:
        answer.prompt_ids = _prompt(loaded, setting, parts, engine.length)
        row = engine.claim(lambda error: None)  # every wait below is told too
        room = Budget(ahead=engine.length, row=engine.length - 1)
        config = loaded.model.config
        record = Record(Tape(), row, loaded.prompt, config, room, "verbatim", room.row, lambda note: None)  # no journal, no notes
        begun = perf_counter()
        record.append(setting)
        record.open(0)
        for part in parts:
            if isinstance(part, Sound):
                async for sound in media_files.play(part.samples.reshape(-1), real_time=real_time):
                    assert record.sound(sound.samples), "_prompt has counted"
            else:
                record.part(part)
        await row.drained()
        asked = perf_counter()
        answer.timings_ms["append"] = (asked - begun) * 1000
        caption = record.caption()
        record.ask()
        await _read_answer(loaded, answer, row.generate(*record.closing(), how=how, most=most, seed=seed), say, asked)
        if caption:
            with suppress(RowFull):  # a prompt that leaves no room to ask for it
                answer.heard = await caption.words(loaded.generation)
    return answer


def _parts(medium: Medium, budget: int) -> list[Typed | Sound | Seen]:
    if medium.text:
        return [Typed(medium.text)]
    if len(medium.samples):
        return [Sound.of(np.pad(medium.samples, (0, -len(medium.samples) % FRAME)).reshape(-1, FRAME))]
    return [_seen(shown, budget if shown.seconds is None else VIDEO_BUDGET) for shown in medium.pictures]


def _seen(shown: Shown, budget: int) -> Seen:
    height, width = shown.pixels.shape[:2]
    return Seen(shown.data, height, width, budget, seconds=shown.seconds)


def _prompt(loaded: Loaded, setting: Setting, parts: Sequence[Typed | Sound | Seen], room: int) -> list[int]:
    """The whole of it in ids, soft tokens as placeholders. Raises RowFull: what cannot fit should not first take minutes."""
    prompt = loaded.prompt
    videos = iter([isinstance(part, Seen) and part.seconds is not None for part in parts if isinstance(part, Seen)])

    def ids(segment: Segment) -> tuple[int, ...]:
        match segment:
            case Picture():
                return (prompt.media.video if next(videos) else prompt.media.image,) * segment.positions
            case Sound():
                return (prompt.media.audio,) * segment.positions
        return segment

    entries: list[Entry] = [setting, Opened(), *parts, Asked()]
    wide = Budget(ahead=1 << 30, row=1 << 30)
    segments = view(entries, prompt, wide, "verbatim", patch=loaded.model.config.patch).segments
    whole = [id for segment in segments for id in ids(segment)]
    if len(whole) + 2 >= room:  # with a place for the end of a run of sound, and one for the answer
        less = "give it less sound, fewer pictures or a smaller budget"
        raise RowFull(f"the prompt takes {len(whole)} positions and a row holds {room}; {less}")
    return whole


async def _read_answer(
    loaded: Loaded,
    answer: Answer,
    tokens: AsyncIterable[tuple[int, float]],
    say: Callable[[str], None],
    asked: float,
) -> None:
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

    async for token, logp in tokens:
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
