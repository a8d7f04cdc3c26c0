"""Which messages and which moments become questions. Pure: times are seconds since 1970 and come as arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from agent.watch.asked import Query, stamp, triggered
from agent.watch.config import Config, Frigate, Schedule, Topic, Trigger
from streams.mqtt import Message

LARGEST = 1 << 20  # bytes of a message


class _After(Struct):
    """Of a Frigate message what is asked for: the fields of its events and of its reviews."""

    id: str
    camera: str
    start_time: float | None = None
    label: str | None = None
    score: float | None = None
    top_score: float | None = None
    false_positive: bool | None = None
    current_zones: tuple[str, ...] = ()
    entered_zones: tuple[str, ...] = ()
    severity: str | None = None
    data: dict[str, Any] | None = None


class _Event(Struct):
    type: str
    after: _After


def topics(config: Config) -> list[str]:
    """What has to be subscribed to."""
    found = [f"{t.topic}/{t.of}" if isinstance(t, Frigate) else t.topic for t in config.trigger if not isinstance(t, Schedule)]
    return [*dict.fromkeys(found)]


def matches(pattern: str, topic: str) -> bool:
    """Whether a topic is one that a filter with + and # means."""
    wanted, given = pattern.split("/"), topic.split("/")
    for n, level in enumerate(wanted):
        if level == "#":
            return not (n == 0 and topic.startswith("$"))
        if n >= len(given) or level not in ("+", given[n]):
            return False
    return len(wanted) == len(given)


@dataclass
class Triggers:
    config: Config
    _fired: dict[int, float] = field(default_factory=dict)  # when each did so last

    def take(self, message: Message, now: float) -> list[Query]:
        """The questions that a message asks. What stays at the broker is old news and asks none."""
        if message.retained or len(message.payload) > LARGEST:
            return []
        out = []
        for number, trigger in enumerate(self.config.trigger):
            query = None
            if isinstance(trigger, Frigate) and message.topic == f"{trigger.topic}/{trigger.of}":
                query = _frigate(trigger, number, message.payload, self.config, now)
            elif isinstance(trigger, Topic) and matches(trigger.topic, message.topic) and _holds(trigger, message.payload):
                key = f"trigger {number}/{stamp(message, now)}"
                query = triggered(trigger, key, now, {"topic": message.topic}, self.config, now)
            if query:
                out.append((number, trigger, query))
        return [query for number, trigger, query in out if self._may(number, trigger, now)]

    def _may(self, number: int, trigger: Trigger, now: float) -> bool:
        return not trigger.cooldown_s or now - self._fired.get(number, -1e18) >= trigger.cooldown_s

    def fired(self, query: Query, now: float) -> None:
        """It was news: its trigger rests now."""
        self._fired[int(query.key.split("/")[0].removeprefix("trigger "))] = now

    def scheduled(self, number: int, now: float) -> tuple[float, Query]:
        """When a schedule is due next after now, and what it asks then."""
        trigger = self.config.trigger[number]
        assert isinstance(trigger, Schedule)
        due = now + trigger.every_s if trigger.every_s else min(_next(clock, now) for clock in trigger.at)
        return due, triggered(trigger, f"trigger {number}/{due}", due, {"schedule": due}, self.config, due)


def _next(clock: str, now: float) -> float:
    hour, minute = map(int, clock.split(":"))
    here = datetime.fromtimestamp(now)
    due = here.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (due if due > here else due + timedelta(days=1)).timestamp()


def _frigate(trigger: Frigate, number: int, payload: bytes, config: Config, now: float) -> Query | None:
    try:
        event = msgspec.json.decode(payload, type=_Event, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    after, data = event.after, event.after.data or {}
    labels = {after.label} if trigger.of == "events" else {*_strings(data.get("objects"))}
    zones = {*after.current_zones, *after.entered_zones} if trigger.of == "events" else {*_strings(data.get("zones"))}
    if event.type == "end" or after.camera != (trigger.frigate_camera or trigger.camera) or after.false_positive:
        return None
    if trigger.labels and not labels & {*trigger.labels}:
        return None
    if trigger.zones and not zones & {*trigger.zones}:
        return None
    if trigger.severity and after.severity != trigger.severity:
        return None
    if trigger.min_score and max(after.score or 0, after.top_score or 0) < trigger.min_score:
        return None
    cause = {"frigate": trigger.of, "id": after.id[:100], "label": after.label, "zones": sorted(zones)[:20]}
    return triggered(trigger, f"trigger {number}/{after.id[:200]}", after.start_time or now, cause, config, now)


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _holds(trigger: Topic, payload: bytes) -> bool:
    value: Any
    try:
        value = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = payload.decode(errors="replace")
    for name in filter(None, trigger.field.split(".")):
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            return False
    if trigger.equals is not UNSET and not _same(value, trigger.equals, payload, trigger.field):
        return False
    if trigger.contains is not UNSET and trigger.contains not in (value if isinstance(value, str | list) else str(value)):
        return False
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if trigger.above is not UNSET and not (number is not None and number > trigger.above):
        return False
    return trigger.below is UNSET or (number is not None and number < trigger.below)


def _same(value: Any, wanted: Any, payload: bytes, field: str) -> bool:
    """As JSON; a bare payload also as the text that it is, so that equals = "1" and equals = 1 both mean 1."""
    if isinstance(wanted, bool) or isinstance(value, bool):
        return value is wanted
    return bool(value == wanted) or (not field and isinstance(wanted, str) and payload.decode(errors="replace") == wanted)
