"""OpenAI Realtime (GA): a client's events → inputs of a session, events of a session → server events. Pure: no socket, no clock.

Whoever calls hands on what stands in `inputs` (to the session) and in `out` (to the client) after each call, in order, and
says what time it is in seconds. A response is one answer, or one stretch of it up to the tools whose results it needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from agent import events
from agent.events import Event, Input
from agent.turns import Manners
from streams.frames import RATE
from web import items
from web.answers import Answers, Wire
from web.buffer import Buffer
from web.config import DETECTION, Config
from web.given import ID, Refused, choice, data, mapping, parse, remember, text, whole
from web.items import Items, Json

EXTENSIONS = ("camera", "marks", "timeline", "playback", "notes", "queue")  # the last is the server's affair


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
        self.inputs: list[Input] = []
        self.out: list[Json] = []
        self._name, self._model = name, model
        self._extensions, self._manners, self._paced = extensions, manners or Manners(), "playback" in extensions
        self._count = 0
        self._about: str | None = None  # the event_id of the client's event that is being done
        config = Config(instructions, spoken=voice is not None, detection=DETECTION)
        self._items = Items(self._send)
        self._buffer = Buffer(self.inputs.append, config.input)
        self._pictures: dict[int, str] = {}
        wire = Wire(name, self.inputs.append, self._send, self._new)
        self._answers = Answers(wire, self._items, self._pictures, config, voice, self._paced)
        self._turns: dict[int, str] = {}  # item of each turn
        self._speaking: str | None = None  # item of the open turn, where the client does not commit
        self._named = False  # the turn that began last came from the client as a whole
        self._talk: str | None = None  # item of the turn that talk over an answer may become
        self._idle: tuple[float, events.Quiet] | None = None  # since when nobody says anything, were all played
        self._shown: deque[tuple[bytes, str]] = deque(maxlen=64)  # pictures that the session has not looked at, and their ids
        self._send("session.created", session=self._answers.session(model))

    @property
    def config(self) -> Config:
        """What the session was told."""
        return self._answers.config

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
                    self._buffer.append(data(event.get("audio"), "audio", items.SOUND))
                case "input_audio_buffer.commit":
                    self._commit()
                case "input_audio_buffer.clear":
                    self._buffer.clear()
                    self._send("input_audio_buffer.cleared")
                case "conversation.item.create":
                    self._create(event)
                case "conversation.item.retrieve":
                    self._send("conversation.item.retrieved", item=self._known(event, "retrieve").json)
                case "conversation.item.truncate":
                    self._truncate(event)
                case "conversation.item.delete":
                    self._delete(event)
                case "response.create":
                    self._answers.create(mapping(event.get("response") or {}, "response"), now)
                    self._hold_sound()
                case "response.cancel":
                    self._answers.cancel(event.get("response_id"))
                case "attend.camera.frame" if "camera" in self._extensions:
                    self._frame(event)
                case _:
                    raise Refused("there is no such event" if isinstance(kind, str) else "type must be a string", param="type")
        except Refused as refused:
            self.error(str(refused), "invalid_request_error", refused.code, refused.param)
        self._about = None

    def _update(self, event: Json) -> None:
        new, was = self.config.updated(mapping(event.get("session"), "session")), self.config
        if new.detection is None and self._speaking is not None:
            self.inputs.append(events.Forget())
        self._buffer.set(new.input, new.detection is None, new.patient)
        if new.detection != was.detection:
            self.inputs.append(events.Set(manners=new.manners(self._manners)))
        self._answers.update(new)
        self._send("session.updated", session=self._answers.session(self._model))

    # -- sound

    def _commit(self) -> None:
        if self.config.detection is None:
            self._buffer.commit(id := self._new("item"))
            self._committed(id)
        elif self._speaking is None:
            raise Refused("nothing was said that could be committed", "input_audio_buffer_commit_empty")
        else:
            self.inputs.append(events.Commit(ask=False))

    def _known(self, event: Json, what: str) -> items.Item:
        return self._items.known(event.get("item_id"), code=f"item_{what}_invalid_item_id")

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
        match kind:
            case "function_call":
                json = self._answers.called(raw, id)
            case "function_call_output":
                json = self._answers.returned(raw, id)
            case _:
                json = self._message(raw, id)
        self._items.done(self._items.add(json, after=after))

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
        self._answers.say(said)
        return items.item(id, "message", role="system", content=[{"type": "input_text", "text": said}])

    def _take(self, part: items.Part, id: str) -> None:
        if isinstance(part, events.Show):
            self._shown.append((part.data, id))
        self.inputs.append(events.Recorded(part, id) if isinstance(part, np.ndarray) else part)

    def _delete(self, event: Json) -> None:
        item = self._known(event, "delete")
        if self._answers.holds(item):
            item.unwanted = True
        else:
            self._drop(item)

    def _drop(self, item: items.Item) -> None:
        if item.of is not None:
            self.inputs.append(events.Delete(item.of))
        self._items.delete(item)

    def _truncate(self, event: Json) -> None:
        item = self._known(event, "truncate")
        index = whole(event.get("content_index", 0), "content_index", 0, 0)
        ms = whole(event.get("audio_end_ms"), "audio_end_ms", 0, 1 << 40)
        ms = self._answers.truncate(item, ms, talking=self._talk is not None)
        self._send("conversation.item.truncated", item_id=item.id, content_index=index, audio_end_ms=ms)

    def _frame(self, event: Json) -> None:
        id = text(event["frame_id"], "frame_id", ID) if event.get("frame_id") is not None else self._new("frame")
        show = events.Show(items.picture(event.get("image_url"), "image_url"), live=True)
        self._shown.append((show.data, id))
        self.inputs.append(show)

    # -- the session's events

    def tell(self, event: Event, now: float) -> None:
        self._answers.tell(event, now)
        for item in self._answers.unwanted():
            self._drop(item)
        self._hold_sound()
        match event:
            case events.Started():
                self._started(event)
            case events.Stopped():
                self._stopped(event)
            case events.Dismissed():
                self._dismissed(event)
            case events.Cleared(start=int(start)) if not self._paced:
                self._talk = self._new("item")
                self._send("input_audio_buffer.speech_started", audio_start_ms=_ms(start), item_id=self._talk)
            case events.Passed() if self._talk:
                self._send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(event.at), item_id=self._talk)
                self._send("input_audio_buffer.cleared")
                self._talk = None
            case events.Captioned():
                self._captioned(event)
            case events.Uncaptioned():
                self._uncaptioned(event)
            case events.Looked():
                self._looked(event)
            case events.Marked() if "marks" in self._extensions:
                self._marked(event)
            case events.Timed() if "timeline" in self._extensions:
                self._send("attend.timeline", answer=event.answer, stages_ms=dict(event.stages), waiting=event.waiting)
            case events.Quiet():
                self._idle = self._answers.playback.end + (self.config.idle or 0) if self.config.patient else now, event
                self.played(now)
            case events.Noted(refused=True):
                self.error(event.message, "invalid_request_error", "invalid_value")
            case events.Noted() if "notes" in self._extensions:
                self._send("attend.note", message=event.message)
            case events.Failed():
                self.error(event.message, "server_error", "session_failed")

    def played(self, now: float) -> None:
        """Time has gone on."""
        self._answers.played(now)
        if self._idle and self._idle[0] <= now:
            self._quiet(self._idle[1])

    def _started(self, event: events.Started) -> None:
        self._idle, self._named = None, event.name is not None
        if event.name is not None:
            remember(self._turns, event.turn, event.name)
            return
        if self._talk:
            item, self._talk = self._talk, None
        else:
            item = self._new("item")
            self._send("input_audio_buffer.speech_started", audio_start_ms=_ms(event.start), item_id=item)
        self._speaking = item

    def _stopped(self, event: events.Stopped) -> None:
        if self._named:
            self._named = False
            if item := self._items.get(self._turns.get(event.turn)):
                item.of = event.turn
            else:  # it was deleted before the session came to it
                self.inputs.append(events.Delete(event.turn))
        elif id := self._speaking:
            self._speaking = None
            remember(self._turns, event.turn, id)
            self._send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(event.end), item_id=id)
            self._committed(id, event.turn)

    def _dismissed(self, event: events.Dismissed) -> None:
        if item := self._speaking:
            self._speaking = None
            self._send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(event.at), item_id=item)
            self._send("input_audio_buffer.cleared")

    def _silent(self, turn: int) -> tuple[items.Item, int] | None:
        """Where a turn's words belong: its item, and the part without a transcript."""
        if (item := self._items.get(self._turns.get(turn))) is None:
            return None
        parts = [n for n, part in enumerate(item.json["content"]) if part["type"] == "input_audio" and part["transcript"] is None]
        return (item, parts[0]) if parts else None

    def _captioned(self, event: events.Captioned) -> None:
        if (place := self._silent(event.turn)) is None:
            return
        item, part = place
        content = list(item.json["content"])
        content[part] = {**content[part], "transcript": event.text}
        item.json = {**item.json, "content": content}
        if self.config.transcription:
            at, kind = {"item_id": item.id, "content_index": part}, "conversation.item.input_audio_transcription"
            self._send(f"{kind}.delta", **at, delta=event.text)
            usage = {  # it is not a model of its own
                "type": "tokens",
                "input_tokens": 0,
                "input_token_details": {"text_tokens": 0, "audio_tokens": 0},
                "output_tokens": 0,
                "total_tokens": 0,
            }
            self._send(f"{kind}.completed", **at, transcript=event.text, usage=usage)

    def _uncaptioned(self, event: events.Uncaptioned) -> None:
        if (place := self._silent(event.turn)) and self.config.transcription:
            error = {"type": "server_error", "code": "transcription_failed", "message": event.message, "param": None}
            kind = "conversation.item.input_audio_transcription.failed"
            self._send(kind, item_id=place[0].id, content_index=place[1], error=error)

    def _looked(self, event: events.Looked) -> None:
        while self._shown:
            data, id = self._shown.popleft()
            if data is event.data:
                remember(self._pictures, event.picture, id)
                if "camera" in self._extensions:
                    self._send("attend.camera.looked", frame_id=id)
                return

    def _marked(self, event: events.Marked) -> None:
        frame = None if event.picture is None else self._pictures.get(event.picture)
        mark = {"box_2d": list(event.mark.box), "label": event.mark.label}
        response = self._answers.active
        self._send("attend.mark", response_id=response.id if response else None, frame_id=frame, mark=mark)

    def _quiet(self, event: events.Quiet) -> None:
        self._idle, item = None, self._new("item")
        end = _ms(event.at)
        start = max(0, end - round(1000 * (self.config.idle or 0)))
        self._send("input_audio_buffer.timeout_triggered", audio_start_ms=start, audio_end_ms=end, item_id=item)
        self._committed(item)
        if not (self._answers.active or self._answers.busy):
            self._answers.create({}, 0.0)

    def _hold_sound(self) -> None:
        """What is said is not to interrupt an answer, also one that was asked for and has not begun."""
        if self._answers.busy or self._answers.awaited:
            self._buffer.answering = True
        elif self._buffer.answering:
            self._buffer.answered()

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
