"""However a row was appended to, truncated, forked and batched, it gives what one pass over the whole sequence gives.

Window 6, slack 5: the rings hold 11 positions, and the rows here are several times as long.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.batch import RowChunk
from model.cache import Cache, NoRow, Row, RowFull, whole_span
from model.config import GemmaConfig
from model.forward import ForwardPass
from model.gemma import Gemma
from tests import tiny
from tests.tiny import at_once, feed

WINDOW, SLACK, LENGTH = 6, 5, 64
RECIPE = tiny.Recipe(layers="ssfsf", hidden=32, kv=2, full_kv=1, head_dim=8, full_head_dim=16, window=WINDOW)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny.write(RECIPE, tmp_path_factory.mktemp("tiny")).model


def tape(count, seed=0, pictures=()):
    """Random embeddings [T, H] and picture numbers [T]; `pictures` are (start, positions)."""
    x = torch.randn(count, RECIPE.hidden, generator=torch.Generator().manual_seed(seed))
    blocks = torch.full((count,), -1)
    for number, (start, size) in enumerate(pictures):
        blocks[start : start + size] = number
    return x, blocks


PICTURES = ((3, 6), (9, 2), (20, 5), (40, 6), (46, 6))  # 9 and 46 follow another picture at once


def cache_of(model, rows=4, length=LENGTH, slack=SLACK):
    return Cache(model.config, rows, length, slack=slack)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def memory(cache, *indices):
    """A copy of all that rows hold, without the spare slot, which padding writes to."""
    return [t[list(indices), :, :-1].clone() for t in (*cache.keys, *cache.values)]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- chunks


@pytest.mark.parametrize("limit", range(1, SLACK + 2))
def test_any_chunking_equals_the_whole(model, limit):
    x, blocks = tape(60, pictures=PICTURES)
    cache = cache_of(model)
    close(feed(model, cache, cache.claim(), x, blocks, limit), at_once(model, x, blocks))


@pytest.mark.parametrize("slack", [0, 1, 5, 30])
@pytest.mark.parametrize("seed", range(3))
def test_random_chunks_up_to_slack_plus_one_equal_the_whole(model, slack, seed):
    pictures = [(start, min(size, slack + 1)) for start, size in PICTURES]
    x, blocks = tape(60, seed, pictures)
    cache = cache_of(model, slack=slack)
    close(feed(model, cache, cache.claim(), x, blocks, slack + 1, seed), at_once(model, x, blocks))


def test_a_chunk_longer_than_slack_plus_one_is_our_mistake(model):
    cache = cache_of(model)
    with pytest.raises(RowFull, match="more than the"):
        model.extend(cache, [cache.claim()], torch.zeros(1, SLACK + 2, RECIPE.hidden))


def test_a_split_picture_is_another_picture(model):
    """This shows that the tests above could fail."""
    x, blocks = tape(10, pictures=[(3, 6)])
    cache = cache_of(model)
    row = cache.claim()
    halves = [slice(i, i + 2) for i in range(0, 10, 2)]
    split = torch.cat([model.extend(cache, [row], x[None, cut], blocks=blocks[None, cut])[0] for cut in halves])
    assert (split - at_once(model, x, blocks)).abs().max() > 0.1


@pytest.mark.parametrize("limit", [4, SLACK + 1])
@pytest.mark.parametrize("last", [1, 3, 100])
def test_the_last_positions_are_what_they_are_among_all(model, limit, last):
    x, blocks = tape(60, pictures=PICTURES)
    cache = cache_of(model, 2)
    whole, part = cache.claim(), cache.claim()
    for cut in tiny.cuts(blocks, limit):
        hidden = model.extend(cache, [whole], x[None, cut], blocks=blocks[None, cut])
        close(model.extend(cache, [part], x[None, cut], blocks=blocks[None, cut], wanted=last), hidden[:, -last:])
    assert same(memory(cache, 0), memory(cache, 1))


@pytest.mark.parametrize("limit", [1, 4])
def test_listening_without_wanting_an_answer_leaves_the_same_cache(model, limit):
    x, blocks = tape(40, pictures=PICTURES[:3])
    cache = cache_of(model, 2)
    wanting, listening = cache.claim(), cache.claim()
    for cut in tiny.cuts(blocks, limit):
        model.extend(cache, [wanting], x[None, cut], blocks=blocks[None, cut])
        assert model.extend(cache, [listening], x[None, cut], blocks=blocks[None, cut], wanted=False) is None
    assert (listening.length, listening.high) == (wanting.length, wanting.high) == (40, 40)
    assert same(memory(cache, 0), memory(cache, 1))


# ---- rows together


def test_rows_together_equal_rows_alone_wherever_they_stand(model):
    cache = cache_of(model)
    rows, lengths = [cache.claim() for _ in range(4)], (2, 17, 40, 29)
    tapes = [tape(n + 20, seed) for seed, n in enumerate(lengths)]
    for row, n, (x, blocks) in zip(rows, lengths, tapes, strict=True):
        feed(model, cache, row, x[:n], blocks[:n], SLACK + 1)
    coming = torch.stack([x[n:] for n, (x, _) in zip(lengths, tapes, strict=True)])
    seen = [model.extend(cache, rows, coming[:, at : at + 1]) for at in range(20)]
    for i, (x, _) in enumerate(tapes):
        close(torch.cat(seen, 1)[i], at_once(model, x)[-20:])


def test_chunks_with_pictures_in_some_rows_together_equal_rows_alone(model):
    cache = cache_of(model)
    rows, lengths = [cache.claim() for _ in range(3)], (0, 9, 31)
    tapes = [tape(n + 12, seed, [(n, 4), (n + 6, 6)] if seed != 1 else []) for seed, n in enumerate(lengths)]
    for row, n, (x, blocks) in zip(rows, lengths, tapes, strict=True):
        if n:
            feed(model, cache, row, x[:n], blocks[:n], SLACK + 1)
    seen = []
    for at in (0, 6):
        chunks = [(x[n + at : n + at + 6], blocks[n + at : n + at + 6]) for n, (x, blocks) in zip(lengths, tapes, strict=True)]
        seen.append(model.extend(cache, rows, torch.stack([x for x, _ in chunks]), blocks=torch.stack([b for _, b in chunks])))
    for i, (x, blocks) in enumerate(tapes):
        close(torch.cat(seen, 1)[i], at_once(model, x, blocks)[-12:])


@pytest.mark.parametrize("order", [(0, 3), (3, 0)])
@pytest.mark.parametrize("count", [1, 4])
def test_rows_between_those_that_step_stay_untouched_bit_for_bit(model, order, count):
    cache = cache_of(model)
    rows, lengths = [cache.claim() for _ in range(4)], (13, 22, 5, 30)
    tapes = [tape(n + 20, seed, [(n + 4, 3)]) for seed, n in enumerate(lengths)]
    for row, n, (x, blocks) in zip(rows, lengths, tapes, strict=True):
        feed(model, cache, row, x[:n], blocks[:n], 3)
    bystanders = memory(cache, 1, 2)
    x = torch.stack([tapes[i][0][lengths[i] :] for i in order])
    blocks = torch.stack([tapes[i][1][lengths[i] :] for i in order])
    stepping = [rows[i] for i in order]
    seen = [model.extend(cache, stepping, x[:, cut], blocks=blocks[:, cut]) for cut in tiny.cuts(blocks[0], count)]
    assert same(bystanders, memory(cache, 1, 2))
    assert [row.length for row in rows] == [33, 22, 5, 50]
    for place, i in enumerate(order):
        x, blocks = tapes[i]
        close(torch.cat(seen, 1)[place], at_once(model, x, blocks)[-20:])
    for i in (1, 2):
        x, blocks = tapes[i]
        close(feed(model, cache, rows[i], x[lengths[i] :], blocks[lengths[i] :]), at_once(model, x, blocks)[-20:])


# ---- fork


@pytest.mark.parametrize("length", [1, 4, 11, 12, 37])
def test_a_fork_leaves_its_parent_alone_and_both_go_on(model, length):
    cache = cache_of(model)
    cache.claim()
    parent = cache.claim()
    past, blocks = tape(length)
    feed(model, cache, parent, past, blocks, 3)
    before = memory(cache, parent.index)
    child = cache.fork(parent)
    assert (child.length, child.index) == (length, 2)
    for row, seed in ((child, 8), (parent, 9)):
        x, blocks = tape(20, seed, [(5, 6)])
        whole = at_once(model, torch.cat((past, x)), torch.cat((torch.full((length,), -1), blocks)))
        close(feed(model, cache, row, x, blocks, 2), whole[length:])
        if row is child:
            assert same(before, memory(cache, parent.index))
            assert parent.length == length


def test_a_fork_of_a_row_that_was_cut_back_knows_how_far_it_can_be_cut(model):
    cache = cache_of(model)
    row = cache.claim()
    feed(model, cache, row, *tape(30))
    cache.truncate(row, 26)
    assert cache.earliest(cache.fork(row)) == cache.earliest(row) == 24


# ---- truncate


@pytest.mark.parametrize("high", [1, 7, 11, 12, 13, 30, 48])
def test_truncate_then_append_equals_never_appended_at_every_legal_depth(model, high):
    cache = cache_of(model)
    row = cache.claim()
    x, blocks = tape(high)
    feed(model, cache, row, x, blocks, SLACK + 1)
    for position in range(cache.earliest(row), high + 1):
        child = cache.fork(row)
        cache.truncate(child, position)
        more, pictures = tape(13, 77, [(2, 5)])
        whole = at_once(model, torch.cat((x[:position], more)), torch.cat((blocks[:position], pictures)))
        close(feed(model, cache, child, more, pictures, 1 + position % (SLACK + 1)), whole[position:])
        cache.release(child)


@pytest.mark.parametrize("cut", [(30, 28, 26, 24), (30, 24), (12, 6), (11, 0), (30, 0), (11, 8, 3), (40, 39, 38)])
def test_cuts_after_cuts_and_after_growing_again_equal_never_appended(model, cut):
    """To each position in turn, with a few appended between; then far beyond the old end, and truncated once more."""
    cache = cache_of(model, length=80)
    row = cache.claim()
    held, blocks = tape(cut[0])
    feed(model, cache, row, held, blocks, SLACK + 1)
    for step, position in enumerate((*cut[1:], None)):
        grown = 1 if position is not None else 25
        if position is None:
            position = row.length
        more = tape(grown, 100 + step)[0]
        cache.truncate(row, position)
        held = torch.cat((held[:position], more))
        close(feed(model, cache, row, more, torch.full((grown,), -1), 2), at_once(model, held)[position:])
    position, more = cache.earliest(row), tape(9, 200)[0]
    assert position == row.length - SLACK - 1
    cache.truncate(row, position)
    close(feed(model, cache, row, more, torch.full((9,), -1), 3), at_once(model, torch.cat((held[:position], more)))[position:])


def test_the_limit_stays_where_it_was_until_the_row_is_longer_than_ever(model):
    """What a truncation leaves behind in the rings is in slots of older positions."""
    cache = cache_of(model)
    row = cache.claim()
    feed(model, cache, row, *tape(30), SLACK + 1)
    cache.truncate(row, 24)
    for length, limit in ((25, 24), (29, 24), (30, 24), (31, 25)):
        feed(model, cache, row, *tape(length - row.length))
        assert (row.length, cache.earliest(row)) == (length, limit)


@pytest.mark.parametrize(("high", "limit"), [(12, 6), (13, 7), (30, 24), (60, 54)])
def test_cutting_one_further_than_the_limit_is_refused_and_changes_nothing(model, high, limit):
    cache = cache_of(model)
    row = cache.claim()
    feed(model, cache, row, *tape(high), SLACK + 1)
    assert cache.earliest(row) == limit
    before = memory(cache, 0)
    with pytest.raises(RowFull, match=rf"position {limit - 1}: .* allow {limit} or later .*write the row again"):
        cache.truncate(row, limit - 1)
    assert (row.length, row.high) == (high, high)
    assert same(before, memory(cache, 0))
    cache.truncate(row, limit)


@pytest.mark.parametrize("high", [12, 13, 30, 60])
def test_the_limit_is_tight(model, high):
    """One position earlier the rings have lost what the window needs."""
    cache = cache_of(model, length=80)
    row = cache.claim()
    x, blocks = tape(high)
    feed(model, cache, row, x, blocks, SLACK + 1)
    row.length = cache.earliest(row) - 1
    more = tape(3, 5)[0]
    whole = at_once(model, torch.cat((x[: row.length], more)))[-3:]
    assert (feed(model, cache, row, more, blocks[:3]) - whole).abs().max() > 0.01


@pytest.mark.parametrize("high", [1, 6, 11])
def test_a_row_within_its_rings_can_be_cut_to_anything(model, high):
    cache = cache_of(model)
    row = cache.claim()
    feed(model, cache, row, *tape(high))
    assert cache.earliest(row) == 0


# ---- full


def test_a_row_takes_its_whole_length_and_nothing_beyond(model):
    cache = cache_of(model, 2, 20)
    row, other = cache.claim(), cache.claim()
    x, blocks = tape(20)
    feed(model, cache, row, x[:18], blocks[:18])
    before = memory(cache, 0, 1)
    for rows, count in (([row], 3), ([other, row], 3), ([row, other], 5)):
        with pytest.raises(RowFull, match=f"{18 + count} positions do not fit in a row of 20"):
            model.extend(cache, rows, torch.zeros(len(rows), count, RECIPE.hidden))
    assert same(before, memory(cache, 0, 1))
    assert (row.length, other.length) == (18, 0)
    close(feed(model, cache, row, x[18:], blocks[18:], 2), at_once(model, x)[18:])


def test_no_row_when_all_are_taken(model):
    cache = cache_of(model, 2)
    first = cache.claim()
    cache.claim()
    assert cache.free == 0
    for ask in (cache.claim, lambda: cache.fork(first)):
        with pytest.raises(NoRow, match="all 2 rows are taken"):
            ask()


def test_the_lowest_free_row_is_claimed(model):
    cache = cache_of(model)
    rows = [cache.claim() for _ in range(4)]
    for i in (3, 1, 2):
        cache.release(rows[i])
    assert cache.free == 3
    assert [cache.claim().index for _ in range(3)] == [1, 2, 3]


def test_releasing_a_row_twice_is_our_mistake(model):
    cache = cache_of(model)
    row = cache.claim()
    cache.release(row)
    with pytest.raises(AssertionError, match="free already"):
        cache.release(row)


@pytest.mark.parametrize("past", [3, 40])
def test_a_released_row_leaks_nothing_of_its_past(model, past):
    cache = cache_of(model)
    row = cache.claim()
    feed(model, cache, row, *tape(past, 3))
    cache.release(row)
    row = cache.claim()
    assert (row.index, row.length, cache.earliest(row)) == (0, 0, 0)
    x, blocks = tape(30, 4, [(12, 4)])
    close(feed(model, cache, row, x, blocks, 3), at_once(model, x, blocks))


# ---- static shapes, compilers, graphs, memory


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """More layers than a compiler takes graphs of one function (8) before it gives up in silence."""
    recipe = tiny.Recipe(layers="ssf" * 4, hidden=32, heads=2, kv=1, head_dim=8, full_head_dim=16, window=WINDOW)
    return tiny.write(recipe, tmp_path_factory.mktemp("deep")).model


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_equal_eager_ones_however_many_layers_there_are(deep, backend):
    model, compiled = deep, Gemma(deep.config)
    compiled.load_state_dict(model.state_dict())
    for block in compiled.eval().requires_grad_(False).blocks:
        block.compile(backend=backend, fullgraph=True)
    for count in (15, 23):
        tapes = [tape(count, seed, [(4, 6)]) for seed in range(2)]
        x, blocks = torch.stack([x for x, _ in tapes]), torch.stack([numbers for _, numbers in tapes])
        hidden = compiled(x, whole_span(model.config, count, blocks, x.dtype, x.device))
        for i, (x, blocks) in enumerate(tapes):
            close(hidden[i], at_once(model, x, blocks))
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "slack"), [(64, 5), (8, 0), (100, 40)])
def test_bytes_per_row_are_the_memory_a_row_takes(model, dtype, length, slack):
    cache = Cache(model.config, 3, length, slack=slack, dtype=dtype)
    taken = sum(t[:, :, :-1].numel() * t.element_size() for t in (*cache.keys, *cache.values))
    assert 3 * Cache.bytes_per_row(model.config, length, slack, dtype) == taken


def test_a_row_of_the_12b_takes_what_its_card_says():
    """8 full layers of 2,048 bytes and 40 sliding layers of 8,192 bytes a position: 2,368 MiB at 131,072."""
    config = GemmaConfig.from_json(tiny.REAL)
    assert Cache.bytes_per_row(config, 131_072, 0, torch.bfloat16) == 2_368 * 2**20
    assert Cache.bytes_per_row(config, 8_192, 1_152, torch.bfloat16) == (128 + 320 + 360) * 2**20


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
def test_bfloat16_rows_run_on_a_gpu(model):
    """Random tiny models tell little in bfloat16: near, not equal."""
    here = Gemma(model.config)
    here.load_state_dict(model.state_dict())
    here.to("cuda", torch.bfloat16).eval().requires_grad_(False)
    cache = Cache(model.config, 2, LENGTH, slack=SLACK, device="cuda", dtype=torch.bfloat16)
    x, blocks = tape(40, pictures=PICTURES[:3])
    hidden = feed(here, cache, cache.claim(), x.cuda().bfloat16(), blocks.cuda(), SLACK + 1).float().cpu()
    assert hidden.isfinite().all()
    assert torch.cosine_similarity(hidden, at_once(model, x, blocks), dim=-1).mean() > 0.95


# ---- any history


@dataclass
class Conversation:
    """What a row should hold: its embeddings and picture numbers, position by position."""

    row: Row
    x: list[torch.Tensor] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class Rows:
    """Four rows and, beside each, the plain list of what went in; every answer is checked against reading the list at once."""

    window, slack, length = 4, 3, 26

    def __init__(self, model, operations=None, buckets=()):
        self.model, self.drawn = model, 0
        self.cache = Cache(model.config, 4, self.length, slack=self.slack)
        self.forward = self.cache.forward = ForwardPass(model, self.cache, operations)
        self.forward.capture(buckets)
        self.held: list[Conversation] = []
        self.happened = Counter()

    def play(self, move, who, size):
        chosen = self.held[who % len(self.held)] if self.held else None
        if chosen is None or (move == "claim" and self.cache.free):
            self.held.append(Conversation(self.cache.claim()))
        elif move == "append":
            self.extend([chosen], 1 + size % (self.slack + 1), False)
        elif move == "picture":
            self.extend([chosen], 1 + size % self.window, True)
        elif move == "step":
            self.extend([c for i, c in enumerate(self.held) if (size | 1 << who % len(self.held)) >> i & 1], 1, False)
        elif move == "pass":
            self.ragged(size)
        elif move == "fork" and self.cache.free:
            self.held.append(Conversation(self.cache.fork(chosen.row), list(chosen.x), list(chosen.blocks)))
        elif move == "cut":
            self.cut(chosen, max(0, len(chosen.x) - size % (self.slack + 3)))
        elif move == "release":
            self.held.remove(chosen)
            self.cache.release(chosen.row)

    def extend(self, conversations, count, picture):
        self.drawn += 1
        x = torch.randn(len(conversations), count, 16, generator=torch.Generator().manual_seed(self.drawn))
        blocks = torch.full((len(conversations), count), self.drawn if picture else -1)
        rows = [c.row for c in conversations]
        if any(len(c.x) + count > self.length for c in conversations):
            with pytest.raises(RowFull):
                self.model.extend(self.cache, rows, x, blocks=blocks)
            self.happened["full"] += 1
            return
        hidden = self.model.extend(self.cache, rows, x, blocks=blocks)
        self.happened["rows together"] += len(rows) > 1
        for i, c in enumerate(conversations):
            c.x += list(x[i])
            c.blocks += blocks[i].tolist()
            assert c.row.length == len(c.x)
            self.happened["round the ring"] += len(c.x) > 2 * (self.window + self.slack)
            close(hidden[i], at_once(self.model, torch.stack(c.x), torch.tensor(c.blocks))[-count:])

    def ragged(self, size):
        """One pass over chunks of several lengths, pictures and steps, of rows in any order; some of it is wanted."""
        self.drawn += 1
        rng, generator = random.Random(self.drawn * 32 + size), torch.Generator().manual_seed(self.drawn)
        held, chunks, tapes = rng.sample(self.held, rng.randint(1, len(self.held))), [], []
        for c in held:
            count = min(rng.randint(1, self.slack + 1), self.length - len(c.x))
            start = rng.randint(0, count)
            pictures = ((start, rng.randint(start, count)),) if rng.random() < 0.5 else ()
            pictures = tuple(seen for seen in pictures if seen[0] < seen[1])
            if count:
                chunks.append(RowChunk(c.row, count, pictures, rng.choice((0, 1, count))))
                tapes.append((c, torch.randn(count, 16, generator=generator)))
        if not chunks:
            return
        hidden, at = self.forward(chunks, torch.cat([x for _, x in tapes])), 0
        for chunk, (c, x) in zip(chunks, tapes, strict=True):
            seen = [any(start <= i < stop for start, stop in chunk.pictures) for i in range(chunk.count)]
            c.blocks += [1000 * self.drawn + c.row.index if inside else -1 for inside in seen]
            c.x += list(x)
            assert c.row.length == len(c.x)
            whole = at_once(self.model, torch.stack(c.x), torch.tensor(c.blocks))
            if chunk.wanted:
                close(hidden[at : at + chunk.wanted], whole[-chunk.wanted :])
            at += chunk.wanted
            self.happened["pictures among others"] += len(chunks) > 1 and any(seen)
        assert (hidden is None) if at == 0 else len(hidden) == at
        self.happened["ragged"] += len({chunk.count for chunk in chunks}) > 1

    def cut(self, c, position):
        if 0 < position < self.cache.earliest(c.row):
            with pytest.raises(RowFull):
                self.cache.truncate(c.row, position)
            self.happened["cut refused"] += 1
            return
        if 0 < position < len(c.x) and c.blocks[position - 1] == c.blocks[position] >= 0:
            return  # half a picture has seen the other half: only whole ones are forgotten
        self.happened["cut"] += position < len(c.x)
        self.cache.truncate(c.row, position)
        del c.x[position:], c.blocks[position:]

    def finish(self):
        """Every row that is left goes on as it should."""
        for c in self.held:
            if len(c.x) < self.length:
                self.extend([c], 1, False)


MOVES = ("append", "append", "pass", "pass", "pass", "step", "step", "picture", "cut", "cut", "fork", "claim", "release")
moves = st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 3), st.integers(0, 31)), min_size=15, max_size=45)
TURN = [("step", 0, 31), ("pass", 0, 5), ("pass", 0, 6), ("cut", 0, 3), ("fork", 0, 0), ("step", 0, 9)]
LONG = [("claim", 0, 0)] * 3 + [("append", i % 3, 3) for i in range(15)] + TURN * 3


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    recipe = tiny.Recipe(layers="sf", hidden=16, heads=2, kv=1, head_dim=8, full_head_dim=8, window=Rows.window)
    return tiny.write(recipe, tmp_path_factory.mktemp("small")).model


@settings(max_examples=25, deadline=None)
@given(moves)
@example(LONG)
def test_any_history_of_four_rows_equals_reading_each_at_once(small, history):
    rows = Rows(small)
    for move, who, size in history:
        rows.play(move, who, size)
    rows.finish()


def test_the_long_history_reaches_what_matters(small):
    rows = Rows(small)
    for move in [*LONG, ("cut", 0, 5), *[("append", 0, 3)] * 5]:
        rows.play(*move)
    happenings = ("rows together", "ragged", "pictures among others", "round the ring", "cut", "cut refused", "full")
    assert all(rows.happened[thing] for thing in happenings), rows.happened


def test_a_batch_without_a_cache_takes_the_place_of_rows(model):
    """The form that training uses: rows of a batch see themselves only."""
    tapes = [tape(30, seed, [(4 + seed, 6)]) for seed in range(3)]
    x, blocks = torch.stack([x for x, _ in tapes]), torch.stack([b for _, b in tapes])
    hidden = model(x, whole_span(model.config, 30, blocks, x.dtype, x.device))
    for i, (x, blocks) in enumerate(tapes):
        close(hidden[i], at_once(model, x, blocks))
