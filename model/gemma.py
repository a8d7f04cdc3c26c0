"""Gemma 4 Unified, read top to bottom: attention, MLP, block, vision, model.

One position is one embedding, whatever it came from: `embed_text` makes one of a token, `embed_audio` one of a raw
frame of samples, `embed_image` one of a square of pixels. `forward` takes whole prompts as embeddings [B, T, H] (nano is trained
with it); `extend` appends to rows of a `Cache`, by `model.forward`.

Shapes: B rows, T positions of this pass, n patches of a picture, H hidden size, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.batch import RowChunk, upload
from model.cache import AttentionMetadata, BatchMetadata, Cache, Row
from model.config import GemmaConfig as GemmaConfig  # `as`: for those who import it from here
from model.config import LayerConfig as LayerConfig
from model.functional import rms_norm, rotate
from model.quantized import QuantizedLinear, Weight, linear
from model.threads import Threads

# cuDNN's attention makes a plan for every new shape (0.44 s on a B200), and here the length grows with every step.
torch.backends.cuda.enable_cudnn_sdp(False)


@lru_cache
def _scale(hidden_size: int, dtype: torch.dtype) -> float:
    return torch.tensor(math.sqrt(hidden_size)).to(dtype).item()


class Attention(nn.Module):
    """Attention over whole prompts. Passes over a cache use its weights, with the operations of `model.forward`."""

    def __init__(self, config: GemmaConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.layer, self.heads, self.eps = layer, config.heads, config.eps
        kv = layer.kv_heads * (1 if layer.shared_kv else 2)
        self.qkv: Weight = nn.Parameter(torch.empty((config.heads + kv) * layer.head_dim, config.hidden_size))
        self.q_norm = nn.Parameter(torch.ones(layer.head_dim))
        self.k_norm = nn.Parameter(torch.ones(layer.head_dim))
        self.out: Weight = nn.Parameter(torch.empty(config.hidden_size, config.heads * layer.head_dim))

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """x [B, T, H] -> [B, T, H]."""
        batch, count, _ = x.shape
        heads, kv, size = self.heads, self.layer.kv_heads, self.layer.head_dim
        qkv = linear(x, self.qkv).view(batch, count, -1, size)
        weight = torch.stack((self.q_norm,) * heads + (self.k_norm,) * kv)
        query_key = rms_norm(qkv[:, :, : heads + kv], self.eps, weight)
        query, key = rotate(query_key, metadata.cos, metadata.sin).transpose(1, 2).split((heads, kv), 1)
        value = rms_norm(qkv[:, :, -kv:], self.eps).transpose(1, 2)  # where keys are values, the last heads are both
        # The heads that share a key head become further queries of it: so keys are never repeated, whatever kernel runs.
        query = query.reshape(batch, kv, -1, size)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=metadata.mask, scale=1.0)
        # On a CPU the result is laid out like the query. CUDA's memory-efficient kernel lays it out by position, so `view` fails.
        attended = attended.unflatten(2, (heads // kv, -1)).permute(0, 3, 1, 2, 4)
        return linear(attended.reshape(batch, -1, heads * size), self.out)


class MLP(nn.Module):
    """The gated feed-forward network of a layer."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_up: Weight = nn.Parameter(torch.empty(2 * config.intermediate_size, config.hidden_size))
        self.down: Weight = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.gate_up).chunk(2, -1)
        return linear(F.gelu(gate, approximate="tanh") * up, self.down)


class Block(nn.Module):
    """One layer. It does not know its index, so a compiler needs one graph for each kind of layer, not for each of 48."""

    def __init__(self, config: GemmaConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.input_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.attention = Attention(config, layer)
        self.post_attention_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.pre_mlp_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp = MLP(config)
        self.post_mlp_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """x [B, T, H] -> [B, T, H]."""
        attended = self.attention(rms_norm(x, self.eps, self.input_norm), metadata)
        x = rms_norm(attended, self.eps, self.post_attention_norm, onto=x)
        out = self.mlp(rms_norm(x, self.eps, self.pre_mlp_norm))
        return rms_norm(out, self.eps, self.post_mlp_norm, onto=x) * self.scale


class Vision(nn.Module):
    """Patches [..., n, 3 * patch^2] -> soft tokens [..., n, H]: LayerNorm, Linear, LayerNorm, plus the embeddings of column and
    row, LayerNorm, RMSNorm, Linear."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(3 * config.patch**2)
        self.dense = nn.Linear(3 * config.patch**2, config.vision_size)
        self.norm2 = nn.LayerNorm(config.vision_size)
        self.places = nn.Parameter(torch.zeros(config.grid, 2, config.vision_size))
        self.norm3 = nn.LayerNorm(config.vision_size)
        self.project = nn.Linear(config.vision_size, config.hidden_size, bias=False)
        self.eps = config.vision_eps

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        x = self.norm2(self.dense(self.norm1(patches.to(self.dense.weight.dtype))))
        x = self.norm3(x + self.places[places[..., 0], 0] + self.places[places[..., 1], 1])
        out: Tensor = self.project(rms_norm(x, self.eps))
        return out


Numbers = Sequence[Sequence[int]]
Part = NDArray[Any] | tuple[Tensor, Tensor]  # ids int64 [n], frames float32 [n, samples], or a picture's patches and positions


class Gemma(nn.Module):
    """The model: embeddings in, hidden states and logits out."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.vision = Vision(config)
        self.audio = nn.Parameter(torch.empty(config.hidden_size, config.frame))
        self.threads = Threads()
        products = [p.numel() for p in self.blocks.parameters() if p.dim() == 2]
        self.product = sum(products) // max(1, len(products))  # numbers in one of the layers' matrices, on average
        self.head: QuantizedLinear | None = None  # a quantized copy of the embedding table, for logits alone

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def embed_text(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H], scaled by sqrt(H) rounded to the model's dtype (62.0 for the 12B in bf16)."""
        return F.embedding(ids, self.embedding) * _scale(self.config.hidden_size, self.dtype)

    def embed_audio(self, frames: Tensor) -> Tensor:
        """frames [..., samples of one frame] in [-1, 1] -> [..., H]. The norm's eps keeps silence near zero."""
        frames = frames.to(self.dtype)
        with self._threads(self.audio, frames):
            return F.linear(rms_norm(frames, self.config.audio_eps), self.audio)

    def embed_image(self, patches: Tensor, places: Tensor) -> Tensor:
        """patches [..., n, 3 * patch^2] in [0, 1] and their positions `places` [..., n, 2] (column, row) -> [..., n, H]."""
        with self._threads(self.vision.dense.weight, patches):
            out: Tensor = self.vision(patches, places)
        return out

    def _threads(self, weight: Tensor, x: Tensor) -> AbstractContextManager[None]:
        """Sets the number of threads for the product of x [..., n] and a matrix; in training it stays as it is."""
        if not torch.is_inference_mode_enabled():
            return nullcontext()
        return self.threads.running(weight.numel(), x.numel() // x.shape[-1])

    def embed(self, parts: Sequence[Part]) -> Tensor:
        """Embeddings [N, H] of these parts, in their order. All text is embedded in one operation, and all sound in another;
        nothing waits for the device."""
        text = [isinstance(part, np.ndarray) and part.ndim == 1 for part in parts]
        sound = [isinstance(part, np.ndarray) and part.ndim == 2 for part in parts]
        embedded: dict[int, Tensor] = {}
        for chosen, embed in ((text, self.embed_text), (sound, self.embed_audio)):
            indices = [index for index, is_it in enumerate(chosen) if is_it]
            if indices:
                together = embed(upload(np.concatenate([parts[index] for index in indices]), self.device))
                embedded |= zip(indices, together.split([len(parts[index]) for index in indices]), strict=True)
        for index, part in enumerate(parts):
            if isinstance(part, tuple):
                embedded[index] = self.embed_image(*(upload(tensor, self.device) for tensor in part))
        return embedded[0] if len(parts) == 1 else torch.cat([embedded[index] for index in range(len(parts))])

    def forward(self, x: Tensor, metadata: BatchMetadata) -> Tensor:
        """Embeddings [B, T, H] of whole prompts, without a cache -> hidden states after the final norm [B, T, H]. Nano is trained
        with this, and the tests compare every other path with it."""
        for layer, block in zip(self.config.layers, self.blocks, strict=True):
            x = block(x, metadata.reaches[layer])
        return self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        """Applies the final norm to the output of the last layer [..., H]."""
        return rms_norm(x, self.config.eps, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] -> float32 logits [..., vocabulary], softcapped, over the tied unscaled table."""
        with self._threads(self.embedding, hidden):
            logits = linear(hidden, self.head or self.embedding).float()
            cap = self.config.softcap
            return logits if cap is None else cap * torch.tanh(logits / cap)

    def extend(
        self, cache: Cache, rows: list[Row], x: Tensor, *, blocks: Tensor | Numbers | None = None, wanted: int | None = None
    ) -> Tensor | None:
        """Appends x [B, T, H] to B rows: a step is T = 1, a chunk is B = 1.

        `blocks` [B, T] numbers the picture that a position belongs to (-1: none); a picture must come in one call, since
        its positions attend to one another. Returns the hidden states [B, wanted, H] of the last `wanted` positions (None: of
        all), or None where `wanted` is 0. Raises RowFull before anything is written."""
        from model.forward import ForwardPass

        if cache.forward is None or cache.forward.model is not self:
            cache.forward = ForwardPass(self, cache)
        count = x.shape[1]
        keep = count if wanted is None else min(int(wanted), count)
        numbers = blocks.tolist() if isinstance(blocks, Tensor) else blocks or [()] * len(rows)
        chunks = [RowChunk(row, count, _pictures(pictured), keep) for row, pictured in zip(rows, numbers, strict=True)]
        hidden = cache.forward(chunks, x.flatten(0, 1))
        return None if hidden is None else hidden.view(len(rows), keep, -1)


def _pictures(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Start and stop of each run of equal numbers that are not negative."""
    found, start = [], 0
    for number, run in groupby(numbers):
        stop = start + len(list(run))
        found += [(start, stop)] if number >= 0 else []
        start = stop
    return tuple(found)
