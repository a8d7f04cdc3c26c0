"""What a conversation has been: the tape, and the row that follows it.

Everything is written on the tape first. Sound goes into the row frame by frame beside it, and so do the parts of an open turn.
After everything else the row is `stale`: it follows, before something depends on it or when it has nothing else to do, by being
cut back to what the two have in common. So a history of thousands of items is not written into the row item by item, but
once, and only as much of it as a row holds.
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
from model.gemma import GemmaConfig
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer

CAPTION = 200  # tokens
TOO_LONG = {"error": "the result is too long"}


@dataclass(frozen=True)
class Caption:
    """What was said in a turn is to be written down, by a fork of the row as it was when the turn ended."""

    turn: int
    fork: SequenceHandle
    closing: Segment
    tokenizer: Tokenizer

    async def words(self, sampling: SamplingParams) -> str:
        answer = AnswerParser(self.tokenizer)
        async with aclosing(
            self.fork.generate(self.closing, sampling=replace(sampling, greedy=True), max_tokens=CAPTION)
        ) as tokens:
            async for _ in answer.read(tokens):
                pass
        return answer.text.strip()


class Context:
    """`limit`: positions that may stand in the row as an answer begins. `emit` is told what goes wrong and can be lived with, and
    what was let go of."""

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
        self.limit = self.budget.row - len(prompt.close_turn()) - 2  # of an open turn: eoa and the closing come after it
        self.turn: int | None = None  # the open one
        self.captions = 0  # on their way: nothing is let go of before they are there
        self._held = View((), 0, 0)  # what the row holds, but for
        self._pieces: list[Segment] = []  # what was appended since
        self._length = 0  # positions of both
        self.stale = False  # the tape says more than the row was told
        self._astray = False  # the row may hold more than that, of an answer that was stopped
        self._gone: tuple[Evicted, ...] = ()  # has been told
        self._spent: tuple[int, ...] = ()  # has left memory
        self._views = ViewComposer(tape.entries, prompt, config.patch)
        self._turn = TurnBuilder(prompt, config.patch)  # what is in the row of the open one

    def append(self, entry: Entry) -> int:
        """On the tape alone. Where its journal cannot follow, the conversation goes on without one."""
        try:
            return self.tape.append(entry)
        except JournalError as error:
            self._emit(events.Notice(f"{error}; the conversation goes on without it"))
            self.tape.close()
            return self.tape.append(entry)

    # -- a turn

    def open(self, at: int) -> int:
        if self.turn is None:
            self.turn, self._turn = self.append(tape.Opened(at=at)), TurnBuilder(self.prompt, self.config.patch)
            self.stale = True
        return self.turn

    def sound(self, frame: np.ndarray) -> bool:
        """A frame of the open turn; False if there is no room for it."""
        sound = tape.Sound.of(frame.reshape(-1, self.config.frame))
        self.catch_up()
        if self._length + sound.positions > self.limit:
            self._decide()
            self.follow()
        if self._length + sound.positions > self.limit:
            return False
        self.append(sound)
        self._grow(self._turn.feed(sound))
        return True

    def part(self, part: tape.Typed | tape.Seen) -> int:
        index, pieces = self.append(part), self._turn.feed(part)
        if not self.stale and self._length + sum(map(size, pieces)) <= self.budget.row:
            self._grow(pieces)
        else:
            self.stale = True
        return index

    def _grow(self, pieces: list[Segment]) -> None:
        """A turn lengthens the row: to compose the whole view for each of 1,500 words took 9 ms a word, in the end."""
        self.row.append(*pieces)
        self._pieces += pieces
        self._length += sum(map(size, pieces))

    def take_out(self) -> list[tape.Sound]:
        """The sound of the open turn, which leaves it as if it had not come; a turn of sound alone is open no longer."""
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
        """The turn is over, and nobody is asked; or it never was."""
        self.append(entry)
        self.turn, self.stale = None, True

    def ask(self) -> int:
        """The model's turn begins; `closing` is what is left to append."""
        self.turn = None
        return self.append(tape.Asked())

    def recall(self, text: str, calls: Iterable[tuple[ToolCall, Any]] = ()) -> None:
        """An answer that was given elsewhere, its calls and what came of them."""
        if self.turn is not None:
            self.append(tape.Closed())
            self.turn = None
        of, self.stale = self.append(tape.Answered((), text)), True
        for call, value in calls:
            index = self.append(tape.Called(of, call.name, call.arguments))
            if not self.returned(index, value):
                self.append(tape.Deleted(index))

    def returned(self, call: int, value: Any) -> bool:
        """On the tape, as far as the row has room for it; False if it does not belong to a call, or the call has its result."""
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

    # -- beside it

    def beside(self, fresh: bool = False) -> Context:
        """A record of its own in a fork of the row: it begins with all of this one but the open turn, or with an empty tape.
        Whoever asked for it releases its row."""
        # A stale row is not made to follow here: the fork would wait for it, and it may be in the middle of an answer.
        held = self._settled()
        how = self.prompt, self.config, self.budget, self.policy, self.budget.row, self._emit
        other = Context(Tape() if fresh else self.tape.copy(), self.row.fork(), *how)
        other._held, other._length, other._astray = held, held.positions, True
        return other

    def again(self, of: int) -> list[Entry]:
        """What was said in a turn, or the picture that was looked at, as far as the tape still has it."""
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
        """The turn, or the answer to what was Asked there, never was. The open turn stays."""
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
        return any(isinstance(entry, tape.Sound) for entry in self.tape.entries[turn + 1 :])

    def caption(self) -> Caption | None:
        """To be called as the turn ends; None if nothing was said in it. The caller releases its fork, and says `captioned`."""
        if self.turn is None or not self.spoken(self.turn):
            return None
        self.catch_up()
        closing = [*self._turn.end(), *self.prompt.text(TRANSCRIBE), *self.prompt.close_turn()]
        self.captions += 1
        return Caption(self.turn, self.row.fork(background=True), tuple(closing), self.prompt.tokenizer)

    def captioned(self, caption: Caption, text: str | None) -> None:
        """None: nobody could tell, and the sound stays what it was."""
        self.captions -= 1
        if text is not None:
            self.append(tape.Transcript(caption.turn, text))

    # -- the row

    def closing(self) -> tuple[Segment, ...]:
        """What is to be appended before the model writes; at least one position. The row holds all before it."""
        target = self._target()
        keep, rest = target.since(self._settled())
        if keep < self._held.positions or self._astray or not rest:
            last = target.positions - 1
            rest = target.rest(last)
            self._rewrite(min(keep, last), target.first(last))
        self._hold(target)
        return rest

    def wrote(self, id: int) -> None:
        """The model has put this id into the row."""
        self._pieces.append((id,))
        self._length += 1

    def stopped(self) -> None:
        """The model was stopped: it may have put more into the row than it has said."""
        self._astray = True

    def catch_up(self) -> None:
        """The row follows, if it is stale."""
        if self.stale:
            self.follow()
            if self.turn is None and not self.captions:
                self._drop()

    def follow(self) -> None:
        """Makes the row hold what the tape says. Raises RowFull where system prompt and open turn alone are too long."""
        target = self._target()
        keep, rest = target.since(self._settled())
        if rest or keep < self._held.positions or self._astray:
            self._rewrite(keep, target)
        self._hold(target)

    def tidy(self) -> None:
        """Between turns: what the policy lets go of leaves the row, and what no view wants any more leaves memory.

        `verbatim` lets nothing go while the row is not nearly full: once it is, a little after every turn would mean to write
        some 4,000 positions anew each time, 1.5 s of nano's."""
        if self.turn is not None or self.captions:
            return
        if self.policy == "transcripts" or self._length > self.budget.row * 7 // 8:
            self._decide()
        self.follow()
        self._drop()

    def _drop(self) -> None:
        """What the row's view has let go of leaves memory, and is told."""
        held = self._held
        if held.spent and held.spent is not self._spent:
            self.append(tape.Dropped(held.spent))
        if held.gone is not self._gone:
            known = frozenset(self._gone)
            if new := tuple(gone for gone in held.gone if gone not in known):
                self._emit(events.EntriesEvicted(new))
        self._spent, self._gone = held.spent, held.gone

    def fits(self, entry: tape.Typed | tape.Seen | tape.CallResult | tape.SystemPrompt) -> bool:
        """Whether the row has room for this too, once what can be let go of is."""
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
        """Words and pictures in the open turn."""
        entries = [] if self.turn is None else self.tape.entries[self.turn :]
        return sum(isinstance(entry, tape.Typed | tape.Seen) for entry in entries)

    @property
    def positions(self) -> int:
        return self._length

    def kinds(self) -> tuple[int, int, int]:
        """Positions of text, of sound and of pictures."""
        segments = self._settled().segments
        sound = sum(size(segment) for segment in segments if isinstance(segment, tape.Sound))
        pictures = sum(size(segment) for segment in segments if isinstance(segment, Picture))
        return self._length - sound - pictures, sound, pictures

    @property
    def thinking(self) -> bool:
        return self._views.setting.thinking

    def _target(self) -> View:
        target = self._views.view() if self._views.decided else None
        if target is None or target.positions > self.budget.row:
            self._decide()
            target = self._views.view()
        return target

    def _decide(self) -> None:
        """With a quarter of the row free, or it would be written anew with every frame that comes. Where the open turn alone
        takes more than the rest, it is all that stays."""
        try:
            self._views.evict(replace(self.budget, row=self.budget.row * 3 // 4), self.policy)
        except RowFull:
            self._views.evict(Budget(ahead=0, row=self.budget.row), "transcripts")

    def _settled(self) -> View:
        self._held, self._pieces = self._held.then(*self._pieces), []
        return self._held

    def _rewrite(self, keep: int, target: View) -> None:
        self.row.rewrite(keep, target)
        self._astray = False

    def _hold(self, target: View) -> None:
        self._held, self._length, self.stale = target, target.positions, False
