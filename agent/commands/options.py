"""Options that several commands share, and functions that use them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from agent import checkpoint, plan
from agent.engine import total_rows
from model import weights
from model.config import CheckpointError
from model.threads import Threads
from web.access import NotServed

DEVICE = "auto, cpu, cuda, cuda:1 or mps (default: a GPU for a large model where there is one, else the CPU)"
THREADS = "of a pass on a CPU (default: OMP_NUM_THREADS, else by the work of each pass, one core left free)"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def positive(text: str) -> int:
    """A number that is at least 1, as an argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def rows(text: str) -> int:
    """A number of rows; 0 for "auto"."""
    return 0 if text == "auto" else positive(text)


def model(parser: argparse.ArgumentParser, usual: str | None = "nano") -> None:
    """Adds the options of a checkpoint. `usual`: the default checkpoint; None: that of a recording."""
    default = "nano, which is embedded" if usual else "the recording's"
    parser.add_argument("--model", default=usual, metavar="DIR|HUB_ID", help=f"checkpoint (default: {default})")
    parser.add_argument("--device", default="auto", metavar="NAME", help=DEVICE)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=positive, metavar="N", help=THREADS)
    parser.add_argument(
        "--weights", choices=("int8", "int4"), help="hold the layers' matrices in so many bits (default: as the files)"
    )
    parser.add_argument("--head-weights", choices=("int8", "int4"), help="the same for the head (default: the embedding table)")
    parser.add_argument(
        "--config-from", metavar="DIR|HUB_ID", help="config.json and tokenizer.json, for GGUF files that come without"
    )


def load(
    given: argparse.Namespace,
    on_progress: Callable[[float], None] = lambda part: None,
    *,
    rows: int = total_rows(1),
    length: int = checkpoint.LENGTH,
    budget: int | None = None,
) -> checkpoint.LoadedModel:
    """Loads the checkpoint. `on_progress` is called with the part that is loaded, from 0 to 1. There must be memory for `rows`
    and for pictures of `budget`. Raises CheckpointError."""

    def progress(done: int, total: int) -> None:
        on_progress(done / total)
        _progress(done, total)

    small = {"quantized": given.weights, "head": given.head_weights, "config_from": given.config_from}
    return checkpoint.load(given.model, given.device, given.dtype, progress, given.threads, rows, length, budget=budget, **small)


def planned(given: argparse.Namespace) -> tuple[int, int]:
    """Rows that this machine has memory for and can keep up with, and the positions of each; prints the plan. Raises
    CheckpointError if there is no room for one row."""
    folder = weights.locate(given.config_from or given.model, weights.CONFIG_FILES if given.config_from else weights.FILES)
    config = weights.read_config(folder)
    device = weights.find_device(given.device, weights.size(config))
    machine_plan = plan.make(config, plan.measure(device, Threads(given.threads).most), given.weights, length=given.length)
    print(f"{plan.HEADER}\n{plan.line(machine_plan)}", flush=True)
    if not machine_plan.rows:
        raise CheckpointError("there is no room for one conversation; attend plan says what would fit")
    return machine_plan.rows, machine_plan.length


def _progress(done: int, total: int) -> None:
    """Shows progress on a terminal, for a checkpoint that takes long to load."""
    if total > 1 << 28 and sys.stderr.isatty():
        end = "\n" if done == total else "\r"
        print(f"loading {done / 2**30:.1f} of {total / 2**30:.1f} GiB", end=end, file=sys.stderr, flush=True)


def token(file: Path) -> str:
    """The token in a file. Raises NotServed."""
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotServed(f"the token file {file} cannot be read: {error}") from error
    if not token:
        raise NotServed(f"{file} holds no token")
    return token
