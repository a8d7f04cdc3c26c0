"""How many threads a pass takes, and that nothing else takes every core."""

import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from threadpoolctl import threadpool_info

from agent import checkpoint, pools
from agent.bench.shapes import SHAPES
from model import forward, threads
from model.cache import Cache, RowFull
from model.config import GemmaConfig
from model.gemma import Gemma
from model.threads import Threads


@pytest.fixture
def machine(monkeypatch):
    """16 cores, nothing said by whoever started the process."""

    def of(cores: int, said: str | None = None) -> None:
        monkeypatch.setattr(threads, "cores", lambda: cores)
        monkeypatch.setattr(threads, "USUAL", int(said or cores))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if said:
            monkeypatch.setenv("OMP_NUM_THREADS", said)

    of(16)
    return of


def of_shape(name: str) -> Gemma:
    with torch.device("meta"):
        return Gemma(GemmaConfig.from_json(SHAPES[name]()))


def test_threads_follow_the_work_of_a_pass(machine):
    nano, mid, large = (of_shape(name) for name in ("nano", "mid", "12b"))
    picture = nano.vision.dense.weight.numel()
    assert [nano.threads.count(nano.product, positions) for positions in (1, 8, 128)] == [1, 1, 1]
    assert nano.threads.count(picture, 280) == 15
    assert [mid.threads.count(mid.product, positions) for positions in (1, 128)] == [3, 15]
    assert large.threads.count(large.product, 1) == 15


def test_one_core_is_left_free_unless_somebody_says_otherwise(machine):
    work = (10**9, 128)
    for cores, most in ((1, 1), (2, 1), (3, 2), (64, 63)):
        machine(cores)
        assert Threads().count(*work) == most
    machine(8, said="8")
    assert Threads().count(*work) == Threads().count(1, 1) == 8
    assert Threads(3).count(*work) == Threads(3).count(1, 1) == 3


def test_a_containers_quota_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    assert threads.cores() == 8
    for text, cores in (("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1), ("1600000 100000\n", 8)):
        (tmp_path / "cpu.max").write_text(text)
        assert threads.cores() == cores


def test_a_pass_sets_its_threads_and_gives_them_back(monkeypatch):
    loaded = checkpoint.load("nano", threads=3)
    model, seen = loaded.model, []
    cache = Cache(model.config, 1, 64, slack=16)
    row, x = cache.claim(), torch.zeros(1, 4, model.config.hidden_size)
    model.vision.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    linear = forward.linear
    monkeypatch.setattr(forward, "linear", lambda *given: seen.append(torch.get_num_threads()) or linear(*given))
    before = torch.get_num_threads()
    assert before != 3
    with torch.inference_mode():
        model.extend(cache, [row], x, wanted=0)
        model.embed_image(torch.zeros(1, 3 * model.config.patch**2), torch.zeros(1, 2, dtype=torch.long))
    assert set(seen) == {3} and len(seen) > len(model.blocks)
    assert torch.get_num_threads() == before
    with pytest.raises(RowFull):
        model.extend(cache, [row], torch.zeros(1, 99, model.config.hidden_size))
    assert torch.get_num_threads() == before
    model.embed_image(torch.zeros(1, 3 * model.config.patch**2), torch.zeros(1, 2, dtype=torch.long))  # as in training
    assert seen[-1] == before


@pytest.mark.slow
def test_the_libraries_of_a_command_take_one_thread_each():
    code = (
        "import cv2, numpy, torch\n"
        "from agent import pools\n"
        "cv2.setNumThreads(4)\n"
        "pools.limit()\n"
        "from threadpoolctl import threadpool_info\n"
        "blas = {pool['num_threads'] for pool in threadpool_info() if pool['user_api'] == 'blas'}\n"
        "print(torch.get_num_threads(), cv2.getNumThreads(), *blas)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1", "1"]


def test_these_tests_run_as_the_commands_do():
    pools.limit()
    assert torch.get_num_threads() == cv2.getNumThreads() == 1
    assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
