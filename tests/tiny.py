"""Tiny random checkpoints with every feature of the 12B, conversations for them, and what transformers makes of both.

A weight depends on nothing but its tensor's name, so a checkpoint is the same whoever builds it.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.cache import Cache, Row, whole_span
from model.config import GemmaConfig
from model.gemma import Gemma
from model.sampling import SamplingParams
from model.weights import layout, load, read_generation

BOI, EOI, IMAGE, VIDEO, BOA, EOA, AUDIO = range(300, 307)
SIDE, FRAME = 6, 20  # pixels along a patch, samples in an audio position

REAL = json.loads((Path(__file__).parent / "fixtures/gemma-4-12b-config.json").read_text())  # of google/gemma-4-12B


@dataclass(frozen=True)
class Recipe:
    """A configuration. `layers` spells them: s sliding, f full (the last must be full). `full_kv` None leaves the key out."""

    layers: str = "ssfssf"
    hidden: int = 64
    heads: int = 4
    kv: int = 2
    full_kv: int | None = 1
    head_dim: int = 16
    full_head_dim: int = 32
    shared_kv: bool = True
    window: int = 8
    softcap: float | None = 30.0
    turned: float = 0.25
    hub: bool = False  # the dialect of config.json: the hub's, or what transformers writes

    def hub_json(self) -> dict[str, Any]:
        text = {
            "model_type": "gemma4_unified_text",
            "vocab_size": 320,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": len(self.layers),
            "layer_types": [{"s": "sliding_attention", "f": "full_attention"}[x] for x in self.layers],
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "head_dim": self.head_dim,
            "global_head_dim": self.full_head_dim,
            "attention_k_eq_v": self.shared_kv,
            "sliding_window": self.window,
            "max_position_embeddings": 512,
            "final_logit_softcapping": self.softcap,
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "use_bidirectional_attention": "vision",
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": self.turned, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "enable_moe_block": False,
            "num_kv_shared_layers": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        }
        if self.full_kv is not None:
            text["num_global_key_value_heads"] = self.full_kv
        return {
            "architectures": ["Gemma4UnifiedForConditionalGeneration"],
            "model_type": "gemma4_unified",
            "text_config": text,
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": SIDE // 3,
                "pooling_kernel_size": 3,
                "mm_embed_dim": 48,
                "output_proj_dims": 48,
                "mm_posemb_size": 16,
                "rms_norm_eps": 1e-6,
            },
            "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": FRAME, "rms_norm_eps": 1e-6},
            "boi_token_id": BOI,
            "eoi_token_id": EOI,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "boa_token_id": BOA,
            "eoa_token_index": EOA,
            "audio_token_id": AUDIO,
            "tie_word_embeddings": True,
        }

    def config_json(self) -> dict[str, Any]:
        return self.hub_json() if self.hub else as_transformers_writes(self.hub_json())


def as_transformers_writes(hub_json: dict[str, Any]) -> dict[str, Any]:
    from transformers import Gemma4UnifiedConfig

    written: dict[str, Any] = json.loads(Gemma4UnifiedConfig.from_dict(hub_json).to_json_string(use_diff=False))
    return written


RECIPES = {
    "golden": Recipe(),
    "hub": Recipe(hub=True, window=4, softcap=None),
    "own values": Recipe(hub=True, layers="sfsf", shared_kv=False, full_kv=1, window=6),  # full_kv counts with shared_kv only
    "no full kv heads": Recipe(hub=True, layers="fssf", kv=1, full_kv=None, window=16),
    "twelve layers": Recipe("ssf" * 4, 32, heads=2, kv=1, full_kv=2, head_dim=8, full_head_dim=16, window=5, softcap=None),
    "all layers alike": Recipe(layers="ssf", kv=2, full_kv=2, full_head_dim=16, turned=0.5, window=7),
    "own values, one head": Recipe(layers="fsf", kv=1, full_kv=None, shared_kv=False, window=12, softcap=None),
}


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a hub name. Seed and laws are those of the printed golden numbers, which went by transformers' names."""
    name = name.replace("vision_embedder.", "embed_vision.")
    name = name.replace("embed_vision.embedding", "embed_vision.multimodal_embedder.embedding")
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("layer_scalar"):
        return 0.6 + 0.4 * torch.rand(shape, generator=generator)
    if any(part in name for part in ("norm", "ln1", "ln2")):
        return float(name.endswith("weight")) + 0.3 * noise
    scales = {"pos_embedding": 0.7, "bias": 0.2, "embed_tokens.weight": 0.25}
    return noise * next((scale for end, scale in scales.items() if name.endswith(end)), 1.5 / shape[-1] ** 0.5)


def tensors(config: GemmaConfig) -> dict[str, Tensor]:
    return {name: draw(name, place.shape) for name, place in layout(config).items()}


@dataclass(frozen=True)
class Checkpoint:
    folder: Path

    @cached_property
    def model(self) -> Gemma:
        return load(self.folder, dtype=torch.float32)

    @cached_property
    def reference(self) -> Any:
        return transformers_loads(self.folder)

    @property
    def generation(self) -> SamplingParams:
        return read_generation(self.folder, self.model.config)


def write(recipe: Recipe, folder: Path) -> Checkpoint:
    raw = recipe.config_json()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors(GemmaConfig.from_json(raw)), folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def transformers_loads(folder: Path) -> Any:
    """transformers' model of a folder in float32; every tensor must have found its place."""
    from transformers import Gemma4UnifiedForConditionalGeneration as Reference

    model, said = Reference.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return model.eval()


@dataclass(frozen=True)
class Prompt:
    ids: Tensor  # [T], placeholders where soft tokens go
    pictures: tuple[tuple[Tensor, Tensor], ...] = ()  # patches [n, 3 * SIDE^2] and places [n, 2]
    sounds: tuple[Tensor, ...] = ()  # [frames, FRAME]

    @property
    def blocks(self) -> Tensor:
        """[T]: the number of the picture that a position belongs to, -1 for none."""
        inside = self.ids == IMAGE
        starts = inside & ~torch.cat((torch.tensor([False]), inside[:-1]))
        return torch.where(inside, starts.cumsum(0) - 1, -1)

    def embed(self, model: Gemma) -> Tensor:
        """[T, H]"""
        x = model.embed_text(self.ids)
        if self.pictures:
            soft = torch.cat([model.embed_image(*picture) for picture in self.pictures])
            x = x.masked_scatter((self.ids == IMAGE)[:, None], soft)
        if self.sounds:
            x = x.masked_scatter((self.ids == AUDIO)[:, None], model.embed_audio(torch.cat(self.sounds)))
        return x

    def for_transformers(self) -> dict[str, Tensor]:
        """Several pictures and sounds go padded to one length, as its processor pads them."""
        ids = self.ids[None]
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int() + 3 * (ids == AUDIO).int()}
        if self.pictures:
            most = max(len(patches) for patches, _ in self.pictures) + 2
            inputs["pixel_values"] = torch.zeros(len(self.pictures), most, 3 * SIDE**2)
            inputs["image_position_ids"] = torch.full((len(self.pictures), most, 2), -1)
            for i, (patches, places) in enumerate(self.pictures):
                inputs["pixel_values"][i, : len(patches)] = patches
                inputs["image_position_ids"][i, : len(patches)] = places
        if self.sounds:
            most = max(map(len, self.sounds)) + 1
            inputs["input_features"] = torch.zeros(len(self.sounds), most, FRAME)
            inputs["input_features_mask"] = torch.zeros(len(self.sounds), most, dtype=torch.bool)
            for i, frames in enumerate(self.sounds):
                inputs["input_features"][i, : len(frames)] = frames
                inputs["input_features_mask"][i, : len(frames)] = True
        return inputs


def prompt(*parts: int | tuple[int, int] | str, seed: int = 0) -> Prompt:
    """6: that many text ids. (3, 2): a picture three patches wide and two high. "12": twelve frames of sound.

    Every other picture is nearly flat and every sound rises from digital silence: that is where the eps of a norm shows."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = [2]
    pictures: list[tuple[Tensor, Tensor]] = []
    sounds: list[Tensor] = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 300, (part,), generator=generator).tolist()
        elif isinstance(part, str):
            ids += [BOA, *[AUDIO] * int(part), EOA]
            loudness = 0.3 * torch.linspace(0, 1, int(part))[:, None] ** 4
            sounds.append(loudness * torch.randn(int(part), FRAME, generator=generator))
        else:
            width, height = part
            ids += [BOI, *[IMAGE] * (width * height), EOI]
            patches = torch.rand(width * height, 3 * SIDE**2, generator=generator)
            if len(pictures) % 2:
                patches = 0.5 + 0.004 * (patches - 0.5)
            pictures.append((patches, torch.tensor([[x, y] for y in range(height) for x in range(width)])))
    return Prompt(torch.tensor(ids), tuple(pictures), tuple(sounds))


def conversation(window: int, seed: int = 0) -> Prompt:
    """97 positions of text, four pictures no larger than the window, and sound."""
    largest = (3, 2) if window >= 6 else (2, 2)
    return prompt(5, largest, 2, "12", 3, (2, 2), (4, 1), "40", (1, 3), 5, seed=seed)


@torch.no_grad()
def trained_logits(reference: Any, prompt: Prompt) -> Tensor:
    """transformers' logits [T, V] under the masks that the model was trained with. Those are what its `generate` builds for
    a static cache; its bare forward lets pictures see themselves on full layers too."""
    inputs = prompt.for_transformers()
    width = reference.config.text_config.hidden_size
    masks = type(reference).create_masks_for_generate(
        reference.config, torch.zeros(1, len(prompt.ids), width), None, None, None, mm_token_type_ids=inputs["mm_token_type_ids"]
    )
    logits: Tensor = reference(**inputs, attention_mask=masks, use_cache=False).logits
    return logits[0]


def generated(reference: Any, prompt: Prompt, count: int, suppressed: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """transformers' greedy ids and their log probabilities [count, V]."""
    out = reference.generate(
        **prompt.for_transformers(),
        max_new_tokens=count,
        do_sample=False,
        suppress_tokens=list(suppressed),
        cache_implementation="static",
        disable_compile=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt.ids) :].tolist(), torch.cat(out.scores).log_softmax(-1)


@torch.no_grad()
def at_once(model: Gemma, x: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Hidden states [T, H] of x [T, H] without a cache: what every way of feeding must come to."""
    span = whole_span(model.config, len(x), None if blocks is None else blocks[None], x.dtype, x.device)
    hidden = model(x[None], span)
    return hidden[0]


def cuts(blocks: Tensor, limit: int, seed: int | None = None) -> Iterator[slice]:
    """Chunks of at most `limit` positions that split no picture: the longest there can be, or random ones of a seed."""
    size = random.Random(seed)
    start, count = 0, len(blocks)
    while start < count:
        stop = min(count, start + (limit if seed is None else size.randint(1, limit)))
        while start < stop < count and blocks[stop] >= 0 and blocks[stop] == blocks[stop - 1]:
            stop -= 1
        if stop == start:  # a picture begins here and is longer than the chunk would have been
            stop = next((i for i in range(start, count) if blocks[i] != blocks[start]), count)
        yield slice(start, stop)
        start = stop


def feed(model: Gemma, cache: Cache, row: Row, x: Tensor, blocks: Tensor, limit: int = 1, seed: int | None = None) -> Tensor:
    """Hidden states [T, H] of x [T, H] appended to a row chunk by chunk; by default one position at a time, pictures whole."""
    seen = []
    for cut in cuts(blocks, limit, seed):
        hidden = model.extend(cache, [row], x[None, cut], blocks=blocks[None, cut])
        assert hidden is not None
        seen.append(hidden[0])
    return torch.cat(seen)
