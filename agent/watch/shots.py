"""The cameras, which of their pictures a question is answered from, and the one that is published, with its marks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from agent import marks
from agent.marks import Mark
from agent.watch.config import LONGEST_LOOK_BACK, ConfigError, WatchConfig
from agent.watch.requests import CameraQuestion
from streams.camera import QUALITY, Camera, Health, Shot
from streams.frames import MediaError
from streams.opencv import cv2
from streams.pictures import decode_picture

FIRST_PICTURE = 10.0  # seconds that a question waits for a camera that has just been opened
STALE = 10.0  # seconds after which the picture of a camera that gives them by itself is too old to answer from
STILL = 2.0  # grey levels on average, of 255, below which two pictures show the same


def open_cameras(config: WatchConfig, changed: Callable[[str, Health], None] = lambda name, health: None) -> dict[str, Camera]:
    """By name. `changed` is called with a name and a new state, by any thread. Raises ConfigError."""
    cameras: dict[str, Camera] = {}
    for name, camera in config.camera.items():
        try:
            cameras[name] = Camera(camera.source, LONGEST_LOOK_BACK, partial(changed, name))
        except MediaError as error:
            close_cameras(cameras)
            raise ConfigError(f"the camera {name} cannot be used: {error}") from error
    return cameras


def close_cameras(cameras: dict[str, Camera]) -> None:
    """Blocks until their threads have ended."""
    for camera in cameras.values():
        camera.close()


def look(camera: Camera, question: CameraQuestion) -> list[Shot]:
    """The pictures to answer from, the oldest first. Blocks. Raises MediaError where there is none that is fresh."""
    newest = camera.newest(wait=FIRST_PICTURE)
    if newest is None:
        raise MediaError(camera.health.why)
    now = time.time()
    if now - newest.at > STALE and camera.source is not None:
        raise MediaError(f"the newest picture is {now - newest.at:.0f} s old: {camera.health.why}")
    if not question.look_back_s:
        return [newest]
    kept = camera.around(question.moment, question.look_back_s, max(0.0, now - question.moment))
    return choose([*[shot for shot in kept if shot.at < newest.at], newest], question.frames, question.moment)


def choose(shots: list[Shot], count: int, moment: float) -> list[Shot]:
    """The last, the one just before the moment, and of the others those that differ most from what is chosen already, in their
    order. What differs from all of it by less than STILL shows nothing new. Pure."""
    if not shots:
        return []
    last = len(shots) - 1
    chosen = [last]
    before = max((number for number in range(last) if shots[number].at < moment), default=None)
    if before is not None and (shots[last].at - shots[before].at > 1 or _difference(shots[last], shots[before]) >= STILL):
        chosen.append(before)
    left = [number for number in range(last) if number not in chosen]
    while left and len(chosen) < count:
        best = max(left, key=lambda number: min(_difference(shots[number], shots[other]) for other in chosen))
        if min(_difference(shots[best], shots[other]) for other in chosen) < STILL:
            break
        chosen.append(best)
        left.remove(best)
    return [shots[number] for number in sorted(chosen)]


def draw_marks(shot: Shot, found: Sequence[Mark]) -> bytes:
    """The picture as a JPEG, with the marks on it. Blocks."""
    if not found:
        return shot.jpeg
    pixels = marks.draw(decode_picture(shot.jpeg, "the picture"), found)
    return cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def _difference(a: Shot, b: Shot) -> float:
    return float(abs(a.grey.astype(int) - b.grey.astype(int)).mean())
