"""JSON schemas from outside, and answers that are JSON of one."""

from __future__ import annotations

from typing import Any

import pytest

from agent.watch.json_schema import parse_answer, schema_error

OPEN = {"type": "object", "required": ["open"], "properties": {"open": {"type": "boolean"}}}


def test_schemas_that_would_fetch_something_or_never_end_are_refused() -> None:
    inside = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "string"}}}
    assert schema_error(inside) is None
    outside: list[dict[str, Any]] = [{"$ref": "http://x/y"}, {"$dynamicRef": "http://x"}, {"pattern": "(a+)+$"}]
    for schema in (*outside, {"type": "x"}, {"title": "a" * 20_000}):
        assert schema_error(schema), schema


@pytest.mark.parametrize(
    ("text", "value", "why"),
    [
        ('{"open": true}', {"open": True}, None),
        ('```json\n{"open": false}\n```', {"open": False}, None),
        ('{"open": 1}', None, "1 is not of type 'boolean' - at `$.open`"),
        ('{"open": NaN}', None, "NaN is no JSON"),
        ("It is open.", None, "Expecting value"),
        ("[" * 100_000, None, "recursion"),
    ],
)
def test_an_answer_is_json_of_the_schema_or_it_is_said_why_not(text: str, value: object, why: str | None) -> None:
    found, wrong = parse_answer(text, OPEN)
    assert found == value and (wrong == why if why is None else why in str(wrong))
