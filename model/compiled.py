"""One position of one row through a layer, compiled: what listening and answering alone is made of.

Each kind of layer is one graph, in which the weights are arguments, so that 48 layers take no longer to compile than two.
Where several rows step together, a chunk comes, or a ring's end lies inside the window, layers run uncompiled: they see a mask.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gemma import Block, Gemma, rms_norm, rotate


class NotCompiled(RuntimeError):
    """Steps run uncompiled; the message says why, and what to do about it."""


def step(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, out: Tensor, gate_up: Tensor, down: Tensor,
    input_norm: Tensor, post_attention_norm: Tensor, pre_mlp_norm: Tensor, post_mlp_norm: Tensor, scale: Tensor, eps: float,
    x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `Block` computes of one position x [1, 1, H], with the keys and values of the positions before it
    [1, heads, n, D]: its output, key and value. It reads a row and leaves the writing to others, or it would be copied."""
    kv, size = keys.shape[1], keys.shape[3]
    heads = out.shape[1] // size
    projected = F.linear(rms_norm(x, eps, input_norm), qkv).view(1, 1, -1, size)
    query = rotate(rms_norm(projected[:, :, :heads], eps, q_norm), cos, sin).view(1, kv, heads // kv, 1, size)
    key = rotate(rms_norm(projected[:, :, heads : heads + kv], eps, k_norm), cos, sin).view(1, kv, 1, size)
    value = rms_norm(projected[:, :, -kv:], eps).view(1, kv, 1, size)
    # Written out, as sums of products, for the compiler to make one loop of: a call of attention would need the new key
    # beside the old ones.
    before = (query * keys[:, :, None]).sum(-1)
    own = (query * key[:, :, None]).sum(-1)
    top = torch.maximum(before.amax(-1, keepdim=True), own)
    weight, own = (before - top).exp(), (own - top).exp()
    seen = (weight[..., None] * values[:, :, None]).sum(3) + own * value
    seen = (seen / (weight.sum(-1, keepdim=True) + own)).view(1, 1, -1)
    x = rms_norm(F.linear(seen, out), eps, post_attention_norm, onto=x)
    gate, up = F.linear(rms_norm(x, eps, pre_mlp_norm), gate_up).chunk(2, -1)
    x = rms_norm(F.linear(F.gelu(gate, approximate="tanh") * up, down), eps, post_mlp_norm, onto=x) * scale
    return x, key, value


def compile_steps(model: Gemma, tell: Callable[[], object] = lambda: None) -> None:
    """From here on `model` takes a step of one row compiled. `tell` is called before it takes long; the second time is shorter,
    since the compiler keeps its work in ~/.cache/attend. Raises NotCompiled, and then leaves the model as it is."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise NotCompiled("steps are compiled on a CPU in float32 alone")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NotCompiled(f"there is no {compiler} here; on Debian and Ubuntu: apt-get install g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise NotCompiled("Python's headers are missing; on Debian and Ubuntu: apt-get install python3-dev")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attend"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))  # torch's own lies under /tmp
    tell()
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    kinds = {block.attention.layer: block for block in reversed(blocks)}
    try:
        with torch.inference_mode():
            compiled = {layer: _compile(block) for layer, block in kinds.items()}
    except (RuntimeError, OSError) as failed:
        reason = (str(failed).strip() or type(failed).__name__).splitlines()[0]
        raise NotCompiled(f"the compiler failed: {reason}") from failed
    for block in blocks:
        block.step = partial(compiled[block.attention.layer], *_weights(block))


def _weights(block: Block) -> tuple[Any, ...]:
    a, m = block.attention, block.mlp
    norms = (block.input_norm, block.post_attention_norm, block.pre_mlp_norm, block.post_mlp_norm)
    tensors = (a.qkv, a.q_norm, a.k_norm, a.out, m.gate_up, m.down, *norms, block.scale)
    return (*(tensor.detach() for tensor in tensors), block.eps)


def _compile(block: Block) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Without torch's guards, 110 µs a call: what they would look at is the same for all layers of a kind, but for the number
    of positions and where they lie, which the graph is told to leave open (no 0 or 1 may be seen for them here)."""
    layer, hidden = block.attention.layer, block.input_norm.shape[0]
    past = [torch.zeros(3, layer.kv_heads, 37, layer.head_dim)[1:2].narrow(2, 3, 29) for _ in range(2)]
    for tensor in past:
        torch._dynamo.mark_dynamic(tensor, 2)
    turn = [torch.zeros(1, 1, 1, layer.head_dim) for _ in range(2)]
    example = (*_weights(block), torch.zeros(1, 1, hidden), *turn, *past)
    # One thread: these loops are short, and a second one costs more than it does.
    made: Any = torch.compile(step, fullgraph=True, dynamic=False, options={"cpp.threads": 1})
    made = made.aot_compile((example, {}))
    made.disable_guard_check()
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = made.fn
    return run
