"""What of a scene lies on each patch of its picture: what nano is taught to see."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from model.nano.world import COLOURS, SHAPES, Scene, tens, third

FINE = 8  # sample points along a side of a patch


Grid = tuple[int, int]
"""Rows and columns of patches that a picture is cut into."""


def grid_of(scene: Scene, patch: int = 48) -> Grid:
    """That of a picture which is cut as it is, each side stretched to the next smaller multiple of the patch."""
    return max(1, scene.height // patch), max(1, scene.width // patch)


@lru_cache(maxsize=4)
def patch_cover(scene: Scene, grid: Grid | None = None) -> np.ndarray:
    """bool [things, patches, FINE * FINE]: which sample points of each patch, row by row, lie inside which thing.

    Kept for the few who ask after it at once: not to be written to."""
    rows, columns = grid or grid_of(scene)
    ys = (np.arange(rows * FINE) + 0.5) * scene.height / (rows * FINE)
    xs = (np.arange(columns * FINE) + 0.5) * scene.width / (columns * FINE)
    cover = np.zeros((len(scene.things), len(ys), len(xs)), bool)
    for inside, thing in zip(cover, scene.things, strict=True):
        for (x0, y0), (x1, y1) in zip(thing.outline, (*thing.outline[1:], thing.outline[0]), strict=True):
            crossed = np.flatnonzero((ys > y0) != (ys > y1))
            inside[crossed] ^= xs > (x0 + (ys[crossed] - y0) * (x1 - x0) / (y1 - y0))[:, None]
    return (
        cover.reshape(-1, rows, FINE, columns, FINE).transpose(0, 1, 3, 2, 4).reshape(len(scene.things), rows * columns, FINE**2)
    )


def covering(scene: Scene, grid: Grid | None = None) -> np.ndarray:
    """For each patch the place in `scene.things` of the one that covers most of it and at least a quarter, else -1."""
    share = patch_cover(scene, grid).mean(-1)
    return np.where(share.max(0) >= 0.25, share.argmax(0), -1)


def patch_labels(scene: Scene, grid: Grid | None = None) -> np.ndarray:
    """For each patch: 0, or 1 + colour * len(SHAPES) + shape of the thing that covers it."""
    codes = [1 + COLOURS.index(x.colour) * len(SHAPES) + SHAPES.index(x.shape) for x in scene.things]
    labels: np.ndarray = np.array([*codes, 0])[covering(scene, grid)]
    return labels


def patch_boxes(scene: Scene, grid: Grid | None = None) -> np.ndarray:
    """For each patch the box of the thing that covers it, int [patches, 4] in tens of thousandths; -1 where nothing does."""
    boxes = [[tens(v) // 10 for v in x.box] for x in scene.things]
    extents: np.ndarray = np.array([*boxes, [-1] * 4])[covering(scene, grid)]
    return extents


TALLIES = (4, 4, 9)


def patch_tallies(scene: Scene, grid: Grid | None = None) -> np.ndarray:
    """What answers need of the thing that covers a patch, int [patches, 3], -1 where nothing does: its place from left to
    right, how many others there are, and which ninth of the picture it lies in."""
    things = scene.things
    tallies = [
        [place, len(things) - 1, 3 * third(thing.box[0] + thing.box[2]) + third(thing.box[1] + thing.box[3])]
        for place, thing in enumerate(things)
    ]
    told: np.ndarray = np.array([*tallies, [-1] * len(TALLIES)])[covering(scene, grid)]
    return told
