"""MQTT topics, as a broker reads them."""

from __future__ import annotations

import pytest

from streams.topics import can_publish_to, filter_error, matches, name_error


@pytest.mark.parametrize(
    ("pattern", "topic", "same"),
    [
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "$SYS/x", False),
        ("a", "b", False),
    ],
)
def test_topics_match_as_a_broker_matches_them(pattern: str, topic: str, same: bool) -> None:
    assert matches(pattern, topic) is same


@pytest.mark.parametrize(
    ("topic", "is_filter", "is_name"),
    [
        ("a/b", True, True),
        ("a//b", True, True),
        ("home/+/doorbell", True, False),
        ("home/#", True, False),
        ("#", True, False),
        ("+", True, False),
        ("$share/group/home/#", True, False),
        ("home/doorbell_+", False, False),
        ("a/#/b", False, False),
        ("a/b#", False, False),
        ("#/#", False, False),
        ("", False, False),
        ("a\0b", False, False),
        ("a" * 65_536, False, False),
        ("\ud800", False, False),
    ],
)
def test_what_can_be_subscribed_to_and_what_is_one_topic(topic: str, is_filter: bool, is_name: bool) -> None:
    assert (filter_error(topic) is None, name_error(topic) is None) == (is_filter, is_name)


@pytest.mark.parametrize(
    ("topic", "can"),
    [("a/b", True), ("", False), ("a/+", False), ("a/#", False), ("$SYS/a", False), ("a\0b", False), ("\ud800", False)],
)
def test_topics_that_nobody_can_publish_to_are_known(topic: str, can: bool) -> None:
    assert can_publish_to(topic) is can
    assert not can_publish_to("a" * 251)
