"""The types of the `openai` package as judge of what we send, and a client of the protocol without a socket."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

from openai.types import realtime
from openai.types.realtime import RealtimeClientEvent, RealtimeServerEvent
from pydantic import BaseModel

from agent.events import Event, Input
from web.protocol import RealtimeProtocol

BEYOND = {"id", "object"}  # of a session: sent by OpenAI too, and not in the request that the type is
KINDS: dict[str, type[BaseModel]] = {
    typing.get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in typing.get_args(typing.get_args(RealtimeServerEvent)[0])
    if "type" in kind.model_fields
}

CLIENTS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(RealtimeClientEvent)[0])


def judged(event: dict[str, Any]) -> BaseModel:
    """Raises unless the event has exactly the fields and types that its type in `openai` has."""
    event = json.loads(json.dumps(event, allow_nan=False))
    model = KINDS[event["type"]].model_validate(event, strict=True)
    assert not (wrong := list(unknown(model))), wrong
    return model


def unknown(model: BaseModel) -> Iterator[str]:
    known = BEYOND if isinstance(model, realtime.RealtimeSessionCreateRequest) else set()
    yield from (f"{type(model).__name__}.{name}" for name in (model.model_extra or {}).keys() - known)
    for name in type(model).model_fields:
        value = getattr(model, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from unknown(inner)


class Client:
    """Says events, hears what comes of them. `inputs` are what a session would get."""

    def __init__(self, protocol: RealtimeProtocol, strict: bool = True) -> None:
        self.protocol, self.strict = protocol, strict
        self.inputs: list[Input] = []
        self.sent: list[dict[str, Any]] = []
        self.now = 0.0
        self.first = self._drain()

    def say(self, type: str, **fields: Any) -> list[dict[str, Any]]:
        return self.raw(json.dumps({"type": type, **fields}))

    def raw(self, message: str | bytes) -> list[dict[str, Any]]:
        self.protocol.receive(message, self.now)
        return self._drain()

    def hear(self, *told: Event) -> list[dict[str, Any]]:
        for event in told:
            self.protocol.handle_event(event, self.now)
        return self._drain()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.protocol.played(self.now)
        self._drain()

    def _drain(self) -> list[dict[str, Any]]:
        out, inputs = self.protocol.out.take()
        self.inputs += inputs
        for event in out:
            if self.strict and not event["type"].startswith("attend."):
                judged(event)
        self.sent += out
        return out


def kinds(sent: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in sent]
