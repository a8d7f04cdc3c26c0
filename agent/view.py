"""Views of a tape: what of a conversation a row should hold, under a budget.

`view` is a pure function of the entries. While a row lives its session holds `upto` still: what is let go is then decided
by the first `upto` entries alone and everything newer only lengthens the view, so that the row follows by appending. It
moves `upto` when it builds the next row in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agent.prompt import Prompt
from agent.segments import Gone, Segment, Turn, View, merged, size
from agent.tape import (
    Answered,
    Asked,
    Called,
    Closed,
    Deleted,
    Entry,
    Heard,
    Opened,
    Part,
    Result,
    Seen,
    Setting,
    Sound,
    Transcript,
    Typed,
)
from model.cache import RowFull

# ---- what the entries say together


@dataclass
class _Reply:
    """One stretch of the model's writing, up to its end or to a tool."""

    entry: Answered
    goes_on: bool  # after the results of the reply before it
    thinks: bool  # begins inside an open thought
    heard: int | None = None
    calls: dict[int, Called] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)  # by call, in the order they came

    @property
    def waits(self) -> bool:
        return bool(self.calls) and (self.heard is None or self.heard >= len(self.entry.ids))


@dataclass
class _Exchange:
    """A turn and what was answered to it; without a role where the model speaks first, or where the turn was deleted."""

    of: int
    role: str | None = None
    parts: list[tuple[int, Part]] = field(default_factory=list)
    closed: bool = True
    asked: bool = False
    thinking: bool = False
    transcript: str | None = None
    replies: list[_Reply] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        return bool(self.replies) and self.replies[-1].waits

    @property
    def live(self) -> bool:
        return not self.closed or self.asked or self.waits

    def pictures(self) -> list[int]:
        return [index for index, part in self.parts if isinstance(part, Seen) and part.data]


def _fold(entries: Sequence[Entry], upto: int) -> tuple[Setting, list[_Exchange]]:
    """The exchanges in order, with the transcripts that were known at `upto`."""
    setting = Setting()
    exchanges: list[_Exchange] = []
    turns: dict[int, _Exchange] = {}
    replies: dict[int, tuple[_Exchange, _Reply]] = {}  # by answer, and by call
    for index, entry in enumerate(entries):
        if isinstance(entry, Opened) or (isinstance(entry, Asked | Answered) and not exchanges):
            exchanges.append(_Exchange(index))
        match entry:
            case Setting():
                setting = entry
            case Opened():
                turns[index] = exchanges[-1]
                exchanges[-1].role, exchanges[-1].closed = entry.role, False
            case Sound() | Typed() | Seen():
                exchanges[-1].parts.append((index, entry))
            case Closed():
                exchanges[-1].closed = True
            case Asked():
                last = exchanges[-1]
                last.closed = True
                if not last.waits:
                    last.asked, last.thinking = True, setting.thinking
            case Answered():
                last = exchanges[-1]
                last.replies.append(_Reply(entry, last.waits, last.waits and last.thinking))
                replies[index] = last, last.replies[-1]
                last.closed, last.asked = True, False
            case Heard():
                replies[entry.of][1].heard = entry.ids
            case Called():
                replies[index] = replies[entry.of]
                replies[entry.of][1].calls[index] = entry
            case Result():
                replies[entry.of][1].results[entry.of] = entry.value
            case Transcript() if index < upto:
                turns[entry.of].transcript = entry.text
            case Deleted():
                _delete(entry.of, turns.get(entry.of), *replies.get(entry.of, (None, None)))
    return setting, exchanges


def _delete(of: int, turn: _Exchange | None, exchange: _Exchange | None, reply: _Reply | None) -> None:
    if turn:
        turn.role, turn.parts, turn.closed = None, [], True
    elif exchange and reply and of in reply.calls:
        del reply.calls[of]
    elif exchange and reply:
        exchange.replies = [other for other in exchange.replies if other is not reply]


# ---- an exchange as segments


@dataclass(frozen=True)
class _Show:
    words: bool = True
    sound: bool = True  # as it was heard; otherwise its transcript, once there is one
    pictures: frozenset[int] | None = None  # None: all

    def has(self, picture: int) -> bool:
        return self.pictures is None or picture in self.pictures


_WORDS = _Show(sound=False, pictures=frozenset())
_NOTHING = replace(_WORDS, words=False)


@dataclass(frozen=True)
class _Writer:
    prompt: Prompt
    patch: int

    def exchange(self, x: _Exchange, show: _Show, last: bool = False) -> list[Segment]:
        """`last`: nothing comes after it, so it may still be open, be asked, or wait for a tool."""
        if show == _NOTHING:
            return []
        turn = [] if x.role is None else self._turn(x.role, self._left(x, show), open=last and not x.closed)
        return [*turn, tuple(self._answers(x, last))] if show.words else [*turn]

    def cost(self, x: _Exchange, show: _Show) -> int:
        return _total(self.exchange(x, show))

    def _left(self, x: _Exchange, show: _Show) -> Iterator[Part]:
        """What is left of a turn's parts."""
        told = False
        for index, part in x.parts:
            match part:
                case Seen():
                    if part.data and show.has(index):
                        yield part
                case _ if not show.words:
                    pass
                case Typed():
                    yield part
                case Sound() if part.data and (show.sound or x.transcript is None):
                    yield part
                case Sound() if not told:
                    yield Typed(x.transcript or "")
                    told = True

    def _turn(self, role: str, parts: Iterable[Part], open: bool) -> Iterator[Segment]:
        turn = Turn(self.prompt, self.patch)
        yield tuple(self.prompt.open_turn(role))
        for part in parts:
            yield from turn.feed(part)
        if not open:
            yield (*turn.end(), *self.prompt.end_turn())

    def _answers(self, x: _Exchange, last: bool) -> list[int]:
        prompt = self.prompt
        turns: list[list[_Reply]] = []
        for reply in x.replies:
            if reply.goes_on and turns:
                turns[-1].append(reply)
            else:
                turns.append([reply])
        ids: list[int] = []
        for turn in turns:
            if last and x.waits and turn is turns[-1]:
                ids += prompt.ask(x.thinking) + [id for reply in turn for id in self._unfinished(reply, x.thinking)]
            elif inside := [id for reply in turn for id in self._finished(reply)]:
                ids += prompt.open_turn("model") + inside + prompt.end_turn()
        return ids + (prompt.ask(x.thinking) if last and x.asked else [])

    def _finished(self, reply: _Reply) -> list[int]:
        """As history has it: no thoughts, what was heard of the words, and every call that came to something."""
        ids = self._words(reply)
        done = {index: value for index, value in reply.results.items() if index in reply.calls}
        for index, call in reply.calls.items():
            ids += self.prompt.tool_call(call.name, call.arguments) if index in done else []
        for index, value in done.items():
            ids += self.prompt.tool_response(reply.calls[index].name, value, opened=False)
        return ids

    def _unfinished(self, reply: _Reply, thinking: bool) -> list[int]:
        """As the model wrote it, thoughts included, and the results so far: the row it goes on from."""
        prompt, name = self.prompt, self.prompt.tokenizer.name
        ids = list(reply.entry.ids)
        if not ids:
            ids = prompt.text(reply.entry.text)
            ids += [id for call in reply.calls.values() for id in prompt.tool_call(call.name, call.arguments)]
        while ids and name(ids[-1]) in ("<turn|>", "<eos>"):
            ids.pop()
        done = [(reply.calls[index].name, value) for index, value in reply.results.items() if index in reply.calls]
        for number, (tool, value) in enumerate(done, 1):
            opened = bool(ids) and name(ids[-1]) == "<|tool_response>"
            ids += prompt.tool_response(tool, value, opened=opened, thinking=thinking and number == len(reply.calls))
        return ids

    def _words(self, reply: _Reply) -> list[int]:
        """What was heard, without thoughts, calls and control tokens, and without the white space around."""
        if not reply.entry.ids:
            return self.prompt.text(reply.entry.text) if reply.heard != 0 else []
        tokenizer, hidden, words = self.prompt.tokenizer, reply.thinks, []
        for id in reply.entry.ids[: reply.heard]:
            match tokenizer.name(id):
                case None if not hidden:
                    words.append(id)
                case "<|channel>" | "<|tool_call>":
                    hidden = True
                case "<channel|>" | "<tool_call|>" | "<|tool_response>" | "<turn|>" | "<eos>":
                    hidden = False
        for end in (0, -1):
            while words and tokenizer.decode([words[end]]).isspace():
                words.pop(end)
        return words


# ---- what is let go

Cost = Callable[[_Exchange, _Show], int]
Policy = Literal["transcripts", "verbatim"]


@dataclass(frozen=True)
class Budget:
    """In positions. `ahead`: all that stands before the sound of the live turn, under `transcripts`. Field reports say that
    the 12B no longer understands sound after 450 to 500 positions of other content (google/gemma-4-12B-it, discussion 45).
    `row`: all that a view holds, under either policy; a row of 8192 less 1024 for the answer."""

    ahead: int = 400
    row: int = 7168


def view(
    entries: Sequence[Entry],
    prompt: Prompt,
    budget: Budget | None = None,
    policy: Policy = "transcripts",
    *,
    upto: int | None = None,
    patch: int = 48,
) -> View:
    """What a row should hold. `patch`: the side in pixels of the model's soft token.

    `transcripts`: finished turns are words. Under `budget.ahead` the newest exchange's words come first, then the newest
    picture, then older words, then older pictures; oldest goes first, a turn and its answer as a whole. An exchange that does
    not fit takes all older ones with it; the newest picture stays without its words. `verbatim`: everything stays as it
    was while it fits `budget.row`; else the newest three quarters of it do, older turns are words, the oldest go.

    The system prompt and the live turn never go: RowFull says when they alone do not fit `budget.row`.
    """
    budget, upto = budget or Budget(), len(entries) if upto is None else upto
    writer, fresh = _Writer(prompt, patch), _Show(sound=policy == "verbatim")
    setting, past = _fold(entries[:upto], upto)
    plan = _plan(past, writer, fresh, len(_begin(prompt, setting)), budget, policy)

    setting, exchanges = _fold(entries, upto)
    segments: list[Segment] = [_begin(prompt, setting)]
    ahead = 0
    for x in exchanges:
        show, last = plan.get(x.of, fresh), x is exchanges[-1]
        written = writer.exchange(x, replace(show, words=show.words or (last and x.live)), last)
        if last and x.live:
            ahead = _total(segments) + _before_sound(written)
        segments += written
    gone, spent = _report(past, plan, policy)
    return View(merged(segments), ahead or _total(segments), upto, gone, spent)


def _begin(prompt: Prompt, setting: Setting) -> tuple[int, ...]:
    return tuple(prompt.begin(setting.system, setting.tools, setting.thinking))


def _total(segments: Iterable[Segment]) -> int:
    return sum(map(size, segments))


def _before_sound(segments: list[Segment]) -> int:
    """0 where there is none."""
    first = next((n for n, segment in enumerate(segments) if isinstance(segment, Sound)), 0)
    return _total(segments[:first])


def _plan(past: list[_Exchange], writer: _Writer, fresh: _Show, system: int, budget: Budget, policy: Policy) -> dict[int, _Show]:
    """What to show of each finished exchange; the live one is taken off `past`."""
    live = writer.exchange(past.pop(), fresh, last=True) if past and past[-1].live else []
    room = budget.row - system - _total(live)
    if room < 0:
        raise RowFull(f"the system prompt and this turn take {budget.row - room} positions and a row has room for {budget.row}")
    opening = len(writer.prompt.open_turn()) + 1  # so that a turn that opens moves nothing
    if policy == "verbatim":
        return _verbatim(past, room, writer.cost)
    return _transcripts(past, min(room, budget.ahead - system - max(opening, _before_sound(live))), writer.cost)


def _transcripts(past: list[_Exchange], room: int, cost: Cost) -> dict[int, _Show]:
    plan = {x.of: _NOTHING for x in past}
    newest_first = past[::-1]
    words: list[tuple[_Exchange, int | None]] = [(x, None) for x in newest_first]
    pictures: list[tuple[_Exchange, int | None]] = [(x, index) for x in newest_first for index in reversed(x.pictures())]
    current = pictures[0][1] if pictures else None
    refused = set()
    for x, index in [*words[:1], *pictures[:1], *words[1:], *pictures[1:]]:
        show = plan[x.of]
        if (index is None) in refused or (index not in (None, current) and not show.words):
            continue
        more = replace(show, words=True) if index is None else replace(show, pictures=(show.pictures or frozenset()) | {index})
        if (price := cost(x, more) - cost(x, show)) <= room:
            plan[x.of], room = more, room - price
        else:
            refused.add(index is None)
    return plan


def _verbatim(past: list[_Exchange], room: int, cost: Cost) -> dict[int, _Show]:
    plan = {x.of: _NOTHING for x in past}
    prices: list[int] = []  # newest first, and no more of them than matter: a tape may be hours long
    for x in reversed(past):
        prices.append(cost(x, _Show()))
        if sum(prices) > room:
            break
    else:
        return {x.of: _Show() for x in past}
    share = room // 4  # of which older turns are words
    newer = next(n for n in range(len(prices)) if sum(prices[: n + 1]) > room - share)
    room -= sum(prices[:newer])
    for n, x in enumerate(reversed(past)):
        price = 0 if n < newer else cost(x, _WORDS)
        if price > room:
            break
        plan[x.of], room = _Show() if n < newer else _WORDS, room - price
    return plan


def _report(past: list[_Exchange], plan: dict[int, _Show], policy: Policy) -> tuple[tuple[Gone, ...], tuple[int, ...]]:
    gone: list[Gone] = []
    spent: list[int] = []
    for x in past:
        show = plan[x.of]
        sounds = [part for _, part in x.parts if isinstance(part, Sound)]
        silent = not (show.words and show.sound) and x.transcript is not None  # without words the sound is all there is
        if not show.words:
            gone.append(Gone(x.of, "turn"))
        elif policy == "verbatim" and silent and sounds:
            gone.append(Gone(x.of, "sound"))
        if silent and any(sound.data for sound in sounds):
            spent.append(x.of)
        for index, part in x.parts:
            if isinstance(part, Seen) and not show.has(index):
                gone += [Gone(index, "picture")] if show.words else []
                spent += [index] if part.data else []
    return tuple(gone), tuple(spent)
