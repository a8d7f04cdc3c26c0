"""Line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 30, 84, 62  # margins around the plot
COLOURS = ("#0b6bcb", "#c2410c", "#3f7d20", "#6d28d9")
INK, PALE, PAPER = "#1f2933", "#d9dee4", "#ffffff"

Points = Sequence[tuple[float, float]]
Axis = tuple[str, str]  # label and unit


def lines(title: str, across: Axis, up: Axis, series: Mapping[str, Points]) -> str:
    """A chart as SVG text. Both axes begin at 0; every point is labelled with its value; ticks are at the points' x."""
    xs = sorted({x for points in series.values() for x, _ in points})
    marks = _ticks(max(y for points in series.values() for _, y in points))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * x / xs[-1], TOP + high * (1 - y / marks[-1])

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13" fill="{INK}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
        _text(LEFT, 28, title, "start", ' font-size="16" font-weight="600"'),
    ]
    for y in marks:
        _, at = place(0, y)
        out.append(_line([(LEFT, at), (WIDTH - RIGHT, at)], PALE if y else INK, 1))
        out.append(_text(LEFT - 9, at + 4, f"{y:,g}", "end"))
    for x in xs:
        at, ground = place(x, 0)
        out.append(_line([(at, ground), (at, ground + 5)], INK, 1))
        out.append(_text(at, ground + 20, f"{x:g}"))
    out.append(_text(LEFT + wide / 2, HEIGHT - 16, f"{across[0]} ({across[1]})"))
    out.append(_text(0, 0, f"{up[0]} ({up[1]})", "middle", f' transform="translate(22 {TOP + high / 2:.1f}) rotate(-90)"'))

    at, halo = float(LEFT), f' stroke="{PAPER}" stroke-width="4" paint-order="stroke"'
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        out.append(f'<g id="{escape(name)}">')
        out.append(_line([(at, 53), (at + 24, 53)], colour, 3))
        out.append(_text(at + 31, 57, name, "start"))
        at += 60 + 7.2 * len(name)
        out.append(_line([place(*point) for point in points], colour, 2.5))
        for point in points:
            x, y = place(*point)
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            out.append(_text(x, y - 10, _short(point[1]), "middle", f' font-size="12" fill="{colour}"{halo}'))
        out.append("</g>")
    return "\n".join([*out, "</svg>", ""])


def _ticks(largest: float) -> list[float]:
    """Four to eight round numbers from 0 to beyond `largest`."""
    rough = max(largest, 1e-9) * 1.05 / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [round(n * step, 12) for n in range(math.ceil(largest * 1.05 / step) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _line(points: Points, colour: str, width: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
