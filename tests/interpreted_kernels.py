"""The Triton kernels on a CPU, by Triton's interpreter, against their references. `tests/test_kernels.py` runs this file in a
process of its own, since the interpreter is chosen before Triton is imported. Float32: bfloat16 products are wrong there.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import given, settings

from model import forward, kernels, reference
from model.batch import RowChunk
from model.cache import Cache
from model.config import GemmaConfig
from model.gemma import Attention
from tests import tiny
from tests.test_cache import LONG, Rows, moves

SHAPES = {
    "tiny": tiny.Recipe(layers="sf", window=6),
    "nano": tiny.Recipe(layers="sf", hidden=64, heads=4, kv=2, head_dim=64, full_head_dim=128, window=20),
    "12B": tiny.Recipe(layers="sf", hidden=64, heads=16, kv=8, full_kv=1, head_dim=256, full_head_dim=512, window=40),
    "own values": tiny.Recipe(layers="sf", shared_kv=False, heads=6, kv=3, head_dim=8, full_head_dim=8, window=5),
}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def cache_of(config, lengths, slack=9, seed=0):
    """Rows of these lengths, filled with random keys and values."""
    cache = Cache(config, len(lengths), 80, slack=slack)
    generator = torch.Generator().manual_seed(seed)
    for memory in (*cache.keys, *cache.values):
        memory.normal_(generator=generator)
    rows = [cache.claim() for _ in lengths]
    for row, length in zip(rows, lengths, strict=True):
        row.length = row.high = length
    return cache, rows


def both(cache, chunks, wanted=False):
    """Of both kinds of layers: metadata of the kernels and of the reference."""
    for index, layer in enumerate(cache.config.layers):
        metas = [operations.metadata(chunks, cache)[layer] for operations in (kernels, reference)]
        if wanted:
            metas = [op.of_wanted(meta, layer, chunks, cache) for op, meta in zip((kernels, reference), metas, strict=True)]
        yield index, layer, *metas


@pytest.fixture(params=SHAPES)
def config(request):
    return GemmaConfig.from_json(SHAPES[request.param].hub_json())


CHUNKS = (
    [(0, 1)],
    [(3, 1), (70, 1), (31, 1)],
    [(0, 10), (55, 3), (12, 1), (69, 10)],
    [(30, 9, (1, 7)), (44, 8, (0, 3), (3, 8)), (5, 1)],
)


def chunked(config, spelled, wanted=0):
    cache, rows = cache_of(config, [length for length, *_ in spelled])
    wide = [RowChunk(row, n, tuple(seen), min(wanted, n)) for row, (_, n, *seen) in zip(rows, spelled, strict=True)]
    return cache, wide[::-1]  # rows in another order than in the cache


@pytest.mark.parametrize("spelled", CHUNKS, ids=["first", "steps", "chunks", "pictures"])
@pytest.mark.parametrize("wanted", [0, 2])
def test_attention(config, spelled, wanted):
    cache, chunks = chunked(config, spelled, wanted)
    for index, layer, ours, theirs in both(cache, chunks, wanted > 0):
        count = sum(chunk.wanted if wanted else chunk.count for chunk in chunks)
        query = torch.randn(count, config.heads, layer.head_dim) * layer.head_dim**-0.5
        memory = cache.keys[index], cache.values[index]
        close(kernels.attend(query, *memory, ours), reference.attend(query, *memory, theirs))


@pytest.mark.parametrize("spelled", CHUNKS, ids=["first", "steps", "chunks", "pictures"])
def test_norms_rotation_and_writing(config, spelled):
    cache, chunks = chunked(config, spelled)
    for index, layer, ours, theirs in both(cache, chunks):
        attention = Attention(config, layer).requires_grad_(False)
        for norm in (attention.q_norm, attention.k_norm):
            norm.uniform_(0.5, 1.5)
        qkv = torch.randn(sum(chunk.count for chunk in chunks), len(attention.qkv))
        found = []
        for operations, meta in ((kernels, ours), (reference, theirs)):
            memory = cache.keys[index].clone(), cache.values[index].clone()
            found.append((operations.norm_rope_write(qkv, attention, meta, *memory), *memory))
        for mine, its in zip(*found, strict=True):
            close(mine, its)
        assert not torch.equal(found[0][1], cache.keys[index])


@pytest.mark.parametrize("size", [16, 100, 3840])
@pytest.mark.parametrize("scaled", [True, False])
def test_norm_add_norm(size, scaled):
    x, y = torch.randn(2, 3, size)
    norm, next_norm = torch.rand(2, size)
    scale = torch.tensor([0.7]) if scaled else None
    ours, theirs = (f.add_norm(x, y, norm, next_norm, 1e-6, scale) for f in (kernels, reference))
    close(ours, theirs)


@pytest.mark.parametrize("size", [16, 100, 3000])
def test_gelu_times_up(size):
    x = 4 * torch.randn(3, 2 * size)
    close(kernels.gelu_up(x), reference.gelu_up(x))


# ---- whole passes


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    recipe = tiny.Recipe(layers="sf", hidden=16, heads=2, kv=1, head_dim=8, full_head_dim=8, window=Rows.window)
    return tiny.write(recipe, tmp_path_factory.mktemp("small")).model


@settings(max_examples=3, deadline=None)
@given(moves)
def test_any_history_of_four_rows_equals_reading_each_at_once(small, history):
    rows = Rows(small, kernels)
    for move in history:
        rows.play(*move)
    rows.finish()


def test_what_is_recorded_once_takes_every_pass_from_static_memory(small, monkeypatch):
    """What a CUDA graph does, without one: replaying runs the same operations on the same tensors again."""

    def record(run, pool):
        result = run()
        return lambda: result.copy_(run()), result

    monkeypatch.setattr(forward, "record", record)
    rows = Rows(small, kernels, buckets=(1, 4, 9))
    for move in LONG:
        rows.play(*move)
    assert rows.happened["ragged"] and rows.happened["round the ring"]
