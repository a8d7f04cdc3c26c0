"""Responses out of band: each in a fork of the row, on a tape of its own, and nothing is left of it afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from agent import events, tape
from agent.answer_task import AnswerTask
from agent.checkpoint import LoadedModel
from agent.context import Context
from agent.conversation_config import ConversationConfig
from agent.engine import EngineStopped, RowLost
from agent.events import Event
from agent.tape import Entry, Sound
from model.cache import RowFull
from streams.frames import Audio, MediaError
from streams.pictures import decode_picture
from streams.voice import Voice

MOST = 4  # at once: they share the spare rows with everybody's captions


class OutOfBandResponses:
    """Those of one conversation, whose `record` they fork. `spawn` runs a task for as long as the conversation goes on."""

    def __init__(
        self,
        record: Context,
        loaded: LoadedModel,
        emit: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._record, self._loaded, self._emit, self._spawn = record, loaded, emit, spawn
        self._given: dict[str, tuple[AnswerTask, asyncio.Task[None]]] = {}

    def begin(self, item: events.CreateOutOfBandResponse, settings: ConversationConfig, voice: Voice | None) -> None:
        if len(self._given) == MOST or item.name in self._given:
            return self.refuse(item, f"{MOST} responses out of band are being given already")
        record = self._record.fork(fresh=item.past is not None)
        if item.setting or item.past is not None:
            record.append(item.setting or settings.setting)
        for part in item.past or ():
            self._put(record, part, settings)
        settings = replace(
            settings, max_tokens=min(item.max_tokens or settings.max_tokens, settings.max_tokens), calls=item.calls
        )
        of, emit = record.ask(), partial(self._tell, item.name)
        reply = AnswerTask(of, record, self._loaded, settings, voice if item.spoken else None, None, emit, out_of_band=True)
        emit(events.AnswerStarted(of))
        self._given[item.name] = reply, self._spawn(self._give(item, record, reply))
        return None

    def _tell(self, name: str, event: Event) -> None:
        self._emit(events.OutOfBandEvent(name, event))

    def refuse(self, item: events.CreateOutOfBandResponse, why: str) -> None:
        self._tell(item.name, events.AnswerStarted(0))
        self._fail(item, 0, why)

    def _fail(self, item: events.CreateOutOfBandResponse, of: int, why: str) -> None:
        self._emit(events.Notice(f"a response out of band failed: {why}"))
        self._tell(item.name, events.AnswerDone(of, "", 0, "failed", 0, 0))

    def take(self, item: events.OutOfBandEvent) -> None:
        """What the door says of one of them; nothing, where that is over."""
        if (found := self._given.get(item.name)) is None:
            return
        reply, task = found
        match item.payload:
            case events.PlaybackPosition():
                reply.hear(item.payload.sample)
            case events.CancelAnswer():
                del self._given[item.name]
                task.cancel()
                reply.cut(reply.heard)

    async def _give(self, item: events.CreateOutOfBandResponse, record: Context, reply: AnswerTask) -> None:
        try:
            await reply.run()
            reply.complete()
        except (RowFull, RowLost, EngineStopped, MediaError) as error:
            self._fail(item, reply.of, str(error))
        finally:
            self._given.pop(item.name, None)
            record.row.release()

    def _put(self, record: Context, part: events.AnswerInput, settings: ConversationConfig) -> None:
        if isinstance(part, events.PastAnswer):
            record.recall(part.text, part.calls)
            return
        entries: list[Entry] = []
        match part:
            case events.TextInput():
                entries = [tape.Typed(part.text)] if part.text.strip() else []
            case events.PictureInput() if part.size:
                entries = [tape.Seen(part.data, *part.size, settings.picture or self._loaded.budget)]
            case events.EntryReference():
                entries = self._record.content(part.of)
            case Audio():
                frame = self._loaded.model.config.frame
                entries = [Sound.of(np.pad(part.samples, (0, -len(part.samples) % frame)).reshape(-1, frame))]
        for entry in entries:
            if not record.tape.fits(entry):
                record.append(tape.Opened())
            record.append(entry)


async def sized(item: events.AnswerInput, work: Executor) -> Any:
    """With its size, where it is a picture, which is decoded in `work`. Raises MediaError for one that cannot be decoded."""
    if not isinstance(item, events.PictureInput):
        return item
    height, width, _ = await asyncio.get_running_loop().run_in_executor(work, _shape, item.data)
    return replace(item, size=(height, width))


def _shape(data: bytes) -> tuple[int, ...]:
    return decode_picture(data, "the picture").shape
