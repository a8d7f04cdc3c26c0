"""Passes on a made-up CUDA device: which operations would run there, and what waits for it."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import forward, kernels, reference
from model.batch import RowChunk
from model.cache import Cache
from model.config import GemmaConfig
from model.sampling import SamplingParams, _suppressed, sample
from tests import fake_cuda, tiny

RECIPE = tiny.Recipe(layers="ssfsf", hidden=32, kv=2, full_kv=1, head_dim=8, full_head_dim=16, window=6)
HOW = SamplingParams(frozenset({1}), (4, 7))


class Watched(TorchDispatchMode):
    """Counts what waits for the device: copies from it, copies to it of memory that is not pinned, and shapes that depend on
    what lies there."""

    def __init__(self):
        super().__init__()
        self.downloads, self.waits, self.pinned = 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "to"):
            self.moved(args[0], out, (kwargs or {}).get("non_blocking", False))
        elif name == "copy":
            self.moved(args[1], args[0], args[2:] == (True,))
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "equal"):
            self.waits.append(name)
        return out

    def moved(self, source, target, quick):
        if source.device.type == "cuda" and target.device.type == "cpu":
            self.downloads += 1
        elif (
            source.device.type == "cpu"
            and target.device.type == "cuda"
            and not (quick and any(source is tensor for tensor in self.pinned))
        ):
            self.waits.append("a copy to the device")


class Launches:
    """In a kernel's place: every tensor that it is given lies on the device."""

    def __getitem__(self, grid):
        assert all(isinstance(n, int) and n >= 1 for n in grid)
        return lambda *given, **_: [t for t in given if isinstance(t, torch.Tensor) and t.device.type != "cuda"] and pytest.fail()


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda device: 132)
    for name in ("_attend", "_combine", "_norm_rope_write", "_add_norm", "_gelu_up"):
        monkeypatch.setattr(kernels, name, Launches())
    mode = Watched()

    def pin(tensor):
        mode.pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    yield mode
    _suppressed.cache_clear()


def spoken(model, cache, forward_pass, rows, watched):
    """A pass over a step, a chunk with sound and text, and a picture among text; two rows speak."""
    frames, ids = np.zeros((4, tiny.FRAME), np.float32), np.arange(5)
    patches, places = torch.zeros(6, 3 * tiny.SIDE**2), torch.zeros(6, 2, dtype=torch.long)
    chunks = [
        RowChunk(rows[2], 1, wanted=1),
        RowChunk(rows[0], 9),
        RowChunk(rows[3], 11, ((5, 11),), wanted=1),
    ]
    x = model.embed([ids[:1], ids, frames, ids, (patches, places)])
    assert x.device.type == "cuda" and x.shape == (21, RECIPE.hidden)
    hidden = forward_pass(chunks, x)
    return sample(model.logits(hidden), [HOW, HOW], [0.1, 0.9])


@pytest.mark.parametrize(
    ("operations", "captured"), [(reference, False), (kernels, False), (kernels, True)], ids=["reference", "kernels", "captured"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_on_a_cuda_device_waits_for_it_once(operations, captured, dtype, watched, monkeypatch):
    with fake_cuda.fake_cuda():
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", tuple)
        monkeypatch.setattr(forward, "record", lambda run, pool: (run, run()))
        model = fake_cuda.gemma(GemmaConfig.from_json(RECIPE.hub_json()), dtype)
        cache = Cache(model.config, 4, 64, slack=20, device="cuda", dtype=dtype)
        forward_pass = forward.ForwardPass(model, cache, operations)
        if captured:
            forward_pass.capture((1, 8, 32))
        rows = [cache.claim() for _ in range(4)]
        spoken(model, cache, forward_pass, rows, watched)  # what is made once may wait
        watched.waits.clear()
        with watched:
            drawn = spoken(model, cache, forward_pass, rows, watched)
            assert watched.waits == [] and watched.downloads == 0
            assert drawn.to("cpu").shape == (2, 2)
    assert watched.downloads == 1
    assert [row.length for row in rows] == [18, 0, 2, 22]
