"""Which pictures a question is answered from."""

from __future__ import annotations

import numpy as np
import pytest

from agent.watch.shots import choose
from streams.camera import Shot


def shots(*levels: int) -> list[Shot]:
    return [Shot(b"", float(at), (1, 1), np.full((18, 32), level, np.uint8)) for at, level in enumerate(levels)]


@pytest.mark.parametrize(
    ("levels", "count", "moment", "at"),
    [
        ([], 4, 9, []),
        ([9], 4, 9, [0]),
        ([9] * 9, 4, 8, [8]),  # nothing changed, and it is now
        ([9] * 9, 4, 3, [2, 8]),  # nothing changed, but it was before
        ([9, 9, 9, 9, 90], 4, 9, [3, 4]),
        ([9, 9, 90, 9, 9], 4, 9, [2, 4]),
        ([9, 9, 200, 90, 9, 91], 3, 5, [2, 4, 5]),
    ],
)
def test_pictures_are_chosen_by_what_changed(levels: list[int], count: int, moment: float, at: list[int]) -> None:
    assert [int(shot.at) for shot in choose(shots(*levels), count, moment)] == at


def test_of_a_slow_change_the_pictures_are_spread() -> None:
    found = [int(shot.at) for shot in choose(shots(*range(0, 250, 10)), 4, 25)]
    assert len(found) == 4 and found[0] == 0 and found[-2:] == [23, 24] and 8 < found[1] < 16
