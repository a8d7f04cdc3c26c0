"""Small tokenizers for tests: nano's own, and one built as Gemma's file is, with the real ids of the pieces that matter."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer as Backend

from model.config import MediaTokens
from model.nano import pieces
from model.tokenizer import CONTROL, Tokenizer

TEXTS = (
    "where is the red circle?",
    'The red circle is left of the blue square. [{"box_2d": [120, 340, 560, 780], "label": "red circle"}]',
    "user model system thought what's this?",
)

REAL_IDS = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4,
    "<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48, "<tool_call|>": 49,
    "<|tool_response>": 50, "<tool_response|>": 51, '<|"|>': 52, "<|think|>": 98,
    "<|channel>": 100, "<channel|>": 101, "<|turn>": 105,
    "<turn|>": 106, "<|image>": 255999, "<|audio>": 256000, "<|image|>": 258880, "<|audio|>": 258881, "<image|>": 258882,
    "<audio|>": 258883, "<|video|>": 258884,
}  # fmt: skip


@cache
def nano_json() -> str:
    with tempfile.TemporaryDirectory() as folder:
        pieces.train(TEXTS, Path(folder))
        return (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")


@cache
def gemma_json(flagged: bool = True) -> str:
    """Merges, no pre-tokenizer, real ids, a template that puts <bos> in front. `flagged`: control tokens are marked special."""
    vocab = dict(REAL_IDS)
    vocab |= {f"<0x{n:02X}>": 200 + n for n in range(256)}
    merges = []
    for id, word in {
        2364: "user",
        4368: "model",
        45518: "thought",
        9000: "\n\n",
        9001: "<|",
        9002: "|>",
        9003: "<|turn",
        9004: "▁the",
    }.items():
        for n in range(1, len(word)):
            vocab.setdefault(word[:n], 10000 + len(vocab))
            vocab.setdefault(word[n], 10000 + len(vocab))
            merges.append([word[:n], word[n]])
        vocab[word] = id
    merges = [pair for n, pair in enumerate(merges) if pair not in merges[:n]]
    vocab["\n"] = 107
    for c in map(chr, range(33, 127)):
        vocab.setdefault(c, 10000 + len(vocab))
    vocab.setdefault("▁", 10000 + len(vocab))
    added = [
        {
            "id": REAL_IDS[name],
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": flagged,
        }
        for name in sorted(CONTROL, key=REAL_IDS.__getitem__)
    ]
    bos = {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}
    single = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": single,
                "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<bos>": bos},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": {
                "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                "vocab": vocab, "merges": merges,
            },
        }
    )  # fmt: skip


KINDS = {"nano": nano_json, "gemma": gemma_json, "gemma, unflagged": lambda: gemma_json(flagged=False)}


@cache
def tokenizer(kind: str = "nano") -> Tokenizer:
    return Tokenizer(Backend.from_str(KINDS[kind]()))


@cache
def parsing(kind: str) -> Backend:
    """The same file as transformers would use it on a rendered template: control tokens in the text are parsed."""
    return Backend.from_str(KINDS[kind]())


def media(t: Tokenizer) -> MediaTokens:
    names = {"boi": "<|image>", "eoi": "<image|>", "image": "<|image|>", "video": "<|video|>"}
    names |= {"boa": "<|audio>", "eoa": "<audio|>", "audio": "<|audio|>"}
    return MediaTokens(**{field: t.special(name) for field, name in names.items()})


def spell(t: Tokenizer, ids: list[int]) -> str:
    """Ids as a string in which control tokens are visible."""
    out, stream = "", t.stream()
    for id in ids:
        name = t.name(id)
        out += stream.push(id) if name is None else stream.flush() + name
    return out + stream.flush()
