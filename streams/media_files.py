"""Sound and video files → samples and pictures with their times, decoded by FFmpeg (PyAV). Within limits of length and size.

Everything here blocks, but for `play`: call it in a thread. What cannot be used raises MediaError with one sentence that names
the file. FFmpeg looks at the content, never at the name, and may open nothing but the file itself in the formats below: it
also "plays" text, pictures, and playlists that name other files.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
import soxr
from av.container import InputContainer
from av.stream import Disposition
from numpy.typing import NDArray

from streams.frames import FRAME, RATE, Audio, Framer, MediaError, Path, Samples, open_file
from streams.opencv import PICTURE_PIXELS

LONGEST = 3_600  # seconds of sound or video
MOST_FRAMES = 240 * LONGEST  # pictures of a video, whatever their times say
RATES = (8_000, 192_000)  # samples a second
LOUDEST = 4.0  # 12 dB over full scale: past mastering overshoot, float samples are in some other unit
CANCELLED = 0.1  # of the power that unrelated channels have when they are averaged: less, and they cancel each other
GAP, JUMP = 0.1, 600.0  # seconds: a pause in the times of a stream is silence; more than JUMP is a broken clock and is ignored
UNKNOWN_FPS = 24.0  # what transformers assumes
SHOWN_PIXELS = 1 << 21  # of a picture of a video: 1920×1080; a larger one is made smaller

VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg"  # names of FFmpeg's demuxers
SOUND_FORMATS = f"wav,w64,aiff,au,caf,flac,ogg,mp3,aac,ac3,amr,asf,wv,{VIDEO_FORMATS}"
VIDEO = re.compile(
    rb".{4}(ftyp|moov|mdat|wide|free|skip)"  # MP4, MOV
    rb"|\x1a\x45\xdf\xa3"  # Matroska, WebM
    rb"|RIFF.{4}AVI "
    rb"|\x47.{187}\x47|\x00\x00\x01\xba",  # MPEG transport and program streams
    re.DOTALL,
)

Pixels = NDArray[np.uint8]


# ---- sound


def read_audio(path: Path) -> Samples:
    """The sound of a sound or video file: float32 [n] at 16 kHz, channels averaged. Raises MediaError.

    Overshoot is clipped, never normalised: the model knows silence by its level. Where the channels cancel each other, the
    loudest one is taken. Pauses that the file's times tell of are silence; what cannot be decoded of it is left out.
    """
    samples = _read_sound(path, None)
    if samples is None or len(samples) == 0:
        raise MediaError(f"{path} holds no sound")
    return samples


def read_soundtrack(path: Path) -> Samples:
    """The sound of a video as `read_audio` has it, from its first picture on; [0] if it has none. Raises MediaError."""
    check_video(path)
    with (
        open_file(path) as file,
        _open_container(file, path, VIDEO_FORMATS) as container,
        closing(_decode_pictures(container, path)) as pictures,
    ):
        begin = next((at for at, _ in pictures), 0.0)
    samples = _read_sound(path, begin)
    return np.zeros(0, np.float32) if samples is None else samples


def _read_sound(path: Path, begin: float | None) -> Samples | None:
    """From `begin` seconds on the file's clock, or from its first sample; None: it has no sound."""
    with open_file(path) as file:
        mix = _mix_channels(file, path, begin)
        if mix and len(mix.power) == 0:  # by its header; a recorder that was killed leaves an RF64 of length 0
            mix = _mix_channels(file, path, begin, to_the_end=True)
        elif mix and mix.cancelled:
            mix = _mix_channels(file, path, begin, int(mix.power.argmax()))
        if mix is None:
            return None
    samples = np.concatenate(mix.parts)
    return np.clip(samples, -1, 1, out=samples)


@dataclass
class _Mix:
    """Channels averaged and resampled to 16 kHz, and how much that took from them."""

    parts: list[Samples] = field(default_factory=lambda: [np.zeros(0, np.float32)])
    power: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # of each channel, summed over its samples
    mixed: float = 0.0  # of the average

    @property
    def cancelled(self) -> bool:
        count = len(self.power)
        return self.mixed * count**2 < CANCELLED * float(self.power.sum())


def _mix_channels(
    file: BinaryIO, path: Path, begin: float | None, channel: int | None = None, to_the_end: bool = False
) -> _Mix | None:
    """`channel`: this one instead of all. `to_the_end`: of a WAV, whatever its header says. None: there is no sound."""
    mix, rate, made = _Mix(), 0, Fraction(0)
    resampler: soxr.ResampleStream | None = None
    with _open_container(file, path, SOUND_FORMATS, ignore_length=str(int(to_the_end))) as container:
        if not container.streams.audio:
            return None
        for block, its_rate in _decode_sound(container, path, begin):
            if rate != its_rate:
                if resampler:
                    mix.parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
                rate, resampler = its_rate, soxr.ResampleStream(its_rate, RATE, 1, dtype="float32")
            assert resampler
            made += Fraction(block.shape[1], rate)
            if made > LONGEST:
                raise MediaError(f"{path} is longer than {LONGEST:,} seconds")
            mono = block.mean(axis=0) if channel is None else block[min(channel, len(block) - 1)]
            mix.parts.append(resampler.resample_chunk(mono))
            if len(mix.power) < len(block):
                mix.power = np.pad(mix.power, (0, len(block) - len(mix.power)))
            mix.power[: len(block)] += np.square(block, dtype=np.float64).sum(axis=1)
            mix.mixed += float(np.square(mono, dtype=np.float64).sum())
    if resampler:
        mix.parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return mix


def _decode_sound(container: InputContainer, path: Path, begin: float | None) -> Iterator[tuple[Samples, int]]:
    """Blocks float32 [channels, n] and their rate, with silence where the stream's times have a pause."""
    position, clock = 0, begin  # in samples; the time in the file at which the sample 0 is due
    stream = container.streams.best("audio")
    assert isinstance(stream, av.AudioStream)
    for frame in _decode(container, stream):
        assert isinstance(frame, av.AudioFrame)
        rate, block = frame.sample_rate, _as_float(frame)
        if not RATES[0] <= rate <= RATES[1]:
            raise MediaError(f"{path} has {rate:,} samples a second; {RATES[0]:,} to {RATES[1]:,} are read")
        peak = np.abs(block).max(initial=0)
        if not np.isfinite(peak):
            raise MediaError(f"{path} holds NaN or infinite samples")
        if peak > LOUDEST:
            raise MediaError(f"{path} holds float samples of ±{peak:g} where full scale is ±1")
        if frame.time is not None:
            clock = frame.time if clock is None else clock
            pause = round((frame.time - clock) * rate) - position
            if abs(pause) > JUMP * rate:
                clock = frame.time - position / rate
            elif pause > GAP * rate:
                yield np.zeros((len(block), pause), np.float32), rate
                position += pause
            elif position == 0 and pause < 0:
                block = block[:, -pause:]  # before `begin`
        position += block.shape[1]
        yield block, rate


def _as_float(frame: av.AudioFrame) -> Samples:
    """float32 [channels, n], full scale ±1."""
    block = frame.to_ndarray()
    if not frame.format.is_planar:
        block = block.reshape(-1, frame.layout.nb_channels).T
    if block.dtype.kind == "f":
        return block.astype(np.float32, copy=False)
    bits = 8 * block.dtype.itemsize
    zero = 1 << (bits - 1) if block.dtype.kind == "u" else 0
    return ((block.astype(np.float64) - zero) / (1 << (bits - 1))).astype(np.float32)


async def play(
    samples: Samples,
    *,
    real_time: bool,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[Audio]:
    """Frames of 40 ms, zeros after the last sample; in real time each one comes when a microphone would have filled it.

    A consumer that fell behind gets what is due at once: frames are never dropped and lateness does not add up.
    """
    framer = Framer(FRAME)
    start = clock()
    for index, frame in enumerate(framer.push(samples) + framer.flush()):
        due = start + (index + 1) * FRAME / RATE
        await sleep(max(0.0, due - clock()) if real_time else 0.0)
        yield Audio(frame, at=index * FRAME)


# ---- video


def check_video(path: Path) -> None:
    """Raises MediaError where a file does not begin as a video does."""
    with open_file(path) as file:
        if not VIDEO.match(file.read(189)):
            raise MediaError(f"{path} is not an MP4, MOV, Matroska, WebM, AVI or MPEG video")


def read_video(path: Path, frames: int = 32) -> list[tuple[float, Pixels]]:
    """(seconds since the first picture, uint8 RGB [H, W, 3]) of `frames` pictures spread evenly over all, upright.

    A video of fewer pictures gives all it has (transformers raises). One of more than SHOWN_PIXELS is made smaller. Every picture
    is decoded in turn: seeking lands on the wrong one in some containers. Raises MediaError.
    """
    assert frames > 0, frames
    check_video(path)
    with open_file(path) as file:
        with _open_container(file, path, VIDEO_FORMATS) as container:
            total = _count_pictures(container, path)
        taken, seen = _take_pictures(file, path, frames, total)
        if seen != total:  # some packets hold no picture to be shown, and a file may be damaged
            taken, _ = _take_pictures(file, path, frames, seen)
    if not taken:
        raise MediaError(f"{path} holds no frame that can be decoded")
    return taken


def _count_pictures(container: InputContainer, path: Path) -> int:
    """By its packets: what a header says may be untrue. Decodes nothing."""
    stream, first, count = _video_stream(container, path), None, 0
    for packet in container.demux(stream):
        count += packet.size > 0
        if packet.pts is not None and packet.time_base:
            at = float(packet.pts * packet.time_base)
            first = at if first is None else first
            if at - first > LONGEST:
                raise MediaError(f"{path} is longer than {LONGEST:,} seconds")
        if count > MOST_FRAMES:
            raise MediaError(f"{path} has more than {MOST_FRAMES:,} pictures")
    return count


def _take_pictures(file: BinaryIO, path: Path, frames: int, total: int) -> tuple[list[tuple[float, Pixels]], int]:
    """The pictures wanted if there are `total` of them, and how many there really are."""
    wanted = {index * total // frames for index in range(frames)}
    taken: list[tuple[float, Pixels]] = []
    seen, first = 0, 0.0
    with _open_container(file, path, VIDEO_FORMATS) as container:
        for at, frame in _decode_pictures(container, path):
            first = first if seen else at
            if seen in wanted:
                taken.append((max(0.0, at - first), _upright(frame)))
            seen += 1
    return taken, seen


def _decode_pictures(container: InputContainer, path: Path) -> Generator[tuple[float, av.VideoFrame], None, None]:
    """Pictures and their times in seconds on the file's clock."""
    stream = _video_stream(container, path)
    fps = float(stream.average_rate or 0)
    fps = fps if 0 < fps <= 1_000 else UNKNOWN_FPS
    stream.thread_type = "AUTO"
    for index, frame in enumerate(_decode(container, stream)):
        assert isinstance(frame, av.VideoFrame)
        _check_size(path, frame.width, frame.height)
        yield index / fps if frame.time is None else frame.time, frame


def _video_stream(container: InputContainer, path: Path) -> av.VideoStream:
    streams = [stream for stream in container.streams.video if Disposition.attached_pic not in stream.disposition]  # no covers
    if not streams:
        raise MediaError(f"{path} is not a video that can be decoded")
    _check_size(path, streams[0].codec_context.width, streams[0].codec_context.height)
    return streams[0]


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > PICTURE_PIXELS:
        raise MediaError(f"{path} has {width:,}×{height:,} pixels, more than {PICTURE_PIXELS:,}")


def _upright(frame: av.VideoFrame) -> Pixels:
    """uint8 RGB [H, W, 3]."""
    scale = min(1.0, (SHOWN_PIXELS / (frame.width * frame.height)) ** 0.5)
    width, height = max(1, int(frame.width * scale)), max(1, int(frame.height * scale))
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA" if scale < 1 else "BILINEAR")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


# ---- FFmpeg


@contextmanager
def _open_container(file: BinaryIO, path: Path, formats: str, **more: str) -> Iterator[InputContainer]:
    """`more`: options of FFmpeg's demuxers. Raises MediaError, also for what FFmpeg finds wrong later."""
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    options = {"fd": str(file.fileno()), "protocol_whitelist": "fd", "format_whitelist": formats, **more}
    try:
        container = av.open("fd:", options=options, metadata_errors="replace")  # by descriptor: FFmpeg would look at a name
    except av.FFmpegError as error:
        sound = formats == SOUND_FORMATS
        what = "sound file that can be read: Format not recognised" if sound else "video that can be decoded"
        raise MediaError(f"{path} is not a {what}") from error
    with container:
        try:
            yield container
        except av.FFmpegError as error:
            raise MediaError(f"{path} cannot be decoded: {error.strerror}") from error


def _decode(container: InputContainer, stream: av.AudioStream | av.VideoStream) -> Iterator[av.AudioFrame | av.VideoFrame]:
    """All that can be decoded of a stream. A damaged packet is left out; where the file itself is broken, it ends."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.InvalidDataError:
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        for frame in frames:
            assert isinstance(frame, av.AudioFrame | av.VideoFrame)
            yield frame
