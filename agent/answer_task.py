"""One answer while it is produced: the model generates it, the voice speaks it and the door plays it, all at the same time."""

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

VOICES = ThreadPoolExecutor(64, "voice")  # threads that wait for a voice: one that stalls must not block others


class AnswerTask:
    """The answer with index `entry` on the tape. `run` ends when all of it was played, or written where there is no voice; who
    cancels `run` calls `interrupt` with how much was heard. `picture`: the one its marks refer to. `given`: the token ids of an
    answer that is not generated. `out_of_band`: nobody returns results of its calls, and its row is not used again."""

    def __init__(
        self,
        entry: int,
        context: Context,
        loaded: LoadedModel,
        settings: ConversationConfig,
        voice: Voice | None,
        picture: int | None,
        emit: Callable[[Event], None],
        given: tuple[int, ...] | None = None,
        out_of_band: bool = False,
    ) -> None:
        self._given = given
        self.entry, self.written, self.voice_failed = entry, False, False
        self.waiting = 0  # positions not prefilled yet when the turn ended
        self._context, self._settings, self._voice, self._picture, self._emit = context, settings, voice, picture, emit
        self._sampling = settings.sampling or loaded.generation
        self._answer, self._clauses = AnswerParser(loaded.tokenizer, context.thinking), Clauses()
        self._sound = Playback(voice.rate) if voice else None
        self._clauses_to_speak: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()  # bounded by the answer's length
        self._playback_changed = asyncio.Event()  # set when audio was synthesized or heard, or playback resumed
        self._pending_calls: set[int] = set()  # without a result
        self._out_of_band = out_of_band
        self.all_sent = False  # all text and audio was emitted; what is left is playback
        self._result_arrived = asyncio.Event()
        self._prompt, self._kinds = 0, (0, 0, 0)  # positions in the row before it
        self._finish_reason: Literal["stop", "length", "interrupted"] = "length"
        self._started, self._stages = perf_counter(), dict[str, float]()

    async def run(self) -> None:
        coroutines = [self._write()]
        if self._sound:
            coroutines += [self._speak(self._sound), self._play(self._sound)]
        tasks = [asyncio.create_task(part) for part in coroutines]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def mark_stage(self, name: str, milliseconds: float | None = None) -> None:
        """Records when a stage was first reached, by default now."""
        self._stages.setdefault(name, (perf_counter() - self._started) * 1000 if milliseconds is None else milliseconds)

    # -- reports from the door

    @property
    def heard(self) -> int:
        """Samples played, to the end of the last whole word; characters where there is no voice."""
        return self._sound.heard_to_word_end if self._sound else len(self._answer.text)

    def hear(self, sample: int) -> None:
        """Playback has reached `sample`."""
        if self._sound:
            self._sound.hear(sample)
            self._playback_changed.set()

    def pause(self, start: int | None = None) -> None:
        """Stops playback until `resume`. `start`: the sample on the microphone's clock since which there is speech over it."""
        if self._sound and not self._sound.paused:
            self._sound.paused = True
            self._emit(events.OutputCleared(self.entry, start))

    def resume(self, sample: int) -> None:
        """Plays on from `sample`."""
        if self._sound:
            self._sound.resume(sample)
            self._playback_changed.set()

    def returned(self, call: int, value: object) -> bool:
        """The result of a call; False if this answer does not wait for it."""
        if call not in self._pending_calls or not self._context.returned(call, value):
            return False
        self._pending_calls.discard(call)
        self._result_arrived.set()
        return True

    # -- the end

    def interrupt(self, heard: int) -> None:
        """Ends a cancelled answer and truncates it to `heard`; without a voice all text so far counts as read."""
        self.pause()
        if self._answer.parts[-1].entry < 0:
            self._append_to_tape()
        self._context.stopped()
        self._finish_reason = "interrupted"
        self._emit_done(self.truncate(heard))

    def truncate(self, heard: int) -> int:
        """Truncates the answer to `heard`, while it runs or later. Returns how many characters were heard."""
        characters = self._sound.characters(heard) if self._sound else len(self._answer.text)
        for part in self._answer.parts:
            if (ids := part.count_ids(characters)) < len(part.ids):
                self._context.append(tape.Heard(part.entry, ids))
        return characters

    def complete(self) -> None:
        """Ends an answer that was heard to its end."""
        self._emit_done(len(self._answer.text))

    def _emit_done(self, heard: int) -> None:
        self.mark_stage("over")
        answer = self._answer
        self._emit(events.AnswerDone(self.entry, answer.text, heard, self._finish_reason, self._prompt, answer.tokens))
        self._emit(events.AnswerTimings(self.entry, self._stages, self.waiting))

    # -- generation, speech, playback

    async def _write(self) -> None:
        answer, context, part = self._answer, self._context, self._answer.parts[-1]
        while True:
            if self._given is None:
                await self._generate()
            else:
                self._write_given(self._given)
            self._emit_pieces(answer.flush())
            self._queue_clauses(self._clauses.flush())
            self._append_to_tape()
            if not part.calls or answer.tokens >= self._settings.max_tokens:
                break
            for more, call in reversed([*enumerate(reversed(part.calls))]):
                index = context.append(tape.Called(part.entry, call.name, call.arguments))
                self._pending_calls.add(index)
                self._emit(events.ToolCalled(self.entry, index, call, more))
            if self._out_of_band:
                break
            while self._pending_calls:
                self._result_arrived.clear()
                await self._result_arrived.wait()
            part = answer.begin()
        self.written = True
        self.mark_stage("written")
        self._clauses_to_speak.put_nowait(None)
        if not self._sound:
            self._mark_all_sent()
        if not self._out_of_band:
            context.tidy()

    def _mark_all_sent(self) -> None:
        if not self.all_sent:
            self.all_sent = True
            self._emit(events.OutputSent(self.entry, "stop" if self._finish_reason == "stop" else "length"))

    async def _generate(self) -> None:
        answer, context, settings, pending = self._answer, self._context, self._settings, -1
        closing = context.closing()
        self._prompt, self._kinds, self._finish_reason = context.positions, context.kinds(), "length"
        self.mark_stage("closing")
        if settings.calls and len(answer.parts) == 1:
            call_start = context.prompt.open_call(settings.calls[0] if len(settings.calls) == 1 else "")
            closing = (*closing, tuple(call_start))
            for id in call_start:
                context.wrote(id)
                self._emit_pieces(answer.push(id))
        max_tokens = max(1, settings.max_tokens - answer.tokens)
        generated = context.row.generate(*closing, sampling=self._sampling, max_tokens=max_tokens, seed=settings.seed)
        async with aclosing(generated) as tokens:
            async for token, _ in tokens:
                self.mark_stage("first_token")
                if pending >= 0:
                    context.wrote(pending)  # the last token is sampled but never prefilled
                pending = token
                self._emit_pieces(answer.push(token))
                self._finish_reason = "stop" if token in self._sampling.stop else "length"

    def _write_given(self, ids: tuple[int, ...]) -> None:
        self._prompt, self._kinds, self._finish_reason = self._context.positions, self._context.kinds(), "stop"
        for id in ids:
            self._emit_pieces(self._answer.push(id))

    def _emit_pieces(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            match piece:
                case str():
                    self.mark_stage("first_text")
                    self._emit(events.TextDelta(self.entry, piece))
                    self._queue_clauses(self._clauses.push(piece))
                case Mark():
                    self._emit(events.MarkAdded(self.entry, self._picture, piece))
                case Thought():
                    self._emit(events.ThoughtDelta(self.entry, piece.text))
                case BrokenCall():
                    self._emit(events.Notice(f"the model called a tool in a way that cannot be read: {piece.text[:200]}"))
                case ToolCall():
                    pass  # emitted once the part is on the tape

    def _queue_clauses(self, clauses: list[tuple[int, str]]) -> None:
        for clause in clauses:
            self._clauses_to_speak.put_nowait(clause)

    def _append_to_tape(self) -> None:
        """Appends the finished part to the tape."""
        part = self._answer.parts[-1]
        part.entry = self._context.append(tape.Answered(tuple(part.ids), self._answer.text[part.start :]))
        self._emit(events.UsageCounted(self.entry, *self._kinds, len(part.ids)))

    async def _speak(self, sound: Playback) -> None:
        """Synthesizes the clauses as they come."""
        while clause := await self._clauses_to_speak.get():
            if self._voice and not self.voice_failed:
                try:
                    await self._synthesize(sound, self._voice, *clause)
                except Exception as error:  # noqa: BLE001  a voice may fail in any way; the answer goes on
                    self.voice_failed = True
                    reason = "it stalled" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
                    self._emit(events.Notice(f"the voice failed, answers go on as text: {reason}"))
        sound.complete = True
        self._playback_changed.set()

    async def _synthesize(self, sound: Playback, voice: Voice, start: int, text: str) -> None:
        base, loop = sound.synthesized, asyncio.get_running_loop()
        with voice.speak(text, self._answer.text[:start]) as stream:
            while True:
                # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that arrives with the result, and every fourth
                # interrupted answer went on speaking and was never freed.
                async with asyncio.timeout(self._settings.patience):
                    chunk = await loop.run_in_executor(VOICES, _next, stream)
                if chunk is None:
                    break
                words = [events.WordTiming(start + w.start, start + w.end, base + w.sample) for w in chunk.words]
                sound.add(chunk.pcm, words)
                self._playback_changed.set()
        sound.end_clause(start + len(text))

    async def _play(self, sound: Playback) -> None:
        """Emits audio at most `settings.ahead` seconds ahead of what was heard."""
        while not sound.finished:
            self._playback_changed.clear()
            while piece := sound.send(self._settings.ahead):
                self.mark_stage("first_sound")
                at, pcm, words = piece
                self._emit(events.AudioDelta(self.entry, at, pcm, sound.rate, words))
            if sound.complete and sound.sent == sound.synthesized:
                self._mark_all_sent()
            await self._playback_changed.wait()
        self._mark_all_sent()


def _next(stream: Stream) -> SpeechChunk | None:
    return next(stream, None)
