"""OpenAI Realtime (GA): a client's events → inputs of a session, events of a session → server events. No socket, no clock.

Whoever drives it hands on what `out` has taken after each call, to the client and to the session, in order, and says what time
it is in seconds. Each event of the reference is a method here, in the order of the reference.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from agent import events
from agent.events import Event
from agent.turns import TurnDetectionConfig
from streams.frames import RATE, Audio
from web import items, schema
from web.audio import BufferFull, InputAudioBuffer
from web.config import SERVER_VAD, SessionConfig
from web.items import ConversationItem, ConversationItems, Json
from web.outgoing import Outgoing, remember
from web.responses import Responses
from web.schema import AUDIO, InvalidRequest, ResponseParams, decoded

EXTENSIONS = ("camera", "marks", "timeline", "playback", "notes", "queue")  # the last is the server's affair
SHORTEST = 100  # milliseconds of a commit
SHOWN = 64 << 20  # bytes of pictures that the session has not looked at, and whose ids are known


class RealtimeProtocol:
    """One conversation. `id` is part of every id. `voice` is what the answers' voice is called, None where there is none."""

    def __init__(
        self,
        id: str,
        model: str,
        voice: str | None = None,
        extensions: frozenset[str] = frozenset(),
        detection: TurnDetectionConfig | None = None,
        instructions: str = "",
    ) -> None:
        self.out = Outgoing(id)
        self._model, self._extensions, self._detection = model, extensions, detection or TurnDetectionConfig()
        self._paced = "playback" in extensions
        self._event_id: str | None = None  # of the client's event that is being done
        config = SessionConfig(instructions, spoken=voice is not None, turn_detection=SERVER_VAD)
        self._items = ConversationItems(self.out)
        self._buffer = InputAudioBuffer(config.input)
        self._pictures: dict[int, str] = {}  # items and frames, by the session's number of the picture
        self._responses = Responses(self.out, self._items, config, voice, self._paced, self._pictures)
        self._turns: dict[int, str] = {}  # item of each turn
        self._speaking: str | None = None  # item of the open turn
        self._whole = False  # the turn that began last came from the client as a whole
        self._talk: str | None = None  # item of the turn that talk over an answer may become
        self._idle: tuple[float, events.UserIdle] | None = None  # since when nobody says anything, were all played
        self._shown: deque[tuple[bytes, str]] = deque(maxlen=64)  # pictures that the session has not looked at, and their ids
        self.out.send("session.created", session=self._responses.session(model))

    @property
    def config(self) -> SessionConfig:
        """What holds of the session."""
        return self._responses.config

    # -- client events

    def receive(self, message: str | bytes, now: float) -> None:
        self._event_id = None
        try:
            event = schema.parsed(message)
            if isinstance(id := event.get("event_id"), str):
                self._event_id = id[:512].encode(errors="replace").decode()
            self._receive(schema.client_event(event), now)
        except InvalidRequest as wrong:
            self.error(str(wrong), "invalid_request_error", wrong.code, wrong.param)
        self._event_id = None

    def _receive(self, event: schema.ClientEvent, now: float) -> None:
        match event:
            case schema.SessionUpdate():
                self._session_update(event)
            case schema.InputAudioBufferAppend():
                self._append(event)
            case schema.InputAudioBufferCommit():
                self._commit()
            case schema.InputAudioBufferClear():
                self._buffer.clear()
                self.out.put(events.DiscardTurn())
                self.out.send("input_audio_buffer.cleared")
            case schema.ConversationItemCreate():
                self._create(event)
            case schema.ConversationItemRetrieve():
                item = self._items.known(event.item_id, "item_retrieve_invalid_item_id")
                self.out.send("conversation.item.retrieved", item=item.json)
            case schema.ConversationItemTruncate():
                self._truncate(event)
            case schema.ConversationItemDelete():
                self._delete(event)
            case schema.ResponseCreate():
                self._responses.create(event.response or ResponseParams(), now)
                self._hold_sound()
            case schema.ResponseCancel():
                self._responses.cancel(event.response_id)
            case schema.AttendCameraFrame() if "camera" in self._extensions:
                self._camera_frame(event)
            case _:
                raise InvalidRequest("there is no such event without the extension `camera`", param="type")

    def _session_update(self, event: schema.SessionUpdate) -> None:
        was, now = self.config, self.config.updated(event.session)
        if (was.turn_detection is None) != (now.turn_detection is None):  # neither way may go on with the other's half
            self._buffer.clear()
            self.out.put(events.DiscardTurn())
        self._buffer.set(now.input, manual=now.turn_detection is None)
        if now.turn_detection != was.turn_detection:
            self.out.put(events.UpdateSettings(detection=now.detection(self._detection)))
        self._responses.update(now)
        self._hold_sound()
        self.out.send("session.updated", session=self._responses.session(self._model))

    def _append(self, event: schema.InputAudioBufferAppend) -> None:
        try:
            self.out.put(*self._buffer.append(decoded(event.audio, "audio", AUDIO)))
        except BufferFull as full:
            raise InvalidRequest(str(full), "input_audio_buffer_full", "audio") from None

    def _commit(self) -> None:
        empty = "input_audio_buffer_commit_empty"
        if self.config.turn_detection is not None:
            if self._speaking is None:
                raise InvalidRequest("nothing was said that could be committed", empty)
            self.out.put(events.CommitTurn(ask=False))
        elif (ms := self._buffer.milliseconds) < SHORTEST:
            raise InvalidRequest(f"a commit needs {SHORTEST} ms of audio, and there are {ms} ms", empty)
        else:
            id = self.out.new("item")
            self.out.put(*self._buffer.commit(), events.CommitTurn(ask=False, name=id))
            self._committed(id)

    def _committed(self, id: str, of: int | None = None) -> None:
        self.out.send("input_audio_buffer.committed", item_id=id, previous_item_id=self._items.last)
        self._items.done(self._items.add(items.user_audio(id), of))

    def _create(self, event: schema.ConversationItemCreate) -> None:
        given, after = event.item, event.previous_item_id
        if (id := given.id) is None:
            id = self.out.new("item")
        elif id in self._items:
            raise InvalidRequest(f"there is an item {id!r} already", "item_create_duplicate_item_id", "item.id")
        if after is not None and after != "root" and after not in self._items:
            raise InvalidRequest(f"there is no item {after!r}", "item_not_found", "previous_item_id")
        match given:
            case schema.FunctionCallItem():
                json = self._responses.bring_call(given, id)
            case schema.FunctionCallOutputItem():
                json = self._responses.bring_output(given, id)
            case schema.MessageItem():
                json = self._message(given, id)
        self._items.done(self._items.add(json, after=after))

    def _message(self, given: schema.MessageItem, id: str) -> Json:
        json, parts = items.parts(given, self.config.input, "item", id)
        if given.role == "system":
            self._responses.add_system(items.text(json["content"]))
        for part in parts:
            match part:
                case Audio():
                    self.out.put(events.RecordedInput(part.samples, id))
                case events.PictureInput():
                    self._show(part, id)
                case events.TextInput() | events.PastAnswer():
                    self.out.put(part)
        return json

    def _truncate(self, event: schema.ConversationItemTruncate) -> None:
        item = self._items.known(event.item_id, "item_truncate_invalid_item_id")
        ms = self._responses.truncate(item, event.audio_end_ms, talking=self._talk is not None)
        self.out.send("conversation.item.truncated", item_id=item.id, content_index=event.content_index, audio_end_ms=ms)

    def _delete(self, event: schema.ConversationItemDelete) -> None:
        item = self._items.known(event.item_id, "item_delete_invalid_item_id")
        if self._responses.holds(item):
            item.deleted = True  # when its response is over
        else:
            self._items.delete(item)

    def _camera_frame(self, event: schema.AttendCameraFrame) -> None:
        show = events.PictureInput(items.picture(event.image_url, "image_url"), live=True)
        self._show(show, self.out.new("frame") if event.frame_id is None else event.frame_id)

    def _show(self, show: events.PictureInput, id: str) -> None:
        self._shown.append((show.data, id))
        while sum(len(data) for data, _ in self._shown) > SHOWN and len(self._shown) > 1:
            self._shown.popleft()
        self.out.put(show)

    # -- the session's events

    def tell(self, event: Event, now: float) -> None:
        self._responses.tell(event, now)
        self._hold_sound()
        match event:
            case events.TurnStarted():
                self._started(event)
            case events.TurnStopped():
                self._stopped(event)
            case events.TurnDiscarded() if self._speaking:
                self._no_turn(self._speaking, event.at)
                self._speaking = None
            case events.OutputCleared(start=int(start)) if not self._paced:
                self._talk = self._speech_started(start)
            case events.FalseInterruption() if self._talk:
                self._no_turn(self._talk, event.at)
                self._talk = None
            case events.InputTranscribed():
                self._captioned(event)
            case events.InputTranscriptionFailed():
                self._uncaptioned(event)
            case events.PictureAttached():
                self._looked(event)
            case events.MarkAdded() if "marks" in self._extensions:
                self._marked(event)
            case events.AnswerTimings() if "timeline" in self._extensions:
                self.out.send("attend.timeline", answer=event.answer, stages_ms=dict(event.stages), waiting=event.waiting)
            case events.UserIdle():
                self._idle = self._since(now), event
                self.played(now)
            case events.Notice(refused=True):
                self.error(event.message, "invalid_request_error", "invalid_value")
            case events.Notice() if "notes" in self._extensions:
                self.out.send("attend.note", message=event.message)
            case events.SessionFailed():
                self.error(event.message, "server_error", "session_failed")

    def played(self, now: float) -> None:
        """Time has gone on."""
        self._responses.played(now)
        if self._idle and self._idle[0] <= now:
            self._timeout(self._idle[1])

    def _hold_sound(self) -> None:
        """What is said during an answer that is not to be interrupted is heard after it."""
        detection = self.config.turn_detection
        holds = detection is not None and not detection["interrupt_response"] and self._responses.busy
        self.out.put(*self._buffer.hold(holds))

    def _speech_started(self, start: int) -> str:
        """The item that what is said may become."""
        id = self.out.new("item")
        self.out.send("input_audio_buffer.speech_started", audio_start_ms=_ms(start), item_id=id)
        return id

    def _no_turn(self, item: str, at: int) -> None:
        self.out.send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(at), item_id=item)
        self.out.send("input_audio_buffer.cleared")

    def _started(self, event: events.TurnStarted) -> None:
        self._idle, self._whole = None, event.name is not None
        if event.name is not None:
            remember(self._turns, event.turn, event.name)
        else:
            self._speaking, self._talk = self._talk or self._speech_started(event.start), None

    def _stopped(self, event: events.TurnStopped) -> None:
        if self._whole:
            self._whole = False
            if item := self._items.get(self._turns.get(event.turn)):
                item.of = event.turn
            else:  # it was deleted before the session came to it
                self.out.put(events.DeleteEntry(event.turn))
        elif id := self._speaking:
            self._speaking = None
            remember(self._turns, event.turn, id)
            self.out.send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(event.end), item_id=id)
            self._committed(id, event.turn)

    def _untold(self, turn: int) -> tuple[ConversationItem, int] | None:
        """Where a turn's words belong: its item, and the part without a transcript."""
        if (item := self._items.get(self._turns.get(turn))) is None:
            return None
        content = enumerate(item.json["content"])
        parts = [n for n, part in content if part["type"] == "input_audio" and part["transcript"] is None]
        return (item, parts[0]) if parts else None

    def _captioned(self, event: events.InputTranscribed) -> None:
        if (place := self._untold(event.turn)) is None:
            return
        item, part = place
        content = list(item.json["content"])
        content[part] = {**content[part], "transcript": event.text}
        item.json = {**item.json, "content": content}
        if self.config.transcription:
            where = {"item_id": item.id, "content_index": part}
            self.out.send("conversation.item.input_audio_transcription.delta", **where, delta=event.text)
            done = {"transcript": event.text, "usage": NO_TOKENS}
            self.out.send("conversation.item.input_audio_transcription.completed", **where, **done)

    def _uncaptioned(self, event: events.InputTranscriptionFailed) -> None:
        if (place := self._untold(event.turn)) and self.config.transcription:
            error = {"type": "server_error", "code": "transcription_failed", "message": event.message, "param": None}
            where = {"item_id": place[0].id, "content_index": place[1]}
            self.out.send("conversation.item.input_audio_transcription.failed", **where, error=error)

    def _looked(self, event: events.PictureAttached) -> None:
        while self._shown:
            data, id = self._shown.popleft()
            if data is event.data:
                remember(self._pictures, event.picture, id)
                if "camera" in self._extensions:
                    self.out.send("attend.camera.looked", frame_id=id)
                return

    def _marked(self, event: events.MarkAdded) -> None:
        frame = None if event.picture is None else self._pictures.get(event.picture)
        mark = {"box_2d": list(event.mark.box), "label": event.mark.label}
        response = self._responses.active
        self.out.send("attend.mark", response_id=response.id if response else None, frame_id=frame, mark=mark)

    def _since(self, now: float) -> float:
        """When the silence that the session tells of ends, by what the client has played."""
        return self._responses.playback.end + (self.config.idle or 0) if self.config.uninterrupted else now

    def _timeout(self, event: events.UserIdle) -> None:
        self._idle, item, end = None, self.out.new("item"), _ms(event.at)
        start = max(0, end - round(1000 * (self.config.idle or 0)))
        self.out.send("input_audio_buffer.timeout_triggered", audio_start_ms=start, audio_end_ms=end, item_id=item)
        self._committed(item)
        if not (self._responses.active or self._responses.busy):
            self._responses.create(ResponseParams(), 0.0)

    def error(self, message: str, type: str, code: str, param: str | None = None) -> None:
        """Of the client's event that is being done, or of the server."""
        wrong = {"type": type, "code": code, "message": message, "param": param, "event_id": self._event_id}
        self.out.send("error", error=wrong)


NO_TOKENS: dict[str, Any] = {  # of a transcript, which is not written by a model of its own
    "type": "tokens",
    "input_tokens": 0,
    "input_token_details": {"text_tokens": 0, "audio_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def _ms(samples: int) -> int:
    return samples * 1000 // RATE
