"""What a client gave, looked at before it is believed: types, lengths and ranges. Refused says in one sentence what is wrong."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

KEPT = 1000  # turns, pictures and calls that are known by their ids
TEXT = 32_768  # characters of one text: a row holds fewer
ID = 64  # characters of an id
VALUES = 50_000  # of one message, about: 8 MB of empty lists took two seconds to read, and nobody else was heard meanwhile


class Refused(ValueError):
    """A client's event that cannot be done. The conversation goes on."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def parse(message: str | bytes) -> dict[str, Any]:
    """A JSON object without NaN and infinity."""
    if isinstance(message, bytes):
        raise Refused("a message is JSON text; binary frames are not read", "invalid_json")
    if message.count(",") > VALUES:
        raise Refused(f"the message has more than {VALUES:,} values (commas are counted)", "invalid_json")
    try:
        event = loads(message)
    except RecursionError:
        raise Refused("the message is nested too deeply", "invalid_json") from None
    except ValueError:
        raise Refused("the message is not JSON", "invalid_json") from None
    if not isinstance(event, dict):
        raise Refused("a message is a JSON object", "invalid_json")
    return event


def loads(text: str) -> Any:
    """Raises ValueError, also for NaN and infinity, and 1e999 is that too: nobody could read them in what we send."""
    return json.loads(text, parse_constant=_no_number, parse_float=_finite)


def _no_number(name: str) -> None:
    raise ValueError(name)


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(digits)
    return value


def text(given: Any, param: str, most: int = TEXT) -> str:
    if not isinstance(given, str):
        raise Refused(f"{param} must be a string", "invalid_type", param)
    if len(given) > most:
        raise Refused(f"{param} has {len(given):,} characters, more than {most:,}", "string_above_max_length", param)
    try:
        given.encode()
    except UnicodeEncodeError:
        raise Refused(f"{param} holds half a character (a lone surrogate)", param=param) from None
    return given


def number(given: Any, param: str, least: float, most: float) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise Refused(f"{param} must be a number", "invalid_type", param)
    if not least <= given <= most:
        raise Refused(f"{param} must be between {least:g} and {most:g}", param=param)
    return given


def whole(given: Any, param: str, least: int, most: int) -> int:
    if isinstance(given, float) and given.is_integer():
        given = int(given)  # JavaScript knows no integers
    if isinstance(given, bool) or not isinstance(given, int):
        raise Refused(f"{param} must be an integer", "invalid_type", param)
    return int(number(given, param, least, most))


def truth(given: Any, param: str) -> bool:
    if not isinstance(given, bool):
        raise Refused(f"{param} must be true or false", "invalid_type", param)
    return given


def choice(given: Any, param: str, known: Sequence[str]) -> str:
    if not isinstance(given, str) or given not in known:
        raise Refused(f"{param} must be one of {', '.join(known)}", param=param)
    return given


def mapping(given: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise Refused(f"{param} must be an object", "invalid_type", param)
    return given


def sequence(given: Any, param: str, most: int) -> list[Any]:
    if not isinstance(given, list):
        raise Refused(f"{param} must be an array", "invalid_type", param)
    if len(given) > most:
        raise Refused(f"{param} has {len(given):,} elements, more than {most:,}", "array_above_max_length", param)
    return given


URL_SAFE = str.maketrans("-_", "+/", "\t\n\r =")


def data(given: Any, param: str, most: int) -> bytes:
    """Base64, also with line breaks, URL-safe or unpadded. Its length is looked at before it is decoded."""
    if not isinstance(given, str):
        raise Refused(f"{param} must be a string", "invalid_type", param)
    given = given.translate(URL_SAFE)
    if len(given) > (most + 2) // 3 * 4:
        raise Refused(f"{param} holds more than {most:,} bytes", "string_above_max_length", param)
    try:
        return base64.b64decode(given + "=" * (-len(given) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{param} is not base64", param=param) from None


def remember(known: dict[K, V], key: K, value: V) -> None:
    """At most KEPT; the oldest is forgotten."""
    known[key] = value
    if len(known) > KEPT:
        del known[next(iter(known))]
