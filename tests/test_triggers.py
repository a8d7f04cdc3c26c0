"""Which messages become questions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.watch import config
from agent.watch.triggers import Triggers, topics
from streams.mqtt import Message

NOW = 1_800_000_000.0


def told(*triggers: dict[str, Any]) -> Triggers:
    data = {"camera": {"front": {"source": "a.mp4"}}, "trigger": [{"camera": "front"} | trigger for trigger in triggers]}
    return Triggers(config.parse(data, "it"))


def asked(it: Triggers, topic: str, payload: Any, now: float = NOW, **more: Any) -> int:
    body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    questions = it.take(Message(topic, body, **more), now)
    for question in questions:
        it.fired(question, now)
    return len(questions)


def event(kind: str = "new", **more: Any) -> dict[str, Any]:
    after = {"id": "1", "camera": "front", "label": "person", "score": 0.7, "top_score": 0.7, "false_positive": False}
    return {"type": kind, "before": {}, "after": after | {"start_time": NOW - 2, "entered_zones": ["porch"]} | more}


@pytest.mark.parametrize(
    ("trigger", "payload", "fires"),
    [
        ({}, event(), 1),
        ({}, event("end"), 0),
        ({}, event(camera="back"), 0),
        ({"frigate_camera": "back"}, event(camera="back"), 1),
        ({}, event(false_positive=True), 0),
        ({"labels": ["dog", "person"]}, event(), 1),
        ({"labels": ["dog"]}, event(), 0),
        ({"zones": ["porch"]}, event("update"), 1),
        ({"zones": ["yard"]}, event(), 0),
        ({"min_score": 0.8}, event(), 0),
        ({"min_score": 0.8}, event("update", top_score=0.9), 1),
    ],
)
def test_frigates_events_are_filtered(trigger: dict[str, Any], payload: Any, fires: int) -> None:
    assert asked(told({"on": "frigate"} | trigger), "frigate/events", payload) == fires


def review(kind: str = "new", **more: Any) -> dict[str, Any]:
    data = {"detections": ["1718.5-abc"], "objects": ["person"], "sub_labels": [], "zones": ["porch"], "audio": []}
    after = {
        "id": "r",
        "camera": "front",
        "start_time": NOW - 1,
        "end_time": None,
        "severity": "detection",
        "thumb_path": "x",
        "data": data,
    }
    return {"type": kind, "before": after, "after": after | more}


def test_frigates_reviews_are_filtered_by_severity_objects_and_zones() -> None:
    it = told({"on": "frigate", "of": "reviews", "severity": "alert", "labels": ["person"], "zones": ["porch"]})
    assert topics(it.config) == ["frigate/reviews"]
    assert asked(it, "frigate/reviews", review()) == 0
    assert asked(it, "frigate/reviews", review("update", severity="alert")) == 1
    assert asked(it, "frigate/reviews", review("end", severity="alert")) == 0


def test_an_event_is_looked_at_from_its_start_and_has_one_key() -> None:
    it = told({"on": "frigate"})
    first, again = (it.take(Message("frigate/events", msgspec.json.encode(event(kind))), NOW)[0] for kind in ("new", "update"))
    assert first.key == again.key and first.moment == NOW - 2 and first.cause and first.cause["id"] == "1"


def test_a_trigger_rests_after_it_fired() -> None:
    it = told({"on": "frigate", "cooldown_s": 30})
    assert [asked(it, "frigate/events", event(id=str(n)), NOW + 10 * n) for n in range(5)] == [1, 0, 0, 1, 0]


def test_what_was_retained_is_old_news() -> None:
    assert asked(told({"on": "frigate"}), "frigate/events", event(), retained=True) == 0


@pytest.mark.parametrize(
    ("trigger", "payload", "fires"),
    [
        ({}, b"anything \xff", 1),
        ({"equals": "press"}, b"press", 1),
        ({"equals": "press"}, b'"press"', 1),
        ({"equals": "release"}, b"press", 0),
        ({"equals": "1"}, b"1", 1),
        ({"equals": True}, b"1", 0),
        ({"field": "a.0.b", "above": 3, "below": 5}, {"a": [{"b": 4}]}, 1),
        ({"field": "a.0.b", "above": 3, "below": 4}, {"a": [{"b": 4}]}, 0),
        ({"field": "a", "above": 3}, {"a": "4"}, 0),
        ({"field": "a", "contains": "x"}, {"a": ["x", "y"]}, 1),
        ({"field": "a", "contains": "z"}, {"a": "xy"}, 0),
        ({"field": "nope"}, {"a": 1}, 0),
    ],
)
def test_a_condition_on_any_payload(trigger: dict[str, Any], payload: Any, fires: int) -> None:
    assert asked(told({"on": "topic", "topic": "t"} | trigger), "t", payload) == fires


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(st.binary(max_size=200) | JSON)
def test_no_payload_does_any_harm(payload: Any) -> None:
    condition = {"field": "after.id", "equals": 1.5, "contains": "x", "above": 1}
    asked(told({"on": "frigate"}, {"on": "topic", "topic": "frigate/events"} | condition), "frigate/events", payload)


def test_schedules_are_due_at_their_times() -> None:
    it = told({"on": "schedule", "every_s": 60}, {"on": "schedule", "at": ["07:30", "22:00"]})
    assert it.scheduled(0, NOW)[0] == NOW + 60
    day = datetime(2027, 5, 4, 8, 0).timestamp()
    due = [datetime.fromtimestamp(it.scheduled(1, at)[0]) for at in (day, day + 14 * 3600)]
    assert due == [datetime(2027, 5, 4, 22, 0), datetime(2027, 5, 5, 7, 30)]
