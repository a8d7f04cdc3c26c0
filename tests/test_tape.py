"""The tape, its journal and its views, on small frames of 20 samples and soft tokens of 6 pixels."""

from __future__ import annotations

import os
import re
import resource
import stat
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.journal import JournalError
from agent.prompt import Prompt
from agent.segments import AudioRun, Evicted, Picture, Segment, View, size
from agent.tape import (
    Answered,
    Asked,
    Called,
    CallResult,
    Closed,
    Deleted,
    Dropped,
    Entry,
    Heard,
    Opened,
    Seen,
    Sound,
    SystemPrompt,
    Tape,
    Transcript,
    Typed,
)
from agent.view import Budget, ViewComposer, view
from model.cache import Cache, Row, RowFull
from model.config import GemmaConfig
from model.gemma import Gemma
from model.pixels import patches
from streams.pictures import decode_picture
from tests.tiny import FRAME, SIDE, Recipe
from tests.vocabulary import media, spell, tokenizer

TOKENIZER = tokenizer("nano")
PROMPT = Prompt(TOKENIZER, media(TOKENIZER))
WIDE = Budget(ahead=100_000, row=100_000)
OPEN = ["<|turn>user\n"]


def sound(frames: int, seed: int = 0, loud: float = 0.3) -> Sound:
    return Sound.of((loud * np.random.default_rng(seed).uniform(-1, 1, (frames, FRAME))).astype(np.float32))


def seen(data: bytes = b"jpeg", **how: Any) -> Seen:
    return Seen(data, 48, 48, 70, **how)  # 64 soft tokens of 6 pixels' side


def taped(*entries: Entry) -> Tape:
    tape = Tape()
    for entry in entries:
        tape.append(entry)
    return tape


def ids(text: str) -> tuple[int, ...]:
    """Ids of an answer; control tokens by name."""
    out: list[int] = []
    for piece in re.split(r"(<\|?[a-z_]+\|?>)", text):
        out += [TOKENIZER.special(piece)] if TOKENIZER.has(piece) else TOKENIZER.encode(piece)
    return tuple(out)


def answered(text: str) -> Answered:
    return Answered(ids(text + "<turn|>"), text)


def looks(tape: Tape | list[Entry], budget: Budget = WIDE, policy: Any = "transcripts", **how: Any) -> View:
    return view(tape.entries if isinstance(tape, Tape) else tape, PROMPT, budget, policy, patch=SIDE, **how)


def shape(segments: View | tuple[Segment, ...]) -> str:
    """Control tokens by name, `~5` for five frames of sound, `#64` for a picture of 64 soft tokens."""
    out = ""
    for segment in segments.segments if isinstance(segments, View) else segments:
        match segment:
            case Sound():
                out += f"~{segment.positions}"
            case Picture():
                out += f"#{segment.positions}"
            case _:
                out += spell(TOKENIZER, list(segment))
    return out


def flat(segments: tuple[Segment, ...]) -> list[Any]:
    """One thing for each position."""
    out: list[Any] = []
    for segment in segments:
        match segment:
            case Sound():
                out += [frame.tobytes() for frame in segment.samples]
            case Picture():
                out += [(segment.data, number) for number in range(segment.positions)]
            case _:
                out += segment
    return out


# ---- what a view says


def after(view: View, held: View) -> tuple[Segment, ...] | None:
    """What to append to a row that holds `held`; None if that is not enough."""
    keep, rest = view.since(held)
    return rest if keep == held.positions else None


def test_a_live_turn_stands_as_it_was_heard_typed_and_seen():
    tape = taped(SystemPrompt("Be brief."), Opened(), Typed(" Look: "), sound(3), sound(2))
    assert shape(looks(tape)) == "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nLook:<|audio>~5"
    tape.append(seen())
    tape.append(sound(1))
    assert shape(looks(tape)).endswith("Look:<|audio>~5<audio|><|image>#64<image|><|audio>~1")
    tape.append(Asked())
    assert shape(looks(tape)).endswith("<|audio>~1<audio|><turn|>\n<|turn>model\n<|channel>thought\n<channel|>")


def test_a_turn_that_is_only_closed_asks_for_nothing():
    tape = taped(Opened("system"), Typed("a"), Closed(), Opened(), Typed("b"), Closed())
    assert shape(looks(tape)) == "<bos><|turn>system\na<turn|>\n<|turn>user\nb<turn|>\n"


def test_words_next_to_words_stand_on_a_line_of_their_own():
    tape = taped(Opened(), Typed("look"), sound(2), Typed("here"), Closed(), Transcript(0, "what is this"))
    assert shape(looks(tape)) == "<bos><|turn>user\nlook\nwhat is this\nhere<turn|>\n"


def test_camera_frames_are_announced_by_their_times():
    tape = taped(Opened(), seen(seconds=0.0), seen(seconds=61.0), Closed())
    assert shape(looks(tape)) == "<bos><|turn>user\n00:00 <|image>#64<image|> 01:01 <|image>#64<image|><turn|>\n"
    tape = taped(Opened(), Typed("look"), seen(seconds=0.0), Closed())
    assert shape(looks(tape)) == "<bos><|turn>user\nlook 00:00 <|image>#64<image|><turn|>\n", "words do not run into a time"


def test_a_finished_turns_sound_becomes_its_words_once_they_are_there():
    tape = taped(Opened(), sound(4), Asked(), answered("A circle."))
    answer = "<|turn>model\nA circle.<turn|>\n"
    assert shape(looks(tape)) == "<bos><|turn>user\n<|audio>~4<audio|><turn|>\n" + answer
    tape.append(Transcript(0, "what is it"))
    assert shape(looks(tape)) == "<bos><|turn>user\nwhat is it<turn|>\n" + answer
    assert shape(looks(tape, policy="verbatim")) == "<bos><|turn>user\n<|audio>~4<audio|><turn|>\n" + answer
    assert looks(tape, upto=4).segments == looks(taped(*tape.entries[:4])).segments, "what came after upto only lengthens a view"


def test_only_what_was_heard_of_an_answer_appears():
    tape = taped(Opened(), Typed("x"), Asked(), Answered(ids("One two three"), "One two three"))
    turn = "<bos><|turn>user\nx<turn|>\n"
    assert shape(looks(tape)) == turn + "<|turn>model\nOne two three<turn|>\n"
    tape.append(Heard(3, len(ids("One two"))))
    assert shape(looks(tape)) == turn + "<|turn>model\nOne two<turn|>\n"
    tape.append(Heard(3, 0))
    assert shape(looks(tape)) == turn
    tape.append(Heard(3, 1_000))  # the interruption was a cough
    assert shape(looks(tape)) == turn + "<|turn>model\nOne two three<turn|>\n"


def test_thoughts_are_in_no_later_view():
    thinking = "<|channel>thought\nhm<channel|> Yes. "
    tape = taped(SystemPrompt(thinking=True), Opened(), Typed("x"), Asked())
    begun = shape(looks(tape))
    assert begun.endswith("<|turn>model\n")
    tape.append(Answered(ids(thinking + "<turn|>"), "Yes."))
    assert shape(looks(tape)) == begun + "Yes.<turn|>\n"
    tape.append(Heard(4, len(ids("<|channel>thought\nh"))))
    assert shape(looks(tape)) == begun.removesuffix("<|turn>model\n"), "interrupted before the first word"


def calling(*, thinking: bool = False) -> Tape:
    tape = taped(SystemPrompt(thinking=thinking), Opened(), Typed("x"), Asked())
    thought = "<|channel>thought\nhm<channel|>" if thinking else ""
    calls = "<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g{}<tool_call|>"
    of = tape.append(Answered(ids(f"{thought}Wait.{calls}<|tool_response>"), "Wait."))
    tape.append(Called(of, "f", {"a": 1}))
    tape.append(Called(of, "g", {}))
    return tape


def test_a_model_that_waits_for_its_tools_goes_on_from_what_it_wrote():
    tape = calling(thinking=True)
    waiting = shape(looks(tape))
    assert waiting.endswith("<channel|>Wait.<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g{}<tool_call|><|tool_response>")
    tape.append(CallResult(6, 3))
    assert shape(looks(tape)) == waiting + "response:g{value:3}<tool_response|>"
    held = looks(tape)
    tape.append(CallResult(5, {"b": "c"}))
    rest = after(looks(tape), held)
    assert rest and shape(rest) == '<|tool_response>response:f{b:<|"|>c<|"|>}<tool_response|><|channel>thought\n'
    tape.append(Answered(ids("so 3<channel|>Three.<turn|>"), "Three."))
    assert shape(looks(tape)).endswith(
        "<|turn>model\nWait.<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g{}<tool_call|><|tool_response>response:g{value:3}"
        '<tool_response|><|tool_response>response:f{b:<|"|>c<|"|>}<tool_response|>Three.<turn|>\n'
    )


def test_an_interruption_takes_words_back_but_not_what_a_tool_did():
    tape = calling()
    tape.append(CallResult(5, "done"))
    tape.append(Heard(4, 0))
    assert shape(looks(tape)).endswith(
        '<|turn>model\n<|tool_call>call:f{a:1}<tool_call|><|tool_response>response:f{value:<|"|>done<|"|>}<tool_response|><turn|>\n'
    )
    tape.append(Deleted(5))
    assert shape(looks(tape)).endswith("<|turn>user\nx<turn|>\n")


def test_an_answer_that_was_brought_along_is_read_from_its_words():
    assert shape(looks(taped(Answered((), "Hello!")))) == "<bos><|turn>model\nHello!<turn|>\n"


def test_a_second_answer_is_asked_for_after_the_first():
    tape = taped(Opened(), Typed("x"), Asked(), answered("A."), Asked())
    assert shape(looks(tape)).endswith("A.<turn|>\n<|turn>model\n<|channel>thought\n<channel|>")
    tape.append(answered("B."))
    assert shape(looks(tape)).endswith("<|turn>model\nA.<turn|>\n<|turn>model\nB.<turn|>\n")


def test_what_was_deleted_is_nowhere(tmp_path):
    tape = Tape.create(tmp_path / "tape")
    entries = [Opened(), Typed("secret"), sound(2), seen(b"face"), Asked(), answered("Secret!"), Transcript(0, "secretly")]
    for entry in [*entries, Opened(), Typed("next"), Closed()]:
        tape.append(entry)
    tape.append(Deleted(0))
    assert shape(looks(tape)) == "<bos><|turn>model\nSecret!<turn|>\n<|turn>user\nnext<turn|>\n"
    tape.append(Deleted(5))
    assert shape(looks(tape)) == "<bos><|turn>user\nnext<turn|>\n"
    written = (tmp_path / "tape").read_bytes()
    for gone in (b"secret", b"Secret", b"face", sound(2).data):
        assert gone not in written
    tape.close()
    again = Tape.load(tmp_path / "tape")
    assert again.entries == tape.entries
    again.close()


# ---- budgets


def exchange(number: int, *parts: Entry, at: int = 0) -> list[Entry]:
    return [Opened(), Typed(f"q{number}"), *parts, Asked(), answered(f"a{number}")]


def test_pictures_go_before_words_and_the_oldest_first():
    tape = [entry for number in range(3) for entry in exchange(number, seen(b"%d" % number))]
    whole = looks(tape)
    assert shape(whole).count("#64") == 3 and not whole.gone
    without: list[Any] = []
    for ahead in range(whole.positions + 20, 0, -1):
        at = looks(tape, Budget(ahead))
        words = re.findall("[qa][012]", shape(at))
        shown = [segment.data for segment in at.segments if isinstance(segment, Picture)]
        if (words, shown) not in without:
            without.append((words, shown))
            assert {gone.of for gone in at.gone if gone.what == "turn"} == {5 * n for n in range(3) if f"q{n}" not in words}
            assert not any(gone.what == "picture" and tape[gone.of].data in shown for gone in at.gone)
    every, last = ["q0", "a0", "q1", "a1", "q2", "a2"], [b"2"]
    assert without == [
        (every, [b"0", b"1", b"2"]),
        (every, [b"1", b"2"]),
        (every, last),
        (every[2:], last),
        (every[4:], last),
        *[(every[n:], []) for n in (0, 2, 4, 6)],  # it does not even fit beside the newest words
    ]


def test_the_current_picture_stays_when_its_words_have_gone():
    tape = exchange(0, seen()) + exchange(1) + exchange(2)
    at = looks(tape, Budget(ahead=looks(tape).positions))
    assert "q0" not in shape(at) and "q2" in shape(at)
    assert shape(at).startswith("<bos><|turn>user\n<|image>#64<image|><turn|>\n<|turn>user\nq1")


def test_the_system_prompt_never_goes():
    tape = [SystemPrompt("You are a helpful pilot."), *exchange(0)]
    assert shape(looks(tape, Budget(ahead=1))) == "<bos><|turn>system\nYou are a helpful pilot.<turn|>\n"


def test_the_live_turn_is_not_evicted_and_says_so_when_a_row_cannot_hold_it():
    tape = [*exchange(0), Opened(), sound(90)]
    fixed = looks(tape, Budget(ahead=1))
    assert shape(fixed) == "<bos><|turn>user\n<|audio>~90"
    assert fixed.gone == (Evicted(0, "turn"),)
    assert looks(tape, Budget(row=fixed.positions)).segments == fixed.segments
    with pytest.raises(RowFull, match=f"take {fixed.positions} positions and a row has room for {fixed.positions - 1}"):
        looks(tape, Budget(row=fixed.positions - 1))


def test_sound_that_opens_a_turn_moves_nothing():
    tape = [entry for number in range(9) for entry in exchange(number)]
    for ahead in range(20, looks(tape).positions, 3):
        ready = looks(tape, Budget(ahead))
        for more in ([Opened()], [Opened(), sound(1)], [Opened(), sound(400), Asked()]):
            assert after(looks(tape + more, Budget(ahead)), ready) is not None


def test_verbatim_keeps_all_as_it_was_then_words_then_lets_go():
    tape: list[Entry] = []
    for number in range(8):
        tape += [Opened(), sound(30, number), seen(b"%d" % number), Asked(), answered(f"a{number}")]
        tape.append(Transcript(6 * number, f"q{number}"))
    full = looks(tape, policy="verbatim")
    assert shape(full).count("~30") == 8 and not full.gone and not full.spent
    tight = looks(tape, Budget(row=400), "verbatim")
    assert shape(tight).count("~30") == shape(tight).count("#64") == 2, shape(tight)
    assert re.findall(r"[qa]\d", shape(tight))[-4:] == ["q5", "a5", "a6", "a7"]
    assert set(tight.gone) == {gone for n in range(6) for gone in (Evicted(6 * n, "sound"), Evicted(6 * n + 2, "picture"))}
    assert tight.spent == tuple(sorted(gone.of for gone in tight.gone))
    tighter = looks(tape, Budget(row=200), "verbatim")
    assert shape(tighter).count("~30") == 1 and Evicted(0, "turn") in tighter.gone and Evicted(36, "sound") in tighter.gone


# ---- a row follows


def test_a_row_follows_a_barge_in_by_cutting_back_to_the_last_word_heard():
    tape = taped(Opened(), sound(3), Asked())
    said = ids("One two three four")
    held = looks(tape).then(said)
    tape.append(Answered(said, ""))
    tape.append(Heard(3, len(ids("One two"))))
    tape.append(Opened())
    tape.append(sound(2, 1))
    keep, rest = looks(tape).since(held)
    assert keep == looks(tape.entries[:3]).positions - len(PROMPT.empty_thought())
    assert shape(rest) == "One two<turn|>\n<|turn>user\n<|audio>~2"
    assert after(looks(tape), held) is None


def test_frames_that_were_fed_one_by_one_are_what_the_view_holds():
    speech = sound(1700, loud=0.5)
    tape, run = taped(Opened()), AudioRun(PROMPT)
    row = looks(tape)
    fed: list[Segment] = []
    for frame in speech.samples:
        piece = Sound.of(frame)
        fed += run.feed(piece)
        tape.append(piece)
    now = looks(tape)
    assert now == replace(row.then(*fed), ahead=now.ahead, upto=now.upto)
    assert now.segments == looks([Opened(), speech]).segments
    assert after(now, row) == tuple(row.then(*fed).rest(row.positions))
    lengths = [segment.positions for segment in now.segments if isinstance(segment, Sound)]
    assert len(lengths) == shape(now).count("<|audio>") > 2 and all(500 <= length <= 750 for length in lengths[:-1])


def runs(levels: np.ndarray) -> list[int]:
    """Frames in each run of sound with these levels."""
    samples = np.outer(levels, np.ones(FRAME)).astype(np.float32)
    return [segment.positions for segment in looks([Opened(), Sound.of(samples)]).segments if isinstance(segment, Sound)]


def test_a_run_of_sound_ends_in_a_pause_between_20_and_30_seconds():
    speech = np.random.default_rng(0).uniform(0.1, 0.9, 1000)
    speech[100:200] = 0.01
    speech[[510, 530, 550]] = 0.0  # one frame is no pause
    speech[600:610] = 0.02
    assert 603 <= runs(speech)[0] <= 606
    rising = np.linspace(0.1, 0.9, 1600)
    assert runs(rising) == [750, 750, 100], "no pause at all"
    assert runs(np.zeros(1200)) == [500, 500, 200]
    assert runs(rising[:750]) == [750], "nothing is opened that nothing follows"


# ---- memory


def test_what_no_view_wants_leaves_memory_and_nothing_else_changes():
    tape = taped(*exchange(0, sound(40), seen(b"a" * 9000)), Transcript(0, "w"), *exchange(1, sound(40), seen(b"b" * 9000)))
    before = looks(tape, Budget(ahead=150))
    assert before.spent == (0, 3)
    tape.append(Dropped(before.spent))
    after = looks(tape, Budget(ahead=150))
    assert (after.segments, after.gone, after.spent) == (before.segments, before.gone, ())
    assert tape.entries[2] == Sound(b"", FRAME) and tape.entries[3] == replace(seen(), data=b"")
    assert tape.entries[9] == sound(40), "not yet words"
    assert shape(looks(tape, policy="verbatim")).startswith("<bos><|turn>user\nq0\nw<turn|>")


# ---- the journal


def conversation() -> list[Entry]:
    tools = ({"name": "f", "parameters": {"properties": {"a": {"type": "number"}}}},)
    call = ids("<|tool_call>call:f{}<tool_call|><|tool_response>")
    return [
        *(SystemPrompt("äöü \ud83d\n", tools, True), Opened(at=7), sound(3), Typed("\n{}"), seen(b"\n\0jp\xffeg", seconds=1.5)),
        *(Asked(), Answered(call), Called(6, "f", {"x": [1, None, "ü"]}), CallResult(7, [1, 2.5]), answered("Well, yes.")),
        *(Heard(9, 2), Transcript(1, "hallo"), Dropped((1,)), Opened(), Typed("x"), Closed(), Deleted(13)),
    ]


def test_a_journal_loads_to_an_equal_tape_that_goes_on(tmp_path):
    path = tmp_path / "tape"
    tape = Tape.create(path, "nano")
    for entry in conversation():
        tape.append(entry)
    tape.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    os.chmod(path, 0o644)
    again = Tape.load(path)
    assert again.entries == tape.entries == taped(*conversation()).entries and again.model == "nano"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for both in (tape, again):
        both.append(Opened())
        both.append(sound(5))
    again.close()
    more = Tape.load(path)
    assert more.entries == tape.entries
    assert looks(more) == looks(tape)
    more.close()


def test_a_journal_torn_anywhere_in_its_last_record_loads_without_it(tmp_path):
    path = tmp_path / "tape"
    tape = Tape.create(path)
    for entry in conversation():
        tape.append(entry)
    before = path.stat().st_size
    tape.append(Opened())
    tape.close()
    whole = path.read_bytes()
    for end in [*range(before, len(whole)), None]:
        path.write_bytes(whole[:end] if end else whole[: before + 9] + bytes(4096))
        torn = Tape.load(path)
        assert torn.entries == tape.entries[:-1]
        assert path.stat().st_size == before
        torn.append(Opened())
        torn.close()
        assert path.read_bytes() == whole


def test_a_damaged_journal_is_refused_by_name_and_place(tmp_path):
    path = tmp_path / "tape"
    tape = Tape.create(path)
    tape.append(Opened())
    middle = path.stat().st_size
    tape.append(Typed("hello"))
    tape.append(Closed())
    tape.close()
    whole = path.read_bytes()
    for at in range(middle, middle + 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(JournalError, match=rf"tape is damaged at byte {middle}"):
            Tape.load(path)
    path.write_bytes(whole.replace(b"attend tape 1", b"attend tape 2"))
    with pytest.raises(JournalError, match="is not a conversation journal that this version can read"):
        Tape.load(path)
    path.write_bytes(whole[:14])
    with pytest.raises(JournalError, match="is empty"):
        Tape.load(path)
    with pytest.raises(JournalError, match="cannot be opened: File exists"):
        Tape.create(path)
    with pytest.raises(JournalError, match="cannot be opened: No such file"):
        Tape.load(tmp_path / "none")


def test_entries_that_do_not_belong_together_are_refused(tmp_path):
    path = tmp_path / "tape"
    tape = Tape.create(path)
    before = path.stat().st_size
    tape.append(Opened())
    after = path.stat().st_size
    tape.append(Typed("hello"))
    tape.close()
    path.write_bytes(path.read_bytes()[:before] + path.read_bytes()[after:])  # words in no turn
    with pytest.raises(JournalError, match="does not belong there"):
        Tape.load(path)


def test_a_journal_keeps_to_its_bound_by_letting_the_oldest_payloads_go(tmp_path):
    path = tmp_path / "tape"
    tape = Tape.create(path, bound=50_000)
    for number in range(40):
        for entry in exchange(number, sound(50, number), seen(b"%02d" % number * 500)):
            tape.append(entry)
        assert path.stat().st_size <= 50_000
    kept = [bool(entry.data) for entry in tape.entries if isinstance(entry, Sound)]
    assert kept == sorted(kept) and 5 < sum(kept) < 20
    assert sum(isinstance(entry, Typed) for entry in tape.entries) == 40, "words stay"
    tape.append(Opened())
    with pytest.raises(JournalError, match="is full and nothing in it can be dropped"):
        for number in range(99):
            tape.append(sound(50, number))
    length = len(tape.entries)
    tape.close()
    tape.append(Typed("and on"))
    assert len(tape.entries) == length + 1, "goes on in memory"
    again = Tape.load(path)
    assert list(again.entries) == list(tape.entries[:-1])
    again.close()


def test_a_full_disk_is_said_and_leaves_a_journal_that_loads(tmp_path):
    path = tmp_path / "tape"
    tape = Tape.create(path)
    tape.append(Opened())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 500, hard))
    try:
        with pytest.raises(JournalError, match="tape cannot be written: No space left"):
            tape.append(sound(50))
        tape.append(Typed("small"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tape.close()
    again = Tape.load(path)
    assert again.entries == tape.entries == [Opened(), Typed("small")]
    again.close()


# ---- any conversation

PARTS = ("sound", "type", "see")
OPS = (*PARTS, "sound", "close", "ask", "answer", "hear", "call", "result", "transcribe", "transcribe", "delete", "set")


@st.composite
def conversations(draw: st.DrawFn) -> list[Entry]:
    """Entries that fit; every word is "w" and its turn's number, every picture's bytes are that number."""
    tape = Tape()
    for op, n in draw(st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 60)), max_size=40)):
        if op in PARTS and not tape.fits(Closed()):
            tape.append(Opened())
        turns = [index for index, entry in enumerate(tape.entries) if isinstance(entry, Opened)]
        last, of = len(tape.entries) - 1, turns[-1 - n % 3] if len(turns) > 2 else 0
        words = f" w{len(turns)} " * (1 + n % 5)
        entry: Entry = {
            "sound": sound(n, n),
            "type": Typed(words),
            "see": replace(seen(b"%d" % len(turns)), width=20 + n, seconds=float(n) if n % 2 else None),
            "close": Closed(),
            "ask": Asked(),
            "answer": Answered(ids(f"{'<|channel>thought' if n % 3 else ''}hm<channel|>{words}") if n % 4 else (), words),
            "hear": Heard(last - n % 5, n % 12),
            "call": Called(last, "f", {"a": n}),
            "result": CallResult(last - n % 3, n),
            "transcribe": Transcript(of, f"w{turns.index(of) + 1}" if of in turns else ""),
            "delete": Deleted(last - n),
            "set": SystemPrompt("s" * (n % 7), thinking=n % 2 > 0),
        }[op]
        if tape.fits(entry):
            tape.append(entry)
    return list(tape.entries)


POLICIES = st.sampled_from(["transcripts", "verbatim"])


@settings(max_examples=80)
@given(conversations(), POLICIES, st.integers(0, 400), st.integers(0, 600))
def test_a_view_keeps_its_budget_and_the_order_and_follows_from_the_tape_alone(entries, policy, ahead, row):
    try:
        at = looks(entries, Budget(ahead, row), policy)
    except RowFull:
        assert looks(entries, Budget(0, 100_000), policy).positions > row
        return
    assert at == looks(list(entries), Budget(ahead, row), policy)
    assert at.positions == sum(map(size, at.segments)) == len(flat(at.segments)) <= row
    if policy == "transcripts" and at.ahead > ahead:
        assert at.positions == looks(entries, Budget(0, 100_000)).positions, "the system prompt and the live turn are all"
    order = [int(number) for number in re.findall(r"w(\d+)", shape(at))]
    assert order == sorted(order)
    pictures = [int(segment.data) for segment in at.segments if isinstance(segment, Picture)]
    assert pictures == sorted(pictures)
    assert all(not isinstance(a, tuple) or not isinstance(b, tuple) for a, b in zip(at.segments, at.segments[1:], strict=False))


@settings(max_examples=60)
@given(conversations(), POLICIES, st.integers(0, 300), st.integers(0, 40))
def test_a_row_that_follows_entry_by_entry_holds_the_view_that_is_composed_at_once(entries, policy, ahead, upto):
    upto = min(upto, len(entries))
    held = looks(entries[:upto], Budget(ahead, 100_000), policy, upto=upto)
    for end in range(upto + 1, len(entries) + 1):
        now = looks(entries[:end], Budget(ahead, 100_000), policy, upto=upto)
        keep, rest = now.since(held)
        a, b = flat(held.segments), flat(now.segments)
        assert a[:keep] + flat(rest) == b
        assert keep == min(len(a), len(b)) or a[keep] != b[keep] or isinstance(a[keep], tuple), "all that can stay stays"
        assert (after(now, held) is None) == (keep < len(a))
        held = now


@settings(max_examples=80)
@given(conversations(), POLICIES, st.integers(0, 300), st.integers(0, 600), st.sets(st.integers(0, 40), max_size=5))
def test_views_that_are_kept_up_with_a_tape_are_those_composed_at_once(entries, policy, ahead, row, decided):
    """But for what they forget, which is tried below."""
    tape, budget, upto = Tape(), Budget(ahead, row), None
    views = ViewComposer(tape.entries, PROMPT, SIDE)
    views._exchanges.prune = lambda _: None  # type: ignore[method-assign]
    for number, entry in enumerate(entries):
        tape.append(entry)
        if upto is None or number in decided:
            try:
                views.evict(budget, policy)
            except RowFull:
                with pytest.raises(RowFull):
                    looks(tape, budget, policy)
                continue
            upto = len(tape.entries)
        plain = looks(tape, budget, policy, upto=upto)
        assert views.view().segments == plain.segments
        live = views.least()
        assert sum(live) <= plain.positions
        if upto == len(tape.entries):
            assert views.view() == plain
            if policy == "transcripts":
                assert sum(live) == looks(tape, Budget(0, 100_000)).positions, "everything else can be evicted"


def test_what_is_evicted_and_out_of_memory_does_not_come_back_and_costs_nothing_more():
    tape = taped(SystemPrompt("Be brief."), Opened())
    views = ViewComposer(tape.entries, PROMPT, SIDE)
    tape.append(sound(60))
    for number in range(300):
        turn = len(tape.entries) - 2
        for entry in (seen(b"%d" % number), Asked(), answered(f"a{number}"), Transcript(turn, f"q{number}")):
            tape.append(entry)
        views.evict(Budget(ahead=150), "transcripts")
        tape.append(Dropped(views.view().spent))
        tape.append(Opened())
        tape.append(sound(60))
    assert views.exchanges < 12
    assert re.findall(r"q\d+", shape(views.view())) == [f"q{number}" for number in (297, 298, 299)]
    for index in [index for index, entry in enumerate(tape.entries[:-2]) if isinstance(entry, Opened)][-3:]:
        tape.append(Deleted(index))
    views.evict(Budget(ahead=150), "transcripts")
    assert not re.findall(r"q\d+", shape(views.view())), "there would be room for three"


@settings(max_examples=60)
@given(conversations(), POLICIES, st.integers(0, 300))
def test_a_live_turn_only_ever_lengthens_the_row(entries, policy, ahead):
    held = looks(entries, Budget(ahead, 100_000), policy)
    for more in ([Opened(), Typed("x"), sound(3), seen(), Typed("y"), sound(2), Closed()], [Opened(), sound(2), Asked()]):
        tape = list(entries)
        at = held
        for entry in more:
            tape.append(entry)
            now = looks(tape, Budget(ahead, 100_000), policy, upto=len(entries))
            if not isinstance(entry, Opened):
                assert after(now, at) is not None
            at = now


@settings(max_examples=40)
@given(conversations(), POLICIES, st.integers(0, 300), st.integers(0, 600))
def test_dropping_what_is_spent_changes_no_view(entries, policy, ahead, row):
    tape = Tape()
    tape._entries = list(entries)
    try:
        before = looks(tape, Budget(ahead, row), policy)
    except RowFull:
        return
    tape.append(Dropped(before.spent))
    after = looks(tape, Budget(ahead, row), policy)
    assert after.segments == before.segments and after.spent == ()


@settings(max_examples=30)
@given(conversations())
def test_any_conversation_survives_its_journal(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("journal") / "tape"
    tape = Tape.create(path)
    for entry in entries:
        tape.append(entry)
    tape.close()
    again = Tape.load(path)
    again.close()
    assert again.entries == tape.entries


# ---- rebuild(tape) = the row it came from


def tiny() -> Gemma:
    raw = Recipe(hub=True, layers="ssfs", window=8).hub_json()
    raw["text_config"]["vocab_size"] = TOKENIZER.vocab_size
    config = replace(GemmaConfig.from_json(raw), media=PROMPT.media)
    torch.manual_seed(0)
    model = Gemma(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1 if name == "vision.places" else p.shape[-1] ** -0.5)
    return model.eval()


class Fed:
    """A row that is cut back and appended to, as a session does; sound in chunks of any size."""

    def __init__(self, model: Gemma, chunk: int) -> None:
        self.model, self.chunk = model, chunk
        self.cache = Cache(model.config, 1, 600, slack=120)
        self.row: Row = self.cache.claim()
        self.hidden = torch.zeros(0)
        self.held = View((), 0, 0)

    def follow(self, to: View) -> None:
        keep, rest = to.since(self.held)
        self.cache.truncate(self.row, keep)
        self.append(*rest)
        self.held = to

    @torch.inference_mode()
    def append(self, *segments: Segment) -> None:
        for segment in segments:
            blocks = None
            if isinstance(segment, Picture):
                pixels, places = patches(decode_picture(segment.data, "picture"), segment.budget, SIDE)
                x = self.model.embed_image(pixels, places)
                assert len(x) == segment.positions
                blocks = torch.zeros(1, len(x), dtype=torch.long)
            elif isinstance(segment, Sound):
                x = self.model.embed_audio(torch.from_numpy(segment.samples))
            else:
                x = self.model.embed_text(torch.tensor(segment))
            for part in [x] if blocks is not None else x.split(self.chunk):
                hidden = self.model.extend(self.cache, [self.row], part[None], blocks=blocks)
                assert hidden is not None
                self.hidden = hidden[0, -1]
        self.held = self.held.then(*segments)

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        return self.model.logits(self.hidden)


@pytest.mark.parametrize("policy", ["verbatim", "transcripts"])
def test_a_row_rebuilt_from_the_journal_is_the_row_it_came_from(tmp_path, policy):
    model, path = tiny(), tmp_path / "tape"
    jpeg = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))[1].tobytes()
    tape, live = Tape.create(path), Fed(model, chunk=1)

    def take(*entries: Entry) -> None:
        for entry in entries:
            tape.append(entry)
            live.follow(looks(tape, policy=policy))

    take(
        SystemPrompt("Be brief."),
        Opened(),
        Typed("look"),
        *(sound(1, seed) for seed in range(20)),
        Seen(jpeg, 40, 60, 70),
        Asked(),
    )
    said = ids("A circle, and a square")
    for id in said:
        live.append((id,))
    take(Answered(said, ""), Heard(len(tape.entries), len(ids("A circle"))), Transcript(1, "what is it"))
    take(Opened(), sound(9, 77), Typed("well?"), Asked())
    tape.close()

    loaded = Tape.load(path)
    loaded.close()
    rebuilt = Fed(model, chunk=50)
    rebuilt.follow(looks(loaded, policy=policy))
    assert live.row.length == rebuilt.row.length == looks(loaded, policy=policy).positions > 10 * model.config.window
    assert ("~20" in shape(live.held)) == (policy == "verbatim")
    assert (live.logits() - rebuilt.logits()).abs().max() < 1e-3
    unheard = looks([entry for entry in loaded.entries if not isinstance(entry, Heard)], policy=policy)
    other = Fed(model, chunk=50)
    other.follow(unheard)
    assert (live.logits() - other.logits()).abs().max() > 1e-2, "the comparison would notice"
