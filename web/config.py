"""A session's configuration: how `session.update` and `response.create` change it, and how it is echoed.

Parameters without effect (voice, speed, noise reduction, …) are echoed with the values that apply.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from agent.calls import declaration
from agent.tape import SystemPrompt
from agent.turns import TurnDetectionConfig
from web.audio import PCM, Format
from web.schema import (
    AudioFormat,
    FunctionTool,
    InvalidRequest,
    ResponseOptions,
    ResponseParams,
    SessionOptions,
    ToolChoice,
    Transcription,
    TurnDetection,
    checked,
)

TOOL = 16_384  # characters that a tool's declaration may have
MAX_TOKENS = 4096  # of a response: the protocol's limit

# There is no model yet that tells from the words whether a sentence is complete; eagerness sets how long a pause may be.
EAGERNESS = {"low": 1000, "medium": 500, "auto": 500, "high": 300}  # ms
SERVER_VAD: Mapping[str, Any] = {
    "type": "server_vad",
    "threshold": 0.5,
    "prefix_padding_ms": 300,
    "silence_duration_ms": 500,
    "idle_timeout_ms": None,
    "create_response": True,
    "interrupt_response": True,
}
SEMANTIC_VAD: Mapping[str, Any] = {
    "type": "semantic_vad", "eagerness": "auto", "create_response": True, "interrupt_response": True,
}  # fmt: skip


@dataclass(frozen=True)
class SessionConfig:
    """The configuration. `turn_detection`: None for push-to-talk. `max_tokens`: of an answer, None for the limit."""

    instructions: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    spoken: bool = True
    max_tokens: int | None = None
    transcription: Mapping[str, Any] | None = None
    turn_detection: Mapping[str, Any] | None = None
    input: Format = PCM
    output: Format = PCM

    @property
    def setting(self) -> SystemPrompt:
        """The system prompt and the tools that the model gets."""
        return SystemPrompt(self.instructions or None, () if self.tool_choice == "none" else self.tools)

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of the tools of which an answer must call one; empty if it need not."""
        if isinstance(self.tool_choice, str):
            return tuple(tool["name"] for tool in self.tools) if self.tool_choice == "required" else ()
        return (self.tool_choice["name"],)

    @property
    def modality(self) -> Literal["audio", "text"]:
        return "audio" if self.spoken else "text"

    @property
    def idle(self) -> float | None:
        """Seconds of silence after an answer that start another one; None: never."""
        ms = (self.turn_detection or {}).get("idle_timeout_ms")
        return None if ms is None else ms / 1000

    @property
    def uninterrupted(self) -> bool:
        """Speech does not interrupt an answer."""
        return self.turn_detection is None or not self.turn_detection["interrupt_response"]

    @property
    def answers(self) -> bool:
        """A turn is answered as soon as it ends."""
        return self.turn_detection is None or bool(self.turn_detection["create_response"])

    def detection(self, usual: TurnDetectionConfig) -> TurnDetectionConfig:
        """The session's turn detection; `usual` has the values that the protocol does not set."""
        given = self.turn_detection
        if given is None:
            return replace(usual, hands_free=False, buffered=True, idle=None)
        usual = replace(usual, hands_free=True, buffered=False, interrupt=given["interrupt_response"])
        if given["type"] == "semantic_vad":
            return replace(usual, silence=EAGERNESS[given["eagerness"]], idle=None)
        return replace(
            usual,
            threshold=min(max(given["threshold"], 0.16), 0.99),
            pre_roll=max(1, given["prefix_padding_ms"]),
            silence=max(1, given["silence_duration_ms"]),
            idle=given["idle_timeout_ms"],
        )

    def updated(self, options: SessionOptions) -> SessionConfig:
        """The configuration after a `session.update`. Raises InvalidRequest."""
        now = self.of_response(options, "session")
        given = options.audio.input if options.audio else None
        if given is None:
            return now
        if given.format:
            now = replace(now, input=_format(given.format, "session.audio.input.format"))
        if given.transcription is not UNSET:
            now = replace(now, transcription=_transcription(given.transcription))
        if given.turn_detection is not UNSET:
            now = replace(now, turn_detection=_turn_detection(given.turn_detection, now.turn_detection))
        return now

    def of_response(self, options: SessionOptions | ResponseParams, where: str) -> SessionConfig:
        """The configuration with the options that sessions and responses share. Raises InvalidRequest."""
        now = self._with_tools(options, where)
        if options.prompt is not None:
            message = f"{where}.prompt is stored where nobody looks; say it in {where}.instructions"
            raise InvalidRequest(message, param=f"{where}.prompt")
        if options.instructions is not None:
            now = replace(now, instructions=options.instructions)
        if options.output_modalities is not None:
            now = replace(now, spoken="audio" in options.output_modalities)
        if (limit := options.max_output_tokens) is not None:
            now = replace(now, max_tokens=None if limit == "inf" else limit)
        output = options.audio.output if options.audio else None
        if output and output.format:
            now = replace(now, output=_format(output.format, f"{where}.audio.output.format"))
        return now

    def _with_tools(self, options: ResponseOptions, where: str) -> SessionConfig:
        now, param = self, f"{where}.tool_choice"
        if options.tools is not None:
            now = replace(now, tools=tuple(_tool(tool, f"{where}.tools[{n}]") for n, tool in enumerate(options.tools)))
        if (choice := options.tool_choice) is not None:
            now = replace(now, tool_choice=msgspec.to_builtins(choice) if isinstance(choice, ToolChoice) else choice)
        if now.tool_choice == "required" and not now.tools:
            raise InvalidRequest(f"{param} is required, and there are no tools", param=param)
        if not set(now.calls) <= {tool["name"] for tool in now.tools}:
            raise InvalidRequest(f"{param} names {now.calls[0]!r}, which is no tool", param=param)
        return now

    def as_json(self, id: str, model: str, voice: str) -> dict[str, Any]:
        """The session object of the protocol."""
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": id,
            "model": model,
            "instructions": self.instructions,
            "output_modalities": [self.modality],
            "max_output_tokens": self.max_tokens or "inf",
            "tools": list(self.tools),
            "tool_choice": self.tool_choice,
            "audio": {
                "input": {
                    "format": self.input.as_json(),
                    "transcription": self.transcription,
                    "noise_reduction": None,
                    "turn_detection": self.turn_detection,
                },
                "output": {"format": self.output.as_json(), "voice": voice, "speed": 1.0},
            },
            "truncation": "auto",
            "tracing": None,
            "prompt": None,
            "include": None,
        }


def _format(given: AudioFormat, where: str) -> Format:
    rates = Format.rates(given.type)
    if given.rate not in (None, *rates):
        known = " or ".join(map(str, rates))
        raise InvalidRequest(f"{where}.rate of {given.type} must be {known}", param=f"{where}.rate")
    return Format(given.type, given.rate or rates[0])


def _transcription(given: Transcription | None) -> Mapping[str, Any] | None:
    if given is None:
        return None
    values = {"model": given.model, "language": given.language}
    return {"model": "attend", **{name: value for name, value in values.items() if value is not None}}


def _turn_detection(given: TurnDetection | None, now: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if given is None:
        return None
    kind = given.type or (now["type"] if now else "server_vad")
    usual = SEMANTIC_VAD if kind == "semantic_vad" else SERVER_VAD
    kept = now if now and now["type"] == kind else {}
    changes = {name: value for name in usual if name != "type" and _is_set(name, value := getattr(given, name))}
    return {**usual, **kept, **changes}


def _is_set(name: str, value: Any) -> bool:
    return value is not UNSET and (value is not None or name == "idle_timeout_ms")


def _tool(given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if given.get("type") == "mcp":
        raise InvalidRequest(f"{where} is no function; servers of tools are not connected to from here", param=f"{where}.type")
    tool = checked(given, FunctionTool, where)
    values = {"description": tool.description, "parameters": tool.parameters}
    kept = {"type": "function", "name": tool.name, **{name: value for name, value in values.items() if value is not None}}
    try:
        length = len(json.dumps(kept, ensure_ascii=False))
        list(declaration(kept))
    except (TypeError, AttributeError, RecursionError) as error:
        raise InvalidRequest(f"{where} is no JSON schema that can be read", param=f"{where}.parameters") from error
    if length > TOOL:
        raise InvalidRequest(f"{where} has more than {TOOL:,} characters", "string_above_max_length", where)
    return kept
