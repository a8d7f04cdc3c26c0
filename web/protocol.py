"""OpenAI Realtime (GA): a client's events → inputs of a session, events of a session → server events. Pure: no socket, no clock.

Whoever calls hands on what stands in `inputs` (to the session) and in `out` (to the client) after each call, in order, and
says what time it is in seconds. A response is one answer, or one stretch of it up to the tools whose results it needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from agent import events
from agent.events import Event, Input
from agent.turns import Manners
from streams.frames import FRAME, RATE
from web import items
from web.audio import Playback
from web.buffer import Buffer
from web.config import DETECTION, Config
from web.given import ID, Refused, choice, mapping, parse, text, whole
from web.items import Items, Json
from web.response import Response, metadata, status_of

EXTENSIONS = ("camera", "marks", "timeline", "playback", "queue")  # the last is the server's affair
KEPT = 1000  # turns, pictures and calls that are known by their ids
OUTPUT = 65_536  # characters of a function's output

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Tune:
    """Settings of a session that hold from its next answer on. `most`: tokens, None as many as it allows."""

    answers: bool
    spoken: bool
    most: int | None


class Conversation:
    """`name` is part of every id. `voice` is what the answers' voice is called, None where there is none."""

    def __init__(
        self,
        name: str,
        model: str,
        voice: str | None = None,
        extensions: frozenset[str] = frozenset(),
        manners: Manners | None = None,
        instructions: str = "",
    ) -> None:
        self.inputs: list[Input | Tune] = []
        self.out: list[Json] = []
        self.playback = Playback()
        self.config = self._tuned = Config(
            instructions, spoken=voice is not None, detection=DETECTION
        )  # what the session was told
        self._name, self._model, self._voice, self._can_speak = name, model, voice or "none", voice is not None
        self._extensions, self._manners = extensions, manners or Manners()
        self._count = 0
        self._about: str | None = None  # the event_id of the client's event that is being done
        self._items = Items(self._send)
        self._system: list[str] = []  # messages of the system, which stand with the instructions
        self._buffer = Buffer(self.inputs.append, self._new, self.config.input)
        self._turns: dict[int, str] = {}  # item of each turn
        self._ours: set[int] = set()  # turns that the client opened itself, so that nobody need tell it
        self._speaking: int | None = None  # the open turn
        self._start = 0  # where it begins
        self._frames = 0  # of the turns since the last answer
        self._shown: deque[tuple[bytes, str]] = deque(maxlen=64)  # pictures that the session has not looked at, and their ids
        self._pictures: dict[int, str] = {}
        self._response: Response | None = None
        self._answer: int | None = None  # from Answering to Answered
        self._wrote = 0  # characters of it
        self._calls: dict[str, int | None] = {}  # by call_id: the session's number, None once nobody waits
        self._returned: dict[int, str] = {}  # by that number
        self._late: list[events.Said] = []  # sound of an answer that waits for tools, and goes on in the next response
        self._send("session.created", session=self.config.as_json(name, model, self._voice))
        self._tune(self.config, always=True)

    # -- the client's events

    def receive(self, message: str | bytes, now: float) -> None:
        self._about = None
        try:
            event = parse(message)
            if isinstance(id := event.get("event_id"), str):
                self._about = id[:512].encode(errors="replace").decode()
            kind = event.get("type")
            match kind:
                case "session.update":
                    self._update(event)
                case "input_audio_buffer.append":
                    self._buffer.append(items.sound(event.get("audio"), "audio", self.config.input))
                case "input_audio_buffer.commit":
                    self._commit()
                case "input_audio_buffer.clear":
                    self._buffer.clear()
                    self._send("input_audio_buffer.cleared")
                case "conversation.item.create":
                    self._create(event)
                case "conversation.item.retrieve":
                    self._send("conversation.item.retrieved", item=self._items.known(event.get("item_id")).json)
                case "conversation.item.truncate":
                    self._truncate(event)
                case "conversation.item.delete":
                    self._delete(event)
                case "response.create":
                    self._respond(event, now)
                case "response.cancel":
                    self._cancel(event)
                case "attend.camera.frame" if "camera" in self._extensions:
                    self._frame(event)
                case _:
                    raise Refused("there is no such event" if isinstance(kind, str) else "type must be a string", param="type")
        except Refused as refused:
            self.error(str(refused), "invalid_request_error", refused.code, refused.param)
        self._about = None

    def _update(self, event: Json) -> None:
        new, was = self.config.updated(mapping(event.get("session"), "session")), self.config
        self.config = new = replace(new, spoken=new.spoken and self._can_speak)
        if new.detection is None and self._speaking is not None and self._speaking not in self._ours:
            self.inputs.append(events.Forget())
        self._buffer.set(new.input, manual=new.detection is None)
        if new.detection != was.detection:
            self.inputs.append(events.Set(manners=new.manners(self._manners)))
        self._tune(new)
        self._send("session.updated", session=new.as_json(self._name, self._model, self._voice))

    def _tune(self, config: Config, always: bool = False) -> None:
        """The session answers by `config` from now on."""
        was, self._tuned = self._tuned, config
        if always or config.setting != was.setting:
            system = "\n\n".join(filter(None, [config.instructions, *self._system]))
            self.inputs.append(events.Set(setting=replace(config.setting, system=system or None)))
        self.inputs.append(Tune(self.config.answers, config.spoken, config.most))

    # -- sound

    def _commit(self) -> None:
        if self.config.detection is None:
            self._committed(self._buffer.commit())
        elif self._speaking is None:
            raise Refused("nothing was said that could be committed", "input_audio_buffer_commit_empty")
        else:
            self.inputs.append(events.Commit(ask=False))

    def _committed(self, id: str, of: int | None = None) -> None:
        self._send("input_audio_buffer.committed", item_id=id, previous_item_id=self._items.last)
        self._items.done(self._items.add(items.spoken(id), of))

    # -- items

    def _create(self, event: Json) -> None:
        raw = mapping(event.get("item"), "item")
        id = items.given_id(raw, self._items) or self._new("item")
        after = event.get("previous_item_id")
        if after is not None and after != "root" and text(after, "previous_item_id", ID) not in self._items:
            raise Refused(f"there is no item {after!r}", "item_not_found", "previous_item_id")
        kind = choice(raw.get("type"), "item.type", ("message", "function_call_output", "function_call"))
        if kind == "function_call":
            raise Refused("calls come from the model; a client sends what came of them", param="item.type")
        json = self._output(raw, id) if kind == "function_call_output" else self._message(raw, id)
        self._items.done(self._items.add(json, after=after))

    def _output(self, raw: Mapping[str, Any], id: str) -> Json:
        call = text(raw.get("call_id"), "item.call_id", ID)
        if call not in self._calls:
            raise Refused(f"there is no call {call!r}", "item_not_found", "item.call_id")
        value = text(raw.get("output"), "item.output", OUTPUT)
        if (number := self._calls[call]) is not None:
            self._returned[number] = value
        return items.item(id, "function_call_output", call_id=call, output=value)

    def _message(self, raw: Mapping[str, Any], id: str) -> Json:
        role = choice(raw.get("role"), "item.role", ("user", "assistant", "system"))
        if role == "user":
            json, parts = items.user(raw, id, self.config.input)
            for part in parts:
                self._take(part, id)
            return json
        if role == "assistant":
            said = items.words(raw, ("output_text", "output_audio"))
            self.inputs.append(events.Recall(said))
            return items.answered(id, "completed", said, sound=False)
        said = items.words(raw, ("input_text",))
        text("\n\n".join([*self._system, said]), "system messages")
        self._system.append(said)
        self._tune(self.config, always=True)
        return items.item(id, "message", role="system", content=[{"type": "input_text", "text": said}])

    def _take(self, part: items.Part, id: str) -> None:
        if isinstance(part, events.Show):
            self._shown.append((part.data, id))
        if isinstance(part, np.ndarray):
            self._buffer.add(id, part)
        else:
            self._buffer.put(part)

    def _delete(self, event: Json) -> None:
        item = self._items.known(event.get("item_id"))
        if self._response and self._response.holds(item):
            raise Refused("the item is being written; cancel its response first", param="item_id")
        if item.of is not None:
            self.inputs.append(events.Delete(item.of))
        self._items.delete(item)

    def _truncate(self, event: Json) -> None:
        item = self._items.known(event.get("item_id"))
        index = whole(event.get("content_index", 0), "content_index", 0, 0)
        ms = whole(event.get("audio_end_ms"), "audio_end_ms", 0, 1 << 40)
        if (place := self.playback.place(item.id, ms)) is None:
            raise Refused("only what the assistant has spoken can be truncated", param="item_id")
        answer, sample, ms = place
        self.inputs.append(events.Truncate(answer, sample))
        if answer == self._answer:
            self.playback.stop()
            self._stop()
        if self.playback.place(item.id, ms + 1) != (answer, sample, ms):  # not all was heard: which words, the session knows
            item.json = {**item.json, "status": "incomplete", "content": [{"type": "output_audio", "transcript": None}]}
        self._send("conversation.item.truncated", item_id=item.id, content_index=index, audio_end_ms=ms)

    def _frame(self, event: Json) -> None:
        id = text(event["frame_id"], "frame_id", ID) if event.get("frame_id") is not None else self._new("frame")
        show = events.Show(items.picture(event.get("image_url"), "image_url"), live=True)
        self._shown.append((show.data, id))
        self.inputs.append(show)

    # -- responses

    def _respond(self, event: Json, now: float) -> None:
        given = mapping(event.get("response") or {}, "response")
        if self._response:
            raise Refused("a response is being given already", "conversation_already_has_active_response")
        if given.get("conversation", "auto") not in ("auto", None):
            raise Refused("a response beside the conversation cannot be given", "unsupported", "response.conversation")
        if given.get("input") is not None:
            raise Refused("a response to other items than the conversation's cannot be given", "unsupported", "response.input")
        config = self.config.answering(given, "response")
        config = replace(config, spoken=config.spoken and self._can_speak)
        said = metadata(given.get("metadata"))
        if self._answer is not None:  # it waits for its tools
            self._begin(replace(config, spoken=self._tuned.spoken, most=self._tuned.most), said, self._answer)
            for number in [number for number in self._calls.values() if number is not None]:
                self.inputs.append(events.Returned(number, self._returned.get(number, {"error": "there is no result"})))
            self._settle()
            late, self._late = self._late, []
            for sound in late:
                self._said(sound, now)
            return
        if config != self._tuned:
            self._tune(config)
        self._begin(config, said)
        self.inputs.append(events.Ask())

    def _begin(self, config: Config, said: Mapping[str, str] | None = None, answer: int | None = None) -> Response:
        self._response = response = Response(config, said, self._voice, self._name, self._send, self._items, self._new)
        response.answer = answer
        return response

    def _cancel(self, event: Json) -> None:
        id = event.get("response_id")
        if self._response is None or (id is not None and id != self._response.id):
            raise Refused("there is no such response in progress", "response_cancel_not_active", "response_id")
        self._stop()

    def _stop(self) -> None:
        if self._response:
            self._response.cancelled = True
        self.inputs.append(events.Stop())

    def _settle(self) -> None:
        """Nobody waits for a tool any more."""
        self._calls = dict.fromkeys(self._calls)
        self._returned.clear()

    # -- the session's events

    def tell(self, event: Event, now: float) -> None:
        match event:
            case events.Started():
                self._started(event)
            case events.Stopped():
                self._stopped(event)
            case events.Dismissed():
                self._dismissed(event)
            case events.Captioned():
                self._captioned(event)
            case events.Looked():
                self._looked(event)
            case events.Answering():
                self._answer, self._wrote, self._buffer.answering = event.answer, 0, True
                if self._response is None:
                    self._begin(self._tuned)
                assert self._response
                self._response.answer = event.answer
            case events.Wrote():
                self._responding().write(event.text)
                self._wrote += len(event.text)
            case events.Said():
                self._said(event, now)
            case events.Cleared() if "playback" in self._extensions and self._response and self._response.open:
                self.playback.stop()
                self._send("attend.cleared", item_id=self._response.message)
            case events.Called():
                self._called(event)
            case events.Marked() if "marks" in self._extensions:
                self._marked(event)
            case events.Answered():
                self._answered(event)
            case events.Timed() if "timeline" in self._extensions:
                self._send("attend.timeline", answer=event.answer, stages_ms=dict(event.stages), waiting=event.waiting)
            case events.Quiet():
                self._quiet(event)
            case events.Noted():
                self.error(event.message, "server_error", "noted")
            case events.Failed():
                self.error(event.message, "server_error", "session_failed")

    def played(self, now: float) -> None:
        """Time has gone on: what the client has played of what was sent."""
        if reached := self.playback.heard(now):
            self.inputs.append(events.Heard(*reached))

    def _started(self, event: events.Started) -> None:
        self._speaking, self._start = event.turn, event.start
        item = self._buffer.begun()
        if item:
            self._ours.add(event.turn)
        else:
            item = self._new("item")
            self._send("input_audio_buffer.speech_started", audio_start_ms=_ms(event.start), item_id=item)
        _remember(self._turns, event.turn, item)

    def _stopped(self, event: events.Stopped) -> None:
        self._speaking, self._frames = None, self._frames + (event.at - self._start) // FRAME
        id = self._turns.get(event.turn)
        if event.turn in self._ours:
            self._ours.discard(event.turn)
            if item := self._items.get(id):
                item.of = event.turn
        elif id:
            self._send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(event.end), item_id=id)
            self._committed(id, event.turn)

    def _dismissed(self, event: events.Dismissed) -> None:
        self._speaking = None
        item = self._turns.pop(event.turn, None)
        if event.turn in self._ours:
            self._ours.discard(event.turn)
        elif item:
            self._send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(event.at), item_id=item)
            self._send("input_audio_buffer.cleared")

    def _captioned(self, event: events.Captioned) -> None:
        if (item := self._items.get(self._turns.get(event.turn))) is None:
            return
        silent = [
            n for n, part in enumerate(item.json["content"]) if part["type"] == "input_audio" and part["transcript"] is None
        ]
        if not silent:
            return
        content = list(item.json["content"])
        content[silent[0]] = {**content[silent[0]], "transcript": event.text}
        item.json = {**item.json, "content": content}
        if self.config.transcription:
            at, kind = {"item_id": item.id, "content_index": silent[0]}, "conversation.item.input_audio_transcription"
            self._send(f"{kind}.delta", **at, delta=event.text)
            usage = {"type": "tokens", "input_tokens": 0, "output_tokens": 0, "total_tokens": 0}  # it is not a model of its own
            self._send(f"{kind}.completed", **at, transcript=event.text, usage=usage)

    def _looked(self, event: events.Looked) -> None:
        while self._shown:
            data, id = self._shown.popleft()
            if data is event.data:
                _remember(self._pictures, event.picture, id)
                if "camera" in self._extensions:
                    self._send("attend.camera.looked", frame_id=id)
                return

    def _marked(self, event: events.Marked) -> None:
        frame = None if event.picture is None else self._pictures.get(event.picture)
        mark = {"box_2d": list(event.mark.box), "label": event.mark.label}
        response = self._response.id if self._response else None
        self._send("attend.mark", response_id=response, frame_id=frame, mark=mark)

    def _responding(self) -> Response:
        """The response in progress; after a tool's results that nobody asked for, one more."""
        return self._response or self._begin(self._tuned, answer=self._answer)

    def _said(self, event: events.Said, now: float) -> None:
        if self._response is None:
            self._late.append(event)
            return
        self._response.say(event)
        item, begun = self._response.message, self._wrote - self._response.written
        offset = self.playback.send(now, item, event.answer, event.sample, len(event.pcm), event.rate)
        if "playback" in self._extensions and event.words:
            words = [
                {
                    "start": word.start - begun,
                    "end": word.end - begun,
                    "audio_ms": round((offset + (word.sample - event.sample) / event.rate) * 1000),
                }
                for word in event.words
                if word.start >= begun  # else of an item before the tools
            ]
            self._send("attend.words", item_id=item, words=words)

    def _called(self, event: events.Called) -> None:
        response, call = self._responding(), self._new("call")
        _remember(self._calls, call, event.call)
        response.call(event, call)
        if not event.more:
            self._response = None
            response.finish("completed")

    def _answered(self, event: events.Answered) -> None:
        response, self._response, self._answer = self._response, None, None
        self._late.clear()
        self._settle()
        if event.finish == "interrupted":
            self.playback.stop()
        if response:
            status, details = status_of(event.finish, response.cancelled)
            heard = event.text[: event.heard] if event.finish == "interrupted" else None
            response.finish(status, details, self._usage(event), heard)
        self._tune(self.config)
        self._buffer.answered()

    def _usage(self, event: events.Answered) -> Json:
        sound, self._frames = min(self._frames, event.prompt), 0  # pictures are counted with the text
        return {
            "total_tokens": event.prompt + event.tokens,
            "input_tokens": event.prompt,
            "output_tokens": event.tokens,
            "input_token_details": {"text_tokens": event.prompt - sound, "audio_tokens": sound},
            "output_token_details": {"text_tokens": event.tokens, "audio_tokens": 0},
        }

    def _quiet(self, event: events.Quiet) -> None:
        item, idle = self._new("item"), (self.config.detection or {}).get("idle_timeout_ms") or 0
        end = _ms(event.at)
        self._send("input_audio_buffer.timeout_triggered", audio_start_ms=max(0, end - idle), audio_end_ms=end, item_id=item)
        self._committed(item)
        if self._response is None and self._answer is None:
            self._begin(self._tuned)
            self.inputs.append(events.Ask())

    # -- out

    def error(self, message: str, type: str, code: str, param: str | None = None) -> None:
        wrong = {"type": type, "code": code, "message": message, "param": param, "event_id": self._about}
        self._send("error", error=wrong)

    def _send(self, type: str, **fields: Any) -> None:
        self.out.append({"type": type, "event_id": self._new("event"), **fields})

    def _new(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._name}_{self._count}"


def _ms(samples: int) -> int:
    return samples * 1000 // RATE


def _remember(known: dict[K, V], key: K, value: V) -> None:
    known[key] = value
    if len(known) > KEPT:
        del known[next(iter(known))]
