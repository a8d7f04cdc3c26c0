"""The responses of a conversation: what a client asks for → inputs of a session, what the session answers → server events. Pure.

A response is one answer, or one stretch of it up to the tools whose results it needs. It is done as soon as all of it was
sent; the answer goes on until it was played, and may still be cut there. Where a client asks for `playback`, sound is sent as
it is played, and a response lasts as long as its answer. A response out of band is an answer of its own (events.OutOfBand).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from agent import events
from agent.calls import ToolCall
from agent.events import Event
from agent.tape import SystemPrompt
from web import items
from web.audio import PlaybackClock
from web.config import MAX_TOKENS, SessionConfig
from web.items import ConversationItem, ConversationItems, Json, ResponseInput
from web.outgoing import Outgoing, remember
from web.response import Response
from web.schema import TEXT, FunctionCallItem, FunctionCallOutputItem, InvalidRequest, ResponseParams

OUT_OF_BAND = 4  # responses at once


class Responses:
    """`config`: what holds of the session. `voice`: what the answers' voice is called, None where there is none. `playback`: the
    client gets sound as it is played. `pictures`: items by the session's numbers of pictures."""

    def __init__(
        self,
        out: Outgoing,
        known: ConversationItems,
        config: SessionConfig,
        voice: str | None,
        playback: bool,
        pictures: Mapping[int, str],
    ) -> None:
        self.playback, self.config = PlaybackClock(), config
        self._out, self._items, self._pictures = out, known, pictures
        self._voice, self._paced = voice, playback
        self._system: list[str] = []  # messages of the system, which stand with the instructions
        self._tuned = config  # what the session answers by
        self._response: Response | None = None  # in progress in the conversation
        self._answer: int | None = None  # of the session, from its beginning until it was played
        self._sent: Response | None = None  # the response in which the last of it was sent
        self._written = 0  # characters of it
        self._out_of_band: dict[str, Response] = {}
        self._calls: dict[str, int] = {}  # the session's number by call_id
        self._brought: dict[str, ToolCall] = {}  # by the client, by call_id
        self._waits: set[int] = set()  # calls whose results the answer needs
        self._returned: dict[int, str] = {}  # what came of them so far
        self._late: list[events.AudioDelta] = []  # sound of an answer that waits for tools, and goes on in the next response
        self._tune(config, always=True)

    @property
    def active(self) -> Response | None:
        """The response in progress in the conversation."""
        return self._response or next((response for response in self._out_of_band.values() if response.kept is not None), None)

    @property
    def busy(self) -> bool:
        """An answer is being given, be it only played, or was asked for."""
        return self._answer is not None or self._response is not None

    def holds(self, item: ConversationItem) -> bool:
        return any(response.holds(item) for response in self._in_progress())

    def _in_progress(self) -> Iterator[Response]:
        if self._response:
            yield self._response
        yield from self._out_of_band.values()

    # -- what the session answers by

    def update(self, config: SessionConfig) -> None:
        self.config = self._speakable(config)
        self._tune(self.config)

    def add_system(self, message: str) -> None:
        """A message of the system, which holds from the next answer on."""
        if sum(map(len, self._system)) + len(message) > TEXT:
            raise InvalidRequest(f"the messages of the system have more than {TEXT:,} characters", "string_above_max_length")
        self._system.append(message)
        self._tune(self.config, always=True)

    def session(self, model: str) -> Json:
        return self.config.as_json(self._out.id, model, self._voice or "none")

    def _speakable(self, config: SessionConfig) -> SessionConfig:
        return replace(config, spoken=config.spoken and self._voice is not None)

    def _tune(self, config: SessionConfig, always: bool = False) -> None:
        """The session answers by `config` from now on. Whether it answers by itself is the session's own affair."""
        was, self._tuned = self._tuned, config
        if config == was and not always:
            return
        setting = self._setting(config, self._system) if always or config.setting != was.setting else None
        most, answers = config.max_tokens or MAX_TOKENS, self.config.answers
        self._out.put(events.UpdateSettings(setting, answers=answers, max_tokens=most, spoken=config.spoken, calls=config.calls))

    def _setting(self, config: SessionConfig, system: list[str]) -> SystemPrompt:
        return replace(config.setting, system="\n\n".join(filter(None, [config.instructions, *system])) or None)

    # -- the client's side

    def create(self, params: ResponseParams, now: float) -> None:
        out_of_band = params.conversation == "none"
        if not out_of_band and self.active:
            code = "conversation_already_has_active_response"
            raise InvalidRequest("a response is being given already", code)
        config = self._speakable(self.config.of_response(params, "response"))
        if out_of_band or params.input is not None:
            self._create_out_of_band(params, config)
        elif self._waits:
            self._go_on(params, config, now)
        else:
            self._tune(config)
            self._begin(config, params)
            self._out.put(events.CreateAnswer())

    def _create_out_of_band(self, params: ResponseParams, config: SessionConfig) -> None:
        if len(self._out_of_band) == OUT_OF_BAND:
            raise InvalidRequest(f"{OUT_OF_BAND} responses out of band are being given already", "too_many_responses")
        past, system = None, self._system
        if params.input is not None:
            reader = ResponseInput(self._items, self._pictures, self._brought, self.config.input)
            past, system = reader.read(params.input), reader.system
        kept = None if params.conversation == "none" else self._items
        response = Response(self._out, config, params, self._voice or "none", kept)
        self._out_of_band[response.id] = response
        asked = self._setting(config, system), config.max_tokens, config.spoken, config.calls
        self._out.put(events.CreateOutOfBandResponse(response.id, past, *asked))

    def _go_on(self, params: ResponseParams, config: SessionConfig, now: float) -> None:
        """The answer has its tools' results."""
        config = replace(config, spoken=self._tuned.spoken, max_tokens=self._tuned.max_tokens)
        self._begin(config, params, self._answer, self._written)
        for number in sorted(self._waits):
            self._out.put(events.ToolResult(number, self._returned.get(number, {"error": "there is no result"})))
        self._waits.clear()
        self._returned.clear()
        late, self._late = self._late, []
        for sound in late:
            self._said(sound, now)

    def _begin(self, config: SessionConfig, params: ResponseParams, answer: int | None = None, base: int = 0) -> Response:
        self._response = Response(self._out, config, params, self._voice or "none", self._items, answer, base)
        return self._response

    def cancel(self, id: str | None) -> None:
        response = self.active if id is None else next((one for one in self._in_progress() if one.id == id), None)
        if response is None:
            what = "no active response found" if id is None else f"there is no response {id!r} in progress"
            raise InvalidRequest(f"Cancellation failed: {what}", "response_cancel_not_active", "response_id")
        response.cancelled = True
        stop = events.CancelAnswer()
        self._out.put(events.OutOfBandEvent(response.id, stop) if response.id in self._out_of_band else stop)

    def truncate(self, item: ConversationItem, ms: int, talking: bool) -> int:
        """Of the item's sound only so much was heard; returns how much that can be. `talking`: as the user talks over it."""
        if (place := self.playback.place(item.id, ms)) is None:
            raise InvalidRequest("Only model output audio messages can be truncated", "unsupported_content_type", "item_id")
        answer, sample, heard = place
        self._out.put(events.TruncateAnswer(answer, sample))
        if answer == self._answer:
            self.playback.stop()
            if self._response and self._response.answer == answer:
                self._response.cancelled = not talking
        if self.playback.place(item.id, heard + 1) != place:  # not all was heard: which words, the session knows
            item.json = {**item.json, "status": "incomplete", "content": [{"type": "output_audio", "transcript": None}]}
        return heard

    def bring_call(self, given: FunctionCallItem, id: str) -> Json:
        """A call that the client brings along; the session hears of it with its result."""
        call_id = self._out.new("call") if given.call_id is None else given.call_id
        if call_id in self._calls or call_id in self._brought:
            raise InvalidRequest(f"item.call_id {call_id!r} is taken", param="item.call_id")
        remember(self._brought, call_id, items.tool_call(given, "item"))
        return items.function_call(id, call_id, given.name, given.arguments, "completed")

    def bring_output(self, given: FunctionCallOutputItem, id: str) -> Json:
        call_id, output = given.call_id, given.output
        if call_id in self._brought:
            self._out.put(events.PastAnswer("", ((self._brought[call_id], output),)))
        elif (number := self._calls.get(call_id)) is None:
            raise InvalidRequest(f"there is no call {call_id!r}", "item_not_found", "item.call_id")
        elif number in self._waits:
            self._returned[number] = output
        else:
            self._out.put(events.ToolResult(number, output))
        return items.item(id, "function_call_output", call_id=call_id, output=output)

    # -- the session's side

    def tell(self, event: Event, now: float) -> None:
        match event:
            case events.AnswerStarted(answer):
                self._answer, self._sent, self._written = answer, None, 0
                response = self._response or self._begin(self._tuned, ResponseParams())
                response.answer = answer
            case events.TextDelta():
                self._responding().write(event.text)
                self._written += len(event.text)
            case events.AudioDelta():
                self._said(event, now)
            case events.OutputCleared() if event.answer == self._answer:
                self.playback.stop()
                if self._paced and self._response and self._response.open:
                    self._out.send("attend.cleared", item_id=self._response.message)
            case events.UsageCounted() if self._response and self._response.answer == event.answer:
                self._response.cost = event
            case events.ToolCalled():
                self._called(event)
            case events.OutputSent() if not self._paced:
                self._sent = self._response
                self._end(event.finish)
            case events.AnswerDone():
                self._over(event)
            case events.OutOfBandEvent(name, inner) if name in self._out_of_band:
                self._tell_out_of_band(self._out_of_band[name], inner)

    def _tell_out_of_band(self, response: Response, event: object) -> None:
        match event:
            case events.TextDelta():
                response.write(event.text)
            case events.AudioDelta():
                response.say(event)
                heard = events.PlaybackPosition(event.answer, event.sample + len(event.pcm))
                self._out.put(events.OutOfBandEvent(response.id, heard))
            case events.ToolCalled():  # nobody waits for it; the client may bring it along with its result
                response.call(event, call_id := self._out.new("call"))
                remember(self._brought, call_id, event.tool)
            case events.UsageCounted():
                response.cost = event
            case events.AnswerDone():
                del self._out_of_band[response.id]
                response.finish(event.finish)
                if response.kept is not None and event.text.strip():
                    self._out.put(events.PastAnswer(event.text))

    def played(self, now: float) -> None:
        """Time has gone on: what the client has played of what was sent."""
        if (reached := self.playback.heard(now)) and not self._at_once:
            self._out.put(events.PlaybackPosition(*reached))

    @property
    def _at_once(self) -> bool:
        """What was sent counts as heard, as talk does not interrupt it: the client says where it stopped, if it did."""
        return self.config.uninterrupted and not self._paced

    def _responding(self) -> Response:
        """The response in progress; after a tool's results that nobody asked for, one more."""
        return self._response or self._begin(self._tuned, ResponseParams(), self._answer, self._written)

    def _said(self, event: events.AudioDelta, now: float) -> None:
        if self._response:
            self._response.say(event)
            item = self._response.message
            offset = self.playback.send(now, item, event.answer, event.sample, len(event.pcm), event.rate)
            if self._paced and event.words:
                self._words(event, item, offset - event.sample / event.rate, self._response.begun)
            if self._at_once:
                self._out.put(events.PlaybackPosition(event.answer, event.sample + len(event.pcm)))
        elif not self._sent:  # else it was taken up again at a word, and its response is done
            self._late.append(event)

    def _words(self, event: events.AudioDelta, item: str, before: float, begun: int) -> None:
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
        self._out.send("attend.words", item_id=item, words=words)

    def _called(self, event: events.ToolCalled) -> None:
        call_id = self._out.new("call")
        self._responding().call(event, call_id)
        remember(self._calls, call_id, event.call)
        self._waits.add(event.call)
        if not event.more:
            self._end("stop")

    def _end(self, finish: str, heard: int | None = None) -> None:
        """The response in progress is done."""
        response, self._response = self._response, None
        if response:
            response.finish(finish, heard)
            if not self._waits:
                self._tune(self.config)

    def _over(self, event: events.AnswerDone) -> None:
        if event.finish == "interrupted":
            self.playback.stop()
        if event.answer != self._answer:
            return
        if self._sent and event.finish == "interrupted":
            self._sent.shorten(event.heard)
        self._answer, self._sent = None, None
        self._late.clear()
        if self._response and self._response.answer == event.answer:
            self._end(event.finish, event.heard if event.finish == "interrupted" else None)
        if self._waits:  # for tools: what they bring now is kept for later
            for number, value in self._returned.items():
                self._out.put(events.ToolResult(number, value))
            self._waits.clear()
            self._returned.clear()
            self._tune(self.config)
