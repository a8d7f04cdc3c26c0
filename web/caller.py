"""A client of the protocol, as it stands behind `Session.run`: for whoever measures a server as its clients know it."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from agent import events
from agent.events import Event, Input
from agent.marks import Mark
from streams.frames import RATE, Audio
from web.audio import PCM, Resampler

WORD = PCM.rate * 2 // 5  # samples that a word takes, about: the protocol has no times of words
Emit = Callable[[Event], Awaitable[None]]


class Caller:
    """One conversation with the server at `url`. What it takes from its door is what a session takes, of speech, pictures and
    typed words; what it tells is what a client can know. Times are in milliseconds after word came that the turn is over;
    "speech_end" is when the last word left here."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.lost: str | None = None  # why the conversation ended before its door had said everything
        self._url, self._headers = url, {"Authorization": f"Bearer {token}"} if token else {}
        self._resampler = Resampler(RATE, PCM.rate)
        self._sent: deque[tuple[int, float]] = deque(maxlen=2000)  # ends of pieces of sound, and when they went
        self._numbers: dict[str, int] = {}  # of items and responses
        self._answer: int | None = None  # the one that is told or played
        self._item, self._finish = "", ""
        self._text, self._told, self._heard = "", 0, 0  # of it: words, samples that came, samples that were played
        self._stopped = 0.0  # when the turn was over
        self._stages: dict[str, float] = {}

    async def run(self, inputs: AsyncIterator[Input], emit: Emit) -> None:
        try:
            async with connect(self._url, additional_headers=self._headers, compression=None, max_size=None) as line:
                await self._say(line, "session.update", session={"audio": {"input": {"transcription": {"model": "attend"}}}})
                read = asyncio.create_task(self._read(line, emit))
                try:
                    async for item in inputs:
                        if read.done():
                            await read
                            break
                        await self._take(line, item, emit)
                finally:
                    read.cancel()
                    with suppress(asyncio.CancelledError, ConnectionClosed):
                        await read
        except (ConnectionClosed, InvalidHandshake, OSError) as error:
            self.lost = str(error)
            await emit(events.Failed(f"the conversation with {self._url} is over: {error}"))

    async def _say(self, line: ClientConnection, type: str, **fields: Any) -> None:
        await line.send(json.dumps({"type": type, **fields}))

    async def _take(self, line: ClientConnection, item: Input, emit: Emit) -> None:
        match item:
            case Audio():
                pcm = PCM.encode(self._resampler.push(item.samples))
                await self._say(line, "input_audio_buffer.append", audio=base64.b64encode(pcm).decode())
                self._sent.append((item.at + len(item.samples), time.monotonic()))
            case events.Show():
                url = "data:image/jpeg;base64," + base64.b64encode(item.data).decode()
                await self._create(line, {"type": "input_image", "image_url": url})
            case events.Write():
                await self._create(line, {"type": "input_text", "text": item.text})
                if item.ask:
                    await self._say(line, "response.create")
            case events.Heard(answer, sample) if answer == self._answer:
                self._heard = sample
                await self._over(emit)

    async def _create(self, line: ClientConnection, part: dict[str, Any]) -> None:
        await self._say(line, "conversation.item.create", item={"type": "message", "role": "user", "content": [part]})

    async def _read(self, line: ClientConnection, emit: Emit) -> None:
        async for message in line:
            event = json.loads(message)
            match event["type"]:
                case "input_audio_buffer.speech_started":
                    await self._interrupt(line, emit)
                    await emit(events.Started(self._number(event["item_id"]), 0, event["audio_start_ms"] * RATE // 1000))
                case "input_audio_buffer.speech_stopped":
                    await self._stop(event, emit)
                case "conversation.item.input_audio_transcription.completed":
                    await emit(events.Captioned(self._number(event["item_id"]), event["transcript"]))
                case "response.created":
                    self._answer = self._number(event["response"]["id"])
                    self._text, self._finish, self._told, self._heard = "", "", 0, 0
                    await emit(events.Answering(self._answer))
                case "response.output_audio_transcript.delta" | "response.output_text.delta":
                    self._reached("first_token")
                    self._text += event["delta"]
                case "response.output_audio.delta":
                    await self._sound(event, emit)
                case "attend.mark" if self._answer is not None:
                    mark = event["mark"]
                    await emit(events.Marked(self._answer, None, Mark(tuple(mark["box_2d"]), mark["label"])))
                case "response.done":
                    status = event["response"]["status"]
                    self._finish = {"completed": "stop", "incomplete": "length", "cancelled": "interrupted"}.get(status, "failed")
                    await self._over(emit)
                case "error":
                    await emit(events.Noted(event["error"]["message"]))

    async def _stop(self, event: dict[str, Any], emit: Emit) -> None:
        end, now = event["audio_end_ms"] * RATE // 1000, time.monotonic()
        left = next((at for sample, at in self._sent if sample >= end), now)
        self._stopped, self._stages = now, {"speech_end": (left - now) * 1000}
        await emit(events.Stopped(self._number(event["item_id"]), 0, end, "silence"))

    async def _sound(self, event: dict[str, Any], emit: Emit) -> None:
        if self._answer is None:  # it was interrupted
            return
        self._reached("first_sound")
        self._item = event["item_id"]
        pcm = PCM.decode(base64.b64decode(event["delta"]))
        first, self._told = self._told, self._told + len(pcm)
        words = tuple(events.Spoken(0, 0, at) for at in range(-(-first // WORD) * WORD, self._told, WORD))
        await emit(events.Said(self._answer, first, pcm, PCM.rate, words))

    async def _interrupt(self, line: ClientConnection, emit: Emit) -> None:
        """The user talks: nothing more is played, and the server is told how much was."""
        if self._answer is None:
            return
        await emit(events.Cleared(self._answer))
        if self._told:
            ms = self._heard * 1000 // PCM.rate
            await self._say(line, "conversation.item.truncate", item_id=self._item, content_index=0, audio_end_ms=ms)
        self._finish, self._heard = "interrupted", self._told
        await self._over(emit)

    async def _over(self, emit: Emit) -> None:
        """The answer is over once all of it came and was played."""
        if self._answer is None or not self._finish or self._heard < self._told:
            return
        answer, self._answer = self._answer, None
        finish: Any = self._finish
        await emit(events.Answered(answer, self._text, len(self._text), finish, 0, 0))
        stages, self._stages = self._stages, {}
        await emit(events.Timed(answer, stages, 0))

    def _reached(self, stage: str) -> None:
        if self._stages:
            self._stages.setdefault(stage, (time.monotonic() - self._stopped) * 1000)

    def _number(self, id: str) -> int:
        return self._numbers.setdefault(id, len(self._numbers) + 1)
