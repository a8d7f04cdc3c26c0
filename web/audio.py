"""Sound on the wire: PCM16 and G.711 to and from samples, rates to and from ours, and what of it a client has played. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from streams.frames import RATE
from web.given import Refused, choice, mapping

Samples = NDArray[np.float32]
KEPT = 32  # items whose sound can be truncated


# ---- formats


@dataclass(frozen=True, slots=True)
class Format:
    """`rate` in samples a second."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: int = 24_000

    @classmethod
    def read(cls, given: Any, param: str) -> Format:
        kind = choice(mapping(given, param).get("type"), f"{param}.type", ("audio/pcm", "audio/pcmu", "audio/pcma"))
        rates = (24_000, RATE) if kind == "audio/pcm" else (8_000,)
        rate = rates[0] if given.get("rate") is None else given["rate"]
        if rate not in rates:
            raise Refused(f"{param}.rate of {kind} must be {' or '.join(map(str, rates))}", param=f"{param}.rate")
        return cls(kind, int(rate))  # type: ignore[arg-type]

    def as_json(self) -> Mapping[str, Any]:
        return {"type": self.type, **({"rate": self.rate} if self.type == "audio/pcm" else {})}

    @property
    def width(self) -> int:
        """Bytes of a sample."""
        return 2 if self.type == "audio/pcm" else 1

    def decode(self, data: bytes) -> Samples:
        if len(data) % self.width:
            raise Refused("the audio ends in the middle of a sample: 16-bit PCM has an even number of bytes", param="audio")
        if self.type == "audio/pcm":
            pcm = np.frombuffer(data, "<i2")
        else:
            pcm = (_ulaw() if self.type == "audio/pcmu" else _alaw())[np.frombuffer(data, np.uint8)]
        samples = pcm.astype(np.float32)
        samples /= 32768
        return samples

    def encode(self, samples: Samples) -> bytes:
        pcm = np.rint(samples * 32768).clip(-32768, 32767).astype("<i2")
        if self.type == "audio/pcm":
            return pcm.tobytes()
        table = _to_ulaw() if self.type == "audio/pcmu" else _to_alaw()
        return bytes(table[pcm.astype(np.int32) + 32768].tobytes())


PCM = Format()


@cache
def _ulaw() -> NDArray[np.int16]:
    """Of each byte its value. Eight segments of sixteen steps, each twice as wide as the one before; bits inverted."""
    code = ~np.arange(256, dtype=np.uint8)
    step, segment = (code & 15).astype(np.int32), (code >> 4 & 7).astype(np.int32)
    size = (((step << 3) + 132) << segment) - 132
    return np.where(code & 128, -size, size).astype(np.int16)


@cache
def _alaw() -> NDArray[np.int16]:
    """The same with the two lowest segments alike, and every other bit inverted."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    step, segment = (code & 15).astype(np.int32), (code >> 4 & 7).astype(np.int32)
    size = np.where(segment, ((step << 4) + 264) << np.maximum(segment - 1, 0), (step << 4) + 8)
    return np.where(code & 128, size, -size).astype(np.int16)


@cache
def _to_ulaw() -> NDArray[np.uint8]:
    """Of each 16-bit value, from the lowest on, its byte."""
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
    """A stream from one rate to another; some milliseconds stay inside until `flush`."""

    def __init__(self, source: int, target: int) -> None:
        self._rates = source, target
        self._stream = None if source == target else soxr.ResampleStream(source, target, 1, dtype="float32")

    def push(self, samples: Samples, last: bool = False) -> Samples:
        if self._stream is None:
            return samples
        out: Samples = self._stream.resample_chunk(samples, last=last)
        if last:
            self.__init__(*self._rates)  # type: ignore[misc]
        return out.clip(-1, 1)

    def flush(self) -> Samples:
        return self.push(np.zeros(0, np.float32), last=True)


# ---- what was played


@dataclass(slots=True)
class _Stretch:
    """Sound of an item that is one piece of an answer: it begins `offset` seconds into the item, at `sample` of the answer."""

    offset: float
    sample: int
    count: int
    rate: int


class Playback:
    """Clients do not say what they have played: it is counted from the moment at which sound was sent, one second a second.

    Seconds are of a clock that whoever calls has; samples are of the answer, which may be taken up again at an earlier word.
    """

    def __init__(self) -> None:
        self._items: OrderedDict[str, tuple[int, list[_Stretch]]] = OrderedDict()  # item: answer and its sound
        self._queue: deque[tuple[float, int, _Stretch]] = deque()  # when it begins to be played, of which answer
        self.end = 0.0  # when all is played

    def send(self, now: float, item: str, answer: int, sample: int, count: int, rate: int) -> float:
        """How many seconds of the item's sound are before it."""
        begin, self.end = max(now, self.end), max(now, self.end) + count / rate
        _, stretches = self._items.setdefault(item, (answer, []))
        offset = stretches[-1].offset + stretches[-1].count / stretches[-1].rate if stretches else 0.0
        self._queue.append((begin, answer, _Stretch(offset, sample, count, rate)))
        if stretches and stretches[-1].sample + stretches[-1].count == sample:
            stretches[-1].count += count
        else:
            stretches.append(_Stretch(offset, sample, count, rate))
        while len(self._items) > KEPT:
            self._items.popitem(last=False)
        return offset

    def heard(self, now: float) -> tuple[int, int] | None:
        """Answer and sample that were reached; None when nothing new was played."""
        reached = None
        while self._queue and self._queue[0][0] <= now:
            begin, answer, stretch = self._queue[0]
            played = min(stretch.count, int((now - begin) * stretch.rate))
            reached = answer, stretch.sample + played
            if played < stretch.count:
                break
            self._queue.popleft()
        return reached

    def stop(self) -> None:
        """The client plays nothing more of what was sent."""
        self._queue.clear()
        self.end = 0.0

    def place(self, item: str, ms: int) -> tuple[int, int, int] | None:
        """Answer and sample at `ms` of an item's sound, and `ms` or the sound's end where that is earlier. None: it has none."""
        if item not in self._items:
            return None
        answer, stretches = self._items[item]
        last = stretches[-1]
        seconds = min(ms / 1000, last.offset + last.count / last.rate)
        stretch = next(stretch for stretch in reversed(stretches) if stretch.offset <= seconds)
        into = min(stretch.count, round((seconds - stretch.offset) * stretch.rate))
        return answer, stretch.sample + into, min(ms, round(seconds * 1000))
