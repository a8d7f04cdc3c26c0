"""What Frigate 0.14 to 0.18 send: each message as the versions write it, and which of them ask a question."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.watch import config, frigate
from agent.watch.triggers import Triggers
from streams.mqtt import Message

NOW = 1_800_000_000.0


def event(kind: str = "new", **more: Any) -> dict[str, Any]:
    """As 0.14 wrote it."""
    after = {"id": "1607.4-mxk", "camera": "front", "frame_time": NOW, "label": "person", "sub_label": None, "top_score": 0.95}
    after |= {"false_positive": False, "start_time": NOW - 2, "end_time": None, "score": 0.87, "box": [424, 500, 536, 712]}
    after |= {"current_zones": [], "entered_zones": ["porch"], "attributes": {}, "current_attributes": [], "snapshot": None}
    return {"type": kind, "before": after, "after": after | more}


def event_18(kind: str = "new", **more: Any) -> dict[str, Any]:
    """As 0.18 writes it."""
    later = {"snapshot_clean": True, "computed_score": 0.8, "max_severity": "alert", "pending_loitering": False, "active": True}
    later |= {"velocity_angle": float("nan"), "path_data": [[[0.4, 0.5], NOW]], "recognized_license_plate": None}
    return event(kind, **(later | {"person_classifier": "resident"} | more))


def review(
    kind: str = "new", objects: Any = ("person",), severity: Any = "alert", end_time: Any = None, **data: Any
) -> dict[str, Any]:
    """As 0.14 wrote it."""
    about = {"detections": ["1607.4-mxk"], "objects": objects, "sub_labels": [], "zones": ["porch"], "audio": []} | data
    after = {"id": "1718.3-fqk", "camera": "front", "start_time": NOW - 1, "end_time": end_time, "severity": severity}
    after |= {"thumb_path": "/media/frigate/clips/review/thumb.webp", "data": about}
    return {"type": kind, "before": after, "after": after}


def review_18(*given: Any, **more: Any) -> dict[str, Any]:
    """As 0.17 and 0.18 write it."""
    return review(*given, **({"verified_objects": [], "thumb_time": None, "metadata": None} | more))


def asked(*payloads: Any, of: str = "events", **conditions: Any) -> int:
    """How many questions the messages ask, one after the other."""
    data = {"camera": {"front": {"source": "a.mp4"}}, "trigger": [{"on": "frigate", "camera": "front", "of": of} | conditions]}
    triggers, keys = Triggers(config.parse(data, "it")), set()
    for payload in payloads:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        keys |= {question.key for question in triggers.take(Message(f"frigate/{of}", body), NOW)}
    return len(keys)


@pytest.mark.parametrize(
    ("objects", "labels", "fires"),
    [
        (["person"], ["person"], 1),
        (["person-verified"], ["person"], 1),
        (["dog-verified", "car"], ["dog"], 1),
        (["person-verified"], ["car"], 0),
        (["fedex"], ["car"], 1),
        (["ups"], ["car"], 1),
        (["royal_mail"], ["car"], 1),
        (["amazon"], ["car"], 1),
        (["amazon"], ["person"], 1),
        (["license_plate"], ["motorcycle"], 1),
        (["face"], ["person"], 1),
        (["fedex"], ["person"], 0),
        (["fedex"], ["fedex"], 1),
        (["person-verified"], ["person-verified"], 1),
        (["doorbell: rang"], ["doorbell"], 1),
        (["person", None, 5], ["person"], 1),
        (None, ["person"], 0),
        (None, [], 1),
    ],
)
@pytest.mark.parametrize("version", [review, review_18])
def test_a_review_names_its_objects_in_many_ways(version: Any, objects: Any, labels: list[str], fires: int) -> None:
    assert asked(version("new", objects), of="reviews", labels=labels) == fires


def test_who_was_recognised_and_what_was_heard_can_be_triggered_on() -> None:
    assert asked(review("update", ["person-verified"], sub_labels=["Bob"]), of="reviews", labels=["Bob"]) == 1
    assert asked(review("new", [], audio=["bark"]), of="reviews", labels=["bark"]) == 1
    assert asked(event("update", sub_label=["Bob", 0.79]), labels=["Bob"]) == 1
    assert asked(event("update", label="car", sub_label=["fedex", 0.9], attributes={"fedex": 0.9}), labels=["car"]) == 1
    assert asked(event("update", label="car", attributes={"amazon": 0.9}), labels=["person"]) == 0


def test_a_review_whose_person_is_recognised_later_is_asked_about_once() -> None:
    messages = [review_18("new", ["person"]), review_18("update", ["person-verified"], sub_labels=["Bob"]), review_18("update")]
    assert asked(*messages, of="reviews", labels=["person"]) == 1
    assert asked(*messages[1:], of="reviews", labels=["person"]) == 1


@pytest.mark.parametrize(
    "sub_label", [None, "Bob", ["Bob", 0.79], ["Bob"], [["Bob", 0.79]], {"name": "Bob"}, 5], ids=lambda value: str(value)
)
@pytest.mark.parametrize("version", [event, event_18])
def test_an_event_is_itself_whatever_its_sub_label_is(version: Any, sub_label: Any) -> None:
    assert asked(version(sub_label=sub_label), labels=["person"], zones=["porch"], min_score=0.9) == 1


@pytest.mark.parametrize("field", sorted(event_18()["after"].keys() - {"id", "camera"}))
def test_any_field_of_an_event_may_be_null_missing_or_of_another_kind(field: str) -> None:
    for value in (None, "text", 5, [], {}, [None]):
        fires = not (field == "end_time" and value is not None)
        assert asked(event_18(**{field: value})) == fires, value
    message = event_18()
    del message["after"][field]
    assert asked(message) == 1


@pytest.mark.parametrize("field", ["detections", "objects", "sub_labels", "zones", "audio", "metadata", "verified_objects"])
def test_any_field_of_a_reviews_data_may_be_null_or_of_another_kind(field: str) -> None:
    for value in (None, "text", 5, [], {}, [None]):
        assert asked(review_18(**{field: value}), of="reviews") == 1


GENAI = {"title": "A visitor", "scene": "Somebody came and left.", "potential_threat_level": 0}


@pytest.mark.parametrize("kind", ["genai", "description", "metadata", "recognized", "", None, "NEW", 5])
def test_only_a_beginning_or_an_update_asks(kind: Any) -> None:
    assert asked(event(kind)) == 0
    assert asked(review_18(kind), of="reviews") == 0
    assert asked(review_18(kind, end_time=NOW, metadata=GENAI), of="reviews") == 0


def test_what_has_ended_asks_nothing_any_more() -> None:
    over = [review_18("end", severity="alert", end_time=NOW), review_18("genai", end_time=NOW, metadata=GENAI)]
    assert asked(*over, of="reviews") == 0
    assert asked(review_18("update", end_time=NOW), of="reviews") == 0
    assert asked(*over, review_18("update"), of="reviews") == 0, "it is known to have ended"
    assert asked(event("end", end_time=NOW), event("update")) == 0
    assert asked(event("end", end_time=NOW, id="another"), event("update")) == 1


UPDATES = [
    {"type": "description", "id": "1607.4-mxk", "description": "The car is red."},
    {"type": "face", "id": "1607.4-mxk", "name": None, "score": 0.95, "camera": "front", "timestamp": NOW},
    {"type": "lpr", "id": "1607.4-mxk", "name": "Bob's", "plate": "123ABC", "score": 0.9, "camera": "front", "timestamp": NOW},
    {"type": "classification", "id": "1607.4-mxk", "camera": "front", "model": "helmet", "attribute": "yes", "score": 0.9},
]


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update["type"])
def test_what_is_learnt_of_an_object_asks_nothing_by_itself_but_a_trigger_on_its_topic_may(update: dict[str, Any]) -> None:
    assert asked(update) == asked(update, of="reviews") == 0
    trigger = {"on": "topic", "topic": "frigate/tracked_object_update", "camera": "front", "field": "type", "equals": "face"}
    triggers = Triggers(config.parse({"camera": {"front": {"source": "a.mp4"}}, "trigger": [trigger]}, "it"))
    taken = triggers.take(Message("frigate/tracked_object_update", json.dumps(update).encode()), NOW)
    assert len(taken) == (update["type"] == "face")


def test_severity_is_told_by_reviews_and_by_newer_events() -> None:
    assert asked(review("new", severity="detection"), of="reviews", severity="alert") == 0
    assert asked(review("new", severity="detection"), review("update"), of="reviews", severity="alert") == 1
    assert asked(event_18(), severity="alert") == 1
    assert asked(event_18(max_severity=None), severity="alert") == 0


SIMPLE = st.none() | st.booleans() | st.floats() | st.text()
ANYTHING = st.recursive(SIMPLE, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(st.dictionaries(st.sampled_from(sorted(event_18()["after"] | review()["after"])), ANYTHING), ANYTHING)
def test_nothing_that_it_might_send_does_any_harm(after: dict[str, Any], kind: Any) -> None:
    for of in ("events", "reviews"):
        frigate.parse(json.dumps({"type": kind, "after": {"id": "1", "camera": "front"} | after}).encode(), of)  # type: ignore[arg-type]
        asked({"type": "new", "after": {"id": "1", "camera": "front"} | after}, of=of)
