"""Replays a recorded conversation: the same frames and inputs in the same order, and a comparison of the sampled ids.

Time is the recording's: a frame goes in only when all events have come that came before it in the recording, so the model may
take as long as it needs. The voice is silent, with the recorded timing. With greedy sampling, or a seed, the ids are the same.
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
PATIENCE = 60.0  # seconds to wait for an event of the recording that the replay may not have
UNSAID = 0.3  # seconds of silence for each word of a text that was not spoken in the recording


@dataclass
class ReplayLog:
    """A recording's log. `lines`: inputs and events in order. `said`: the chunks of each text that was spoken."""

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
    """The ids of an answer in the recording (`then`) and in the replay (`now`). One side of an interrupted answer may
    have more ids: `same` compares as far as both go."""

    then: list[int]
    now: list[int]
    text: str
    stopped: bool

    @property
    def same(self) -> bool:
        count = min(len(self.then), len(self.now)) if self.stopped else max(len(self.then), len(self.now))
        return self.then[:count] == self.now[:count]


def read(path: Path) -> ReplayLog:
    """The log of a recording; `path` is its wav or its log. Raises MediaError."""
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
    """The configuration of the recorded conversation."""
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
    """Replays a recording and compares its answers. Raises MediaError if the recording's wav cannot be read."""
    frames = _left(log.path.with_suffix(".wav"))
    voice = _Silent(log) if log.head["rate"] else None
    session = Session(engine, Vad(), voice, settings(log.head))
    replayed = _Replayed(log, session, frames)
    await session.run(replayed.inputs(), replayed.emit)
    return [
        Compared(then["ids"], now, then["text"], then["finish"] == "interrupted")
        for then, now in zip(log.answers, [*replayed.ids, *[[]] * len(log.answers)], strict=False)
    ]


def _left(path: Path) -> np.ndarray:
    """The frames that the session heard: float32 [n, FRAME], exactly the int16 values."""
    try:
        sound, _ = soundfile.read(path, dtype="int16", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise MediaError(f"{path}, the recording's sound, cannot be read") from error
    frames: np.ndarray = sound[: len(sound) // FRAME * FRAME, 0].astype(np.float32).reshape(-1, FRAME) / np.float32(32768)
    return frames


class _Replayed:
    """The inputs of the replay, each given when the events before it have come."""

    def __init__(self, log: ReplayLog, session: Session, frames: np.ndarray) -> None:
        self._log, self._session, self._frames = log, session, frames
        self._seen: Counter[str] = Counter()
        self._answers: list[int] = []  # of the replay, in order
        self._then: dict[int, int] = {}  # the index of each answer of the recording
        self._sent: dict[int, int] = {}  # samples sent of each answer
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
                raise MediaError(f"the conversation failed during the replay: {event.message}")
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
            if line["picture"] in self._log.pictures:  # all others were replaced by a newer one
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
        """Waits for a condition, for PATIENCE at most: beyond that the replay differs, which the comparison shows."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return


class _Silent:
    """The recorded voice as silence of the same length, with the same word timings."""

    def __init__(self, log: ReplayLog) -> None:
        self.rate, self._said = log.head["rate"], log.said

    def speak(self, text: str, before: str = "") -> Stream:
        chunks = list(self._chunks(text))

        def make(put: Callable[[SpeechChunk], bool], over: threading.Event) -> None:
            for chunk in chunks:
                if not put(chunk):
                    return

        return Stream(make)

    def _chunks(self, text: str) -> Iterator[SpeechChunk]:
        recorded, at = self._said.get(text), 0
        if not recorded:
            yield SpeechChunk(np.zeros(round(UNSAID * self.rate * (1 + text.count(" "))), np.float32), 0, ())
            return
        for count, words in recorded.popleft():
            yield SpeechChunk(np.zeros(count, np.float32), at, tuple(Word(*word) for word in words))
            at += count
