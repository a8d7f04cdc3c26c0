"""Microphones and speakers of this machine, by PortAudio (sounddevice).

A device runs at its own rate and is resampled here. What PortAudio calls back happens in its threads and does next to
nothing; opening and closing may wait for a sound server and happens in a thread too. A device that goes away is noticed
and taken up again when it is back; meanwhile the clock goes on, with silence.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from streams.channel import Channel
from streams.frames import FRAME, RATE, Framer
from streams.portaudio import BLOCK, Device, Line, SoundError, open_line

Samples = NDArray[np.float32]

WAITING = 100  # blocks that may wait for the loop: 2 s
PATIENCE = 1.0  # seconds without a block after which a microphone is gone
STARTING = 3.0  # before its first block: a sound server may take 1.7
RETRY = 1.0  # seconds between attempts to take a device up again
DEAF = 5 * RATE  # samples of nothing but zeros, after which somebody should know: no microphone is that silent
FADE = 0.005  # seconds in which sound that is cleared goes away: a click is not silence
QUALITY = "LQ"  # of soxr: 6 ms late, the better ones up to 66


# ---- in


class Microphone:
    """Frames of 40 ms at 16 kHz, as int16 would hold them, at the pace of the device and without end.

    `note` is told what a person should know: that it is gone, that it is back, that it gives nothing but zeros.
    """

    def __init__(self, device: Device, note: Callable[[str], None] = lambda message: None) -> None:
        self.device, self._note = device, note
        self.overflows = 0  # times that the system threw sound away because nobody took it
        self.away = False
        self._blocks: Channel[bytes] = Channel(WAITING)
        self._line: Line | None = None
        self._zeros = 0  # samples since the last other one

    @property
    def dropped(self) -> int:
        """Blocks that were thrown away because the loop did not take them."""
        return self._blocks.dropped

    async def open(self) -> None:
        """Raises SoundError."""
        self._line = await asyncio.to_thread(open_line, self.device, self._take)

    async def close(self) -> None:
        """`frames` end."""
        await self._shut()
        self._blocks.put(b"")

    async def _shut(self) -> None:
        if line := self._line:
            self._line = None
            await asyncio.to_thread(line.close)

    def _take(self, data: Any, count: int, times: Any, status: Any) -> None:
        """In PortAudio's thread; it uses its buffer again."""
        self.overflows += bool(status.input_overflow)
        self._blocks.put(bytes(data))

    async def frames(self) -> AsyncIterator[Samples]:
        """Of the device that is open, until it is closed."""
        while True:
            async for frame in self._present():
                yield frame
            if self._line is None:
                return
            self._note(f"the microphone {self.device} is gone; it is taken up again when it is back")
            self.away = True
            async for frame in self._absent():
                yield frame
            self.away = False
            self._note(f"the microphone {self.device} is back")

    async def _present(self) -> AsyncIterator[Samples]:
        assert self._line
        line, framer, patience = self._line, Framer(FRAME), STARTING
        resampler = soxr.ResampleStream(line.rate, RATE, 1, dtype="float32", quality=QUALITY) if line.rate != RATE else None
        while not line.over.is_set():
            try:
                async with asyncio.timeout(patience):
                    block = await self._blocks.get()
            except TimeoutError:
                return
            if not block:
                return
            patience = PATIENCE
            pcm = np.frombuffer(block, "<i2").reshape(-1, line.channels).mean(1, dtype=np.float32) / np.float32(32768)
            pcm = resampler.resample_chunk(pcm) if resampler else pcm
            for frame in framer.push(pcm):
                self._watch(frame)
                yield np.rint(frame * 32768).clip(-32768, 32767).astype(np.float32) / np.float32(32768)

    async def _absent(self) -> AsyncIterator[Samples]:
        again = asyncio.create_task(self._again())
        clock = asyncio.get_running_loop().time
        due = clock()
        try:
            while not again.done():
                yield np.zeros(FRAME, np.float32)
                due += FRAME / RATE
                await asyncio.sleep(max(0.0, due - clock()))
            await again
        finally:
            again.cancel()

    async def _again(self) -> None:
        await self._shut()
        while self._line is None:
            try:
                await self.open()
            except SoundError:
                await asyncio.sleep(RETRY)

    def _watch(self, frame: Samples) -> None:
        """A muted microphone gives zeros, and a person who talks to it wonders."""
        before = self._zeros
        self._zeros = 0 if frame.any() else before + len(frame)
        if before < DEAF <= self._zeros:
            self._note(f"the microphone {self.device} gives nothing but zeros: it may be muted, on it or in the system's mixer")


# ---- out


@dataclass(eq=False)
class _Stretch:
    """Sound that belongs together: `of` whom, beginning at its `sample`; resampled piece by piece, without a seam."""

    of: int
    sample: int
    rate: int
    out: int  # samples a second of the device
    resampler: Any = None  # None once all is out of it
    given: int = 0  # samples put in
    made: int = 0  # samples that came out

    def push(self, pcm: Samples, last: bool = False) -> Samples:
        self.given += len(pcm)
        sound: Samples = self.resampler.resample_chunk(pcm, last=last)
        self.made += len(sound)
        if last:
            self.resampler = None
        return sound

    def place(self, out: int) -> int:
        """The sample that `out` samples of the device end at."""
        if self.resampler is None and out >= self.made:
            return self.sample + self.given
        return self.sample + min(self.given, out * self.rate // self.out)


class Speaker:
    """Plays pieces of numbered sounds, says how far they were really heard, and stops at once.

    `tap` is told, in PortAudio's thread, all that is handed to the device, silence included: samples and their rate.
    """

    def __init__(
        self,
        device: Device,
        note: Callable[[str], None] = lambda message: None,
        tap: Callable[[Samples, int], None] | None = None,
    ) -> None:
        self.device, self._note, self._tap = device, note, tap
        self.underflows = 0
        self._line: Line | None = None
        self._lock = threading.Lock()
        self._queue: deque[tuple[_Stretch, int, Samples]] = deque()  # what is not handed out: where it begins in its stretch
        self._last: _Stretch | None = None
        self._laid: deque[tuple[int, int, _Stretch, int]] = deque()  # handed out: from frame, to frame, stretch, where in it
        self._frame = 0  # of the device, handed out
        self._clock = (0.0, 0)  # a moment of PortAudio's clock, and the frame that sounds then
        self._heard: tuple[int, int] | None = None

    async def open(self) -> None:
        """Raises SoundError."""
        self._frame, self._clock = 0, (0.0, 0)
        self._line = await asyncio.to_thread(open_line, self.device, self._give)

    async def close(self) -> None:
        if line := self._line:
            self._line = None
            await asyncio.to_thread(line.close)

    async def stay(self) -> None:
        """Takes the device up again whenever it goes, without end. Meanwhile all that is given counts as heard at once: the
        conversation goes on in writing, and waits for no ear."""
        while True:
            line = self._line
            assert line
            while not line.over.is_set():
                await asyncio.sleep(BLOCK)
            self._note(f"the speaker {self.device} is gone; it is taken up again when it is back")
            await self.close()
            with self._lock:
                if self._queue or self._laid:
                    last = self._queue[-1][0] if self._queue else self._laid[-1][2]
                    self._heard, self._last = (last.of, last.sample + last.given), None
                self._queue.clear()
                self._laid.clear()
            while self._line is None:
                try:
                    await self.open()
                except SoundError:
                    await asyncio.sleep(RETRY)
            self._note(f"the speaker {self.device} is back")

    def play(self, of: int, sample: int, pcm: Samples, rate: int) -> None:
        """What belongs at `sample` of the sound `of`, after all that was given before."""
        line = self._line
        with self._lock:
            if line is None:
                self._heard = of, sample + len(pcm)
                return
            last = self._last
            if last is None or last.resampler is None or (last.of, last.sample + last.given) != (of, sample):
                self._end()
                last = self._last = _Stretch(of, sample, rate, line.rate)
                last.resampler = soxr.ResampleStream(rate, line.rate, 1, dtype="float32", quality=QUALITY)
            at = last.made
            self._queue.append((last, at, last.push(pcm)))

    def _end(self) -> None:
        """What the last stretch's resampler holds back comes out: nothing follows it."""
        last = self._last
        if last and last.resampler:
            at = last.made
            self._queue.append((last, at, last.push(np.zeros(0, np.float32), last=True)))

    def clear(self) -> None:
        """Plays nothing more of what was given; what the device holds already, some 40 ms, still sounds."""
        with self._lock:
            fading = round(FADE * self._line.rate) if self._line else 0
            queue, self._last = list(self._queue), None
            self._queue.clear()
            if queue and fading:
                stretch, at, sound = queue[0]
                sound = sound[:fading] * np.linspace(1, 0, min(len(sound), fading), dtype=np.float32)
                self._queue.append((stretch, at, sound))

    @property
    def idle(self) -> bool:
        """Nothing sounds and nothing is to."""
        self.heard  # noqa: B018  lets go of what has sounded
        with self._lock:
            return not (self._queue or self._laid)

    @property
    def heard(self) -> tuple[int, int] | None:
        """Which sound was heard last, and to which of its samples."""
        with self._lock:
            if self._line and not self._line.over.is_set():
                moment, frame = self._clock
                now = frame + int((self._line.stream.time - moment) * self._line.rate)
                while self._laid and self._laid[0][0] < now:
                    first, end, stretch, at = self._laid[0]
                    self._heard = stretch.of, stretch.place(at + min(end, now) - first)
                    if end > now:
                        break
                    self._laid.popleft()
            return self._heard

    def _give(self, data: Any, count: int, times: Any, status: Any) -> None:
        """In PortAudio's thread."""
        line, out = self._line, np.zeros(count, np.float32)
        with self._lock:
            self.underflows += bool(status.output_underflow)
            filled = 0
            while filled < count:
                if not self._queue:
                    self._end()
                if not self._queue:
                    break
                stretch, at, sound = self._queue.popleft()
                take = sound[: count - filled]
                out[filled : filled + len(take)] = take
                if len(take):
                    self._laid.append((self._frame + filled, self._frame + filled + len(take), stretch, at))
                filled += len(take)
                if len(take) < len(sound):
                    self._queue.appendleft((stretch, at + len(take), sound[len(take) :]))
            # Some drivers do not say when a sample sounds; then what they are asked to hold back is what they do.
            ahead = times.outputBufferDacTime - times.currentTime
            late = ahead if 0 < ahead < 2 else line.stream.latency if line else 0.0
            self._clock = times.currentTime + late, self._frame
            self._frame += count
        pcm = np.rint(out * 32767).astype("<i2")
        channels = len(data) // (2 * count)
        data[:] = np.repeat(pcm, channels).tobytes() if channels > 1 else pcm.tobytes()
        if self._tap and line:
            self._tap(out, line.rate)
