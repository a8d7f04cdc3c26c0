"""`attend`, or `python -m agent`: runs a command, and prints an error that ends it as one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from agent import pools
from agent.commands import ask, bench, plan, serve, talk, watch
from agent.engine import EngineStopped, RowLost
from agent.watch.config import ConfigError
from agent.watch.outbox import OutboxError
from agent.watch.visual_qa import NoAnswer
from model.cache import RowFull
from model.config import CheckpointError
from model.tokenizer import TokenizerError
from model.vad import VadMissing
from streams.broker import BrokerError
from streams.frames import MediaError
from streams.portaudio import SoundError
from streams.voice import VoiceMissing
from web.access import NotServed

ERRORS = (
    CheckpointError, TokenizerError, RowFull, RowLost, EngineStopped, VoiceMissing, VadMissing,
    MediaError, SoundError, NotServed, ConfigError, OutboxError, BrokerError, NoAnswer,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="attend", description="An agent that listens and watches while you speak.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (ask, talk, serve, watch, plan, bench):
        command.add(commands)
    given = parser.parse_args(arguments)
    pools.limit()
    try:
        return int(given.run(given))
    except ERRORS as error:
        print(f"attend: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
