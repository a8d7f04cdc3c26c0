"""The input audio buffer: what a client appends, clears and commits → what a session hears. Pure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agent import events
from agent.events import Input
from streams.frames import RATE, Audio
from web.audio import Format, Resampler, Samples
from web.given import Refused

LONGEST = 110  # seconds of sound that may wait for a commit, or be an item: a turn has 120
SHORTEST = RATE // 10  # samples of a commit


class Buffer:
    """With turn detection the session judges what it hears. Without it (`manual`) the session keeps what comes until it is
    committed. Where talk is not to interrupt an answer (`patient`), sound waits here until the answer is over."""

    def __init__(self, put: Callable[[Input], None], format: Format) -> None:
        self._put = put
        self._format, self._resampler = format, Resampler(format.rate, RATE)
        self.manual = self.patient = False
        self.answering = False
        self._odd = b""  # the first byte of a sample whose second one comes with the next append
        self._at = 0  # samples that were handed on
        self._samples = 0  # that wait for a commit
        self._held: list[Audio] = []  # until the answer is over
        self._waiting = 0  # samples in it

    def set(self, format: Format, manual: bool, patient: bool) -> None:
        if format != self._format:
            self._format, self._resampler, self._odd = format, Resampler(format.rate, RATE), b""
        if self.manual and not manual:
            self.clear()
        self.manual, self.patient = manual, patient

    def append(self, data: bytes) -> None:
        """Of any length: a stream may be cut in the middle of a sample."""
        whole = self._odd + data
        odd = len(whole) % self._format.width
        samples = self._format.decode(whole[: len(whole) - odd])
        more = len(samples) * RATE // self._format.rate
        if self.manual and self._samples + more > LONGEST * RATE:
            raise Refused(f"more than {LONGEST} seconds wait for a commit", "input_audio_buffer_full", "audio")
        if self._waiting > LONGEST * RATE:
            raise Refused(f"more than {LONGEST} seconds wait for the end of an answer", "input_audio_buffer_full", "audio")
        self._odd = whole[len(whole) - odd :]
        self._samples += more if self.manual else 0
        self._hear(self._resampler.push(samples))

    def commit(self, item: str) -> None:
        """The sound becomes this item."""
        if self._samples < SHORTEST:
            ms = self._samples * 1000 // RATE
            raise Refused(f"a commit needs 100 ms of audio, and there are {ms} ms", "input_audio_buffer_commit_empty")
        self._hear(self._resampler.flush())
        self._odd, self._samples = b"", 0
        self._put(events.Commit(ask=False, name=item))

    def clear(self) -> None:
        self._resampler, self._odd = Resampler(self._format.rate, RATE), b""
        self._held.clear()
        self._samples = self._waiting = 0
        self._put(events.Forget())

    def answered(self) -> None:
        """No answer is being given, and none has been asked for."""
        self.answering, self._waiting = False, 0
        for sound in self._held:
            self._put(sound)
        self._held.clear()

    def _hear(self, samples: Samples) -> None:
        if not len(samples):
            return
        sound = Audio(np.ascontiguousarray(samples), self._at)
        self._at += len(samples)
        if self.patient and self.answering and not self.manual:
            self._waiting += len(samples)
            self._held.append(sound)
        else:
            self._put(sound)
