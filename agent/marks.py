"""Marks on a picture: parses detection JSON in a stream of text, and draws it.

Gemma answers "where is …?" with `[{"box_2d": [y0, x0, y1, x1], "label": "…"}]`, often in a ```json fence, amid ordinary text.
That JSON is for the picture and must not be spoken. `MarkReader` takes the text as it is generated, and returns ordinary text at
once and each mark as soon as its object is complete. Other brackets, braces and fences are ordinary text. Errors in the model's
JSON are tolerated: where an object breaks off, it ends, and what follows is text again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streams.opencv import cv2

SCALE = 1000  # the model's coordinates run from 0 to 1000, whatever the picture's size


@dataclass(frozen=True)
class Mark:
    """A box (y0, x0, y1, x1) in thousandths of the picture's height and width. A point is a box without extent."""

    box: tuple[int, int, int, int]
    label: str = ""

    @property
    def is_point(self) -> bool:
        return self.box[:2] == self.box[2:]


# ---- one object ------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"""["'](box_2d|point)["']\s*:\s*(\[[^"'{}]*|null|None|$)""")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_LABEL = re.compile(r"""["']label["']\s*:\s*(["'])([\s\S]*)""")
_WORDS = ("true", "false", "null", "none")
_LONGEST, _LONGEST_STRING = 1000, 200  # characters


def _is_detection(text: str) -> bool:
    return _KEY.search(text) is not None


def _mark(text: str) -> Mark | None:
    """The mark in an object's text, also if its JSON is imperfect; None if it has no valid box or point."""
    found = _KEY.search(text)
    if not found or "]" not in found[2]:
        return None
    numbers = [round(min(max(float(n), 0), SCALE)) for n in _NUMBER.findall(found[2][: found[2].rindex("]")])]
    if found[1] == "point" and len(numbers) == 2:
        y, x = numbers
        return Mark((y, x, y, x), _label(text))
    if found[1] == "box_2d" and len(numbers) == 4:
        (y0, y1), (x0, x1) = sorted(numbers[0::2]), sorted(numbers[1::2])
        if y0 < y1 and x0 < x1:
            return Mark((y0, x0, y1, x1), _label(text))
    return None


def _label(text: str) -> str:
    found = _LABEL.search(text)
    if not found:
        return ""
    quote, rest = found.groups()
    end = re.search(rf"(?<!\\){quote}\s*(?:[,:}}\]\"']|$)", rest)
    label = rest[: end.start()] if end else rest.rstrip(f" }}{quote}")
    try:
        label = json.loads(f'"{label}"', strict=False)
    except ValueError:
        label = label.replace(f"\\{quote}", quote)
    return " ".join("".join(c if c.isprintable() else " " for c in label).split())


class _Object:
    """Scans one object character by character to find its end.

    A quote ends a string only where one may end, so that 'the dog's bowl' is one string. Anything that JSON cannot contain ends
    the object.
    """

    def __init__(self, opening: str) -> None:
        self.text = opening  # up to the first colon
        self._depth = 0
        self._word = ""  # true, false, null
        self._quote = ""
        self._start = 0  # of the string
        self._maybe_closed = self._escaped = False

    def push(self, c: str) -> int | None:
        """None to go on; otherwise the object is the first n characters of `text`, and the rest does not belong to it."""
        self.text += c
        before = len(self.text) - 1
        if self._quote and not self._in_string(c):
            too_long = before - self._start > _LONGEST_STRING
            return (
                self._string_end(self._start if too_long else len(self.text))
                if too_long or (c == "\n" and not self._maybe_closed)
                else None
            )
        if before > _LONGEST:
            return before
        if c.isalpha() and not (c in "eE" and self.text[before - 1].isdigit()):
            self._word += c
            return None if any(word.startswith(self._word.lower()) for word in _WORDS) else before + 1 - len(self._word)
        if self._word and self._word.lower() not in _WORDS:
            return before - len(self._word)
        self._word = ""
        if c in "\"'":
            self._quote, self._start = c, before
            self._maybe_closed = self._escaped = False
        elif c == "[":
            self._depth += 1
        elif c == "]":
            self._depth -= 1
            return before if self._depth < 0 else None
        elif c == "}":
            return before + 1
        elif not (c.isspace() or c in ",:+-.eE0123456789"):
            return before
        return None

    def _in_string(self, c: str) -> bool:
        """Whether the string has ended and c comes after it."""
        if self._maybe_closed:
            if c.isspace():
                return False
            if c in ",:}]\"'":
                self._quote = ""
                return True
            self._maybe_closed = False
        if self._escaped:
            self._escaped = False
        elif c == "\\":
            self._escaped = True
        else:
            self._maybe_closed = c == self._quote
        return False

    def end(self) -> int:
        """Where the object ends if no more text comes."""
        return self._string_end(len(self.text)) if self._quote and not self._maybe_closed else len(self.text)

    def _string_end(self, otherwise: int) -> int:
        """The first position inside an open string that looks like its end, else `otherwise`."""
        sign = re.compile(rf"{self._quote}(?:\s*\}})?|\s*\}}|(?=[\]\n])").search(self.text, self._start + 1)
        return sign.end() if sign else otherwise


# ---- the stream ------------------------------------------------------------------------------------------------------

# Text before an object's first value that may still become a detection: a fence, a bracket, a brace, a quoted key.
_OPENING = re.compile(r"""(?:`{1,2}|(?:```[A-Za-z]*\s*)?(?:\[\s*)?(?:\{\s*(?:["']\w*(?:["']\s*)?)?)?)""")
_OPENED = re.compile(r"""[^{]*\{\s*["']\w+["']\s*:""")
_EMPTY = re.compile(r"```[A-Za-z]*\s*\[\s*\]")  # a fenced empty list
_LONGEST_OPENING = 100


class MarkReader:
    """Splits text deltas into ordinary text and marks, in order. It does not matter where the text is split into deltas."""

    def __init__(self) -> None:
        self._held = ""  # undecided: may be the start of a detection
        self._object: _Object | None = None  # the last part of _held, from its brace
        self._list = self._fence = False  # inside a detection's bracket, or fence, where separators are not text
        self._ticks, self._code = 0, False  # backticks in a row; inside a fence that is text, which the next one closes
        self._out: list[str | Mark] = []

    def push(self, text: str) -> list[str | Mark]:
        """The text and marks that are decided with this delta."""
        self._feed(text)
        out, self._out = self._out, []
        return out

    def flush(self) -> list[str | Mark]:
        """The rest, at the end of the text."""
        while self._held:
            if self._object:
                self._feed(self._finish(self._object.end()))
            elif self._list or self._fence:
                self._held = ""  # a separator, half a fence, the start of another object
            else:
                self._feed(self._reject())
        self._list = self._fence = self._code = False
        self._ticks = 0
        return self.push("")

    def _feed(self, text: str) -> None:
        pending = list(reversed(text))
        while pending:
            pending += reversed(self._step(pending.pop()))

    def _step(self, c: str) -> str:
        """Takes one character; returns those that have to be read again."""
        if self._object:
            self._held += c
            end = self._object.push(c)
            return "" if end is None else self._finish(end)
        if self._list or self._fence:
            return self._between(c)
        if not self._held and (c not in "[{`" or (c == "`" and self._code)):
            self._add_text(c)
            return ""
        self._held += c
        return self._open()

    def _open(self) -> str:
        if _OPENED.fullmatch(self._held):
            self._object = _Object(self._held[self._held.index("{") :])
        elif _EMPTY.fullmatch(self._held):
            self._held, self._fence = "", True
        elif len(self._held) > _LONGEST_OPENING or not _OPENING.fullmatch(self._held):
            return self._reject()
        return ""

    def _between(self, c: str) -> str:
        """After an object of a list or in a fence: another object, or the end."""
        self._held += c
        body = self._held.lstrip(", \t\r\n")
        if body.startswith("{") or not body:
            if _OPENED.fullmatch(body):
                self._object = _Object(body)
                return ""
            if len(self._held) <= _LONGEST_OPENING and _OPENING.fullmatch(body):
                return ""
        elif self._fence and body in ("`", "``"):
            return ""
        elif self._fence and body == "```":
            self._held, self._list, self._fence = "", False, False
            return ""
        elif body == ("]" if self._list else "["):
            self._held, self._list = "", not self._list
            return ""
        self._list = self._fence = False
        return self._reject()

    def _finish(self, end: int) -> str:
        """The object has ended: a detection becomes a mark, without its bracket and fence; anything else was text."""
        assert self._object
        text, opening = self._object.text, self._held[: -len(self._object.text)]
        self._object = None
        if not (self._list or self._fence):
            if not _is_detection(text[:end]):
                return self._reject()
            self._list, self._fence = "[" in opening, "```" in opening
        if mark := _mark(text[:end]):
            self._out.append(mark)
        self._held = ""
        return text[end:]

    def _reject(self) -> str:
        """_held is not a detection: its first character is text, and the rest is read again, since one may start there."""
        held, self._held = self._held, ""
        self._add_text(held[0])
        return held[1:]

    def _add_text(self, c: str) -> None:
        self._ticks = self._ticks + 1 if c == "`" else 0
        if self._ticks == 3:
            self._code = not self._code
        if self._out and isinstance(self._out[-1], str):
            self._out[-1] += c
        else:
            self._out.append(c)


def parse(text: str) -> tuple[str, list[Mark]]:
    """The ordinary text of a whole text, and its marks."""
    reader = MarkReader()
    out = reader.push(text) + reader.flush()
    return "".join(part for part in out if isinstance(part, str)), [part for part in out if isinstance(part, Mark)]


# ---- the picture -----------------------------------------------------------------------------------------------------

_COLOURS = ((255, 221, 51), (64, 224, 208), (255, 105, 180), (124, 252, 0), (255, 140, 0), (173, 130, 255))  # RGB, all light


def draw(picture: NDArray[np.uint8], marks: Sequence[Mark]) -> NDArray[np.uint8]:
    """A copy of an RGB picture [height, width, 3] with the marks drawn: light lines edged in black, labels on a background."""
    out = np.array(picture, dtype=np.uint8, order="C")
    height, width = out.shape[:2]
    if not height or not width:
        return out
    line = max(2, round(min(height, width) / 240))
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(dict.fromkeys(mark.label for mark in marks))}
    for mark in marks:
        (y0, y1), (x0, x1) = (_pixels(mark.box[0::2], height), _pixels(mark.box[1::2], width))
        for colour, thickness in (((0, 0, 0), line + 2), (colours[mark.label], line)):
            if mark.is_point:
                cv2.circle(out, (x0, y0), 2 * line + thickness, colour, cv2.FILLED, cv2.LINE_AA)
            else:
                cv2.rectangle(out, (x0, y0), (x1, y1), colour, thickness)
    for mark in marks:  # over all lines
        _write(out, mark, colours[mark.label])
    return out


def _pixels(span: Sequence[int], size: int) -> tuple[int, int]:
    first, last = (min(round(n * size / SCALE), size - 1) for n in span)
    return first, last


def _write(out: NDArray[np.uint8], mark: Mark, colour: tuple[int, int, int]) -> None:
    if not mark.label:
        return
    height, width = out.shape[:2]
    font = cv2.FontFace("sans")
    size = min(max(12, min(height, width) // 28), 48)
    _, top, text_width, text_height = cv2.getTextSize((width, height), mark.label, (0, 0), font, size, 600)
    pad = size // 4
    box_width, box_height = min(text_width + 2 * pad, width), min(text_height + 2 * pad, height)
    (y, _), (x, _) = _pixels(mark.box[0::2], height), _pixels(mark.box[1::2], width)
    y = y - box_height if y >= box_height else y  # above the box, or inside it if there is no room
    x, y = min(x, width - box_width), min(y, height - box_height)
    cv2.rectangle(out, (x, y), (x + box_width - 1, y + box_height - 1), colour, cv2.FILLED)
    cv2.putText(out, mark.label, (x + pad, y + pad - top), (0, 0, 0), font, size, 600)
