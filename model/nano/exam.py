"""Examines nano: `python -m model.nano.exam --seed N`, in full or `--quick` in about two minutes.

Everything is of another kind than the lessons: voices and one drawer that training never met, typed forms it was not shown,
people who talk about something else. Every question goes in as in life: sound frame by frame, the picture as one block, the
answer greedily. An answer is right if its sentence is right to the letter and, where it points, every mark covers its thing with
IoU >= 0.5. The neural voices and those of other synthesisers come from a bank (see kokoro.py and other_voices.py), the people
from a folder of recordings; where they are missing, their rows are left out and the exam says so.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from agent import checkpoint
from agent.checkpoint import LoadedModel
from agent.marks import Mark, parse
from agent.prompt import AnswerReader, Text
from model.nano import drawers, speech, world
from model.nano.bank import Bank, Entry
from model.nano.channel import augment
from model.nano.lessons import SIZES, TURN_DETECTION
from model.nano.phrases import NOT_UNDERSTOOD
from model.nano.speakers import PersonRecording, recordings, unfinished
from model.nano.typed import typed
from model.nano.understand import Question, reply
from model.nano.utterance import Utterance, broken_off

LENGTH = 1024
QUICK = 12  # one in so many of the items of a full exam


@dataclass
class ExamRow:
    """What one part of the exam counted: items by kind, those that were right, words and boxes."""

    title: str
    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    words: int = 0
    errors: int = 0
    boxes_wanted: int = 0
    boxes_placed: int = 0

    def count(self, kind: str, right: bool) -> None:
        self.asked[kind] += 1
        self.right[kind] += right

    @property
    def share(self) -> float:
        """Right of all, 0 to 1."""
        return self.right.total() / max(1, self.asked.total())

    @property
    def word_error_rate(self) -> float:
        return self.errors / max(1, self.words)

    @property
    def boxes(self) -> float:
        """Share of the wanted boxes that were met with IoU >= 0.5."""
        return self.boxes_placed / max(1, self.boxes_wanted)

    def __str__(self) -> str:
        parts = [f"{self.title:<34}{self.share:6.1%} of {self.asked.total():<4}"]
        if self.words:
            parts.append(f"words wrong {self.word_error_rate:5.1%} of {self.words:<5}")
        if self.boxes_wanted:
            parts.append(f"boxes {self.boxes:5.1%} of {self.boxes_wanted:<4}")
        kinds = "  ".join(f"{kind} {self.right[kind] / n:.0%}" for kind, n in sorted(self.asked.items()))
        return "  ".join([*parts, kinds] if len(self.asked) > 1 else parts)


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union of two boxes (y0, x0, y1, x1)."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, height) * max(0, width)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def well_placed(marks: list[Mark], wanted: list[Mark]) -> int:
    """How many of the wanted boxes have a mark of their label on them."""
    return sum(any(mark.label == want.label and iou(mark.box, want.box) >= 0.5 for mark in marks) for want in wanted)


def word_errors(said: str, heard: str) -> int:
    """Levenshtein distance in words."""
    a, b = said.split(), heard.split()
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


class Candidate:
    """One conversation with the model under examination; turns that are over are kept as words, as `transcripts` does."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.cache = checkpoint.new_cache(loaded, 2, LENGTH)
        self.how = replace(loaded.generation, greedy=True)
        self.past: list[tuple[np.ndarray | None, int, str, str]] = []  # picture, budget, words and answer
        self._begin()

    def _begin(self) -> None:
        self.row = self.cache.claim()
        prompt = self.loaded.prompt
        self._write(prompt.begin())
        for picture, budget, words, answer in self.past:
            self._write(prompt.open_turn())
            self._show(picture, budget)
            self._write([*prompt.text(words), *prompt.end_turn(), *prompt.answer(answer)])

    def _write(self, ids: list[int], wanted: bool = False) -> torch.Tensor | None:
        return checkpoint.append_ids(self.loaded, self.cache, self.row, ids, wanted=wanted)

    def _show(self, picture: np.ndarray | None, budget: int) -> None:
        if picture is not None:
            self._write([self.loaded.prompt.boi])
            checkpoint.append_picture(self.loaded, self.cache, self.row, *checkpoint.patchify(self.loaded, picture, budget))
            self._write([self.loaded.prompt.eoi])

    def turn(self, text: str, pcm: np.ndarray | None, picture: np.ndarray | None, budget: int = 70) -> tuple[str, str]:
        """Typed text, or the sound of it; returns the answer and, of sound, the transcript."""
        prompt = self.loaded.prompt
        self._write(prompt.open_turn())
        self._show(picture, budget)
        heard = text
        if pcm is None:
            self._write(prompt.text(text))
        else:
            self._hear(pcm)
            self._write([prompt.eoa])
            heard = checkpoint.transcribe(self.loaded, self.cache, self.row)
        answer = self._answered()
        self.past.append((picture, budget, heard, answer))
        self.cache.release(self.row)
        self._begin()
        return answer, heard

    def finished(self, pcm: np.ndarray) -> str:
        """What it says to the question whether the speaker has finished; the conversation ends with it."""
        prompt = self.loaded.prompt
        self._write(prompt.open_turn())
        self._hear(pcm)
        self._write([prompt.eoa, *prompt.text(TURN_DETECTION["question"])])
        return self._answered()

    def _hear(self, pcm: np.ndarray) -> None:
        size = self.loaded.model.config.frame
        self._write([self.loaded.prompt.boa])
        for frame in np.pad(pcm, (0, -len(pcm) % size)).reshape(-1, size):
            checkpoint.append_frame(self.loaded, self.cache, self.row, frame)

    def _answered(self) -> str:
        loaded = self.loaded
        hidden = self._write(loaded.prompt.close_turn(), wanted=True)
        assert hidden is not None
        reader, answer = AnswerReader(loaded.tokenizer), ""
        for token, _ in checkpoint.generate(loaded, self.cache, self.row, hidden, self.how, 200):
            answer += "".join(event.text for event in reader.push(token) if isinstance(event, Text))
        return answer.strip()


def judge(row: ExamRow, ask: world.Ask, answer: str) -> bool:
    """Whether the answer is right; counted in the row."""
    (sentence, marks), (wanted, wanted_marks) = parse(answer), parse(ask.answer)
    on = well_placed(marks, wanted_marks)
    row.boxes_wanted += len(wanted_marks)
    row.boxes_placed += on
    right = sentence.strip() == wanted.strip() and on == len(wanted_marks) == len(marks)
    row.count(ask.kind, right)
    return right


Say = Callable[[np.random.Generator, world.Scene], tuple[world.Ask, Utterance]]


@dataclass(frozen=True)
class Exam:
    loaded: LoadedModel
    seed: int
    bank: Path | None = None
    people: Path | None = None
    share: float = 1.0  # of the items of a full exam

    def rows(self) -> Iterator[ExamRow | str]:
        """A row for each part as it is done, or a line that says what is missing."""
        voices: dict[str, list[Bank]] = {"kokoro": [], "piper": [], "festival": []}
        for file in sorted((self.bank / "exam").glob("*.jsonl")) if self.bank else []:
            voices.setdefault(file.stem.partition("-")[0], []).append(Bank([file]))
        yield self.spoken("spoken, espeak-ng held out", self.espeak, 120)
        for family, banks in voices.items():
            if banks:
                yield self.spoken(f"spoken, {family} held out", self.stored(banks), 120)
            else:
                yield f"no voices of {family} in the bank: its row is left out"
        for name, drawer in (*drawers.drawers().items(), ("solids (held out)", drawers.held_out())):
            yield self.typed(f"typed, drawer {name}", drawer, 120)
        yield self.typed("typed, forms held out", None, 120, held_out=True)
        yield self.shouted("typed, in capitals", 60)
        for budget in (140, 280):
            yield self.typed(f"typed, budget {budget}", None, 60, budget=budget)
        if talk := recordings(self.people, held_out=True):
            yield self.others(talk, 56)
        else:
            yield "no recordings of people: their row is left out"
        yield self.pauses("pauses, espeak-ng held out", self.espeak, 100)
        if voices["kokoro"]:
            yield self.pauses("pauses, kokoro held out", self.stored(voices["kokoro"]), 100)
            yield self.conversations("five spoken turns, kokoro", self.stored(voices["kokoro"]), 24)
        yield self.conversations("five spoken turns, espeak-ng", self.espeak, 24)

    def _rng(self, title: str) -> np.random.Generator:
        return np.random.default_rng((self.seed, *title.encode()))

    def _some(self, count: int) -> range:
        return range(max(4, round(count * self.share)))

    def _scene(self, rng: np.random.Generator, drawer: drawers.Drawer, budget: int = 70) -> tuple[world.Scene, np.ndarray]:
        sizes = SIZES[budget]
        scene = drawers.scene(drawer, rng, *sizes[rng.integers(len(sizes))])
        return scene, drawer.draw(scene, rng)

    def _any_drawer(self, rng: np.random.Generator) -> drawers.Drawer:
        return drawers.pick(drawers.drawers(), rng)

    def espeak(self, rng: np.random.Generator, scene: world.Scene) -> tuple[world.Ask, Utterance]:
        """Variants of espeak-ng that training does not hear."""
        ask = world.sample_ask(rng, scene)
        return ask, speech.clean(ask.text, rng, held_out=True)

    def stored(self, banks: Sequence[Bank]) -> Say:
        """One of the voices of a family; its sentences as often of each kind as people ask."""

        def say(rng: np.random.Generator, scene: world.Scene) -> tuple[world.Ask, Utterance]:
            bank = banks[int(rng.integers(len(banks)))]
            wanted = world.sample_ask(rng, scene)
            entry: Entry | None = bank.about(Question(wanted.kind, wanted.colour, wanted.shape), rng)
            entry = entry or bank.any(rng)
            return reply(entry.text, scene), entry.utterance(rng)

        return say

    def spoken(self, title: str, say: Say, count: int) -> ExamRow:
        """One question about one picture each, and what was said in words."""
        rng, row = self._rng(title), ExamRow(title)
        for _ in self._some(count):
            scene, picture = self._scene(rng, self._any_drawer(rng))
            ask, said = say(rng, scene)
            answer, heard = Candidate(self.loaded).turn(ask.text, augment(said, rng).pcm, picture)
            judge(row, ask, answer)
            words = world.spoken(ask.text)
            row.words += len(words.split())
            row.errors += word_errors(words, heard)
        return row

    def typed(
        self, title: str, drawer: drawers.Drawer | None, count: int, *, held_out: bool = False, budget: int = 70
    ) -> ExamRow:
        rng, row = self._rng(title), ExamRow(title)
        for _ in self._some(count):
            scene, picture = self._scene(rng, drawer or self._any_drawer(rng), budget)
            ask = world.sample_ask(rng, scene)
            answer, _ = Candidate(self.loaded).turn(typed(ask.text, rng, held_out), None, picture, budget)
            judge(row, ask, answer)
        return row

    def shouted(self, title: str, count: int) -> ExamRow:
        rng, row = self._rng(title), ExamRow(title)
        for _ in self._some(count):
            scene, picture = self._scene(rng, self._any_drawer(rng))
            ask = world.sample_ask(rng, scene)
            judge(row, ask, Candidate(self.loaded).turn(ask.text.upper(), None, picture)[0])
        return row

    def others(self, talk: list[PersonRecording], count: int) -> ExamRow:
        """People who talk about something else, with a picture in view."""
        rng, row = self._rng("people"), ExamRow("people's other talk told apart")
        for number in self._some(count):
            _, picture = self._scene(rng, self._any_drawer(rng))
            answer, _ = Candidate(self.loaded).turn("", talk[number % len(talk)].pcm()[: 8 * 16000], picture)
            row.count("other", answer == NOT_UNDERSTOOD)
        return row

    def pauses(self, title: str, say: Say, count: int) -> ExamRow:
        """Whole and broken-off questions, with the silence after the last word that the judge of pauses is asked after."""
        rng, row = self._rng(title), ExamRow(title)
        least, most = TURN_DETECTION["silence_ms"]
        while row.asked.total() < len(self._some(count)):
            _, said = say(rng, world.sample_scene(rng, 384, 384))
            whole, ends = row.asked.total() % 2 == 0, unfinished(tuple(word for word, _, _ in said.words))
            if not (whole or ends):
                continue
            kept = len(said.words) if whole else ends[rng.integers(len(ends))]
            heard = augment(broken_off(said, kept, rng.uniform(least, most) / 1000), rng)
            answer = Candidate(self.loaded).finished(heard.pcm)
            row.count("finished" if whole else "broken off", answer == TURN_DETECTION["finished" if whole else "unfinished"])
        return row

    def conversations(self, title: str, say: Say, count: int) -> ExamRow:
        """Five turns about one picture, of which all have to be right; counted by turn too."""
        rng, row = self._rng(title), ExamRow(title)
        for _ in self._some(count):
            candidate, all_right = Candidate(self.loaded), True
            scene, picture = self._scene(rng, self._any_drawer(rng))
            for turn in range(5):
                ask, said = say(rng, scene)
                answer, _ = candidate.turn(ask.text, augment(said, rng).pcm, None if turn else picture)
                all_right &= judge(ExamRow(""), ask, answer)
            row.count("all five", all_right)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a folder, or nano for the embedded weights")
    parser.add_argument("--quick", action="store_true", help="fewer of everything: about two minutes")
    parser.add_argument("--share", type=float, default=1.0, help="of the items, 1,750 in full, which take a quarter of an hour")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bank", type=Path, default=Path("build/nano/bank"), help="holds the voices of the exam in exam/")
    parser.add_argument("--people", type=Path, help="a folder of recordings of people, with people.jsonl")
    given = parser.parse_args()
    loaded = checkpoint.load(str(Path(given.model)))
    exam = Exam(loaded, given.seed, given.bank, given.people, 1 / QUICK if given.quick else given.share)
    print(f"seed {given.seed}, {exam.share:.0%} of the items", flush=True)
    for row in exam.rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
