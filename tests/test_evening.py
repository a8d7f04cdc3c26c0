"""A long evening at the door of this machine, as fast as it goes: silence, talk and noise, with nano."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agent import checkpoint
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.session import Session
from agent.talk import door
from agent.talk.terminal import Terminal
from model.vad import Vad
from streams.echo import EchoCanceller
from streams.frames import FRAME, RATE
from streams.media_files import read_audio
from streams.voice import open_voice

DEMO = Path(checkpoint.__file__).parents[1] / "model/nano/demo"


class Evening:
    """A microphone by which minutes pass: in each a question, half a minute of silence, and noise that nobody means."""

    overflows = dropped = 0
    device = SimpleNamespace(cancels=False)

    def __init__(self, minutes: int) -> None:
        self.minutes, self.memory = minutes, list[int]()
        self.ready: Any = None

    async def frames(self) -> AsyncIterator[np.ndarray]:
        rng, question = np.random.default_rng(0), read_audio(DEMO / "question.wav")
        for _ in range(self.minutes):
            minute = 1e-4 * rng.standard_normal(60 * RATE)
            minute[RATE : RATE + len(question)] += question
            minute[40 * RATE : 50 * RATE] += 0.05 * rng.standard_normal(10 * RATE)
            for frame in minute.clip(-1, 1).astype(np.float32).reshape(-1, FRAME):
                await self.ready()
                yield frame
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") >> 10)

    async def close(self) -> None:
        pass


class Ear:
    """A speaker that plays all it is given at once."""

    heard: tuple[int, int] | None = None

    def play(self, of: int, sample: int, pcm: np.ndarray, rate: int) -> None:
        self.heard = of, sample + len(pcm)

    def clear(self) -> None:
        pass

    async def keep_open(self) -> None:
        await asyncio.Event().wait()


async def evening(minutes: int) -> tuple[list[int], str]:
    """KiB after each minute, and what was printed."""
    loaded, out = checkpoint.load("nano"), io.StringIO()
    microphone = Evening(minutes)
    with Engine(loaded) as engine, Terminal(out, lively=False) as terminal:
        session = Session(engine, Vad(), open_voice("espeak"), ConversationConfig())

        async def ready() -> None:
            await asyncio.sleep(0)
            while session.record.row.waiting > 4 or session.record.captions:
                await asyncio.sleep(0.001)

        microphone.ready = ready
        conversation = door.RoomConversation(terminal, door.Devices(microphone, Ear(), EchoCanceller()))  # type: ignore[arg-type]
        await conversation.run(session)
        assert conversation.failed is None
    return microphone.memory, out.getvalue()


@pytest.mark.slow
async def test_an_evening_takes_no_more_memory_than_its_first_minutes():
    memory, printed = await evening(6)
    assert printed.count("attend   ") == 6 and printed.count("you ") == 6
    assert max(memory[3:]) - memory[2] < 8 << 10, memory  # a minute of sound alone is 1.9 MiB


if __name__ == "__main__":
    told, _ = asyncio.run(evening(int(sys.argv[1])))
    print("minute: MiB", {n: told[n] >> 10 for n in range(0, len(told), max(1, len(told) // 12))}, "last", told[-1] >> 10)
