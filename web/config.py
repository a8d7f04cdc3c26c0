"""What a client may set of a session (`session.update`) and of one response, what of it we do, and how we say so.

What we cannot do is not echoed: `session.updated` tells what holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from agent.calls import declaration
from agent.tape import Setting
from agent.turns import Manners
from web.audio import PCM, Format
from web.given import Refused, choice, mapping, number, sequence, text, truth, whole

TOOLS = 128
TOOL = 16_384  # characters of one tool's declaration
MOST = 4096  # tokens of a response, as the protocol has it

# A model that tells from the words whether a sentence is complete is not there yet; eagerness says how long a pause may be.
EAGERNESS = {"low": 1000, "medium": 500, "auto": 500, "high": 300}  # ms
DETECTION: Mapping[str, Any] = {
    "type": "server_vad",
    "threshold": 0.5,
    "prefix_padding_ms": 300,
    "silence_duration_ms": 500,
    "idle_timeout_ms": None,
    "create_response": True,
    "interrupt_response": True,
}
SEMANTIC: Mapping[str, Any] = {
    "type": "semantic_vad", "eagerness": "auto", "create_response": True, "interrupt_response": True,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """`detection` is None for push-to-talk; `most` tokens of an answer, None for as many as we allow."""

    instructions: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    choice: str | Mapping[str, Any] = "auto"  # of tools, as the protocol has it
    spoken: bool = True
    most: int | None = None
    transcription: Mapping[str, Any] | None = None
    detection: Mapping[str, Any] | None = None
    input: Format = PCM
    output: Format = PCM

    @property
    def setting(self) -> Setting:
        return Setting(self.instructions or None, () if self.choice == "none" else self.tools)

    @property
    def calls(self) -> tuple[str, ...]:
        """The tools of which an answer must call one."""
        if isinstance(self.choice, str):
            return tuple(tool["name"] for tool in self.tools) if self.choice == "required" else ()
        return (self.choice["name"],)

    @property
    def modality(self) -> Literal["audio", "text"]:
        return "audio" if self.spoken else "text"

    @property
    def idle(self) -> float | None:
        """Seconds of silence after an answer that ask for another one."""
        ms = (self.detection or {}).get("idle_timeout_ms")
        return None if ms is None else ms / 1000

    @property
    def patient(self) -> bool:
        """Nobody interrupts an answer by talking."""
        return self.detection is None or not self.detection["interrupt_response"]

    @property
    def answers(self) -> bool:
        return self.detection is None or bool(self.detection["create_response"])

    def manners(self, usual: Manners) -> Manners:
        given = self.detection
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

    def updated(self, given: Mapping[str, Any]) -> Config:
        """With what `session.update` says; raises Refused before anything holds."""
        choice(given.get("type", "realtime"), "session.type", ("realtime",))
        now = self.answering(given, "session")
        audio = _within(given, "audio", "session.audio")
        into = _within(audio, "input", "session.audio.input")
        if into.get("format") is not None:
            now = replace(now, input=Format.read(into["format"], "session.audio.input.format"))
        if "transcription" in into:
            now = replace(now, transcription=_transcription(into["transcription"]))
        if "turn_detection" in into:
            now = replace(now, detection=_detection(into["turn_detection"], now.detection))
        return now

    def answering(self, given: Mapping[str, Any], where: str) -> Config:
        """With what may also be said of one response."""
        now = self
        if given.get("prompt") is not None:
            raise Refused(f"{where}.prompt is stored where nobody looks; say it in {where}.instructions", param=f"{where}.prompt")
        if given.get("instructions") is not None:
            now = replace(now, instructions=text(given["instructions"], f"{where}.instructions"))
        if given.get("tools") is not None:
            now = replace(now, tools=_tools(given["tools"], f"{where}.tools"))
        if (chosen := given.get("tool_choice")) is not None:
            now = replace(now, choice=_choice(chosen, f"{where}.tool_choice"))
        if now.choice == "required" and not now.tools:
            raise Refused(f"{where}.tool_choice is required, and there are no tools", param=f"{where}.tool_choice")
        if not set(now.calls) <= {tool["name"] for tool in now.tools}:
            raise Refused(f"{where}.tool_choice names {now.calls[0]!r}, which is no tool", param=f"{where}.tool_choice")
        if given.get("output_modalities") is not None:
            now = replace(now, spoken=_spoken(given["output_modalities"], f"{where}.output_modalities"))
        if (most := given.get("max_output_tokens")) is not None:
            now = replace(now, most=None if most == "inf" else whole(most, f"{where}.max_output_tokens", 1, MOST))
        audio = _within(given, "audio", f"{where}.audio")
        out = _within(audio, "output", f"{where}.audio.output")
        if out.get("format") is not None:
            now = replace(now, output=Format.read(out["format"], f"{where}.audio.output.format"))
        return now

    def as_json(self, name: str, model: str, voice: str) -> dict[str, Any]:
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": name,
            "model": model,
            "instructions": self.instructions,
            "output_modalities": [self.modality],
            "max_output_tokens": self.most or "inf",
            "tools": list(self.tools),
            "tool_choice": self.choice,
            "audio": {
                "input": {
                    "format": self.input.as_json(),
                    "transcription": self.transcription,
                    "noise_reduction": None,
                    "turn_detection": self.detection,
                },
                "output": {"format": self.output.as_json(), "voice": voice, "speed": 1.0},
            },
            "truncation": "auto",
            "tracing": None,
            "prompt": None,
            "include": None,
        }


def _within(given: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    return mapping({} if given.get(name) is None else given[name], where)


def _spoken(given: Any, where: str) -> bool:
    kinds = [choice(kind, where, ("text", "audio")) for kind in sequence(given, where, 2)]
    if not kinds:
        raise Refused(f'{where} must be ["audio"] or ["text"]', param=where)
    return "audio" in kinds


def _transcription(given: Any) -> Mapping[str, Any] | None:
    if given is None:
        return None
    where = "session.audio.input.transcription"
    asked = mapping(given, where)
    said = {name: text(asked[name], f"{where}.{name}", 256) for name in ("model", "language") if asked.get(name) is not None}
    return {"model": "attend", **said}  # which one, is not the client's to say: the model that listens also writes


def _detection(given: Any, now: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if given is None:
        return None
    where = "session.audio.input.turn_detection"
    asked = mapping(given, where)
    kind = choice(asked.get("type", now["type"] if now else "server_vad"), f"{where}.type", ("server_vad", "semantic_vad"))
    usual = SEMANTIC if kind == "semantic_vad" else DETECTION
    out = {**usual, **(now if now and now["type"] == kind else {})}
    for name in usual.keys() - {"type"}:
        if name not in asked or (asked[name] is None and name != "idle_timeout_ms"):
            continue
        value, param = asked[name], f"{where}.{name}"
        match name:
            case "create_response" | "interrupt_response":
                out[name] = truth(value, param)
            case "eagerness":
                out[name] = choice(value, param, tuple(EAGERNESS))
            case "threshold":
                out[name] = float(number(value, param, 0, 1))
            case "prefix_padding_ms":
                out[name] = whole(value, param, 0, 2000)
            case "silence_duration_ms":
                out[name] = whole(value, param, 0, 10_000)
            case "idle_timeout_ms":
                out[name] = None if value is None else whole(value, param, 1000, 300_000)
    return out


def _choice(given: Any, where: str) -> str | Mapping[str, Any]:
    if not isinstance(given, dict):
        return choice(given, where, ("auto", "none", "required"))
    choice(given.get("type"), f"{where}.type", ("function",))
    return {"type": "function", "name": text(given.get("name"), f"{where}.name", 64)}


def _tools(given: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    return tuple(_tool(tool, f"{where}[{n}]") for n, tool in enumerate(sequence(given, where, TOOLS)))


def _tool(given: Any, where: str) -> Mapping[str, Any]:
    tool = mapping(given, where)
    if tool.get("type", "function") != "function":
        raise Refused(f"{where} is no function; servers of tools are not connected to from here", param=f"{where}.type")
    name = text(tool.get("name"), f"{where}.name", 64)
    if not name or not all(character.isalnum() or character in "_-." for character in name):
        raise Refused(f"{where}.name may hold nothing but letters, digits, dots, _ and -", param=f"{where}.name")
    if tool.get("parameters") is not None:
        mapping(tool["parameters"], f"{where}.parameters")
    kept = {key: tool[key] for key in ("description", "parameters") if tool.get(key) is not None}
    kept = {"type": "function", "name": name, **kept}
    try:
        text(json.dumps(kept, ensure_ascii=False), where, TOOL)
        list(declaration(kept))
    except (TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{where} is no JSON schema that can be read", param=f"{where}.parameters") from error
    if not isinstance(kept.get("description", ""), str):
        raise Refused(f"{where}.description must be a string", "invalid_type", f"{where}.description")
    return kept
