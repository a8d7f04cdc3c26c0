"""The shape of a checkpoint's network, read from its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that does not fit; the message names the file, key or tensor."""


@dataclass(frozen=True)
class LayerConfig:
    """The attention of one layer. Layers with equal values share masks and RoPE tables."""

    sliding: bool
    head_dim: int
    kv_heads: int
    shared_kv: bool  # no v_proj: V is the key projection, normed without weight and not rotated
    theta: float
    rotated: float  # share of the pairs that RoPE rotates


@dataclass(frozen=True)
class MediaTokens:
    """Token ids of the markers before, after and in place of pictures and sound."""

    boi: int
    eoi: int
    image: int
    video: int
    boa: int
    eoa: int
    audio: int


@dataclass(frozen=True)
class GemmaConfig:
    """The network's shape, and the token ids of its media."""

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
    grid: int  # longest row or column of patches that the position table has
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
        rotation = rope[kind]
        if rotation["rope_type"] not in ("default", "proportional"):
            raise CheckpointError(f'config.json asks for RoPE of the unknown type "{rotation["rope_type"]}"')
        share = rotation.get("partial_rotary_factor", 1.0) if rotation["rope_type"] == "proportional" else 1.0
        yield LayerConfig(sliding, head_dim, kv_heads, shared, float(rotation["rope_theta"]), float(share))
