"""What lies between the matrix products of a pass, as Triton kernels: the functions of `model.reference`, for CUDA.

Attention is split over the keys, so that one row with a long past keeps the whole device busy, and its parts are put
together by a second launch. A tile is up to 16 queries of one key head: those of the heads that share it, at neighbouring
positions of one row. All launches have shapes that depend on the number of positions alone, so a graph of them can be
captured; tiles and positions that are there only to fill up are known by a count or a last position that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from model.batch import RowChunk, upload
from model.functional import rope

if TYPE_CHECKING:
    from model.cache import Cache
    from model.gemma import Attention, GemmaConfig, LayerConfig

WARPS, STAGES = 8, 2  # of attention: with 32 keys at a time and 512 numbers a head, 83 KB of shared memory and no spills
SPLITS = 64  # at most: of 8,192 positions 128 each


@dataclass(frozen=True)
class KernelMetadata:
    """What layers of one kind need to know of a pass over N positions; int32 [N] but for cos and sin [N, 1, D]."""

    cos: Tensor
    sin: Tensor
    rows: Tensor
    slots: Tensor  # that are written
    first: Tensor  # position that is seen
    last: Tensor
    tile_starts: Tensor
    tile_counts: Tensor  # positions of a tile; 0: it only fills up
    ring: int  # position p stands at slot p mod this


# ---- planned on the host


def table(chunks: Sequence[RowChunk], cache: Cache, size: int) -> NDArray[np.int32]:
    """All numbers of a pass over `size` positions, [2 + 5 for each kind of layer, size], to be uploaded at once."""
    found = np.zeros((2 + 5 * len(kinds(cache.config)), size), np.int32)
    start = 0
    for chunk in chunks:
        found[0, start : start + chunk.count] = chunk.row.index
        found[1, start : start + chunk.count] = chunk.positions
        start += chunk.count
    for layer, part in zip(kinds(cache.config), np.split(found[2:], len(kinds(cache.config))), strict=True):
        _fill(part, layer, chunks, cache, [chunk.count for chunk in chunks])
    return found


def _fill(part: NDArray[np.int32], layer: LayerConfig, chunks: Sequence[RowChunk], cache: Cache, counts: Sequence[int]) -> None:
    """The five lines of one kind, for the last positions of each chunk."""
    slots, first, last, tile_starts, tile_counts = part
    slots[:], last[:] = cache.slots(layer), -1
    most = max(1, _queries(cache.config, layer) * layer.kv_heads // cache.config.heads)  # positions of a tile
    start = tile = 0
    for chunk, count in zip(chunks, counts, strict=True):
        here, there = slice(start, start + count), slice(chunk.count - count, None)
        slots[here] = chunk.positions[there] % cache.slots(layer)
        first[here], last[here] = (bound[there] for bound in chunk.visible(layer, cache.config.window))
        for at in range(0, count, most):
            tile_starts[tile], tile_counts[tile] = start + at, min(most, count - at)
            tile += 1
        start += count


def kinds(config: GemmaConfig) -> list[LayerConfig]:
    return list(dict.fromkeys(config.layers))


def views(numbers: Tensor, cache: Cache) -> dict[LayerConfig, KernelMetadata]:
    """Of a `table` on the device."""
    found = {}
    for layer, part in zip(kinds(cache.config), numbers[2:].chunk(len(kinds(cache.config))), strict=True):
        slots, first, last, starts, counts = part.unbind()
        turn = rope(layer, numbers[1], cache.dtype)
        found[layer] = KernelMetadata(*turn, numbers[0], slots, first, last, starts, counts, cache.slots(layer))
    return found


def metadata(chunks: Sequence[RowChunk], cache: Cache) -> dict[LayerConfig, KernelMetadata]:
    return views(upload(table(chunks, cache, sum(chunk.count for chunk in chunks)), cache.device), cache)


def of_wanted(meta: KernelMetadata, layer: LayerConfig, chunks: Sequence[RowChunk], cache: Cache) -> KernelMetadata:
    """Of the wanted positions alone, for `attend`."""
    counts = [chunk.wanted for chunk in chunks]
    found = np.zeros((6, sum(counts)), np.int32)
    found[0] = np.repeat([chunk.row.index for chunk in chunks], counts)
    _fill(found[1:], layer, chunks, cache, counts)
    rows, slots, first, last, tile_starts, tile_counts = upload(found, cache.device).unbind()
    return replace(meta, rows=rows, slots=slots, first=first, last=last, tile_starts=tile_starts, tile_counts=tile_counts)


def _queries(config: GemmaConfig, layer: LayerConfig) -> int:
    """Of a tile: what the tensor cores take at least."""
    return max(16, int(triton.next_power_of_2(config.heads // layer.kv_heads)))


# ---- norms, rotation, writing


def norm_rope_write(qkv: Tensor, attention: Attention, meta: KernelMetadata, keys: Tensor, values: Tensor) -> Tensor:
    heads, kv, size = attention.heads, attention.layer.kv_heads, attention.layer.head_dim
    query = torch.empty(len(qkv), heads, size, device=qkv.device, dtype=qkv.dtype)
    _norm_rope_write[(len(qkv), heads + kv)](
        qkv, attention.q_norm, attention.k_norm, meta.cos, meta.sin, meta.rows, meta.slots, query, keys, values,
        attention.eps, keys.stride(0), keys.stride(1),
        HEADS=heads, KV=kv, SHARED=attention.layer.shared_kv, SIZE=size, BLOCK=triton.next_power_of_2(size // 2),
    )  # fmt: skip
    return query


@triton.jit
def _norm_rope_write(
    qkv, q_norm, k_norm, cos, sin, rows, slots, query, keys, values, eps, row_stride, head_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position, head = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = SIZE // 2
    low = tl.arange(0, BLOCK)
    inside = low < HALF
    width = (HEADS + KV) * SIZE if SHARED else (HEADS + 2 * KV) * SIZE
    source = qkv + position * width + head * SIZE + low
    a = tl.load(source, inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / SIZE + eps)
    a, b = a * scale, b * scale
    norm = q_norm if head < HEADS else k_norm
    c = tl.load(cos + position * SIZE + low, inside, other=0.0).to(tl.float32)
    s = tl.load(sin + position * SIZE + HALF + low, inside, other=0.0).to(tl.float32)
    u = a * tl.load(norm + low, inside, other=0.0).to(tl.float32)
    w = b * tl.load(norm + HALF + low, inside, other=0.0).to(tl.float32)
    if head < HEADS:
        target = query + (position * HEADS + head) * SIZE + low
        tl.store(target, u * c - w * s, inside)
        tl.store(target + HALF, w * c + u * s, inside)
    else:
        row, slot = tl.load(rows + position).to(tl.int64), tl.load(slots + position)
        offset = row * row_stride + (head - HEADS) * head_stride + slot * SIZE + low
        tl.store(keys + offset, u * c - w * s, inside)
        tl.store(keys + offset + HALF, w * c + u * s, inside)
        if not SHARED:
            a = tl.load(source + KV * SIZE, inside, other=0.0).to(tl.float32)
            b = tl.load(source + KV * SIZE + HALF, inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / SIZE + eps)
            a, b = a * scale, b * scale
        tl.store(values + offset, a, inside)
        tl.store(values + offset + HALF, b, inside)


# ---- attention


def attend(query: Tensor, keys: Tensor, values: Tensor, meta: KernelMetadata) -> Tensor:
    count, heads, size = query.shape
    kv = keys.shape[1]
    splits = min(SPLITS, triton.next_power_of_2(triton.cdiv(2 * _processors(query.device), count * kv)))
    parts = torch.empty(count, heads, splits, size, device=query.device, dtype=torch.float32)
    best = torch.empty(count, heads, splits, device=query.device, dtype=torch.float32)
    total = torch.empty_like(best)
    _attend[(count, kv, splits)](
        query, keys, values, meta.rows, meta.first, meta.last, meta.tile_starts, meta.tile_counts, parts, best, total,
        keys.stride(0), keys.stride(1), meta.ring,
        HEADS=heads, GROUP=heads // kv, SIZE=size, D=max(16, triton.next_power_of_2(size)),
        M=max(16, triton.next_power_of_2(heads // kv)), N=32 if size > 128 else 64, SPLITS=splits,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    found = torch.empty(count, heads * size, device=query.device, dtype=query.dtype)
    _combine[(count, heads)](
        meta.last, parts, best, total, found, SIZE=size, D=triton.next_power_of_2(size), SPLITS=splits, SOME=min(splits, 8)
    )
    return found


@lru_cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 8


@triton.jit
def _attend(
    query, keys, values, rows, first, last, tile_starts, tile_counts, parts, best, total, row_stride, head_stride, ring,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    tile, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(tile_counts + tile)
    if count > 0:
        start = tl.load(tile_starts + tile)
        m, d, n = tl.arange(0, M), tl.arange(0, D), tl.arange(0, N)
        live = m < count * GROUP
        at = start + tl.where(live, m // GROUP, 0)
        head = kv * GROUP + m % GROUP
        lowest = tl.load(first + at, live, other=2147483647)
        highest = tl.load(last + at, live, other=-1)
        oldest, end = tl.min(lowest), tl.max(highest) + 1
        share = tl.cdiv(tl.cdiv(end - oldest, N), SPLITS) * N
        begin = oldest + split * share
        end = tl.minimum(end, begin + share)
        memory = tl.load(rows + start).to(tl.int64) * row_stride + kv * head_stride
        whole = d < SIZE
        q = tl.load(query + (at * HEADS + head)[:, None] * SIZE + d[None, :], live[:, None] & whole[None, :], other=0.0)
        top = tl.full([M], float("-inf"), tl.float32)
        weight = tl.zeros([M], tl.float32)
        sum_ = tl.zeros([M, D], tl.float32)
        for position in range(begin, end, N):
            p = position + n
            slot = memory + (p % ring) * SIZE
            k = tl.load(keys + slot[None, :] + d[:, None], whole[:, None], other=0.0)
            scores = tl.dot(q, k, input_precision="ieee")
            seen = (p[None, :] >= lowest[:, None]) & (p[None, :] <= highest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # of a query that has seen nothing yet
            shares = tl.exp(scores - base[:, None])
            fade = tl.exp(top - base)
            # What stands beyond the end was another row's once, and nothing times what is no number is no zero.
            v = tl.load(values + slot[:, None] + d[None, :], (p < end)[:, None] & whole[None, :], other=0.0)
            sum_ = sum_ * fade[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
            weight = weight * fade + tl.sum(shares, 1)
            top = higher
        place = (at * HEADS + head) * SPLITS + split
        tl.store(best + place, top, live)
        tl.store(total + place, weight, live)
        tl.store(parts + place[:, None] * SIZE + d[None, :], sum_, live[:, None] & whole[None, :])


@triton.jit
def _combine(last, parts, best, total, found, SIZE: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, SOME: tl.constexpr):
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    d = tl.arange(0, D)
    whole = d < SIZE
    sum_ = tl.zeros([D], tl.float32)
    if tl.load(last + tl.program_id(0)) >= 0:  # else it only fills up, and has no parts
        every = place * SPLITS + tl.arange(0, SPLITS)
        top = tl.max(tl.load(best + every))
        weight = tl.sum(tl.exp(tl.load(best + every) - top) * tl.load(total + every))
        for split in range(0, SPLITS, SOME):
            some = place * SPLITS + split + tl.arange(0, SOME)
            part = tl.load(parts + some[:, None] * SIZE + d[None, :], whole[None, :], other=0.0)
            sum_ += tl.sum(tl.exp(tl.load(best + some) - top)[:, None] * part, 0)
        sum_ /= weight
    tl.store(found + place * SIZE + d, sum_, whole)


# ---- around the products


def add_norm(x: Tensor, y: Tensor, norm: Tensor, next_norm: Tensor, eps: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    count, size = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _add_norm[(count,)](
        x, y, norm, next_norm, norm if scale is None else scale, total, normed, eps,
        SCALED=scale is not None, SIZE=size, BLOCK=block, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return total, normed


@triton.jit
def _add_norm(x, y, norm, next_norm, scale, total, normed, eps, SCALED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * SIZE
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    b = tl.load(y + at + i, inside, other=0.0).to(tl.float32)
    b = b * tl.rsqrt(tl.sum(b * b) / SIZE + eps) * tl.load(norm + i, inside, other=0.0).to(tl.float32)
    a = tl.load(x + at + i, inside, other=0.0).to(tl.float32) + b
    if SCALED:
        a *= tl.load(scale).to(tl.float32)
    a = a.to(total.dtype.element_ty)
    tl.store(total + at + i, a, inside)
    a = a.to(tl.float32)
    a = a * tl.rsqrt(tl.sum(a * a) / SIZE + eps) * tl.load(next_norm + i, inside, other=0.0).to(tl.float32)
    tl.store(normed + at + i, a, inside)


def gelu_up(gate_up: Tensor) -> Tensor:
    count, size = gate_up.shape[0], gate_up.shape[1] // 2
    found = torch.empty(count, size, device=gate_up.device, dtype=gate_up.dtype)
    block = min(1024, triton.next_power_of_2(size))
    _gelu_up[(count, triton.cdiv(size, block))](gate_up, found, SIZE=size, BLOCK=block)
    return found


@triton.jit
def _gelu_up(gate_up, found, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + i, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + i, inside, other=0.0).to(tl.float32)
    # By tanh: x sigmoid(x (a + b x^2)); exp of more than 80 would be infinite, which is right and warned of.
    gelu = gate / (1.0 + tl.exp(tl.minimum(-gate * (1.5957691216057308 + 0.07135481627159966 * gate * gate), 80.0)))
    tl.store(found + row * SIZE + i, gelu * up, inside)
