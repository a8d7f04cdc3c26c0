"""What the model writes, token by token, as text, thoughts, marks and calls; and which token a word ends at."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.answer_parser import AnswerParser
from agent.calls import BrokenCall, ToolCall
from agent.marks import Mark
from agent.prompt import Thought
from tests.talk import TOKENIZER, ids

MARKS = '[{"box_2d": [120, 340, 560, 780], "label": "red circle"}]'
CALL = '<|tool_call>call:look{where:<|"|>left<|"|>}<tool_call|><|tool_response>'


def read(text: str, answer: AnswerParser | None = None) -> tuple[AnswerParser, list]:
    answer = answer or AnswerParser(TOKENIZER)
    pieces = [piece for id in ids(text) for piece in answer.push(id)]
    return answer, pieces + answer.flush()


def test_text_thoughts_marks_and_calls_are_told_apart():
    answer, pieces = read(f"<|channel>thought\nhm, left<channel|>It is {MARKS} here.{CALL}")
    assert "".join(piece.text for piece in pieces if isinstance(piece, Thought)) == "hm, left"
    assert [piece for piece in pieces if isinstance(piece, Mark)] == [Mark((120, 340, 560, 780), "red circle")]
    assert [piece for piece in pieces if isinstance(piece, ToolCall)] == answer.parts[0].calls
    assert [(call.name, call.arguments) for call in answer.parts[0].calls] == [("look", {"where": "left"})]
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == answer.text
    assert re.sub(" +", " ", answer.text) == "It is here."


def test_a_call_that_cannot_be_read_is_no_call():
    answer, pieces = read("<|tool_call>call:{{<tool_call|>")
    assert [type(piece) for piece in pieces] == [BrokenCall] and not answer.parts[0].calls


def test_an_answer_does_not_begin_with_white_space():
    assert read(" \n Yes.<turn|>")[0].text == "Yes."


def test_a_stretch_goes_on_after_its_tools_in_the_same_answer():
    answer, _ = read("Let me look." + CALL)
    part = answer.begin()
    assert read("Red.<turn|>", answer)[0].text == "Let me look. Red."
    assert part.start == len("Let me look.") and not part.calls
    assert [s.count_ids(len("Let me look.")) for s in answer.parts] == [len(ids("Let me look.")), 0]
    assert answer.tokens == len(ids("Let me look." + CALL + "Red.<turn|>"))


@pytest.mark.parametrize("thinking", [True, False])
def test_after_a_tools_result_a_thought_may_be_open(thinking):
    answer = AnswerParser(TOKENIZER, thinking)
    read("<|channel>thought\nhm" + CALL, answer)
    answer.begin()
    _, pieces = read("so<channel|>Red.", answer)
    assert ("so" in answer.text) != thinking
    assert "".join(piece.text for piece in pieces if isinstance(piece, Thought)) == ("so" if thinking else "")


WORDS = st.lists(st.sampled_from(["red", "Circle", "the", "left.", "é", "日本", "a,", MARKS]), max_size=12).map(" ".join)


@given(WORDS)
def test_the_ids_until_a_character_write_that_character_and_no_more_than_its_token(text):
    answer, _ = read(text)
    part = answer.parts[0]
    assert part.characters == sorted(part.characters) and len(part.characters) == len(part.ids)
    assert part.count_ids(0) == 0
    for characters in range(1, len(answer.text) + 1):
        count = part.count_ids(characters)
        again = AnswerParser(TOKENIZER)
        for id in part.ids[:count]:
            again.push(id)
        assert count == len(part.ids) or len(again.text) >= characters
        assert count == 1 or part.characters[count - 2] < characters
