"""The items of a conversation: as JSON of the protocol, and as session inputs where a client creates or references them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent import events
from agent.calls import ToolCall
from agent.events import AnswerInput
from streams.frames import RATE, Audio, MediaError
from streams.pictures import check_picture
from web.audio import LONGEST, Format, Resampler, Samples
from web.outgoing import Outgoing
from web.schema import (
    AUDIO,
    Content,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    InvalidRequest,
    ItemReference,
    MessageItem,
    arguments,
    decoded,
)

KEPT = 1000  # items that can be retrieved; what the model keeps is the session's policy
PICTURE = 20 << 20  # bytes of a picture file: more than a phone's photo of 50 megapixels
URI = re.compile(r"data:image/(png|jpeg|jpg|webp);base64,")
ROLES = {
    "user": ("input_text", "input_audio", "input_image"), "assistant": ("output_text", "output_audio"), "system": ("input_text",)
}  # fmt: skip

Json = dict[str, Any]


@dataclass
class ConversationItem:
    """An item. `of`: the session's number of its turn or answer, if it has one. `deleted`: by the client while its response was
    in progress; it is removed when the response is done."""

    json: Json
    of: int | None = None
    deleted: bool = False

    @property
    def id(self) -> str:
        return str(self.json["id"])


# ---- as JSON


def item(id: str, type: str, status: str = "completed", **more: Any) -> Json:
    return {"id": id, "object": "realtime.item", "type": type, "status": status, **more}


def user_audio(id: str) -> Json:
    """A message of the user's speech; its transcript comes later."""
    return item(id, "message", role="user", content=[{"type": "input_audio", "transcript": None}])


def assistant_message(id: str, status: str, words: str | None, spoken: bool) -> Json:
    """A message of the assistant; `words` is None before its content starts."""
    part = {"type": "output_audio", "transcript": words} if spoken else {"type": "output_text", "text": words}
    return item(id, "message", status, role="assistant", content=[] if words is None else [part])


def function_call(id: str, call_id: str, name: str, arguments: str, status: str) -> Json:
    return item(id, "function_call", status, call_id=call_id, name=name, arguments=arguments)


# ---- from a client


def picture(uri: str | None, param: str) -> bytes:
    """The file in a `data:` URI; nothing is ever fetched. Only its header is checked here; the session decodes it. Raises
    InvalidRequest."""
    if uri is None or not (head := URI.match(uri)):
        message = f"{param} must be a data: URI of a PNG, JPEG or WebP picture in base64; addresses are not fetched"
        raise InvalidRequest(message, param=param)
    file = decoded(uri[head.end() :], param, PICTURE)
    try:
        check_picture(file, f"the picture in {param}")
    except MediaError as error:
        raise InvalidRequest(str(error), param=param) from error
    return file


def recording(audio: str | None, param: str, format: Format) -> Samples:
    """The audio of an input_audio part, float32 at 16 kHz. Raises InvalidRequest."""
    if audio is None:
        raise InvalidRequest(f"Missing required parameter: {param!r}", "missing_required_parameter", param)
    data = decoded(audio, param, AUDIO)
    if len(data) % format.width:
        raise InvalidRequest(f"{param} ends in the middle of a sample: 16-bit PCM has an even number of bytes", param=param)
    if len(data) > LONGEST * format.rate * format.width:
        raise InvalidRequest(f"{param} holds more than {LONGEST} seconds; a turn has no more", param=param)
    return np.ascontiguousarray(Resampler(format.rate, RATE).push(format.decode(data), last=True))


def parts(message: MessageItem, format: Format, within: str, id: str = "") -> tuple[Json, list[AnswerInput]]:
    """A message as JSON, without its pictures and audio, and its session inputs (none for a system message). Raises
    InvalidRequest."""
    content: list[Json] = []
    found: list[AnswerInput] = []
    for n, part in enumerate(message.content):
        where = f"{within}.content[{n}]"
        if part.type not in ROLES[message.role]:
            known = ", ".join(ROLES[message.role])
            raise InvalidRequest(f"{where}.type must be one of {known} in a message of the {message.role}", param=f"{where}.type")
        match part.type:
            case "input_image":
                found.append(events.PictureInput(picture(part.image_url, f"{where}.image_url")))
                content.append({"type": "input_image", "detail": part.detail or "auto"})
            case "input_audio":
                found.append(Audio(recording(part.audio, f"{where}.audio", format), 0))
                content.append({"type": "input_audio", "transcript": part.transcript})
            case _:
                name = "transcript" if part.type == "output_audio" else "text"
                content.append({"type": part.type, name: (words := _words(part, name, where))})
                found += [events.TextInput(words, ask=False)] if message.role == "user" else []
    if message.role == "assistant":
        found = [events.PastAnswer(text(content))]
    return item(id, "message", role=message.role, content=content), found


def _words(part: Content, name: str, where: str) -> str:
    words: str | None = getattr(part, name)
    if words is None:
        raise InvalidRequest(f"Missing required parameter: '{where}.{name}'", "missing_required_parameter", f"{where}.{name}")
    return words


def text(content: Sequence[Mapping[str, Any]]) -> str:
    """The text of a message: its text parts and transcripts joined."""
    return "".join(part.get("transcript") or part.get("text") or "" for part in content)


def tool_call(given: FunctionCallItem, within: str) -> ToolCall:
    return ToolCall(given.name, arguments(given.arguments, f"{within}.arguments"))


# ---- the items of a conversation


class ConversationItems:
    """The items in order; the oldest are dropped beyond KEPT. Sends their events."""

    def __init__(self, out: Outgoing) -> None:
        self._out = out
        self._items: OrderedDict[str, ConversationItem] = OrderedDict()

    def __contains__(self, id: object) -> bool:
        return id in self._items

    @property
    def last(self) -> str | None:
        return next(reversed(self._items), None)

    def get(self, id: str | None) -> ConversationItem | None:
        return self._items.get(id) if id else None

    def known(self, id: str, code: str, param: str = "item_id") -> ConversationItem:
        """The item of this id. Raises InvalidRequest with this code if there is none."""
        if id not in self._items:
            raise InvalidRequest(f"there is no item {id!r}", code, param)
        return self._items[id]

    def add(self, json: Json, of: int | None = None, after: str | None = None) -> ConversationItem:
        """Adds an item at the end, or after `after`, which is an id or "root"."""
        previous = self.last if after is None else None if after == "root" else after
        self._items[json["id"]] = item = ConversationItem(json, of)
        if after is not None:
            keys = list(self._items)
            for key in keys[0 if after == "root" else keys.index(after) + 1 : -1]:
                self._items.move_to_end(key)
        if len(self._items) > KEPT:
            self._items.popitem(last=False)
        for type in ("conversation.item.added", "conversation.item.created"):
            self._out.send(type, item=json, previous_item_id=previous)
        return item

    def done(self, item: ConversationItem) -> None:
        """Sends conversation.item.done."""
        keys = list(self._items)
        at = keys.index(item.id) if item.id in self._items else 0
        self._out.send("conversation.item.done", item=item.json, previous_item_id=keys[at - 1] if at else None)

    def delete(self, item: ConversationItem) -> None:
        """Deletes an item, and its entry in the session's context."""
        if self._items.pop(item.id, None):
            self._out.send("conversation.item.deleted", item_id=item.id)
        if item.of is not None:
            self._out.put(events.DeleteEntry(item.of))


# ---- the input of a response


class ResponseInput:
    """Reads the `input` of a response: items that replace the conversation as its context. `known`: the conversation's items.
    `pictures`: item ids by the session's numbers of pictures. `calls`: tool calls by call_id."""

    def __init__(
        self, known: ConversationItems, pictures: Mapping[int, str], calls: Mapping[str, ToolCall], format: Format
    ) -> None:
        self._known, self._pictures, self._format = known, pictures, format
        self._calls = dict(calls)
        self.system: list[str] = []  # the system messages among them

    def read(self, given: Sequence[InputItem]) -> tuple[AnswerInput, ...]:
        """The session inputs of all items. Raises InvalidRequest."""
        return tuple(part for n, item in enumerate(given) for part in self._item(item, f"response.input[{n}]"))

    def _item(self, given: InputItem, where: str) -> Iterator[AnswerInput]:
        match given:
            case ItemReference():
                yield from self._reference(self._known.known(given.id, "item_not_found", f"{where}.id"), where)
            case FunctionCallItem():
                if given.call_id is None:
                    raise InvalidRequest(f"Missing required parameter: '{where}.call_id'", "missing_required_parameter", where)
                self._calls[given.call_id] = tool_call(given, where)
            case FunctionCallOutputItem():
                yield self._output(given.call_id, given.output, f"{where}.call_id")
            case MessageItem():
                json, found = parts(given, self._format, where)
                self.system += [text(json["content"])] if given.role == "system" else []
                yield from found

    def _output(self, call_id: str, output: str, param: str) -> AnswerInput:
        if call_id not in self._calls:
            raise InvalidRequest(f"there is no call {call_id!r}", "item_not_found", param)
        return events.PastAnswer("", ((self._calls[call_id], output),))

    def _reference(self, item: ConversationItem, where: str) -> Iterator[AnswerInput]:
        json = item.json
        match json["type"], json.get("role"):
            case "function_call", _:
                self._calls[json["call_id"]] = ToolCall(json["name"], arguments(json["arguments"], where))
            case "function_call_output", _:
                yield self._output(json["call_id"], json["output"], where)
            case _, "assistant":
                yield events.PastAnswer(text(json["content"]))
            case _, "system":
                self.system.append(text(json["content"]))
            case _:
                yield from self._user_message(item)

    def _user_message(self, item: ConversationItem) -> Iterator[AnswerInput]:
        pictures = [index for index, id in self._pictures.items() if id == item.id]
        for part in item.json["content"]:
            match part["type"]:
                case "input_text":
                    yield events.TextInput(part["text"], ask=False)
                case "input_image" if pictures:
                    yield events.EntryReference(pictures.pop(0))
                case "input_audio" if part["transcript"] is not None:
                    yield events.TextInput(part["transcript"], ask=False)
                case "input_audio" if item.of is not None:
                    yield events.EntryReference(item.of)
