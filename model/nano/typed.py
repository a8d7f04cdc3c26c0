"""Sentences as people type them: capitals or none, any punctuation, both spellings, contractions and slips of a finger.

Some forms are kept out of the lessons, for the exam.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np

SPELLINGS = {"colour": "color", "grey": "gray", "favourite": "favorite", "coloured": "colored"}
CONTRACTIONS = {
    "what is": "what's",
    "where is": "where's",
    "who is": "who's",
    "how is": "how's",
    "i am": "i'm",
    "it is": "it's",
    "that is": "that's",
    "is there a ": "is there any ",
    "can not": "can't",
    "do not": "don't",
    "let us": "let's",
}
ENDINGS = ("", "?", ".", "??", "?!", " ?", "!", " ", "  ")
HELD_OUT_ENDINGS = ("...", "???", " !", ",")
NEAR_KEYS = {
    "a": "s", "b": "v", "c": "x", "d": "f", "e": "r", "f": "g", "g": "h", "h": "j", "i": "o", "j": "k", "k": "l", "l": "k",
    "m": "n", "n": "m", "o": "p", "p": "o", "q": "w", "r": "t", "s": "a", "t": "r", "u": "y", "v": "c", "w": "e", "x": "z",
    "y": "t", "z": "x",
}  # fmt: skip


def typed(text: str, rng: np.random.Generator, held_out: bool = False) -> str:
    """A form of the text that says the same. `held_out`: one of the forms that training never shows."""
    if held_out:
        return _held_out(text, rng)
    if rng.random() < 0.25:
        return text
    if rng.random() < 0.5:
        text = american(text)
    if rng.random() < 0.3:
        text = contracted(text)
    if rng.random() < 0.2:
        text = slip(text, rng)
    case = rng.random()
    if case < 0.4:
        text = text.lower()
    elif case < 0.55:
        text = text.upper()
    if rng.random() < 0.5:
        text = text.rstrip(".?!") + ENDINGS[rng.integers(len(ENDINGS))]
    if rng.random() < 0.15:
        text = text.replace(",", "")
    if rng.random() < 0.08:
        text = " " * int(rng.integers(1, 4)) + text
    return text


def american(text: str) -> str:
    return re.sub(r"\w+", lambda match: _as_cased(match[0], SPELLINGS.get(match[0].lower(), match[0])), text)


def contracted(text: str) -> str:
    for long, short in CONTRACTIONS.items():
        text = re.sub(rf"\b{long}", partial(_shortened, short=short), text, count=1, flags=re.IGNORECASE)
    return text


def slip(text: str, rng: np.random.Generator, kinds: tuple[str, ...] = ("swapped", "missing", "neighbour")) -> str:
    """One slip of a finger inside one of the longer words; the first letter stays."""
    words = list(re.finditer(r"[A-Za-z]{4,}", text))
    if not words:
        return text
    word = words[rng.integers(len(words))]
    at = word.start() + int(rng.integers(1, len(word[0]) - 1))
    here, following = text[at], text[at + 1]
    kind = kinds[rng.integers(len(kinds))]
    if kind == "swapped":
        return text[:at] + following + here + text[at + 2 :]
    if kind == "missing":
        return text[:at] + text[at + 1 :]
    if kind == "doubled":
        return text[:at] + here + text[at:]
    return text[:at] + NEAR_KEYS.get(here.lower(), here) + text[at + 1 :]


def _held_out(text: str, rng: np.random.Generator) -> str:
    match rng.integers(4):
        case 0:
            return text.title().replace("'S", "'s")
        case 1:
            return contracted(text).replace("'", "")
        case 2:
            return slip(text, rng, ("doubled",))
        case _:
            return text.lower().rstrip(".?!") + HELD_OUT_ENDINGS[rng.integers(len(HELD_OUT_ENDINGS))]


def _shortened(match: re.Match[str], short: str) -> str:
    return _as_cased(match[0], short)


def _as_cased(old: str, new: str) -> str:
    return new[0].upper() + new[1:] if old[0].isupper() else new
