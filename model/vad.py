"""The probability of speech in each microphone frame: silero-vad (MIT), its published 16 kHz weights run in numpy.

It is numpy and not torch, because each conversation calls it on the event loop 25 times a second: a chunk is seven small
products, without tensors or a thread pool. The package is located but never imported, since importing it sets torch to one
thread for the whole process. Its safetensors file comes from another training run than its TorchScript file, a format that torch
deprecates; on speech, noise and music the two gave the same decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FRAME = 640  # samples of a microphone frame
CHUNK = 512  # samples that the network takes in one step
CONTEXT = 64  # samples of the last chunk that it takes again
WINDOW, HOP = 256, 128  # of the spectrum; a chunk and its context give four windows
WIDTH = 128  # of the recurrent state


class VadMissing(RuntimeError):
    """The weights of silero-vad are not installed."""


@dataclass(eq=False, slots=True)
class VadState:
    """The state of one conversation. `broken` counts the frames that held NaN or infinity."""

    rest: np.ndarray = field(
        default_factory=lambda: np.zeros(CONTEXT, np.float32)
    )  # context, then samples of an unfinished chunk
    hidden: np.ndarray = field(default_factory=lambda: np.zeros(WIDTH, np.float32))
    cell: np.ndarray = field(default_factory=lambda: np.zeros(WIDTH, np.float32))
    broken: int = 0


class Vad:
    """The network. It can be shared: what changes from frame to frame is the `VadState` of each conversation."""

    def __init__(self) -> None:
        """Reads the weights. Raises VadMissing."""
        raw = {name: array.astype(np.float32) for name, array in load_file(_weights()).items()}

        def taps(name: str, *which: int) -> np.ndarray:
            """A convolution as a matrix [taps · in, out], of the taps that are not always on padding."""
            weight = raw[f"{name}.weight"][:, :, list(which)]  # [out, in, taps]
            return np.ascontiguousarray(weight.transpose(2, 1, 0).reshape(-1, weight.shape[0]))

        self._spectrum = np.ascontiguousarray(raw["stft_conv.weight"][:, 0].T)  # [256, 129 real + 129 imaginary]
        self._conv1, self._conv2 = taps("conv1", 0, 1, 2), taps("conv2", 0, 1, 2)
        self._conv3, self._conv4 = taps("conv3", 1, 2), taps("conv4", 1)  # over two positions, then one
        self._biases = [raw[f"conv{i}.bias"] for i in (1, 2, 3, 4)]
        self._gates = np.concatenate([raw["lstm_cell.weight_ih"], raw["lstm_cell.weight_hh"]], axis=1).T.copy()  # [256, 512]
        self._gate_bias = raw["lstm_cell.bias_ih"] + raw["lstm_cell.bias_hh"]
        self._final, self._final_bias = raw["final_conv.weight"][0, :, 0], raw["final_conv.bias"][0]

    def start(self) -> VadState:
        """The state of a new conversation."""
        return VadState()

    def hear(self, frame: np.ndarray, state: VadState) -> float:
        """Returns the probability of speech, 0..1, in the newest chunk that a frame completes. `frame`: float32 [640] in [-1, 1].
        At most 24 ms of it are left for the next call.

        Louder samples are clipped. A frame with NaN or infinity is taken as silence and counted: in the recurrent state it would
        spoil the result for the rest of the conversation.
        """
        assert frame.dtype == np.float32 and frame.shape == (FRAME,), (frame.dtype, frame.shape)
        if not np.isfinite(frame).all():
            state.broken += 1
            frame = np.zeros(FRAME, np.float32)
        sound = np.concatenate([state.rest, np.clip(frame, -1, 1)])
        probability, at = 0.0, 0
        while len(sound) - at >= CONTEXT + CHUNK:
            probability = self._step(sound[at : at + CONTEXT + CHUNK], state)
            at += CHUNK
        state.rest = sound[at:]
        return probability

    def _step(self, chunk: np.ndarray, state: VadState) -> float:
        """One step of the network (silero_vad/tinygrad_model.py has its graph) for a chunk [64 + 512]."""
        padded = np.concatenate([chunk, chunk[-2 : -2 - CONTEXT : -1]])  # reflected at the end only
        spectrum = _windows(padded, WINDOW, HOP) @ self._spectrum  # [4, 258]
        half = spectrum.shape[1] // 2
        x = np.zeros((6, half), np.float32)  # one row of padding on each side
        x[1:5] = np.sqrt(spectrum[:, :half] ** 2 + spectrum[:, half:] ** 2)
        y = np.zeros((5, WIDTH), np.float32)  # conv2 has a stride of two and never reaches the padding at the end
        y[1:] = np.maximum(_windows(x.reshape(-1), 3 * half, half) @ self._conv1 + self._biases[0], 0)
        z = np.maximum(_windows(y.reshape(-1), 3 * WIDTH, 2 * WIDTH) @ self._conv2 + self._biases[1], 0)  # [2, 64]
        z = np.maximum(z.reshape(-1) @ self._conv3 + self._biases[2], 0)  # [64]
        z = np.maximum(z @ self._conv4 + self._biases[3], 0)  # [128]
        gates = np.concatenate([z, state.hidden]) @ self._gates + self._gate_bias  # input, forget, new, output
        keep = _sigmoid(gates)
        new = np.tanh(gates[2 * WIDTH : 3 * WIDTH])
        state.cell = keep[WIDTH : 2 * WIDTH] * state.cell + keep[:WIDTH] * new
        state.hidden = keep[3 * WIDTH :] * np.tanh(state.cell)
        return float(_sigmoid(np.maximum(state.hidden, 0) @ self._final + self._final_bias))


def _windows(row: np.ndarray, size: int, step: int) -> np.ndarray:
    """[n] → every `step`-th window [windows, size], as a view; sliding_window_view took two fifths of a frame's time."""
    return np.ndarray(((len(row) - size) // step + 1, size), row.dtype, row, 0, (step * row.itemsize, row.itemsize))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = 0.5 * np.tanh(0.5 * x) + 0.5  # exp would overflow, and warn
    return result


def _weights() -> Path:
    spec = find_spec("silero_vad")
    path = Path(spec.origin or "").parent / "data" / "silero_vad_16k.safetensors" if spec else None
    if path is None or not path.exists():
        raise VadMissing("the weights of silero-vad are not installed; run: pip install 'silero-vad>=6.2.3,<7'")
    return path
