"""OpenCV's limits and its silence hold in the commands that are really started, not only where a test imports in a good order."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streams.opencv import PICTURE_PIXELS

ROOT = Path(__file__).parent.parent

# Python runs this file before the command: it notes what the environment says at the moment when cv2 is first imported.
NOTES = """
import json, os, sys

def note(event, arguments):
    if event == "import" and arguments[0] == "cv2" and not os.path.exists(os.environ["NOTES"]):
        with open(os.environ["NOTES"], "w") as file:
            json.dump({name: value for name, value in os.environ.items() if name.startswith("OPENCV")}, file)

sys.addaudithook(note)
"""


def test_one_file_imports_cv2() -> None:
    importing = set()
    for folder in ("agent", "model", "streams", "web"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if "cv2" in [name.split(".")[0] for name in names] or (isinstance(node, ast.ImportFrom) and node.module == "cv2"):
                    importing.add(str(path.relative_to(ROOT)))
    assert importing == {"streams/opencv.py"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["ask", "--image", "{picture}", "What is in the picture?"],
        ["watch", "--camera", "front=rtsp://127.0.0.1:1/live", "--once", "front", "Who is there?"],
        ["talk", "--camera", "/dev/null", "--mic", "none such"],
        ["serve", "--port", "1", "--host", "192.0.2.1"],
        ["bench", "session", "--help"],
    ],
    ids=lambda command: command[0],
)
def test_each_command_sets_the_limits_before_cv2_is_imported_and_cv2_writes_nothing(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTES)
    notes = tmp_path / "notes.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV")}
    environment |= {"NOTES": str(notes), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    words = [word.format(picture=ROOT / "model" / "nano" / "demo" / "picture.jpg") for word in command]
    run = [sys.executable, "-m", "agent", *words]
    done = subprocess.run(
        run, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    settings = json.loads(notes.read_text())
    assert settings["OPENCV_IO_MAX_IMAGE_PIXELS"] == str(PICTURE_PIXELS)
    assert (settings["OPENCV_LOG_LEVEL"], settings["OPENCV_FFMPEG_LOGLEVEL"]) == ("SILENT", "-8")
    assert not [line for line in done.stderr.splitlines() if "WARN" in line or "ERROR" in line or "tcp @" in line], done.stderr
