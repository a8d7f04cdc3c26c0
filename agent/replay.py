"""A recorded conversation held again: the same frames and inputs in the same order, and a comparison of what is drawn.

Time is the recording's. Before a frame goes in, everything must have come out that had come out by then; so the model may
take as long as it needs. The voice says what it said, in silence. With greedy sampling, or a seed, the ids are the same.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from agent import events
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.events import Event, Input
from agent.recording import FORMAT, beside, ids
from agent.session import Session
from agent.tape import SystemPrompt
from agent.turns import TurnDetectionConfig
from agent.view import Budget
from model.sampling import SamplingParams
from model.vad import Vad
from streams.frames import FRAME, Audio, MediaError
from streams.voice import SpeechChunk, Stream, Word

WAITED = (
    "TurnStarted",
    "TurnStopped",
    "TurnDiscarded",
    "InputTranscribed",
    "PictureAttached",
    "AnswerStarted",
    "OutputCleared",
    "AnswerDone",
)
PATIENCE = 60.0  # seconds for what the recording has and the replay does not
UNSAID = 0.3  # seconds of silence for each word that the recording's voice never came to


@dataclass
class ReplayLog:
    """What a recording says. `lines` with `at`, in order; `said`: how the voice spoke each text."""

    path: Path
    head: dict[str, Any]
    lines: list[dict[str, Any]]
    pictures: dict[int, bytes]
    said: dict[str, deque[list[Any]]]

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == "AnswerDone"]


@dataclass
class Compared:
    """One answer, then and now; ids of an answer that was stopped may go on further on one side. `same`: as far as both go."""

    then: list[int]
    now: list[int]
    text: str
    stopped: bool

    @property
    def same(self) -> bool:
        count = min(len(self.then), len(self.now)) if self.stopped else max(len(self.then), len(self.now))
        return self.then[:count] == self.now[:count]


def read(path: Path) -> ReplayLog:
    """Of the recording `path`, wav or log. Raises MediaError."""
    path = beside(path)
    lines: list[dict[str, Any]] = []
    pictures: dict[int, bytes] = {}
    said: dict[str, deque[list[Any]]] = defaultdict(deque)
    try:
        head, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if head.pop("attend") != FORMAT:
            raise MediaError(f"{path} is the log of another version")
        for line in rest:
            if "data" in line:
                pictures[line["picture"]] = base64.b64decode(line["data"])
            elif "said" in line:
                said[line["said"]].append(line["chunks"])
            else:
                lines.append(line)
    except OSError as error:
        raise MediaError(f"{path}, the recording's log, cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MediaError(f"{path} is not the log of a recording, or is damaged") from error
    if "sampling" not in head:
        raise MediaError(f"{path} was recorded from a server's conversation, whose ids nobody here knows")
    return ReplayLog(path, head, lines, pictures, said)


def settings(head: dict[str, Any]) -> ConversationConfig:
    """With which it was held."""
    sampling = {
        **head["sampling"],
        "stop": frozenset(head["sampling"]["stop"]),
        "suppressed": tuple(head["sampling"]["suppressed"]),
    }
    return ConversationConfig(
        policy=head["policy"],
        budget=Budget(**head["budget"]),
        detection=TurnDetectionConfig(**head["turn_detection"]),
        setting=SystemPrompt(head["setting"]["system"], thinking=head["setting"]["thinking"]),
        camera=head["camera"],
        picture=head["picture"],
        sampling=SamplingParams(**sampling),
        seed=head["seed"],
        max_tokens=head["max_tokens"],
    )


async def replay(log: ReplayLog, engine: Engine) -> list[Compared]:
    """Raises MediaError where the recording's sound is missing."""
    frames = _left(log.path.with_suffix(".wav"))
    voice = _Silent(log) if log.head["rate"] else None
    session = Session(engine, Vad(), voice, settings(log.head))
    again = _Replayed(log, session, frames)
    await session.run(again.inputs(), again.emit)
    return [
        Compared(then["ids"], now, then["text"], then["finish"] == "interrupted")
        for then, now in zip(log.answers, [*again.ids, *[[]] * len(log.answers)], strict=False)
    ]


def _left(path: Path) -> np.ndarray:
    """int16-exact float32 [n, FRAME]: the frames that the session heard."""
    try:
        sound, _ = soundfile.read(path, dtype="int16", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise MediaError(f"{path}, the recording's sound, cannot be read") from error
    frames: np.ndarray = sound[: len(sound) // FRAME * FRAME, 0].astype(np.float32).reshape(-1, FRAME) / np.float32(32768)
    return frames


class _Replayed:
    def __init__(self, log: ReplayLog, session: Session, frames: np.ndarray) -> None:
        self._log, self._session, self._frames = log, session, frames
        self._seen: Counter[str] = Counter()
        self._answers: list[int] = []  # now, by their order
        self._then: dict[int, int] = {}  # the order of the recording's
        self._sent: dict[int, int] = {}  # samples of each answer
        self._changed = asyncio.Event()
        self.ids: list[list[int]] = []

    async def emit(self, event: Event) -> None:
        self._seen[type(event).__name__] += 1
        match event:
            case events.AnswerStarted():
                self._answers.append(event.answer)
            case events.AudioDelta():
                self._sent[event.answer] = max(self._sent.get(event.answer, 0), event.sample + len(event.pcm))
            case events.AnswerDone():
                self.ids.append(ids(self._session, event.answer))
            case events.SessionFailed():
                raise MediaError(f"the conversation failed as it was held again: {event.message}")
        self._changed.set()

    async def inputs(self) -> AsyncIterator[Input]:
        due: Counter[str] = Counter()
        lines, at = iter(self._log.lines), 0
        for line in lines:
            while at < line["at"] and at < len(self._frames):
                await self._until(lambda: due <= self._seen)
                yield Audio(self._frames[at], at * FRAME)
                at += 1
                await asyncio.sleep(0)
            if line.get("event") in WAITED:
                due[line["event"]] += 1
            if line.get("event") == "AnswerStarted":
                self._then[line["answer"]] = len(self._then)
            if "input" in line:
                async for item in self._input(dict(line), due):
                    yield item
        await self._until(lambda: due <= self._seen)

    async def _input(self, line: dict[str, Any], due: Counter[str]) -> AsyncIterator[Input]:
        kind = line.pop("input")
        line.pop("at")
        if kind == "PictureInput":
            if line["picture"] in self._log.pictures:  # all others were forgotten for a newer one
                yield events.PictureInput(self._log.pictures[line["picture"]], line["live"])
            return
        if "answer" in line:
            await self._until(lambda: due <= self._seen)
            order = self._then.get(line["answer"], len(self._answers))
            if order >= len(self._answers):
                return
            line["answer"] = self._answers[order]
            if kind == "PlaybackPosition":
                await self._until(lambda: self._sent.get(line["answer"], 0) >= line["sample"])
        yield getattr(events, kind)(**line)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Or until it will never be: then the two have gone apart, which the comparison shows."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return


class _Silent:
    """The recorded voice without its sound: as long, and with its words where they were."""

    def __init__(self, log: ReplayLog) -> None:
        self.rate, self._said = log.head["rate"], log.said

    def speak(self, text: str, before: str = "") -> Stream:
        chunks = list(self._chunks(text))

        def make(take: Callable[[SpeechChunk], bool], over: threading.Event) -> None:
            for chunk in chunks:
                if not take(chunk):
                    return

        return Stream(make)

    def _chunks(self, text: str) -> Iterator[SpeechChunk]:
        told, at = self._said.get(text), 0
        if not told:
            yield SpeechChunk(np.zeros(round(UNSAID * self.rate * (1 + text.count(" "))), np.float32), 0, ())
            return
        for count, words in told.popleft():
            yield SpeechChunk(np.zeros(count, np.float32), at, tuple(Word(*word) for word in words))
            at += count
