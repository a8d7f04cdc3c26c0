"""`attend plan`: what this machine, or another, can run."""

from __future__ import annotations

import argparse

import torch

from agent import plan
from agent.bench.shapes import SHAPES
from agent.commands import options
from agent.commands.options import Commands
from model import weights
from model.config import GemmaConfig
from model.threads import Threads

THE_12B = "google/gemma-4-12B-it"  # whose shape is known without fetching it


def add(commands: Commands) -> None:
    planning = commands.add_parser("plan", help="what this machine can run", description=plan.__doc__)
    planning.add_argument("--model", default=THE_12B, metavar="DIR|HUB_ID", help=f"checkpoint (default: {THE_12B}, not fetched)")
    planning.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    planning.add_argument(
        "--rows", type=options.positive, metavar="N", help="conversations at once (default: as many as it holds)"
    )
    planning.add_argument("--length", type=options.positive, metavar="N", help="positions of each (default: as many as fit)")
    planning.add_argument("--memory", type=float, metavar="GIB", help="of a GPU that is not here; with --bandwidth")
    planning.add_argument("--bandwidth", type=float, metavar="GB_S", help="of its memory")
    planning.add_argument("--known", action="store_true", help="a table of usual GPUs and a desktop's CPU")
    planning.set_defaults(run=_plan)


def _plan(given: argparse.Namespace) -> int:
    raw = SHAPES["12b"]() if given.model == THE_12B else None
    config = GemmaConfig.from_json(raw) if raw else weights.read_config(weights.locate(given.model, weights.CONFIG_FILES))
    if given.known:
        machines = [*plan.known(), plan.DESKTOP]
    elif given.memory and given.bandwidth:
        machines = [plan.Machine("a GPU as told", "cuda", int(given.memory * plan.GIB), 1e9 * given.bandwidth)]
    else:
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(usual if given.device == "auto" else given.device)
        machines = [plan.measure(device, Threads().most)]
    print(f"{given.model}; milliseconds are arithmetic, {plan.OVERHEAD} times the reading of what a step needs\n")
    for machine in machines:
        print("\n".join(plan.table(config, machine, given.rows, given.length)) + "\n")
    return 0
