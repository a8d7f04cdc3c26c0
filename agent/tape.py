"""The tape of a conversation: what was said, seen and answered, append-only, in memory and if wanted in a journal on disk.

Entries refer to earlier ones by their index. Nothing is changed afterwards: a transcript, how much of an answer was heard,
a tool's result, a deletion are entries of their own. What may leave memory is the payload (samples, JPEGs) that no view
will want again, said by `Dropped`, and all that was `Deleted`. What a row should hold of it: agent/view.py.
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
    """What stands before everything; the last one counts. `tools` in OpenAI's form."""

    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = False


@dataclass(frozen=True)
class Opened:
    """A turn begins; its parts follow until Closed or Asked. `at`: the sample on the stream's clock."""

    role: str = "user"
    at: int = 0


@dataclass(frozen=True)
class Sound:
    """Whole frames as little-endian int16. A row is fed with `samples`, never with what they were made of: so that it hears
    exactly what the tape can give again."""

    data: bytes
    frame: int = FRAME

    @classmethod
    def of(cls, samples: NDArray[np.float32]) -> Sound:
        """From float32 [frame] or [n, frame] in [-1, 1]."""
        pcm = np.rint(samples * 32768).clip(-32768, 32767).astype("<i2")
        return cls(pcm.tobytes(), samples.shape[-1])

    @property
    def samples(self) -> NDArray[np.float32]:
        """[n, frame]"""
        samples = np.frombuffer(self.data, "<i2").astype(np.float32)
        samples /= 32768
        return samples.reshape(-1, self.frame)

    @property
    def positions(self) -> int:
        return len(self.data) // (2 * self.frame)


@dataclass(frozen=True)
class Typed:
    text: str


@dataclass(frozen=True)
class Seen:
    """A picture that was looked at: the file's bytes, its upright size in pixels, its budget in soft tokens, the sample at
    which it was taken; `seconds` on the camera's clock, written before it where it is one of a stream."""

    data: bytes
    height: int
    width: int
    budget: int = 280
    at: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Closed:
    """The turn has ended; nobody is asked to answer."""


@dataclass(frozen=True)
class Asked:
    """The turn, if one is open, has ended, and the model's begins."""


@dataclass(frozen=True)
class Answered:
    """What the model wrote: every id that was sampled, thoughts, calls and the stop token included, and the words of it.
    Without ids (an answer that a client brought along) the words are what counts."""

    ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Heard:
    """Of the answer `of` only the first `ids` ids were heard. The last one counts."""

    of: int
    ids: int


@dataclass(frozen=True)
class Called:
    """A tool that the answer `of` called; the model waits for its Result and then goes on in the same turn."""

    of: int
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CallResult:
    """What came of the call `of`."""

    of: int
    value: Any


@dataclass(frozen=True)
class Transcript:
    """The words of all sound in the finished turn `of`; empty where there were none or nobody could tell."""

    of: int
    text: str


@dataclass(frozen=True)
class Dropped:
    """The sound of these turns and these pictures are no longer in memory."""

    of: tuple[int, ...]


@dataclass(frozen=True)
class Deleted:
    """The turn, answer, call or piece of sound `of` never was."""

    of: int


Part = Sound | Typed | Seen
Entry = SystemPrompt | Opened | Part | Closed | Asked | Answered | Heard | Called | CallResult | Transcript | Dropped | Deleted


# ---- the tape

REFERS = {Heard: Answered, Called: Answered, CallResult: Called, Transcript: Opened, Deleted: Opened | Answered | Called | Sound}
JOINED = 320_000  # bytes of sound in one entry: 10 s
BOUND = 256 << 20  # bytes of a journal: more than two hours of sound


class Tape:
    """`model`: the checkpoint whose ids these are. Without a journal, which is the default, nothing leaves memory."""

    def __init__(self, model: str = "", journal: Journal | None = None) -> None:
        self.model, self._journal = model, journal
        self._entries: list[Entry] = []
        self._open: int | None = None  # the turn that takes parts

    @classmethod
    def create(cls, path: Path, model: str = "", bound: int = BOUND) -> Tape:
        """A new tape with a journal of at most `bound` bytes: past it, the oldest payloads leave tape and file until half is
        free. Raises JournalError if the file exists or cannot be written."""
        return cls(model, Journal(path, bound, json.dumps({"model": model}).encode()))

    @classmethod
    def load(cls, path: Path, bound: int = BOUND) -> Tape:
        """The tape in a journal, to go on with. A torn last record (kill -9) is cut off. Raises JournalError."""
        bodies = records(path)
        head, size = next(bodies, (b"", 0))
        if not head:
            raise JournalError(f"the journal {path} holds nothing")
        tape = cls(json.loads(head)["model"])
        for body, size in bodies:
            entry = _read(body)
            if entry is None or not tape.fits(entry):
                raise JournalError(f"the journal {path} is damaged: what ends at byte {size:,} does not belong there")
            tape._take(entry)
        tape._journal = Journal(path, bound, head, size)
        return tape

    @property
    def entries(self) -> Sequence[Entry]:
        return self._entries

    def append(self, entry: Entry) -> int:
        """The entry's index. Raises JournalError where the file cannot follow; `close` then goes on without it."""
        assert self.fits(entry), entry
        if self._journal:
            body = _body(entry)
            if not self._journal.room(body):
                self._shrink(self._journal)
                if not self._journal.room(body):
                    raise JournalError(f"the journal {self._journal.path} is full and nothing in it can be let go")
            self._journal.append(body)
        self._take(entry)
        if self._journal and isinstance(entry, Deleted):  # deleted is deleted: on the disk too
            self._journal.rewrite(map(_body, self._entries))
        return len(self._entries) - 1

    def copy(self) -> Tape:
        """What it says so far but for the open turn, without a journal."""
        copy, end = Tape(self.model), len(self._entries) if self._open is None else self._open
        facts = (Heard, CallResult, Transcript, Deleted)  # about what was before that turn
        copy._entries = self._entries[:end]
        copy._entries += [e for e in self._entries[end:] if isinstance(e, SystemPrompt) or (isinstance(e, facts) and e.of < end)]
        return copy

    def close(self) -> None:
        """The journal is closed; the tape goes on in memory."""
        if self._journal:
            self._journal.close()
            self._journal = None

    def fits(self, entry: Entry) -> bool:
        """Whether the entry makes sense here: parts go into an open turn, facts are about what there is."""

        def there(index: int, kinds: Any) -> bool:
            return 0 <= index < len(self._entries) and isinstance(self._entries[index], kinds)

        match entry:
            case Sound() if len(entry.data) % (2 * entry.frame):
                return False
            case Sound() | Typed() | Seen() | Closed():
                return self._open is not None
            case Dropped():
                return all(there(index, Opened | Seen) for index in entry.of)
            case Transcript():
                return entry.of != self._open and there(entry.of, Opened)
            case Heard() | Called() | CallResult() | Deleted():
                return there(entry.of, REFERS[type(entry)])
        return True

    def _take(self, entry: Entry) -> None:
        last = self._entries[-1] if self._entries else None
        if isinstance(entry, Sound) and isinstance(last, Sound) and last.frame == entry.frame and len(last.data) < JOINED:
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
        """Empties the payloads of a turn or a picture; with `words` all that a turn, an answer or a call ever said."""
        turn, about = isinstance(self._entries[of], Opened), {of}
        for index in range(of, len(self._entries)):
            entry = self._entries[index]
            turn = turn and (index == of or not isinstance(entry, Opened))
            if not (turn or words or index == of):
                break
            part = isinstance(entry, Sound | Typed | Seen if words else Sound)  # of a turn whose sound goes, a picture stays
            if (turn and part) or index in about or getattr(entry, "of", None) in about:
                self._entries[index] = _emptied(entry, words)
                if isinstance(entry, Called):
                    about.add(index)

    def _shrink(self, journal: Journal) -> None:
        spare = sum(len(getattr(entry, "data", b"")) for entry in self._entries) - journal.bound // 2
        gone, turn = set(), -1
        for index, entry in enumerate(self._entries):
            turn = index if isinstance(entry, Opened) else turn
            if spare <= 0 or turn == self._open:
                break
            if isinstance(entry, Sound | Seen) and entry.data:
                gone.add(turn if isinstance(entry, Sound) else index)
                spare -= len(entry.data)
        if gone:
            journal.append(_body(dropped := Dropped(tuple(sorted(gone)))))
            self._take(dropped)
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
    """One line of JSON, then the payload as it is."""
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
