"""A scripted conversation, without devices: plays the turns of a script to `Session.run`, and can record both sides.

A script is a TOML file; a turn may have each of these keys once:

    system = "You are attend."        # optional

    [[turn]]
    show = "table.jpg"                # a picture
    say = "question.wav"              # a sound file, or
    speak = "what do you see"         # words for espeak-ng, with
    voice = "en-gb+f2"                # this voice
    type = "and how many are red?"    # typed words
    interrupt = 3                     # the next turn begins when this many words of this turn's answer were heard
    wait = 0.6                        # seconds of silence before it

Time is counted in frames of the microphone: in 40 ms of it, 40 ms of the answer are played. Without `real_time` it stops while
the model computes, so a script takes as long as the model needs, and the result does not depend on the machine's speed.
"""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soxr

from agent import events
from agent.events import Event, Input
from agent.marks import Mark
from agent.recording import Recording
from streams.frames import FRAME, RATE, Audio, MediaError
from streams.media_files import read_audio

TAIL = 40  # frames of silence after the last answer, in which its transcript arrives
SETTLED = 8  # frames after which a script without real time waits until the model has taken them
PATIENCE = 250  # frames of silence after which a turn counts as unanswered
FORMAT = "[[turn]] with show, say, speak and voice, type, interrupt, wait; see agent/script.py"
KEYS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("show", "say", "speak", "voice", "type"), str), "interrupt": int, "wait": (int, float),
}  # fmt: skip


@dataclass(frozen=True)
class ScriptedTurn:
    """What the user does in one turn. `speech`: float32 at 16 kHz. `interrupt`: words of the answer that are heard before the
    next turn begins. `wait`: seconds of silence before this one."""

    picture: bytes = b""
    speech: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    typed: str = ""
    interrupt: int | None = None
    wait: float = 0.6


class SessionLike(Protocol):
    """A session, or a client with the interface of one."""

    async def run(self, inputs: AsyncIterator[Input], emit: Callable[[Event], Awaitable[None]]) -> None: ...


@dataclass
class ScriptedExchange:
    """The answer to a scripted turn. `heard`: characters that were heard. `stages`: milliseconds after the turn's end."""

    caption: str = ""
    text: str = ""
    heard: int = 0
    marks: list[Mark] = field(default_factory=list)
    finish: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)
    waiting: int = 0

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "marks": [{"box_2d": list(mark.box), "label": mark.label} for mark in self.marks]}


def read(path: Path) -> tuple[str | None, list[ScriptedTurn]]:
    """The system prompt and the turns of a script. Raises MediaError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MediaError(f"{path} is not a script that can be read: {error}") from error
    turns = raw.get("turn")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise MediaError(f"{path} has no [[turn]]")
    if unknown := raw.keys() - {"turn", "system"}:
        raise MediaError(f"{path} says {sorted(unknown)[0]!r}, which a script does not have")
    return raw.get("system"), [_turn(path, number, turn) for number, turn in enumerate(turns, 1)]


def _turn(path: Path, number: int, raw: Mapping[str, Any]) -> ScriptedTurn:
    where = f"turn {number} of {path}"
    for key, value in raw.items():
        if key not in KEYS:
            raise MediaError(f"{where} says {key!r}; a turn has {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise MediaError(f"{where}: {key} cannot be {value!r}")
    if not raw.keys() & {"say", "speak", "type"}:
        raise MediaError(f"{where} asks nothing: it needs say, speak or type")
    speech = np.zeros(0, np.float32)
    if "say" in raw:
        speech = read_audio(path.parent / raw["say"])
    elif "speak" in raw:
        speech = _spoken(raw["speak"], raw.get("voice", "en-us"), where)
    picture = b""
    if "show" in raw:
        try:
            picture = (path.parent / raw["show"]).read_bytes()
        except OSError as error:
            raise MediaError(f"{where}: {raw['show']} cannot be read: {error.strerror}") from error
    return ScriptedTurn(picture, speech, raw.get("type", ""), raw.get("interrupt"), float(raw.get("wait", 0.6)))


def _spoken(text: str, voice: str, where: str) -> np.ndarray:
    from streams.espeak import Espeak

    try:
        speech = Espeak().say(text, voice=voice)
    except ValueError as error:
        raise MediaError(f"{where}: {error}") from error
    pcm: np.ndarray = soxr.resample(speech.pcm, speech.rate, RATE)
    return pcm.clip(-1, 1).astype(np.float32)


class Performance:
    """Plays `turns` to a session and keeps its events. `quiet`: standard deviation of noise instead of digital silence.
    `settled`: waits until the model has processed its input; without it, and without `real_time`, audio comes too fast."""

    def __init__(
        self,
        turns: Iterable[ScriptedTurn],
        real_time: bool = False,
        quiet: float = 1e-4,
        recording: Recording | None = None,
        settled: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.turns, self.real_time, self._recording, self._settled = turns, real_time, recording, settled
        self.exchanges: list[ScriptedExchange] = []
        self.events: list[Event] = []
        self.times: list[float] = []  # of `events`, by `clock`
        self.asked: list[tuple[int, int]] = []  # of each turn: first sample of its speech, number of exchanges before it
        self.late: list[float] = []  # in real time: seconds by which each frame was late
        self.answers: dict[int, ScriptedExchange] = {}
        self._rng, self._quiet = np.random.default_rng(0), quiet
        self._frames = 0
        self._answer: int | None = None  # the answer in progress
        self._transcripts: dict[int, str] = {}
        self._turn: int | None = None
        self._turn_of_answer: dict[int, int] = {}  # turn by the answer to it
        self._playing: list[events.AudioDelta] = []
        self._played = 0
        self._paused = False  # by the user's voice: time goes on, until the session has decided what it was
        self._ends: list[int] = []  # samples at which each word but the first begins
        self._changed = asyncio.Event()
        self._begun = time.monotonic()

    @property
    def notes(self) -> list[str]:
        """Messages of what went wrong."""
        return [event.message for event in self.events if isinstance(event, events.Notice | events.SessionFailed)]

    @property
    def clock(self) -> float:
        """Seconds of microphone time since the start."""
        return time.monotonic() - self._begun if self.real_time else self._frames * FRAME / RATE

    def forget(self) -> None:
        """Drops everything kept so far; to be called between two turns."""
        for kept in (self.exchanges, self.events, self.times, self.asked, self.late, self.answers):
            kept.clear()
        self._transcripts.clear()
        self._turn_of_answer.clear()

    async def run(self, session: SessionLike) -> None:
        """Plays all turns, and returns when the session has ended."""
        await session.run(self._inputs(), self._emit)
        for answer, turn in self._turn_of_answer.items():
            self.answers[answer].caption = self._transcripts.get(turn, "")

    async def _emit(self, event: Event) -> None:
        self.events.append(event)
        self.times.append(self.clock)
        match event:
            case events.TurnStarted() | events.PictureAttached():
                self._turn = event.turn
            case events.InputTranscribed():
                self._transcripts[event.turn] = event.text
            case events.AnswerStarted():
                self._paused = False
                self._answer, self._played, self._ends, self._playing = event.answer, 0, [], []
                self.answers[event.answer] = ScriptedExchange()
                self.exchanges.append(self.answers[event.answer])
                if self._turn is not None:
                    self._turn_of_answer[event.answer], self._turn = self._turn, None
            case events.MarkAdded():
                self.answers[event.answer].marks.append(event.mark)
            case events.AudioDelta():
                self._paused = False
                self._playing.append(event)
                self._ends += [word.sample for word in event.words if word.sample and word.sample not in self._ends]
            case events.OutputCleared():
                self._paused, self._playing = True, []
            case events.AnswerDone():
                exchange, self._answer = self.answers[event.answer], None
                exchange.text, exchange.heard, exchange.finish = event.text, event.heard, event.finish
            case events.AnswerTimings():
                self.answers[event.answer].stages, self.answers[event.answer].waiting = event.stages, event.waiting
        self._changed.set()

    async def _inputs(self) -> AsyncIterator[Input]:
        for turn in self.turns:
            async for item in self._silence(round(turn.wait * RATE / FRAME)):
                yield item
            if turn.picture:
                yield events.PictureInput(turn.picture)
            if turn.typed:
                yield events.TextInput(turn.typed, ask=not len(turn.speech))
            before, patience = len(self.exchanges), PATIENCE
            self.asked.append((self._frames * FRAME, before))
            padded = np.pad(turn.speech, (0, -len(turn.speech) % FRAME))
            for frame in padded.reshape(-1, FRAME):
                async for item in self._frame(frame):
                    yield item
            while (len(self.exchanges) == before and patience) or not self._reached(turn.interrupt):
                patience = max(0, patience - 1)
                async for item in self._silence(1):
                    yield item
        async for item in self._silence(TAIL):
            yield item

    def _reached(self, interrupt: int | None) -> bool:
        if self._answer is None:
            return True
        return interrupt is not None and sum(end <= self._played for end in self._ends) >= interrupt

    async def _silence(self, frames: int) -> AsyncIterator[Input]:
        for _ in range(frames):
            async for item in self._frame(np.zeros(FRAME, np.float32)):
                yield item

    async def _frame(self, frame: np.ndarray) -> AsyncIterator[Input]:
        """One frame of the microphone, and the playback meanwhile."""
        if self.real_time:
            due = (self._frames + 1) * FRAME / RATE
            await asyncio.sleep(max(0.0, due - self.clock))
            self.late.append(self.clock - due)
        else:
            await asyncio.sleep(0)
            if self._settled and self._frames % SETTLED == 0:
                await self._settled()
            while self._answer is not None and not self._playing and not self._paused:
                self._changed.clear()
                await self._changed.wait()
        yield Audio((frame + self._quiet * self._rng.standard_normal(FRAME)).clip(-1, 1).astype(np.float32), self._frames * FRAME)
        heard = self._play()
        if self._recording:
            self._recording.hear(frame)
        if heard:
            yield heard
        self._frames += 1

    def _play(self) -> events.PlaybackPosition | None:
        wanted = self._playing[0].rate * FRAME // RATE if self._playing else 0
        if not wanted:
            return None
        while wanted and self._playing:
            delta = self._playing[0]
            at = self._played - delta.sample if delta.sample <= self._played < delta.sample + len(delta.pcm) else 0
            piece = delta.pcm[at : at + wanted]
            if self._recording:
                self._recording.play(delta.rate, piece)
            self._played = delta.sample + at + len(piece)
            wanted -= len(piece)
            if at + len(piece) == len(delta.pcm):
                self._playing.pop(0)
        return events.PlaybackPosition(delta.answer, self._played)
