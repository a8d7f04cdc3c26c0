"""Client events as OpenAI's reference defines them, and validation of messages.

Every field of the reference is declared; those without effect are typed `NoEffect`. Unknown fields are refused, as OpenAI does.
What depends on the state of a conversation is checked where it is used, with the same `InvalidRequest`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, inspect

TEXT = 32_768  # characters of one text: more than a row holds
ARGUMENTS = 65_536  # characters of a function's arguments, and of its output
VALUES = 50_000  # of one message, roughly: 8 MB of empty lists took two seconds to parse, and blocked all other clients
AUDIO = 15 << 20  # bytes of audio in one event: OpenAI's limit

T = TypeVar("T")
NoEffect = Any
Text = Annotated[str, Meta(max_length=TEXT)]
ID = Annotated[str, Meta(min_length=1, max_length=64)]
Name = Annotated[str, Meta(max_length=64)]
Milliseconds = Annotated[int, Meta(ge=0, le=1 << 40)]


class InvalidRequest(ValueError):
    """A client event that is refused: one sentence, OpenAI's error code, and the path of the wrong value."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class Known(Struct, forbid_unknown_fields=True):
    """An object that may have no other fields than the declared ones."""


# ---- the session


class AudioFormat(Known):
    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"]
    rate: int | None = None


class Transcription(Known):
    model: Annotated[str, Meta(max_length=256)] | None = None
    language: Annotated[str, Meta(max_length=256)] | None = None
    prompt: NoEffect = None
    delay: NoEffect = None
    keywords: NoEffect = None
    languages: NoEffect = None


class TurnDetection(Known):
    """Turn detection of either type. Fields that are not given keep their value, `type` included."""

    type: Literal["server_vad", "semantic_vad"] | None = None
    threshold: Annotated[float, Meta(ge=0, le=1)] | None = None
    prefix_padding_ms: Annotated[int, Meta(ge=0, le=2000)] | None = None
    silence_duration_ms: Annotated[int, Meta(ge=0, le=10_000)] | None = None
    idle_timeout_ms: Annotated[int, Meta(ge=1000, le=300_000)] | UnsetType | None = UNSET
    create_response: bool | None = None
    interrupt_response: bool | None = None
    eagerness: Literal["low", "medium", "high", "auto"] | None = None


class AudioInput(Known):
    format: AudioFormat | None = None
    transcription: Transcription | UnsetType | None = UNSET
    turn_detection: TurnDetection | UnsetType | None = UNSET
    noise_reduction: NoEffect = None


class AudioOutput(Known):
    format: AudioFormat | None = None
    voice: NoEffect = None
    speed: NoEffect = None


class AudioOptions(Known):
    input: AudioInput | None = None
    output: AudioOutput | None = None


class ResponseAudio(Known):
    output: AudioOutput | None = None


class FunctionTool(Known):
    name: Annotated[str, Meta(pattern=r"^[\w.-]+$", max_length=64)]
    type: Literal["function"] = "function"
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class ToolChoice(Known):
    type: Literal["function"]
    name: Name


class ResponseOptions(Known):
    """The options that sessions and responses share."""

    instructions: Text | None = None
    output_modalities: Annotated[list[Literal["text", "audio"]], Meta(min_length=1, max_length=2)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=4096)] | Literal["inf"] | None = None
    prompt: Any = None  # refused: no prompts are stored here
    parallel_tool_calls: NoEffect = None
    reasoning: NoEffect = None


class SessionOptions(ResponseOptions):
    type: Literal["realtime"] = "realtime"
    audio: AudioOptions | None = None
    model: NoEffect = None
    include: NoEffect = None
    tracing: NoEffect = None
    truncation: NoEffect = None


# ---- items


class Content(Known):
    """A part of a message; which types a role may have is checked in web/items.py."""

    type: Literal["input_text", "input_audio", "input_image", "output_text", "output_audio"]
    text: Text | None = None
    audio: str | None = None
    image_url: str | None = None
    detail: Literal["auto", "low", "high"] | None = None
    transcript: Text | None = None


class _Item(Known):
    id: ID | None = None
    object: NoEffect = None
    status: NoEffect = None


class MessageItem(_Item, kw_only=True, tag_field="type", tag="message"):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Content], Meta(max_length=64)]


class FunctionCallItem(_Item, kw_only=True, tag_field="type", tag="function_call"):
    name: Name
    arguments: Annotated[str, Meta(max_length=ARGUMENTS)]
    call_id: ID | None = None


class FunctionCallOutputItem(_Item, kw_only=True, tag_field="type", tag="function_call_output"):
    call_id: ID
    output: Annotated[str, Meta(max_length=ARGUMENTS)]


class ItemReference(Known, tag_field="type", tag="item_reference"):
    id: ID


Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
Item = MessageItem | FunctionCallItem | FunctionCallOutputItem
InputItem = Item | ItemReference


class ResponseParams(ResponseOptions):
    audio: ResponseAudio | None = None
    conversation: Literal["auto", "none"] | None = None
    input: Annotated[list[InputItem], Meta(max_length=256)] | None = None
    metadata: Metadata | None = None


# ---- events


class _ClientEvent(Known, tag_field="type"):
    event_id: Annotated[str, Meta(max_length=512)] | None = None


class SessionUpdate(_ClientEvent, kw_only=True, tag="session.update"):
    session: SessionOptions


class InputAudioBufferAppend(_ClientEvent, kw_only=True, tag="input_audio_buffer.append"):
    audio: str


class InputAudioBufferCommit(_ClientEvent, kw_only=True, tag="input_audio_buffer.commit"):
    pass


class InputAudioBufferClear(_ClientEvent, kw_only=True, tag="input_audio_buffer.clear"):
    pass


class ConversationItemCreate(_ClientEvent, kw_only=True, tag="conversation.item.create"):
    item: Item
    previous_item_id: ID | None = None


class ConversationItemRetrieve(_ClientEvent, kw_only=True, tag="conversation.item.retrieve"):
    item_id: ID


class ConversationItemTruncate(_ClientEvent, kw_only=True, tag="conversation.item.truncate"):
    item_id: ID
    audio_end_ms: Milliseconds
    content_index: Annotated[int, Meta(ge=0, le=0)] = 0


class ConversationItemDelete(_ClientEvent, kw_only=True, tag="conversation.item.delete"):
    item_id: ID


class ResponseCreate(_ClientEvent, kw_only=True, tag="response.create"):
    response: ResponseParams | None = None


class ResponseCancel(_ClientEvent, kw_only=True, tag="response.cancel"):
    response_id: ID | None = None


class AttendCameraFrame(_ClientEvent, kw_only=True, tag="attend.camera.frame"):
    """A camera frame, of the extension `camera`."""

    image_url: str
    frame_id: ID | None = None


ClientEvent = (
    SessionUpdate
    | InputAudioBufferAppend
    | InputAudioBufferCommit
    | InputAudioBufferClear
    | ConversationItemCreate
    | ConversationItemRetrieve
    | ConversationItemTruncate
    | ConversationItemDelete
    | ResponseCreate
    | ResponseCancel
    | AttendCameraFrame
)

# ---- messages


def parsed(message: str | bytes) -> dict[str, Any]:
    """The JSON object of a message, without NaN and infinity. Raises InvalidRequest."""
    if isinstance(message, bytes):
        raise InvalidRequest("a message is JSON text; binary frames are not read", "invalid_json")
    if message.count(",") > VALUES:
        raise InvalidRequest(f"the message has more than {VALUES:,} values (commas are counted)", "invalid_json")
    try:
        event = json.loads(message, parse_constant=_no_number, parse_float=_number)
    except RecursionError:
        raise InvalidRequest("the message is nested too deeply", "invalid_json") from None
    except ValueError:
        raise InvalidRequest("the message is not JSON", "invalid_json") from None
    if not isinstance(event, dict):
        raise InvalidRequest("a message is a JSON object", "invalid_json")
    return event


def client_event(event: dict[str, Any]) -> ClientEvent:
    """The typed event of a JSON object. Raises InvalidRequest."""
    if not isinstance(kind := event.get("type"), str):
        raise InvalidRequest("type must be a string", param="type")
    if (path := next(_lone_surrogates(event), None)) is not None:
        raise InvalidRequest(f"{path or 'the event'} holds half a character (a lone surrogate)", param=path or None)
    if kind not in KINDS:
        raise InvalidRequest(f"there is no such event as {kind[:64]!r}", param="type")
    return checked(event, KINDS[kind])


def arguments(text: str, param: str) -> dict[str, Any]:
    """The arguments of a function call, with numbers as they are written. Raises InvalidRequest."""
    try:
        found = json.loads(text, parse_constant=_no_number) if text else {}
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} is not JSON", param=param) from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{param} must be an object", "invalid_type", param)
    return found


def _no_number(name: str) -> None:
    raise ValueError(name)


def _number(digits: str) -> float | int:
    """1.0 becomes an integer, since JavaScript has no others; 1e999 is refused, since it cannot be sent as JSON."""
    if math.isinf(value := float(digits)):
        raise ValueError(digits)
    return int(value) if value.is_integer() else value


def _lone_surrogates(value: Any, path: str = "") -> Iterator[str]:
    """The paths of strings with lone surrogates, which JSON can express and UTF-8 cannot encode."""
    match value:
        case str() if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                yield path
        case list():
            for n, part in enumerate(value):
                yield from _lone_surrogates(part, f"{path}[{n}]")
        case dict():
            for name, part in value.items():
                yield from _lone_surrogates(name, path)
                yield from _lone_surrogates(part, f"{path}.{name}" if path else name)


def decoded(text: str, param: str, limit: int) -> bytes:
    """Decodes base64, also URL-safe, unpadded or with line breaks. The length is checked first. Raises InvalidRequest."""
    text = text.translate(_BASE64)
    if len(text) > (limit + 2) // 3 * 4:
        raise InvalidRequest(f"{param} holds more than {limit:,} bytes", "string_above_max_length", param)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{param} is not base64", param=param) from None


_BASE64 = str.maketrans("-_", "+/", "\t\n\r =")


# ---- validation


def checked(value: Any, kind: type[T], within: str = "") -> T:
    """Converts `value` to this type. `within`: its path in the event. Raises InvalidRequest."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _invalid_request(str(error), value, kind, within) from None


def _invalid_request(text: str, value: Any, kind: Any, within: str) -> InvalidRequest:
    """The InvalidRequest for an error message of msgspec, in OpenAI's words."""
    what, _, where = text.partition(" - at ")
    path = where.rpartition("`$")[2].rstrip("`").removeprefix(".").replace("[...]", "")
    param = f"{within}.{path}".strip(".") if within and not path.startswith("[") else within + path
    if match := re.search(r"(unknown|missing required) field `(.*)`$", what, re.DOTALL):
        param = f"{param}.{match[2]}" if param else match[2]
        if match[1] == "unknown":
            return InvalidRequest(f"Unknown parameter: {param[:256]!r}", "unknown_parameter", param[:256])
        return InvalidRequest(f"Missing required parameter: {param!r}", "missing_required_parameter", param)
    if what.startswith("Invalid"):
        known = ", ".join(map(repr, _choices(kind, path)))
        return InvalidRequest(f"{param} must be one of {known}", param=param)
    if "length <=" in what:
        code = "array_above_max_length" if "array" in what or "object" in what else "string_above_max_length"
        return InvalidRequest(f"{param} is too long: it {_plain(what)}", code, param)
    if "matching regex" in what:
        return InvalidRequest(f"{param} may hold nothing but letters, digits, dots, _ and -", param=param)
    code = "invalid_type" if ", got " in what else "invalid_value"
    return InvalidRequest(f"{param or 'the event'} {_plain(what)}", code, param or None)


def _plain(what: str) -> str:
    """ "Expected `int | null`, got `str`" → "must be an integer or null, not a string"."""

    def named(match: re.Match[str]) -> str:
        return " or ".join(NAMES.get(name, name) for name in match[1].split(" | "))

    what = what.replace("Number out of range", "must be a smaller number").replace("Expected", "must be")
    return re.sub(r"`(.*?)`", named, what.replace(", got ", ", not "))


NAMES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "object": "an object",
    "array": "an array",
}


@cache
def _described(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _choices(kind: Any, path: str) -> list[str]:
    """The values that are allowed at `path` of this type."""
    found: list[Any] = [_described(kind)]
    for step in re.findall(r"[^.\[\]]+", path):
        found = [inner for node in _single(found) for inner in _inside(node, step)]
    values: list[Any] = []
    for node in _single(found):
        values += node.values if isinstance(node, inspect.LiteralType) else [node] if isinstance(node, str) else []
    return values


def _single(nodes: list[Any]) -> Iterator[Any]:
    for node in nodes:
        yield from _single(list(node.types)) if isinstance(node, inspect.UnionType) else [node]


def _inside(node: Any, step: str) -> list[Any]:
    match node:
        case inspect.StructType() if step == node.tag_field:
            return [str(node.tag)]
        case inspect.StructType():
            return [field.type for field in node.fields if field.encode_name == step]
        case inspect.ListType() if step.isdigit():
            return [node.item_type]
    return []


KINDS: dict[str, type[ClientEvent]] = {str(kind.__struct_config__.tag): kind for kind in get_args(ClientEvent)}
