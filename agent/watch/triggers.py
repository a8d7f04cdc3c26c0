"""Which messages and which moments become questions. Pure: times are seconds since 1970 and come as arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec
from msgspec import UNSET

from agent.watch import frigate
from agent.watch.config import FrigateTrigger, ScheduleTrigger, TopicTrigger, WatchConfig
from agent.watch.requests import CameraQuestion, message_key, triggered
from streams.mqtt import Message
from streams.topics import matches

LARGEST = 1 << 20  # bytes of a message
ENDED = 1_000  # of Frigate's objects and reviews that have ended; the latest are remembered


def topics(config: WatchConfig) -> list[str]:
    """The topic filters to subscribe to."""
    found = []
    for trigger in config.trigger:
        if isinstance(trigger, FrigateTrigger):
            found.append(f"{trigger.topic}/{trigger.of}")
        elif isinstance(trigger, TopicTrigger):
            found.append(trigger.topic)
    return [*dict.fromkeys(found)]


@dataclass
class Triggers:
    config: WatchConfig
    _fired: dict[int, float] = field(default_factory=dict)  # when each trigger did so last, by its number
    _ended: dict[tuple[str, str], None] = field(default_factory=dict)  # topic and id, the latest last

    def take(self, message: Message, now: float) -> list[CameraQuestion]:
        """The questions that a message asks. A retained message is from before, and asks none."""
        if message.retained or len(message.payload) > LARGEST:
            return []
        out = []
        for number, trigger in enumerate(self.config.trigger):
            question = None
            if isinstance(trigger, FrigateTrigger) and message.topic == f"{trigger.topic}/{trigger.of}":
                question = self._frigate(trigger, number, message, now)
            elif isinstance(trigger, TopicTrigger) and matches(trigger.topic, message.topic) and _holds(trigger, message.payload):
                key = f"trigger {number}/{message_key(message, now)}"
                question = triggered(trigger, key, now, {"topic": message.topic}, self.config, now)
            if question and not (trigger.cooldown_s and now - self._fired.get(number, -1e18) < trigger.cooldown_s):
                out.append(question)
        return out

    def fired(self, question: CameraQuestion, now: float) -> None:
        """A question of `take` was new, and was accepted: the trigger's cooldown begins."""
        self._fired[int(question.key.split("/")[0].removeprefix("trigger "))] = now

    def _frigate(self, trigger: FrigateTrigger, number: int, message: Message, now: float) -> CameraQuestion | None:
        detection = frigate.parse(message.payload, trigger.of)
        if detection is None:
            return None
        if detection.ended:
            self._ended[message.topic, detection.id] = None
            if len(self._ended) > ENDED:
                del self._ended[next(iter(self._ended))]
        if (message.topic, detection.id) in self._ended or not _meets(trigger, detection):
            return None
        cause = {"frigate": trigger.of, "id": detection.id[:100], "label": detection.label, "zones": sorted(detection.zones)[:20]}
        if trigger.of == "reviews":
            cause |= {"labels": sorted(detection.labels)[:20]}
        key = f"trigger {number}/{detection.id[:200]}"
        return triggered(trigger, key, detection.start_time or now, cause, self.config, now)

    def scheduled(self, number: int, now: float) -> tuple[float, CameraQuestion]:
        """When a schedule is due next after now, and its question then."""
        trigger = self.config.trigger[number]
        assert isinstance(trigger, ScheduleTrigger)
        due = now + trigger.every_s if trigger.every_s else min(_next(clock, now) for clock in trigger.at)
        return due, triggered(trigger, f"trigger {number}/{due}", due, {"schedule": due}, self.config, due)


def _next(clock: str, now: float) -> float:
    hour, minute = map(int, clock.split(":"))
    here = datetime.fromtimestamp(now)
    due = here.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (due if due > here else due + timedelta(days=1)).timestamp()


def _meets(trigger: FrigateTrigger, detection: frigate.Detection) -> bool:
    """Whether Frigate's message says that something goes on, and all conditions hold of it."""
    return (
        detection.ongoing
        and detection.camera == (trigger.frigate_camera or trigger.camera)
        and not detection.false_positive
        and (not trigger.labels or not detection.labels.isdisjoint(trigger.labels))
        and (not trigger.zones or not detection.zones.isdisjoint(trigger.zones))
        and (trigger.severity is None or detection.severity == trigger.severity)
        and detection.score >= trigger.min_score
    )


def _holds(trigger: TopicTrigger, payload: bytes) -> bool:
    value: Any
    try:
        value = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = payload.decode(errors="replace")
    for name in filter(None, trigger.field.split(".")):
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
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
