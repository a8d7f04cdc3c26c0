"""One conversation: `Session.run(inputs, emit)` is the seam behind every door.

Everything is decided on the event loop, in one place, as inputs come. While the user has the floor each frame goes into the
row at once, so that a turn's end leaves nothing to do but the closing. An answer is a task of its own (agent/answer_task.py);
stopping it cancels that, and tape and row go back to the last word that was heard.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from agent import events, tape
from agent.answer_task import AnswerTask
from agent.context import Caption, Context
from agent.conversation_config import ConversationConfig
from agent.engine import Engine, EngineStopped, RowLost
from agent.events import Event, Input
from agent.journal import JournalError
from agent.out_of_band import OutOfBandResponses, sized
from agent.turns import (
    BargeIn,
    IdleTimeout,
    OutputPaused,
    OutputResumed,
    SpeechDiscarded,
    SpeechEnded,
    SpeechStarted,
    State,
    TurnDetector,
)
from agent.turns import Decision as Decision
from model.cache import RowFull
from model.vad import FRAME, Vad
from streams.frames import RATE, Audio, Framer, MediaError
from streams.voice import Voice

TROUBLE = (RowFull, RowLost, EngineStopped, JournalError, MediaError)  # ends one conversation, with a sentence
LATER = 1024  # inputs that wait until an answer is over: then the session is full, and its door lets the client wait
LATER_BYTES = 16 << 20  # of their words and pictures
LATEST = 4 * LATER  # from a door that does not wait: what comes then is lost, and said
AT_ONCE = 16  # of them, once it is over; then it is the turn of other conversations
PARTS = 64  # words and pictures in one turn; more begin another


class ConsumerStalled(RuntimeError):
    """The door takes no events any more."""


class Session:
    """Takes its row here: NoRow or EngineStopped is raised before anything begins. `run` gives it back."""

    def __init__(
        self,
        engine: Engine,
        vad: Vad,
        voice: Voice | None = None,
        settings: ConversationConfig | None = None,
        on: tape.Tape | None = None,
    ) -> None:
        self.engine, self.voice, self.settings = engine, voice, settings or ConversationConfig()
        self._most = self.settings.max_tokens
        self.dropped = 0  # frames lost to a model that is too slow, or to a turn that is too long
        self._vad, self._listening = vad, vad.start()
        self._turns, self._framer = TurnDetector(self.settings.detection), Framer(FRAME)
        self._recent: deque[tuple[int, np.ndarray]] = deque()  # frames that may turn out to have begun a turn
        self._loud = False  # the open turn takes sound
        self._buffer: list[np.ndarray] = []  # frames that wait for a commit
        self._streamed = 0  # of these in the open turn, which they leave for what comes before them
        self._asked = False  # an answer is wanted as soon as the open turn ends
        self._over_it = False  # someone talks over an answer, and it may become a turn
        self._picture: int | None = None  # the newest that was looked at: marks are on it
        self._camera: events.PictureInput | None = None
        self._reply: AnswerTask | None = None
        self._giving: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None  # until the row holds what the tape says
        self._given: deque[AnswerTask] = deque(maxlen=8)  # of which a door may still say how much was heard
        self._later: deque[Input] = deque()  # until the answer is over
        self._resuming = False  # it is, and they are being taken
        self._tasks: set[asyncio.Task[Any]] = set()
        self._out: asyncio.Queue[Event] = asyncio.Queue(self.settings.unread + 1)  # the last place is for Failed
        self._over: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        loaded, s = engine.loaded, self.settings
        row, config, emit = engine.claim(self._end_with), loaded.model.config, self._emit
        self.record = Context(
            on or tape.Tape(), row, loaded.prompt, config, s.budget, s.policy, engine.length - s.max_tokens, emit
        )
        self._out_of_band = OutOfBandResponses(self.record, loaded, emit, self._spawn)

    async def run(self, inputs: AsyncIterator[Input], emit: Callable[[Event], Awaitable[None]]) -> None:
        """Until `inputs` end, or something fails: then `Failed` is the last event. What is the door's own fault is raised."""
        sender = asyncio.create_task(self._send(emit))
        sender.add_done_callback(self._done)
        try:
            try:
                if not self.record.tape.entries:
                    self.record.append(self.settings.setting)
                self.record.tidy()
                self._spawn(self._read(inputs))
                trouble = await self._over
            except TROUBLE as error:
                trouble = error
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                self.record.row.release()
                self.record.tape.close()
            if isinstance(trouble, TROUBLE):
                self._out.put_nowait(events.SessionFailed(str(trouble)))
            elif trouble is not None:
                raise trouble
            rest = asyncio.create_task(self._out.join())
            await asyncio.wait({rest, sender}, timeout=self.settings.patience, return_when=asyncio.FIRST_COMPLETED)
            rest.cancel()
            if sender.done():
                await sender
        finally:
            sender.cancel()

    @property
    def full(self) -> bool:
        """So much waits for the end of an answer that no more should come."""
        return len(self._later) >= LATER or sum(map(events.weight, self._later)) > LATER_BYTES

    # -- inputs

    async def _read(self, inputs: AsyncIterator[Input]) -> None:
        async for item in inputs:
            try:
                if isinstance(item, events.PictureInput):
                    item = await sized(item, self.engine.pictures)
                elif isinstance(item, events.CreateOutOfBandResponse) and item.past:
                    item = replace(item, past=tuple([await sized(part, self.engine.pictures) for part in item.past]))
            except MediaError as error:
                if isinstance(item, events.CreateOutOfBandResponse):
                    self._out_of_band.refuse(item, str(error))
                else:
                    self._note(str(error), refused=True)
                continue
            self._take(item)
        self._end_with(None)

    def _take(self, item: Input, resumed: bool = False) -> None:
        """`resumed`: it has waited for its turn already."""
        reply = self._reply
        if reply:
            self._turns.heard(reply.heard)
        told = reply is None or (reply.told and not self._later)
        waits = not resumed and (self._resuming or not told)  # what changes the conversation
        match item:
            case Audio() if self._turns.detection.buffered:
                self._append(self._framer.push(item.samples))
            case Audio():
                for frame in self._framer.push(item.samples):
                    self._hear(frame)
            case events.PlaybackPosition():
                if reply and item.answer == reply.of:
                    reply.hear(item.sample)
            case events.CreateOutOfBandResponse():
                self._out_of_band.begin(item, self.settings, self.voice)
            case events.OutOfBandEvent():
                self._out_of_band.take(item)
            case events.PushToTalkStart():
                self._decide(self._turns.press())
            case events.PushToTalkEnd():
                self._decide(self._turns.release())
            case events.DiscardTurn():
                self._clear()
                self._decide(self._turns.cancel())
                self._pass()
            case events.CommitTurn() if self._turns.detection.buffered:
                self._commit_buffer(item, waits)
            case events.CancelAnswer():
                self._stop()
            case events.ToolResult():
                self._return(item)
            case events.TruncateAnswer():
                self._truncate(item)
            case events.PictureInput(live=True):
                self._camera = item
            case events.UpdateSettings() if reply and item != (rest := events.UpdateSettings(setting=item.setting)):
                self._set(replace(item, setting=None))
                self._take(rest)
            case events.TextInput() if reply and item.ask:
                self._stop()
                self._take(item)
            case events.CreateAnswer() | events.CommitTurn(ask=True) if reply and reply.told:  # who asks again has heard enough
                self._hear_out(reply)
                self._ask(item)
            case _ if waits and len(self._later) >= LATEST:
                self._note("too much came while an answer was given; the last of it was not taken", refused=True)
            case _ if waits:
                self._later.append(item)
            case _ if self._streamed or (
                self._turns.floor == "user" and isinstance(item, events.PastAnswer | events.RecordedInput)
            ):
                self._before_sound(item)
            case _:
                self._change(item)

    def _ask(self, item: Input) -> None:
        """After an answer. Talk over its last word has become a turn, which is to be answered when it ends."""
        if self._turns.floor == "user":
            self._asked = True
        else:
            self._take(item)

    def _before_sound(self, item: Input) -> None:
        """What is being said, or waits for a commit, comes after what the door puts into the conversation now."""
        loud, self._loud = self._loud, False
        sounds, self._streamed = self.record.take_out(), 0
        self._change(item)
        if loud:
            self.record.open(self._turns.now)
            self._loud = True
            for sound in sounds:
                for frame in sound.samples:
                    self._sound(frame, live=False)
        self._stream()
        self._follow()

    def _change(self, item: Input) -> None:
        """What changes the conversation, when no answer is being given."""
        match item:
            case events.TextInput():
                if item.text.strip() and not self._part(tape.Typed(item.text)):
                    return
                if item.ask and self._turns.floor is None:
                    self._close(ask=True)
            case events.PictureInput():
                self._part(self._seen(item))
            case events.RecordedInput():
                whole = np.pad(item.samples, (0, -len(item.samples) % FRAME)).reshape(-1, FRAME)
                self._record_turn(list(whole), item.name)
            case events.CommitTurn():
                self._commit(item.ask)
            case events.CreateAnswer():
                self._commit(True)
            case events.UpdateSettings():
                self._set(item)
            case events.PastAnswer():
                self.record.recall(item.text, item.calls)
                self._follow()
            case events.SayText() if self._turns.floor == "user":
                self._note("nothing can be said while the user speaks")
            case events.SayText():
                self._answer(0, None, tuple(self.engine.loaded.tokenizer.encode(item.text)))
            case events.DeleteEntry():
                self.record.delete(item.of)
                self._follow()

    def _hear(self, frame: np.ndarray) -> None:
        detection, at, loud = self._turns.detection, self._turns.now, self._loud
        self._recent.append((at, frame))
        while self._recent[0][0] < at - detection.keep:
            self._recent.popleft()
        self._decide(self._turns.hear(len(frame), self._vad.hear(frame, self._listening)))
        self._pass()
        if loud and self._loud:
            self._sound(frame)

    def _pass(self) -> None:
        """Talk over an answer may turn out to be none."""
        if self._over_it and self._turns.state is State.QUIET:
            self._over_it = False
            self._emit(events.FalseInterruption(self._turns.now))

    def _sound(self, frame: np.ndarray, live: bool = True) -> None:
        """`live`: it may come faster than the model takes it."""
        if (live and self.record.row.behind > self.settings.backlog) or not self.record.sound(frame):
            self.dropped += 1

    # -- the input buffer

    def _append(self, frames: list[np.ndarray]) -> None:
        room = self._turns.detection.longest * RATE // 1000 // FRAME - len(self._buffer)
        self.dropped += max(0, len(frames) - room)
        self._buffer += frames[: max(0, room)]
        self._turns.skip(FRAME * len(frames))
        self._stream()

    def _stream(self) -> None:
        """What waits for a commit goes into the row meanwhile, where nothing else goes on."""
        if self._streamed == len(self._buffer) or self._turns.floor == "user" or (self._reply and not self._reply.told):
            return
        self.record.open(self._turns.now)
        for frame in self._buffer[self._streamed :]:
            self._sound(frame)
        self._streamed = len(self._buffer)

    def _commit_buffer(self, item: events.CommitTurn, waits: bool) -> None:
        frames, self._buffer = self._buffer + self._framer.flush(), []
        if not frames:
            self._take(events.CreateAnswer()) if item.ask else None
        elif waits:
            self._take(events.RecordedInput(np.concatenate(frames), item.name))
        else:
            self._record_turn(frames, item.name)
        if frames and item.ask:
            self._take(events.CreateAnswer())

    def _record_turn(self, frames: list[np.ndarray], name: str | None) -> None:
        """A turn of its own, of which some frames may be there."""
        end = self._turns.now
        self._emit(events.TurnStarted(self.record.open(end), end, max(0, end - FRAME * len(frames)), name))
        for frame in frames[self._streamed :]:
            self._sound(frame, live=False)
        self._streamed = 0
        self._close(False, SpeechEnded(end, end, "committed"))

    def _clear(self) -> None:
        if self._streamed:
            self.record.take_out()
            self._follow()
        self._buffer, self._streamed = [], 0
        if self._turns.detection.buffered:
            self._framer = Framer(FRAME)

    def _part(self, part: tape.Typed | tape.Seen) -> bool:
        """Whether the turn has room for it."""
        if self.record.parts == PARTS and self._turns.floor != "user":
            self.record.close(tape.Closed())
        if self.record.parts == PARTS or not self.record.fits(part):
            what = "a picture" if isinstance(part, tape.Seen) else "words"
            self._note(f"there is no room for {what} of this size in a turn", refused=True)
            return False
        turn = self.record.open(self._turns.now)
        index = self.record.part(part)
        self._follow()
        if isinstance(part, tape.Seen):
            self._picture = index
            self._emit(events.PictureAttached(index, turn, part.data))
        return True

    def _seen(self, picture: events.PictureInput) -> tape.Seen:
        assert picture.size
        return tape.Seen(picture.data, *picture.size, self.settings.picture or self.engine.loaded.budget, at=self._turns.now)

    def _look(self) -> None:
        """The newest picture of the camera becomes part of the turn; each is looked at once."""
        if self._camera:
            seen, self._camera = self._seen(self._camera), None
            self._part(seen)

    def _set(self, item: events.UpdateSettings) -> None:
        told = {known.name: value for known in fields(item) if (value := getattr(item, known.name)) is not None}
        self.settings = replace(self.settings, **told)
        self.settings = replace(self.settings, max_tokens=min(self.settings.max_tokens, self._most))
        self._turns.detection = self.settings.detection
        if item.setting and not self.record.fits(item.setting):
            self._note("there is no room for a system prompt and tools of this size; they stay as they are", refused=True)
        elif item.setting:
            self.record.append(item.setting)
            self.record.stale = True
            self._follow()

    # -- turns

    def _decide(self, decisions: Iterable[Decision], ask: bool | None = None) -> None:
        for decision in decisions:
            match decision:
                case SpeechStarted():
                    self._begin(decision)
                case SpeechEnded():
                    self._close(self._asked or (self.settings.answers if ask is None else ask), decision)
                case SpeechDiscarded():
                    self._dismiss(decision)
                case OutputPaused() if self._reply:
                    self._over_it = True
                    before = self._turns.detection.speech + self._turns.detection.pre_roll
                    self._reply.hush(max(0, decision.at - before * RATE // 1000))
                case OutputResumed() if self._reply:
                    self._reply.go_on(decision.heard)
                case BargeIn():
                    self._cut(decision.heard)
                case IdleTimeout():
                    self._emit(events.UserIdle(decision.at))
        if self._later and not self._resuming:
            self._resuming = True
            for _ in range(AT_ONCE):
                self._resume()
            self._resuming = self._reply is None and len(self._later) > 0
            if self._resuming:
                self._spawn(self._resume_rest())
        self._stream()

    def _resume(self) -> None:
        """Takes the first of the inputs that waited until the answer was over, if it is."""
        if self._reply is None and self._later:
            item = self._later.popleft()
            if self._turns.floor == "user" and isinstance(item, events.CommitTurn | events.CreateAnswer):
                self._asked |= isinstance(item, events.CreateAnswer) or item.ask
            else:
                self._take(item, resumed=True)

    async def _resume_rest(self) -> None:
        while self._reply is None and self._later:
            self._resume()
            await asyncio.sleep(0)
        self._resuming = False
        self._stream()

    def _begin(self, began: SpeechStarted) -> None:
        turn, self._loud, self._over_it = self.record.open(began.start), True, False
        self._emit(events.TurnStarted(turn, began.at, began.start))
        if self.settings.camera == "live":
            self._look()
        for at, frame in self._recent:
            if at >= began.start:
                self._sound(frame)

    def _commit(self, ask: bool) -> None:
        if self._turns.floor == "user":
            self._decide(self._turns.commit(), ask)
        elif ask or self.record.turn is not None:
            self._close(ask)

    def _close(self, ask: bool, ended: SpeechEnded | None = None) -> None:
        """The turn, if one is open, is complete."""
        self._loud = False
        record, waiting = self.record, self.record.row.waiting
        if ended and record.turn is not None:
            self._emit(events.TurnStopped(record.turn, ended.at, ended.end, ended.why))
        caption = record.caption() if self.settings.captions else None
        if not ask:
            record.close(tape.Closed())
            self._follow()
        else:
            if record.turn is not None and self.settings.camera != "off":
                self._look()
            self._answer(waiting, ended)
        if caption:
            self._spawn(self._caption(caption))

    def _dismiss(self, discarded: SpeechDiscarded) -> None:
        turn, self._loud = self.record.turn, False
        assert turn is not None
        self.record.take_out()
        self._follow()
        self._emit(events.TurnDiscarded(turn, discarded.at))
        if self._asked and self._reply is None:
            self._close(ask=True)

    async def _caption(self, caption: Caption) -> None:
        text = None
        try:
            text = await caption.words(self.engine.loaded.generation)
        except TROUBLE as error:
            self._emit(events.InputTranscriptionFailed(caption.turn, f"this turn has no caption: {error}"))
        finally:
            caption.fork.release()
        self.record.captioned(caption, text)
        if text is not None:
            self._emit(events.InputTranscribed(caption.turn, text))
        if self._reply is None or self._reply.written:
            self.record.tidy()

    # -- the answer

    def _answer(self, waiting: int, ended: SpeechEnded | None, given: tuple[int, ...] | None = None) -> None:
        of, loaded, self._asked = self.record.ask(), self.engine.loaded, False
        voice = self.voice if self.settings.spoken else None
        reply = AnswerTask(of, self.record, loaded, self.settings, voice, self._picture, self._emit, given)
        reply.waiting = waiting
        if ended:
            reply.stage("speech_end", (ended.end - ended.at) * 1000 / RATE)
        self._reply = reply
        self._given.append(reply)
        self._turns.answering(to_speech=ended is not None)
        self._emit(events.AnswerStarted(of))
        self._giving = self._spawn(self._give(reply))

    async def _give(self, reply: AnswerTask) -> None:
        await reply.run()
        self._ended(reply)
        reply.complete()
        self._decide(self._turns.answered())

    def _ended(self, reply: AnswerTask) -> None:
        self._reply = None
        if reply.lost:
            self.voice = None

    def _hear_out(self, reply: AnswerTask) -> None:
        assert self._giving
        self._giving.cancel()
        self._ended(reply)
        reply.complete()
        self._decide(self._turns.answered())

    def _stop(self) -> None:
        if self._reply:
            self._cut(self._reply.heard)
            self._decide(self._turns.answered())

    def _truncate(self, item: events.TruncateAnswer) -> None:
        if self._reply and self._reply.of == item.answer:
            self._cut(item.sample)
            self._decide(self._turns.answered())
        elif given := next((reply for reply in self._given if reply.of == item.answer), None):
            given.shorten(item.sample)
            if self._reply is None:
                self.record.stale = True
                self._follow()

    def _cut(self, heard: int) -> None:
        reply = self._reply
        assert reply and self._giving
        self._giving.cancel()
        self._ended(reply)
        reply.cut(heard)
        self.record.follow()

    def _return(self, item: events.ToolResult) -> None:
        if self._reply and self._reply.returned(item.call, item.value):
            return
        if not self.record.returned(item.call, item.value):
            self._note("a tool's result came that belongs to no call, or for the second time")
        elif self._reply is None:
            self._follow()

    # -- the row

    def _follow(self) -> None:
        """The row follows the tape as soon as it has nothing else to do. What comes meanwhile it is told at once, and nothing
        twice: to follow item by item made an imported history 20 times as long for the engine."""
        if self.record.stale and self._following is None:
            self._following = self._spawn(self._catch_up())

    async def _catch_up(self) -> None:
        while self.record.stale and (self._reply is None or self._reply.written):
            await self.record.row.drained()
            if self._reply is None or self._reply.written:
                self.record.catch_up()
        self._following = None

    # -- the outside

    def _note(self, message: str, refused: bool = False) -> None:
        self._emit(events.Notice(message, refused))

    def _emit(self, event: Event) -> None:
        if self._out.qsize() < self.settings.unread:
            self._out.put_nowait(event)
        else:
            self._end_with(ConsumerStalled(f"the door has left {self.settings.unread} events lying; the conversation is over"))

    async def _send(self, emit: Callable[[Event], Awaitable[None]]) -> None:
        while True:
            await emit(await self._out.get())
            self._out.task_done()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._end_with(error)

    def _end_with(self, error: BaseException | None) -> None:
        if not self._over.done():
            self._over.set_result(error)
