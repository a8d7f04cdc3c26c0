"""MQTT topics: which can be subscribed to and published to, and which filter matches which topic. Pure."""

from __future__ import annotations

LONGEST = 65_535  # bytes of a topic, as the protocol counts them
LONGEST_REPLY = 250  # bytes of a topic that somebody else chooses


def filter_error(topic: str) -> str | None:
    """Why this is no topic filter to subscribe to, as a part of a sentence."""
    if why := _text_error(topic):
        return why
    levels = topic.split("/")
    if "#" in topic and (topic.count("#") > 1 or levels[-1] != "#"):
        return "in a topic # stands alone, as its last level"
    if any("+" in level and level != "+" for level in levels):
        return "in a topic + stands alone between slashes"
    return None


def name_error(topic: str) -> str | None:
    """Why this is no single topic, as a part of a sentence."""
    if why := _text_error(topic):
        return why
    return "one topic is meant, so + and # cannot be in it" if set("+#") & set(topic) else None


def can_publish_to(topic: str) -> bool:
    """Whether answers can be published to a topic that a message names: short, no wildcards, nothing of the broker's own."""
    return name_error(topic) is None and not topic.startswith("$") and len(topic.encode()) <= LONGEST_REPLY


def matches(pattern: str, topic: str) -> bool:
    """Whether a filter with + and # matches a topic."""
    wanted, given = pattern.split("/"), topic.split("/")
    for number, level in enumerate(wanted):
        if level == "#":
            return not (number == 0 and topic.startswith("$"))
        if number >= len(given) or level not in ("+", given[number]) or (level == "+" and number == 0 and topic.startswith("$")):
            return False
    return len(wanted) == len(given)


def _text_error(topic: str) -> str | None:
    try:
        size = len(topic.encode())
    except UnicodeEncodeError:
        return "it is not Unicode text"
    if not 0 < size <= LONGEST:
        return f"a topic has 1 to {LONGEST:,} bytes"
    return None if topic.isprintable() else "it holds control characters"
