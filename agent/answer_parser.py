"""One answer as it is written: tokens in; text, thoughts, marks and calls out; and which token the last word heard ends at."""

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
    """What the model wrote without a break: up to its end, or to the tools whose results it needs."""

    begun: int  # characters of the answer's text before it
    ids: list[int] = field(default_factory=list)
    reach: list[int] = field(default_factory=list)  # characters of the answer's text after each id
    calls: list[ToolCall] = field(default_factory=list)
    entry: int = -1  # on the tape, once it is complete

    def until(self, characters: int) -> int:
        """The ids that write so many characters of the text."""
        if characters <= self.begun:
            return 0
        return next((n for n, reach in enumerate(self.reach, 1) if reach >= characters), len(self.ids))


class AnswerParser:
    """`thinking`: whether thoughts may be open when results of tools come back."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool = False) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        self.text = ""
        self.stretches: list[AnswerPart] = []
        self.begin()

    @property
    def tokens(self) -> int:
        return sum(len(stretch.ids) for stretch in self.stretches)

    def begin(self) -> AnswerPart:
        """The first stretch, or the next one after a tool's results."""
        self._reader = AnswerReader(self._tokenizer, self._thinking and bool(self.stretches))
        self._marks = MarkReader()
        self.stretches.append(AnswerPart(len(self.text)))
        return self.stretches[-1]

    def push(self, id: int) -> list[Piece]:
        stretch = self.stretches[-1]
        pieces = self._read(self._reader.push(id))
        stretch.ids.append(id)
        stretch.reach.append(len(self.text))
        return pieces

    def flush(self) -> list[Piece]:
        """The end of a stretch, wherever it came."""
        return self._read(self._reader.flush()) + self._said(self._marks.flush())

    async def read(self, tokens: AsyncIterable[tuple[int, float]]) -> AsyncIterator[Piece]:
        """The pieces of an answer while it is sampled, to its end. `tokens`: ids with their log-probabilities."""
        async for id, _ in tokens:
            for piece in self.push(id):
                yield piece
        for piece in self.flush():
            yield piece

    def _read(self, found: Iterable[AnswerEvent]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in found:
            if isinstance(event, Text):
                pieces += self._said(self._marks.push(event.text))
            else:
                pieces.append(event)
            if isinstance(event, ToolCall):
                self.stretches[-1].calls.append(event)
        return pieces

    def _said(self, parts: Iterable[str | Mark]) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            if isinstance(part, str):
                if len(self.text) == self.stretches[-1].begun:  # a stretch does not know what stood before its tools
                    part = part.lstrip()
                    part = " " + part if part and self.text and not self.text[-1].isspace() else part
                self.text += part
            pieces += [part] if part else []
        return pieces
