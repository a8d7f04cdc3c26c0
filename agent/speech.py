"""An answer as audio: clauses for the voice, and what was synthesized, sent and heard. Pure; time is counted in samples."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np

from agent.events import WordTiming

# A clause is spoken as soon as it is complete, so the first audio waits for a clause and not for a sentence.
_END = re.compile(r"[.!?…:;,\n](?=[\s\"')\]])|\n")
MAX_CLAUSE = 60  # characters; a longer clause is split at a space
MIN_CLAUSE = 12  # characters; after "Yes," in "Yes, there is …" the voice should not pause


class Clauses:
    """Splits generated text into clauses for the voice; each comes with the index of its first character."""

    def __init__(self) -> None:
        self._text, self._at = "", 0

    def push(self, text: str) -> list[tuple[int, str]]:
        """The next text; returns the clauses it completes."""
        self._text += text
        out = []
        while end := self._boundary():
            out += self._pop(end)
        return out

    def flush(self) -> list[tuple[int, str]]:
        """The end of the text; returns the last clause."""
        return self._pop(len(self._text))

    def _boundary(self) -> int:
        for match in _END.finditer(self._text):
            if match.end() >= MIN_CLAUSE or match[0] in ".!?…\n":
                return match.end()
        return self._text.rfind(" ", 0, MAX_CLAUSE) + 1 if len(self._text) > MAX_CLAUSE else 0

    def _pop(self, end: int) -> list[tuple[int, str]]:
        at, clause = self._at, self._text[:end]
        self._text, self._at = self._text[end:], at + end
        return [(at, clause)] if any(map(str.isalnum, clause)) else []


@dataclass
class Playback:
    """The audio of one answer. `synthesized`, `sent`, `heard`: samples from its start; 0 <= heard <= sent <= synthesized."""

    rate: int
    synthesized: int = 0
    sent: int = 0
    heard: int = 0
    complete: bool = False  # nothing more will be synthesized
    paused: bool = False  # nothing is sent until `resume`
    words: list[WordTiming] = field(default_factory=list)
    _words_sent: int = 0
    _ends: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)], repr=False)  # of words: (sample, characters)
    _last: WordTiming | None = None  # the last word, whose end is not known yet
    _chunks: list[np.ndarray] = field(default_factory=list, repr=False)
    _starts: list[int] = field(default_factory=list, repr=False)

    @property
    def finished(self) -> bool:
        """All audio was synthesized and heard."""
        return self.complete and self.heard >= self.synthesized

    def add(self, pcm: np.ndarray, words: list[WordTiming]) -> None:
        """Appends samples (float32 [n]) and words; a word may begin at any sample after the word before it."""
        if len(pcm):
            self._chunks.append(pcm)
            self._starts.append(self.synthesized)
            self.synthesized += len(pcm)
        for word in words:
            if self._last:
                self._ends.append((word.sample, self._last.end))
            self._last = word
        self.words += words

    def end_clause(self, characters: int) -> None:
        """All audio so far speaks the first `characters` characters of the text, which end with a word."""
        self._ends.append((self.synthesized, characters))
        self._last = None

    def send(self, ahead: float) -> tuple[int, np.ndarray, tuple[WordTiming, ...]] | None:
        """The next audio to send, at most `ahead` seconds ahead of what was heard: (start sample, float32 [n], the
        words that begin in it), or None."""
        stop = min(self.synthesized, self.heard + int(ahead * self.rate))
        if self.paused or stop <= self.sent:
            return None
        start, self.sent = self.sent, stop
        first = bisect_right(self._starts, start) - 1
        pieces = []
        for at, chunk in zip(self._starts[first:], self._chunks[first:], strict=True):
            if at >= stop:
                break
            pieces.append(chunk[max(0, start - at) : stop - at])
        last = self.complete and stop == self.synthesized  # a word may begin at the very end of the audio
        first_word, self._words_sent = self._words_sent, self._words_before(stop + last)
        return start, np.concatenate(pieces), tuple(self.words[first_word : self._words_sent])

    def hear(self, sample: int) -> None:
        """Playback has reached `sample`."""
        self.heard = max(self.heard, min(sample, self.sent))

    @property
    def heard_to_word_end(self) -> int:
        """The sample at which the last completely heard word ends."""
        return self._end(self.heard)[0]

    def resume(self, sample: int) -> None:
        """Sends again from `sample` on."""
        self.sent = self.heard = min(sample, self.sent)
        self._words_sent = self._words_before(self.sent)
        self.paused = False

    def characters(self, sample: int) -> int:
        """How many characters of the text were spoken completely at `sample`."""
        return self._end(sample)[1]

    def _end(self, sample: int) -> tuple[int, int]:
        return self._ends[bisect_right(self._ends, sample, key=lambda end: end[0]) - 1]

    def _words_before(self, sample: int) -> int:
        """How many words begin before `sample`."""
        return bisect_left(self.words, sample, key=lambda word: word.sample)
