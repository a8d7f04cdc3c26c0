"""What Frigate (0.14 to 0.18) says on frigate/events and frigate/reviews, as far as a trigger needs it. Pure.

Frigate's own words, from its documentation and sources:

- A message's type is "new", "update" or "end". Reviews are followed by others after their end: "genai" brings a description.
- A review names its objects by label, but as `person-verified` once a sub-label is known (a face, a number plate), by an
  attribute such as `fedex` instead of `car` where a delivery company's logo was seen, and as `label: sub-label` where another
  program made the event. Sounds stand beside the objects, as `audio`.
- An event keeps its label; its sub-label is null, a text or [text, score], and its attributes are {text: score}.
- Every field may be null, and further ones come with each version. So nothing but `id` and `camera` is required.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

# The objects on which an attribute is looked for. A review names the attribute instead of the object.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "face": ("person",),
    "amazon": ("person", "car"),
    "license_plate": ("car", "motorcycle"),
}
COMPANIES = "an_post canada_post dhl dpd fedex gls nzpost postnl postnord purolator royal_mail ups usps"
ATTRIBUTES |= dict.fromkeys(COMPANIES.split(), ("car",))


@dataclass(frozen=True)
class Detection:
    """A tracked object, or a review of several. Times in seconds since 1970, scores from 0 to 1."""

    id: str
    camera: str
    ongoing: bool  # the message says that it began or changed, and it has not ended
    ended: bool
    label: str | None  # of a tracked object
    labels: frozenset[str]  # all that it may be called
    zones: frozenset[str]
    severity: str | None = None  # "alert" or "detection"
    start_time: float | None = None
    score: float = 0.0  # the best so far
    false_positive: bool = False


def parse(payload: bytes, of: Literal["events", "reviews"]) -> Detection | None:
    """None of what is no such message."""
    try:
        message = json.loads(payload)  # which takes the NaN that Python programs write
    except (ValueError, RecursionError):
        return None
    after = message.get("after") if isinstance(message, dict) else None
    if not isinstance(after, dict) or not _is_text(after.get("id")) or not _is_text(after.get("camera")):
        return None
    data = after.get("data")
    if of == "events":
        labels, zones = _event_labels(after), [*_texts(after.get("current_zones")), *_texts(after.get("entered_zones"))]
    else:
        data = data if isinstance(data, dict) else {}
        labels, zones = _review_labels(data), _texts(data.get("zones"))
    label, severity = after.get("label"), after.get("severity") or after.get("max_severity")
    ended = message.get("type") == "end" or after.get("end_time") is not None
    return Detection(
        id=after["id"],
        camera=after["camera"],
        ongoing=message.get("type") in ("new", "update") and not ended,
        ended=ended,
        label=label if _is_text(label) else None,
        labels=frozenset(labels),
        zones=frozenset(zones),
        severity=severity if _is_text(severity) else None,
        start_time=_number(after.get("start_time")),
        score=max(_number(after.get(name)) or 0.0 for name in ("score", "top_score")),
        false_positive=after.get("false_positive") is True,
    )


def _event_labels(after: dict[str, Any]) -> list[str]:
    return [text for name in ("label", "sub_label", "attributes") for text in _texts(after.get(name))]


def _review_labels(data: dict[str, Any]) -> list[str]:
    labels = []
    for name in _texts(data.get("objects")):
        label = name.partition(": ")[0].removesuffix("-verified")
        labels += [name, label, *ATTRIBUTES.get(label, ())]
    return [*labels, *_texts(data.get("sub_labels")), *_texts(data.get("audio"))]


def _texts(value: Any) -> list[str]:
    """The texts of a text, a list, or an object's keys; what else is there is ignored."""
    found = [value] if isinstance(value, str) else value if isinstance(value, list | dict) else ()
    return [item for item in found if _is_text(item)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()  # which lone surrogates are not; they cannot be written down


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12 else None
