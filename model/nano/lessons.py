"""Conversations about the small world, as the tensors that nano is trained on.

A lesson is a whole conversation in the chat format that the product speaks: pictures come and change, asks are typed or
spoken, answers follow. What is learned: every token of the answers, and densely, through the same head, at each patch of
a picture the colour and shape that cover it (else "no") and at each frame of speech the word that has just ended. The
dense targets are what makes it learn at all: without them sight stood still for 30,000 pictures.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from agent.prompt import Prompt
from model.nano import cover, drawers, world
from model.nano.phrases import NOT_UNDERSTOOD
from model.nano.speakers import Speakers
from model.nano.typed import typed
from model.nano.utterance import Utterance
from model.pixels import patches as cut
from model.tokenizer import Tokenizer
from model.weights import read_config

# What each budget makes of 4:3, 16:9, 1:1 and 3:4, and how many of the pictures have it.
SIZES = {
    70: ((432, 336), (432, 336), (528, 288), (384, 384), (336, 432)),
    140: ((624, 480), (720, 384), (528, 528), (480, 624)),
    280: ((912, 672), (1056, 576), (768, 768), (672, 912)),
}
BUDGETS = {70: 0.8, 140: 0.14, 280: 0.06}
SHAPES = ((12, 352), (8, 528))  # conversations and positions of a batch: most are short, some go on
LONG = 0.3  # share of the long ones
PAST = 0.35  # share of the conversations that begin with turns that are over
TURN_DETECTION = json.loads((Path(__file__).parent / "turn_detection.json").read_text(encoding="utf-8"))
SYSTEMS = ("You are attend, a helpful assistant that listens and watches.", "You are a helpful assistant.", "Answer briefly.")
ANSWER, SIGHT, HEARING = range(3)
KINDS = (*world.KINDS, "finished")
# More of what is hard to learn, less of what is learnt in minutes, than people ask.
ASKS = {
    "describe": 4,
    "where": 7,
    "count": 4,
    "colour": 4,
    "exists": 3,
    "other": 2,
    "hello": 0.5,
    "name": 0.5,
    "ability": 0.5,
    "thanks": 0.5,
    "goodbye": 0.5,
}
ASKS_BLIND = {"no_picture": 4, "other": 4, "hello": 1, "name": 1, "ability": 1, "thanks": 1, "goodbye": 1}
# Of the turns that are spoken.
TRANSCRIBED, FRAGMENTS, PAUSES, PEOPLE = 0.26, 0.1, 0.1, 0.06


@dataclass
class Lesson:
    ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    frames_at: list[int] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    patches_at: list[int] = field(default_factory=list)
    outlines: list[np.ndarray] = field(default_factory=list)  # of each patch what is painted, bool [n, points]
    extents: list[np.ndarray] = field(default_factory=list)  # of each patch the box of its thing, int [n, 4]
    tallies: list[np.ndarray] = field(default_factory=list)  # of each patch what answers need of its thing, int [n, 3]
    asked: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # position, kind, colour, shape, found
    things: list[list[int]] = field(default_factory=list)  # the positions of each thing of the newest picture
    looks: list[tuple[int, list[int]]] = field(default_factory=list)  # position, and those of the things written about there
    targets: list[tuple[int, int, float, int]] = field(default_factory=list)  # position, token, weight, what it teaches

    def write(self, ids: list[int]) -> None:
        self.ids += ids
        self.blocks += [-1] * len(ids)


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [B, T]
    blocks: Tensor  # [B, T]
    frames: Tensor  # [m, samples]
    frames_at: Tensor  # [m] places in B * T
    patches: Tensor  # [k, 3 * patch^2]
    places: Tensor  # [k, 2]
    patches_at: Tensor  # [k]
    outlines: Tensor  # [k, points] 1 where a thing covers the point
    extents: Tensor  # [k, 4] the covering thing's box in tens of thousandths, -1 where there is none
    tallies: Tensor  # [k, 3] of the covering thing, -1 where there is none
    asked: Tensor  # [a, 5]: place in B * T where an answer begins, kind, colour, shape (0: any), found (-1: nothing to find)
    looks_at: Tensor  # [n] places in B * T where something is written about things
    looks_to: Tensor  # bool [n, T]: where those things are
    targets: Tensor  # [t, 3]: place in B * T, token, what it teaches
    weights: Tensor  # [t]


class Teacher:
    """Makes lessons. `ease` 1 is a beginner's world of few large shapes, 0 the whole of it. Of the rest most questions are
    spoken; in `galleries`, a share of the lessons, one picture follows the other with typed questions."""

    def __init__(
        self, folder: Path, speakers: Speakers | None = None, photos: Path | None = None, galleries: float = 0.2
    ) -> None:
        self.config = read_config(folder)
        self.tokenizer = Tokenizer.load(folder)
        self.prompt = Prompt(self.tokenizer, self.config.media)
        self.speakers, self.drawers, self.galleries = speakers or Speakers(), drawers.drawers(photos), galleries
        word = self._word
        self.none = word("no")
        self.silence = self.tokenizer.encode(".")[0]
        self.seen = [(word(colour), word(shape)) for colour in world.COLOURS for shape in world.SHAPES]
        self.close = self.tokenizer.special("<turn|>")
        # A coordinate that is off by ten is nearly right, and is taught so.
        numbers = {n: self.tokenizer.encode(str(n))[0] for n in range(0, 1001, 10)}
        self.near = {id: [numbers[m] for m in (n - 10, n + 10) if m in numbers] for n, id in numbers.items()}

    def _word(self, word: str) -> int:
        """The token of a word inside a sentence; of a word out of the vocabulary its first piece."""
        return self.tokenizer.encode(" " + word)[0]

    def lesson(self, rng: np.random.Generator, ease: float = 0.0, length: int = 352) -> Lesson:
        lesson, prompt = Lesson(), self.prompt
        system = str(rng.choice(SYSTEMS)) if rng.random() < 0.1 else None
        lesson.write(prompt.begin(system))
        blind, gallery = rng.random() < 0.08, rng.random() < self.galleries
        scene, drawer = None, drawers.pick(self.drawers, rng)
        over = int(rng.integers(1, 5)) if rng.random() < PAST else 0
        while (room := length - len(lesson.ids)) > 56:
            another = rng.random() < (0.5 if gallery else 0.25) and room > (100 if gallery else 150)
            budget = None
            if not blind and (scene is None or another):
                budget = int(rng.choice(tuple(BUDGETS), p=tuple(BUDGETS.values())))
                budget = budget if room > budget + 40 + 70 * (not gallery) else 70
                width, height = SIZES[budget][rng.integers(len(SIZES[budget]))]
                most, least = 4 - round(3 * ease), 1 / 6 + ease / 8
                drawer = drawers.pick(self.drawers, rng)
                scene = drawers.scene(drawer, rng, *self._camera(rng, width, height), count=(1, most), size=(least, 1 / 2))
            if over > 0 and room > 170:
                over -= 1
                self._past(lesson, rng, scene, drawer, budget)
                continue
            self._turn(lesson, rng, scene, drawer, budget, aloud=not gallery and rng.random() < 0.8, room=room)
        return lesson

    def _turn(
        self,
        lesson: Lesson,
        rng: np.random.Generator,
        scene: world.Scene | None,
        drawer: drawers.Drawer,
        budget: int | None,
        aloud: bool,
        room: int,
    ) -> None:
        """One question and its answer: the picture (if there is a budget for one), the sound and the words in any order
        that life gives them."""
        prompt = self.prompt
        ask, parts = self._spoken(rng, scene, room) if aloud else self._typed(rng, scene)
        if budget is not None:
            parts.insert(int(rng.integers(len(parts) + 1)), budget)
        self._say(lesson, rng, scene, drawer, parts)
        lesson.write(prompt.close_turn())
        self._answer(lesson, ask, scene)

    def _past(
        self, lesson: Lesson, rng: np.random.Generator, scene: world.Scene | None, drawer: drawers.Drawer, budget: int | None
    ) -> None:
        """A turn that is over, as a conversation keeps it: what was shown, the words, and the answer without its thought."""
        ask = world.sample_ask(rng, scene, self._kind(rng, scene))
        parts: list[Utterance | str | int] = [world.spoken(ask.text)]
        if budget is not None:
            parts.insert(int(rng.integers(2)), budget)
        self._say(lesson, rng, scene, drawer, parts)
        lesson.write(self.prompt.end_turn())
        lesson.write(self.prompt.answer(ask.answer))

    def _say(
        self,
        lesson: Lesson,
        rng: np.random.Generator,
        scene: world.Scene | None,
        drawer: drawers.Drawer,
        parts: list[Utterance | str | int],
    ) -> None:
        prompt = self.prompt
        lesson.write(prompt.open_turn())
        for part in parts:
            match part:
                case Utterance():
                    self._hear(lesson, rng, part)
                case int():
                    assert scene is not None
                    self._see(lesson, rng, scene, drawer, part)
                case str():
                    lesson.write(prompt.text(part))

    def _typed(self, rng: np.random.Generator, scene: world.Scene | None) -> tuple[world.Ask, list[Utterance | str | int]]:
        """As somebody types it, or as a transcript of speech that is over has it."""
        ask = world.sample_ask(rng, scene, self._kind(rng, scene))
        return ask, [typed(ask.text, rng) if rng.random() < 0.8 else world.spoken(ask.text)]

    def _spoken(
        self, rng: np.random.Generator, scene: world.Scene | None, room: int
    ) -> tuple[world.Ask, list[Utterance | str | int]]:
        """A question, or speech of any kind and the order to write it down, or a pause and the question whether it ends there."""
        speakers, what, written = self.speakers, rng.random(), world.sample_ask(rng, None, "transcribe").text
        if what < PEOPLE and speakers.people:
            heard, whole = speakers.person(rng, longest=min(6.0, max(2.0, (room - 30) / 25)))
            if whole and rng.random() < 0.25:
                transcript = world.spoken(heard.text)
                return world.Ask("transcribe", written, transcript), [heard, written]
            return world.Ask("other", heard.text, NOT_UNDERSTOOD), [heard]
        if what < PEOPLE + PAUSES:
            told = TURN_DETECTION
            heard, whole = speakers.pause(rng, tuple(ms / 1000 for ms in told["silence_ms"]))
            return world.Ask("finished", told["question"], told["finished" if whole else "unfinished"]), [heard, told["question"]]
        if what < PEOPLE + PAUSES + TRANSCRIBED:
            if rng.random() < FRAGMENTS / TRANSCRIBED:
                heard = speakers.fragments(rng)
            else:
                _, heard = speakers.ask(rng, scene, self._kind(rng, scene))
            parts: list[Utterance | str | int] = [heard, written]
            transcript = " ".join(word for word, _, _ in heard.words)
            return world.Ask("transcribe", written, transcript), parts if rng.random() < 0.8 else parts[::-1]
        ask, heard = speakers.ask(rng, scene, self._kind(rng, scene))
        return ask, [heard]

    def _answer(self, lesson: Lesson, ask: world.Ask, scene: world.Scene | None) -> None:
        prompt = self.prompt
        answer = [*prompt.text(ask.answer), self.close]
        start = len(lesson.ids) - 1
        colour, shape = (1 + all.index(x) if x else 0 for all, x in ((world.COLOURS, ask.colour), (world.SHAPES, ask.shape)))
        found = -1 if ask.found is None or scene is None else ask.found
        lesson.asked.append((start, KINDS.index(ask.kind), colour, shape, found))
        for i, token in enumerate(answer):
            near = self.near.get(token, [])
            lesson.targets.append((start + i, token, 1 - 0.25 * len(near), ANSWER))
            lesson.targets += [(start + i, other, 0.25, ANSWER) for other in near]
        if found == 0:  # nothing to look at: it rests on itself, so that a yes can be told from a no
            lesson.looks += [(at, [at]) for at in range(start, start + len(answer))]
        elif found > 0:
            reader, written = self.tokenizer.stream(), 0
            for i, token in enumerate(answer[:-1]):
                about = next(things for end, things in ask.about if end > written or end == len(ask.answer))
                if where := [at for thing in about for at in lesson.things[thing]]:
                    lesson.looks.append((start + i, where))
                written += len(reader.push(token))
        lesson.write(answer + prompt.after_answer())

    def _kind(self, rng: np.random.Generator, scene: world.Scene | None) -> str:
        shares = ASKS_BLIND if scene is None else ASKS
        weights = np.array(list(shares.values()))
        return list(shares)[int(rng.choice(len(weights), p=weights / weights.sum()))]

    def _camera(self, rng: np.random.Generator, width: int, height: int) -> tuple[int, int]:
        """Pixels of a picture that a budget makes width × height: mostly just that, else as a camera or a client has it."""
        if rng.random() < 0.7:
            return width, height
        scale = rng.uniform(0.6, 1.6)
        return round(width * scale * rng.uniform(0.96, 1.04)), round(height * scale)

    def _see(self, lesson: Lesson, rng: np.random.Generator, scene: world.Scene, drawer: drawers.Drawer, budget: int) -> None:
        media, picture = self.config.media, drawer.draw(scene, rng)
        patches, places = cut(picture, budget, self.config.patch)
        grid = int(places[:, 1].max()) + 1, int(places[:, 0].max()) + 1
        lesson.write([media.boi])
        start, block = len(lesson.ids), max(lesson.blocks) + 1
        lesson.patches.append(patches)
        lesson.places.append(places)
        lesson.patches_at += range(start, start + len(patches))
        lesson.ids += [media.image] * len(patches)
        lesson.blocks += [block] * len(patches)
        covering = cover.covering(scene, grid)
        lesson.things = [(start + np.flatnonzero(covering == n)).tolist() for n in range(len(scene.things))]
        lesson.outlines.append(np.any(cover.patch_cover(scene, grid), 0))
        lesson.extents.append(cover.patch_boxes(scene, grid))
        lesson.tallies.append(cover.patch_tallies(scene, grid))
        for i, label in enumerate(cover.patch_labels(scene, grid)):
            if label == 0:
                lesson.targets.append((start + i, self.none, 0.5, SIGHT))
            else:
                lesson.targets += [(start + i, word, 0.75, SIGHT) for word in self.seen[label - 1]]
        lesson.write([media.eoi])

    def _hear(self, lesson: Lesson, rng: np.random.Generator, said: Utterance) -> None:
        media, heard = self.config.media, self.speakers.heard(said, rng)
        size = self.config.frame
        pcm = np.pad(heard.pcm, (0, -len(heard.pcm) % size))
        frames = pcm.reshape(-1, size)
        lesson.write([media.boa])
        start = len(lesson.ids)
        lesson.frames.append(frames)
        lesson.frames_at += range(start, start + len(frames))
        lesson.write([media.audio] * len(frames))
        if heard.words:
            words = np.full(len(frames), self.silence)
            for word, _, end in heard.words:
                words[end // size + 2 :] = self._word(word)
            lesson.targets += [(start + i, int(word), 1.0, HEARING) for i, word in enumerate(words)]
        lesson.write([media.eoa])


def collate(lessons: list[Lesson], length: int) -> Batch:
    """All lessons cut or padded to `length`, so that every batch has one shape."""
    ids = torch.zeros(len(lessons), length, dtype=torch.long)
    blocks = torch.full((len(lessons), length), -1)
    for i, lesson in enumerate(lessons):
        kept = min(length, len(lesson.ids))
        ids[i, :kept] = torch.tensor(lesson.ids[:kept])
        blocks[i, :kept] = torch.tensor(lesson.blocks[:kept])

    def flat(name: str) -> Tensor:
        return torch.tensor([i * length + at for i, x in enumerate(lessons) for at in getattr(x, name) if at < length])

    def media(name: str, size: int, places: str) -> Tensor:
        """What stands at the kept places, in order."""
        parts = [
            torch.as_tensor(np.concatenate(getattr(x, name)))[: sum(at < length for at in getattr(x, places))]
            for x in lessons
            if getattr(x, name)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, size)

    targets = [
        (i * length + at, token, kind, weight)
        for i, x in enumerate(lessons)
        for at, token, weight, kind in x.targets
        if at < length
    ]
    looks = [(i, at, where) for i, x in enumerate(lessons) for at, where in x.looks if at < length]
    looks_to = torch.zeros(len(looks), length, dtype=torch.bool)
    for look, (_, _, where) in zip(looks_to, looks, strict=True):
        look[where] = True
    return Batch(
        ids,
        blocks,
        media("frames", 640, "frames_at"),
        flat("frames_at").long(),
        media("patches", 6912, "patches_at"),
        media("places", 2, "patches_at").long(),
        flat("patches_at").long(),
        media("outlines", cover.FINE**2, "patches_at").float(),
        media("extents", 4, "patches_at").long(),
        media("tallies", len(cover.TALLIES), "patches_at").long(),
        torch.tensor([(i * length + at, *rest) for i, x in enumerate(lessons) for at, *rest in x.asked if at < length])
        .view(-1, 5)
        .long(),
        torch.tensor([i * length + at for i, at, _ in looks]).long(),
        looks_to,
        torch.tensor([t[:3] for t in targets]),
        torch.tensor([t[3] for t in targets]),
    )


class Lessons(IterableDataset[Batch]):
    """Batches without end, from `start` on; each worker makes every n-th, and the same seed makes the same ones.

    `shapes` are the conversations and positions that a batch may have; the first is the usual one."""

    def __init__(
        self,
        folder: Path,
        shapes: tuple[tuple[int, int], ...],
        seed: int,
        start: int,
        ease_steps: int,
        bank: Path | None = None,
        people: Path | None = None,
        photos: Path | None = None,
    ) -> None:
        self.folder, self.shapes = folder, shapes
        self.seed, self.start, self.ease_steps = seed, start, ease_steps
        self.bank, self.people, self.photos = bank, people, photos

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        if worker:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # that of the process it was forked from is not for it
        teacher, step = Teacher(self.folder, Speakers(self.bank, self.people), self.photos), self.start + first
        while True:
            rng = np.random.default_rng((self.seed, step))
            ease = max(0.0, 1 - step / self.ease_steps)
            rows, length = self.shapes[0 if rng.random() > LONG else -1]
            yield collate([teacher.lesson(rng, ease, length) for _ in range(rows)], length)
            step += stride
