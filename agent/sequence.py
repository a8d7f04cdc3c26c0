"""The operations that a conversation submits for its row, and the sequence in which they wait for the engine's thread."""

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
    """Writes a segment to the row."""

    segment: Segment
    patches: Future[tuple[Tensor, Tensor]] | None = None  # of a picture, once its decoding has begun on another thread
    sampled_by: Generate | None = None  # set where the segment is a token that this generation sampled
    rewritten: bool = False  # these positions were in the row before
    since: float = field(default_factory=perf_counter)
    done: int = 0  # positions that are in the row

    @property
    def remaining(self) -> int:
        return size(self.segment) - self.done


Parts = list[tuple[Append, int, int]]  # each with the first of its positions in a pass, and the one after the last


@dataclass(eq=False)
class Rewrite:
    """Makes the row hold `view`, of which its first `keep` positions are there already."""

    keep: int
    view: View


@dataclass(eq=False)
class Fork:
    """Copies the row to a spare one for `child`."""

    child: Sequence


@dataclass(eq=False)
class Barrier:
    """Calls back when all operations before it are done, with None, or with the error that the row was lost to."""

    callback: Callable[[Exception | None], None]


@dataclass(eq=False)
class Generate:
    """Samples tokens after the operation before it. `callback` gets each token with its log-probability; None at the end, or the
    error that the row was lost to."""

    sampling: SamplingParams
    max_tokens: int
    generator: Random  # one number of it for each token
    callback: Callable[[tuple[int, float] | Exception | None], None]
    cancelled: bool = False
    count: int = 0


Operation = Append | Rewrite | Fork | Barrier | Generate


@dataclass(eq=False)
class Sequence:
    """A row and its pending operations. Only the engine's thread changes it, except for `submitted`, which the conversation
    counts."""

    lost: Callable[[Exception], None]  # called with the error that the row was lost to
    parent: Sequence | None = None  # of a fork
    background: bool = False  # nobody waits for what it does
    row: Row | None = None
    fork_position: int | None = None  # of a fork: the parent's length where it begins, once the parent has got there
    pending: deque[Operation] = field(default_factory=deque)
    submitted: int = 0  # positions to append, since the sequence began
    written: int = 0  # of those, positions that are in the row
    rewriting: int = 0  # positions that were in the row before and are not yet there again
    ended: bool = False  # it has given its row back
    error: Exception | None = None  # what the row was lost to

    @property
    def conversation(self) -> Sequence:
        """The conversation's own sequence, of which this one is a fork, or a fork of a fork."""
        return self.parent.conversation if self.parent else self

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for this row: it is to answer, or the user is speaking to it."""
        return not self.background and any(
            (isinstance(op, Generate) and not op.cancelled)
            or (isinstance(op, Append) and isinstance(op.segment, Sound) and not op.rewritten)
            for op in self.pending
        )

    def next_picture(self) -> Append | None:
        """The picture to decode next: one at a time and no further ahead than the second, so that conversations take turns at
        the decoder and decoded pictures (8 MB each) do not pile up."""
        pictures = islice((op for op in self.pending if isinstance(op, Append) and isinstance(op.segment, Picture)), 2)
        picture = next((op for op in pictures if not (op.patches and op.patches.done())), None)
        return picture if picture and picture.patches is None else None

    def due(self, limit: int) -> Parts:
        """What can be written in one pass: at most `limit` positions, or one picture, which is never split."""
        parts, count = [], 0
        for op in self.pending if self.row else ():
            if not isinstance(op, Append) or count >= limit:
                break
            picture = isinstance(op.segment, Picture)
            if picture and (not (op.patches and op.patches.done()) or (count and count + op.remaining > limit)):
                break
            stop = op.done + (op.remaining if picture else min(op.remaining, limit - count))
            parts.append((op, op.done, stop))
            count += stop - op.done
        return parts

    def generation_after(self, parts: Parts) -> Generate | None:
        """The generation that samples from the last of these positions, if there is one."""
        last, _, stop = parts[-1]
        following = self.pending[len(parts)] if len(self.pending) > len(parts) and stop == size(last.segment) else None
        return following if isinstance(following, Generate) else None
