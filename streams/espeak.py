"""espeak-ng in this process: streaming, with the time of each word.

The one module that touches espeak-ng (GPL-3, an optional extra). The library keeps its state in globals, so one
`_EspeakLibrary` per process owns it under one lock; an `Espeak` is only a handle and may be used from any thread.
"""

import _ctypes
import ctypes
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from streams.language import language_of
from streams.voice import TOKEN, Speech, SpeechChunk, Stream, VoiceMissing, Word, plain

RATE = 22050
CHUNK_MS = 20  # asked for; espeak rounds it up to about 50 ms
PART = 1000  # characters spoken under one hold of the lock: bounds the wait of others and what a stream runs ahead

_SYNCHRONOUS, _DONT_EXIT, _UTF8, _ABORT = 2, 0x8000, 1, 1
_IPA = 2
_EVENT_END, _EVENT_WORD, _EVENT_CLAUSE = 0, 1, 5
_PARAMETERS = {"rate": 1, "volume": 2, "pitch": 3, "range": 4}


class EspeakSettings(TypedDict, total=False):
    """How a text is spoken; see `Espeak.say`."""

    voice: str
    rate: int
    pitch: int
    range: int
    volume: int
    fresh: bool


DEFAULTS: EspeakSettings = {"voice": "en-us", "rate": 175, "pitch": 50, "range": 50, "volume": 100, "fresh": False}


@dataclass(frozen=True)
class EspeakVoice:
    """Espeak with fixed settings: a `Voice`. `follows`: a text in another language is spoken by that language's usual voice."""

    espeak: "Espeak"
    settings: EspeakSettings
    follows: bool = False
    rate: int = RATE

    def speak(self, text: str, before: str = "") -> Stream:
        return self.espeak.stream(text, lambda: self._settings(before + text))

    def _settings(self, text: str) -> EspeakSettings:
        own = self.settings["voice"]
        spoken = language_of(text) if self.follows else None
        if spoken is None or spoken == own.partition("-")[0]:
            return self.settings
        accents = self.espeak.voices(spoken)
        return {**self.settings, "voice": accents[0]} if accents else self.settings


class Espeak:
    """Speech synthesis by espeak-ng. Raises VoiceMissing where the library is not installed."""

    def __init__(self) -> None:
        self._library = _library()

    def speak(self, text: str, **settings: Unpack[EspeakSettings]) -> Stream:
        """The sound of the text as a stream of chunks, with the settings of `say`. Raises ValueError for an unknown voice."""
        self._resolved(settings)
        return self.stream(text, lambda: settings)

    def stream(self, text: str, choose: Callable[[], EspeakSettings]) -> Stream:
        """The same with settings that `choose` returns; it is called in the stream's own thread and may take a while."""
        return Stream(lambda take, _: self._library.synthesise(text, take, **self._resolved(choose())))

    def bound(self, **settings: Unpack[EspeakSettings]) -> EspeakVoice:
        """A `Voice` that always speaks with these settings. Raises ValueError for an unknown voice, now and not later."""
        self._resolved(settings)
        return EspeakVoice(self, {**DEFAULTS, **settings})

    def say(self, text: str, **settings: Unpack[EspeakSettings]) -> Speech:
        """The whole sound of the text: float32 [n] at 22,050 Hz. Blocks. Raises ValueError for an unknown voice.

        voice: an accent of `voices`, and perhaps a variant of `variants`: "en-gb-scotland+f3".
        rate: words a minute; pitch, range: 0..100; volume: 0..200.
        fresh: from espeak's first state, so that the same text is the same sound to the sample (about 1 ms);
        otherwise the voice's flutter goes on where the last text left it.
        """
        resolved = self._resolved(settings)
        chunks: list[SpeechChunk] = []

        def take(chunk: SpeechChunk) -> bool:
            chunks.append(chunk)
            return True

        self._library.synthesise(text, take, **resolved)
        pcm = np.concatenate([chunk.pcm for chunk in chunks]) if chunks else np.zeros(0, np.float32)
        return Speech(pcm, RATE, tuple(word for chunk in chunks for word in chunk.words))

    def phonemes(self, text: str, voice: str = "en-us") -> list[str]:
        """The sounds of each clause of the text, in IPA with stress."""
        return self._library.phonemes(text, self._library.resolve(voice))

    def voices(self, language: str = "en") -> tuple[str, ...]:
        """The accents of a language, as names that `say` takes."""
        return tuple(name for name in self._library.voices if name == language or name.startswith(language + "-"))

    def variants(self) -> tuple[str, ...]:
        """The names that may follow a "+"."""
        return self._library.variants

    def _resolved(self, settings: EspeakSettings) -> EspeakSettings:
        """With the defaults, and the voice by the name that espeak knows. Raises ValueError for an unknown voice."""
        complete: EspeakSettings = {**DEFAULTS, **settings}
        return {**complete, "voice": self._library.resolve(complete["voice"])}


class _EspeakLibrary:
    """The library, loaded once; every call that speaks happens under its lock."""

    def __init__(self, path: str, data: str | None):
        self._path, self._data = path, data
        self._lock = threading.Lock()
        self._take: Callable[[np.ndarray, list[_EspeakEvent]], bool] = lambda pcm, events: False
        self._callback = _CALLBACK(self._on_sound)  # espeak keeps the pointer: this reference keeps it alive
        self._load()
        self.voices = self._voices()
        folder = ctypes.c_char_p()
        self._lib.espeak_Info(ctypes.byref(folder))
        found = (Path((folder.value or b"").decode()) / "voices" / "!v").glob("*")
        self.variants = tuple(sorted(file.name for file in found if file.is_file()))
        os.register_at_fork(after_in_child=self._after_fork)

    def resolve(self, voice: str) -> str:
        """The name by which espeak knows a voice; ValueError, since espeak itself takes an unknown variant for none."""
        accent, plus, variant = voice.partition("+")
        if accent not in self.voices:
            raise ValueError(f"no voice {accent!r}: see Espeak().voices(language)")
        if plus and variant not in self.variants:
            raise ValueError(f"no voice variant {variant!r}: see Espeak().variants()")
        return self.voices[accent] + plus + variant

    def synthesise(self, text: str, take: Callable[[SpeechChunk], bool], *, voice: str, fresh: bool, **parameters: int) -> None:
        """Calls take with each chunk until it says False. Holds the lock for one part of the text at a time."""
        words, made, going = _WordTimes(text), 0, True
        failure: list[BaseException] = []

        def on_sound(pcm: np.ndarray, events: list[_EspeakEvent]) -> bool:
            nonlocal made, going
            try:
                known = words.known(events, start, begun)
                going = take(SpeechChunk(pcm, made, known))
            except BaseException as error:  # noqa: BLE001  may not cross the C frames in between
                failure.append(error)
                going = False
            made += len(pcm)
            return going

        for start, part in _parts(text):
            begun = made
            with self._lock:
                if fresh and start == 0:
                    self._reload()
                code = self._lib.espeak_SetVoiceByName(voice.encode())
                if code:
                    raise ValueError(f"espeak-ng refused the voice {voice!r} (code {code})")
                for name, value in parameters.items():
                    self._lib.espeak_SetParameter(_PARAMETERS[name], value, 0)
                self._take = on_sound
                data = plain(part).encode()
                self._lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
            if failure:
                raise failure[0]
            if not going:
                return
        if rest := words.upto(len(text), made):
            take(SpeechChunk(np.zeros(0, np.float32), made, rest))

    def phonemes(self, text: str, voice: str) -> list[str]:
        with self._lock:
            if self._lib.espeak_SetVoiceByName(voice.encode()):
                raise ValueError(f"espeak-ng refused the voice {voice!r}")
            self._lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
            rest, clauses = ctypes.c_char_p(plain(text).encode()), []
            while rest:  # the library moves the pointer behind each clause, and clears it behind the last
                clauses.append(self._lib.espeak_TextToPhonemes(ctypes.byref(rest), _UTF8, _IPA).decode())
        return clauses

    def _on_sound(self, wav: Any, count: int, events: Any) -> int:
        if not wav:
            return 0
        pcm = np.frombuffer(ctypes.string_at(wav, 2 * count), np.int16).astype(np.float32) / 32768
        seen: list[_EspeakEvent] = []
        while events[len(seen)].type != _EVENT_END:
            seen.append(events[len(seen)])
        return 0 if self._take(pcm, seen) else _ABORT

    def _load(self) -> None:
        self._lib = ctypes.CDLL(self._path)
        self._lib.espeak_Info.restype = ctypes.c_char_p
        self._lib.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_EspeakVoiceInfo))
        rate = self._lib.espeak_Initialize(_SYNCHRONOUS, CHUNK_MS, self._data and self._data.encode(), _DONT_EXIT)
        if rate != RATE:
            raise VoiceMissing(f"espeak-ng at {self._path} has no usable data folder; install the apt package libespeak-ng1.")
        self._lib.espeak_SetSynthCallback(self._callback)

    def _reload(self) -> None:
        """espeak never resets its flutter and noise: only a newly loaded library starts from the beginning."""
        self._lib.espeak_Terminate()
        _ctypes.dlclose(self._lib._handle)
        self._load()
        ctypes.CDLL(None).srand(1)
        if hasattr(self._lib, "espeak_ng_SetRandSeed"):
            self._lib.espeak_ng_SetRandSeed(ctypes.c_long(1))

    def _after_fork(self) -> None:
        """A child has neither the library's threads, on which espeak_Terminate waits for ever, nor whoever held the lock."""
        self._lock = threading.Lock()
        _ctypes.dlclose(self._lib._handle)
        self._load()

    def _voices(self) -> dict[str, str]:
        """Language code → the voice's file, which espeak takes as a name (it does not take every code as one)."""
        found: dict[str, tuple[int, str]] = {}
        listed, index = self._lib.espeak_ListVoices(None), 0
        while listed[index]:
            voice = listed[index].contents
            index += 1
            file = voice.identifier.decode()
            if file.startswith("mb/"):  # needs mbrola and its data
                continue
            at = 0
            while priority := voice.languages[at]:  # a byte of priority, a code and a NUL for each; a zero ends them
                code = ctypes.string_at(ctypes.addressof(voice.languages.contents) + at + 1)
                at += len(code) + 2
                best = found.get(code.decode())
                if best is None or priority < best[0]:
                    found[code.decode()] = (priority, file)
        return {code: file for code, (_, file) in sorted(found.items())}


class _WordTimes:
    """From espeak's word events to words of the text, each once and in order.

    An event's position counts characters from 1; its length is often wrong, numbers give several events, and words that
    espeak says as one ("of the") give a single event. So the text is cut into words here, an event only says when one
    begins, and a word without an event lies between its neighbours in proportion to its letters.
    """

    def __init__(self, text: str):
        self._tokens = [match.span() for match in TOKEN.finditer(text)]
        self._spoken = [any(map(str.isalnum, text[start:end])) for start, end in self._tokens]
        self._next = 0
        self._last = 0  # where the last known word begins, in samples

    def known(self, events: list["_EspeakEvent"], part: int, begun: int) -> tuple[Word, ...]:
        words: list[Word] = []
        for event in events:
            sample, place = begun + event.sample, part + event.position - 1
            if event.type == _EVENT_CLAUSE:
                words += self.upto(place, sample)
            elif event.type == _EVENT_WORD and event.position > 0:
                words += self._begin(place, sample)
        return tuple(words)

    def upto(self, place: int, sample: int) -> tuple[Word, ...]:
        """The words before this place that no event told of; the sound had come to this sample."""
        first = self._next
        while self._next < len(self._tokens) and self._tokens[self._next][1] <= place:
            self._next += 1
        between = slice(first, self._next)
        skipped = [span for span, spoken in zip(self._tokens[between], self._spoken[between], strict=True) if spoken]
        if not skipped:
            return ()
        begin = self._tokens[first - 1][0] if first else 0
        width = max(1, skipped[-1][1] - begin)
        words = [Word(*span, self._last + (sample - self._last) * (span[0] - begin) // width) for span in skipped]
        self._last = words[-1].sample
        return tuple(words)

    def _begin(self, place: int, sample: int) -> tuple[Word, ...]:
        words = self.upto(place, sample)
        if self._next == len(self._tokens) or self._tokens[self._next][0] > place:
            return words  # inside a word that has begun, or in the space between two
        self._last = sample
        self._next += 1
        return (*words, Word(*self._tokens[self._next - 1], sample))


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """The text in parts of at most PART characters, cut after a sentence or at a space where it can be."""
    start = 0
    while len(text) - start > PART:
        window = text[start : start + PART]
        ends = [match.end() for match in re.finditer(r"[.!?…\n]\s", window)] or [
            match.end() for match in re.finditer(r"\s", window)
        ]
        end = start + (ends[-1] if ends else PART)
        yield start, text[start:end]
        start = end
    yield start, text[start:]


class _EspeakEvent(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("message", ctypes.c_uint),
        ("position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


class _EspeakVoiceInfo(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.POINTER(ctypes.c_ubyte)),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EspeakEvent))


@cache
def _library() -> _EspeakLibrary:
    with suppress(OSError, VoiceMissing):
        return _EspeakLibrary(find_library("espeak-ng") or "libespeak-ng.so.1", None)
    if importlib.util.find_spec("espeakng_loader"):
        import espeakng_loader

        return _EspeakLibrary(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())
    raise VoiceMissing("There is no voice: install the apt package libespeak-ng1, or `pip install attend[espeak]`.")


def open_voice(voice: str | None, language: str) -> EspeakVoice:
    """This voice, or without one the usual voice of the language."""
    espeak = Espeak()
    language = language.lower().replace("_", "-")
    accents = espeak.voices(language) or espeak.voices(language.partition("-")[0])
    if voice is None:
        if not accents:
            raise VoiceMissing(f"espeak-ng has no voice for the language {language!r}: name another one of its voices.")
        voice = DEFAULTS["voice"] if DEFAULTS["voice"] in accents else accents[0]
        threading.Thread(target=language_of, args=("",), daemon=True).start()  # else the first answer would wait for it
        return EspeakVoice(espeak, {**DEFAULTS, "voice": voice}, follows=True)
    try:
        return espeak.bound(voice=voice)
    except ValueError as error:
        hint = "say auto, none, pocket, espeak, or a voice of espeak-ng like de or en-us+f2"
        raise VoiceMissing(f"There is no voice {voice!r}: {hint}.") from error
