"""Examines nano: `python -m model.nano.exam --seed N`. Voices it was never trained on, scenes drawn afresh.

Every question goes in as in life: sound frame by frame, the picture as one block, the answer greedily. An answer is right
if its sentence is right to the letter and, where it points, every mark covers its thing with IoU >= 0.5.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from agent import checkpoint
from agent.checkpoint import LoadedModel
from agent.marks import Mark, parse
from agent.prompt import AnswerReader, Text
from model.nano import draw, speech, world
from model.nano.lessons import SIZES

LENGTH = 1024
GROUPS = ("spoken", "typed", "first-turn", "later")


@dataclass
class Result:
    """What an exam counted. `asked` and `right` hold (group, kind) of every answer."""

    title: str
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    right: Counter[tuple[str, str]] = field(default_factory=Counter)
    boxes_wanted: int = 0
    boxes_placed: int = 0
    words: int = 0
    errors: int = 0

    def share(self, group: str) -> float:
        """Answers of a group that are fully right, 0 to 1."""
        return _sum(self.right, group) / max(1, _sum(self.asked, group))

    @property
    def word_error_rate(self) -> float:
        return self.errors / max(1, self.words)

    @property
    def boxes(self) -> float:
        """Share of the wanted boxes that were met with IoU >= 0.5."""
        return self.boxes_placed / max(1, self.boxes_wanted)

    def __str__(self) -> str:
        lines = [self.title]
        for group in GROUPS:
            kinds = "  ".join(
                f"{kind} {self.right[g, kind] / n:.0%}" for (g, kind), n in sorted(self.asked.items()) if g == group
            )
            lines.append(f"{group + ' answers, fully right':<28}{self.share(group):6.1%} of {_sum(self.asked, group)}   {kinds}")
        lines.append(
            f"{'word error rate':<28}{self.word_error_rate:6.1%} of {self.words} words, voices held out: "
            f"{', '.join(speech.HELD_OUT)}"
        )
        lines.append(f"{'boxes with IoU >= 0.5':<28}{self.boxes:6.1%} of {self.boxes_wanted}")
        return "\n".join(lines)


def _sum(counts: Counter[tuple[str, str]], group: str) -> int:
    return sum(n for (g, _), n in counts.items() if g == group)


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
    """One conversation with the model under examination."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.cache = checkpoint.new_cache(loaded, 2, LENGTH)
        self.row = self.cache.claim()
        self.how = replace(loaded.generation, greedy=True)
        self._write(loaded.prompt.begin())

    def _write(self, ids: list[int], wanted: bool = False) -> torch.Tensor | None:
        return checkpoint.append_ids(self.loaded, self.cache, self.row, ids, wanted=wanted)

    def turn(self, text: str, pcm: np.ndarray | None, picture: np.ndarray | None) -> tuple[str, str]:
        """Typed text, or the sound of it; returns the answer and, of sound, the transcript."""
        loaded, prompt = self.loaded, self.loaded.prompt
        self._write(prompt.open_turn())
        if picture is not None:
            self._write([prompt.boi])
            checkpoint.append_picture(loaded, self.cache, self.row, *checkpoint.patchify(loaded, picture, loaded.budget))
            self._write([prompt.eoi])
        heard = ""
        if pcm is None:
            self._write(prompt.text(text))
        else:
            size = loaded.model.config.frame
            self._write([prompt.boa])
            for frame in np.pad(pcm, (0, -len(pcm) % size)).reshape(-1, size):
                checkpoint.append_frame(loaded, self.cache, self.row, frame)
            self._write([prompt.eoa])
            heard = checkpoint.transcribe(loaded, self.cache, self.row)
        hidden = self._write(prompt.close_turn(), wanted=True)
        assert hidden is not None
        reader, answer = AnswerReader(loaded.tokenizer), ""
        for token, _ in checkpoint.generate(loaded, self.cache, self.row, hidden, self.how, 200):
            answer += "".join(event.text for event in reader.push(token) if isinstance(event, Text))
        self._write([loaded.prompt.tokenizer.special("<turn|>"), *prompt.after_answer()])
        return answer.strip(), heard


def examine(loaded: LoadedModel, conversations: int, turns: int, seed: int) -> Result:
    rng = np.random.default_rng((seed, 20_26))
    result = Result(f"seed {seed}: {conversations} conversations of {turns} turns")
    for number in range(conversations):
        candidate, aloud = Candidate(loaded), number % 2 == 0
        scene: world.Scene | None = None
        for turn in range(turns):
            picture = None
            if turn == 0 or rng.random() < 0.4:
                scene = world.sample_scene(rng, *SIZES[rng.integers(len(SIZES))])
                picture = draw.draw(scene, rng)
            ask = world.sample_ask(rng, scene)
            pcm = speech.utter(ask.text, rng, held_out=True).pcm if aloud else None
            answer, heard = candidate.turn(ask.text, pcm, picture)
            (sentence, marks), (wanted, wanted_marks) = parse(answer), parse(ask.answer)
            on = well_placed(marks, wanted_marks)
            result.boxes_wanted += len(wanted_marks)
            result.boxes_placed += on
            right = sentence.strip() == wanted.strip() and on == len(wanted_marks) == len(marks)
            for group in ("spoken" if aloud else "typed", "first-turn" if turn == 0 else "later"):
                result.asked[group, ask.kind] += 1
                result.right[group, ask.kind] += right
            if aloud:
                said = world.spoken(ask.text)
                result.words += len(said.split())
                result.errors += word_errors(said, heard)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a folder, or nano for the embedded weights")
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(examine(checkpoint.load(str(Path(given.model))), given.conversations, given.turns, given.seed))


if __name__ == "__main__":
    main()
