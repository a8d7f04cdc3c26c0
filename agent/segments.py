"""Segments, the content of a row, and views made of them: counted, compared, extended.

A segment is token ids, sound or a picture. A picture is prefilled in one chunk; everything else in chunks of any size.
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
    """One block of soft tokens; boi and eoi come around it as ids. `positions`: how many soft tokens."""

    data: bytes
    budget: int
    positions: int

    @classmethod
    def of(cls, data: bytes, height: int, width: int, budget: int, patch: int) -> Picture:
        """From a picture file and its size in pixels."""
        height, width = target_size(height, width, budget, patch)
        return cls(data, budget, height * width // patch**2)


Segment = tuple[int, ...] | Sound | Picture


@dataclass(frozen=True)
class Evicted:
    """What a view no longer shows: a whole turn with its answer, a picture, or (`verbatim`) sound that became text."""

    of: int
    what: Literal["turn", "picture", "sound"]


@dataclass(frozen=True)
class View:
    """What a row should hold. Neighbouring segments of one kind are merged, so that equal views compare equal."""

    segments: tuple[Segment, ...]
    ahead: int  # positions before the live turn's sound; without sound, before that turn; without a live turn, all
    upto: int
    gone: tuple[Evicted, ...] = ()
    spent: tuple[int, ...] = ()  # entries whose payloads no later view needs, once a row holds this one: for Dropped

    @cached_property
    def positions(self) -> int:
        return sum(map(size, self.segments))

    def then(self, *segments: Segment) -> View:
        """This view with `segments` appended."""
        return replace(self, segments=merged([*self.segments, *segments]))

    def since(self, other: View) -> tuple[int, tuple[Segment, ...]]:
        """How many positions of a row that holds `other` can be kept, and the segments to append to them."""
        keep = 0
        for mine, its in zip(self.segments, other.segments, strict=False):
            keep += _shared(mine, its)
            if mine != its:
                break
        return keep, self.rest(keep)

    def first(self, at: int) -> View:
        """The first `at` positions; `at` must not be inside a picture."""
        segments: list[Segment] = []
        for segment in self.segments:
            room = at - sum(map(size, segments))
            if room <= 0:
                break
            segments.append(_head(segment, room))
        return replace(self, segments=tuple(segments))

    def rest(self, at: int) -> tuple[Segment, ...]:
        """The segments from position `at` on; `at` must not be inside a picture."""
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
    """In positions."""
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
    """The length of the common prefix of two segments, in positions."""
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
    """Joins neighbours of one kind and leaves out empty segments."""
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
    """An open audio block: boa, frames, and where it is closed and reopened, because Gemma takes at most 30 s in one block.

    The decision depends on the frames so far alone, so that live input and a rebuilt row get the same tokens. From 20 s on the
    block may end after any frame. A frame's level is that of the loudest of the last four, since the closure of a plosive is no
    pause. The block ends where that level ranks among its lowest: below all others at 20 s, in the lowest quarter at 25 s,
    anywhere at 30 s.
    """

    PATIENT, LONGEST = 500, 750  # positions of 40 ms: 20 s, 30 s

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._due = [prompt.boa]
        self._recent: deque[int] = deque(maxlen=4)
        self._levels: list[int] = []

    def feed(self, sound: Sound) -> list[Segment]:
        """The sound, with the control tokens that belong before and inside it."""
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
    """The parts of an open turn as segments, after its opening tokens. Live input and a rebuilt row get the same tokens. `patch`:
    the side of the model's soft token in pixels."""

    def __init__(self, prompt: Prompt, patch: int) -> None:
        self._prompt, self._patch = prompt, patch
        self._run: AudioRun | None = None
        self._has_timestamp = self._after_text = False

    def feed(self, part: Sound | Typed | Seen) -> list[Segment]:
        if isinstance(part, Sound):
            self._after_text, self._run = False, self._run or AudioRun(self._prompt)
            return self._run.feed(part)
        ids = self._words(part.text.strip()) if isinstance(part, Typed) else self._before(part)
        if not ids:
            return []
        ended: list[Segment] = [(self._prompt.eoa,)] if self._run else []
        self._run, self._after_text = None, isinstance(part, Typed)
        if isinstance(part, Typed):
            return [*ended, ids]
        return [*ended, ids, Picture.of(part.data, part.height, part.width, part.budget, self._patch), (self._prompt.eoi,)]

    def end(self) -> list[int]:
        """The tokens that close an open audio block."""
        return [self._prompt.eoa] if self._run else []

    def _words(self, text: str) -> tuple[int, ...]:
        """On a new line after other text, so that separate texts do not run together."""
        return tuple(self._prompt.tokenizer.encode("\n" + text) if self._after_text and text else self._prompt.text(text))

    def _before(self, picture: Seen) -> tuple[int, ...]:
        if picture.seconds is None:
            return (self._prompt.boi,)
        stamp = self._prompt.timestamp(picture.seconds, first=not (self._has_timestamp or self._after_text))
        self._has_timestamp = True
        return (*stamp, self._prompt.boi)
