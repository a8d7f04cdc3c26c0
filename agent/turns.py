"""Turn detection, who has the floor: the speech probability of each frame in, decisions out.

Pure: no clock and no tasks. Time is the number of samples heard, so an hour of speech replays in a second.

       speech for `speech`                   silence for `pause`         silence for `silence`
    QUIET ─▶ STARTING ────────────▶ SPEAKING ◀─────────────────▶ STOPPING ──────────▶ QUIET
      ▲         │     SpeechStarted            PauseStarted,          SpeechEnded, or SpeechDiscarded
      └─────────┘ silence for `gap`            PauseEnded             if the speech was shorter than `least`

Speech over an answer stays in STARTING for longer, because it may be a cough or an "mm-hmm". Playback pauses at once
(OutputPaused), since that is what the user waits for. Then either the speech lasts for `interruption` and the answer ends
(BargeIn), or it stops and playback goes on at the word where it paused (OutputResumed). A false alarm costs a moment of silence
and never the answer.

A turn is open from SpeechStarted to SpeechEnded or SpeechDiscarded, and never during an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from streams.frames import RATE

EndReason = Literal["silence", "released", "committed", "long"]


@dataclass(frozen=True, slots=True)
class TurnDetectionConfig:
    """When a turn begins and ends. Times are in milliseconds."""

    threshold: float = 0.5  # speech probability at which speech begins; it ends 0.15 lower (silero's own hysteresis)
    pre_roll: int = 300  # audio from before the onset that joins the turn, or the first syllable is lost
    speech: int = 80  # of speech, two frames: opens a turn or pauses an answer; silero needs another 40 to 120 for the onset
    least: int = 160  # of speech in a whole turn: the shortest "no" is 240, a click or a knock is less
    gap: int = 320  # of silence that ends a sound too short to be speech; "no, wait … stop it" has 240 in the middle
    pause: int = 120  # of silence after which an answer may be prepared speculatively
    silence: int = 500  # of silence that ends a turn; where a model judges pauses, the longest wait
    interruption: int = 800  # of speech over an answer; measured: "mm-hmm" 560 to 760, "no, wait" 840 and more
    interrupt: bool = True  # False: speech over an answer is ignored (a loudspeaker without echo cancellation)
    hands_free: bool = True  # False: push to talk, only `press` and `release` open and close turns
    buffered: bool = False  # audio waits for a commit, as in OpenAI's input audio buffer, and interrupts nothing
    longest: int = 120_000  # of one turn: a television never stops
    idle: int | None = None  # of silence after an answer until IdleTimeout; None: never

    def __post_init__(self) -> None:
        assert 0.15 < self.threshold < 1, self.threshold
        assert 0 < self.speech <= self.least <= self.interruption, self
        assert min(self.pre_roll, self.gap, self.pause, self.silence) > 0, self
        assert self.idle is None or self.idle > 0, self

    @property
    def keep(self) -> int:
        """How many samples a turn may begin before it is detected; older frames are not needed."""
        return _samples(self.pre_roll + self.interruption + self.gap)


# ---- decisions; `at`: the sample at which they were made


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """The user has the floor; the turn's audio begins at sample `start`."""

    at: int
    start: int


@dataclass(frozen=True, slots=True)
class PauseStarted:
    """The user has been silent since `end`: an answer may start speculatively. PauseEnded, SpeechEnded or
    SpeechDiscarded follows."""

    at: int
    end: int


@dataclass(frozen=True, slots=True)
class PauseEnded:
    """The user speaks again in the same turn: a speculative answer is void."""

    at: int


@dataclass(frozen=True, slots=True)
class SpeechEnded:
    """The turn is complete; the last word ended at `end`."""

    at: int
    end: int
    why: EndReason


@dataclass(frozen=True, slots=True)
class SpeechDiscarded:
    """The audio since `start` was not a turn; it is discarded."""

    at: int
    start: int


@dataclass(frozen=True, slots=True)
class OutputPaused:
    """There is speech over the answer: playback pauses until OutputResumed or BargeIn."""

    at: int


@dataclass(frozen=True, slots=True)
class OutputResumed:
    """The speech was too short for an interruption: playback goes on from the answer's sample `heard`.

    The speech lies between `start` and `end`."""

    at: int
    heard: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BargeIn:
    """The answer is interrupted and truncated at its sample `heard`. SpeechStarted follows.

    If `heard` is 0, the last turn had been ended too early, and the new one is the rest of it.
    """

    at: int
    heard: int


@dataclass(frozen=True, slots=True)
class IdleTimeout:
    """There has been no speech for `TurnDetectionConfig.idle` since the answer. At most once for each answer."""

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
    STARTING = auto()  # speech or a cough
    SPEAKING = auto()
    STOPPING = auto()  # a pause, or the end of the turn


class TurnDetector:
    """The floor of one conversation. `detection` may be replaced at any time and applies from the next frame on."""

    def __init__(self, detection: TurnDetectionConfig = TurnDetectionConfig(), at: int = 0) -> None:
        self.detection = detection
        self.now = at
        self.state = State.QUIET
        self._speaking_now = False  # whether the last frame was speech, with hysteresis
        self._onset = at  # of the speech
        self._end = at  # of the speech so far
        self._speech_samples = 0  # since the onset
        self._start = at  # of the turn
        self._not_before = at  # the next turn cannot begin earlier: that audio belongs to the last one
        self._pressed_at: int | None = None
        self._heard: int | None = None  # samples of the answer that were heard; None: there is no answer
        self._to_speech = True  # the answer is to speech, and not to typed text
        self._output_paused = False
        self._answered_at: int | None = None  # the start of the idle time

    @property
    def floor(self) -> Literal["user", "agent"] | None:
        """Speech over an answer does not take the floor before it is an interruption."""
        if self.state in (State.SPEAKING, State.STOPPING):
            return "user"
        return None if self._heard is None else "agent"

    # -- the microphone

    def hear(self, samples: int, probability: float) -> list[Decision]:
        """The next frame: its number of samples and its speech probability, 0 to 1."""
        assert samples > 0 and 0 <= probability <= 1, (samples, probability)
        before, threshold = self._speaking_now, self.detection.threshold
        self.now += samples
        self._speaking_now = probability >= (threshold - 0.15 if before else threshold)
        if self._speaking_now:
            self._speech_samples += samples
            self._end = self.now
        if self.state is State.QUIET and self._speaking_now and not before and self._listens:
            self.state = State.STARTING
            self._onset, self._speech_samples = self.now - samples, samples
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
        if idle is None or self._answered_at is None or self._heard is not None:
            return []
        if self.now - max(self._answered_at, self._end) < _samples(idle):
            return []
        self._answered_at = None
        return [IdleTimeout(self.now)]

    def _starting(self) -> list[Decision]:
        config = self.detection
        if self.now - self._end >= _samples(config.gap):
            return self._abandon()
        if self._speech_samples < _samples(config.speech):
            return []
        if self._heard is None:
            return self._open(self._onset)
        events: list[Decision] = [] if self._output_paused else [OutputPaused(self.now)]
        self._output_paused = True
        # Nobody says "mm-hmm" before the answer's first word is heard: early speech is the rest of the user's sentence. Not
        # so after typed text: there the click of a key would cancel the answer.
        if self._end - self._onset >= _samples(config.interruption if self._heard or not self._to_speech else config.least):
            events += self._interrupt() + self._open(self._onset)
        return events

    def _speaking(self) -> list[Decision]:
        config, silence = self.detection, self.now - self._end
        if self._pressed_at is None and silence >= _samples(config.silence):
            return [self._close("silence")]
        if self.now - self._start >= _samples(config.longest):
            return [self._close("long")]
        events: list[Decision] = []
        if self.state is State.SPEAKING and silence >= _samples(config.pause):
            self.state = State.STOPPING
            events.append(PauseStarted(self.now, self._end))
        elif self.state is State.STOPPING and self._speaking_now:
            self.state = State.SPEAKING
            events.append(PauseEnded(self.now))
        return events

    def skip(self, samples: int) -> None:
        """Advances time by audio that is not judged."""
        self.now += samples

    # -- push to talk and requests

    def press(self) -> list[Decision]:
        """Push to talk: a turn is open until `release`, with or without speech, and an answer is interrupted at once."""
        if self._pressed_at is not None:
            return []
        self._pressed_at = self.now
        if self.floor == "user":
            return []
        if self.state is not State.STARTING:
            self._onset, self._speech_samples, self._end = self.now, 0, self.now
        return self._interrupt() + self._open(self._onset)

    def release(self) -> list[Decision]:
        """Push to talk: ends the turn; a press shorter than `least` discards it."""
        return [] if self._pressed_at is None else [self._close("released")]

    def commit(self) -> list[Decision]:
        """Ends the open turn, if any, at a client's request or because the model judged a pause."""
        return [self._close("committed")] if self.floor == "user" else []

    def cancel(self) -> list[Decision]:
        """Discards the open turn, if any."""
        if self.floor == "user":
            return [self._discard()]
        return self._abandon() if self.state is State.STARTING else []

    # -- the answer

    def answering(self, to_speech: bool = True) -> None:
        """An answer begins, to speech or to typed text; nothing of it has been heard yet."""
        assert self.floor is None, f"an answer begins while the floor is the {self.floor}'s"
        self._heard, self._answered_at, self._to_speech = 0, None, to_speech
        if self.state is State.STARTING and not self.detection.interrupt:
            self.state = State.QUIET

    def heard(self, samples: int) -> None:
        """Samples of the answer played so far, to the end of a whole word. Ignored after the answer has ended."""
        if self._heard is not None:
            self._heard = max(self._heard, samples)

    def answered(self) -> list[Decision]:
        """The answer has ended, heard completely or cancelled. Speech over its last word becomes a turn."""
        if self._heard is None:
            return []
        self._heard, self._output_paused, self._answered_at = None, False, self.now
        return self._starting() if self.state is State.STARTING else []

    # -- transitions

    def _open(self, onset: int) -> list[Decision]:
        self._start = max(onset - _samples(self.detection.pre_roll), self._not_before)
        self.state = State.SPEAKING
        return [SpeechStarted(self.now, self._start)]

    def _close(self, why: EndReason) -> Decision:
        """After this, speech that goes on does not open a turn: only a new onset does."""
        held = 0 if self._pressed_at is None else self.now - self._pressed_at
        if why != "committed" and max(held, self._speech_samples) < _samples(self.detection.least):
            return self._discard()
        self.state, self._pressed_at, self._answered_at = State.QUIET, None, None
        self._not_before = self.now
        return SpeechEnded(self.now, self._end, why)

    def _discard(self) -> Decision:
        self.state, self._pressed_at = State.QUIET, None
        return SpeechDiscarded(self.now, self._start)

    def _interrupt(self) -> list[Decision]:
        if self._heard is None:
            return []
        event = BargeIn(self.now, self._heard)
        self._heard, self._output_paused, self._answered_at = None, False, self.now
        return [event]

    def _abandon(self) -> list[Decision]:
        self.state = State.QUIET
        if not self._output_paused or self._heard is None:
            return []
        self._output_paused = False
        return [OutputResumed(self.now, self._heard, self._onset, self._end)]


def _samples(ms: int) -> int:
    return ms * RATE // 1000
