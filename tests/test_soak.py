"""Hours of talk in minutes: conversations one after the other over a real socket, and memory stays where it was.

`python -m tests.test_soak 30` talks for 30 simulated minutes: of sound that is spoken and of answers that are played.
"""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from statistics import median
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from agent import checkpoint
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from streams.voice import open_voice
from tests.serving import DEMO, plain, question, say, serving, text, until
from tests.test_faults import resident

PICTURE = "data:image/jpeg;base64," + base64.b64encode((DEMO / "picture.jpg").read_bytes()).decode()
LONG = 5.0  # simulated minutes of a conversation; then another begins


class Talker:
    """`seconds` of sound that were said and answered so far."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection, self.seconds, self.answers = connection, 0.0, 0

    async def done(self) -> dict[str, Any]:
        response: dict[str, Any] = {"id": None}
        for event in await until(self.connection, "response.done"):
            if event["type"] == "response.output_audio.delta":
                self.seconds += len(event["delta"]) * 3 / 4 / 48_000
            response = event.get("response", response)
        self.answers += 1
        return response

    async def speak(self) -> None:
        for piece in question():
            await say(self.connection, "input_audio_buffer.append", audio=piece)
            self.seconds += 0.1

    async def spoken(self) -> None:
        await self.speak()
        await self.done()

    async def shown(self) -> None:
        content = [{"type": "input_image", "image_url": PICTURE}]
        await say(self.connection, "conversation.item.create", item={"type": "message", "role": "user", "content": content})
        await self.spoken()

    async def typed(self) -> None:
        await say(self.connection, "conversation.item.create", item=text("how many squares are there"))
        await say(self.connection, "response.create")
        await self.done()

    async def truncated(self) -> None:
        await say(self.connection, "response.create")
        output = (await self.done())["output"]
        if output:
            await say(self.connection, "conversation.item.truncate", item_id=output[0]["id"], content_index=0, audio_end_ms=300)

    async def cancelled(self) -> None:
        await say(self.connection, "response.create")
        await say(self.connection, "response.cancel")
        await self.done()

    async def beside(self) -> None:
        given = {"conversation": "none", "input": [text("who are you")], "output_modalities": ["text"]}
        await say(self.connection, "response.create", response=given)
        await self.done()


async def soak(minutes: float, sample: Any = lambda *_: None) -> list[int]:
    """MiB that this process held after each simulated minute."""
    held: list[int] = []
    seconds = 0.0
    acts = ("shown", "typed", "spoken", "truncated", "spoken", "beside", "spoken", "cancelled")
    with Engine(checkpoint.load("nano"), rows=2, length=2048) as engine:
        async with serving(engine, open_voice("espeak"), settings=ConversationConfig(seed=0), patience=None) as port:
            while seconds < minutes * 60:
                async with plain(port, "?model=nano") as connection:
                    talker, act = Talker(connection), 0
                    while talker.seconds < LONG * 60 and seconds + talker.seconds < minutes * 60:
                        await getattr(talker, acts[act % len(acts)])()
                        act += 1
                        if (seconds + talker.seconds) // 60 >= len(held) + 1:
                            held.append(resident())
                            sample(len(held), held[-1], talker.answers)
                    seconds += talker.seconds
    return held


def flat(held: list[int], most: int) -> bool:
    """The last quarter is where the second was: by then all that is kept once is there."""
    quarter = max(1, len(held) // 4)
    return median(held[-quarter:]) - median(held[quarter : 2 * quarter]) <= most


@pytest.mark.slow
async def test_minutes_of_talk_leave_memory_where_it_was():
    held = await soak(4)
    assert len(held) >= 4 and flat(held, 24), held


def main() -> None:
    begun = time.monotonic()
    minutes = float(sys.argv[1])
    held = asyncio.run(
        soak(minutes, lambda n, mib, count: print(f"minute {n}: {mib} MiB, answer {count} of its conversation", flush=True))
    )
    print(f"{minutes:g} simulated minutes in {time.monotonic() - begun:.0f} s; {'flat' if flat(held, 24) else 'NOT flat'}")


if __name__ == "__main__":
    main()
