"""The crowd at a server, over sockets: what a client knows of its answers, and what becomes of a line that breaks."""

from __future__ import annotations

import asyncio
import time

import pytest

from agent import events
from agent.bench import load_test
from agent.engine import Engine
from agent.script import Performance, ScriptedTurn
from model.nano import people
from streams.media_files import read_audio
from tests.serving import DEMO, TEN, serving
from web.client import RealtimeClient


def url(port: int) -> str:
    return f"ws://127.0.0.1:{port}"


@pytest.mark.slow
async def test_a_caller_tells_its_door_what_a_session_would(engine, mind):
    mind.says("It is red.", TEN, "Yes.")
    mind.hears("where is it", "and there", "no wait")
    speech = read_audio(DEMO / "question.wav")
    played = Performance(
        [ScriptedTurn(b"", speech), ScriptedTurn(b"", speech, interrupt=2), ScriptedTurn(b"", speech, wait=0.0)], real_time=True
    )
    async with serving(engine, clock=time.monotonic) as port:
        caller = RealtimeClient(url(port))
        await played.run(caller)
    assert caller.lost is None and not played.notes
    first, cut, last = played.exchanges
    assert (first.text, first.finish, first.caption) == ("It is red.", "stop", "where is it")
    assert first.stages["speech_end"] < 0 < first.stages["first_token"] <= first.stages["first_sound"]
    assert cut.finish == "interrupted" and last.text == "Yes."
    kinds = [type(event) for event in played.events]
    assert kinds.index(events.OutputCleared) < [n for n, kind in enumerate(kinds) if kind is events.TurnStarted][2]


async def test_a_line_that_breaks_is_said_and_ends_its_conversation_alone(engine: Engine):
    played = Performance([ScriptedTurn(typed="hello")])
    caller = RealtimeClient("ws://127.0.0.1:9/v1/realtime")
    await played.run(caller)
    assert caller.lost and len(played.notes) == 1 and "is over" in played.notes[0]
    async with serving(engine) as port:
        lines = [RealtimeClient(url(port)) for _ in range(3)]
        talks = [Performance([ScriptedTurn(typed="hello")]) for _ in lines]
        await asyncio.gather(*(talk.run(line) for talk, line in zip(talks, lines, strict=True)))
    assert sum(line.lost is not None for line in lines) == 1, "there is room for two"


@pytest.mark.slow
async def test_a_small_crowd_at_a_server_is_answered(engine, mind):
    said: list[str] = []
    async with serving(engine, clock=time.monotonic) as port:
        result = await load_test.remote([2], lambda: RealtimeClient(url(port)), lambda seed: people.person(seed)[:1], said.append)
    figures = result["speakers"]["2"]
    assert figures["lost"]["attend"] == figures["unanswered"]["attend"] == 0
    assert figures["first_token"]["count"] <= 2 and "2 speakers, 2 questions" in said[0]
