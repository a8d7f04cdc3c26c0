"""A client of the protocol with the interface of `Session.run`: a conversation with a server, for a door or a benchmark."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from agent import events
from agent.events import Event, Input
from agent.marks import Mark
from streams.frames import RATE, Audio
from web.audio import PCM, Format

EXTENSIONS = "camera,marks,playback,notes"
OURS = Format(rate=RATE)  # as from the microphone: at 24 kHz the resamplers on both sides would add latency
FRAMES = 16  # camera frames that are kept until the server reports one of them as attached
Emit = Callable[[Event], Awaitable[None]]


def address(url: str) -> str:
    """The websocket address at a server, with our extensions; `ws://host:port` is enough."""
    scheme, host, path, query, _ = urlsplit(url)
    more = f"extensions={EXTENSIONS}"
    return urlunsplit((scheme, host, path if path.strip("/") else "/v1/realtime", f"{query}&{more}" if query else more, ""))


class RealtimeClient:
    """One conversation with the server at `url`. It takes a session's inputs, except those that only the server can decide, and
    emits the events that a client can know. Stage times are milliseconds after the server reported the end of the turn;
    "speech_end" is when the last word was sent from here. `spoken` False: answers are text only. `push_to_talk`: only
    PushToTalkStart and PushToTalkEnd open and close turns."""

    def __init__(self, url: str, token: str | None = None, spoken: bool = True, push_to_talk: bool = False) -> None:
        self.lost: str | None = None  # why the conversation ended before its inputs did
        self._url, self._headers = address(url), {"Authorization": f"Bearer {token}"} if token else {}
        self._spoken, self._push_to_talk, self._pressed = spoken, push_to_talk, False
        self._sent: deque[tuple[int, float]] = deque(maxlen=2000)  # last sample of each audio message, and when it was sent
        self._frames: deque[tuple[str, bytes]] = deque(maxlen=FRAMES)
        self._count = 0  # of camera frames
        self._numbers: dict[str, int] = {}  # our numbers of items, responses and frames
        self._answer: int | None = None  # the one in progress or in playback
        self._item, self._finish, self._final_text = "", "", ""  # its audio item, finish reason and final text
        self._text, self._received, self._played = "", 0, 0  # of it: text, samples received, samples played
        self._stopped: float | None = None  # when the last turn ended that has no answer yet
        self._ended = 0.0  # milliseconds relative to that: when its last word was sent
        self._begun = 0.0  # when the answer's turn ended
        self._stages: dict[str, float] = {}

    async def run(self, inputs: AsyncIterator[Input], emit: Emit) -> None:
        """Until `inputs` end. A server that cannot be reached, or closes the connection, is emitted as SessionFailed."""
        try:
            async with connect(self._url, additional_headers=self._headers, compression=None, max_size=None) as connection:
                audio_input: dict[str, Any] = {"format": OURS.as_json(), "transcription": {"model": "attend"}}
                audio_input |= {"turn_detection": None} if self._push_to_talk else {}
                output = {} if self._spoken else {"output_modalities": ["text"]}
                await self._send(
                    connection, "session.update", session={"type": "realtime", "audio": {"input": audio_input}, **output}
                )
                read = asyncio.create_task(self._read(connection, emit))
                try:
                    async for item in inputs:
                        if read.done():
                            await read
                            break
                        await self._handle(connection, item, emit)
                finally:
                    read.cancel()
                    with suppress(asyncio.CancelledError, ConnectionClosed):
                        await read
        except (ConnectionClosed, InvalidHandshake, InvalidURI, OSError) as error:
            self.lost = str(error)
            await emit(events.SessionFailed(f"the conversation with {self._url} is over: {error}"))

    async def _send(self, connection: ClientConnection, type: str, **fields: Any) -> None:
        await connection.send(json.dumps({"type": type, **fields}))

    async def _handle(self, connection: ClientConnection, item: Input, emit: Emit) -> None:
        match item:
            case Audio() if self._pressed or not self._push_to_talk:
                audio = base64.b64encode(OURS.encode(item.samples)).decode()
                await self._send(connection, "input_audio_buffer.append", audio=audio)
                self._sent.append((item.at + len(item.samples), time.monotonic()))
            case events.PushToTalkStart():
                self._pressed = True
                if self._answer is not None:
                    await self._send(connection, "response.cancel")
                    await emit(events.OutputCleared(self._answer))
                await emit(events.TurnStarted(-1, 0, 0))
            case events.PushToTalkEnd():
                self._pressed = False
                self._stopped, self._ended = time.monotonic(), 0.0
                await self._send(connection, "input_audio_buffer.commit")
                await self._send(connection, "response.create")
                await emit(events.TurnStopped(-1, 0, 0, "released"))
            case events.PictureInput(live=True):
                self._count += 1
                self._frames.append((f"frame{self._count}", item.data))
                await self._send(connection, "attend.camera.frame", frame_id=f"frame{self._count}", image_url=_uri(item.data))
            case events.PictureInput():
                await self._create(connection, {"type": "input_image", "image_url": _uri(item.data)})
            case events.TextInput():
                await self._create(connection, {"type": "input_text", "text": item.text})
                if item.ask:
                    await self._send(connection, "response.create")
            case events.PlaybackPosition(answer, sample) if answer == self._answer:
                self._played = sample
                await self._finish_if_played(emit)

    async def _create(self, connection: ClientConnection, part: dict[str, Any]) -> None:
        await self._send(connection, "conversation.item.create", item={"type": "message", "role": "user", "content": [part]})

    async def _read(self, connection: ClientConnection, emit: Emit) -> None:
        async for message in connection:
            event = json.loads(message)
            match event["type"]:
                case "input_audio_buffer.speech_started":
                    await emit(events.TurnStarted(self._number(event["item_id"]), 0, event["audio_start_ms"] * RATE // 1000))
                case "input_audio_buffer.speech_stopped":
                    await self._stop(event, emit)
                case "input_audio_buffer.cleared":  # it was not a turn
                    self._stopped = None
                    await emit(events.FalseInterruption(0))
                case "conversation.item.input_audio_transcription.completed":
                    await emit(events.InputTranscribed(self._number(event["item_id"]), event["transcript"]))
                case "response.created":
                    await self._begin(event["response"]["id"], emit)
                case "response.output_audio_transcript.delta" | "response.output_text.delta" if self._answer is not None:
                    self._reached("first_token")
                    self._text += event["delta"]
                    await emit(events.TextDelta(self._answer, event["delta"]))
                case "response.output_audio.delta" if self._answer is not None:
                    self._reached("first_sound")
                    pcm = PCM.decode(base64.b64decode(event["delta"]))
                    delta = events.AudioDelta(self._answer, self._received, pcm, PCM.rate)
                    self._item, self._received = event["item_id"], self._received + len(pcm)
                    await emit(delta)
                case "attend.words" if self._answer is not None:
                    words = [events.WordTiming(word["start"], word["end"], _samples(word["audio_ms"])) for word in event["words"]]
                    await emit(events.AudioDelta(self._answer, self._received, np.zeros(0, np.float32), PCM.rate, tuple(words)))
                case "attend.cleared" if self._answer is not None:
                    await emit(events.OutputCleared(self._answer))
                case "attend.camera.looked":
                    if data := next((data for name, data in self._frames if name == event["frame_id"]), None):
                        await emit(events.PictureAttached(self._number(event["frame_id"]), -1, data))
                case "attend.mark" if self._answer is not None:
                    mark, frame = event["mark"], event["frame_id"]
                    picture = self._number(frame) if frame is not None else None
                    await emit(events.MarkAdded(self._answer, picture, Mark(tuple(mark["box_2d"]), mark["label"])))
                case "response.done":
                    await self._done(connection, event["response"], emit)
                case "attend.note":
                    await emit(events.Notice(event["message"]))
                case "error":
                    await emit(events.Notice(event["error"]["message"]))

    async def _stop(self, event: dict[str, Any], emit: Emit) -> None:
        end, now = event["audio_end_ms"] * RATE // 1000, time.monotonic()
        left = next((at for sample, at in self._sent if sample >= end), now)
        self._stopped, self._ended = now, (left - now) * 1000
        await emit(events.TurnStopped(self._number(event["item_id"]), 0, end, "silence"))

    async def _begin(self, response: str, emit: Emit) -> None:
        self._answer = self._number(response)
        self._text, self._finish, self._final_text, self._received, self._played, self._item = "", "", "", 0, 0, ""
        self._stages = {} if self._stopped is None else {"speech_end": self._ended}
        self._begun, self._stopped = self._stopped or 0.0, None
        await emit(events.AnswerStarted(self._answer))

    async def _done(self, connection: ClientConnection, response: dict[str, Any], emit: Emit) -> None:
        if self._answer is None:
            return
        self._finish = {"completed": "stop", "incomplete": "length", "cancelled": "interrupted"}.get(response["status"], "failed")
        parts = [part for item in response["output"] for part in item.get("content", ())]
        self._final_text = "".join(part.get("transcript") or part.get("text") or "" for part in parts)
        if self._finish == "interrupted":
            if self._item:  # the server only estimates what was played; here it is known
                ms = min(self._played, self._received) * 1000 // PCM.rate
                where = {"item_id": self._item, "content_index": 0, "audio_end_ms": ms}
                await self._send(connection, "conversation.item.truncate", **where)
            self._played = self._received
        await self._finish_if_played(emit)

    async def _finish_if_played(self, emit: Emit) -> None:
        """Ends the answer once all of it has been received and played."""
        if self._answer is None or not self._finish or self._played < self._received:
            return
        answer, self._answer = self._answer, None
        finish: Any = self._finish
        kept = len(self._final_text) if self._finish == "interrupted" else len(self._text)
        await emit(events.AnswerDone(answer, self._text, kept, finish, 0, 0))
        await emit(events.AnswerTimings(answer, self._stages, 0))

    def _reached(self, stage: str) -> None:
        if self._stages:
            self._stages.setdefault(stage, (time.monotonic() - self._begun) * 1000)

    def _number(self, id: str) -> int:
        return self._numbers.setdefault(id, len(self._numbers) + 1)


def _uri(picture: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def _samples(ms: float) -> int:
    return round(ms * PCM.rate / 1000)
