"""Speech for training the nano checkpoint: a text becomes 16 kHz sound of a random voice, with each word's place.

`clean` makes a sound (a few milliseconds), `augment` gives it another room, microphone and loudness (cheaper, so a bank
of clean ones serves many times), `utter` does both. Everything follows from the generator passed in.
"""

from functools import cache

import numpy as np
import soxr

from model.nano.channel import augment
from model.nano.utterance import RATE, Utterance, place
from streams.espeak import RATE as ESPEAK_RATE
from streams.espeak import Espeak, EspeakSettings

ACCENTS = (
    "en-gb", "en-us", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc",
)  # fmt: skip
HELD_OUT = ("m3", "f2", "paul", "Gene", "linda", "Alicia")  # never trained on; m3, f2, paul and Gene are plain
_UNLIKE_SPEECH = {
    "Demonic", "Storm", "Tweaky", "UniRobot", "anikaRobot", "croak", "fast", "whisper", "whisperf", "klatt6",
    "robosoft", "robosoft2", "robosoft3", "robosoft4", "robosoft5", "robosoft6", "robosoft7", "robosoft8",
}  # fmt: skip
_OF_SOME_RELEASES = {"Reed", "ian", "mike2"}
_TOO_LIKE_HELD_OUT = {"Gene2"}  # the same sound as Gene but for the pitch
_NO_VARIANT = ""


def utter(text: str, rng: np.random.Generator, held_out: bool = False) -> Utterance:
    return augment(clean(text, rng, held_out), rng)


def clean(text: str, rng: np.random.Generator, held_out: bool = False) -> Utterance:
    """A random voice in silence, at a peak of 0.5."""
    how = draw_voice(rng, held_out)
    speed = rng.uniform(0.85, 1.15)

    speech = spoken_by_espeak().say(text, **how)
    if not speech.words:
        raise ValueError(f"nothing to say in {text!r}")
    pcm = soxr.resample(speech.pcm, ESPEAK_RATE * speed, RATE, quality="MQ")
    scale = RATE / (ESPEAK_RATE * speed)
    starts = [round(word.sample * scale) for word in speech.words] + [len(pcm)]
    names = [text[word.start : word.end].lower().replace("’", "'") for word in speech.words]
    return place(text, pcm, list(zip(names, starts, starts[1:], strict=False)), rng)


def draw_voice(rng: np.random.Generator, held_out: bool = False) -> EspeakSettings:
    variants = HELD_OUT if held_out else training_variants()
    variant = variants[rng.integers(len(variants))]
    return {
        "voice": ACCENTS[rng.integers(len(ACCENTS))] + (f"+{variant}" if variant else ""),
        "rate": int(rng.integers(130, 221)),
        "pitch": int(rng.integers(25, 76)),
        "range": int(rng.integers(25, 81)),
        "fresh": True,
    }


@cache
def training_variants() -> tuple[str, ...]:
    kept_out = {*HELD_OUT, *_UNLIKE_SPEECH, *_OF_SOME_RELEASES, *_TOO_LIKE_HELD_OUT}
    return (_NO_VARIANT, *(name for name in spoken_by_espeak().variants() if name not in kept_out))


@cache
def spoken_by_espeak() -> Espeak:
    return Espeak()
