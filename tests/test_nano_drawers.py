"""Who draws the scenes of nano's lessons and exam, and the camera in front of them."""

import cv2
import numpy as np
import pytest

from model.nano import camera, drawers, paper
from model.nano.lessons import BUDGETS, SIZES
from model.nano.world import COLOURS, SHAPES
from model.pixels import target_size

ALL = {**drawers.drawers(), "solids": drawers.held_out()}
HUES = {"red": 0, "orange": 30, "yellow": 56, "green": 125, "blue": 225, "purple": 285}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def inside(scene, thing, margin: int) -> np.ndarray:
    mask = np.zeros((scene.height, scene.width), np.uint8)
    cv2.fillPoly(mask, [np.rint(np.array(thing.outline)).astype(np.int32)], 1)
    return cv2.erode(mask, np.ones((margin, margin))).astype(bool)


@pytest.mark.parametrize("name", ALL)
def test_what_is_drawn_has_the_colours_and_places_that_the_scene_says(name: str) -> None:
    drawer, right, total = ALL[name], 0, 0
    for seed in range(12):
        scene = drawers.scene(drawer, rng(seed), 432, 336)
        picture = drawer.draw(scene, rng(seed))
        assert picture.shape == (336, 432, 3) and picture.dtype == np.uint8
        for thing in scene.things:
            core = inside(scene, thing, 9)
            if core.sum() < 60:
                continue
            red, green, blue = picture[core].astype(float).mean(0)
            hue = np.rad2deg(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
            near = min(HUES, key=lambda colour: abs((hue - HUES[colour] + 180) % 360 - 180))
            right, total = right + (near == thing.colour), total + 1
    assert total > 15 and right >= 0.95 * total


@pytest.mark.parametrize("name", ALL)
def test_a_drawing_follows_from_its_generator(name: str) -> None:
    drawer = ALL[name]
    pictures = [drawer.draw(drawers.scene(drawer, rng(3), 384, 384), rng(4)) for _ in range(2)]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("name", ALL)
def test_every_drawer_knows_every_shape(name: str) -> None:
    for shape in SHAPES:
        corners = ALL[name].outline(rng(5), shape)
        assert np.allclose(corners.min(0), 0) and np.isclose(corners.max(), 1)


def test_the_lessons_never_show_the_drawer_that_is_held_out() -> None:
    shown = drawers.drawers()
    assert len(shown) == 3 and drawers.held_out().draw not in [drawer.draw for drawer in shown.values()]
    picked = {drawers.pick(shown, rng(seed)).outline for seed in range(60)}
    assert picked == {drawer.outline for drawer in shown.values()}


def test_photographs_become_backgrounds(tmp_path) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), np.full((200, 300, 3), (10, 200, 10), np.uint8))
    (tmp_path / "notes.txt").write_text("no picture")
    found = paper.photographs(tmp_path)
    assert len(found) == 1 and found[0].shape == (200, 300, 3)
    assert paper.photographs(None) == ()


def test_a_camera_makes_grain_and_keeps_what_it_sees() -> None:
    plain = np.full((96, 128, 3), 120, np.float32)
    plain[:, 64:] = (200, 40, 40)
    for seed in range(20):
        seen = camera.shoot(plain, rng(seed)).astype(float)
        assert seen[10:-10, :50].std() > 0.1
        assert seen[10:-10, 80:, 0].mean() > seen[10:-10, 80:, 1].mean() + 60


def test_lessons_use_every_budget_at_sizes_that_fill_it() -> None:
    for budget, sizes in SIZES.items():
        assert BUDGETS[budget] > 0
        for width, height in sizes:
            tall, wide = target_size(height, width, budget)
            assert 0.8 * budget <= tall * wide / 48**2 <= budget
    assert set(HUES) == set(COLOURS)
