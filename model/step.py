"""One position each of some rows through all layers, on a CPU in float32: what listening to people and answering them is
made of.

Around four products with matrices a layer has some forty operations on a few hundred numbers. Such an operation takes numpy
half a microsecond and torch three: so they are numpy's here, over the same memory, and the products are torch's, which has
threads. It computes what `model.forward` computes, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cache import Cache, Row
from model.functional import frequencies
from model.quantized import QuantizedLinear, Weight

if TYPE_CHECKING:
    from model.batch import RowChunk
    from model.gemma import Block, Gemma, GemmaConfig, LayerConfig

Array = NDArray[np.float32]
GELU = (math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi))  # gelu, by tanh: x sigmoid(x (a + b x^2))


class _SharedBuffer:
    """The same numbers for both: a matrix with a row for each of `count`, and [count, ...]; of one alone without that axis,
    which costs numpy a tenth of a step."""

    def __init__(self, count: int, *shape: int) -> None:
        self.torch = torch.empty(count, math.prod(shape))
        self.numpy: Array = self.torch.numpy().reshape(shape if count == 1 else (count, *shape))
        self._vector = self.torch[0] if count == 1 else None

    def become(self, weight: Tensor, x: _SharedBuffer) -> None:
        """x times the weight's transpose."""
        if self._vector is None or x._vector is None:
            torch.mm(x.torch, weight.t(), out=self.torch)
        else:
            torch.mv(weight, x._vector, out=self._vector)


class _LayerKind:
    """Where layers of one kind read and write, and how far they turn."""

    def __init__(self, config: GemmaConfig, layer: LayerConfig, cache: Cache) -> None:
        self._window = config.window if layer.sliding else None
        self._slots, self._frequencies = cache.slots(layer), frequencies(layer, torch.device("cpu")).numpy()
        self.places: list[tuple[int, int, list[slice]]] = []  # of each row: its index, the slot that is written, those to read
        self._half = layer.head_dim // 2
        self.cos: Array = np.empty(0, np.float32)  # [B, 1, 2, D / 2], of one row [2, D / 2]
        self.sin = self.cos  # of two halves alike the first negated

    def move(self, rows: list[Row]) -> None:
        """To the next positions of these rows."""
        self.places.clear()
        for row in rows:
            oldest = 0 if self._window is None else max(0, row.length + 1 - self._window)
            first, last = oldest % self._slots, row.length % self._slots
            seen = [slice(first, last + 1)] if first <= last else [slice(first, self._slots), slice(last + 1)]
            self.places.append((row.index, last, seen))
        if self.cos.size != 2 * self._half * len(rows):
            shape = (2, self._half) if len(rows) == 1 else (len(rows), 1, 2, self._half)
            self.cos, self.sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
        cos, sin = self.cos.reshape(-1, 2, self._half), self.sin.reshape(-1, 2, self._half)
        angle = np.multiply.outer(np.array([row.length for row in rows], np.float32), self._frequencies)
        np.cos(angle, out=cos[:, 0])
        np.sin(angle, out=sin[:, 1])
        cos[:, 1] = cos[:, 0]
        np.negative(sin[:, 1], out=sin[:, 0])


class Step:
    """Steps of `model` on rows of `cache`. Only one thread may have it: what lies between two operations is kept."""

    def __init__(self, model: Gemma, cache: Cache) -> None:
        self.model, config = model, model.config
        self._kinds = {layer: _LayerKind(config, layer, cache) for layer in set(config.layers)}
        self._layers = [
            _LayerStep(config, layer, block, self._kinds[layer], keys, values)  # type: ignore[arg-type]
            for layer, block, keys, values in zip(config.layers, model.blocks, cache.keys, cache.values, strict=True)
        ]
        self._eps, self._norm = config.eps, _numpy(model.norm)

    @staticmethod
    def suits(model: Gemma, cache: Cache, chunks: Sequence[RowChunk]) -> bool:
        on_cpu = model.device.type == cache.device.type == "cpu" and model.dtype == cache.dtype == torch.float32
        plain = not any(isinstance(module, QuantizedLinear) for module in model.blocks[0].modules())
        return on_cpu and plain and all(chunk.count == 1 for chunk in chunks)

    def __call__(self, rows: list[Row], x: Tensor, wanted: bool) -> Tensor | None:
        """x [B, H], at the ends of rows that have room, to hidden states after the final norm [B, H], where wanted."""
        for kind in self._kinds.values():
            kind.move(rows)
        state: Array = (x[0] if len(x) == 1 else x).numpy().copy()
        count = len(x)
        last = self._layers[-1]
        for layer in self._layers:
            between = layer.listen(state, count)
            if layer is last and not wanted:
                return None
            layer.answer(between, state)
        out: Array = np.empty_like(state)
        _rms_norm(state, self._eps, self._norm, out)
        return torch.from_numpy(out).view(count, -1)


class _Workspace:
    """What lies between the products of a layer, for so many rows."""

    def __init__(self, count: int, config: GemmaConfig, layer: LayerConfig, projected: int) -> None:
        heads, kv, size = config.heads, layer.kv_heads, layer.head_dim
        self.x, self.y = _SharedBuffer(count, config.hidden_size), _SharedBuffer(count, config.hidden_size)
        self.projected = _SharedBuffer(count, projected // size, size)
        self.query = _SharedBuffer(count, heads + kv, 2, size // 2)  # and key, after their norm and turn
        self.found = _SharedBuffer(count, heads, size)
        self.wide, self.gated = _SharedBuffer(count, 2, config.intermediate_size), _SharedBuffer(count, config.intermediate_size)
        # By row, and there by head of keys:
        self.asked = [row[: heads * size].view(kv, -1, size) for row in self.query.torch]
        self.answers = [row.view(kv, -1, size) for row in self.found.torch]
        self.keys = [row.view(-1, size)[heads:].numpy() for row in self.query.torch]
        self.values = [
            row.view(-1, size)[-kv:].numpy() for row in self.projected.torch
        ]  # in full layers these are the keys, before their norm's weight and turn


class _LayerStep:
    def __init__(
        self, config: GemmaConfig, layer: LayerConfig, block: Block, kind: _LayerKind, keys: Tensor, values: Tensor
    ) -> None:
        attention, self._kind, self._eps = block.attention, kind, config.eps
        self._config, self._layer = config, layer
        self._between: dict[int, _Workspace] = {}
        self._keys, self._values = keys.numpy(), values.numpy()  # [rows, heads, slots, D]
        self._qkv, self._out = _plain(attention.qkv), _plain(attention.out)
        self._gate_up, self._down = _plain(block.mlp.gate_up), _plain(block.mlp.down)
        norms = (block.input_norm, block.post_attention_norm, block.pre_mlp_norm, block.post_mlp_norm)
        self._input, self._post_attention, self._pre_mlp, self._post_mlp = map(_numpy, norms)
        heads = [_numpy(attention.q_norm)] * config.heads + [_numpy(attention.k_norm)] * layer.kv_heads
        self._qk_norm: Array = np.stack(heads).reshape(-1, 2, layer.head_dim // 2)
        self._scale = np.float32(block.scale.item())

    def listen(self, x: Array, count: int) -> _Workspace:
        """Writes the positions' keys and values to their rows."""
        if (between := self._between.get(count)) is None:
            between = self._between[count] = _Workspace(count, self._config, self._layer, len(self._qkv))
        kind, query = self._kind, between.query.numpy
        _rms_norm(x, self._eps, self._input, between.x.numpy)
        between.projected.become(self._qkv, between.x)
        projected = between.projected.numpy
        length = np.vecdot(projected, projected)[..., None]
        length *= np.float32(1 / projected.shape[-1])
        length += np.float32(self._eps)
        projected /= np.sqrt(length, out=length)
        straight = projected[..., : len(self._qk_norm), :].reshape(query.shape) * self._qk_norm
        np.multiply(straight, kind.cos, out=query)
        query += straight[..., ::-1, :] * kind.sin
        for (row, slot, _), key, value in zip(kind.places, between.keys, between.values, strict=True):
            self._keys[row, :, slot] = key
            self._values[row, :, slot] = value
        return between

    def answer(self, between: _Workspace, x: Array) -> None:
        """x becomes what the layer puts out, of all that the rows hold."""
        for (row, _, seen), asked, found in zip(self._kind.places, between.asked, between.answers, strict=True):
            keys, values = _slots(self._keys[row], seen), _slots(self._values[row], seen)
            weights = torch.softmax(torch.bmm(asked, keys.transpose(1, 2)), -1)
            torch.bmm(weights, values, out=found)
        y = between.y.numpy
        between.y.become(self._out, between.found)
        _rms_norm(y, self._eps, self._post_attention, y)
        x += y
        _rms_norm(x, self._eps, self._pre_mlp, between.x.numpy)
        between.wide.become(self._gate_up, between.x)
        gate, up, gated = between.wide.numpy[..., 0, :], between.wide.numpy[..., 1, :], between.gated.numpy
        np.multiply(gate, gate, out=gated)
        gated *= np.float32(-GELU[1])
        gated -= np.float32(GELU[0])
        gated *= gate
        np.minimum(gated, np.float32(80), out=gated)  # exp of more is infinite, which is right and warned of
        np.exp(gated, out=gated)
        gated += np.float32(1)
        np.divide(gate, gated, out=gated)
        gated *= up
        between.y.become(self._down, between.gated)
        _rms_norm(y, self._eps, self._post_mlp, y)
        x += y
        x *= self._scale


def _plain(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.detach()


def _numpy(weight: Tensor) -> Array:
    array: Array = weight.detach().numpy()
    return array


def _slots(memory: Array, seen: list[slice]) -> Tensor:
    """Of one row [heads, slots, D] those that are seen; in which order is no matter."""
    if len(seen) == 1:
        return torch.from_numpy(memory[:, seen[0]])
    return torch.from_numpy(np.concatenate([memory[:, part] for part in seen], 1))  # around the ring's end


def _rms_norm(x: Array, eps: float, weight: Array, out: Array) -> None:
    if x.ndim == 1:  # numbers of Python's are faster than arrays of one
        np.multiply(x, np.float32(1 / math.sqrt(float(x.dot(x)) / len(x) + eps)), out=out)
    else:
        length = np.vecdot(x, x)[:, None]
        length *= np.float32(1 / x.shape[-1])
        length += np.float32(eps)
        np.divide(x, np.sqrt(length, out=length), out=out)
    out *= weight
