"""Views of a tape: what of a conversation a row should hold, under a budget.

`view` is a pure function of the entries. While a row lives its `ViewComposer` keeps `upto`: what is evicted is then decided by
the first `upto` entries alone and everything newer only lengthens the view, so that the row follows by appending. `upto`
moves when the next row is built in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from agent.exchanges import Exchange, Exchanges, Reply
from agent.prompt import Prompt
from agent.segments import Evicted, Segment, TurnBuilder, View, merged, size
from agent.tape import Entry, Part, Seen, Sound, SystemPrompt, Typed
from model.cache import RowFull

# ---- an exchange as segments


@dataclass(frozen=True)
class _Visible:
    words: bool = True
    sound: bool = True  # as it was heard; otherwise its transcript, once there is one
    pictures: frozenset[int] | None = None  # None: all

    def has(self, picture: int) -> bool:
        return self.pictures is None or picture in self.pictures


_WORDS = _Visible(sound=False, pictures=frozenset())
_NOTHING = replace(_WORDS, words=False)


@dataclass(frozen=True)
class _Renderer:
    exchanges: Exchanges
    prompt: Prompt
    patch: int

    def begin(self) -> tuple[int, ...]:
        setting = self.exchanges.setting
        return tuple(self.prompt.begin(setting.system, setting.tools, setting.thinking))

    def exchange(self, x: Exchange, show: _Visible, last: bool = False) -> list[Segment]:
        """`last`: nothing comes after it, so it may still be open, be asked, or wait for a tool."""
        if show == _NOTHING:
            return []
        turn = [] if x.role is None else self._turn(x.role, self._left(x, show), open=last and not x.closed)
        return [*turn, tuple(self._answers(x, last))] if show.words else [*turn]

    def cost(self, x: Exchange, show: _Visible, last: bool = False) -> int:
        return _total(self.exchange(x, show, last))

    def _left(self, x: Exchange, show: _Visible) -> Iterator[Part]:
        """What is left of a turn's parts."""
        told = False
        for index, part in self.exchanges.parts(x):
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
        turn = TurnBuilder(self.prompt, self.patch)
        yield tuple(self.prompt.open_turn(role))
        for part in parts:
            yield from turn.feed(part)
        if not open:
            yield (*turn.end(), *self.prompt.end_turn())

    def _answers(self, x: Exchange, last: bool) -> list[int]:
        prompt = self.prompt
        turns: list[list[Reply]] = []
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

    def _finished(self, reply: Reply) -> list[int]:
        """As history has it: no thoughts, what was heard of the words, and every call that came to something."""
        ids = self._words(reply)
        done = {index: value for index, value in reply.results.items() if index in reply.calls}
        for index, call in reply.calls.items():
            ids += self.prompt.tool_call(call.name, call.arguments) if index in done else []
        for index, value in done.items():
            ids += self.prompt.tool_response(reply.calls[index].name, value, opened=False)
        return ids

    def _unfinished(self, reply: Reply, thinking: bool) -> list[int]:
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

    def _words(self, reply: Reply) -> list[int]:
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

Cost = Callable[[Exchange, _Visible], int]
Policy = Literal["transcripts", "verbatim"]


@dataclass(frozen=True)
class Budget:
    """In positions. `ahead`: all that stands before the sound of the live turn, under `transcripts`. Field reports say that
    the 12B no longer understands sound after 450 to 500 positions of other content (google/gemma-4-12B-it, discussion 45).
    `row`: all that a view holds, under either policy; a row of 8192 less 1024 for the answer."""

    ahead: int = 400
    row: int = 7168


class ViewComposer:
    """Of a tape that grows: `let_go` decides by what is on it now, `view` is what a row should hold.

    `transcripts`: finished turns are words. Under `budget.ahead` the newest exchange's words come first, then the newest
    picture, then older words, then older pictures; oldest goes first, a turn and its answer as a whole. An exchange that does
    not fit takes all older ones with it; the newest picture stays without its words. `verbatim`: everything stays as it
    was while it fits `budget.row`; else the newest three quarters of it do, older turns are words, the oldest go.

    What was let go does not come back. `patch`: the side in pixels of the model's soft token.
    """

    def __init__(self, entries: Sequence[Entry], prompt: Prompt, patch: int = 48) -> None:
        self._entries, self._exchanges = entries, Exchanges(entries)
        self._writer = _Renderer(self._exchanges, prompt, patch)
        self._fresh = _Visible()
        self._plan: dict[int, _Visible] = {}
        self._upto: int | None = None
        self._gone: tuple[Evicted, ...] = ()
        self._spent: tuple[int, ...] = ()

    @property
    def decided(self) -> bool:
        return self._upto is not None

    def let_go(self, budget: Budget, policy: Policy, upto: int | None = None) -> None:
        """By the first `upto` entries, or by all. The system prompt and the live turn never go: RowFull says when they alone do
        not fit `budget.row`; nothing is decided then."""
        exchanges, writer, fresh = self._exchanges, self._writer, _Visible(sound=policy == "verbatim")
        exchanges.read(upto)
        exchanges.settle()
        live = exchanges.live
        past = exchanges.known[:-1] if live else exchanges.known
        written = writer.exchange(live, fresh, last=True) if live else []
        system = len(writer.begin())
        room = budget.row - system - _total(written)
        if room < 0:
            raise RowFull(
                f"the system prompt and this turn take {budget.row - room} positions and a row has room for {budget.row}"
            )
        opening = len(writer.prompt.open_turn()) + 1  # so that a turn that opens moves nothing
        if policy == "verbatim":
            plan = _verbatim(past, room, writer.cost)
        else:
            ahead = min(room, budget.ahead - system - max(opening, _before_sound(written)))
            plan = _transcripts([(x, exchanges.pictures(x)) for x in past], ahead, writer.cost)
        self._plan, self._fresh = plan, fresh
        self._upto = len(self._entries) if upto is None else upto
        self._gone, self._spent = _report([(x, [*exchanges.parts(x)], plan[x.of]) for x in past], policy)
        exchanges.forget([of for of, show in plan.items() if show == _NOTHING])

    @property
    def setting(self) -> SystemPrompt:
        self._exchanges.read()
        return self._exchanges.setting

    def least(self) -> tuple[int, int]:
        """Positions of what never goes: the system prompt, and the live exchange."""
        self._exchanges.read()
        live = self._exchanges.live
        return len(self._writer.begin()), self._writer.cost(live, self._fresh, last=True) if live else 0

    def view(self) -> View:
        assert self._upto is not None, "nothing is decided"
        exchanges, writer = self._exchanges, self._writer
        exchanges.read()
        segments: list[Segment] = [writer.begin()]
        ahead = 0
        for x in exchanges.known:
            show, last = self._plan.get(x.of, self._fresh), x is exchanges.known[-1]
            written = writer.exchange(x, replace(show, words=show.words or (last and x.live)), last)
            if last and x.live:
                ahead = _total(segments) + _before_sound(written)
            segments += written
        return View(merged(segments), ahead or _total(segments), self._upto, self._gone, self._spent)


def view(
    entries: Sequence[Entry],
    prompt: Prompt,
    budget: Budget | None = None,
    policy: Policy = "transcripts",
    *,
    upto: int | None = None,
    patch: int = 48,
) -> View:
    """What a row should hold, composed at once. Raises RowFull, as `ViewComposer.let_go` does."""
    views = ViewComposer(entries, prompt, patch)
    views.let_go(budget or Budget(), policy, upto)
    return views.view()


def _total(segments: Iterable[Segment]) -> int:
    return sum(map(size, segments))


def _before_sound(segments: list[Segment]) -> int:
    """0 where there is none."""
    first = next((n for n, segment in enumerate(segments) if isinstance(segment, Sound)), 0)
    return _total(segments[:first])


def _transcripts(past: list[tuple[Exchange, list[int]]], room: int, cost: Cost) -> dict[int, _Visible]:
    """Of exchanges and their pictures."""
    plan = {x.of: _NOTHING for x, _ in past}
    words: list[tuple[Exchange, int | None]] = [(x, None) for x, _ in reversed(past)]
    pictures: list[tuple[Exchange, int | None]] = [(x, index) for x, seen in reversed(past) for index in reversed(seen)]
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


def _verbatim(past: list[Exchange], room: int, cost: Cost) -> dict[int, _Visible]:
    plan = {x.of: _NOTHING for x in past}
    prices: list[int] = []  # newest first, and no more of them than matter: a tape may be hours long
    for x in reversed(past):
        prices.append(cost(x, _Visible()))
        if sum(prices) > room:
            break
    else:
        return {x.of: _Visible() for x in past}
    share = room // 4  # of which older turns are words
    newer = next(n for n in range(len(prices)) if sum(prices[: n + 1]) > room - share)
    room -= sum(prices[:newer])
    for n, x in enumerate(reversed(past)):
        price = 0 if n < newer else cost(x, _WORDS)
        if price > room:
            break
        plan[x.of], room = _Visible() if n < newer else _WORDS, room - price
    return plan


def _report(
    past: list[tuple[Exchange, list[tuple[int, Part]], _Visible]], policy: Policy
) -> tuple[tuple[Evicted, ...], tuple[int, ...]]:
    gone: list[Evicted] = []
    spent: list[int] = []
    for x, parts, show in past:
        sounds = [part for _, part in parts if isinstance(part, Sound)]
        silent = not (show.words and show.sound) and x.transcript is not None  # without words the sound is all there is
        if not show.words:
            gone.append(Evicted(x.of, "turn"))
        elif policy == "verbatim" and silent and sounds:
            gone.append(Evicted(x.of, "sound"))
        if silent and any(sound.data for sound in sounds):
            spent.append(x.of)
        for index, part in parts:
            if isinstance(part, Seen) and not show.has(index):
                gone += [Evicted(index, "picture")] if show.words else []
                spent += [index] if part.data else []
    return tuple(gone), tuple(spent)
