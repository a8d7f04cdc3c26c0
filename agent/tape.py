"""The tape of a conversation: an append-only list of what was said, seen and answered, in memory and optionally in a journal.

Entries refer to earlier ones by index. No entry is changed later: a transcript, how much of an answer was heard, a tool result
and a deletion are entries of their own. Only payloads (samples, JPEGs) leave memory: those that no view will need again
(`Dropped`), and everything that was `Deleted`. Which part of the tape a row should hold: agent/view.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from agent.journal import Journal, JournalError, records
from streams.frames import FRAME

# ---- entries


@dataclass(frozen=True)
class SystemPrompt:
    """The system prompt at the start of the row; the last one counts. `tools` in OpenAI's format."""

    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = False


@dataclass(frozen=True)
class Opened:
    """A turn begins; its parts follow until Closed or Asked. `at`: the sample on the microphone's clock."""

    role: str = "user"
    at: int = 0


@dataclass(frozen=True)
class Sound:
    """Whole frames as little-endian int16. A row is prefilled from `samples`, never from the original float samples, so that a
    row rebuilt from the tape holds exactly the same."""

    data: bytes
    frame: int = FRAME

    @classmethod
    def of(cls, samples: NDArray[np.float32]) -> Sound:
        """From float32 [frame] or [n, frame] in [-1, 1]."""
        pcm = np.rint(samples * 32768).clip(-32768, 32767).astype("<i2")
        return cls(pcm.tobytes(), samples.shape[-1])

    @property
    def samples(self) -> NDArray[np.float32]:
        """float32 [n, frame] in [-1, 1]."""
        samples = np.frombuffer(self.data, "<i2").astype(np.float32)
        samples /= 32768
        return samples.reshape(-1, self.frame)

    @property
    def positions(self) -> int:
        return len(self.data) // (2 * self.frame)


@dataclass(frozen=True)
class Typed:
    """Text in a turn."""

    text: str


@dataclass(frozen=True)
class Seen:
    """A picture in a turn: the file's bytes, its upright size in pixels, its budget in soft tokens, the sample at which it was
    taken; for one of a stream, `seconds` on the camera's clock, which are written before it."""

    data: bytes
    height: int
    width: int
    budget: int = 280
    at: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Closed:
    """The turn has ended; no answer follows."""


@dataclass(frozen=True)
class Asked:
    """The turn, if one is open, has ended, and an answer begins."""


@dataclass(frozen=True)
class Answered:
    """What the model generated: every sampled id, with thoughts, calls and the stop token, and its text. Without ids (an answer
    that a client supplied) the text counts."""

    ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Heard:
    """Only the first `ids` ids of the answer `of` were heard. The last such entry counts."""

    of: int
    ids: int


@dataclass(frozen=True)
class Called:
    """A tool call in the answer `of`; the model waits for its CallResult and then goes on in the same turn."""

    of: int
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CallResult:
    """The result of the call `of`."""

    of: int
    value: Any


@dataclass(frozen=True)
class Transcript:
    """The transcript of all sound in the finished turn `of`; empty if there were no intelligible words."""

    of: int
    text: str


@dataclass(frozen=True)
class Dropped:
    """The sound of these turns, and these pictures, are no longer in memory."""

    of: tuple[int, ...]


@dataclass(frozen=True)
class Deleted:
    """The turn, answer, call or sound `of` is deleted."""

    of: int


Part = Sound | Typed | Seen
Entry = SystemPrompt | Opened | Part | Closed | Asked | Answered | Heard | Called | CallResult | Transcript | Dropped | Deleted


# ---- the tape

TARGETS = {Heard: Answered, Called: Answered, CallResult: Called, Transcript: Opened, Deleted: Opened | Answered | Called | Sound}
MAX_SOUND = 320_000  # bytes of sound in one entry: 10 s
BOUND = 256 << 20  # bytes of a journal: more than two hours of sound


class Tape:
    """`model`: the checkpoint whose token ids these are. Without a journal, the default, nothing is written to disk."""

    def __init__(self, model: str = "", journal: Journal | None = None) -> None:
        self.model, self._journal = model, journal
        self._entries: list[Entry] = []
        self._open: int | None = None  # the index of the open turn

    @classmethod
    def create(cls, path: Path, model: str = "", bound: int = BOUND) -> Tape:
        """A new tape with a journal of at most `bound` bytes; beyond that, the oldest payloads are dropped from tape and file
        until half is free. Raises JournalError if the file exists or cannot be written."""
        return cls(model, Journal(path, bound, json.dumps({"model": model}).encode()))

    @classmethod
    def load(cls, path: Path, bound: int = BOUND) -> Tape:
        """Loads a tape from its journal and goes on in it. A torn last record (kill -9) is cut off. Raises JournalError."""
        bodies = records(path)
        head, size = next(bodies, (b"", 0))
        if not head:
            raise JournalError(f"the journal {path} is empty")
        tape = cls(json.loads(head)["model"])
        for body, size in bodies:
            entry = _read(body)
            if entry is None or not tape.fits(entry):
                raise JournalError(f"the journal {path} is damaged: the record that ends at byte {size:,} does not belong there")
            tape._add(entry)
        tape._journal = Journal(path, bound, head, size)
        return tape

    @property
    def entries(self) -> Sequence[Entry]:
        return self._entries

    def append(self, entry: Entry) -> int:
        """Returns the entry's index. Raises JournalError if the file cannot be written; `close` then goes on in memory."""
        assert self.fits(entry), entry
        if self._journal:
            body = _body(entry)
            if not self._journal.room(body):
                self._shrink(self._journal)
                if not self._journal.room(body):
                    raise JournalError(f"the journal {self._journal.path} is full and nothing in it can be dropped")
            self._journal.append(body)
        self._add(entry)
        if self._journal and isinstance(entry, Deleted):  # deleted on disk too
            self._journal.rewrite(map(_body, self._entries))
        return len(self._entries) - 1

    def copy(self) -> Tape:
        """A copy without the open turn and without a journal."""
        copy, end = Tape(self.model), len(self._entries) if self._open is None else self._open
        facts = (Heard, CallResult, Transcript, Deleted)  # kept if they are about an entry before that turn
        copy._entries = self._entries[:end]
        copy._entries += [e for e in self._entries[end:] if isinstance(e, SystemPrompt) or (isinstance(e, facts) and e.of < end)]
        return copy

    def close(self) -> None:
        """Closes the journal; the tape goes on in memory."""
        if self._journal:
            self._journal.close()
            self._journal = None

    def fits(self, entry: Entry) -> bool:
        """Whether the entry is valid here: parts need an open turn, and a reference needs an entry of the right kind."""

        def exists(index: int, kinds: Any) -> bool:
            return 0 <= index < len(self._entries) and isinstance(self._entries[index], kinds)

        match entry:
            case Sound() if len(entry.data) % (2 * entry.frame):
                return False
            case Sound() | Typed() | Seen() | Closed():
                return self._open is not None
            case Dropped():
                return all(exists(index, Opened | Seen) for index in entry.of)
            case Transcript():
                return entry.of != self._open and exists(entry.of, Opened)
            case Heard() | Called() | CallResult() | Deleted():
                return exists(entry.of, TARGETS[type(entry)])
        return True

    def _add(self, entry: Entry) -> None:
        last = self._entries[-1] if self._entries else None
        if isinstance(entry, Sound) and isinstance(last, Sound) and last.frame == entry.frame and len(last.data) < MAX_SOUND:
            # Frames come 25 times a second; two hours of them as entries made every view take 100 ms.
            self._entries[-1] = replace(last, data=last.data + entry.data)
            return
        self._entries.append(entry)
        match entry:
            case Opened():
                self._open = len(self._entries) - 1
            case Closed() | Asked() | Answered():
                self._open = None
            case Dropped():
                for index in entry.of:
                    self._blank(index, words=False)
            case Deleted():
                self._blank(entry.of, words=True)
                self._open = None if self._open == entry.of else self._open

    def _blank(self, of: int, words: bool) -> None:
        """Empties the payloads of a turn or a picture; with `words` also all text of a turn, an answer or a call."""
        turn, about = isinstance(self._entries[of], Opened), {of}
        for index in range(of, len(self._entries)):
            entry = self._entries[index]
            turn = turn and (index == of or not isinstance(entry, Opened))
            if not (turn or words or index == of):
                break
            part = isinstance(entry, Sound | Typed | Seen if words else Sound)  # a picture outlives its turn's sound
            if (turn and part) or index in about or getattr(entry, "of", None) in about:
                self._entries[index] = _emptied(entry, words)
                if isinstance(entry, Called):
                    about.add(index)

    def _shrink(self, journal: Journal) -> None:
        excess = sum(len(getattr(entry, "data", b"")) for entry in self._entries) - journal.bound // 2
        dropped, turn = set(), -1
        for index, entry in enumerate(self._entries):
            turn = index if isinstance(entry, Opened) else turn
            if excess <= 0 or turn == self._open:
                break
            if isinstance(entry, Sound | Seen) and entry.data:
                dropped.add(turn if isinstance(entry, Sound) else index)
                excess -= len(entry.data)
        if dropped:
            entry = Dropped(tuple(sorted(dropped)))
            journal.append(_body(entry))
            self._add(entry)
        journal.rewrite(map(_body, self._entries))


def _emptied(entry: Entry, words: bool) -> Entry:
    match entry:
        case Sound() | Seen():
            return replace(entry, data=b"")
        case Typed() | Transcript() if words:
            return replace(entry, text="")
        case Answered() if words:
            return Answered(())
        case Called() if words:
            return replace(entry, arguments={})
        case CallResult() if words:
            return replace(entry, value=None)
    return entry


# ---- entries as bytes

KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Entry)}


def _body(entry: Entry) -> bytes:
    """One line of JSON, then the payload as raw bytes."""
    named = {field.name: getattr(entry, field.name) for field in fields(entry)}
    data: bytes = named.pop("data", b"")
    return json.dumps({"kind": type(entry).__name__, **named}, separators=(",", ":")).encode() + b"\n" + data


def _read(body: bytes) -> Entry | None:
    line, _, data = body.partition(b"\n")
    try:
        named = json.loads(line)
        kind = KINDS[named.pop("kind")]
        for name in {"ids", "tools", "of"} & named.keys():
            named[name] = tuple(named[name]) if isinstance(named[name], list) else named[name]
        entry: Entry = kind(**named, **({"data": data} if kind in (Sound, Seen) else {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry
