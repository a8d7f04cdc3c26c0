"""A client's events of every kind, and what becomes of them where someone has been at them; and pictures that are bombs."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from tests.talk import jpeg

SOUND = base64.b64encode(bytes(9600)).decode()
PICTURE = "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()
TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"at": {}}}}
ITEMS: list[dict[str, Any]] = [
    {
        "type": "message",
        "role": "user",
        "content": [
            {"type": "input_text", "text": "hello"},
            {"type": "input_image", "image_url": PICTURE, "detail": "low"},
            {"type": "input_audio", "audio": SOUND, "transcript": "hm"},
        ],
    },
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hello"}]},
    {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be kind."}]},
    {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 1}'},
    {"type": "function_call_output", "call_id": "c1", "output": "{}"},
]
DETECTION = {
    "type": "server_vad",
    "threshold": 0.5,
    "prefix_padding_ms": 300,
    "silence_duration_ms": 500,
    "idle_timeout_ms": 6000,
}
SESSION = {
    "type": "realtime",
    "instructions": "Be brief.",
    "output_modalities": ["audio"],
    "max_output_tokens": 100,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "name": "look"},
    "audio": {
        "input": {
            "format": {"type": "audio/pcm", "rate": 24_000},
            "transcription": {"model": "x", "language": "en"},
            "turn_detection": DETECTION | {"create_response": True, "interrupt_response": True},
        },
        "output": {"format": {"type": "audio/pcmu"}, "voice": "x", "speed": 1.0},
    },
}
RESPONSE = {
    "conversation": "none",
    "metadata": {"a": "b"},
    "input": [*ITEMS, {"type": "item_reference", "id": "i1"}],
    "instructions": "Be brief.",
    "output_modalities": ["text"],
    "max_output_tokens": "inf",
    "tools": [TOOL],
    "tool_choice": "none",
}
EVENTS: list[dict[str, Any]] = [
    {"type": "session.update", "session": SESSION},
    {"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "low"}}}}},
    {"type": "input_audio_buffer.append", "audio": SOUND},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
    *(
        {"type": "conversation.item.create", "previous_item_id": "root", "item": {"id": f"i{n}", **i}}
        for n, i in enumerate(ITEMS)
    ),
    {"type": "conversation.item.retrieve", "item_id": "i1"},
    {"type": "conversation.item.truncate", "item_id": "i1", "content_index": 0, "audio_end_ms": 10},
    {"type": "conversation.item.delete", "item_id": "i1"},
    {"type": "response.create", "response": RESPONSE},
    {"type": "response.cancel", "response_id": "r1"},
    {"type": "attend.camera.frame", "frame_id": "f", "image_url": PICTURE},
]

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["\ud800", "x" * 70_000, 10**400, [[[]]], {"a": {"a": {}}}, "data:image/png;base64,", "AAA=", "<|turn>", [], {}]
    ),
)


@st.composite
def messages(draw: st.DrawFn) -> str:
    """An event in which up to three values are others, are gone, or are called otherwise."""
    event: dict[str, Any] = {"event_id": "e", **copy.deepcopy(draw(st.sampled_from(EVENTS)))}
    for _ in range(draw(st.integers(1, 3))):
        at: Any = event
        while True:
            if not at:
                break
            keys = list(at) if isinstance(at, dict) else range(len(at))
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and draw(st.integers(0, 3)):
                at = at[key]
                continue
            match draw(st.sampled_from(["other", "gone", "more"])):
                case "other":
                    at[key] = copy.deepcopy(draw(LEAVES))  # the leaves are shared by all examples
                case "gone":
                    del at[key]
                case "more" if isinstance(at, dict):
                    at[draw(st.text(max_size=9))] = copy.deepcopy(draw(LEAVES))
                case "more":
                    at.append(copy.deepcopy(draw(LEAVES)))
            break
    return draw(st.sampled_from([str, lambda text: text[:-1]]))(json.dumps(event))


def bombs() -> Iterator[str]:
    """As data: URIs: pictures of gigapixels in a few bytes, a thousand frames, entities of entities, and some that are broken."""

    def png(width: int, height: int) -> bytes:
        def chunk(kind: bytes, body: bytes) -> bytes:
            return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

        head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")

    def gif(frames: int) -> bytes:
        frame = b"\x2c\0\0\0\0\xff\xff\xff\xff\0\x08\x02\x84\x51\0"
        return b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + frame * frames + b";"

    jpeg = b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\1\x11\0\2\x11\1\3\x11\1" + bytes(99)
    webp = b"RIFF\x16\0\0\0WEBPVP8X\x0a" + bytes(7) + b"\xff\xff\xff" * 2
    laughs = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(9))
    svg = f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY l0 "ha">{laughs}]><svg width="60000" height="60000">&l9;</svg>'.encode()
    broken = [png(1, 1)[:40], b"\xff\xd8\xff" + bytes(99), b"RIFF" + bytes(40)]
    called = [("png", one) for one in (png(60_000, 60_000), png(1 << 31, 1), *broken)] + [("jpeg", jpeg), ("webp", webp)]
    for one in (gif(1), gif(999), svg, gzip.compress(svg)):
        called += [(kind, one) for kind in ("gif", "svg+xml", "png", "jpeg")]  # also under a name that is taken
    for kind, one in called:
        yield f"data:image/{kind};base64,{base64.b64encode(one).decode()}"
