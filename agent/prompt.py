"""The chat format of Gemma 4, as segments of ids around live frames. Pure: names and text in, ids out.

A conversation is appended piece by piece as it happens, so nothing here renders a whole prompt. In order:

    begin(system, tools, thinking)        <bos> and, if any of the three is given, the system turn
    open_turn()                           <|turn>user⏎
    text("…"), boa … eoa, boi … eoi       text, audio and pictures of the user, in any order
    close_turn(thinking)                  <turn|>⏎<|turn>model⏎, and the empty thought when thinking is off
      … the model writes; AnswerReader reads it …
    after_answer()                        ⏎ once the model's own <turn|> is in the row, then the next open_turn()

When the model calls a tool it stops at its own <|tool_response>; `tool_response(name, result)` continues from there in the same
model turn. History that is rendered from text uses `end_turn` (for a user turn that is not to be answered yet) and `answer`.

Text of users, tools and system prompts is encoded as plain text: it cannot become a control token (see Tokenizer.encode).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.calls import MARK, BrokenCall, Control, Part, ToolCall, declaration, notation, read_call
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from model.config import MediaTokens


@dataclass(frozen=True)
class Prompt:
    """Renders segments of the chat format to ids."""

    tokenizer: Tokenizer
    media: MediaTokens

    @property
    def boi(self) -> int:
        """The token before a picture's soft tokens; `eoi` comes after them."""
        return self.media.boi

    @property
    def eoi(self) -> int:
        return self.media.eoi

    @property
    def boa(self) -> int:
        """The token before a run of audio frames; `eoa` comes after it."""
        return self.media.boa

    @property
    def eoa(self) -> int:
        return self.media.eoa

    # -- the live conversation

    def begin(self, system: str | None = None, tools: Sequence[Mapping[str, Any]] = (), thinking: bool = False) -> list[int]:
        parts: list[Part] = [Control("<bos>")]
        if system is not None or tools or thinking:
            parts += [Control("<|turn>"), "system\n"]
            if thinking:
                parts += [Control("<|think|>"), "\n"]
            parts.append((system or "").strip())
            for tool in tools:
                parts += [Control("<|tool>"), *declaration(tool), Control("<tool|>")]
            parts += [Control("<turn|>"), "\n"]
        return self._ids(parts)

    def open_turn(self, role: str = "user") -> list[int]:
        return self._ids([Control("<|turn>"), f"{'model' if role == 'assistant' else role}\n"])

    def text(self, text: str) -> list[int]:
        return self._ids([text.strip()])

    def timestamp(self, seconds: float, first: bool = False) -> list[int]:
        """The time before a video frame: `mm:ss `, with a space before it unless it is the first of the turn."""
        whole = int(seconds)
        return self._ids([f"{'' if first else ' '}{whole // 60:02d}:{whole % 60:02d} "])

    def end_turn(self) -> list[int]:
        """Closes a turn without asking for an answer; also closes a model turn that was interrupted."""
        return self._ids([Control("<turn|>"), "\n"])

    def ask(self, thinking: bool = False) -> list[int]:
        """Opens the model's turn. With thinking off it contains an empty thought already."""
        return self.open_turn("model") + ([] if thinking else self.empty_thought())

    def empty_thought(self) -> list[int]:
        return self._ids([Control("<|channel>"), "thought\n", Control("<channel|>")])

    def close_turn(self, thinking: bool = False) -> list[int]:
        return self.end_turn() + self.ask(thinking)

    def after_answer(self) -> list[int]:
        return self._ids(["\n"])

    # -- history

    def answer(self, text: str) -> list[int]:
        """A finished model turn in canonical form: its text, without a thought."""
        return self.open_turn("model") + self.text(text) + self.end_turn()

    # -- tools

    def tool_call(self, name: str, arguments: Mapping[str, Any]) -> list[int]:
        """A call as the model writes it, for history."""
        return self._ids([Control("<|tool_call>"), f"call:{name}", *notation(arguments), Control("<tool_call|>")])

    def open_call(self, name: str = "") -> list[int]:
        """The start of a call of any tool, or of `name`, which forces the model to complete it."""
        return self._ids([Control("<|tool_call>"), f"call:{name}{{" if name else "call:"])

    def tool_response(self, name: str, result: Any, *, opened: bool = True, thinking: bool = False) -> list[int]:
        """The result of a call. `opened`: the model has written <|tool_response> itself; False for the second of several and in
        history."""
        body = result if isinstance(result, Mapping) else {"value": result}
        parts: list[Part] = [] if opened else [Control("<|tool_response>")]
        parts += [f"response:{name}", *notation(body), Control("<tool_response|>")]
        if thinking:
            parts += [Control("<|channel>"), "thought\n"]
        return self._ids(parts)

    def _ids(self, parts: Iterable[Part]) -> list[int]:
        ids: list[int] = []
        text: list[str] = []

        def flush() -> None:
            if text:
                ids.extend(self.tokenizer.encode("".join(text)))
                text.clear()

        for part in parts:
            if isinstance(part, Control):
                flush()
                ids.append(self.tokenizer.special(part))
            else:
                text.append(part)
        flush()
        return ids


# ---- parsing what the model writes


@dataclass(frozen=True)
class Text:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class Thought:
    """A piece of the model's reasoning: it is not spoken and does not stay in the history."""

    text: str


AnswerEvent = Text | Thought | ToolCall | BrokenCall

_LABEL = "thought\n"


class AnswerReader:
    """Parses generated ids into events. `thinking`: the prompt ends inside an open thought (after a tool's result)."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._mode = "thought" if thinking else "text"  # or "label" (at the start of a thought), or "call"
        self._held = ""  # text of a label or a call until it is complete

    def push(self, id: int) -> list[AnswerEvent]:
        """The events that are complete with the next id."""
        match self._tokenizer.name(id):
            case None:
                return self._read(self._stream.push(id))
            case "<|channel>":
                return self._switch("label")
            case "<|tool_call>":  # also ends a thought
                return self._switch("call")
            case "<channel|>" | "<tool_call|>" | "<|tool_response>" | "<turn|>" | "<eos>":
                return self._switch("text")
            case '<|"|>' if self._mode == "call":
                self._read(self._stream.flush())
                self._held += MARK
        return []  # no other control token has a meaning in an answer

    def flush(self) -> list[AnswerEvent]:
        """The last events, at the end of the answer."""
        return self._switch("text")

    def _switch(self, mode: str) -> list[AnswerEvent]:
        events = self._read(self._stream.flush())
        if self._mode == "call":
            events.append(read_call(self._held))
        self._mode, self._held = mode, ""
        return events

    def _read(self, text: str) -> list[AnswerEvent]:
        if self._mode == "label":
            self._held += text
            if self._held != _LABEL and _LABEL.startswith(self._held):
                return []
            self._mode, text = "thought", self._held.removeprefix(_LABEL)
        if self._mode == "call":
            self._held += text.replace(MARK, "")
            return []
        if not text:
            return []
        return [Text(text) if self._mode == "text" else Thought(text)]
