"""Groups the entries of a tape into exchanges (a turn and the answers to it) as they come.

Each entry is read once: to compose a view from all 9,000 entries of two hours took 80 ms on the event loop, for every turn.
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
class ModelOutput:
    """A part of an answer: what the model generated up to a stop token or to its tool calls."""

    entry: Answered
    continues: bool  # the part before it called tools, and this one follows their results
    starts_in_thought: bool
    heard: int | None = None  # ids that were heard; None: all
    calls: dict[int, Called] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)  # by call, in the order they came

    @property
    def awaits_results(self) -> bool:
        """It ended with tool calls that were all heard: the model goes on when their results are there."""
        return bool(self.calls) and (self.heard is None or self.heard >= len(self.entry.ids))


@dataclass(eq=False)
class Exchange:
    """A turn and the answers to it; `role` is None where the agent spoke first or the turn was deleted."""

    of: int  # index of its first entry on the tape
    role: str | None = None
    parts: list[int] = field(default_factory=list)  # indices on the tape; their payloads may have left memory
    closed: bool = True
    asked: bool = False
    thinking: bool = False
    transcript: str | None = None  # as of the last `apply_transcripts`
    outputs: list[ModelOutput] = field(default_factory=list)

    @property
    def awaits_results(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].awaits_results

    @property
    def live(self) -> bool:
        """The turn is open, or its answer is not complete."""
        return not self.closed or self.asked or self.awaits_results


class Exchanges:
    """The exchanges of a tape, in order. `entries` grows as the tape does; `read` processes the new ones."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.setting = SystemPrompt()
        self.items: list[Exchange] = []
        self._entries, self._count_read = entries, 0
        self._turns: dict[int, Exchange] = {}
        self._outputs: dict[int, tuple[Exchange, ModelOutput]] = {}  # by index of an answer or of a call
        self._new_transcripts: dict[int, str] = {}  # by turn; not applied yet

    @property
    def live(self) -> Exchange | None:
        return self.items[-1] if self.items and self.items[-1].live else None

    def parts(self, x: Exchange) -> Iterator[tuple[int, Part]]:
        for index in x.parts:
            entry = self._entries[index]
            assert isinstance(entry, Sound | Typed | Seen)
            yield index, entry

    def pictures(self, x: Exchange) -> list[int]:
        """Indices of its pictures that are in memory."""
        return [index for index, part in self.parts(x) if isinstance(part, Seen) and part.data]

    def apply_transcripts(self) -> None:
        """Applies the transcripts that came since the last call. In between, a view only grows at its end."""
        for of, text in self._new_transcripts.items():
            if turn := self._turns.get(of):
                turn.transcript = text
        self._new_transcripts.clear()

    def prune(self, invisible: Collection[int]) -> None:
        """Forgets those of the `invisible` exchanges that have no payload in memory and to which nothing will be added."""

        def needed(x: Exchange) -> bool:
            return x.of not in invisible or x is self.items[-1] or any(getattr(part, "data", b"") for _, part in self.parts(x))

        self.items = [x for x in self.items if needed(x)]
        self._turns = {x.of: x for x in self.items if x.of in self._turns}
        kept = set(map(id, self.items))
        self._outputs = {index: of for index, of in self._outputs.items() if id(of[0]) in kept}

    def read(self, upto: int | None = None) -> None:
        """Processes the new entries, or only those before index `upto`."""
        for index in range(self._count_read, upto := len(self._entries) if upto is None else upto):
            self._add(index, self._entries[index])
        self._count_read = max(self._count_read, upto)

    def _add(self, index: int, entry: Entry) -> None:
        if isinstance(entry, Opened) or (isinstance(entry, Asked | Answered) and not self.items):
            self.items.append(Exchange(index))
        match entry:
            case SystemPrompt():
                self.setting = entry
            case Opened():
                self._turns[index] = last = self.items[-1]
                last.role, last.closed = entry.role, False
            case Sound() | Typed() | Seen():
                self.items[-1].parts.append(index)
            case Closed():
                self.items[-1].closed = True
            case Asked():
                last = self.items[-1]
                last.closed = True
                if not last.awaits_results:
                    last.asked, last.thinking = True, self.setting.thinking
            case Answered():
                last = self.items[-1]
                last.outputs.append(ModelOutput(entry, last.awaits_results, last.awaits_results and last.thinking))
                self._outputs[index] = last, last.outputs[-1]
                last.closed, last.asked = True, False
            case Transcript():
                self._new_transcripts[entry.of] = entry.text
            case Heard() | Called() | CallResult() if found := self._outputs.get(entry.of):
                self._add_fact(index, entry, *found)
            case Deleted():
                self._delete(entry.of)

    def _add_fact(self, index: int, entry: Heard | Called | CallResult, of: Exchange, output: ModelOutput) -> None:
        match entry:
            case Heard():
                output.heard = entry.ids
            case Called():
                self._outputs[index] = of, output
                output.calls[index] = entry
            case CallResult():
                output.results[entry.of] = entry.value

    def _delete(self, of: int) -> None:
        if turn := self._turns.get(of):
            turn.role, turn.parts, turn.closed, turn.transcript = None, [], True, None
            self._new_transcripts.pop(of, None)
        elif found := self._outputs.get(of):
            exchange, output = found
            if of in output.calls:
                del output.calls[of]
                output.results.pop(of, None)
            else:
                exchange.outputs = [other for other in exchange.outputs if other is not output]
        elif turn := next((x for x in reversed(self.items) if of in x.parts), None):
            turn.parts.remove(of)
