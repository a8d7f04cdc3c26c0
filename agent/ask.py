"""One question from files, on the same path as a live turn: the tape, the engine and its row, audio frame by frame, in the order
given. Only there is no turn detection, and the answer is not spoken."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.answer_parser import AnswerParser
from agent.checkpoint import LENGTH, LoadedModel
from agent.context import Context
from agent.engine import Engine
from agent.marks import Mark
from agent.prompt import Thought
from agent.segments import Picture, Segment
from agent.tape import Asked, Entry, Opened, Seen, Sound, SystemPrompt, Tape, Typed
from agent.view import Budget, view
from model.cache import RowFull
from streams import media_files, pictures
from streams.frames import FRAME, RATE
from streams.opencv import cv2

if TYPE_CHECKING:
    from model.sampling import SamplingParams

VIDEO_BUDGET = 70  # soft tokens of each picture of a video
CHUNK = 2  # seconds of a video's audio between two groups of pictures, at least
NEAR = 10  # frames by which audio and pictures may be out of step, so that no word is split: 0.4 s


@dataclass(frozen=True)
class QuestionPart:
    """A part of the question from the command line; `value` is text or the path of a file."""

    kind: Literal["text", "image", "audio", "video"]
    value: str


@dataclass(frozen=True)
class QuestionMedia:
    """A question whose files have been read: the entries for the tape, in order."""

    parts: tuple[Typed | Sound | Seen, ...]
    audio_seconds: float

    @property
    def last_picture(self) -> bytes | None:
        """The file of the picture on which marks are drawn, if there is one."""
        return next((part.data for part in reversed(self.parts) if isinstance(part, Seen)), None)


@dataclass
class AskResult:
    """The prompt in ids (soft tokens as placeholders) and the answer. Times in milliseconds."""

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


# ---- the question


def read(parts: Sequence[QuestionPart], *, soundtracks: bool = True) -> QuestionMedia:
    """Reads all files of the question, so that a bad one is found before a model is loaded. Blocks. Raises MediaError.

    `soundtracks`: the audio of a video is part of the question too, interleaved with its pictures.
    """
    read: list[Typed | Sound | Seen] = []
    seconds = 0.0
    for part in parts:
        match part.kind:
            case "text":
                read.append(Typed(part.value))
            case "audio":
                samples = media_files.read_audio(part.value)
                seconds += len(samples) / RATE
                read.append(_sound(samples))
            case "image":
                data = pictures.load_picture(part.value)
                height, width = pictures.decode_picture(data, part.value).shape[:2]
                read.append(Seen(data, height, width))
            case "video":
                shown = media_files.read_video(part.value)
                samples = media_files.read_soundtrack(part.value) if soundtracks else np.zeros(0, np.float32)
                seconds += len(samples) / RATE
                read += _interleave(shown, samples)
    return QuestionMedia(tuple(read), seconds)


def _interleave(shown: Sequence[tuple[float, NDArray[np.uint8]]], samples: NDArray[np.float32]) -> Iterator[Seen | Sound]:
    """A video's pictures with their times, and between them its audio `samples`, float32 [n] at 16 kHz from 0 s on.

    The pictures of at least CHUNK seconds come first, then the audio of these seconds, which ends where it is quietest: a word
    that is split by a picture is not understood.
    """
    begun = heard = 0  # frames of audio: the start of the pictures since the last piece of audio, and the end of that piece
    for at, pixels in shown:
        now = round(at * RATE / FRAME)
        if now - begun >= CHUNK * RATE // FRAME and heard * FRAME < len(samples):
            end = _quietest(samples, now)
            yield _sound(samples[heard * FRAME : end * FRAME])
            begun, heard = now, end
        height, width = pixels.shape[:2]
        png = cv2.imencode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        yield Seen(png, height, width, VIDEO_BUDGET, seconds=at)
    if heard * FRAME < len(samples):
        yield _sound(samples[heard * FRAME :])


def _quietest(samples: NDArray[np.float32], near: int) -> int:
    """The frame within NEAR of this one around which 200 ms are quietest: shorter silence may be a plosive, and not a pause."""
    first = near - NEAR
    frames = samples[first * FRAME : (near + NEAR) * FRAME]
    if len(frames) < 2 * NEAR * FRAME:
        return near
    energy = (frames.reshape(-1, FRAME) ** 2).sum(axis=1)
    return first + 2 + int(np.convolve(energy, np.ones(5), "valid").argmin())


def _sound(samples: NDArray[np.float32]) -> Sound:
    """The samples as whole frames, padded with zeros."""
    return Sound.of(np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME))


def _prompt_ids(loaded: LoadedModel, setting: SystemPrompt, parts: Sequence[Typed | Sound | Seen], length: int) -> list[int]:
    """The whole prompt in ids, soft tokens as placeholders. Raises RowFull at once, and not after minutes of prefill."""
    prompt = loaded.prompt
    videos = iter([part.seconds is not None for part in parts if isinstance(part, Seen)])

    def ids(segment: Segment) -> tuple[int, ...]:
        match segment:
            case Picture():
                return (prompt.media.video if next(videos) else prompt.media.image,) * segment.positions
            case Sound():
                return (prompt.media.audio,) * segment.positions
        return segment

    entries: list[Entry] = [setting, Opened(), *parts, Asked()]
    unlimited = Budget(ahead=1 << 30, row=1 << 30)
    segments = view(entries, prompt, unlimited, "verbatim", patch=loaded.model.config.patch).segments
    whole = [id for segment in segments for id in ids(segment)]
    if len(whole) + 2 >= length:  # with a position for the end of the audio, and one for the answer
        film = any(isinstance(part, Seen) and part.seconds is not None for part in parts)
        less = "leave the video's sound out with --no-sound, or give it " if film else "give it "
        less += "less sound, fewer pictures or a smaller budget"
        raise RowFull(f"the prompt takes {len(whole)} positions and a row holds {length}; {less}")
    return whole


# ---- the answer


async def ask(
    loaded: LoadedModel,
    question: QuestionMedia,
    *,
    sampling: SamplingParams,
    system: str | None = None,
    budget: int | None = None,
    max_tokens: int = 256,
    seed: int | None = None,
    thinking: bool = False,
    real_time: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> AskResult:
    """Appends the question to a row and generates the answer. `on_text` is called with its text as it comes.

    `budget`: soft tokens of a picture, by default the checkpoint's. Raises RowFull if the question does not fit.
    """
    setting = SystemPrompt(system, thinking=thinking)
    result = AskResult(audio_seconds=question.audio_seconds)
    parts = [_with_budget(part, budget or loaded.budget) for part in question.parts]
    with Engine(loaded, length=LENGTH, budget=max(budget or loaded.budget, VIDEO_BUDGET)) as engine:
        result.prompt_ids = _prompt_ids(loaded, setting, parts, engine.length)
        row = engine.claim(lambda error: None)  # errors are also raised by each wait below
        limits = Budget(ahead=engine.length, row=engine.length - 1)
        config = loaded.model.config
        context = Context(Tape(), row, loaded.prompt, config, limits, "verbatim", limits.row, lambda note: None)
        begun = perf_counter()
        context.append(setting)
        context.open(0)
        for part in parts:
            if isinstance(part, Sound):
                async for sound in media_files.play(part.samples.reshape(-1), real_time=real_time):
                    assert context.sound(sound.samples), "_prompt_ids has counted"
            else:
                context.part(part)
        await row.drained()
        asked = perf_counter()
        result.timings_ms["append"] = (asked - begun) * 1000
        caption = context.caption()
        context.ask()
        tokens = row.generate(*context.closing(), sampling=sampling, max_tokens=max_tokens, seed=seed)
        await _read_answer(loaded, result, tokens, on_text, asked)
        if caption:
            with suppress(RowFull):  # the prompt leaves no room for a transcript
                result.heard = await caption.words(loaded.generation)
    return result


def _with_budget(part: Typed | Sound | Seen, budget: int) -> Typed | Sound | Seen:
    return replace(part, budget=budget) if isinstance(part, Seen) and part.seconds is None else part


async def _read_answer(
    loaded: LoadedModel,
    result: AskResult,
    tokens: AsyncIterable[tuple[int, float]],
    on_text: Callable[[str], None],
    asked: float,
) -> None:
    """Reads tokens (id, log-probability) into `result` until they end."""
    answer, times = AnswerParser(loaded.tokenizer), list[float]()

    async def counted() -> AsyncIterator[tuple[int, float]]:
        async for token, logprob in tokens:
            times.append(perf_counter())
            result.answer_ids.append(token)
            result.logprobs.append(logprob)
            if token in loaded.generation.stop:
                result.finish = "stop"
            yield token, logprob

    async for piece in answer.read(counted()):
        match piece:
            case str():
                on_text(piece)
            case Mark():
                result.marks.append(piece)
            case Thought():
                result.thought += piece.text
            case _:
                result.finish = "tool_call"
    result.text = answer.text.strip()
    first, last = (times[0], times[-1]) if times else (asked, asked)
    result.timings_ms["last_frame_to_first_token"] = (first - asked) * 1000
    result.timings_ms["per_token"] = (last - first) * 1000 / max(1, len(times) - 1)
