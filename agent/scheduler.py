"""Which prefill chunk goes next, if any: the engine's decisions, pure, without a clock, a thread or a tensor.

A tick of the engine is one decode step and then at most one chunk. Somebody waits for a chunk (an answer, or sound that is
being said, comes after it) or nobody does: history, rewritten rows, captions. Three rules make it fair:

* Conversations take turns. The next chunk is that of the conversation with the least virtual time, which is the positions it
  was given (start-time fair queueing); who comes after a pause begins where the others are, so nobody saves up turns.
* While answers are decoded each step adds to a token budget that chunks take from. So a long prompt slows the answers of
  others down by a bounded amount.
* What nobody waits for uses what is left. Where nothing is left it is given a small share, so that a busy engine still
  tidies up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

CHUNK = 128  # positions; a picture may be longer, since it goes in at once
STEP = 32  # positions that a decode step adds to the budget of chunks that somebody waits for: of four steps one has a chunk
SHARE = 4  # and what nobody waits for is given one position for so many of those


@dataclass(frozen=True, slots=True)
class PendingChunk:
    conversation: Hashable
    positions: int
    awaited: bool  # somebody waits for it


class Scheduler:
    def __init__(self) -> None:
        self._times: dict[Hashable, float] = {}  # virtual, by conversation
        self._now = 0.0  # where the last one that was chosen began
        self._budget, self._background = CHUNK, 0  # of what is waited for, and of what is not

    def choose(self, chunks: Sequence[PendingChunk], decoding: bool) -> int | None:
        """The index of the chunk that goes now; None: the next step goes first. To be asked once after each step. `decoding`: in
        that step was a token or a frame of sound that somebody waits for, so the next one will soon be due."""
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
        """It is over."""
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
