"""A bank of spoken sentences: made once by a synthesiser that is too slow for every lesson, and sounding new each time.

A family of voices is two files: `NAME.pcm`, 16 kHz int16, one utterance after the other, and `NAME.jsonl`, a line for each:
`start` and `end` in samples, `text`, `words` as [word, first, last sample within the utterance], `voice`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.nano.understand import Question, understand
from model.nano.utterance import RATE, Utterance, place


@dataclass(frozen=True)
class Entry:
    pcm: np.ndarray  # int16, of the whole family
    start: int
    end: int
    text: str
    words: tuple[tuple[str, int, int], ...]

    def utterance(self, rng: np.random.Generator) -> Utterance:
        return place(self.text, self.pcm[self.start : self.end].astype(np.float32) / 32768, self.words, rng)


class Bank:
    """What one or more families say, found by what it asks. Raises FileNotFoundError where a family is missing."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries = [entry for file in files for entry in _entries(file)]
        self.asking: dict[Question, list[Entry]] = defaultdict(list)
        self.kinds: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            question = understand(entry.text)
            self.asking[question].append(entry)
            self.kinds[question.kind].append(entry)

    def any(self, rng: np.random.Generator) -> Entry:
        return self.entries[rng.integers(len(self.entries))]

    def about(self, question: Question, rng: np.random.Generator) -> Entry | None:
        """A sentence that asks this, else one of its kind, else None."""
        found = self.asking.get(question) or self.kinds.get(question.kind)
        return found[rng.integers(len(found))] if found else None


def _entries(file: Path) -> Iterator[Entry]:
    pcm = np.memmap(file.with_suffix(".pcm"), np.int16, "r")
    for line in file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        if told["end"] <= len(pcm):
            words = tuple((word, first, last) for word, first, last in told["words"])
            yield Entry(pcm, told["start"], told["end"], told["text"], words)


class Writer:
    """Adds to a family, and takes up again what was broken off: `count` utterances are there already."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lines, self._sound = file.with_suffix(".jsonl"), file.with_suffix(".pcm")
        told = self._lines.read_bytes() if self._lines.exists() else b""
        whole = told[: told.rfind(b"\n") + 1]
        lines = whole.splitlines()
        self.count, self._at = len(lines), json.loads(lines[-1])["end"] if lines else 0
        self._lines.write_bytes(whole)
        with self._sound.open("ab") as sound:
            sound.truncate(2 * self._at)

    def add(self, pcm: np.ndarray, text: str, words: Sequence[tuple[str, int, int]], voice: Any) -> None:
        """pcm float32 at 16 kHz. The sound is there before the line that tells of it."""
        with self._sound.open("ab") as sound:
            sound.write((np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes())
        told = {"start": self._at, "end": self._at + len(pcm), "text": text, "words": list(words), "voice": voice}
        with self._lines.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(told, separators=(",", ":")) + "\n")
        self._at += len(pcm)
        self.count += 1


def seconds(entries: Sequence[Entry]) -> float:
    return sum(entry.end - entry.start for entry in entries) / RATE
