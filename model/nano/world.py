"""The small world that nano understands: coloured shapes in view, and what people ask about them.

Everything is drawn from a numpy Generator, so the same seed gives the same scenes, questions and answers.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .phrases import (
    CLOSINGS,
    FILLERS,
    NO_PICTURE,
    NOT_UNDERSTOOD,
    OPENINGS,
    ORDER_CLOSINGS,
    ORDER_OPENINGS,
    ORDERS,
    OTHER,
    QUESTIONS,
    TALK,
    TRANSCRIBE,
)

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
KINDS = (*QUESTIONS, *TALK, "no_picture", "other", "transcribe")

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
KEPT_CAPITALS = ("I", "Anna", "Peter", "John", "Mary")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
# How often each kind comes when none is asked for. "transcribe" is an order about speech and comes only when asked for.
WITH_PICTURE = {"describe": 3, "count": 4, "colour": 3, "exists": 4, "where": 5, **dict.fromkeys(TALK, 0.5), "other": 3}
WITHOUT_PICTURE = {"no_picture": 4, **dict.fromkeys(TALK, 1), "other": 4}


Choice = TypeVar("Choice")
Outline = Callable[[np.random.Generator, str], np.ndarray]
"""Corners [n, 2] of a shape, turned at random, within a box at the origin whose larger side is one long."""


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    box: tuple[int, int, int, int]
    """y0, x0, y1, x1 in thousandths of the picture."""
    outline: tuple[tuple[float, float], ...]
    """Corners (x, y) in pixels."""


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    things: tuple[Thing, ...]
    """From left to right."""


@dataclass(frozen=True)
class Ask:
    kind: str
    text: str
    answer: str
    speech: str = ""
    """What was said before the text; only a "transcribe" has it."""
    colour: str | None = None
    shape: str | None = None
    found: int | None = None
    """How many things in view are of that colour and shape; None where that is not what is asked."""
    about: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """The answer up to which character is about which things, by their places in the scene."""


def _pick(rng: np.random.Generator, options: Sequence[Choice]) -> Choice:
    return options[int(rng.integers(len(options)))]


# Scenes


def unit_outline(rng: np.random.Generator, shape: str) -> np.ndarray:
    """Corners of the shape, turned at random, with the larger side of its box one long and the box at the origin."""
    stretch = rng.uniform(0.92, 1.0)
    if shape == "circle":
        angles = np.arange(48) * (2 * math.pi / 48)
        radii = np.ones(48)
    elif shape == "star":
        angles = np.arange(10) * (2 * math.pi / 10)
        radii = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
    else:
        corners = 4 if shape == "square" else 3
        angles = np.arange(corners) * (2 * math.pi / corners)
        radii = np.ones(corners)
        if shape == "triangle":
            angles = angles + rng.uniform(-0.22, 0.22, 3)
    points = np.stack([radii * np.cos(angles + math.pi / 4), stretch * radii * np.sin(angles + math.pi / 4)], 1)
    turn = rng.uniform(0, 2 * math.pi)
    points = points @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points -= points.min(0)
    unit: np.ndarray = points / points.max()
    return unit


def _place(
    rng: np.random.Generator, width: int, height: int, shapes: list[str], size: tuple[float, float], outline_of: Outline
) -> list[np.ndarray] | None:
    """Outlines in pixels that keep apart, or None if this throw of the dice left no room."""
    short = min(width, height)
    margin, gap = 0.01 * short, 0.04 * short
    placed: list[np.ndarray] = []
    for shape, side in zip(shapes, sorted(rng.uniform(*size, len(shapes)), reverse=True), strict=True):
        outline = outline_of(rng, shape) * side * short
        extent = outline.max(0)
        for _ in range(20):
            low = rng.uniform(margin, np.array([width, height]) - margin - extent)
            if all((low > other.max(0) + gap).any() or (low + extent < other.min(0) - gap).any() for other in placed):
                placed.append(outline + low)
                break
        else:
            return None
    return placed


def sample_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    count: tuple[int, int] = (1, 4),
    size: tuple[float, float] = (1 / 6, 1 / 2),
    outline: Outline = unit_outline,
) -> Scene:
    """Between count[0] and count[1] things, each box's larger side between the two parts of the picture's short side."""
    names: list[tuple[str, str]] = []
    for _ in range(int(rng.integers(count[0], count[1] + 1))):
        shape, colour = _pick(rng, SHAPES), _pick(rng, COLOURS)
        alike = rng.random()
        if names and alike < 0.3:
            shape, colour = _pick(rng, names)
        elif names and alike < 0.45:
            shape = _pick(rng, names)[0]
        elif names and alike < 0.55:
            colour = _pick(rng, names)[1]
        names.append((shape, colour))
    low, high = size
    for attempt in range(200):
        top = max(low, high * (1 - attempt / 200))
        outlines = _place(rng, width, height, [shape for shape, _ in names], (low, top), outline)
        if outlines is not None:
            break
    else:
        raise ValueError(f"no room for {len(names)} things of size {size} in {width}×{height}")
    scale = np.array([1000 / height, 1000 / width])
    things = []
    for (shape, colour), corners in zip(names, outlines, strict=True):
        y0, x0 = (round(v) for v in corners.min(0)[::-1] * scale)
        y1, x1 = (round(v) for v in corners.max(0)[::-1] * scale)
        things.append(Thing(shape, colour, (y0, x0, y1, x1), tuple((float(x), float(y)) for x, y in corners)))
    return Scene(width, height, tuple(sorted(things, key=lambda thing: (thing.box[1] + thing.box[3], thing.box[0]))))


def tens(coordinate: int) -> int:
    """As an answer writes a coordinate."""
    return (coordinate + 5) // 10 * 10


# Answers


def _name(colour: str | None, shape: str | None) -> str:
    return " ".join(word for word in (colour, shape or "shape") if word)


def _a(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _listing(things: list[Thing]) -> str:
    """Equal things together, in the order of the first of each: "a red circle, two blue stars and a green square"."""
    counts: dict[str, int] = {}
    for thing in things:
        name = _name(thing.colour, thing.shape)
        counts[name] = counts.get(name, 0) + 1
    parts = [_a(name) if n == 1 else f"{NUMBERS[n]} {name}s" for name, n in counts.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _there(number: int, name: str) -> str:
    return f"There is one {name}." if number == 1 else f"There are {NUMBERS[number]} {name}s."


def third(both: int) -> int:
    """Which third the middle of two coordinates lies in, from their sum."""
    return min(2, both * 3 // 2000)


def _place_words(box: tuple[int, int, int, int]) -> str:
    y0, x0, y1, x1 = box
    return PLACES[third(y0 + y1)][third(x0 + x1)]


def _marks(things: list[Thing]) -> str:
    return json.dumps([{"box_2d": [tens(v) for v in t.box], "label": _name(t.colour, t.shape)} for t in things])


def _found(scene: Scene, colour: str | None, shape: str | None) -> list[Thing]:
    return [t for t in scene.things if colour in (None, t.colour) and shape in (None, t.shape)]


def _answer(kind: str, colour: str | None, shape: str | None, found: list[Thing]) -> str:
    name = _name(colour, shape)
    if kind == "describe":
        return f"I see {_listing(found)}." if found else "I see no shapes."
    if kind == "count":
        return _there(len(found), name)
    if kind == "exists":
        return f"Yes, there is {_a(name)}." if found else f"No, there is no {name}."
    if not found:
        return f"I see no {name}."
    if kind == "colour":
        if len(found) == 1:
            return f"The {name} is {found[0].colour}."
        listing = _listing(found)
        return f"There {'is' if listing.startswith('a') else 'are'} {listing}."
    where = f"The {name} is {_place_words(found[0].box)}." if len(found) == 1 else _there(len(found), name)
    return f"{where} {_marks(found)}"


def _about(answer: str, found: list[Thing], scene: Scene) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Where equal things are listed one name after the other, each name is about its own; each mark is about its thing, and
    the rest about all that was found."""
    places = [scene.things.index(thing) for thing in found]
    sentence = answer.partition(" [{")[0]
    names = list(dict.fromkeys(_name(thing.colour, thing.shape) for thing in found))
    spans: list[tuple[int, tuple[int, ...]]] = []
    if all(name in sentence for name in names):
        end = 0
        for name in names:
            end = sentence.index(name, end) + len(name)
            spans.append((end, tuple(n for n, x in zip(places, found, strict=True) if _name(x.colour, x.shape) == name)))
    spans.append((len(sentence), tuple(places)))
    end = len(sentence)
    for place in places if end < len(answer) else ():
        end = answer.index("}", end) + 1
        spans.append((end, (place,)))
    return tuple(spans) if found else ()


# Asks


def sample_subject(rng: np.random.Generator, kind: str, scene: Scene) -> tuple[str | None, str | None]:
    """What the question is about: colour and shape, either None when it does not matter."""
    if kind == "describe" or (kind == "where" and rng.random() < 0.2):
        return None, None
    present = rng.random() < {"count": 0.72, "colour": 0.88, "exists": 0.5, "where": 0.87}[kind]
    detail = rng.random()
    by_colour = kind == "count" and detail > 0.85
    by_shape = kind == "colour" or detail < {"count": 0.25, "exists": 0.2, "where": 0.2}[kind]
    if kind == "count" and 0.7 < detail <= 0.85:
        return None, None
    if present and scene.things:
        thing = _pick(rng, scene.things)
        return (None if by_shape else thing.colour), (None if by_colour else thing.shape)
    shapes, colours = {t.shape for t in scene.things}, {t.colour for t in scene.things}
    if by_shape:
        missing = [s for s in SHAPES if s not in shapes]
        if missing or kind == "colour":
            return None, _pick(rng, missing or SHAPES)
    if by_colour:
        return _pick(rng, [c for c in COLOURS if c not in colours] or COLOURS), None
    pairs = {(t.colour, t.shape) for t in scene.things}
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs]
    near = [(c, s) for c, s in absent if c in colours or s in shapes]
    return _pick(rng, near if near and rng.random() < 0.6 else absent)


def _dress(rng: np.random.Generator, text: str) -> str:
    """Sometimes the small words that people put around a sentence."""
    first = text.split(" ")[0]
    order = first in ORDERS
    if rng.random() < 0.12:
        opening = _pick(rng, ORDER_OPENINGS if order else OPENINGS)
        text = f"{opening} {text if first in KEPT_CAPITALS else text[0].lower() + text[1:]}"
        if opening == "Could you":
            text = text[:-1] + "?"
    if rng.random() < 0.08:
        text = text[:-1] + _pick(rng, ORDER_CLOSINGS if order else CLOSINGS) + text[-1]
    return text


def _question(rng: np.random.Generator, kind: str, scene: Scene) -> Ask:
    colour, shape = sample_subject(rng, kind, scene)
    one = _name(colour, shape)
    if shape is None and rng.random() < 0.5:
        one = one.replace("shape", "thing")
    text = _pick(rng, QUESTIONS[kind]).format(a=_a(one), one=one, many=one + "s")
    return question(kind, colour, shape, scene, _dress(rng, text))


def question(kind: str, colour: str | None, shape: str | None, scene: Scene, text: str) -> Ask:
    """The text, which asks this about the scene, and its answer. Colour and shape are None where they do not matter."""
    found = _found(scene, colour, shape)
    answer = _answer(kind, colour, shape, found)
    return Ask(kind, text, answer, "", colour, shape, len(found), _about(answer, found, scene))


def _other(rng: np.random.Generator) -> Ask:
    text = re.sub(r"\{(\w+)\}", lambda match: _pick(rng, FILLERS[match[1]]), _pick(rng, OTHER))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return Ask("other", _dress(rng, text[0].upper() + text[1:]), NOT_UNDERSTOOD)


def sample_ask(rng: np.random.Generator, scene: Scene | None, kind: str | None = None) -> Ask:
    """Something a person says while the scene is in view (None: there is no picture), and nano's answer."""
    if kind is None:
        weights = WITHOUT_PICTURE if scene is None else WITH_PICTURE
        shares = np.array(list(weights.values()))
        kind = list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    if kind == "other":
        return _other(rng)
    if kind == "transcribe":
        speech = sample_ask(rng, scene).text
        return Ask(kind, _pick(rng, TRANSCRIBE), spoken(speech), speech)
    if kind in TALK:
        texts, answer = TALK[kind]
        return Ask(kind, _pick(rng, texts), answer)
    if scene is None:
        about = _pick(rng, tuple(QUESTIONS)) if kind == "no_picture" else kind
        return Ask("no_picture", _question(rng, about, sample_scene(rng, 384, 384)).text, NO_PICTURE)
    if kind not in QUESTIONS:
        raise ValueError(f"no question of kind {kind!r} about a picture")
    return _question(rng, kind, scene)


def spoken(text: str) -> str:
    """The text as a transcript has it: lower case, only words, with the apostrophes inside them."""
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower()))


def corpus(rng: np.random.Generator, n: int) -> Iterator[str]:
    """n texts of this world: what is said, its transcript and the answers, for training a tokenizer."""
    texts: list[str] = []
    for _ in range(n):
        if not texts:
            scene = sample_scene(rng, 432, 336) if rng.random() < 0.85 else None
            ask = sample_ask(rng, scene, "transcribe" if rng.random() < 0.1 else None)
            texts = [ask.text, spoken(ask.text), ask.answer]
        yield texts.pop()
