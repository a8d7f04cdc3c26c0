"""The engine against plain calls of the model: many conversations at once, each answers as if it were alone."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from agent import engine
from agent.engine import CHUNK, STEP_LIMIT, Engine, EngineStopped, RowLost, SequenceHandle
from agent.segments import Picture, Segment, size
from agent.tape import Sound
from model import cache
from model.cache import NoRow, RowFull
from model.forward import ForwardPass
from model.sampling import sample
from streams.frames import MediaError
from tests.talk import WINDOW, Plain, greedy, jpeg, picture, same, settled, sound, tiny, viewed, words
from tests.talk import written as written_by

LOADED = tiny()
GREEDY = greedy(LOADED)
CLOSING = words(5, 99)


def nobody(error: Exception) -> None:
    assert isinstance(error, EngineStopped), error


def written(handle: SequenceHandle, closing: Segment = CLOSING, max_tokens: int = 12) -> Any:
    return written_by(handle, closing, sampling=GREEDY, max_tokens=max_tokens)


def expected(*past: Segment, closing: Segment = CLOSING, max_tokens: int = 12) -> list[tuple[int, float]]:
    return Plain(LOADED, (*past, closing)).generate(GREEDY, max_tokens)


def held(engine: Engine) -> threading.Event:
    """The engine does nothing until this is set: what is submitted meanwhile is there in one tick."""
    hold = threading.Event()
    engine.call(partial(hold.wait, 30))
    return hold


async def reported(errors: list[Exception], count: int) -> bool:
    """Waits until so many errors were reported. Returns whether there are no more."""
    async with asyncio.timeout(60):
        while len(errors) < count:
            await asyncio.sleep(0)
    return len(errors) == count


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, int]]:
    """For each pass, how many positions each row took."""
    seen: list[dict[int, int]] = []
    forward = ForwardPass.__call__

    def counted(self: ForwardPass, chunks: Any, x: torch.Tensor) -> Any:
        seen.append({chunk.row.index: chunk.count for chunk in chunks})
        return forward(self, chunks, x)

    monkeypatch.setattr(ForwardPass, "__call__", counted)
    return seen


@pytest.fixture
def short_rings(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cache, "SLACK", 150)
    return 150 + WINDOW


class Gate:
    """A sampler that samples as many tokens as were allowed."""

    def __init__(self) -> None:
        self.begun, self._allowed = 0, threading.Semaphore(0)

    def allow(self, count: int) -> None:
        self._allowed.release(count)

    def __call__(self, logits: torch.Tensor, *given: Any) -> torch.Tensor:
        for _ in logits:
            self.begun += 1
            assert self._allowed.acquire(timeout=30)
        return sample(logits, *given)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.allow(1000)


def conversation(seed: int) -> list[Segment]:
    return [words(7, seed), picture(LOADED, seed), words(3, seed + 1), sound(40, seed), words(2, seed + 2), sound(25, seed + 3)]


def pieces(segments: list[Segment], how: str, seed: int) -> Iterator[Segment]:
    """The same positions, split otherwise; pictures stay whole."""
    rng = random.Random(seed)
    for segment in segments:
        at = 0
        while at < size(segment):
            whole = isinstance(segment, Picture) or how == "whole"
            count = size(segment) if whole else 1 if how == "one by one" else rng.randint(1, 20)
            if isinstance(segment, Sound):
                yield Sound(segment.data[2 * segment.frame * at :][: 2 * segment.frame * count], segment.frame)
            else:
                yield segment if isinstance(segment, Picture) else segment[at : at + count]
            at += count


# ---- rows


async def test_rows_fed_in_any_pieces_and_at_once_write_what_the_plain_verbs_write(passes):
    how = ["one by one", "in chunks", "whole", "one by one"]
    with Engine(LOADED, rows=4, length=600) as engine:
        handles = [engine.claim(nobody) for _ in how]
        streams = [list(pieces(conversation(seed), way, seed)) for seed, way in enumerate(how)]
        for turn in range(max(map(len, streams))):
            for handle, stream in zip(handles, streams, strict=True):
                handle.append(*stream[turn : turn + 1])
            await asyncio.sleep(0)
        answers = await asyncio.gather(*map(written, handles))
        assert any(len(rows) > 1 for rows in passes), "they share passes"
        assert max(max(rows.values()) for rows in passes) <= max(CHUNK, picture(LOADED).positions)
        for handle in handles:
            handle.release()
    for seed, answer in enumerate(answers):
        assert same(answer, expected(*conversation(seed))), how[seed]


async def test_a_row_goes_on_after_what_it_wrote():
    with Engine(LOADED, length=600) as engine:
        handle = engine.claim(nobody)
        handle.append(*conversation(0))
        first = await written(handle)
        handle.append((first[-1][0],), sound(30, 5))  # the last token is never in the row
        second = await written(handle)
    said = tuple(token for token, _ in first)
    assert same(second, expected(*conversation(0), CLOSING, said, sound(30, 5)))


async def test_a_fork_leaves_its_parent_alone_and_waits_for_a_spare_row():
    with Engine(LOADED, rows=1, length=600, spares=1) as engine:
        parent = engine.claim(nobody)
        parent.append(*conversation(0))
        one, two = parent.fork(), parent.fork()
        later = asyncio.create_task(written(two, words(4, 1)))
        assert same(await written(one, words(4, 0)), expected(*conversation(0), closing=words(4, 0)))
        assert same(await written(parent), expected(*conversation(0)))
        assert not later.done() and two.waiting == 4
        one.release()
        assert same(await later, expected(*conversation(0), closing=words(4, 1)))
        two.release()


async def test_a_fork_begins_where_it_was_asked_for_though_its_parent_went_on(gate):
    with Engine(LOADED, rows=1, length=600, spares=1, sampler=gate) as engine:
        parent = engine.claim(nobody)
        other = parent.fork()  # holds the spare row
        other.append(words(1))
        parent.append(*conversation(0))
        fork = parent.fork()
        parent.append(sound(50, 8), words(9))
        await settled(parent)
        other.release()
        gate.allow(1000)
        assert same(await written(fork), expected(*conversation(0)))


async def test_a_fork_holds_what_was_rewritten_after_it():
    with Engine(LOADED, rows=1, length=600) as engine:
        parent = engine.claim(nobody)
        parent.append(words(50))
        await settled(parent)
        hold = held(engine)
        fork = parent.fork()
        parent.rewrite(20, viewed(words(20), words(60, 7)))  # in the same tick
        hold.set()
        assert same(await written(fork), expected(words(50)))
        assert same(await written(parent), expected(words(20), words(60, 7)))


async def test_a_fork_that_waited_until_its_past_was_rewritten_says_so():
    with Engine(LOADED, rows=1, length=600, spares=1) as engine:
        parent = engine.claim(nobody)
        one = parent.fork()
        one.append(words(1))
        parent.append(words(50))
        fork = parent.fork()
        waits = asyncio.create_task(written(fork))
        await asyncio.sleep(0)
        parent.rewrite(20, viewed(words(20), words(60, 7)))
        with pytest.raises(RowFull, match="truncated before a fork"):
            await waits
        one.release()
        assert same(await written(parent), expected(words(20), words(60, 7)))
        again = parent.fork()
        assert len(await written(again)) == 12, "and its place is free"


@pytest.mark.parametrize("keep", [0, 9, 60, 330])
async def test_what_was_rewritten_was_never_appended(short_rings, keep):
    """Also further back than the slack of the rings."""
    old, new = (*words(keep), *words(340 - keep, 1)), (*words(keep), *words(10, 2))
    with Engine(LOADED, length=600) as engine:
        handle = engine.claim(nobody)
        handle.append(old, sound(30))
        await settled(handle)
        assert handle.row and engine._cache.earliest(handle.row) > 60
        handle.rewrite(keep, viewed(new, sound(60, 4)))
        assert same(await written(handle), expected(new, sound(60, 4)))
        assert handle.waiting == 0


async def test_a_row_is_rewritten_over_and_over_and_never_runs_out(short_rings):
    with Engine(LOADED, length=600) as engine:
        handle = engine.claim(nobody)
        for number in range(12):
            handle.rewrite(0, viewed(words(300, number)))
        assert same(await written(handle), expected(words(300, 11)))


async def test_cancelling_stops_before_the_next_step_and_the_row_goes_on(gate, passes):
    with Engine(LOADED, length=600, sampler=gate) as engine:
        handle = engine.claim(nobody)
        handle.append(*conversation(0))
        gate.allow(3)
        tokens = handle.generate(CLOSING, sampling=GREEDY, max_tokens=100)
        said = [(await anext(tokens))[0] for _ in range(3)]
        while gate.begun < 4:
            await asyncio.sleep(0)
        await tokens.aclose()  # while the fourth is being sampled
        before = sum(sum(rows.values()) for rows in passes)
        gate.allow(1)
        handle.append(words(1))
        await settled(handle)
        assert sum(sum(rows.values()) for rows in passes) == before + 1
        gate.allow(1000)
        heard = (*CLOSING, said[0])
        handle.rewrite(sum(map(size, conversation(0))) + 6, viewed(*conversation(0), heard, sound(30)))
        assert same(await written(handle), expected(*conversation(0), heard, sound(30)))


async def test_an_answer_ends_where_the_row_is_full_and_a_row_that_overflows_is_lost():
    errors: list[Exception] = []
    with Engine(LOADED, length=100) as engine:
        handle = engine.claim(errors.append)
        handle.append(words(90))
        assert len(await written(handle, words(5), max_tokens=50)) == 6
        handle.append(words(20))
        with pytest.raises(RowFull, match="do not fit in a row of 100"):
            await written(handle)
        assert await reported(errors, 1) and isinstance(errors[0], RowFull)


# ---- places


async def test_a_claim_beyond_the_rows_is_refused_at_once_and_a_released_row_is_free():
    with Engine(LOADED, rows=2, length=100) as engine:
        one, two = engine.claim(nobody), engine.claim(nobody)
        assert engine.free == 0
        with pytest.raises(NoRow, match="all 2 places are taken"):
            engine.claim(nobody)
        one.append(words(50))
        one.release()
        one.release()
        assert engine.free == 1
        three = engine.claim(nobody)
        assert same(await written(three), expected())
        two.release()
        three.release()
        assert engine.free == 2


async def lost(handle: SequenceHandle) -> Exception:
    with pytest.raises(Exception) as caught:
        await written(handle)
    return caught.value


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Picture(b"not a picture", 70, 54), "the picture"),
        (Picture(jpeg(), 70, 9), "the model failed on this conversation"),  # larger than it was said to be
        ((100_000,), "the model failed on this conversation"),
        (sound(3, frame=77), "the model failed on this conversation"),
    ],
)
async def test_a_bad_part_ends_its_conversation_alone_and_its_row_is_free(bad, says):
    errors: list[Exception] = []
    with Engine(LOADED, rows=2, length=600) as engine:
        well, ill = engine.claim(nobody), engine.claim(errors.append)
        well.append(*conversation(0))
        ill.append(words(20), bad)
        assert says in str(await lost(ill))
        assert same(await written(well), expected(*conversation(0)))
        assert await reported(errors, 1) and says in str(errors[0])
        assert isinstance(errors[0], MediaError | RowLost)
        ill.release()
        again = engine.claim(nobody)
        assert same(await written(again), expected())


async def test_whoever_waits_for_a_row_is_told_when_all_is_in_it_or_what_it_was_lost_to():
    with Engine(LOADED, rows=2, length=60) as running:
        errors: list[Exception] = []
        well, ill = running.claim(nobody), running.claim(errors.append)
        well.append(words(40), sound(3))
        await well.drained()
        assert well.waiting == 0
        ill.append(words(70))
        for _ in range(2):  # while it is being lost, and long after
            with pytest.raises(RowFull):
                await ill.drained()
        assert await reported(errors, 1)


async def test_out_of_memory_ends_the_one_conversation_and_says_so_once(monkeypatch):
    errors: list[Exception] = []
    forward, full = ForwardPass.__call__, threading.Event()

    def heavy(self: ForwardPass, chunks: Any, x: torch.Tensor) -> Any:
        if full.is_set() and any(chunk.row.index == 1 for chunk in chunks):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, chunks, x)

    monkeypatch.setattr(ForwardPass, "__call__", heavy)
    with Engine(LOADED, rows=3, length=600) as engine:
        handles = [engine.claim(errors.append if row == 1 else nobody) for row in range(3)]
        for seed, handle in enumerate(handles):
            handle.append(*conversation(seed))
        await settled(handles[1])
        answers = [asyncio.create_task(written(handle, max_tokens=30)) for handle in handles]
        await asyncio.sleep(0)
        full.set()
        first, second, third = await asyncio.gather(*answers, return_exceptions=True)
        assert isinstance(second, RowLost) and "ran out of memory on this conversation" in str(second)
        handles[1].append(words(3))
        assert isinstance(await lost(handles[1]), RowLost)
        assert await reported(errors, 1) and str(errors[0]) == str(second)
        assert same(first, expected(*conversation(0), max_tokens=30)) and same(third, expected(*conversation(2), max_tokens=30))
        full.clear()
        handles[1].release()
        assert same(await written(engine.claim(nobody)), expected())


@pytest.mark.parametrize("fault", ["NaN", "no memory"])
async def test_a_token_that_cannot_be_sampled_ends_one_conversation(fault):
    errors: list[Exception] = []

    def broken(logits: torch.Tensor, generations: Any, uniforms: Any) -> torch.Tensor:
        ill = [how is not GREEDY for how in generations]
        if fault == "no memory" and any(ill):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(torch.where(torch.tensor(ill)[:, None], torch.nan, logits), generations, uniforms)

    with Engine(LOADED, rows=2, length=600, sampler=broken) as running:
        well, ill = running.claim(nobody), running.claim(errors.append)
        lost, answer = await asyncio.gather(
            written_by(ill, CLOSING, sampling=LOADED.generation), written(well), return_exceptions=True
        )
        assert isinstance(lost, RowLost) and re.search("logits are NaN|ran out of memory", str(lost))
        assert same(answer, expected())
        assert await reported(errors, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dying_thread_tells_everyone_and_nothing_hangs(monkeypatch):
    errors: list[Exception] = []

    def dies(*_: Any, **__: Any) -> Any:
        raise AssertionError("a mistake")

    with Engine(LOADED, rows=3, length=600) as engine:
        idle, speaking = engine.claim(errors.append), engine.claim(errors.append)
        fork = idle.fork()
        assert len(await written(speaking)) == 12
        monkeypatch.setattr(ForwardPass, "__call__", dies)
        waits = asyncio.create_task(written(fork))
        with pytest.raises(EngineStopped, match="the model has stopped: a mistake"):
            await written(speaking)
        with pytest.raises(EngineStopped):
            await waits
        engine._thread.join(10)
        assert await reported(errors, 2) and {type(error) for error in errors} == {EngineStopped}
        with pytest.raises(EngineStopped):
            engine.claim(nobody)
        assert engine.free == 0
        for handle in (idle, speaking, fork):
            handle.append(words(3))
            assert isinstance(await lost(handle), EngineStopped)
            handle.release()
        assert len(errors) == 2


async def test_closing_the_engine_ends_what_is_under_way():
    errors: list[Exception] = []
    engine = Engine(LOADED, length=4000)
    handle = engine.claim(errors.append)
    tokens = handle.generate(CLOSING, sampling=GREEDY, max_tokens=3000)
    await anext(tokens)
    engine.close()
    with pytest.raises(EngineStopped, match="it was closed"):
        async for _ in tokens:
            pass
    assert await reported(errors, 1)


def test_a_conversation_whose_loop_has_gone_harms_nobody():
    with Engine(LOADED, rows=2, length=600) as engine:

        async def leaves() -> None:
            handle = engine.claim(nobody)
            tokens = handle.generate(CLOSING, sampling=GREEDY, max_tokens=500)
            await anext(tokens)
            leaves.tokens = tokens  # type: ignore[attr-defined]  # never closed

        loop = asyncio.new_event_loop()
        loop.run_until_complete(leaves())
        loop.close()

        async def comes() -> None:
            assert same(await written(engine.claim(nobody)), expected())

        asyncio.run(comes())


# ---- one after the other


async def test_a_picture_or_a_backlog_for_one_rides_along_with_anothers_steps_one_chunk_at_a_time(passes):
    with Engine(LOADED, rows=3, length=2000) as engine:
        speaking, looking, behind = (engine.claim(nobody) for _ in range(3))
        tokens = speaking.generate(CLOSING, sampling=GREEDY, max_tokens=1900)
        await anext(tokens)
        row = speaking.row
        assert row
        passes.clear()
        for seed in range(5):
            looking.append(words(3), picture(LOADED, seed), words(2))
            behind.append(words(300))
        async for _ in tokens:
            if not looking.waiting and not behind.waiting:
                break
        await tokens.aclose()
    others = [[count for index, count in rows.items() if index != row.index] for rows in passes]
    assert sum(map(sum, others)) > 1500, "the pictures and the backlog went in while it spoke"
    assert all(rows[row.index] == 1 for rows in passes), "and it had a step in every pass"
    assert all(sum(count > STEP_LIMIT for count in counts) <= 1 for counts in others)


def chunk_passes(passes: list[dict[int, int]], handle: SequenceHandle) -> list[int]:
    """The indices of the passes in which this row had a chunk."""
    assert handle.row
    index = handle.row.index
    return [number for number, rows in enumerate(passes) if rows.get(index, 0) > STEP_LIMIT]


async def test_what_nobody_waits_for_goes_after_what_somebody_waits_for_and_is_not_starved_by_it(passes):
    with Engine(LOADED, rows=2, length=2000) as engine:
        history, asks = engine.claim(nobody), engine.claim(nobody)
        hold = held(engine)
        history.append(words(1000))
        answer = asyncio.create_task(written(asks, words(1000), max_tokens=1))
        await asyncio.sleep(0)
        hold.set()
        assert len(await answer) == 1
        assert chunk_passes(passes, asks) == [0, 1, 2, 3, 5, 6, 7, 8] and chunk_passes(passes, history)[0] == 4
        await settled(history)


async def test_a_caption_waits_for_what_other_conversations_wait_for(passes):
    with Engine(LOADED, rows=2, length=2000) as engine:
        parent, other = engine.claim(nobody), engine.claim(nobody)
        parent.append(words(5))
        await settled(parent)
        passes.clear()
        hold = held(engine)
        fork = parent.fork(background=True)
        caption = asyncio.create_task(written(fork, words(200), max_tokens=1))
        await asyncio.sleep(0)
        answer = asyncio.create_task(written(other, words(200, 1), max_tokens=1))
        await asyncio.sleep(0)
        hold.set()
        await asyncio.gather(caption, answer)
        assert chunk_passes(passes, other) == [0, 1] and chunk_passes(passes, fork) == [2, 3]


async def test_conversations_that_are_waited_for_take_turns_whoever_came_first(passes):
    with Engine(LOADED, rows=3, length=2000) as engine:
        handles = [engine.claim(nobody) for _ in range(3)]
        hold = held(engine)
        answers = []
        for handle, count in zip(handles, (1500, 300, 20), strict=True):
            answers.append(asyncio.create_task(written(handle, words(count), max_tokens=1)))
            await asyncio.sleep(0)
        hold.set()
        await asyncio.gather(*answers)
        long, short, shortest = (chunk_passes(passes, handle) for handle in handles)
        assert shortest == [2] and short[-1] <= 7 and long[-1] == len(passes) - 1


async def test_an_answer_is_slowed_by_the_history_of_another_by_one_chunk_in_sixteen_steps_and_by_a_prompt_in_four(passes):
    for wanted, every in ((0, 16), (1, 4)):
        with Engine(LOADED, rows=2, length=2000) as engine:
            speaks, loads = engine.claim(nobody), engine.claim(nobody)
            tokens = speaks.generate(CLOSING, sampling=GREEDY, max_tokens=100)
            await anext(tokens)
            engine.call(passes.clear)  # by the engine's thread, which goes on until it is held
            hold = held(engine)
            if wanted:
                asked = asyncio.create_task(written(loads, words(1400), max_tokens=1))
                await asyncio.sleep(0)
            else:
                loads.append(words(1400))
            hold.set()
            assert len([token async for token in tokens]) == 99
            chunks = chunk_passes(passes[:40], loads)
            assert all(speaks.row.index in rows for rows in passes[:40])  # type: ignore[union-attr]
            assert all(b - a > 1 for a, b in pairwise(chunks)) and 40 // every - 1 <= len(chunks) <= 40 // every + 1
            if wanted:
                await asked


async def test_pictures_of_a_conversation_are_decoded_one_at_a_time_and_not_far_ahead(monkeypatch):
    """So another conversation's picture waits for one of them at most, and decoded pictures do not pile up in memory."""
    hold, decoded, decode = threading.Event(), list[bytes](), engine.decode_picture

    def slow(data: bytes, name: str) -> Any:
        assert hold.wait(30)
        decoded.append(data)
        return decode(data, name)

    monkeypatch.setattr(engine, "decode_picture", slow)
    with Engine(LOADED, rows=2, length=2000) as running:
        many, one = running.claim(nobody), running.claim(nobody)
        many.append(*(picture(LOADED, seed) for seed in range(6)))
        one.append(picture(LOADED, 7))
        both = asyncio.gather(many.drained(), one.drained())
        running.call(hold.set)  # both were submitted
        await both
    assert decoded.index(jpeg(7)) <= 2 and len(decoded) == 7
