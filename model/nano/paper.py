"""Shapes cut out of coloured paper or painted by hand, on a table or in front of a photograph, before a camera."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from model.nano.camera import shoot
from model.nano.world import Scene
from streams.opencv import cv2

# Means in CIE Lab (L 0..100) and how far each may be from it: paper and paint are duller than light.
PIGMENTS = {
    "red": ((46, 62, 38), (8, 9, 8)),
    "orange": ((66, 38, 64), (6, 6, 8)),
    "yellow": ((85, -4, 75), (6, 5, 12)),
    "green": ((50, -42, 30), (9, 9, 9)),
    "blue": ((40, 14, -56), (9, 9, 9)),
    "purple": ((36, 46, -44), (7, 8, 8)),
}


def outline(rng: np.random.Generator, shape: str) -> np.ndarray:
    """Cut by hand and seen at an angle: corners [n, 2] within a box whose larger side is one."""
    if shape == "circle":
        turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        wobble = sum(rng.normal(0, 0.012) * np.cos(n * turns + rng.uniform(0, 7)) for n in range(2, 7))
        points = np.stack([(1 + wobble) * np.cos(turns), (1 + wobble) * np.sin(turns)], 1)
    else:
        if shape == "star":
            inner = rng.uniform(0.38, 0.52)
            corners = [(r * np.sin(k * np.pi / 5), -r * np.cos(k * np.pi / 5)) for k, r in enumerate((1.0, inner) * 5)]
        elif shape == "square":
            corners = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
        else:
            corners = [(0.0, -1.0), (1.0, 0.75), (-1.0, 0.75)]
        cut = np.array(corners) + rng.normal(0, 0.03, (len(corners), 2))
        sides = []
        for a, b in zip(cut, np.roll(cut, -1, 0), strict=True):  # scissors do not go quite straight
            along = np.linspace(0, 1, 6)[:-1, None]
            bow = rng.normal(0, 0.012) * np.sin(np.pi * along)
            sides.append(a + (b - a) * along + bow * (b - a)[::-1] * (1, -1))
        points = np.concatenate(sides)
    angle = rng.uniform(0, 2 * np.pi)
    points = points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    # The table is seen from above or a little from the side, which narrows and shears what lies on it.
    points = points * (1, rng.uniform(0.88, 1)) + points[:, 1:] * (rng.normal(0, 0.04), 0)
    points /= 1 + rng.normal(0, 0.03) * points[:, 1:]
    points = points - points.min(0)
    unit: np.ndarray = points / points.max()
    return unit


def draw(scene: Scene, rng: np.random.Generator, photos: tuple[np.ndarray, ...] = ()) -> np.ndarray:
    """The scene as uint8 RGB [H, W, 3]. `photos` are backgrounds, which are used half of the time."""
    height, width = scene.height, scene.width
    behind = rng.random() < 0.5 and len(photos) > 0
    picture = _window(photos[rng.integers(len(photos))], height, width, rng) if behind else _table(height, width, rng)
    if rng.random() < 0.15:
        _hand(picture, rng)
    thick, towards = rng.uniform(0, 0.03) * min(height, width), rng.uniform(-1, 1, 2)
    for thing in scene.things:
        _lay(picture, np.array(thing.outline), _colour(thing.colour, rng), thick * towards, rng)
    return shoot(picture, rng)


def _colour(name: str, rng: np.random.Generator) -> np.ndarray:
    middle, spread = PIGMENTS[name]
    lab = np.array(middle) + rng.uniform(-1, 1, 3) * spread
    rgb = cv2.cvtColor(lab.astype(np.float32).reshape(1, 1, 3), cv2.COLOR_Lab2RGB)
    return np.clip(rgb.reshape(3), 0, 1) * 255


def _lay(picture: np.ndarray, points: np.ndarray, colour: np.ndarray, shift: np.ndarray, rng: np.random.Generator) -> None:
    """One piece of paper with its shadow, its grain and sometimes a fold; or paint with the strokes of a brush."""
    height, width = picture.shape[:2]
    reach = 12 + int(np.abs(shift).max())
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - reach, 0)
    x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + reach, (width, height))
    size = int(x1 - x0), int(y1 - y0)
    cover = _mask(points - (x0, y0), size)
    window = picture[y0:y1, x0:x1]
    if np.abs(shift).max() > 1:
        shadow = cv2.GaussianBlur(_mask(points + shift - (x0, y0), size), (0, 0), 1 + np.abs(shift).max() / 3)
        window *= 1 - np.float32(rng.uniform(0.2, 0.55)) * shadow[:, :, None]
    shade = np.ones(cover.shape, np.float32)
    if rng.random() < 0.3:
        x, y = np.meshgrid(np.arange(size[0], dtype=np.float32), np.arange(size[1], dtype=np.float32))
        angle, middle = rng.uniform(0, np.pi), points.mean(0) - (x0, y0)
        side = (x - middle[0]) * np.cos(angle) + (y - middle[1]) * np.sin(angle)
        shade *= 1 - np.float32(rng.uniform(0.05, 0.3)) * (side > 0)
    blur = (1, 7) if rng.random() < 0.4 else (1, 1)
    grain = cv2.GaussianBlur(rng.standard_normal(cover.shape, np.float32), (0, 0), blur[0], sigmaY=blur[1])
    shade *= 1 + grain * np.float32(rng.uniform(0.01, 0.12))
    if rng.random() < 0.15:  # a thin coat of paint lets the ground through
        cover = cover * np.float32(rng.uniform(0.85, 1))
    paint = np.clip(shade[:, :, None] * colour.astype(np.float32), 0, 255)
    window += cover[:, :, None] * (paint - window)


def _mask(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """0..1 [H, W]: how much of each pixel lies inside; drawn twice as large and averaged."""
    mask = np.zeros((2 * size[1], 2 * size[0]), np.uint8)
    cv2.fillPoly(mask, [np.rint(2 * points - 0.5).astype(np.int32)], 255)
    halved: np.ndarray = cv2.resize(mask, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return halved


def _table(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Cloth, wood, stone or card: noise of a few sizes in a dull tone."""
    tone = rng.uniform(40, 235) * np.array([1, 1, 1]) + rng.uniform(-1, 1) * np.array([14, 3, -14]) * (rng.random() < 0.7)
    field = np.zeros((height, width), np.float32)
    for cells in (3, 9, 27, 81):
        stretch = int(rng.choice((1, 1, 6)))
        small = rng.standard_normal((cells, max(2, cells // stretch)), np.float32)
        field += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) / np.float32(cells**0.4)
    picture = np.clip(tone, 0, 255).astype(np.float32) + field[:, :, None] * np.float32(rng.uniform(1, 14))
    if rng.random() < 0.3:
        step = int(rng.integers(width // 8, width // 3))
        for at in range(int(rng.integers(step)), width, step):
            picture[:, at : at + 2] *= np.float32(rng.uniform(0.5, 0.9))
    return np.clip(picture, 0, 255)


def _hand(picture: np.ndarray, rng: np.random.Generator) -> None:
    """A hand that reaches in from an edge."""
    height, width = picture.shape[:2]
    skin = np.array([225, 175, 145]) * rng.uniform(0.35, 1.05)
    middle = np.array([rng.uniform(0, width), rng.choice((0, height))])
    inwards = 1 if middle[1] == 0 else -1
    for finger in range(4):
        tip = middle + (rng.normal(0, 3) + 0.05 * width * (finger - 1.5), inwards * rng.uniform(0.08, 0.16) * height)
        near, far = ((int(x), int(y)) for x, y in (middle, tip))
        cv2.line(picture, near, far, tuple(float(v) for v in skin), max(3, width // 28), cv2.LINE_AA)


def _window(photo: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A piece of a photograph, with its colours mostly taken back: what is coloured in the world is the shapes."""
    tall, wide = photo.shape[:2]
    scale = min(tall / height, wide / width) * rng.uniform(0.4, 1)
    h, w = max(8, int(height * scale)), max(8, int(width * scale))
    y, x = rng.integers(tall - h + 1), rng.integers(wide - w + 1)
    piece = cv2.resize(photo[y : y + h, x : x + w], (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    grey = piece.mean(2, keepdims=True)
    faded: np.ndarray = grey + (piece - grey) * np.float32(rng.uniform(0, 0.6))
    return faded


@cache
def photographs(folder: Path | None) -> tuple[np.ndarray, ...]:
    """Every picture of a folder as uint8 RGB; none where there is no folder."""
    found = []
    for file in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []:
        picture = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if picture is not None:
            found.append(np.ascontiguousarray(picture[:, :, ::-1]))
    return tuple(found)
