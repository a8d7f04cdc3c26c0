"""`attend bench`: the benchmarks."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from agent.bench import alone, hours, load_test, neighbour, shapes, waits
from agent.commands import options
from agent.commands.options import Commands
from agent.view import Policy
from streams.frames import MediaError
from streams.voice import open_voice
from web.client import RealtimeClient


def add(commands: Commands) -> None:
    benching = commands.add_parser("bench", help="measure", description="Measurements on this machine.")
    kinds = benching.add_subparsers(required=True, metavar="WHAT")
    model = kinds.add_parser(
        "model", help="the model alone, beside transformers where it is installed", description=alone.__doc__
    )
    model.add_argument(
        "--shape", action="append", choices=sorted(shapes.SHAPES), help="repeatable (default: nano, mid, and 12b on a GPU)"
    )
    model.add_argument("--device", default="auto", metavar="NAME", help=options.DEVICE)
    model.add_argument("--threads", type=options.positive, metavar="N", help=options.THREADS)
    model.add_argument(
        "--busy",
        action="store_true",
        help="instead: passes beside busy processes, with the chosen threads and with every core's",
    )
    model.add_argument("--json", action="store_true", help="print one JSON object")
    model.set_defaults(run=_bench_model)
    talking = kinds.add_parser("session", help="whole conversations, many at once, in real time", description=load_test.__doc__)
    options.model(talking)
    talking.add_argument(
        "--speakers", type=options.positive, action="append", metavar="N", help="talk at once; repeatable (default: 1, 4, 16)"
    )
    talking.add_argument("--busy", action="store_true", help="everything beside one busy process, not the fewest speakers alone")
    talking.add_argument("--url", metavar="WS", help="at a server that is running, ws://127.0.0.1:8765/v1/realtime, not in here")
    talking.add_argument("--token-file", type=Path, metavar="F", help="with --url: a file with the server's token")
    talking.add_argument("--chart", type=Path, metavar="OUT.svg", help="measure and draw the first token by length of speech")
    talking.add_argument("--json", action="store_true", help="print one JSON object")
    talking.add_argument("--hours", type=float, metavar="H", help="instead: one conversation of so long, simulated")
    talking.add_argument(
        "--policy", action="append", choices=get_args(Policy), help="with --hours: under this one (default: each)"
    )
    talking.add_argument(
        "--noisy", action="store_true", help="instead: answers to one client of a server while another one is a burden"
    )
    talking.set_defaults(run=_bench_session)


def _bench_model(given: argparse.Namespace) -> int:
    say: Callable[[str], None] = (lambda line: None) if given.json else print
    result = alone.model(given.shape, given.device, say, threads=given.threads, busy=given.busy)
    if given.json:
        print(json.dumps(result))
    return 0


def _bench_session(given: argparse.Namespace) -> int:
    from model.nano import people  # belongs to nano's training recipe, and is imported for this command only

    if given.chart and not given.chart.parent.is_dir():
        raise MediaError(f"{given.chart} cannot be written: its folder must exist")
    say: Callable[[str], None] = (lambda line: None) if given.json else partial(print, flush=True)
    if given.noisy:
        figures = asyncio.run(neighbour.measure(given.model, say))
        if given.json:
            print(json.dumps(figures))
        return 0
    if given.url:
        token = options.token(given.token_file) if given.token_file else None
        figures = asyncio.run(
            load_test.remote(given.speakers or [1, 4, 16], lambda: RealtimeClient(given.url, token), people.person, say)
        )
        if given.json:
            print(json.dumps(figures))
        return 0
    voice, loaded = open_voice("espeak"), options.load(given, rows=0)  # each measurement says how many it takes

    async def measure() -> dict[str, Any]:
        if given.hours:
            return await hours.conversation(loaded, voice, people.person, given.hours, say, given.policy or get_args(Policy))
        result = await load_test.session(given.speakers or [1, 4, 16], loaded, voice, people.person, say, busy=given.busy)
        result |= {"model": given.model, "pictures": await waits.pictures(loaded, people.picture(0, *people.LARGE), say)}
        if given.chart:
            result["first_token"] = await waits.first_token(loaded, people.picture(0, *people.SIZE), say)
        return result

    result = asyncio.run(measure())
    if given.chart and not given.hours:
        waits.write(given.chart, result["first_token"], f"{given.model} on {result['device']}")
    if given.json:
        print(json.dumps(result))
    return 0
