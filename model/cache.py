"""Rows of fixed memory for keys and values.

A full layer keeps every position of a row, flat. A sliding layer keeps a ring of window + slack positions: position p
stands at slot p mod (window + slack). The slack is what makes two things possible: a chunk of up to slack + 1 positions
can be written before it is read, and a row can be cut back by up to slack + 1 positions without having lost any that its
window still needs. Which position a slot holds is computed from where the row ends, never stored; what a cut leaves
behind in a ring then reads as older than the window and is masked.

Every row has one slot more than it can use: positions that only fill a pass up to its static shape write there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.functional import rope

if TYPE_CHECKING:
    from model.forward import ForwardPass
    from model.gemma import GemmaConfig, LayerConfig

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
class AttentionMetadata:
    """What layers of one kind need to know of a pass."""

    cos: Tensor  # [B, T, 1, D], halves alike
    sin: Tensor  # the first half negated
    mask: Tensor  # [B, 1, heads per key head * T, T], added to the scores


@dataclass(frozen=True)
class BatchMetadata:
    """What the positions of whole prompts see: computed once, used by every layer."""

    reaches: dict[LayerConfig, AttentionMetadata]


def whole_span(config: GemmaConfig, count: int, blocks: Tensor | None, dtype: torch.dtype, device: torch.device) -> BatchMetadata:
    """The span of a batch without a cache: positions 0..count-1, each row seeing itself only. `blocks` [B, T] or None.

    Rows shorter than `count` are padded at their end, where nothing that counts can see the padding."""
    at = torch.arange(count, device=device)[None]
    reaches = {
        layer: AttentionMetadata(*rope(layer, at, dtype), _mask(config, layer, at, blocks, dtype)) for layer in set(config.layers)
    }
    return BatchMetadata(reaches)


def _mask(config: GemmaConfig, layer: LayerConfig, at: Tensor, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Full layers are causal. Sliding layers see the window, and within it all of their own picture."""
    q, k = at[:, :, None], at[:, None, :]
    allowed = k <= q
    if layer.sliding:
        if blocks is not None:
            allowed = allowed | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0))
            allowed = allowed & (k < q + config.window)
        allowed = allowed & (k > q - config.window)
    mask = torch.where(allowed, 0.0, -torch.inf).to(dtype)
    return mask.repeat(1, config.heads // layer.kv_heads, 1)[:, None]


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

    def bytes_per_row(self, config: GemmaConfig, dtype: torch.dtype, slack: int | None = None) -> int:
        """With the least slack that serves, unless another is said."""
        slack = self.least_slack if slack is None else slack
        return Cache.bytes_per_row(config, min(self.length, config.max_positions), slack, dtype)

    def slack(self, config: GemmaConfig, dtype: torch.dtype, free: int | None) -> int:
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
        config: GemmaConfig,
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
        self.forward: ForwardPass | None = None  # what takes passes over these rows, once there was one

    @staticmethod
    def bytes_per_row(config: GemmaConfig, length: int, slack: int, dtype: torch.dtype) -> int:
        """Memory that one row takes, in bytes."""
        slots = sum((config.window + slack if x.sliding else length) * x.kv_heads * x.head_dim for x in config.layers)
        return 2 * slots * dtype.itemsize

    def slots(self, layer: LayerConfig) -> int:
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

    def advance(self, row: Row, count: int) -> None:
        row.length += count
        row.high = max(row.high, row.length)
