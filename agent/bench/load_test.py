"""A load test on this machine: simulated speakers who talk to one engine at once, in real time.

Each speaker has a session of its own, shows a picture, asks about it aloud, listens to the answer as a loudspeaker plays it, and
interrupts one answer. A larger group contains the speakers of a smaller one. Each speaker also talks alone first, without real
time, which gives the number of right answers to expect.

"Last word over" is the end of speech that the session found in the audio, so it includes the wait for the turn's end. The latency
of an interruption is from the first sample of its first word to the event that stops playback.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter, process_time
from typing import Any, Protocol

import torch

from agent import events, script
from agent.bench import machine, waits
from agent.bench.figures import Figure, line
from agent.checkpoint import LoadedModel
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.marks import Mark
from agent.script import Performance, ScriptedExchange, ScriptedTurn
from agent.session import Session
from model.vad import Vad
from streams.frames import RATE
from streams.voice import Voice

STAGGER = 4.0  # seconds over which the starts of the speakers are spread


@dataclass(frozen=True)
class SpokenQuestion:
    """A turn and how to check its answer: `right` takes the answer's text and marks."""

    turn: ScriptedTurn
    onset: int  # sample of its speech at which the first word begins
    right: Callable[[str, list[Mark]], bool]


Person = Callable[[int], list[SpokenQuestion]]


@dataclass(frozen=True)
class Spread:
    """One line of the table: median and percentiles of `count` values. None: there was nothing to measure."""

    key: str
    what: str
    unit: str
    median: float | None
    p95: float | None
    p99: float | None
    count: int

    @classmethod
    def of(cls, key: str, what: str, values: Iterable[float], unit: str = "ms") -> Spread:
        found = sorted(values)
        middle, p95, p99 = (found[math.ceil(share * len(found)) - 1] if found else None for share in (0.5, 0.95, 0.99))
        return cls(key, what, unit, middle, p95, p99, len(found))

    def __str__(self) -> str:
        if self.median is None or self.p95 is None or self.p99 is None:
            return f"{self.what:<44}{'—':>14}"
        far = "".join(f"{f'{value:,.0f} {self.unit}':>12}" for value in (self.p95, self.p99))
        return f"{line(Figure(self.key, self.what, self.unit, self.median))}{far}  of {self.count:,}"


@dataclass(frozen=True)
class SpeakerTally:
    """A speaker's finished conversation."""

    questions: Sequence[SpokenQuestion]
    played: Performance
    dropped: int  # frames
    positions: int  # in the row at the end

    def exchanges(self) -> list[ScriptedExchange | None]:
        """The answer to each question: the last one before the next question, None if there is none."""
        asked = [before for _, before in self.played.asked]
        ends = [*asked[1:], len(self.played.exchanges)]
        found = [self.played.exchanges[end - 1] if end > begin else None for begin, end in zip(asked, ends, strict=True)]
        return found + [None] * (len(self.questions) - len(found))

    def right(self) -> list[bool]:
        """Whether the answer is right, for each question whose answer was not to be interrupted."""
        pairs = zip(self.questions, self.exchanges(), strict=True)
        return [x is not None and q.right(x.text, x.marks) for q, x in pairs if q.turn.interrupt is None]

    def interruptions(self) -> list[float]:
        """Latencies in milliseconds of those interruptions that came during an answer."""
        timed = zip(self.played.events, self.played.times, strict=True)
        cleared = [at for event, at in timed if isinstance(event, events.OutputCleared)]
        asked = zip(self.questions, self.questions[1:], self.played.asked[1:], strict=False)
        onsets = [(start + after.onset) / RATE for before, after, (start, _) in asked if before.turn.interrupt is not None]
        reactions = [[at - onset for at in cleared if 0 <= at - onset < 2] for onset in onsets]
        return [1000 * min(found) for found in reactions if found]


async def session(
    counts: Sequence[int],
    loaded: LoadedModel,
    voice: Voice | None,
    person: Person,
    say: waits.Say,
    real_time: bool = True,
    busy: bool = False,
) -> dict[str, Any]:
    """Measures each number of speakers, passes the lines of a table to `say`, and returns all figures. The smallest number is
    also measured beside a busy process; with `busy`, all are.

    Raises CheckpointError if the rows do not fit."""
    model, vad = loaded.model, Vad()
    most = max(counts)
    waits.room(loaded, most + max(1, most // 4), f"{most} speakers")
    threads = model.threads.count(model.product, 1)
    say(
        f"on {model.device}, torch {torch.__version__}"
        + (f", threads of a step: {threads}" if model.device.type == "cpu" else "")
    )
    people = [person(seed) for seed in range(most)]
    alone = []
    for questions in people:
        alone += (await _run(loaded, vad, voice, [questions], False))[0]
    result: dict[str, Any] = {}
    for count, beside in [(count, busy) for count in counts] + ([] if busy else [(min(counts), True)]):
        with machine.busy(*[0] * beside):
            meter, begin, before = machine.Meter(), perf_counter(), process_time()
            tallies, lags = await _run(loaded, vad, voice, people[:count], real_time)
            cores, load = (process_time() - before) / (perf_counter() - begin), meter.read()
        asked = f"{count} speaker{'s' if count > 1 else ''}, {sum(len(tally.questions) for tally in tallies)} questions"
        say(f"\n{asked}{', beside one busy process' if beside else ''}")
        say(f"{'':44}{'median':>14}{'p95':>12}{'p99':>12}")
        figures: list[Spread | Figure] = [*_figures(tallies, lags), *_counts(tallies, alone[:count], model.device)]
        figures.append(Figure("busy", "processor cores kept busy, of all", "%", 100 * cores / (os.cpu_count() or 1)))
        figures += load.figures() if load else []
        for figure in figures:
            say(_count(figure) if isinstance(figure, Figure) else str(figure))
        for message in sorted({note for tally in tallies for note in tally.played.notes}):
            say(f"  said by a session: {message}")
        result[f"{count}{' busy' if beside else ''}"] = {figure.key: asdict(figure) for figure in figures}
    return {"device": str(model.device), "threads": threads, "torch": torch.__version__, "speakers": result}


class RemoteSession(script.SessionLike, Protocol):
    """A session of a remote server. `lost`: why it ended early, if it did."""

    lost: str | None


async def remote(counts: Sequence[int], connect: Callable[[], RemoteSession], person: Person, say: waits.Say) -> dict[str, Any]:
    """The same load at a remote server, in real time, measured by its clients; returns all figures."""
    people = [person(seed) for seed in range(max(counts))]
    result: dict[str, Any] = {}
    for count in counts:
        sessions = [connect() for _ in range(count)]

        async def talk(number: int, count: int = count, sessions: list[RemoteSession] = sessions) -> SpeakerTally:
            await asyncio.sleep(STAGGER * number / count)
            played = Performance([question.turn for question in people[number]], True)
            await played.run(sessions[number])
            return SpeakerTally(people[number], played, 0, 0)

        tallies = await asyncio.gather(*(talk(number) for number in range(count)))
        say(f"\n{count} speaker{'s' if count > 1 else ''}, {sum(len(tally.questions) for tally in tallies)} questions")
        say(f"{'':44}{'median':>14}{'p95':>12}{'p99':>12}")
        asked = sum(len(tally.right()) for tally in tallies)
        figures: list[Spread | Figure] = [figure for figure in _figures(tallies, []) if figure.key not in ("lag", "late")]
        figures += [
            Figure("lost", "conversations lost", "", sum(session.lost is not None for session in sessions)),
            Figure(
                "unanswered", "questions without an answer", "", sum(x is None for tally in tallies for x in tally.exchanges())
            ),
            Figure("right", "answers fully right", "", sum(sum(tally.right()) for tally in tallies), note=f"of {asked}"),
        ]
        for figure in figures:
            say(_count(figure) if isinstance(figure, Figure) else str(figure))
        for message in sorted({note for tally in tallies for note in tally.played.notes}):
            say(f"  said by the server: {message}")
        result[str(count)] = {figure.key: asdict(figure) for figure in figures}
    return {"speakers": result}


async def _run(
    loaded: LoadedModel, vad: Vad, voice: Voice | None, people: Sequence[list[SpokenQuestion]], real_time: bool
) -> tuple[list[SpeakerTally], list[float]]:
    """Runs all conversations; returns them, and the engine's frame lags in seconds."""
    settings = ConversationConfig(sampling=replace(loaded.generation, greedy=True))

    async def talk(number: int, questions: list[SpokenQuestion]) -> SpeakerTally:
        await asyncio.sleep(STAGGER * number / len(people) if real_time else 0)
        session = Session(engine, vad, voice, settings)
        played = Performance([question.turn for question in questions], real_time)
        await played.run(session)
        return SpeakerTally(questions, played, session.dropped, session.record.positions)

    with Engine(loaded, len(people), waits.LENGTH) as engine:
        tallies = await asyncio.gather(*(talk(number, questions) for number, questions in enumerate(people)))
        return tallies, list(engine.lags)


def _figures(tallies: list[SpeakerTally], lags: list[float]) -> list[Spread]:
    stages = [exchange.stages for tally in tallies for exchange in tally.played.exchanges if "speech_end" in exchange.stages]

    def between(end: str, begin: str = "") -> list[float]:
        return [found[end] - found.get(begin, 0) for found in stages if end in found]

    return [
        Spread.of("first_token", "last word over to first token", between("first_token", "speech_end")),
        Spread.of("first_sound", "last word over to first sound", between("first_sound", "speech_end")),
        Spread.of("closing", "  turn's end to first token", between("first_token")),
        Spread.of("barge_in", "onset of an interruption to silence", (ms for tally in tallies for ms in tally.interruptions())),
        Spread.of("lag", "a frame's arrival until it is in its row", (1000 * lag for lag in lags)),
        Spread.of("late", "a frame's end until its session takes it", (1000 * s for tally in tallies for s in tally.played.late)),
    ]


def _counts(tallies: list[SpeakerTally], alone: list[SpeakerTally], device: torch.device) -> list[Figure]:
    right, at_best = (sum(sum(tally.right()) for tally in group) for group in (tallies, alone))
    asked = sum(len(tally.right()) for tally in tallies)
    unanswered = sum(exchange is None for tally in tallies for exchange in tally.exchanges())
    peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "by this process so far"
    if device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated() / 2**20, "on the device"
    return [
        Figure("dropped", "frames dropped", "", sum(tally.dropped for tally in tallies)),
        Figure("unanswered", "questions without an answer", "", unanswered),
        Figure("right", "answers fully right", "", right, note=f"of {asked}"),
        Figure("right_alone", "  the same questions, each speaker alone", "", at_best, note=f"of {asked}"),
        Figure("positions", "positions held at the end", "", sum(tally.positions for tally in tallies)),
        Figure("peak", "most memory taken", "MiB", peak, note=where),
    ]


def _count(figure: Figure) -> str:
    return f"{figure.what:<44}{f'{figure.attend:,.0f} {figure.unit}'.strip():>14}  {figure.note}".rstrip()
