"""One response as the protocol tells it: session events of an answer in, server events in OpenAI's order out.

response.created, rate_limits.updated; of each item output_item.added, conversation.item.added and created, of a message
content_part.added, its deltas, then done in reverse; response.done.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from agent import events
from web.audio import Resampler
from web.config import Config
from web.given import Refused, mapping, text
from web.items import Item, Items, Json, answered, called

Send = Callable[..., None]
PIECES = 5  # a second of sound at most
Status = Literal["completed", "cancelled", "incomplete", "failed"]


class Response:
    """`send(type, **fields)` sends an event; `new(kind)` is a new id. `items`: the conversation's, or None for a response that
    none of them is to keep. `base`: characters that its answer had before it."""

    def __init__(
        self,
        config: Config,
        metadata: Mapping[str, str] | None,
        voice: str,
        session: str,
        send: Send,
        items: Items | None,
        new: Callable[[str], str],
        answer: int | None = None,
        base: int = 0,
    ) -> None:
        self.id = new("resp")
        self.answer = answer  # None until the session has begun it
        self.config, self.cancelled = config, False
        self._at_character = base
        self._metadata, self._voice, self._conversation = metadata, voice, f"conv_{session}" if items is not None else None
        self._send, self._all, self._new = send, items, new
        self._items: list[Item] = []  # of the response
        self._message: Item | None = None  # the open one
        self._words = ""
        self._resampler: Resampler | None = None
        self._next = 0  # sample of the answer that belongs after what was sent
        send("response.created", response=self._json("in_progress"))
        send("rate_limits.updated", rate_limits=[])  # one's own machine has none

    @property
    def message(self) -> str:
        """The id of the item that is being said; one is begun where there is none."""
        return self._opened().id

    @property
    def open(self) -> bool:
        return self._message is not None

    @property
    def begun(self) -> int:
        """Characters of the answer before the open item."""
        return self._at_character

    def _json(self, status: str, details: Json | None = None, usage: Json | None = None) -> Json:
        out = {"output": {"format": self.config.output.as_json(), "voice": self._voice}}
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [item.json for item in self._items],
            "conversation_id": self._conversation,
            "output_modalities": [self.config.modality],
            "max_output_tokens": self.config.most or "inf",
            "audio": out,
            "usage": usage,
            "metadata": self._metadata,
        }

    def _at(self, item: Item, part: bool = True) -> Json:
        place = {"response_id": self.id, "item_id": item.id, "output_index": self._items.index(item)}
        return {**place, "content_index": 0} if part else place

    @property
    def unwanted(self) -> list[Item]:
        return [item for item in self._items if item.unwanted]

    def holds(self, item: Item) -> bool:
        return item in self._items

    def _begin(self, json: Json, of: int | None) -> Item:
        self._send("response.output_item.added", response_id=self.id, output_index=len(self._items), item=json)
        self._items.append(self._all.add(json, of) if self._all is not None else Item(json))
        return self._items[-1]

    def _end(self, item: Item, json: Json) -> None:
        item.json = json
        if self._all is not None:
            self._all.done(item)
        self._send("response.output_item.done", response_id=self.id, output_index=self._items.index(item), item=json)

    def _part(self, words: str) -> Json:
        return {"type": "audio", "transcript": words} if self.config.spoken else {"type": "text", "text": words}

    def _opened(self) -> Item:
        if self._message is None:
            self._message = self._begin(answered(self._new("item"), "in_progress", None, self.config.spoken), self.answer)
            self._words = ""
            self._send("response.content_part.added", **self._at(self._message), part=self._part(""))
        return self._message

    # -- what the session says

    def write(self, words: str) -> None:
        message = self._opened()
        self._words += words
        kind = "output_audio_transcript" if self.config.spoken else "output_text"
        self._send(f"response.{kind}.delta", **self._at(message), delta=words)

    def say(self, said: events.Said) -> None:
        message = self._opened()
        if self._resampler and said.sample != self._next:  # the answer is taken up again at a word
            self._sound(message, self._resampler.flush())
        self._resampler = self._resampler or Resampler(said.rate, self.config.output.rate)
        self._next = said.sample + len(said.pcm)
        self._sound(message, self._resampler.push(said.pcm))

    def _sound(self, message: Item, samples: Any) -> None:
        piece = self.config.output.rate // PIECES
        for at in range(0, len(samples), piece):
            delta = base64.b64encode(self.config.output.encode(samples[at : at + piece])).decode()
            self._send("response.output_audio.delta", **self._at(message), delta=delta)

    def call(self, tool: events.Called, id: str) -> None:
        self.close("completed")
        arguments = json.dumps(tool.tool.arguments, ensure_ascii=False)
        name = tool.tool.name
        item = self._begin(called(self._new("item"), id, name, "", "in_progress"), tool.call)
        at = {**self._at(item, part=False), "call_id": id}
        self._send("response.function_call_arguments.delta", **at, delta=arguments)
        self._send("response.function_call_arguments.done", **at, name=name, arguments=arguments)
        self._end(item, called(item.id, id, name, arguments, "completed"))

    def close(self, status: Literal["completed", "incomplete"], heard: int | None = None) -> None:
        """The open message is complete; so many characters of its answer were heard, where that is not all."""
        if (message := self._message) is None:
            return
        at, words, self._message = self._at(message), self._words, None
        if self._resampler:
            self._sound(message, self._resampler.flush())
            self._resampler = None
        if self.config.spoken:
            self._send("response.output_audio.done", **at)
            self._send("response.output_audio_transcript.done", **at, transcript=words)
        else:
            self._send("response.output_text.done", **at, text=words)
        self._send("response.content_part.done", **at, part=self._part(words))
        kept = words if heard is None else words[: max(0, heard - self._at_character)]
        self._at_character += len(words)
        self._end(message, answered(message.id, status, kept, self.config.spoken))

    def shorten(self, heard: int) -> None:
        """It was done, and while it was played it was cut: so many characters of its answer were heard."""
        item = self._items[-1] if self._items else None
        words = item.json["content"][0].get("transcript") if item and item.json["type"] == "message" else None
        if item and words is not None:
            begun = self._at_character - len(words)
            item.json = answered(item.id, "incomplete", words[: max(0, heard - begun)], self.config.spoken)

    def finish(self, status: Status, details: Json | None = None, usage: Json | None = None, heard: int | None = None) -> None:
        self.close("completed" if status == "completed" else "incomplete", heard)
        self._send("response.done", response=self._json(status, {"type": status, **(details or {})}, usage))


def metadata(given: Any) -> Mapping[str, str] | None:
    if given is None:
        return None
    pairs = mapping(given, "response.metadata")
    if len(pairs) > 16:
        raise Refused("response.metadata holds more than 16 pairs", param="response.metadata")
    return {text(key, "response.metadata", 64): text(value, f"response.metadata.{key[:64]}", 512) for key, value in pairs.items()}


def status_of(finish: str, cancelled: bool) -> tuple[Status, Json | None]:
    match finish:
        case "interrupted":
            return "cancelled", {"reason": "client_cancelled" if cancelled else "turn_detected"}
        case "length":
            return "incomplete", {"reason": "max_output_tokens"}
        case "failed":
            return "failed", {"error": {"type": "server_error", "code": "model_failed"}}
    return "completed", None
