import pytest
import torch

from agent.bench import alone
from agent.bench.alone import Effort
from agent.bench.figures import Figure, line
from agent.bench.shapes import SHAPES
from model.gemma import CheckpointError, Config, Gemma

ONCE = Effort(seconds=0, least=1, most=1)
ALONE = {
    *(f"{what}_{count}" for what in ("append", "real_time") for count in (1, 4, 16)),
    *("step", "read", "step_over_read", "flat", "fork", "truncate", "weights", "row", "peak"),
    *(f"{what}_{seconds}" for what in ("first_token", "whole") for seconds in (2, 10, 30)),
    *("rows_1", "rows_4", "rows_4_over_1", "rows_16", "rows_16_over_1"),
}
BESIDE = {key for key in ALONE if key.startswith(("append", "real_time", "first_token", "whole"))} | {"step"}


def test_nano_is_measured_beside_transformers_which_computes_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    said: list[str] = []
    result = alone.model(["nano"], "cpu", said.append, ONCE)
    nano = result["shapes"]["nano"]
    assert result["transformers"] == transformers.__version__
    assert nano["logits_differ_by"] < 1e-2
    assert nano["figures"].keys() == ALONE
    for key, figure in nano["figures"].items():
        assert figure["attend"] > 0, key
        assert (figure["transformers"] or 0) > 0 if key in BESIDE else figure["transformers"] is None, key
    for key in BESIDE - {"real_time_1", "real_time_4", "real_time_16"}:
        figure = nano["figures"][key]
        faster = figure["attend"] / figure["transformers"]
        assert figure["ratio"] == pytest.approx(faster if figure["unit"] == "/s" else 1 / faster), key
        assert any(text == line(Figure(**figure)) for text in said), key
    assert nano["figures"]["real_time_4"]["attend"] == pytest.approx(nano["figures"]["append_4"]["attend"] / 25)
    assert nano["figures"]["weights"]["attend"] == pytest.approx(nano["parameters"] * 4 / 2**20)


def test_without_transformers_there_is_one_column_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "_library", lambda say: None)
    said: list[str] = []
    result = alone.model(["nano"], "cpu", said.append, ONCE)
    figures = result["shapes"]["nano"]["figures"]
    assert "transformers is not installed here: attend's column alone" in said
    assert result["transformers"] is None and figures.keys() == ALONE
    assert all(figure["transformers"] is None and figure["ratio"] is None for figure in figures.values())


def test_a_line_shows_three_figures_and_leaves_out_what_was_not_measured() -> None:
    assert line(Figure("k", "decode step", "ms", 3.6123, 10.04, 2.779)).split()[2:] == ["3.61", "ms", "10.0", "ms", "2.78×"]
    assert line(Figure("k", "weights", "MiB", 22_811.6, note="n")).split() == ["weights", "22,812", "MiB", "n"]


def test_the_real_shape_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Gemma(Config.from_json(SHAPES["12b"]()))
    assert sum(p.numel() for p in model.parameters()) == 11_959_730_224


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no device tpu"):
        alone.model(["nano"], "tpu", print, ONCE)
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match="no device cuda"):
            alone.model(["nano"], "cuda", print, ONCE)


def test_a_shape_that_does_not_fit_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.weights.free_memory", lambda device: 2**30)
    with pytest.raises(CheckpointError, match=r"measuring 12b needs \d+\.\d GiB, 1\.0 free on cpu"):
        alone.model(["12b"], "cpu", print, ONCE)
