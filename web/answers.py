"""The responses of a conversation: what a client asks for → inputs of a session, what the session answers → responses. Pure.

A response is one answer, or one stretch of it up to the tools whose results it needs. It is done as soon as all of it was
sent; the answer goes on until it was played, and may still be cut there. Where a client asks for `playback`, sound is sent as
it is played, and a response lasts as long as its answer. Responses beside the conversation have answers below zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent import events
from agent.calls import ToolCall
from agent.events import Event, Input
from agent.tape import Setting
from web import items
from web.audio import Playback
from web.config import MOST, Config
from web.given import ID, Refused, choice, remember, text
from web.items import Item, Items, Json
from web.past import OUTPUT, Reader, call
from web.response import Response, metadata, status_of

BESIDE = 4  # responses beside the conversation at once


@dataclass(frozen=True, slots=True)
class Wire:
    """Where things go: `put` to the session, `send(type, **fields)` to the client; `new(kind)` is a new id."""

    name: str
    put: Callable[[Input], None]
    send: Callable[..., None]
    new: Callable[[str], str]


class Answers:
    """`config` is what the session was told; `spoken` says whether there is a voice, `voice` what it is called."""

    def __init__(
        self, wire: Wire, known: Items, pictures: Mapping[int, str], config: Config, voice: str | None, paced: bool
    ) -> None:
        self.playback, self.config = Playback(), config
        self.system: list[str] = []  # messages of the system, which stand with the instructions
        self._wire, self._items, self._pictures = wire, known, pictures
        self._voice, self._can_speak, self._paced = voice or "none", voice is not None, paced
        self._tuned = config  # what the session answers by
        self._response: Response | None = None
        self._answer: int | None = None  # from Answering to Answered
        self._told: Response | None = None  # in which the last of it was sent
        self._written = 0  # characters of it
        self._asides: dict[int, tuple[Response, bool]] = {}  # and whether the conversation keeps them
        self._count = 0  # of those so far
        self._costs: dict[int, events.Counted] = {}  # of the last stretch of an answer
        self._calls: dict[str, int] = {}  # the session's number by call_id
        self._brought: dict[str, ToolCall] = {}  # by the client
        self._returned: dict[int, str] = {}  # while the answer waits, by that number
        self._waits: set[int] = set()
        self._unwanted: list[Item] = []
        self._late: list[events.Said] = []  # sound of an answer that waits for tools, and goes on in the next response
        self._tune(config, always=True)

    @property
    def active(self) -> Response | None:
        """The response in progress in the conversation."""
        kept = (response for response, kept in self._asides.values() if kept)
        return self._response or next(kept, None)

    @property
    def busy(self) -> bool:
        """An answer is being given, be it only played."""
        return self._answer is not None

    @property
    def awaited(self) -> bool:
        """A response is in progress in the conversation, and its answer may not have begun."""
        return self._response is not None

    def update(self, config: Config) -> Config:
        """What holds of it."""
        self.config = config = replace(config, spoken=config.spoken and self._can_speak)
        self._tune(config)
        return config

    def say(self, system: str) -> None:
        text("\n\n".join([*self.system, system]), "system messages")
        self.system.append(system)
        self._tune(self.config, always=True)

    def session(self, model: str) -> Json:
        return self.config.as_json(self._wire.name, model, self._voice)

    def _tune(self, config: Config, always: bool = False) -> None:
        """The session answers by `config` from now on. How it answers by itself is the session's own affair."""
        was, self._tuned = self._tuned, config
        if config == was and not always:
            return
        setting = self._setting(config) if always or config.setting != was.setting else None
        self._wire.put(
            events.Set(setting, answers=self.config.answers, most=config.most or MOST, spoken=config.spoken, calls=config.calls)
        )

    def _setting(self, config: Config, system: list[str] | None = None) -> Setting:
        said = "\n\n".join(filter(None, [config.instructions, *(self.system if system is None else system)]))
        return replace(config.setting, system=said or None)

    # -- the client's side

    def create(self, given: Mapping[str, Any], now: float) -> None:
        beside = choice(given.get("conversation") or "auto", "response.conversation", ("auto", "none")) == "none"
        if not beside and self.active:
            raise Refused("a response is being given already", "conversation_already_has_active_response")
        config = self.config.answering(given, "response")
        config = replace(config, spoken=config.spoken and self._can_speak)
        said = metadata(given.get("metadata"))
        if beside or given.get("input") is not None:
            self._beside(given.get("input"), config, said, kept=not beside)
        elif self._waits:
            self._go_on(config, said, now)
        else:
            self._tune(config)
            self._begin(config, said)
            self._wire.put(events.Ask())

    def _beside(self, input: Any, config: Config, said: Mapping[str, str] | None, kept: bool) -> None:
        if len(self._asides) == BESIDE:
            raise Refused(f"{BESIDE} responses beside the conversation are being given already", "too_many_responses")
        past = system = None
        if input is not None:
            reader = Reader(self._items, self._pictures, self._brought, self.config.input)
            past, system = reader.read(input), reader.system
        self._count += 1
        answer = -self._count
        self._asides[answer] = self._response_of(config, said, answer, self._items if kept else None), kept
        setting = self._setting(config, system)
        self._wire.put(events.Aside(answer, past, setting, config.most, config.spoken, config.calls))

    def _go_on(self, config: Config, said: Mapping[str, str] | None, now: float) -> None:
        """The answer has its tools' results."""
        config = replace(config, spoken=self._tuned.spoken, most=self._tuned.most)
        self._response = self._response_of(config, said, self._answer, self._items, self._written)
        for number in sorted(self._waits):
            self._wire.put(events.Returned(number, self._returned.get(number, {"error": "there is no result"})))
        self._waits.clear()
        self._returned.clear()
        late, self._late = self._late, []
        for sound in late:
            self._said(sound, now)

    def _begin(self, config: Config, said: Mapping[str, str] | None = None, answer: int | None = None) -> Response:
        self._response = self._response_of(config, said, answer, self._items, self._written if answer is not None else 0)
        return self._response

    def _response_of(
        self, config: Config, said: Mapping[str, str] | None, answer: int | None, into: Items | None, base: int = 0
    ) -> Response:
        return Response(config, said, self._voice, self._wire.name, self._wire.send, into, self._wire.new, answer, base)

    def cancel(self, id: Any) -> None:
        found = [self.active] if id is None else [self._response, *(response for response, _ in self._asides.values())]
        response = next((response for response in found if response and id in (None, response.id)), None)
        if response is None:
            wrong = "Cancellation failed: no active response found" if id is None else f"Cancellation failed: no response {id!r}"
            raise Refused(wrong, "response_cancel_not_active", "response_id")
        response.cancelled = True
        aside = response.answer is not None and response.answer < 0
        self._wire.put(events.Stop(response.answer if aside else None))

    def truncate(self, item: Item, ms: int, talking: bool) -> int:
        """Of the item's sound only so much was heard; returns how much that can be. `talking`: as the user talks over it."""
        if (place := self.playback.place(item.id, ms)) is None:
            raise Refused("Only model output audio messages can be truncated", "unsupported_content_type", "item_id")
        answer, sample, heard = place
        self._wire.put(events.Truncate(answer, sample))
        if answer == self._answer:
            self.playback.stop()
            if self._response and self._response.answer == answer:
                self._response.cancelled = not talking
        if self.playback.place(item.id, heard + 1) != place:  # not all was heard: which words, the session knows
            item.json = {**item.json, "status": "incomplete", "content": [{"type": "output_audio", "transcript": None}]}
        return heard

    def unwanted(self) -> list[Item]:
        """Items that were deleted while they were written, of responses that are over since this was asked last."""
        found, self._unwanted = self._unwanted, []
        return found

    def holds(self, item: Item) -> bool:
        return any(response.holds(item) for response in (self._response, *(r for r, _ in self._asides.values())) if response)

    def called(self, raw: Mapping[str, Any], id: str) -> Json:
        """A call that the client brings along; the session hears of it with its result."""
        given = raw.get("call_id")
        name = self._wire.new("call") if given is None else text(given, "item.call_id", ID)
        if name in self._calls or name in self._brought:
            raise Refused(f"item.call_id {name!r} is taken", param="item.call_id")
        tool = call(raw, "item")
        remember(self._brought, name, tool)
        return items.called(id, name, tool.name, raw.get("arguments") or "", "completed")

    def returned(self, raw: Mapping[str, Any], id: str) -> Json:
        name = text(raw.get("call_id"), "item.call_id", ID)
        value = text(raw.get("output"), "item.output", OUTPUT)
        if name in self._brought:
            self._wire.put(events.Recall("", ((self._brought[name], value),)))
        elif (number := self._calls.get(name)) is None:
            raise Refused(f"there is no call {name!r}", "item_not_found", "item.call_id")
        elif number in self._waits:
            self._returned[number] = value
        else:
            self._wire.put(events.Returned(number, value))
        return items.item(id, "function_call_output", call_id=name, output=value)

    # -- the session's side

    def tell(self, event: Event, now: float) -> None:
        match event:
            case events.Answering(answer) if answer >= 0:
                self._answer, self._told, self._written = answer, None, 0
                response = self._response or self._begin(self._tuned)
                response.answer = answer
            case events.Wrote():
                self._wrote(event)
            case events.Said():
                self._said(event, now)
            case events.Cleared() if event.answer == self._answer:
                self.playback.stop()
                if self._paced and self._response and self._response.open:
                    self._wire.send("attend.cleared", item_id=self._response.message)
            case events.Counted():
                self._costs[event.answer] = event
            case events.Called():
                self._called(event)
            case events.Told(answer) if answer >= 0 and not self._paced:
                self._told = self._response
                self._end(event.finish)
            case events.Answered(answer) if answer < 0:
                self._aside_over(event)
            case events.Answered():
                self._over(event)

    def played(self, now: float) -> None:
        """Time has gone on: what the client has played of what was sent."""
        if (reached := self.playback.heard(now)) and not self._at_once:
            self._wire.put(events.Heard(*reached))

    @property
    def _at_once(self) -> bool:
        """What was sent counts as heard, as talk does not interrupt it: the client says where it stopped, if it did."""
        return self.config.patient and not self._paced

    def _responding(self, answer: int) -> Response:
        """The response in progress; after a tool's results that nobody asked for, one more."""
        if answer in self._asides:
            return self._asides[answer][0]
        return self._response or self._begin(self._tuned, answer=self._answer)

    def _wrote(self, event: events.Wrote) -> None:
        self._responding(event.answer).write(event.text)
        self._written += len(event.text) if event.answer == self._answer else 0

    def _said(self, event: events.Said, now: float) -> None:
        end = event.sample + len(event.pcm)
        if event.answer in self._asides:
            self._asides[event.answer][0].say(event)
            self._wire.put(events.Heard(event.answer, end))
        elif self._response:
            self._response.say(event)
            item = self._response.message
            offset = self.playback.send(now, item, event.answer, event.sample, len(event.pcm), event.rate)
            if self._paced and event.words:
                self._words(event, item, offset - event.sample / event.rate, self._response.begun)
            if self._at_once:
                self._wire.put(events.Heard(event.answer, end))
        elif not self._told:  # else it was taken up again at a word, and its response is done
            self._late.append(event)

    def _words(self, event: events.Said, item: str, before: float, begun: int) -> None:
        """Where each word stands in the item's text and sound, but for those of an item before the tools."""
        words = [
            {
                "start": word.start - begun,
                "end": word.end - begun,
                "audio_ms": round((before + word.sample / event.rate) * 1000),
            }
            for word in event.words
            if word.start >= begun
        ]
        self._wire.send("attend.words", item_id=item, words=words)

    def _called(self, event: events.Called) -> None:
        response, name = self._responding(event.answer), self._wire.new("call")
        response.call(event, name)
        if event.answer < 0:  # nobody waits for it; the client may bring it along with its result
            remember(self._brought, name, event.tool)
            return
        remember(self._calls, name, event.call)
        self._waits.add(event.call)
        if not event.more:
            self._end("stop")

    def _end(self, finish: str, heard: int | None = None) -> None:
        """The response in progress is done."""
        response, self._response = self._response, None
        if response:
            status, details = status_of(finish, response.cancelled)
            response.finish(status, details, self._usage(response.answer), heard)
            self._unwanted += response.unwanted
            if not self._waits:
                self._tune(self.config)

    def _over(self, event: events.Answered) -> None:
        if event.finish == "interrupted":
            self.playback.stop()
        if event.answer != self._answer:
            return
        if self._told and event.finish == "interrupted":
            self._told.shorten(event.heard)
        self._answer, self._told = None, None
        self._late.clear()
        if self._response and self._response.answer == event.answer:
            self._end(event.finish, event.heard if event.finish == "interrupted" else None)
        if self._waits:  # for tools: what they bring now is kept for later
            for number, value in self._returned.items():
                self._wire.put(events.Returned(number, value))
            self._waits.clear()
            self._returned.clear()
            self._tune(self.config)

    def _aside_over(self, event: events.Answered) -> None:
        response, kept = self._asides.pop(event.answer)
        status, details = status_of(event.finish, response.cancelled)
        response.finish(status, details, self._usage(event.answer))
        self._unwanted += response.unwanted if kept else []
        if kept and event.text.strip():
            self._wire.put(events.Recall(event.text))

    def _usage(self, answer: int | None) -> Json:
        cost = self._costs.pop(answer, None) if answer is not None else None
        cost = cost or events.Counted(0, 0, 0, 0, 0)
        before = cost.text + cost.sound + cost.pictures
        return {
            "total_tokens": before + cost.tokens,
            "input_tokens": before,
            "output_tokens": cost.tokens,
            "input_token_details": {"text_tokens": cost.text, "audio_tokens": cost.sound, "image_tokens": cost.pictures},
            "output_token_details": {"text_tokens": cost.tokens, "audio_tokens": 0},
        }
