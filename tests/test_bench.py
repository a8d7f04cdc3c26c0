import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from agent import checkpoint
from agent.bench import alone, contention, gpu, machine, reference
from agent.bench.alone import Effort
from agent.bench.figures import Figure, line
from agent.bench.shapes import SHAPES
from model import threads
from model.config import CheckpointError, GemmaConfig
from model.gemma import Gemma

ONCE = Effort(seconds=0, min_rounds=1, max_rounds=1)
ALONE = {
    *(f"{what}_{count}" for what in ("append", "real_time") for count in (1, 4, 16)),
    *("step", "read", "step_over_read", "flat", "fork", "truncate", "weights", "row", "peak", "busy", "busy_over_alone"),
    *(f"{what}_{seconds}" for what in ("first_token", "whole") for seconds in (2, 10, 30)),
    *("rows_1", "rows_4", "rows_4_over_1", "rows_16", "rows_16_over_1"),
}
BESIDE = {key for key in ALONE if key.startswith(("append", "real_time", "first_token", "whole"))} | {"step"}


@pytest.mark.slow
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
    monkeypatch.setattr(reference, "transformers", lambda say: None)
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
        model = Gemma(GemmaConfig.from_json(SHAPES["12b"]()))
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


def test_passes_are_measured_beside_busy_processes_by_threads() -> None:
    said: list[str] = []
    result = contention.table(checkpoint.load("nano").model, said.append, seconds=0, company=("alone", "one at nice 19"))
    assert result.keys() == {"alone", "one at nice 19"}
    for found in result.values():
        assert found.keys() == {"chosen", str(threads.cores())}
        for passes in found.values():
            assert passes.keys() == {"step of one row", "of eight", "chunk of 128", "picture embedded"}
            assert all(0 < times["median"] <= times["p99"] for times in passes.values())
    assert sum(text.startswith("one at nice 19") for text in said) == 2


def test_how_busy_the_machine_was_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat, clock = tmp_path / "stat", iter([100.0, 110.0])
    monkeypatch.setattr(machine, "STAT", stat)
    monkeypatch.setattr(machine, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "process_time", iter([5.0, 8.0]).__next__)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    stat.write_text("cpu 100 0 0 9 9 0 0 50 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    meter = machine.Meter()
    stat.write_text("cpu 700 100 100 9 9 50 50 150 0 0\n")  # nine seconds of work, one taken by the host
    load = meter.read()
    assert load and (load.others, load.steal) == (pytest.approx(0.6), pytest.approx(0.05))
    assert str(load) == "other processes kept 0.60 of 2 cores busy, the host took 5 %"


def test_a_system_that_does_not_tell_its_load_is_not_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    assert machine.Meter().read() is None


def test_a_busy_process_computes_and_ends_with_the_measurement() -> None:
    with machine.busy(0, 19):
        running = _busy_processes()
        assert sorted(nice for _, nice in running) == [0, 19]
    assert not _busy_processes()


def _busy_processes() -> list[tuple[int, int]]:
    """Process and niceness of each child that runs machine.BUSY."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    ours = [child for child in children if b"parent = os.getppid()" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return [(child, os.getpriority(os.PRIO_PROCESS, child)) for child in ours]


def test_transformers_can_be_had_beside_a_torchvision_that_was_built_for_another_torch() -> None:
    """In a process of its own, as the command's: this one imported both long ago."""
    code = "from agent.bench import reference; print(reference.transformers(print).__version__)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == version("transformers")


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_runs_in_little_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "agent.bench.gpu", "--dry-run", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout
    found = json.loads(out.read_text())
    assert found["floors"]["read_gb_s"] > 0 and found["agreement"]["captured_bfloat16"] < 1e-2
    assert {"step_2x60_ms", "closing_after_30_s_ms", "picture_beside_steps_ms", "peak_gib"} <= found["passes"].keys()
    assert found["listening"]["lag_2_ms"]["count"] > 0 and found["small_weights"]["int4_step_8_ms"] > 0
    assert not any("error" in stage for stage in found.values() if isinstance(stage, dict))


def test_a_stage_that_fails_is_told_in_the_file_and_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STAGES", {"floors": (gpu.floors, 60), "nonsense": (gpu.floors, 60)})
    out = tmp_path / "gpu.json"
    assert not gpu.run_all(out, dry=True)
    found = json.loads(out.read_text())
    assert found["floors"]["copy_gb_s"] > 0 and "invalid choice" in found["nonsense"]["error"]
