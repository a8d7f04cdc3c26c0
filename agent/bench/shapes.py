"""The shapes that are measured, each as a config.json: the embedded model, one of 428 million parameters, and the 12B."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from model import weights

MEDIA = ("boi_token_id", "eoi_token_id", "image_token_id", "boa_token_id", "eoa_token_index", "audio_token_id", "video_token_id")
_NANO, _REAL = tuple(range(10, 17)), (255_999, 258_882, 258_880, 256_000, 258_883, 258_881, 258_884)


def _config(hidden: int, layers: str, vocabulary: int, heads: int, kv: int, size: int, media: tuple[int, ...]) -> dict[str, Any]:
    """A config.json in the proportions of the 12B. `layers`: s for sliding, f for full attention. `size`: of a sliding head."""
    far = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0}
    near = {"rope_type": "default", "rope_theta": 10_000.0}
    text = {
        "model_type": "gemma4_unified_text", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 4 * hidden,
        "num_hidden_layers": len(layers), "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": size,
        "num_global_key_value_heads": 1, "global_head_dim": 2 * size, "attention_k_eq_v": True, "sliding_window": 1024,
        "layer_types": [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in layers], "rms_norm_eps": 1e-6,
        "rope_parameters": {"full_attention": far, "sliding_attention": near}, "final_logit_softcapping": 30.0,
        "max_position_embeddings": 262_144, "use_bidirectional_attention": "vision",
    }  # fmt: skip
    vision = {
        "model_type": "gemma4_unified_vision", "patch_size": 16, "pooling_kernel_size": 3, "mm_embed_dim": hidden,
        "mm_posemb_size": 1120, "output_proj_dims": hidden, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    audio = {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640, "rms_norm_eps": 1e-6}
    parts = {"text_config": text, "vision_config": vision, "audio_config": audio}
    return {"model_type": "gemma4_unified", **parts, **dict(zip(MEDIA, media, strict=True))}


def _nano() -> dict[str, Any]:
    file = weights.NANO / "config.json"
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return raw or _config(256, "ssfssfsf", 1024, 4, 2, 64, _NANO)


SHAPES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "nano": _nano,
    "mid": lambda: _config(1024, "sssssf" * 4, 32_768, 8, 4, 128, _NANO),
    "12b": lambda: _config(3840, "sssssf" * 8, 262_144, 16, 8, 256, _REAL),
}
