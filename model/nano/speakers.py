"""Who speaks in a lesson: espeak-ng, flite, the voices of the bank, and people who talk about something else.

`Speakers` gives sentences with the sound of them. All but espeak-ng may be missing; `Speakers.missing` says what that costs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile

from model.nano import speech, world
from model.nano.bank import Bank
from model.nano.channel import augment
from model.nano.flite import Flite, FliteMissing
from model.nano.phrases import QUESTIONS
from model.nano.understand import OTHER, Question, reply, subject, understand
from model.nano.utterance import RATE, Utterance, broken_off, hesitant, join, paced, part

# How many of the spoken turns each family has, when all are there.
SHARES = {"espeak": 0.22, "flite": 0.18, "bank": 0.6}
HESITATIONS = ("um", "uh", "er", "hmm")
OPEN_ENDED = frozenset(
    (
        "the",
        "a",
        "an",
        "is",
        "are",
        "of",
        "to",
        "in",
        "any",
        "my",
        "me",
        "you",
        "do",
        "does",
        "did",
        "can",
        "could",
        "what",
        "where",
        "which",
        "how",
        "many",
        "and",
        "at",
        "for",
        "some",
        "if",
        "it",
        "there",
        "with",
    )
)


@dataclass(frozen=True)
class PersonRecording:
    """Somebody who talks about something else; no word times."""

    file: Path
    text: str

    def pcm(self) -> np.ndarray:
        return _recording(self.file)


class Speakers:
    def __init__(self, bank: Path | None = None, people: Path | None = None) -> None:
        """`bank`: a folder of families (see bank.py). `people`: a folder with people.jsonl and its recordings."""
        self.missing: list[str] = []
        self.flite, self.bank, self.people = self._flite(), self._open(bank), recordings(people, held_out=False)
        if not self.people:
            self.missing.append("no recordings of people: speech about other things will be taken for questions more often")
        there = {"espeak": True, "flite": self.flite is not None, "bank": self.bank is not None}
        shares = np.array([share * there[name] for name, share in SHARES.items()])
        self._shares = shares / shares.sum()

    def _flite(self) -> Flite | None:
        try:
            return Flite()
        except FliteMissing as e:
            self.missing.append(f"{e}. Without it voices cut from recordings are not understood.")
            return None

    def _open(self, folder: Path | None) -> Bank | None:
        files = sorted(folder.glob("*.jsonl")) if folder and folder.is_dir() else []
        if not files:
            self.missing.append("no bank of neural voices: more than half of the words of a voice like a person's will be wrong")
            return None
        return Bank(files)

    def ask(self, rng: np.random.Generator, scene: world.Scene | None, kind: str) -> tuple[world.Ask, Utterance]:
        """Something of this kind to say while the scene is in view, and the sound of it."""
        family = tuple(SHARES)[rng.choice(len(SHARES), p=self._shares)]
        if family == "bank":
            heard = self._stored(rng, scene, kind)
            ask = reply(heard.text, scene)
        else:
            ask = world.sample_ask(rng, scene, kind)
            heard = self.say(ask.text, rng, family)
        return ask, self.altered(heard, rng)

    def say(self, text: str, rng: np.random.Generator, family: str = "espeak") -> Utterance:
        """In silence. flite gives up on some texts, which espeak then says."""
        if family == "flite" and self.flite is not None:
            try:
                return self.flite.clean(text, rng)
            except ValueError:
                pass
        return speech.clean(text, rng)

    def _stored(self, rng: np.random.Generator, scene: world.Scene | None, kind: str) -> Utterance:
        assert self.bank is not None
        about = Question(kind)
        if scene is not None and kind in QUESTIONS:
            about = Question(kind, *world.sample_subject(rng, kind, scene))
        elif kind == "no_picture":
            about = Question(tuple(QUESTIONS)[rng.integers(len(QUESTIONS))])
        entry = self.bank.about(about, rng)
        if entry is None:
            return self.say(world.sample_ask(rng, scene, kind).text, rng)
        heard = entry.utterance(rng)
        if rng.random() < 0.5:
            heard = paced(heard, rng.uniform(0.87, 1.15))
        return self._swapped(heard, rng) if rng.random() < 0.2 else heard

    def _swapped(self, heard: Utterance, rng: np.random.Generator) -> Utterance:
        """The same question about something else: its name is cut from another utterance. Makes many sentences of few."""
        assert self.bank is not None
        own = subject(tuple(word for word, _, _ in heard.words))
        if own is None:
            return heard
        for _ in range(6):
            other = self.bank.any(rng).utterance(rng)
            theirs = subject(tuple(word for word, _, _ in other.words))
            if theirs is None or theirs[1] - theirs[0] != own[1] - own[0] or len(other.words) == 1:
                continue
            old, new = heard.words[own[0] : own[1]], other.words[theirs[0] : theirs[1]]
            alike = old[-1][0].endswith("s") == new[-1][0].endswith("s") and (old[0][0] == "orange") == (new[0][0] == "orange")
            if not alike or "thing" in new[-1][0] or "shape" in new[-1][0] or "thing" in old[-1][0] or "shape" in old[-1][0]:
                continue
            pieces = [part(heard, 0, own[0])] if own[0] else []
            pieces.append(part(other, *theirs))
            if own[1] < len(heard.words):
                pieces.append(part(heard, own[1], len(heard.words)))
            joined = join(pieces, [0.0] * (len(pieces) - 1))
            return joined if understand(joined.text) is not OTHER else heard
        return heard

    def altered(self, heard: Utterance, rng: np.random.Generator) -> Utterance:
        """Sometimes with a pause or an "um" before one of its words."""
        if len(heard.words) < 3 or rng.random() > 0.08:
            return heard
        at = int(rng.integers(1, len(heard.words)))
        um = self._um(rng) if rng.random() < 0.6 else np.zeros(1, np.float32)
        return hesitant(heard, at, um, (rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.4)))

    def _um(self, rng: np.random.Generator) -> np.ndarray:
        said = self.say(str(rng.choice(HESITATIONS)), rng, "flite" if rng.random() < 0.5 else "espeak")
        return said.pcm[said.words[0][1] : said.words[-1][2]] * np.float32(rng.uniform(0.4, 1))

    def _trailing(self, kept: Utterance, rng: np.random.Generator, silence: tuple[float, float]) -> Utterance:
        """With an "um" after the pause, and another pause."""
        after = Utterance("", np.zeros(int(rng.uniform(*silence) * RATE), np.float32), ())
        return join([kept, Utterance("", self._um(rng), ()), after], [0.0, 0.0])

    def fragments(self, rng: np.random.Generator) -> Utterance:
        """Pieces of several utterances one after the other: only who hears each word can write them down."""
        if self.bank is None:
            return self.say(world.sample_ask(rng, None, "other").text, rng)
        pieces = []
        for _ in range(int(rng.integers(2, 4))):
            whole = self.bank.any(rng).utterance(rng)
            first = int(rng.integers(len(whole.words)))
            piece = part(whole, first, min(len(whole.words), first + int(rng.integers(1, 5))))
            loudness = np.float32(rng.uniform(0.5, 1))
            pieces.append(Utterance(piece.text, piece.pcm * loudness, piece.words))
        return join(pieces, [float(rng.uniform(0, 0.25)) for _ in pieces[1:]])

    def pause(self, rng: np.random.Generator, silence: tuple[float, float]) -> tuple[Utterance, bool]:
        """A question that is whole or broken off, followed by so many seconds of silence, and whether it is whole."""
        kind = tuple(QUESTIONS)[rng.integers(len(QUESTIONS))] if rng.random() < 0.8 else "other"
        scene = world.sample_scene(rng, 384, 384) if kind != "other" else None
        for _ in range(20):
            _, heard = self.ask(rng, scene, kind)
            if whole := rng.random() < 0.5:
                return broken_off(heard, len(heard.words), rng.uniform(*silence)), whole
            ends = unfinished(tuple(word for word, _, _ in heard.words))
            if ends:
                kept = broken_off(heard, ends[rng.integers(len(ends))], rng.uniform(*silence))
                return (self._trailing(kept, rng, silence) if rng.random() < 0.2 else kept), whole
        raise AssertionError("twenty sentences that cannot be broken off")

    def beside(self, rng: np.random.Generator) -> np.ndarray:
        """Somebody else, for a crowd."""
        if self.people and (self.bank is None or rng.random() < 0.5):
            return self.people[rng.integers(len(self.people))].pcm()
        return self.bank.any(rng).utterance(rng).pcm if self.bank is not None else speech.clean("There is food.", rng).pcm

    def heard(self, utterance: Utterance, rng: np.random.Generator) -> Utterance:
        return augment(utterance, rng, self.beside if self.people or self.bank else None)

    def person(self, rng: np.random.Generator, longest: float) -> tuple[Utterance, bool]:
        """A recording of at most so many seconds, or a stretch of one, and whether it is a whole one."""
        for _ in range(10):
            recording = self.people[rng.integers(len(self.people))]
            pcm = recording.pcm()
            if len(pcm) <= longest * RATE and rng.random() < 0.7:
                return Utterance(recording.text, pcm, ()), True
        length = min(len(pcm), int(rng.uniform(1.5, longest) * RATE))
        at = int(rng.integers(len(pcm) - length + 1))
        return Utterance("", pcm[at : at + length], ()), False


def unfinished(words: tuple[str, ...]) -> list[int]:
    """After how many of the words somebody who stops has plainly not finished."""
    known = understand(" ".join(words)) is not OTHER
    return [
        count
        for count in range(1, len(words))
        if understand(" ".join(words[:count])) is OTHER and (words[count - 1] in OPEN_ENDED or (known and count > 1))
    ]


def recordings(folder: Path | None, held_out: bool) -> list[PersonRecording]:
    """Every fifth one is held out of training."""
    list_of_them = folder / "people.jsonl" if folder else None
    if folder is None or list_of_them is None or not list_of_them.exists():
        return []
    told = [json.loads(line) for line in list_of_them.read_text(encoding="utf-8").splitlines()]
    return [PersonRecording(folder / x["file"], x["text"]) for n, x in enumerate(told) if (n % 5 == 0) == held_out]


@cache
def _recording(file: Path) -> np.ndarray:
    pcm, rate = soundfile.read(file, dtype="float32")
    assert rate == RATE, file
    return np.asarray(pcm)
