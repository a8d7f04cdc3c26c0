"""The log beside a recording: whatever goes in and comes out is a line of it."""

import json
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from agent import events
from agent.calls import ToolCall
from agent.events import Event, Input
from agent.marks import Mark
from agent.recording import EventLog
from agent.segments import Evicted
from agent.tape import SystemPrompt
from agent.turns import TurnDetectionConfig
from streams.frames import Audio

SPECIAL: dict[Any, Any] = {
    Any: {"found": [1, "two"]},
    Evicted: Evicted(3, "turn"),
    Mark: Mark((1, 2, 3, 4), "cup"),
    ToolCall: ToolCall("look", {"where": ["left", {"at": 1.5}]}),
    SystemPrompt: SystemPrompt("Be brief.", ({"name": "look"},)),
    TurnDetectionConfig: TurnDetectionConfig(),
    events.WordTiming: events.WordTiming(0, 3, 5),
    np.ndarray: np.zeros(4, np.float32),
    int: 7,
    float: 0.5,
    str: "ä",
    bool: True,
    bytes: b"jpeg",
}


def some(kind: Any) -> Any:
    """A value of an annotation."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in SPECIAL:
        return SPECIAL[kind]
    if origin is tuple:
        return tuple(some(part) for part in inner if part is not Ellipsis)
    if origin is UnionType or "Union" in str(origin):
        return some(inner[0])
    if origin is not None and "Mapping" in str(origin):
        return {"first_token": 12.5}
    if origin is not None and "Literal" in str(origin):
        return inner[0]
    if origin is not None:
        return some(origin)
    return kind(**{field.name: some(get_type_hints(kind)[field.name]) for field in fields(kind)})


@pytest.mark.parametrize("kind", [*get_args(Event), *get_args(Input)], ids=lambda kind: kind.__name__)
def test_every_event_and_every_input_is_a_line_of_the_log(kind, tmp_path):
    log = EventLog(tmp_path / "talk.jsonl", {"model": "nano"})
    thing = Audio(np.zeros(640, np.float32), 0) if kind is Audio else some(kind)
    if kind in get_args(Event):
        log.event(thing, None)
    else:
        log.input(thing)
    log.close()
    head, *lines = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert head == {"attend": 2, "model": "nano"}
    assert [line.get("event", line.get("input")) for line in lines] == ([] if kind is Audio else [kind.__name__])
    if kind is events.EntriesEvicted:
        assert lines[0]["gone"] == [{"of": 3, "what": "turn"}]
