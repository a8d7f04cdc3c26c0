"""Utterances, and what can be made of them without a synthesiser: joined, broken off, hesitant, faster or slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import soxr

RATE = 16000
BLOCK = 80  # samples over which loudness is measured
PEAK = 0.5


@dataclass(frozen=True)
class Utterance:
    """pcm is float32 at 16 kHz; words are (lower-cased word, start, end) in samples, none where nobody knows the times."""

    text: str
    pcm: np.ndarray
    words: tuple[tuple[str, int, int], ...]


def loud(pcm: np.ndarray) -> np.ndarray:
    """The blocks that are louder than 40 dB below the loudest."""
    blocks = np.pad(pcm, (0, -len(pcm) % BLOCK)).reshape(-1, BLOCK)
    power = np.einsum("ij,ij->i", blocks, blocks)
    return np.flatnonzero(power > power.max() * 1e-4)


def place(text: str, pcm: np.ndarray, words: Sequence[tuple[str, int, int]], rng: np.random.Generator) -> Utterance:
    """The sound between silences of everyday lengths, at a peak of 0.5; a word before a pause ends where its sound does."""
    heard = loud(pcm)
    first, last = int(heard[0]) * BLOCK, min(len(pcm), (int(heard[-1]) + 1) * BLOCK)
    # Who presses a button speaks at once or late, and is cut off soon or late.
    before = int((rng.uniform(0.05, 0.6) if rng.random() < 0.8 else rng.choice((0.01, 1.0, 1.5))) * RATE)
    after = int(rng.uniform(0.15, 0.7) * RATE)
    starts = [max(first, start) for _, start, _ in words] + [last]
    placed = []
    for (name, _, end), start, limit in zip(words, starts, starts[1:], strict=False):
        limit = min(limit, max(end, start + 1))
        at = np.searchsorted(heard, limit // BLOCK)
        end = min(limit, (int(heard[at - 1]) + 1) * BLOCK) if at else limit
        placed.append((name, start - first + before, max(start + 1, end) - first + before))
    sound = np.zeros(before + (last - first) + after, np.float32)
    sound[before : before + last - first] = pcm[first:last]
    sound *= PEAK / max(1e-6, float(np.abs(sound).max()))
    return Utterance(text, sound, tuple(placed))


def paced(utterance: Utterance, speed: float) -> Utterance:
    """Faster and higher, or slower and lower, as a tape that runs at another speed: another speaker."""
    pcm = soxr.resample(utterance.pcm, RATE * speed, RATE, quality="MQ")
    return replace(utterance, pcm=pcm, words=tuple((word, int(a / speed), int(b / speed)) for word, a, b in utterance.words))


def part(utterance: Utterance, first: int, last: int) -> Utterance:
    """The words from `first` up to but without `last`, cut where the neighbours end or begin."""
    words = utterance.words[first:last]
    begin = 0 if first == 0 else (utterance.words[first - 1][2] + words[0][1]) // 2
    end = len(utterance.pcm) if last == len(utterance.words) else (words[-1][2] + utterance.words[last][1]) // 2
    pcm = utterance.pcm[begin:end].copy()
    fade = min(80, len(pcm) // 2)
    pcm[:fade] *= np.linspace(0, 1, fade, dtype=np.float32)
    pcm[len(pcm) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    text = " ".join(word for word, _, _ in words)
    return Utterance(text, pcm, tuple((word, max(0, a - begin), min(b, end) - begin) for word, a, b in words))


def join(parts: Sequence[Utterance], pauses: Sequence[float]) -> Utterance:
    """One after the other, with as many seconds of silence between them as `pauses` says."""
    pieces, words, at = [], [], 0
    for number, piece in enumerate(parts):
        if number:
            silence = np.zeros(int(pauses[number - 1] * RATE), np.float32)
            pieces.append(silence)
            at += len(silence)
        pieces.append(piece.pcm)
        words += [(word, a + at, b + at) for word, a, b in piece.words]
        at += len(piece.pcm)
    return Utterance(" ".join(piece.text for piece in parts), np.concatenate(pieces), tuple(words))


def broken_off(utterance: Utterance, count: int, silence: float) -> Utterance:
    """Its first `count` words, or all, and then so many seconds of silence, counted from the end of the last word."""
    kept = part(utterance, 0, count)
    end = kept.words[-1][2]
    pcm = np.zeros(end + int(silence * RATE), np.float32)
    pcm[:end] = kept.pcm[:end]
    return replace(kept, pcm=pcm)


def hesitant(utterance: Utterance, at: int, sound: np.ndarray, pauses: tuple[float, float]) -> Utterance:
    """With a sound like "um" before the word at `at`, which no transcript writes down."""
    um = Utterance("", sound, ())
    parts = [part(utterance, 0, at), um, part(utterance, at, len(utterance.words))]
    return replace(join(parts, pauses), text=utterance.text)
