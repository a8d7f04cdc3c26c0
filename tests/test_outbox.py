"""The outbox: questions and answers that are not published yet survive, and are bounded."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agent.watch import outbox
from agent.watch.outbox import Outbox, OutboxError
from agent.watch.requests import CameraQuestion, MonitorRequest
from streams.mqtt import Publication


def question(key: str, asked: float = 0.0) -> CameraQuestion:
    return CameraQuestion(key=key, camera="front", question="q", asked=asked, moment=asked, until=asked + 60)


def out(name: str, size: int = 1) -> Publication:
    return Publication(name, b"x" * size, retain=True, correlation=b"c")


def drained(it: Outbox) -> list[str]:
    names = []
    while unsent := it.unsent():
        names.append(unsent[1].topic)
        it.sent(unsent[0])
    return names


def test_an_ask_is_open_until_it_is_answered_and_its_first_line_is_remembered(tmp_path: Path) -> None:
    it = Outbox(tmp_path, "home")
    assert it.accept(question("a")) and it.accept(question("b")) and not it.accept(question("a"))
    it.answered("a", [out("first")], "first")
    assert [(each.key, begun) for each, begun in it.open()] == [("a", True), ("b", False)]
    it.answered("a", [out("final"), out("image")])
    it.close()
    it = Outbox(tmp_path, "home")
    assert [each for each, _ in it.open()] == [question("b")]
    assert it.unsent() == (1, out("first")) and drained(it) == ["first", "final", "image"]
    it.close()


def test_what_is_written_survives_kill_9(tmp_path: Path) -> None:
    script = f"""
import os, pathlib, signal
from tests.test_outbox import Outbox, out, question
it = Outbox(pathlib.Path({str(tmp_path)!r}), "home")
it.accept(question("a")); it.accept(question("b")); it.answered("a", [out("answer")])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=False, timeout=120)
    assert done.returncode == -9
    it = Outbox(tmp_path, "home")
    assert [each.key for each, _ in it.open()] == ["b"] and drained(it) == ["answer"]
    it.close()


def test_an_id_may_be_used_again_after_a_while_but_not_before_it_is_answered(tmp_path: Path) -> None:
    it = Outbox(tmp_path, "home")
    assert it.accept(question("a", 0), 600) and not it.accept(question("a", 1000), 600)
    it.answered("a", [])
    assert not it.accept(question("a", 500), 600) and it.accept(question("a", 1000), 600)
    assert it.recent("a", 900) and not it.recent("a", 1100) and not it.recent("b", 0)
    it.close()


def test_what_waits_for_the_broker_is_bounded_in_number_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "UNSENT", 5)
    monkeypatch.setattr(outbox, "UNSENT_BYTES", 1000)
    monkeypatch.setattr(outbox, "REMEMBERED", 10)
    it = Outbox(tmp_path, "home")
    it.put([out(str(n)) for n in range(8)])
    assert it.dropped == 3
    it.put([out("big", 900), out("bigger", 990)])
    assert drained(it) == ["bigger"]
    for n in range(30):
        it.accept(question(str(n)))
        it.answered(str(n), [])
    assert not it.knows("5") and it.knows("25")
    it.close()


def test_monitors_and_cameras_whose_monitors_are_off_are_remembered(tmp_path: Path) -> None:
    it, request = Outbox(tmp_path, "home"), MonitorRequest(condition="it burns")
    it.monitor("front", "fire", request, True, [out("began")])
    it.pause("back", True)
    it.close()
    it = Outbox(tmp_path, "home")
    assert it.monitors() == [("front", "fire", request, True)] and it.paused() == {"back"} and drained(it) == ["began"]
    it.forget("front", "fire")
    it.pause("back", False)
    assert not it.monitors() and not it.paused()
    it.close()


def test_it_is_for_its_owners_eyes_and_for_one_process(tmp_path: Path) -> None:
    it = Outbox(tmp_path / "new", "home")
    assert stat.S_IMODE((tmp_path / "new" / "home.sqlite").stat().st_mode) == 0o600
    with pytest.raises(OutboxError, match="does another attend watch run with the same node"):
        Outbox(tmp_path / "new", "home")
    it.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutboxError, match="file/home.sqlite cannot be used"):
        Outbox(tmp_path / "file", "home")
