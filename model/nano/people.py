"""People who ask about drawn pictures aloud, for `attend bench session`: questions, voices and scenes that nano never met."""

from __future__ import annotations

from functools import partial

import numpy as np

from agent.bench.load_test import SpokenQuestion
from agent.marks import Mark, parse
from agent.script import ScriptedTurn
from model.nano import draw, exam, speech, world
from streams.frames import RATE
from streams.opencv import cv2

KINDS = ("count", "describe", "exists", "colour", "where")  # the answer to the second, the longest, is interrupted
CUT = 2  # words of it are heard before the next question begins
SIZE, LARGE = (432, 336), (960, 672)  # pixels: 63 positions of the budget 70, and 280 of 280


def person(seed: int) -> list[SpokenQuestion]:
    """Shows a picture, then asks one question after the other about it."""
    rng = np.random.default_rng((seed, 20_27))
    scene = world.sample_scene(rng, *SIZE, count=(2, 4))
    shown = jpeg(draw.draw(scene, rng))
    questions = []
    for number, kind in enumerate(KINDS):
        cuts, is_cut = kind == "describe", number > 0 and KINDS[number - 1] == "describe"
        ask = world.sample_ask(rng, scene, kind)
        said = speech.utter(ask.text, rng, held_out=True)
        onset = said.words[0][1]
        skipped = max(0, onset - RATE // 20) if is_cut else 0  # whoever interrupts speaks at once
        turn = ScriptedTurn(
            b"" if number else shown,
            said.pcm[skipped:],
            interrupt=CUT if cuts else None,
            wait=0.0 if is_cut else 0.6,
        )
        questions.append(SpokenQuestion(turn, onset - skipped, partial(right, ask.answer)))
    return questions


def picture(seed: int, width: int, height: int) -> bytes:
    """Of pixels, as JPEG."""
    rng = np.random.default_rng((seed, 20_28))
    return jpeg(draw.draw(world.sample_scene(rng, width, height), rng))


def right(wanted: str, text: str, marks: list[Mark]) -> bool:
    """As in the exam: the sentence to the letter, and every mark covers its thing."""
    sentence, places = parse(wanted)
    return text.strip() == sentence.strip() and exam.well_placed(marks, places) == len(places) == len(marks)


def jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture[:, :, ::-1])[1].tobytes()
