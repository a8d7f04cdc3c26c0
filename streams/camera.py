"""Cameras: a thread for each source takes every frame as it comes, the newest wins, and the last seconds are kept.

A second thread looks at the newest picture a few times a second: it fills the ring of pictures that are kept, and reports when
pictures stay away, are black, or no longer change. A source that fails is opened again, after longer and longer pauses.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np

from .address import display
from .frames import MediaError
from .opencv import cv2
from .sources import READING, CameraFrame, decoded, open_source

RATE = 4.0  # pictures a second that are kept and judged
KEPT_SIDE, KEPT_BYTES = 960, 32 << 20  # pixels of a kept picture's longer side; bytes of all that one camera keeps
SIDE = 1920  # pixels of the newest picture's longer side: a model sees 2.6 megapixels at most
QUALITY = 90  # of a JPEG
STALLED_AFTER, BLACK_AFTER, FROZEN_AFTER = 5.0, 3.0, 30.0  # seconds; an encoder renews a still picture within 10
PAUSES = (0.5, 30.0)  # seconds before a lost source is opened again: the first, doubled up to the last

State = Literal["opening", "live", "stalled", "black", "frozen", "lost"]


@dataclass(frozen=True, slots=True)
class Health:
    """A camera's state, and one sentence about it for a person."""

    state: State
    why: str


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """A picture as a JPEG, when it was taken in seconds since 1970, and a small grey copy to detect changes with."""

    jpeg: bytes = field(repr=False)
    at: float
    size: tuple[int, int]  # height, width
    grey: np.ndarray = field(repr=False)  # uint8 [18, 32]
    retained: bool = False  # it was taken before `at`, which is when it came, and nobody knows how long before


class FaultDetector:
    """What is wrong with a camera's pictures, by their grey copies and the seconds at which they came. Pure."""

    def __init__(self, now: float) -> None:
        self._last: np.ndarray | None = None
        self._came = self._changed = self._lit = now

    def add(self, grey: np.ndarray, now: float) -> None:
        """`grey`: uint8 [18, 32]."""
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
    snapshot on the local network, or None for a camera whose pictures come by `push`. Starts its threads; `close` ends them.

    `keep`: seconds of pictures that `around` can return. `changed` is called with each new state, by a thread of the camera.
    Everything may be called from any thread; `newest` encodes, which takes some 20 ms. Raises MediaError for what can never be a
    camera; a source that may yet come up is reported by `changed` and opened again.
    """

    def __init__(
        self, source: int | str | None, keep: float = 10.0, changed: Callable[[Health], None] = lambda health: None
    ) -> None:
        self.source, self._name = source, "the camera" if source is None else display(source)
        self.health = Health("opening", f"{self._name} has not given a picture yet")
        self._keep, self._tell = keep, changed
        self._ring: deque[tuple[float, Shot]] = deque()  # with the monotonic time, which the clock's jumps do not touch
        self._lost: str | None = None
        self._frame: CameraFrame | None = None
        self._encoded: tuple[CameraFrame, Shot] | None = None
        self._pushed: tuple[bytes, float, bool] | None = None  # the next picture that nobody has decoded yet
        self._last_pushed = self._last_retained = b""
        self._decoding = False  # a picture was pushed, and is not there yet
        self._moved = threading.Condition()  # guards what is above
        self._over = threading.Event()
        self._open = self._read_pushed if source is None else open_source(source, self._wait_until)
        self._threads = [threading.Thread(target=run, name=self._name, daemon=True) for run in (self._grab, self._watch)]
        for thread in self._threads:
            thread.start()

    def newest(self, wait: float = 0.0) -> Shot | None:
        """The newest picture. Waits up to `wait` seconds for the first one, and until one that was pushed is decoded. None: there
        has been none."""
        with self._moved:
            self._moved.wait_for(lambda: (self._frame and not self._decoding) or self._over.is_set(), wait)
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

    def push(self, picture: bytes, at: float | None = None, retained: bool = False) -> None:
        """The next picture of a camera without a source, as a file's bytes, and when it was taken in seconds since 1970 (now,
        unless given). `retained`: it may be older; one that was pushed before is ignored. Returns at once; what cannot be decoded
        is reported."""
        assert self.source is None, "this camera has a source of its own"
        with self._moved:
            if retained and picture in (self._last_pushed, self._last_retained):
                return
            self._last_pushed, self._last_retained = picture, picture if retained else self._last_retained
            self._pushed, self._decoding = (picture, time.time() if at is None else at, retained), True
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
                for frame in self._open():
                    with self._moved:
                        self._frame, self._lost, pause = frame, None, PAUSES[0]
                        self._decoding = self._pushed is not None
                        self._moved.notify_all()
                    if self._over.is_set():
                        return
            except (MediaError, cv2.error) as error:
                with self._moved:  # the text of a cv2.error may quote the address
                    self._lost = str(error) if isinstance(error, MediaError) else f"{self._name} cannot be decoded"
                    self._decoding = self._pushed is not None
                    self._moved.notify_all()
                self._over.wait(pause)
                pause = min(2 * pause, PAUSES[1])

    def _read_pushed(self) -> Iterator[CameraFrame]:
        """Each picture that was pushed last, as it comes."""
        while True:
            with self._moved:
                self._moved.wait_for(lambda: self._pushed or self._over.is_set())
                pushed, self._pushed = self._pushed, None
            if pushed is None:
                return
            yield decoded(pushed[0], "the picture that was sent", *pushed[1:])

    def _wait_until(self, due: float) -> bool:
        """False: the camera is closed. `due`: of time.monotonic()."""
        return not self._over.wait(max(0.0, due - time.monotonic()))

    # -- the thread that looks

    def _watch(self) -> None:
        faults, seen = FaultDetector(time.monotonic()), None
        while not self._over.is_set():
            with self._moved:
                self._moved.wait_for(lambda seen=seen: self._over.is_set() or self._frame is not seen or self._lost, 1 / RATE)  # type: ignore[misc]
                frame, lost = self._frame, self._lost
            if frame and frame is not seen:
                shot, seen = _shot(frame, KEPT_SIDE), frame
                faults.add(shot.grey, frame.arrived)
                self._add(frame.arrived, shot)
            self._judge(faults, lost)
            self._over.wait(1 / RATE)

    def _add(self, arrived: float, shot: Shot) -> None:
        with self._moved:
            self._ring.append((arrived, shot))
            held = sum(len(kept.jpeg) for _, kept in self._ring)
            while len(self._ring) > 1 and (self._ring[0][0] < arrived - self._keep or held > KEPT_BYTES):
                held -= len(self._ring.popleft()[1].jpeg)

    def _judge(self, faults: FaultDetector, lost: str | None) -> None:
        fault, frame = faults.fault(time.monotonic()), self._frame
        if lost:
            health = Health("lost", lost)
        elif frame is None:
            health = self.health
        elif frame.retained:
            health = Health("live", f"{self._name} has given an older picture, and none since")
        elif fault and not (fault.state == "stalled" and self.source is None):  # pictures are pushed when something happens
            health = fault
        else:
            health = Health("live", f"{self._name} is live")
        if health.state != self.health.state or (health.state in ("lost", "live") and health != self.health):
            self.health = health
            self._tell(health)


def small_grey(pixels: np.ndarray) -> np.ndarray:
    """BGR [H, W, 3] → uint8 [18, 32]."""
    return cv2.cvtColor(cv2.resize(pixels, (32, 18), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)


def _shot(frame: CameraFrame, side: int) -> Shot:
    height, width = frame.pixels.shape[:2]
    scale, jpeg, pixels = side / max(height, width), frame.jpeg, frame.pixels
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels, jpeg = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), None
    if jpeg is None:
        jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return Shot(jpeg, frame.at, pixels.shape[:2], small_grey(pixels), frame.retained)
