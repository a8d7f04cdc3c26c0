"""Who has the floor: the probability of speech in each frame in, decisions out.

Pure: no clock and no tasks. Time is the number of samples heard, so an hour of talk replays in a second.

          talk for `speech`                silence for `pause`
    QUIET ─▶ STARTING ─────────▶ SPEAKING ◀───────────────────▶ STOPPING ──▶ QUIET
      ▲         │     Began                 Paused, WentOn         Ended, or Discarded if it was less than `least`
      └─────────┘ silence for `gap`

Talk over an answer stays in STARTING for longer, for it may be a cough or an "mm-hmm". The answer is Hushed at once, since
silence is what the user waits for; then either the talk lasts for `interruption`, and the answer is Interrupted, or it
stops, and the answer is TakenUp at the word that was cut. So a wrong guess costs a moment and never the answer.

A turn is open from Began to Ended or Discarded, and never while an answer is being given.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from streams.frames import RATE

EndReason = Literal["silence", "released", "committed", "long"]


@dataclass(frozen=True, slots=True)
class TurnDetectionConfig:
    """Times are in milliseconds."""

    threshold: float = 0.5  # of probability, where speech begins; it ends 0.15 lower (silero's own hysteresis)
    pre_roll: int = 300  # kept from before the onset, or the first syllable is lost
    speech: int = 80  # of talk: two frames open a turn or hush an answer; silero needs another 40 to 120 for the onset itself
    least: int = 160  # of talk in a whole turn: the shortest "no" is 240, a click or a knock is less
    gap: int = 320  # of silence that ends a sound too short to be talk; "no, wait … stop it" has 240 in the middle
    pause: int = 120  # of silence after which an answer may be guessed at
    silence: int = 500  # that ends a turn; with a model that judges pauses itself, the longest wait
    interruption: int = 800  # of talk over an answer: measured, "mm-hmm" takes 560 to 760 and "no, wait" 840 and more
    interrupt: bool = True  # False: talk over an answer is not heard at all (a loudspeaker without echo cancellation)
    hands_free: bool = True  # False: only `press` and `release` open and close turns
    buffered: bool = False  # sound waits for a commit, as in OpenAI's input buffer, and interrupts nothing
    longest: int = 120_000  # of one turn: a television never stops talking
    idle: int | None = None  # of silence after an answer

    def __post_init__(self) -> None:
        assert 0.15 < self.threshold < 1, self.threshold
        assert 0 < self.speech <= self.least <= self.interruption, self
        assert min(self.pre_roll, self.gap, self.pause, self.silence) > 0, self
        assert self.idle is None or self.idle > 0, self

    @property
    def keep(self) -> int:
        """Samples of the past that Began may ask for; frames older than that can go."""
        return _samples(self.pre_roll + self.interruption + self.gap)


# ---- decisions; `at` is when they were made


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """The user has the floor: what was heard from sample `start` on belongs to the turn."""

    at: int
    start: int


@dataclass(frozen=True, slots=True)
class PauseStarted:
    """The user has said nothing since `end`: a chance to guess at the answer. WentOn, Ended or Discarded follows."""

    at: int
    end: int


@dataclass(frozen=True, slots=True)
class PauseEnded:
    """The user speaks again, in the same turn: a guess is worth nothing."""

    at: int


@dataclass(frozen=True, slots=True)
class SpeechEnded:
    """The turn is complete; the last word was over at `end`."""

    at: int
    end: int
    why: EndReason


@dataclass(frozen=True, slots=True)
class SpeechDiscarded:
    """What was heard since `start` was no turn: forget it."""

    at: int
    start: int


@dataclass(frozen=True, slots=True)
class OutputPaused:
    """Someone talks over the answer: play nothing more until TakenUp or Interrupted."""

    at: int


@dataclass(frozen=True, slots=True)
class OutputResumed:
    """It was too short to be an interruption: go on with the answer from its sample `heard`.

    The talk itself lies between `start` and `end`."""

    at: int
    heard: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BargeIn:
    """The answer is over, and everything after its sample `heard` was never said. Began follows.

    If nothing was heard, the last turn was cut too early, and what begins is the rest of it.
    """

    at: int
    heard: int


@dataclass(frozen=True, slots=True)
class IdleTimeout:
    """Nobody has said anything for `TurnDetectionConfig.idle` since the answer. Said once for each answer."""

    at: int


Decision = (
    SpeechStarted
    | PauseStarted
    | PauseEnded
    | SpeechEnded
    | SpeechDiscarded
    | OutputPaused
    | OutputResumed
    | BargeIn
    | IdleTimeout
)


# ---- the machine


class State(Enum):
    QUIET = auto()
    STARTING = auto()  # perhaps talk, perhaps a cough
    SPEAKING = auto()
    STOPPING = auto()  # a pause, or the end


class TurnDetector:
    """One conversation's floor. `manners` may be replaced at any time and hold from the next frame on."""

    def __init__(self, detection: TurnDetectionConfig = TurnDetectionConfig(), at: int = 0) -> None:
        self.detection = detection
        self.now = at
        self.state = State.QUIET
        self._talking = False  # the last frame, with hysteresis
        self._onset = at  # of the talk
        self._end = at  # of the talk so far
        self._said = 0  # samples of talk since the onset
        self._start = at  # of the turn
        self._free = at  # nothing before belongs to the next turn, as it belongs to the last one
        self._pressed: int | None = None
        self._heard: int | None = None  # of the answer; None: there is none
        self._to_speech = True  # the answer is to what was said, and not to what was typed
        self._hushed = False
        self._answered: int | None = None  # since when Idle is due

    @property
    def floor(self) -> Literal["user", "agent"] | None:
        """Talk over an answer does not take the floor before it is an interruption."""
        if self.state in (State.SPEAKING, State.STOPPING):
            return "user"
        return None if self._heard is None else "agent"

    # -- the microphone

    def hear(self, samples: int, probability: float) -> list[Decision]:
        """The next frame: how long it is and how likely it holds speech."""
        assert samples > 0 and 0 <= probability <= 1, (samples, probability)
        before, threshold = self._talking, self.detection.threshold
        self.now += samples
        self._talking = probability >= (threshold - 0.15 if before else threshold)
        if self._talking:
            self._said += samples
            self._end = self.now
        if self.state is State.QUIET and self._talking and not before and self._listens:
            self.state = State.STARTING
            self._onset, self._said = self.now - samples, samples
        match self.state:
            case State.QUIET:
                return self._quiet()
            case State.STARTING:
                return self._starting()
            case State.SPEAKING | State.STOPPING:
                return self._speaking()

    @property
    def _listens(self) -> bool:
        return self.detection.hands_free and (self.detection.interrupt or self._heard is None)

    def _quiet(self) -> list[Decision]:
        idle = self.detection.idle
        if idle is None or self._answered is None or self._heard is not None:
            return []
        if self.now - max(self._answered, self._end) < _samples(idle):
            return []
        self._answered = None
        return [IdleTimeout(self.now)]

    def _starting(self) -> list[Decision]:
        m = self.detection
        if self.now - self._end >= _samples(m.gap):
            return self._let_go()
        if self._said < _samples(m.speech):
            return []
        if self._heard is None:
            return self._open(self._onset)
        events: list[Decision] = [] if self._hushed else [OutputPaused(self.now)]
        self._hushed = True
        # Before its first word is heard nobody says "mm-hmm" to an answer: the user is still busy with the last sentence. Who
        # typed is not: a click of the keys would cancel what was asked for.
        if self._end - self._onset >= _samples(m.interruption if self._heard or not self._to_speech else m.least):
            events += self._interrupt() + self._open(self._onset)
        return events

    def _speaking(self) -> list[Decision]:
        m, silence = self.detection, self.now - self._end
        if self._pressed is None and silence >= _samples(m.silence):
            return [self._close("silence")]
        if self.now - self._start >= _samples(m.longest):
            return [self._close("long")]
        events: list[Decision] = []
        if self.state is State.SPEAKING and silence >= _samples(m.pause):
            self.state = State.STOPPING
            events.append(PauseStarted(self.now, self._end))
        elif self.state is State.STOPPING and self._talking:
            self.state = State.SPEAKING
            events.append(PauseEnded(self.now))
        return events

    def skip(self, samples: int) -> None:
        """Time goes on, and what was heard is not to be judged."""
        self.now += samples

    # -- the user's other ways

    def press(self) -> list[Decision]:
        """Push to talk: a turn is open from here to `release`, whatever is heard, and an answer is interrupted at once."""
        if self._pressed is not None:
            return []
        self._pressed = self.now
        if self.floor == "user":
            return []
        if self.state is not State.STARTING:
            self._onset, self._said, self._end = self.now, 0, self.now
        return self._interrupt() + self._open(self._onset)

    def release(self) -> list[Decision]:
        """Ends the turn; a mere tap discards it."""
        return [] if self._pressed is None else [self._close("released")]

    def commit(self) -> list[Decision]:
        """The turn, if one is open, is complete: a client says so, or the model has judged a pause."""
        return [self._close("committed")] if self.floor == "user" else []

    def cancel(self) -> list[Decision]:
        """Whatever the user is saying is to be forgotten."""
        if self.floor == "user":
            return [self._discard()]
        return self._let_go() if self.state is State.STARTING else []

    # -- the answer

    def answering(self, to_speech: bool = True) -> None:
        """An answer is on its way, to what was said or to what was typed; nothing of it has been heard yet."""
        assert self.floor is None, f"an answer begins while the floor is the {self.floor}'s"
        self._heard, self._answered, self._to_speech = 0, None, to_speech
        if self.state is State.STARTING and not self.detection.interrupt:
            self.state = State.QUIET

    def heard(self, samples: int) -> None:
        """So much of the answer has been played, counted to the end of a whole word. Late news of an ended answer is ignored."""
        if self._heard is not None:
            self._heard = max(self._heard, samples)

    def answered(self) -> list[Decision]:
        """The answer is over, because all was heard or because it was stopped. Talk over its last word becomes a turn."""
        if self._heard is None:
            return []
        self._heard, self._hushed, self._answered = None, False, self.now
        return self._starting() if self.state is State.STARTING else []

    # -- transitions

    def _open(self, onset: int) -> list[Decision]:
        self._start = max(onset - _samples(self.detection.pre_roll), self._free)
        self.state = State.SPEAKING
        return [SpeechStarted(self.now, self._start)]

    def _close(self, why: EndReason) -> Decision:
        """After this, talk that just goes on opens no turn: only a new onset does."""
        held = 0 if self._pressed is None else self.now - self._pressed
        if why != "committed" and max(held, self._said) < _samples(self.detection.least):
            return self._discard()
        self.state, self._pressed, self._answered = State.QUIET, None, None
        self._free = self.now
        return SpeechEnded(self.now, self._end, why)

    def _discard(self) -> Decision:
        self.state, self._pressed = State.QUIET, None
        return SpeechDiscarded(self.now, self._start)

    def _interrupt(self) -> list[Decision]:
        if self._heard is None:
            return []
        event = BargeIn(self.now, self._heard)
        self._heard, self._hushed, self._answered = None, False, self.now
        return [event]

    def _let_go(self) -> list[Decision]:
        self.state = State.QUIET
        if not self._hushed or self._heard is None:
            return []
        self._hushed = False
        return [OutputResumed(self.now, self._heard, self._onset, self._end)]


def _samples(ms: int) -> int:
    return ms * RATE // 1000
