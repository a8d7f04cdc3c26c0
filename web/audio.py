"""Audio on the wire: PCM16 and G.711 to and from samples, resampling, the input audio buffer, and the one record of how much a
client has played. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from streams.frames import RATE, Audio

Samples = NDArray[np.float32]
KEPT = 32  # items whose sound can be truncated


# ---- formats


@dataclass(frozen=True, slots=True)
class Format:
    """An audio format of the protocol; `rate` in samples per second."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: int = 24_000

    @staticmethod
    def rates(type: str) -> tuple[int, ...]:
        """The sample rates that are allowed for a type, the default first."""
        return (24_000, RATE) if type == "audio/pcm" else (8_000,)

    def as_json(self) -> Mapping[str, Any]:
        return {"type": self.type, **({"rate": self.rate} if self.type == "audio/pcm" else {})}

    @property
    def width(self) -> int:
        """Bytes per sample."""
        return 2 if self.type == "audio/pcm" else 1

    def decode(self, data: bytes) -> Samples:
        """Bytes of whole samples → float32 in [-1, 1] at `rate`."""
        if self.type == "audio/pcm":
            pcm = np.frombuffer(data, "<i2")
        else:
            pcm = (_ulaw() if self.type == "audio/pcmu" else _alaw())[np.frombuffer(data, np.uint8)]
        samples = pcm.astype(np.float32)
        samples /= 32768
        return samples

    def encode(self, samples: Samples) -> bytes:
        """float32 in [-1, 1] at `rate` → bytes."""
        pcm = np.rint(samples * 32768).clip(-32768, 32767).astype("<i2")
        if self.type == "audio/pcm":
            return pcm.tobytes()
        table = _to_ulaw() if self.type == "audio/pcmu" else _to_alaw()
        return bytes(table[pcm.astype(np.int32) + 32768].tobytes())


PCM = Format()


@cache
def _ulaw() -> NDArray[np.int16]:
    """The value of each µ-law byte. Eight segments of sixteen steps, each twice as wide as the one before; bits inverted."""
    code = ~np.arange(256, dtype=np.uint8)
    step, segment = (code & 15).astype(np.int32), (code >> 4 & 7).astype(np.int32)
    size = (((step << 3) + 132) << segment) - 132
    return np.where(code & 128, -size, size).astype(np.int16)


@cache
def _alaw() -> NDArray[np.int16]:
    """The value of each A-law byte: as µ-law, but the two lowest segments have equal steps, and every other bit is inverted."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    step, segment = (code & 15).astype(np.int32), (code >> 4 & 7).astype(np.int32)
    size = np.where(segment, ((step << 4) + 264) << np.maximum(segment - 1, 0), (step << 4) + 8)
    return np.where(code & 128, size, -size).astype(np.int16)


@cache
def _to_ulaw() -> NDArray[np.uint8]:
    """The µ-law byte of each 16-bit value, from the lowest on."""
    value = np.arange(-32768, 32768)
    size = np.minimum(np.abs(value), 32635) + 132
    segment = np.log2(size).astype(np.int32) - 7
    code = segment << 4 | size >> segment + 3 & 15
    inverted: NDArray[np.uint8] = (~np.where(value < 0, code | 128, code)).astype(np.uint8)
    return inverted


@cache
def _to_alaw() -> NDArray[np.uint8]:
    value = np.arange(-32768, 32768) >> 3
    size = np.where(value < 0, -value - 1, value)
    segment = np.maximum(np.log2(np.maximum(size, 1)).astype(np.int32) - 4, 0)
    code = segment << 4 | size >> np.maximum(segment, 1) & 15
    return (np.where(value < 0, code, code | 128) ^ 0x55).astype(np.uint8)


class Resampler:
    """Resamples a stream; it holds some milliseconds back until `flush`."""

    def __init__(self, source: int, target: int) -> None:
        self._stream = None if source == target else soxr.ResampleStream(source, target, 1, dtype="float32")

    def push(self, samples: Samples, last: bool = False) -> Samples:
        if self._stream is None:
            return samples
        out: Samples = self._stream.resample_chunk(samples, last=last)
        if last:
            self._stream.clear()
        return out.clip(-1, 1)

    def flush(self) -> Samples:
        return self.push(np.zeros(0, np.float32), last=True)


# ---- the input audio buffer

LONGEST = 110  # seconds of audio that may wait for a commit, or that an item may have; a turn has 120


class BufferFull(ValueError):
    """No more audio can be taken now; the message says what it has to wait for."""


class InputAudioBuffer:
    """Appended audio → 16 kHz frames for the session. With turn detection the session decides about turns; without it (`manual`)
    the session buffers audio until a commit. Where speech must not interrupt an answer, audio is held here until its end."""

    def __init__(self, format: Format) -> None:
        self._format, self._resampler = format, Resampler(format.rate, RATE)
        self.manual = False
        self._odd = b""  # the first byte of a sample whose second one comes with the next append
        self._at = 0  # samples given to the session
        self._uncommitted = 0  # samples at 16 kHz
        self._holds = False
        self._held: list[Audio] = []

    def set(self, format: Format, manual: bool) -> None:
        if format != self._format:
            self._format, self._resampler, self._odd = format, Resampler(format.rate, RATE), b""
        self.manual = manual

    @property
    def milliseconds(self) -> int:
        """Audio that waits for a commit."""
        return self._uncommitted * 1000 // RATE

    def append(self, data: bytes) -> list[Audio]:
        """Takes bytes of any number: a stream may be split in the middle of a sample. Raises BufferFull."""
        data = self._odd + data
        whole = len(data) // self._format.width * self._format.width
        samples = self._format.decode(data[:whole])
        more = len(samples) * RATE // self._format.rate
        if self.manual and self._uncommitted + more > LONGEST * RATE:
            raise BufferFull(f"more than {LONGEST} seconds wait for a commit")
        if self._held and self._at - self._held[0].at > LONGEST * RATE:
            raise BufferFull(f"more than {LONGEST} seconds wait for the end of an answer")
        self._odd = data[whole:]
        self._uncommitted += more if self.manual else 0
        return self._heard(self._resampler.push(samples))

    def commit(self) -> list[Audio]:
        """Returns the rest of what was appended, which the resampler held back."""
        self._odd, self._uncommitted = b"", 0
        return self._heard(self._resampler.flush())

    def clear(self) -> None:
        self._resampler, self._odd, self._uncommitted = Resampler(self._format.rate, RATE), b"", 0
        self._held.clear()

    def hold(self, holds: bool) -> list[Audio]:
        """Starts or stops holding audio back; returns what was held when it stops."""
        self._holds = holds
        held, self._held = ([], self._held) if holds else (self._held, [])
        return held

    def _heard(self, samples: Samples) -> list[Audio]:
        if not len(samples):
            return []
        sound = Audio(np.ascontiguousarray(samples), self._at)
        self._at += len(samples)
        if not self._holds:
            return [sound]
        self._held.append(sound)
        return []


# ---- what was played


@dataclass(slots=True)
class _Piece:
    """A contiguous run of an answer's audio in an item: it begins `offset` seconds into the item, at `sample` of the answer."""

    offset: float
    sample: int
    count: int
    rate: int


class PlaybackClock:
    """Estimates what a client has played, since clients do not say: audio plays in real time from the moment it is sent.

    Times are seconds of the caller's clock; samples are of the answer, which may be resumed at an earlier word.
    """

    def __init__(self) -> None:
        self._items: OrderedDict[str, tuple[int, list[_Piece]]] = OrderedDict()  # by item: its answer and its audio
        self._queue: deque[tuple[float, int, _Piece]] = deque()  # when playback of it begins, its answer
        self.end = 0.0  # when playback ends

    def send(self, now: float, item: str, answer: int, sample: int, count: int, rate: int) -> float:
        """Registers `count` samples sent at `now`. Returns how many seconds of the item's audio come before them."""
        begin, self.end = max(now, self.end), max(now, self.end) + count / rate
        _, pieces = self._items.setdefault(item, (answer, []))
        offset = pieces[-1].offset + pieces[-1].count / pieces[-1].rate if pieces else 0.0
        self._queue.append((begin, answer, _Piece(offset, sample, count, rate)))
        if pieces and pieces[-1].sample + pieces[-1].count == sample:
            pieces[-1].count += count
        else:
            pieces.append(_Piece(offset, sample, count, rate))
        while len(self._items) > KEPT:
            self._items.popitem(last=False)
        return offset

    def heard(self, now: float) -> tuple[int, int] | None:
        """The answer and the sample that playback has reached; None when nothing new was played."""
        reached = None
        while self._queue and self._queue[0][0] <= now:
            begin, answer, piece = self._queue[0]
            played = min(piece.count, int((now - begin) * piece.rate))
            reached = answer, piece.sample + played
            if played < piece.count:
                break
            self._queue.popleft()
        return reached

    def stop(self) -> None:
        """The client plays no more of what was sent."""
        self._queue.clear()
        self.end = 0.0

    def place(self, item: str, ms: int) -> tuple[int, int, int] | None:
        """Answer and sample at `ms` of an item's audio, and `ms` limited to the audio's length. None if the item has no audio."""
        if item not in self._items:
            return None
        answer, pieces = self._items[item]
        last = pieces[-1]
        seconds = min(ms / 1000, last.offset + last.count / last.rate)
        piece = next(piece for piece in reversed(pieces) if piece.offset <= seconds)
        into = min(piece.count, round((seconds - piece.offset) * piece.rate))
        return answer, piece.sample + into, min(ms, round(seconds * 1000))
