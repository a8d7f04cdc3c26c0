"""One position of one row through all layers, on a CPU in float32: what listening, and answering one person, is made of.

Around four products with matrices a layer has some forty operations on a few hundred numbers each. Such an operation takes
numpy half a microsecond and torch three: so they are numpy's here, over the same memory, and the products are torch's, which
has threads. It computes what `Gemma.forward` computes, to rounding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cache import Cache, Row, frequencies

if TYPE_CHECKING:
    from model.gemma import Block, Config, Gemma, Layer

Array = NDArray[np.float32]
GELU = (math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi))  # gelu, by tanh: x sigmoid(x (a + b x^2))


class _Twin:
    """The same numbers for both."""

    def __init__(self, *shape: int) -> None:
        self.torch = torch.empty(math.prod(shape))
        self.numpy: Array = self.torch.numpy().reshape(shape)


class _Kind:
    """Where layers of one kind read and write, and how far they turn."""

    def __init__(self, config: Config, layer: Layer, cache: Cache) -> None:
        self._window = config.window if layer.sliding else None
        self._slots, self._frequencies = cache.slots(layer), frequencies(layer, torch.device("cpu")).numpy()
        half = layer.head_dim // 2
        self.first = self.end = 0  # slots that are read, the newest last
        self.cos, self.sin = np.empty((2, half), np.float32), np.empty((2, half), np.float32)  # of the second the first negated

    def move(self, position: int) -> bool:
        """To a new position; False where the ring's end lies inside of the window."""
        oldest = 0 if self._window is None else max(0, position + 1 - self._window)
        self.first = oldest % self._slots
        self.end = self.first + position + 1 - oldest
        angle = self._frequencies * np.float32(position)
        np.cos(angle, out=self.cos[0])
        np.sin(angle, out=self.sin[1])
        self.cos[1] = self.cos[0]
        np.negative(self.sin[1], out=self.sin[0])
        return self.end <= self._slots


class Single:
    """Steps of `model` on rows of `cache`. Only one thread may have it: what lies between two operations is kept."""

    def __init__(self, model: Gemma, cache: Cache) -> None:
        self.model, config = model, model.config
        self._kinds = {layer: _Kind(config, layer, cache) for layer in set(config.layers)}
        self._layers = [
            _Layer(config, layer, block, self._kinds[layer], keys, values)  # type: ignore[arg-type]
            for layer, block, keys, values in zip(config.layers, model.blocks, cache.keys, cache.values, strict=True)
        ]
        self._eps, self._norm = config.eps, _numpy(model.norm)

    @staticmethod
    def suits(model: Gemma, cache: Cache) -> bool:
        return model.device.type == cache.device.type == "cpu" and model.dtype == cache.dtype == torch.float32

    def ready(self, row: Row) -> bool:
        """The row's next position can be taken here."""
        return all(kind.move(row.length) for kind in self._kinds.values())

    def __call__(self, row: Row, x: Tensor, wanted: bool) -> Tensor | None:
        """x [1, 1, H], at the end of a row that is ready, to the hidden state after the final norm [1, 1, H], where wanted."""
        state: Array = x.numpy().reshape(-1).copy()
        last = self._layers[-1]
        for layer in self._layers:
            layer.listen(row, state)
            if layer is last and not wanted:
                return None
            layer.answer(row, state)
        out: Array = np.empty_like(state)
        _rms_norm(state, self._eps, self._norm, out)
        return torch.from_numpy(out).view(1, 1, -1)


class _Layer:
    def __init__(self, config: Config, layer: Layer, block: Block, kind: _Kind, keys: Tensor, values: Tensor) -> None:
        attention, self._kind, self._eps = block.attention, kind, config.eps
        self._heads, self._kv, size = config.heads, layer.kv_heads, layer.head_dim
        self._keys, self._values = keys.numpy(), values.numpy()  # [rows, heads, slots, D]
        self._qkv, self._out = attention.qkv.detach(), attention.out.detach()
        self._gate_up, self._down = block.mlp.gate_up.detach(), block.mlp.down.detach()
        norms = (block.input_norm, block.post_attention_norm, block.pre_mlp_norm, block.post_mlp_norm)
        self._input, self._post_attention, self._pre_mlp, self._post_mlp = map(_numpy, norms)
        heads = [_numpy(attention.q_norm)] * self._heads + [_numpy(attention.k_norm)] * self._kv
        self._qk_norm: Array = np.stack(heads).reshape(-1, 2, size // 2)
        self._scale = np.float32(block.scale.item())
        # What lies between the products.
        self._x, self._y = _Twin(config.hidden_size), _Twin(config.hidden_size)
        self._projected = _Twin(attention.qkv.shape[0] // size, size)
        self._query = _Twin(self._heads + self._kv, 2, size // 2)  # and key, after their norm and turn
        self._asked = self._query.torch[: self._heads * size].view(self._kv, -1, size)
        self._wide, self._gated = _Twin(2, config.intermediate_size), _Twin(config.intermediate_size)

    def listen(self, row: Row, x: Array) -> None:
        """Writes the position's key and value to the row."""
        kind, kv, between = self._kind, self._kv, self._query.numpy
        _rms_norm(x, self._eps, self._input, self._x.numpy)
        torch.mv(self._qkv, self._x.torch, out=self._projected.torch)
        projected = self._projected.numpy
        length = np.vecdot(projected, projected)[:, None]
        length *= np.float32(1 / projected.shape[1])
        length += np.float32(self._eps)
        projected /= np.sqrt(length, out=length)
        straight = projected[: self._heads + kv].reshape(between.shape) * self._qk_norm
        np.multiply(straight, kind.cos, out=between)
        between += straight[:, ::-1] * kind.sin
        self._keys[row.index, :, kind.end - 1] = between.reshape(-1, projected.shape[1])[self._heads :]
        self._values[row.index, :, kind.end - 1] = projected[-kv:]

    def answer(self, row: Row, x: Array) -> None:
        """x becomes what the layer puts out, of all that its row holds."""
        seen = slice(self._kind.first, self._kind.end)
        keys = torch.from_numpy(self._keys[row.index, :, seen].swapaxes(1, 2))
        weights = torch.softmax(torch.bmm(self._asked, keys), -1)
        found = torch.bmm(weights, torch.from_numpy(self._values[row.index, :, seen]))
        torch.mv(self._out, found.view(-1), out=self._y.torch)
        _rms_norm(self._y.numpy, self._eps, self._post_attention, self._y.numpy)
        x += self._y.numpy
        _rms_norm(x, self._eps, self._pre_mlp, self._x.numpy)
        torch.mv(self._gate_up, self._x.torch, out=self._wide.torch)
        (gate, up), gated = self._wide.numpy, self._gated.numpy
        np.multiply(gate, gate, out=gated)
        gated *= np.float32(-GELU[1])
        gated -= np.float32(GELU[0])
        gated *= gate
        np.minimum(gated, np.float32(80), out=gated)  # exp of more is infinite, which is right and warned of
        np.exp(gated, out=gated)
        gated += np.float32(1)
        np.divide(gate, gated, out=gated)
        gated *= up
        torch.mv(self._down, self._gated.torch, out=self._y.torch)
        _rms_norm(self._y.numpy, self._eps, self._post_mlp, self._y.numpy)
        x += self._y.numpy
        x *= self._scale


def _numpy(weight: Tensor) -> Array:
    array: Array = weight.detach().numpy()
    return array


def _rms_norm(x: Array, eps: float, weight: Array, out: Array) -> None:
    scale = 1 / math.sqrt(float(x.dot(x)) / len(x) + eps)
    np.multiply(x, weight, out=out)
    out *= np.float32(scale)
