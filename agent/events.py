"""The inputs and events of a conversation: what every door sends to a `Session` and receives from it.

Time is counted in samples: of the microphone (16,000 a second) in `at`, `start` and `end`; of the answer's own audio
(`AudioDelta.rate`) in `sample`. Turns, answers, calls and pictures are identified by their index on the tape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from agent.calls import ToolCall
from agent.marks import Mark
from agent.segments import Evicted
from agent.tape import SystemPrompt
from agent.turns import EndReason, TurnDetectionConfig
from streams.frames import Audio

# ---- inputs


@dataclass(frozen=True, slots=True)
class TextInput:
    """Text that the user typed. `ask`: create an answer as soon as the turn can end."""

    text: str
    ask: bool = True


@dataclass(frozen=True, slots=True)
class PictureInput:
    """A picture file (JPEG, PNG, WebP). `live`: from a camera, of which only the newest is used. `size`: height and width in
    pixels, filled in by the session."""

    data: bytes
    live: bool = False
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RecordedInput:
    """A whole turn of audio, float32 [n] at 16 kHz in [-1, 1]. `name`: the door's name for the turn."""

    samples: np.ndarray = field(repr=False)
    name: str | None = None


@dataclass(frozen=True, slots=True)
class PushToTalkStart:
    """Push to talk: the turn is open until `PushToTalkEnd`."""


@dataclass(frozen=True, slots=True)
class PushToTalkEnd:
    """Push to talk: the turn ends; a mere tap discards it."""


@dataclass(frozen=True, slots=True)
class CommitTurn:
    """The open turn, or the audio in the input buffer, is complete. `ask`: create an answer. `name`: the door's name for the turn
    made from the buffer."""

    ask: bool = True
    name: str | None = None


@dataclass(frozen=True, slots=True)
class DiscardTurn:
    """Discards the open turn and the audio in the input buffer."""


@dataclass(frozen=True, slots=True)
class CreateAnswer:
    """Creates an answer to the conversation so far."""


@dataclass(frozen=True, slots=True)
class EntryReference:
    """Refers to the speech of a turn, or to a picture, in the conversation."""

    of: int


@dataclass(frozen=True, slots=True)
class CreateOutOfBandResponse:
    """Creates an out-of-band response: an answer that the conversation does not keep. Its events come as `OutOfBandEvent` with
    this `name`, which the door chooses. `past`: its context; None: the conversation without the open turn.
    `calls`: it begins with a call of one of these tools; calls are reported, and their results are not awaited."""

    name: str
    past: tuple[AnswerInput, ...] | None = None
    setting: SystemPrompt | None = None
    max_tokens: int | None = None
    spoken: bool = True
    calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelAnswer:
    """Stops the answer; what was heard of it stays."""


@dataclass(frozen=True, slots=True)
class PlaybackPosition:
    """The playback of `answer` has reached `sample`. After `OutputCleared` the door sends it once more."""

    answer: int
    sample: int


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of a tool call. If the answer no longer waits for it, it is kept for the next one."""

    call: int
    value: Any


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """New settings; None leaves one unchanged. They apply at once, except to a running answer; `setting`, the system prompt,
    applies when that has ended. `max_tokens`: of an answer, at most what the session was created with. `calls`: an answer begins
    with a call of one of these tools."""

    setting: SystemPrompt | None = None
    detection: TurnDetectionConfig | None = None
    camera: Literal["off", "end", "live"] | None = None
    answers: bool | None = None
    max_tokens: int | None = None
    spoken: bool | None = None
    calls: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class TruncateAnswer:
    """Truncates `answer`, running or finished, at `sample` of its audio. Overrides any earlier `PlaybackPosition`."""

    answer: int
    sample: int


@dataclass(frozen=True, slots=True)
class PastAnswer:
    """An answer of an earlier conversation, supplied by the door: its text, and its calls with their results."""

    text: str
    calls: tuple[tuple[ToolCall, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class SayText:
    """Text that the agent speaks unprompted, as an answer of its own: a greeting."""

    text: str


@dataclass(frozen=True, slots=True)
class DeleteEntry:
    """Deletes the turn or answer `of`."""

    of: int


@dataclass(frozen=True, slots=True)
class OutOfBandEvent:
    """An event of the out-of-band response `name`, or a PlaybackPosition or CancelAnswer for it from the door. Its answer
    has an index of its own."""

    name: str
    payload: PlaybackPosition | CancelAnswer | Event


AnswerInput = TextInput | PictureInput | Audio | PastAnswer | EntryReference
Input = (
    Audio
    | TextInput
    | PictureInput
    | RecordedInput
    | PushToTalkStart
    | PushToTalkEnd
    | CommitTurn
    | DiscardTurn
    | CreateAnswer
    | CreateOutOfBandResponse
    | OutOfBandEvent
    | CancelAnswer
    | PlaybackPosition
    | ToolResult
    | UpdateSettings
    | TruncateAnswer
    | PastAnswer
    | SayText
    | DeleteEntry
)


def weight(input: Input | AnswerInput) -> int:
    """Approximate bytes of its text, pictures and recordings."""
    match input:
        case TextInput() | PastAnswer():
            return len(input.text)
        case PictureInput():
            return len(input.data)
        case RecordedInput():
            return input.samples.nbytes
        case CreateOutOfBandResponse():
            return sum(map(weight, input.past or ()))
    return 0


# ---- events


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The user has the floor; the turn's audio begins at `start`. `name`: of a turn that the door supplied as a whole."""

    turn: int
    at: int
    start: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class TurnStopped:
    """The latest turn has ended; its last word ended at `end`. Its index is `turn` from here on: it changes when history was
    inserted before it."""

    turn: int
    at: int
    end: int
    why: EndReason


@dataclass(frozen=True, slots=True)
class TurnDiscarded:
    """The turn was discarded: a click, a tap, or by request."""

    turn: int
    at: int


@dataclass(frozen=True, slots=True)
class FalseInterruption:
    """The speech that caused an `OutputCleared` was not a turn: a cough, an "mm-hmm"."""

    at: int


@dataclass(frozen=True, slots=True)
class InputTranscribed:
    """The transcript of a turn; it may come after the answer has started."""

    turn: int
    text: str


@dataclass(frozen=True, slots=True)
class InputTranscriptionFailed:
    """A turn could not be transcribed; `message` says why in one sentence."""

    turn: int
    message: str


@dataclass(frozen=True, slots=True)
class PictureAttached:
    """The picture was added to the turn; marks that follow refer to it."""

    picture: int
    turn: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AnswerStarted:
    """An answer has started; 0 for an out-of-band response that could not start."""

    answer: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next text of an answer, as it is generated, without marks and thoughts."""

    answer: int
    text: str


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """The next text of the model's reasoning."""

    answer: int
    text: str


@dataclass(frozen=True, slots=True)
class MarkAdded:
    """A mark on `picture`, or on the newest one if that is None."""

    answer: int
    picture: int | None
    mark: Mark


@dataclass(frozen=True, slots=True)
class WordTiming:
    """A word of the answer: text[start:end] begins at `sample` of its audio."""

    start: int
    end: int
    sample: int


@dataclass(frozen=True, slots=True)
class AudioDelta:
    """Audio to play, from `sample` of the answer on; after a pause it may begin again at an earlier word."""

    answer: int
    sample: int
    pcm: np.ndarray = field(repr=False)  # float32 [n] in [-1, 1]
    rate: int
    words: tuple[WordTiming, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputCleared:
    """Discard the audio that was not played yet, and report with `PlaybackPosition` how far playback came. `start`: the sample
    since which there is speech over the answer, if that is the reason; `TurnStarted` or `FalseInterruption` follows."""

    answer: int
    start: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """The model calls a tool; the answer goes on after a `ToolResult` with this `call`."""

    answer: int
    call: int
    tool: ToolCall
    more: int = 0  # how many calls follow before the answer waits


@dataclass(frozen=True, slots=True)
class UsageCounted:
    """A part of an answer is complete, to its end or to its tool calls: the positions in the row before it, by kind, and the
    tokens generated."""

    answer: int
    text: int
    sound: int
    pictures: int
    tokens: int


@dataclass(frozen=True, slots=True)
class OutputSent:
    """All text and audio of the answer was emitted; only its playback goes on."""

    answer: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class AnswerDone:
    """The answer has ended: its whole `text`, and how many characters of it were heard."""

    answer: int
    text: str
    heard: int
    finish: Literal["stop", "length", "interrupted", "failed"]
    prompt: int  # positions in the row before it
    tokens: int


@dataclass(frozen=True, slots=True)
class AnswerTimings:
    """When each stage of an answer was reached, in milliseconds after the frame that ended the turn; `speech_end`, when the last
    word ended, is negative. `waiting`: positions that were not prefilled yet at that moment."""

    answer: int
    stages: Mapping[str, float]
    waiting: int


@dataclass(frozen=True, slots=True)
class UserIdle:
    """There has been no speech for `TurnDetectionConfig.idle` since the answer."""

    at: int


@dataclass(frozen=True, slots=True)
class EntriesEvicted:
    """What the model no longer has in its context, to stay in its budget; each is reported once."""

    gone: tuple[Evicted, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something went wrong and the conversation goes on; `message` is one sentence. `refused`: an input was rejected."""

    message: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """The conversation has failed; `message` says why in one sentence. Always the last event."""

    message: str


Event = (
    TurnStarted
    | TurnStopped
    | TurnDiscarded
    | FalseInterruption
    | InputTranscribed
    | InputTranscriptionFailed
    | PictureAttached
    | AnswerStarted
    | TextDelta
    | ThoughtDelta
    | MarkAdded
    | AudioDelta
    | OutputCleared
    | ToolCalled
    | UsageCounted
    | OutputSent
    | AnswerDone
    | AnswerTimings
    | UserIdle
    | EntriesEvicted
    | Notice
    | OutOfBandEvent
    | SessionFailed
)
