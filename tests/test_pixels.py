import functools
import random

import numpy as np
import pytest
import torch

from model.pixels import BUDGETS, patches, target_size


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# (width, height) of the picture: for each budget, (width, height) that the model sees, and its soft tokens
TABLE = {
    (640, 480): [(432, 336, 63), (624, 480, 130), (912, 672, 266), (1296, 960, 540), (1824, 1344, 1064)],
    (1280, 720): [(528, 288, 66), (720, 384, 120), (1056, 576, 264), (1488, 816, 527), (2112, 1200, 1100)],
    (1920, 1080): [(528, 288, 66), (720, 384, 120), (1056, 576, 264), (1488, 816, 527), (2112, 1200, 1100)],
    (800, 800): [(384, 384, 64), (528, 528, 121), (768, 768, 256), (1104, 1104, 529), (1584, 1584, 1089)],
    (3000, 60): [(2832, 48, 59), (3984, 48, 83), (5664, 96, 236), (8016, 144, 501), (11328, 192, 944)],
}


@pytest.mark.parametrize("size", TABLE, ids=lambda size: f"{size[0]}x{size[1]}")
def test_sizes_are_those_of_the_specification(size):
    width, height = size
    for budget, (w, h, tokens) in zip(BUDGETS, TABLE[size], strict=True):
        assert target_size(height, width, budget) == (h, w)
        assert target_size(width, height, budget) == (w, h)
        assert h // 48 * (w // 48) == tokens


def test_no_shape_exceeds_its_budget():
    draw = random.Random(0)
    for _ in range(20_000):
        height, width = (int(10 ** draw.uniform(0, 4.2)) for _ in range(2))
        budget, patch = draw.choice(BUDGETS), draw.choice((6, 48))
        h, w = target_size(height, width, budget, patch)
        assert h % patch == w % patch == 0
        assert 1 <= h // patch * (w // patch) <= budget


def test_a_line_becomes_one_row_of_patches_that_fills_the_budget():
    assert target_size(1, 10_000, 70) == (48, 70 * 48)
    assert target_size(10_000, 1, 1120) == (1120 * 48, 48)
    cells, positions = patches(noise(2000, 2), budget=70, patch=6)
    assert cells.shape == (70, 108)
    assert positions.tolist() == [[0, y] for y in range(70)]


def test_a_red_square_is_red_in_its_cells_only():
    picture = np.zeros((6 * 8, 6 * 8, 3), np.uint8)  # 8 × 8 cells are exactly what budget 70 gives: nothing is resized
    picture[12:24, 30:36] = 255, 0, 0
    cells, positions = patches(picture, budget=70, patch=6)
    assert cells.dtype == torch.float32 and positions.dtype == torch.int64
    red = (cells == torch.tensor([1.0, 0.0, 0.0]).repeat(36)).all(dim=1)
    assert positions[red].tolist() == [[5, 2], [5, 3]]
    assert (cells[~red] == 0).all()


def test_a_cell_runs_by_row_then_column_then_channel():
    picture = noise(48, 48)
    cells, positions = patches(picture, budget=70, patch=6)
    x, y = positions[11].tolist()
    assert (x, y) == (3, 1)
    expected = picture[6 * y : 6 * y + 6, 6 * x : 6 * x + 6].reshape(-1).astype(np.float32) / 255
    np.testing.assert_allclose(cells[11].numpy(), expected, rtol=1e-6)


def test_arrays_views_and_tensors_are_alike():
    picture = noise(50, 70)
    expected = patches(picture)
    fixed = picture.copy()
    fixed.flags.writeable = False
    for same in (torch.from_numpy(picture), fixed, picture[..., ::-1].copy()[..., ::-1], np.asfortranarray(picture)):
        cells, positions = patches(same)
        assert torch.equal(cells, expected[0]) and torch.equal(positions, expected[1])


def test_misuse_is_loud():
    with pytest.raises(ValueError, match="one of 70, 140, 280, 560, 1120 soft tokens, not 100"):
        patches(noise(10, 10), budget=100)
    for wrong in (noise(10, 10).astype(np.float32), noise(10, 10)[..., 0], noise(10, 10).transpose(2, 0, 1)):
        with pytest.raises(AssertionError):
            patches(wrong)
    with pytest.raises(AssertionError):
        patches(np.zeros((0, 10, 3), np.uint8))


@functools.cache
def reference(budget, patch_size):
    pytest.importorskip("PIL", reason="transformers' image processor needs Pillow")
    pytest.importorskip("transformers")
    pytest.importorskip("torchvision", reason="transformers' image processor needs torchvision")
    from transformers.models.gemma4_unified.image_processing_gemma4_unified import Gemma4UnifiedImageProcessor

    return Gemma4UnifiedImageProcessor(max_soft_tokens=budget, patch_size=patch_size, pooling_kernel_size=3)


def assert_as_transformers(picture, budget, patch_size):
    # left to itself it takes a picture 1 or 3 pixels high for channels-first
    output = reference(budget, patch_size)(picture, return_tensors="pt", input_data_format="channels_last")
    cells, positions = patches(picture, budget, patch_size * 3)
    n = output["num_soft_tokens_per_image"][0]
    assert len(cells) == n
    assert (output["image_position_ids"][0, n:] == -1).all()  # the padding that is left out here
    assert torch.equal(positions, output["image_position_ids"][0, :n])
    assert torch.equal(cells, output["pixel_values"][0, :n])


@pytest.mark.parametrize("budget", BUDGETS)
def test_patches_are_those_of_transformers(budget):
    for height, width in [(480, 640), (333, 517), (60, 3000), (1, 1), (1, 40), (200, 2), (768, 768), (1080, 1920)]:
        assert_as_transformers(noise(height, width, seed=height), budget, patch_size=16)


@pytest.mark.parametrize("budget", BUDGETS)
def test_patches_of_the_tiny_model_are_those_of_transformers(budget):
    draw = random.Random(budget)
    for seed in range(40):
        height, width = (int(10 ** draw.uniform(0, 2.9)) for _ in range(2))
        assert_as_transformers(noise(height, width, seed), budget, patch_size=2)
