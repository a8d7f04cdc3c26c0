"""Speech for training the nano checkpoint: a text becomes 16 kHz sound of a random voice, with each word's place.

`clean` makes a sound (a few milliseconds), `augment` gives it another room, microphone and loudness (cheaper, so a bank
of clean ones serves many times), `utter` does both. Everything follows from the generator passed in.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import soxr

from streams.espeak import RATE as ESPEAK_RATE
from streams.espeak import Espeak, EspeakSettings

RATE = 16000

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

BLOCK = 80  # samples of one step of the loudness curve
ROOM = 4096  # samples after the sound for a tail of echo


@dataclass(frozen=True)
class Utterance:
    """pcm is float32 at 16 kHz; words are (lower-cased word, start, end) in samples."""

    text: str
    pcm: np.ndarray
    words: tuple[tuple[str, int, int], ...]


def utter(text: str, rng: np.random.Generator, held_out: bool = False) -> Utterance:
    return augment(clean(text, rng, held_out), rng)


def clean(text: str, rng: np.random.Generator, held_out: bool = False) -> Utterance:
    """A random voice in silence, at a peak of 0.5."""
    how = draw_voice(rng, held_out)
    speed = rng.uniform(0.85, 1.15)
    before, after = int(rng.uniform(0.05, 0.6) * RATE), int(rng.uniform(0.2, 0.7) * RATE)

    speech = _espeak().say(text, **how)
    if not speech.words:
        raise ValueError(f"nothing to say in {text!r}")
    pcm = soxr.resample(speech.pcm, ESPEAK_RATE * speed, RATE, quality="MQ")
    loud = _loud(pcm)
    first, last = int(loud[0]) * BLOCK, min(len(pcm), (int(loud[-1]) + 1) * BLOCK)

    scale = RATE / (ESPEAK_RATE * speed)
    starts = [max(first, round(word.sample * scale)) for word in speech.words] + [last]
    words = []
    for word, start, limit in zip(speech.words, starts, starts[1:], strict=False):
        at = np.searchsorted(loud, limit // BLOCK)  # a word before a pause ends where its sound does
        end = min(limit, (int(loud[at - 1]) + 1) * BLOCK) if at else limit
        name = text[word.start : word.end].lower().replace("’", "'")
        words.append((name, start - first + before, max(start + 1, end) - first + before))

    sound = np.zeros(before + (last - first) + after, np.float32)
    sound[before : before + last - first] = pcm[first:last]
    sound *= 0.5 / np.abs(sound).max()
    return Utterance(text, sound, tuple(words))


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
    return (_NO_VARIANT, *(name for name in _espeak().variants() if name not in kept_out))


def augment(utterance: Utterance, rng: np.random.Generator) -> Utterance:
    """The same words through another room and microphone, at another loudness, up to 20 ms sooner or later."""
    length, words = len(utterance.pcm), utterance.words
    first, last = words[0][1], words[-1][2]
    shift = int(np.clip(rng.integers(-320, 321), -first, length - last))
    pcm = np.zeros(length, np.float32)
    source = utterance.pcm[max(0, -shift) : length - max(0, shift)]
    pcm[max(0, shift) : max(0, shift) + len(source)] = source

    pcm = _through(pcm, rng)
    spoken = pcm[first + shift : last + shift]
    level = float(np.sqrt(np.dot(spoken, spoken) / len(spoken))) + 1e-9

    # Half of the time a quiet place, half of the time anything.
    snr = rng.uniform(28, 40) if rng.random() < 0.5 else rng.uniform(5, 28)
    pcm += _noise(length, rng) * np.float32(level * 10 ** (-snr / 20))
    pcm *= np.float32(min(10 ** (rng.uniform(-35, -12) / 20) / level, 0.99 / float(max(pcm.max(), -pcm.min()))))
    return replace(utterance, pcm=pcm, words=tuple((word, start + shift, end + shift) for word, start, end in words))


def _through(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random tone curve, sometimes a telephone's band, sometimes a room: one filter in the frequency domain, without delay."""
    equalised, narrow, echoing = rng.random(3) < (0.7, 0.2, 0.3)
    if not (equalised or narrow or echoing):
        return pcm
    size = _fast_size(len(pcm) + ROOM)
    octaves, place = _octaves(size)
    gain = np.zeros(len(octaves), np.float32)  # dB
    if equalised:
        gain += np.interp(octaves, np.arange(9), np.cumsum(rng.normal(0, 3, 9)) * 0.6 + rng.normal(0, 2, 9)).astype(np.float32)
        gain -= gain[len(gain) // 2]
    if narrow:
        low, high = np.log2(rng.uniform(150, 400) / 31.25), np.log2(rng.uniform(3000, 4500) / 31.25)
        gain -= np.minimum(60, 24 * np.maximum(0, low - octaves) + 36 * np.maximum(0, octaves - high)).astype(np.float32)
    response = (10 ** (gain / 20)).astype(np.float32)[place]
    if echoing:
        tail = np.zeros(size, np.float32)
        until = int(rng.uniform(0.05, 0.25) * RATE)
        decay = np.exp(np.linspace(0, -6.9, until, dtype=np.float32))
        tail[:until] = rng.standard_normal(until, np.float32) * decay
        tail[: int(rng.uniform(0.002, 0.01) * RATE)] = 0  # the first reflection comes a little later
        tail *= np.float32(rng.uniform(0.1, 0.6)) / np.sqrt(np.dot(tail, tail))
        tail[0] = 1
        response = response * np.fft.rfft(tail)
    return np.fft.irfft(np.fft.rfft(pcm, size) * response, size)[: len(pcm)]


def _noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Two colours of noise mixed, at an rms of about 1."""
    bank = _noises()
    mixed = np.zeros(length, np.float32)
    share = rng.uniform(0, 1)
    for weight in (share, 1 - share):
        colour = bank[rng.integers(len(bank))]
        at = int(rng.integers(len(colour)))
        part = np.resize(colour[at:], length) if at + length <= len(colour) else np.resize(np.roll(colour, -at), length)
        mixed += part * np.float32(np.sqrt(weight) * rng.choice((-1, 1)))
    return mixed


@cache
def _noises() -> tuple[np.ndarray, ...]:
    """Loops of 30 s: white, pink, brown, blue, a fan's hum over pink, and a far crowd."""
    rng, size = np.random.default_rng(7), 30 * RATE
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / RATE), 20)
    loops = [
        np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * frequency**slope * (frequency > 20), size)
        for slope in (0, -0.5, -1, 0.5, -0.5)
    ]
    loops = [loop / loop.std() for loop in loops]
    seconds = np.arange(size) / RATE
    loops[4] += sum(np.sin(2 * np.pi * (50 * n * seconds + rng.random())) / n for n in range(1, 12))
    speech_like = np.exp(-(np.log2(frequency / 400) ** 2) / 2)  # most of a crowd's sound lies around 400 Hz
    crowd = np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * speech_like, size)
    swell = np.interp(seconds, np.arange(0, 31, 0.25), rng.uniform(0.3, 1, 124))
    loops.append(crowd * swell)
    return tuple((loop / loop.std()).astype(np.float32) for loop in loops)


@cache
def _octaves(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A fine scale of octaves above 31.25 Hz (0 .. 8), and each frequency bin's place on it."""
    octaves = np.linspace(0, 8, 512)
    bins = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / RATE), 31.25) / 31.25)
    return octaves, np.rint(bins / 8 * 511).astype(np.intp)


@cache
def _fast_sizes() -> np.ndarray:
    return np.array(sorted(2**a * 3**b * 5**c for a in range(9, 20) for b in range(3) for c in range(2)))


def _fast_size(length: int) -> int:
    sizes = _fast_sizes()
    return int(sizes[np.searchsorted(sizes, length)])


def _loud(pcm: np.ndarray) -> np.ndarray:
    """The blocks that are louder than 40 dB below the loudest."""
    blocks = np.pad(pcm, (0, -len(pcm) % BLOCK)).reshape(-1, BLOCK)
    power = np.einsum("ij,ij->i", blocks, blocks)
    return np.flatnonzero(power > power.max() * 1e-4)


@cache
def _espeak() -> Espeak:
    return Espeak()
