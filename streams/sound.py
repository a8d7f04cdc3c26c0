"""Microphones and speakers of this machine, by PortAudio (sounddevice).

A device runs at its own rate and is resampled here. PortAudio's callbacks run in its own threads and do very little; opening
and closing may wait for a sound server and runs in a thread as well. A device that goes away is noticed and reopened when it
is back; meanwhile the clock goes on, with silence.
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
from streams.portaudio import BLOCK, Device, DeviceStream, SoundError, open_stream

Samples = NDArray[np.float32]

WAITING = 100  # blocks that may wait for the loop: 2 s
TIMEOUT = 1.0  # seconds without a block after which a microphone counts as gone
STARTING = 3.0  # the same before its first block: a sound server may take 1.7
RETRY = 1.0  # seconds between attempts to reopen a device
SILENT = 5 * RATE  # samples of nothing but zeros, after which the user is told: no microphone is that silent
FADE = 0.005  # seconds of fade-out when playback is cleared: stopping at once would click
QUALITY = "LQ"  # of soxr: 6 ms late, the better ones up to 66


# ---- in


class Microphone:
    """Captures frames of 40 ms at 16 kHz, rounded to int16, at the pace of the device and without end.

    `note` is called with a sentence for the user: the device is gone, it is back, it gives nothing but zeros.
    """

    def __init__(self, device: Device, note: Callable[[str], None] = lambda message: None) -> None:
        self.device, self._note = device, note
        self.overflows = 0  # times that the system dropped sound because it was not read in time
        self.away = False
        self._blocks: Channel[bytes] = Channel(WAITING)
        self._stream: DeviceStream | None = None
        self._zeros = 0  # samples since the last other one

    @property
    def dropped(self) -> int:
        """Blocks that were dropped because the event loop did not take them."""
        return self._blocks.dropped

    async def open(self) -> None:
        """Opens the device. Raises SoundError."""
        self._stream = await asyncio.to_thread(open_stream, self.device, self._take)

    async def close(self) -> None:
        """Closes the device; `frames` ends."""
        await self._shut()
        self._blocks.put(b"")

    async def _shut(self) -> None:
        if stream := self._stream:
            self._stream = None
            await asyncio.to_thread(stream.close)

    def _take(self, data: Any, count: int, times: Any, status: Any) -> None:
        """Runs in PortAudio's thread, which reuses its buffer."""
        self.overflows += bool(status.input_overflow)
        self._blocks.put(bytes(data))

    async def frames(self) -> AsyncIterator[Samples]:
        """float32 [640] in [-1, 1], until `close`; silence while the device is gone."""
        while True:
            async for frame in self._present():
                yield frame
            if self._stream is None:
                return
            self._note(f"the microphone {self.device} is gone; it is reopened when it is back")
            self.away = True
            async for frame in self._absent():
                yield frame
            self.away = False
            self._note(f"the microphone {self.device} is back")

    async def _present(self) -> AsyncIterator[Samples]:
        assert self._stream
        stream, framer, timeout = self._stream, Framer(FRAME), STARTING
        resampler = soxr.ResampleStream(stream.rate, RATE, 1, dtype="float32", quality=QUALITY) if stream.rate != RATE else None
        while not stream.over.is_set():
            try:
                async with asyncio.timeout(timeout):
                    block = await self._blocks.get()
            except TimeoutError:
                return
            if not block:
                return
            timeout = TIMEOUT
            pcm = np.frombuffer(block, "<i2").reshape(-1, stream.channels).mean(1, dtype=np.float32) / np.float32(32768)
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
        while self._stream is None:
            try:
                await self.open()
            except SoundError:
                await asyncio.sleep(RETRY)

    def _watch(self, frame: Samples) -> None:
        """Tells the user once about a muted microphone, which gives zeros."""
        before = self._zeros
        self._zeros = 0 if frame.any() else before + len(frame)
        if before < SILENT <= self._zeros:
            self._note(f"the microphone {self.device} gives nothing but zeros: it may be muted, on it or in the system's mixer")


# ---- out


@dataclass(eq=False)
class _PlayedAudio:
    """A continuous piece of the answer `of`, from its `sample` on; resampled chunk by chunk, without a seam."""

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
        """The sample of the answer that has been played after `out` samples of the device."""
        if self.resampler is None and out >= self.made:
            return self.sample + self.given
        return self.sample + min(self.given, out * self.rate // self.out)


class Speaker:
    """Plays answers chunk by chunk, reports how far they were really played, and stops at once.

    `tap` gets all that is handed to the device, silence included, in PortAudio's thread: float32 [n] and its rate.
    """

    def __init__(
        self,
        device: Device,
        note: Callable[[str], None] = lambda message: None,
        tap: Callable[[Samples, int], None] | None = None,
    ) -> None:
        self.device, self._note, self._tap = device, note, tap
        self.underflows = 0
        self._stream: DeviceStream | None = None
        self._lock = threading.Lock()
        self._queue: deque[tuple[_PlayedAudio, int, Samples]] = deque()  # what is not handed out: where it begins in its audio
        self._last: _PlayedAudio | None = None
        self._laid: deque[tuple[int, int, _PlayedAudio, int]] = deque()  # handed out: from frame, to frame, audio, where in it
        self._frame = 0  # of the device, handed out
        self._clock = (0.0, 0)  # a moment of PortAudio's clock, and the frame that sounds then
        self._heard: tuple[int, int] | None = None

    async def open(self) -> None:
        """Raises SoundError."""
        self._frame, self._clock = 0, (0.0, 0)
        self._stream = await asyncio.to_thread(open_stream, self.device, self._give)

    async def close(self) -> None:
        if stream := self._stream:
            self._stream = None
            await asyncio.to_thread(stream.close)

    async def keep_open(self) -> None:
        """Reopens the device whenever it goes away; runs until cancelled. Meanwhile all that is given counts as played at once,
        so that the conversation goes on in writing."""
        while True:
            stream = self._stream
            assert stream
            while not stream.over.is_set():
                await asyncio.sleep(BLOCK)
            self._note(f"the speaker {self.device} is gone; it is reopened when it is back")
            await self.close()
            with self._lock:
                if self._queue or self._laid:
                    last = self._queue[-1][0] if self._queue else self._laid[-1][2]
                    self._heard, self._last = (last.of, last.sample + last.given), None
                self._queue.clear()
                self._laid.clear()
            while self._stream is None:
                try:
                    await self.open()
                except SoundError:
                    await asyncio.sleep(RETRY)
            self._note(f"the speaker {self.device} is back")

    def play(self, of: int, sample: int, pcm: Samples, rate: int) -> None:
        """Queues a chunk: float32 [n] at `rate` Hz, which begins at `sample` of the answer `of`. Never blocks."""
        stream = self._stream
        with self._lock:
            if stream is None:
                self._heard = of, sample + len(pcm)
                return
            last = self._last
            if last is None or last.resampler is None or (last.of, last.sample + last.given) != (of, sample):
                self._end()
                last = self._last = _PlayedAudio(of, sample, rate, stream.rate)
                last.resampler = soxr.ResampleStream(rate, stream.rate, 1, dtype="float32", quality=QUALITY)
            at = last.made
            self._queue.append((last, at, last.push(pcm)))

    def _end(self) -> None:
        """Flushes the resampler of the last audio: nothing follows it."""
        last = self._last
        if last and last.resampler:
            at = last.made
            self._queue.append((last, at, last.push(np.zeros(0, np.float32), last=True)))

    def clear(self) -> None:
        """Drops what is queued; what the device has already, some 40 ms, is still played."""
        with self._lock:
            fading = round(FADE * self._stream.rate) if self._stream else 0
            queue, self._last = list(self._queue), None
            self._queue.clear()
            if queue and fading:
                audio, at, sound = queue[0]
                sound = sound[:fading] * np.linspace(1, 0, min(len(sound), fading), dtype=np.float32)
                self._queue.append((audio, at, sound))

    @property
    def idle(self) -> bool:
        """Nothing is being played or queued."""
        self.heard  # noqa: B018  forgets what has been played
        with self._lock:
            return not (self._queue or self._laid)

    @property
    def heard(self) -> tuple[int, int] | None:
        """The answer that was played last, and how many of its samples."""
        with self._lock:
            if self._stream and not self._stream.over.is_set():
                moment, frame = self._clock
                now = frame + int((self._stream.stream.time - moment) * self._stream.rate)
                while self._laid and self._laid[0][0] < now:
                    first, end, audio, at = self._laid[0]
                    self._heard = audio.of, audio.place(at + min(end, now) - first)
                    if end > now:
                        break
                    self._laid.popleft()
            return self._heard

    def _give(self, data: Any, count: int, times: Any, status: Any) -> None:
        """Runs in PortAudio's thread: fills its buffer."""
        stream, out = self._stream, np.zeros(count, np.float32)
        with self._lock:
            self.underflows += bool(status.output_underflow)
            filled = 0
            while filled < count:
                if not self._queue:
                    self._end()
                if not self._queue:
                    break
                audio, at, sound = self._queue.popleft()
                take = sound[: count - filled]
                out[filled : filled + len(take)] = take
                if len(take):
                    self._laid.append((self._frame + filled, self._frame + filled + len(take), audio, at))
                filled += len(take)
                if len(take) < len(sound):
                    self._queue.appendleft((audio, at + len(take), sound[len(take) :]))
            # Some drivers do not say when a sample sounds; then what they are asked to hold back is what they do.
            ahead = times.outputBufferDacTime - times.currentTime
            late = ahead if 0 < ahead < 2 else stream.stream.latency if stream else 0.0
            self._clock = times.currentTime + late, self._frame
            self._frame += count
        pcm = np.rint(out * 32767).astype("<i2")
        channels = len(data) // (2 * count)
        data[:] = np.repeat(pcm, channels).tobytes() if channels > 1 else pcm.tobytes()
        if self._tap and stream:
            self._tap(out, stream.rate)
