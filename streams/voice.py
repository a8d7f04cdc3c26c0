"""Text in, sound out, streaming, with the time of each word: what a voice is, and `open_voice`, which finds one."""

import queue
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

TOKEN = re.compile(r"[^\W_]+(?:['’.,:][^\W_]+)*|\S")
_UNSPOKEN = {code: " " for code in range(32) if chr(code) not in "\n\t"}  # espeak takes control characters for commands
_UNSPOKEN |= {0x7F: " "} | dict.fromkeys(range(55296, 57344), "?")


class VoiceMissing(RuntimeError):
    """There is no such voice on this machine; says what to install."""


@dataclass(frozen=True)
class Word:
    """text[start:end] begins at this sample of the sound."""

    start: int
    end: int
    sample: int


@dataclass(frozen=True)
class Chunk:
    """A piece of the sound from `sample` on, and the words that became known with it (in order; never a later one first)."""

    pcm: np.ndarray
    sample: int
    words: tuple[Word, ...]


@dataclass(frozen=True)
class Speech:
    """pcm is float32 in [-1, 1]."""

    pcm: np.ndarray
    rate: int
    words: tuple[Word, ...]


class Stream:
    """An iterator of chunks that are made while they are taken. `stop` may come from any thread and is done in a millisecond.

    `make` hands each chunk to a function that answers whether to go on, and is given an event that says the same: it is set
    by `stop`, and also where `make` ends or fails, so that threads which a voice has started of its own end with it.
    """

    def __init__(self, make: Callable[[Callable[[Chunk], bool], threading.Event], None]):
        self._chunks: queue.SimpleQueue[Chunk | BaseException | None] = queue.SimpleQueue()  # bounded by the text
        self._closed = False  # for the reader, who still gets what was made before `make` ended
        self._over = threading.Event()
        self._make = make
        self._thread = threading.Thread(target=self._run, name="voice", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = None if self._closed else self._chunks.get()
        if isinstance(chunk, Chunk) and not self._closed:
            return chunk
        self._closed = True
        if isinstance(chunk, BaseException):
            raise chunk
        raise StopIteration

    def stop(self) -> None:
        """Nothing more comes out, and nothing more is made."""
        self._closed = True
        self._over.set()
        self._chunks.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        def take(chunk: Chunk) -> bool:
            self._chunks.put(chunk)
            return not self._over.is_set()

        try:
            self._make(take, self._over)
            self._chunks.put(None)
        except BaseException as error:  # noqa: BLE001  raised again in the reader
            self._chunks.put(error)
        finally:
            self._over.set()


class Voice(Protocol):
    """What a conversation speaks with."""

    @property
    def rate(self) -> int:
        """Samples a second of all that it says."""

    def speak(self, text: str, before: str = "") -> Stream:
        """The sound of the text as a stream of chunks. `before`: what was said before it, in the same language."""


def open_voice(name: str = "auto", language: str = "en") -> Voice | None:
    """A voice by name; None is text alone.

    auto: pocket-tts if it is installed and its weights are on disk already, else espeak-ng, else None. Downloads nothing.
    none: None.
    pocket: pocket-tts; downloads its weights, some hundred MB, the first time.
    espeak: espeak-ng in the language of what it says, or in this one where that cannot be told.
    Anything else is a voice of espeak-ng: "de", "en-gb-scotland+f3". Then the language is not looked at.
    """
    from streams import espeak, pocket  # not above: they build on this module

    if name == "none":
        return None
    if name not in ("auto", "pocket"):
        return espeak.open_voice(None if name == "espeak" else name, language)

    if name == "pocket":
        return pocket.open_voice(language)
    with suppress(VoiceMissing):
        return pocket.open_voice(language, download=False)
    with suppress(VoiceMissing):
        return espeak.open_voice(None, language)
    return None


def words_in(text: str) -> list[tuple[int, int]]:
    """Where each word of the text begins and ends; what has no letter and no digit is none."""
    return [match.span() for match in TOKEN.finditer(text) if any(map(str.isalnum, match[0]))]


def plain(text: str) -> str:
    """The text without what no voice can say: control characters and broken surrogates, each replaced by one character."""
    return text.translate(_UNSPOKEN)
