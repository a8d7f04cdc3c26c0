"""Sound in frames, on a clock that counts samples; and what all media from outside have in common: their error, their files."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

RATE = 16_000  # samples a second, everywhere inside
FRAME = 640  # samples: 40 ms, one soft token

Samples = NDArray[np.float32]
Path = str | os.PathLike[str]


class MediaError(ValueError):
    """Sound, a picture or a video from outside that cannot be used; the message is one sentence for a person."""


def open_file(path: Path) -> BinaryIO:
    """A regular file with something in it; a pipe or a device could block or never end. Raises MediaError."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise MediaError(f"{path} is not a file")
        if about.st_size == 0:
            raise MediaError(f"{path} is empty")
        return open(path, "rb")
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """Mono sound at 16 kHz in [-1, 1]. The model tells silence from speech by absolute level, so int16-scaled samples are a bug.

    Raises MediaError for NaN and infinity.
    """

    samples: Samples  # float32 [n]
    at: int  # the first sample's index on the stream's clock

    def __post_init__(self) -> None:
        assert self.samples.dtype == np.float32 and self.samples.ndim == 1, (self.samples.dtype, self.samples.shape)
        peak = np.abs(self.samples).max(initial=0)
        if not np.isfinite(peak):
            raise MediaError(f"the sound at sample {self.at} holds NaN or infinity")
        assert peak <= 1, f"samples must be in [-1, 1], not ±{peak}"

    @property
    def end(self) -> int:
        """The index of the sample after the last one."""
        return self.at + len(self.samples)


class Framer:
    """Chunks of any length in, frames of exactly `size` samples out. Frames are copies: a device may reuse its buffer."""

    def __init__(self, size: int = FRAME) -> None:
        assert size > 0, size
        self.size = size
        self._rest = np.zeros(0, np.float32)

    def push(self, samples: Samples) -> list[Samples]:
        """float32 [n] → the frames that are complete now, each float32 [size]."""
        assert samples.dtype == np.float32 and samples.ndim == 1, (samples.dtype, samples.shape)
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // self.size * self.size
        self._rest = samples[whole:]
        return list(samples[:whole].reshape(-1, self.size))

    def flush(self) -> list[Samples]:
        """What is left as one frame, zeros after it; nothing if nothing is left."""
        return self.push(np.zeros(-len(self._rest) % self.size, np.float32))
