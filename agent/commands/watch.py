"""`attend watch`: questions about cameras, over MQTT."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
from pathlib import Path
from typing import Any

from agent.commands import options
from agent.commands.options import Commands
from agent.engine import Engine, total_rows
from agent.watch import config, service
from agent.watch.visual_qa import VisualQA
from model.pixels import BUDGETS


def add(commands: Commands) -> None:
    watching = commands.add_parser("watch", help="questions about cameras, over MQTT", description=service.__doc__)
    options.model(watching)
    watching.add_argument("--config", type=Path, metavar="F", help=f"TOML; an example: {config.EXAMPLE}")
    watching.add_argument("--camera", action="append", metavar="NAME=SOURCE", help="a camera, without a file or beside it")
    watching.add_argument("--broker", metavar="HOST[:PORT]", help="or mqtt://HOST or mqtts://HOST; default 127.0.0.1:1883")
    watching.add_argument("--once", nargs=2, metavar=("CAMERA", "QUESTION"), help="ask without a broker and print the answer")
    watching.add_argument("--json", action="store_true", help="with --once: print one JSON object")
    watching.set_defaults(run=_watch)


def _watch(given: argparse.Namespace) -> int:
    settings = config.read(given.config, *_given(given))
    spares, budget = settings.at_once + 1, BUDGETS[-1]  # one for monitors; any message may ask for large pictures
    loaded = options.load(given, rows=total_rows(1, spares), budget=budget)

    async def ask_once() -> dict[str, Any]:
        with Engine(loaded, spares=1, budget=budget) as engine:
            return await service.ask_once(settings, VisualQA(engine, settings.system), given.model, *given.once)

    async def stay() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        with Engine(loaded, spares=spares, budget=budget) as engine:
            await service.WatchService(settings, VisualQA(engine, settings.system), given.model).run(stop)

    if given.once:
        answer = asyncio.run(ask_once())
        print(json.dumps(answer) if given.json else answer["answer"])
        for mark in [] if given.json else answer["marks"]:
            print(f"mark      {mark['label'] or 'point'} at {mark['box_2d']} (top, left, bottom, right in thousandths)")
        return 0
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    asyncio.run(stay())
    return 0


def _given(given: argparse.Namespace) -> tuple[dict[str, str], str | None]:
    cameras = dict(camera.partition("=")[::2] for camera in given.camera or ())
    if not all(name and source and "://" not in name for name, source in cameras.items()):  # the = of ?usr=… is not the one
        raise config.ConfigError("--camera wants NAME=SOURCE, as in --camera front=rtsp://10.0.0.5/stream")
    if not given.config and not cameras:
        raise config.ConfigError("there is no camera: give --config attend.toml or --camera NAME=SOURCE")
    return cameras, given.broker
