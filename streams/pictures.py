"""Pictures from files and from clients → uint8 RGB arrays. Their limits are checked before anything is decoded.

Everything here blocks, `check_picture` excepted: call it in a thread (decoding releases the GIL). What cannot be used raises
MediaError with one sentence that names the picture. Decoding takes up to 8 bytes for each pixel of the file, half a gigabyte
at the very most; what is returned has at most DECODED_PIXELS, 48 MiB.
"""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.frames import MediaError, Path, open_file
from streams.opencv import PICTURE_PIXELS, cv2

Pixels = NDArray[np.uint8]

PICTURE_BYTES = 32 << 20
DECODED_PIXELS = 1 << 24  # a larger picture is made smaller; no model here sees more than 2.6 million
JPEG_SCANS = 64  # a progressive JPEG has about 10; each further one costs 33 bytes and, at 16 megapixels, 16 ms
JPEG_SEGMENTS = 4096
PNG_CHUNKS = 1 << 16
STRIP = 256  # rows whose transparency is blended at once

# A marker in a JPEG that matters: not a stuffed zero, a fill byte or a restart inside of the compressed data.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)
_HEIF = re.compile(rb".{4}ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1|avif|avis)", re.DOTALL)


class PictureHeader(NamedTuple):
    """Width and height in pixels as stored, before EXIF turns it; zeros where the file is damaged."""

    width: int
    height: int
    transparent: bool = False  # it may be
    scans: int = 1  # of a JPEG


_DAMAGED = PictureHeader(0, 0)


def read_picture(path: Path) -> Pixels:
    """The picture in a file: PNG, JPEG, WebP, HEIC or AVIF, otherwise as `decode_picture` gives it. Raises MediaError."""
    return decode_picture(load_picture(path), str(path))


def load_picture(path: Path) -> bytes:
    """The bytes of a picture file as `decode_picture` takes them; HEIC and AVIF are made a JPEG. Raises MediaError."""
    with open_file(path) as file:
        data = file.read(PICTURE_BYTES + 1)
    if not _HEIF.match(data) or len(data) > PICTURE_BYTES:
        return data
    pixels = _decode_heif(data, str(path))
    how = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), how)[1].tobytes()


def decode_picture(data: bytes, name: str) -> Pixels:
    """PNG, JPEG or WebP → uint8 RGB [H, W, 3], upright by its EXIF, transparency on white, 16 bits cut to 8.

    Of an animation, the first frame. Colour profiles are not applied, nor is the one transparent grey (tRNS) of a grey PNG.
    A picture of more than DECODED_PIXELS is made smaller: a JPEG by half as it is decoded. Raises MediaError.
    """
    header = check_picture(data, name)
    large = header.width * header.height > DECODED_PIXELS
    buffer = np.frombuffer(data, np.uint8)
    flags = cv2.IMREAD_REDUCED_GRAYSCALE_2 if large and data.startswith(b"\xff\xd8") else 0  # the bit that halves, of any colour
    try:
        pixels = _decode_on_white(buffer) if header.transparent else None
        if pixels is None:
            pixels = _decode_rgb(buffer, flags)
    except cv2.error as error:
        raise MediaError(f"{name} is damaged or cut short") from error
    if pixels is None:
        raise MediaError(f"{name} is damaged or cut short")
    return _shrink(pixels)


def _shrink(pixels: NDArray[Any]) -> NDArray[Any]:
    """A picture [H, W, C] of more than DECODED_PIXELS in fewer, in the same proportions."""
    height, width = pixels.shape[:2]
    if height * width <= DECODED_PIXELS:
        return pixels
    scale = (DECODED_PIXELS / (height * width)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def check_picture(data: bytes, name: str) -> PictureHeader:
    """What the header of a PNG, JPEG or WebP says: this takes a few milliseconds, decoding may take a second.

    Raises MediaError for another kind of file, for too many bytes, pixels or scans, and for what is seen to be cut short.
    """
    if len(data) > PICTURE_BYTES:
        raise MediaError(f"{name} has more than {PICTURE_BYTES:,} bytes")
    if _HEIF.match(data):
        raise MediaError(f"{name} is a HEIC or AVIF photo, not a PNG, JPEG or WebP picture: export or share it as a JPEG")
    header = _read_header(data)
    if header is None:
        raise MediaError(f"{name} is not a PNG, JPEG or WebP picture")
    _check_size(header, name)
    scans = max(1, min(JPEG_SCANS, JPEG_SCANS * DECODED_PIXELS // (header.width * header.height)))
    if header.scans > scans:
        raise MediaError(f"{name} is a JPEG of more than {scans} scans")
    return header


def _check_size(header: PictureHeader, name: str) -> None:
    width, height = header[:2]
    if width * height > PICTURE_PIXELS:
        raise MediaError(f"{name} has {width:,}×{height:,} pixels, more than {PICTURE_PIXELS:,}")
    if width * height == 0:
        raise MediaError(f"{name} is damaged or cut short")


# ---- headers


def _read_header(data: bytes) -> PictureHeader | None:
    """None: it is no picture of a kind that is decoded here."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_png(data)
    if data.startswith(b"\xff\xd8"):
        return _read_jpeg(data)
    if data.startswith(b"RIFF") and data[8:15] == b"WEBPVP8":
        return _read_webp(data)
    return None


def _read_png(data: bytes) -> PictureHeader:
    kinds: list[bytes] = []
    at = 8
    # To its end, as cv2 5.0 sets aside what a chunk says it holds, up to 4 GB, before it looks whether that is there.
    while at + 12 <= len(data) and len(kinds) < PNG_CHUNKS and kinds[-1:] != [b"IEND"]:
        kinds.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4])
    if at > len(data) or kinds[:1] != [b"IHDR"] or kinds.count(b"IHDR") > 1 or kinds[-1] != b"IEND":
        return _DAMAGED
    transparent = data[25] & 4 > 0 or b"tRNS" in kinds
    return PictureHeader(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), transparent)


def _read_jpeg(data: bytes) -> PictureHeader:
    """Segment by segment to the end of the image. What lies behind it is not looked at: the film of a motion photo, say, in
    which any pair of bytes comes up."""
    width = height = scans = 0
    at = 2
    for _ in range(JPEG_SEGMENTS):
        if not (found := _MARKER.search(data, at)):
            break
        marker, at = found[1][0], found.end()
        if marker == 0xD9:  # EOI
            break
        if marker in (0x01, 0xD8):  # these stand alone
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and not width:
            height, width = int.from_bytes(data[at + 3 : at + 5]), int.from_bytes(data[at + 5 : at + 7])
        scans += marker == 0xDA
        at += int.from_bytes(data[at : at + 2])
    else:
        return _DAMAGED
    return PictureHeader(width, height, False, scans)


def _read_webp(data: bytes) -> PictureHeader:
    kind, body = data[15:16], data[20:30]
    if len(body) < 10:
        return _DAMAGED
    if kind == b"X":
        size = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        return PictureHeader(*size, body[0] & 16 > 0)
    if kind == b"L":
        bits = int.from_bytes(body[1:5], "little")
        return PictureHeader(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bits >> 28 & 1 > 0)
    size = int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return PictureHeader(*size)


# ---- decoding


def _decode_on_white(buffer: Pixels) -> Pixels | None:
    """None: it is not transparent after all."""
    pixels, kinds, metadata = cv2.imdecodeWithMetadata(buffer, cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 4:
        return None
    flat = _on_white(_shrink(pixels))
    if cv2.IMAGE_METADATA_EXIF not in kinds:
        return np.ascontiguousarray(flat[..., ::-1])
    # cv2 turns a picture upright only where it drops the alpha, so it gets the flat picture back with the same EXIF.
    _, encoded = cv2.imencodeWithMetadata(".png", flat, kinds, metadata, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    return _decode_rgb(encoded)


def _decode_rgb(buffer: Pixels, flags: int = 0) -> Pixels | None:
    pixels = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB | flags)
    return None if pixels is None else np.asarray(pixels, np.uint8)


def _on_white(pixels: NDArray[Any]) -> Pixels:
    """uint8 or uint16 [H, W, 4], its alpha last → uint8 [H, W, 3]."""
    flat = np.empty((*pixels.shape[:2], 3), np.uint8)
    for top in range(0, len(pixels), STRIP):  # the whole of it in 16 bits were another 300 MB
        strip = pixels[top : top + STRIP]
        strip = strip >> 8 if strip.dtype == np.uint16 else strip.astype(np.uint16)
        colour, alpha = strip[..., :3], strip[..., 3:]
        flat[top : top + STRIP] = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    return flat


def _decode_heif(data: bytes, name: str) -> Pixels:
    """HEIC or AVIF → uint8 RGB [H, W, 3], as `decode_picture` has it, turned upright as the file says."""
    from pi_heif import HeifImageFile  # late: only files of photos come here
    from PIL import ImageOps
    from PIL.AvifImagePlugin import AvifImageFile

    kind = AvifImageFile if b"avi" in data[8:12] else HeifImageFile  # made directly: Image.open would have limits of its own
    wrong = (OSError, ValueError, RuntimeError, SyntaxError, EOFError)
    try:
        photo = kind(io.BytesIO(data))
    except wrong as error:
        raise MediaError(f"{name} is damaged or cut short") from error
    _check_size(PictureHeader(*photo.size), name)
    try:
        upright = ImageOps.exif_transpose(photo)
        pixels = np.asarray(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))
    except wrong as error:
        raise MediaError(f"{name} is damaged or cut short") from error
    pixels = _shrink(pixels)
    return _on_white(pixels) if pixels.shape[2] == 4 else pixels
