"""Views of a tape: which part of a conversation a row should hold, under a budget.

`view` is a pure function of the entries. The `ViewComposer` of a row remembers `upto`: the first `upto` entries alone decide
what is evicted, and newer ones only extend the view, so that the row follows by appending. `evict` moves `upto`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from agent.exchanges import Exchange, Exchanges, ModelOutput
from agent.prompt import Prompt
from agent.segments import Evicted, Segment, TurnBuilder, View, merged, size
from agent.tape import Entry, Part, Seen, Sound, SystemPrompt, Typed
from model.cache import RowFull

# ---- an exchange as segments


@dataclass(frozen=True)
class _Visible:
    words: bool = True
    sound: bool = True  # as audio; otherwise as its transcript, once there is one
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

    def exchange(self, x: Exchange, visible: _Visible, last: bool = False) -> list[Segment]:
        """`last`: it is the newest exchange, so its turn may be open and its answer may be running or wait for tool results."""
        if visible == _NOTHING:
            return []
        turn = [] if x.role is None else self._turn(x.role, self._visible_parts(x, visible), open=last and not x.closed)
        return [*turn, tuple(self._answers(x, last))] if visible.words else [*turn]

    def cost(self, x: Exchange, visible: _Visible, last: bool = False) -> int:
        return _total(self.exchange(x, visible, last))

    def _visible_parts(self, x: Exchange, visible: _Visible) -> Iterator[Part]:
        """The parts of a turn that are shown: pictures and sound in memory, text, and the transcript in place of sound."""
        transcribed = False
        for index, part in self.exchanges.parts(x):
            match part:
                case Seen():
                    if part.data and visible.has(index):
                        yield part
                case _ if not visible.words:
                    pass
                case Typed():
                    yield part
                case Sound() if part.data and (visible.sound or x.transcript is None):
                    yield part
                case Sound() if not transcribed:
                    yield Typed(x.transcript or "")
                    transcribed = True

    def _turn(self, role: str, parts: Iterable[Part], open: bool) -> Iterator[Segment]:
        turn = TurnBuilder(self.prompt, self.patch)
        yield tuple(self.prompt.open_turn(role))
        for part in parts:
            yield from turn.feed(part)
        if not open:
            yield (*turn.end(), *self.prompt.end_turn())

    def _answers(self, x: Exchange, last: bool) -> list[int]:
        prompt = self.prompt
        turns: list[list[ModelOutput]] = []
        for output in x.outputs:
            if output.continues and turns:
                turns[-1].append(output)
            else:
                turns.append([output])
        ids: list[int] = []
        for turn in turns:
            if last and x.awaits_results and turn is turns[-1]:
                ids += prompt.ask(x.thinking) + [id for output in turn for id in self._unfinished(output, x.thinking)]
            elif inside := [id for output in turn for id in self._finished(output)]:
                ids += prompt.open_turn("model") + inside + prompt.end_turn()
        return ids + (prompt.ask(x.thinking) if last and x.asked else [])

    def _finished(self, output: ModelOutput) -> list[int]:
        """As history: the text that was heard, without thoughts, and every call that has a result."""
        ids = self._heard_ids(output)
        done = {index: value for index, value in output.results.items() if index in output.calls}
        for index, call in output.calls.items():
            ids += self.prompt.tool_call(call.name, call.arguments) if index in done else []
        for index, value in done.items():
            ids += self.prompt.tool_response(output.calls[index].name, value, opened=False)
        return ids

    def _unfinished(self, output: ModelOutput, thinking: bool) -> list[int]:
        """As the model generated it, with thoughts and the results so far: the model goes on from here."""
        prompt, name = self.prompt, self.prompt.tokenizer.name
        ids = list(output.entry.ids)
        if not ids:
            ids = prompt.text(output.entry.text)
            ids += [id for call in output.calls.values() for id in prompt.tool_call(call.name, call.arguments)]
        while ids and name(ids[-1]) in ("<turn|>", "<eos>"):
            ids.pop()
        done = [(output.calls[index].name, value) for index, value in output.results.items() if index in output.calls]
        for number, (tool, value) in enumerate(done, 1):
            opened = bool(ids) and name(ids[-1]) == "<|tool_response>"
            ids += prompt.tool_response(tool, value, opened=opened, thinking=thinking and number == len(output.calls))
        return ids

    def _heard_ids(self, output: ModelOutput) -> list[int]:
        """The ids that were heard, without thoughts, calls, control tokens and surrounding white space."""
        if not output.entry.ids:
            return self.prompt.text(output.entry.text) if output.heard != 0 else []
        tokenizer, hidden, words = self.prompt.tokenizer, output.starts_in_thought, []
        for id in output.entry.ids[: output.heard]:
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


# ---- eviction

Cost = Callable[[Exchange, _Visible], int]
Policy = Literal["transcripts", "verbatim"]


@dataclass(frozen=True)
class Budget:
    """In positions. `ahead`: at most so many before the sound of the live turn, under `transcripts`. Field reports say that the
    12B no longer understands sound after 450 to 500 positions of other content (google/gemma-4-12B-it, discussion 45). `row`: at
    most so many in a view, under either policy; by default a row of 8192 less 1024 for the answer."""

    ahead: int = 400
    row: int = 7168


class ViewComposer:
    """The views of a growing tape: `evict` decides what leaves, by the entries so far; `view` is what a row should hold.

    Policy `transcripts`: finished turns are shown as text. `budget.ahead` is filled with the text of the newest exchange, then
    the newest picture, then older text, then older pictures; a turn and its answer go together. An exchange that does not fit
    evicts all older ones too; the newest picture stays without its text. Policy `verbatim`: everything stays as it was while it
    fits `budget.row`; otherwise the newest turns stay in three quarters of it, older ones are text, and the oldest go.

    What was evicted does not come back. `patch`: the side of the model's soft token in pixels.
    """

    def __init__(self, entries: Sequence[Entry], prompt: Prompt, patch: int = 48) -> None:
        self._entries, self._exchanges = entries, Exchanges(entries)
        self._renderer = _Renderer(self._exchanges, prompt, patch)
        self._default = _Visible()
        self._plan: dict[int, _Visible] = {}
        self._upto: int | None = None
        self._evicted: tuple[Evicted, ...] = ()
        self._unneeded: tuple[int, ...] = ()

    @property
    def decided(self) -> bool:
        """Whether `evict` has been called."""
        return self._upto is not None

    def evict(self, budget: Budget, policy: Policy, upto: int | None = None) -> None:
        """Decides what is evicted, by the first `upto` entries or by all. The system prompt and the live turn always stay; raises
        RowFull, and decides nothing, if they alone do not fit `budget.row`."""
        exchanges, renderer, default = self._exchanges, self._renderer, _Visible(sound=policy == "verbatim")
        exchanges.read(upto)
        exchanges.apply_transcripts()
        live = exchanges.live
        finished = exchanges.items[:-1] if live else exchanges.items
        rendered = renderer.exchange(live, default, last=True) if live else []
        system = len(renderer.begin())
        room = budget.row - system - _total(rendered)
        if room < 0:
            raise RowFull(
                f"the system prompt and this turn take {budget.row - room} positions and a row has room for {budget.row}"
            )
        opening = len(renderer.prompt.open_turn()) + 1  # reserved, so that opening a turn evicts nothing
        if policy == "verbatim":
            plan = _verbatim(finished, room, renderer.cost)
        else:
            ahead = min(room, budget.ahead - system - max(opening, _positions_before_sound(rendered)))
            plan = _transcripts([(x, exchanges.pictures(x)) for x in finished], ahead, renderer.cost)
        self._plan, self._default = plan, default
        self._upto = len(self._entries) if upto is None else upto
        self._evicted, self._unneeded = _evictions([(x, [*exchanges.parts(x)], plan[x.of]) for x in finished], policy)
        exchanges.prune([of for of, visible in plan.items() if visible == _NOTHING])

    @property
    def exchanges(self) -> int:
        """How many exchanges are remembered, evicted ones that may still change included."""
        return len(self._exchanges.items)

    @property
    def setting(self) -> SystemPrompt:
        self._exchanges.read()
        return self._exchanges.setting

    def least(self) -> tuple[int, int]:
        """Positions of what is never evicted: (the system prompt, the live exchange)."""
        self._exchanges.read()
        live = self._exchanges.live
        return len(self._renderer.begin()), self._renderer.cost(live, self._default, last=True) if live else 0

    def view(self) -> View:
        """What a row should hold now."""
        assert self._upto is not None, "call evict first"
        exchanges, renderer = self._exchanges, self._renderer
        exchanges.read()
        segments: list[Segment] = [renderer.begin()]
        ahead = 0
        for x in exchanges.items:
            visible, last = self._plan.get(x.of, self._default), x is exchanges.items[-1]
            rendered = renderer.exchange(x, replace(visible, words=visible.words or (last and x.live)), last)
            if last and x.live:
                ahead = _total(segments) + _positions_before_sound(rendered)
            segments += rendered
        return View(merged(segments), ahead or _total(segments), self._upto, self._evicted, self._unneeded)


def view(
    entries: Sequence[Entry],
    prompt: Prompt,
    budget: Budget | None = None,
    policy: Policy = "transcripts",
    *,
    upto: int | None = None,
    patch: int = 48,
) -> View:
    """What a row should hold, in one call. Raises RowFull as `ViewComposer.evict` does."""
    views = ViewComposer(entries, prompt, patch)
    views.evict(budget or Budget(), policy, upto)
    return views.view()


def _total(segments: Iterable[Segment]) -> int:
    return sum(map(size, segments))


def _positions_before_sound(segments: list[Segment]) -> int:
    """Positions before the first sound; 0 if there is none."""
    first = next((n for n, segment in enumerate(segments) if isinstance(segment, Sound)), 0)
    return _total(segments[:first])


def _transcripts(finished: list[tuple[Exchange, list[int]]], room: int, cost: Cost) -> dict[int, _Visible]:
    """What to show of each exchange under policy `transcripts`. `finished`: exchanges with their pictures."""
    plan = {x.of: _NOTHING for x, _ in finished}
    words: list[tuple[Exchange, int | None]] = [(x, None) for x, _ in reversed(finished)]
    pictures: list[tuple[Exchange, int | None]] = [(x, index) for x, seen in reversed(finished) for index in reversed(seen)]
    current = pictures[0][1] if pictures else None
    refused = set()
    for x, index in [*words[:1], *pictures[:1], *words[1:], *pictures[1:]]:
        visible = plan[x.of]
        if (index is None) in refused or (index not in (None, current) and not visible.words):
            continue
        more = (
            replace(visible, words=True)
            if index is None
            else replace(visible, pictures=(visible.pictures or frozenset()) | {index})
        )
        if (needed := cost(x, more) - cost(x, visible)) <= room:
            plan[x.of], room = more, room - needed
        else:
            refused.add(index is None)
    return plan


def _verbatim(finished: list[Exchange], room: int, cost: Cost) -> dict[int, _Visible]:
    """What to show of each exchange under policy `verbatim`."""
    plan = {x.of: _NOTHING for x in finished}
    costs: list[int] = []  # newest first, and only as many as can fit: a tape may be hours long
    for x in reversed(finished):
        costs.append(cost(x, _Visible()))
        if sum(costs) > room:
            break
    else:
        return {x.of: _Visible() for x in finished}
    share = room // 4  # for older turns, as text
    newer = next(n for n in range(len(costs)) if sum(costs[: n + 1]) > room - share)
    room -= sum(costs[:newer])
    for n, x in enumerate(reversed(finished)):
        needed = 0 if n < newer else cost(x, _WORDS)
        if needed > room:
            break
        plan[x.of], room = _Visible() if n < newer else _WORDS, room - needed
    return plan


def _evictions(
    finished: list[tuple[Exchange, list[tuple[int, Part]], _Visible]], policy: Policy
) -> tuple[tuple[Evicted, ...], tuple[int, ...]]:
    gone: list[Evicted] = []
    spent: list[int] = []
    for x, parts, visible in finished:
        sounds = [part for _, part in parts if isinstance(part, Sound)]
        silent = not (visible.words and visible.sound) and x.transcript is not None  # without one, the sound is all there is
        if not visible.words:
            gone.append(Evicted(x.of, "turn"))
        elif policy == "verbatim" and silent and sounds:
            gone.append(Evicted(x.of, "sound"))
        if silent and any(sound.data for sound in sounds):
            spent.append(x.of)
        for index, part in parts:
            if isinstance(part, Seen) and not visible.has(index):
                gone += [Evicted(index, "picture")] if visible.words else []
                spent += [index] if part.data else []
    return tuple(gone), tuple(spent)
