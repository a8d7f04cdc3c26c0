"""The vocabulary of nano: whole words of its small world, numbers by tens, bytes for everything else.

Gemma's conventions (space written as `▁`, byte fallback, control tokens by their real names) in at most 1,024 pieces. A word that
the world uses is one piece, with and without the space before it, and so is every coordinate 0, 10 … 1000 and every fixed run of
the detection JSON. The pieces are looked up whole, not merged from pairs, so no slot is spent on the fragments between.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.tokenizer import CONTROL

LIMIT = 1024
SPACE = "\u2581"

JSON = (
    '▁[{"box_2d":▁[', '[{"box_2d":▁[', '{"box_2d":▁[', ',▁', '],▁"label":▁"', '"},▁', '"}]', '"}', "```json", "```",
)  # fmt: skip
NUMBERS = tuple(str(n) for n in range(0, 1001, 10))
ALPHABET = tuple(chr(n) for n in range(33, 127)) + (SPACE, "\n", *"’–—…°")

# One pre-token is one look-up: a JSON run, a newline, a number, a word with the space before it, or any single character.
# A comma takes its space along only before a number, so that a word behind a comma is the same piece as elsewhere.
_RUNS = "|".join(re.escape(run) + (r"(?=\d)" if run == ",▁" else "") for run in JSON)
PATTERN = rf"{_RUNS}|\n|\d+|{SPACE}?\p{{L}}+(?:['’]\p{{L}}+)?|[\s\S]"


def train(texts: Iterable[str], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; the same texts give the same bytes."""
    pieces = [*CONTROL, *(f"<0x{n:02X}>" for n in range(256)), *ALPHABET, *JSON, *NUMBERS]
    pieces += _words(texts, LIMIT - len(set(pieces)), known=frozenset(pieces))
    tokenizer = _tokenizer({piece: id for id, piece in enumerate(dict.fromkeys(pieces))})

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 262144,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _words(texts: Iterable[str], room: int, known: frozenset[str]) -> list[str]:
    """The commonest words as they stand in the texts, then the same words without or with their space, while there is room."""
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in split.pre_tokenize_str(text.replace(" ", SPACE)))
    twins: Counter[str] = Counter()
    for piece, count in counts.items():
        twins[piece.removeprefix(SPACE) if piece.startswith(SPACE) else SPACE + piece] += count

    chosen: dict[str, None] = {}
    for ranking in (counts, twins):
        for piece, _ in sorted(ranking.items(), key=lambda item: (-item[1], item[0])):
            if len(chosen) < room and piece not in known and piece.strip(SPACE)[:1].isalpha():
                chosen[piece] = None
    return list(chosen)


def _tokenizer(vocab: dict[str, int]) -> Tokenizer:
    model = models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    return tokenizer
