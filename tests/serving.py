"""A real server on a real socket for tests, whose model says what it is told, and clients of it."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from openai import AsyncOpenAI
from websockets.asyncio.client import ClientConnection, connect

from agent import checkpoint
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.view import Budget
from model.vad import Vad
from streams.media_files import read_audio
from tests.talk import Beeps, Mind, tiny
from web.server import Options, Server

LOADED = tiny(640)
VAD = Vad()
DEMO = Path(checkpoint.__file__).parents[1] / "model/nano/demo"
TEN = "one two three four five six seven eight nine ten."
SETTINGS = ConversationConfig(budget=Budget(ahead=3000, row=3000), max_tokens=60, sampling=LOADED.generation)


def fast() -> float:
    """A clock by which a second of sound is played in a fiftieth."""
    return time.monotonic() * 50


@asynccontextmanager
async def serving(engine: Engine, voice: Any = "beeps", patience: float | None = 120, **options: Any) -> AsyncIterator[int]:
    given = {"port": 0, "settings": SETTINGS, "clock": fast, "voice": "beeps", **options}
    async with (
        asyncio.timeout(patience),
        Server(engine, VAD, Beeps() if voice == "beeps" else voice, Options(**given)).open() as port,
    ):
        yield port


def stock(port: int) -> Any:
    client = AsyncOpenAI(api_key="anything", websocket_base_url=f"ws://127.0.0.1:{port}/v1", base_url="http://localhost")
    return client.realtime.connect(model="nano")


def plain(port: int, query: str = "", **more: Any) -> connect:
    return connect(f"ws://127.0.0.1:{port}/v1/realtime{query}", compression=None, proxy=None, **more)


async def say(connection: ClientConnection, type: str, **fields: Any) -> None:
    await connection.send(json.dumps({"type": type, **fields}))


async def until(connection: ClientConnection, type: str) -> list[dict[str, Any]]:
    """All events up to the first of this type."""
    heard: list[dict[str, Any]] = []
    while not heard or heard[-1]["type"] != type:
        heard.append(json.loads(await connection.recv()))
    return heard


async def works(port: int, mind: Mind) -> None:
    """A fresh conversation, from a question to its answer."""
    mind.says("Yes.")
    async with plain(port) as connection:
        await say(connection, "conversation.item.create", item=text("Well?"))
        await say(connection, "response.create", response={"output_modalities": ["text"]})
        done = (await until(connection, "response.done"))[-1]["response"]
        assert done["status"] == "completed" and done["output"][0]["content"][0]["text"] == "Yes."


async def free(engine: Engine, rows: int = 2) -> None:
    while engine.free < rows:
        await asyncio.sleep(0)


async def get(port: int, target: str, *headers: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    """Status and all that came, by hand: a client would mend what is wrong."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host or f'127.0.0.1:{port}'}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]), answer


def text(words: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": words}]}


def question(silence: float = 1.0, rate: int = 24_000) -> list[str]:
    """The demo's spoken question and silence after it, in pieces of 100 ms, as base64."""
    heard = np.concatenate(
        [np.zeros(8000, np.float32), read_audio(DEMO / "question.wav"), np.zeros(round(silence * 16_000), np.float32)]
    )
    pcm = (soxr.resample(heard, 16_000, rate).clip(-1, 1) * 32767).astype("<i2").tobytes()
    return [base64.b64encode(pcm[at : at + rate // 5]).decode() for at in range(0, len(pcm), rate // 5)]


UPGRADE = (
    "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)  # fmt: skip
