"""Cameras: a thread for each source takes every frame as it comes, the newest wins, and the last seconds are kept.

A second thread looks at the newest picture a few times a second: it fills the ring of what is kept, and tells when pictures
stay away, are black, or do not change any more. A source that fails is opened again, after longer and longer pauses.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import IO, Any, Literal, Self
from urllib.parse import unquote, urlsplit

import numpy as np

from .frames import MediaError
from .media_files import UNKNOWN_FPS, check_video
from .opencv import PICTURE_PIXELS, cv2
from .pictures import PICTURE_BYTES, decode_picture

PUSHED = "pushed"  # the source of a camera whose pictures come by `push`
RATE = 4.0  # pictures a second that are kept and judged
KEPT_SIDE, KEPT_BYTES = 960, 32 << 20  # pixels of a kept picture's longer side; bytes of all that one camera keeps
SIDE = 1920  # pixels of the newest picture's longer side: a model sees 2.6 megapixels at most
QUALITY = 90
STALLED_AFTER, BLACK_AFTER, FROZEN_AFTER = 5.0, 3.0, 30.0  # seconds; an encoder renews a still picture within 10
OPENING, READING = 5_000, 5_000  # milliseconds that a stream may take; a snapshot as well
SNAPSHOTS = 1.0  # seconds from one snapshot to the next
PAUSES = (0.5, 30.0)  # seconds before a lost source is opened again: the first, doubled up to the last

State = Literal["opening", "live", "stalled", "black", "frozen", "lost"]


@dataclass(frozen=True, slots=True)
class Health:
    """How a camera is, and one sentence about it for a person."""

    state: State
    why: str


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """A picture as a JPEG, when it was taken in seconds since 1970, and a small grey copy to tell change by."""

    jpeg: bytes = field(repr=False)
    at: float
    size: tuple[int, int]  # height, width
    grey: np.ndarray = field(repr=False)  # uint8 [18, 32]


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    pixels: np.ndarray  # uint8 BGR [H, W, 3]
    jpeg: bytes | None = None  # as the source gave it
    at: float = field(default_factory=time.time)
    since: float = field(default_factory=time.monotonic)


class Sight:
    """What is wrong with pictures, by their grey copies and the seconds at which they came. Pure."""

    def __init__(self, now: float) -> None:
        self._last: np.ndarray | None = None
        self._came = self._changed = self._lit = now

    def see(self, grey: np.ndarray, now: float) -> None:
        if self._last is None or not np.array_equal(grey, self._last):
            self._changed = now
        if grey.mean() > 12 or grey.std() > 6:
            self._lit = now
        self._last, self._came = grey, now

    def fault(self, now: float) -> Health | None:
        if now - self._came >= STALLED_AFTER:
            return Health("stalled", f"there has been no new picture for {now - self._came:.0f} s")
        if self._came - self._lit >= BLACK_AFTER:
            return Health("black", "the picture is black: the lens is covered, or it is dark")
        if self._came - self._changed >= FROZEN_AFTER:
            return Health("frozen", f"the picture has not changed at all for {FROZEN_AFTER:.0f} s")
        return None


class Camera:
    """`source`: a device's number or path, a video file (played over and over), an rtsp:// address, the http:// address of a
    snapshot on the local network, or `PUSHED`. Starts its threads; `close` ends them.

    `changed` is told each new state, by a thread of the camera. Everything may be called from any thread; `newest` encodes,
    which takes some 20 ms. Raises MediaError for what can never be a camera; what may yet come up is only reported.
    """

    def __init__(self, source: int | str, keep: float = 10.0, changed: Callable[[Health], None] = lambda health: None) -> None:
        self.health = Health("opening", f"{shown(source)} has not given a picture yet")
        self._keep, self._tell = keep, changed
        self._ring: deque[tuple[float, Shot]] = deque()  # with the monotonic time, which the clock's jumps do not touch
        self._lost: str | None = None
        self._frame: _Frame | None = None
        self._encoded: tuple[_Frame, Shot] | None = None
        self._given: tuple[bytes, float] | None = None
        self._moved = threading.Condition()  # guards what is above
        self._over = threading.Event()
        self.source, self._shots = source, _opener(source, self)
        name = f"camera {shown(source)}"
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for run in (self._grab, self._watch)]
        for thread in self._threads:
            thread.start()

    def newest(self, wait: float = 0.0) -> Shot | None:
        """The newest picture, for whose first one this waits so many seconds. None: there has been none."""
        with self._moved:
            self._moved.wait_for(lambda: self._frame or self._over.is_set(), wait)
            frame, done = self._frame, self._encoded
        if frame is None or (done and done[0] is frame):
            return done[1] if frame and done else None
        shot = _shot(frame, SIDE)
        with self._moved:
            self._encoded = (frame, shot)
        return shot

    def around(self, at: float, before: float, after: float = 0.0) -> list[Shot]:
        """What is kept of the seconds before and after a moment (seconds since 1970), the oldest first."""
        with self._moved:
            return [shot for _, shot in self._ring if at - before <= shot.at <= at + after]

    def push(self, picture: bytes, at: float | None = None) -> None:
        """The next picture of a PUSHED camera, as a file's bytes. Returns at once; what cannot be decoded is reported."""
        assert self.source == PUSHED, "this camera has a source of its own"
        with self._moved:
            self._given = picture, time.time() if at is None else at
            self._moved.notify_all()

    def close(self) -> None:
        self._over.set()
        with self._moved:
            self._moved.notify_all()
        for thread in self._threads:
            thread.join(3 * READING / 1000)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread of the source

    def _grab(self) -> None:
        pause = PAUSES[0]
        while not self._over.is_set():
            try:
                for frame in self._shots():
                    with self._moved:
                        self._frame, self._lost, pause = frame, None, PAUSES[0]
                        self._moved.notify_all()
                    if self._over.is_set():
                        return
            except (MediaError, cv2.error) as error:
                with self._moved:
                    self._lost = str(error) if isinstance(error, MediaError) else f"{shown(self.source)} cannot be decoded"
                    self._moved.notify_all()
                self._over.wait(pause)
                pause = min(2 * pause, PAUSES[1])

    def pushed(self) -> Iterator[_Frame]:
        """What was pushed last, as it comes."""
        while True:
            with self._moved:
                self._moved.wait_for(lambda: self._given or self._over.is_set())
                given, self._given = self._given, None
            if given is None:
                return
            yield _decoded(given[0], "the picture that was sent", given[1])

    def paced(self, seconds: float) -> bool:
        """Waits; False: the camera is closed."""
        return not self._over.wait(max(0.0, seconds))

    # -- the thread that looks

    def _watch(self) -> None:
        sight, seen = Sight(time.monotonic()), None
        while not self._over.is_set():
            with self._moved:
                self._moved.wait_for(lambda seen=seen: self._over.is_set() or self._frame is not seen or self._lost, 1 / RATE)  # type: ignore[misc]
                frame, lost = self._frame, self._lost
            if frame and frame is not seen:
                shot, seen = _shot(frame, KEPT_SIDE), frame
                sight.see(shot.grey, frame.since)
                self._add(frame.since, shot)
            self._judge(sight, lost)
            self._over.wait(1 / RATE)

    def _add(self, since: float, shot: Shot) -> None:
        with self._moved:
            self._ring.append((since, shot))
            held = sum(len(kept.jpeg) for _, kept in self._ring)
            while len(self._ring) > 1 and (self._ring[0][0] < since - self._keep or held > KEPT_BYTES):
                held -= len(self._ring.popleft()[1].jpeg)

    def _judge(self, sight: Sight, lost: str | None) -> None:
        fault = sight.fault(time.monotonic())
        if lost:
            health = Health("lost", lost)
        elif self._frame is None:
            health = self.health
        elif fault and not (fault.state == "stalled" and self.source == PUSHED):  # who pushes does so when there is something
            health = fault
        else:
            health = Health("live", f"{shown(self.source)} is live")
        if health.state != self.health.state or (lost and health != self.health):
            self.health = health
            self._tell(health)


def shown(source: int | str) -> str:
    """A source as it may be told: without user and password."""
    return re.sub(r"//[^/@]*@", "//", str(source)) if isinstance(source, str) else f"camera {source}"


def grey(pixels: np.ndarray) -> np.ndarray:
    """BGR [H, W, 3] → uint8 [18, 32]."""
    return cv2.cvtColor(cv2.resize(pixels, (32, 18), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)


def _shot(frame: _Frame, side: int) -> Shot:
    height, width = frame.pixels.shape[:2]
    scale, jpeg, pixels = side / max(height, width), frame.jpeg, frame.pixels
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels, jpeg = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), None
    if jpeg is None:
        jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return Shot(jpeg, frame.at, pixels.shape[:2], grey(pixels))


def _decoded(data: bytes, name: str, at: float) -> _Frame:
    pixels = cv2.cvtColor(decode_picture(data, name), cv2.COLOR_RGB2BGR)
    return _Frame(pixels, data if data.startswith(b"\xff\xd8") else None, at)


# ---- sources: each call opens anew and gives frames until MediaError says why there are no more


def _opener(source: int | str, camera: Camera) -> Callable[[], Iterator[_Frame]]:
    if source == PUSHED:
        return camera.pushed
    if isinstance(source, int) or source.startswith("/dev/"):
        return lambda: _device(source)
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme in ("rtsp", "rtsps"):
        return lambda: _stream(source)
    if scheme in ("http", "https"):
        if not urlsplit(source).hostname:
            raise MediaError(f"{shown(source)} names no host")
        return lambda: _snapshots(source, camera)
    if scheme:
        raise MediaError(f"{shown(source)} is no camera: give a device, a video file, or an rtsp:// or http:// address")
    return lambda: _file(source, camera)


def _device(source: int | str) -> Iterator[_Frame]:
    path = f"/dev/video{source}" if isinstance(source, int) else source
    if sys.platform == "linux" and not os.path.exists(path):
        raise MediaError(f"there is no camera at {path}: is it plugged in, and is its number right?")
    if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
        raise MediaError(f"this user may not open {path}; the group video may: sudo usermod -aG video $USER, and log in anew")
    capture = cv2.VideoCapture(source, cv2.CAP_ANY, [cv2.CAP_PROP_BUFFERSIZE, 1])
    closed = f"the camera {path} cannot be opened; does another program use it?"
    yield from _frames(capture, closed, f"the camera {path} gives no pictures any more")


def _stream(address: str) -> Iterator[_Frame]:
    waits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPENING, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READING]
    capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, waits)
    closed = f"{shown(address)} cannot be opened: is it reachable, and are path, user and password right?"
    yield from _frames(capture, closed, f"{shown(address)} has broken off")


def _frames(capture: cv2.VideoCapture, closed: str, ended: str) -> Iterator[_Frame]:
    try:
        if not capture.isOpened():
            raise MediaError(closed)
        while capture.grab():
            ok, pixels = capture.retrieve()
            if ok:
                yield _Frame(_sized(pixels, ended))
        raise MediaError(ended)
    finally:
        capture.release()


def _sized(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.shape[0] * pixels.shape[1] > PICTURE_PIXELS:
        raise MediaError(f"{name}: its pictures have more than {PICTURE_PIXELS:,} pixels")
    return pixels


def _file(path: str, camera: Camera) -> Iterator[_Frame]:
    """At the pace at which it was taken, over and over."""
    damaged = f"{path} is not a video that can be decoded"
    while True:
        check_video(path)
        capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
        fps = capture.get(cv2.CAP_PROP_FPS)
        gap = 1 / (fps if 0 < fps <= 1_000 else UNKNOWN_FPS)
        due, given = time.monotonic(), 0
        try:
            for frame in _frames(capture, damaged, damaged):
                if not camera.paced(due - time.monotonic()):
                    return
                yield _Frame(frame.pixels)
                due, given = max(due, time.monotonic() - 1) + gap, given + 1
        except MediaError:
            if not given:
                raise


def _snapshots(address: str, camera: Camera) -> Iterator[_Frame]:
    fetch = _fetcher(address)
    while True:
        begun = time.monotonic()
        yield _decoded(fetch(), f"what {shown(address)} gives", time.time())
        if not camera.paced(begun + SNAPSHOTS - time.monotonic()):
            return


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _fetcher(address: str) -> Callable[[], bytes]:
    """Fetches one picture from this network: no redirects, no proxies, so many bytes and seconds."""
    parts, name = urlsplit(address), shown(address)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    secrets = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    if parts.username:
        secrets.add_password(None, plain, unquote(parts.username), unquote(parts.password or ""))
    ways = [urllib.request.HTTPDigestAuthHandler(secrets), urllib.request.HTTPBasicAuthHandler(secrets)]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay(), *ways)

    def fetch() -> bytes:
        try:
            _check_local(parts.hostname or "", name)
            with opener.open(plain, timeout=READING / 1000) as answer:
                return _read(answer, name)
        except urllib.error.HTTPError as error:
            raise MediaError(f"{name} answers {error.code} {error.reason}".strip()) from error
        except (OSError, HTTPException) as error:
            why = getattr(error, "reason", None) or error
            raise MediaError(f"{name} cannot be reached: {getattr(why, 'strerror', None) or why}") from error

    return fetch


def _check_local(host: str, name: str) -> None:
    for *_, place in socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP):
        if ipaddress.ip_address(str(place[0]).partition("%")[0]).is_global:
            raise MediaError(f"{name} is not on the local network; snapshots are fetched from nowhere else")


def _read(answer: IO[bytes], name: str) -> bytes:
    until, data = time.monotonic() + 2 * READING / 1000, bytearray()
    while part := answer.read(1 << 16):
        data += part
        if len(data) > PICTURE_BYTES:
            raise MediaError(f"{name} gives more than {PICTURE_BYTES:,} bytes")
        if time.monotonic() > until:
            raise MediaError(f"{name} gives its picture too slowly")
    return bytes(data)
