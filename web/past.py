"""The `input` of a response: items that are its whole past, each as what a session takes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from agent import events
from agent.calls import ToolCall
from agent.events import Past
from streams.frames import Audio
from web import items
from web.audio import Format
from web.given import ID, Refused, choice, loads, mapping, sequence, text
from web.items import Item, Items, Json

INPUT = 256  # items
OUTPUT = 65_536  # characters of a function's arguments, and of its output


def call(raw: Mapping[str, Any], where: str) -> ToolCall:
    """A function call that a client brings along."""
    said = text(raw.get("arguments"), f"{where}.arguments", OUTPUT)
    try:
        arguments = loads(said) if said else {}
    except (ValueError, RecursionError):
        raise Refused(f"{where}.arguments is not JSON", param=f"{where}.arguments") from None
    return ToolCall(text(raw.get("name"), f"{where}.name", 64), dict(mapping(arguments, f"{where}.arguments")))


class Reader:
    """`known` are the items of the conversation, `pictures` and `calls` what the session knows of them by their ids."""

    def __init__(self, known: Items, pictures: Mapping[int, str], calls: Mapping[str, ToolCall], format: Format) -> None:
        self._known, self._pictures, self._format = known, pictures, format
        self._calls = dict(calls)
        self.system: list[str] = []  # messages of the system among them

    def read(self, given: Any) -> tuple[Past, ...]:
        where = "response.input"
        found: list[Past] = []
        for n, raw in enumerate(sequence(given, where, INPUT)):
            found += self._item(mapping(raw, f"{where}[{n}]"), f"{where}[{n}]")
        return tuple(found)

    def _item(self, raw: Mapping[str, Any], where: str) -> Iterator[Past]:
        kinds = ("message", "function_call", "function_call_output", "item_reference")
        match choice(raw.get("type"), f"{where}.type", kinds):
            case "item_reference":
                yield from self._refer(self._known.known(raw.get("id"), f"{where}.id"), where)
            case "function_call":
                self._calls[text(raw.get("call_id"), f"{where}.call_id", ID)] = call(raw, where)
            case "function_call_output":
                yield self._output(raw, where)
            case _:
                yield from self._message(raw, where)

    def _output(self, raw: Mapping[str, Any], where: str) -> Past:
        id = text(raw.get("call_id"), f"{where}.call_id", ID)
        if id not in self._calls:
            raise Refused(f"there is no call {id!r}", "item_not_found", f"{where}.call_id")
        return events.Recall("", ((self._calls[id], text(raw.get("output"), f"{where}.output", OUTPUT)),))

    def _message(self, raw: Mapping[str, Any], where: str) -> Iterator[Past]:
        match choice(raw.get("role"), f"{where}.role", ("user", "assistant", "system")):
            case "user":
                _, parts = items.user(raw, "", self._format, where)
                for part in parts:
                    yield Audio(part, 0) if isinstance(part, np.ndarray) else part
            case "assistant":
                yield events.Recall(items.words(raw, ("output_text", "output_audio"), where))
            case _:
                self.system.append(items.words(raw, ("input_text",), where))

    def _refer(self, item: Item, where: str) -> Iterator[Past]:
        json: Json = item.json
        if json["type"] != "message":
            yield from self._item(json, where)
        elif json["role"] == "assistant":
            yield events.Recall("".join(part.get("transcript") or part.get("text") or "" for part in json["content"]))
        elif json["role"] == "system":
            self.system += [part["text"] for part in json["content"]]
        else:
            yield from self._said(item)

    def _said(self, item: Item) -> Iterator[Past]:
        pictures = [index for index, id in self._pictures.items() if id == item.id]
        for part in item.json["content"]:
            match part["type"]:
                case "input_text":
                    yield events.Write(part["text"], ask=False)
                case "input_image" if pictures:
                    yield events.Again(pictures.pop(0))
                case "input_audio" if part["transcript"] is not None:
                    yield events.Write(part["transcript"], ask=False)
                case "input_audio" if item.of is not None:
                    yield events.Again(item.of)
