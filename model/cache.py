"""Rows of fixed memory for keys and values.

A full layer keeps every position of a row, flat. A sliding layer keeps a ring of window + slack positions: position p
stands at slot p mod (window + slack). The slack is what makes two things possible: a chunk of up to slack + 1 positions
can be written before it is read, and a row can be cut back by up to slack + 1 positions without having lost any that its
window still needs. Which position a slot holds is computed from where the row ends, never stored; what a cut leaves
behind in a ring then reads as older than the window and is masked.

Every row has one slot more than it can use: rows that lie between the rows of a step, but take no part in it, write there.
So a step runs over one contiguous slice of rows, copies nothing, and has static shapes (`whole=True`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.gemma import Config, Layer
    from model.step import Step

SLACK = 1152  # more than the largest picture (1,120 positions), and about 45 s of sound
SPOKEN = 40  # positions beside a picture that can be cut back at least


class RowFull(ValueError):
    """A row cannot take that many positions, or cannot be cut back that far; the message names the limit."""


class NoRow(RuntimeError):
    """Every row is taken."""


@dataclass(eq=False)
class Row:
    """One conversation's place in the cache. `length` positions are in it; `high` is the longest it has been."""

    index: int
    length: int = 0
    high: int = 0


@dataclass(frozen=True)
class Reach:
    """What layers of one kind need to know of a pass."""

    cos: Tensor  # [B, T, 1, D], halves alike
    sin: Tensor  # the first half negated
    mask: Tensor | None  # None: all is seen; [B, 1, heads per key head * T, n], added to the scores
    slots: Tensor | None = None  # [B, T] where the new positions are written
    first: int = 0  # slot that is read, and those after it
    live: int = 0  # slots that are read


@dataclass(frozen=True)
class Span:
    """Where the positions of one pass stand and what they see: computed once, used by every layer."""

    reaches: dict[Layer, Reach]
    first: int = 0  # the slice of rows that the pass runs over
    count: int = 0
    members: Tensor | None = None  # places in that slice of the rows that take part; None: all, in order

    def spread(self, x: Tensor) -> Tensor:
        """[rows that take part, T, H] -> [rows of the slice, T, H]."""
        if self.members is None:
            return x
        wide = x.new_zeros(self.count, *x.shape[1:])
        wide[self.members] = x
        return wide

    def gather(self, x: Tensor) -> Tensor:
        return x if self.members is None else x[self.members]


@dataclass(frozen=True)
class Memory:
    """Keys and values of one layer for the rows of a pass, [B, heads, slots, D] each."""

    keys: Tensor
    values: Tensor

    def exchange(self, key: Tensor, value: Tensor, reach: Reach) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values [B, heads, T, D]; returns all that can be seen [B, heads, n, D]."""
        assert reach.slots is not None, "the span was made for no cache"
        if key.shape[0] == 1:  # half the time of the general way
            slots = reach.slots[0]
            self.keys.index_copy_(2, slots, key)
            self.values.index_copy_(2, slots, value)
        else:
            every = torch.arange(key.shape[0], device=key.device)[:, None]
            self.keys[every, :, reach.slots] = key.transpose(1, 2)
            self.values[every, :, reach.slots] = value.transpose(1, 2)
        return self.keys.narrow(2, reach.first, reach.live), self.values.narrow(2, reach.first, reach.live)


def whole_span(config: Config, count: int, blocks: Tensor | None, dtype: torch.dtype, device: torch.device) -> Span:
    """The span of a batch without a cache: positions 0..count-1, each row seeing itself only. `blocks` [B, T] or None.

    Rows shorter than `count` are padded at their end, where nothing that counts can see the padding."""
    at = torch.arange(count, device=device)[None]
    reaches = {
        layer: Reach(*_turn(layer, at, dtype), _mask(config, layer, at, at, blocks, blocks, dtype))
        for layer in set(config.layers)
    }
    return Span(reaches)


def _mask(
    config: Config,
    layer: Layer,
    query: Tensor,
    key: Tensor,
    query_block: Tensor | None,
    key_block: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Positions query [B, T] looking at positions key [B, n]; a negative key position holds nothing.

    Full layers are causal. Sliding layers see the window, and within it all of their own picture (model card of Gemma 4;
    the symmetric window matters only for pictures longer than it)."""
    q, k = query[:, :, None], key[:, None, :]
    allowed = (k <= q) & (k >= 0)
    if layer.sliding:
        if query_block is not None and key_block is not None:
            allowed = allowed | ((query_block[:, :, None] == key_block[:, None, :]) & (query_block[:, :, None] >= 0))
            allowed = allowed & (k < q + config.window)
        allowed = allowed & (k > q - config.window)
    mask = torch.where(allowed, 0.0, -torch.inf).to(dtype)
    group = config.heads // layer.kv_heads
    return mask.repeat(1, group, 1)[:, None]


def _turn(layer: Layer, query: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = query[:, :, None, None].float() * frequencies(layer, query.device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@lru_cache
def frequencies(layer: Layer, device: torch.device) -> Tensor:
    """Angles of one position, float32 [D/2]: theta^(-2i/D) for the pairs that turn, 0 for the rest ("proportional" RoPE)."""
    half = layer.head_dim // 2
    pair = torch.arange(half, dtype=torch.float32, device=device)
    turning = int(layer.rotated * layer.head_dim // 2)
    return torch.where(pair < turning, layer.theta ** (-pair / half), 0.0)


@dataclass(frozen=True)
class Room:
    """Rows of a cache, of so many positions each, that take pictures of up to `budget` soft tokens."""

    rows: int
    length: int
    budget: int

    @property
    def least_slack(self) -> int:
        """A picture goes in at once. What is longer is not cut back but written anew. For the 12B 320 positions instead of SLACK
        save 260 MiB a row."""
        return min(SLACK, self.budget + SPOKEN)

    def bytes_per_row(self, config: Config, dtype: torch.dtype, slack: int | None = None) -> int:
        """With the least slack that serves, unless another is said."""
        slack = self.least_slack if slack is None else slack
        return Cache.bytes_per_row(config, min(self.length, config.max_positions), slack, dtype)

    def slack(self, config: Config, dtype: torch.dtype, free: int | None) -> int:
        """The usual slack where rows with it fit into what is free; less where they do not, as much as fits."""
        if free is None:
            return SLACK
        sizes = (SLACK, (SLACK + self.least_slack) // 2)
        return next((x for x in sizes if self.rows * self.bytes_per_row(config, dtype, x) <= free), self.least_slack)


NO_ROWS = Room(0, 0, 0)


class Cache:
    """`rows` rows of up to `length` positions. Memory is taken at once and never grows."""

    def __init__(
        self,
        config: Config,
        rows: int,
        length: int,
        *,
        slack: int = SLACK,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.length, self.slack = config, length, slack
        self.device, self.dtype = torch.device(device), dtype
        shapes = [(rows, x.kv_heads, self.slots(x) + 1, x.head_dim) for x in config.layers]
        # Zeros, not garbage: a masked score of NaN would still be NaN.
        self.keys = [torch.zeros(s, device=device, dtype=dtype) for s in shapes]
        self.values = [torch.zeros(s, device=device, dtype=dtype) for s in shapes]
        self._free = list(range(rows))
        self.step: Step | None = None  # what steps on a CPU are taken with, once there was one

    @staticmethod
    def bytes_per_row(config: Config, length: int, slack: int, dtype: torch.dtype) -> int:
        """Memory that one row takes, in bytes."""
        slots = sum((config.window + slack if x.sliding else length) * x.kv_heads * x.head_dim for x in config.layers)
        return 2 * slots * dtype.itemsize

    def slots(self, layer: Layer) -> int:
        """That can be used, of one row."""
        return self.config.window + self.slack if layer.sliding else self.length

    @property
    def free(self) -> int:
        """Rows that can be claimed."""
        return len(self._free)

    def claim(self) -> Row:
        """The lowest free row, empty: rows in use stay close together, and a step over them stays narrow."""
        if not self._free:
            raise NoRow(f"all {self.keys[0].shape[0]} rows are taken")
        index = min(self._free)
        self._free.remove(index)
        return Row(index)

    def release(self, row: Row) -> None:
        assert row.index not in self._free, f"row {row.index} is free already"
        self._free.append(row.index)

    def fork(self, row: Row) -> Row:
        """A second row with the same past; the parent is only read."""
        child = self.claim()
        child.length, child.high = row.length, row.high
        for layer, key, value in zip(self.config.layers, self.keys, self.values, strict=True):
            live = min(row.high, self.slots(layer))
            key[child.index, :, :live] = key[row.index, :, :live]
            value[child.index, :, :live] = value[row.index, :, :live]
        return child

    def earliest(self, row: Row) -> int:
        """The least position to which `truncate` can cut the row back."""
        return max(0, row.high - self.slack - 1) if row.high > self.config.window + self.slack else 0

    def truncate(self, row: Row, position: int) -> None:
        """Forgets everything from `position` on. Raises RowFull further back than the slack allows, unless that is all."""
        assert 0 <= position <= row.length, f"position {position} is not in a row of {row.length}"
        if 0 < position < self.earliest(row):
            raise RowFull(
                f"cannot cut the row back to position {position}: its sliding layers keep what is needed from "
                f"{self.earliest(row)} on (slack {self.slack}); rebuild it from the tape"
            )
        row.length = position
        row.high = row.high if position else 0

    def span(self, rows: Sequence[Row], count: int, blocks: Tensor | None = None, *, whole: bool = False) -> Span:
        """The span of `count` new positions on each of `rows`. With `whole` every slot is read, whether or not a
        position is in it yet: static shapes, for graphs and compilers, which may write over its tensors."""
        assert rows and count >= 1, "a pass needs rows and positions"
        if count > self.slack + 1:
            raise RowFull(
                f"{count} positions at once, as of a large picture, are more than the {self.slack + 1} that a row takes"
            )
        for row in rows:
            if row.length + count > self.length:
                raise RowFull(f"{row.length + count} positions do not fit in a row of {self.length}")
        first = min(row.index for row in rows)
        width = max(row.index for row in rows) + 1 - first
        places = [row.index - first for row in rows]
        members = part = None
        lengths, taking = [rows[0].length] * width, [False] * width
        for row, place in zip(rows, places, strict=True):
            lengths[place], taking[place] = row.length, True
        if places != list(range(width)):
            members, part = torch.tensor(places, device=self.device), torch.tensor(taking, device=self.device)[:, None]
        if blocks is not None and members is not None:
            blocks = blocks.new_full((width, count), -1).index_copy_(0, members, blocks)
        query = torch.tensor([[*range(length, length + count)] for length in lengths], device=self.device)
        kinds = set(self.config.layers)
        reaches = {layer: self._cached_reach(layer, lengths, query, blocks, part, whole) for layer in kinds}
        return Span(reaches, first, width, members)

    def _cached_reach(
        self, layer: Layer, lengths: list[int], query: Tensor, blocks: Tensor | None, part: Tensor | None, whole: bool
    ) -> Reach:
        count, size = query.shape[1], self.slots(layer)
        end = max(lengths) + count
        oldest = max(0, min(lengths) + 1 - self.config.window) if layer.sliding else 0  # position that counts
        # Only the slots from there to the newest are read, unless the ring's end lies between.
        flat = not whole and oldest % size + end - oldest <= size
        first, live = (oldest % size, end - oldest) if flat else (0, size)
        slots = query if flat and end <= size else torch.remainder(query, size)
        if part is not None:
            slots = torch.where(part, slots, size)
        cos, sin = _turn(layer, query, self.dtype)
        if flat and len(lengths) == count == 1:
            return Reach(cos, sin, None, slots, first, live)  # one position, which sees all of it
        last = query[:, -1:]
        if flat:
            key = torch.arange(oldest, end, device=self.device)[None]  # [1, n]
        else:  # the newest position not after `last` that stands at a slot; negative: none yet
            key = last - torch.remainder(last - torch.arange(size, device=self.device), size)
        key_block = None
        if blocks is not None:
            inside = (key - query[:, :1]).clamp(0, count - 1)
            key_block = torch.where((key >= query[:, :1]) & (key <= last), blocks.gather(1, inside), -1)
        return Reach(cos, sin, _mask(self.config, layer, query, key, blocks, key_block, self.dtype), slots, first, live)

    def memory(self, index: int, span: Span) -> Memory:
        """What layer `index` holds for the rows of a span."""
        rows = slice(span.first, span.first + span.count)
        return Memory(self.keys[index][rows], self.values[index][rows])

    def advance(self, rows: Iterable[Row], count: int) -> None:
        for row in rows:
            row.length += count
            row.high = max(row.high, row.length)
