"""Answers as messages: what is published of a question, and where. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from agent.marks import Mark
from agent.watch.requests import CameraQuestion, Requester
from agent.watch.visual_qa import VisualAnswer
from streams.camera import Shot
from streams.mqtt import Publication


def answer_body(question: CameraQuestion, model: str, now: float, **more: Any) -> dict[str, Any]:
    """The fields that every answer has, an error as well, and more."""
    by = {"id": question.by.id, "camera": question.camera, "question": question.question}
    cause = {"cause": question.cause} if question.cause else {}
    return by | {"model": model, "asked": question.asked, "at": now} | cause | {"stage": "final"} | more


def finished_body(
    question: CameraQuestion,
    model: str,
    answer: VisualAnswer,
    shots: Sequence[Shot],
    begun: float,
    now: float,
    stage: str = "final",
) -> dict[str, Any]:
    """An answer to publish. `shots`: the pictures it is about, the oldest first; `begun`: when work on it began."""
    timings = {"waited": (begun - question.asked) * 1000, "first_token": answer.first_token_ms}
    timings |= {"model": answer.model_ms, "total": (now - question.asked) * 1000}
    more: dict[str, Any] = {} if answer.value is None else {"value": answer.value}
    more |= {
        "answer": answer.text,
        "stage": stage,
        "marks": _marks(answer.marks),
        "frames": [round(shot.at, 3) for shot in shots],
    }
    more |= {"age_s": round(max(0.0, now - shots[-1].at), 3)} | ({"retained": True} if shots[-1].retained else {})
    return answer_body(question, model, now, **more, timings_ms={name: round(ms, 1) for name, ms in timings.items()})


def replies(at: str, retain: bool, body: dict[str, Any], by: Requester) -> list[Publication]:
    """An answer to whoever asked, and on the camera's own topic. `at`: what the camera's topics begin with."""
    data = msgspec.json.encode(body)
    own = Publication(f"{at}/answer", data, retain and "error" not in body)
    return [Publication(by.reply_to, data, correlation=by.correlation), own] if by.reply_to else [own]


def publications(
    at: str, retain: bool, body: dict[str, Any], event_type: str, by: Requester, picture: bytes | None = None
) -> list[Publication]:
    """All that is published of an answer. `at`: what the camera's topics begin with; `picture`: a JPEG."""
    event = {"event_type": event_type} | {
        name: body[name] for name in body if name not in ("marks", "timings_ms", "value", "stage")
    }
    shown = [Publication(f"{at}/image", picture, retain)] if picture else []
    return [*replies(at, retain, body, by), *shown, Publication(f"{at}/event", msgspec.json.encode(event))]


def _marks(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    return [{"box_2d": list(mark.box), "label": mark.label} for mark in marks]
