"""Plans: what fits a machine, how many conversations it holds, and what is said where it holds none."""

import argparse

import pytest
import torch

from agent import plan
from agent.bench.shapes import SHAPES
from agent.plan import GIB, Machine
from model import weights
from model.cache import Room
from model.config import CheckpointError, GemmaConfig
from model.gemma import Gemma
from tests import tiny

BIG = GemmaConfig.from_json(SHAPES["12b"]())


def gpu(gib, gb_s=1000):
    return Machine("a GPU", "cuda", int(gib * GIB), 1e9 * gb_s)


def make(machine, form=None, **choice):
    return plan.make(BIG, machine, form, **choice)


def test_weights_are_counted_as_they_are_held(tmp_path):
    checkpoint = tiny.write(tiny.RECIPES["hub"], tmp_path)
    for form in plan.FORMS:
        model = weights.load(checkpoint.folder, dtype=torch.bfloat16, weights=form)
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert held == weights.weight_bytes(model.config, form, torch.bfloat16)


def test_the_12b_takes_what_is_published_of_it():
    with torch.device("meta"):
        model = Gemma(BIG).to(torch.bfloat16)
    assert weights.weight_bytes(BIG, None, torch.bfloat16) == sum(p.nbytes for p in model.parameters())
    assert weights.weight_bytes(BIG, "int4", torch.bfloat16) / 1e9 == pytest.approx(8.9, abs=0.3)


def test_rows_and_their_spares_fill_what_is_left():
    made = make(gpu(48, 100_000))
    row = Room(1, made.length, 280).bytes_per_row(BIG, torch.bfloat16)
    assert made.total <= 48 * GIB < made.total + 2 * row


def test_a_row_is_shorter_where_a_long_one_does_not_fit():
    needs = make(gpu(80), rows=1, length=2048).total / GIB
    made = make(gpu(needs + 0.01))
    assert (made.rows, made.length) == (1, 2048)


def test_no_more_rows_than_can_be_kept_up_with():
    made = make(gpu(400, 1000))
    assert 1 < made.rows < 64 and made.keeps_up
    more = make(gpu(400, 1000), rows=made.rows + 1)
    assert more.rows and not more.keeps_up


@pytest.mark.parametrize(
    ("gib", "form", "fits"), [(24, None, False), (24, "int8", True), (16, "int8", True), (12, "int8", False)]
)
def test_usual_gpus(gib, form, fits):
    assert bool(make(gpu(gib - 0.9), form).rows) is fits


def test_a_plan_that_does_not_fit_says_what_is_short():
    said = plan.line(make(gpu(16)))
    assert "does not fit" in said and "16.0 are free" in said
    assert "does not fit" in plan.line(make(gpu(48, 100_000), rows=64))


def test_what_to_take_is_the_most_exact_form_that_keeps_up():
    *_, advice = plan.table(BIG, gpu(23, 936))
    assert advice.startswith("take --weights int8 --rows ")
    *_, advice = plan.table(BIG, gpu(4))
    assert "none of these" in advice


def test_a_cpu_listens_in_chunks_and_is_bound_by_arithmetic():
    made = plan.make(BIG, plan.DESKTOP, "int4")
    slower = Machine("slower", "cpu", 56 * GIB, 80e9, {None: 10, "int8": 10, "int4": 10})
    assert made.keeps_up and made.one_ms > made.listen_ms
    assert not plan.make(BIG, slower, "int4").keeps_up


def test_this_machine_is_measured():
    made = plan.measure(torch.device("cpu"), 1)
    assert made.memory > 0 and 1e8 < made.bandwidth < 1e13 and set(made.position_ms) == set(plan.FORMS)


@pytest.mark.parametrize("arguments", [["--known"], ["--memory", "24", "--bandwidth", "936"], ["--model", "nano"]])
def test_the_command_prints_a_table(arguments, capsys):
    from agent.__main__ import main

    assert main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\nint8") == printed.count("\nint4") >= 1 and "take" in printed


def test_serve_takes_as_many_rows_as_are_planned(capsys):
    from agent.commands import options

    given = argparse.Namespace(model="nano", config_from=None, device="cpu", threads=1, weights=None, length=None)
    rows, length = options.planned(given)
    assert (rows, length) == (64, 8192) and f"{rows} × 8,192" in capsys.readouterr().out
    assert options.rows("auto") == 0 and options.rows("3") == 3


def test_weights_that_do_not_fit_are_refused_with_what_would(tmp_path, monkeypatch):
    checkpoint = tiny.write(tiny.RECIPES["hub"], tmp_path)
    config = weights.read_config(checkpoint.folder)
    needed = weights.weight_bytes(config, "int8", torch.float32)
    monkeypatch.setattr(weights, "free_memory", lambda device: needed)
    with pytest.raises(CheckpointError, match="--weights int8 would fit"):
        weights.load(checkpoint.folder)
    monkeypatch.setattr(weights, "free_memory", lambda device: 10)
    with pytest.raises(CheckpointError, match="attend plan says what would fit"):
        weights.load(checkpoint.folder)
