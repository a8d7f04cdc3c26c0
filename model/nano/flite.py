"""Speech by flite, whose voices are cut from recordings of people: slt, rms, awb and kal16, with the time of each word.

Debian's `flite` brings the libraries. A voice is warped a little each time, which makes more speakers out of four.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import soxr

from model.nano.utterance import RATE, Utterance, place

VOICES = ("cmu_us_slt", "cmu_us_rms", "cmu_us_awb", "cmu_us_kal16")
_VERSION = "so.1"


class FliteMissing(Exception):
    """There is no flite on this machine."""


class _Wave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class Flite:
    """Raises FliteMissing if the libraries are not there. Not for several threads at once."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(f"libflite.{_VERSION}", mode=ctypes.RTLD_GLOBAL)
            for part in ("usenglish", "cmulex"):
                ctypes.CDLL(f"libflite_{part}.{_VERSION}", mode=ctypes.RTLD_GLOBAL)
            self._library.flite_init()
            self._voices = [self._voice(name) for name in VOICES]
        except OSError as e:
            raise FliteMissing("flite's libraries are missing; on Debian and Ubuntu: sudo apt-get install flite") from e
        text, pointer, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_float
        for name, result, arguments in (
            ("flite_synth_text", pointer, (text, pointer)),
            ("flite_feat_set_float", None, (pointer, text, number)),
            ("utt_relation", pointer, (pointer, text)),
            ("utt_wave", ctypes.POINTER(_Wave), (pointer,)),
            ("relation_head", pointer, (pointer,)),
            ("item_next", pointer, (pointer,)),
            ("item_daughter", pointer, (pointer,)),
            ("ffeature_float", number, (pointer, text)),
            ("delete_utterance", None, (pointer,)),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def _voice(self, name: str) -> int:
        register = getattr(ctypes.CDLL(f"libflite_{name}.{_VERSION}"), f"register_{name}")
        register.restype, register.argtypes = ctypes.c_void_p, (ctypes.c_char_p,)
        voice: int = register(None)
        return voice

    def clean(self, text: str, rng: np.random.Generator) -> Utterance:
        """A voice in silence, at a peak of 0.5. Raises ValueError if flite makes other words of the text than it has."""
        library, voice = self._library, self._voices[rng.integers(len(self._voices))]
        library.flite_feat_set_float(_features(voice), b"duration_stretch", rng.uniform(0.8, 1.25))
        ctypes.CDLL(None).srand(int(rng.integers(1 << 30)))  # the noise of its voices comes from there
        utterance = library.flite_synth_text(text.encode(), voice)
        try:
            wave = library.utt_wave(utterance).contents
            pcm = np.ctypeslib.as_array(wave.samples, (wave.count,)).astype(np.float32) / 32768
            rate, times = wave.rate, self._token_times(utterance)
        finally:
            library.delete_utterance(utterance)
        names = [token.strip(".,?!;:").lower() for token in text.split()]
        if len(names) != len(times):
            raise ValueError(f"flite made {len(times)} words of {text!r}")
        speed = rng.uniform(0.84, 1.18)
        pcm = soxr.resample(pcm, rate * speed, RATE, quality="MQ")
        words = [(name, round(a * RATE / speed), round(b * RATE / speed)) for name, (a, b) in zip(names, times, strict=True)]
        return place(text, pcm, words, rng)

    def _token_times(self, utterance: int) -> list[tuple[float, float]]:
        """Start and end in seconds of each token of the text that is said."""
        library, times = self._library, []
        token = library.relation_head(library.utt_relation(utterance, b"Token"))
        while token:
            spans, word = [], library.item_daughter(token)
            while word:
                spans.append(
                    (
                        library.ffeature_float(word, b"R:SylStructure.daughter1.daughter1.R:Segment.p.end"),
                        library.ffeature_float(word, b"R:SylStructure.daughtern.daughtern.R:Segment.end"),
                    )
                )
                word = library.item_next(word)
            if spans:
                times.append((spans[0][0], spans[-1][1]))
            token = library.item_next(token)
        return times


def _features(voice: int) -> ctypes.c_void_p:
    """The settings of a voice, which are the second field of its struct, after the name."""
    return ctypes.c_void_p(ctypes.cast(voice, ctypes.POINTER(ctypes.c_void_p))[1])


@cache
def flite() -> Flite:
    return Flite()
