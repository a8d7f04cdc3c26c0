"""Gemma 4 Unified, read top to bottom: config, norm, RoPE, attention, MLP, block, model.

One position is one embedding, whatever it came from: `embed_text` makes one of a token, `embed_audio` one of a raw
frame of samples, `embed_image` one of a square of pixels. `forward` takes whole prompts as embeddings [B, T, H] (that is how
nano is trained); `extend` appends to rows of a `Cache`, by `model.forward`.

Shapes: B rows, T positions of this pass, n positions that can be seen, H hidden size, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from model.functional import rms_norm, rotate
from model.quantized import QuantizedLinear, Weight, linear
from model.threads import Threads

# cuDNN's attention makes a plan for every new shape (0.44 s on a B200), and here the length grows with every step.
torch.backends.cuda.enable_cudnn_sdp(False)


class CheckpointError(ValueError):
    """A checkpoint that does not fit; the message names the file, key or tensor."""


@dataclass(frozen=True)
class LayerConfig:
    """What attention needs to know of one layer. Layers with equal values share masks and RoPE tables."""

    sliding: bool
    head_dim: int
    kv_heads: int
    shared_kv: bool  # no v_proj: V is the key projection, normed without weight and not rotated
    theta: float
    rotated: float  # share of the pairs that RoPE turns


@dataclass(frozen=True)
class MediaTokens:
    """Token ids that stand around and in place of pictures and sound."""

    boi: int
    eoi: int
    image: int
    video: int
    boa: int
    eoa: int
    audio: int


@dataclass(frozen=True)
class GemmaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    layers: tuple[LayerConfig, ...]
    window: int
    max_positions: int
    softcap: float | None
    eps: float
    patch_size: int
    pooling: int
    vision_size: int
    grid: int  # longest row or column of patches the position table knows
    vision_eps: float
    frame: int  # samples in one audio position
    audio_eps: float
    media: MediaTokens

    @property
    def patch(self) -> int:
        """Side in pixels of the square that becomes one position."""
        return self.patch_size * self.pooling

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> GemmaConfig:
        """Reads config.json in both dialects: `global_head_dim`/`num_global_key_value_heads` of the hub's files and
        `per_layer_config` of transformers >= 5.23. Raises CheckpointError for another model or a missing key."""
        if raw.get("model_type") != "gemma4_unified":
            raise CheckpointError(f'config.json says model_type "{raw.get("model_type")}"; attend runs "gemma4_unified"')
        try:
            return cls._read(raw, raw["text_config"], raw["vision_config"], raw["audio_config"])
        except KeyError as missing:
            raise CheckpointError(f"config.json has no {missing}") from missing
        except (TypeError, AttributeError) as wrong:
            raise CheckpointError(f"config.json holds a value of the wrong type: {wrong}") from wrong

    @classmethod
    def _read(
        cls, raw: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any], audio: Mapping[str, Any]
    ) -> GemmaConfig:
        unsupported = {
            "hidden_activation": text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh",
            "attention_bias": bool(text.get("attention_bias")),
            "enable_moe_block": bool(text.get("enable_moe_block")),
            "num_kv_shared_layers": bool(text.get("num_kv_shared_layers")),
            "hidden_size_per_layer_input": bool(text.get("hidden_size_per_layer_input")),
            "use_double_wide_mlp": bool(text.get("use_double_wide_mlp")),
            "use_bidirectional_attention": text.get("use_bidirectional_attention", "vision") != "vision",
            "tie_word_embeddings": not raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True)),
        }
        for key, bad in unsupported.items():
            if bad:
                raise CheckpointError(
                    f"config.json sets {key}={text.get(key, raw.get(key))!r}, which Gemma 4 Unified does not have"
                )
        return cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            heads=text["num_attention_heads"],
            layers=tuple(_layers(text)),
            window=text["sliding_window"],
            max_positions=text["max_position_embeddings"],
            softcap=text.get("final_logit_softcapping"),
            eps=text["rms_norm_eps"],
            patch_size=vision["patch_size"],
            pooling=vision["pooling_kernel_size"],
            vision_size=vision["mm_embed_dim"],
            grid=vision["mm_posemb_size"],
            vision_eps=vision["rms_norm_eps"],
            frame=audio["audio_embed_dim"],
            audio_eps=audio["rms_norm_eps"],
            media=MediaTokens(
                boi=raw["boi_token_id"],
                eoi=raw["eoi_token_id"],
                image=raw["image_token_id"],
                video=raw["video_token_id"],
                boa=raw["boa_token_id"],
                eoa=raw["eoa_token_index"],
                audio=raw["audio_token_id"],
            ),
        )


def _layers(text: Mapping[str, Any]) -> Iterator[LayerConfig]:
    rope = text["rope_parameters"]
    # transformers pads the keys to one width ("05", "11") and writes {} where all layers are alike.
    own = {key.lstrip("0") or "0": value for key, value in (text.get("per_layer_config") or {}).items()}
    for i, kind in enumerate(text["layer_types"]):
        if kind not in ("sliding_attention", "full_attention"):
            raise CheckpointError(f'config.json: layer {i} is of the unknown type "{kind}"')
        sliding = kind == "sliding_attention"
        head_dim, kv_heads = text["head_dim"], text["num_key_value_heads"]
        shared = not sliding and bool(text.get("attention_k_eq_v"))
        if "per_layer_config" in text:
            this = own.get(str(i), {})
            head_dim, kv_heads = this.get("head_dim", head_dim), this.get("num_key_value_heads", kv_heads)
        elif not sliding:
            head_dim = text.get("global_head_dim") or 512
            if shared:
                kv_heads = text.get("num_global_key_value_heads") or kv_heads
        turn = rope[kind]
        if turn["rope_type"] not in ("default", "proportional"):
            raise CheckpointError(f'config.json asks for RoPE of the unknown type "{turn["rope_type"]}"')
        share = turn.get("partial_rotary_factor", 1.0) if turn["rope_type"] == "proportional" else 1.0
        yield LayerConfig(sliding, head_dim, kv_heads, shared, float(turn["rope_theta"]), float(share))


@lru_cache
def _scale(hidden_size: int, dtype: torch.dtype) -> float:
    return torch.tensor(math.sqrt(hidden_size)).to(dtype).item()


class Attention(nn.Module):
    def __init__(self, config: GemmaConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.layer, self.heads, self.eps = layer, config.heads, config.eps
        kv = layer.kv_heads * (1 if layer.shared_kv else 2)
        self.qkv: Weight = nn.Parameter(torch.empty((config.heads + kv) * layer.head_dim, config.hidden_size))
        self.q_norm = nn.Parameter(torch.ones(layer.head_dim))
        self.k_norm = nn.Parameter(torch.ones(layer.head_dim))
        self.out: Weight = nn.Parameter(torch.empty(config.hidden_size, config.heads * layer.head_dim))

    def forward(self, x: Tensor, reach: AttentionMetadata) -> Tensor:
        batch, count, _ = x.shape
        heads, kv, size = self.heads, self.layer.kv_heads, self.layer.head_dim
        qkv = linear(x, self.qkv).view(batch, count, -1, size)
        weight = torch.stack((self.q_norm,) * heads + (self.k_norm,) * kv)
        query_key = rms_norm(qkv[:, :, : heads + kv], self.eps, weight)
        query, key = rotate(query_key, reach.cos, reach.sin).transpose(1, 2).split((heads, kv), 1)
        value = rms_norm(qkv[:, :, -kv:], self.eps).transpose(1, 2)  # where keys are values, the last heads are both
        # The heads that share a key head become further queries of it: nothing is repeated, whatever kernel runs.
        query = query.reshape(batch, kv, -1, size)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=reach.mask, scale=1.0)
        # On a CPU it lies as the query does; CUDA's memory-efficient kernel lays it out by positions, which no view undoes.
        seen = seen.unflatten(2, (heads // kv, -1)).permute(0, 3, 1, 2, 4)
        return linear(seen.reshape(batch, -1, heads * size), self.out)


class MLP(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_up: Weight = nn.Parameter(torch.empty(2 * config.intermediate_size, config.hidden_size))
        self.down: Weight = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.gate_up).chunk(2, -1)
        return linear(F.gelu(gate, approximate="tanh") * up, self.down)


class Block(nn.Module):
    """Knows nothing of its place among the layers, so a compiler needs one graph for each kind, not for each of 48."""

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

    def forward(self, x: Tensor, reach: AttentionMetadata) -> Tensor:
        seen = self.attention(rms_norm(x, self.eps, self.input_norm), reach)
        x = rms_norm(seen, self.eps, self.post_attention_norm, onto=x)
        out = self.mlp(rms_norm(x, self.eps, self.pre_mlp_norm))
        return rms_norm(out, self.eps, self.post_mlp_norm, onto=x) * self.scale


class Vision(nn.Module):
    """Patches -> soft tokens: LayerNorm, Linear, LayerNorm, plus the position's column and row, LayerNorm, RMSNorm, Linear."""

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
Part = NDArray[Any] | tuple[Tensor, Tensor]  # ids int64 [n], frames float32 [n, samples], or a picture's patches and places


class Gemma(nn.Module):
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
        self.product = sum(products) // max(1, len(products))  # numbers in a layer's matrix, on average
        self.head: QuantizedLinear | None = None  # logits are computed with it instead of the embedding table

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
        """patches [..., n, 3 * patch^2] in [0, 1] and places [..., n, 2] (column, row) -> [..., n, H]."""
        with self._threads(self.vision.dense.weight, patches):
            out: Tensor = self.vision(patches, places)
        return out

    def _threads(self, weight: Tensor, x: Tensor) -> AbstractContextManager[None]:
        """For x [..., numbers of one position] times a matrix; in training the caller's threads stay as they are."""
        if not torch.is_inference_mode_enabled():
            return nullcontext()
        return self.threads.running(weight.numel(), x.numel() // x.shape[-1])

    def embed(self, parts: Sequence[Part]) -> Tensor:
        """Embeddings [N, H] of what comes one after the other. All text is embedded at once, and so is all sound; nobody
        waits for the device."""
        text = [isinstance(part, np.ndarray) and part.ndim == 1 for part in parts]
        sound = [isinstance(part, np.ndarray) and part.ndim == 2 for part in parts]
        embedded: dict[int, Tensor] = {}
        for chosen, embed in ((text, self.embed_text), (sound, self.embed_audio)):
            places = [place for place, is_it in enumerate(chosen) if is_it]
            if places:
                together = embed(upload(np.concatenate([parts[place] for place in places]), self.device))
                embedded |= zip(places, together.split([len(parts[place]) for place in places]), strict=True)
        for place, part in enumerate(parts):
            if isinstance(part, tuple):
                embedded[place] = self.embed_image(*(upload(tensor, self.device) for tensor in part))
        return embedded[0] if len(parts) == 1 else torch.cat([embedded[place] for place in range(len(parts))])

    def forward(self, x: Tensor, span: BatchMetadata) -> Tensor:
        """Embeddings [B, T, H] of whole prompts, without a cache -> hidden states after the final norm [B, T, H]. That is how
        nano is trained, and what every other path is tested against."""
        for layer, block in zip(self.config.layers, self.blocks, strict=True):
            x = block(x, span.reaches[layer])
        return self.normed(x)

    def normed(self, x: Tensor) -> Tensor:
        """What the layers put out [..., H] -> what `logits` takes."""
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
        its positions see one another. Returns the hidden states of the last `wanted` positions, None for 0, or of all
        [B, T, H]. Raises RowFull before anything is written."""
        from model.forward import ForwardPass

        if cache.forward is None or cache.forward.model is not self:
            cache.forward = ForwardPass(self, cache)
        count = x.shape[1]
        keep = count if wanted is None else min(int(wanted), count)
        numbers = blocks.tolist() if isinstance(blocks, Tensor) else blocks or [()] * len(rows)
        chunks = [RowChunk(row, count, _pictures(those), keep) for row, those in zip(rows, numbers, strict=True)]
        hidden = cache.forward(chunks, x.flatten(0, 1))
        return None if hidden is None else hidden.view(len(rows), keep, -1)


def _pictures(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Where runs of one number that is not negative start and stop."""
    found, start = [], 0
    for number, run in groupby(numbers):
        stop = start + len(list(run))
        found += [(start, stop)] if number >= 0 else []
        start = stop
    return tuple(found)
