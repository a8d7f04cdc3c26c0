"""One answer as it is given: the model writes it, the voice speaks it and the door plays it, all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from time import perf_counter
from typing import Literal

from agent import events, tape
from agent.answer_parser import AnswerParser, Piece
from agent.calls import BrokenCall, ToolCall
from agent.checkpoint import LoadedModel
from agent.context import Context
from agent.conversation_config import ConversationConfig
from agent.events import Event
from agent.marks import Mark
from agent.prompt import Thought
from agent.speech import Clauses, Playback
from streams.voice import SpeechChunk, Stream, Voice

VOICES = ThreadPoolExecutor(64, "voice")  # those that wait for a voice: one that stalls must not keep others waiting


class AnswerTask:
    """The answer `of`, written on the record and told with `emit`. `run` ends when all of it was heard, or read where there is
    no voice; whoever cancels it says with `cut` how much of it counts. `picture`: marks are on it. `given`: the ids it consists
    of, where the model is not asked. `out_of_band`: nobody brings results of its calls, and its row is not used again."""

    def __init__(
        self,
        of: int,
        record: Context,
        loaded: LoadedModel,
        settings: ConversationConfig,
        voice: Voice | None,
        picture: int | None,
        emit: Callable[[Event], None],
        given: tuple[int, ...] | None = None,
        out_of_band: bool = False,
    ) -> None:
        self._given = given
        self.of, self.written, self.lost = of, False, False  # `lost`: its voice is
        self.waiting = 0  # positions that were not in the row when the turn ended
        self._record, self._settings, self._voice, self._picture, self._emit = record, settings, voice, picture, emit
        self._sampling = settings.sampling or loaded.generation
        self._answer, self._clauses = AnswerParser(loaded.tokenizer, record.thinking), Clauses()
        self._sound = Playback(voice.rate) if voice else None
        self._speakable: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()  # bounded by the answer's length
        self._moved = asyncio.Event()  # something was made or heard, or may be sent again
        self._calls: set[int] = set()  # without a result
        self._out_of_band = out_of_band
        self.told = False  # all of it is out, and what is left is to be heard
        self._returned = asyncio.Event()
        self._prompt, self._kinds = 0, (0, 0, 0)  # positions in the row before it
        self._finish: Literal["stop", "length", "interrupted"] = "length"
        self._began, self._stages = perf_counter(), dict[str, float]()

    async def run(self) -> None:
        work = [self._write()]
        if self._sound:
            work += [self._speak(self._sound), self._play(self._sound)]
        tasks = [asyncio.create_task(part) for part in work]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stage(self, name: str, milliseconds: float | None = None) -> None:
        """When it was reached for the first time; now, if nothing is said."""
        self._stages.setdefault(name, (perf_counter() - self._began) * 1000 if milliseconds is None else milliseconds)

    # -- what the door says

    @property
    def heard(self) -> int:
        """Samples, to the end of a whole word; characters where there is no sound."""
        return self._sound.whole if self._sound else len(self._answer.text)

    def hear(self, sample: int) -> None:
        """So much was played."""
        if self._sound:
            self._sound.hear(sample)
            self._moved.set()

    def hush(self, start: int | None = None) -> None:
        """Nothing more is played until `go_on`; since `start` someone talks."""
        if self._sound and not self._sound.held:
            self._sound.held = True
            self._emit(events.OutputCleared(self.of, start))

    def go_on(self, sample: int) -> None:
        if self._sound:
            self._sound.go_on(sample)
            self._moved.set()

    def returned(self, call: int, value: object) -> bool:
        """What came of a tool; False if nobody waits for it."""
        if call not in self._calls or not self._record.returned(call, value):
            return False
        self._calls.discard(call)
        self._returned.set()
        return True

    # -- how it ends

    def cut(self, heard: int) -> None:
        """The answer, which is being cancelled, ends at `heard`; what comes after was never said. Text alone was read."""
        self.hush()
        if self._answer.stretches[-1].entry < 0:
            self._keep()
        self._record.stopped()
        self._finish = "interrupted"
        self._over(self.shorten(heard))

    def shorten(self, heard: int) -> int:
        """Of what was written only so much counts, here or once the answer is over; returns how many characters that is."""
        characters = self._sound.characters(heard) if self._sound else len(self._answer.text)
        for stretch in self._answer.stretches:
            if (ids := stretch.until(characters)) < len(stretch.ids):
                self._record.append(tape.Heard(stretch.entry, ids))
        return characters

    def complete(self) -> None:
        self._over(len(self._answer.text))

    def _over(self, heard: int) -> None:
        self.stage("over")
        answer = self._answer
        self._emit(events.AnswerDone(self.of, answer.text, heard, self._finish, self._prompt, answer.tokens))
        self._emit(events.AnswerTimings(self.of, self._stages, self.waiting))

    # -- the three

    async def _write(self) -> None:
        answer, record, stretch = self._answer, self._record, self._answer.stretches[-1]
        while True:
            if self._given is None:
                await self._stretch()
            else:
                self._quote(self._given)
            self._tell(answer.flush())
            self._say(self._clauses.flush())
            self._keep()
            if not stretch.calls or answer.tokens >= self._settings.max_tokens:
                break
            for more, call in reversed([*enumerate(reversed(stretch.calls))]):
                index = record.append(tape.Called(stretch.entry, call.name, call.arguments))
                self._calls.add(index)
                self._emit(events.ToolCalled(self.of, index, call, more))
            if self._out_of_band:
                break
            while self._calls:
                self._returned.clear()
                await self._returned.wait()
            stretch = answer.begin()
        self.written = True
        self.stage("written")
        self._speakable.put_nowait(None)
        if not self._sound:
            self._all_told()
        if not self._out_of_band:
            record.tidy()

    def _all_told(self) -> None:
        if not self.told:
            self.told = True
            self._emit(events.OutputSent(self.of, "stop" if self._finish == "stop" else "length"))

    async def _stretch(self) -> None:
        answer, record, settings, newest = self._answer, self._record, self._settings, -1
        closing = record.closing()
        self._prompt, self._kinds, self._finish = record.positions, record.kinds(), "length"
        self.stage("closing")
        if settings.calls and len(answer.stretches) == 1:
            begun = record.prompt.open_call(settings.calls[0] if len(settings.calls) == 1 else "")
            closing = (*closing, tuple(begun))
            for id in begun:
                record.wrote(id)
                self._tell(answer.push(id))
        most = max(1, settings.max_tokens - answer.tokens)
        async with aclosing(record.row.generate(*closing, sampling=self._sampling, max_tokens=most, seed=settings.seed)) as drawn:
            async for token, _ in drawn:
                self.stage("first_token")
                if newest >= 0:
                    record.wrote(newest)  # the last one is never in the row
                newest = token
                self._tell(answer.push(token))
                self._finish = "stop" if token in self._sampling.stop else "length"

    def _quote(self, ids: tuple[int, ...]) -> None:
        self._prompt, self._kinds, self._finish = self._record.positions, self._record.kinds(), "stop"
        for id in ids:
            self._tell(self._answer.push(id))

    def _tell(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            match piece:
                case str():
                    self.stage("first_text")
                    self._emit(events.TextDelta(self.of, piece))
                    self._say(self._clauses.push(piece))
                case Mark():
                    self._emit(events.MarkAdded(self.of, self._picture, piece))
                case Thought():
                    self._emit(events.ThoughtDelta(self.of, piece.text))
                case BrokenCall():
                    self._emit(events.Notice(f"the model called a tool in a way that cannot be read: {piece.text[:200]}"))
                case ToolCall():
                    pass  # once the stretch is on the tape

    def _say(self, clauses: list[tuple[int, str]]) -> None:
        for clause in clauses:
            self._speakable.put_nowait(clause)

    def _keep(self) -> None:
        """What was written since the last tools goes on the tape."""
        stretch = self._answer.stretches[-1]
        stretch.entry = self._record.append(tape.Answered(tuple(stretch.ids), self._answer.text[stretch.begun :]))
        self._emit(events.UsageCounted(self.of, *self._kinds, len(stretch.ids)))

    async def _speak(self, sound: Playback) -> None:
        """Clauses become sound, until all of it is made."""
        while clause := await self._speakable.get():
            if self._voice and not self.lost:
                try:
                    await self._made(sound, self._voice, *clause)
                except Exception as error:  # noqa: BLE001  a voice may fail in any way, and never fails the answer
                    self.lost = True
                    why = "it stalled" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
                    self._emit(events.Notice(f"the voice is lost, answers go on as text: {why}"))
        sound.complete = True
        self._moved.set()

    async def _made(self, sound: Playback, voice: Voice, start: int, text: str) -> None:
        base, loop = sound.made, asyncio.get_running_loop()
        with voice.speak(text, self._answer.text[:start]) as stream:
            while True:
                # Not asyncio.wait_for: Python 3.11's swallows a cancellation that comes with the result, and every fourth
                # answer that was interrupted spoke on to nobody and was never let go of.
                async with asyncio.timeout(self._settings.patience):
                    chunk = await loop.run_in_executor(VOICES, _next, stream)
                if chunk is None:
                    break
                words = [events.WordTiming(start + w.start, start + w.end, base + w.sample) for w in chunk.words]
                sound.make(chunk.pcm, words)
                self._moved.set()
        sound.pause(start + len(text))

    async def _play(self, sound: Playback) -> None:
        """Sound goes out as fast as it is heard."""
        while not sound.over:
            self._moved.clear()
            while piece := sound.send(self._settings.ahead):
                self.stage("first_sound")
                at, pcm, words = piece
                self._emit(events.AudioDelta(self.of, at, pcm, sound.rate, words))
            if sound.complete and sound.sent == sound.made:
                self._all_told()
            await self._moved.wait()
        self._all_told()


def _next(stream: Stream) -> SpeechChunk | None:
    return next(stream, None)
