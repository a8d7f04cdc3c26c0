"""The embedded checkpoint: transformers reads it and agrees, and it passes its exam."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from agent import checkpoint
from agent.checkpoint import LoadedModel
from model.nano import draw, drawers, exam, speech, world
from model.nano.lessons import KINDS, Teacher, collate
from model.weights import NANO

pytestmark = pytest.mark.slow
CARD = NANO / "CARD.md"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return checkpoint.load("nano")


def _conversation(loaded: LoadedModel, seed: int) -> tuple[list[int], torch.Tensor | None, torch.Tensor]:
    """Prompt ids with placeholders, frames [n, 640] or None, patches [m, 6912]: a question about a picture, spoken or typed."""
    rng, prompt = np.random.default_rng(seed), loaded.prompt
    scene = world.sample_scene(rng, 432, 336)
    ask = world.sample_ask(rng, scene, ("describe", "where", "count", "colour")[seed % 4])
    pieces, _ = checkpoint.patchify(loaded, draw.draw(scene, rng), loaded.budget)
    ids = [*prompt.begin(), *prompt.open_turn(), prompt.boi, *[prompt.media.image] * len(pieces), prompt.eoi]
    if seed % 2:
        return [*ids, *prompt.text(ask.text), *prompt.close_turn()], None, pieces
    pcm = speech.utter(ask.text, rng, held_out=True).pcm
    frames = torch.from_numpy(np.pad(pcm, (0, -len(pcm) % 640)).reshape(-1, 640))
    return [*ids, prompt.boa, *[prompt.media.audio] * len(frames), prompt.eoa, *prompt.close_turn()], frames, pieces


def test_transformers_loads_it_and_gives_the_same_greedy_answers(loaded: LoadedModel) -> None:
    from transformers import Gemma4UnifiedForConditionalGeneration

    theirs = Gemma4UnifiedForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32).eval()
    media = loaded.model.config.media
    for seed in range(8):
        ids, frames, pieces = _conversation(loaded, seed)
        places = torch.tensor([[x, y] for y in range(7) for x in range(9)])
        kinds = torch.tensor([[1 if i == media.image else 3 if i == media.audio else 0 for i in ids]])
        sound = {}
        if frames is not None:
            sound = {"input_features": frames[None], "input_features_mask": torch.ones(1, len(frames), dtype=torch.bool)}
        with torch.inference_mode():
            out = theirs.generate(
                input_ids=torch.tensor([ids]),
                pixel_values=pieces[None],
                image_position_ids=places[None],
                mm_token_type_ids=kinds,
                **sound,
                cache_implementation="static",
                disable_compile=True,
                do_sample=False,
                max_new_tokens=60,
                suppress_tokens=list(loaded.generation.suppressed),
            )[0, len(ids) :].tolist()
        cache = checkpoint.new_cache(loaded, 1, 512)
        row, hidden = cache.claim(), None
        at, number = 0, 0
        while at < len(ids):
            if ids[at] == media.image:
                checkpoint.append_picture(loaded, cache, row, pieces, places)
                at += len(pieces)
            elif ids[at] == media.audio:
                assert frames is not None
                checkpoint.append_frame(loaded, cache, row, frames[number].numpy())
                at, number = at + 1, number + 1
            else:
                hidden = checkpoint.append_ids(loaded, cache, row, [ids[at]], wanted=True)
                at += 1
        assert hidden is not None
        ours = [token for token, _ in checkpoint.generate(loaded, cache, row, hidden, loaded.generation, 60)]
        assert ours == out, f"conversation {seed}"


def test_the_card_states_what_the_exam_finds(loaded: LoadedModel) -> None:
    """The card's exam is longer; a short one of another seed must come out near it, so that neither drifts from the weights."""
    part = exam.Exam(loaded, seed=7)
    found = {
        "espeak-ng": part.spoken("spoken, espeak-ng held out", part.espeak, 40),
        "flat": part.typed("typed, drawer flat", drawers.drawers()["flat"], 40),
        "solids": part.typed("typed, drawer solids (held out)", drawers.held_out(), 40),
    }
    card = CARD.read_text(encoding="utf-8")
    assert "python -m model.nano.exam --seed" in card
    for row in found.values():
        print(row)
        stated = re.search(rf"^{re.escape(row.title)} +([\d.]+)%", card, re.MULTILINE)
        assert stated, f"the card says nothing of: {row.title}"
        assert abs(float(stated[1]) / 100 - row.share) < 0.2, f"{row.title}: {row.share:.1%}, and the card says {stated[1]} %"
    wrong = re.search(r"^spoken, espeak-ng held out .*words wrong +([\d.]+)%", card, re.MULTILINE)
    assert wrong and abs(float(wrong[1]) / 100 - found["espeak-ng"].word_error_rate) < 0.1
    for variant in speech.HELD_OUT:
        assert variant in card


def test_an_exam_without_a_bank_says_what_it_leaves_out(loaded: LoadedModel) -> None:
    said = [row for row in exam.Exam(loaded, seed=1, share=0.001).rows() if isinstance(row, str)]
    assert len(said) == 4 and all("left out" in line for line in said)


def test_a_row_counts_words_boxes_and_answers(loaded: LoadedModel) -> None:
    row = exam.ExamRow("some")
    scene = world.sample_scene(np.random.default_rng(1), 432, 336, count=(2, 2))
    ask = world.sample_ask(np.random.default_rng(2), scene, "where")
    assert exam.judge(row, ask, ask.answer)
    assert not exam.judge(row, ask, "I see no shapes.")
    assert (row.share, row.boxes_wanted) == (0.5, 2 * row.boxes_placed)
    assert exam.word_errors("where is the red circle", "where is a circle") == 2


def test_it_is_small_enough_to_live_in_the_repository() -> None:
    assert (NANO / "model.safetensors").stat().st_size <= 40e6
    assert json.loads((NANO / "config.json").read_text())["model_type"] == "gemma4_unified"


def test_a_lesson_teaches_every_token_of_its_answers_and_every_place_of_sight_and_hearing() -> None:
    teacher = Teacher(NANO)
    lesson = teacher.lesson(np.random.default_rng(5))
    media = teacher.config.media
    taught = {at for at, *_ in lesson.targets}
    for at, token in enumerate(lesson.ids):
        if token in (media.image, media.audio):
            assert at in taught
    answers = [at for at, token in enumerate(lesson.ids) if token == teacher.close and at - 1 in taught]
    assert answers, "no turn of the model ends in this lesson"
    assert len(lesson.patches_at) == sum(map(len, lesson.patches)) == lesson.ids.count(media.image)
    assert len(lesson.frames_at) == sum(map(len, lesson.frames)) == lesson.ids.count(media.audio)


def test_a_lesson_says_what_each_answer_is_asked_for() -> None:
    teacher, found = Teacher(NANO), set()
    for seed in range(24):
        lesson = teacher.lesson(np.random.default_rng(seed))
        for at, kind, _, shape, n in lesson.asked:
            end = lesson.ids.index(teacher.close, at + 1)
            answer = teacher.tokenizer.decode(lesson.ids[at + 1 : end])
            if KINDS[kind] == "count":
                assert f" {world.NUMBERS[n]} " in answer
                found.add(n)
            if shape and KINDS[kind] in world.QUESTIONS:
                assert world.SHAPES[shape - 1] in answer
            assert (n >= 0) == (KINDS[kind] in world.QUESTIONS)
    assert len(found) > 1


def test_lessons_of_one_seed_are_the_same_and_fit_their_batch() -> None:
    teacher = Teacher(NANO)

    def batch() -> object:
        rng = np.random.default_rng(3)
        return collate([teacher.lesson(rng) for _ in range(2)], 200)

    one, two = vars(batch()), vars(batch())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["ids"].shape == (2, 200)
    assert len(one["frames"]) == len(one["frames_at"]) and len(one["patches"]) == len(one["patches_at"]) == len(one["places"])
    assert one["targets"][:, 0].max() < 400


def test_the_recipe_learns_and_resumes(tmp_path: Path) -> None:
    from model.nano import train

    course = train.Course(steps=6, shapes=((2, 128),), warmup=1, ease_steps=2, compiled=False)
    cpu, out, embedded = torch.device("cpu"), tmp_path / "out", tmp_path / "embedded"
    embedded.mkdir()
    first = train.train(course, out, cpu, workers=0, begin=NANO, until=4)
    again = train.train(course, out, cpu, workers=0, begin=NANO, export=embedded)
    assert (first, again) == (4, 6)
    begun, learnt = checkpoint.load("nano").model, checkpoint.load(str(embedded)).model
    assert learnt.config == begun.config
    pairs = zip(learnt.blocks.parameters(), begun.blocks.parameters(), strict=True)
    assert all((a != b).any() for a, b in pairs if a.ndim == 2)  # a norm's weight may move by less than bfloat16 tells
