"""Echo cancellation: the speaker's sound is removed from the microphone's, so that the agent's own voice is no barge-in.

Echo is distinguished from a voice by its level: how loud the speaker comes back is measured while it plays, and what is clearly
louder passes unchanged. So with a headset barge-in works after a second of playback, and beside a loudspeaker one must speak
up. Where the extra `aec` is installed, WebRTC's echo canceller subtracts what it can of the rest, and the same gate judges what
is left. (Alone it is not enough: without any echo it suppressed a voice for 1.2 s.)
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
AHEAD = 3 * FRAME  # far-end samples that may wait for their frame of the microphone
QUIET = 1e-3  # RMS of the speaker below which it counts as silent
ROOM = 14  # frames within which an echo comes back, through buffers and room: 560 ms
LEARN = 20  # frames of playback before anything passes: 0.8 s
LOUDER = 2.5  # than the loudest echo: 8 dB
SLOPE = 0.997  # a frame: within ten seconds of playback the loudest echo counts half
RISE = 1.03  # a frame, at most, once the gain is measured
STAY = 8  # frames that the gate stays open after a voice, else every soft syllable would be lost


class EchoCanceller:
    """Call `far` with all that is played, `clean` with each microphone frame. `cancel`: by WebRTC, where installed."""

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
        """The far-end signal: float32 [n] at `rate` Hz as it is played, silence included. From any thread."""
        if rate != self._rate:
            self._rate, self._resampler = rate, soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="LQ")
        sound = self._resampler.resample_chunk(sound)
        with self._lock:
            self._far.append(sound)
            self._waiting += len(sound)
            while self._waiting > AHEAD:
                self._waiting -= len(self._far.popleft())

    def clean(self, frame: Samples) -> Samples:
        """float32 [640] at 16 kHz without the echo; zeros where there was nothing else."""
        far = self._taken()
        self._levels.append(_level(far))
        loudest = max(self._levels)
        rest = self._canceller(frame, far) if self._canceller else None
        left = rest is not None and self._rest.passes(_level(rest), loudest)
        if self._came.passes(_level(frame), loudest):
            return frame
        return rest if rest is not None and left else np.zeros(FRAME, np.float32)

    def _taken(self) -> Samples:
        """The far-end samples for one frame, padded in front with silence where there are too few."""
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
    """Opens for what is clearly louder than the loudest echo so far."""

    gain: float = 0.0  # of the loudest echo, relative to what was played
    learned: int = 0  # frames from which that was measured
    free: int = 0  # frames for which the gate stays open

    def passes(self, level: float, loudest: float) -> bool:
        """Whether a frame of this level passes, while the speaker was no louder than `loudest` (both RMS)."""
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
    """(frame, far) → the frame without the echo of `far`, all float32 [640]; None where the extra `aec` is not installed."""
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
