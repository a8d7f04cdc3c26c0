"""The thread that owns the model: it batches the rows of many conversations into one forward pass at a time.

A conversation holds a `SequenceHandle`. Its methods return at once; the thread carries them out in order. Each tick of the
thread is one forward pass: the step of every row that has one due (a microphone frame, or the token just sampled), and at most
one prefill chunk, which is what has piled up for a single row: at most `CHUNK` positions, or one picture. So a step never waits
longer than a pass with one chunk takes, and the busier the engine is, the more rows share a pass. agent/scheduler.py decides
which chunk goes next, and when.
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
from model.cache import NoRow, Row, RowFull
from model.forward import ForwardPass, select
from model.gemma import Part
from model.sampling import Sampler, SamplingParams, sample
from streams.frames import MediaError
from streams.pictures import decode_picture

STEP_LIMIT = 4  # up to so many positions are a step, since a few pile up whenever the engine is busy; more are a chunk
RESTART = "attend ends, so that its supervisor restarts it"
PASS_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)  # a full row, no memory, a picture that cannot be decoded


class EngineStopped(RuntimeError):
    """The engine's thread has ended, so no conversation can go on."""


class RowLost(RuntimeError):
    """A forward pass failed on one conversation, which has lost its row."""


# ---- the conversation's side


class SequenceHandle:
    """A conversation's access to its row, for use on the event loop. A failure ends it and is reported once."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine, self._sequence, self._released = engine, sequence, False

    @property
    def waiting(self) -> int:
        """Submitted positions that are not in the row yet."""
        return self._sequence.submitted - self._sequence.written

    @property
    def behind(self) -> int:
        """Waiting positions that are new, rewrites excluded: where they grow, the model is too slow for the input."""
        return self.waiting - self._sequence.rewriting

    @property
    def row(self) -> Row | None:
        """The row of the cache; None before there is one, and once it was given back."""
        return self._sequence.row

    def append(self, *segments: Segment) -> None:
        """Appends segments at the end of the row."""
        self._engine._submit(self._sequence, *self._appends(segments))

    def rewrite(self, keep: int, view: View) -> None:
        """Makes the row hold `view`, of which its first `keep` positions are there already. Where the sliding layers no longer
        hold what that needs, the whole row is written again."""
        self._engine._submit(self._sequence, Rewrite(keep, view))

    def fork(self, background: bool = False) -> SequenceHandle:
        """A second row that continues from here. It waits until a spare row is free. `background`: nobody waits for its output,
        so it yields to others."""
        child = Sequence(self._sequence.lost, self._sequence, background)
        self._engine._submit(self._sequence, Fork(child))
        return SequenceHandle(self._engine, child)

    async def drained(self) -> None:
        """Waits until everything submitted so far is in the row. Raises the error that the row was lost to."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish(error: Exception | None) -> None:
            if not done.done():
                done.set_exception(error) if error else done.set_result(None)

        self._engine._submit(self._sequence, Barrier(partial(_call_soon, loop, finish)))
        await done

    async def generate(
        self, *closing: Segment, sampling: SamplingParams, max_tokens: int, seed: int | None = None
    ) -> AsyncGenerator[tuple[int, float]]:
        """Appends `closing`, then yields tokens with their log-probabilities, the stop token included. Also ends where the row is
        full. Closing the iterator stops generation before the next step. Every token but the last is in the row. Raises the
        error that the row was lost to."""
        assert closing, "generation has to follow at least one position"
        loop, sampled = asyncio.get_running_loop(), asyncio.Queue[tuple[int, float] | Exception | None]()
        run = Generate(sampling, max_tokens, Random(seed), partial(_call_soon, loop, sampled.put_nowait))
        self._engine._submit(self._sequence, *self._appends(closing), run)
        try:
            while (item := await sampled.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            run.cancelled = True
            self._engine._submit(self._sequence)

    def release(self) -> None:
        """Gives the row back. Further calls do nothing."""
        if not self._released:
            self._released = True
            self._engine._release(self._sequence)

    def _appends(self, segments: tuple[Segment, ...]) -> list[Append]:
        appends = [Append(segment) for segment in segments if size(segment)]
        self._sequence.submitted += sum(size(append.segment) for append in appends)
        return appends


class Engine:
    """Serves `rows` conversations at once, with `spares` more rows for their forks and pictures of up to `budget` soft tokens
    (None: the checkpoint's). Starts its thread; `close` ends it. Raises CheckpointError where the rows do not fit.

    `sampler` samples the tokens; it can be replaced while the engine runs."""

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
        # Of functions that the thread is to call. The conversations bound it: they stop where SequenceHandle.behind is too large.
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._sequences: list[Sequence] = []
        self._scheduler = Scheduler()
        self._free_rows = rows
        self._stopped: EngineStopped | None = None
        self._stop_lock = threading.Lock()
        self._stop_reason: Future[EngineStopped] = Future()
        self.pictures = ThreadPoolExecutor(1, "pictures")  # all pictures are decoded here, on one core
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def free(self) -> int:
        """The number of conversations that can still begin."""
        return 0 if self._stopped else self._free_rows

    def claim(self, failed: Callable[[Exception], None]) -> SequenceHandle:
        """A row for a conversation. `failed` is called on the event loop if the row is lost. Raises NoRow at once if all rows are
        taken, or EngineStopped."""
        if self._stopped:
            raise self._stopped
        if not self._free_rows:
            raise NoRow(f"all {self.rows} places are taken; try again when a conversation has ended")
        self._free_rows -= 1
        loop = asyncio.get_running_loop()
        sequence = Sequence(partial(_call_soon, loop, failed))
        self._submit(sequence)
        return SequenceHandle(self, sequence)

    async def stopped(self) -> EngineStopped:
        """Waits until the thread has ended and returns the reason: it failed, or was closed."""
        return await asyncio.shield(asyncio.wrap_future(self._stop_reason))

    def call(self, function: Callable[[], None]) -> None:
        """Has the engine's thread call a function between two passes."""
        self._calls.put(function)

    def close(self) -> None:
        """Ends the thread. Whoever still waits gets EngineStopped."""
        self._calls.put(None)
        self._thread.join()
        self.pictures.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, sequence: Sequence, *ops: Operation) -> None:
        def add() -> None:
            if sequence.ended or (sequence.parent and sequence.parent.ended):
                for op in ops:
                    _cancel(op, self._stopped or sequence.error or RowLost("the conversation has no row any more"))
            else:
                if sequence not in self._sequences:
                    self._sequences.append(sequence)
                sequence.pending.extend(ops)

        self.call(add)
        if self._stopped:
            self._end_all(self._stopped)

    def _release(self, sequence: Sequence) -> None:
        if sequence.parent is None:
            self._free_rows += 1
        self.call(lambda: self._end(sequence, None))

    def _decode(self, append: Append, picture: Picture) -> None:
        append.patches = self.pictures.submit(
            lambda: patchify(self.loaded, decode_picture(picture.data, "the picture"), picture.budget)
        )
        append.patches.add_done_callback(lambda _: self.call(lambda: None))  # a tick takes it up

    # -- the thread

    def _run(self) -> None:
        try:
            busy = True
            while True:
                while not busy or not self._calls.empty():
                    call = self._calls.get()
                    if call is None:
                        return
                    call()
                    busy = True
                busy = self._tick()
        except EngineStopped as stopped:
            self._stopped = stopped
        except torch.AcceleratorError as error:  # an earlier pass failed, and the device reports it now
            self._stopped = self._device_failed(error)
        except Exception as error:
            self._stopped = EngineStopped(f"the model has stopped: {error}")
            raise
        finally:
            self._stopped = self._stopped or EngineStopped("the model has stopped: it was closed")
            self._end_all(self._stopped)
            self._stop_reason.set_result(self._stopped)

    def _end_all(self, why: EngineStopped) -> None:
        """Ends every sequence with an error. Called by the thread as it ends, and after that by whoever submits an operation."""
        with self._stop_lock:
            with suppress(Empty):
                while True:
                    if call := self._calls.get_nowait():
                        call()
            for sequence in list(self._sequences):
                self._end(sequence, why)

    @torch.inference_mode()
    def _tick(self) -> bool:
        """At most one forward pass. Returns False where there was nothing to do."""
        changed = sum(self._run_operations(sequence) for sequence in list(self._sequences)) > 0
        due = [(sequence, parts) for sequence in self._sequences if (parts := sequence.due(CHUNK))]
        steps, chunks = list[tuple[Sequence, Parts]](), list[tuple[Sequence, Parts]]()
        for sequence, parts in due:
            chunk = isinstance(parts[0][0].segment, Picture) or _positions(parts) > STEP_LIMIT
            (chunks if chunk else steps).append((sequence, parts))
        decoding = any(sequence.awaited for sequence, _ in steps)
        chosen = self._scheduler.choose([_chunk(sequence, parts) for sequence, parts in chunks], decoding)
        group = steps if chosen is None else [*steps, chunks[chosen]]
        if group:
            self._timing.wait()  # at most one pass is queued on the device, so that the next request does not wait for several
            begun = self._timing.begin()
            self._run_pass(sorted(group, key=lambda one: one[0].row.index if one[0].row else 0))
            self._timing.mark(lambda done: self.steps.append(done - begun) if steps else None)
        return changed or bool(due)

    def _run_operations(self, sequence: Sequence) -> bool:
        """Runs the operations that need no forward pass. Returns whether there were any."""
        changed = False
        if sequence.row is None and not self._give_row(sequence):
            return False
        assert sequence.row
        while sequence.pending:
            match op := sequence.pending[0]:
                case Rewrite():
                    sequence.pending.popleft()
                    at = self._truncate(sequence, op.keep)
                    appends = [Append(segment, rewritten=True) for segment in op.view.rest(at)]
                    count = sum(size(append.segment) for append in appends)
                    sequence.rewriting += count
                    sequence.written -= count
                    sequence.pending.extendleft(reversed(appends))
                case Fork():
                    sequence.pending.popleft()
                    op.child.fork_position = sequence.row.length
                    if not op.child.ended:
                        self._sequences += [] if op.child in self._sequences else [op.child]
                        self._give_row(op.child)
                case Generate(cancelled=True):
                    sequence.pending.popleft()
                case Append(sampled_by=Generate(cancelled=True)):
                    sequence.pending.popleft()
                    sequence.written += 1
                case Barrier():
                    sequence.pending.popleft()
                    op.callback(None)
                case Append():
                    break
                case Generate():
                    raise AssertionError("generation has to follow at least one position")
            changed = True
        if (append := sequence.next_picture()) and isinstance(append.segment, Picture):
            self._decode(append, append.segment)
        return changed

    def _truncate(self, sequence: Sequence, keep: int) -> int:
        """Truncates the row to `keep` positions, or to none where the sliding layers no longer hold what that needs. Returns the
        new length."""
        assert sequence.row
        at = min(keep, sequence.row.length)
        at = at if at >= self._cache.earliest(sequence.row) else 0
        self._cache.truncate(sequence.row, at)
        for child in [other for other in self._sequences if other.parent is sequence and other.row is None]:
            if child.fork_position is not None and child.fork_position > at:
                self._end(child, RowFull("the row was truncated before a fork of it could be made"))
        return at

    def _give_row(self, sequence: Sequence) -> bool:
        """Claims a row for a sequence: for a conversation at once, for a fork once its parent has got to the position where it
        begins and a spare row is free. Returns whether it has one."""
        if sequence.ended:
            return False
        if sequence.parent is None:
            sequence.row = self._cache.claim()
            return True
        parent = sequence.parent.row
        if parent is None or sequence.fork_position is None:
            return False
        if sum(other.parent is not None and other.row is not None for other in self._sequences) >= self.spares:
            return False
        if sequence.fork_position < self._cache.earliest(parent):
            self._end(sequence, RowFull("the row grew too far before a fork of it could be made"))
            return False
        sequence.row = self._cache.fork(parent)
        self._cache.truncate(sequence.row, sequence.fork_position)
        return True

    def _run_pass(self, group: list[tuple[Sequence, Parts]]) -> None:
        """One forward pass over all of these, then the next token of those that generate."""
        self._timing.begin()
        try:
            hidden = self._compute(group)
        except PASS_ERRORS as error:
            self._raise_if_fatal(error)
            if len(group) > 1:  # each alone, to find the one that failed
                for one in group:
                    if not one[0].ended:
                        self._run_pass([one])
            else:
                self._end(group[0][0], _row_lost(error))
            return
        runs = [(sequence, run) for sequence, parts in group if (run := sequence.generation_after(parts))]
        for sequence, parts in group:
            self._count_written(sequence, parts)
        live = [index for index, (_, run) in enumerate(runs) if not run.cancelled]
        if hidden is not None and live:
            self._sample([(*runs[index], runs[index][1].generator.random()) for index in live], select(hidden, live))

    def _raise_if_fatal(self, error: Exception) -> None:
        """Raises EngineStopped for a failure of the device, unless it ran out of memory, after which it goes on. Once a GPU has
        failed, every later call fails too; and it reports errors late, so they cannot be traced to one conversation."""
        sticky = isinstance(error, RuntimeError) and self.loaded.model.device.type != "cpu"
        if (sticky or isinstance(error, torch.AcceleratorError)) and not out_of_memory(error):
            raise self._device_failed(error) from error

    def _device_failed(self, error: Exception) -> EngineStopped:
        return EngineStopped(f"the device {self.loaded.model.device} has failed: {_first_line(error)}; {RESTART}")

    def _compute(self, group: list[tuple[Sequence, Parts]]) -> Tensor | None:
        """One forward pass. Returns the hidden states [n, H] of the last positions of the rows that generate from there."""
        chunks = []
        for sequence, parts in group:
            assert sequence.row
            ends = [0]
            for _, start, stop in parts:
                ends.append(ends[-1] + stop - start)
            pictures = tuple(bounds for bounds, (append, _, _) in zip(pairwise(ends), parts, strict=True) if append.patches)
            chunks.append(batch.RowChunk(sequence.row, ends[-1], pictures, wanted=1 if sequence.generation_after(parts) else 0))
        return self._forward(chunks, self.loaded.model.embed([_part(*part) for _, parts in group for part in parts]))

    def _count_written(self, sequence: Sequence, parts: Parts) -> None:
        """Counts positions as written, and removes the operations that are done."""
        arrived = [append.since for append, _, _ in parts if isinstance(append.segment, Sound) and not append.rewritten]
        if arrived:
            self._timing.mark(lambda done: self.lags.extend(done - since for since in arrived))
        for append, start, stop in parts:
            append.done = stop
            sequence.written += stop - start
            sequence.rewriting -= stop - start if append.rewritten else 0
            if append.remaining == 0:
                sequence.pending.popleft()

    def _sample(self, runs: list[tuple[Sequence, Generate, float]], hidden: Tensor) -> None:
        """Samples the next token of each run from hidden states [runs, H], each with a uniform number in [0, 1). All are copied
        from the device at once."""
        try:
            logits = self.loaded.model.logits(hidden)
            tokens, logps = self.sampler(logits, [run.sampling for _, run, _ in runs], [uniform for *_, uniform in runs]).tolist()
        except PASS_ERRORS as error:
            self._raise_if_fatal(error)
            if len(runs) > 1:
                for index, one in enumerate(runs):
                    self._sample([one], hidden[index : index + 1])
            else:
                self._end(runs[0][0], _row_lost(error))
            return
        for (sequence, run, _), token, logp in zip(runs, tokens, logps, strict=True):
            if math.isnan(logp):
                self._end(sequence, RowLost("the model failed on this conversation: its logits are NaN"))
            elif not (run.cancelled or sequence.ended):
                self._deliver(sequence, run, int(token), logp)

    def _deliver(self, sequence: Sequence, run: Generate, token: int, logp: float) -> None:
        assert sequence.row and sequence.pending[0] is run
        run.count += 1
        run.callback((token, logp))
        if token in run.sampling.stop or run.count == run.max_tokens or sequence.row.length == self._cache.length:
            sequence.pending.popleft()
            run.callback(None)
        else:
            sequence.pending.appendleft(Append((token,), sampled_by=run))
            sequence.written -= 1

    def _end(self, sequence: Sequence, error: Exception | None) -> None:
        """Frees the row, and ends pending operations and forks with `error`."""
        if sequence.ended:
            return
        sequence.ended, sequence.error = True, error
        if sequence.parent is None:
            self._scheduler.forget(sequence)
        if sequence in self._sequences:
            self._sequences.remove(sequence)
        if sequence.row:
            self._cache.release(sequence.row)
            sequence.row = None
        for op in sequence.pending:
            _cancel(op, error or RowLost("the conversation has given its row back"))
        sequence.pending.clear()
        for child in [other for other in self._sequences if other.parent is sequence]:
            self._end(child, error)
        if error and sequence.parent is None:
            sequence.lost(error)


def total_rows(rows: int, spares: int | None = None) -> int:
    """Rows of an engine for `rows` conversations, those for forks included; `spares` None: one for every four."""
    return rows + (max(1, rows // 4) if spares is None else spares)


def _positions(parts: Parts) -> int:
    return sum(stop - start for _, start, stop in parts)


def _chunk(sequence: Sequence, parts: Parts) -> PendingChunk:
    return PendingChunk(sequence.conversation, _positions(parts), sequence.awaited)


def _part(append: Append, start: int, stop: int) -> Part:
    """Positions `start` to `stop` of a segment, in the form that `Gemma.embed` takes."""
    if append.patches:
        return append.patches.result()
    if isinstance(append.segment, Sound):
        return append.segment.samples[start:stop]
    assert isinstance(append.segment, tuple)
    return np.array(append.segment[start:stop])


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
        op.callback(error)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[Any], None], value: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(callback, value)
