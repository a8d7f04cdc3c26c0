"""All responses of a conversation: a client's requests → session inputs, the session's answers → server events. Pure.

A response is one answer, or the part of it up to tool calls whose results it needs. It is done as soon as all of it has been
sent; the answer lasts until it has been played, and may still be interrupted then. With the extension `playback` audio is sent as
it is played, and a response lasts as long as its answer. An out-of-band response is an answer of its own (events.OutOfBandEvent).
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
    """`config`: the session's configuration. `voice`: the name of the TTS voice, None without one. `playback`: the client gets
    audio as it is played. `pictures`: item ids by the session's numbers of pictures."""

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
        self._system: list[str] = []  # system messages, which follow the instructions in the system prompt
        self._configured = config  # what the session was last configured with
        self._response: Response | None = None  # in progress in the conversation
        self._answer: int | None = None  # the session's current answer, from its start until it has been played
        self._sent: Response | None = None  # the response in which the end of the answer was sent
        self._written = 0  # characters of the answer so far
        self._out_of_band: dict[str, Response] = {}
        self._calls: dict[str, int] = {}  # the session's number of a call, by call_id
        self._client_calls: dict[str, ToolCall] = {}  # calls that the client added, by call_id
        self._pending_calls: set[int] = set()  # calls whose results the answer needs to continue
        self._results: dict[int, str] = {}  # results so far
        self._deferred_audio: list[events.AudioDelta] = []  # audio of an answer that waits for tools; sent in the next response
        self._configure(config, always=True)

    @property
    def active(self) -> Response | None:
        """The response in progress in the conversation."""
        return self._response or next(
            (response for response in self._out_of_band.values() if response.conversation is not None), None
        )

    @property
    def busy(self) -> bool:
        """An answer was requested, or is being generated or played."""
        return self._answer is not None or self._response is not None

    def holds(self, item: ConversationItem) -> bool:
        return any(response.holds(item) for response in self._in_progress())

    def _in_progress(self) -> Iterator[Response]:
        if self._response:
            yield self._response
        yield from self._out_of_band.values()

    # -- the session's configuration

    def update(self, config: SessionConfig) -> None:
        self.config = self._with_voice(config)
        self._configure(self.config)

    def add_system(self, message: str) -> None:
        """Adds a system message, which applies from the next answer on. Raises InvalidRequest if there is too much text."""
        if sum(map(len, self._system)) + len(message) > TEXT:
            raise InvalidRequest(f"the messages of the system have more than {TEXT:,} characters", "string_above_max_length")
        self._system.append(message)
        self._configure(self.config, always=True)

    def session(self, model: str) -> Json:
        return self.config.as_json(self._out.id, model, self._voice or "none")

    def _with_voice(self, config: SessionConfig) -> SessionConfig:
        return replace(config, spoken=config.spoken and self._voice is not None)

    def _configure(self, config: SessionConfig, always: bool = False) -> None:
        """Sends `config` to the session where it changed. Whether turns are answered at all comes from `self.config`."""
        was, self._configured = self._configured, config
        if config == was and not always:
            return
        setting = self._system_prompt(config, self._system) if always or config.setting != was.setting else None
        limit, answers = config.max_tokens or MAX_TOKENS, self.config.answers
        self._out.put(events.UpdateSettings(setting, answers=answers, max_tokens=limit, spoken=config.spoken, calls=config.calls))

    def _system_prompt(self, config: SessionConfig, system: list[str]) -> SystemPrompt:
        return replace(config.setting, system="\n\n".join(filter(None, [config.instructions, *system])) or None)

    # -- requests of the client

    def create(self, params: ResponseParams, now: float) -> None:
        """Starts a response. Raises InvalidRequest if that is not possible now."""
        out_of_band = params.conversation == "none"
        if not out_of_band and self.active:
            code = "conversation_already_has_active_response"
            raise InvalidRequest("a response is being given already", code)
        config = self._with_voice(self.config.of_response(params, "response"))
        if out_of_band or params.input is not None:
            self._create_out_of_band(params, config)
        elif self._pending_calls:
            self._continue(params, config, now)
        else:
            self._configure(config)
            self._start(config, params)
            self._out.put(events.CreateAnswer())

    def _create_out_of_band(self, params: ResponseParams, config: SessionConfig) -> None:
        if len(self._out_of_band) == OUT_OF_BAND:
            raise InvalidRequest(f"{OUT_OF_BAND} responses out of band are being given already", "too_many_responses")
        past, system = None, self._system
        if params.input is not None:
            reader = ResponseInput(self._items, self._pictures, self._client_calls, self.config.input)
            past, system = reader.read(params.input), reader.system
        conversation = None if params.conversation == "none" else self._items
        response = Response(self._out, config, params, self._voice or "none", conversation)
        self._out_of_band[response.id] = response
        asked = self._system_prompt(config, system), config.max_tokens, config.spoken, config.calls
        self._out.put(events.CreateOutOfBandResponse(response.id, past, *asked))

    def _continue(self, params: ResponseParams, config: SessionConfig, now: float) -> None:
        """Continues the answer with its tools' results, in a new response."""
        config = replace(config, spoken=self._configured.spoken, max_tokens=self._configured.max_tokens)
        self._start(config, params, self._answer, self._written)
        for number in sorted(self._pending_calls):
            self._out.put(events.ToolResult(number, self._results.get(number, {"error": "there is no result"})))
        self._pending_calls.clear()
        self._results.clear()
        deferred, self._deferred_audio = self._deferred_audio, []
        for sound in deferred:
            self._audio(sound, now)

    def _start(self, config: SessionConfig, params: ResponseParams, answer: int | None = None, base: int = 0) -> Response:
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
        """Truncates an item's audio at `ms`. Returns `ms` limited to its length. `talking`: because the user speaks over it."""
        if (place := self.playback.place(item.id, ms)) is None:
            raise InvalidRequest("Only model output audio messages can be truncated", "unsupported_content_type", "item_id")
        answer, sample, heard = place
        self._out.put(events.TruncateAnswer(answer, sample))
        if answer == self._answer:
            self.playback.stop()
            if self._response and self._response.answer == answer:
                self._response.cancelled = not talking
        if self.playback.place(item.id, heard + 1) != place:  # not all was heard; only the session knows which words were
            item.json = {**item.json, "status": "incomplete", "content": [{"type": "output_audio", "transcript": None}]}
        return heard

    def add_client_call(self, given: FunctionCallItem, id: str) -> Json:
        """Adds a call of the client's history as an item; the session gets it together with its result."""
        call_id = self._out.new("call") if given.call_id is None else given.call_id
        if call_id in self._calls or call_id in self._client_calls:
            raise InvalidRequest(f"item.call_id {call_id!r} is taken", param="item.call_id")
        remember(self._client_calls, call_id, items.tool_call(given, "item"))
        return items.function_call(id, call_id, given.name, given.arguments, "completed")

    def add_call_output(self, given: FunctionCallOutputItem, id: str) -> Json:
        """Passes on the result of a call and returns its item. Raises InvalidRequest if there is no such call."""
        call_id, output = given.call_id, given.output
        if call_id in self._client_calls:
            self._out.put(events.PastAnswer("", ((self._client_calls[call_id], output),)))
        elif (number := self._calls.get(call_id)) is None:
            raise InvalidRequest(f"there is no call {call_id!r}", "item_not_found", "item.call_id")
        elif number in self._pending_calls:
            self._results[number] = output
        else:
            self._out.put(events.ToolResult(number, output))
        return items.item(id, "function_call_output", call_id=call_id, output=output)

    # -- events of the session

    def handle_event(self, event: Event, now: float) -> None:
        """Handles one event of the session."""
        match event:
            case events.AnswerStarted(answer):
                self._answer, self._sent, self._written = answer, None, 0
                response = self._response or self._start(self._configured, ResponseParams())
                response.answer = answer
            case events.TextDelta():
                self._current().add_text(event.text)
                self._written += len(event.text)
            case events.AudioDelta():
                self._audio(event, now)
            case events.OutputCleared() if event.answer == self._answer:
                self.playback.stop()
                if self._paced and self._response and self._response.open:
                    self._out.send("attend.cleared", item_id=self._response.message)
            case events.UsageCounted() if self._response and self._response.answer == event.answer:
                self._response.usage = event
            case events.ToolCalled():
                self._tool_called(event)
            case events.OutputSent() if not self._paced:
                self._sent = self._response
                self._finish_response(event.finish)
            case events.AnswerDone():
                self._answer_done(event)
            case events.OutOfBandEvent(name, inner) if name in self._out_of_band:
                self._out_of_band_event(self._out_of_band[name], inner)

    def _out_of_band_event(self, response: Response, event: object) -> None:
        match event:
            case events.TextDelta():
                response.add_text(event.text)
            case events.AudioDelta():
                response.add_audio(event)
                heard = events.PlaybackPosition(event.answer, event.sample + len(event.pcm))
                self._out.put(events.OutOfBandEvent(response.id, heard))
            case events.ToolCalled():  # the response ends here; the client may add the call with its result to the conversation
                response.add_call(event, call_id := self._out.new("call"))
                remember(self._client_calls, call_id, event.tool)
            case events.UsageCounted():
                response.usage = event
            case events.AnswerDone():
                del self._out_of_band[response.id]
                response.finish(event.finish)
                if response.conversation is not None and event.text.strip():
                    self._out.put(events.PastAnswer(event.text))

    def played(self, now: float) -> None:
        """Reports to the session how much the client has played by now."""
        if (reached := self.playback.heard(now)) and not self._heard_when_sent:
            self._out.put(events.PlaybackPosition(*reached))

    @property
    def _heard_when_sent(self) -> bool:
        """Whether audio counts as heard once it is sent: speech does not interrupt it, and the client truncates if it stops."""
        return self.config.uninterrupted and not self._paced

    def _current(self) -> Response:
        """The response in progress; starts one if the answer continues without response.create after a tool's result."""
        return self._response or self._start(self._configured, ResponseParams(), self._answer, self._written)

    def _audio(self, event: events.AudioDelta, now: float) -> None:
        if self._response:
            self._response.add_audio(event)
            item = self._response.message
            offset = self.playback.send(now, item, event.answer, event.sample, len(event.pcm), event.rate)
            if self._paced and event.words:
                self._send_words(event, item, offset - event.sample / event.rate, self._response.begun)
            if self._heard_when_sent:
                self._out.put(events.PlaybackPosition(event.answer, event.sample + len(event.pcm)))
        elif not self._sent:  # else it was resumed at an earlier word, and its response is already done
            self._deferred_audio.append(event)

    def _send_words(self, event: events.AudioDelta, item: str, before: float, begun: int) -> None:
        """Sends the position of each word in the item's text and audio, without words of an item before the tool calls."""
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

    def _tool_called(self, event: events.ToolCalled) -> None:
        call_id = self._out.new("call")
        self._current().add_call(event, call_id)
        remember(self._calls, call_id, event.call)
        self._pending_calls.add(event.call)
        if not event.more:
            self._finish_response("stop")

    def _finish_response(self, finish: str, heard: int | None = None) -> None:
        """Finishes the response in progress."""
        response, self._response = self._response, None
        if response:
            response.finish(finish, heard)
            if not self._pending_calls:
                self._configure(self.config)

    def _answer_done(self, event: events.AnswerDone) -> None:
        if event.finish == "interrupted":
            self.playback.stop()
        if event.answer != self._answer:
            return
        if self._sent and event.finish == "interrupted":
            self._sent.truncate(event.heard)
        self._answer, self._sent = None, None
        self._deferred_audio.clear()
        if self._response and self._response.answer == event.answer:
            self._finish_response(event.finish, event.heard if event.finish == "interrupted" else None)
        if self._pending_calls:  # the answer no longer waits for its tools; the session keeps their results for later
            for number, value in self._results.items():
                self._out.put(events.ToolResult(number, value))
            self._pending_calls.clear()
            self._results.clear()
            self._configure(self.config)
