"""A measured figure, and its line in a table."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A measured value. `ratio`: how many times faster attend is than transformers."""

    key: str
    what: str
    unit: str
    attend: float
    transformers: float | None = None
    ratio: float | None = None
    note: str = ""


def line(figure: Figure) -> str:
    """The figure as a line of a table."""
    theirs = "" if figure.transformers is None else f"{_short(figure.transformers)} {figure.unit}"
    ratio = "" if figure.ratio is None else f"{_short(figure.ratio)}×"
    return f"{figure.what:<44}{_short(figure.attend) + ' ' + figure.unit:>14}{theirs:>14}{ratio:>8}  {figure.note}".rstrip()


def _short(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"
