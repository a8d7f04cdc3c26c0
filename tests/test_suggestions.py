"""What a checkpoint's folder suggests to people who try its model."""

import json
import shutil
from pathlib import Path

import pytest

from agent.suggestions import read_suggestions
from model.config import CheckpointError
from model.weights import NANO

GOOD = {"about": "It knows squares.", "picture": "picture.jpg", "questions": ["Where?", "How many?"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(NANO / "demo/picture.jpg", folder)
    return folder


def test_the_embedded_model_says_what_it_knows_and_three_questions_about_its_own_picture() -> None:
    given = read_suggestions(NANO)
    assert given is not None and "squares" in given.about
    assert len(given.questions) == 3 and given.picture.is_relative_to(NANO / "demo")


def test_a_folder_without_the_file_suggests_nothing(folder: Path) -> None:
    assert read_suggestions(folder) is None


def test_a_terminal_says_it_in_two_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "suggestions.json").write_text(json.dumps(GOOD))
    monkeypatch.chdir(folder)
    given = read_suggestions(folder)
    assert given is not None
    assert given.lines() == [
        "It knows squares.",
        'try "Where?" or "How many?", about the picture that --camera picture.jpg shows it',
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"about": ""}, "length >= 1 - at `$.about`"),
        ({"questions": []}, "length >= 1 - at `$.questions`"),
        ({"questions": ["a", "b", "c", "d"]}, "length <= 3 - at `$.questions`"),
        ({"questions": "Where?"}, "at `$.questions`"),
        ({"voice": "x"}, "unknown field `voice`"),
        ({"picture": "none.jpg"}, "names 'none.jpg', which is no picture in its folder"),
        ({"picture": "../outside.jpg"}, "which is no picture in its folder"),
        ({"picture": "link.jpg"}, "which is no picture in its folder"),
        ({"picture": "suggestions.json"}, "which is no picture in its folder"),
    ],
)
def test_what_cannot_be_used_is_refused_and_no_file_outside_the_folder_is_shown(folder: Path, change, complaint) -> None:
    shutil.copy(NANO / "demo/picture.jpg", folder.parent / "outside.jpg")
    (folder / "link.jpg").symlink_to(folder.parent / "outside.jpg")
    (folder / "suggestions.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(CheckpointError) as refused:
        read_suggestions(folder)
    assert complaint in str(refused.value) and str(folder) in str(refused.value)


def test_a_file_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "suggestions.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="suggestions.json cannot be used"):
        read_suggestions(folder)
