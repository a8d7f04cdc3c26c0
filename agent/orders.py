"""What a row is to do, in order: the orders that a conversation gives, and the seat where they wait."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from agent.segments import Segment, View, size
from model.cache import Row
from model.sampling import Generation


@dataclass(eq=False)
class Take:
    segment: Segment
    cut: Future[tuple[Tensor, Tensor]] | None = None  # of a picture, which another thread decodes
    drawn: Generate | None = None  # whose token it is
    again: bool = False  # it stood in the row before
    since: float = field(default_factory=perf_counter)
    done: int = 0  # positions that are in the row

    @property
    def left(self) -> int:
        return size(self.segment) - self.done


@dataclass(eq=False)
class Rewrite:
    keep: int
    view: View


@dataclass(eq=False)
class Fork:
    child: Seat


@dataclass(eq=False)
class Reach:
    """Somebody wants to know when all before it is done."""

    tell: Callable[[Exception | None], None]


@dataclass(eq=False)
class Generate:
    how: Generation
    most: int
    generator: torch.Generator | None
    tell: Callable[[tuple[int, float] | Exception | None], None]
    cancelled: bool = False
    count: int = 0


Op = Take | Rewrite | Fork | Reach | Generate


@dataclass(eq=False)
class Seat:
    """A row and what it is to do. The thread's own, but for `asked`, which the conversation counts."""

    tell: Callable[[Exception], None]
    parent: Seat | None = None  # of a fork: it works in the background
    row: Row | None = None
    at: int | None = None  # of a fork: the position of its parent where it begins, once the parent has come there
    todo: deque[Op] = field(default_factory=deque)
    asked: int = 0  # positions
    taken: int = 0
    again: int = 0  # positions that are being written once more, and not yet taken
    gone: bool = False
    error: Exception | None = None  # what it was lost to

    @property
    def awaited(self) -> float:
        """Since when somebody waits for what this row is to do; infinite where it works in the background."""
        takes = (op.since for op in self.todo if isinstance(op, Take) and not op.again)
        return math.inf if self.parent else next(takes, math.inf)

    def due(self, most: int) -> list[tuple[Take, int, int]]:
        """What can go into the row in one pass: takes with first and last position. A picture goes whole."""
        parts, count = [], 0
        for op in self.todo if self.row else ():
            if not isinstance(op, Take) or count >= most or (op.cut and not op.cut.done()):
                break
            if op.cut and count and count + op.left > most:
                break
            stop = op.done + (op.left if op.cut else min(op.left, most - count))
            parts.append((op, op.done, stop))
            count += stop - op.done
        return parts

    def wanted(self, parts: list[tuple[Take, int, int]]) -> Generate | None:
        """Who waits for the last of these positions."""
        last, _, stop = parts[-1]
        following = self.todo[len(parts)] if len(self.todo) > len(parts) and stop == size(last.segment) else None
        return following if isinstance(following, Generate) else None
