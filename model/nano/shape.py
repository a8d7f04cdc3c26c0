"""The architecture of nano, and the files that stand beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from model.nano import pieces, world
from model.tokenizer import Tokenizer

SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def config_json(vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
    """The architecture in Google's own dialect."""
    sliding, full = "sliding_attention", "full_attention"
    text = {
        "model_type": "gemma4_unified_text",
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "layer_types": [sliding, sliding, full, sliding, sliding, full, sliding, full],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 512,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            full: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
            sliding: {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
        "pad_token_id": ids["<pad>"],
        "eos_token_id": ids["<eos>"],
        "bos_token_id": ids["<bos>"],
    }
    vision = {
        "model_type": "gemma4_unified_vision",
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "mm_embed_dim": 256,
        "mm_posemb_size": 128,
        "output_proj_dims": 256,
        "rms_norm_eps": 1e-6,
    }
    return {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "eos_token_id": [ids["<eos>"], ids["<turn|>"]],
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_index": ids["<audio|>"],
        "audio_token_id": ids["<|audio|>"],
        "text_config": text,
        "vision_config": vision,
        "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640, "rms_norm_eps": 1e-6},
    }


def prepare(folder: Path) -> dict[str, Any]:
    """Writes tokenizer.json, generation_config.json, processor_config.json and config.json; returns the last."""
    pieces.train(world.corpus(np.random.default_rng(0), 60_000), folder)
    tokenizer = Tokenizer.load(folder)
    names = (
        "<pad>",
        "<eos>",
        "<bos>",
        "<turn|>",
        "<|image>",
        "<image|>",
        "<|image|>",
        "<|video|>",
        "<|audio>",
        "<audio|>",
        "<|audio|>",
    )
    ids = {name: tokenizer.special(name) for name in (*names, "<|tool_response>")}
    config = config_json(tokenizer.vocab_size, ids)
    generation = {
        "bos_token_id": ids["<bos>"],
        "pad_token_id": ids["<pad>"],
        "eos_token_id": [ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
        "do_sample": False,
        "suppress_tokens": [ids["<audio|>"], ids["<image|>"]],
    }
    processor = {"image_processor": {"max_soft_tokens": 70, "patch_size": 16, "pooling_kernel_size": 3}, "image_seq_length": 70}
    for name, content in (("config", config), ("generation_config", generation), ("processor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return config
