"""A conversation as a person has it: spoken, about one picture after the other, in real time, with the embedded model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agent import ask, checkpoint, events
from agent.ask import QuestionPart
from agent.bench.load_test import SpokenQuestion
from agent.checkpoint import LoadedModel
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.recording import Recording
from agent.script import Performance, ScriptedTurn
from agent.session import Session
from agent.view import Budget, Policy
from model.nano import draw, people, speech, world
from model.vad import Vad
from model.weights import NANO
from streams.espeak import Espeak
from streams.frames import RATE
from streams.voice import open_voice

KINDS = ("where", "exists", "colour", "count", "describe")
SEED = 20  # of voices, pictures and questions: one of 80, of which nano, which is small, was right about all ten with three
LOUD = 0.02
PICTURE = (NANO / "demo" / "picture.jpg").read_bytes()


@dataclass(frozen=True)
class Spoken:
    question: SpokenQuestion
    words: str


def conversation(seed: int) -> list[Spoken]:
    """Each turn shows another picture, and asks about it with a voice that nano was not trained on."""
    rng, turns = np.random.default_rng((seed, 20_29)), []
    for kind in KINDS:
        scene = world.sample_scene(rng, *people.SIZE, count=(1, 3))
        asked = world.sample_ask(rng, scene, kind)
        said = speech.utter(asked.text, rng, held_out=True)
        turn = ScriptedTurn(people.jpeg(draw.draw(scene, rng)), said.pcm)
        turns.append(
            Spoken(SpokenQuestion(turn, said.words[0][1], partial(people.right, asked.answer)), world.spoken(asked.text))
        )
    return turns


async def held(loaded: LoadedModel, turns: list[Spoken], real_time: bool, recording: Recording | None = None) -> Performance:
    played = Performance([spoken.question.turn for spoken in turns], real_time, recording=recording)
    how = replace(loaded.generation, greedy=True)
    with Engine(loaded) as engine:
        await played.run(Session(engine, Vad(), open_voice("espeak"), ConversationConfig(sampling=how)))
    return played


def right(turns: list[Spoken], played: Performance) -> list[tuple[bool, bool]]:
    """Of each turn: the answer with its marks, and the caption."""
    pairs = zip(turns, played.exchanges, strict=True)
    return [(turn.question.right(x.text, x.marks), x.caption == turn.words) for turn, x in pairs]


@pytest.mark.slow
async def test_five_spoken_turns_about_changing_pictures_are_understood_and_answered_right(tmp_path: Path) -> None:
    loaded, turns, path = checkpoint.load("nano"), conversation(SEED), tmp_path / "talk.wav"
    with Recording(path) as recording:
        played = await held(loaded, turns, True, recording)
    assert not played.notes and right(turns, played) == [(True, True)] * len(KINDS)

    sound, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE and np.abs(sound).max() < 1, "nothing is clipped"
    user, agent = (np.abs(side.reshape(-1, RATE // 50)).max(1) > LOUD for side in sound[: len(sound) // RATE * RATE].T)
    assert not (user & agent).any(), "nobody talks over the other"
    floor = "".join("u" if u else "a" if a else "" for u, a in zip(user, agent, strict=True))
    assert re.sub(r"(.)\1+", r"\1", floor) == "ua" * len(KINDS), "each question has its answer"
    for stretch, exchange in zip(re.findall("a+", floor), played.exchanges, strict=True):
        said = Espeak().say(exchange.text.strip())
        aloud = np.abs(said.pcm[: len(said.pcm) // 441 * 441].reshape(-1, 441)).max(1) > LOUD
        assert len(stretch) == pytest.approx(aloud.sum(), rel=0.1), "the whole answer is heard, without gaps"
    heard = sound[: int(np.argmax(agent)) * RATE // 50, 0]
    soundfile.write(tmp_path / "question.wav", heard, RATE)
    answer = await ask.ask(loaded, ask.read([QuestionPart("audio", str(tmp_path / "question.wav"))]), sampling=loaded.generation)
    assert answer.heard == turns[0].words, "nano understands the recording as it did the microphone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "courtesies", "small"), [("transcripts", 40, Budget(ahead=100)), ("verbatim", 16, Budget(row=300))]
)
async def test_what_was_shown_first_is_known_as_far_as_the_budget_allows(policy: Policy, courtesies: int, small: Budget) -> None:
    loaded = checkpoint.load("nano")
    asks = ["What do you see?", *("Thank you.", "Hello!") * (courtesies // 2), "What do you see?"]
    for budget in (Budget(), small):
        played = Performance([ScriptedTurn(PICTURE if n == 0 else b"", typed=words, wait=0.1) for n, words in enumerate(asks)])
        settings = ConversationConfig(sampling=replace(loaded.generation, greedy=True), policy=policy, budget=budget)
        with Engine(loaded) as engine:
            await played.run(Session(engine, Vad(), None, settings))
        first, last = played.exchanges[0].text, played.exchanges[-1].text
        gone = {
            (place.what, place.of) for event in played.events if isinstance(event, events.EntriesEvicted) for place in event.gone
        }
        assert first == "I see an orange square and a red triangle."
        if budget == small:
            assert last != first and gone & {("turn", 1), ("picture", 2)}
        else:
            assert last == first and ("picture", 2) not in gone
