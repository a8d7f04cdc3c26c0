"""What a sentence of nano's world asks, from its words alone: the way back from `world.sample_ask`."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from model.nano import world
from model.nano.phrases import CLOSINGS, NO_PICTURE, NOT_UNDERSTOOD, OPENINGS, ORDER_CLOSINGS, ORDER_OPENINGS, QUESTIONS, TALK


class Question(NamedTuple):
    """A kind of `world.KINDS`; for a question about a picture also its colour and shape, None where it does not matter."""

    kind: str
    colour: str | None = None
    shape: str | None = None


OTHER = Question("other")
_SUBJECT = re.compile(
    rf"\b(?:(?P<colour>{'|'.join(world.COLOURS)}) )?(?P<noun>{'|'.join((*world.SHAPES, 'shape', 'thing'))})(?P<many>s?)\b"
)


def understand(text: str) -> Question:
    """OTHER for everything that nano does not answer. Typed forms are taken back first: see `typed.plain`."""
    words = world.spoken(text)
    for opening in ("", *_openings()):
        for closing in ("", *_closings()):
            if words.startswith(opening) and words.endswith(closing) and len(words) > len(opening) + len(closing):
                question = _bare(words[len(opening) : len(words) - len(closing)])
                if question is not OTHER:
                    return question
    return OTHER


def reply(text: str, scene: world.Scene | None) -> world.Ask:
    """The text as something asked about the scene, and its answer."""
    kind, colour, shape = understand(text)
    if kind == "other":
        return world.Ask(kind, text, NOT_UNDERSTOOD)
    if kind in TALK:
        return world.Ask(kind, text, TALK[kind][1])
    if scene is None:
        return world.Ask("no_picture", text, NO_PICTURE)
    return world.question(kind, colour, shape, scene, text)


def subject(words: tuple[str, ...]) -> tuple[int, int] | None:
    """Which of the words, from and up to, name what is asked about: "red circles" of "are there any red circles"."""
    nouns = {f"{noun}{s}" for noun in (*world.SHAPES, "shape", "thing") for s in ("", "s")}
    for at, word in enumerate(words):
        if word in world.COLOURS and at + 1 < len(words) and words[at + 1] in nouns:
            return at, at + 2
        if word in nouns:
            return at, at + 1
    return None


@cache
def _bare(words: str) -> Question:
    for kind, (texts, _) in TALK.items():
        if words in {world.spoken(text) for text in texts}:
            return Question(kind)
    if words in _templates():
        return Question(_templates()[words])
    match = _SUBJECT.search(words)
    if match is None:
        return OTHER
    before = words[: match.start()]
    if before.endswith(("a ", "an ")):
        frame, before = "a X", before[: -2 if before.endswith(" a ") or before == "a " else -3]
        frame = before + frame
    else:
        frame = before + ("Xs" if match["many"] else "X")
    asked = _templates().get(frame + words[match.end() :])
    if asked is None:
        return OTHER
    noun = match["noun"]
    return Question(asked, match["colour"], noun if noun in world.SHAPES else None)


@cache
def _templates() -> dict[str, str]:
    """The questions with X for what they ask about, as spoken, and the kind of each."""
    marks = {"a": "a Xq", "one": "Xq", "many": "Xqs"}
    return {re.sub("xq", "X", world.spoken(text.format(**marks))): kind for kind, texts in QUESTIONS.items() for text in texts}


@cache
def _openings() -> tuple[str, ...]:
    return tuple(dict.fromkeys(world.spoken(x) + " " for x in (*OPENINGS, *ORDER_OPENINGS)))


@cache
def _closings() -> tuple[str, ...]:
    return tuple(dict.fromkeys(" " + world.spoken(x) for x in (*CLOSINGS, *ORDER_CLOSINGS)))
