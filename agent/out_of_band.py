"""Out-of-band responses: each runs in a fork of the row, on a tape of its own, and the conversation keeps nothing of it."""

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

MAX_RESPONSES = 4  # at once: they share the spare rows with the captions of all conversations


class OutOfBandResponses:
    """The out-of-band responses of one conversation, whose `context` they fork. `spawn` starts a task that ends with the
    conversation at the latest."""

    def __init__(
        self,
        context: Context,
        loaded: LoadedModel,
        emit: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._context, self._loaded, self._emit, self._spawn = context, loaded, emit, spawn
        self._running: dict[str, tuple[AnswerTask, asyncio.Task[None]]] = {}

    def begin(self, item: events.CreateOutOfBandResponse, settings: ConversationConfig, voice: Voice | None) -> None:
        if len(self._running) == MAX_RESPONSES or item.name in self._running:
            return self.refuse(item, f"{MAX_RESPONSES} out-of-band responses are running already")
        context = self._context.fork(fresh=item.past is not None)
        if item.setting or item.past is not None:
            context.append(item.setting or settings.setting)
        for part in item.past or ():
            self._append_input(context, part, settings)
        settings = replace(
            settings, max_tokens=min(item.max_tokens or settings.max_tokens, settings.max_tokens), calls=item.calls
        )
        entry, emit = context.ask(), partial(self._emit_named, item.name)
        answer = AnswerTask(entry, context, self._loaded, settings, voice if item.spoken else None, None, emit, out_of_band=True)
        emit(events.AnswerStarted(entry))
        self._running[item.name] = answer, self._spawn(self._run(item, context, answer))
        return None

    def _emit_named(self, name: str, event: Event) -> None:
        self._emit(events.OutOfBandEvent(name, event))

    def refuse(self, item: events.CreateOutOfBandResponse, reason: str) -> None:
        """Reports the response as failed, before it has begun."""
        self._emit_named(item.name, events.AnswerStarted(0))
        self._fail(item, 0, reason)

    def _fail(self, item: events.CreateOutOfBandResponse, entry: int, reason: str) -> None:
        self._emit(events.Notice(f"an out-of-band response failed: {reason}"))
        self._emit_named(item.name, events.AnswerDone(entry, "", 0, "failed", 0, 0))

    def receive(self, item: events.OutOfBandEvent) -> None:
        """A report from the door about a running response; ignored if that has ended."""
        if (found := self._running.get(item.name)) is None:
            return
        answer, task = found
        match item.payload:
            case events.PlaybackPosition():
                answer.hear(item.payload.sample)
            case events.CancelAnswer():
                del self._running[item.name]
                task.cancel()
                answer.interrupt(answer.heard)

    async def _run(self, item: events.CreateOutOfBandResponse, context: Context, answer: AnswerTask) -> None:
        try:
            await answer.run()
            answer.complete()
        except (RowFull, RowLost, EngineStopped, MediaError) as error:
            self._fail(item, answer.entry, str(error))
        finally:
            self._running.pop(item.name, None)
            context.row.release()

    def _append_input(self, context: Context, part: events.AnswerInput, settings: ConversationConfig) -> None:
        if isinstance(part, events.PastAnswer):
            context.recall(part.text, part.calls)
            return
        entries: list[Entry] = []
        match part:
            case events.TextInput():
                entries = [tape.Typed(part.text)] if part.text.strip() else []
            case events.PictureInput() if part.size:
                entries = [tape.Seen(part.data, *part.size, settings.picture or self._loaded.budget)]
            case events.EntryReference():
                entries = self._context.content(part.of)
            case Audio():
                frame = self._loaded.model.config.frame
                entries = [Sound.of(np.pad(part.samples, (0, -len(part.samples) % frame)).reshape(-1, frame))]
        for entry in entries:
            if not context.tape.fits(entry):
                context.append(tape.Opened())
            context.append(entry)


async def with_size(item: events.AnswerInput, executor: Executor) -> Any:
    """The item, with its size if it is a picture, which is decoded in `executor`. Raises MediaError if it cannot be decoded."""
    if not isinstance(item, events.PictureInput):
        return item
    height, width, _ = await asyncio.get_running_loop().run_in_executor(executor, _shape, item.data)
    return replace(item, size=(height, width))


def _shape(data: bytes) -> tuple[int, ...]:
    return decode_picture(data, "the picture").shape
