"""The one thread that owns the model: rows of many conversations, one pass at a time.

A conversation holds a `SequenceHandle`. Its methods return at once; the row does them in order. Each tick of the thread is one
forward pass: the step of every row that has one due (a microphone frame, the token just drawn), and at most one chunk beside
them: what has piled up for a single row, at most `CHUNK` positions or one picture. So nobody waits longer for a step than for a
pass with one chunk, and the busier the engine is, the more rows share a pass. Which chunk that is, and when, agent/scheduler.py
decides.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from queue import Empty, SimpleQueue
from random import Random
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from agent.checkpoint import LENGTH, LoadedModel, new_cache, out_of_memory, patchify
from agent.scheduler import CHUNK, PendingChunk, Scheduler
from agent.segments import Picture, Segment, View, size
from agent.sequence import Append, Barrier, Fork, Generate, Operation, Parts, Rewrite, Sequence
from agent.tape import Sound
from agent.timing import Timing
from model import batch
from model.cache import NoRow, RowFull
from model.forward import ForwardPass, select
from model.gemma import Part
from model.sampling import Sampler, SamplingParams, sample
from streams.frames import MediaError
from streams.pictures import decode_picture

FEW = 4  # positions that piled up behind a busy moment are taken at once: only more than these are a chunk
RESTART = "attend ends, so that whoever watches over it starts it again"
FAULTS = (RuntimeError, ValueError, IndexError, MemoryError)  # of one pass: a full row, no memory, a picture that is none


class EngineStopped(RuntimeError):
    """The thread is gone; no conversation can go on."""


class RowLost(RuntimeError):
    """A pass failed on one conversation, and its row is gone."""


# ---- the conversation's side


class SequenceHandle:
    """A row as its conversation sees it. Use it on the event loop; a failure ends it and is told once."""

    def __init__(self, engine: Engine, seat: Sequence) -> None:
        self._engine, self._seat, self._released = engine, seat, False

    @property
    def waiting(self) -> int:
        """Positions that are not in the row yet."""
        return self._seat.asked - self._seat.taken

    @property
    def behind(self) -> int:
        """Of these, those that never were: a model that is too slow for what comes, not one that tidies up."""
        return self.waiting - self._seat.again

    def append(self, *segments: Segment) -> None:
        self._engine._order(self._seat, *self._takes(segments))

    def rewrite(self, keep: int, view: View) -> None:
        """Makes the row hold `view`, of which it holds the first `keep` positions already. Where the rings do not reach back
        that far it begins anew."""
        self._engine._order(self._seat, Rewrite(keep, view))

    def fork(self, background: bool = False) -> SequenceHandle:
        """A second row that goes on from here. It waits while no spare row is free. `background`: nobody waits for it."""
        child = Sequence(self._seat.tell, self._seat, background)
        self._engine._order(self._seat, Fork(child))
        return SequenceHandle(self._engine, child)

    async def drained(self) -> None:
        """Until everything that was ordered is in the row. Raises what the row was lost to."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell(error: Exception | None) -> None:
            if not done.done():
                done.set_exception(error) if error else done.set_result(None)

        self._engine._order(self._seat, Barrier(partial(_tell, loop, tell)))
        await done

    async def generate(
        self, *closing: Segment, sampling: SamplingParams, max_tokens: int, seed: int | None = None
    ) -> AsyncGenerator[tuple[int, float]]:
        """Appends and generates: tokens and their log-probabilities, the stop token included. Ends also where the row is full;
        closing the iterator stops it before its next step. Every token but the last is in the row."""
        assert closing, "an answer needs something to follow"
        loop, drawn = asyncio.get_running_loop(), asyncio.Queue[tuple[int, float] | Exception | None]()
        run = Generate(sampling, max_tokens, Random(seed), partial(_tell, loop, drawn.put_nowait))
        self._engine._order(self._seat, *self._takes(closing), run)
        try:
            while (item := await drawn.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            run.cancelled = True
            self._engine._order(self._seat)

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._engine._release(self._seat)

    def _takes(self, segments: tuple[Segment, ...]) -> list[Append]:
        takes = [Append(segment) for segment in segments if size(segment)]
        self._seat.asked += sum(size(take.segment) for take in takes)
        return takes


class Engine:
    """`rows` conversations at once, and `spares` more rows for their forks, with pictures of up to `budget` soft tokens (None:
    the checkpoint's). Starts its thread; `close` ends it. Raises CheckpointError where the rows do not fit.

    `sampler` draws the tokens; another can be put in its place while the engine runs."""

    def __init__(
        self,
        loaded: LoadedModel,
        rows: int = 1,
        length: int = LENGTH,
        spares: int | None = None,
        budget: int | None = None,
        sampler: Sampler = sample,
    ) -> None:
        self.loaded, self.rows = loaded, rows
        self.spares = total_rows(rows, spares) - rows
        self.lags: deque[float] = deque(maxlen=1 << 16)  # seconds from a frame's arrival until it was in its row
        self.steps: deque[float] = deque(maxlen=1 << 10)  # seconds that the last steps took
        self._timing = Timing(loaded.model.device)
        self._cache = new_cache(loaded, rows + self.spares, length, budget)
        self._forward = ForwardPass(loaded.model, self._cache)
        self._forward.capture()
        self.sampler = sampler
        self.length = self._cache.length
        self._orders: SimpleQueue[Callable[[], None] | None] = (
            SimpleQueue()
        )  # bounded by those who ask: see SequenceHandle.behind
        self._seats: list[Sequence] = []
        self._scheduler = Scheduler()
        self._left = rows
        self._dead: EngineStopped | None = None
        self._ending = threading.Lock()
        self._ended: Future[EngineStopped] = Future()
        self.pictures = ThreadPoolExecutor(1, "pictures")  # whoever decodes one, does it here: one core for all of them
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def free(self) -> int:
        """Conversations that can begin."""
        return 0 if self._dead else self._left

    def claim(self, failed: Callable[[Exception], None]) -> SequenceHandle:
        """A row. `failed` is told on the event loop if it is lost. Raises NoRow at once if all are taken, or EngineStopped."""
        if self._dead:
            raise self._dead
        if not self._left:
            raise NoRow(f"all {self.rows} places are taken; try again when a conversation has ended")
        self._left -= 1
        loop = asyncio.get_running_loop()
        seat = Sequence(partial(_tell, loop, failed))
        self._order(seat)
        return SequenceHandle(self, seat)

    async def stopped(self) -> EngineStopped:
        """Waits until the thread is gone. Returns why: it failed, or was closed."""
        return await asyncio.shield(asyncio.wrap_future(self._ended))

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join()
        self.pictures.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, seat: Sequence, *ops: Operation) -> None:
        def take() -> None:
            if seat.gone or (seat.parent and seat.parent.gone):
                for op in ops:
                    _cancel(op, self._dead or seat.error or RowLost("the conversation has no row any more"))
            else:
                if seat not in self._seats:
                    self._seats.append(seat)
                seat.todo.extend(ops)

        self._orders.put(take)
        if self._dead:
            self._end(self._dead)

    def _release(self, seat: Sequence) -> None:
        if seat.parent is None:
            self._left += 1
        self._orders.put(lambda: self._leave(seat, None))

    def _decode(self, take: Append, picture: Picture) -> None:
        take.cut = self.pictures.submit(
            lambda: patchify(self.loaded, decode_picture(picture.data, "the picture"), picture.budget)
        )
        take.cut.add_done_callback(lambda _: self._orders.put(lambda: None))

    # -- the thread

    def _run(self) -> None:
        try:
            moved = True
            while True:
                while not moved or not self._orders.empty():
                    order = self._orders.get()
                    if order is None:
                        return
                    order()
                    moved = True
                moved = self._tick()
        except EngineStopped as stopped:
            self._dead = stopped
        except torch.AcceleratorError as error:  # of an earlier pass
            self._dead = self._failed(error)
        except Exception as error:
            self._dead = EngineStopped(f"the model has stopped: {error}")
            raise
        finally:
            self._dead = self._dead or EngineStopped("the model has stopped: it was closed")
            self._end(self._dead)
            self._ended.set_result(self._dead)

    def _end(self, why: EngineStopped) -> None:
        """Tells all who still wait for something. By the thread as it goes, and afterwards by whoever orders something."""
        with self._ending:
            with suppress(Empty):
                while True:
                    if order := self._orders.get_nowait():
                        order()
            for seat in list(self._seats):
                self._leave(seat, why)

    @torch.inference_mode()
    def _tick(self) -> bool:
        moved = sum(self._settle(seat) for seat in list(self._seats)) > 0
        due = [(seat, parts) for seat in self._seats if (parts := seat.due(CHUNK))]
        steps, chunks = list[tuple[Sequence, Parts]](), list[tuple[Sequence, Parts]]()
        for seat, parts in due:
            chunk = isinstance(parts[0][0].segment, Picture) or _positions(parts) > FEW
            (chunks if chunk else steps).append((seat, parts))
        decoding = any(seat.awaited for seat, _ in steps)
        chosen = self._scheduler.choose([_chunk(seat, parts) for seat, parts in chunks], decoding)
        group = steps if chosen is None else [*steps, chunks[chosen]]
        if group:
            self._timing.wait()  # never more than one pass ahead of the device: who comes next waits for no queue
            begun = self._timing.begin()
            self._pass(sorted(group, key=lambda one: one[0].row.index if one[0].row else 0))
            self._timing.mark(lambda done: self.steps.append(done - begun) if steps else None)
        return moved or bool(due)

    def _settle(self, seat: Sequence) -> bool:
        """Does what costs no pass."""
        moved = False
        if seat.row is None and not self._sit(seat):
            return False
        assert seat.row
        while seat.todo:
            match op := seat.todo[0]:
                case Rewrite():
                    seat.todo.popleft()
                    at = self._cut_back(seat, op.keep)
                    takes = [Append(segment, again=True) for segment in op.view.rest(at)]
                    again = sum(size(take.segment) for take in takes)
                    seat.again += again
                    seat.taken -= again
                    seat.todo.extendleft(reversed(takes))
                case Fork():
                    seat.todo.popleft()
                    op.child.at = seat.row.length
                    if not op.child.gone:
                        self._seats += [] if op.child in self._seats else [op.child]
                        self._sit(op.child)
                case Generate(cancelled=True):
                    seat.todo.popleft()
                case Append(drawn=Generate(cancelled=True)):
                    seat.todo.popleft()
                    seat.taken += 1
                case Barrier():
                    seat.todo.popleft()
                    op.tell(None)
                case Append():
                    break
                case Generate():
                    raise AssertionError("what is generated follows something")
            moved = True
        if (take := seat.undecoded()) and isinstance(take.segment, Picture):
            self._decode(take, take.segment)
        return moved

    def _cut_back(self, seat: Sequence, keep: int) -> int:
        """The position to which the row was cut back: `keep`, or where the rings do not reach back so far, 0."""
        assert seat.row
        at = min(keep, seat.row.length)
        at = at if at >= self._cache.earliest(seat.row) else 0
        self._cache.truncate(seat.row, at)
        for child in [other for other in self._seats if other.parent is seat and other.row is None]:
            if child.at is not None and child.at > at:
                self._leave(child, RowFull("the row was cut back before a fork of it could be made"))
        return at

    def _sit(self, seat: Sequence) -> bool:
        """Gives a seat its row: a conversation at once, a fork when its parent has come so far and a spare one is free."""
        if seat.gone:
            return False
        if seat.parent is None:
            seat.row = self._cache.claim()
            return True
        parent = seat.parent.row
        if parent is None or seat.at is None:
            return False
        if sum(other.parent is not None and other.row is not None for other in self._seats) >= self.spares:
            return False
        if seat.at < self._cache.earliest(parent):
            self._leave(seat, RowFull("the row went on too far before a fork of it could be made"))
            return False
        seat.row = self._cache.fork(parent)
        self._cache.truncate(seat.row, seat.at)
        return True

    def _pass(self, group: list[tuple[Sequence, Parts]]) -> None:
        self._timing.begin()
        try:
            hidden = self._extend(group)
        except FAULTS as error:
            self._survive(error)
            if len(group) > 1:  # whose fault it was shows alone
                for one in group:
                    if not one[0].gone:
                        self._pass([one])
            else:
                self._leave(group[0][0], _row_lost(error))
            return
        runs = [(seat, run) for seat, parts in group if (run := seat.wanted(parts))]
        for seat, parts in group:
            self._took(seat, parts)
        kept = [place for place, (_, run) in enumerate(runs) if not run.cancelled]
        if hidden is not None and kept:
            self._draw([(*runs[place], runs[place][1].generator.random()) for place in kept], select(hidden, kept))

    def _survive(self, error: Exception) -> None:
        """Raises EngineStopped for a fault that is not one conversation's: once a GPU has failed every later call fails too, and
        what it tells is late, so whose fault it was does not show. But for a lack of memory, after which it goes on."""
        sticky = isinstance(error, RuntimeError) and self.loaded.model.device.type != "cpu"
        if (sticky or isinstance(error, torch.AcceleratorError)) and not out_of_memory(error):
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> EngineStopped:
        return EngineStopped(f"the device {self.loaded.model.device} has failed: {_first_line(error)}; {RESTART}")

    def _extend(self, group: list[tuple[Sequence, Parts]]) -> Tensor | None:
        """Hidden states of the last positions of those rows that are to go on from there."""
        chunks = []
        for seat, parts in group:
            assert seat.row
            ends = [0]
            for _, start, stop in parts:
                ends.append(ends[-1] + stop - start)
            pictures = tuple(bounds for bounds, (take, _, _) in zip(pairwise(ends), parts, strict=True) if take.cut)
            chunks.append(batch.RowChunk(seat.row, ends[-1], pictures, wanted=1 if seat.wanted(parts) else 0))
        return self._forward(chunks, self.loaded.model.embed([_part(*part) for _, parts in group for part in parts]))

    def _took(self, seat: Sequence, parts: Parts) -> None:
        arrived = [take.since for take, _, _ in parts if isinstance(take.segment, Sound) and not take.again]
        if arrived:
            self._timing.mark(lambda done: self.lags.extend(done - since for since in arrived))
        for take, start, stop in parts:
            take.done = stop
            seat.taken += stop - start
            seat.again -= stop - start if take.again else 0
            if take.left == 0:
                seat.todo.popleft()

    def _draw(self, runs: list[tuple[Sequence, Generate, float]], hidden: Tensor) -> None:
        """The next token of each run, of hidden states [runs, H] and a number uniform in [0, 1): one download for all."""
        try:
            logits = self.loaded.model.logits(hidden)
            tokens, logps = self.sampler(logits, [run.sampling for _, run, _ in runs], [uniform for *_, uniform in runs]).tolist()
        except FAULTS as error:
            self._survive(error)
            if len(runs) > 1:
                for index, one in enumerate(runs):
                    self._draw([one], hidden[index : index + 1])
            else:
                self._leave(runs[0][0], _row_lost(error))
            return
        for (seat, run, _), token, logp in zip(runs, tokens, logps, strict=True):
            if math.isnan(logp):
                self._leave(seat, RowLost("the model failed on this conversation: what it computed are no numbers"))
            elif not (run.cancelled or seat.gone):
                self._drawn(seat, run, int(token), logp)

    def _drawn(self, seat: Sequence, run: Generate, token: int, logp: float) -> None:
        assert seat.row and seat.todo[0] is run
        run.count += 1
        run.tell((token, logp))
        if token in run.sampling.stop or run.count == run.max_tokens or seat.row.length == self._cache.length:
            seat.todo.popleft()
            run.tell(None)
        else:
            seat.todo.appendleft(Append((token,), drawn=run))
            seat.taken -= 1

    def _leave(self, seat: Sequence, error: Exception | None) -> None:
        """The row is free again, whatever happened."""
        if seat.gone:
            return
        seat.gone, seat.error = True, error
        if seat.parent is None:
            self._scheduler.forget(seat)
        if seat in self._seats:
            self._seats.remove(seat)
        if seat.row:
            self._cache.release(seat.row)
            seat.row = None
        for op in seat.todo:
            _cancel(op, error or RowLost("the conversation has given its row back"))
        seat.todo.clear()
        for child in [other for other in self._seats if other.parent is seat]:
            self._leave(child, error)
        if error and seat.parent is None:
            seat.tell(error)


def total_rows(rows: int, spares: int | None = None) -> int:
    """Of an engine for so many conversations, with the rows for their forks."""
    return rows + (max(1, rows // 4) if spares is None else spares)


def _positions(parts: Parts) -> int:
    return sum(stop - start for _, start, stop in parts)


def _chunk(seat: Sequence, parts: Parts) -> PendingChunk:
    return PendingChunk(seat.conversation, _positions(parts), seat.awaited)


def _part(take: Append, start: int, stop: int) -> Part:
    """These positions, as the model embeds them."""
    if take.cut:
        return take.cut.result()
    if isinstance(take.segment, Sound):
        return take.segment.samples[start:stop]
    assert isinstance(take.segment, tuple)
    return np.array(take.segment[start:stop])


def _row_lost(error: Exception) -> Exception:
    if isinstance(error, RowFull | MediaError):
        return error
    if out_of_memory(error):
        return RowLost("the model ran out of memory on this conversation; its row is free again")
    return RowLost(f"the model failed on this conversation: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _cancel(op: Operation, error: Exception) -> None:
    if isinstance(op, Generate | Barrier):
        op.tell(error)


def _tell(loop: asyncio.AbstractEventLoop, listener: Callable[[Any], None], what: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(listener, what)
