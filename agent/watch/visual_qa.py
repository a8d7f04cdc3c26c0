"""Questions about pictures: each is a fork of one row that holds the system prompt, in the background of all conversations.

JSON of a schema is checked and asked for again, with what was wrong. Libraries that constrain decoding want a mask over the
whole vocabulary in every step of the one thread that everybody shares; they would have to earn that with the real weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from agent.answer_parser import AnswerParser
from agent.checkpoint import LoadedModel
from agent.engine import Engine, SequenceHandle
from agent.marks import Mark
from agent.prompt import AnswerReader, Text
from agent.segments import Picture, Segment
from agent.watch.json_schema import parse_answer, unfenced
from streams.camera import Shot

SMALL = 70  # soft tokens of a picture among several, or of a quick look
MAX_TOKENS, MAX_TOKENS_BRIEF = 256, 32  # of an answer, of a first line
ATTEMPTS = 3  # at JSON of a schema
JSON = "Answer with JSON alone, of this JSON schema: "


class NoAnswer(RuntimeError):
    """The model wrote nothing that was asked for: one sentence."""


@dataclass
class VisualAnswer:
    """Milliseconds count from the moment when the pictures were handed over."""

    text: str = ""
    marks: list[Mark] = field(default_factory=list)
    value: Any = None  # of a schema
    first_token_ms: float = 0.0
    model_ms: float = 0.0


class VisualQA:
    def __init__(self, engine: Engine, system: str | None) -> None:
        """`system`: the system prompt."""
        self.engine, self._system = engine, system
        self._row: SequenceHandle | None = None

    async def ask(
        self,
        shots: Sequence[Shot],
        question: str,
        *,
        budget: int | None = None,
        schema: dict[str, Any] | None = None,
        brief: bool = False,
    ) -> VisualAnswer:
        """`budget`: soft tokens of a picture; `brief`: the first sentence alone. Raises NoAnswer, RowFull, RowLost, NoRow,
        EngineStopped."""
        prompt, answer, begun = self.engine.loaded.prompt, VisualAnswer(), perf_counter()
        row = self._fork()
        try:
            row.append(tuple(prompt.open_turn()), *picture_segments(self.engine.loaded, shots, budget))
            wanted = question if schema is None else f"{question}\n{JSON}{json.dumps(schema)}"
            for _ in range(ATTEMPTS):
                raw, last = await self.write(row, wanted, answer, begun, brief=brief)
                if schema is None:
                    return answer
                answer.value, why = parse_answer(raw, schema)
                if why is None:
                    answer.text = unfenced(raw)
                    return answer
                row.append((last, *prompt.after_answer(), *prompt.open_turn()))
                wanted = f"That is not it: {why}. {JSON}{json.dumps(schema)}"
            raise NoAnswer(f"after {ATTEMPTS} tries the answer is not JSON of the schema: {why}")
        finally:
            row.release()
            answer.model_ms = (perf_counter() - begun) * 1000

    async def holds(self, shot: Shot, condition: str) -> tuple[bool | None, str]:
        """Whether a condition holds in the picture, None where the answer is neither yes nor no; and the answer."""
        condition = re.sub(r"^\s*(please )?(tell|let) me( know)? (when|if|once|as soon as)\s+", "", condition, flags=re.I).strip()
        if not condition.endswith("?"):
            condition = f'Is this so in the picture: "{condition}"? Answer yes or no.'
        answer = await self.ask([shot], condition, budget=SMALL, brief=True)
        found = re.match(r"\W*(yes|no)\b", answer.text, re.I)
        return (found[1].lower() == "yes" if found else None), answer.text

    async def write(
        self, row: SequenceHandle, wanted: str, answer: VisualAnswer, begun: float, *, brief: bool
    ) -> tuple[str, int]:
        """Generates into `answer`. Returns the text as written, and the last token, which is not in the row yet."""
        loaded = self.engine.loaded
        closing = tuple(loaded.prompt.text(wanted) + loaded.prompt.close_turn())
        parameters, max_tokens, last = replace(loaded.generation, greedy=True), MAX_TOKENS_BRIEF if brief else MAX_TOKENS, -1
        parsed, reader, raw = AnswerParser(loaded.tokenizer), AnswerReader(loaded.tokenizer), ""
        async with aclosing(row.generate(closing, sampling=parameters, max_tokens=max_tokens)) as tokens:
            async for token, _ in tokens:
                answer.first_token_ms = answer.first_token_ms or (perf_counter() - begun) * 1000
                last = token
                raw += "".join(event.text for event in reader.push(token) if isinstance(event, Text))
                answer.marks += [piece for piece in parsed.push(token) if isinstance(piece, Mark)]
                if brief and re.search(r"\w[.!?\n]", parsed.text):
                    break
        raw += "".join(event.text for event in reader.flush() if isinstance(event, Text))
        answer.marks += [piece for piece in parsed.flush() if isinstance(piece, Mark)]
        answer.text = parsed.text.strip()
        return raw, last

    def _fork(self) -> SequenceHandle:
        if self._row is None:
            self._row = self.engine.claim(self._lost)
            self._row.append(tuple(self.engine.loaded.prompt.begin(self._system or None)))
        return self._row.fork(background=True)

    def _lost(self, _: Exception) -> None:
        if self._row:
            self._row.release()
        self._row = None


def picture_segments(loaded: LoadedModel, shots: Sequence[Shot], budget: int | None) -> list[Segment]:
    """Pictures for the prompt; several stand there as a video, with their times."""
    prompt, patch, out = loaded.prompt, loaded.model.config.patch, list[Segment]()
    budget = budget or (SMALL if len(shots) > 1 else loaded.budget)
    for number, shot in enumerate(shots):
        if len(shots) > 1:
            out.append(tuple(prompt.timestamp(shot.at - shots[0].at, first=number == 0)))
        out += [(prompt.boi,), Picture.of(shot.jpeg, *shot.size, budget, patch), (prompt.eoi,)]
    return out
