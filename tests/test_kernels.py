"""The Triton kernels without a GPU: run by the interpreter, and compiled for every generation of devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model import forward, kernels, reference
from model.batch import RowChunk
from model.cache import Cache
from model.config import GemmaConfig
from model.gemma import Gemma
from tests import tiny

GENERATIONS = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB of shared memory by compute capability
NUMBERS = {"rows", "slots", "first", "last", "tile_starts", "tile_counts"}


def test_the_kernels_equal_their_references_under_the_interpreter():
    """In a process of its own: the interpreter is chosen before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:]


def compiled(kernel, capability, dtype, warps, stages, **constants):
    """Shared memory in KiB, registers of a thread, and bytes of it that are spilled."""

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in NUMBERS:
            return "*i32"
        if name in ("parts", "best") or (name == "total" and kernel is not kernels._add_norm):
            return "*fp32"
        return {"eps": "fp32", "row_stride": "i32", "head_stride": "i32", "ring": "i32"}.get(name, f"*{dtype}")

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type) in enumerate(signature.items())
        if type.startswith("*") or name.endswith("stride")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


def resources(binary, folder):
    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said.stdout)
    assert found, said.stdout
    registers, stack, local = map(int, found.groups())
    return binary.metadata.shared / 1024, registers, stack + local


REAL = GemmaConfig.from_json(tiny.REAL)
ATTENTION = {
    "12B sliding": {"HEADS": 16, "GROUP": 2, "SIZE": 256, "D": 256, "M": 16, "N": 32, "SPLITS": 32},
    "12B full": {"HEADS": 16, "GROUP": 16, "SIZE": 512, "D": 512, "M": 16, "N": 32, "SPLITS": 64},
    "nano full": {"HEADS": 4, "GROUP": 4, "SIZE": 128, "D": 128, "M": 16, "N": 64, "SPLITS": 64},
}


@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_fits_every_generation_and_spills_next_to_nothing(capability, shape, tmp_path):
    warps, stages = kernels.WARPS, kernels.STAGES
    binary = compiled(kernels._attend, capability, "bf16", warps, stages, **ATTENTION[shape])
    shared, registers, spilled = resources(binary, tmp_path)
    assert shared < GENERATIONS[capability] - 1  # one block on a multiprocessor, of which the system takes 1 KiB
    assert registers <= 128 and spilled <= 16  # bytes: ptxas 13 keeps four numbers outside where it aims at 128 registers


@pytest.mark.parametrize("capability", GENERATIONS)
def test_the_other_kernels_compile_for_every_generation_without_spills(capability, tmp_path):
    for kernel, warps, constants in (
        (kernels._combine, 4, {"SIZE": 512, "D": 512, "SPLITS": 64, "SOME": 8}),
        (kernels._norm_rope_write, 4, {"HEADS": 16, "KV": 8, "SHARED": False, "SIZE": 256, "BLOCK": 128}),
        (kernels._norm_rope_write, 4, {"HEADS": 16, "KV": 1, "SHARED": True, "SIZE": 512, "BLOCK": 256}),
        (kernels._add_norm, 8, {"SCALED": True, "SIZE": 3840, "BLOCK": 4096}),
        (kernels._gelu_up, 4, {"SIZE": 15360, "BLOCK": 1024}),
    ):
        shared, registers, spilled = resources(compiled(kernel, capability, "bf16", warps, 3, **constants), tmp_path)
        assert shared <= 48 and registers <= 128 and spilled == 0, kernel


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(dtype):
    """Two kinds of layers in the 12B's head sizes; one cache for the kernels, a second for their references."""
    recipe = tiny.Recipe(layers="ssf", hidden=256, heads=16, kv=8, full_kv=1, head_dim=256, full_head_dim=512, window=40)
    torch.manual_seed(0)
    model = Gemma(GemmaConfig.from_json(recipe.hub_json())).to("cuda", dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p.shape[-1] ** -0.5)
        elif name.endswith("q_norm"):
            p.fill_(p.numel() ** -0.5)
    caches = [Cache(model.config, 4, 300, slack=60, device="cuda", dtype=dtype) for _ in range(2)]
    return [forward.ForwardPass(model, cache, op) for cache, op in zip(caches, (kernels, reference), strict=True)]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 6e-2)])
def test_passes_on_a_gpu_equal_their_references(graphs, dtype, tolerance):
    """Steps, chunks and pictures together, several times round the rings."""
    torch.backends.cuda.matmul.allow_tf32 = False
    ours, theirs = on_gpu(dtype)
    if graphs:
        ours.capture((1, 4, 16, 64))
    rows = [[forward.cache.claim() for _ in range(4)] for forward in (ours, theirs)]
    for counts in [(1, 20, 7, 1), (60, 0, 0, 3), (1, 1, 1, 1), (0, 0, 30, 1), (5, 0, 0, 0)] * 4:
        x = torch.randn(sum(counts), 256, device="cuda").to(dtype)
        pair = []
        for pass_, places in zip((ours, theirs), rows, strict=True):
            chunks = [
                RowChunk(row, n, ((2, n - 1),) if n > 4 else (), min(n, 2)) for row, n in zip(places, counts, strict=True) if n
            ]
            pair.append(pass_(chunks, x).float())
        assert (pair[0] - pair[1]).norm() <= tolerance * pair[1].norm()
