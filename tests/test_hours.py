"""Hours of one conversation, in small: what is counted, and what is let go of."""

from typing import get_args

import pytest

from agent import checkpoint
from agent.bench import hours
from agent.bench.load_test import SpokenQuestion
from agent.marks import Mark
from agent.script import ScriptedTurn
from agent.view import Policy
from model.nano import people


def greeting(seed: int) -> list[SpokenQuestion]:
    """Shows a picture and says hello, typed."""

    def right(text: str, marks: list[Mark]) -> bool:
        return text.strip().startswith("Hello")

    return [SpokenQuestion(ScriptedTurn(people.picture(seed, 96, 96), typed="Hello", wait=0.1), 0, right)]


@pytest.mark.slow
async def test_both_policies_are_told_stretch_by_stretch_and_nothing_grows() -> None:
    told: list[str] = []
    result = await hours.conversation(checkpoint.load("nano"), None, greeting, 0.0005, told.append, get_args(Policy))
    assert list(result) == ["transcripts", "verbatim"]
    for figures in result.values():
        assert figures["dropped"] == 0 and len(figures["stretches"]) == hours.INTERVALS
        assert [stretch["minutes"] for stretch in figures["stretches"]] == sorted(s["minutes"] for s in figures["stretches"])
        assert all(s["asked"] == s["right"] > 0 and s["unanswered"] == 0 < s["first_token"] for s in figures["stretches"])
        entries = [stretch["entries"] for stretch in figures["stretches"]]
        assert entries == sorted(entries), "the tape is append-only"
    assert len([line for line in told if line.strip()]) == 2 * (1 + hours.INTERVALS + 1)
