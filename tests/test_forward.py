"""Passes on a made-up CUDA device: which operations would run there, and what waits for it."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from model import forward, kernels, reference
from model.batch import Chunk
from model.cache import Cache
from model.functional import frequencies
from model.gemma import Config, Gemma
from model.sampling import Generation, _suppressed, sample
from tests import tiny

RECIPE = tiny.Recipe(layers="ssfsf", hidden=32, kv=2, full_kv=1, head_dim=8, full_head_dim=16, window=6)
HOW = Generation(frozenset({1}), (4, 7))


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


class Indexing(TorchFunctionMode):
    """A torch without CUDA asks for its driver as it indexes and copies in place: the same by operations that do not."""

    def __init__(self, watched):
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func, types, args=(), kwargs=None):
        on_device = args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda"
        match func.__name__ if on_device else "":
            case "__getitem__":
                return indexed(*args)
            case "__setitem__":
                return self.copy(indexed(*args[:2]), args[2])
            case "copy_":
                return self.copy(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def copy(self, target, source, non_blocking=False):
        assert target.shape == source.shape
        self.watched.moved(source, target, non_blocking)
        return target


def indexed(x, index):
    index, axis = index if isinstance(index, tuple) else (index,), 0
    if any(isinstance(part, torch.Tensor) for part in index):
        rows, column = index  # the table of places in a picture
        return torch.nn.functional.embedding(rows, x.select(1, column))
    for part in index:
        if part is Ellipsis:
            axis = x.dim() - sum(later is not None for later in index[1:])
        elif part is None:
            x = x.unsqueeze(axis)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice(x, axis, part.start, part.stop)
        else:
            x = x.select(axis, part)
            continue
        axis += part is not Ellipsis
    return x


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
    frequencies.cache_clear()
    _suppressed.cache_clear()


def made_up(dtype):
    with torch.device("meta"):
        model = Gemma(Config.from_json(RECIPE.hub_json()))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device="cuda:0", dtype=dtype), requires_grad=False))
    return model


def spoken(model, cache, forward_pass, rows, watched):
    """A pass over a step, a chunk with sound and text, and a picture among text; two rows speak."""
    frames, ids = np.zeros((4, tiny.FRAME), np.float32), np.arange(5)
    patches, places = torch.zeros(6, 3 * tiny.SIDE**2), torch.zeros(6, 2, dtype=torch.long)
    chunks = [
        Chunk(rows[2], 1, wanted=1),
        Chunk(rows[0], 9),
        Chunk(rows[3], 11, ((5, 11),), wanted=1),
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
    with FakeTensorMode(), Indexing(watched), torch.inference_mode():
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", tuple)
        monkeypatch.setattr(forward, "record", lambda run, pool: (run, run()))
        model = made_up(dtype)
        cache = Cache(model.config, 4, 64, slack=20, device="cuda:0", dtype=dtype)
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
