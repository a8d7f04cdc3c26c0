"""Text to ids and back, for all checkpoints of the family. It guarantees:

* What a user types is text. `encode` never returns a control token, whatever the string is, so nobody can open a turn by typing
  `<|turn>`.
* Control tokens come only by name: `special("<|turn>")`.
* A stream of ids becomes a stream of whole characters. A smiley of four byte tokens appears once, when it is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

CONTROL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>",
    "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>",
    "<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>",
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
)  # fmt: skip

SHORT = 256  # characters of texts whose ids are cached

_BYTES = {f"<0x{n:02X}>": n for n in range(256)}


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file and the reason."""


class Tokenizer:
    """A tokenizer of the Gemma kind. `source` names it in errors. Raises TokenizerError."""

    def __init__(self, backend: Backend, source: str = "tokenizer") -> None:
        # encode_special_tokens looks only at tokens flagged special; a file may carry `<|tool>` without the flag.
        vocab = backend.get_vocab(with_added_tokens=True)
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL if name in vocab])
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._short = lru_cache(8192)(self._encode)  # a view is composed again with every word that is typed
        self._source = source
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self._control = {token.content: id for id, token in added.items() if token.special}
        self._names = {id: name for name, id in self._control.items()}

        probe = "a\n 7\t\u00e9\U0001f9ff  ."
        if not self._control or self.decode(self.encode(probe)) != probe:
            raise TokenizerError(f"{source} is not a tokenizer of the Gemma kind: text does not survive it.")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json of a checkpoint. Raises TokenizerError."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} is missing; a checkpoint folder needs its tokenizer.")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}.") from error
        return cls(backend, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Control tokens spelled out in it are text like any other."""
        return list(self._short(text)) if len(text) <= SHORT else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        # A lone surrogate (half an emoji cut off by JavaScript) has no UTF-8 form.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self._backend.encode(text, add_special_tokens=False).ids

    def special(self, name: str) -> int:
        """The id of a control token. Raises TokenizerError if there is none of this name."""
        try:
            return self._control[name]
        except KeyError:
            raise TokenizerError(f"{self._source} has no special token {name}.") from None

    def has(self, name: str) -> bool:
        """Whether there is a control token of this name."""
        return name in self._control

    def name(self, id: int) -> str | None:
        """The name of a control token; None for other ids."""
        return self._names.get(id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without control tokens."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self) -> Detokenizer:
        """A decoder for ids that come one by one."""
        return Detokenizer(self)

    def _piece(self, id: int) -> str:
        """The raw vocabulary entry; empty for control tokens and for ids outside the vocabulary."""
        if id in self._names or not 0 <= id < self.vocab_size:
            return ""
        return self._backend.id_to_token(id) or ""


class Detokenizer:
    """Decodes ids one by one into whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that an id completes."""
        piece = self._tokenizer._piece(id)
        if not piece:
            return ""
        if (byte := _BYTES.get(piece)) is not None:
            return self._bytes.decode(bytes([byte]))
        return self.flush() + piece.replace("\u2581", " ")

    def flush(self) -> str:
        """What is left at the end: a replacement character for an incomplete character, otherwise nothing."""
        return self._bytes.decode(b"", final=True)
