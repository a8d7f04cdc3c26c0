"""The protocol without a socket: order, ids and fields of what is sent, what a session gets, and any junk."""

from __future__ import annotations

import base64
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agent import events
from agent.calls import ToolCall
from agent.events import (
    AnswerDone,
    AnswerStarted,
    AudioDelta,
    InputTranscribed,
    OutputSent,
    TextDelta,
    ToolCalled,
    TurnStarted,
    TurnStopped,
    UsageCounted,
)
from agent.marks import Mark
from agent.tape import SystemPrompt
from streams.frames import Audio
from tests.mangled import messages
from tests.realtime import CLIENTS, KINDS, Client, judged, kinds
from tests.talk import jpeg
from web.audio import LONGEST, Format, PlaybackClock, Resampler
from web.items import PICTURE
from web.protocol import RealtimeProtocol
from web.schema import AUDIO

RATE = 16_000
JPEG = jpeg()


def client(voice: str | None = "espeak", *extensions: str, strict: bool = True) -> Client:
    return Client(RealtimeProtocol("x", "nano", voice, frozenset(extensions)), strict)


def manual() -> Client:
    c = client()
    c.say("session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
    c.inputs.clear()
    return c


def update_settings(setting: SystemPrompt | None = None, **more: Any) -> events.UpdateSettings:
    return events.UpdateSettings(setting, **{"answers": True, "max_tokens": 4096, "spoken": True, "calls": (), **more})


def pcm(seconds: float, rate: int = 24_000) -> str:
    wave = 8000 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)
    return base64.b64encode(wave.astype("<i2").tobytes()).decode()


def uri(file: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": words}], **more}


def said(answer: int, sample: int, seconds: float, rate: int = RATE) -> AudioDelta:
    return AudioDelta(answer, sample, np.full(round(seconds * rate), 0.1, np.float32), rate)


def answered(answer: int, words: str, finish: Any = "stop", heard: int | None = None) -> AnswerDone:
    return AnswerDone(answer, words, len(words) if heard is None else heard, finish, 50, 4)


def refused(sent: list[dict[str, Any]]) -> dict[str, Any]:
    assert kinds(sent) == ["error"], sent
    error: dict[str, Any] = sent[0]["error"]
    assert error["type"] == "invalid_request_error" and error["message"][-1] != "."
    return error


MESSAGE = ["response.output_item.added", "conversation.item.added", "conversation.item.created", "response.content_part.added"]
AUDIO_DONE = [
    "response.output_audio.done", "response.output_audio_transcript.done", "response.content_part.done",
    "conversation.item.done", "response.output_item.done", "response.done",
]  # fmt: skip
TEXT_DONE = ["response.output_text.done", *AUDIO_DONE[2:]]
ITEM = ["conversation.item.added", "conversation.item.created", "conversation.item.done"]


# ---- junk


def test_every_event_that_a_client_of_the_protocol_has_is_known():
    said = {typing.get_args(kind.model_fields["type"].annotation)[0] for kind in CLIENTS}
    unknown = {kind for kind in said if any("no such event" in e["error"]["message"] for e in client().say(kind) if "error" in e)}
    assert len(said) == 11 and unknown == {"output_audio_buffer.clear"}, "which is WebRTC's alone"


@given(st.lists(messages(), min_size=1, max_size=4))
def test_whatever_is_said_is_answered_by_the_book(said):
    c = client("espeak", "camera", strict=False)
    for message in said:
        for event in c.raw(message):
            if event["type"] in KINDS:
                judged(event)
            if event["type"] == "error":
                assert event["error"]["type"] == "invalid_request_error" and event["error"]["message"]


def parameters(kind: Any, seen: tuple[Any, ...] = ()) -> dict[str, Any]:
    """All that a type of the `openai` package has, as an object that holds each of its fields, one after the other."""
    found: dict[str, Any] = {}
    for inner in (kind, *typing.get_args(kind)):
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
            found |= {name: parameters(field.annotation, (*seen, inner)) for name, field in inner.model_fields.items()}
        elif inner is not kind:
            found |= parameters(inner, seen)
    return found


def paths(tree: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, inner in tree.items():
        yield (*at, name)
        yield from paths(inner, (*at, name))


def test_every_parameter_of_the_reference_is_known():
    """Whatever its value: what is wrong with it may be anything but that nobody knows it."""
    elsewhere = {
        "prompt",
        "tracing",
        "truncation",
        "reasoning",
        "tools",
        "input",
        "item",
        "tool_choice",
        "voice",
        "noise_reduction",
    }
    for kind in CLIENTS:
        for path in paths(parameters(kind)):
            event: Any = None
            for name in reversed(path):
                event = {name: event}
            name = typing.get_args(kind.model_fields["type"].annotation)[0]
            sent = client(strict=False).say(**{"type": name, **(event if path[0] != "type" else {})})
            unknown = [e["error"]["param"] for e in sent if e["type"] == "error" and e["error"]["code"] == "unknown_parameter"]
            assert not unknown or elsewhere & set(path), (name, path, unknown)


def test_what_the_reference_does_not_know_is_refused_wherever_it_stands():
    for event, param in (
        ({"type": "input_audio_buffer.clear", "voice": 1}, "voice"),
        ({"type": "session.update", "session": {"audio": {"output": {"pitch": 2}}}}, "session.audio.output.pitch"),
        ({"type": "conversation.item.create", "item": text("x", name="n")}, "item.name"),
        ({"type": "response.create", "response": {"input": [text("x", name="n")]}}, "response.input[0].name"),
    ):
        error = refused(client().say(**event))
        assert (error["code"], error["param"]) == ("unknown_parameter", param)
        assert error["message"] == f"Unknown parameter: {param!r}"


# ---- a session


def test_a_session_begins_with_what_holds():
    c = client()
    assert kinds(c.first) == ["session.created"]
    session = c.first[0]["session"]
    assert session["id"] == "x" and session["model"] == "nano"
    assert session["audio"]["input"]["turn_detection"]["type"] == "server_vad"
    assert session["audio"]["output"]["format"] == {"type": "audio/pcm", "rate": 24000}
    assert c.inputs == [update_settings(SystemPrompt())]


def test_without_a_voice_answers_are_text():
    c = client(voice=None)
    assert c.first[0]["session"]["output_modalities"] == ["text"]
    updated = c.say("session.update", session={"type": "realtime", "output_modalities": ["audio"]})
    assert updated[0]["session"]["output_modalities"] == ["text"]


def test_an_update_says_what_holds_and_tells_the_session():
    c = client()
    tool = {"type": "function", "name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}}
    updated = c.say(
        "session.update",
        session={
            "type": "realtime",
            "instructions": "Be brief.",
            "tools": [tool],
            "output_modalities": ["text"],
            "max_output_tokens": 99,
            "truncation": "disabled",
            "tracing": "auto",
            "include": [],
            "reasoning": {"effort": "low"},
            "model": "gpt-realtime",
            "parallel_tool_calls": False,
            "audio": {
                "input": {"transcription": {"model": "whisper-1"}, "noise_reduction": {"type": "near_field"}},
                "output": {"voice": "marin", "speed": 1.5, "format": {"type": "audio/pcmu"}},
            },
        },
    )
    session = updated[0]["session"]
    assert session["instructions"] == "Be brief." and session["tools"] == [tool] and session["max_output_tokens"] == 99
    assert session["audio"]["input"]["noise_reduction"] is None and session["audio"]["output"]["speed"] == 1
    assert session["audio"]["output"]["voice"] == "espeak" and session["audio"]["output"]["format"] == {"type": "audio/pcmu"}
    assert c.inputs[-1] == update_settings(SystemPrompt("Be brief.", (tool,)), max_tokens=99, spoken=False)


@pytest.mark.parametrize(
    ("detection", "expected"),
    [
        ({"type": "server_vad"}, {"threshold": 0.5, "pre_roll": 300, "silence": 500, "idle": None, "hands_free": True}),
        ({"type": "server_vad", "threshold": 0.0, "prefix_padding_ms": 0}, {"threshold": 0.16, "pre_roll": 1}),
        ({"type": "server_vad", "threshold": 1, "silence_duration_ms": 200}, {"threshold": 0.99, "silence": 200}),
        ({"type": "server_vad", "idle_timeout_ms": 6000, "interrupt_response": False}, {"idle": 6000, "interrupt": False}),
        ({"type": "semantic_vad"}, {"silence": 500, "hands_free": True}),
        ({"type": "semantic_vad", "eagerness": "low"}, {"silence": 1000}),
        ({"type": "semantic_vad", "eagerness": "high", "interrupt_response": False}, {"silence": 300, "interrupt": False}),
        (None, {"hands_free": False, "idle": None}),
    ],
)
def test_turn_detection_becomes_the_sessions(detection, expected):
    c = client()
    c.say("session.update", session={"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "medium"}}}})
    sent = c.say("session.update", session={"audio": {"input": {"turn_detection": detection}}})
    told = [put.detection for put in c.inputs if isinstance(put, events.UpdateSettings) and put.detection][-1]
    assert {name: getattr(told, name) for name in expected} == expected
    echo = sent[0]["session"]["audio"]["input"]["turn_detection"]
    assert echo is None if detection is None else echo == {**echo, **detection}


def test_a_part_of_turn_detection_leaves_the_rest():
    c = client()
    for detection in ({"type": "server_vad", "silence_duration_ms": 900}, {"create_response": False}):
        sent = c.say("session.update", session={"audio": {"input": {"turn_detection": detection}}})
    echo = sent[0]["session"]["audio"]["input"]["turn_detection"]
    assert echo["silence_duration_ms"] == 900 and echo["create_response"] is False
    assert c.inputs[-1] == update_settings(answers=False)


@pytest.mark.parametrize(
    ("session", "param"),
    [
        (3, "session"),
        ({"type": "transcription"}, "session.type"),
        ({"instructions": 3}, "session.instructions"),
        ({"prompt": {"id": "pmpt_1"}}, "session.prompt"),
        ({"instructions": "x" * 40_000}, "session.instructions"),
        ({"instructions": "\ud800"}, "session.instructions"),
        ({"output_modalities": []}, "session.output_modalities"),
        ({"output_modalities": ["smell"]}, "session.output_modalities[0]"),
        ({"voice": "alloy"}, "session.voice"),
        ({"audio": {"input": {"format": {"type": "audio/pcm", "channels": 2}}}}, "session.audio.input.format.channels"),
        ({"tools": [{"name": "look", "meta": {}}]}, "session.tools[0].meta"),
        ({"max_output_tokens": 0}, "session.max_output_tokens"),
        ({"max_output_tokens": True}, "session.max_output_tokens"),
        ({"tools": {}}, "session.tools"),
        ({"tools": [{"type": "mcp"}]}, "session.tools[0].type"),
        ({"tools": [{"type": "function"}]}, "session.tools[0].name"),
        ({"tools": [{"name": "a b"}]}, "session.tools[0].name"),
        ({"tools": [{"name": "a", "parameters": {"type": 5}}]}, "session.tools[0].parameters"),
        ({"tools": [{"name": "a", "description": 5}]}, "session.tools[0].description"),
        ({"tool_choice": 5}, "session.tool_choice"),
        ({"audio": []}, "session.audio"),
        ({"audio": {"input": {"format": {"type": "audio/opus"}}}}, "session.audio.input.format.type"),
        ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 44100}}}}, "session.audio.input.format.rate"),
        ({"audio": {"input": {"turn_detection": {"type": "magic"}}}}, "session.audio.input.turn_detection.type"),
        ({"audio": {"input": {"turn_detection": {"threshold": 2}}}}, "session.audio.input.turn_detection.threshold"),
        ({"audio": {"input": {"turn_detection": {"threshold": "a"}}}}, "session.audio.input.turn_detection.threshold"),
        (
            {"audio": {"input": {"turn_detection": {"create_response": 1}}}},
            "session.audio.input.turn_detection.create_response",
        ),
    ],
)
def test_an_update_that_cannot_be_done_changes_nothing(session, param):
    c = client()
    before = c.protocol.config
    error = refused(c.say("session.update", session=session, event_id="e1"))
    assert (error["event_id"], error["param"]) == ("e1", param)
    assert c.protocol.config == before and len(c.inputs) == 1


# ---- speech


def test_a_spoken_turn_and_its_answer_in_the_order_of_openai():
    c = client()
    c.say("session.update", session={"audio": {"input": {"transcription": {"model": "whisper-1"}}}})
    sent = c.hear(TurnStarted(1, 8000, 3200))
    assert sent == [{**sent[0], "type": "input_audio_buffer.speech_started", "audio_start_ms": 200}]
    user = sent[0]["item_id"]
    sent = c.hear(TurnStopped(1, 32000, 24000, "silence"))
    assert kinds(sent) == ["input_audio_buffer.speech_stopped", "input_audio_buffer.committed", *ITEM]
    assert sent[0]["audio_end_ms"] == 1500 and {sent[0]["item_id"], sent[1]["item_id"], sent[2]["item"]["id"]} == {user}
    assert sent[1]["previous_item_id"] is None and sent[2]["previous_item_id"] is None

    assert kinds(c.hear(AnswerStarted(4))) == ["response.created", "rate_limits.updated"]
    sent = c.hear(TextDelta(4, "Two "), TextDelta(4, "balls."), said(4, 0, 0.2))
    deltas = ["response.output_audio_transcript.delta"] * 2 + ["response.output_audio.delta"]
    assert kinds(sent) == MESSAGE + deltas
    message = sent[0]["item"]["id"]
    assert sent[1]["previous_item_id"] == user and sent[3]["part"] == {"type": "audio", "transcript": ""}
    sent = c.hear(InputTranscribed(1, "How many balls?"))
    kind = "conversation.item.input_audio_transcription"
    assert kinds(sent) == [f"{kind}.delta", f"{kind}.completed"] and sent[1]["transcript"] == "How many balls?"
    assert sent[1]["usage"]["input_token_details"] == {"text_tokens": 0, "audio_tokens": 0}, "which @openai/agents-realtime wants"
    assert c.hear(UsageCounted(4, 5, 36, 9, 4)) == []
    sent = c.hear(OutputSent(4, "stop"))
    assert kinds(sent) == ["response.output_audio.delta", *AUDIO_DONE]  # what the resampler kept inside
    response = sent[-1]["response"]
    assert response["status"] == "completed" and response["usage"]["total_tokens"] == 54
    assert response["usage"]["input_token_details"] == {"text_tokens": 5, "audio_tokens": 36, "image_tokens": 9}
    assert c.hear(answered(4, "Two balls.")) == [], "that was said when all was sent, not when all was played"
    assert response["output"] == [sent[-2]["item"]] == [sent[-3]["item"]]
    assert response["output"][0]["content"] == [{"type": "output_audio", "transcript": "Two balls."}]
    assert sent[-3]["previous_item_id"] == user
    for id, words in ((user, "How many balls?"), (message, "Two balls.")):
        item = c.say("conversation.item.retrieve", item_id=id)[0]["item"]
        assert item["content"][0]["transcript"] == words


def test_captions_are_sent_to_who_asks_for_them():
    c = client()
    c.hear(TurnStarted(1, 8000, 3200), TurnStopped(1, 32000, 24000, "silence"))
    assert c.hear(InputTranscribed(1, "Hello.")) == []


def test_a_turn_without_a_caption_says_so_to_who_asks_for_captions():
    c = client()
    c.hear(TurnStarted(1, 8000, 3200), TurnStopped(1, 32000, 24000, "silence"))
    assert c.hear(events.InputTranscriptionFailed(1, "No memory")) == []
    c.say("session.update", session={"audio": {"input": {"transcription": {"model": "whisper-1"}}}})
    sent = c.hear(events.InputTranscriptionFailed(1, "No memory"), events.InputTranscriptionFailed(99, "Nobody"))
    assert kinds(sent) == ["conversation.item.input_audio_transcription.failed"] and sent[0]["error"]["message"] == "No memory"


def test_a_cough_is_no_item():
    c = client()
    c.hear(TurnStarted(1, 8000, 3200))
    assert kinds(c.hear(events.TurnDiscarded(1, 12000))) == ["input_audio_buffer.speech_stopped", "input_audio_buffer.cleared"]
    assert c.hear(InputTranscribed(1, "?")) == []


def test_text_alone():
    c = client()
    c.say("session.update", session={"output_modalities": ["text"]})
    c.say("conversation.item.create", item=text("hello"))
    assert c.inputs[-1] == events.TextInput("hello", ask=False)
    assert kinds(c.say("response.create")) == ["response.created", "rate_limits.updated"]
    assert c.inputs[-1] == events.CreateAnswer()
    sent = c.hear(AnswerStarted(3), TextDelta(3, "Hi"), TextDelta(3, "."), answered(3, "Hi."))
    assert kinds(sent) == MESSAGE + ["response.output_text.delta"] * 2 + TEXT_DONE
    assert sent[-1]["response"]["output"][0]["content"] == [{"type": "output_text", "text": "Hi."}]


def test_what_was_said_and_not_heard_is_not_kept():
    c = client()
    c.hear(AnswerStarted(2), TextDelta(2, "One two three."), said(2, 0, 0.2))
    sent = c.hear(answered(2, "One two three.", "interrupted", 4))
    response = sent[-1]["response"]
    assert response["status"] == "cancelled" and response["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
    assert response["output"][0]["status"] == "incomplete" and response["output"][0]["content"][0]["transcript"] == "One "


def test_an_answer_cut_by_its_length_says_so():
    c = client()
    response = c.hear(AnswerStarted(2), TextDelta(2, "One"), answered(2, "One", "length"))[-1]["response"]
    assert (response["status"], response["status_details"]["reason"]) == ("incomplete", "max_output_tokens")


def test_an_answer_of_no_words():
    c = client()
    sent = c.hear(AnswerStarted(2), answered(2, ""))
    assert kinds(sent) == ["response.created", "rate_limits.updated", "response.done"] and sent[-1]["response"]["output"] == []


def test_cancel():
    c = client()
    error = refused(c.say("response.cancel"))
    assert error["code"] == "response_cancel_not_active" and error["message"].startswith("Cancellation failed")
    response = c.say("response.create", response={"metadata": {"a": "b"}})[0]["response"]
    assert refused(c.say("response.cancel", response_id="other"))["code"] == "response_cancel_not_active"
    assert c.say("response.cancel", response_id=response["id"]) == [] and c.inputs[-1] == events.CancelAnswer()
    done = c.hear(AnswerStarted(2), answered(2, "", "interrupted"))[-1]["response"]
    assert done["status_details"]["reason"] == "client_cancelled" and done["metadata"] == {"a": "b"}


def test_one_response_at_a_time():
    c = client()
    c.say("response.create")
    assert refused(c.say("response.create", event_id="e"))["code"] == "conversation_already_has_active_response"
    c.hear(AnswerStarted(2), answered(2, "x"))
    assert kinds(c.say("response.create"))[0] == "response.created"


def test_a_response_may_have_settings_of_its_own():
    c = client()
    c.say("session.update", session={"instructions": "A"})
    c.inputs.clear()
    given = {"instructions": "B", "output_modalities": ["text"], "max_output_tokens": 7, "metadata": {"k": "v"}}
    response = c.say("response.create", response=given)[0]["response"]
    assert c.inputs == [update_settings(SystemPrompt("B"), max_tokens=7, spoken=False), events.CreateAnswer()]
    assert response["output_modalities"] == ["text"] and response["max_output_tokens"] == 7
    c.inputs.clear()
    done = c.hear(AnswerStarted(2), TextDelta(2, "x"), answered(2, "x"))[-1]["response"]
    assert done["id"] == response["id"] and done["metadata"] == {"k": "v"}
    assert c.inputs == [update_settings(SystemPrompt("A"))]


@pytest.mark.parametrize(
    "given",
    [
        {"conversation": "conv_1"},
        {"temperature": 0.8},
        {"audio": {"input": {}}},
        {"input": {}},
        {"input": [1]},
        {"input": [{"type": "item_reference", "id": "nobody"}]},
        {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text"}]}]},
        {"input": [{"type": "function_call_output", "call_id": "nobody", "output": ""}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "name": "nobody"}},
        {"tool_choice": {"type": "mcp", "server_label": "x"}},
        {"metadata": {"a": 1}},
        {"metadata": {str(n): "" for n in range(17)}},
        {"metadata": {"k" * 65: ""}},
        {"max_output_tokens": 5000},
        {"prompt": {"id": "pmpt_1", "variables": {"a": "b"}}},
        [1],
        "x",
    ],
)
def test_a_response_that_cannot_be_given(given):
    c = client()
    refused(c.say("response.create", response=given))
    assert events.CreateAnswer() not in c.inputs


# ---- push to talk


def test_push_to_talk():
    c = manual()
    c.say("input_audio_buffer.append", audio=pcm(0.3))
    c.say("input_audio_buffer.append", audio=pcm(0.3))
    assert all(isinstance(put, Audio) for put in c.inputs)
    sent = c.say("input_audio_buffer.commit")
    assert kinds(sent) == ["input_audio_buffer.committed", *ITEM]
    item = sent[0]["item_id"]
    assert c.inputs[-1] == events.CommitTurn(ask=False, name=item)
    heard = [put for put in c.inputs if isinstance(put, Audio)]
    assert heard[-1].end == 9600
    assert [put.at for put in heard] == [0, *[put.end for put in heard[:-1]]]
    assert c.hear(TurnStarted(1, 640, 0, item), TurnStopped(1, 9600, 9600, "committed")) == []
    c.hear(InputTranscribed(1, "Hello."))
    assert c.say("conversation.item.retrieve", item_id=sent[0]["item_id"])[0]["item"]["content"][0]["transcript"] == "Hello."
    c.say("conversation.item.delete", item_id=sent[0]["item_id"])
    assert c.inputs[-1] == events.DeleteEntry(1)


def test_a_commit_of_nothing():
    c = manual()
    assert refused(c.say("input_audio_buffer.commit"))["code"] == "input_audio_buffer_commit_empty"
    c.say("input_audio_buffer.append", audio=pcm(0.05))
    assert refused(c.say("input_audio_buffer.commit"))["code"] == "input_audio_buffer_commit_empty"
    c.say("input_audio_buffer.append", audio=pcm(0.06))
    assert kinds(c.say("input_audio_buffer.commit"))[0] == "input_audio_buffer.committed"


def test_what_is_cleared_was_never_said():
    c = manual()
    c.say("input_audio_buffer.append", audio=pcm(0.3))
    assert kinds(c.say("input_audio_buffer.clear")) == ["input_audio_buffer.cleared"] and c.inputs[-1] == events.DiscardTurn()
    assert refused(c.say("input_audio_buffer.commit"))


def test_without_turn_detection_the_session_is_told_that_sound_waits_for_a_commit():
    c = client()
    c.say("session.update", session={"audio": {"input": {"turn_detection": None}}})
    (detection,) = [put.detection for put in c.inputs if isinstance(put, events.UpdateSettings) and put.detection]
    assert detection.buffered and not detection.hands_free
    c.say("session.update", session={"audio": {"input": {"turn_detection": {"type": "server_vad"}}}})
    assert not [put.detection for put in c.inputs if isinstance(put, events.UpdateSettings) and put.detection][-1].buffered


def test_a_stream_may_be_cut_in_the_middle_of_a_sample():
    c, whole = client(), np.arange(4800, dtype="<i2").tobytes()
    for piece in (whole[:1001], whole[1001:1002], whole[1002:6001], whole[6001:]):
        assert c.say("input_audio_buffer.append", audio=base64.b64encode(piece).decode()) == []
    other = client()
    other.say("input_audio_buffer.append", audio=base64.b64encode(whole).decode())
    heard, same = ([put.samples for put in each.inputs if isinstance(put, Audio)] for each in (c, other))
    assert np.allclose(np.concatenate(heard), np.concatenate(same), atol=1e-6)


def test_a_byte_that_waits_for_its_sample_is_cleared_with_the_buffer():
    c = manual()
    c.say("input_audio_buffer.append", audio=base64.b64encode(b"\x01").decode())
    c.say("input_audio_buffer.clear")
    c.say("input_audio_buffer.append", audio=base64.b64encode(bytes(9600)).decode())
    assert not any(put.samples.any() for put in c.inputs if isinstance(put, Audio))


def test_base64_as_it_comes():
    sound = np.full(2401, -1234, "<i2").tobytes()
    plain = base64.b64encode(sound).decode()
    forms = [
        plain.rstrip("="), base64.urlsafe_b64encode(sound).decode(), base64.urlsafe_b64encode(sound).decode().rstrip("="),
        base64.encodebytes(sound).decode(), plain.replace("A", "A\r\n"),
    ]  # fmt: skip
    for form in forms:
        c = client()
        assert c.say("input_audio_buffer.append", audio=form) == [] and isinstance(c.inputs[-1], Audio)
    content = [{"type": "input_image", "image_url": "data:image/jpeg;base64," + base64.encodebytes(JPEG).decode()}]
    c.say("conversation.item.create", item={"type": "message", "role": "user", "content": content})
    assert c.inputs[-1] == events.PictureInput(JPEG)


def test_with_turn_detection_a_commit_ends_the_open_turn():
    c = client()
    assert refused(c.say("input_audio_buffer.commit"))["code"] == "input_audio_buffer_commit_empty"
    c.hear(TurnStarted(1, 8000, 3200))
    assert c.say("input_audio_buffer.commit") == [] and c.inputs[-1] == events.CommitTurn(ask=False)
    assert "input_audio_buffer.committed" in kinds(c.hear(TurnStopped(1, 9000, 9000, "committed")))


def test_uncommitted_audio_is_bounded():
    c = manual()
    for _ in range(LONGEST // 50):
        assert c.say("input_audio_buffer.append", audio=pcm(50)) == []
    c.say("input_audio_buffer.append", audio=pcm(LONGEST % 50 - 1))
    assert refused(c.say("input_audio_buffer.append", audio=pcm(2)))["code"] == "input_audio_buffer_full"
    assert kinds(c.say("input_audio_buffer.commit"))[0] == "input_audio_buffer.committed"


def test_leaving_push_to_talk_forgets_what_was_not_committed():
    c = manual()
    c.say("input_audio_buffer.append", audio=pcm(0.3))
    c.say("session.update", session={"audio": {"input": {"turn_detection": {"type": "server_vad"}}}})
    assert events.DiscardTurn() in c.inputs


@pytest.mark.parametrize("audio", [None, 5, "§", "AAAAA", "AA=A" * 9 + "§", "A" * (AUDIO * 4 // 3 + 8)])
def test_audio_that_is_none(audio):
    c = client()
    refused(c.say("input_audio_buffer.append", audio=audio))
    assert not any(isinstance(put, Audio) for put in c.inputs)


def test_silence_brings_a_turn_of_its_own():
    c = client()
    c.say("session.update", session={"audio": {"input": {"turn_detection": {"type": "server_vad", "idle_timeout_ms": 5000}}}})
    sent = c.hear(events.UserIdle(160_000))
    assert kinds(sent)[:2] == ["input_audio_buffer.timeout_triggered", "input_audio_buffer.committed"]
    assert (sent[0]["audio_start_ms"], sent[0]["audio_end_ms"]) == (5000, 10000)
    assert kinds(sent)[-2:] == ["response.created", "rate_limits.updated"] and c.inputs[-1] == events.CreateAnswer()


# ---- items


def test_items_know_their_place():
    c = client()
    made = [c.say("conversation.item.create", item=text(str(n), id=f"i{n}")) for n in range(3)]
    assert all(kinds(sent) == ITEM for sent in made)
    assert [sent[0]["previous_item_id"] for sent in made] == [None, "i0", "i1"]
    sent = c.say("conversation.item.create", item=text("x", id="ix"), previous_item_id="i0")
    assert [event["previous_item_id"] for event in sent] == ["i0"] * 3
    sent = c.say("conversation.item.create", item=text("y", id="iy"), previous_item_id="root")
    assert [event["previous_item_id"] for event in sent] == [None] * 3
    assert c.say("conversation.item.create", item=text("z"))[0]["previous_item_id"] == "i2"
    assert refused(c.say("conversation.item.create", item=text("z"), previous_item_id="no"))["code"] == "item_not_found"
    error = refused(c.say("conversation.item.create", item=text("z", id="i1")))
    assert (error["code"], error["param"]) == ("item_create_duplicate_item_id", "item.id")


def test_a_picture_with_words():
    c = client()
    content = [{"type": "input_image", "image_url": uri(JPEG)}, {"type": "input_text", "text": "What is it?"}]
    sent = c.say("conversation.item.create", item={"type": "message", "role": "user", "content": content})
    assert c.inputs[-2:] == [events.PictureInput(JPEG), events.TextInput("What is it?", ask=False)]
    assert sent[0]["item"]["content"][0] == {"type": "input_image", "detail": "auto"}


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/x.jpg",
        "file:///etc/passwd",
        "data:image/svg+xml;base64,PHN2Zz4=",
        "data:image/gif;base64,R0lGODlh",
        "data:image/png,raw",
        uri(b"GIF89a"),
        uri(b""),
        "data:image/png;base64,§",
        5,
        None,
        "data:image/png;base64," + "A" * (PICTURE * 4 // 3 + 100),
    ],
)
def test_pictures_that_are_none(address):
    c = client()
    content = [{"type": "input_image", "image_url": address}]
    refused(c.say("conversation.item.create", item={"type": "message", "role": "user", "content": content}))
    assert not any(isinstance(put, events.PictureInput) for put in c.inputs)


def test_sound_as_an_item_is_a_turn_of_its_own():
    c = client()
    content = [{"type": "input_audio", "audio": pcm(1)}]
    sent = c.say("conversation.item.create", item={"type": "message", "role": "user", "content": content})
    assert kinds(sent) == ITEM
    recorded, item = c.inputs[-1], sent[0]["item"]["id"]
    assert isinstance(recorded, events.RecordedInput) and recorded.name == item and len(recorded.samples) == RATE
    assert c.hear(TurnStarted(1, 640, 0, item), TurnStopped(1, RATE, RATE, "committed")) == []
    c.say("conversation.item.delete", item_id=item)
    assert c.inputs[-1] == events.DeleteEntry(1)


def test_sound_that_is_deleted_before_the_session_came_to_it_is_deleted_then():
    c = client()
    content = [{"type": "input_audio", "audio": pcm(1)}]
    c.say("conversation.item.create", item={"type": "message", "role": "user", "id": "i", "content": content})
    c.say("conversation.item.delete", item_id="i")
    c.hear(TurnStarted(1, 640, 0, "i"), TurnStopped(1, RATE, RATE, "committed"))
    assert c.inputs[-1] == events.DeleteEntry(1)


def test_an_item_holds_no_more_sound_than_a_turn():
    c = client()
    c.say("session.update", session={"audio": {"input": {"format": {"type": "audio/pcmu"}}}})
    content = [{"type": "input_audio", "audio": base64.b64encode(bytes(8000 * (LONGEST + 1))).decode()}]
    error = refused(c.say("conversation.item.create", item={"type": "message", "role": "user", "content": content}))
    assert error["param"] == "item.content[0].audio"


def test_history_that_a_client_brings_along():
    c = client()
    part = {"type": "output_text", "text": "Earlier."}
    c.say("conversation.item.create", item={"type": "message", "role": "assistant", "content": [part]})
    assert c.inputs[-1] == events.PastAnswer("Earlier.")
    c.say("session.update", session={"instructions": "A"})
    part = {"type": "input_text", "text": "It is night."}
    c.say("conversation.item.create", item={"type": "message", "role": "system", "content": [part]})
    assert c.inputs[-1] == update_settings(SystemPrompt("A\n\nIt is night."))


@pytest.mark.parametrize(
    "item",
    [
        None, [], {}, {"type": "message"}, {"type": "message", "role": "user"}, {"type": "message", "role": "dog", "content": []},
        {"type": "message", "role": "user", "content": [1]}, {"type": "message", "role": "user", "content": [{"type": "x"}]},
        text(5), text("x" * 40_000), text("\udfff"), text("x", id=5), text("x", id="x" * 100),
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}] * 65},
        {"type": "function_call_output", "call_id": "no", "output": "x"},
        {"type": "function_call", "name": "f", "arguments": "["}, {"type": "function_call", "name": "f", "arguments": "[]"},
        {"type": "function_call", "name": 5, "arguments": "{}"}, {"type": "function_call", "name": "f", "arguments": "NaN"},
        {"type": "item_reference", "id": "x"},
    ],
)  # fmt: skip
def test_items_that_are_none(item):
    c = client()
    refused(c.say("conversation.item.create", item=item))
    assert len(c.inputs) == 1


def test_the_oldest_items_are_forgotten():
    c = client()
    for n in range(1005):
        c.say("conversation.item.create", item=text("x", id=f"i{n}"))
    assert refused(c.say("conversation.item.retrieve", item_id="i4"))["code"] == "item_retrieve_invalid_item_id"
    assert kinds(c.say("conversation.item.retrieve", item_id="i5")) == ["conversation.item.retrieved"]


def test_delete():
    c = client()
    c.hear(AnswerStarted(2))
    sent = c.hear(TextDelta(2, "x"))
    item = sent[0]["item"]["id"]
    c.hear(answered(2, "x"))
    assert kinds(c.say("conversation.item.delete", item_id=item)) == ["conversation.item.deleted"]
    assert c.inputs[-1] == events.DeleteEntry(2)
    for kind in ("delete", "retrieve", "truncate"):
        code = refused(c.say(f"conversation.item.{kind}", item_id=item, **({"audio_end_ms": 0} if kind == "truncate" else {})))[
            "code"
        ]
        assert code == f"item_{kind}_invalid_item_id"


def test_an_item_that_is_deleted_while_it_is_written_goes_when_its_response_is_over():
    c = client()
    c.say("response.create")
    item = c.hear(AnswerStarted(2), TextDelta(2, "x"))[0]["item"]["id"]
    assert c.say("response.cancel") == [] and c.say("conversation.item.delete", item_id=item) == []
    sent = c.hear(answered(2, "x", "interrupted", 0))
    assert kinds(sent)[-2:] == ["response.done", "conversation.item.deleted"] and sent[-1]["item_id"] == item
    assert c.inputs[-1] == events.DeleteEntry(2)


# ---- what was heard


def test_playback_is_counted_from_when_sound_was_sent():
    c = client()
    c.hear(AnswerStarted(2), TextDelta(2, "x"), said(2, 0, 0.3))
    c.inputs.clear()
    for seconds in (0.1, 0.1, 0.5, 0.5):
        c.wait(seconds)
    assert c.inputs == [events.PlaybackPosition(2, 1600), events.PlaybackPosition(2, 3200), events.PlaybackPosition(2, 4800)]
    c.hear(said(2, 4800, 0.2), said(2, 8000, 0.2))
    c.wait(0.3)
    assert c.inputs[-1] == events.PlaybackPosition(2, 9600)
    c.hear(answered(2, "x", "interrupted", 0))
    c.inputs.clear()
    c.wait(9)
    assert c.inputs == []


def test_truncate_says_where_in_the_answer_it_was():
    c = client()
    sent = c.hear(AnswerStarted(2), TextDelta(2, "One two"), said(2, 0, 0.5), said(2, 4000, 0.5))  # taken up again at 250 ms
    item = sent[2]["item"]["id"]
    c.hear(answered(2, "One two"))
    for ms, clamped, sample in ((100, 100, 1600), (500, 500, 4000), (600, 600, 5600), (5000, 1000, 12000), (0, 0, 0)):
        sent = c.say("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=ms)
        assert kinds(sent) == ["conversation.item.truncated"] and sent[0]["audio_end_ms"] == clamped
        assert c.inputs[-1] == events.TruncateAnswer(2, sample)


def test_what_was_truncated_has_no_transcript():
    c = client()
    item = c.hear(AnswerStarted(2), TextDelta(2, "One two"), said(2, 0, 0.5), answered(2, "One two"))[2]["item"]["id"]
    for ms, transcript in ((900, "One two"), (200, None)):
        c.say("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=ms)
        assert c.say("conversation.item.retrieve", item_id=item)[0]["item"]["content"][0]["transcript"] == transcript


def test_truncate_stops_an_answer_that_is_being_given():
    c = client()
    item = c.hear(AnswerStarted(2), TextDelta(2, "One two"), said(2, 0, 0.5))[2]["item"]["id"]
    c.say("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=200)
    assert c.inputs[-1] == events.TruncateAnswer(2, 3200)
    done = c.hear(answered(2, "One two", "interrupted", 3))[-1]["response"]
    assert done["status_details"]["reason"] == "client_cancelled"


@pytest.mark.parametrize("more", [{}, {"audio_end_ms": -1}, {"audio_end_ms": "x"}, {"audio_end_ms": 1, "content_index": 2}])
def test_truncations_that_are_none(more):
    c = client()
    item = c.hear(AnswerStarted(2), TextDelta(2, "x"), said(2, 0, 0.5), answered(2, "x"))[2]["item"]["id"]
    refused(c.say("conversation.item.truncate", item_id=item, **more))
    c.say("conversation.item.create", item=text("x", id="mine"))
    refused(c.say("conversation.item.truncate", item_id="mine", content_index=0, audio_end_ms=5))


def test_playback_forgets_old_items():
    playback = PlaybackClock()
    for n in range(100):
        playback.send(0.0, f"i{n}", n, 0, 160, RATE)
    assert playback.place("i0", 5) is None and playback.place("i99", 5) == (99, 80, 5)


def test_a_response_is_done_when_all_of_it_was_sent_and_its_answer_may_still_be_cut():
    c = client()
    item = c.hear(AnswerStarted(2), TextDelta(2, "One two three."), said(2, 0, 2), OutputSent(2, "stop"))[2]["item"]["id"]
    c.wait(0.5)
    assert c.inputs[-1] == events.PlaybackPosition(2, 8000)
    assert kinds(c.hear(events.OutputCleared(2, 9000))) == ["input_audio_buffer.speech_started"]
    assert kinds(c.say("conversation.item.truncate", item_id=item, audio_end_ms=400)) == ["conversation.item.truncated"]
    assert c.inputs[-1] == events.TruncateAnswer(2, 6400)
    assert c.hear(answered(2, "One two three.", "interrupted", 4)) == []
    assert c.say("conversation.item.retrieve", item_id=item)[0]["item"]["content"][0]["transcript"] is None
    before = len(c.inputs)
    c.wait(5)
    assert len(c.inputs) == before, "nothing is played any more"


def test_what_was_cut_while_it_was_played_is_not_kept():
    c = client()
    item = c.hear(AnswerStarted(2), TextDelta(2, "One two three."), said(2, 0, 2), OutputSent(2, "stop"))[2]["item"]["id"]
    c.hear(events.OutputCleared(2, 9000), answered(2, "One two three.", "interrupted", 4), TurnStarted(5, 30_000, 9000))
    kept = c.say("conversation.item.retrieve", item_id=item)[0]["item"]
    assert kept["status"] == "incomplete" and kept["content"][0]["transcript"] == "One "


def test_who_asks_for_the_next_response_while_one_is_played_gets_it():
    c = client()
    c.hear(AnswerStarted(2), TextDelta(2, "One."), said(2, 0, 2), OutputSent(2, "stop"))
    assert kinds(c.say("response.create"))[0] == "response.created" and c.inputs[-1] == events.CreateAnswer()
    assert c.hear(answered(2, "One.")) == []
    done = c.hear(AnswerStarted(5), TextDelta(5, "Two."), OutputSent(5, "stop"))[-1]["response"]
    assert done["status"] == "completed" and done["output"][0]["content"][0]["transcript"] == "Two."


def test_talk_over_an_answer_is_told_before_it_is_known_to_be_a_turn():
    c = client()
    c.hear(AnswerStarted(2), TextDelta(2, "One two."), said(2, 0, 0.2))
    started = c.hear(events.OutputCleared(2, 9600))[0]
    assert (started["type"], started["audio_start_ms"]) == ("input_audio_buffer.speech_started", 600)
    sent = c.hear(events.FalseInterruption(16_000))
    assert kinds(sent) == ["input_audio_buffer.speech_stopped", "input_audio_buffer.cleared"]
    assert sent[0]["item_id"] == started["item_id"] and sent[0]["audio_end_ms"] == 1000
    assert kinds(c.hear(said(2, 1600, 0.2)))[-1] == "response.output_audio.delta", "the answer goes on"
    item = c.hear(events.OutputCleared(2, 32_000))[0]["item_id"]
    assert kinds(c.hear(answered(2, "One two.", "interrupted", 4)))[-1] == "response.done"
    assert c.hear(TurnStarted(5, 48_000, 31_000)) == []
    assert c.hear(TurnStopped(5, 64_000, 60_000, "silence"))[0]["item_id"] == item


def test_whoever_asks_for_it_gets_sound_as_it_is_played():
    c = client("espeak", "playback")
    words = tuple(events.WordTiming(4 * n, 4 * n + 3, 1600 * n) for n in range(2))
    sent = c.hear(AnswerStarted(2), TextDelta(2, "One two."), replace(said(2, 0, 0.2), words=words))
    assert sent[-1]["words"] == [{"start": 0, "end": 3, "audio_ms": 0}, {"start": 4, "end": 7, "audio_ms": 100}]
    assert kinds(c.hear(events.OutputCleared(2, 9600), events.FalseInterruption(16_000), OutputSent(2, "stop"))) == [
        "attend.cleared"
    ]
    sent = c.hear(replace(said(2, 1600, 0.2), words=words[1:]))  # taken up again at a word
    assert sent[-1]["words"] == [{"start": 4, "end": 7, "audio_ms": 200}]
    assert kinds(c.hear(answered(2, "One two.")))[-1] == "response.done"


@pytest.mark.parametrize("detection", [None, {"type": "server_vad", "interrupt_response": False}])
def test_where_talk_does_not_interrupt_what_was_sent_counts_as_heard(detection):
    c = client()
    c.say("session.update", session={"audio": {"input": {"turn_detection": detection}}})
    c.hear(AnswerStarted(2), TextDelta(2, "One."), said(2, 0, 2))
    assert c.inputs[-1] == events.PlaybackPosition(2, 2 * RATE)
    c.hear(OutputSent(2, "stop"), answered(2, "One."))
    c.inputs.clear()
    c.wait(5)
    assert c.inputs == []


def test_what_is_said_during_an_answer_that_is_not_to_be_interrupted_is_heard_after_it():
    c = client()
    c.say("session.update", session={"audio": {"input": {"turn_detection": {"type": "server_vad", "interrupt_response": False}}}})
    c.hear(AnswerStarted(2))
    c.inputs.clear()
    c.say("input_audio_buffer.append", audio=pcm(0.5))
    c.say(
        "conversation.item.create",
        item={"type": "message", "role": "user", "content": [{"type": "input_audio", "audio": pcm(1)}]},
    )
    c.say("input_audio_buffer.append", audio=pcm(0.5))
    assert [type(put) for put in c.inputs] == [events.RecordedInput], "which waits in the session"
    c.hear(answered(2, "x"))
    assert sum(len(put.samples) for put in c.inputs if isinstance(put, Audio)) > 0.9 * RATE
    c.inputs.clear()
    c.say("response.create")
    c.say("input_audio_buffer.append", audio=pcm(0.5))
    assert not any(isinstance(put, Audio) for put in c.inputs), "an answer that was asked for is not to be interrupted either"
    c.hear(AnswerStarted(4))
    c.inputs.clear()
    c.say("input_audio_buffer.append", audio=pcm(0.5))
    c.say("input_audio_buffer.clear")
    for _ in range(LONGEST // 50 + 1):
        assert c.say("input_audio_buffer.append", audio=pcm(50)) == []
    assert refused(c.say("input_audio_buffer.append", audio=pcm(1)))["code"] == "input_audio_buffer_full"


def test_silence_counts_from_the_end_of_what_is_played():
    c = client()
    detection = {"type": "server_vad", "interrupt_response": False, "idle_timeout_ms": 5000}
    c.say("session.update", session={"audio": {"input": {"turn_detection": detection}}})
    c.hear(AnswerStarted(2), TextDelta(2, "One."), said(2, 0, 3), OutputSent(2, "stop"), answered(2, "One."))
    c.now += 5
    assert c.hear(events.UserIdle(160_000)) == []
    c.wait(2.9)
    assert c.sent[-1]["type"] == "response.done"
    c.wait(0.2)
    assert "input_audio_buffer.timeout_triggered" in kinds(c.sent) and c.inputs[-1] == events.CreateAnswer()


# ---- beside the conversation


def beside(response: dict[str, Any], *told: events.Event) -> list[events.OutOfBandEvent]:
    return [events.OutOfBandEvent(response["id"], event) for event in told]


def test_a_response_beside_the_conversation_leaves_no_items():
    c = client()
    given = {"conversation": "none", "metadata": {"k": "v"}, "instructions": "Sum up.", "output_modalities": ["text"]}
    response = c.say("response.create", response={**given, "max_output_tokens": 9})[0]["response"]
    assert response["conversation_id"] is None and response["metadata"] == {"k": "v"}
    name = response["id"]
    assert c.inputs[-1] == events.CreateOutOfBandResponse(name, None, SystemPrompt("Sum up."), 9, False)
    assert kinds(c.say("response.create"))[0] == "response.created", "the conversation goes on meanwhile"
    told = beside(response, AnswerStarted(3), TextDelta(3, "Two words."), UsageCounted(3, 7, 0, 0, 3), answered(3, "Two words."))
    c.hear(told[0], AnswerStarted(3))
    sent = c.hear(told[1], TextDelta(3, "Hi."), *told[2:])
    ours = [event for event in sent if event.get("response_id") == response["id"] or "response" in event]
    added = ["response.output_item.added", "response.content_part.added", "response.output_text.delta"]
    assert kinds(ours) == [
        *added,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.done",
    ]
    done = ours[-1]["response"]
    assert done["id"] == response["id"] and done["metadata"] == {"k": "v"} and done["usage"]["total_tokens"] == 10
    assert done["output"][0]["content"] == [{"type": "output_text", "text": "Two words."}]
    code = refused(c.say("conversation.item.retrieve", item_id=done["output"][0]["id"]))["code"]
    assert code == "item_retrieve_invalid_item_id"
    assert c.hear(answered(3, "Hi."))[-1]["response"]["output"][0]["content"][0]["transcript"] == "Hi."


def test_a_response_to_items_of_its_own():
    c = client()
    c.say("conversation.item.create", item=text("Earlier.", id="i1"))
    picture = {"type": "input_image", "image_url": uri(JPEG)}
    c.say("conversation.item.create", item={"type": "message", "role": "user", "id": "i2", "content": [picture]})
    c.hear(events.PictureAttached(7, 5, c.inputs[-1].data), TurnStarted(9, 900, 0), TurnStopped(9, 9000, 8000, "silence"))
    spoken = c.sent[-1]["item"]["id"]
    system = {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be brief."}]}
    past = [
        *({"type": "item_reference", "id": id} for id in ("i1", "i2", spoken)),
        text("Now."), {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_audio", "audio": pcm(1)}, picture]}, system,
        {"type": "function_call", "name": "look", "call_id": "c1", "arguments": '{"at": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "a ball"},
    ]  # fmt: skip
    response = c.say("response.create", response={"conversation": "none", "input": past})[0]["response"]
    aside = c.inputs[-1]
    assert isinstance(aside, events.CreateOutOfBandResponse) and aside.past and aside.setting == SystemPrompt("Be brief.")
    told = [part for part in aside.past if not isinstance(part, Audio)]
    assert told == [
        events.TextInput("Earlier.", ask=False), events.EntryReference(7), events.EntryReference(9),
        events.TextInput("Now.", ask=False),
        events.PastAnswer("Yes."), events.PictureInput(JPEG), events.PastAnswer("", ((ToolCall("look", {"at": 1}), "a ball"),)),
    ]  # fmt: skip
    assert [len(part.samples) for part in aside.past if isinstance(part, Audio)] == [RATE]
    c.say("response.cancel", response_id=response["id"])
    assert c.inputs[-1] == events.OutOfBandEvent(response["id"], events.CancelAnswer())
    done = c.hear(*beside(response, AnswerStarted(9), answered(9, "", "interrupted")))[-1]["response"]
    assert done["status_details"]["reason"] == "client_cancelled"


def test_a_response_to_items_of_its_own_may_be_kept():
    c = client()
    response = c.say("response.create", response={"input": []})[0]["response"]
    assert (
        c.inputs[-1] == events.CreateOutOfBandResponse(response["id"], (), SystemPrompt(), None, True)
        and response["conversation_id"]
    )
    assert refused(c.say("response.create"))["code"] == "conversation_already_has_active_response"
    sent = c.hear(*beside(response, AnswerStarted(9), TextDelta(9, "Hi."), said(9, 0, 0.5)))
    assert "conversation.item.added" in kinds(sent)
    assert c.inputs[-1] == events.OutOfBandEvent(response["id"], events.PlaybackPosition(9, RATE // 2))
    c.hear(*beside(response, answered(9, "Hi.")))
    assert c.inputs[-1] == events.PastAnswer("Hi.")


def test_not_too_many_beside_the_conversation():
    c = client()
    made = [c.say("response.create", response={"conversation": "none"})[0]["response"] for _ in range(4)]
    assert refused(c.say("response.create", response={"conversation": "none"}))["code"] == "too_many_responses"
    c.hear(*beside(made[1], answered(9, "", "failed")))
    assert kinds(c.say("response.create", response={"conversation": "none"}))[0] == "response.created"


# ---- functions


def test_calls_that_a_client_brings_along():
    c = client()
    call = {"type": "function_call", "name": "look", "call_id": "c1", "arguments": '{"at": "left"}'}
    sent = c.say("conversation.item.create", item=call)
    assert kinds(sent) == ITEM and sent[0]["item"]["arguments"] == '{"at": "left"}'
    assert refused(c.say("conversation.item.create", item=call))["param"] == "item.call_id"
    assert len(c.inputs) == 1, "the model hears of it with its result"
    c.say("conversation.item.create", item={"type": "function_call_output", "call_id": "c1", "output": "a ball"})
    assert c.inputs[-1] == events.PastAnswer("", ((ToolCall("look", {"at": "left"}), "a ball"),))


TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("chosen", "calls", "known"),
    [
        ("auto", (), True),
        ("none", (), False),
        ("required", ("look", "point"), True),
        ({"type": "function", "name": "point"}, ("point",), True),
    ],
)
def test_tools_are_chosen(chosen, calls, known):
    c = client()
    tools = [TOOL, {**TOOL, "name": "point"}]
    session = c.say("session.update", session={"tools": tools, "tool_choice": chosen})[0]["session"]
    assert session["tool_choice"] == chosen
    assert c.inputs[-1] == update_settings(SystemPrompt(tools=tuple(tools)) if known else None, calls=calls)
    c.say("response.create", response={"tool_choice": {"type": "function", "name": "look"}})
    assert c.inputs[-2].calls == ("look",) and c.inputs[-1] == events.CreateAnswer()
    c.hear(AnswerStarted(3), answered(3, "x"))
    assert c.inputs[-1].calls == calls
    assert refused(c.say("session.update", session={"tools": [], "tool_choice": "required"}))


def test_a_result_after_an_interruption_is_handed_on():
    c = client()
    item = c.hear(AnswerStarted(3), ToolCalled(3, 5, ToolCall("f", {})), ToolCalled(3, 6, ToolCall("g", {})))
    calls = [event["item"]["call_id"] for event in item if event["type"] == "response.output_item.done"]
    output = {"type": "function_call_output", "output": "x"}
    c.say("conversation.item.create", item={**output, "call_id": calls[0]})
    assert events.ToolResult(5, "x") not in c.inputs
    c.hear(answered(3, "", "interrupted"))
    assert c.inputs[-1] == events.ToolResult(5, "x")
    c.say("conversation.item.create", item={**output, "call_id": calls[1]})
    assert c.inputs[-1] == events.ToolResult(6, "x")


def test_a_call_ends_a_response_and_its_result_begins_the_next():
    c = client()
    c.say("response.create", response={"metadata": {"n": "1"}})
    c.hear(AnswerStarted(3))
    sent = c.hear(TextDelta(3, "Wait."), ToolCalled(3, 5, ToolCall("look", {"at": "ä"})))
    call = ["response.output_item.added", "conversation.item.added", "conversation.item.created"]
    call += ["response.function_call_arguments.delta", "response.function_call_arguments.done"]
    call += ["conversation.item.done", "response.output_item.done", "response.done"]
    assert kinds(sent) == [*MESSAGE, "response.output_audio_transcript.delta", *AUDIO_DONE[:-1], *call]
    output = sent[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call"] and output[1]["arguments"] == '{"at": "ä"}'
    assert sent[-1]["response"]["status"] == "completed"
    assert c.hear(said(3, 0, 0.2)) == []  # the voice is not so fast: its sound comes with the next response

    result = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "a ball"}
    assert kinds(c.say("conversation.item.create", item=result)) == ITEM
    assert not any(isinstance(put, events.ToolResult) for put in c.inputs)
    sent = c.say("response.create")
    assert kinds(sent) == ["response.created", "rate_limits.updated", *MESSAGE, "response.output_audio.delta"]
    assert events.ToolResult(5, "a ball") in c.inputs
    done = c.hear(TextDelta(3, "A ball."), answered(3, "Wait.A ball."))[-1]["response"]
    assert done["output"][0]["content"][0]["transcript"] == "A ball." and done["metadata"] is None


def test_calls_of_one_breath_are_one_response():
    c = client()
    sent = c.hear(AnswerStarted(3), ToolCalled(3, 5, ToolCall("f", {}), more=1), ToolCalled(3, 6, ToolCall("g", {})))
    assert kinds(sent).count("response.done") == 1
    items = sent[-1]["response"]["output"]
    assert [item["name"] for item in items] == ["f", "g"]
    c.say("conversation.item.create", item={"type": "function_call_output", "call_id": items[1]["call_id"], "output": "{}"})
    c.say("response.create")
    told = [put for put in c.inputs if isinstance(put, events.ToolResult)]
    assert told == [events.ToolResult(5, {"error": "there is no result"}), events.ToolResult(6, "{}")]


def test_a_result_that_nobody_waits_for_any_more():
    c = client()
    call = c.hear(AnswerStarted(3), ToolCalled(3, 5, ToolCall("f", {})))[-1]["response"]["output"][0]["call_id"]
    assert c.hear(answered(3, "", "interrupted")) == []
    result = {"type": "function_call_output", "call_id": call, "output": "late"}
    assert kinds(c.say("conversation.item.create", item=result)) == ITEM and c.inputs[-1].value == "late"
    c.say("response.create")
    assert c.inputs[-1] == events.CreateAnswer()


# ---- sound


@pytest.mark.parametrize("kind", ["audio/pcmu", "audio/pcma"])
def test_g711_keeps_what_it_can_say(kind):
    format = Format(kind, 8000)
    every = bytes(range(256))
    assert np.isin(np.frombuffer(format.encode(format.decode(every)), np.uint8) ^ np.frombuffer(every, np.uint8), [0, 0x80]).all()
    samples = np.linspace(-1, 1, 65536, dtype=np.float32).clip(-1, 32767 / 32768)
    wrong = np.abs(format.decode(format.encode(samples)) - samples)
    assert (wrong <= np.abs(samples) / 32 + 0.0005).all()


@pytest.mark.parametrize(
    ("kind", "code", "value"),
    [
        ("audio/pcmu", 0x00, -32124),
        ("audio/pcmu", 0xFF, 0),
        ("audio/pcmu", 0x80, 32124),
        ("audio/pcma", 0xD5, 8),
        ("audio/pcma", 0xAA, 32256),
    ],
)
def test_g711_by_the_book(kind, code, value):
    assert Format(kind, 8000).decode(bytes([code])) * 32768 == value


@pytest.mark.parametrize(
    ("given", "echo"),
    [
        ({"type": "audio/pcm", "rate": 24000}, {"type": "audio/pcm", "rate": 24000}),
        ({"type": "audio/pcm"}, {"type": "audio/pcm", "rate": 24000}),
        ({"type": "audio/pcm", "rate": 16000}, {"type": "audio/pcm", "rate": 16000}),
        ({"type": "audio/pcmu"}, {"type": "audio/pcmu"}),
        ({"type": "audio/pcma"}, {"type": "audio/pcma"}),
    ],
)
def test_a_second_of_sound_stays_a_second_in_any_format(given, echo):
    c = client(strict=given.get("rate") != 16000)  # the types know 24,000 alone
    format = Format(given["type"], given.get("rate") or Format.rates(given["type"])[0])
    sent = c.say("session.update", session={"audio": {"input": {"format": given}, "output": {"format": given}}})
    assert sent[0]["session"]["audio"]["input"]["format"] == sent[0]["session"]["audio"]["output"]["format"] == echo
    wave = (0.5 * np.sin(np.arange(format.rate) * 2 * np.pi * 440 / format.rate)).astype(np.float32)
    c.inputs.clear()
    for part in np.array_split(wave, 10):
        c.say("input_audio_buffer.append", audio=base64.b64encode(format.encode(part)).decode())
    heard = np.concatenate([put.samples for put in c.inputs if isinstance(put, Audio)])
    assert 0.9 * RATE < len(heard) <= RATE and abs(np.abs(heard[2000:-2000]).max() - 0.5) < 0.02
    tone = (0.5 * np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE)).astype(np.float32)
    c.hear(AnswerStarted(2), TextDelta(2, "x"), *(AudioDelta(2, n * 1600, tone[n * 1600 :][:1600], RATE) for n in range(10)))
    c.hear(answered(2, "x"))
    back = b"".join(base64.b64decode(event["delta"]) for event in c.sent if event["type"] == "response.output_audio.delta")
    assert len(back) == format.rate * format.width
    spectrum = np.abs(np.fft.rfft(format.decode(back)))
    assert spectrum.argmax() == 440


def test_resampling_in_pieces_is_resampling_at_once():
    wave = np.sin(np.arange(24_000) / 7).astype(np.float32) / 2
    pieces, whole = Resampler(24_000, RATE), Resampler(24_000, RATE)
    got = np.concatenate([*(pieces.push(part) for part in np.array_split(wave, 13)), pieces.flush()])
    assert np.allclose(got, whole.push(wave, last=True), atol=1e-6)


# ---- our own


def test_extensions_are_for_who_asks():
    c = client()
    assert refused(c.say("attend.camera.frame", image_url=uri(JPEG)))
    looked = events.PictureAttached(5, 4, JPEG)
    mark = events.MarkAdded(6, 5, Mark((1, 2, 3, 4), "ball"))
    timed = events.AnswerTimings(6, {"first_token": 12.5}, 3)
    assert c.hear(looked, AnswerStarted(6)) and c.hear(mark, timed) == []

    c = client("espeak", "camera", "marks", "timeline")
    assert c.say("attend.camera.frame", image_url=uri(JPEG), frame_id="f1") == []
    show = c.inputs[-1]
    assert isinstance(show, events.PictureInput) and show.live
    assert c.hear(events.PictureAttached(5, 4, show.data)) == [
        {"type": "attend.camera.looked", "event_id": c.sent[-1]["event_id"], "frame_id": "f1"}
    ]
    c.hear(AnswerStarted(6))
    sent = c.hear(mark, timed)
    assert sent[0]["frame_id"] == "f1" and sent[0]["mark"] == {"box_2d": [1, 2, 3, 4], "label": "ball"}
    assert sent[1]["stages_ms"] == {"first_token": 12.5}


def test_words_stand_in_the_sound_as_it_is_sent():
    c = client("espeak", "playback")
    c.hear(AnswerStarted(6), TextDelta(6, "Yes, a star. "))
    one = AudioDelta(
        6, 0, np.zeros(RATE // 2, np.float32), RATE, (events.WordTiming(0, 3, 0), events.WordTiming(5, 6, RATE // 4))
    )
    sent = c.hear(one)
    item = next(event["item_id"] for event in sent if event["type"] == "attend.words")
    assert sent[-1]["words"] == [{"start": 0, "end": 3, "audio_ms": 0}, {"start": 5, "end": 6, "audio_ms": 250}]
    assert c.hear(events.OutputCleared(6))[-1]["item_id"] == item
    again = AudioDelta(6, RATE // 4, np.zeros(RATE // 4, np.float32), RATE, (events.WordTiming(5, 6, RATE // 4),))
    assert c.hear(again)[-1]["words"] == [{"start": 5, "end": 6, "audio_ms": 500}]  # taken up: the word is sent once more
    c = client()
    assert "attend.words" not in kinds(c.hear(AnswerStarted(6), TextDelta(6, "Yes, a star. "), one, events.OutputCleared(6)))


def test_what_merely_deserves_saying_is_no_error():
    c, told = client(), client("espeak", "notes")
    note, refusal = events.Notice("the voice is lost"), events.Notice("the picture is broken", refused=True)
    assert c.hear(note) == [] and [(e["type"], e["message"]) for e in told.hear(note)] == [("attend.note", "the voice is lost")]
    assert refused(c.hear(refusal))["message"] == "the picture is broken"


def test_nothing_that_was_cleared_counts_as_heard():
    for extension in ("playback", "marks"):
        c = client("espeak", extension)
        c.hear(AnswerStarted(6), TextDelta(6, "Yes."), said(6, 0, 0.5), events.OutputCleared(6))
        c.wait(1)
        assert not [e for e in c.inputs if isinstance(e, events.PlaybackPosition)]
