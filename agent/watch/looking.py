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

from jsonschema import Draft202012Validator, ValidationError

from agent.answer import Answer
from agent.engine import Engine, Feed
from agent.marks import Mark
from agent.prompt import AnswerReader, Text
from agent.segments import Picture, Segment
from streams.camera import Shot

SMALL = 70  # soft tokens of a picture among several, or of a quick look
MOST, FEW = 256, 32  # tokens of an answer, of a first line
TRIES = 3  # at JSON of a schema
JSON = "Answer with JSON alone, of this JSON schema: "


class NoAnswer(RuntimeError):
    """The model wrote nothing that was asked for: one sentence."""


@dataclass
class Said:
    text: str = ""
    marks: list[Mark] = field(default_factory=list)
    value: Any = None  # of a schema
    first_token_ms: float = 0.0  # from the moment when the pictures were handed over
    model_ms: float = 0.0
    tokens: int = 0


class Looker:
    def __init__(self, engine: Engine, system: str | None) -> None:
        self._engine, self._system = engine, system
        self._row: Feed | None = None

    async def ask(
        self,
        shots: Sequence[Shot],
        question: str,
        *,
        budget: int | None = None,
        schema: dict[str, Any] | None = None,
        brief: bool = False,
    ) -> Said:
        """`brief`: the first sentence. Raises NoAnswer, RowFull, RowLost, EngineStopped."""
        prompt, said, begun = self._engine.loaded.prompt, Said(), perf_counter()
        row = self._fork()
        try:
            row.append(tuple(prompt.open_turn()), *self._pictures(shots, budget))
            wanted = question if schema is None else f"{question}\n{JSON}{json.dumps(schema)}"
            for _ in range(TRIES):
                raw, last = await self._write(row, wanted, said, begun, brief=brief)
                why = None if schema is None else _wrong(raw, schema, said)
                if why is None:
                    return said
                row.append((last, *prompt.after_answer(), *prompt.open_turn()))
                wanted = f"That is not it: {why}. {JSON}{json.dumps(schema)}"
            raise NoAnswer(f"after {TRIES} tries the answer is not JSON of the schema: {why}")
        finally:
            row.release()
            said.model_ms = (perf_counter() - begun) * 1000

    async def holds(self, shot: Shot, condition: str) -> tuple[bool | None, str]:
        """Whether that is so in the picture, None where the answer is neither yes nor no, and the answer."""
        condition = re.sub(r"^\s*(please )?(tell|let) me( know)? (when|if|once|as soon as)\s+", "", condition, flags=re.I).strip()
        if not condition.endswith("?"):
            condition = f'Is this so in the picture: "{condition}"? Answer yes or no.'
        said = await self.ask([shot], condition, budget=SMALL, brief=True)
        found = re.match(r"\W*(yes|no)\b", said.text, re.I)
        return (found[1].lower() == "yes" if found else None), said.text

    def _fork(self) -> Feed:
        if self._row is None:
            self._row = self._engine.claim(self._lost)
            self._row.append(tuple(self._engine.loaded.prompt.begin(self._system or None)))
        return self._row.fork()

    def _lost(self, _: Exception) -> None:
        if self._row:
            self._row.release()
        self._row = None

    def _pictures(self, shots: Sequence[Shot], budget: int | None) -> list[Segment]:
        loaded, out = self._engine.loaded, list[Segment]()
        prompt, patch = loaded.prompt, loaded.model.config.patch
        budget = budget or (SMALL if len(shots) > 1 else loaded.budget)
        for number, shot in enumerate(shots):
            if len(shots) > 1:
                out.append(tuple(prompt.timestamp(shot.at - shots[0].at, first=number == 0)))
            out += [(prompt.boi,), Picture.of(shot.jpeg, *shot.size, budget, patch), (prompt.eoi,)]
        return out

    async def _write(self, row: Feed, wanted: str, said: Said, begun: float, *, brief: bool) -> tuple[str, int]:
        """Everything that was written, and the last token, which is not in the row."""
        loaded = self._engine.loaded
        closing = tuple(loaded.prompt.text(wanted) + loaded.prompt.close_turn())
        how, most, last = replace(loaded.generation, greedy=True), FEW if brief else MOST, -1
        answer, reader, raw = Answer(loaded.tokenizer), AnswerReader(loaded.tokenizer), ""
        async with aclosing(row.generate(closing, how=how, most=most)) as drawn:
            async for token, _ in drawn:
                said.first_token_ms = said.first_token_ms or (perf_counter() - begun) * 1000
                said.tokens, last = said.tokens + 1, token
                raw += "".join(event.text for event in reader.push(token) if isinstance(event, Text))
                pieces = answer.push(token)
                said.marks += [piece for piece in pieces if isinstance(piece, Mark)]
                if brief and re.search(r"\w[.!?\n]", answer.text):
                    break
        raw += "".join(event.text for event in reader.flush() if isinstance(event, Text))
        said.marks += [piece for piece in answer.flush() if isinstance(piece, Mark)]
        said.text = answer.text.strip()
        return raw, last


def _wrong(raw: str, schema: dict[str, Any], said: Said) -> str | None:
    """What is wrong with it; if nothing, `said` has the value."""
    text = re.sub(r"^\s*```\w*\s*|\s*```\s*$", "", raw).strip()
    try:
        value = json.loads(text, parse_constant=_refused)
        Draft202012Validator(schema).validate(value)
    except ValidationError as error:
        return f"{error.message[:200]} - at `{error.json_path}`"
    except (ValueError, RecursionError) as error:
        return f"{error or 'no JSON'}"[:200]
    said.value, said.text = value, text
    return None


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
