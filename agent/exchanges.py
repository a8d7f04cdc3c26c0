"""What the entries of a tape say together: exchanges of a turn and the answers to it, read as the entries come.

Nothing is read twice: to compose a view from all 9,000 entries of two hours took 80 ms on the event loop, for every turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.tape import (
    Answered,
    Asked,
    Called,
    CallResult,
    Closed,
    Deleted,
    Entry,
    Heard,
    Opened,
    Part,
    Seen,
    Sound,
    SystemPrompt,
    Transcript,
    Typed,
)


@dataclass(eq=False)
class Reply:
    """One stretch of the model's writing, up to its end or to a tool."""

    entry: Answered
    goes_on: bool  # after the results of the reply before it
    thinks: bool  # begins inside an open thought
    heard: int | None = None
    calls: dict[int, Called] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)  # by call, in the order they came

    @property
    def waits(self) -> bool:
        return bool(self.calls) and (self.heard is None or self.heard >= len(self.entry.ids))


@dataclass(eq=False)
class Exchange:
    """A turn and what was answered to it; without a role where the model speaks first, or where the turn was deleted."""

    of: int
    role: str | None = None
    parts: list[int] = field(default_factory=list)  # places on the tape: their payload may leave memory
    closed: bool = True
    asked: bool = False
    thinking: bool = False
    transcript: str | None = None  # as far as it was known when the exchanges were last settled
    replies: list[Reply] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        return bool(self.replies) and self.replies[-1].waits

    @property
    def live(self) -> bool:
        return not self.closed or self.asked or self.waits


class Exchanges:
    """In order. `entries` may grow behind this one's back, as a tape does; `read` takes in what is new."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.setting = SystemPrompt()
        self.known: list[Exchange] = []
        self._entries, self._read = entries, 0
        self._turns: dict[int, Exchange] = {}
        self._replies: dict[int, tuple[Exchange, Reply]] = {}  # by answer, and by call
        self._told: dict[int, str] = {}  # transcripts that came since

    @property
    def live(self) -> Exchange | None:
        return self.known[-1] if self.known and self.known[-1].live else None

    def parts(self, x: Exchange) -> Iterator[tuple[int, Part]]:
        for index in x.parts:
            entry = self._entries[index]
            assert isinstance(entry, Sound | Typed | Seen)
            yield index, entry

    def pictures(self, x: Exchange) -> list[int]:
        return [index for index, part in self.parts(x) if isinstance(part, Seen) and part.data]

    def settle(self) -> None:
        """From here on the transcripts that came count. Between two of these a view only grows."""
        for of, text in self._told.items():
            if turn := self._turns.get(of):
                turn.transcript = text
        self._told.clear()

    def forget(self, gone: Collection[int]) -> None:
        """Those of these exchanges that hold no payload any more, and that nothing will be added to, are known no longer."""

        def stays(x: Exchange) -> bool:
            return x.of not in gone or x is self.known[-1] or any(getattr(part, "data", b"") for _, part in self.parts(x))

        self.known = [x for x in self.known if stays(x)]
        self._turns = {x.of: x for x in self.known if x.of in self._turns}
        there = set(map(id, self.known))
        self._replies = {index: of for index, of in self._replies.items() if id(of[0]) in there}

    def read(self, upto: int | None = None) -> None:
        """Takes in the entries that came since, or the first `upto` only."""
        for index in range(self._read, upto := len(self._entries) if upto is None else upto):
            self._take(index, self._entries[index])
        self._read = max(self._read, upto)

    def _take(self, index: int, entry: Entry) -> None:
        if isinstance(entry, Opened) or (isinstance(entry, Asked | Answered) and not self.known):
            self.known.append(Exchange(index))
        match entry:
            case SystemPrompt():
                self.setting = entry
            case Opened():
                self._turns[index] = last = self.known[-1]
                last.role, last.closed = entry.role, False
            case Sound() | Typed() | Seen():
                self.known[-1].parts.append(index)
            case Closed():
                self.known[-1].closed = True
            case Asked():
                last = self.known[-1]
                last.closed = True
                if not last.waits:
                    last.asked, last.thinking = True, self.setting.thinking
            case Answered():
                last = self.known[-1]
                last.replies.append(Reply(entry, last.waits, last.waits and last.thinking))
                self._replies[index] = last, last.replies[-1]
                last.closed, last.asked = True, False
            case Transcript():
                self._told[entry.of] = entry.text
            case Heard() | Called() | CallResult() if known := self._replies.get(entry.of):
                self._add(index, entry, *known)
            case Deleted():
                self._delete(entry.of)

    def _add(self, index: int, entry: Heard | Called | CallResult, of: Exchange, reply: Reply) -> None:
        match entry:
            case Heard():
                reply.heard = entry.ids
            case Called():
                self._replies[index] = of, reply
                reply.calls[index] = entry
            case CallResult():
                reply.results[entry.of] = entry.value

    def _delete(self, of: int) -> None:
        if turn := self._turns.get(of):
            turn.role, turn.parts, turn.closed, turn.transcript = None, [], True, None
            self._told.pop(of, None)
        elif known := self._replies.get(of):
            exchange, reply = known
            if of in reply.calls:
                del reply.calls[of]
                reply.results.pop(of, None)
            else:
                exchange.replies = [other for other in exchange.replies if other is not reply]
        elif turn := next((x for x in reversed(self.known) if of in x.parts), None):
            turn.parts.remove(of)
