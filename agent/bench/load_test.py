"""Conversations measured on this machine: speakers who talk to one engine at once, in real time.

Each speaker has a session of its own, shows a picture, asks about it aloud, listens to the answer as fast as a
loudspeaker plays it, and interrupts one answer. The first speakers of a larger crowd are those of the smaller one, and all
of them were heard alone before, in no hurry: so many answers are right at best.

"Last word over" is where the session found it in the sound, so the wait for the turn's end is part of those figures. An
interruption counts from the first word's first sample to the moment when the door is told to play nothing more.
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

STAGGER = 4.0  # seconds within which all speakers begin


@dataclass(frozen=True)
class SpokenQuestion:
    turn: ScriptedTurn
    onset: int  # sample of its speech where the first word begins
    right: Callable[[str, list[Mark]], bool]


Person = Callable[[int], list[SpokenQuestion]]


@dataclass(frozen=True)
class Spread:
    """One line of the table: a median of `count` values and how far they reach. None: there was nothing to measure."""

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
    """One speaker's conversation, when it is over."""

    questions: Sequence[SpokenQuestion]
    played: Performance
    dropped: int  # frames
    positions: int  # in the row at the end

    def exchanges(self) -> list[ScriptedExchange | None]:
        """What came of each question: the last answer before the next one is asked."""
        asked = [before for _, before in self.played.asked]
        ends = [*asked[1:], len(self.played.exchanges)]
        found = [self.played.exchanges[end - 1] if end > begin else None for begin, end in zip(asked, ends, strict=True)]
        return found + [None] * (len(self.questions) - len(found))

    def right(self) -> list[bool]:
        """Of each question whose answer was not to be interrupted."""
        pairs = zip(self.questions, self.exchanges(), strict=True)
        return [x is not None and q.right(x.text, x.marks) for q, x in pairs if q.turn.interrupt is None]

    def interruptions(self) -> list[float]:
        """Milliseconds of each that fell into an answer."""
        told = zip(self.played.events, self.played.times, strict=True)
        cleared = [at for event, at in told if isinstance(event, events.OutputCleared)]
        asked = zip(self.questions, self.questions[1:], self.played.asked[1:], strict=False)
        onsets = [(start + after.onset) / RATE for before, after, (start, _) in asked if before.turn.interrupt is not None]
        reactions = [[at - onset for at in cleared if 0 <= at - onset < 2] for onset in onsets]
        return [1000 * min(found) for found in reactions if found]


async def session(
    crowds: Sequence[int],
    loaded: LoadedModel,
    voice: Voice | None,
    person: Person,
    say: waits.Say,
    real_time: bool = True,
    busy: bool = False,
) -> dict[str, Any]:
    """Measures each crowd and tells `say` the table, line by line, and the smallest once more beside a busy process, or with
    `busy` all of them so; returns all figures.

    Raises CheckpointError where a crowd's rows do not fit."""
    model, vad = loaded.model, Vad()
    most = max(crowds)
    waits.room(loaded, most + max(1, most // 4), f"{most} speakers")
    threads = model.threads.count(model.product, 1)
    say(
        f"on {model.device}, torch {torch.__version__}"
        + (f", threads of a step: {threads}" if model.device.type == "cpu" else "")
    )
    people = [person(seed) for seed in range(most)]
    alone = []
    for questions in people:
        alone += (await _crowd(loaded, vad, voice, [questions], False))[0]
    result: dict[str, Any] = {}
    for count, beside in [(count, busy) for count in crowds] + ([] if busy else [(min(crowds), True)]):
        with machine.busy(*[0] * beside):
            meter, begin, before = machine.Meter(), perf_counter(), process_time()
            talks, lags = await _crowd(loaded, vad, voice, people[:count], real_time)
            cores, load = (process_time() - before) / (perf_counter() - begin), meter.read()
        asked = f"{count} speaker{'s' if count > 1 else ''}, {sum(len(talk.questions) for talk in talks)} questions"
        say(f"\n{asked}{', beside one busy process' if beside else ''}")
        say(f"{'':44}{'median':>14}{'p95':>12}{'p99':>12}")
        figures: list[Spread | Figure] = [*_figures(talks, lags), *_counts(talks, alone[:count], model.device)]
        figures.append(Figure("busy", "processor cores kept busy, of all", "%", 100 * cores / (os.cpu_count() or 1)))
        figures += load.figures() if load else []
        for figure in figures:
            say(_count(figure) if isinstance(figure, Figure) else str(figure))
        for message in sorted({note for talk in talks for note in talk.played.notes}):
            say(f"  said by a session: {message}")
        result[f"{count}{' busy' if beside else ''}"] = {figure.key: asdict(figure) for figure in figures}
    return {"device": str(model.device), "threads": threads, "torch": torch.__version__, "speakers": result}


class Call(script.Talks, Protocol):
    """A conversation with a server elsewhere. `lost`: why it ended early, if it did."""

    lost: str | None


async def calls(crowds: Sequence[int], call: Callable[[], Call], person: Person, say: waits.Say) -> dict[str, Any]:
    """The same crowds at a server elsewhere, in real time, measured as its clients know it; returns all figures."""
    people = [person(seed) for seed in range(max(crowds))]
    result: dict[str, Any] = {}
    for count in crowds:
        lines = [call() for _ in range(count)]

        async def talk(number: int, count: int = count, lines: list[Call] = lines) -> SpeakerTally:
            await asyncio.sleep(STAGGER * number / count)
            played = Performance([question.turn for question in people[number]], True)
            await played.run(lines[number])
            return SpeakerTally(people[number], played, 0, 0)

        talks = await asyncio.gather(*(talk(number) for number in range(count)))
        say(f"\n{count} speaker{'s' if count > 1 else ''}, {sum(len(talk.questions) for talk in talks)} questions")
        say(f"{'':44}{'median':>14}{'p95':>12}{'p99':>12}")
        asked = sum(len(talk.right()) for talk in talks)
        figures: list[Spread | Figure] = [figure for figure in _figures(talks, []) if figure.key not in ("lag", "late")]
        figures += [
            Figure("lost", "conversations lost", "", sum(line.lost is not None for line in lines)),
            Figure("unanswered", "questions without an answer", "", sum(x is None for talk in talks for x in talk.exchanges())),
            Figure("right", "answers fully right", "", sum(sum(talk.right()) for talk in talks), note=f"of {asked}"),
        ]
        for figure in figures:
            say(_count(figure) if isinstance(figure, Figure) else str(figure))
        for message in sorted({note for talk in talks for note in talk.played.notes}):
            say(f"  said by the server: {message}")
        result[str(count)] = {figure.key: asdict(figure) for figure in figures}
    return {"speakers": result}


async def _crowd(
    loaded: LoadedModel, vad: Vad, voice: Voice | None, people: Sequence[list[SpokenQuestion]], real_time: bool
) -> tuple[list[SpeakerTally], list[float]]:
    """What came of each conversation, and the engine's lags in seconds."""
    settings = ConversationConfig(sampling=replace(loaded.generation, greedy=True))

    async def talk(number: int, questions: list[SpokenQuestion]) -> SpeakerTally:
        await asyncio.sleep(STAGGER * number / len(people) if real_time else 0)
        session = Session(engine, vad, voice, settings)
        played = Performance([question.turn for question in questions], real_time)
        await played.run(session)
        return SpeakerTally(questions, played, session.dropped, session.record.positions)

    with Engine(loaded, len(people), waits.LENGTH) as engine:
        talks = await asyncio.gather(*(talk(number, questions) for number, questions in enumerate(people)))
        return talks, list(engine.lags)


def _figures(talks: list[SpeakerTally], lags: list[float]) -> list[Spread]:
    stages = [exchange.stages for talk in talks for exchange in talk.played.exchanges if "speech_end" in exchange.stages]

    def between(end: str, begin: str = "") -> list[float]:
        return [found[end] - found.get(begin, 0) for found in stages if end in found]

    return [
        Spread.of("first_token", "last word over to first token", between("first_token", "speech_end")),
        Spread.of("first_sound", "last word over to first sound", between("first_sound", "speech_end")),
        Spread.of("closing", "  turn's end to first token", between("first_token")),
        Spread.of("barge_in", "onset of an interruption to silence", (ms for talk in talks for ms in talk.interruptions())),
        Spread.of("lag", "a frame's arrival until it is in its row", (1000 * lag for lag in lags)),
        Spread.of("late", "a frame's end until its session takes it", (1000 * s for talk in talks for s in talk.played.late)),
    ]


def _counts(talks: list[SpeakerTally], alone: list[SpeakerTally], device: torch.device) -> list[Figure]:
    right, at_best = (sum(sum(talk.right()) for talk in group) for group in (talks, alone))
    asked = sum(len(talk.right()) for talk in talks)
    unheard = sum(exchange is None for talk in talks for exchange in talk.exchanges())
    peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "by this process so far"
    if device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated() / 2**20, "on the device"
    return [
        Figure("dropped", "frames dropped", "", sum(talk.dropped for talk in talks)),
        Figure("unanswered", "questions without an answer", "", unheard),
        Figure("right", "answers fully right", "", right, note=f"of {asked}"),
        Figure("right_alone", "  the same questions, each speaker alone", "", at_best, note=f"of {asked}"),
        Figure("positions", "positions held at the end", "", sum(talk.positions for talk in talks)),
        Figure("peak", "most memory taken", "MiB", peak, note=where),
    ]


def _count(figure: Figure) -> str:
    return f"{figure.what:<44}{f'{figure.attend:,.0f} {figure.unit}'.strip():>14}  {figure.note}".rstrip()
