"""Who draws the scenes: three in the lessons, and `solids`, which is kept for the exam.

Drawers share no code for shapes, colours and backgrounds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.nano import draw, flat, paper, solids, world


class Drawer(NamedTuple):
    outline: world.Outline
    draw: Callable[[world.Scene, np.random.Generator], np.ndarray]
    share: float
    """Of the pictures of the lessons."""


def drawers(photos: Path | None = None) -> dict[str, Drawer]:
    """Those of the lessons; `photos` is a folder of photographs, which become backgrounds."""
    backgrounds = paper.photographs(photos)
    return {
        "painted": Drawer(world.unit_outline, draw.draw, 0.25),
        "flat": Drawer(flat.outline, flat.draw, 0.4),
        "paper": Drawer(paper.outline, lambda scene, rng: paper.draw(scene, rng, backgrounds), 0.35),
    }


def held_out() -> Drawer:
    return Drawer(solids.outline, solids.draw, 0.0)


def pick(found: dict[str, Drawer], rng: np.random.Generator) -> Drawer:
    shares = np.array([drawer.share for drawer in found.values()])
    return list(found.values())[rng.choice(len(shares), p=shares / shares.sum())]


def scene(drawer: Drawer, rng: np.random.Generator, width: int, height: int, **how: Any) -> world.Scene:
    """A scene of the shapes that this drawer draws; takes the settings of `world.sample_scene`."""
    return world.sample_scene(rng, width, height, outline=drawer.outline, **how)
