"""Parses an answer while it is generated: token ids in; text, thoughts, marks and tool calls out."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass, field

from agent.calls import BrokenCall, ToolCall
from agent.marks import Mark, MarkReader
from agent.prompt import AnswerEvent, AnswerReader, Text, Thought
from model.tokenizer import Tokenizer

Piece = str | Thought | Mark | ToolCall | BrokenCall


@dataclass
class AnswerPart:
    """A part of an answer: what the model generates up to a stop token, or up to the tool calls whose results it needs."""

    start: int  # where its text begins in the answer's text, in characters
    ids: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)  # length of the answer's text after each id
    calls: list[ToolCall] = field(default_factory=list)
    entry: int = -1  # its index on the tape, once it is complete

    def count_ids(self, characters: int) -> int:
        """How many of its ids produce the first `characters` characters of the answer's text."""
        if characters <= self.start:
            return 0
        return next((n for n, end in enumerate(self.characters, 1) if end >= characters), len(self.ids))


class AnswerParser:
    """Parses one answer, part by part. `thinking`: a part that follows tool results may begin inside a thought."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool = False) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        self.text = ""
        self.parts: list[AnswerPart] = []
        self.begin()

    @property
    def tokens(self) -> int:
        return sum(len(part.ids) for part in self.parts)

    def begin(self) -> AnswerPart:
        """Begins the first part, or the next one after tool results."""
        self._reader = AnswerReader(self._tokenizer, self._thinking and bool(self.parts))
        self._marks = MarkReader()
        self.parts.append(AnswerPart(len(self.text)))
        return self.parts[-1]

    def push(self, id: int) -> list[Piece]:
        """The next sampled id; returns the pieces it completes."""
        part = self.parts[-1]
        pieces = self._read(self._reader.push(id))
        part.ids.append(id)
        part.characters.append(len(self.text))
        return pieces

    def flush(self) -> list[Piece]:
        """The end of a part, complete or not; returns the last pieces."""
        return self._read(self._reader.flush()) + self._add_text(self._marks.flush())

    async def read(self, tokens: AsyncIterable[tuple[int, float]]) -> AsyncIterator[Piece]:
        """The pieces of a whole part while it is sampled. `tokens`: ids with their log-probabilities."""
        async for id, _ in tokens:
            for piece in self.push(id):
                yield piece
        for piece in self.flush():
            yield piece

    def _read(self, parsed: Iterable[AnswerEvent]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in parsed:
            if isinstance(event, Text):
                pieces += self._add_text(self._marks.push(event.text))
            else:
                pieces.append(event)
            if isinstance(event, ToolCall):
                self.parts[-1].calls.append(event)
        return pieces

    def _add_text(self, items: Iterable[str | Mark]) -> list[Piece]:
        pieces: list[Piece] = []
        for item in items:
            if isinstance(item, str):
                if len(self.text) == self.parts[-1].start:  # the model does not know how the text before its tool calls ended
                    item = item.lstrip()
                    item = " " + item if item and self.text and not self.text[-1].isspace() else item
                self.text += item
            pieces += [item] if item else []
        return pieces
