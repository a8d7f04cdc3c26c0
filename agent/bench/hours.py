"""Hours of one conversation, simulated as fast as the model computes: memory and latency must not grow.

Speakers come one after the other; each shows a picture, asks about it aloud, listens, and interrupts one answer. Time is counted
in frames of the microphone and stops while the model computes (agent/script.py), so latencies are those of the model alone.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from agent.bench import waits
from agent.bench.load_test import Person, SpeakerTally
from agent.checkpoint import LoadedModel
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.script import Performance, ScriptedTurn
from agent.session import Session
from agent.view import Policy
from model.vad import Vad
from streams.voice import Voice

INTERVALS = 8  # lines of the table


@dataclass(frozen=True)
class Interval:
    """An interval of the conversation. `first_token`: milliseconds after the turn's end. `memory`: MiB at its end."""

    minutes: float
    asked: int
    unanswered: int
    right: int
    first_token: float
    slowest: float
    positions: int
    entries: int
    memory: float

    def __str__(self) -> str:
        return (
            f"{self.minutes:>8.0f}{self.asked:>10}{self.unanswered:>12}{self.right:>8}{self.first_token:>13.1f}"
            f"{self.slowest:>10.1f}{self.positions:>11,}{self.entries:>10,}{self.memory:>10,.0f}"
        )


HEAD = "{:>8}{:>10}{:>12}{:>8}{:>13}{:>10}{:>11}{:>10}{:>10}".format(
    "minutes", "asked", "unanswered", "right", "first token", "slowest", "positions", "entries", "MiB"
)


async def conversation(
    loaded: LoadedModel, voice: Voice | None, person: Person, hours: float, say: waits.Say, policies: Sequence[Policy]
) -> dict[str, Any]:
    """Simulates `hours` under each policy, passes the lines of a table to `say`, and returns all figures."""
    result: dict[str, Any] = {}
    for policy in policies:
        begun = perf_counter()
        say(f"\n{policy}\n{HEAD}")
        with Engine(loaded) as engine:
            settings = ConversationConfig(policy=policy, sampling=replace(loaded.generation, greedy=True))
            visits = _Visits(Session(engine, Vad(), voice, settings), person, 3600 * hours, say)
            await visits.played.run(visits.session)
        say(f"{hours:g} hours in {(perf_counter() - begun) / 60:.1f} minutes, {visits.session.dropped} frames dropped")
        for message in sorted(visits.notes):
            say(f"  said by the session: {message}")
        result[policy] = {"dropped": visits.session.dropped, "stretches": [asdict(interval) for interval in visits.intervals]}
    return result


class _Visits:
    """Plays one speaker after the other, and keeps only the figures."""

    def __init__(self, session: Session, person: Person, seconds: float, say: waits.Say) -> None:
        self.session, self.intervals, self.notes = session, list[Interval](), set[str]()
        self._person, self._seconds, self._say = person, seconds, say
        self.played = Performance(self._turns(), settled=session.record.row.drained)

    def _turns(self) -> Iterator[ScriptedTurn]:
        asked = unanswered = right = 0
        waited: list[float] = []
        for seed in count():
            questions = self._person(seed)
            yield from (question.turn for question in questions)
            talk = SpeakerTally(questions, self.played, 0, 0)
            right += sum(talk.right())
            asked += len(questions)
            unanswered += sum(exchange is None for exchange in talk.exchanges())
            waited += [x.stages["first_token"] for x in self.played.exchanges if "first_token" in x.stages]
            self.notes.update(self.played.notes)
            self.played.forget()
            if self.played.clock * INTERVALS >= self._seconds * (len(self.intervals) + 1):
                record = self.session.record
                figures = asked, unanswered, right, median(waited), max(waited), record.positions, len(record.tape.entries)
                self.intervals.append(Interval(self.played.clock / 60, *figures, _memory()))
                self._say(str(self.intervals[-1]))
                asked = unanswered = right = 0
                waited = []
            if len(self.intervals) >= INTERVALS:
                return


def _memory() -> float:
    """MiB that this process holds now; the peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
