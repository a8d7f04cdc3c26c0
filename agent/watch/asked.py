"""What is asked about a camera and what is answered, as messages. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from agent.marks import Mark
from agent.watch.config import Asking, Config, ConfigError, Source, Text, Trigger, decoded, wrong_schema
from model.pixels import BUDGETS
from streams.camera import Shot
from streams.mqtt import Message, Publication, can_publish_to

LARGEST = 64 << 10  # bytes of an ask
Id = Annotated[str, Meta(min_length=1, max_length=200)]


class Asker(Struct, frozen=True, kw_only=True):
    """Who asked, as far as it was said: what goes back with the answer, and where to."""

    id: str | None = None
    reply_to: str | None = None
    correlation: bytes | None = None


class Query(Asking, frozen=True, kw_only=True):
    """A question that was accepted. Times in seconds since 1970."""

    key: str  # by which it is told from all others, also if it comes twice
    camera: str
    question: str
    asked: float
    moment: float  # around which is looked
    until: float  # after which nobody wants the answer any more
    by: Asker = Asker()
    cause: dict[str, Any] | None = None  # what of a trigger's message is handed on


class Ask(Asking, frozen=True, kw_only=True):
    """An ask as JSON. What is not said is as the camera's configuration says."""

    question: Text | None = None
    id: Id | None = None
    reply_to: Id | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    at: float | None = None  # when it was asked, in seconds since 1970


class Refused(ValueError):
    """An ask that is not taken: one sentence, and what is known of who asked."""

    def __init__(self, why: str, by: Asker) -> None:
        super().__init__(why)
        self.by = by


def _over(source: Source, given: dict[str, Any]) -> dict[str, Any]:
    """How to ask: what was said, over what the camera's configuration says."""
    return {name: given.get(name, getattr(source, name)) for name in Asking.__struct_fields__}


def read_ask(message: Message, camera: str, config: Config, own: str, now: float) -> Query:
    """Plain text, or JSON if it begins with a brace. `own`: topics that begin so are ours, and no answer goes there. Raises
    Refused."""
    source, reply_to, data = config.camera[camera], message.reply_to, message.payload
    by = Asker(reply_to=reply_to if place(reply_to, own) else None, correlation=message.correlation)
    if len(data) > LARGEST:
        raise Refused(f"an ask has at most {LARGEST:,} bytes", by)
    given: dict[str, Any] = {}
    ask = Ask()
    try:
        text = data.decode()
        if text.lstrip().startswith("{"):
            ask = decoded(data, Ask)
            given = msgspec.json.decode(data)
        elif text.strip():
            ask = Ask(question=msgspec.convert(text.strip().replace("\0", ""), Text))
        if ask.budget not in (None, *BUDGETS):
            raise ConfigError(f"a budget is one of {', '.join(map(str, BUDGETS))} - at `$.budget`")
        if ask.schema is not None and (why := wrong_schema(ask.schema)):
            raise ConfigError(f"no JSON schema: {why} - at `$.schema`")
    except (UnicodeDecodeError, msgspec.ValidationError, ConfigError) as error:
        why = "an ask is UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise Refused(f"this ask cannot be read: {why}", by) from error
    reply_to = reply_to or ask.reply_to
    if reply_to and not place(reply_to, own):
        raise Refused("answers cannot be published to this reply topic", Asker(id=ask.id))
    begun = min(ask.at or now, now)
    waits = min(ask.deadline_s or config.deadline_s, message.expiry_s or 86_400)
    known = ask.id or (message.correlation and message.correlation.hex())
    key = f"{camera}/{reply_to or ''}/{known}" if known else f"{camera}/{stamp(message, now)}"
    return Query(
        **_over(source, given),
        key=key,
        camera=camera,
        question=ask.question or source.question,
        asked=now,
        moment=begun,
        until=begun + waits,
        by=Asker(id=ask.id, reply_to=reply_to, correlation=message.correlation),
    )


def stamp(message: Message, now: float) -> str:
    """Part of the key of what has no id: all but its end is the same if the broker sends it again."""
    return f"{sha256(message.topic.encode() + b'/' + message.payload).hexdigest()[:24]}/{message.mid}/{now:.3f}"


def place(reply_to: str | None, own: str) -> bool:
    """Whether an answer can be published there."""
    return reply_to is not None and can_publish_to(reply_to) and not reply_to.startswith(own)


def triggered(trigger: Trigger, key: str, moment: float, cause: dict[str, Any], config: Config, now: float) -> Query:
    source = config.camera[trigger.camera]
    said = {name: value for name, value in msgspec.structs.asdict(trigger).items() if value != getattr(Asking(), name, value)}
    return Query(
        **_over(source, said),
        key=key,
        camera=trigger.camera,
        question=trigger.question or source.question,
        asked=now,
        moment=min(moment, now),
        until=now + config.deadline_s,
        cause=cause,
    )


def answer(query: Query, model: str, now: float, **more: Any) -> dict[str, Any]:
    """What is published of an answer."""
    out = {"id": query.by.id, "camera": query.camera, "question": query.question, "model": model, "asked": query.asked, "at": now}
    return out | ({"cause": query.cause} if query.cause else {}) | {"stage": "final"} | more


def copies(at: str, retain: bool, given: dict[str, Any], by: Asker) -> list[Publication]:
    """An answer for who asked, and on the camera's own topic."""
    body = msgspec.json.encode(given)
    own = Publication(f"{at}/answer", body, retain and "error" not in given)
    return [Publication(by.reply_to, body, correlation=by.correlation), own] if by.reply_to else [own]


def publications(
    at: str, retain: bool, given: dict[str, Any], kind: str, by: Asker, picture: bytes | None = None
) -> list[Publication]:
    """All that is published of an answer; `at`: the camera's topics begin so; `kind`: of the event."""
    event = {"event_type": kind} | {name: given[name] for name in given if name not in ("marks", "timings_ms", "value", "stage")}
    shown = [Publication(f"{at}/image", picture, retain)] if picture else []
    return [*copies(at, retain, given, by), *shown, Publication(f"{at}/event", msgspec.json.encode(event))]


def marked(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    return [{"box_2d": list(mark.box), "label": mark.label} for mark in marks]


def chosen(shots: list[Shot], count: int, moment: float, still: float = 2.0) -> list[Shot]:
    """The last, the one just before the moment, and of the others those that differ most from what is chosen already, in their
    order. What differs from all of it by less than `still` grey levels shows nothing new."""
    if not shots:
        return []
    last = len(shots) - 1
    taken = [last]
    before = max((n for n in range(last) if shots[n].at < moment), default=None)
    if before is not None and (shots[last].at - shots[before].at > 1 or _differ(shots[last], shots[before]) >= still):
        taken.append(before)
    left = [n for n in range(last) if n not in taken]
    while left and len(taken) < count:
        best = max(left, key=lambda n: min(_differ(shots[n], shots[other]) for other in taken))
        if min(_differ(shots[best], shots[other]) for other in taken) < still:
            break
        taken.append(best)
        left.remove(best)
    return [shots[n] for n in sorted(taken)]


def _differ(a: Shot, b: Shot) -> float:
    return float(abs(a.grey.astype(int) - b.grey.astype(int)).mean())
