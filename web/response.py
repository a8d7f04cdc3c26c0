"""One response as the protocol tells it: session events of an answer in, server events in OpenAI's order out. Pure."""

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

PIECES = 5  # a second of sound at most
Status = Literal["completed", "cancelled", "incomplete", "failed"]


class Response:
    """One response, in OpenAI's order: response.created, rate_limits.updated; of each item output_item.added,
    conversation.item.added and created, of a message content_part.added, its deltas, then done in reverse; response.done.

    `kept`: the items of the conversation, or None for a response that the conversation does not keep. `answer`: the session's
    number, None until it has begun. `base`: characters that its answer had before it."""

    def __init__(
        self,
        out: Outgoing,
        config: SessionConfig,
        params: ResponseParams,
        voice: str,
        kept: ConversationItems | None,
        answer: int | None = None,
        base: int = 0,
    ) -> None:
        self.id, self.config, self.kept, self.answer = out.new("resp"), config, kept, answer
        self.cancelled = False  # by the client
        self.cost: events.UsageCounted | None = None  # of the last stretch of its answer
        self.begun = base  # characters of the answer before the open message
        self._out, self._metadata, self._voice = out, params.metadata, voice
        self._items: list[ConversationItem] = []
        self._message: ConversationItem | None = None  # the open one
        self._words = ""
        self._resampler: Resampler | None = None
        self._next = 0  # sample of the answer that belongs after what was sent
        out.send("response.created", response=self._json("in_progress"))
        out.send("rate_limits.updated", rate_limits=[])  # one's own machine has none

    @property
    def message(self) -> str:
        """The id of the message that is being written; one is begun where there is none."""
        return self._opened().id

    @property
    def open(self) -> bool:
        return self._message is not None

    def holds(self, item: ConversationItem) -> bool:
        return item in self._items

    def write(self, words: str) -> None:
        message = self._opened()
        self._words += words
        kind = "output_audio_transcript" if self.config.spoken else "output_text"
        self._out.send(f"response.{kind}.delta", **self._place(message), delta=words)

    def say(self, said: events.AudioDelta) -> None:
        message = self._opened()
        if self._resampler and said.sample != self._next:  # the answer is taken up again at a word
            self._sound(message, self._resampler.flush())
        self._resampler = self._resampler or Resampler(said.rate, self.config.output.rate)
        self._next = said.sample + len(said.pcm)
        self._sound(message, self._resampler.push(said.pcm))

    def call(self, called: events.ToolCalled, call_id: str) -> None:
        self._close("completed")
        name, arguments = called.tool.name, json.dumps(called.tool.arguments, ensure_ascii=False)
        item = self._begin(items.function_call(self._out.new("item"), call_id, name, "", "in_progress"), called.call)
        place = {**self._place(item, part=False), "call_id": call_id}
        self._out.send("response.function_call_arguments.delta", **place, delta=arguments)
        self._out.send("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        self._end(item, items.function_call(item.id, call_id, name, arguments, "completed"))

    def shorten(self, heard: int) -> None:
        """It was done, and while it was played it was cut: so many characters of its answer were heard."""
        item = self._items[-1] if self._items else None
        words = item.json["content"][0].get("transcript") if item and item.json["type"] == "message" else None
        if item and words is not None:
            begun = self.begun - len(words)
            item.json = items.assistant_message(item.id, "incomplete", words[: max(0, heard - begun)], self.config.spoken)

    def finish(self, finish: str, heard: int | None = None) -> None:
        """`finish`: as the session says. `heard`: characters of its answer that were, where that is not all."""
        status, details = self._status(finish)
        self._close("completed" if status == "completed" else "incomplete", heard)
        self._out.send("response.done", response=self._json(status, {"type": status, **details}, _usage(self.cost)))
        for item in self._items:
            if self.kept is not None and item.deleted:
                self.kept.delete(item)

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
            "conversation_id": None if self.kept is None else f"conv_{self._out.id}",
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

    def _begin(self, json: Json, of: int | None) -> ConversationItem:
        self._out.send("response.output_item.added", response_id=self.id, output_index=len(self._items), item=json)
        self._items.append(self.kept.add(json, of) if self.kept is not None else ConversationItem(json))
        return self._items[-1]

    def _end(self, item: ConversationItem, json: Json) -> None:
        item.json = json
        if self.kept is not None:
            self.kept.done(item)
        self._out.send("response.output_item.done", response_id=self.id, output_index=self._items.index(item), item=json)

    def _opened(self) -> ConversationItem:
        if self._message is None:
            json = items.assistant_message(self._out.new("item"), "in_progress", None, self.config.spoken)
            self._message, self._words = self._begin(json, self.answer), ""
            self._out.send("response.content_part.added", **self._place(self._message), part=self._part(""))
        return self._message

    def _sound(self, message: ConversationItem, samples: Samples) -> None:
        piece = self.config.output.rate // PIECES
        for at in range(0, len(samples), piece):
            delta = base64.b64encode(self.config.output.encode(samples[at : at + piece])).decode()
            self._out.send("response.output_audio.delta", **self._place(message), delta=delta)

    def _close(self, status: Literal["completed", "incomplete"], heard: int | None = None) -> None:
        """The open message is complete."""
        if (message := self._message) is None:
            return
        place, words, self._message = self._place(message), self._words, None
        if self._resampler:
            self._sound(message, self._resampler.flush())
            self._resampler = None
        if self.config.spoken:
            self._out.send("response.output_audio.done", **place)
            self._out.send("response.output_audio_transcript.done", **place, transcript=words)
        else:
            self._out.send("response.output_text.done", **place, text=words)
        self._out.send("response.content_part.done", **place, part=self._part(words))
        kept = words if heard is None else words[: max(0, heard - self.begun)]
        self.begun += len(words)
        self._end(message, items.assistant_message(message.id, status, kept, self.config.spoken))


def _usage(cost: events.UsageCounted | None) -> Json:
    cost = cost or events.UsageCounted(0, 0, 0, 0, 0)
    before = cost.text + cost.sound + cost.pictures
    return {
        "total_tokens": before + cost.tokens,
        "input_tokens": before,
        "output_tokens": cost.tokens,
        "input_token_details": {"text_tokens": cost.text, "audio_tokens": cost.sound, "image_tokens": cost.pictures},
        "output_token_details": {"text_tokens": cost.tokens, "audio_tokens": 0},
    }
