"""Which positions of which rows one pass takes, and which slots of the cache they write and see.

All of it is computed on the host before the pass: a step, a chunk and a picture differ in nothing but these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cache import Cache, Row, RowFull

if TYPE_CHECKING:
    from model.gemma import LayerConfig

Positions = NDArray[np.int32]


@dataclass(frozen=True)
class RowChunk:
    """The next `count` positions of one row. `pictures` are (start, stop) within them: a picture's positions see one
    another, so it comes whole in one chunk. The hidden states of the last `wanted` positions are returned."""

    row: Row
    count: int = 1
    pictures: tuple[tuple[int, int], ...] = ()
    wanted: int = 0

    @property
    def positions(self) -> Positions:
        return np.arange(self.row.length, self.row.length + self.count, dtype=np.int32)

    def visible(self, layer: LayerConfig, window: int) -> tuple[Positions, Positions]:
        """The first and the last position that each position sees in layers of this kind.

        Full layers are causal. Sliding layers see the window, and within it all of their own picture (model card of Gemma 4;
        the symmetric window matters only for pictures longer than it)."""
        at = self.positions
        if not layer.sliding:
            return np.zeros_like(at), at
        last = at.copy()
        for start, stop in self.pictures:
            last[start:stop] = np.minimum(at[stop - 1], at[start:stop] + window - 1)
        return np.maximum(0, at - window + 1), last


def check(chunks: Sequence[RowChunk], cache: Cache) -> None:
    """Raises RowFull where a row has no room."""
    assert chunks and len({chunk.row.index for chunk in chunks}) == len(chunks), "a pass takes one chunk of each row"
    for chunk in chunks:
        assert chunk.count >= 1, "a chunk has positions"
        if chunk.count > cache.slack + 1:
            raise RowFull(
                f"{chunk.count} positions at once, as of a large picture, are more than the {cache.slack + 1} that a row takes"
            )
        if chunk.row.length + chunk.count > cache.length:
            raise RowFull(f"{chunk.row.length + chunk.count} positions do not fit in a row of {cache.length}")


def wanted(chunks: Sequence[RowChunk]) -> list[int]:
    """Places in the pass of the positions whose hidden states are wanted."""
    places: list[int] = []
    start = 0
    for chunk in chunks:
        start += chunk.count
        places += range(start - chunk.wanted, start)
    return places


def pinned(array: Any, device: torch.device) -> Tensor:
    """What a copy to that device does not wait for. The memory is used again only after the copy."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: Any, device: torch.device) -> Tensor:
    """An array or a list on the device, which nobody waits for."""
    return pinned(array, device).to(device, non_blocking=True)
