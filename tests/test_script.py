"""Scripts of conversations: what a file may say, and the recording of both sides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agent import events, script
from agent.__main__ import main
from model.weights import NANO
from streams.frames import FRAME, RATE, MediaError

TALK = NANO / "demo" / "talk.toml"


def write(folder: Path, text: str) -> Path:
    (folder / "script.toml").write_text(text, encoding="utf-8")
    return folder / "script.toml"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[turn]", "is not a script that can be read"),
        ("", r"has no \[\[turn\]\]"),
        ("turn = 3", r"has no \[\[turn\]\]"),
        ('sytem = "x"\n[[turn]]\ntype = "a"', "says 'sytem', which a script does not have"),
        ('[[turn]]\ntype = "a"\n[[turn]]\nshout = "b"', "turn 2 of .* says 'shout'; a turn has show, say, speak"),
        ('[[turn]]\ntype = "a"\ninterrupt = true', "interrupt cannot be True"),
        ("[[turn]]\ntype = 3", "type cannot be 3"),
        ('[[turn]]\nshow = "a.jpg"', "asks nothing"),
        ('[[turn]]\ntype = "a"\nshow = "none.jpg"', "turn 1 of .*: none.jpg cannot be read: No such file"),
        ('[[turn]]\nsay = "none.wav"', "none.wav cannot be read"),
        ('[[turn]]\nspeak = "a"\nvoice = "klingon"', "turn 1 of .*: no voice 'klingon'"),
    ],
)
def test_a_script_that_cannot_be_played_is_refused_with_a_sentence(tmp_path, text, complaint):
    with pytest.raises(MediaError, match=complaint):
        script.read(write(tmp_path, text))


def test_turns_say_what_the_file_says(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(800, np.float32), 8000)
    (tmp_path / "a.jpg").write_bytes(b"picture")
    text = 'system = "Be brief."\n[[turn]]\nshow = "a.jpg"\nsay = "a.wav"\nwait = 2\n[[turn]]\ntype = "b"\ninterrupt = 3'
    system, (spoken, typed) = script.read(write(tmp_path, text))
    assert system == "Be brief." and spoken.picture == b"picture" and spoken.wait == 2.0
    assert len(spoken.speech) == pytest.approx(RATE // 10, abs=64)
    assert (typed.typed, typed.interrupt, typed.wait, len(typed.speech)) == ("b", 3, 0.6, 0)


def loud(channel: np.ndarray) -> np.ndarray:
    """Which frames are not silent."""
    frames = channel[: len(channel) // FRAME * FRAME].reshape(-1, FRAME)
    return np.sqrt((frames**2).mean(axis=1)) > 1e-3


@pytest.mark.slow
def test_a_conversation_is_played_told_and_recorded(tmp_path, capsys):
    recording = tmp_path / "talk.wav"
    assert main(["ask", "--turns", str(TALK), "--record", str(recording), "--voice", "espeak", "--json"]) == 0
    exchanges = json.loads(capsys.readouterr().out)
    turns = script.read(TALK)[1]
    assert len(exchanges) == len(turns)
    assert [exchange["finish"] for exchange in exchanges] == ["stop", "interrupted", "stop", "stop"]
    assert exchanges[1]["heard"] < len(exchanges[1]["text"])

    sound, rate = soundfile.read(recording, dtype="float32")
    assert rate == RATE and sound.shape[1] == 2 and np.abs(sound).max() <= 1
    user, agent = loud(sound[:, 0]), loud(sound[:, 1])
    assert user.sum() > 60 and agent.sum() > 60, "both are heard"
    assert (user & agent).sum() < 25, "they talk at once only until the interruption is noticed"
    starts = np.flatnonzero(agent[1:] & ~agent[:-1])
    assert all(agent[start + 1 : start + 5].all() for start in starts[:1]), "an answer has no gap in its first word"


def test_what_is_heard_is_reported_as_it_is_played():
    performance = script.Performance([])
    pcm = np.ones(3000, np.float32)
    performance._playing = [events.AudioDelta(7, 0, pcm, 22050)]
    told = [performance._play() for _ in range(5)]
    assert [heard.sample for heard in told if heard] == [882, 1764, 2646, 3000]


def test_options_that_have_no_meaning_together_are_refused(capsys):
    assert main(["ask", "--turns", str(TALK), "--text", "a"]) == 2
    assert "leave --text" in capsys.readouterr().err
