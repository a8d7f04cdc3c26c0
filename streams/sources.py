"""Where a camera's pictures come from: devices, streams, video files, snapshots. `open_source` is the way in.

Each source is a function that opens anew with every call and gives frames until MediaError says why there are no more.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException, responses
from typing import IO, Any

import numpy as np

from .address import ENCODE, check_source, display, may_need_encoding, without_login
from .frames import MediaError
from .media_files import LONGEST, UNKNOWN_FPS, check_video
from .opencv import PICTURE_PIXELS, cv2
from .pictures import PICTURE_BYTES, decode_picture

OPENING, READING = 5_000, 5_000  # milliseconds that a stream may take to open and to give a frame; a snapshot as well
SNAPSHOTS = 1.0  # seconds from one snapshot to the next
LATE = 1.0  # seconds that a video file may be behind its own times before it goes on from where it is

WaitUntil = Callable[[float], bool]  # sleeps until a time of time.monotonic(); False: the camera is closed


@dataclass(frozen=True, slots=True, eq=False)
class CameraFrame:
    """One picture as a source gave it."""

    pixels: np.ndarray  # uint8 BGR [H, W, 3]
    jpeg: bytes | None = None  # the file itself, where it came as a JPEG
    at: float = field(default_factory=time.time)  # when it was taken, in seconds since 1970
    arrived: float = field(default_factory=time.monotonic)
    retained: bool = False  # it was taken before it came, and nobody knows when


def open_source(source: int | str, wait_until: WaitUntil) -> Callable[[], Iterator[CameraFrame]]:
    """The function that opens this device number, path or address. Raises MediaError for what can never be a camera."""
    check_source(source)
    if isinstance(source, int) or source.startswith("/dev/"):
        return lambda: read_device(source)
    scheme = source.partition("://")[0].lower() if "://" in source else ""
    if scheme in ("rtsp", "rtsps"):
        return lambda: read_stream(source)
    if scheme in ("http", "https"):
        return lambda: read_snapshots(source, wait_until)
    return lambda: play_file(source, wait_until)


def decoded(data: bytes, name: str, at: float, retained: bool = False) -> CameraFrame:
    """A picture file's bytes as a frame. Raises MediaError, which calls it `name`."""
    pixels = cv2.cvtColor(decode_picture(data, name), cv2.COLOR_RGB2BGR)
    return CameraFrame(pixels, data if data.startswith(b"\xff\xd8") else None, at, retained=retained)


def read_device(source: int | str) -> Iterator[CameraFrame]:
    path = f"/dev/video{source}" if isinstance(source, int) else source
    if sys.platform == "linux" and not os.path.exists(path):
        raise MediaError(f"there is no camera at {path}: is it plugged in, and is its number right?")
    if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
        raise MediaError(f"this user may not open {path}; the group video may: sudo usermod -aG video $USER, and log in anew")
    capture = cv2.VideoCapture(source, cv2.CAP_ANY, [cv2.CAP_PROP_BUFFERSIZE, 1])
    closed = f"the camera {path} cannot be opened; does another program use it?"
    for pixels, _ in _captured(capture, closed, f"the camera {path} gives no pictures any more"):
        yield CameraFrame(pixels)


def read_stream(address: str) -> Iterator[CameraFrame]:
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPENING, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READING]
    capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)
    closed = f"{display(address)} cannot be opened: is it reachable, and are path, user and password right?"
    for pixels, _ in _captured(capture, closed + _encoding_advice(address), f"{display(address)} has broken off"):
        yield CameraFrame(pixels)


def play_file(path: str, wait_until: WaitUntil) -> Iterator[CameraFrame]:
    """A video at the pace at which it was taken, each frame at its own time, over and over."""
    damaged = f"{display(path)} is not a video that can be decoded"
    while True:
        check_video(path)
        capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
        fps = capture.get(cv2.CAP_PROP_FPS)
        gap = 1 / (fps if 0 < fps <= 1_000 else UNKNOWN_FPS)
        due, last = time.monotonic(), None
        try:
            for pixels, seconds in _captured(capture, damaged, damaged):
                if last is not None:
                    gap = seconds - last if 0 < seconds - last < LONGEST else gap  # else the file's times are not times
                    due = max(due, time.monotonic() - LATE) + gap
                if not wait_until(due):
                    return
                last = seconds
                yield CameraFrame(pixels)
        except MediaError:  # which is its end, if it gave a frame
            if last is None:
                raise
        if not wait_until(due + gap):  # the last frame is shown as long as the one before it
            return


def _captured(capture: cv2.VideoCapture, closed: str, ended: str) -> Iterator[tuple[np.ndarray, float]]:
    """uint8 BGR [H, W, 3] and its seconds from the start. `closed`, `ended`: what MediaError says where it cannot be opened, or
    gives no more."""
    try:
        if not capture.isOpened():
            raise MediaError(closed)
        while capture.grab():
            seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            ok, pixels = capture.retrieve()
            if ok:
                if pixels.shape[0] * pixels.shape[1] > PICTURE_PIXELS:
                    raise MediaError(f"{ended}: its pictures have more than {PICTURE_PIXELS:,} pixels")
                yield pixels, seconds
        raise MediaError(ended)
    finally:
        capture.release()


def read_snapshots(address: str, wait_until: WaitUntil) -> Iterator[CameraFrame]:
    fetch = _fetcher(address)
    while True:
        begun = time.monotonic()
        yield decoded(fetch(), f"what {display(address)} gives", time.time())
        if not wait_until(begun + SNAPSHOTS):
            return


def _encoding_advice(address: str) -> str:
    return f" ({ENCODE})" if may_need_encoding(address) else ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _fetcher(address: str) -> Callable[[], bytes]:
    """Fetches one picture from the local network: no redirects, no proxies, limited bytes and seconds."""
    login, host, plain = without_login(address)
    name, passwords = display(address), urllib.request.HTTPPasswordMgrWithDefaultRealm()
    if login:
        passwords.add_password(None, plain, *login)
    logins = [urllib.request.HTTPDigestAuthHandler(passwords), urllib.request.HTTPBasicAuthHandler(passwords)]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects(), *logins)

    def fetch() -> bytes:
        try:
            _check_local(host, name)
            with opener.open(plain, timeout=READING / 1000) as answer:
                return _body(answer, name)
        except urllib.error.HTTPError as error:
            advice = _encoding_advice(address) if error.code in (401, 403) else ""
            raise MediaError(f"{name} answers {error.code} {responses.get(error.code, '')}".strip() + advice) from error
        except HTTPException as error:  # whose text may quote the address
            raise MediaError(f"{name} does not answer as HTTP demands ({type(error).__name__})") from error
        except OSError as error:
            why = getattr(error, "reason", None) or error
            told = getattr(why, "strerror", None) or ("timed out" if isinstance(why, TimeoutError) else type(why).__name__)
            raise MediaError(f"{name} cannot be reached: {told}") from error
        except ValueError as error:  # urllib's word for a challenge to log in that it does not know; MediaError is one too
            if isinstance(error, MediaError):
                raise
            raise MediaError(f"{name} wants a kind of login that is not known here") from error

    return fetch


def _check_local(host: str, name: str) -> None:
    for *_, place in socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP):
        if ipaddress.ip_address(str(place[0]).partition("%")[0]).is_global:
            raise MediaError(f"{name} is not on the local network; snapshots are fetched from nowhere else")


def _body(answer: IO[bytes], name: str) -> bytes:
    until, data = time.monotonic() + 2 * READING / 1000, bytearray()
    while part := answer.read(1 << 16):
        data += part
        if len(data) > PICTURE_BYTES:
            raise MediaError(f"{name} gives more than {PICTURE_BYTES:,} bytes")
        if time.monotonic() > until:
            raise MediaError(f"{name} gives its picture too slowly")
    return bytes(data)
