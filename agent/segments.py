"""What a row can hold, as segments, and views made of them: counted, compared, continued.

A segment is ids, sound or a picture. A picture goes into a row in one call; everything else in any chunks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from agent.prompt import Prompt
from agent.tape import Seen, Sound, Typed
from model.pixels import target_size


@dataclass(frozen=True)
class Picture:
    """One block of soft tokens; boi and eoi stand around it as ids."""

    data: bytes
    budget: int
    positions: int

    @classmethod
    def of(cls, data: bytes, height: int, width: int, budget: int, patch: int) -> Picture:
        """Of a picture's file and its size in pixels."""
        height, width = target_size(height, width, budget, patch)
        return cls(data, budget, height * width // patch**2)


Segment = tuple[int, ...] | Sound | Picture


@dataclass(frozen=True)
class Evicted:
    """What a view lets go of: the words and all of a turn and its answer, a picture, or (`verbatim`) sound that became text."""

    of: int
    what: Literal["turn", "picture", "sound"]


@dataclass(frozen=True)
class View:
    """What a row should hold. Neighbouring segments of one kind are one, so equal views compare equal."""

    segments: tuple[Segment, ...]
    ahead: int  # positions before the sound of the live turn, or before the live turn, or all of them
    upto: int
    gone: tuple[Evicted, ...] = ()
    spent: tuple[int, ...] = ()  # payloads that no later view wants, once a row holds this one: for Dropped

    @cached_property
    def positions(self) -> int:
        return sum(map(size, self.segments))

    def then(self, *segments: Segment) -> View:
        """This and what was appended since."""
        return replace(self, segments=merged([*self.segments, *segments]))

    def since(self, other: View) -> tuple[int, tuple[Segment, ...]]:
        """How many positions of a row that holds `other` can stay, and what is to be appended to those."""
        keep = 0
        for mine, its in zip(self.segments, other.segments, strict=False):
            keep += _shared(mine, its)
            if mine != its:
                break
        return keep, self.rest(keep)

    def first(self, at: int) -> View:
        """The first `at` positions, which do not end inside a picture."""
        segments: list[Segment] = []
        for segment in self.segments:
            room = at - sum(map(size, segments))
            if room <= 0:
                break
            segments.append(_head(segment, room))
        return replace(self, segments=tuple(segments))

    def rest(self, at: int) -> tuple[Segment, ...]:
        """The segments from position `at` on, which is not inside a picture."""
        out: list[Segment] = []
        for segment in self.segments:
            if at >= size(segment):
                at -= size(segment)
                continue
            out.append(_tail(segment, at))
            at = 0
        assert at == 0, "past the end of the view"
        return tuple(out)


def size(segment: Segment) -> int:
    return len(segment) if isinstance(segment, tuple) else segment.positions


def _tail(segment: Segment, at: int) -> Segment:
    if at == 0:
        return segment
    assert not isinstance(segment, Picture), "a picture is one block"
    return segment[at:] if isinstance(segment, tuple) else replace(segment, data=segment.data[2 * segment.frame * at :])


def _head(segment: Segment, count: int) -> Segment:
    if count >= size(segment):
        return segment
    assert not isinstance(segment, Picture), "a picture is one block"
    return segment[:count] if isinstance(segment, tuple) else replace(segment, data=segment.data[: 2 * segment.frame * count])


def _shared(a: Segment, b: Segment) -> int:
    """Positions that two segments have in common at their beginning."""
    if a == b:
        return size(a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if isinstance(a, Sound) and isinstance(b, Sound) and a.frame == b.frame:
        count = min(a.positions, b.positions)
        same = (a.samples[:count] == b.samples[:count]).all(axis=1)
        return count if same.all() else int(same.argmin())
    return 0


def merged(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    groups: list[list[Segment]] = []
    for segment in segments:
        if size(segment) == 0:
            continue
        last = groups[-1][0] if groups else None
        alike = type(last) is type(segment) and not isinstance(segment, Picture)
        if alike and getattr(last, "frame", 0) == getattr(segment, "frame", 0):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return tuple(group[0] if len(group) == 1 else _joined(group) for group in groups)


def _joined(group: list[Segment]) -> Segment:
    if isinstance(group[0], Sound):
        return Sound(b"".join(sound.data for sound in group if isinstance(sound, Sound)), group[0].frame)
    return tuple(id for ids in group if isinstance(ids, tuple) for id in ids)


class AudioRun:
    """An open run of sound: boa, frames, and where it is closed and opened again, which Gemma wants within 30 s.

    The decision needs the frames so far and nothing else, so that live feeding and rebuilding come to the same. From 20 s on
    the run may end after any frame; the level there is that of the loudest of the last four frames, since the closure of a
    plosive is no pause. It ends where that level ranks among the run's lowest: lower than all at 20 s, among the lowest
    quarter at 25 s, anywhere at 30 s.
    """

    PATIENT, LONGEST = 500, 750  # positions of 40 ms: 20 s, 30 s

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._due = [prompt.boa]
        self._recent: deque[int] = deque(maxlen=4)
        self._levels: list[int] = []

    def feed(self, sound: Sound) -> list[Segment]:
        """The sound, with the control tokens that are due before and within it."""
        out: list[Segment] = []
        pcm = np.frombuffer(sound.data, "<i2").reshape(-1, sound.frame)
        start = 0
        for index, energy in enumerate((pcm.astype(np.int64) ** 2).sum(axis=1).tolist()):  # integers: the same everywhere
            if self._due:
                out += [replace(sound, data=pcm[start:index].tobytes()), tuple(self._due)]
                start, self._due = index, []
                self._recent.clear()
                self._levels.clear()
            if self._ends(energy):
                self._due = [self._prompt.eoa, self._prompt.boa]
        out.append(replace(sound, data=pcm[start:].tobytes()))
        return [segment for segment in out if size(segment)]

    def _ends(self, energy: int) -> bool:
        self._recent.append(energy)
        level = max(self._recent)
        lower = bisect_left(self._levels, level)
        insort(self._levels, level)
        count, over, span = len(self._levels), len(self._levels) - self.PATIENT, self.LONGEST - self.PATIENT
        return count >= self.LONGEST or (over >= 0 and lower * span**2 <= count * over**2)


class TurnBuilder:
    """An open turn, part by part, behind its opening: what each part adds to a row. As with sound, live feeding and rebuilding
    come to the same. `patch`: the side in pixels of the model's soft token."""

    def __init__(self, prompt: Prompt, patch: int) -> None:
        self._prompt, self._patch = prompt, patch
        self._run: AudioRun | None = None
        self._timed = self._glued = False

    def feed(self, part: Sound | Typed | Seen) -> list[Segment]:
        if isinstance(part, Sound):
            self._glued, self._run = False, self._run or AudioRun(self._prompt)
            return self._run.feed(part)
        ids = self._words(part.text.strip()) if isinstance(part, Typed) else self._before(part)
        if not ids:
            return []
        ended: list[Segment] = [(self._prompt.eoa,)] if self._run else []
        self._run, self._glued = None, isinstance(part, Typed)
        if isinstance(part, Typed):
            return [*ended, ids]
        return [*ended, ids, Picture.of(part.data, part.height, part.width, part.budget, self._patch), (self._prompt.eoi,)]

    def end(self) -> list[int]:
        """What closes the sound that is open."""
        return [self._prompt.eoa] if self._run else []

    def _words(self, text: str) -> tuple[int, ...]:
        """A line of its own after other words: what was said does not run into what was typed."""
        return tuple(self._prompt.tokenizer.encode("\n" + text) if self._glued and text else self._prompt.text(text))

    def _before(self, picture: Seen) -> tuple[int, ...]:
        if picture.seconds is None:
            return (self._prompt.boi,)
        stamp = self._prompt.timestamp(picture.seconds, first=not (self._timed or self._glued))
        self._timed = True
        return (*stamp, self._prompt.boi)
