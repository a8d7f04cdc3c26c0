import json
import re
from collections import Counter

import cv2
import numpy as np
import pytest

from model.nano.cover import patch_boxes, patch_labels, patch_tallies
from model.nano.draw import draw
from model.nano.world import (
    COLOURS,
    KINDS,
    NUMBERS,
    SHAPES,
    Scene,
    corpus,
    sample_ask,
    sample_scene,
    spoken,
    tens,
)

SIZES = [(432, 336), (528, 288), (384, 384), (336, 432), (640, 480), (1280, 720)]
QUESTIONS = ("describe", "count", "colour", "exists", "where")
HUES = {"red": 0, "orange": 27, "yellow": 56, "green": 126, "blue": 219, "purple": 282}


def scenes(seed: int, n: int, **options) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, *SIZES[i % len(SIZES)], **options) for i in range(n)]


def cover(scene: Scene, thing) -> np.ndarray:
    mask = np.zeros((scene.height, scene.width), np.uint8)
    cv2.fillPoly(mask, [np.rint(np.array(thing.outline)).astype(np.int32)], 1)
    return mask.astype(bool)


def test_things_keep_apart_and_within_their_sizes():
    for scene in scenes(0, 300):
        short = min(scene.width, scene.height)
        assert 1 <= len(scene.things) <= 4
        for i, thing in enumerate(scene.things):
            y0, x0, y1, x1 = thing.box
            assert 0 <= y0 < y1 <= 1000 and 0 <= x0 < x1 <= 1000
            side = max((y1 - y0) * scene.height, (x1 - x0) * scene.width) / 1000
            assert short / 6 - 2 <= side <= short / 2 + 2
            for other in scene.things[i + 1 :]:
                assert y1 < other.box[0] or other.box[2] < y0 or x1 < other.box[1] or other.box[3] < x0


def test_every_shape_colour_and_count_comes_often():
    seen = Counter(name for scene in scenes(1, 1500) for thing in scene.things for name in (thing.shape, thing.colour))
    total = sum(seen[shape] for shape in SHAPES)
    assert all(seen[shape] > 0.2 * total for shape in SHAPES) and all(seen[colour] > 0.12 * total for colour in COLOURS)
    counts = Counter(len(scene.things) for scene in scenes(2, 1000))
    assert all(counts[n] > 200 for n in (1, 2, 3, 4))


def test_a_scene_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="no room"):
        sample_scene(np.random.default_rng(0), 384, 384, count=(8, 8), size=(0.5, 0.5))


def test_the_same_seed_gives_the_same_world():
    def run():
        rng = np.random.default_rng(7)
        scene = sample_scene(rng, 432, 336)
        return scene, draw(scene, rng), [sample_ask(rng, scene) for _ in range(20)]

    (scene, picture, asks), (scene2, picture2, asks2) = run(), run()
    assert scene == scene2 and asks == asks2 and (picture == picture2).all()


def test_boxes_match_what_is_painted():
    rng = np.random.default_rng(3)
    for scene in scenes(3, 36):
        picture = draw(scene, rng)
        assert picture.shape == (scene.height, scene.width, 3) and picture.dtype == np.uint8
        smooth = cv2.medianBlur(cv2.GaussianBlur(picture, (5, 5), 1.2), 5).astype(int)
        painted = (smooth.max(2) - smooth.min(2)) > 45
        near = np.zeros_like(painted)
        for thing in scene.things:
            y0, x0, y1, x1 = np.array(thing.box) / 1000 * (scene.height, scene.width, scene.height, scene.width)
            pad = 6
            window = np.zeros_like(painted)
            window[max(0, int(y0) - pad) : int(y1) + pad, max(0, int(x0) - pad) : int(x1) + pad] = True
            near |= window
            ys, xs = np.nonzero(painted & window)
            # thin points of stars and triangles fade in blur
            slack = 0.07 * max(y1 - y0, x1 - x0) + 3
            assert np.abs(np.array([ys.min() - y0, xs.min() - x0, ys.max() + 1 - y1, xs.max() + 1 - x1])).max() < slack
        assert (painted & ~near).mean() < 1e-4


def test_surroundings_are_grey_with_grain_and_insides_are_of_their_colour():
    rng = np.random.default_rng(4)
    for scene in scenes(4, 48):
        picture = draw(scene, rng).astype(np.float32)
        free = np.ones(picture.shape[:2], np.uint8)
        for thing in scene.things:
            inside = cover(scene, thing)
            free &= ~inside
            core = cv2.erode(inside.astype(np.uint8), np.ones((9, 9))).astype(bool)
            red, green, blue = picture[core].mean(0)
            high, low = max(red, green, blue), min(red, green, blue)
            assert high - low > 55, (thing.colour, red, green, blue)
            hue = np.rad2deg(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
            far = {colour: abs((hue - centre + 180) % 360 - 180) for colour, centre in HUES.items()}
            assert min(far, key=far.get) == thing.colour
        free = cv2.erode(free, np.ones((15, 15))).astype(bool)
        mean = picture[free].mean(0)
        assert mean.max() - mean.min() < 22
        for y in range(0, scene.height - 47, 48):
            for x in range(0, scene.width - 47, 48):
                if free[y : y + 48, x : x + 48].all():
                    cell = picture[y : y + 48, x : x + 48]
                    fine = cell - cv2.GaussianBlur(cell, (0, 0), 1)
                    assert fine.std() > 0.6
                    tint = np.abs(cell.mean((0, 1)) - cell.mean()).max()
                    assert tint < 2.2 * cell.std()


def test_labels_agree_with_the_outlines():
    for scene in scenes(5, 60):
        rows, columns = scene.height // 48, scene.width // 48
        labels = patch_labels(scene).reshape(rows, columns)
        if scene.height % 48 or scene.width % 48:
            continue
        shares = np.stack([cover(scene, t).reshape(rows, 48, columns, 48).mean((1, 3)) for t in scene.things])
        best = shares.argmax(0)
        codes = np.array([1 + COLOURS.index(t.colour) * len(SHAPES) + SHAPES.index(t.shape) for t in scene.things])
        clear = np.abs(shares.max(0) - 0.25) > 0.04
        if len(codes) > 1:
            first, second = np.sort(shares, 0)[-1], np.sort(shares, 0)[-2]
            clear &= first - second > 0.04
        assert (labels == np.where(shares.max(0) >= 0.25, codes[best], 0))[clear].all()


def test_a_patch_knows_the_box_of_the_thing_that_covers_it():
    for seed in range(20):
        scene = sample_scene(np.random.default_rng(seed), 432, 336)
        labels, boxes = patch_labels(scene), patch_boxes(scene)
        assert boxes.shape == (len(labels), 4)
        assert ((boxes == -1).all(1) == (labels == 0)).all() and ((boxes >= 0).all(1) == (labels > 0)).all()
        for label, box in zip(labels[labels > 0], boxes[labels > 0], strict=True):
            assert (int(label), *box) in [
                (1 + COLOURS.index(t.colour) * len(SHAPES) + SHAPES.index(t.shape), *(tens(v) // 10 for v in t.box))
                for t in scene.things
            ]


def test_a_patch_knows_how_its_thing_stands_among_the_others():
    for seed in range(20):
        scene = sample_scene(np.random.default_rng(seed), 432, 336)
        for box, (place, others, ninth) in zip(patch_boxes(scene), patch_tallies(scene), strict=True):
            if box[0] < 0:
                assert (place, others, ninth) == (-1, -1, -1)
                continue
            thing = scene.things[place]
            assert tuple(box) == tuple(tens(v) // 10 for v in thing.box) and others + 1 == len(scene.things)
            y, x = thing.box[0] + thing.box[2], thing.box[1] + thing.box[3]
            assert (ninth // 3 / 3 <= y / 2000 <= (ninth // 3 + 1) / 3) and (ninth % 3 / 3 <= x / 2000 <= (ninth % 3 + 1) / 3)


# The truth is worked out again here from the words of the question alone.


def subject(text: str) -> tuple[str | None, str | None]:
    words = [word.removesuffix("s") for word in spoken(text).split()]
    return next((w for w in words if w in COLOURS), None), next((w for w in words if w in SHAPES), None)


def named(text: str) -> Counter:
    numbers = {"a": 1, "an": 1, **{word: n for n, word in enumerate(NUMBERS)}}
    found = re.findall(rf"({'|'.join(numbers)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(s?)\b", text)
    assert all((numbers[number] > 1) == (plural == "s") for number, _, _, plural in found)
    return Counter({(colour, shape): numbers[number] for number, colour, shape, _ in found})


def check(ask, scene: Scene) -> None:
    colour, shape = subject(ask.text)
    things = [t for t in scene.things if (not colour or t.colour == colour) and (not shape or t.shape == shape)]
    truth = Counter((t.colour, t.shape) for t in things)
    name = " ".join(filter(None, (colour, shape or "shape")))
    if ask.kind == "describe":
        assert ask.answer.startswith("I see a") or ask.answer.startswith(("I see two", "I see three", "I see four"))
        assert named(ask.answer) == truth == Counter((t.colour, t.shape) for t in scene.things)
    elif ask.kind == "count":
        plural = "" if len(things) == 1 else "s"
        assert ask.answer == f"There {'are' if plural else 'is'} {NUMBERS[len(things)]} {name}{plural}."
    elif ask.kind == "exists":
        assert ask.answer.split(",")[0] == ("Yes" if things else "No")
        assert ask.answer.endswith(f" {name}.")
    elif not things:
        assert ask.answer == f"I see no {name}."
    elif ask.kind == "colour":
        if len(things) == 1:
            assert ask.answer == f"The {shape} is {things[0].colour}."
        else:
            assert ask.answer.startswith("There ") and named(ask.answer) == truth
    else:
        sentence, _, listing = ask.answer.partition(". ")
        boxes = json.loads(listing)
        assert [box["label"] for box in boxes] == [f"{t.colour} {t.shape}" for t in things]
        for box, thing in zip(boxes, things, strict=True):
            assert all(v % 10 == 0 and abs(v - exact) <= 5 for v, exact in zip(box["box_2d"], thing.box, strict=True))
        if len(things) > 1:
            assert sentence == f"There are {NUMBERS[len(things)]} {name}s"
        else:
            y0, x0, y1, x1 = things[0].box
            assert ("left" in sentence) == ((x0 + x1) / 2 < 1000 / 3) and ("right" in sentence) == ((x0 + x1) / 2 >= 2000 / 3)
            assert ("top" in sentence) == ((y0 + y1) / 2 < 1000 / 3) and ("bottom" in sentence) == ((y0 + y1) / 2 >= 2000 / 3)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_answers_are_true_to_the_scene(kind):
    rng = np.random.default_rng(8)
    for scene in scenes(8, 300):
        ask = sample_ask(rng, scene, kind)
        assert ask.kind == kind
        check(ask, scene)


def test_answers_are_balanced():
    rng = np.random.default_rng(9)
    few = scenes(9, 600)
    answers = {kind: [sample_ask(rng, scene, kind).answer for scene in few] for kind in QUESTIONS}
    assert 0.4 < np.mean([a.startswith("Yes") for a in answers["exists"]]) < 0.6
    assert np.mean(["There are no" in a for a in answers["count"]]) < 0.35
    assert np.mean([bool(re.search("two|three|four", a)) for a in answers["count"]]) > 0.25
    assert np.mean(["I see no" in a for a in answers["where"]]) < 0.25
    assert np.mean(["I see no" in a for a in answers["colour"]]) < 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_asked_in_many_wordings_that_can_be_spoken(kind):
    rng = np.random.default_rng(10)
    scene = None if kind == "no_picture" else sample_scene(rng, 432, 336)
    asks = [sample_ask(rng, scene, kind) for _ in range(1500)]
    names = rf"\b(an? )?({'|'.join(COLOURS)}|{'|'.join(SHAPES)}|shape|thing)s?\b"
    wordings = {re.sub(r"(X )+", "X ", re.sub(names, "X", ask.text)) for ask in asks}
    assert len(wordings) >= (500 if kind == "other" else 9)
    for ask in asks:
        assert ask.kind == kind and re.fullmatch(r"[A-Z][A-Za-z', ]*[.?]", ask.text), ask.text
        assert re.fullmatch(r"[a-z' ]+", spoken(ask.text)) and "  " not in spoken(ask.text)


def test_without_a_picture_nothing_is_claimed_about_one():
    rng = np.random.default_rng(11)
    for kind in QUESTIONS:
        assert sample_ask(rng, None, kind).answer == "I have no picture to look at."
    kinds = Counter(sample_ask(rng, None).kind for _ in range(500))
    assert kinds["no_picture"] > 100 and not any(kinds[kind] for kind in QUESTIONS)
    with pytest.raises(ValueError, match="no_picture"):
        sample_ask(rng, sample_scene(rng, 384, 384), "no_picture")


def test_a_sentence_belongs_to_one_kind():
    rng = np.random.default_rng(12)
    kinds: dict[str, str] = {}
    for scene in scenes(12, 200):
        for ask in (sample_ask(rng, scene) for _ in range(20)):
            assert kinds.setdefault(spoken(ask.text), ask.kind) == ask.kind


def test_a_transcript_is_what_was_said():
    rng = np.random.default_rng(13)
    for _ in range(100):
        ask = sample_ask(rng, None, "transcribe")
        assert ask.speech and ask.answer == spoken(ask.speech)
    assert spoken("Hey, what's in the picture?") == "hey what's in the picture"


def test_corpus_gives_as_many_texts_as_asked():
    texts = list(corpus(np.random.default_rng(14), 500))
    assert len(texts) == 500 and texts == list(corpus(np.random.default_rng(14), 500))
    assert any("box_2d" in text for text in texts) and any(text == text.lower() for text in texts)
