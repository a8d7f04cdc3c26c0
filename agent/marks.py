"""What the model points at: detection JSON in a stream of text ↔ marks on a picture.

Gemma answers "where is …?" with `[{"box_2d": [y0, x0, y1, x1], "label": "…"}]`, often in a ```json fence, amid ordinary
text. That JSON is for the picture and never for the voice. `MarkReader` takes the text as it comes and gives back what
can be said, at once, and each mark as soon as its object is complete. Other brackets, braces and fences are text like
any other, and what the model gets wrong about JSON is forgiven: where an object breaks off, it ends, and what follows
is text again.
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
    """The mark of one object's text, however it is spelled; None if it has no place or no extent."""
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
    """Follows one object character by character, to see where it ends.

    A quote ends a string only where one may end, so that 'the dog's bowl' is one string.
    Anything that no JSON has ends the object.
    """

    def __init__(self, opening: str) -> None:
        self.text = opening  # up to the first colon
        self._depth = 0
        self._word = ""  # true, false, null
        self._quote = ""
        self._start = 0  # of the string
        self._maybe_closed = self._escaped = False

    def push(self, c: str) -> int | None:
        """None: go on. Otherwise the object ends with this many characters of `text`, and the rest was never part of it."""
        self.text += c
        before = len(self.text) - 1
        if self._quote and not self._in_string(c):
            too_long = before - self._start > _LONGEST_STRING
            return (
                self._cut(self._start if too_long else len(self.text))
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
        """Whether the string is over and c stands behind it."""
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
        """Where it ends if nothing more comes."""
        return self._cut(len(self.text)) if self._quote and not self._maybe_closed else len(self.text)

    def _cut(self, otherwise: int) -> int:
        """Inside an open string: the first place that looks like its end."""
        sign = re.compile(rf"{self._quote}(?:\s*\}})?|\s*\}}|(?=[\]\n])").search(self.text, self._start + 1)
        return sign.end() if sign else otherwise


# ---- the stream ------------------------------------------------------------------------------------------------------

# Everything before an object's first value that may yet become a detection: a fence, a bracket, a brace, a quoted key.
_OPENING = re.compile(r"""(?:`{1,2}|(?:```[A-Za-z]*\s*)?(?:\[\s*)?(?:\{\s*(?:["']\w*(?:["']\s*)?)?)?)""")
_OPENED = re.compile(r"""[^{]*\{\s*["']\w+["']\s*:""")
_EMPTY = re.compile(r"```[A-Za-z]*\s*\[\s*\]")  # a fenced list of nothing
_LONGEST_OPENING = 100


class MarkReader:
    """Deltas of text in; text that can be said, and marks, out, in order. However the text is cut up, the outcome is the same."""

    def __init__(self) -> None:
        self._held = ""  # undecided: may be the beginning of a detection
        self._object: _Object | None = None  # the last part of what is held, from its brace
        self._list = self._fence = False  # inside a detection's bracket, its fence: what separates objects is not text
        self._ticks, self._code = 0, False  # backticks said in a row; inside a fence that is text, where the next one closes it
        self._out: list[str | Mark] = []

    def push(self, text: str) -> list[str | Mark]:
        self._feed(text)
        out, self._out = self._out, []
        return out

    def flush(self) -> list[str | Mark]:
        """The end of the text, wherever it came."""
        while self._held:
            if self._object:
                self._feed(self._finish(self._object.end()))
            elif self._list or self._fence:
                self._held = ""  # a separator, half a fence, the beginning of one more object
            else:
                self._feed(self._reject())
        self._list = self._fence = self._code = False
        self._ticks = 0
        return self.push("")

    def _feed(self, text: str) -> None:
        todo = list(reversed(text))
        while todo:
            todo += reversed(self._step(todo.pop()))

    def _step(self, c: str) -> str:
        """Take one character; give back those that are to be read again."""
        if self._object:
            self._held += c
            end = self._object.push(c)
            return "" if end is None else self._finish(end)
        if self._list or self._fence:
            return self._between(c)
        if not self._held and (c not in "[{`" or (c == "`" and self._code)):
            self._say(c)
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
        """After an object of a list or in a fence: one more, or the end of it."""
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
        """The object is over: a detection goes to the picture and takes its bracket and fence along; anything else was text."""
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
        """What was held is text. Only its first character is sure: a detection may begin right behind it."""
        held, self._held = self._held, ""
        self._say(held[0])
        return held[1:]

    def _say(self, c: str) -> None:
        self._ticks = self._ticks + 1 if c == "`" else 0
        if self._ticks == 3:
            self._code = not self._code
        if self._out and isinstance(self._out[-1], str):
            self._out[-1] += c
        else:
            self._out.append(c)


def parse(text: str) -> tuple[str, list[Mark]]:
    """What can be said of a whole text, and its marks."""
    reader = MarkReader()
    out = reader.push(text) + reader.flush()
    return "".join(part for part in out if isinstance(part, str)), [part for part in out if isinstance(part, Mark)]


# ---- the picture -----------------------------------------------------------------------------------------------------

_COLOURS = ((255, 221, 51), (64, 224, 208), (255, 105, 180), (124, 252, 0), (255, 140, 0), (173, 130, 255))  # RGB, all light


def draw(picture: NDArray[np.uint8], marks: Sequence[Mark]) -> NDArray[np.uint8]:
    """A copy of an RGB picture with the marks on it. Light lines edged in black, labels on their own ground."""
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
    y = y - box_height if y >= box_height else y  # above the box, or inside where there is no room
    x, y = min(x, width - box_width), min(y, height - box_height)
    cv2.rectangle(out, (x, y), (x + box_width - 1, y + box_height - 1), colour, cv2.FILLED)
    cv2.putText(out, mark.label, (x + pad, y + pad - top), (0, 0, 0), font, size, 600)
