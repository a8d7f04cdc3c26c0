"""What goes into a conversation and what comes out of it: the words between `Session` and every door.

Time is counted in samples: of the microphone (16,000 a second) in `at`, of the answer's own sound (`AudioDelta.rate`) in
`sample`. An answer and a turn are known by their place on the tape.
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
    """Words that the user types. `ask`: an answer is wanted as soon as the turn can end."""

    text: str
    ask: bool = True


@dataclass(frozen=True, slots=True)
class PictureInput:
    """A picture file (JPEG, PNG, WebP). `live`: a camera's, of which the newest is looked at and all others are forgotten.
    `size`: height and width, which the session finds out."""

    data: bytes
    live: bool = False
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RecordedInput:
    """A whole turn of sound at once, float32 [n] at 16 kHz in [-1, 1]. `name`: what the door calls the turn."""

    samples: np.ndarray = field(repr=False)
    name: str | None = None


@dataclass(frozen=True, slots=True)
class PushToTalkStart:
    """Push to talk: the turn is open until `PushToTalkEnd`."""


@dataclass(frozen=True, slots=True)
class PushToTalkEnd:
    pass


@dataclass(frozen=True, slots=True)
class CommitTurn:
    """The open turn, or what waits in the input buffer, is complete. `ask` False: it is kept, and nobody answers yet. `name`:
    what the door calls the turn that the buffer becomes."""

    ask: bool = True
    name: str | None = None


@dataclass(frozen=True, slots=True)
class DiscardTurn:
    """What is being said now, and what waits in the input buffer, is to be forgotten."""


@dataclass(frozen=True, slots=True)
class CreateAnswer:
    """An answer is wanted to what is there."""


@dataclass(frozen=True, slots=True)
class EntryReference:
    """What was said in that turn, or the picture that was looked at there."""

    of: int


@dataclass(frozen=True, slots=True)
class CreateOutOfBandResponse:
    """A response out of band is wanted: an answer that the conversation does not keep. Its events come as `OutOfBandEvent` with
    this `name`, which the door chooses. `past`: what it is to answer instead of the conversation, the open turn of which it does
    not know. Its `calls` are told, and nobody waits for their results."""

    name: str
    past: tuple[AnswerInput, ...] | None = None
    setting: SystemPrompt | None = None
    max_tokens: int | None = None
    spoken: bool = True
    calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelAnswer:
    """The answer is to stop where it is; what was heard of it stays."""


@dataclass(frozen=True, slots=True)
class PlaybackPosition:
    """Of `answer` so many samples were really played. After `OutputCleared` the door says once more how many."""

    answer: int
    sample: int


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of a tool call. Where the answer does not wait for it any more, it is kept for the next one."""

    call: int
    value: Any


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """New settings; None leaves one as it is. They hold at once, but not for the answer that is being given; `setting` holds
    when that is over. `most`: tokens of an answer, no more than the session was made for. `calls`: an answer begins with a call
    of one of these tools."""

    setting: SystemPrompt | None = None
    detection: TurnDetectionConfig | None = None
    camera: Literal["off", "end", "live"] | None = None
    answers: bool | None = None
    max_tokens: int | None = None
    spoken: bool | None = None
    calls: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class TruncateAnswer:
    """Of `answer`, be it over or not, only so many samples were heard: what came after was never said. The door knows better
    than the `PlaybackPosition` that it told before."""

    answer: int
    sample: int


@dataclass(frozen=True, slots=True)
class PastAnswer:
    """An answer from an earlier conversation, which the door brings along: its words, its calls and what came of each."""

    text: str
    calls: tuple[tuple[ToolCall, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class SayText:
    """Words that the agent is to say of itself, as an answer that nobody asked for: an opening line."""

    text: str


@dataclass(frozen=True, slots=True)
class DeleteEntry:
    """The turn or answer never was."""

    of: int


@dataclass(frozen=True, slots=True)
class OutOfBandEvent:
    """What concerns the response out of band of this `name`: what the session tells of it, or Heard and Stop from the door. Its
    answer has a number of its own."""

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
    """Bytes of its words, pictures and recordings, about."""
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
    """The user has the floor; the turn's sound begins at `start`. `name`: of a turn that came from the door as a whole."""

    turn: int
    at: int
    start: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class TurnStopped:
    """The turn that began last is over; its last word was over at `end`. It is known by this `turn` from here on: history that
    came meanwhile stands before it."""

    turn: int
    at: int
    end: int
    why: EndReason


@dataclass(frozen=True, slots=True)
class TurnDiscarded:
    """The turn was none: a click, a tap, or forgotten by request."""

    turn: int
    at: int


@dataclass(frozen=True, slots=True)
class FalseInterruption:
    """The talk over an answer, told by `OutputCleared`, was no turn: a cough, an "mm-hmm"."""

    at: int


@dataclass(frozen=True, slots=True)
class InputTranscribed:
    """What was said in a turn; it may come after the answer began."""

    turn: int
    text: str


@dataclass(frozen=True, slots=True)
class InputTranscriptionFailed:
    """Nobody can tell what was said in a turn, and why: one sentence for a person."""

    turn: int
    message: str


@dataclass(frozen=True, slots=True)
class PictureAttached:
    """The picture is in the turn, and marks that follow are on it."""

    picture: int
    turn: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AnswerStarted:
    answer: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next words of an answer, as the model writes them: without marks and thoughts."""

    answer: int
    text: str


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    answer: int
    text: str


@dataclass(frozen=True, slots=True)
class MarkAdded:
    answer: int
    picture: int | None
    mark: Mark


@dataclass(frozen=True, slots=True)
class WordTiming:
    """A word of the answer: text[start:end] begins at `sample` of its sound."""

    start: int
    end: int
    sample: int


@dataclass(frozen=True, slots=True)
class AudioDelta:
    """Sound to play: it belongs at `sample` of the answer, also when an answer is taken up again at a word."""

    answer: int
    sample: int
    pcm: np.ndarray = field(repr=False)  # float32 [n] in [-1, 1]
    rate: int
    words: tuple[WordTiming, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputCleared:
    """Play nothing more of what was sent; say with `PlaybackPosition` how far it came. `start`: since when someone talks over the
    answer, where that is why; `TurnStarted` or `FalseInterruption` follows."""

    answer: int
    start: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """A tool is wanted; `ToolResult` with this `call` goes on with the answer."""

    answer: int
    call: int
    tool: ToolCall
    more: int = 0  # so many follow before the answer waits


@dataclass(frozen=True, slots=True)
class UsageCounted:
    """A stretch of an answer is written, up to its end or to the tools that it calls: positions that were in the row before it,
    by kind, and its tokens."""

    answer: int
    text: int
    sound: int
    pictures: int
    tokens: int


@dataclass(frozen=True, slots=True)
class OutputSent:
    """All words and all sound of the answer are out, and what is left is to be heard."""

    answer: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class AnswerDone:
    """The answer is over: all `text` of it, and how many characters of that were heard."""

    answer: int
    text: str
    heard: int
    finish: Literal["stop", "length", "interrupted", "failed"]
    prompt: int  # positions in the row before it
    tokens: int


@dataclass(frozen=True, slots=True)
class AnswerTimings:
    """When each stage of an answer was reached, in milliseconds after the frame came that ended the turn; `speech` is how long
    before that the last word was over. `waiting`: positions not yet in the row at that moment."""

    answer: int
    stages: Mapping[str, float]
    waiting: int


@dataclass(frozen=True, slots=True)
class UserIdle:
    """Nobody has said anything for as long as the manners allow."""

    at: int


@dataclass(frozen=True, slots=True)
class EntriesEvicted:
    """What the model does not remember any more, under its budget; each is told once."""

    gone: tuple[Evicted, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something went wrong and the conversation goes on: one sentence for a person. `refused`: something that the door gave was
    not taken."""

    message: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """The conversation is over: one sentence for a person. Always the last event."""

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
