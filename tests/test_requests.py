"""Asks over MQTT, and what a question is made of."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.watch import config
from agent.watch.requests import CameraQuestion, read_ask
from streams.mqtt import Message

NOW = 1_800_000_000.0


def ask(payload: bytes, now: float = NOW, **more: Any) -> Any:
    told = config.parse({"camera": {"front": {"source": "a.mp4"}}}, "it")
    return read_ask(Message("agent/home/front/ask", payload, **more), "front", told, now)


def test_what_is_not_said_is_as_the_camera_is_configured() -> None:
    data = {"camera": {"front": {"source": "a", "budget": 70, "quick": True, "question": "Who?"}}}
    question = read_ask(Message("t", b'{"budget": 140}'), "front", config.parse(data, "it"), NOW)
    assert (question.budget, question.quick, question.question) == (140, True, "Who?")


def test_the_same_ask_that_the_broker_sends_again_has_the_same_stem_and_another_one_has_not() -> None:
    first, again, other = ask(b"hello", mid=5), ask(b"hello", NOW + 3, mid=5, again=True), ask(b"hello", NOW + 3, mid=6)
    assert first.key.rpartition("/")[0] == again.key.rpartition("/")[0] != other.key.rpartition("/")[0]
    assert len({first.key, again.key, other.key}) == 3
    assert ask(b'{"id": "a"}').key == ask(b'{"id": "a", "question": "b"}', NOW + 9).key
    assert ask(b"a", correlation=b"x").key == ask(b"a", NOW + 1, correlation=b"x").key != ask(b"a", correlation=b"y").key


def test_the_shortest_of_all_deadlines_holds() -> None:
    assert ask(b"a").until == NOW + 60
    assert ask(b'{"deadline_s": 5}').until == NOW + 5 == ask(b"a", expiry_s=5.0).until
    assert ask(f'{{"at": {NOW - 8}, "deadline_s": 5}}'.encode()).until == NOW - 3


def test_a_question_survives_being_written_down() -> None:
    about = {"key": "k", "camera": "c", "question": "q", "asked": 1.0, "moment": 2.0, "until": 3.0}
    it = CameraQuestion(**about, schema={"type": "object"}, look_back_s=3)
    assert msgspec.json.decode(msgspec.json.encode(it), type=CameraQuestion) == it
