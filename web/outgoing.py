"""What a call of the protocol produces: server events for the client and inputs for the session, each in order. Pure."""

from __future__ import annotations

import json
import secrets
from typing import Any, TypeVar

from agent.events import Input

K = TypeVar("K")
V = TypeVar("V")

KEPT = 1000  # turns, pictures and calls whose ids are remembered


class Outgoing:
    """Collects server events and session inputs. The session's `id` is part of every other id."""

    def __init__(self, id: str) -> None:
        self.id = id
        self._events: list[dict[str, Any]] = []
        self._inputs: list[Input] = []
        self._count = 0

    def new(self, kind: str) -> str:
        """A new id of this kind."""
        self._count += 1
        return f"{kind}_{self.id}_{self._count}"

    def send(self, type: str, **fields: Any) -> None:
        self._events.append({"type": type, "event_id": self.new("event"), **fields})

    def put(self, *inputs: Input) -> None:
        self._inputs += inputs

    def take(self) -> tuple[list[dict[str, Any]], list[Input]]:
        """Everything since the last call: events for the client, inputs for the session."""
        events, inputs, self._events, self._inputs = self._events, self._inputs, [], []
        return events, inputs


def lone_event(type: str, **fields: Any) -> str:
    """A server event outside of a conversation, as JSON text."""
    return json.dumps({"type": type, "event_id": f"event_{secrets.token_hex(4)}", **fields})


def server_error(message: str, code: str) -> str:
    """An `error` event outside of a conversation, as JSON text."""
    wrong = {"type": "server_error", "code": code, "message": message, "param": None, "event_id": None}
    return lone_event("error", error=wrong)


def remember(known: dict[K, V], key: K, value: V) -> None:
    """Stores a value, and drops the oldest beyond KEPT."""
    known[key] = value
    if len(known) > KEPT:
        del known[next(iter(known))]
