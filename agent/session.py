"""One conversation: every door calls `Session.run(inputs, emit)`.

All decisions are made on the event loop, in one place, as inputs arrive. While the user speaks, each frame is appended to the row
at once, so that when the turn ends only its closing tokens are left to prefill. An answer runs in a task of its own
(agent/answer_task.py); an interruption cancels it and truncates tape and row to the last word that was heard.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any, Self

import numpy as np

from agent import events, tape
from agent.answer_task import AnswerTask
from agent.context import Caption, Context
from agent.conversation_config import ConversationConfig
from agent.engine import Engine, EngineStopped, RowLost
from agent.events import Event, Input
from agent.journal import JournalError
from agent.out_of_band import OutOfBandResponses, with_size
from agent.tape import Tape
from agent.turns import (
    BargeIn,
    Decision,
    IdleTimeout,
    OutputPaused,
    OutputResumed,
    SpeechDiscarded,
    SpeechEnded,
    SpeechStarted,
    State,
    TurnDetector,
)
from model.cache import RowFull
from model.vad import FRAME, Vad
from streams.frames import RATE, Audio, Framer, MediaError
from streams.voice import Voice

CONVERSATION_ERRORS = (RowFull, RowLost, EngineStopped, JournalError, MediaError)  # each ends one conversation, with one sentence
MAX_DEFERRED = 1024  # inputs that wait for the end of an answer; beyond this `full` is true and the door makes its client wait
MAX_DEFERRED_BYTES = 16 << 20  # of text and pictures in them
DEFERRED_LIMIT = 4 * MAX_DEFERRED  # from a door that does not wait; more are dropped, with a Notice
DRAIN_BATCH = 16  # deferred inputs taken at once; then other conversations run
MAX_PARTS = 64  # texts and pictures in one turn; more begin another turn


class ConsumerStalled(RuntimeError):
    """The door has stopped reading events."""


class Session:
    """Claims a row when it is made, and raises NoRow or EngineStopped if there is none. `close`, the end of `run` or the end of a
    `with` block releases the row and closes the tape, whichever comes first."""

    def __init__(
        self,
        engine: Engine,
        vad: Vad,
        voice: Voice | None = None,
        settings: ConversationConfig | None = None,
        tape: Tape | None = None,
    ) -> None:
        self.engine, self.voice, self.settings = engine, voice, settings or ConversationConfig()
        self._max_tokens = self.settings.max_tokens
        self.dropped = 0  # frames that were not appended: the model is too slow, or the turn too long
        self._vad, self._vad_state = vad, vad.start()
        self._turns, self._framer = TurnDetector(self.settings.detection), Framer(FRAME)
        self._recent_frames: deque[tuple[int, np.ndarray]] = deque()  # the latest frames: a turn begins before it is detected
        self._capturing = False  # frames are appended to the open turn
        self._buffer: list[np.ndarray] = []  # the input audio buffer: frames that wait for a commit
        self._buffer_streamed = 0  # how many of these are in the row already, ahead of the commit
        self._answer_requested = False  # an answer starts as soon as the open turn ends
        self._talked_over = False  # there is speech over an answer; it becomes a turn or a FalseInterruption
        self._picture: int | None = None  # the newest one in the conversation: marks refer to it
        self._camera: events.PictureInput | None = None
        self._answer: AnswerTask | None = None
        self._answer_run: asyncio.Task[None] | None = None
        self._syncing: asyncio.Task[None] | None = None  # runs until the row matches the tape
        self._recent_answers: deque[AnswerTask] = deque(maxlen=8)  # a door may still truncate these
        self._deferred: deque[Input] = deque()  # inputs that wait for the end of the answer
        self._draining = False  # the answer has ended, and they are being processed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._outgoing: asyncio.Queue[Event] = asyncio.Queue(self.settings.unread + 1)  # the last place is for SessionFailed
        self._finished: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        loaded, s = engine.loaded, self.settings
        config, limit = loaded.model.config, engine.length - s.max_tokens
        with ExitStack() as resources:
            row, tape = engine.claim(self._finish), tape or Tape()
            resources.callback(row.release)
            resources.callback(tape.close)
            self.record = Context(tape, row, loaded.prompt, config, s.budget, s.policy, limit, self._emit)
            self._out_of_band = OutOfBandResponses(self.record, loaded, self._emit, self._spawn)
            self._resources = resources.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the row and closes the tape's journal; nothing if that is done already."""
        self._resources.close()

    async def run(self, inputs: AsyncIterator[Input], emit: Callable[[Event], Awaitable[None]]) -> None:
        """Runs until `inputs` end or something fails: then `SessionFailed` is the last event. Raises what `inputs` or `emit`
        raise, and ConsumerStalled if the door stops reading. The row is released before the last events are delivered."""
        sender = asyncio.create_task(self._send(emit))
        sender.add_done_callback(self._task_done)
        try:
            try:
                if not self.record.tape.entries:
                    self.record.append(self.settings.setting)
                self.record.tidy()
                self._spawn(self._read(inputs))
                cause = await self._finished
            except CONVERSATION_ERRORS as error:
                cause = error
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                self.close()
            if isinstance(cause, CONVERSATION_ERRORS):
                self._outgoing.put_nowait(events.SessionFailed(str(cause)))
            elif cause is not None:
                raise cause
            rest = asyncio.create_task(self._outgoing.join())
            await asyncio.wait({rest, sender}, timeout=self.settings.patience, return_when=asyncio.FIRST_COMPLETED)
            rest.cancel()
            if sender.done():
                await sender
        finally:
            sender.cancel()

    @property
    def full(self) -> bool:
        """So many inputs wait for the end of an answer that the door should send no more."""
        return len(self._deferred) >= MAX_DEFERRED or sum(map(events.weight, self._deferred)) > MAX_DEFERRED_BYTES

    # -- inputs

    async def _read(self, inputs: AsyncIterator[Input]) -> None:
        async for item in inputs:
            try:
                if isinstance(item, events.PictureInput):
                    item = await with_size(item, self.engine.pictures)
                elif isinstance(item, events.CreateOutOfBandResponse) and item.past:
                    item = replace(item, past=tuple([await with_size(part, self.engine.pictures) for part in item.past]))
            except MediaError as error:
                if isinstance(item, events.CreateOutOfBandResponse):
                    self._out_of_band.refuse(item, str(error))
                else:
                    self._notify(str(error), refused=True)
                continue
            self._receive(item)
        self._finish(None)

    def _receive(self, item: Input, was_deferred: bool = False) -> None:
        """`was_deferred`: it has waited for the end of an answer already."""
        answer = self._answer
        if answer:
            self._turns.heard(answer.heard)
        free = answer is None or (answer.all_sent and not self._deferred)
        defer = not was_deferred and (self._draining or not free)  # inputs that change the conversation
        match item:
            case Audio() if self._turns.detection.buffered:
                self._append_to_buffer(self._framer.push(item.samples))
            case Audio():
                for frame in self._framer.push(item.samples):
                    self._hear_frame(frame)
            case events.PlaybackPosition():
                if answer and item.answer == answer.entry:
                    answer.hear(item.sample)
            case events.CreateOutOfBandResponse():
                self._out_of_band.begin(item, self.settings, self.voice)
            case events.OutOfBandEvent():
                self._out_of_band.receive(item)
            case events.PushToTalkStart():
                self._decide(self._turns.press())
            case events.PushToTalkEnd():
                self._decide(self._turns.release())
            case events.DiscardTurn():
                self._discard_buffer()
                self._decide(self._turns.cancel())
                self._check_false_interruption()
            case events.CommitTurn() if self._turns.detection.buffered:
                self._commit_buffer(item, defer)
            case events.CancelAnswer():
                self._cancel_answer()
            case events.ToolResult():
                self._receive_tool_result(item)
            case events.TruncateAnswer():
                self._truncate(item)
            case events.PictureInput(live=True):
                self._camera = item
            case events.UpdateSettings() if answer and item != (rest := events.UpdateSettings(setting=item.setting)):
                self._update_settings(replace(item, setting=None))
                self._receive(rest)
            case events.TextInput() if answer and item.ask:
                self._cancel_answer()
                self._receive(item)
            case events.CreateAnswer() | events.CommitTurn(ask=True) if answer and answer.all_sent:  # a new request ends playback
                self._complete_answer(answer)
                self._answer_after(item)
            case _ if defer and len(self._deferred) >= DEFERRED_LIMIT:
                self._notify("too many inputs came during an answer; the last ones were dropped", refused=True)
            case _ if defer:
                self._deferred.append(item)
            case _ if self._buffer_streamed or (
                self._turns.floor == "user" and isinstance(item, events.PastAnswer | events.RecordedInput)
            ):
                self._insert_before_audio(item)
            case _:
                self._apply(item)

    def _answer_after(self, item: Input) -> None:
        """After an answer. If speech over its last word has become a turn, the request waits for the end of that turn."""
        if self._turns.floor == "user":
            self._answer_requested = True
        else:
            self._receive(item)

    def _insert_before_audio(self, item: Input) -> None:
        """Applies `item` ahead of the audio of the open turn or of the input buffer, which is appended again behind it."""
        capturing, self._capturing = self._capturing, False
        sounds, self._buffer_streamed = self.record.take_out(), 0
        self._apply(item)
        if capturing:
            self.record.open(self._turns.now)
            self._capturing = True
            for sound in sounds:
                for frame in sound.samples:
                    self._append_frame(frame, live=False)
        self._stream_buffer()
        self._sync_row()

    def _apply(self, item: Input) -> None:
        """Applies an input that changes the conversation, while no answer is running."""
        match item:
            case events.TextInput():
                if item.text.strip() and not self._add_part(tape.Typed(item.text)):
                    return
                if item.ask and self._turns.floor is None:
                    self._end_turn(ask=True)
            case events.PictureInput():
                self._add_part(self._picture_entry(item))
            case events.RecordedInput():
                whole = np.pad(item.samples, (0, -len(item.samples) % FRAME)).reshape(-1, FRAME)
                self._add_recorded_turn(list(whole), item.name)
            case events.CommitTurn():
                self._commit_turn(item.ask)
            case events.CreateAnswer():
                self._commit_turn(True)
            case events.UpdateSettings():
                self._update_settings(item)
            case events.PastAnswer():
                self.record.recall(item.text, item.calls)
                self._sync_row()
            case events.SayText() if self._turns.floor == "user":
                self._notify("text cannot be spoken while the user speaks")
            case events.SayText():
                self._begin_answer(0, None, tuple(self.engine.loaded.tokenizer.encode(item.text)))
            case events.DeleteEntry():
                self.record.delete(item.of)
                self._sync_row()

    def _hear_frame(self, frame: np.ndarray) -> None:
        detection, at, capturing = self._turns.detection, self._turns.now, self._capturing
        self._recent_frames.append((at, frame))
        while self._recent_frames[0][0] < at - detection.keep:
            self._recent_frames.popleft()
        self._decide(self._turns.hear(len(frame), self._vad.hear(frame, self._vad_state)))
        self._check_false_interruption()
        if capturing and self._capturing:
            self._append_frame(frame)

    def _check_false_interruption(self) -> None:
        """Reports speech over an answer that ended without becoming a turn."""
        if self._talked_over and self._turns.state is State.QUIET:
            self._talked_over = False
            self._emit(events.FalseInterruption(self._turns.now))

    def _append_frame(self, frame: np.ndarray, live: bool = True) -> None:
        """`live`: frames that arrive faster than the model takes them are dropped."""
        if (live and self.record.row.behind > self.settings.backlog) or not self.record.sound(frame):
            self.dropped += 1

    # -- the input buffer

    def _append_to_buffer(self, frames: list[np.ndarray]) -> None:
        room = self._turns.detection.longest * RATE // 1000 // FRAME - len(self._buffer)
        self.dropped += max(0, len(frames) - room)
        self._buffer += frames[: max(0, room)]
        self._turns.skip(FRAME * len(frames))
        self._stream_buffer()

    def _stream_buffer(self) -> None:
        """Appends the input buffer to the row ahead of its commit, unless a turn or an answer is going on."""
        if (
            self._buffer_streamed == len(self._buffer)
            or self._turns.floor == "user"
            or (self._answer and not self._answer.all_sent)
        ):
            return
        self.record.open(self._turns.now)
        for frame in self._buffer[self._buffer_streamed :]:
            self._append_frame(frame)
        self._buffer_streamed = len(self._buffer)

    def _commit_buffer(self, item: events.CommitTurn, defer: bool) -> None:
        frames, self._buffer = self._buffer + self._framer.flush(), []
        if not frames:
            self._receive(events.CreateAnswer()) if item.ask else None
        elif defer:
            self._receive(events.RecordedInput(np.concatenate(frames), item.name))
        else:
            self._add_recorded_turn(frames, item.name)
        if frames and item.ask:
            self._receive(events.CreateAnswer())

    def _add_recorded_turn(self, frames: list[np.ndarray], name: str | None) -> None:
        """A whole turn of audio, of which the first frames may be in the row already."""
        end = self._turns.now
        self._emit(events.TurnStarted(self.record.open(end), end, max(0, end - FRAME * len(frames)), name))
        for frame in frames[self._buffer_streamed :]:
            self._append_frame(frame, live=False)
        self._buffer_streamed = 0
        self._end_turn(False, SpeechEnded(end, end, "committed"))

    def _discard_buffer(self) -> None:
        if self._buffer_streamed:
            self.record.take_out()
            self._sync_row()
        self._buffer, self._buffer_streamed = [], 0
        if self._turns.detection.buffered:
            self._framer = Framer(FRAME)

    def _add_part(self, part: tape.Typed | tape.Seen) -> bool:
        """Adds it to the turn; False, with a Notice, if there is no room."""
        if self.record.parts == MAX_PARTS and self._turns.floor != "user":
            self.record.close(tape.Closed())
        if self.record.parts == MAX_PARTS or not self.record.fits(part):
            what = "a picture" if isinstance(part, tape.Seen) else "words"
            self._notify(f"there is no room for {what} of this size in a turn", refused=True)
            return False
        turn = self.record.open(self._turns.now)
        index = self.record.part(part)
        self._sync_row()
        if isinstance(part, tape.Seen):
            self._picture = index
            self._emit(events.PictureAttached(index, turn, part.data))
        return True

    def _picture_entry(self, picture: events.PictureInput) -> tape.Seen:
        assert picture.size
        return tape.Seen(picture.data, *picture.size, self.settings.picture or self.engine.loaded.budget, at=self._turns.now)

    def _attach_camera_picture(self) -> None:
        """Adds the camera's newest picture to the turn; each one is used once."""
        if self._camera:
            seen, self._camera = self._picture_entry(self._camera), None
            self._add_part(seen)

    def _update_settings(self, item: events.UpdateSettings) -> None:
        changes = {field.name: value for field in fields(item) if (value := getattr(item, field.name)) is not None}
        self.settings = replace(self.settings, **changes)
        self.settings = replace(self.settings, max_tokens=min(self.settings.max_tokens, self._max_tokens))
        self._turns.detection = self.settings.detection
        if item.setting and not self.record.fits(item.setting):
            self._notify("there is no room for a system prompt and tools of this size; they stay as they are", refused=True)
        elif item.setting:
            self.record.append(item.setting)
            self.record.stale = True
            self._sync_row()

    # -- turns

    def _decide(self, decisions: Iterable[Decision], ask: bool | None = None) -> None:
        for decision in decisions:
            match decision:
                case SpeechStarted():
                    self._start_turn(decision)
                case SpeechEnded():
                    self._end_turn(self._answer_requested or (self.settings.answers if ask is None else ask), decision)
                case SpeechDiscarded():
                    self._discard_turn(decision)
                case OutputPaused() if self._answer:
                    self._talked_over = True
                    before = self._turns.detection.speech + self._turns.detection.pre_roll
                    self._answer.pause(max(0, decision.at - before * RATE // 1000))
                case OutputResumed() if self._answer:
                    self._answer.resume(decision.heard)
                case BargeIn():
                    self._interrupt(decision.heard)
                case IdleTimeout():
                    self._emit(events.UserIdle(decision.at))
        if self._deferred and not self._draining:
            self._draining = True
            for _ in range(DRAIN_BATCH):
                self._drain_one()
            self._draining = self._answer is None and len(self._deferred) > 0
            if self._draining:
                self._spawn(self._drain_rest())
        self._stream_buffer()

    def _drain_one(self) -> None:
        """Processes the first deferred input, unless an answer is running."""
        if self._answer is None and self._deferred:
            item = self._deferred.popleft()
            if self._turns.floor == "user" and isinstance(item, events.CommitTurn | events.CreateAnswer):
                self._answer_requested |= isinstance(item, events.CreateAnswer) or item.ask
            else:
                self._receive(item, was_deferred=True)

    async def _drain_rest(self) -> None:
        while self._answer is None and self._deferred:
            self._drain_one()
            await asyncio.sleep(0)
        self._draining = False
        self._stream_buffer()

    def _start_turn(self, began: SpeechStarted) -> None:
        turn, self._capturing, self._talked_over = self.record.open(began.start), True, False
        self._emit(events.TurnStarted(turn, began.at, began.start))
        if self.settings.camera == "live":
            self._attach_camera_picture()
        for at, frame in self._recent_frames:
            if at >= began.start:
                self._append_frame(frame)

    def _commit_turn(self, ask: bool) -> None:
        if self._turns.floor == "user":
            self._decide(self._turns.commit(), ask)
        elif ask or self.record.turn is not None:
            self._end_turn(ask)

    def _end_turn(self, ask: bool, ended: SpeechEnded | None = None) -> None:
        """Closes the turn, if one is open; `ask`: an answer begins."""
        self._capturing = False
        record, waiting = self.record, self.record.row.waiting
        if ended and record.turn is not None:
            self._emit(events.TurnStopped(record.turn, ended.at, ended.end, ended.why))
        caption = record.caption() if self.settings.captions else None
        if not ask:
            record.close(tape.Closed())
            self._sync_row()
        else:
            if record.turn is not None and self.settings.camera != "off":
                self._attach_camera_picture()
            self._begin_answer(waiting, ended)
        if caption:
            self._spawn(self._caption(caption))

    def _discard_turn(self, discarded: SpeechDiscarded) -> None:
        turn, self._capturing = self.record.turn, False
        assert turn is not None
        self.record.take_out()
        self._sync_row()
        self._emit(events.TurnDiscarded(turn, discarded.at))
        if self._answer_requested and self._answer is None:
            self._end_turn(ask=True)

    async def _caption(self, caption: Caption) -> None:
        text = None
        try:
            text = await caption.words(self.engine.loaded.generation)
        except CONVERSATION_ERRORS as error:
            self._emit(events.InputTranscriptionFailed(caption.turn, f"this turn could not be transcribed: {error}"))
        finally:
            caption.fork.release()
        self.record.captioned(caption, text)
        if text is not None:
            self._emit(events.InputTranscribed(caption.turn, text))
        if self._answer is None or self._answer.written:
            self.record.tidy()

    # -- the answer

    def _begin_answer(self, waiting: int, ended: SpeechEnded | None, given: tuple[int, ...] | None = None) -> None:
        entry, loaded, self._answer_requested = self.record.ask(), self.engine.loaded, False
        voice = self.voice if self.settings.spoken else None
        answer = AnswerTask(entry, self.record, loaded, self.settings, voice, self._picture, self._emit, given)
        answer.waiting = waiting
        if ended:
            answer.mark_stage("speech_end", (ended.end - ended.at) * 1000 / RATE)
        self._answer = answer
        self._recent_answers.append(answer)
        self._turns.answering(to_speech=ended is not None)
        self._emit(events.AnswerStarted(entry))
        self._answer_run = self._spawn(self._run_answer(answer))

    async def _run_answer(self, answer: AnswerTask) -> None:
        await answer.run()
        self._clear_answer(answer)
        answer.complete()
        self._decide(self._turns.answered())

    def _clear_answer(self, answer: AnswerTask) -> None:
        self._answer = None
        if answer.voice_failed:
            self.voice = None

    def _complete_answer(self, answer: AnswerTask) -> None:
        assert self._answer_run
        self._answer_run.cancel()
        self._clear_answer(answer)
        answer.complete()
        self._decide(self._turns.answered())

    def _cancel_answer(self) -> None:
        if self._answer:
            self._interrupt(self._answer.heard)
            self._decide(self._turns.answered())

    def _truncate(self, item: events.TruncateAnswer) -> None:
        if self._answer and self._answer.entry == item.answer:
            self._interrupt(item.sample)
            self._decide(self._turns.answered())
        elif recent := next((answer for answer in self._recent_answers if answer.entry == item.answer), None):
            recent.truncate(item.sample)
            if self._answer is None:
                self.record.stale = True
                self._sync_row()

    def _interrupt(self, heard: int) -> None:
        answer = self._answer
        assert answer and self._answer_run
        self._answer_run.cancel()
        self._clear_answer(answer)
        answer.interrupt(heard)
        self.record.follow()

    def _receive_tool_result(self, item: events.ToolResult) -> None:
        if self._answer and self._answer.returned(item.call, item.value):
            return
        if not self.record.returned(item.call, item.value):
            self._notify("a tool result belongs to no call, or its call has a result already")
        elif self._answer is None:
            self._sync_row()

    # -- the row

    def _sync_row(self) -> None:
        """The row follows the tape as soon as it is idle; entries that come meanwhile are batched. Item by item, an
        imported history took the engine 20 times as long."""
        if self.record.stale and self._syncing is None:
            self._syncing = self._spawn(self._sync_when_idle())

    async def _sync_when_idle(self) -> None:
        while self.record.stale and (self._answer is None or self._answer.written):
            await self.record.row.drained()
            if self._answer is None or self._answer.written:
                self.record.catch_up()
        self._syncing = None

    # -- the outside

    def _notify(self, message: str, refused: bool = False) -> None:
        self._emit(events.Notice(message, refused))

    def _emit(self, event: Event) -> None:
        if self._outgoing.qsize() < self.settings.unread:
            self._outgoing.put_nowait(event)
        else:
            self._finish(ConsumerStalled(f"the door has left {self.settings.unread} events unread; the conversation is over"))

    async def _send(self, emit: Callable[[Event], Awaitable[None]]) -> None:
        while True:
            await emit(await self._outgoing.get())
            self._outgoing.task_done()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        if not self._finished.done():
            self._finished.set_result(error)
