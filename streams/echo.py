"""What a microphone hears of the speaker beside it is taken out, so that nobody is interrupted by their own voice.

An echo is told from a voice by its level: how loud the speaker comes back is measured while it speaks, and what is clearly
louder passes as it is. So a headset leaves the way free after a second of speech, and beside a loudspeaker one must speak up to
interrupt. Where the extra `aec` is installed, WebRTC's echo canceller subtracts what it can of the rest, and what is left is
told by its level in turn. (Alone it will not do: where there is no echo it took a voice for one, for 1.2 s.)
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from streams.frames import FRAME, RATE

Samples = NDArray[np.float32]

CHUNK = RATE // 100  # samples that the canceller takes
AHEAD = 3 * FRAME  # samples of the speaker that may wait for their frame of the microphone
QUIET = 1e-3  # level of the speaker under which it says nothing
ROOM = 14  # frames after which a sound has come back, through buffers and room: 560 ms
LEARN = 20  # frames of speech before anything passes: 0.8 s
LOUDER = 2.5  # than ever came back: 8 dB
SLOPE = 0.997  # a frame: in ten seconds of speech the loudest echo counts half
RISE = 1.03  # a frame, at most, once it is known
STAY = 8  # frames that the way stays free after a voice, or every soft syllable were lost


class Echo:
    """`far` is told what the speaker gets, `clean` gives the microphone's frame without it."""

    def __init__(self, cancel: bool = True) -> None:
        self._canceller = _canceller() if cancel else None
        self.cancels = self._canceller is not None
        self._lock = threading.Lock()
        self._far: deque[Samples] = deque()  # at 16 kHz, not matched with the microphone yet
        self._waiting = 0  # samples in it
        self._resampler: Any = None
        self._rate = 0
        self._levels: deque[float] = deque([0.0] * ROOM, ROOM)  # of the speaker
        self._came, self._rest = _Gate(), _Gate()  # as the microphone hears it, and after the canceller

    def far(self, sound: Samples, rate: int) -> None:
        """From any thread, at the speaker's pace, silence included."""
        if rate != self._rate:
            self._rate, self._resampler = rate, soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="LQ")
        sound = self._resampler.resample_chunk(sound)
        with self._lock:
            self._far.append(sound)
            self._waiting += len(sound)
            while self._waiting > AHEAD:
                self._waiting -= len(self._far.popleft())

    def clean(self, frame: Samples) -> Samples:
        """float32 [640] at 16 kHz; zeros where it is nothing but the speaker."""
        far = self._taken()
        self._levels.append(_level(far))
        loudest = max(self._levels)
        rest = self._canceller(frame, far) if self._canceller else None
        left = rest is not None and self._rest.passes(_level(rest), loudest)
        if self._came.passes(_level(frame), loudest):
            return frame
        return rest if rest is not None and left else np.zeros(FRAME, np.float32)

    def _taken(self) -> Samples:
        """As much of the speaker as is due with a frame, silence before it where there is not so much."""
        with self._lock:
            sound = np.concatenate([np.zeros(0, np.float32), *self._far])
            self._far.clear()
            far, rest = sound[:FRAME], sound[FRAME:]
            self._waiting = len(rest)
            if len(rest):
                self._far.append(rest)
        return np.pad(far, (FRAME - len(far), 0))


@dataclass
class _Gate:
    """Opens for what is clearly louder than the speaker ever came back."""

    gain: float = 0.0  # how loud the speaker comes back, at most
    learned: int = 0  # frames from which that is known
    free: int = 0  # frames for which everything passes

    def passes(self, level: float, loudest: float) -> bool:
        """A frame of this level, while the speaker was no louder than `loudest`."""
        if loudest < QUIET:
            self.free = 0
            return True
        gain = level / loudest
        voice = self.learned >= LEARN and gain > LOUDER * self.gain
        if self.learned >= LEARN:  # slowly, or the onset of a voice were learned; at all, since the volume may be turned up
            gain = min(gain, self.gain * RISE)
        self.gain = max(self.gain * SLOPE, gain)
        self.learned += 1
        self.free = STAY if voice else max(0, self.free - 1)
        return voice or self.free > 0


def _level(sound: Samples) -> float:
    return float(np.sqrt(np.mean(sound * sound)))


def _canceller() -> Any:
    """(frame, far) → the frame without the echo of far; None where the extra `aec` is not installed."""
    try:
        from livekit.rtc import AudioFrame
        from livekit.rtc.apm import AudioProcessingModule
    except ImportError:
        return None
    module = AudioProcessingModule(echo_cancellation=True)

    def audio(sound: Samples) -> Any:
        return AudioFrame(bytearray(np.rint(sound * 32767).astype("<i2").tobytes()), RATE, 1, len(sound))

    def cancel(frame: Samples, far: Samples) -> Samples:
        out = []
        for at in range(0, FRAME, CHUNK):
            module.process_reverse_stream(audio(far[at : at + CHUNK]))
            near = audio(frame[at : at + CHUNK])
            module.process_stream(near)
            out.append(np.frombuffer(bytes(near.data), "<i2").astype(np.float32) / np.float32(32768))
        return np.concatenate(out)

    return cancel
