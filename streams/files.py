"""Files from outside → samples, pictures and video frames. A picture's limits are checked before anything of it is decoded.

Everything here blocks: call it in a thread. What cannot be used raises MediaError with one sentence that names the file.
"""

import asyncio
import os
import re
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from .frames import FRAME, RATE, Audio, Framer, MediaError
from .opencv import PICTURE_PIXELS, cv2

LONGEST = 3_600  # seconds of sound or video
RATES = (8_000, 192_000)  # samples a second
LOUDEST = 4.0  # 12 dB over full scale: past mastering overshoot, float samples are in some other unit
PICTURE_BYTES = 32 << 20
PICTURE_SCANS = 64  # a progressive JPEG has about 10; each further one costs 33 bytes and, at 16 megapixels, 16 ms
UNKNOWN_FPS = 24.0  # what transformers assumes

Path = str | os.PathLike[str]

# FFmpeg also "plays" text files, pictures and playlists that name other files, so the container is recognised here first.
VIDEO = re.compile(
    rb".{4}(ftyp|moov|mdat|wide|free|skip)"  # MP4, MOV
    rb"|\x1a\x45\xdf\xa3"  # Matroska, WebM
    rb"|RIFF.{4}AVI "
    rb"|\x47.{187}\x47|\x00\x00\x01\xba",  # MPEG transport and program streams
    re.DOTALL,
)


def _open(path: Path) -> BinaryIO:
    """A regular file with something in it; a pipe or a device could block or never end."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise MediaError(f"{path} is not a file")
        if about.st_size == 0:
            raise MediaError(f"{path} is empty")
        return open(path, "rb")
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error


def read_audio(path: Path) -> np.ndarray:
    """float32 [n] at 16 kHz, channels averaged. Overshoot is clipped, never normalised: the model knows silence by its level."""
    parts: list[np.ndarray] = []
    with _open(path) as file:
        try:
            # By descriptor: given a name that ends in .raw, soundfile would not look at the content.
            with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                rate = sound.samplerate
                if not RATES[0] <= rate <= RATES[1]:
                    raise MediaError(f"{path} has {rate:,} samples a second; {RATES[0]:,} to {RATES[1]:,} are read")
                resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32")
                # Counted while reading, as the length in a header may be unknown or untrue.
                while len(block := sound.read(1 << 16, dtype="float32", always_2d=True)):
                    if sound.tell() > LONGEST * rate:
                        raise MediaError(f"{path} is longer than {LONGEST:,} seconds")
                    peak = np.abs(block).max()
                    if not np.isfinite(peak):
                        raise MediaError(f"{path} holds NaN or infinite samples")
                    if peak > LOUDEST:
                        raise MediaError(f"{path} holds float samples of ±{peak:g} where full scale is ±1")
                    parts.append(resampler.resample_chunk(block.mean(axis=1)))
                parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        except soundfile.LibsndfileError as error:
            raise MediaError(f"{path} is not a sound file that can be read: {error.error_string.strip(' .')}") from error
    samples = np.concatenate(parts)
    if len(samples) == 0:
        raise MediaError(f"{path} holds no sound")
    return np.clip(samples, -1, 1, out=samples)


async def play(
    samples: np.ndarray,
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


def read_picture(path: Path) -> np.ndarray:
    """The picture in a file, as decode_picture gives it."""
    with _open(path) as file:
        return decode_picture(file.read(PICTURE_BYTES + 1), str(path))


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """PNG, JPEG or WebP → uint8 RGB [H, W, 3], upright by its EXIF, transparency on white, 16 bits cut to 8.

    Of an animation, the first frame. Colour profiles are not applied, nor is the one transparent grey (tRNS) of a grey PNG.
    """
    alpha, damaged = check_picture(data, name), MediaError(f"{name} is damaged or cut short")
    buffer = np.frombuffer(data, np.uint8)
    try:
        pixels = _on_white(buffer) if alpha else None
        if pixels is None:
            pixels = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise damaged from error
    if pixels is None:
        raise damaged
    return pixels


def check_picture(data: bytes, name: str) -> bool:
    """Whether it may be transparent. Raises MediaError for what its header gives away: that takes no time, decoding does."""
    if len(data) > PICTURE_BYTES:
        raise MediaError(f"{name} has more than {PICTURE_BYTES:,} bytes")
    header = _header(data)
    if header is None:
        raise MediaError(f"{name} is not a PNG, JPEG or WebP picture")
    width, height, alpha = header
    if width * height > PICTURE_PIXELS:
        raise MediaError(f"{name} has {width:,}×{height:,} pixels, more than {PICTURE_PIXELS:,}")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > PICTURE_SCANS:
        raise MediaError(f"{name} is a JPEG of more than {PICTURE_SCANS} scans")
    if width * height == 0:
        raise MediaError(f"{name} is damaged or cut short")
    return alpha


def _header(data: bytes) -> tuple[int, int, bool] | None:
    """(width, height, whether it may be transparent), or None if it is no picture that is read here; zeros if it is broken."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_header(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg_header(data)
    if data.startswith(b"RIFF") and data[8:15] == b"WEBPVP8":
        return _webp_header(data)
    return None


def _png_header(data: bytes) -> tuple[int, int, bool]:
    kinds: list[bytes] = []
    at = 8
    # To its end, as cv2 5.0 sets aside what a chunk says it holds, up to 4 GB, before it looks whether that is there.
    while at + 12 <= len(data) and len(kinds) < 1 << 16 and kinds[-1:] != [b"IEND"]:
        kinds.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4])
    if at > len(data) or kinds[:1] != [b"IHDR"] or kinds.count(b"IHDR") > 1 or kinds[-1] != b"IEND":
        return 0, 0, False
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), data[25] & 4 > 0 or b"tRNS" in kinds


def _jpeg_header(data: bytes) -> tuple[int, int, bool]:
    at = 2
    for _ in range(4096):  # segments before the frame header: Exif, colour profile, thumbnails, tables
        if at + 9 > len(data) or data[at] != 0xFF:
            break
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7]), False
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
    return 0, 0, False


def _webp_header(data: bytes) -> tuple[int, int, bool]:
    kind, body = data[15:16], data[20:30]
    if len(body) < 10:
        return 0, 0, False
    if kind == b"X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"), body[0] & 16 > 0
    if kind == b"L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bits >> 28 & 1 > 0
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF, False


def _on_white(buffer: np.ndarray) -> np.ndarray | None:
    pixels, kinds, metadata = cv2.imdecodeWithMetadata(buffer, cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 4:
        return None
    if pixels.dtype == np.uint16:
        pixels = (pixels // 256).astype(np.uint8)
    alpha = pixels[..., 3:].astype(np.uint16)
    pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if cv2.IMAGE_METADATA_EXIF not in kinds:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    # cv2 turns a picture upright only where it drops the alpha, so it gets the flat picture back with the same EXIF.
    _, flat = cv2.imencodeWithMetadata(".png", pixels, kinds, metadata, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    return cv2.imdecode(flat, cv2.IMREAD_COLOR_RGB)


def check_video(path: Path) -> None:
    """Raises MediaError where a file does not begin as a video does."""
    with _open(path) as file:
        if not VIDEO.match(file.read(189)):
            raise MediaError(f"{path} is not an MP4, MOV, Matroska, WebM, AVI or MPEG video")


def read_video(path: Path, frames: int = 32) -> list[tuple[float, np.ndarray]]:
    """(seconds, uint8 RGB [H, W, 3]) of `frames` frames spread evenly from the first on, upright.

    A video of fewer frames gives all it has (transformers raises). Seconds are index / fps, as if the rate were constant.
    """
    assert frames > 0, frames
    check_video(path)
    taken, claimed, seen = _sample_video(path, frames, None)
    if seen != claimed:  # some containers do not know, and a file cut short knows wrong
        taken, _, seen = _sample_video(path, frames, seen)
    if not taken:
        raise MediaError(f"{path} holds no frame that can be decoded")
    return taken


def _sample_video(path: Path, frames: int, total: int | None) -> tuple[list[tuple[float, np.ndarray]], int, int]:
    """One pass: the frames wanted of `total` (what the container claims if None), that total, and how many there really were."""
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise MediaError(f"{path} is not a video that can be decoded")
        width, height = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > PICTURE_PIXELS:
            raise MediaError(f"{path} has {width:,}×{height:,} pixels, more than {PICTURE_PIXELS:,}")
        fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps if 0 < fps <= 1_000 else UNKNOWN_FPS
        if total is None:
            total = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        wanted = {index * total // frames for index in range(frames)}
        taken: list[tuple[float, np.ndarray]] = []
        seen = 0
        # Every frame is decoded in turn: seeking lands on the wrong frame in some containers, and only the end tells the count.
        while max(seen, total) <= LONGEST * fps and capture.grab():
            if seen in wanted:
                ok, pixels = capture.retrieve()
                if not ok:
                    raise MediaError(f"{path} has a frame that cannot be decoded, {seen / fps:.1f} s from its start")
                taken.append((seen / fps, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)))
            seen += 1
        if max(seen, total) > LONGEST * fps:
            raise MediaError(f"{path} is longer than {LONGEST:,} seconds")
        return taken, total, seen
    finally:
        capture.release()
