from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.marks import Mark, MarkReader, draw, parse

RED = Mark((120, 340, 560, 780), "red circle")
BLUE = Mark((0, 10, 1000, 990), "blue square")
RED_JSON = '{"box_2d": [120, 340, 560, 780], "label": "red circle"}'
BLUE_JSON = '{"box_2d": [0, 10, 1000, 990], "label": "blue square"}'


@pytest.mark.parametrize(
    "text, plain, marks",
    [
        (f"Here: [{RED_JSON}, {BLUE_JSON}] both.", "Here:  both.", [RED, BLUE]),
        (f"[\n  {RED_JSON},\n  {BLUE_JSON}\n]", "", [RED, BLUE]),
        (f"{RED_JSON} alone", " alone", [RED]),
        (f"Look:\n```json\n[{RED_JSON}]\n```\nThere.", "Look:\n\nThere.", [RED]),
        (f"```\n{RED_JSON}\n```", "", [RED]),
        (f"```json\n{RED_JSON}\n{BLUE_JSON}\n```", "", [RED, BLUE]),
        (f"[{RED_JSON}] and [{BLUE_JSON}].", " and .", [RED, BLUE]),
        (f"[{RED_JSON}", "", [RED]),
        ("none: ```json\n[]\n```", "none: ", []),
        ('{"label": "red circle", "box_2d": [120, 340, 560, 780]}', "", [RED]),
        ('{"box_2d": [120, 340, 560, 780]}', "", [Mark(RED.box)]),
        ('{"box_2d": [120, 340, 560, 780], "label": null, "confidence": 0.5, "seen": true}', "", [Mark(RED.box)]),
        # points
        ('[{"point": [10, 20], "label": "door"}]', "", [Mark((10, 20, 10, 20), "door")]),
        ('{"point": [2000, -3.0]}', "", [Mark((1000, 0, 1000, 0))]),
    ],
)
def test_detections_are_marks(text, plain, marks):
    assert parse(text) == (plain, marks)


@pytest.mark.parametrize(
    "text",
    [
        "", "[see above]", "{braces}", "a[0] = {1: 2}", "[]", "{}", "[[[", "`code`", "```py\nprint([1, 2])\n```",
        '{"name": "x"}', '[{"name": "x"}, [1]]',
        'say "box_2d"', '{"box_2d"', '{"point": "left"}', "[1, 2, 3, 4]", "f({'a': 'b'})", "```json\n", "[{",
        '```json\n{"a": [1]}\n```',
    ],
)  # fmt: skip
def test_other_brackets_are_text(text):
    assert parse(text) == (text, [])
    assert parse(f"{text}. {RED_JSON} {text}") == (f"{text}.  {text}", [RED])


@pytest.mark.parametrize(
    "text, plain, mark",
    [
        ("[{'box_2d': [120, 340, 560, 780], 'label': 'red circle'}]", "", RED),
        ("[{'box_2d': [120, 340, 560, 780,], 'label': 'red circle',},]", "", RED),
        ('[{"box_2d": [120.4, 339.6, 5.6e2, 780.0], "label": "red circle"}]', "", RED),
        ('[{"box_2d": [560, 780, 120, 340], "label": "red circle"}]', "", RED),
        ('[{"box_2d": [[120, 340], [560, 780]], "label": "red circle"}]', "", RED),
        ('[{"box_2d": [120, 340, 560, 780] "label": "red circle"}]', "", RED),
        ('[{"box_2d": [-5, 10, 99999, 990], "label": "blue square"}]', "", BLUE),
        ("{'box_2d': [120, 340, 560, 780], 'label': 'the dog's bowl'}", "", Mark(RED.box, "the dog's bowl")),
        ('{"box_2d": [120, 340, 560, 780], "label": "the "big" dog"}', "", Mark(RED.box, 'the "big" dog')),
        ('{"box_2d": [120, 340, 560, 780], "label": "a } b ] c"}', "", Mark(RED.box, "a } b ] c")),
        (r'{"box_2d": [120, 340, 560, 780], "label": "T\u00fcr \"1\"\n"}', "", Mark(RED.box, 'Tür "1"')),
        # cut off
        ('[{"box_2d": [120, 340, 560, 780], "label": "red ci', "", Mark(RED.box, "red ci")),
        ('[{"box_2d": [120, 340, 560, 780], "lab', "", Mark(RED.box)),
        ('[{"box_2d": [120, 340, 560, 78', "", None),
        ('[{"box_2d": ', "", None),
        (f"[{RED_JSON}, " + '{"bo', "", RED),
        (f"```json\n[{RED_JSON}]\n``", "", RED),
        # broken off: what follows is said
        ('[{"box_2d": [120, 340, 560, 780], "label": "red circle"] and more.', " and more.", RED),
        ('[{"box_2d": [120, 340, 560, 780], "label": "red circle}] and more.', " and more.", RED),
        ('[{"box_2d": [120, 340, 560, 780], "label": "red circle\nand more.', "\nand more.", RED),
        ('[{"box_2d": [120, 340, 560, 780] and more.', "and more.", Mark(RED.box)),
        (f"[{RED_JSON}, and more.", ", and more.", RED),
        (f"[{RED_JSON}; or [see] more", "; or [see] more", RED),
        ('{"box_2d": I think it is left.', "I think it is left.", None),
        # nothing to draw
        ('[{"box_2d": [5, 5, 5, 9], "label": "thin"}] ok', " ok", None),
        ('[{"box_2d": [1200, 5, 1300, 9], "label": "outside"}] ok', " ok", None),
        ('[{"box_2d": [1, 2, 3], "label": "three"}] ok', " ok", None),
        ('[{"box_2d": [], "label": "none"}] ok', " ok", None),
        ('[{"box_2d": null}] ok', " ok", None),
        ('{"point": [1, 2, 3]} ok', " ok", None),
    ],
)
def test_broken_json_is_forgiven(text, plain, mark):
    assert parse(text) == (plain, [mark] if mark else [])


def test_the_end_of_a_code_block_is_not_the_fence_of_a_detection():
    assert parse(f"```py\nx\n```\n[{RED_JSON}]") == ("```py\nx\n```\n", [RED])
    assert parse(f"```py\nx\n```\n```json\n[{RED_JSON}]\n```") == ("```py\nx\n```\n", [RED])
    assert parse(f"```\nHere:\n[{RED_JSON}]\n```") == ("```\nHere:\n\n```", [RED])


def test_a_list_goes_on_after_an_object_that_broke_off():
    assert parse('[{"box_2d": [120, 340, 560, 780], "label": "red circle", ' + f"{BLUE_JSON}] ok") == (" ok", [RED, BLUE])
    assert parse(f'[{{"label": "no place"}}, {RED_JSON}]')[1] == [RED]
    assert parse(f'[{RED_JSON}, {{"label": "no place"}}, {BLUE_JSON}] ok') == (" ok", [RED, BLUE])


def test_marks_and_text_come_at_once():
    reader = MarkReader()
    assert reader.push("At the top [") == ["At the top "]
    assert reader.push(RED_JSON[:-1]) == []
    assert reader.push("}") == [RED]
    assert reader.push(", " + BLUE_JSON) == [BLUE]
    assert reader.push("].") == ["."]
    assert reader.push("[see {th") == ["[see {th"]
    assert reader.flush() == []


# ---- however it comes

words = st.text("abc ,.:;!?'\"\n()]}0é🧿", max_size=12)
labels = st.text("abc 'é🧿}]{[,:", max_size=8).map(lambda s: " ".join(s.split()))
numbers = st.integers(0, 1000)
boxes = st.tuples(numbers, numbers, numbers, numbers).filter(lambda b: b[0] < b[2] and b[1] < b[3])
marks = st.builds(Mark, boxes, labels)


@st.composite
def detections(draw):
    """One run of JSON as a model may write it, and its marks."""
    found = draw(st.lists(marks, min_size=1, max_size=3))
    objects = [{"box_2d": list(mark.box), "label": mark.label} for mark in found]
    if draw(st.booleans()):
        objects = [dict(reversed(entry.items())) for entry in objects]
    alone = len(objects) == 1 and draw(st.booleans())
    text = json.dumps(
        objects[0] if alone else objects, indent=draw(st.sampled_from([None, 1, 2])), ensure_ascii=draw(st.booleans())
    )
    if draw(st.booleans()):
        text = (
            text.replace("]}", "],}").replace("}]", "},\n]")
            if '"' + "]}" not in text and not any(c in m.label for m in found for c in "[]{}")
            else text
        )
    if draw(st.booleans()):
        text = f"```{draw(st.sampled_from(['', 'json']))}\n{text}\n```"
    return text, found


@st.composite
def answers(draw):
    text, plain, found = "", "", []
    for said in draw(st.lists(words, max_size=3)):
        shown, more = draw(detections())
        text, plain, found = text + said + shown, plain + said, found + more
    said = draw(words)
    return text + said, plain + said, found


def read(chunks: list[str]) -> tuple[str, list[Mark]]:
    reader = MarkReader()
    out = [part for chunk in chunks for part in reader.push(chunk)] + reader.flush()
    return "".join(part for part in out if isinstance(part, str)), [part for part in out if isinstance(part, Mark)]


@st.composite
def chunked(draw, texts):
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(answers())
def test_text_and_marks_are_told_apart(answer):
    text, plain, found = answer
    assert parse(text) == (plain, found)
    assert read(list(text)) == (plain, found)


fragments = st.sampled_from(
    [
        "[",
        "]",
        "{",
        "}",
        "`",
        "```",
        "```json",
        "\n",
        " ",
        ",",
        ":",
        '"',
        "'",
        "\\",
        "box_2d",
        '"box_2d"',
        '{"box_2d": [',
        '"point": ',
        '"label": "',
        "1, 2, ",
    ]
    + ["[1, 2, 3, 4]", "null", "tru", "1e9", RED_JSON, f"[{BLUE_JSON}", "word"]
)
anything = st.lists(fragments | st.text(max_size=3), max_size=12).map("".join)


@given(chunked(anything))
@example(['[{"box_2d": [1,2,3,4], "label": "', "a", '"', " ", "}", "]"])
def test_any_text_in_any_chunks(chunks):
    text = "".join(chunks)
    plain, found = read(chunks)
    assert (plain, found) == parse(text)
    rest = iter(text)
    assert all(c in rest for c in plain)  # what is said was written, in that order
    for mark in found:
        y0, x0, y1, x1 = mark.box
        assert 0 <= y0 <= y1 <= 1000 and 0 <= x0 <= x1 <= 1000
        assert mark.is_point or (y0 < y1 and x0 < x1)
    if "box_2d" not in text and "point" not in text and "```" not in text:
        assert (plain, found) == (text, [])


def test_hostile_text_is_read_in_good_time():
    for piece in (
        "[",
        "{",
        '{"a":',
        '{"a":"',
        '[{"a":1,',
        "`",
        "```json ",
        '{"box_2d":[',
        '{"box_2d":"',
        "[" + " " * 50,
        RED_JSON,
        '{"label": "x',
    ):
        text = piece * (4_000 // len(piece))
        plain, _ = parse(text)
        if "box_2d" not in piece:
            assert plain == text


# ---- drawn


def picture(height: int = 336, width: int = 432, value: int = 127) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.mark.parametrize("value", [0, 127, 255])
def test_a_box_is_drawn_where_it_is_and_shows_on_any_ground(value):
    before = picture(value=value)
    after = draw(before, [Mark((250, 250, 750, 500), "")])
    assert (before == value).all() and after.shape == before.shape and after.dtype == np.uint8
    changed = np.abs(after.astype(int) - value).max(2) > 60
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert abs(rows[0] - 84) <= 4 and abs(rows[-1] - 252) <= 4
    assert abs(columns[0] - 108) <= 4 and abs(columns[-1] - 216) <= 4
    assert not changed[100:240, 130:200].any()  # what is inside stays visible


def test_a_point_is_a_dot():
    changed = (draw(picture(), [Mark((500, 500, 500, 500))]) != 127).any(2)
    assert changed[168, 216] and changed.sum() < 300
    assert not changed[:150].any() and not changed[190:].any()


def test_a_label_is_written_in_any_script():
    marks = [Mark((500, 100, 900, 300), label) for label in ("red circle", "Tür", "红", "")]
    pictures = [draw(picture(), [mark]) for mark in marks]
    assert len({p.tobytes() for p in pictures}) == 4


@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.lists(st.builds(Mark, st.tuples(numbers, numbers, numbers, numbers), st.text(max_size=20)), max_size=3),
)
def test_anything_can_be_drawn_on_anything(height, width, found):
    assert draw(picture(height, width), found).shape == (height, width, 3)


def test_views_and_empty_pictures_can_be_drawn_on():
    assert draw(picture()[::2, ::-1], [RED]).shape == (168, 432, 3)
    assert draw(picture(0, 5), [RED]).shape == (0, 5, 3)
