"""Questions about cameras, as they come in: an ask over MQTT, or a trigger that fired. Pure."""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from agent.watch.config import (
    CameraConfig,
    ConfigError,
    QuestionOptions,
    Text,
    TriggerConfig,
    WatchConfig,
    decode_json,
    options_error,
)
from streams.mqtt import Message
from streams.topics import can_publish_to

LARGEST = 64 << 10  # bytes of an ask
Id = Annotated[str, Meta(min_length=1, max_length=200)]


class Requester(Struct, frozen=True, kw_only=True):
    """Who asked, as far as known: what goes back with the answer, and the topic for it."""

    id: str | None = None
    reply_to: str | None = None
    correlation: bytes | None = None


class CameraQuestion(QuestionOptions, frozen=True, kw_only=True):
    """A question that was accepted. Times in seconds since 1970."""

    key: str  # unique; the same where the same question comes twice
    camera: str
    question: str
    asked: float
    moment: float  # of the event: the pictures around it are looked at
    until: float  # after which the answer is no longer wanted
    by: Requester = Requester()
    cause: dict[str, Any] | None = None  # what is passed on from a trigger's message


class AskPayload(QuestionOptions, frozen=True, kw_only=True):
    """An ask as JSON. What it leaves out is as the camera is configured."""

    question: Text | None = None
    id: Id | None = None
    reply_to: Id | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    at: float | None = None  # when it was asked, in seconds since 1970


class MonitorRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Tell me when: the camera is looked at every `interval_s` seconds, and so many looks in a row have to agree."""

    condition: Annotated[str, Meta(min_length=1, max_length=500)]
    id: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    interval_s: Annotated[float, Meta(ge=0.1, le=3_600)] = 2.0
    looks: Annotated[int, Meta(ge=1, le=20)] = 2
    reply_to: Annotated[str, Meta(min_length=1, max_length=250)] | None = None


class AskRefused(ValueError):
    """An ask or a request to monitor that is not accepted: one sentence. `by`: who is to be told."""

    def __init__(self, why: str, by: Requester) -> None:
        super().__init__(why)
        self.by = by


def read_ask(message: Message, camera: str, config: WatchConfig, now: float) -> CameraQuestion:
    """Plain text, or JSON if it begins with a brace. Raises AskRefused."""
    camera_config, reply_to, data = config.camera[camera], message.reply_to, message.payload
    by = Requester(reply_to=reply_to if can_reply_to(reply_to, config) else None, correlation=message.correlation)
    if len(data) > LARGEST:
        raise AskRefused(f"an ask has at most {LARGEST:,} bytes", by)
    given: dict[str, Any] = {}
    ask = AskPayload()
    try:
        text = data.decode()
        if text.lstrip().startswith("{"):
            ask = decode_json(data, AskPayload)
            given = msgspec.json.decode(data)
        elif text.strip():
            ask = AskPayload(question=msgspec.convert(text.strip().replace("\0", ""), Text))
        if wrong := options_error(ask):
            raise ConfigError(f"{wrong[0]} - at `$.{wrong[1]}`")
    except (UnicodeDecodeError, msgspec.ValidationError, ConfigError) as error:
        why = "an ask is UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise AskRefused(f"this ask cannot be read: {why}", by) from error
    reply_to = reply_to or ask.reply_to
    if reply_to and not can_reply_to(reply_to, config):
        raise AskRefused("answers cannot be published to this reply topic", Requester(id=ask.id))
    begun = min(ask.at or now, now)
    waits = min(ask.deadline_s or config.deadline_s, message.expiry_s or 86_400)
    known = ask.id or (message.correlation and message.correlation.hex())
    key = f"{camera}/{reply_to or ''}/{known}" if known else f"{camera}/{message_key(message, now)}"
    return CameraQuestion(
        **_options(camera_config, given),
        key=key,
        camera=camera,
        question=ask.question or camera_config.question,
        asked=now,
        moment=begun,
        until=begun + waits,
        by=Requester(id=ask.id, reply_to=reply_to, correlation=message.correlation),
    )


def read_monitor_request(payload: bytes, config: WatchConfig) -> MonitorRequest:
    """Plain text, or JSON if it begins with a brace. Raises AskRefused."""
    text = payload.decode(errors="replace").strip()
    try:
        if len(payload) > LARGEST:
            raise ConfigError(f"it has more than {LARGEST:,} bytes")
        data = text.encode() if text.startswith("{") else msgspec.json.encode({"condition": text})
        request = decode_json(data, MonitorRequest)
        if request.reply_to and not can_reply_to(request.reply_to, config):
            raise ConfigError("nothing can be published to this reply topic")
    except ConfigError as error:
        raise AskRefused(f"this cannot be watched for: {error}", Requester()) from error
    return request


def triggered(
    trigger: TriggerConfig, key: str, moment: float, cause: dict[str, Any], config: WatchConfig, now: float
) -> CameraQuestion:
    """The question of a trigger that fired. `moment`: of the event; `now`: both in seconds since 1970."""
    camera = config.camera[trigger.camera]
    given = {name: value for name, value in _options(trigger, {}).items() if value != getattr(QuestionOptions(), name)}
    return CameraQuestion(
        **_options(camera, given),
        key=key,
        camera=trigger.camera,
        question=trigger.question or camera.question,
        asked=now,
        moment=min(moment, now),
        until=now + config.deadline_s,
        cause=cause,
    )


def message_key(message: Message, now: float) -> str:
    """Part of the key of a message without an id: all but its end is the same if the broker sends it again."""
    return f"{sha256(message.topic.encode() + b'/' + message.payload).hexdigest()[:24]}/{message.mid}/{now:.3f}"


def can_reply_to(topic: str | None, config: WatchConfig) -> bool:
    """Whether an answer can be published there; not on a topic of our own, where it would be read as an ask."""
    return topic is not None and can_publish_to(topic) and not topic.startswith(f"{config.base}/")


def _options(configured: CameraConfig | TriggerConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a question: those given, and else those configured."""
    return {name: given.get(name, getattr(configured, name)) for name in QuestionOptions.__struct_fields__}
