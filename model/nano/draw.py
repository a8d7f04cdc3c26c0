"""Scenes as a camera would see them: grey surroundings with light and grain, and painted shapes of a clear hue.

The vision embedder's first LayerNorm takes a patch's mean and spread away, so that only grain and edges tell an evenly
tinted grey from paint: grain is therefore never absent, and the tint of the light stays within it.
"""

import colorsys
import functools

import numpy as np

from streams.opencv import cv2

from .world import Scene, Thing

cv2.setNumThreads(1)

# Ranges of hue in degrees, saturation and value: wide enough to vary, with gaps that the light does not bridge.
PAINTS = {
    "red": ((-10, 5), (0.82, 0.96), (0.68, 0.95)),
    "orange": ((23, 32), (0.86, 0.97), (0.9, 1.0)),
    "yellow": ((51, 60), (0.78, 0.96), (0.86, 1.0)),
    "green": ((102, 150), (0.68, 0.95), (0.5, 0.85)),
    "blue": ((207, 231), (0.75, 0.95), (0.6, 0.97)),
    "purple": ((271, 294), (0.58, 0.88), (0.5, 0.85)),
}


@functools.cache
def _grain() -> np.ndarray:
    """Sensor noise of spread about one, mostly in brightness; pictures take pieces of it."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((1024, 1536, 3), np.float32) * np.float32(0.6)
    noise += rng.standard_normal((1024, 1536, 1), np.float32) * np.float32(0.8)
    return noise


@functools.cache
def _textures() -> tuple[np.ndarray, ...]:
    """Paper, plaster and wood of spread one."""
    rng = np.random.default_rng(2)
    made = []
    for across, along in ((1.2, 1.2), (4, 4), (1.5, 30)):
        noise = cv2.GaussianBlur(rng.standard_normal((1024, 1536), np.float32), (0, 0), along, sigmaY=across)
        made.append(noise / noise.std())
    return tuple(made)


def _piece(rng: np.random.Generator, bank: np.ndarray, height: int, width: int) -> np.ndarray:
    """A random window of the bank, which repeats when the picture is larger."""
    repeats = (-(-height // bank.shape[0]), -(-width // bank.shape[1]))
    if repeats != (1, 1):
        bank = np.tile(bank, repeats + (1,) * (bank.ndim - 2))
    y, x = rng.integers(bank.shape[0] - height + 1), rng.integers(bank.shape[1] - width + 1)
    return bank[y : y + height, x : x + width]


def _fixed(points: np.ndarray) -> np.ndarray:
    """Points for cv2 with four bits behind the point; cv2 counts from pixel centres, outlines from pixel corners."""
    return np.rint((points - 0.5) * 16).astype(np.int32)


def _fill(surface: np.ndarray, points: np.ndarray, value: float) -> None:
    cv2.fillPoly(surface, [_fixed(points)], value, cv2.LINE_AA, 4)


def _soft(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """A smooth random field between about -1 and 1."""
    rows = rng.uniform(-1, 1, (cells, cells + 1)).astype(np.float32)
    return cv2.resize(rows, (width, height), interpolation=cv2.INTER_CUBIC if cells > 2 else cv2.INTER_LINEAR)


def _surroundings(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Walls, tables and paper, as grey levels."""
    level = rng.uniform(50, 215)
    grey = np.full((height, width), level, np.float32)
    kind = rng.random()
    if kind < 0.35:
        # the edge of a table
        left, right = rng.uniform(0.25, 0.85) * height + rng.uniform(-0.06, 0.06, 2) * height
        _fill(grey, np.array([[-9, left], [width + 9, right], [width + 9, height + 9], [-9, height + 9]]), rng.uniform(50, 215))
        if rng.random() < 0.5:
            line = _fixed(np.array([[-9, left], [width + 9, right]]))
            cv2.polylines(grey, [line], False, rng.uniform(25, 200), int(rng.integers(1, 5)), cv2.LINE_AA, 4)
    elif kind < 0.6:
        # sheets of paper
        for _ in range(int(rng.integers(1, 3))):
            centre = rng.uniform(0.1, 0.9, 2) * (width, height)
            sheet = cv2.boxPoints((tuple(centre), tuple(rng.uniform(0.4, 1.1, 2) * (width, height)), rng.uniform(-40, 40)))
            _fill(grey, sheet, rng.uniform(60, 225))
    if rng.random() < 0.7:
        texture = _textures()[int(rng.integers(3))]
        cv2.scaleAdd(_piece(rng, texture, height, width), rng.uniform(1, 8), grey, dst=grey)
    if rng.random() < 0.6:
        cv2.scaleAdd(_soft(rng, height, width, int(rng.integers(3, 7))), rng.uniform(4, 30), grey, dst=grey)
    return np.clip(grey, 30, 235, out=grey)


def _cast_shadows(rng: np.random.Generator, grey: np.ndarray, scene: Scene) -> None:
    height, width = grey.shape
    shadow = np.zeros((-(-height // 4), -(-width // 4)), np.float32)
    shift = rng.uniform(-0.035, 0.035, 2) * min(height, width)
    for thing in scene.things:
        _fill(shadow, (np.array(thing.outline) + shift) / 4, 1.0)
    shadow = cv2.GaussianBlur(shadow, (0, 0), rng.uniform(0.7, 3))
    grey *= cv2.resize(1 - shadow * np.float32(rng.uniform(0.15, 0.5)), (width, height), interpolation=cv2.INTER_LINEAR)


def _paint(rng: np.random.Generator, picture: np.ndarray, thing: Thing) -> None:
    """The shape in its colour, with a little light and texture of its own."""
    points = np.array(thing.outline)
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 3, 0)
    x1, y1 = np.ceil(points.max(0)).astype(int) + 3
    window = picture[y0:y1, x0:x1]
    height, width = window.shape[:2]
    cover = np.zeros((height, width), np.uint8)
    _fill(cover, points - (x0, y0), 255)
    hue, saturation, value = (rng.uniform(*limits) for limits in PAINTS[thing.colour])
    colour = np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value), np.float32) * 235
    shade = 1 + _soft(rng, height, width, 2) * np.float32(rng.uniform(0, 0.12))
    shade += _piece(rng, _textures()[int(rng.integers(3))], height, width) * np.float32(rng.uniform(0, 0.02))
    if rng.random() < 0.3:
        line = np.zeros((height, width), np.uint8)
        cv2.polylines(line, [_fixed(points - (x0, y0))], True, 255, int(rng.integers(1, 4)), cv2.LINE_AA, 4)
        shade *= 1 - line * np.float32(rng.uniform(0.1, 0.45) / 255)
    paint = cv2.merge([shade * part for part in colour])
    cv2.blendLinear(paint, window, cover * np.float32(1 / 255), (255 - cover) * np.float32(1 / 255), dst=window)


def _light(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """How much light falls on each pixel, brightest at one: a slope, and sometimes a lens that darkens the corners."""
    field = 1 + _soft(rng, 13, 13, 2) * np.float32(rng.uniform(0, 0.15))
    if rng.random() < 0.5:
        square = np.linspace(-1, 1, 13, dtype=np.float32) ** 2
        field *= 1 - np.float32(rng.uniform(0, 0.14)) * (square[:, None] + square)
    light: np.ndarray = cv2.resize(field / field.max(), (width, height), interpolation=cv2.INTER_LINEAR)
    return light


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as uint8 RGB, height × width × 3."""
    height, width = scene.height, scene.width
    grey = _surroundings(rng, height, width)
    if rng.random() < 0.4:
        _cast_shadows(rng, grey, scene)
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    for thing in scene.things:
        _paint(rng, picture, thing)

    sigma = rng.uniform(2, 10)
    tint = rng.uniform(-1, 1) * np.array([1, rng.uniform(-0.3, 0.3), -1]) * min(1.2 * sigma, 8) / 160
    light = _light(rng, height, width)
    exposure = rng.uniform(0.8, 1)
    cv2.multiply(picture, cv2.merge([light * np.float32(exposure * (1 + part)) for part in tint]), dst=picture)
    blur = rng.uniform(0, 1.5)
    if blur > 0.3:
        reach = 3 if blur < 0.7 else 5 if blur < 1.1 else 7
        picture = cv2.GaussianBlur(picture, (reach, reach), blur)
    return cv2.addWeighted(picture, 1, _piece(rng, _grain(), height, width), sigma, 0, dtype=cv2.CV_8U)
