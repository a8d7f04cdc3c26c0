"""What lies between the matrix products of a pass, in plain torch: the reference for `model.kernels`, and what runs where
these do not.

Both modules have the same functions. Here attention goes row by row, over a slice of the row's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import RowChunk, upload
from model.functional import rms_norm, rope, rotate

if TYPE_CHECKING:
    from model.cache import Cache
    from model.gemma import Attention, LayerConfig


@dataclass(frozen=True)
class RowRun:
    """Neighbouring positions of the pass that belong to one row."""

    row: int
    start: int
    stop: int
    written: tuple[slice, ...]  # slots, in the order of positions; two slices around a ring's end
    seen: tuple[slice, ...]
    mask: Tensor | None  # [heads of a key head * positions, slots seen], added to the scores; None: all is seen


@dataclass(frozen=True)
class ReferenceMetadata:
    """What layers of one kind need to know of a pass over N positions."""

    cos: Tensor  # [N, 1, D], as `rope` makes them
    sin: Tensor
    runs: tuple[RowRun, ...]


def metadata(chunks: Sequence[RowChunk], cache: Cache) -> dict[LayerConfig, ReferenceMetadata]:
    at = upload(np.concatenate([chunk.positions for chunk in chunks]), cache.device)
    layers = set(cache.config.layers)
    return {layer: ReferenceMetadata(*rope(layer, at, cache.dtype), _runs(layer, chunks, cache)) for layer in layers}


def of_wanted(meta: ReferenceMetadata, layer: LayerConfig, chunks: Sequence[RowChunk], cache: Cache) -> ReferenceMetadata:
    """Of the wanted positions alone, for `attend`."""
    return replace(meta, runs=_runs(layer, chunks, cache, of_wanted=True))


def _runs(layer: LayerConfig, chunks: Sequence[RowChunk], cache: Cache, of_wanted: bool = False) -> tuple[RowRun, ...]:
    runs, start, size = [], 0, cache.slots(layer)
    for chunk in chunks:
        count = chunk.wanted if of_wanted else chunk.count
        first, last = (bound[chunk.count - count :] for bound in chunk.visible(layer, cache.config.window))
        if not count:
            continue
        oldest, end, mask = int(first[0]), int(last[-1]) + 1, None
        if count > 1:
            key = torch.arange(oldest, end)
            seen = (key >= torch.from_numpy(first)[:, None]) & (key <= torch.from_numpy(last)[:, None])
            mask = torch.where(seen, 0.0, -torch.inf).to(cache.dtype).repeat(cache.config.heads // layer.kv_heads, 1)
            mask = upload(mask, cache.device)
        written = _slots(chunk.row.length, chunk.row.length + chunk.count, size)
        runs.append(RowRun(chunk.row.index, start, start + count, written, _slots(oldest, end, size), mask))
        start += count
    return tuple(runs)


def _slots(start: int, stop: int, size: int) -> tuple[slice, ...]:
    """Where a memory of `size` slots holds the positions from `start` to `stop`."""
    first, last = start % size, (stop - 1) % size + 1
    return (slice(first, last),) if first < last else (slice(first, size), slice(0, last))


def norm_rope_write(qkv: Tensor, attention: Attention, meta: ReferenceMetadata, keys: Tensor, values: Tensor) -> Tensor:
    """Norms and turns queries and keys, norms values, and writes keys and values to the cache [rows, heads, slots, D].

    qkv [N, all heads * D] -> queries [N, heads, D]."""
    heads, kv, size = attention.heads, attention.layer.kv_heads, attention.layer.head_dim
    qkv = qkv.view(len(qkv), -1, size)
    weight = torch.stack((attention.q_norm,) * heads + (attention.k_norm,) * kv)
    turned = rotate(rms_norm(qkv[:, : heads + kv], attention.eps, weight), meta.cos, meta.sin)
    query, key = turned[:, :heads], turned[:, heads:]
    value = rms_norm(qkv[:, -kv:], attention.eps)  # where keys are values, the last heads are both
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    for run in meta.runs:
        start = run.start
        for slots in run.written:
            stop = start + slots.stop - slots.start
            keys[run.row, :, slots] = key[:, start:stop]
            values[run.row, :, slots] = value[:, start:stop]
            start = stop
    return query


def attend(query: Tensor, keys: Tensor, values: Tensor, meta: ReferenceMetadata) -> Tensor:
    """Queries [N, heads, D] -> what they see [N, heads * D]. Scores have no scale."""
    found = [_attend(query[run.start : run.stop], keys[run.row], values[run.row], run) for run in meta.runs]
    return found[0] if len(found) == 1 else torch.cat(found)


def _attend(query: Tensor, keys: Tensor, values: Tensor, run: RowRun) -> Tensor:
    count, heads, size = query.shape
    seen = [[memory[:, slots] for slots in run.seen] for memory in (keys, values)]
    key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in seen)
    # The heads that share a key head become further queries of it: nothing is repeated, whatever kernel runs.
    query = query.transpose(0, 1).reshape(1, len(keys), -1, size)
    if count == 1:  # three products of one row each are sooner done than one call of the fused kernel
        shares = torch.softmax(query[0] @ key.transpose(1, 2), -1, dtype=torch.float32).to(value.dtype)
        return (shares @ value).view(1, heads * size)
    found = F.scaled_dot_product_attention(query, key[None], value[None], attn_mask=run.mask, scale=1.0)
    return found.reshape(heads, count, size).transpose(0, 1).reshape(count, heads * size)


def add_norm(x: Tensor, y: Tensor, norm: Tensor, next_norm: Tensor, eps: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The end of one half of a block and the start of the next: (x + norm of y) * scale, and the next norm of that."""
    x = rms_norm(y, eps, norm, onto=x)
    x = x if scale is None else x * scale
    return x, rms_norm(x, eps, next_norm)


def gelu_up(gate_up: Tensor) -> Tensor:
    """[N, 2 F] -> gelu of the first half times the second [N, F]."""
    gate, up = gate_up.chunk(2, -1)
    gelu: Tensor = F.gelu(gate, approximate="tanh")
    return gelu * up
