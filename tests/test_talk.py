"""`attend talk` as a person has it: a process, a sound card that PortAudio plays on, and what is heard and read of it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import soundfile

from agent import checkpoint, replay
from agent.__main__ import main
from streams.frames import FRAME, RATE
from streams.media_files import read_audio
from tests.soundcard import MISSING, Card
from tests.test_camera import Rtsp

ROOT = Path(checkpoint.__file__).parents[1]
DEMO = ROOT / "model/nano/demo"
LONG = 60.0  # seconds that anything may take on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason="install the apt packages pulseaudio, pulseaudio-utils, libasound2-plugins"),
]


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    card = Card(tmp_path)
    yield card
    card.close()


COMMAND = [sys.executable, "-m", "agent", "talk", "--mic", "mic", "--speaker", "spk"]
HERE = ["--voice", "espeak", "--greedy"]


class Talking:
    """The process, and what it printed, line by line."""

    def __init__(self, card: Card, *options: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *(() if "--server" in options else HERE), *options],
            cwd=ROOT,
            env={**os.environ, **card.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def until(self, start: str, count: int = 1) -> str:
        """The line with this beginning, once there are so many."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [line for line in list(self.lines) if line.startswith(start)]
            assert self.process.poll() is None or len(found) >= count, self.lines
            return len(found) >= count

        wait(there, lambda: f"no {start!r} in {self.lines}")
        return found[count - 1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join(5)
        assert self.process.stdout
        self.process.stdout.close()

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(LONG)
        self._thread.join(5)
        return code


def wait(there: Callable[[], bool], complaint: Callable[[], str] = lambda: "it never came") -> None:
    until = time.monotonic() + LONG
    while not there():
        assert time.monotonic() < until, complaint()
        time.sleep(0.02)


def question() -> np.ndarray:
    return np.concatenate([np.zeros(RATE // 2, np.float32), read_audio(DEMO / "question.wav")])


def gap(card: Card, before: float) -> float:
    """When sound was over that was playing at `before`."""
    loud = [at for at in card.loud() if at > before - 0.3]
    return next((a for a, b in zip(loud, [*loud[1:], np.inf], strict=True) if a >= before and b - a > 0.3), loud[-1])


def test_a_spoken_question_is_answered_aloud_recorded_and_held_again(card, tmp_path, capsys):
    files = ["--record", str(tmp_path / "talk.wav"), "--marks", str(tmp_path / "marks")]
    with Talking(card, "--camera", str(DEMO / "picture.jpg"), *files) as talking:
        talking.until("note     listening to mic")
        assert "circles, squares" in talking.until("note     nano is a small model")
        assert "demo/picture.jpg" in talking.until('note     try "Where is the orange square?"')
        card.say(question())
        wait(lambda: card.silent)
        ended = card.spoken[-1]
        talking.until("times")
        first = card.loud(ended)[0]
        with capsys.disabled():
            print(f"\nend of speech to first sound, in the recording: {(first - ended) * 1000:.0f} ms")
        assert talking.until("you ") == "you      where is the orange square"
        assert talking.until("attend") == "attend   The orange square is at the top."
        assert talking.until("mark").startswith("mark     orange square at the top")
        talking.until("note     the marks are drawn in")
        assert talking.end() == 0
    assert len(card.loud(ended)) > 80, "more than a second of speech was played"
    assert len(list((tmp_path / "marks").glob("*.png"))) == 1

    sound, rate = soundfile.read(tmp_path / "talk.wav", dtype="float32")
    assert rate == RATE and sound.shape[1] == 2
    assert (np.abs(sound[:, 0]) > 0.05).sum() > RATE // 4 and (np.abs(sound[:, 1]) > 0.05).sum() > RATE // 4
    assert main(["replay", str(tmp_path / "talk.wav")]) == 0
    assert re.search(r"^1  the same \d+ ids: The orange square is at the top\.$", capsys.readouterr().out, re.MULTILINE)
    log = replay.read(tmp_path / "talk.wav")
    log.answers[0]["ids"][2] += 1
    assert not replay.Compared(log.answers[0]["ids"], [1, 2, 3], "", False).same


SPEECH = "I am attend. I can tell you about the picture that I see, and I will go on talking about it until you ask something. "


def interrupt(card: Card, capsys: pytest.CaptureFixture[str]) -> None:
    """Asks while something is said, and prints for how many seconds that went on: a figure, as the machine may be busy."""
    asked = read_audio(DEMO / "question.wav")
    onset = int(np.argmax(np.abs(asked) > 0.05)) / RATE
    card.say(asked)
    begun = card.said_at()
    wait(lambda: gap(card, begun) < time.monotonic() - 1)
    silence = gap(card, begun) - begun - onset
    with capsys.disabled():
        print(f"\nonset of an interruption to silence, at the speaker: {silence * 1000:.0f} ms")


def noticed(wav: Path) -> float:
    """Seconds from the first sound of the user to the moment when the answer was silenced, in frames of the microphone."""
    sound, _ = soundfile.read(wav, dtype="float32")
    log = [json.loads(line) for line in wav.with_suffix(".jsonl").read_text().splitlines()]
    silenced = next(line["at"] for line in log if line.get("event") == "OutputCleared")
    return float(silenced * FRAME - np.argmax(np.abs(sound[:, 0]) > 0.05)) / RATE


def test_an_interruption_silences_it_at_once_and_the_next_answer_fits(card, tmp_path, capsys):
    files = ["--record", str(tmp_path / "talk.wav")]
    with Talking(card, "--camera", str(DEMO / "picture.jpg"), "--say", 3 * SPEECH, *files) as talking:
        talking.until("note     listening to mic")
        wait(lambda: len(card.loud()) > 300)  # three seconds: by then it knows that nothing of it comes back
        interrupt(card, capsys)
        assert talking.until("attend", 2).startswith("attend   The orange square")
        assert "not heard" in talking.until("attend")
        assert talking.end() == 0
    assert 0 <= noticed(tmp_path / "talk.wav") < 0.25


@pytest.fixture
def server() -> Iterator[str]:
    """A running `attend serve`."""
    command = [sys.executable, "-m", "agent", "serve", "--port", "0", "--voice", "espeak"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    yield process.stdout.readline().strip().removesuffix("/v1/realtime")
    process.terminate()
    process.communicate()


def test_at_a_server_it_is_the_same(card, server, tmp_path, capsys):
    files = ["--record", str(tmp_path / "talk.wav"), "--marks", str(tmp_path / "marks")]
    with Talking(card, "--server", server, "--camera", str(DEMO / "picture.jpg"), *files) as talking:
        talking.until("note     listening to mic")
        card.say(question())
        assert talking.until("attend") == "attend   The orange square is at the top."
        assert talking.until("you ") == "you      where is the orange square"
        assert talking.until("mark").startswith("mark     orange square at the top")
        assert "first sound after" in talking.until("times")
        talking.until("note     the marks are drawn in")
        card.say(question())
        said = len(card.loud())
        wait(lambda: len(card.loud()) > said + 30)
        interrupt(card, capsys)
        assert "not heard" in talking.until("attend", 2)
        assert talking.until("attend", 3) == "attend   The orange square is at the top."
        assert talking.end() == 0
    sound, _ = soundfile.read(tmp_path / "talk.wav", dtype="float32")
    assert (np.abs(sound[:, 1]) > 0.05).sum() > RATE // 4
    assert main(["replay", str(tmp_path / "talk.wav")]) == 2


def test_a_server_that_is_not_there_is_told_and_what_it_decides_is_refused(card, capsys):
    with Talking(card, "--server", "ws://127.0.0.1:9") as talking:
        assert "ws://127.0.0.1:9/v1/realtime" in talking.until("note     the conversation with")
        assert talking.process.wait(LONG) == 1
    assert main(["talk", "--server", "ws://127.0.0.1:9", "--say", "hello"]) == 2
    assert "leave it out, or leave --server out" in capsys.readouterr().err


@pytest.mark.parametrize("canceller", [True, False], ids=["with aec", "without"])
def test_its_own_voice_from_the_room_does_not_interrupt_it(card, canceller, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    room = 0.08 * rng.standard_normal(3200) * np.exp(-np.arange(3200) / 800)  # 200 ms of decay
    room[0] = 0.5
    card.echo = lambda: np.convolve(card.recent(FRAME + len(room)), room)[len(room) : len(room) + FRAME]
    if not canceller:
        (tmp_path / "livekit").mkdir()
        (tmp_path / "livekit" / "__init__.py").write_text("raise ImportError('left out')\n")
        card.environment["PYTHONPATH"] = str(tmp_path)
    with Talking(card, "--say", SPEECH) as talking:
        assert ("speak up" in talking.until("note     listening to mic")) == (not canceller)
        assert talking.until("times")
        assert talking.until("attend") == f"attend   {SPEECH.strip()}", "every word was heard"
        assert talking.end() == 0
    assert not [line for line in talking.lines if line.startswith("you")]


def test_a_microphone_that_is_unplugged_is_taken_up_again(card):
    with Talking(card, "--camera", str(DEMO / "picture.jpg")) as talking:
        talking.until("note     listening to mic")
        card.mic.kill()
        talking.until("note     the microphone mic is gone")
        card.mic.start()
        talking.until("note     the microphone mic is back")
        card.say(question())
        assert talking.until("attend") == "attend   The orange square is at the top."
        assert talking.end() == 0


def test_without_its_speaker_it_goes_on_in_writing_and_then_aloud(card):
    with Talking(card, "--camera", str(DEMO / "picture.jpg")) as talking:
        talking.until("note     listening to mic")
        card.spk.kill()
        talking.until("note     the speaker spk is gone")
        card.say(question())
        assert talking.until("attend") == "attend   The orange square is at the top."
        card.spk.start()
        talking.until("note     the speaker spk is back")
        back = time.monotonic()
        card.say(question())
        talking.until("attend", 2)
        wait(lambda: len(card.loud(back)) > 50)
        assert talking.end() == 0


def test_a_broken_camera_file_is_told_and_the_conversation_goes_on(card, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"broken" * 100)
    with Talking(card, "--camera", str(tmp_path / "broken.mp4")) as talking:
        talking.until("note     listening to mic")
        assert "cannot be decoded" in talking.until("note     camera:") or "not a video" in talking.until("note     camera:")
        card.say(question())
        talking.until("attend")
        assert talking.end() == 0


def test_a_stream_that_ends_is_told_and_taken_up_again(card):
    stream = Rtsp()
    with Talking(card, "--camera", stream.address) as talking:
        talking.until(f"note     camera: {stream.address} is live")
        stream.end()
        assert "live" not in talking.until("note     camera:", 2)
        stream = Rtsp(stream.port)
        talking.until(f"note     camera: {stream.address} is live", 2)
        card.say(question())
        talking.until("attend")
        assert talking.end() == 0
    stream.end()


class Lively:
    """The process as somebody sees it who sits before a terminal."""

    def __init__(self, card: Card, *options: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *HERE, *options],
            cwd=ROOT,
            env={**os.environ, **card.environment, "TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: the process has ended
            while data := os.read(self._master, 4096):
                self.seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def until(self, words: str) -> None:
        wait(lambda: words in self.seen, lambda: f"no {words!r} in {self.seen}")

    def end(self) -> int:
        code = self.process.wait(LONG)
        self._thread.join(5)
        os.close(self._master)
        return code


def test_in_a_terminal_one_line_lives_and_the_space_bar_opens_and_closes_a_turn(card):
    talking = Lively(card, "--camera", str(DEMO / "picture.jpg"), "--push-to-talk")
    talking.until("listening to mic")
    card.say(question())
    wait(lambda: card.silent)
    assert "you speak" not in talking.seen, "nobody pressed"
    talking.press(b" ")
    talking.until("you speak")
    card.say(question())
    wait(lambda: card.silent)
    talking.press(b" ")
    talking.until("where is the orange square")
    talking.until("The orange square is at the top.")
    assert "▮" in talking.seen and "not heard" not in talking.seen
    talking.until("first sound after")
    talking.press(b"\x03")
    assert talking.end() == 0


def test_ctrl_c_twice_ends_it_at_once(card):
    stuck = (
        "from agent.talk.door import RoomConversation\n"
        "async def stop(self): self.terminal.note('stopping')\n"
        "RoomConversation.stop = stop\n"
    )
    folder = card.mic.folder.parent / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(stuck)
    card.environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    talking = Lively(card)
    talking.until("listening to mic")
    talking.press(b"\x03")
    talking.until("stopping")
    talking.press(b"\x03")
    assert talking.end() == 130


def test_devices_are_listed_with_what_they_can_do_and_tried(card):
    command = [sys.executable, "-m", "agent", "devices", "--check", "--mic", "mic", "--speaker", "spk"]
    command += ["--camera", str(DEMO / "picture.jpg")]
    card.say(np.concatenate([question()] * 4))
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **card.environment}, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^microphone +\d+  mic: [\d,]+ Hz, \d+ channels", done.stdout, re.MULTILINE)
    assert re.search(r"^speaker +\d+  spk: ", done.stdout, re.MULTILINE)
    assert re.search(r"heard -\d+ dB at its loudest, lost sound 0 times", done.stdout)
    assert re.search(r'^speaker +spk: "This is attend', done.stdout, re.MULTILINE) and len(card.loud()) > 50
    assert re.search(r"^camera .*: a picture of [\d,]+ bytes", done.stdout, re.MULTILINE)
