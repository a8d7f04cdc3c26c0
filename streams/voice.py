"""Streaming speech synthesis with word timestamps: what a voice is, and `open_voice`, which finds one by name."""

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
    """There is no such voice on this machine; the message says what to install."""


@dataclass(frozen=True)
class Word:
    """A word timestamp: text[start:end] begins at this sample of the sound."""

    start: int
    end: int
    sample: int


@dataclass(frozen=True)
class SpeechChunk:
    """A piece of the sound from `sample` on, and the words whose times became known with it, in order."""

    pcm: np.ndarray  # float32 [n] in [-1, 1]
    sample: int
    words: tuple[Word, ...]


@dataclass(frozen=True)
class Speech:
    """The whole sound of a text."""

    pcm: np.ndarray  # float32 [n] in [-1, 1]
    rate: int  # Hz
    words: tuple[Word, ...]


class Stream:
    """An iterator of chunks, synthesised in a thread of its own. `stop` may be called from any thread and takes a millisecond.

    `make(take, over)` runs in the thread. It hands each chunk to `take`, which returns whether to go on. `over` is set by `stop`,
    and when `make` ends or fails, so that threads which a voice has started end with it. What `make` raises is raised to the
    reader.
    """

    def __init__(self, make: Callable[[Callable[[SpeechChunk], bool], threading.Event], None]):
        self._chunks: queue.SimpleQueue[SpeechChunk | BaseException | None] = queue.SimpleQueue()  # bounded by the text
        self._closed = False  # for the reader, who still gets what was made before `make` ended
        self._over = threading.Event()
        self._make = make
        self._thread = threading.Thread(target=self._run, name="voice", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[SpeechChunk]:
        return self

    def __next__(self) -> SpeechChunk:
        chunk = None if self._closed else self._chunks.get()
        if isinstance(chunk, SpeechChunk) and not self._closed:
            return chunk
        self._closed = True
        if isinstance(chunk, BaseException):
            raise chunk
        raise StopIteration

    def stop(self) -> None:
        """Ends the iteration and the synthesis."""
        self._closed = True
        self._over.set()
        self._chunks.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        def take(chunk: SpeechChunk) -> bool:
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
    """A text-to-speech voice."""

    @property
    def rate(self) -> int:
        """Samples a second of its sound."""

    def speak(self, text: str, before: str = "") -> Stream:
        """The sound of the text as a stream of chunks. `before`: the text before it, in the same language."""


def open_voice(name: str = "auto", language: str = "en") -> Voice | None:
    """A voice by name; None means text alone. Raises VoiceMissing. Blocks, for seconds where weights are loaded.

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
    """(start, end) of each word of the text; what has no letter and no digit is not a word."""
    return [match.span() for match in TOKEN.finditer(text) if any(map(str.isalnum, match[0]))]


def plain(text: str) -> str:
    """The text with control characters and lone surrogates, which no voice can say, each replaced by one character."""
    return text.translate(_UNSPOKEN)
