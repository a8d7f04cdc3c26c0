"""One decode step: a single position of each of a few rows through all layers, on a CPU in float32.

Besides four matrix products a layer has some forty operations on a few hundred numbers. Such an operation takes numpy half a
microsecond and torch three. So numpy does them here, over the same memory, and torch does the products, since it has threads.
The result is that of `model.forward`, except for rounding.
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
from model.config import GemmaConfig, LayerConfig
from model.functional import frequencies
from model.quantized import QuantizedLinear, Weight

if TYPE_CHECKING:
    from model.batch import RowChunk
    from model.gemma import Block, Gemma

Array = NDArray[np.float32]
GELU = (math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi))  # gelu, by tanh: x sigmoid(x (a + b x^2))


class _SharedBuffer:
    """One buffer, seen by torch as a matrix [count, numbers] and by numpy as [count, *shape]. Where `count` is 1 numpy's view
    lacks that axis, which would cost a tenth of a step."""

    def __init__(self, count: int, *shape: int) -> None:
        self.torch = torch.empty(count, math.prod(shape))
        self.numpy: Array = self.torch.numpy().reshape(shape if count == 1 else (count, *shape))
        self._vector = self.torch[0] if count == 1 else None

    def set_product(self, weight: Tensor, x: _SharedBuffer) -> None:
        """Stores x times the transpose of weight [out, in]."""
        if self._vector is None or x._vector is None:
            torch.mm(x.torch, weight.t(), out=self.torch)
        else:
            torch.mv(weight, x._vector, out=self._vector)


class _LayerKind:
    """Slots and RoPE tables of the current step, for layers of one kind."""

    def __init__(self, config: GemmaConfig, layer: LayerConfig, cache: Cache) -> None:
        self._window = config.window if layer.sliding else None
        self._slots, self._frequencies = cache.slots(layer), frequencies(layer, torch.device("cpu")).numpy()
        self.rows: list[tuple[int, int, list[slice]]] = []  # of each row: its index, the slot to write, the slots to read
        self._half = layer.head_dim // 2
        self.cos: Array = np.empty(0, np.float32)  # [B, 1, 2, D / 2], of one row [2, D / 2]
        self.sin = self.cos  # the same shape, the first half negated

    def set_rows(self, rows: list[Row]) -> None:
        """Sets the step to the next position of each of these rows."""
        self.rows.clear()
        for row in rows:
            oldest = 0 if self._window is None else max(0, row.length + 1 - self._window)
            first, last = oldest % self._slots, row.length % self._slots
            visible = [slice(first, last + 1)] if first <= last else [slice(first, self._slots), slice(last + 1)]
            self.rows.append((row.index, last, visible))
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
    """Steps of `model` on rows of `cache`. Only one thread may use it, since its buffers are reused."""

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
        """Whether a pass over these chunks can be done here."""
        on_cpu = model.device.type == cache.device.type == "cpu" and model.dtype == cache.dtype == torch.float32
        plain = not any(isinstance(module, QuantizedLinear) for module in model.blocks[0].modules())
        return on_cpu and plain and all(chunk.count == 1 for chunk in chunks)

    def __call__(self, rows: list[Row], x: Tensor, wanted: bool) -> Tensor | None:
        """Appends embeddings x [B, H] to rows that have room. Returns hidden states after the final norm [B, H], if wanted."""
        for kind in self._kinds.values():
            kind.set_rows(rows)
        state: Array = (x[0] if len(x) == 1 else x).numpy().copy()
        count = len(x)
        last = self._layers[-1]
        for layer in self._layers:
            workspace = layer.write_kv(state, count)
            if layer is last and not wanted:
                return None
            layer.attend(workspace, state)
        out: Array = np.empty_like(state)
        _rms_norm(state, self._eps, self._norm, out)
        return torch.from_numpy(out).view(count, -1)


class _Workspace:
    """Buffers for what is computed within a layer, for `count` rows."""

    def __init__(self, count: int, config: GemmaConfig, layer: LayerConfig, projected: int) -> None:
        heads, kv, size = config.heads, layer.kv_heads, layer.head_dim
        self.x, self.y = _SharedBuffer(count, config.hidden_size), _SharedBuffer(count, config.hidden_size)
        self.projected = _SharedBuffer(count, projected // size, size)
        self.query = _SharedBuffer(count, heads + kv, 2, size // 2)  # queries and keys, after norm and RoPE
        self.attended = _SharedBuffer(count, heads, size)
        self.gate_up = _SharedBuffer(count, 2, config.intermediate_size)
        self.gated = _SharedBuffer(count, config.intermediate_size)
        # Views of each row, by key head:
        self.queries = [row[: heads * size].view(kv, -1, size) for row in self.query.torch]
        self.outputs = [row.view(kv, -1, size) for row in self.attended.torch]
        self.keys = [row.view(-1, size)[heads:].numpy() for row in self.query.torch]
        # In full layers these are the keys, before the weight of their norm and RoPE.
        self.values = [row.view(-1, size)[-kv:].numpy() for row in self.projected.torch]


class _LayerStep:
    """One layer of a step, over its weights and its part of the cache."""

    def __init__(
        self, config: GemmaConfig, layer: LayerConfig, block: Block, kind: _LayerKind, keys: Tensor, values: Tensor
    ) -> None:
        attention, self._kind, self._eps = block.attention, kind, config.eps
        self._config, self._layer = config, layer
        self._workspaces: dict[int, _Workspace] = {}  # by the number of rows
        self._keys, self._values = keys.numpy(), values.numpy()  # [rows, heads, slots, D]
        self._qkv, self._out = _matrix(attention.qkv), _matrix(attention.out)
        self._gate_up, self._down = _matrix(block.mlp.gate_up), _matrix(block.mlp.down)
        norms = (block.input_norm, block.post_attention_norm, block.pre_mlp_norm, block.post_mlp_norm)
        self._input, self._post_attention, self._pre_mlp, self._post_mlp = map(_numpy, norms)
        heads = [_numpy(attention.q_norm)] * config.heads + [_numpy(attention.k_norm)] * layer.kv_heads
        self._qk_norm: Array = np.stack(heads).reshape(-1, 2, layer.head_dim // 2)
        self._scale = np.float32(block.scale.item())

    def write_kv(self, x: Array, count: int) -> _Workspace:
        """Writes keys and values of the new positions to their rows. Returns the workspace, with the queries."""
        if (workspace := self._workspaces.get(count)) is None:
            workspace = self._workspaces[count] = _Workspace(count, self._config, self._layer, len(self._qkv))
        kind, query = self._kind, workspace.query.numpy
        _rms_norm(x, self._eps, self._input, workspace.x.numpy)
        workspace.projected.set_product(self._qkv, workspace.x)
        projected = workspace.projected.numpy
        length = np.vecdot(projected, projected)[..., None]
        length *= np.float32(1 / projected.shape[-1])
        length += np.float32(self._eps)
        projected /= np.sqrt(length, out=length)
        normed = projected[..., : len(self._qk_norm), :].reshape(query.shape) * self._qk_norm
        np.multiply(normed, kind.cos, out=query)
        query += normed[..., ::-1, :] * kind.sin
        for (row, slot, _), key, value in zip(kind.rows, workspace.keys, workspace.values, strict=True):
            self._keys[row, :, slot] = key
            self._values[row, :, slot] = value
        return workspace

    def attend(self, workspace: _Workspace, x: Array) -> None:
        """Does attention over the rows and the MLP. Replaces x with the layer's output."""
        for (row, _, visible), queries, output in zip(self._kind.rows, workspace.queries, workspace.outputs, strict=True):
            keys, values = _slots(self._keys[row], visible), _slots(self._values[row], visible)
            weights = torch.softmax(torch.bmm(queries, keys.transpose(1, 2)), -1)
            torch.bmm(weights, values, out=output)
        y = workspace.y.numpy
        workspace.y.set_product(self._out, workspace.attended)
        _rms_norm(y, self._eps, self._post_attention, y)
        x += y
        _rms_norm(x, self._eps, self._pre_mlp, workspace.x.numpy)
        workspace.gate_up.set_product(self._gate_up, workspace.x)
        gate, up, gated = workspace.gate_up.numpy[..., 0, :], workspace.gate_up.numpy[..., 1, :], workspace.gated.numpy
        np.multiply(gate, gate, out=gated)
        gated *= np.float32(-GELU[1])
        gated -= np.float32(GELU[0])
        gated *= gate
        np.minimum(gated, np.float32(80), out=gated)  # exp of more is infinite: the result would be right, but numpy warns
        np.exp(gated, out=gated)
        gated += np.float32(1)
        np.divide(gate, gated, out=gated)
        gated *= up
        workspace.y.set_product(self._down, workspace.gated)
        _rms_norm(y, self._eps, self._post_mlp, y)
        x += y
        x *= self._scale


def _matrix(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.detach()


def _numpy(weight: Tensor) -> Array:
    array: Array = weight.detach().numpy()
    return array


def _slots(memory: Array, visible: list[slice]) -> Tensor:
    """The visible slots of one row [heads, slots, D], in any order."""
    if len(visible) == 1:
        return torch.from_numpy(memory[:, visible[0]])
    return torch.from_numpy(np.concatenate([memory[:, part] for part in visible], 1))  # around the end of the ring


def _rms_norm(x: Array, eps: float, weight: Array, out: Array) -> None:
    if x.ndim == 1:  # Python's numbers are faster than arrays of one element
        np.multiply(x, np.float32(1 / math.sqrt(float(x.dot(x)) / len(x) + eps)), out=out)
    else:
        length = np.vecdot(x, x)[:, None]
        length *= np.float32(1 / x.shape[-1])
        length += np.float32(eps)
        np.divide(x, np.sqrt(length, out=length), out=out)
    out *= weight
