"""The benchmark of a client beside a burden, over a real socket and small: every figure is there, and nothing is refused."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from agent.bench import neighbour
from tests.serving import serving


@pytest.mark.slow
async def test_each_burden_is_borne_and_measured(engine, mind, monkeypatch):
    for name, count in {"LEAST": 3, "ITEMS": 200, "WORDS": 1000, "PICTURES": 2, "PINGS": 2000, "PAUSE": 0.0}.items():
        monkeypatch.setattr(neighbour, name, count)
    monkeypatch.setattr(neighbour, "SIZES", ((400, 600),))
    said: list[str] = []
    async with serving(engine) as port:
        figures: dict[str, Any] = await neighbour.burdens(
            f"ws://127.0.0.1:{port}/v1/realtime", os.getpid(), said.append, neighbour.KINDS
        )
        await asyncio.sleep(0)
    assert figures.keys() == {"nobody else is there", *neighbour.KINDS, "kept"}
    assert all(figures[name]["count"] >= 1 and figures[name]["p99"] > 0 for name in neighbour.KINDS)
    assert len(said) == len(figures) + 1
