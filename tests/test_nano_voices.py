"""What lessons are made of beside espeak-ng: stored voices, flite, people, how sentences are cut and joined, and typed forms."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from model.nano import kokoro, speakers, typed, world
from model.nano.bank import Bank, Writer
from model.nano.flite import flite
from model.nano.lessons import TURN_DETECTION
from model.nano.speakers import Speakers, recordings, unfinished
from model.nano.understand import OTHER, Question, reply, subject, understand
from model.nano.utterance import RATE, Utterance, broken_off, hesitant, join, paced, part
from model.tokenizer import Tokenizer
from model.weights import NANO


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def beeps(text: str, seed: int = 0) -> Utterance:
    """A tone of 100 ms for each word, with 50 ms between them and 200 ms of silence around."""
    words = text.lower().split()
    pcm = np.zeros(int((0.4 + 0.15 * len(words)) * RATE), np.float32)
    spans = []
    for n, word in enumerate(words):
        at = int((0.2 + 0.15 * n) * RATE)
        pcm[at : at + RATE // 10] = rng(seed + n).uniform(-0.5, 0.5, RATE // 10)
        spans.append((word, at, at + RATE // 10))
    return Utterance(text, pcm, tuple(spans))


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """A folder with one family, which says what is needed here."""
    writer = Writer(tmp_path / "bank" / "tones")
    texts = ["where is the red circle", "find the blue star", "how many green squares are there", "hello", "i am tired today"]
    for text in texts:
        said = beeps(text)
        writer.add(said.pcm, text, said.words, "tones")
    return tmp_path / "bank"


# What a sentence asks


def test_a_sentence_is_understood_as_it_was_meant() -> None:
    draw = rng(1)
    for number in range(150):
        scene = world.sample_scene(draw, 432, 336) if number % 4 else None
        for _ in range(8):
            ask = world.sample_ask(draw, scene)
            again = reply(ask.text, scene)
            assert (again.kind, again.answer, again.about) == (ask.kind, ask.answer, ask.about), ask.text


def test_a_broken_off_question_is_not_understood() -> None:
    assert understand("Okay, where is the red circle now?") == Question("where", "red", "circle")
    assert understand("where is the red") is OTHER
    assert subject(("are", "there", "any", "red", "stars")) == (3, 5)


def test_somebody_has_not_finished_only_where_the_words_show_it() -> None:
    ends = unfinished(("what", "do", "you", "see", "in", "the", "picture"))
    assert 4 not in ends and {2, 3, 5, 6} <= set(ends)
    assert unfinished(("the", "train", "is", "late", "today")) == [1, 3]


# How sentences are cut and joined


def test_parts_that_are_joined_again_sound_as_before() -> None:
    whole = beeps("where is the red circle")
    joined = join([part(whole, 0, 2), part(whole, 2, 5)], [0.0])
    assert [word for word, _, _ in joined.words] == whole.text.split()
    assert len(joined.pcm) == len(whole.pcm)
    assert joined.words == whole.words


def test_what_is_broken_off_ends_with_the_silence_that_is_asked_for() -> None:
    kept = broken_off(beeps("where is the red circle"), 3, 0.15)
    assert kept.text == "where is the"
    end = kept.words[-1][2]
    assert len(kept.pcm) - end == int(0.15 * RATE) and not kept.pcm[end:].any()
    assert np.abs(kept.pcm[end - 400 : end]).max() > 0.2


def test_an_um_is_heard_and_not_written_down() -> None:
    whole, um = beeps("where is the red circle"), np.full(1600, 0.3, np.float32)
    slow = hesitant(whole, 3, um, (0.1, 0.2))
    assert [word for word, _, _ in slow.words] == whole.text.split()
    assert len(slow.pcm) == len(whole.pcm) + 1600 + int(0.3 * RATE)
    assert slow.words[3][1] - slow.words[2][2] > 0.35 * RATE


def test_another_pace_keeps_words_where_they_sound() -> None:
    fast = paced(beeps("find the blue star"), 1.25)
    for _, start, end in fast.words:
        assert np.abs(fast.pcm[start + 100 : end - 100]).max() > 0.2
        assert np.abs(fast.pcm[start - 200 : start - 100]).max() < 0.05


# The bank


def test_a_bank_that_was_broken_off_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    said = beeps("hello there")
    writer = Writer(tmp_path / "family")
    writer.add(said.pcm, said.text, said.words, "one")
    with (tmp_path / "family.pcm").open("ab") as sound:
        sound.write(b"half of the next")
    with (tmp_path / "family.jsonl").open("a") as lines:
        lines.write('{"start": 99')
    writer = Writer(tmp_path / "family")
    assert writer.count == 1
    writer.add(said.pcm, "goodbye now", said.words, "two")
    entries = Bank([tmp_path / "family.jsonl"]).entries
    assert [entry.text for entry in entries] == ["hello there", "goodbye now"]
    for entry in entries:
        assert np.allclose(entry.pcm[entry.start : entry.end] / 32767, said.pcm, atol=1e-4)


def test_a_bank_finds_what_asks_about_the_same_thing(bank: Path) -> None:
    found = Bank(sorted(bank.glob("*.jsonl")))
    entry = found.about(Question("where", "red", "circle"), rng())
    assert entry is not None and entry.text == "where is the red circle"
    assert found.about(Question("count", "purple", "star"), rng()).text == "how many green squares are there"  # type: ignore[union-attr]
    assert found.about(Question("colour"), rng()) is None


# Who speaks


def test_a_stored_question_is_answered_as_what_it_asks(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speakers, "SHARES", {"espeak": 0.0, "flite": 0.0, "bank": 1.0})
    they, draw = Speakers(bank), rng(2)
    for _ in range(40):
        scene = world.sample_scene(draw, 384, 384)
        ask, heard = they.ask(draw, scene, "where")
        assert ask.kind == "where" and world.spoken(ask.text) == " ".join(word for word, _, _ in heard.words)
        assert ask == reply(ask.text, scene)


def test_names_are_swapped_between_stored_sentences_into_whole_questions(bank: Path) -> None:
    they, draw, texts = Speakers(bank), rng(3), set()
    assert they.bank is not None
    for _ in range(60):
        entry = they.bank.about(Question("where", "red", "circle"), draw)
        assert entry is not None
        texts.add(they._swapped(entry.utterance(draw), draw).text)
    assert "where is the blue star" in texts
    assert all(understand(text).kind == "where" for text in texts)


def test_without_a_bank_it_says_what_that_costs(tmp_path: Path) -> None:
    assert any("no bank of neural voices" in note for note in Speakers(tmp_path / "nothing").missing)


def test_every_fifth_recording_is_kept_for_the_exam(tmp_path: Path) -> None:
    with (tmp_path / "people.jsonl").open("w") as lines:
        for n in range(10):
            soundfile.write(tmp_path / f"{n}.flac", np.zeros(RATE), RATE)
            lines.write(json.dumps({"file": f"{n}.flac", "text": "One coffee."}) + "\n")
    held, heard = recordings(tmp_path, held_out=True), recordings(tmp_path, held_out=False)
    assert len(held) == 2 and len(heard) == 8 and not {x.file for x in held} & {x.file for x in heard}
    assert len(held[0].pcm()) == RATE


@pytest.mark.slow
def test_flite_says_where_each_word_lies() -> None:
    for seed in range(4):
        said = flite().clean("Okay, what's the colour of the circle, please?", rng(seed))
        assert [word for word, _, _ in said.words] == ["okay", "what's", "the", "colour", "of", "the", "circle", "please"]
        assert all(a < b for _, a, b in said.words)
        assert all(end <= start + 1 for (_, _, end), (_, start, _) in zip(said.words, said.words[1:], strict=False))
        assert not said.pcm[: said.words[0][1]].any() and not said.pcm[said.words[-1][2] :].any()


@pytest.mark.slow
def test_flite_says_the_same_from_the_same_generator() -> None:
    for seed in range(6):
        one = flite().clean("Where is the star?", rng(seed))
        flite().clean("Something else.", rng(9))
        assert np.array_equal(one.pcm, flite().clean("Where is the star?", rng(seed)).pcm)


def test_held_out_voices_are_no_part_of_a_blend() -> None:
    some = kokoro.Kokoro.__new__(kokoro.Kokoro)
    some.voices = {name: np.full((510, 1, 256), n, np.float32) for n, name in enumerate((*kokoro.HELD_OUT, "af_sky", "bm_lewis"))}
    for seed in range(50):
        style, (a, b, c, _, _) = some.style(rng(seed))
        assert not {a, b, c} & set(kokoro.HELD_OUT)
        assert style.shape == (510, 1, 256) and 5.99 < style.min() <= style.max() < 7.01


# Typing


def test_typed_forms_say_the_same() -> None:
    draw = rng(4)
    forms = [typed.typed("What is the colour of the red circle?", draw) for _ in range(400)]
    assert any(form.isupper() for form in forms) and any(form.islower() and "?" not in form for form in forms)
    assert any("color" in form.lower() for form in forms) and any("what's" in form.lower() for form in forms)
    letters = sorted("whatisthecolouroftheredcircle")
    for form in forms:
        own = sorted(x for x in form.lower().replace("color", "colour").replace("'s", " is") if x.isalpha())
        assert abs(len(own) - len(letters)) <= 2


def test_no_lesson_shows_a_form_that_is_kept_for_the_exam() -> None:
    draw, text = rng(5), "What is the colour of the circle?"
    shown = {typed.typed(text, draw) for _ in range(3000)}
    kept = {typed.typed(text, draw, held_out=True) for _ in range(300)}
    assert len(kept) > 8 and not shown & kept


# The judge of pauses


def test_the_question_about_a_pause_is_short_and_its_answers_are_one_token_each() -> None:
    tokenizer = Tokenizer.load(NANO)
    assert len(tokenizer.encode(TURN_DETECTION["question"])) <= 6
    assert all(len(tokenizer.encode(TURN_DETECTION[name])) == 1 for name in ("finished", "unfinished"))


def test_pauses_are_taught_in_both_ways_and_after_the_silence_that_is_named(bank: Path) -> None:
    they, draw, seen = Speakers(bank), rng(6), set()
    for _ in range(30):
        said, whole = they.pause(draw, (0.12, 0.2))
        seen.add(whole)
        assert whole or understand(" ".join(word for word, _, _ in said.words)) is OTHER
        assert len(said.pcm) - said.words[-1][2] >= int(0.12 * RATE)
    assert seen == {True, False}


# Kokoro, without its weights


@pytest.mark.parametrize(
    "text", ["Is there an orange star in the picture?", "Okay, what's the colour of the square, please?", "Hi."]
)
def test_each_word_has_its_own_phonemes_also_where_espeak_joins_some(text: str) -> None:
    some = kokoro.Kokoro.__new__(kokoro.Kokoro)
    some.ids = {x: n for n, x in enumerate("ˈˌːəɚɛɜɪʊʌɑɐɔæɡðŋɹʃʒθʔᵻabdefhijklmnopstuvwz .,?!", 1)}
    phonemes = some._phonemes(text, british=False)
    spans = list(some._spans(text, phonemes, british=False))
    assert [word for word, _, _ in spans] == world.spoken(text).split()
    assert all(first < last for _, first, last in spans) and spans[0][1] == 0
    assert all(last <= first for (_, _, last), (_, first, _) in pairwise(spans))
    assert all(" " not in phonemes[first:last] for _, first, last in spans)


def test_the_durations_are_added_to_a_graph_as_one_more_output() -> None:
    added = kokoro._with_durations(b"graph")[5:]
    assert added[0] == 7 << 3 | 2 and added[1] == len(added) - 2
    assert added[2] == 12 << 3 | 2 and added.endswith(kokoro.DURATIONS.encode())


def test_what_kokoro_needs_is_named(tmp_path: Path) -> None:
    with pytest.raises(kokoro.KokoroMissing, match=r"onnxruntime|kokoro-v1\.0\.int8\.onnx"):
        kokoro.Kokoro(tmp_path)
    with pytest.raises(kokoro.KokoroMissing, match="voices-v1.0.bin"):
        kokoro._voices(tmp_path)


def test_a_third_of_the_sentences_of_a_bank_are_short() -> None:
    lengths = [len(kokoro.sentence(rng(seed)).split()) for seed in range(200)]
    assert 0.25 < np.mean([n <= 3 for n in lengths]) < 0.6
