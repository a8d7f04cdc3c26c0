"""What a GPU asks of the model, tested without one."""

import asyncio
import math
import threading

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agent import checkpoint, timing
from agent.__main__ import main
from agent.bench.shapes import SHAPES
from agent.engine import Engine, EngineStopped
from agent.segments import Picture
from model import weights
from model.cache import SLACK, Cache, Room, RowFull
from model.config import CheckpointError, GemmaConfig
from model.forward import ForwardPass
from model.functional import rms_norm
from model.gemma import Gemma
from model.weights import NANO, read_config
from tests import fake_cuda, tiny
from tests.talk import tiny as tiny_loaded
from tests.talk import words

LOADED = tiny_loaded()
TINY = GemmaConfig.from_json(tiny.Recipe().hub_json())


@pytest.mark.parametrize("config", [TINY, pytest.param(read_config(NANO), marks=pytest.mark.slow)], ids=["tiny", "nano"])
def test_a_pass_of_every_kind_runs_on_a_gpu(config):
    """Text, sound, a picture, a step of neighbours and of rows with a hole between them, past the window, and the logits."""
    with fake_cuda.fake_cuda():
        model = fake_cuda.gemma(config)
        cache = Cache(config, 4, 3 * config.window + 400, slack=40, device="cuda", dtype=model.dtype)
        rows = [cache.claim() for _ in range(4)]
        text = model.embed_text(torch.arange(9, device="cuda"))
        hidden = model.extend(cache, rows[:1], text[None], wanted=1)
        assert hidden.shape == (1, 1, config.hidden_size) and hidden.device.type == "cuda"
        logits = model.logits(hidden[0, -1])
        assert (logits.shape, logits.dtype) == ((config.vocab_size,), torch.float32)
        sound = model.embed_audio(torch.zeros(12, config.frame, device="cuda"))
        assert model.extend(cache, rows[:1], sound[None], wanted=0) is None
        places = torch.zeros(12, 2, dtype=torch.long, device="cuda")
        picture = model.embed_image(torch.zeros(12, 3 * config.patch**2, device="cuda"), places)
        model.extend(cache, rows[:1], picture[None], blocks=[[0] * 12], wanted=0)
        for _ in range(config.window // 41 + 2):
            model.extend(cache, rows[1:2], torch.cat([text, sound, sound])[None], wanted=0)
        for group in (rows, [rows[0], rows[3]], rows[1:2], rows[:1]):
            step = text[: len(group), None]
            assert model.extend(cache, group, step, wanted=1).shape == (len(group), 1, config.hidden_size)
        child = model.extend(cache, [rows[2]], text[None, :3])
        assert child.shape == (1, 3, config.hidden_size) and child.dtype == torch.bfloat16


def test_attention_may_come_back_in_any_layout(monkeypatch):
    """A CPU's kernel follows the query's; a GPU's memory-efficient one lays it out by positions."""
    model = tiny_model()
    x = torch.randn(1, 30, TINY.hidden_size, generator=torch.Generator().manual_seed(0))

    def fed() -> torch.Tensor:
        cache = Cache(TINY, 1, 60, slack=30)
        row = cache.claim()
        return torch.cat([model.extend(cache, [row], part) for part in x.split([22, 1, 7], 1)], 1)

    expected, attention, seen = fed(), F.scaled_dot_product_attention, []

    def by_positions(*given, **how):
        out = attention(*given, **how)
        seen.append(out.shape)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", by_positions)
    torch.testing.assert_close(fed(), expected)
    assert any(heads > 1 and positions > 1 for _, heads, positions, _ in seen)


def tiny_model() -> Gemma:
    torch.manual_seed(0)
    model = Gemma(TINY).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0, 1 / math.sqrt(p.shape[-1]))
    return model


def test_cudnn_makes_no_plan_for_every_length():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("weight", [(8,), (2, 8), None])
def test_a_norm_waits_for_no_value_off_the_cpu(weight):
    """`meta` has no values at all."""
    x = torch.empty(1, 1, 2, 8, device="meta") if weight != (8,) else torch.empty(1, 1, 8, device="meta")
    with torch.inference_mode():
        out = rms_norm(x, 1e-6, weight and torch.empty(weight, device="meta"))
    assert out.shape == x.shape and out.device.type == "meta"


# ---- the device, and what fits on it


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many CUDA devices."""

    def of(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return of


def test_a_small_model_stays_on_the_cpu_and_a_large_one_goes_to_the_gpu(gpus):
    nano, large = (weights.size(GemmaConfig.from_json(SHAPES[name]())) for name in ("nano", "12b"))
    gpus(1)
    assert weights.find_device("auto", nano).type == "cpu"
    assert weights.find_device("auto", large).type == "cuda"
    assert weights.find_device("cuda", nano).type == "cuda"
    gpus(0)
    assert weights.find_device("auto", large).type == "cpu"


def test_every_device_can_be_named_and_one_that_is_not_there_is_refused(gpus, monkeypatch):
    gpus(2)
    assert weights.find_device("cuda:1", 1) == torch.device("cuda", 1)
    for name, says in (("cuda:2", "2 cuda devices"), ("mps", "no mps devices"), ("tpu", "say auto"), ("cuda:x", "say auto")):
        with pytest.raises(CheckpointError, match=f"there is no device {name}.*{says}"):
            weights.find_device(name, 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert weights.find_device("mps", 1).type == "mps"


def test_a_device_of_a_command_is_refused_in_one_sentence(capsys):
    assert main(["ask", "--text", "hello", "--device", "cuda:7"]) == 2
    assert capsys.readouterr().err.startswith("attend: there is no device cuda:7 here, where torch finds ")


def test_matrices_are_transposed_for_a_cpu_in_float32_alone():
    for dtype, transposed in ((torch.float32, True), (torch.bfloat16, False)):
        model = weights.load(NANO, dtype=dtype)
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        assert {p.t().is_contiguous() for p in matrices} == {transposed}


REAL, BF16, GIB = GemmaConfig.from_json(SHAPES["12b"]()), torch.bfloat16, 2**30


def test_slack_is_as_much_as_fits_and_at_least_what_a_picture_needs():
    rows, weights_bytes = Room(80, 8192, 280), 2 * weights.size(REAL)  # 64 conversations and their spares
    for gigabytes, slack in ((140, SLACK), (80, 736), (70, 320)):
        assert rows.slack(REAL, BF16, gigabytes * GIB - weights_bytes) == slack
        assert weights_bytes + rows.rows * rows.bytes_per_row(REAL, BF16, slack) < gigabytes * GIB
    assert Room(2, 8192, 1120).slack(REAL, BF16, 0) == SLACK
    assert rows.slack(REAL, BF16, None) == SLACK


def test_rows_are_counted_before_weights_are_loaded(monkeypatch):
    room = Room(4, 8192, 280)
    config = read_config(NANO)
    needed = 4 * weights.size(config) + 4 * room.bytes_per_row(config, torch.float32)
    monkeypatch.setattr(weights, "free_memory", lambda device: needed)
    weights.load(NANO, room=room)
    monkeypatch.setattr(weights, "free_memory", lambda device: needed - 1)
    monkeypatch.setattr(Gemma, "to_empty", lambda *_, **__: pytest.fail("took memory"))
    says = r"the model needs \d+\.\d GiB and 4 rows of 8,192 positions \d+\.\d, \d+\.\d free on cpu"
    with pytest.raises(CheckpointError, match=says):
        weights.load(NANO, room=room)
    with pytest.raises(CheckpointError, match=says):
        checkpoint.load("nano", rows=4, budget=280)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")])
def test_rows_that_do_not_fit_are_refused_in_a_sentence(monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(CheckpointError, match="8 rows of 600 positions do not fit on cpu; ask for fewer"):
        Engine(LOADED, rows=6, length=600, spares=2)


async def test_a_picture_beyond_what_rows_take_ends_its_conversation_alone(monkeypatch):
    monkeypatch.setattr(weights, "free_memory", lambda device: 0)
    errors: list[Exception] = []
    square = cv2.imencode(".png", np.zeros((60, 60, 3), np.uint8))[1].tobytes()
    large = Picture.of(square, 60, 60, 280, LOADED.model.config.patch)
    with Engine(LOADED, rows=2, length=600, budget=70) as running:
        ill, well = running.claim(errors.append), running.claim(errors.append)
        ill.append(large)
        with pytest.raises(RowFull, match=r"\d+ positions at once, as of a large picture"):
            await ill.drained()
        well.append(words(20))
        await well.drained()
        assert len(errors) == 1


# ---- faults, and times


async def test_a_device_that_fails_ends_the_engine_with_one_sentence(monkeypatch, capfd):
    """It is not tried again, row by row: every later call would fail."""
    tried: list[int] = []

    def fails(self, chunks, x):
        tried.append(len(chunks))
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(ForwardPass, "__call__", fails)
    says = "the device cpu has failed: CUDA error: an illegal memory access was encountered; attend ends, so that"
    with Engine(LOADED, rows=2, length=600) as running:
        feeds = [running.claim(lambda error: None) for _ in range(2)]
        hold = threading.Event()
        running.call(lambda: hold.wait(30))
        for feed in feeds:
            feed.append(words(1))
        waiting = [asyncio.create_task(feed.drained()) for feed in feeds]
        await asyncio.sleep(0)
        hold.set()
        for ended in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(ended, EngineStopped) and str(ended).startswith(says)
        assert str(await running.stopped()).startswith(says)
    assert tried == [2]
    assert capfd.readouterr().err == ""


def test_a_server_whose_device_fails_ends(monkeypatch, capsys):
    def fails(self):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Engine, "_tick", fails)
    assert main(["serve", "--port", "0", "--voice", "none"]) == 2
    said = capsys.readouterr().err
    assert "attend: the device cpu has failed: CUDA error: unspecified launch failure; attend ends" in said
    assert "Traceback" not in said


class Gpu:
    """A device whose events are passed when a test says so; times in seconds."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.events = clock, list[Gpu.Event]()

    class Event:
        def __init__(self, gpu: "Gpu") -> None:
            self.gpu, self.at = gpu, None

        def record(self) -> None:
            self.gpu.events.append(self)

        def query(self) -> bool:
            return self.at is not None

        def synchronize(self) -> None:
            self.at = self.at if self.at is not None else self.gpu.clock[0]

        def elapsed_time(self, other: "Gpu.Event") -> float:
            return 1000 * (other.at - self.at)

    def past(self, count: int, at: float) -> None:
        """It has passed so many more events, at that time of its own clock."""
        for event in [event for event in self.events if event.at is None][:count]:
            event.at = at


def test_times_end_when_the_gpu_is_done_not_when_it_was_asked(monkeypatch):
    clock, reported = [100.0], list[float]()
    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])
    gpu = Gpu(clock)
    timed = timing.Timing(torch.device("cuda"), lambda: Gpu.Event(gpu))
    assert timed.begin() == 100
    gpu.past(1, at=7.0)  # its clock is another one
    timed.mark(reported.append)
    timed.mark(reported.append)
    timed.poll()
    assert reported == []
    clock[0] = 100.5
    gpu.past(1, at=7.03)
    timed.poll()
    assert reported == pytest.approx([100.03])
    assert timed.begin() == 100.5  # no new reference: the second mark is still pending
    gpu.past(1, at=7.05)
    clock[0] = 101.0
    timed.poll()
    assert reported == pytest.approx([100.03, 100.05])


def test_marks_of_a_gpu_that_is_behind_are_bounded(monkeypatch):
    clock, reported = [0.0], list[float]()
    gpu = Gpu(clock)
    monkeypatch.setattr(timing, "PENDING", 3)
    timed = timing.Timing(torch.device("cuda"), lambda: Gpu.Event(gpu))
    timed.begin()
    gpu.past(1, at=0.0)
    for _ in range(5):
        timed.mark(reported.append)
    assert len(reported) == 2


def test_on_a_cpu_a_mark_is_reported_at_once(monkeypatch):
    clock, reported = iter([3.0, 5.0]), list[float]()
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    timed = timing.Timing(torch.device("cpu"))
    assert timed.begin() == 3
    timed.mark(reported.append)
    assert reported == [5]
