"""What a row is to do, in order: the orders that a conversation gives, and the seat where they wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from time import perf_counter

from torch import Tensor

from agent.segments import Picture, Segment, View, size
from agent.tape import Sound
from model.cache import Row
from model.sampling import SamplingParams


@dataclass(eq=False)
class Append:
    segment: Segment
    cut: Future[tuple[Tensor, Tensor]] | None = None  # of a picture, once another thread decodes it
    drawn: Generate | None = None  # whose token it is
    again: bool = False  # it stood in the row before
    since: float = field(default_factory=perf_counter)
    done: int = 0  # positions that are in the row

    @property
    def left(self) -> int:
        return size(self.segment) - self.done


Parts = list[tuple[Append, int, int]]  # takes with their first position and the one after the last


@dataclass(eq=False)
class Rewrite:
    keep: int
    view: View


@dataclass(eq=False)
class Fork:
    child: Sequence


@dataclass(eq=False)
class Barrier:
    """Somebody wants to know when all before it is done."""

    tell: Callable[[Exception | None], None]


@dataclass(eq=False)
class Generate:
    sampling: SamplingParams
    max_tokens: int
    generator: Random  # one number of it for each token
    tell: Callable[[tuple[int, float] | Exception | None], None]
    cancelled: bool = False
    count: int = 0


Operation = Append | Rewrite | Fork | Barrier | Generate


@dataclass(eq=False)
class Sequence:
    """A row and what it is to do. The thread's own, but for `asked`, which the conversation counts."""

    tell: Callable[[Exception], None]
    parent: Sequence | None = None  # of a fork
    background: bool = False  # nobody waits for what it does
    row: Row | None = None
    at: int | None = None  # of a fork: the position of its parent where it begins, once the parent has come there
    todo: deque[Operation] = field(default_factory=deque)
    asked: int = 0  # positions
    taken: int = 0
    again: int = 0  # positions that are being written once more, and not yet taken
    gone: bool = False
    error: Exception | None = None  # what it was lost to

    @property
    def conversation(self) -> Sequence:
        """The row that this one is a fork of, or a fork's fork."""
        return self.parent.conversation if self.parent else self

    @property
    def awaited(self) -> bool:
        """Somebody waits for what this row is to do: it is to answer, or it is being spoken to."""
        return not self.background and any(
            (isinstance(op, Generate) and not op.cancelled)
            or (isinstance(op, Append) and isinstance(op.segment, Sound) and not op.again)
            for op in self.todo
        )

    def undecoded(self) -> Append | None:
        """The picture that is to be decoded next: one at a time and no further ahead than the second, so that conversations
        take turns at the decoder and decoded pictures (8 MB each) do not pile up."""
        pictures = islice((op for op in self.todo if isinstance(op, Append) and isinstance(op.segment, Picture)), 2)
        take = next((take for take in pictures if not (take.cut and take.cut.done())), None)
        return take if take and take.cut is None else None

    def due(self, most: int) -> Parts:
        """What can go into the row in one pass: takes with first and last position. A picture goes whole."""
        parts, count = [], 0
        for op in self.todo if self.row else ():
            if not isinstance(op, Append) or count >= most:
                break
            picture = isinstance(op.segment, Picture)
            if picture and (not (op.cut and op.cut.done()) or (count and count + op.left > most)):
                break
            stop = op.done + (op.left if picture else min(op.left, most - count))
            parts.append((op, op.done, stop))
            count += stop - op.done
        return parts

    def wanted(self, parts: Parts) -> Generate | None:
        """Who waits for the last of these positions."""
        last, _, stop = parts[-1]
        following = self.todo[len(parts)] if len(self.todo) > len(parts) and stop == size(last.segment) else None
        return following if isinstance(following, Generate) else None
