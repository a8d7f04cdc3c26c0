"""The KV cache: rows of fixed memory for keys and values.

A full layer keeps every position of a row, flat. A sliding layer keeps a ring buffer of window + slack positions: position p is
in slot p mod (window + slack). The slack makes two things possible: a chunk of up to slack + 1 positions can be written before it
is read, and a row can be truncated by up to slack + 1 positions without losing any that its window still needs. Which position a
slot holds is computed from the row's length, never stored; what a truncation leaves behind in a ring then reads as older than
the window and is masked.

Every row has one slot more than it can use: the padding of a pass with a static shape writes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.config import GemmaConfig, LayerConfig
from model.functional import rope

if TYPE_CHECKING:
    from model.forward import ForwardPass

SLACK = 1152  # positions: more than the largest picture (1,120), and about 45 s of sound
MIN_TRUNCATION = 40  # positions beside a picture by which a row can always be truncated


class RowFull(ValueError):
    """A row cannot hold that many positions, or cannot be truncated that far; the message names the limit."""


class NoRow(RuntimeError):
    """All rows are taken."""


@dataclass(eq=False)
class Row:
    """One row of the cache: `length` positions are in it; `high` is the greatest length it has had."""

    index: int
    length: int = 0
    high: int = 0


@dataclass(frozen=True)
class AttentionMetadata:
    """RoPE tables and attention mask of whole prompts, for layers of one kind."""

    cos: Tensor  # [B, T, 1, D], halves alike
    sin: Tensor  # the first half negated
    mask: Tensor  # [B, 1, heads per key head * T, T], added to the scores


@dataclass(frozen=True)
class BatchMetadata:
    """The attention metadata of whole prompts for each kind of layer: computed once, used by every layer."""

    reaches: dict[LayerConfig, AttentionMetadata]


def whole_span(config: GemmaConfig, count: int, blocks: Tensor | None, dtype: torch.dtype, device: torch.device) -> BatchMetadata:
    """The metadata of a batch of whole prompts without a cache: positions 0..count-1, where each prompt attends to itself alone.
    `blocks` [B, T] numbers the picture of each position (-1: none), or is None.

    Shorter prompts are padded at their end, where no real position attends to the padding."""
    at = torch.arange(count, device=device)[None]
    reaches = {
        layer: AttentionMetadata(*rope(layer, at, dtype), _mask(config, layer, at, blocks, dtype)) for layer in set(config.layers)
    }
    return BatchMetadata(reaches)


def _mask(config: GemmaConfig, layer: LayerConfig, at: Tensor, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Full layers are causal. Sliding layers attend to the window, and within it to all of their own picture."""
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
    """The rows that a cache is to have: `length` positions each, with pictures of up to `budget` soft tokens."""

    rows: int
    length: int
    budget: int

    @property
    def min_slack(self) -> int:
        """Enough for a picture, which is written at once. A row that has to be truncated further is written again as a whole. For
        the 12B, 320 positions instead of SLACK save 260 MiB a row."""
        return min(SLACK, self.budget + MIN_TRUNCATION)

    def bytes_per_row(self, config: GemmaConfig, dtype: torch.dtype, slack: int | None = None) -> int:
        """Memory of one row in bytes; `slack` None: the least that will do."""
        slack = self.min_slack if slack is None else slack
        return Cache.bytes_per_row(config, min(self.length, config.max_positions), slack, dtype)

    def slack(self, config: GemmaConfig, dtype: torch.dtype, free: int | None) -> int:
        """The largest slack, up to `SLACK`, with which the rows fit into `free` bytes (None: unknown); at least `min_slack`."""
        if free is None:
            return SLACK
        sizes = (SLACK, (SLACK + self.min_slack) // 2)
        return next((x for x in sizes if self.rows * self.bytes_per_row(config, dtype, x) <= free), self.min_slack)


NO_ROWS = Room(0, 0, 0)


class Cache:
    """`rows` rows of up to `length` positions. Memory is allocated at once and never grows."""

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
        self.forward: ForwardPass | None = None  # over these rows, once `Gemma.extend` was called

    @staticmethod
    def bytes_per_row(config: GemmaConfig, length: int, slack: int, dtype: torch.dtype) -> int:
        """Memory of one row in bytes."""
        slots = sum((config.window + slack if x.sliding else length) * x.kv_heads * x.head_dim for x in config.layers)
        return 2 * slots * dtype.itemsize

    def slots(self, layer: LayerConfig) -> int:
        """Usable slots of a row in a layer."""
        return self.config.window + self.slack if layer.sliding else self.length

    @property
    def free(self) -> int:
        """The number of rows that can be claimed."""
        return len(self._free)

    def claim(self) -> Row:
        """Claims the lowest free row, empty. So the rows in use stay close together. Raises NoRow."""
        if not self._free:
            raise NoRow(f"all {self.keys[0].shape[0]} rows are taken")
        index = min(self._free)
        self._free.remove(index)
        return Row(index)

    def release(self, row: Row) -> None:
        """Gives a row back."""
        assert row.index not in self._free, f"row {row.index} is free already"
        self._free.append(row.index)

    def fork(self, row: Row) -> Row:
        """Copies a row to a free one. Raises NoRow."""
        child = self.claim()
        child.length, child.high = row.length, row.high
        for layer, key, value in zip(self.config.layers, self.keys, self.values, strict=True):
            live = min(row.high, self.slots(layer))
            key[child.index, :, :live] = key[row.index, :, :live]
            value[child.index, :, :live] = value[row.index, :, :live]
        return child

    def earliest(self, row: Row) -> int:
        """The least position to which `truncate` can go, other than 0."""
        return max(0, row.high - self.slack - 1) if row.high > self.config.window + self.slack else 0

    def truncate(self, row: Row, position: int) -> None:
        """Removes everything from `position` on. Raises RowFull for one that is neither 0 nor at least `earliest`."""
        assert 0 <= position <= row.length, f"position {position} is not in a row of {row.length}"
        if 0 < position < self.earliest(row):
            raise RowFull(
                f"cannot truncate the row to position {position}: its sliding layers allow {self.earliest(row)} or later "
                f"(slack {self.slack}); write the row again from the tape"
            )
        row.length = position
        row.high = row.high if position else 0

    def advance(self, row: Row, count: int) -> None:
        """Counts `count` positions that a pass has written."""
        row.length += count
        row.high = max(row.high, row.length)
