"""GGUF files of llama.cpp as a source of weights: the model in one file (or several parts), the projectors of pictures and sound
in another, whose name begins with "mmproj".

Names and layouts are those that llama.cpp's conversion writes for Gemma 4 Unified (conversion/gemma.py): the pixels of a
patch are stored by channel, and positions of pictures as one table for columns and one for rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.config import CheckpointError
from model.quantized import GROUP, Form, Quantized, quantize

if TYPE_CHECKING:
    from gguf import ReaderTensor

_BLOCK = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_OTHERS = {
    "token_embd.weight": "model.language_model.embed_tokens.weight",
    "output_norm.weight": "model.language_model.norm.weight",
    "v.patch_norm.1.weight": "model.vision_embedder.patch_ln1.weight",
    "v.patch_norm.1.bias": "model.vision_embedder.patch_ln1.bias",
    "v.patch_embd.weight": "model.vision_embedder.patch_dense.weight",
    "v.patch_embd.bias": "model.vision_embedder.patch_dense.bias",
    "v.patch_norm.2.weight": "model.vision_embedder.patch_ln2.weight",
    "v.patch_norm.2.bias": "model.vision_embedder.patch_ln2.bias",
    "v.position_embd.weight": "model.vision_embedder.pos_embedding",
    "v.patch_norm.3.weight": "model.vision_embedder.pos_norm.weight",
    "v.patch_norm.3.bias": "model.vision_embedder.pos_norm.bias",
    "mm.input_projection.weight": "model.embed_vision.embedding_projection.weight",
    "mm.a.input_projection.weight": "model.embed_audio.embedding_projection.weight",
}
_NOT_OURS = {"rope_freqs.weight", "output.weight"}  # computed from config.json; tied to token_embd
_FOUR_BITS = {"Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K"}
_PLAIN = {"F32", "F16", "BF16"}


class GgufFiles:
    """Tensors under the hub's names. `load` in model/weights.py tells what a matrix becomes in memory: four bits and fewer become
    int4 (Q4_0 as it is but for scales in bfloat16, the others rounded anew), more bits int8 (rounded anew), plain floats
    stay. Raises CheckpointError for a file that is broken, of another architecture, or of types that it does not know."""

    def __init__(self, files: list[Path]) -> None:
        try:
            import gguf
        except ImportError as missing:
            raise CheckpointError("reading GGUF files needs the package gguf: pip install attend[gguf]") from missing
        self._dequantize: Callable[[Any, Any], np.ndarray] = gguf.dequantize
        self.tensors: dict[str, ReaderTensor] = {}
        for file in files:
            try:
                reader = gguf.GGUFReader(file)
            except (ValueError, IndexError, OSError, KeyError) as broken:
                raise CheckpointError(f"{file} is truncated or not a GGUF file: {broken}") from broken
            architecture = reader.get_field("general.architecture")
            if architecture and (kind := architecture.contents()) not in ("gemma4", "clip"):
                raise CheckpointError(f'{file} holds a model of the architecture "{kind}"; attend runs "gemma4"')
            for tensor in reader.tensors:
                name = _hub_name(tensor.name)
                if name in self.tensors:
                    raise CheckpointError(f"{file} holds {tensor.name} once more; keep the files of one model in {file.parent}")
                if tensor.name not in _NOT_OURS:
                    self.tensors[name] = tensor
        projectors = any(name.startswith("model.vision_embedder.") for name in self.tensors)
        if self.tensors and not projectors:
            raise CheckpointError(
                f"{files[0].parent} has no mmproj-….gguf, without which the model neither hears nor sees; put it beside the model"
            )

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(n) for n in reversed(self.tensors[name].shape))
        return (shape[1], shape[0], shape[2]) if name.endswith("pos_embedding") else shape

    def form(self, name: str) -> Form | None:
        kind = self.tensors[name].tensor_type.name
        return None if kind in _PLAIN else "int4" if kind in _FOUR_BITS else "int8"

    def read(self, name: str) -> Tensor | Quantized:
        tensor = self.tensors[name]
        if tensor.tensor_type.name == "Q4_0" and name.endswith("_proj.weight"):
            return _q4_0(np.asarray(tensor.data))
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as unknown:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"the tensor {tensor.name} is of the type {kind}, which gguf cannot read") from unknown
        weight = torch.from_numpy(np.array(values)).view(*reversed([int(n) for n in tensor.shape]))
        if name.endswith("pos_embedding"):
            return weight.transpose(0, 1)
        if name.endswith(("patch_dense.weight", "patch_ln1.weight", "patch_ln1.bias")):
            by_channel: Tensor = weight.unflatten(-1, (3, -1))
            return by_channel.transpose(-1, -2).flatten(-2)
        form = self.form(name)
        return weight if form is None or not name.endswith("_proj.weight") else quantize(weight, form)


def _hub_name(name: str) -> str:
    if name in _OTHERS:
        return _OTHERS[name]
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        layer, part = match.groups()
        if part == "layer_output_scale":
            return f"model.language_model.layers.{layer}.layer_scalar"
        if part in _BLOCK:
            return f"model.language_model.layers.{layer}.{_BLOCK[part]}.weight"
    return name  # unknown: `load` names it


def _q4_0(data: np.ndarray) -> Quantized:
    """Blocks of 18 bytes, uint8 [out, in / 32 * 18]: a float16 scale, then 32 codes, the first sixteen in the low halves."""
    blocks = torch.from_numpy(np.array(data)).view(torch.uint8).unflatten(-1, (-1, 18))
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0].to(torch.bfloat16)
    halves = blocks[..., 2:]
    codes = torch.cat((halves & 15, halves >> 4), -1)
    assert codes.shape[-1] == GROUP
    return Quantized("int4", codes.flatten(1), scale, torch.zeros_like(scale))
