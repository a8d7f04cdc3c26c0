"""A CUDA device that computes nothing: every tensor has its shape, type, strides and device, as on a real one.

What mixes devices or types, what waits for a value (`.item()`), and what views a tensor that cannot be viewed raises here as
it does there. For machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from model.config import GemmaConfig
from model.functional import frequencies
from model.gemma import Gemma

aten = torch.ops.aten


@contextmanager
def fake_cuda() -> Iterator[None]:
    frequencies.cache_clear()
    try:
        with FakeTensorMode(), _Functions(), torch.inference_mode():
            yield
    finally:
        frequencies.cache_clear()  # they are fake


def gemma(config: GemmaConfig, dtype: torch.dtype = torch.bfloat16) -> Gemma:
    """On the fake device, as loaded. To be called within `fake_cuda`."""
    with torch.device("meta"):
        model = Gemma(config)
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None:
                fake = torch.empty(p.shape, device="cuda", dtype=dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    return model


class _Functions(TorchFunctionMode):
    """Indexing and `torch.tensor` want a driver even for fake tensors; attention takes the memory-efficient kernel, as on most
    GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _index(*args)
        if func is Tensor.__setitem__:
            return _assign(*args)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.copy_:
            return _copy(*args, **(kwargs or {}))
        if func is Tensor.to:  # which asks the driver for the number of the device
            args = [torch.device("cuda", 0) if part == torch.device("cuda") else part for part in args]
            if args[1] == torch.device("cuda", 0) and args[0].numel() == 1:  # a constant, which would be moved in earnest
                return torch.empty(args[0].shape, dtype=args[0].dtype, device="cuda")
        if func is torch.tensor and (device := (kwargs or {}).pop("device", None)):
            return aten._to_copy(func(*args, **kwargs), device=device)
        return func(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float) -> Tensor:
    shape = (*query.shape[:2], query.shape[2], key.shape[2])
    bias = None if attn_mask is None else attn_mask.expand(shape)
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, False, scale=scale)[0]


def _split(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What slices, numbers and None make of x, and the tensors that are still to index it, by dimension."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is ... for part in parts):
        at = next(i for i, part in enumerate(parts) if part is ...)
        used = sum(part is not None and part is not ... for part in parts)
        parts[at : at + 1] = [slice(None)] * (x.dim() - used)
    dim, tensors = 0, list[Tensor | None]()
    for part in parts:
        if part is None:
            x, part = aten.unsqueeze(x, dim), slice(None)
        if isinstance(part, int):
            x = aten.select(x, dim, part)
            continue
        if isinstance(part, slice):
            x = aten.slice(x, dim, part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, Tensor) else None)
        dim += 1
    return x, tensors


def _index(x: Tensor, index: Any) -> Tensor:
    x, tensors = _split(x, index)
    return aten.index(x, tensors) if any(tensor is not None for tensor in tensors) else x


def _assign(x: Tensor, index: Any, value: Any) -> None:
    x, tensors = _split(x, index)
    value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=x.dtype, device=x.device)
    if any(tensor is not None for tensor in tensors):
        aten.index_put_(x, tensors, value)
    else:
        _copy(x, value)


def _copy(x: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
    aten.copy(x, value, non_blocking)  # not in place, which asks the driver: nothing lies there
    return x
