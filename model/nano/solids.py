"""The drawer that the lessons never show: thick tiles under a lamp, worked out pixel by pixel from distances to their edges.

It shares no code for shapes, colours, backgrounds or the camera with the others, and the exam alone uses it.
"""

from __future__ import annotations

import numpy as np

from model.nano.world import Scene

# Hue as a turn 0..1, and its reach; saturation and value are drawn the same for all.
HUES = {"red": (0.995, 0.012), "orange": (0.075, 0.012), "yellow": (0.155, 0.012), "green": (0.34, 0.05), "blue": (0.61, 0.03)}
HUES["purple"] = (0.78, 0.025)


def outline(rng: np.random.Generator, shape: str) -> np.ndarray:
    """Corners [n, 2] within a box whose larger side is one: regular shapes in any position."""
    around = {"circle": 60, "square": 4, "triangle": 3, "star": 10}[shape]
    radius = np.ones(around)
    radius[1::2] = 0.45 if shape == "star" else 1.0
    z = radius * np.exp(1j * (np.arange(around) / around + rng.random()) * 2 * np.pi)
    points = np.stack([z.real - z.real.min(), z.imag - z.imag.min()], 1)
    unit: np.ndarray = points / points.max()
    return unit


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as uint8 RGB [H, W, 3]."""
    height, width = scene.height, scene.width
    y, x = np.mgrid[0:height, 0:width] + 0.5
    wave = np.sin((x * rng.normal(0, 1) + y * rng.normal(0, 1)) / rng.uniform(4, 40) + 3 * np.sin(y / rng.uniform(30, 90)))
    picture = np.repeat((rng.uniform(60, 220) + rng.uniform(1, 9) * wave)[:, :, None], 3, 2)
    picture *= 1 + rng.uniform(-0.04, 0.04) * np.array([1, 0.2, -1])
    lamp = np.exp(1j * rng.uniform(0, 2 * np.pi))
    for thing in scene.things:
        points = np.array(thing.outline)
        bevel = rng.uniform(2, 6)
        inside, edge, slope = _distances(points, x, y)
        away = _distances(points + 0.02 * height * np.array([lamp.real, lamp.imag]), x, y)
        picture *= (1 - 0.4 * np.clip(0.5 + np.where(away[0], away[1], -away[1]) / 6, 0, 1))[:, :, None]
        facing = (slope * lamp.conjugate()).real * np.clip(1 - edge / bevel, 0, 1)
        shade = 1 + 0.22 * facing
        gloss = np.exp(-(((x - points[:, 0].mean()) ** 2 + (y - points[:, 1].mean()) ** 2) / (0.02 * height * width)))
        tone = _tone(thing.colour, rng)
        tile = np.clip(shade[:, :, None] * tone + 255 * rng.uniform(0, 0.12) * gloss[:, :, None], 0, 255)
        cover = np.clip(0.5 + np.where(inside, edge, -edge), 0, 1)[:, :, None]
        picture = picture * (1 - cover) + tile * cover
    picture = picture + rng.normal(0, rng.uniform(0.8, 5), picture.shape)
    seen: np.ndarray = np.clip(picture, 0, 255).astype(np.uint8)
    return seen


def _tone(colour: str, rng: np.random.Generator) -> np.ndarray:
    hue, reach = HUES[colour]
    hue = (hue + rng.uniform(-reach, reach)) % 1
    saturation, value = rng.uniform(0.72, 1), rng.uniform(0.55, 1) if colour not in ("yellow", "orange") else rng.uniform(0.85, 1)
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    tone: np.ndarray = 255 * value * (1 - saturation * (1 - wheel))
    return tone


def _distances(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every pixel: whether it lies inside, how far it is from the edge, and the direction to its nearest point."""
    pixel, nearest, towards = x + 1j * y, np.full(x.shape, np.inf), np.zeros(x.shape, complex)
    inside = np.zeros(x.shape, bool)
    corners = points[:, 0] + 1j * points[:, 1]
    for a, b in zip(corners, np.roll(corners, -1), strict=True):
        along = np.clip(((pixel - a) * (b - a).conjugate()).real / abs(b - a) ** 2, 0, 1)
        gap = a + along * (b - a) - pixel
        closer = np.abs(gap) < nearest
        nearest, towards = np.where(closer, np.abs(gap), nearest), np.where(closer, gap, towards)
        if a.imag != b.imag:
            crosses = (y > a.imag) != (y > b.imag)
            inside ^= crosses & (x < a.real + (y - a.imag) * (b.real - a.real) / (b.imag - a.imag))
    return inside, nearest, towards / np.maximum(nearest, 1e-6)
