"""The input audio buffer: what a client appends, clears and commits → what a session hears. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from agent import events
from agent.events import Input
from streams.frames import FRAME, RATE, Audio
from web.audio import Format, Resampler, Samples
from web.given import Refused

LONGEST = 110  # seconds of sound that may wait for a commit: a turn has 120
SHORTEST = RATE // 10  # samples of a commit


class Buffer:
    """With turn detection everything is heard as it comes. Without it, and where sound is a part of an item, the turn is opened
    here; while an answer is being given such turns wait, as they would interrupt it. So does all sound where talk is not to
    interrupt an answer (`patient`)."""

    def __init__(self, put: Callable[[Input], None], new: Callable[[str], str], format: Format) -> None:
        self._put, self._new = put, new
        self._format, self._resampler = format, Resampler(format.rate, RATE)
        self.manual = self.patient = False  # `manual`: the client commits
        self.answering = False
        self._at = 0  # samples that were handed on
        self._item: str | None = None  # of the commit to come
        self._samples = 0  # in it
        self._pressed: deque[str] = deque()  # items whose turns the session will begin, as it was asked to
        self._held: list[Input] = []
        self._waiting = 0  # samples in it

    def begun(self) -> str | None:
        """A turn has begun: the item that it was opened for, if it was here."""
        return self._pressed.popleft() if self._pressed else None

    def set(self, format: Format, manual: bool, patient: bool) -> None:
        if format != self._format:
            self._format, self._resampler = format, Resampler(format.rate, RATE)
        if self.manual and not manual and self._item:
            self._drop()
        self.manual, self.patient = manual, patient

    def append(self, samples: Samples) -> None:
        """float32 at the format's rate."""
        if self.manual and self._samples + len(samples) * RATE // self._format.rate > LONGEST * RATE:
            raise Refused(f"more than {LONGEST} seconds wait for a commit", "input_audio_buffer_full", "audio")
        if self._waiting > LONGEST * RATE:
            raise Refused(f"more than {LONGEST} seconds wait for the end of an answer", "input_audio_buffer_full", "audio")
        self._hear(self._resampler.push(samples))

    def commit(self) -> str:
        """The item that the sound becomes."""
        if self._item:
            self._hear(self._resampler.flush())
        if self._item is None or self._samples < SHORTEST:
            ms = self._samples * 1000 // RATE
            raise Refused(f"a commit needs 100 ms of audio, and there are {ms} ms", "input_audio_buffer_commit_empty")
        item, self._item, self._samples = self._item, None, 0
        self._close()
        return item

    def clear(self) -> None:
        self._resampler = Resampler(self._format.rate, RATE)
        self._drop()

    def add(self, item: str, samples: Samples) -> None:
        """A turn of its own, at 16 kHz."""
        self._press(item)
        self._feed(samples, ours=True)
        self._close()

    def put(self, input: Input, ours: bool = True) -> None:
        """`ours`: it belongs after what is held back."""
        opens = isinstance(input, events.Press) or self.patient
        if ours and self.answering and (opens or self._held):
            self._held.append(input)
            self._waiting += len(input.samples) if isinstance(input, Audio) else 0
        else:
            self._put(input)

    def answered(self) -> None:
        self.answering, self._waiting = False, 0
        for input in self._held:
            self._put(input)
        self._held.clear()

    def _hear(self, samples: Samples) -> None:
        if self.manual and len(samples):
            if self._item is None:
                self._item = self._new("item")
                self._press(self._item)
            self._samples += len(samples)
        self._feed(samples, ours=self.manual or self.patient)

    def _press(self, item: str) -> None:
        self._pressed.append(item)
        self.put(events.Press())

    def _feed(self, samples: Samples, ours: bool) -> None:
        if len(samples):
            self.put(Audio(np.ascontiguousarray(samples), self._at), ours)
            self._at += len(samples)

    def _close(self) -> None:
        self._feed(np.zeros(-self._at % FRAME, np.float32), ours=True)  # the session hears whole frames
        self.put(events.Commit(ask=False))

    def _drop(self) -> None:
        if self._held and self._item:
            while not isinstance(held := self._held.pop(), events.Press):
                self._waiting -= len(held.samples) if isinstance(held, Audio) else 0
            self._pressed.pop()
        elif self._held and not self.manual:
            self._held, self._waiting = self._turns_held(), 0
        else:
            self._put(events.Forget())
        self._item, self._samples = None, 0

    def _turns_held(self) -> list[Input]:
        """What waits, but for the sound between the turns that were opened here."""
        kept: list[Input] = []
        inside = False
        for held in self._held:
            inside = (inside or isinstance(held, events.Press)) and not isinstance(held, events.Commit)
            kept += [] if isinstance(held, Audio) and not inside else [held]
        return kept
