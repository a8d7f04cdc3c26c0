"""The way from a mouth to a model: a room, other sounds beside the talk, a microphone and a codec, in this order."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import soundfile
import soxr

from model.nano.utterance import RATE, Utterance

ROOM = 4096  # samples after the sound for a tail of echo

Talk = Callable[[np.random.Generator], np.ndarray]


def augment(utterance: Utterance, rng: np.random.Generator, beside: Talk | None = None) -> Utterance:
    """The same words through another room and microphone, at another loudness, up to 20 ms sooner or later.

    `beside` gives the talk of somebody else, for a crowd."""
    length, words = len(utterance.pcm), utterance.words
    first, last = (words[0][1], words[-1][2]) if words else (0, length)
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
    other = rng.random()
    if other < 0.08:
        pcm += _music(length, rng) * np.float32(level * 10 ** (-rng.uniform(8, 25) / 20))
    elif other < 0.18 and beside is not None:
        pcm += _crowd(length, rng, beside) * np.float32(level * 10 ** (-rng.uniform(8, 25) / 20))
    pcm *= np.float32(min(10 ** (rng.uniform(-35, -12) / 20) / level, 0.99 / float(max(pcm.max(), -pcm.min()))))
    if rng.random() < 0.25:
        pcm = np.clip(CODECS[rng.integers(len(CODECS))](pcm, rng), -0.99, 0.99)
    return replace(utterance, pcm=pcm, words=tuple((word, start + shift, end + shift) for word, start, end in words))


def _through(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random tone curve, sometimes a telephone's band, sometimes a room: one filter in the frequency domain, without delay."""
    equalised, narrow, echoing = rng.random(3) < (0.7, 0.15, 0.35)
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


# Codecs


def _telephone(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """G.711: 8 kHz, eight bits on a logarithmic scale."""
    narrow = np.clip(soxr.resample(pcm, RATE, RATE // 2, quality="MQ"), -1, 1)
    coded = np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256)
    coded = np.round(coded * 127) / 127
    narrow = np.sign(coded) * np.expm1(np.abs(coded) * np.log(256)) / 255
    return _fit(soxr.resample(narrow.astype(np.float32), RATE // 2, RATE, quality="MQ"), len(pcm))


def _bluetooth(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As mSBC does: the loud parts of the spectrum at few bits in each 7.5 ms, so that noise follows the sound."""
    size = 120
    blocks = _fit(pcm, len(pcm) + -len(pcm) % size).reshape(-1, size)
    spectrum = np.fft.rfft(blocks)
    step = np.abs(spectrum).max(-1, keepdims=True) * np.float32(2.0 ** -rng.uniform(4, 6)) + 1e-9
    coarse = np.round(spectrum.real / step) * step + 1j * np.round(spectrum.imag / step) * step
    return np.fft.irfft(coarse, size).astype(np.float32).reshape(-1)[: len(pcm)]


def _lost_packets(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One or two packets of 20 ms that never came, filled with the one before."""
    pcm, packet = pcm.copy(), RATE // 50
    for _ in range(int(rng.integers(1, 3))):
        if len(pcm) > 3 * packet:
            at = int(rng.integers(packet, len(pcm) - packet))
            pcm[at : at + packet] = pcm[at - packet : at] * np.linspace(1, 0.3, packet, dtype=np.float32)
    return pcm


def _clipped(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A microphone that is turned up too far."""
    top = np.float32(np.abs(pcm).max() * rng.uniform(0.25, 0.7))
    clipped: np.ndarray = np.clip(pcm, -top, top)
    return clipped


def _opus(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _coded(pcm, "OGG", "OPUS", rng.uniform(0.3, 0.95))


def _mp3(pcm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _coded(pcm, "MP3", "MPEG_LAYER_III", rng.uniform(0.3, 0.95))


def _coded(pcm: np.ndarray, container: str, codec: str, squeezed: float) -> np.ndarray:
    file = io.BytesIO()
    soundfile.write(file, pcm, RATE, format=container, subtype=codec, compression_level=squeezed)
    file.seek(0)
    return _fit(soundfile.read(file, dtype="float32")[0], len(pcm))


CODECS = (_telephone, _bluetooth, _lost_packets, _clipped, _opus, _mp3)


def _fit(pcm: np.ndarray, length: int) -> np.ndarray:
    return np.pad(pcm[:length], (0, max(0, length - len(pcm)))).astype(np.float32)


# Sounds beside the talk, at an rms of about 1


def _noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Two colours of noise mixed."""
    bank = _noises()
    mixed = np.zeros(length, np.float32)
    share = rng.uniform(0, 1)
    for weight in (share, 1 - share):
        colour = bank[rng.integers(len(bank))]
        at = int(rng.integers(len(colour)))
        part = np.resize(colour[at:], length) if at + length <= len(colour) else np.resize(np.roll(colour, -at), length)
        mixed += part * np.float32(np.sqrt(weight) * rng.choice((-1, 1)))
    return mixed


def _crowd(length: int, rng: np.random.Generator, beside: Talk) -> np.ndarray:
    """One to five others who talk."""
    mixed = np.zeros(length, np.float32)
    for _ in range(int(rng.integers(1, 6))):
        talk = beside(rng)
        at = int(rng.integers(-len(talk) // 2, max(1, length - len(talk) // 2)))
        piece = talk[max(0, -at) :][: length - max(0, at)]
        mixed[max(0, at) : max(0, at) + len(piece)] += piece
    return _evened(mixed)


def _music(length: int, rng: np.random.Generator) -> np.ndarray:
    """A piece of one of a few tunes."""
    tune = _tunes()[rng.integers(len(_tunes()))]
    return _evened(np.resize(np.roll(tune, -int(rng.integers(len(tune)))), length))


@cache
def _tunes() -> tuple[np.ndarray, ...]:
    """Loops of 12 s: chords of a few decaying tones with overtones, and a beat."""
    rng, size, made = np.random.default_rng(8), 12 * RATE, []
    for _ in range(12):
        beat = int(rng.uniform(0.25, 0.7) * RATE)
        tune = np.zeros(size + 4 * beat, np.float32)
        seconds = np.arange(3 * beat, dtype=np.float32) / RATE
        root, brightness = rng.uniform(80, 300), rng.uniform(0.2, 0.7)
        for at in range(0, size, beat):
            for step in rng.choice((0, 3, 4, 5, 7, 9, 12, 16), int(rng.integers(1, 4))):
                tone = root * 2 ** (step / 12)
                wave = sum(brightness**n * np.sin(2 * np.pi * tone * (n + 1) * seconds) for n in range(5))
                tune[at : at + len(seconds)] += wave * np.exp(-seconds * np.float32(rng.uniform(1, 6)))
            if rng.random() < 0.5:
                drum = rng.standard_normal(1600).astype(np.float32) * np.exp(-np.arange(1600, dtype=np.float32) / 300)
                tune[at : at + 1600] += drum
        made.append(tune[:size])
    return tuple(made)


def _evened(pcm: np.ndarray) -> np.ndarray:
    return (pcm / max(1e-6, float(np.sqrt(np.mean(np.square(pcm)))))).astype(np.float32)


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
