"""A checkpoint's `suggestions.json`: what the model knows, and questions about a picture that it can answer. A large model needs
none; a small one disappoints whoever asks about anything else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from model.config import CheckpointError

FILE = "suggestions.json"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Suggestions:
    """What to try. `about`: one line. `questions`: up to three, about the file `picture`."""

    about: str
    picture: Path
    questions: tuple[str, ...]

    def lines(self) -> list[str]:
        """As lines for a terminal."""
        return [self.about, trying(self.questions, _short(self.picture))]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    about: Annotated[str, Meta(min_length=1, max_length=300)]
    picture: str  # relative to the folder
    questions: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=80)], ...], Meta(min_length=1, max_length=3)]


def read_suggestions(folder: Path) -> Suggestions | None:
    """The suggestions in a folder, None if it has none. Raises CheckpointError if they cannot be used."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        given = msgspec.json.decode(path.read_bytes(), type=_File)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as wrong:
        raise CheckpointError(f"{path} cannot be used: {wrong}") from wrong
    picture = (folder / given.picture).resolve()
    inside = picture.is_relative_to(folder.resolve())  # the server shows it to everybody
    if not inside or picture.suffix.lower() not in PICTURES or not picture.is_file():
        raise CheckpointError(f"{path} names {given.picture!r}, which is no picture in its folder ({', '.join(PICTURES)})")
    return Suggestions(given.about, picture, given.questions)


def trying(questions: tuple[str, ...], picture: str) -> str:
    """The suggestion as one line. `picture`: the argument of --camera."""
    quoted = [f'"{question}"' for question in questions]
    listed = ", ".join(quoted[:-1]) + " or " + quoted[-1] if len(quoted) > 1 else quoted[0]
    return f"try {listed}, about the picture that --camera {picture} shows it"


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
