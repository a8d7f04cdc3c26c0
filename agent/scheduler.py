"""Decides which prefill chunk goes next, if any: pure code, without a clock, a thread or a tensor.

A tick of the engine is one decode step and at most one prefill chunk. A chunk is awaited where an answer, or the speech of the
user who is speaking, comes after it. Others are background work: history, rewritten rows, transcripts. Three rules make it fair:

* Conversations take turns. The next chunk is that of the conversation with the least virtual time, which is the number of
  positions it was given (start-time fair queueing). After a pause it begins where the others are, so nobody saves up turns.
* While answers are decoded, each step adds to a token budget that chunks use up. So a long prompt slows down the answers of
  others by a bounded amount.
* Background work uses idle ticks. Where there are none it gets a small share, so that a busy engine still does it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

CHUNK = 128  # positions; a picture may be longer, since it is never split
STEP = 32  # positions that a decode step adds to the budget of awaited chunks: one step in four has a chunk
SHARE = 4  # background work gets one position for so many of those


@dataclass(frozen=True, slots=True)
class PendingChunk:
    conversation: Hashable
    positions: int
    awaited: bool  # an answer or live speech comes after it; False: background work


class Scheduler:
    """Chooses among the chunks that are pending in each tick."""

    def __init__(self) -> None:
        self._times: dict[Hashable, float] = {}  # virtual times, by conversation
        self._now = 0.0  # the virtual time of the last conversation that was chosen, before its chunk
        self._budget, self._background = CHUNK, 0  # positions that awaited chunks and background work may take

    def choose(self, chunks: Sequence[PendingChunk], decoding: bool) -> int | None:
        """The index of the chunk that goes now, or None where the next step goes first. Call it once a step. `decoding`: the step
        has a token or a frame of sound that is awaited, so the next one will soon be due."""
        awaited = [index for index, chunk in enumerate(chunks) if chunk.awaited]
        others = [index for index, chunk in enumerate(chunks) if not chunk.awaited]
        if decoding:
            self._budget = min(CHUNK, self._budget + STEP)
            self._earn(STEP)
        else:
            self._budget = CHUNK
        if others and (self._background == CHUNK or not (awaited or decoding)):
            self._background = 0
            return self._next(chunks, others)
        if awaited and self._budget >= min(CHUNK, chunks[index := self._first(chunks, awaited)].positions):
            self._budget -= chunks[index].positions
            self._earn(chunks[index].positions)
            return self._next(chunks, [index])
        return None

    def forget(self, conversation: Hashable) -> None:
        """Removes a conversation that has ended."""
        self._times.pop(conversation, None)

    def _earn(self, positions: int) -> None:
        self._background = min(CHUNK, self._background + positions // SHARE)

    def _first(self, chunks: Sequence[PendingChunk], among: Sequence[int]) -> int:
        return min(among, key=lambda index: self._time(chunks[index].conversation))

    def _time(self, conversation: Hashable) -> float:
        return max(self._now, self._times.get(conversation, 0.0))

    def _next(self, chunks: Sequence[PendingChunk], among: Sequence[int]) -> int:
        chunk = chunks[index := self._first(chunks, among)]
        self._now = self._time(chunk.conversation)
        self._times[chunk.conversation] = self._now + chunk.positions
        return index
