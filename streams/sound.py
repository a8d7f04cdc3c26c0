"""Microphones and speakers of this machine, by PortAudio (sounddevice).

A device runs at its own rate and is resampled here. What PortAudio calls back happens in its threads and does next to
nothing; opening and closing may wait for a sound server and happens in a thread too. A device that goes away is noticed
and taken up again when it is back; meanwhile the clock goes on, with silence.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from streams.channel import Channel
from streams.frames import FRAME, RATE, Framer

Kind = Literal["microphone", "speaker"]
Samples = NDArray[np.float32]

BLOCK = 0.02  # seconds in a callback: a frame of 40 ms is due 20 ms sooner than with blocks of its own length
WAITING = 100  # blocks that may wait for the loop: 2 s
PATIENCE = 1.0  # seconds without a block after which a microphone is gone
STARTING = 3.0  # before its first block: a sound server may take 1.7
RETRY = 1.0  # seconds between attempts to take a device up again
DEAF = 5 * RATE  # samples of nothing but zeros, after which somebody should know: no microphone is that silent
FADE = 0.005  # seconds in which sound that is cleared goes away: a click is not silence
RATES = (48_000, 44_100, 16_000)  # that are tried where a device refuses its own
QUALITY = "LQ"  # of soxr: 6 ms late, the better ones up to 66

BUSY, NO_RATE, NO_CHANNELS = -9985, -9997, -9998  # errors of PortAudio


class SoundError(RuntimeError):
    """A microphone or speaker that cannot be used: one sentence for a person, with the remedy."""


# ---- which there are


@dataclass(frozen=True)
class Device:
    """`index` is PortAudio's. `server`: its name at a PulseAudio or PipeWire server, which PortAudio does not list."""

    kind: Kind
    index: int
    name: str
    rate: int
    channels: int
    usual: bool = False
    server: str | None = None
    cancels: bool = False  # the system takes the speaker's sound out of it

    def __str__(self) -> str:
        return self.server or self.name


def devices() -> list[Device]:
    """All of them, the usual one of each kind first. Blocks. Raises SoundError where there is no PortAudio."""
    portaudio, found = _portaudio(), []
    with _lock:
        _look_again()
        listed, usual = portaudio.query_devices(), portaudio.default.device
    server: int | None = None
    for index, raw in enumerate(listed):
        server = index if raw["name"] == "pulse" else server
        for kind, place, count in (("microphone", 0, "max_input_channels"), ("speaker", 1, "max_output_channels")):
            if raw[count]:
                rate = round(raw["default_samplerate"]) or RATES[0]
                found.append(Device(kind, index, raw["name"], rate, raw[count], usual[place] == index))  # type: ignore[arg-type]
    if server is not None:
        found += _of_server(server)
    return sorted(found, key=lambda device: not device.usual)


def _of_server(index: int) -> Iterator[Device]:
    """What stands behind PortAudio's device "pulse"."""
    if not (pactl := shutil.which("pactl")):
        return
    for kind, what in (("microphone", "sources"), ("speaker", "sinks")):
        try:
            asked = subprocess.run([pactl, "-f", "json", "list", what], capture_output=True, timeout=5, check=True)
            listed = json.loads(asked.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            return  # an old pactl, or no server
        for raw in listed:
            if kind == "microphone" and raw.get("monitor_source"):
                continue  # what a speaker plays
            rate = next((int(word[:-2]) for word in raw["sample_specification"].split() if word.endswith("Hz")), RATES[0])
            cancels = "echo-cancel" in f"{raw['driver']} {raw['name']}".replace("_", "-").lower()
            name = raw.get("description") or raw["name"]
            yield Device(kind, index, name, rate, 1, server=raw["name"], cancels=cancels)  # type: ignore[arg-type]


def choose(found: Iterable[Device], kind: Kind, wanted: str | None = None) -> Device:
    """The one that is meant: by index or by part of its name; else one whose echo the system cancels, else the usual one."""
    of_kind = [device for device in found if device.kind == kind]
    option = "--mic" if kind == "microphone" else "--speaker"
    if not of_kind:
        raise SoundError(
            f"there is no {kind}: plug one in; where a desktop's sound server has it: sudo apt-get install libasound2-plugins"
        )
    if wanted is None:
        return next((device for device in of_kind if device.cancels), of_kind[0])
    exact = [
        d for d in of_kind if wanted in (d.name, d.server) or (wanted.isdecimal() and d.index == int(wanted) and not d.server)
    ]
    part = [device for device in of_kind if wanted.lower() in f"{device.name} {device.server or ''}".lower()]
    if not (exact or part):
        there = ", ".join(str(device) for device in of_kind)
        raise SoundError(f"there is no {kind} {wanted!r}; {option} takes a number or part of a name of these: {there}")
    return (exact or part)[0]


# ---- PortAudio

_lock = threading.Lock()  # PortAudio is not thread-safe but for its callbacks
_open: set[_Line] = set()


def _portaudio() -> Any:
    """Imported late: it looks for its library, which a server has no use for."""
    try:
        import sounddevice
    except OSError as error:
        raise SoundError("PortAudio is not installed; on Debian and Ubuntu: sudo apt-get install libportaudio2") from error
    return sounddevice


def _look_again() -> None:
    """PortAudio lists devices once, as it begins. It can only begin anew while nothing is open. Under the lock."""
    portaudio = _portaudio()
    if not _open:
        portaudio._terminate()
        portaudio._initialize()


@contextmanager
def _server(device: Device) -> Iterator[None]:
    """A sound server's clients learn from the environment which of its devices is meant, as they connect."""
    name = "PULSE_SOURCE" if device.kind == "microphone" else "PULSE_SINK"
    before = os.environ.get(name)
    if device.server:
        os.environ[name] = device.server
    try:
        yield
    finally:
        if device.server:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


@dataclass(eq=False)
class _Line:
    """An open stream of PortAudio. `over`: it has ended by itself."""

    stream: Any
    rate: int
    channels: int
    over: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Blocks."""
        with _lock:
            if self in _open:
                _open.discard(self)
                self.stream.abort(ignore_errors=True)
                self.stream.close(ignore_errors=True)


def _line(device: Device, callback: Callable[[Any, int, Any, Any], None]) -> _Line:
    """Opens and starts it at the first rate that it takes. Blocks. Raises SoundError."""
    portaudio, error = _portaudio(), None
    make = portaudio.RawInputStream if device.kind == "microphone" else portaudio.RawOutputStream
    with _lock, _server(device):
        _look_again()
        for channels in dict.fromkeys((1, min(2, device.channels))):
            for rate in dict.fromkeys((device.rate, *RATES)):
                over = threading.Event()
                try:
                    stream = make(
                        samplerate=rate,
                        blocksize=round(BLOCK * rate),
                        device=device.index,
                        channels=channels,
                        dtype="int16",
                        latency="low",
                        callback=callback,
                        finished_callback=over.set,
                    )
                except portaudio.PortAudioError as refused:
                    error = refused
                    if _code(refused) not in (NO_RATE, NO_CHANNELS):
                        raise SoundError(_why(device, refused)) from refused
                    continue
                line = _Line(stream, rate, channels, over)
                _open.add(line)
                try:
                    stream.start()
                except portaudio.PortAudioError as refused:
                    _open.discard(line)
                    stream.close(ignore_errors=True)
                    raise SoundError(_why(device, refused)) from refused
                return line
    assert error is not None
    raise SoundError(_why(device, error)) from error


def _code(error: Exception) -> int | None:
    return error.args[1] if len(error.args) > 1 and isinstance(error.args[1], int) else None


def _why(device: Device, error: Exception) -> str:
    option, which = ("--mic" if device.kind == "microphone" else "--speaker"), f"the {device.kind} {device}"
    if _code(error) == BUSY:
        return f"{which} is busy: close the program that holds it, or choose another with {option}"
    if _code(error) in (NO_RATE, NO_CHANNELS):
        return f"{which} takes none of the rates {', '.join(f'{r:,}' for r in RATES)}; choose another with {option}"
    text = str(error.args[0]).rpartition(": ")[2] if error.args else type(error).__name__
    return f"{which} cannot be opened ({text}): see that it is plugged in, or choose another with {option}"


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
        self._line: _Line | None = None
        self._zeros = 0  # samples since the last other one

    @property
    def dropped(self) -> int:
        """Blocks that were thrown away because the loop did not take them."""
        return self._blocks.dropped

    async def open(self) -> None:
        """Raises SoundError."""
        self._line = await asyncio.to_thread(_line, self.device, self._take)

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
                block = await asyncio.wait_for(self._blocks.get(), patience)
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
        self._line: _Line | None = None
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
        self._line = await asyncio.to_thread(_line, self.device, self._give)

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
