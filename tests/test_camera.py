"""Cameras from real sources: files, a real RTSP server, a real HTTP server, pictures that are pushed."""

from __future__ import annotations

import base64
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streams import camera, sources
from streams.camera import Camera, FaultDetector, Health, Shot
from streams.frames import MediaError
from streams.opencv import cv2
from streams.pictures import decode_picture

SOON = 60.0  # seconds; the machine may be busy
RED, BLUE, GREY, BLACK = (255, 0, 0), (0, 0, 255), (128, 128, 128), (0, 0, 0)


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (120, 160)) -> np.ndarray:
    return np.full((*size, 3), colour, np.uint8)


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (120, 160)) -> bytes:
    return bytes(cv2.imencode(".jpg", flat(colour, size)[:, :, ::-1])[1].tobytes())


def video(path: Path, frames: list[np.ndarray], fps: float = 20) -> str:
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
    for frame in frames:
        writer.write(frame[:, :, ::-1])
    writer.release()
    return str(path)


def colour(shot: Shot) -> str:
    r, g, b = decode_picture(shot.jpeg, "it").reshape(-1, 3).mean(0)
    return "red" if r > g + 60 and r > b + 60 else "blue" if b > r + 60 else "other"


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


class Told:
    """The states that a camera told, in order."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Health] = queue.Queue()

    def __call__(self, health: Health) -> None:
        self.queue.put(health)

    def until(self, state: str) -> Health:
        while (health := self.queue.get(timeout=SOON)).state != state:
            pass
        return health


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera, "PAUSES", (0.05, 0.2))
    monkeypatch.setattr(sources, "SNAPSHOTS", 0.05)


# ---- files


def test_a_file_is_played_at_its_own_pace_over_and_over_and_its_frames_know_their_time(tmp_path, told):
    path = video(tmp_path / "a.mp4", [flat(RED)] * 10 + [flat(BLUE)] * 10)
    begun = time.time()
    with Camera(path, changed=told) as it:
        first = it.newest(wait=SOON)
        assert first and colour(first) == "red" and begun <= first.at <= time.time()
        assert told.until("live").why == f"{path} is live"
        until(lambda: colour(it.newest()) == "blue")
        half = it.newest().at
        until(lambda: colour(it.newest()) == "red")
        assert half - first.at > 0.1 and it.newest().at > half


def variable_rate(path: Path, milliseconds: list[int]) -> str:
    """A Matroska film whose frames stand at these times and grow lighter."""
    raw = [cv2.VIDEOWRITER_PROP_RAW_VIDEO, 1]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 1000.0, (160, 120), raw)
    assert writer.isOpened()
    for number, at in enumerate(milliseconds):
        writer.set(cv2.VIDEOWRITER_PROP_PTS, at)
        writer.write(np.frombuffer(jpeg((20 * number,) * 3), np.uint8))
    writer.release()
    return str(path)


def test_a_video_of_variable_frame_rate_is_played_at_its_own_times_over_and_over(tmp_path):
    times = [0, 40, 80, 1080, 2080, 2120]
    due: list[float] = []

    def wait_until(at: float) -> bool:
        due.append(at)
        return len(due) <= 2 * len(times) + 1  # its end counts as one more

    shown = [frame.pixels.mean() for frame in sources.play_file(variable_rate(tmp_path / "a.mkv", times), wait_until)]
    assert np.allclose(shown, [0, 20, 40, 60, 80, 100] * 2, atol=3)
    assert np.allclose(np.diff(due[:7]), [0.04, 0.04, 1, 1, 0.04, 0.04], atol=0.002), "the last one stays as the one before it"
    assert np.allclose(np.diff(due[7:13]), [0.04, 0.04, 1, 1, 0.04], atol=0.002)


def test_the_newest_is_the_frame_that_came_last_and_not_the_next_one_in_a_queue(tmp_path):
    grey = [np.full((64, 64, 3), 8 * n, np.uint8) for n in range(30)]
    with Camera(video(tmp_path / "a.mp4", grey, fps=30)) as it:
        it.newest(wait=SOON)
        until(lambda: it.newest().grey.mean() > 100)  # nobody took the frames in between
        assert time.time() - it.newest().at < SOON


def test_what_is_kept_is_of_the_last_seconds_and_small(tmp_path, monkeypatch):
    monkeypatch.setattr(camera, "RATE", 50.0)
    noisy = [np.random.default_rng(n).integers(0, 255, (720, 1280, 3), dtype=np.uint8) for n in range(4)]
    with Camera(video(tmp_path / "a.mp4", noisy), keep=1.0) as it:
        until(lambda: it.around(time.time(), 60))
        first = it.around(time.time(), 60)[0].at
        until(lambda: it.newest().at - first > 1.5 and len(it.around(time.time(), 60)) > 1)
        kept = it.around(time.time(), 60)
        assert [shot.at for shot in kept] == sorted(shot.at for shot in kept)
        assert kept[0].at > first and kept[-1].at - kept[0].at <= 1.1
        assert decode_picture(kept[0].jpeg, "it").shape == (540, 960, 3)
        assert decode_picture(it.newest().jpeg, "it").shape == (720, 1280, 3)
        middle = kept[len(kept) // 2].at
        assert all(shot.at <= middle for shot in it.around(middle, 60))
        largest = max(len(shot.jpeg) for shot in kept)
        monkeypatch.setattr(camera, "KEPT_BYTES", largest)
        until(lambda: len(it.around(time.time(), 60)) == 1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"#EXTM3U\nfile:///etc/passwd\n" * 9, "is not an MP4"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 200, "not a video that can be decoded"),
    ],
)
def test_a_file_that_cannot_be_played_is_told_in_a_sentence_and_played_once_it_is_there(tmp_path, told, content, why):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with Camera(str(path), changed=told) as it:
        assert why in told.until("lost").why and str(path) in it.health.why
        assert it.newest() is None
        os.replace(video(tmp_path / "b.mp4", [flat(RED)] * 5), path)
        told.until("live")
        assert colour(it.newest(wait=SOON)) == "red"


def test_nobody_waits_longer_than_told_nor_for_a_camera_that_is_closed(tmp_path):
    path = str(tmp_path / "none.mp4")
    it = Camera(path)
    assert it.newest(wait=0.01) is None
    waiting = threading.Thread(target=it.newest, args=(SOON,))
    waiting.start()
    it.close()
    waiting.join(SOON)
    assert not waiting.is_alive() and not [thread for thread in threading.enumerate() if path in thread.name]


# ---- what is no camera


def test_what_can_never_be_a_camera_is_refused():
    for source in ("ftp://host/picture.jpg", "http:///picture.jpg"):
        with pytest.raises(MediaError, match="names no host|is no camera"):
            Camera(source)


def test_a_device_that_is_not_there_is_told(told):
    with Camera(93, changed=told):
        assert told.until("lost").why == "there is no camera at /dev/video93: is it plugged in, and is its number right?"


def test_a_device_that_is_none_is_told(told):
    with Camera("/dev/null", changed=told):
        assert told.until("lost").why == "the camera /dev/null cannot be opened; does another program use it?"


# ---- what pictures look like


def lit(level: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(level, 2, (18, 32)), 0, 255).astype(np.uint8)


def states(greys: list[np.ndarray], until: float = 0.0) -> list[str]:
    faults, out = FaultDetector(0), []
    for second, each in enumerate(greys):
        faults.add(each, second)
        out.append(fault.state if (fault := faults.fault(second)) else "live")
    return out


def test_black_pictures_are_told_from_dark_ones_and_only_after_a_while():
    assert states([lit(90)] + [lit(2, n) for n in range(1, 6)]) == ["live", "live", "live", "black", "black", "black"]
    assert set(states([lit(25, n) for n in range(10)])) == {"live"}


def test_pictures_that_do_not_change_at_all_are_frozen_and_a_quiet_scene_is_not():
    assert states([lit(90)] * 40).index("frozen") == 30
    assert set(states([lit(90, n) for n in range(40)])) == {"live"}


def test_pictures_that_stay_away_are_a_stall_until_one_comes():
    faults = FaultDetector(0)
    faults.add(lit(90), 1)
    assert faults.fault(5.9) is None
    assert faults.fault(8) == Health("stalled", "there has been no new picture for 7 s")
    faults.add(lit(91), 9)
    assert faults.fault(9) is None


def test_a_covered_lens_is_reported_and_so_is_its_end(tmp_path, told, monkeypatch):
    monkeypatch.setattr(camera, "BLACK_AFTER", 0.3)
    with Camera(video(tmp_path / "a.mp4", [flat(GREY)] * 20 + [flat(BLACK)] * 40), changed=told) as it:
        told.until("live")
        assert "black" in told.until("black").why
        assert it.newest() is not None, "it is shown all the same"
        told.until("live")


def test_a_frozen_picture_is_reported(tmp_path, told, monkeypatch):
    monkeypatch.setattr(camera, "FROZEN_AFTER", 0.3)
    with Camera(video(tmp_path / "a.mp4", [flat(GREY)] * 60), changed=told):
        told.until("frozen")


# ---- pushed pictures


def test_a_pushed_picture_is_kept_byte_for_byte_with_its_time(told):
    with Camera(None, changed=told) as it:
        assert it.newest() is None
        it.push(jpeg(RED), at=1_000_000_000.5)
        shot = it.newest(wait=SOON)
        assert (shot.jpeg, shot.at) == (jpeg(RED), 1_000_000_000.5)
        until(lambda: it.around(1_000_000_000.5, 1))


def test_a_picture_that_may_be_older_says_so_until_a_new_one_comes(told):
    with Camera(None, changed=told) as it:
        it.push(jpeg(RED), retained=True)
        assert it.newest(wait=SOON).retained and told.until("live").why == "the camera has given an older picture, and none since"
        it.push(jpeg(BLUE))
        assert told.until("live").why == "the camera is live"
        shot = it.newest()
        assert colour(shot) == "blue" and not shot.retained
        it.push(jpeg(RED), retained=True)  # the broker came back, and gives again what it had given
        it.push(jpeg(BLUE), retained=True)
        it.push(jpeg(RED), at=1_000_000_000.5)
        until(lambda: it.newest().at == 1_000_000_000.5)
        it.push(jpeg(GREY), retained=True)  # it came while there was no connection
        until(lambda: it.newest().retained)


def test_what_is_pushed_and_is_no_picture_is_told_and_harms_nothing(told):
    with Camera(None, changed=told) as it:
        for junk in (
            b"",
            b"junk",
            b"\xff\xd8\xff",
            jpeg(RED)[:200],
            b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff" + b"\0" * 20,
        ):
            it.push(junk)
            told.until("lost")
            it.push(jpeg(BLUE))
            told.until("live")
        assert colour(it.newest()) == "blue"


def test_who_asks_right_after_a_picture_was_pushed_gets_that_one():
    with Camera(None) as it:
        for number in range(1, 30):
            it.push(jpeg(RED if number % 2 else BLUE, (1080, 1920)), at=float(number))
            assert it.newest(wait=SOON).at == number
        it.push(b"junk")
        assert it.newest(wait=SOON).at == 29


def test_of_pictures_pushed_in_a_burst_the_last_one_stays():
    with Camera(None) as it:
        for _ in range(300):
            it.push(jpeg(RED))
        it.push(jpeg(BLUE))
        until(lambda: (shot := it.newest()) and colour(shot) == "blue")


# ---- snapshots


class Snapshots(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.body, self.code, self.secret, self.asked = jpeg(RED), 200, b"", 0
        self.headers: dict[str, str] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}/snap.jpg"


class _Answers(BaseHTTPRequestHandler):
    server: Snapshots

    def do_GET(self) -> None:
        self.server.asked += 1
        allowed = (
            not self.server.secret
            or self.headers.get("Authorization") == f"Basic {base64.b64encode(self.server.secret).decode()}"
        )
        self.send_response(self.server.code if allowed else 401)
        for name, value in self.server.headers.items() if allowed else [("WWW-Authenticate", 'Basic realm="camera"')]:
            self.send_header(name, value)
        self.end_headers()
        if allowed:
            self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def snapshots() -> Iterator[Snapshots]:
    server = Snapshots()
    yield server
    server.shutdown()
    server.server_close()


def test_a_snapshot_address_is_asked_again_and_again(snapshots, told):
    with Camera(f"http://{snapshots.address}", changed=told) as it:
        assert colour(it.newest(wait=SOON)) == "red"
        snapshots.body = jpeg(BLUE)
        until(lambda: colour(it.newest()) == "blue")


def test_a_snapshot_behind_a_password_is_fetched_and_the_password_never_told(snapshots, told):
    snapshots.secret = b"me:pass word"
    with Camera(f"http://me:pass%20word@{snapshots.address}") as it:
        assert it.newest(wait=SOON)
        snapshots.secret = b"changed"
        until(lambda: it.health.state == "lost")
        assert it.health.why == f"http://{snapshots.address} answers 401 Unauthorized"


def test_a_login_that_was_not_percent_encoded_is_never_shown_and_the_advice_is(snapshots, told):
    snapshots.secret = b"me:100%safe"
    with Camera(f"http://me:100%25safe@{snapshots.address}?pwd=se@cret") as it:
        assert it.newest(wait=SOON) and "se@cret" not in it.health.why
    with Camera(f"http://me:100%safe@{snapshots.address}?pwd=secret") as it:
        assert it.newest(wait=SOON), "urllib reads it as it was meant"
    snapshots.secret = b"me:other"
    with Camera(f"http://me:100%safe@{snapshots.address}?pwd=secret", changed=told) as it:
        told.until("lost")
        assert it.health.why.startswith(f"http://{snapshots.address} answers 401 Unauthorized (in a user name, password or query")
        assert "safe" not in it.health.why and "secret" not in it.health.why


def test_a_snapshot_behind_a_login_of_another_kind_is_told(snapshots, told):
    snapshots.code, snapshots.headers = 401, {"WWW-Authenticate": "Bearer"}
    with Camera(f"http://me:secret@{snapshots.address}", changed=told):
        assert told.until("lost").why == f"http://{snapshots.address} wants a kind of login that is not known here"


@pytest.mark.parametrize(
    ("code", "headers", "body", "why"),
    [
        (404, {}, b"", "answers 404"),
        (302, {"Location": "http://example.com/"}, b"", "answers 302"),
        (200, {}, b"<html>", "is not a PNG, JPEG or WebP picture"),
        (200, {}, b"\xff\xd8" + b"\0" * (33 << 20), "bytes"),
    ],
)
def test_a_snapshot_that_is_none_is_told(snapshots, told, code, headers, body, why):
    snapshots.code, snapshots.headers, snapshots.body = code, headers, body
    with Camera(f"http://{snapshots.address}", changed=told):
        assert why in told.until("lost").why


def test_snapshots_come_from_the_local_network_alone(told):
    with Camera("http://93.184.216.34/snap.jpg", changed=told):
        assert "is not on the local network" in told.until("lost").why


def test_nobody_listening_is_told_and_found_again(snapshots, told):
    snapshots.shutdown()
    snapshots.server_close()
    with Camera(f"http://{snapshots.address}", changed=told):
        assert "cannot be reached: " in told.until("lost").why


# ---- RTSP

SERVER = ["/usr/bin/python3", str(Path(__file__).with_name("rtsp.py"))]


class Rtsp:
    def __init__(self, *port: str) -> None:
        self.process = subprocess.Popen([*SERVER, *port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout and self.process.stderr
        line = self.process.stdout.readline()
        if not line:
            complaint = self.process.stderr.read()
            assert "gi" in complaint or "Namespace" in complaint, complaint
            pytest.skip("the system packages gir1.2-gst-rtsp-server-1.0, python3-gi and gstreamer1.0-plugins-good are missing")
        self.port = str(int(line))
        self.address = f"rtsp://127.0.0.1:{self.port}/ball"

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def rtsp() -> Iterator[Rtsp]:
    server = Rtsp()
    yield server
    server.end()


@pytest.mark.slow
def test_a_stream_is_watched_its_loss_told_and_a_stall_noticed(rtsp, told, monkeypatch):
    monkeypatch.setattr(camera, "STALLED_AFTER", 1.0)
    monkeypatch.setattr(sources, "READING", 4_000)
    with Camera(rtsp.address, changed=told) as it:
        told.until("live")
        first = it.newest()
        until(lambda: (shot := it.newest()).at > first.at and not np.array_equal(shot.grey, first.grey))
        rtsp.process.send_signal(signal.SIGSTOP)
        assert "no new picture" in told.until("stalled").why
        rtsp.process.send_signal(signal.SIGCONT)
        told.until("live")
        rtsp.process.kill()
        assert told.until("lost").why.startswith(rtsp.address)
