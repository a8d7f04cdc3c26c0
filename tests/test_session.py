"""Whole conversations: nano as it speaks, and a tiny model whose words are given, behind a door that counts samples."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch

from agent import checkpoint, events, script, tape
from agent.calls import ToolCall
from agent.context import Caption
from agent.conversation_config import ConversationConfig
from agent.engine import Engine, RowLost, SequenceHandle
from agent.segments import View
from agent.session import ConsumerStalled, Session
from agent.tape import Answered, Asked, Closed, Entry, Opened, Seen, Sound, SystemPrompt, Tape, Transcript, Typed
from agent.turns import TurnDetectionConfig
from agent.view import Budget, Policy, ViewComposer, view
from model.cache import NoRow
from model.forward import ForwardPass
from model.vad import Vad
from streams.espeak import Espeak
from streams.frames import Audio
from streams.media_files import read_audio
from streams.voice import open_voice
from tests.talk import END, PROMPT, Beeps, Door, Mind, Plain, ids, jpeg, settled, tiny, words
from tests.test_turns import Room

LOADED = tiny(640)
WIDE = Budget(ahead=3000, row=3000)
VAD = Vad()


@cache
def said(text: str, voice: str = "en-gb+f3") -> np.ndarray:
    speech = Espeak().say(text, voice=voice, fresh=True)
    pcm = soxr.resample(speech.pcm, speech.rate, 16000)
    loud = np.flatnonzero(np.abs(pcm) > 0.01)
    return pcm[loud[0] : loud[-1] + 1].clip(-1, 1).astype(np.float32)


QUESTION = "What colour is the large circle on the left?"
OBJECTION = "No, wait, I mean the other one."


@pytest.fixture
def running(engine: Engine) -> Engine:
    return engine


def session(engine: Engine, voice: Any = "beeps", tape: Tape | None = None, **settings: Any) -> Session:
    given = ConversationConfig(**{"budget": WIDE, "max_tokens": 60, "sampling": LOADED.generation, **settings})
    return Session(engine, VAD, Beeps() if voice == "beeps" else voice, given, tape)


def names(door: Door, *without: type) -> str:
    skipped = (
        events.AudioDelta,
        events.TextDelta,
        events.AnswerTimings,
        events.InputTranscribed,
        events.UsageCounted,
        events.OutputSent,
        *without,
    )
    return " ".join(type(event).__name__ for event in door.events if not isinstance(event, skipped))


def sounds(session: Session) -> list[Sound]:
    """Each turn's, in one piece: a caption that comes late stands between two on the tape."""
    turns: list[bytes] = []
    for entry in session.record.tape.entries:
        if isinstance(entry, Opened):
            turns.append(b"")
        elif isinstance(entry, Sound):
            turns[-1] += entry.data
    return [Sound(data, 640) for data in turns]


def by_hand(entries: Sequence[Entry], policy: Policy = "transcripts", budget: Budget = WIDE) -> View:
    return view(entries, PROMPT, budget, policy, patch=LOADED.model.config.patch)


async def holds(session: Session, mind: Mind, expected: View) -> bool:
    """Whether the row is a row that was fed with `expected`: the logits of what follows agree, position by position."""
    async with asyncio.timeout(60):
        while session.record.stale:  # it follows when it has nothing else to do
            await asyncio.sleep(0)
    await settled(session.record.row)
    fork = session.record.row.fork()
    mind.logits.clear()
    asked = words(6)
    async with asyncio.timeout(60):
        drawn = [token async for token, _ in fork.generate(asked, sampling=mind.PROBE, max_tokens=12)]
    fork.release()
    plain = Plain(LOADED, expected.segments, 3200)
    reference = plain.logits((*asked, *drawn[:-1]))[len(asked) - 1 :]
    difference = (torch.stack(mind.logits) - reference).abs().max()
    assert session.record.positions == expected.positions
    return bool(difference < 1e-3)


# ---- nano


@pytest.mark.slow
async def test_nano_hears_answers_and_marks_what_it_sees():
    demo = Path(checkpoint.__file__).parents[1] / "model/nano/demo"
    question, shown = read_audio(demo / "question.wav"), (demo / "picture.jpg").read_bytes()
    with Engine(checkpoint.load("nano"), length=2048) as engine:
        performance = script.Performance(
            [script.ScriptedTurn(shown, question), script.ScriptedTurn(typed="how many circles are there")]
        )
        await performance.run(Session(engine, VAD, open_voice("espeak"), ConversationConfig(seed=0)))
        assert engine.free == 1
    spoken, typed = performance.exchanges
    assert spoken.caption == "where is the orange square"
    assert re.match("The orange square is ", spoken.text) and spoken.heard == len(spoken.text)
    assert [mark.label for mark in spoken.marks] == ["orange square"]
    assert re.match("There (is|are) .* circles?.", typed.text) and typed.finish == "stop" and not typed.caption
    assert sum(len(event.pcm) for event in performance.events if isinstance(event, events.AudioDelta)) > 22050
    assert not any(isinstance(event, events.Notice | events.SessionFailed) for event in performance.events)


# ---- turns


async def test_a_spoken_turn_is_captioned_and_answered_and_every_word_of_it_is_heard(running, mind):
    mind.says("It is red. And it is large.")
    mind.hears("what colour is it")
    async with Door(session(running)) as door:
        await door.quiet(400)
        await door.hear(said(QUESTION))
        await door.answered(1)
    assert names(door) == "TurnStarted TurnStopped AnswerStarted AnswerDone"
    assert [(event.turn, event.text) for event in door.of(events.InputTranscribed)] == [(1, "what colour is it")]
    assert "".join(event.text for event in door.of(events.TextDelta)) == "It is red. And it is large."
    (answered,) = door.of(events.AnswerDone)
    assert (answered.text, answered.heard, answered.finish) == ("It is red. And it is large.", 27, "stop")
    spoken = [word for event in door.of(events.AudioDelta) for word in event.words]
    assert [answered.text[word.start : word.end] for word in spoken] == ["It", "is", "red", "And", "it", "is", "large"]
    assert len(door.sound) == 7 * 2400 and (np.diff(door.sound) > 0).all()
    assert [word.sample for word in spoken] == [2400 * n for n in range(7)]
    assert running.free == 2


async def test_frames_go_into_the_row_while_the_user_speaks(running, mind):
    async with Door(session(running)) as door:
        await door.quiet(400)
        before = door.session.record.positions
        await door.hear(said(QUESTION))
        heard = len(said(QUESTION)) // 640
        assert door.session.record.positions - before > heard and not door.session.record.row.waiting
        assert not door.of(events.TurnStopped)
        await door.answered(1)
    assert door.of(events.AnswerTimings)[0].waiting <= 1, "at the turn's end nothing is left but the closing"


async def test_sound_is_never_sent_far_ahead_of_what_was_heard(running, mind):
    mind.says("one two three four five six seven eight")
    async with Door(session(running, ahead=0.3)) as door:
        await door.put(events.TextInput("count"))
        await door.until(events.AudioDelta)
        await door.quiet(0)
        for _ in range(3):
            await asyncio.sleep(0)
        assert sum(len(event.pcm) for event in door.of(events.AudioDelta)) == 0.3 * 8000, "nothing was heard yet"
        await door.answered(1)


async def test_words_pictures_and_speech_are_one_turn(running, mind):
    async with Door(session(running, policy="verbatim", captions=False)) as door:
        await door.put(events.TextInput("look at this:", ask=False), events.PictureInput(jpeg()))
        await door.quiet(200)
        await door.hear(said("What is it?"))
        await door.put(events.TextInput("the red one", ask=True))
        await door.answered(1)
        speech, silence = (entry for entry in door.session.record.tape.entries if isinstance(entry, Sound))
        turn = [Opened(), Typed("look at this:"), Seen(jpeg(), 40, 60, 70), speech, Typed("the red one"), silence, Asked()]
        kinds = [type(entry) for entry in door.session.record.tape.entries]
        assert kinds == [SystemPrompt, *map(type, turn), Answered]
        assert await holds(door.session, mind, by_hand([SystemPrompt(), *turn, Answered((END,))], "verbatim"))
    assert door.of(events.PictureAttached)[0].data == jpeg()


async def test_a_turn_of_many_parts_is_not_composed_anew_with_each_of_them(running, mind, monkeypatch):
    composed: list[None] = []
    compose = ViewComposer.view
    monkeypatch.setattr(ViewComposer, "view", lambda views: (composed.append(None), compose(views))[1])
    async with Door(session(running, captions=False)) as door:
        await door.put(*(events.TextInput("word", ask=False) if n % 5 else events.PictureInput(jpeg()) for n in range(60)))
        parts = [Typed("word") if n % 5 else Seen(jpeg(), 40, 60, 70) for n in range(60)]
        entries = [SystemPrompt(), Opened(), *parts]
        assert list(door.session.record.tape.entries) == entries and len(composed) < 10
        assert await holds(door.session, mind, by_hand(entries))


async def test_a_button_opens_and_closes_the_turn(running, mind):
    async with Door(session(running, detection=TurnDetectionConfig(hands_free=False))) as door:
        await door.hear(said("nobody listens to this"))
        await door.quiet(800)
        assert names(door) == ""
        await door.put(events.PushToTalkStart())
        await door.hear(said(QUESTION))
        await door.quiet(900)
        await door.hear(said("on the left"))
        await door.put(events.PushToTalkEnd())
        assert names(door) == "TurnStarted TurnStopped AnswerStarted"
        await door.answered(1)
    assert door.of(events.TurnStopped)[0].why == "released"


async def test_a_tap_and_what_is_forgotten_leave_no_trace(running, mind):
    async with Door(session(running, detection=TurnDetectionConfig(hands_free=False))) as door:
        before = by_hand([SystemPrompt()])
        await door.put(events.PushToTalkStart())
        await door.quiet(80)
        await door.put(events.PushToTalkEnd(), events.PushToTalkStart())
        await door.hear(said(QUESTION))
        await door.put(events.DiscardTurn())
        assert names(door) == "TurnStarted TurnDiscarded TurnStarted TurnDiscarded"
        assert not any(sound.data for sound in sounds(door.session))
        assert await holds(door.session, mind, before)


# ---- the input buffer of a client that commits


BUFFERED = TurnDetectionConfig(hands_free=False, buffered=True)


def spoken(text: str) -> np.ndarray:
    """Whole frames: what is left of one waits for the next sample."""
    pcm = said(text)
    return pcm[: len(pcm) // 640 * 640]


def frames(pcm: np.ndarray) -> Sound:
    return Sound.of(pcm.reshape(-1, 640))


async def append(door: Door, pcm: np.ndarray) -> None:
    for start in range(0, len(pcm), 1600):
        await door.put(Audio(pcm[start : start + 1600], start))


def written(session: Session) -> list[Entry]:
    """What is on the tape and was not taken back."""
    entries = session.record.tape.entries
    gone = {entry.of for entry in entries if isinstance(entry, tape.Deleted)}
    kept = [entry for n, entry in enumerate(entries) if n not in gone and (not isinstance(entry, Sound) or entry.data)]
    kept = [entry for entry in kept if not isinstance(entry, tape.Deleted | tape.Dropped | Transcript | tape.Heard)]
    return [entry for n, entry in enumerate(kept) if not (isinstance(entry, Sound) and isinstance(kept[n - 1], Sound))]


async def test_sound_that_waits_for_a_commit_is_in_the_row_as_it_comes(running, mind):
    mind.says("red")
    async with Door(session(running, detection=BUFFERED, captions=False)) as door:
        await append(door, spoken(QUESTION))
        assert names(door) == ""
        assert await holds(door.session, mind, by_hand([SystemPrompt(), Opened(), frames(spoken(QUESTION))]))
        await door.put(events.CommitTurn(ask=False, name="i1"))
        assert names(door) == "TurnStarted TurnStopped" and door.of(events.TurnStarted)[0].name == "i1"
        assert await holds(door.session, mind, by_hand([SystemPrompt(), Opened(), frames(spoken(QUESTION)), Closed()]))
        await door.put(events.CreateAnswer())
        await door.answered(1)
    assert [*map(type, written(door.session))][:6] == [SystemPrompt, Opened, Sound, Closed, Asked, Answered]


async def test_sound_that_comes_after_a_commit_begins_the_next_buffer_and_interrupts_nothing(running, mind):
    mind.says("it is red", "yes")
    first, second = spoken(QUESTION), spoken(OBJECTION)
    async with Door(session(running, detection=BUFFERED, captions=False, ahead=10.0, policy="verbatim")) as door:
        await append(door, first)
        await door.put(events.CommitTurn(ask=False), Audio(second[:640], 0), events.CreateAnswer())
        await append(door, second[640:])
        await door.put(events.CommitTurn(ask=False))
        await append(door, spoken("nobody ever commits this"))
        await door.until(events.OutputSent)
        await door.put(events.CreateAnswer())
        await door.until(events.OutputSent, 2)
    assert [event.finish for event in door.of(events.AnswerDone)][:1] == ["stop"]
    assert [sound.data for sound in sounds(door.session) if sound.data][:2] == [frames(first).data, frames(second).data]
    told = [type(entry) for entry in written(door.session) if not isinstance(entry, Sound)]
    assert told[:9] == [SystemPrompt, Opened, Closed, Asked, Answered, Opened, Closed, Asked, Answered]


async def test_what_is_in_the_buffer_stays_there_until_it_is_committed(running, mind):
    mind.says("yes")
    async with Door(session(running, detection=BUFFERED, captions=False, ahead=10.0, policy="verbatim")) as door:
        await append(door, spoken(QUESTION))
        await door.put(events.TextInput("who are you", ask=False))
        assert await holds(
            door.session, mind, by_hand([SystemPrompt(), Opened(), Typed("who are you"), frames(spoken(QUESTION))])
        )
        await door.put(events.CreateAnswer())
        await door.until(events.OutputSent)
        asked = [entry for entry in written(door.session) if not isinstance(entry, Sound)]
        assert [*map(type, asked)][:5] == [SystemPrompt, Opened, Typed, Asked, Answered]
        await door.put(events.CommitTurn(ask=False), events.CreateAnswer())
        await door.until(events.OutputSent, 2)
    turns = [sound.data for sound in sounds(door.session) if sound.data]
    assert turns == [frames(spoken(QUESTION)).data], "the whole of it, once"


async def test_what_is_cleared_was_never_said_also_beside_a_picture(running, mind):
    async with Door(session(running, detection=BUFFERED)) as door:
        await door.put(events.PictureInput(jpeg()))
        await settled(door.session.record.row)
        before = by_hand(written(door.session))
        await append(door, spoken(QUESTION))
        await door.put(events.DiscardTurn())
        assert await holds(door.session, mind, before)
        await door.put(events.UpdateSettings(detection=TurnDetectionConfig()))
        await door.hear(np.tile([0.9, -0.9], 1920).astype(np.float32))  # a click is no turn
        await door.quiet(1000)
        assert await holds(door.session, mind, before)


async def test_a_cough_beside_a_picture_leaves_the_picture_alone(running, mind):
    async with Door(session(running, detection=TurnDetectionConfig(hands_free=False))) as door:
        await door.put(events.PictureInput(jpeg()))
        await settled(door.session.record.row)
        before = by_hand(written(door.session))
        await door.put(events.PushToTalkStart())
        await door.quiet(80)
        await door.put(events.PushToTalkEnd())
        assert names(door) == "PictureAttached TurnStarted TurnDiscarded"
        assert await holds(door.session, mind, before)


async def test_history_that_comes_while_somebody_speaks_stands_before_what_is_said(running, mind):
    mind.hears("which one")
    mind.says("that one")
    call = (ToolCall("look", {"at": "left"}), "a ball")
    async with Door(session(running, policy="verbatim")) as door:
        await door.put(events.TextInput("hello", ask=False))
        await door.hear(spoken(QUESTION))
        half = frames(spoken(QUESTION)).positions
        await door.put(
            events.PastAnswer("I am attend."), events.PastAnswer("", (call,)), events.RecordedInput(spoken(OBJECTION), "i9")
        )
        await settled(door.session.record.row)
        assert sounds(door.session)[-1].positions >= half
        await door.answered(1)
        assert not door.of(events.Notice)
    told = [entry for entry in written(door.session) if not isinstance(entry, SystemPrompt)]
    kinds = [type(entry) for entry in told]
    assert kinds[:4] == [Opened, Typed, Closed, Answered] and told[3] == Answered((), "I am attend.")
    assert kinds[kinds.index(tape.CallResult) :][:8] == [tape.CallResult, Opened, Sound, Closed, Opened, Sound, Asked, Answered]
    recorded, live = door.of(events.TurnStopped)
    assert [(event.name, event.turn) for event in door.of(events.TurnStarted)][1] == ("i9", recorded.turn)
    assert {event.turn for event in door.of(events.InputTranscribed)} == {recorded.turn, live.turn}


async def test_who_asks_as_talk_over_the_last_word_begins_is_answered_even_if_that_is_no_turn(running, mind):
    mind.says("one two three", "yes")
    async with Door(session(running, ahead=10.0, answers=False, captions=False)) as door:
        await door.put(events.TextInput("count"))
        await door.until(events.OutputSent)
        loud = spoken(OBJECTION)
        while not door.of(events.OutputCleared):
            await door.hear(loud[:640])
            loud = loud[640:]
        await door.put(events.CreateAnswer())
        if door.of(events.AnswerDone)[0].finish == "stop":
            await door.quiet(1500)
        await door.until(events.OutputSent, 2)


async def test_nobody_answers_before_somebody_asks(running, mind):
    async with Door(session(running, answers=False)) as door:
        await door.quiet(400)
        await door.hear(said(QUESTION))
        await door.quiet(800)
        assert names(door) == "TurnStarted TurnStopped"
        await door.put(events.TextInput("and this", ask=False), events.CommitTurn(ask=False))
        assert names(door) == "TurnStarted TurnStopped"
        await door.put(events.CreateAnswer())
        await door.answered(1)
    written = [entry for entry in door.session.record.tape.entries if not isinstance(entry, Sound | Transcript | tape.Dropped)]
    assert [*map(type, written)] == [SystemPrompt, Opened, Closed, Opened, Typed, Closed, Asked, Answered]


async def test_a_camera_is_looked_at_once_and_only_its_newest_picture(running, mind):
    async with Door(session(running, camera="end")) as door:
        await door.put(*(events.PictureInput(jpeg(seed), live=True) for seed in range(3)))
        await door.put(events.TextInput("what is it"))
        await door.answered(1)
        await door.put(events.TextInput("and now"))
        await door.answered(2)
    assert [event.data for event in door.of(events.PictureAttached)] == [jpeg(2)]


async def test_what_was_said_replaces_its_sound_in_the_row_under_transcripts(running, mind):
    for policy in ("transcripts", "verbatim"):
        mind.hears("what is it")
        mind.says("It is red.")
        async with Door(session(running, policy=policy)) as door:
            await door.quiet(400)
            await door.hear(said("What is it?"))
            await door.answered(1)
            heard = sounds(door.session)[0]
            assert bool(heard.data) == (policy == "verbatim"), "nobody will want it again"
            heard = heard if heard.data else Sound.of(np.zeros((9, 640), np.float32))
            turn = [SystemPrompt(), Opened(), heard, Asked(), Answered((*ids("It is red."), END)), Transcript(1, "what is it")]
            assert await holds(door.session, mind, by_hand(turn, policy))


# ---- interruptions


async def talked_over(door: Door, mind: Mind, over: np.ndarray, after: int, drawing: bool = False) -> None:
    """A question, and `over` when so many words of the answer were heard; while the model is stopped, if it is `drawing`."""
    await door.quiet(400)
    await door.hear(said(QUESTION))
    while not door.of(events.AnswerStarted):
        await door.quiet(40)
    while drawing and not mind.thinks:
        await asyncio.sleep(0)
    door.keeps_up = not drawing
    await door.until(events.AudioDelta)
    while door._played < after * 2400 + 100:
        await door.quiet(40)
    await door.hear(over)


@pytest.mark.parametrize("drawing", [False, True], ids=["all drawn", "tokens still being drawn"])
@pytest.mark.parametrize("policy", ["transcripts", "verbatim"])
async def test_after_an_interruption_the_unheard_words_never_existed(running, mind, policy, drawing):
    said_ = "It is a red circle. It is large, and left of a square."
    async with Door(session(running, policy=policy)) as door:
        mind.says(said_)
        mind.hears("what colour", "no wait")
        if drawing:
            mind.stop_after(len(ids("It is a red circle. It is large, and left")))
        await talked_over(door, mind, said(OBJECTION), 4, drawing)
        assert mind.thinks == drawing
        interrupted = door.of(events.AnswerDone)[0]
        kept = said_[: interrupted.heard]
        assert interrupted.finish == "interrupted" and kept in ("It is a red", "It is a red circle.")
        steps = mind.steps
        mind.says("The blue one.")
        mind.go_on()
        door.keeps_up = True
        await settled(door.session.record.row)
        first, second = sounds(door.session)
        count = next(n for n in range(60) if LOADED.tokenizer.decode(list(ids(said_)[:n])) == kept)
        past = [SystemPrompt(), Opened(), first, Asked(), Answered(ids(said_)[:count])]
        if policy == "verbatim" or drawing:
            assert await holds(door.session, mind, by_hand([*past, Opened(), second], "verbatim")), "while the user goes on"
        assert mind.steps - steps <= 1, "it stopped at once"
        await door.answered(2)
        assert door.of(events.AnswerDone)[1].text == "The blue one."
        second = sounds(door.session)[1] if policy == "verbatim" else second
        told = [Transcript(1, "what colour"), Transcript(5, "no wait")]
        full = [*past, Opened(), second, Asked(), Answered((*ids("The blue one."), END)), *told]
        assert await holds(door.session, mind, by_hand(full, policy)), "and in the end"
        assert door.session.record.positions > 5 * LOADED.model.config.window
    assert (
        names(door)
        == "TurnStarted TurnStopped AnswerStarted OutputCleared AnswerDone TurnStarted TurnStopped AnswerStarted AnswerDone"
    )


async def test_typed_words_and_stop_end_an_answer_at_what_was_heard(running, mind):
    mind.says("It is a red circle and it is large.")
    async with Door(session(running)) as door:
        await door.put(events.TextInput("what is it"))
        await door.until(events.AudioDelta)
        while door._played < 3 * 2400:
            await door.quiet(40)
        await door.put(events.CancelAnswer())
        assert door.of(events.AnswerDone)[0].text[: door.of(events.AnswerDone)[0].heard] == "It is a"
        mind.says("Yes.")
        said = len(door.of(events.AudioDelta))
        await door.put(events.TextInput("is it"))
        await door.until(events.AudioDelta, said + 1)
        mind.says("No.")
        await door.put(events.TextInput("really"))
        await door.answered(3)
    assert [event.finish for event in door.of(events.AnswerDone)] == ["interrupted", "interrupted", "stop"]
    assert door.of(events.AnswerDone)[2].text == "No."


async def test_a_door_may_say_later_how_much_of_an_answer_was_heard(running, mind):
    text = "It is a red circle and it is large."
    mind.says(text)
    async with Door(session(running)) as door:
        await door.put(events.TextInput("what is it"))
        await door.answered(1)
        (given,) = door.of(events.AnswerDone)
        assert given.heard == len(text)
        await door.put(events.TruncateAnswer(given.answer, 3 * 2400 + 100))
        kept = next(n for n in range(60) if LOADED.tokenizer.decode(list(ids(text)[:n])) == "It is a")
        past = [SystemPrompt(), Opened(), Typed("what is it"), Asked(), Answered(ids(text)[:kept])]
        assert await holds(door.session, mind, by_hand(past))
        await door.put(events.TruncateAnswer(given.answer + 1000, 0))
        assert await holds(door.session, mind, by_hand(past)), "nobody knows that answer"


async def test_an_answer_is_cut_where_the_door_says_it_was_heard(running, mind):
    mind.says("It is a red circle and it is large.")
    async with Door(session(running)) as door:
        await door.put(events.TextInput("what is it"))
        await door.until(events.AudioDelta)
        while door._played < 5 * 2400:
            await door.quiet(40)
        (answering,) = door.of(events.AnswerStarted)
        await door.put(events.TruncateAnswer(answering.answer, 2 * 2400 + 10))
        (given,) = door.of(events.AnswerDone)
        assert (given.finish, given.text[: given.heard]) == ("interrupted", "It is")


async def test_what_was_deleted_never_was_and_what_is_brought_along_was(running, mind):
    mind.says("It is red.")
    async with Door(session(running)) as door:
        await door.put(events.TextInput("what is it"))
        await door.answered(1)
        answer, turn = door.of(events.AnswerStarted)[0].answer, 1
        await door.put(events.DeleteEntry(answer))
        asked = [SystemPrompt(), Opened(), Typed("what is it"), Closed()]
        assert await holds(door.session, mind, by_hand(asked))
        await door.put(events.DeleteEntry(turn), events.DeleteEntry(10**6), events.DeleteEntry(0))
        assert await holds(door.session, mind, by_hand([SystemPrompt()]))
        await door.put(events.TextInput("who are you", ask=False), events.PastAnswer("I am attend."))
        brought = [SystemPrompt(), Opened(), Typed("who are you"), Closed(), Answered((), "I am attend.")]
        assert await holds(door.session, mind, by_hand(brought))


@pytest.mark.parametrize("over", [False, True])
async def test_an_opening_line_is_an_answer_that_nobody_asked_for(running, mind, over):
    mind.says("The left one.")
    async with Door(session(running)) as door:
        await door.put(events.SayText("Hello, ask me what you see."))
        if over:
            await door.until(events.AudioDelta)
            await door.hear(np.zeros(16_000, np.float32))
            await door.hear(np.pad(said(QUESTION), (0, 16_000)))
            await door.answered(2)
        else:
            await door.answered(1)
        opening = door.of(events.AnswerDone)[0]
        assert opening.text == "Hello, ask me what you see."
        assert (opening.finish, opening.heard < len(opening.text)) == (("interrupted", True) if over else ("stop", False))
        assert await holds(door.session, mind, by_hand(door.session.record.tape.entries))


async def test_text_alone_was_read_as_far_as_it_was_written(running, mind):
    mind.says("It is a red circle and it is large.")
    mind.stop_after(len(ids("It is a red")))
    async with Door(session(running, voice=None)) as door:
        await door.put(events.TextInput("what is it"))
        while "".join(event.text for event in door.of(events.TextDelta)) != "It is a red":
            await door.until(events.TextDelta, len(door.of(events.TextDelta)) + 1)
        await door.put(events.CancelAnswer())
        mind.go_on()
        (answered,) = door.of(events.AnswerDone)
        assert answered.text == "It is a red" and answered.heard == len(answered.text)
        taken = [SystemPrompt(), Opened(), Typed("what is it"), Asked(), Answered(ids("It is a red"))]
        assert await holds(door.session, mind, by_hand(taken))


async def test_a_cough_or_mm_hmm_ends_as_if_nothing_had_happened(running, mind):
    text = "It is a red circle. It is large, and left of a square."
    tracks = []
    for over in (np.zeros(640, np.float32), Room(VAD, "en-us", 60).cough().astype(np.float32), said("mm-hmm")):
        mind.says(text)
        async with Door(session(running, captions=False)) as door:
            await talked_over(door, mind, over, after=2)
            await door.answered(1)
        (answered,) = door.of(events.AnswerDone)
        assert (answered.text, answered.heard, answered.finish) == (text, len(text), "stop")
        assert "".join(event.text for event in door.of(events.TextDelta)) == text
        tracks.append(door.sound)
        again = [event.sample for before, event in pairwise(door.of(events.AudioDelta)) if event.sample < before.sample]
        assert len(again) == len(door.of(events.OutputCleared)), "taken up once"
        assert all(sample % 2400 == 0 for sample in again), "at the word that was cut"
        assert not door.of(events.TurnDiscarded) and len(door.of(events.TurnStarted)) == 1
    assert all((track == tracks[0]).all() for track in tracks)
    assert door.of(events.OutputCleared), "the last one was noticed"


async def test_an_interrupted_answer_leaves_nothing_running(running, mind):
    """However the interruption falls on the chunks of its voice, which come all the time."""
    async with Door(session(running)) as door:
        before = asyncio.all_tasks()
        for number in range(40):
            mind.says("It is a red circle. " * 10)
            await door.put(events.TextInput("what is it"))
            await door.until(events.AudioDelta)
            for _ in range(number):
                await asyncio.sleep(0)
            await door.put(events.CancelAnswer())
            async with asyncio.timeout(20):
                while asyncio.all_tasks() - before:
                    await asyncio.sleep(0)
            door.events.clear()


async def test_what_comes_during_an_answer_is_in_the_turn_that_interrupts_it(running, mind):
    mind.says("It is a red circle and it is large, and there is a square.")
    async with Door(session(running, captions=False)) as door:
        await door.put(events.TextInput("what is it"))
        await door.until(events.AudioDelta)
        await door.put(events.PictureInput(jpeg(7)), events.TextInput("this one", ask=False), events.CreateAnswer())
        assert not door.of(events.PictureAttached)
        while door._played < 3 * 2400:
            await door.quiet(40)
        await door.hear(said(OBJECTION))
        assert len(door.of(events.AnswerStarted)) == 1
        await door.answered(2)
    (looked,) = door.of(events.PictureAttached)
    assert looked.data == jpeg(7) and looked.turn == door.of(events.TurnStarted)[0].turn


# ---- tools and thoughts

LOOK = '<|tool_call>call:look{where:<|"|>left<|"|>}<tool_call|><|tool_response>'


@pytest.mark.parametrize("thinking", [False, True])
async def test_an_answer_goes_on_when_its_tool_has_returned(running, mind, thinking):
    tools = ({"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}},)
    setting = SystemPrompt(tools=tools, thinking=thinking)
    first = ("<|channel>thought\nhm<channel|>" if thinking else "") + "Let me look" + LOOK
    second = ("so<channel|>" if thinking else "") + "It is red."
    mind.says(first, second)
    async with Door(session(running, setting=setting)) as door:
        await door.put(events.TextInput("what is it"))
        await door.until(events.ToolCalled)
        await door.until(events.AudioDelta)
        called = door.of(events.ToolCalled)[0]
        assert (called.tool.name, called.tool.arguments) == ("look", {"where": "left"})
        await settled(door.session.record.row)
        await door.put(events.ToolResult(99, "what"), events.ToolResult(called.call, {"seen": "a circle"}))
        await door.answered(1)
        asked = [setting, Opened(), Typed("what is it"), Asked()]
        end = () if thinking else (END,)
        stretches = [Answered(ids(first)), tape.Called(4, "look", {"where": "left"}), tape.CallResult(5, {"seen": "a circle"})]
        assert await holds(door.session, mind, by_hand([*asked, *stretches, Answered((*ids(second), *end))]))
    (answered,) = door.of(events.AnswerDone)
    assert (answered.text, answered.finish) == ("Let me look It is red.", "stop")
    assert [event.message for event in door.of(events.Notice)] == [NOBODYS]
    spoken = [answered.text[word.start : word.end] for event in door.of(events.AudioDelta) for word in event.words]
    assert spoken == ["Let", "me", "look", "It", "is", "red"], "thoughts are never spoken"
    thought = "".join(event.text for event in door.of(events.ThoughtDelta))
    assert thought == ("hmso" if thinking else "")


NOBODYS = "a tool result belongs to no call, or its call has a result already"


async def test_a_result_that_comes_after_its_answer_was_stopped_is_kept_for_the_next_one(running, mind):
    mind.says("Let me look." + LOOK)
    async with Door(session(running, voice=None)) as door:
        await door.put(events.TextInput("what is it"))
        await door.until(events.ToolCalled)
        (called,) = door.of(events.ToolCalled)
        await door.put(events.CancelAnswer())
        past = [SystemPrompt(), Opened(), Typed("what is it"), Asked()]
        assert await holds(door.session, mind, by_hand([*past, Answered(ids("Let me look."))])), "a call without a result is none"
        await door.put(events.ToolResult(called.call, "red"), events.ToolResult(called.call, "blue"))
        assert [event.message for event in door.of(events.Notice)] == [NOBODYS]
        words, look = ids("Let me look."), tape.Called(4, "look", called.tool.arguments)
        past += [Answered((*words, *ids(LOOK))), look, tape.Heard(4, len(words)), tape.CallResult(5, "red")]
        assert await holds(door.session, mind, by_hand(past))
        mind.says("Fine.")
        await door.put(events.CreateAnswer())
        await door.answered(2)
        assert await holds(door.session, mind, by_hand([*past, Asked(), Answered((*ids("Fine."), END))]))


async def test_calls_that_a_door_brings_along_are_gone_on_from(running, mind):
    mind.says("It is red.")
    async with Door(session(running, voice=None)) as door:
        await door.put(events.TextInput("what is it", ask=False))
        look = ToolCall("look", {"where": "left"})
        await door.put(
            events.PastAnswer("", ((look, "a circle"),)), events.PastAnswer("", ((look, "red " * 5000),)), events.CreateAnswer()
        )
        await door.answered(1)
        past = [SystemPrompt(), Opened(), Typed("what is it"), Closed(), Answered(()), tape.Called(4, "look", {"where": "left"})]
        past += [tape.CallResult(5, "a circle"), Answered(()), tape.Called(7, "look", {"where": "left"})]
        past += [tape.CallResult(8, {"error": "the result is too long"}), Asked(), Answered((*ids("It is red."), END))]
        assert await holds(door.session, mind, by_hand(past))


@pytest.mark.parametrize("tools", [("look",), ("look", "point")])
async def test_an_answer_may_have_to_begin_with_a_call(running, mind, tools):
    begun = "<|tool_call>call:look{" if len(tools) == 1 else "<|tool_call>call:"
    rest = (LOOK[len("<|tool_call>call:") :] if len(tools) > 1 else LOOK[len(begun) :], "It is red.")
    mind.says(*rest)
    async with Door(session(running, voice=None)) as door:
        await door.put(events.UpdateSettings(calls=tools), events.TextInput("what is it"))
        await door.until(events.ToolCalled)
        (called,) = door.of(events.ToolCalled)
        assert called.tool == ToolCall("look", {"where": "left"})
        await door.put(events.UpdateSettings(calls=()), events.ToolResult(called.call, "a circle"))
        await door.answered(1)
        first, second = door.of(events.UsageCounted)
        assert first.tokens == len(ids(begun)) + len(ids(rest[0])) + 1 and second.tokens == len(ids("It is red.")) + 1
        past = [SystemPrompt(), Opened(), Typed("what is it"), Asked(), Answered((*ids(begun), *ids(rest[0])))]
        past += [tape.Called(4, "look", {"where": "left"}), tape.CallResult(5, "a circle"), Answered((*ids("It is red."), END))]
        assert await holds(door.session, mind, by_hand(past))
    assert door.of(events.AnswerDone)[0].text == "It is red."


# ---- beside the conversation


def out_of_band(door: Door, kind: type) -> list[tuple[str, Any]]:
    return [(wrapped.name, wrapped.payload) for wrapped in door.of(events.OutOfBandEvent) if isinstance(wrapped.payload, kind)]


async def until_out_of_band(door: Door, count: int) -> None:
    """Until so many of them are over."""
    async with asyncio.timeout(60):
        while len(out_of_band(door, events.AnswerDone)) < count:
            await asyncio.sleep(0)


async def test_an_answer_beside_the_conversation_leaves_no_trace(running, mind):
    mind.says("It is red.")
    async with Door(session(running)) as door:
        await door.put(events.TextInput("what is it"))
        await door.answered(1)
        past = by_hand([SystemPrompt(), Opened(), Typed("what is it"), Asked(), Answered((*ids("It is red."), END))])
        before = list(door.session.record.tape.entries)
        await door.put(events.TextInput("and that", ask=False))
        mind.says("Two words.", "Blue.")
        await door.put(events.CreateOutOfBandResponse("one", setting=SystemPrompt("Sum up."), spoken=False))
        await until_out_of_band(door, 1)
        past_of_it = (events.TextInput("a", ask=False), events.PastAnswer("b"), events.PictureInput(jpeg()))
        await door.put(events.CreateOutOfBandResponse("two", past_of_it, max_tokens=3))
        while not (said := out_of_band(door, events.AudioDelta)):
            await asyncio.sleep(0)
        await door.put(events.OutOfBandEvent("two", events.PlaybackPosition(said[0][1].answer, len(said[0][1].pcm))))
        await until_out_of_band(door, 2)
        over = [(name, event.text, event.finish) for name, event in out_of_band(door, events.AnswerDone)]
        assert over == [("one", "Two words.", "stop"), ("two", "Blu", "length")]
        assert not door.of(events.PictureAttached) and len(door.of(events.AnswerDone)) == 1
        turn = [*before, Opened(), Typed("and that")]
        assert list(door.session.record.tape.entries)[: len(before)] == before
        assert await holds(door.session, mind, by_hand(turn)) and past.positions < by_hand(turn).positions
        counts = dict(out_of_band(door, events.UsageCounted))
        assert counts["two"].pictures > 0 and counts["one"].pictures == counts["one"].sound == 0
        assert counts["one"].text == by_hand([*before, SystemPrompt("Sum up."), Asked()]).positions


async def test_answers_beside_the_conversation_are_stopped_and_refused_alone(running, mind):
    mind.says("word " * 30)
    mind.stop_after(2)
    async with Door(session(running, voice=None)) as door:
        await door.put(events.CreateOutOfBandResponse("one"))
        while not out_of_band(door, events.TextDelta):
            await asyncio.sleep(0)
        stops = [events.OutOfBandEvent(name, events.CancelAnswer()) for name in ("one", "nobody")]
        await door.put(events.CreateOutOfBandResponse("two", (events.PictureInput(b"no picture"),)), *stops)
        await until_out_of_band(door, 2)
        assert [(name, event.finish) for name, event in out_of_band(door, events.AnswerDone)] == [
            ("two", "failed"),
            ("one", "interrupted"),
        ]
        mind.go_on()
        assert await holds(door.session, mind, by_hand([SystemPrompt()])), (
            "and by then the model has left the one that was stopped"
        )
        assert await converses(door, mind) == "It is fine."


# ---- an answer that is told, and heard later


async def test_what_is_out_can_still_be_cut_and_who_asks_again_has_heard_it(running, mind):
    mind.says("one two three four five six")
    async with Door(session(running, ahead=10.0)) as door:
        await door.put(events.TextInput("count"))
        await door.until(events.OutputSent)
        assert sum(len(event.pcm) for event in door.of(events.AudioDelta)) == 6 * 2400 and not door.of(events.AnswerDone)
        await door.put(events.TextInput("and this", ask=False))
        mind.says("seven eight nine ten")
        await door.put(events.CreateAnswer())
        assert [(event.finish, event.heard) for event in door.of(events.AnswerDone)] == [("stop", 27)]
        await door.until(events.OutputSent, 2)
        await door.put(events.TruncateAnswer(door.of(events.AnswerStarted)[1].answer, 2 * 2400 + 10))
        assert (door.of(events.AnswerDone)[1].finish, door.of(events.AnswerDone)[1].heard) == ("interrupted", 11)
    assert [entry.text for entry in door.session.record.tape.entries if isinstance(entry, Typed)] == ["count", "and this"]


async def test_talk_over_an_answer_is_told_at_once_and_so_is_that_it_was_none(running, mind):
    for over, after in ((said("mm-hmm"), "FalseInterruption"), (said(OBJECTION), "TurnStarted")):
        mind.says("It is a red circle. It is large, and left of a square.")
        async with Door(session(running, captions=False)) as door:
            await talked_over(door, mind, over, after=2)
            await door.answered(2 if after == "TurnStarted" else 1)
        told = [
            event
            for event in door.events
            if isinstance(event, events.OutputCleared | events.FalseInterruption | events.TurnStarted)
        ][1:]
        assert [type(event).__name__ for event in told] == ["OutputCleared", after]
        assert told[0].start is not None and abs(told[0].start - getattr(told[1], "start", told[0].start)) <= 0.2 * 16_000


async def test_an_answer_that_is_talked_over_goes_on_as_its_door_begins_to_commit(running, mind):
    mind.says("It is a red circle. It is large, and left of a square.")
    async with Door(session(running, captions=False)) as door:
        await talked_over(door, mind, said(OBJECTION)[:6400], after=2)
        await door.put(events.DiscardTurn(), events.UpdateSettings(detection=BUFFERED))
        assert [type(event) for event in door.events if isinstance(event, events.OutputCleared | events.FalseInterruption)] == [
            events.OutputCleared,
            events.FalseInterruption,
        ]
        await door.answered(1)
    assert door.of(events.AnswerDone)[0].finish == "stop"


async def test_a_turn_whose_caption_fails_is_told_apart(running, mind, monkeypatch):
    async def fails(*_: Any) -> str:
        raise RowLost("no memory")

    monkeypatch.setattr(Caption, "words", fails)
    async with Door(session(running)) as door:
        await door.quiet(400)
        await door.hear(said(QUESTION))
        await door.answered(1)
    assert door.of(events.InputTranscriptionFailed) == [
        events.InputTranscriptionFailed(1, "this turn could not be transcribed: no memory")
    ]
    assert not door.of(events.InputTranscribed)


async def test_settings_of_answers_hold_for_the_next_one(running, mind):
    async with Door(session(running)) as door:
        mind.says("one two three four five")
        await door.put(events.UpdateSettings(spoken=False, max_tokens=3), events.TextInput("count"))
        await door.answered(1)
        assert not door.of(events.AudioDelta) and door.of(events.AnswerDone)[0].tokens == 3
        await door.put(events.UpdateSettings(spoken=True, max_tokens=10_000, answers=False))
        assert door.session.settings.max_tokens == 60
        mind.says("one")
        await door.hear(said(QUESTION))
        await door.quiet(800)
        assert len(door.of(events.AnswerStarted)) == 1
        await door.put(events.CreateAnswer())
        await door.answered(2)
        assert door.of(events.AudioDelta)


async def test_a_result_that_is_too_long_is_not_given_to_the_model(running, mind):
    mind.says(LOOK, "Hm.")
    async with Door(session(running, voice=None)) as door:
        await door.put(events.TextInput("what is it"))
        await door.until(events.ToolCalled)
        await door.put(events.ToolResult(door.of(events.ToolCalled)[0].call, "red " * 5000))
        await door.answered(1)
    assert "too long" in door.of(events.Notice)[0].message and door.of(events.AnswerDone)[0].text == "Hm."


# ---- long conversations


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["transcripts", "verbatim"])
async def test_a_long_conversation_takes_no_more_memory_than_a_short_one(running, mind, policy):
    budget, kept, positions = Budget(ahead=300, row=500), [], []
    async with Door(session(running, policy=policy, budget=budget, detection=TurnDetectionConfig(hands_free=False))) as door:
        for turn in range(20):
            mind.says(f"Number {turn}.")
            mind.hears("what colour is the large circle")
            await door.put(events.PictureInput(jpeg(turn)), events.PushToTalkStart())
            await door.hear(said("What is it?"))
            await door.put(events.PushToTalkEnd())
            await door.answered(turn + 1)
            kept.append(sum(len(getattr(entry, "data", b"")) for entry in door.session.record.tape.entries))
            positions.append(door.session.record.positions)
            assert door.session.record.row.row
            assert door.session.record.row.row.length <= 500 + 60
    assert max(kept[10:]) <= max(kept[:10]) and max(positions) <= 500 + 60
    assert not door.session.dropped and not door.of(events.Notice)
    assert [event.text for event in door.of(events.AnswerDone)] == [f"Number {turn}." for turn in range(20)]
    told = [gone for event in door.of(events.EntriesEvicted) for gone in event.gone]
    assert len(told) == len(set(told)), "each is told once"
    entries = door.session.record.tape.entries
    turns = [index for index, entry in enumerate(entries) if isinstance(entry, Opened)]
    gone = [place.of for place in told if place.what == "turn"]
    assert gone == turns[: len(gone)] and 5 < len(gone) < 20, "the oldest first"
    assert door.session.record._views.exchanges < 12


async def test_no_frame_is_lost_to_a_row_that_is_being_written_anew(running, mind):
    detection = TurnDetectionConfig(hands_free=False)
    async with Door(session(running, policy="verbatim", backlog=30, detection=detection, captions=False, answers=False)) as door:
        await door.put(*(events.TextInput("word " * 100, ask=False) for _ in range(9)), events.CommitTurn(ask=False))
        await settled(door.session.record.row)
        door.keeps_up = False
        await door.put(events.UpdateSettings(setting=SystemPrompt("Be brief.")), events.PushToTalkStart())
        before = door.session.record.positions
        await door.hear(said(QUESTION)[: 25 * 640])
        await door.put(events.CommitTurn(ask=False))
        assert door.session.dropped == 0 and door.session.record.positions > before + 25


async def test_a_full_row_is_not_written_anew_with_every_turn(running, mind, monkeypatch):
    written, rewrite = [], SequenceHandle.rewrite
    monkeypatch.setattr(SequenceHandle, "rewrite", lambda *how: (written.append(how[2].positions - how[1]), rewrite(*how))[1])
    async with Door(session(running, policy="verbatim", budget=Budget(row=600))) as door:
        for turn in range(60):
            mind.says(f"Number {turn}.")
            await door.put(events.TextInput(f"what is number {turn}"))
            await door.answered(turn + 1)
    told = [gone for event in door.of(events.EntriesEvicted) for gone in event.gone]
    assert len(told) > 20, "it was full"
    assert 0 < len([positions for positions in written if positions > 100]) < 20


async def test_a_turn_that_is_longer_than_the_row_loses_its_end_and_is_answered(running, mind):
    detection = TurnDetectionConfig(hands_free=False)
    async with Door(session(running, budget=Budget(ahead=300, row=200), detection=detection, captions=False)) as door:
        await door.put(events.PushToTalkStart())
        for _ in range(5):
            await door.hear(said(QUESTION))
        await door.put(events.PushToTalkEnd())
        await door.answered(1)
        assert door.session.dropped > 50
        assert door.of(events.AnswerDone)[0].finish == "stop"


async def test_what_is_too_long_for_the_row_is_refused_and_nobody_answers(running, mind):
    async with Door(session(running, budget=Budget(ahead=100, row=100))) as door:
        await door.put(events.TextInput("word " * 500), events.PictureInput(jpeg()), events.PictureInput(jpeg()))
        await door.put(events.UpdateSettings(setting=SystemPrompt("word " * 500)))
        assert names(door) == "Notice PictureAttached Notice Notice"
        mind.says("Yes.")
        await door.put(events.TextInput("and this"))
        await door.answered(1)
        assert door.of(events.AnswerDone)[0].text == "Yes."


# ---- faults


async def converses(door: Door, mind: Mind, answers: int = 1) -> str:
    """One more question and its answer."""
    mind.says("It is fine.")
    await door.put(events.TextInput("how is it"))
    await door.answered(answers)
    return door.of(events.AnswerDone)[-1].text


@pytest.mark.parametrize("how", ["breaks", "stalls", "is none"])
async def test_without_its_voice_an_answer_goes_on_as_text(running, mind, how):
    over = threading.Event()
    voice = {"breaks": Beeps(3), "stalls": Beeps(3, stalls=over), "is none": None}[how]
    mind.says("It is a red circle. It is large.")
    async with Door(session(running, voice=voice, patience=0.05)) as door:
        await door.put(events.TextInput("what is it"))
        await door.answered(1)
        over.set()
        (answered,) = door.of(events.AnswerDone)
        assert (answered.text, answered.heard, answered.finish) == ("It is a red circle. It is large.", 32, "stop")
        before = len(door.of(events.AudioDelta))
        assert await converses(door, mind, 2) == "It is fine." and len(door.of(events.AudioDelta)) == before
    notes = [event.message for event in door.of(events.Notice)]
    lost = "the voice failed, answers go on as text: "
    assert notes == {"breaks": [lost + "the voice broke"], "stalls": [lost + "it stalled"], "is none": []}[how]
    if how != "is none":
        assert len(door.sound) == 3 * 2400


async def test_a_door_that_takes_no_events_for_a_while_harms_nobody(running, mind):
    release = asyncio.Event()

    class Slow(Door):
        async def _emit(self, event: events.Event) -> None:
            await release.wait()
            await super()._emit(event)

    slow, quick = Slow(session(running, voice=None)), Door(session(running, voice=None))
    async with slow, quick:
        mind.says("It is slow.")
        await slow.put(events.TextInput("how is it"))
        while not any(isinstance(entry, Answered) for entry in slow.session.record.tape.entries):
            await asyncio.sleep(0)
        assert not slow.events
        assert await converses(quick, mind) == "It is fine."
        release.set()
        await slow.until(events.AnswerDone)
    assert slow.of(events.AnswerDone)[0].text == "It is slow."


async def ran(session: Session, inputs: AsyncIterator[events.Input], emit: Any = None) -> list[events.Event]:
    seen: list[events.Event] = []

    async def keep(event: events.Event) -> None:
        seen.append(event)

    async with asyncio.timeout(60):
        await session.run(inputs, emit or keep)
    return seen


async def forever(*items: events.Input) -> AsyncIterator[events.Input]:
    for item in items:
        yield item
    await asyncio.Event().wait()


async def test_a_door_that_leaves_everything_lying_is_left(running, mind):
    async def never(_: events.Event) -> None:
        await asyncio.Event().wait()

    mind.says("word " * 50)
    with pytest.raises(ConsumerStalled, match="has left 20 events unread"):
        await ran(session(running, voice=None, unread=20), forever(events.TextInput("what is it")), never)
    assert running.free == 2


async def test_what_a_door_does_wrong_is_raised_there(running, mind):
    async def breaks(_: events.Event) -> None:
        raise ConnectionResetError("the socket is gone")

    with pytest.raises(ConnectionResetError):
        await ran(session(running), forever(events.TextInput("what is it")), breaks)
    assert running.free == 2

    async def odd() -> AsyncIterator[events.Input]:
        yield events.TextInput("what is it", ask=False)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ran(session(running), odd())
    assert running.free == 2


async def test_a_cancelled_conversation_gives_its_row_back(running, mind):
    mind.says("word " * 40)
    mind.stop_after(3)
    one, two = Door(session(running)), session(running)
    with pytest.raises(NoRow):
        session(running)
    task = asyncio.create_task(one.run(one.session))
    one._queue.put_nowait(events.TextInput("what is it"))
    await one.until(events.TextDelta)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    mind.go_on()
    assert running.free == 1
    async with Door(two) as door:
        assert await converses(door, mind) == "It is fine."
    async with Door(session(running)) as door, Door(session(running)) as other:
        assert await converses(door, mind) == await converses(other, mind) == "It is fine."


async def test_sound_that_is_none_ends_the_conversation_with_one_sentence(running, mind):
    async def inputs() -> AsyncIterator[events.Input]:
        yield Audio(np.zeros(640, np.float32), 0)
        yield Audio(np.full(640, np.nan, np.float32), 640)

    seen = await ran(session(running), inputs())
    assert seen == [events.SessionFailed("the sound at sample 640 holds NaN or infinity")]
    assert running.free == 2


async def test_clipped_sound_is_heard(running, mind):
    async with Door(session(running)) as door:
        await door.quiet(400)
        await door.hear((20 * said(QUESTION)).clip(-1, 1))
        await door.answered(1)
    assert names(door) == "TurnStarted TurnStopped AnswerStarted AnswerDone"


async def test_a_picture_that_is_none_is_said_and_the_conversation_goes_on(running, mind):
    async with Door(session(running)) as door:
        await door.put(
            events.PictureInput(b"GIF89a, or so"), events.PictureInput(jpeg()[:200]), events.PictureInput(b"", live=True)
        )
        assert len(door.of(events.Notice)) >= 2 and not door.of(events.PictureAttached)
        assert await converses(door, mind) == "It is fine."


async def test_an_engine_that_fails_on_one_conversation_ends_that_one_alone(running, mind, monkeypatch):
    forward = ForwardPass.__call__

    def heavy(self: ForwardPass, chunks: Any, x: torch.Tensor) -> Any:
        if any(chunk.row is ill.session.record.row.row for chunk in chunks):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, chunks, x)

    async with Door(session(running)) as well:
        mind.says("word " * 30)
        ill = Door(session(running))
        async with ill:
            await ill.quiet(400)
            monkeypatch.setattr(ForwardPass, "__call__", heavy)
            ill.keeps_up = False
            await ill.put(events.TextInput("what is it"))
            await ill.until(events.SessionFailed)
        assert isinstance(ill.events[-1], events.SessionFailed) and len(ill.of(events.SessionFailed)) == 1
        assert "ran out of memory on this conversation" in ill.of(events.SessionFailed)[0].message
        assert running.free == 1
        assert await converses(well, mind) == "It is fine."


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_stops_ends_every_conversation_with_one_sentence(running, mind, monkeypatch):
    def dies(*_: Any, **__: Any) -> Any:
        raise AssertionError("a mistake")

    async with Door(session(running)) as one, Door(session(running)) as two:
        await one.quiet(40)
        monkeypatch.setattr(ForwardPass, "__call__", dies)
        one.keeps_up = two.keeps_up = False
        await one.put(events.TextInput("what is it"))
        await two.until(events.SessionFailed)
        await one.until(events.SessionFailed)
    for door in (one, two):
        assert (
            door.events[-1] == events.SessionFailed("the model has stopped: a mistake")
            and len(door.of(events.SessionFailed)) == 1
        )


async def test_a_journal_that_cannot_be_written_is_said_once_and_the_conversation_goes_on(running, mind, tmp_path):
    full = Tape.create(tmp_path / "tape", bound=1500)
    async with Door(session(running, tape=full, voice=None)) as door:
        for turn in range(12):
            assert await converses(door, mind, turn + 1) == "It is fine."
    notes = [event.message for event in door.of(events.Notice)]
    assert len(notes) == 1 and notes[0].endswith("is full and nothing in it can be dropped; the conversation goes on without it")
    assert sum(isinstance(entry, Answered) for entry in full.entries) == 12


async def test_a_conversation_goes_on_from_its_tape(running, mind, tmp_path):
    mind.hears("what is it")
    mind.says("It is red.")
    async with Door(session(running, tape=Tape.create(tmp_path / "tape"))) as door:
        await door.quiet(400)
        await door.hear(said("What is it?"))
        await door.answered(1)
    again = Tape.load(tmp_path / "tape")
    mind.says("Large.")
    async with Door(session(running, tape=again)) as door:
        await door.put(events.TextInput("how large"))
        await door.answered(1)
        turn = [Opened(), Typed("what is it"), Asked(), Answered((*ids("It is red."), END))]
        more = [Opened(), Typed("how large"), Asked(), Answered((*ids("Large."), END))]
        assert await holds(door.session, mind, by_hand([SystemPrompt(), *turn, *more]))


async def test_a_system_prompt_that_is_longer_than_the_row_is_said_at_once(running, mind):
    seen = await ran(session(running, setting=SystemPrompt("word " * 5000)), forever())
    assert len(seen) == 1 and isinstance(seen[0], events.SessionFailed) and "the system prompt" in seen[0].message
    assert running.free == 2


async def test_a_session_that_never_runs_gives_its_row_back(running):
    with pytest.raises(ZeroDivisionError), session(running):
        assert running.free == 1
        raise ZeroDivisionError
    with session(running) as unstarted:
        task = asyncio.create_task(unstarted.run(forever(), lambda event: asyncio.sleep(0)))
        task.cancel()  # before its first step: `run` never begins
        await asyncio.wait({task})
        assert running.free == 1
    async with asyncio.timeout(60):
        while running.free < 2:
            await asyncio.sleep(0)
