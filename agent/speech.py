"""An answer as sound: which words can be spoken already, what was made, sent and heard of it. Pure; samples, not seconds."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np

from agent.events import WordTiming

# A clause is spoken as soon as it is complete: what the first word waits for is a clause and not a sentence.
_END = re.compile(r"[.!?…:;,\n](?=[\s\"')\]])|\n")
LONG = 60  # characters without such an end, after which a space will do
BRIEF = 12  # "Yes, there is …" is one breath


class Clauses:
    """Text as it is written in, clauses that can be spoken out, each with the place of its first character."""

    def __init__(self) -> None:
        self._text, self._at = "", 0

    def push(self, text: str) -> list[tuple[int, str]]:
        self._text += text
        out = []
        while cut := self._cut():
            out += self._take(cut)
        return out

    def flush(self) -> list[tuple[int, str]]:
        return self._take(len(self._text))

    def _cut(self) -> int:
        for match in _END.finditer(self._text):
            if match.end() >= BRIEF or match[0] in ".!?…\n":
                return match.end()
        return self._text.rfind(" ", 0, LONG) + 1 if len(self._text) > LONG else 0

    def _take(self, cut: int) -> list[tuple[int, str]]:
        at, clause = self._at, self._text[:cut]
        self._text, self._at = self._text[cut:], at + cut
        return [(at, clause)] if any(map(str.isalnum, clause)) else []


@dataclass
class Playback:
    """The sound of one answer. `made`, `sent` and `heard` are samples from its beginning; 0 <= heard <= sent <= made."""

    rate: int
    made: int = 0
    sent: int = 0
    heard: int = 0
    complete: bool = False  # nothing more will be made
    held: bool = False  # nothing is sent
    words: list[WordTiming] = field(default_factory=list)
    _told: int = 0  # words that were sent
    _ends: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)], repr=False)  # of words: sample, characters
    _last: WordTiming | None = None  # whose end is not known yet
    _chunks: list[np.ndarray] = field(default_factory=list, repr=False)
    _starts: list[int] = field(default_factory=list, repr=False)

    @property
    def over(self) -> bool:
        return self.complete and self.heard >= self.made

    def make(self, pcm: np.ndarray, words: list[WordTiming]) -> None:
        """The next samples, and the next words: these begin anywhere from the last one on."""
        if len(pcm):
            self._chunks.append(pcm)
            self._starts.append(self.made)
            self.made += len(pcm)
        for word in words:
            if self._last:
                self._ends.append((word.sample, self._last.end))
            self._last = word
        self.words += words

    def pause(self, characters: int) -> None:
        """All that was made is so much of the text, to the end of a word."""
        self._ends.append((self.made, characters))
        self._last = None

    def send(self, ahead: float) -> tuple[int, np.ndarray, tuple[WordTiming, ...]] | None:
        """What can be sent now, at most `ahead` seconds before what was heard: where it belongs, samples, words in it."""
        stop = min(self.made, self.heard + int(ahead * self.rate))
        if self.held or stop <= self.sent:
            return None
        start, self.sent = self.sent, stop
        first = bisect_right(self._starts, start) - 1
        pieces = []
        for at, chunk in zip(self._starts[first:], self._chunks[first:], strict=True):
            if at >= stop:
                break
            pieces.append(chunk[max(0, start - at) : stop - at])
        last = self.complete and stop == self.made  # a word may begin where the sound ends
        told, self._told = self._told, self._place(stop + last)
        return start, np.concatenate(pieces), tuple(self.words[told : self._told])

    def hear(self, sample: int) -> None:
        """So much was played."""
        self.heard = max(self.heard, min(sample, self.sent))

    @property
    def whole(self) -> int:
        """Where the last word that was heard to its end was over."""
        return self._end(self.heard)[0]

    def go_on(self, sample: int) -> None:
        """Send again from `sample` on."""
        self.sent = self.heard = min(sample, self.sent)
        self._told = self._place(self.sent)
        self.held = False

    def characters(self, sample: int) -> int:
        """How much of the text was over at `sample`."""
        return self._end(sample)[1]

    def _end(self, sample: int) -> tuple[int, int]:
        return self._ends[bisect_right(self._ends, sample, key=lambda end: end[0]) - 1]

    def _place(self, sample: int) -> int:
        """How many words begin before it."""
        return bisect_left(self.words, sample, key=lambda word: word.sample)
