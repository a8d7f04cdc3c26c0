"""Gemma's notation for tools: renders declarations and results, parses calls. Pure.

A value is written `{key:value,other:[1,true,null]}`: bare keys, sorted; strings between the control token <|"|>; no spaces. It is
rendered as separate parts of text and control tokens, so that a string which contains the characters `<|"|>` cannot end itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class Control(str):
    """The name of a control token, as a part beside parts of text."""


Part = str  # text, or Control
QUOTE = Control('<|"|>')


def _sorted(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(((str(key), value) for key, value in mapping.items()), key=lambda item: item[0].lower())


def notation(value: Any, quote_keys: bool = False) -> Iterator[Part]:
    """Renders a JSON value."""
    if isinstance(value, str):
        yield from (QUOTE, value, QUOTE)
    elif value is None:
        yield "null"
    elif isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, Mapping):
        keys = ((notation(key) if quote_keys else [key], item) for key, item in _sorted(value))
        yield from _list("{", ([*key, ":", *notation(item, quote_keys)] for key, item in keys), "}")
    elif isinstance(value, Iterable):
        yield from _list("[", (notation(item, quote_keys) for item in value), "]")
    elif isinstance(value, int | float):
        yield str(value)
    else:
        yield from (QUOTE, str(value), QUOTE)


def _list(opening: str, items: Iterable[Iterable[Part]], closing: str) -> Iterator[Part]:
    yield opening
    for index, item in enumerate(items):
        if index:
            yield ","
        yield from item
    yield closing


def declaration(tool: Mapping[str, Any]) -> Iterator[Part]:
    """Renders a function in OpenAI's form, nested ({"function": {…}}) or flat. Raises ValueError if it has no name."""
    function = tool.get("function", tool)
    if not function.get("name"):
        raise ValueError("A tool needs a name.")
    fields: list[list[Part]] = [["description:", *notation(str(function.get("description") or ""))]]
    if parameters := function.get("parameters"):
        fields.append(["parameters:", *_list("{", _object({"type": "object", **parameters}, properties=False), "}")])
    yield f"declaration:{function['name']}"
    yield from _list("{", fields, "}")


def _object(schema: Mapping[str, Any], properties: bool) -> Iterator[list[Part]]:
    """The last fields of an object: properties (if there are any, or `properties`), required, type."""
    if schema.get("properties") or properties:
        yield _properties(schema.get("properties"))
    if schema.get("required"):
        yield ["required:", *notation(schema["required"])]
    yield from _type(schema)


def _properties(properties: Any) -> list[Part]:
    known = _sorted(properties) if isinstance(properties, Mapping) else []
    return ["properties:", *_list("{", ([f"{key}:", *_schema(schema)] for key, schema in known), "}")]


def _type(schema: Mapping[str, Any]) -> Iterator[list[Part]]:
    kind, _ = _kind(schema)
    if kind:
        yield ["type:", *notation(kind)]


def _kind(schema: Mapping[str, Any]) -> tuple[str, bool]:
    """The type in capitals, and whether null is allowed; JSON schema can have both in `type`: ["string", "null"]."""
    kinds = schema.get("type") or ""
    names = [kinds] if isinstance(kinds, str) else [str(kind) for kind in kinds]
    rest = [name.upper() for name in names if name.lower() != "null"]
    return (rest[0] if rest else ""), bool(schema.get("nullable")) or len(rest) < len(names)


def _schema(schema: Any) -> Iterator[Part]:
    schema = schema if isinstance(schema, Mapping) else {}  # JSON schema also allows true
    kind, nullable = _kind(schema)
    fields: list[list[Part]] = []
    if schema.get("description"):
        fields.append(["description:", *notation(str(schema["description"]))])
    if kind == "STRING" and schema.get("enum"):
        fields.append(["enum:", *notation(schema["enum"])])
    if kind == "ARRAY" and isinstance(schema.get("items"), Mapping) and schema["items"]:
        fields.append(["items:", *_items(schema["items"])])
    if nullable:
        fields.append(["nullable:true"])
    fields += _object(schema, properties=True) if kind == "OBJECT" else _type(schema)
    yield from _list("{", fields, "}")


def _items(schema: Mapping[str, Any]) -> Iterator[Part]:
    """The items of an array: unlike those of a property, all keys are in alphabetical order."""
    fields: list[list[Part]] = []
    for key, value in _sorted(schema):
        if key == "type":
            fields += _type(schema)
        elif key == "properties":
            fields.append(_properties(value))
        elif value is not None:
            fields.append([f"{key}:", *notation(value, quote_keys=True)])
    yield from _list("{", fields, "}")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the model."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BrokenCall:
    """A call that is malformed or incomplete: it must not run, and the user has to be told."""

    text: str


MARK = "\0"  # stands for the token <|"|> in a call's text, so that the same characters as plain text do not end a string


def read_call(text: str) -> ToolCall | BrokenCall:
    """Parses `call:name{key:value}`, strings between MARKs.

    Tolerates quoted keys, plain quotes, spaces, and the constants of JSON and Python, but not an incomplete call.
    """
    head = re.match(r"\s*(?:call:)?\s*([\w.\-]+)\s*(?=\{)", text)
    if head:
        try:
            arguments, _ = _NotationReader(text).value(head.end())
            return ToolCall(head[1], arguments)
        except (_Unreadable, RecursionError):
            pass
    return BrokenCall(text.replace(MARK, QUOTE))


class _Unreadable(ValueError):
    pass


_WORDS = {"true": True, "false": False, "null": None, "none": None, "nil": None}
_QUOTES = (MARK, '"', "'")


class _NotationReader:
    """A recursive-descent parser: each method takes a position and returns a value and the position after it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def value(self, at: int) -> tuple[Any, int]:
        at = self._skip(at)
        if self.text[at] == "{":
            return self._object(at + 1)
        if self.text[at] == "[":
            return self._array(at + 1)
        if self.text[at] in _QUOTES:
            return self._string(at)
        word, at = self._until(at, ",}]")
        return _bare(word), at

    def _object(self, at: int) -> tuple[dict[str, Any], int]:
        out: dict[str, Any] = {}
        while self.text[at := self._skip(at, ",")] != "}":
            key, at = self._string(at) if self.text[at] in _QUOTES else self._until(at, ":,}")
            at = self._skip(at)
            if self.text[at] != ":":
                raise _Unreadable
            out[key], at = self.value(at + 1)
        return out, at + 1

    def _array(self, at: int) -> tuple[list[Any], int]:
        out: list[Any] = []
        while self.text[at := self._skip(at, ",")] != "]":
            if self.text[at] == "}":
                raise _Unreadable
            item, at = self.value(at)
            out.append(item)
        return out, at + 1

    def _string(self, at: int) -> tuple[str, int]:
        quote, out = self.text[at], ""
        while True:
            piece, at = self._until(at + 1, quote if quote == MARK else quote + "\\", strip=False)
            out += piece
            if self.text[at] == quote:
                return out, at + 1
            at += 1
            out += {"n": "\n", "t": "\t"}.get(self.text[at : at + 1], self.text[at : at + 1])

    def _until(self, at: int, stops: str, strip: bool = True) -> tuple[str, int]:
        end = at
        while end < len(self.text) and self.text[end] not in stops:
            end += 1
        if end >= len(self.text):
            raise _Unreadable
        return (self.text[at:end].strip() if strip else self.text[at:end]), end

    def _skip(self, at: int, extra: str = "") -> int:
        while at < len(self.text) and (self.text[at].isspace() or self.text[at] in extra):
            at += 1
        if at >= len(self.text):
            raise _Unreadable
        return at


def _bare(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    for number in (int, float):
        try:
            if math.isfinite(parsed := number(word)):
                return parsed
        except (ValueError, OverflowError):
            continue
    return word
