"""A conversation from a script: a door without devices, through `Session.run`, and a recording of both sides.

A TOML file, of which every turn may have each of these once:

    system = "You are attend."        # before everything, if at all

    [[turn]]
    show = "table.jpg"                # a picture
    say = "question.wav"              # a sound file, or
    speak = "what do you see"         # words for espeak-ng, with
    voice = "en-gb+f2"                # this voice
    type = "and how many are red?"    # typed words
    interrupt = 3                     # the next turn begins when so many words of this one's answer were heard
    wait = 0.6                        # seconds of silence before it

Time is the microphone's: 40 ms of it pass while 40 ms of the answer are played. Without `real_time` it stands still while
the model computes, so that a script takes as long as the model needs and the outcome does not depend on the machine.
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

TAIL = 40  # frames of silence after the last answer: for its caption, and for the ear
SETTLED = 8  # frames after which a script without real time waits for the model
PATIENCE = 250  # frames of silence after which a turn that nobody answers is given up
FORMAT = "[[turn]] with show, say, speak and voice, type, interrupt, wait; see agent/script.py"
KEYS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("show", "say", "speak", "voice", "type"), str), "interrupt": int, "wait": (int, float),
}  # fmt: skip


@dataclass(frozen=True)
class ScriptedTurn:
    picture: bytes = b""
    speech: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    typed: str = ""
    interrupt: int | None = None
    wait: float = 0.6


class Talks(Protocol):
    """A session, or what stands for one that is elsewhere."""

    async def run(self, inputs: AsyncIterator[Input], emit: Callable[[Event], Awaitable[None]]) -> None: ...


@dataclass
class ScriptedExchange:
    """What came of one answer. Times in milliseconds after the turn's end."""

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
    """System prompt and turns. Raises MediaError for what cannot be used."""
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
    """Plays `turns` to a session and keeps what comes back. `quiet`: a little noise instead of digital silence. `settled`: waits
    until the model has taken in what it was sent; without it, and without `real_time`, sound comes faster than the model is."""

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
        self.asked: list[tuple[int, int]] = []  # of each turn: the sample its speech begins at, the exchanges before it
        self.late: list[float] = []  # in real time: by how many seconds each frame came too late
        self.answers: dict[int, ScriptedExchange] = {}
        self._rng, self._quiet = np.random.default_rng(0), quiet
        self._frames = 0
        self._answer: int | None = None  # the one that is being given
        self._captions: dict[int, str] = {}
        self._turn: int | None = None
        self._asked: dict[int, int] = {}  # answer by the turn it answers
        self._playing: list[events.AudioDelta] = []
        self._played = 0
        self._hushed = False  # by the user's voice: time goes on, to tell what it is
        self._ends: list[int] = []  # where each word but the first begins
        self._changed = asyncio.Event()
        self._begun = time.monotonic()

    @property
    def notes(self) -> list[str]:
        """What went wrong."""
        return [event.message for event in self.events if isinstance(event, events.Notice | events.SessionFailed)]

    @property
    def clock(self) -> float:
        """Seconds of the microphone's time."""
        return time.monotonic() - self._begun if self.real_time else self._frames * FRAME / RATE

    def forget(self) -> None:
        """Between two turns: what was told so far is let go of."""
        for kept in (self.exchanges, self.events, self.times, self.asked, self.late, self.answers):
            kept.clear()
        self._captions.clear()
        self._asked.clear()

    async def run(self, session: Talks) -> None:
        await session.run(self._inputs(), self._emit)
        for answer, turn in self._asked.items():
            self.answers[answer].caption = self._captions.get(turn, "")

    async def _emit(self, event: Event) -> None:
        self.events.append(event)
        self.times.append(self.clock)
        match event:
            case events.TurnStarted() | events.PictureAttached():
                self._turn = event.turn
            case events.InputTranscribed():
                self._captions[event.turn] = event.text
            case events.AnswerStarted():
                self._hushed = False
                self._answer, self._played, self._ends, self._playing = event.answer, 0, [], []
                self.answers[event.answer] = ScriptedExchange()
                self.exchanges.append(self.answers[event.answer])
                if self._turn is not None:
                    self._asked[event.answer], self._turn = self._turn, None
            case events.MarkAdded():
                self.answers[event.answer].marks.append(event.mark)
            case events.AudioDelta():
                self._hushed = False
                self._playing.append(event)
                self._ends += [word.sample for word in event.words if word.sample and word.sample not in self._ends]
            case events.OutputCleared():
                self._hushed, self._playing = True, []
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
        """40 ms pass."""
        if self.real_time:
            due = (self._frames + 1) * FRAME / RATE
            await asyncio.sleep(max(0.0, due - self.clock))
            self.late.append(self.clock - due)
        else:
            await asyncio.sleep(0)
            if self._settled and self._frames % SETTLED == 0:
                await self._settled()
            while self._answer is not None and not self._playing and not self._hushed:
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
            said = self._playing[0]
            at = self._played - said.sample if said.sample <= self._played < said.sample + len(said.pcm) else 0
            piece = said.pcm[at : at + wanted]
            if self._recording:
                self._recording.play(said.rate, piece)
            self._played = said.sample + at + len(piece)
            wanted -= len(piece)
            if at + len(piece) == len(said.pcm):
                self._playing.pop(0)
        return events.PlaybackPosition(said.answer, self._played)
