"""One response of the protocol: session events of an answer in, server events in OpenAI's order out. Pure."""

from __future__ import annotations

import base64
import json
from typing import Literal

from agent import events
from web import items
from web.audio import Resampler, Samples
from web.config import SessionConfig
from web.items import ConversationItem, ConversationItems, Json
from web.outgoing import Outgoing
from web.schema import ResponseParams

DELTAS = 5  # audio deltas per second of audio, at least
Status = Literal["completed", "cancelled", "incomplete", "failed"]


class Response:
    """One response, in OpenAI's order: response.created, rate_limits.updated; of each item output_item.added,
    conversation.item.added and created, of a message content_part.added, its deltas, then done in reverse; response.done.

    `conversation`: the items to which its output is added, None for an out-of-band response. `answer`: the session's number of
    the answer, None until it has started. `base`: characters that the answer had before this response."""

    def __init__(
        self,
        out: Outgoing,
        config: SessionConfig,
        params: ResponseParams,
        voice: str,
        conversation: ConversationItems | None,
        answer: int | None = None,
        base: int = 0,
    ) -> None:
        self.id, self.config, self.conversation, self.answer = out.new("resp"), config, conversation, answer
        self.cancelled = False  # by the client
        self.usage: events.UsageCounted | None = None  # of the last part of its answer
        self.begun = base  # characters of the answer before the message in progress
        self._out, self._metadata, self._voice = out, params.metadata, voice
        self._items: list[ConversationItem] = []
        self._message: ConversationItem | None = None  # the one in progress
        self._words = ""
        self._resampler: Resampler | None = None
        self._next = 0  # sample of the answer that follows what was sent
        out.send("response.created", response=self._json("in_progress"))
        out.send("rate_limits.updated", rate_limits=[])  # there are none on one's own machine

    @property
    def message(self) -> str:
        """The id of the message in progress; starts one if there is none."""
        return self._open_message().id

    @property
    def open(self) -> bool:
        return self._message is not None

    def holds(self, item: ConversationItem) -> bool:
        return item in self._items

    def add_text(self, words: str) -> None:
        """Sends a text or transcript delta."""
        message = self._open_message()
        self._words += words
        kind = "output_audio_transcript" if self.config.spoken else "output_text"
        self._out.send(f"response.{kind}.delta", **self._place(message), delta=words)

    def add_audio(self, said: events.AudioDelta) -> None:
        """Sends audio deltas, resampled to the output format."""
        message = self._open_message()
        if self._resampler and said.sample != self._next:  # the answer was resumed at an earlier word
            self._send_audio(message, self._resampler.flush())
        self._resampler = self._resampler or Resampler(said.rate, self.config.output.rate)
        self._next = said.sample + len(said.pcm)
        self._send_audio(message, self._resampler.push(said.pcm))

    def add_call(self, called: events.ToolCalled, call_id: str) -> None:
        """Ends the message in progress, and sends a function call as an item."""
        self._close_message("completed")
        name, arguments = called.tool.name, json.dumps(called.tool.arguments, ensure_ascii=False)
        item = self._start_item(items.function_call(self._out.new("item"), call_id, name, "", "in_progress"), called.call)
        place = {**self._place(item, part=False), "call_id": call_id}
        self._out.send("response.function_call_arguments.delta", **place, delta=arguments)
        self._out.send("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        self._finish_item(item, items.function_call(item.id, call_id, name, arguments, "completed"))

    def truncate(self, heard: int) -> None:
        """Truncates a finished response that was interrupted in playback to the `heard` characters of its answer."""
        item = self._items[-1] if self._items else None
        words = item.json["content"][0].get("transcript") if item and item.json["type"] == "message" else None
        if item and words is not None:
            begun = self.begun - len(words)
            item.json = items.assistant_message(item.id, "incomplete", words[: max(0, heard - begun)], self.config.spoken)

    def finish(self, finish: str, heard: int | None = None) -> None:
        """Sends response.done. `finish`: the session's finish reason. `heard`: characters of the answer heard, None for all."""
        status, details = self._status(finish)
        self._close_message("completed" if status == "completed" else "incomplete", heard)
        self._out.send("response.done", response=self._json(status, {"type": status, **details}, _usage_json(self.usage)))
        for item in self._items:
            if self.conversation is not None and item.deleted:
                self.conversation.delete(item)

    def _status(self, finish: str) -> tuple[Status, Json]:
        match finish:
            case "interrupted":
                return "cancelled", {"reason": "client_cancelled" if self.cancelled else "turn_detected"}
            case "length":
                return "incomplete", {"reason": "max_output_tokens"}
            case "failed":
                return "failed", {"error": {"type": "server_error", "code": "model_failed"}}
        return "completed", {}

    def _json(self, status: str, details: Json | None = None, usage: Json | None = None) -> Json:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [item.json for item in self._items],
            "conversation_id": None if self.conversation is None else f"conv_{self._out.id}",
            "output_modalities": [self.config.modality],
            "max_output_tokens": self.config.max_tokens or "inf",
            "audio": {"output": {"format": self.config.output.as_json(), "voice": self._voice}},
            "usage": usage,
            "metadata": self._metadata,
        }

    def _place(self, item: ConversationItem, part: bool = True) -> Json:
        place = {"response_id": self.id, "item_id": item.id, "output_index": self._items.index(item)}
        return {**place, "content_index": 0} if part else place

    def _part(self, words: str) -> Json:
        return {"type": "audio", "transcript": words} if self.config.spoken else {"type": "text", "text": words}

    def _start_item(self, json: Json, of: int | None) -> ConversationItem:
        self._out.send("response.output_item.added", response_id=self.id, output_index=len(self._items), item=json)
        self._items.append(self.conversation.add(json, of) if self.conversation is not None else ConversationItem(json))
        return self._items[-1]

    def _finish_item(self, item: ConversationItem, json: Json) -> None:
        item.json = json
        if self.conversation is not None:
            self.conversation.done(item)
        self._out.send("response.output_item.done", response_id=self.id, output_index=self._items.index(item), item=json)

    def _open_message(self) -> ConversationItem:
        if self._message is None:
            json = items.assistant_message(self._out.new("item"), "in_progress", None, self.config.spoken)
            self._message, self._words = self._start_item(json, self.answer), ""
            self._out.send("response.content_part.added", **self._place(self._message), part=self._part(""))
        return self._message

    def _send_audio(self, message: ConversationItem, samples: Samples) -> None:
        piece = self.config.output.rate // DELTAS
        for at in range(0, len(samples), piece):
            delta = base64.b64encode(self.config.output.encode(samples[at : at + piece])).decode()
            self._out.send("response.output_audio.delta", **self._place(message), delta=delta)

    def _close_message(self, status: Literal["completed", "incomplete"], heard: int | None = None) -> None:
        """Ends the message in progress, if there is one."""
        if (message := self._message) is None:
            return
        place, words, self._message = self._place(message), self._words, None
        if self._resampler:
            self._send_audio(message, self._resampler.flush())
            self._resampler = None
        if self.config.spoken:
            self._out.send("response.output_audio.done", **place)
            self._out.send("response.output_audio_transcript.done", **place, transcript=words)
        else:
            self._out.send("response.output_text.done", **place, text=words)
        self._out.send("response.content_part.done", **place, part=self._part(words))
        kept = words if heard is None else words[: max(0, heard - self.begun)]
        self.begun += len(words)
        self._finish_item(message, items.assistant_message(message.id, status, kept, self.config.spoken))


def _usage_json(counted: events.UsageCounted | None) -> Json:
    usage = counted or events.UsageCounted(0, 0, 0, 0, 0)
    prompt = usage.text + usage.sound + usage.pictures
    return {
        "total_tokens": prompt + usage.tokens,
        "input_tokens": prompt,
        "output_tokens": usage.tokens,
        "input_token_details": {"text_tokens": usage.text, "audio_tokens": usage.sound, "image_tokens": usage.pictures},
        "output_token_details": {"text_tokens": usage.tokens, "audio_tokens": 0},
    }
