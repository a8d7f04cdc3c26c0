"""A conversation's context: the tape, which holds everything, and the row of the cache, which is kept in line with it.

Everything is written on the tape first. Sound and the other parts of an open turn are appended to the row at the same time.
Any other change leaves the row `stale`. A stale row is updated before something depends on it, or when there is nothing else to
do: it is truncated to what it has in common with the tape, and the rest is appended. So a history of thousands of items is
written into the row once, not item by item, and only as much of it as a row holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agent import events, tape
from agent.answer_parser import AnswerParser
from agent.calls import ToolCall
from agent.checkpoint import TRANSCRIBE
from agent.engine import SequenceHandle
from agent.events import Event
from agent.journal import JournalError
from agent.prompt import Prompt
from agent.segments import Evicted, Picture, Segment, TurnBuilder, View, size
from agent.tape import Entry, Tape
from agent.view import Budget, Policy, ViewComposer
from model.cache import RowFull
from model.config import GemmaConfig
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer

CAPTION = 200  # tokens of a transcript
TOO_LONG = {"error": "the result is too long"}


@dataclass(frozen=True)
class Caption:
    """A transcript to make of a turn, in a fork of the row as it was when the turn ended."""

    turn: int
    fork: SequenceHandle
    closing: Segment
    tokenizer: Tokenizer

    async def words(self, sampling: SamplingParams) -> str:
        """Generates the transcript, greedily. Raises the error that the row was lost to."""
        answer = AnswerParser(self.tokenizer)
        async with aclosing(
            self.fork.generate(self.closing, sampling=replace(sampling, greedy=True), max_tokens=CAPTION)
        ) as tokens:
            async for _ in answer.read(tokens):
                pass
        return answer.text.strip()


class Context:
    """Keeps a tape and the row that follows it. `limit`: positions that the row may hold when an answer begins. `emit` receives
    non-fatal errors, and what was evicted."""

    def __init__(
        self,
        tape: Tape,
        row: SequenceHandle,
        prompt: Prompt,
        config: GemmaConfig,
        budget: Budget,
        policy: Policy,
        limit: int,
        emit: Callable[[Event], None],
    ) -> None:
        self.tape, self.row, self.prompt, self.config = tape, row, prompt, config
        self.budget, self.policy, self._emit = replace(budget, row=min(budget.row, limit)), policy, emit
        self.limit = self.budget.row - len(prompt.close_turn()) - 2  # for an open turn: eoa and the end of the turn come after it
        self.turn: int | None = None  # the open one
        self.captions = 0  # transcripts being made; nothing is evicted until they are there
        self._held = View((), 0, 0)  # what the row holds, without
        self._appended: list[Segment] = []  # what was appended since
        self._length = 0  # positions of both
        self.stale = False  # the tape has changes that the row does not have yet
        self._overrun = False  # the row may hold more than is recorded here, from an answer that was stopped
        self._reported: tuple[Evicted, ...] = ()  # evictions that were emitted
        self._dropped: tuple[int, ...] = ()  # entries whose data was dropped from memory
        self._views = ViewComposer(tape.entries, prompt, config.patch)
        self._turn = TurnBuilder(prompt, config.patch)  # builds the open turn's segments

    def append(self, entry: Entry) -> int:
        """Appends to the tape alone. Returns the entry's index. If the journal fails, the conversation goes on without one."""
        try:
            return self.tape.append(entry)
        except JournalError as error:
            self._emit(events.Notice(f"{error}; the conversation goes on without it"))
            self.tape.close()
            return self.tape.append(entry)

    # -- a turn

    def open(self, at: int) -> int:
        """Opens a turn at a sample, unless one is open. Returns the entry's index."""
        if self.turn is None:
            self.turn, self._turn = self.append(tape.Opened(at=at)), TurnBuilder(self.prompt, self.config.patch)
            self.stale = True
        return self.turn

    def sound(self, frame: np.ndarray) -> bool:
        """Appends a frame of samples to the open turn. Returns False if there is no room for it."""
        sound = tape.Sound.of(frame.reshape(-1, self.config.frame))
        self.catch_up()
        if self._length + sound.positions > self.limit:
            self._evict()
            self.follow()
        if self._length + sound.positions > self.limit:
            return False
        self.append(sound)
        self._grow(self._turn.feed(sound))
        return True

    def part(self, part: tape.Typed | tape.Seen) -> int:
        """Appends text or a picture to the open turn. Returns the entry's index."""
        index, segments = self.append(part), self._turn.feed(part)
        if not self.stale and self._length + sum(map(size, segments)) <= self.budget.row:
            self._grow(segments)
        else:
            self.stale = True
        return index

    def _grow(self, segments: list[Segment]) -> None:
        """Appends to the row without composing the whole view: to do so for each of 1,500 words took 9 ms a word in the end."""
        self.row.append(*segments)
        self._appended += segments
        self._length += sum(map(size, segments))

    def take_out(self) -> list[tape.Sound]:
        """Removes the sound from the open turn and returns it. A turn of nothing but sound is closed."""
        turn, entries = self.turn, self.tape.entries
        if turn is None:
            return []
        kinds = tape.Sound | tape.Typed | tape.Seen
        parts = [(n, entry) for n, entry in enumerate(entries[turn:], turn) if isinstance(entry, kinds)]
        sounds = [(n, entry) for n, entry in parts if isinstance(entry, tape.Sound) and entry.data]
        if all(isinstance(entry, tape.Sound) for _, entry in parts):
            self.close(tape.Deleted(turn))
        elif sounds:
            for n, _ in sounds:
                self.append(tape.Deleted(n))
            self._turn = TurnBuilder(self.prompt, self.config.patch)
            for _, entry in parts:
                if not isinstance(entry, tape.Sound):
                    self._turn.feed(entry)
            self.stale = True
        return [entry for _, entry in sounds]

    def close(self, entry: tape.Closed | tape.Deleted) -> None:
        """Ends the open turn without an answer, or deletes it."""
        self.append(entry)
        self.turn, self.stale = None, True

    def ask(self) -> int:
        """Begins the model's turn and returns the entry's index. `closing` then gives what is left to append."""
        self.turn = None
        return self.append(tape.Asked())

    def recall(self, text: str, calls: Iterable[tuple[ToolCall, Any]] = ()) -> None:
        """Records an answer that was given elsewhere, with its tool calls and their results."""
        if self.turn is not None:
            self.append(tape.Closed())
            self.turn = None
        of, self.stale = self.append(tape.Answered((), text)), True
        for call, value in calls:
            index = self.append(tape.Called(of, call.name, call.arguments))
            if not self.returned(index, value):
                self.append(tape.Deleted(index))

    def returned(self, call: int, value: Any) -> bool:
        """Records the result of the tool call at entry `call`, or an error in its place where the row has no room for it. Returns
        False if the entry is not a call, if the call has a result already, or if there is no room for the error either."""
        entries = self.tape.entries
        result = tape.CallResult(call, value)
        if not self.tape.fits(result) or any(isinstance(entry, tape.CallResult) and entry.of == call for entry in entries[call:]):
            return False
        if not self.fits(result):
            self._emit(events.Notice("a tool's result is too long for the row; the model is told so"))
            result = tape.CallResult(call, TOO_LONG)
        if not self.fits(result):
            return False
        self.append(result)
        self.stale = True
        return True

    # -- out of band, and past turns

    def fork(self, fresh: bool = False) -> Context:
        """Another context in a fork of the row: it begins with everything here except the open turn, or with an empty tape. The
        caller releases its row."""
        # A stale row is not updated here: the fork would wait for it, and it may be in the middle of an answer.
        held = self._held_now()
        same = self.prompt, self.config, self.budget, self.policy, self.budget.row, self._emit
        other = Context(Tape() if fresh else self.tape.copy(), self.row.fork(), *same)
        other._held, other._length, other._overrun = held, held.positions, True
        return other

    def content(self, of: int) -> list[Entry]:
        """The transcript or the sound of the turn at entry `of`, or the picture there, as far as the tape still has it."""
        entries = self.tape.entries
        if not 0 <= of < len(entries) or not isinstance(entries[of], tape.Seen | tape.Opened):
            return []
        if isinstance(picture := entries[of], tape.Seen):
            return [picture] if picture.data else []
        words = [entry.text for entry in entries[of:] if isinstance(entry, tape.Transcript) and entry.of == of]
        if words:
            return [tape.Typed(words[-1])]
        end = next((n for n in range(of + 1, len(entries)) if isinstance(entries[n], tape.Closed | tape.Asked)), len(entries))
        return [entry for entry in entries[of:end] if isinstance(entry, tape.Sound) and entry.data]

    def delete(self, of: int) -> None:
        """Deletes the turn or the answer at entry `of`. The open turn stays."""
        entries = self.tape.entries
        if of == self.turn or not 0 <= of < len(entries):
            return
        if isinstance(entries[of], tape.Asked):
            end = next((n for n in range(of + 1, len(entries)) if isinstance(entries[n], tape.Asked | tape.Opened)), len(entries))
            for index in [n for n in range(of, end) if isinstance(entries[n], tape.Answered)]:
                self.append(tape.Deleted(index))
        elif isinstance(entries[of], tape.Opened | tape.Answered):
            self.append(tape.Deleted(of))
        self.stale = True

    def spoken(self, turn: int) -> bool:
        """Whether the latest turn, which begins at entry `turn`, has sound."""
        return any(isinstance(entry, tape.Sound) for entry in self.tape.entries[turn + 1 :])

    def caption(self) -> Caption | None:
        """Begins a transcript of the open turn; None if it has no sound. Call it when the turn ends. The caller releases the fork
        and then calls `captioned`."""
        if self.turn is None or not self.spoken(self.turn):
            return None
        self.catch_up()
        closing = [*self._turn.end(), *self.prompt.text(TRANSCRIBE), *self.prompt.close_turn()]
        self.captions += 1
        return Caption(self.turn, self.row.fork(background=True), tuple(closing), self.prompt.tokenizer)

    def captioned(self, caption: Caption, text: str | None) -> None:
        """Records a transcript that is ready; `text` None: it failed, and the turn keeps its sound alone."""
        self.captions -= 1
        if text is not None:
            self.append(tape.Transcript(caption.turn, text))

    # -- the row

    def closing(self) -> tuple[Segment, ...]:
        """Brings the row up to date, and returns what is left to append before the model generates: at least one position."""
        target = self._target()
        keep, rest = target.since(self._held_now())
        if keep < self._held.positions or self._overrun or not rest:
            last = target.positions - 1
            rest = target.rest(last)
            self._rewrite(min(keep, last), target.first(last))
        self._set_held(target)
        return rest

    def wrote(self, id: int) -> None:
        """Records a token that generation has put into the row."""
        self._appended.append((id,))
        self._length += 1

    def stopped(self) -> None:
        """Records that generation was stopped: the row may hold tokens that were not reported."""
        self._overrun = True

    def catch_up(self) -> None:
        """Updates the row, if it is stale. Raises RowFull as `follow` does."""
        if self.stale:
            self.follow()
            if self.turn is None and not self.captions:
                self._drop()

    def follow(self) -> None:
        """Updates the row from the tape. Raises RowFull where system prompt and open turn alone are too long."""
        target = self._target()
        keep, rest = target.since(self._held_now())
        if rest or keep < self._held.positions or self._overrun:
            self._rewrite(keep, target)
        self._set_held(target)

    def tidy(self) -> None:
        """Between turns, evicts from the row by the policy, and drops from memory what no view needs any more.

        `verbatim` evicts nothing until the row is nearly full, then leaves a quarter free: to evict a little after every turn
        would write some 4,000 positions again each time, which takes nano 1.5 s."""
        if self.turn is not None or self.captions:
            return
        if self.policy == "transcripts" or self._length > self.budget.row * 7 // 8:
            self._evict()
        self.follow()
        self._drop()

    def _drop(self) -> None:
        """Drops from memory the data that the row's view no longer needs, and emits what was evicted."""
        held = self._held
        if held.spent and held.spent is not self._dropped:
            self.append(tape.Dropped(held.spent))
        if held.gone is not self._reported:
            known = frozenset(self._reported)
            if new := tuple(evicted for evicted in held.gone if evicted not in known):
                self._emit(events.EntriesEvicted(new))
        self._dropped, self._reported = held.spent, held.gone

    def fits(self, entry: tape.Typed | tape.Seen | tape.CallResult | tape.SystemPrompt) -> bool:
        """Whether the row has room for this entry too, once everything that may be evicted is."""
        prompt, (system, live) = self.prompt, self._views.least()
        match entry:
            case tape.SystemPrompt():
                return len(prompt.begin(entry.system, entry.tools, entry.thinking)) + live <= self.limit
            case tape.CallResult():
                call = self.tape.entries[entry.of]
                assert isinstance(call, tape.Called)
                more = len(prompt.tool_response(call.name, entry.value, opened=False, thinking=self.thinking))
            case _ if self.turn is None:
                live, more = len(prompt.open_turn()), sum(map(size, TurnBuilder(prompt, self.config.patch).feed(entry)))
            case _:
                more = sum(map(size, copy(self._turn).feed(entry)))
        return system + live + more <= self.limit

    @property
    def parts(self) -> int:
        """The number of texts and pictures in the open turn."""
        entries = [] if self.turn is None else self.tape.entries[self.turn :]
        return sum(isinstance(entry, tape.Typed | tape.Seen) for entry in entries)

    @property
    def positions(self) -> int:
        """Positions in the row, as far as they are recorded."""
        return self._length

    def kinds(self) -> tuple[int, int, int]:
        """Positions of text, of sound and of pictures in the row."""
        segments = self._held_now().segments
        sound = sum(size(segment) for segment in segments if isinstance(segment, tape.Sound))
        pictures = sum(size(segment) for segment in segments if isinstance(segment, Picture))
        return self._length - sound - pictures, sound, pictures

    @property
    def thinking(self) -> bool:
        return self._views.setting.thinking

    def _target(self) -> View:
        """The view that the row should hold."""
        target = self._views.view() if self._views.decided else None
        if target is None or target.positions > self.budget.row:
            self._evict()
            target = self._views.view()
        return target

    def _evict(self) -> None:
        """Decides what to evict. It leaves a quarter of the row free, or the row would be written again with every frame. Where
        the open turn alone needs more than that, all else is evicted."""
        try:
            self._views.evict(replace(self.budget, row=self.budget.row * 3 // 4), self.policy)
        except RowFull:
            self._views.evict(Budget(ahead=0, row=self.budget.row), "transcripts")

    def _held_now(self) -> View:
        """What the row holds."""
        self._held, self._appended = self._held.then(*self._appended), []
        return self._held

    def _rewrite(self, keep: int, target: View) -> None:
        self.row.rewrite(keep, target)
        self._overrun = False

    def _set_held(self, target: View) -> None:
        self._held, self._length, self.stale = target, target.positions, False
