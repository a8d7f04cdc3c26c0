"""Splits a picture into the patches that the model embeds, exactly as transformers' Gemma4UnifiedImageProcessor does."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    import numpy as np

BUDGETS = (70, 140, 280, 560, 1120)  # of soft tokens that a picture may take


def target_size(height: int, width: int, budget: int, patch: int = 48) -> tuple[int, int]:
    """The (height, width) of the largest grid of whole patches with nearly the picture's shape and at most `budget` cells.

    `patch` is the side of one soft token in pixels: the checkpoint's patch_size × pooling_kernel_size. Raises ValueError for a
    budget that is not one of BUDGETS.
    """
    if budget not in BUDGETS:
        raise ValueError(f"a picture's budget is one of {', '.join(map(str, BUDGETS))} soft tokens, not {budget}")
    assert height > 0 and width > 0, (height, width)
    scale = math.sqrt(budget * patch**2 / (height * width))
    rows = math.floor(scale * height / patch)
    columns = math.floor(scale * width / patch)
    # One side rounds to 0 where the picture is longer than budget:1. It gets a single line of patches that fills the budget.
    if rows == 0:
        rows, columns = 1, budget
    elif columns == 0:
        rows, columns = budget, 1
    return rows * patch, columns * patch


def patches(picture: "torch.Tensor | np.ndarray", budget: int = 280, patch: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 RGB [H, W, 3] → patches float32 [n, patch·patch·3] in 0..1, row by row; places int64 [n, 2]: (column, row).

    A patch is flattened in the order row, column, channel. There is no padding to the budget: n is as many as this picture has.
    Raises ValueError for a budget that is not one of BUDGETS.
    """
    if not isinstance(picture, torch.Tensor):
        picture = torch.from_numpy(picture.copy())  # torch accepts neither read-only arrays nor views with negative strides
    assert picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[2] == 3, (picture.dtype, picture.shape)
    height, width = target_size(picture.shape[0], picture.shape[1], budget, patch)
    pixels = picture.cpu().permute(2, 0, 1)
    if pixels.shape[1:] != (height, width):
        # uint8 on the CPU: resizing in float32 (or on a GPU) differs by up to 19/255 from what the model was trained on.
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    rows, columns = height // patch, width // patch
    cells = pixels.reshape(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return cells * (1 / 255), torch.stack([x, y], dim=-1).reshape(-1, 2)
