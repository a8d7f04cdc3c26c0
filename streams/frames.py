"""The two things that flow, sound and pictures, on one clock that counts samples."""

from dataclasses import dataclass

import numpy as np

RATE = 16_000  # samples a second, everywhere inside
FRAME = 640  # samples: 40 ms, one soft token


class MediaError(ValueError):
    """Sound or a picture from outside that cannot be used; the message is one sentence for a person."""


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """Mono sound in [-1, 1]. The model tells silence from speech by absolute level, so int16-scaled samples are a bug."""

    samples: np.ndarray  # float32 [n]
    at: int  # the first sample's index on the stream's clock

    def __post_init__(self) -> None:
        assert self.samples.dtype == np.float32 and self.samples.ndim == 1, (self.samples.dtype, self.samples.shape)
        peak = np.abs(self.samples).max(initial=0)
        if not np.isfinite(peak):
            raise MediaError(f"the sound at sample {self.at} holds NaN or infinity")
        assert peak <= 1, f"samples must be in [-1, 1], not ±{peak}"

    @property
    def end(self) -> int:
        return self.at + len(self.samples)


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    pixels: np.ndarray  # uint8 [height, width, 3], RGB
    at: int  # when it was taken, on the same clock of samples

    def __post_init__(self) -> None:
        assert self.pixels.dtype == np.uint8 and self.pixels.ndim == 3, (self.pixels.dtype, self.pixels.shape)
        height, width, channels = self.pixels.shape
        assert height > 0 and width > 0 and channels == 3, self.pixels.shape


class Framer:
    """Chunks of any length in, frames of exactly `size` samples out. Frames are copies: a device may reuse its buffer."""

    def __init__(self, size: int = FRAME) -> None:
        assert size > 0, size
        self.size = size
        self._rest = np.zeros(0, np.float32)

    def push(self, samples: np.ndarray) -> list[np.ndarray]:
        assert samples.dtype == np.float32 and samples.ndim == 1, (samples.dtype, samples.shape)
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // self.size * self.size
        self._rest = samples[whole:]
        return list(samples[:whole].reshape(-1, self.size))

    def flush(self) -> list[np.ndarray]:
        """What is left as one frame, zeros after it; nothing if nothing is left."""
        return self.push(np.zeros(-len(self._rest) % self.size, np.float32))
