"""OpenAI Realtime (GA) as a state machine: client events → session inputs, session events → server events. No socket, no clock.

After each call the caller passes on what `out` has collected, to the client and to the session, in order. Times are seconds of
the caller's clock. Each client event of the reference is a method here, in the order of the reference.
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

EXTENSIONS = ("camera", "marks", "timeline", "playback", "notes", "queue")  # the server handles the last one
SHORTEST = 100  # milliseconds that a commit needs
PENDING = 64 << 20  # bytes of pictures whose ids are kept until the session has looked at them


class RealtimeProtocol:
    """One conversation. `id` is part of every other id. `voice` is the name of the TTS voice, None without one."""

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
        self._event_id: str | None = None  # of the client's event that is being handled
        config = SessionConfig(instructions, spoken=voice is not None, turn_detection=SERVER_VAD)
        self._items = ConversationItems(self.out)
        self._buffer = InputAudioBuffer(config.input)
        self._pictures: dict[int, str] = {}  # ids of items and camera frames, by the session's number of the picture
        self._responses = Responses(self.out, self._items, config, voice, self._paced, self._pictures)
        self._turns: dict[int, str] = {}  # item id of each turn
        self._speaking: str | None = None  # item id of the open turn
        self._recorded_turn = False  # the last turn that started is audio that the client sent as an item
        self._interruption_item: str | None = None  # item id of speech over an answer, which may become a turn
        self._idle: tuple[float, events.UserIdle] | None = None  # deadline after playback, and the session's event
        self._pending_pictures: deque[tuple[bytes, str]] = deque(maxlen=64)  # with their ids, until the session looks at them
        self.out.send("session.created", session=self._responses.session(model))

    @property
    def config(self) -> SessionConfig:
        """The session's current configuration."""
        return self._responses.config

    # -- client events

    def receive(self, message: str | bytes, now: float) -> None:
        """Handles one message of the client. What is wrong with it becomes an `error` event."""
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
        if (was.turn_detection is None) != (
            now.turn_detection is None
        ):  # no turn is buffered in one mode and completed in the other
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
                json = self._responses.add_client_call(given, id)
            case schema.FunctionCallOutputItem():
                json = self._responses.add_call_output(given, id)
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
        ms = self._responses.truncate(item, event.audio_end_ms, talking=self._interruption_item is not None)
        self.out.send("conversation.item.truncated", item_id=item.id, content_index=event.content_index, audio_end_ms=ms)

    def _delete(self, event: schema.ConversationItemDelete) -> None:
        item = self._items.known(event.item_id, "item_delete_invalid_item_id")
        if self._responses.holds(item):
            item.deleted = True  # once its response is done
        else:
            self._items.delete(item)

    def _camera_frame(self, event: schema.AttendCameraFrame) -> None:
        show = events.PictureInput(items.picture(event.image_url, "image_url"), live=True)
        self._show(show, self.out.new("frame") if event.frame_id is None else event.frame_id)

    def _show(self, show: events.PictureInput, id: str) -> None:
        self._pending_pictures.append((show.data, id))
        while sum(len(data) for data, _ in self._pending_pictures) > PENDING and len(self._pending_pictures) > 1:
            self._pending_pictures.popleft()
        self.out.put(show)

    # -- the session's events

    def handle_event(self, event: Event, now: float) -> None:
        """Handles one event of the session."""
        self._responses.handle_event(event, now)
        self._hold_sound()
        match event:
            case events.TurnStarted():
                self._turn_started(event)
            case events.TurnStopped():
                self._turn_stopped(event)
            case events.TurnDiscarded() if self._speaking:
                self._discard_speech(self._speaking, event.at)
                self._speaking = None
            case events.OutputCleared(start=int(start)) if not self._paced:
                self._interruption_item = self._speech_started(start)
            case events.FalseInterruption() if self._interruption_item:
                self._discard_speech(self._interruption_item, event.at)
                self._interruption_item = None
            case events.InputTranscribed():
                self._transcribed(event)
            case events.InputTranscriptionFailed():
                self._transcription_failed(event)
            case events.PictureAttached():
                self._picture_attached(event)
            case events.MarkAdded() if "marks" in self._extensions:
                self._mark_added(event)
            case events.AnswerTimings() if "timeline" in self._extensions:
                self.out.send("attend.timeline", answer=event.answer, stages_ms=dict(event.stages), waiting=event.waiting)
            case events.UserIdle():
                self._idle = self._idle_deadline(now), event
                self.played(now)
            case events.Notice(refused=True):
                self.error(event.message, "invalid_request_error", "invalid_value")
            case events.Notice() if "notes" in self._extensions:
                self.out.send("attend.note", message=event.message)
            case events.SessionFailed():
                self.error(event.message, "server_error", "session_failed")

    def played(self, now: float) -> None:
        """To be called regularly: reports playback progress to the session, and checks the idle deadline."""
        self._responses.played(now)
        if self._idle and self._idle[0] <= now:
            self._timeout(self._idle[1])

    def _hold_sound(self) -> None:
        """Holds input audio back during an answer that must not be interrupted, and releases it afterwards."""
        detection = self.config.turn_detection
        holds = detection is not None and not detection["interrupt_response"] and self._responses.busy
        self.out.put(*self._buffer.hold(holds))

    def _speech_started(self, start: int) -> str:
        """Sends speech_started. Returns the id of the item that the speech may become."""
        id = self.out.new("item")
        self.out.send("input_audio_buffer.speech_started", audio_start_ms=_ms(start), item_id=id)
        return id

    def _discard_speech(self, item: str, at: int) -> None:
        self.out.send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(at), item_id=item)
        self.out.send("input_audio_buffer.cleared")

    def _turn_started(self, event: events.TurnStarted) -> None:
        self._idle, self._recorded_turn = None, event.name is not None
        if event.name is not None:
            remember(self._turns, event.turn, event.name)
        else:
            self._speaking, self._interruption_item = self._interruption_item or self._speech_started(event.start), None

    def _turn_stopped(self, event: events.TurnStopped) -> None:
        if self._recorded_turn:
            self._recorded_turn = False
            if item := self._items.get(self._turns.get(event.turn)):
                item.of = event.turn
            else:  # the client deleted it before the session took it
                self.out.put(events.DeleteEntry(event.turn))
        elif id := self._speaking:
            self._speaking = None
            remember(self._turns, event.turn, id)
            self.out.send("input_audio_buffer.speech_stopped", audio_end_ms=_ms(event.end), item_id=id)
            self._committed(id, event.turn)

    def _awaiting_transcript(self, turn: int) -> tuple[ConversationItem, int] | None:
        """The item of a turn, and the index of its audio part that has no transcript yet."""
        if (item := self._items.get(self._turns.get(turn))) is None:
            return None
        content = enumerate(item.json["content"])
        parts = [n for n, part in content if part["type"] == "input_audio" and part["transcript"] is None]
        return (item, parts[0]) if parts else None

    def _transcribed(self, event: events.InputTranscribed) -> None:
        if (place := self._awaiting_transcript(event.turn)) is None:
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

    def _transcription_failed(self, event: events.InputTranscriptionFailed) -> None:
        if (place := self._awaiting_transcript(event.turn)) and self.config.transcription:
            error = {"type": "server_error", "code": "transcription_failed", "message": event.message, "param": None}
            where = {"item_id": place[0].id, "content_index": place[1]}
            self.out.send("conversation.item.input_audio_transcription.failed", **where, error=error)

    def _picture_attached(self, event: events.PictureAttached) -> None:
        while self._pending_pictures:
            data, id = self._pending_pictures.popleft()
            if data is event.data:
                remember(self._pictures, event.picture, id)
                if "camera" in self._extensions:
                    self.out.send("attend.camera.looked", frame_id=id)
                return

    def _mark_added(self, event: events.MarkAdded) -> None:
        frame = None if event.picture is None else self._pictures.get(event.picture)
        mark = {"box_2d": list(event.mark.box), "label": event.mark.label}
        response = self._responses.active
        self.out.send("attend.mark", response_id=response.id if response else None, frame_id=frame, mark=mark)

    def _idle_deadline(self, now: float) -> float:
        """The idle deadline: counted from the end of playback where speech does not interrupt, else now."""
        return self._responses.playback.end + (self.config.idle or 0) if self.config.uninterrupted else now

    def _timeout(self, event: events.UserIdle) -> None:
        self._idle, item, end = None, self.out.new("item"), _ms(event.at)
        start = max(0, end - round(1000 * (self.config.idle or 0)))
        self.out.send("input_audio_buffer.timeout_triggered", audio_start_ms=start, audio_end_ms=end, item_id=item)
        self._committed(item)
        if not (self._responses.active or self._responses.busy):
            self._responses.create(ResponseParams(), 0.0)

    def error(self, message: str, type: str, code: str, param: str | None = None) -> None:
        """Sends an `error` for the client's event that is being handled, or for the server itself."""
        wrong = {"type": type, "code": code, "message": message, "param": param, "event_id": self._event_id}
        self.out.send("error", error=wrong)


NO_TOKENS: dict[str, Any] = {  # of a transcript: no separate model writes it
    "type": "tokens",
    "input_tokens": 0,
    "input_token_details": {"text_tokens": 0, "audio_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def _ms(samples: int) -> int:
    return samples * 1000 // RATE
