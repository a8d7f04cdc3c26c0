"""The items of a conversation as the protocol writes them, and what a client's own items put into a session."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent import events
from streams.frames import RATE, MediaError
from streams.pictures import check_picture
from web.audio import Format, Resampler, Samples
from web.buffer import LONGEST
from web.given import ID, Refused, choice, data, mapping, sequence, text

KEPT = 1000  # items that can be retrieved; what the model keeps is the session's own policy
PARTS = 64  # of one item
PICTURE = 20 << 20  # bytes of a picture file: more than a telephone's photo of 50 megapixels
SOUND = 15 << 20  # bytes of sound in one event, as the protocol has it
URI = re.compile(r"data:image/(png|jpeg|jpg|webp);base64,")

Json = dict[str, Any]
Part = events.Write | events.Show | Samples


@dataclass
class Item:
    """`of`: the turn or answer on the tape, where it is one of its own."""

    json: Json
    of: int | None = None
    unwanted: bool = False  # it was deleted while it was written, and goes when its response is over

    @property
    def id(self) -> str:
        return str(self.json["id"])


def item(id: str, type: str, status: str = "completed", **more: Any) -> Json:
    return {"id": id, "object": "realtime.item", "type": type, "status": status, **more}


def spoken(id: str, transcript: str | None = None) -> Json:
    """What the user said."""
    return item(id, "message", role="user", content=[{"type": "input_audio", "transcript": transcript}])


def answered(id: str, status: str, words: str | None, sound: bool) -> Json:
    """What the assistant said; None: nothing yet."""
    part = {"type": "output_audio", "transcript": words} if sound else {"type": "output_text", "text": words}
    return item(id, "message", status, role="assistant", content=[] if words is None else [part])


def called(id: str, call: str, name: str, arguments: str, status: str) -> Json:
    return item(id, "function_call", status, call_id=call, name=name, arguments=arguments)


def picture(given: Any, param: str) -> bytes:
    """A `data:` URI; nothing is ever fetched. Of the file the header is looked at; the session decodes it."""
    if not isinstance(given, str) or not (head := URI.match(given)):
        raise Refused(
            f"{param} must be a data: URI of a PNG, JPEG or WebP picture in base64; addresses are not fetched", param=param
        )
    file = data(given[head.end() :], param, PICTURE)
    try:
        check_picture(file, f"the picture in {param}")
    except MediaError as error:
        raise Refused(str(error), param=param) from error
    return file


def sound(given: Any, param: str, format: Format) -> Samples:
    """A whole recording, as float32 at the format's rate."""
    samples = format.decode(data(given, param, SOUND))
    if len(samples) > LONGEST * format.rate:
        raise Refused(f"{param} holds more than {LONGEST} seconds; a turn has no more", param=param)
    return samples


def given_id(given: Mapping[str, Any], known: Container[str]) -> str | None:
    if given.get("id") is None:
        return None
    id = text(given["id"], "item.id", ID)
    if not id:
        raise Refused("item.id is empty", param="item.id")
    if id in known:
        raise Refused(f"there is an item {id!r} already", "item_create_duplicate_item_id", "item.id")
    return id


def user(given: Mapping[str, Any], id: str, format: Format, within: str = "item") -> tuple[Json, list[Part]]:
    """The item, and what a session takes: sound as float32 at its own rate."""
    parts: list[Part] = []
    content: list[Json] = []
    for n, raw in enumerate(sequence(given.get("content"), f"{within}.content", PARTS)):
        where = f"{within}.content[{n}]"
        part = mapping(raw, where)
        match choice(part.get("type"), f"{where}.type", ("input_text", "input_image", "input_audio")):
            case "input_text":
                words = text(part.get("text"), f"{where}.text")
                parts.append(events.Write(words, ask=False))
                content.append({"type": "input_text", "text": words})
            case "input_image":
                parts.append(events.Show(picture(part.get("image_url"), f"{where}.image_url")))
                detail = choice(part.get("detail") or "auto", f"{where}.detail", ("auto", "low", "high"))
                content.append({"type": "input_image", "detail": detail})  # the picture itself is not sent back
            case "input_audio":
                heard = sound(part.get("audio"), f"{where}.audio", format)
                parts.append(np.ascontiguousarray(Resampler(format.rate, RATE).push(heard, last=True)))
                transcript = part.get("transcript")
                said = None if transcript is None else text(transcript, f"{where}.transcript")
                content.append({"type": "input_audio", "transcript": said})
    return item(id, "message", role="user", content=content), parts


def words(given: Mapping[str, Any], kinds: tuple[str, ...], within: str = "item") -> str:
    """Of a system's or an assistant's message: all its text."""
    found = []
    for n, raw in enumerate(sequence(given.get("content"), f"{within}.content", PARTS)):
        where = f"{within}.content[{n}]"
        part = mapping(raw, where)
        kind = choice(part.get("type"), f"{where}.type", kinds)
        name = "transcript" if kind.endswith("audio") else "text"
        found.append(text(part.get(name), f"{where}.{name}"))
    return "".join(found)


class Items:
    """All of a conversation, in order. `send(type, **fields)` sends an event."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._items: OrderedDict[str, Item] = OrderedDict()

    def __contains__(self, id: object) -> bool:
        return id in self._items

    @property
    def last(self) -> str | None:
        return next(reversed(self._items), None)

    def get(self, id: str | None) -> Item | None:
        return self._items.get(id) if id else None

    def known(self, given: Any, param: str = "item_id", code: str = "item_not_found") -> Item:
        """`code`: of the error where there is none."""
        id = text(given, param, ID)
        if id not in self._items:
            raise Refused(f"there is no item {id!r}", code, param)
        return self._items[id]

    def add(self, json: Json, of: int | None = None, after: str | None = None) -> Item:
        """At the end, or behind `after`, which is an id or "root"."""
        previous = self.last if after is None else None if after == "root" else after
        self._items[json["id"]] = item = Item(json, of)
        if after is not None:
            keys = list(self._items)
            for key in keys[0 if after == "root" else keys.index(after) + 1 : -1]:
                self._items.move_to_end(key)
        if len(self._items) > KEPT:
            self._items.popitem(last=False)
        for type in ("conversation.item.added", "conversation.item.created"):
            self._send(type, item=json, previous_item_id=previous)
        return item

    def done(self, item: Item) -> None:
        keys = list(self._items)
        at = keys.index(item.id) if item.id in self._items else 0
        self._send("conversation.item.done", item=item.json, previous_item_id=keys[at - 1] if at else None)

    def delete(self, item: Item) -> None:
        del self._items[item.id]
        self._send("conversation.item.deleted", item_id=item.id)
