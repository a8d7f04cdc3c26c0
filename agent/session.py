"""One conversation: `Session.run(inputs, emit)` is the seam behind every door.

Everything is decided on the event loop, in one place, as inputs come. While the user has the floor each frame goes into the
row at once, so that a turn's end leaves nothing to do but the closing. An answer is three tasks: one writes, one speaks, one
plays; stopping it cancels them, and tape and row go back to the last word that was heard.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal

import numpy as np

from agent import events, tape
from agent.answer import Answer, Piece
from agent.calls import BrokenCall, ToolCall
from agent.engine import Engine, EngineStopped, RowLost
from agent.events import Event, Input
from agent.journal import JournalError
from agent.marks import Mark
from agent.prompt import Thought
from agent.record import Caption, Record
from agent.speech import Clauses, Playback
from agent.turns import Began, Discarded, Ended, Hushed, Idle, Interrupted, Manners, TakenUp, Turns
from agent.turns import Event as Decision
from agent.view import Budget, Policy
from model.cache import RowFull
from model.sampling import Generation
from model.vad import FRAME, Vad
from streams.files import decode_picture
from streams.frames import RATE, Audio, Framer, MediaError
from streams.voice import Chunk, Stream, Voice

TROUBLE = (RowFull, RowLost, EngineStopped, JournalError, MediaError)  # ends one conversation, with a sentence
LARGEST = 1120  # positions of a picture
VOICES = ThreadPoolExecutor(64, "voice")  # those that wait for a voice: one that stalls must not keep others waiting


class DoorStuck(RuntimeError):
    """The door takes no events any more."""


@dataclass(frozen=True)
class Settings:
    policy: Policy = "transcripts"
    budget: Budget = field(default_factory=Budget)
    manners: Manners = field(default_factory=Manners)
    setting: tape.Setting = field(default_factory=tape.Setting)
    camera: Literal["off", "end", "live"] = "end"  # when its newest picture is looked at: never, as a turn ends, as it begins too
    picture: int | None = None  # soft tokens; None: as the checkpoint says
    how: Generation | None = None  # None: as the checkpoint says
    seed: int | None = None
    most: int = 512  # tokens of an answer
    answers: bool = True  # a spoken turn is answered as soon as it ends
    captions: bool = True
    ahead: float = 0.3  # seconds of sound that are sent before they are heard
    patience: float = 10.0  # seconds without sound after which the voice is given up
    backlog: int = 750  # positions that may wait for a model which is too slow; frames beyond are lost, and counted
    unread: int = 1024  # events that a door may leave lying


@dataclass(frozen=True, slots=True)
class _Picture:
    """One that was shown and can be decoded."""

    show: events.Show
    height: int
    width: int


@dataclass(eq=False)
class _Reply:
    """The answer that is being given."""

    of: int  # the tape's Asked
    answer: Answer
    sound: Playback | None
    waiting: int  # positions that were not in the row when the turn ended
    began: float = field(default_factory=perf_counter)
    prompt: int = 0  # positions in the row before it
    finish: Literal["stop", "length", "interrupted", "tool", "failed"] = "length"
    written: bool = False
    calls: set[int] = field(default_factory=set)  # without a result
    returned: asyncio.Event = field(default_factory=asyncio.Event)
    clauses: asyncio.Queue[tuple[int, str] | None] = field(default_factory=asyncio.Queue)  # bounded by the answer's length
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # something was made or heard, or may be sent again
    stages: dict[str, float] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def stage(self, name: str) -> None:
        self.stages.setdefault(name, (perf_counter() - self.began) * 1000)


class Session:
    """Takes its row here: NoRow or EngineStopped is raised before anything begins. `run` gives it back."""

    def __init__(
        self, engine: Engine, vad: Vad, voice: Voice | None = None, settings: Settings | None = None, on: tape.Tape | None = None
    ) -> None:
        self.engine, self.voice, self.settings = engine, voice, settings or Settings()
        self.dropped = 0  # frames lost to a model that is too slow, or to a turn that is too long
        self._vad, self._listening = vad, vad.start()
        self._turns, self._framer = Turns(self.settings.manners), Framer(FRAME)
        self._recent: deque[tuple[int, np.ndarray]] = deque()  # frames that may turn out to have begun a turn
        self._loud = False  # the open turn takes sound
        self._picture: int | None = None  # the newest that was looked at: marks are on it
        self._camera: _Picture | None = None
        self._reply: _Reply | None = None
        self._later: list[Input | _Picture] = []  # until the answer is over
        self._tasks: set[asyncio.Task[Any]] = set()
        self._out: asyncio.Queue[Event] = asyncio.Queue(self.settings.unread)
        self._over: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        loaded, s = engine.loaded, self.settings
        limit = engine.length - s.most - len(loaded.prompt.close_turn(True)) - 8
        row, config, note = engine.claim(self._end_with), loaded.model.config, self._note
        self.record = Record(on or tape.Tape(), row, loaded.prompt, config, s.budget, s.policy, limit, note)

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
            if trouble is not None and not isinstance(trouble, TROUBLE):
                raise trouble
            rest = asyncio.create_task(self._out.join())
            await asyncio.wait({rest, sender}, timeout=self.settings.patience, return_when=asyncio.FIRST_COMPLETED)
            rest.cancel()
        finally:
            sender.cancel()
        if trouble is not None:
            await emit(events.Failed(str(trouble)))

    # -- inputs

    async def _read(self, inputs: AsyncIterator[Input]) -> None:
        async for item in inputs:
            if isinstance(item, events.Show):
                try:
                    pixels = await asyncio.to_thread(decode_picture, item.data, "the picture")
                except MediaError as error:
                    self._note(str(error))
                    continue
                self._take(_Picture(item, *pixels.shape[:2]))
            else:
                self._take(item)
        self._end_with(None)

    def _take(self, item: Input | _Picture) -> None:
        reply = self._reply
        match item:
            case Audio():
                for frame in self._framer.push(item.samples):
                    self._hear(frame)
            case events.Heard():
                if reply and reply.sound and item.answer == reply.of:
                    self._turns.heard(reply.sound.hear(item.sample))
                    reply.moved.set()
            case events.Press():
                self._decide(self._turns.press())
            case events.Release():
                self._decide(self._turns.release())
            case events.Forget():
                self._decide(self._turns.cancel())
            case events.Stop():
                self._stop()
            case events.Returned():
                self._returned(item)
            case _Picture() if item.show.live:
                self._camera = item
            case events.Write() if reply and item.ask:
                self._stop()
                self._take(item)
            case _ if reply:
                self._later.append(item)
            case events.Write():
                if item.text.strip():
                    self._part(tape.Typed(item.text), len(item.text) // 2)
                if item.ask and self._turns.floor is None:
                    self._close(ask=True)
            case _Picture():
                self._part(self._seen(item), LARGEST)
            case events.Commit():
                self._commit(item.ask)
            case events.Ask():
                self._commit(True)
            case events.Set():
                self._set(item)

    def _hear(self, frame: np.ndarray) -> None:
        manners, at, loud = self._turns.manners, self._turns.now, self._loud
        self._recent.append((at, frame))
        while self._recent[0][0] < at - manners.keep:
            self._recent.popleft()
        self._decide(self._turns.hear(len(frame), self._vad.hear(frame, self._listening)))
        if loud and self._loud:
            self._sound(frame)

    def _sound(self, frame: np.ndarray) -> None:
        if self.record.row.waiting > self.settings.backlog or not self.record.sound(frame):
            self.dropped += 1

    def _part(self, part: tape.Typed | tape.Seen, positions: int) -> None:
        if not self.record.room(positions):
            self._note(f"this turn has no room for {positions} more positions; what came was not taken")
            return
        turn = self.record.open(self._turns.now)
        index = self.record.part(part)
        if isinstance(part, tape.Seen):
            self._picture = index
            self._emit(events.Looked(index, turn, part.data))

    def _seen(self, picture: _Picture) -> tape.Seen:
        budget = self.settings.picture or self.engine.loaded.budget
        return tape.Seen(picture.show.data, picture.height, picture.width, budget, at=self._turns.now)

    def _look(self) -> None:
        """The newest picture of the camera becomes part of the turn; each is looked at once."""
        if self._camera:
            seen, self._camera = self._seen(self._camera), None
            self._part(seen, LARGEST)

    def _set(self, item: events.Set) -> None:
        told = {name: value for name in ("manners", "camera", "setting") if (value := getattr(item, name)) is not None}
        self.settings = replace(self.settings, **told)
        self._turns.manners = self.settings.manners
        if item.setting:
            self.record.append(item.setting)
            self.record.follow()

    # -- turns

    def _decide(self, decisions: Iterable[Decision], ask: bool | None = None) -> None:
        for decision in decisions:
            match decision:
                case Began():
                    self._begin(decision)
                case Ended():
                    self._close(self.settings.answers if ask is None else ask, decision)
                case Discarded():
                    self._dismiss(decision)
                case Hushed():
                    self._hush()
                case TakenUp() if self._reply and self._reply.sound:
                    self._reply.sound.go_on(decision.heard)
                    self._reply.moved.set()
                case Interrupted():
                    self._cut(decision.heard)
                case Idle():
                    self._emit(events.Quiet(decision.at))

    def _begin(self, began: Began) -> None:
        turn, self._loud = self.record.open(began.start), True
        self._emit(events.Started(turn, began.at, began.start))
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

    def _close(self, ask: bool, ended: Ended | None = None) -> None:
        """The turn, if one is open, is complete."""
        self._loud = False
        record, waiting = self.record, self.record.row.waiting
        began = perf_counter()
        if ended and record.turn is not None:
            self._emit(events.Stopped(record.turn, ended.at, ended.end, ended.why))
        caption = record.caption() if self.settings.captions else None
        if not ask:
            record.close(tape.Closed())
        else:
            if record.turn is not None and self.settings.camera != "off":
                self._look()
            self._answer(_Reply(record.ask(), *self._blank(), waiting, began), ended)
        if caption:
            self._spawn(self._caption(caption))

    def _dismiss(self, discarded: Discarded) -> None:
        turn, self._loud = self.record.turn, False
        assert turn is not None
        if all(isinstance(entry, tape.Sound) for entry in self.record.tape.entries[turn + 1 :]):
            self.record.close(tape.Deleted(turn))
        self._emit(events.Dismissed(turn, discarded.at))

    async def _caption(self, caption: Caption) -> None:
        loaded = self.engine.loaded
        answer = Answer(loaded.tokenizer)
        text = None
        try:
            async with aclosing(caption.generate(loaded.generation)) as drawn:
                async for token, _ in drawn:
                    answer.push(token)
            answer.flush()
            text = answer.text.strip()
        except TROUBLE as error:
            self._note(f"this turn has no caption: {error}")
        finally:
            caption.fork.release()
        self.record.captioned(caption, text)
        if text is not None:
            self._emit(events.Captioned(caption.turn, text))
        self._tidy()

    # -- the answer

    def _blank(self) -> tuple[Answer, Playback | None]:
        return Answer(self.engine.loaded.tokenizer, self.record.thinking), Playback(self.voice.rate) if self.voice else None

    def _answer(self, reply: _Reply, ended: Ended | None) -> None:
        self._reply = reply
        if ended:
            reply.stages["speech_end"] = (ended.end - ended.at) * 1000 / RATE
        self._turns.answering()
        self._emit(events.Answering(reply.of))
        reply.tasks.append(self._spawn(self._write(reply)))
        if reply.sound:
            reply.tasks += [self._spawn(self._speak(reply, reply.sound)), self._spawn(self._play(reply, reply.sound))]

    async def _write(self, reply: _Reply) -> None:
        settings, record, answer, clauses = self.settings, self.record, reply.answer, Clauses()
        how, stretch = settings.how or self.engine.loaded.generation, answer.stretches[-1]
        while True:
            closing, newest = record.closing(), -1
            reply.prompt, reply.finish = record.positions, "length"
            reply.stage("closing")
            drawing = record.row.generate(*closing, how=how, most=settings.most - answer.tokens, seed=settings.seed)
            async with aclosing(drawing) as drawn:
                async for token, _ in drawn:
                    reply.stage("first_token")
                    if newest >= 0:
                        record.wrote(newest)  # the last one is never in the row
                    newest = token
                    self._tell(reply, answer.push(token), clauses)
                    reply.finish = "stop" if token in how.stop else "length"
            self._tell(reply, answer.flush(), clauses)
            self._keep(reply)
            if not stretch.calls or answer.tokens >= settings.most:
                break
            reply.finish = "tool"
            for call in stretch.calls:
                index = record.append(tape.Called(stretch.entry, call.name, call.arguments))
                reply.calls.add(index)
                self._emit(events.Called(reply.of, index, call))
            while reply.calls:
                reply.returned.clear()
                await reply.returned.wait()
            stretch = answer.begin()
        reply.written = True
        reply.stage("written")
        for clause in [*clauses.flush(), None]:
            reply.clauses.put_nowait(clause)
        self._tidy()
        if reply.sound is None:
            self._finish(reply)

    def _tell(self, reply: _Reply, pieces: list[Piece], clauses: Clauses) -> None:
        for piece in pieces:
            match piece:
                case str():
                    reply.stage("first_text")
                    self._emit(events.Wrote(reply.of, piece))
                    for clause in clauses.push(piece):
                        reply.clauses.put_nowait(clause)
                    if reply.sound is None:
                        self._turns.heard(len(reply.answer.text))
                case Mark():
                    self._emit(events.Marked(reply.of, self._picture, piece))
                case Thought():
                    self._emit(events.Reasoned(reply.of, piece.text))
                case BrokenCall():
                    self._note(f"the model called a tool in a way that cannot be read: {piece.text[:200]}")
                case ToolCall():
                    pass  # once the stretch is on the tape

    def _keep(self, reply: _Reply) -> None:
        """What was written since the last tools goes on the tape."""
        stretch = reply.answer.stretches[-1]
        stretch.entry = self.record.append(tape.Answered(tuple(stretch.ids), reply.answer.text[stretch.begun :]))

    def _returned(self, item: events.Returned) -> None:
        if self._reply and item.call in self._reply.calls:
            self.record.append(tape.Result(item.call, item.value))
            self._reply.calls.discard(item.call)
            self._reply.returned.set()
        else:
            self._note("a tool's result came that nobody waits for")

    async def _speak(self, reply: _Reply, sound: Playback) -> None:
        """Clauses become sound, until all of it is made."""
        voice, loop = self.voice, asyncio.get_running_loop()
        while voice and (clause := await reply.clauses.get()):
            start, text = clause
            base = sound.made
            try:
                with voice.speak(text) as stream:
                    while chunk := await asyncio.wait_for(loop.run_in_executor(VOICES, _next, stream), self.settings.patience):
                        words = [events.Spoken(start + w.start, start + w.end, base + w.sample) for w in chunk.words]
                        sound.make(chunk.pcm, words)
                        reply.moved.set()
            except (TimeoutError, RuntimeError, OSError, ValueError) as error:
                self.voice = voice = None
                why = "it stalled" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
                self._note(f"the voice is lost, answers go on as text: {why}")
        while not reply.written:
            await reply.clauses.get()
        sound.complete = True
        reply.moved.set()

    async def _play(self, reply: _Reply, sound: Playback) -> None:
        """Sound goes out as fast as it is heard; when all of it was, the answer is over."""
        while not sound.over:
            reply.moved.clear()
            while piece := sound.send(self.settings.ahead):
                reply.stage("first_sound")
                at, pcm, words = piece
                self._emit(events.Said(reply.of, at, pcm, sound.rate, words))
            await reply.moved.wait()
        self._finish(reply)

    def _tidy(self) -> None:
        if self._reply is None or (self._reply.written and not self._reply.calls):
            self.record.tidy()

    def _finish(self, reply: _Reply) -> None:
        self._over_with(reply, len(reply.answer.text))
        self._decide(self._turns.answered())
        self._take_up()

    def _over_with(self, reply: _Reply, heard: int) -> None:
        answer, self._reply = reply.answer, None
        reply.stage("over")
        self._emit(events.Answered(reply.of, answer.text, heard, reply.finish, reply.prompt, answer.tokens))
        self._emit(events.Timed(reply.of, reply.stages, reply.waiting))

    def _take_up(self) -> None:
        later, self._later = self._later, []
        for item in later:
            self._take(item)

    def _hush(self) -> None:
        if self._reply and self._reply.sound and not self._reply.sound.held:
            self._reply.sound.held = True
            self._emit(events.Cleared(self._reply.of))

    def _stop(self) -> None:
        if self._reply:
            self._cut(self._reply.sound.whole if self._reply.sound else 0)
            self._decide(self._turns.answered())
            self._take_up()

    def _cut(self, heard: int) -> None:
        """The answer ends at its sample `heard`, a whole word's end; what came after was never said. Text alone was read."""
        reply = self._reply
        assert reply
        for task in reply.tasks:
            task.cancel()
        if reply.answer.stretches[-1].entry < 0:
            self._keep(reply)
        self._hush()
        characters = reply.sound.characters(heard) if reply.sound else len(reply.answer.text)
        for stretch in reply.answer.stretches:
            if (ids := stretch.until(characters)) < len(stretch.ids):
                self.record.append(tape.Heard(stretch.entry, ids))
        self.record.stopped()
        reply.finish = "interrupted"
        self._over_with(reply, characters)
        self.record.follow()

    # -- the outside

    def _note(self, message: str) -> None:
        self._emit(events.Noted(message))

    def _emit(self, event: Event) -> None:
        try:
            self._out.put_nowait(event)
        except asyncio.QueueFull:
            self._end_with(DoorStuck(f"the door has left {self._out.maxsize} events lying; the conversation is over"))

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


def _next(stream: Stream) -> Chunk | None:
    return next(stream, None)
