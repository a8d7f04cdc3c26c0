"""Pictures as programs make them: hard or smooth edges, solid colours of any tint, a plain page, no camera in between."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from model.nano.camera import jpeg
from model.nano.world import Scene

# Colours as people pick them from a palette; each is varied a little.
PALETTE = {
    "red": ((255, 0, 0), (220, 20, 60), (200, 30, 30), (178, 20, 20), (230, 57, 53), (255, 45, 45)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 139, 34), (50, 205, 50), (0, 170, 60), (67, 160, 71)),
    "blue": ((0, 0, 255), (30, 60, 200), (65, 105, 225), (30, 110, 255), (10, 20, 160), (33, 100, 243)),
    "yellow": ((255, 255, 0), (255, 225, 0), (255, 235, 59), (240, 220, 20), (250, 240, 90)),
    "orange": ((255, 165, 0), (255, 140, 0), (255, 127, 0), (245, 130, 30), (251, 140, 0)),
    "purple": ((128, 0, 128), (160, 32, 240), (138, 43, 226), (148, 0, 211), (142, 36, 170), (106, 27, 154)),
}
PAGES = ((255, 255, 255), (250, 250, 245), (240, 240, 240), (200, 200, 200), (128, 128, 128), (40, 40, 44), (0, 0, 0))
TINTED_PAGES = ((245, 245, 220), (225, 240, 250), (230, 250, 230), (250, 235, 240), (30, 30, 60), (60, 45, 30))


def outline(rng: np.random.Generator, shape: str) -> np.ndarray:
    """Corners [n, 2] of a shape as drawing programs offer it, within a box whose larger side is one."""
    turn = rng.uniform(-math.pi, math.pi) if rng.random() < 0.4 else 0.0
    if shape == "circle":
        points = _polar(np.ones(64), 0.0)
        points[:, 1] *= rng.uniform(0.85, 1) if rng.random() < 0.3 else 1
    elif shape == "square":
        points = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
        points[:, 1] *= rng.uniform(0.88, 1) if rng.random() < 0.3 else 1
        turn = turn if rng.random() < 0.5 else 0.0
    elif shape == "triangle":
        points = np.array([[rng.choice((0.5, 0.5, 0.5, 0.0, 1.0)), 0], [1, rng.uniform(0.8, 1)], [0, 1]])
        points[1:, 1] = points[1, 1]
    else:
        tips = 5 if rng.random() < 0.85 else 6
        points = _polar(np.where(np.arange(2 * tips) % 2 == 0, 1.0, rng.uniform(0.36, 0.55)), -math.pi / 2)
    points = points @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points = points - points.min(0)
    unit: np.ndarray = points / points.max()
    return unit


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as uint8 RGB [H, W, 3]."""
    tinted = rng.random() < 0.25
    pages = TINTED_PAGES if tinted else PAGES
    page = pages[rng.integers(len(pages))] if rng.random() < 0.65 else (255, 255, 255)
    scale = 3 if rng.random() < 0.4 else 1  # smooth edges are drawn large
    image = Image.new("RGB", (scene.width * scale, scene.height * scale), page)
    pen = ImageDraw.Draw(image)
    _ruled(pen, image.size, page, rng)
    stroke = int(rng.integers(1, 5)) * scale if rng.random() < 0.4 else 0
    ink = (0, 0, 0) if sum(page) > 200 and rng.random() < 0.8 else (90, 90, 90)
    for thing in scene.things:
        tones = PALETTE[thing.colour]
        tone = np.array(tones[rng.integers(len(tones))]) + rng.integers(-12, 13, 3)
        points = [(x * scale - 0.5, y * scale - 0.5) for x, y in thing.outline]
        pen.polygon(points, fill=tuple(int(v) for v in np.clip(tone, 0, 255)))
        if stroke:
            pen.line([*points, points[0], points[1]], fill=ink, width=stroke, joint="curve")
    if scale > 1:
        image = image.resize((scene.width, scene.height), Image.Resampling.BOX)
    picture = np.asarray(image)
    if rng.random() < 0.35:
        grain = rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(0.3, 3))
        picture = np.clip(picture + grain, 0, 255).astype(np.uint8)
    return jpeg(picture, rng, 0.6)


def _ruled(pen: ImageDraw.ImageDraw, size: tuple[int, int], page: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Squared or lined paper, a toolbar, or nothing."""
    width, height = size
    faint = tuple(int(v + (-25 if v > 60 else 25)) for v in page)
    kind = rng.random()
    if kind < 0.12:
        step = int(rng.integers(width // 40, width // 10))
        for at in range(0, max(size), step):
            pen.line([(0, at), (width, at)], fill=faint)
            if kind < 0.07:
                pen.line([(at, 0), (at, height)], fill=faint)
    elif kind < 0.2:
        bar = int(rng.integers(height // 50, height // 16) + 1)
        level = int(rng.integers(60, 240))
        pen.rectangle([0, 0, width, bar] if rng.random() < 0.5 else [0, height - bar, width, height], fill=(level,) * 3)


def _polar(radii: np.ndarray, start: float) -> np.ndarray:
    angles = start + np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
