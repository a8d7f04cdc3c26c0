"""Weights of a linear layer in eight or four bits: how they are rounded, held in memory and multiplied.

    int8    w = q * scale                 one scale for each output
    int4    w = (q - 8) * scale + zero    a scale and a zero for each group of 32 inputs

int4 is exactly the form of compressed-tensors' W4A16 (zero 0) and of GGUF's Q4_0. It is that of Q4_1 and Q4_K too, but their
scales are rounded to bfloat16. Products are computed in bfloat16 and returned in the type of the input: on a CPU torch's int4
product takes 25 times as long with float32 activations, its int8 product 12 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["int8", "int4"]
GROUP = 32  # inputs that share a scale and a zero in int4
ROWS = 64  # of x in one int4 product on CUDA: torch's kernel is made for few, so more are split into several products


@dataclass(frozen=True)
class Quantized:
    """A matrix [out, in] in one of the forms: `codes` uint8 in 0..15 (int4) or int8 [out, in]; `scale` bfloat16 [out, in / 32],
    or [out, 1] for int8; `zero` like `scale`, 0 for int8."""

    form: Form
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self) -> Tensor:
        """The values float32 [out, in] that products compute with."""
        groups = self.codes.float().unflatten(1, (self.scale.shape[1], -1))
        centre = 8 if self.form == "int4" else 0
        values: Tensor = (groups - centre) * self.scale.float()[..., None] + self.zero.float()[..., None]
        return values.flatten(1)


def suits(outputs: int, inputs: int, form: Form) -> bool:
    """Whether torch's kernels support a matrix of this shape in a form; int8 supports all."""
    return form == "int8" or (outputs % 16 == 0 and inputs % GROUP == 0)


def quantize(weight: Tensor, form: Form) -> Quantized:
    """Rounds a matrix [out, in] to the nearest values of a form.

    int4 tries two grids for each group and takes the better one: a grid around 0 that ends at the largest value, as in GGUF's
    Q4_0, which restores weights that were trained for it, and a grid from the smallest to the largest value."""
    weight = weight.float()
    if form == "int8":
        scale = _bfloat16(weight.abs().amax(1, keepdim=True) / 127)
        codes = (weight / _divisor(scale)).round().clamp(-127, 127).to(torch.int8)
        return Quantized(form, codes, scale, torch.zeros_like(scale))
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2), groups.amax(2)
    largest = torch.where(high.abs() > low.abs(), high, low)
    signed = _bfloat16(largest / -8), torch.zeros_like(largest, dtype=torch.bfloat16)
    spread = _bfloat16((high - low) / 15)
    ranged = spread, _bfloat16(low + 8 * spread.float())
    (codes, error), (other, its_error) = _round(groups, *signed), _round(groups, *ranged)
    better = its_error < error
    scale, zero = (torch.where(better, its, own) for own, its in zip(signed, ranged, strict=True))
    return Quantized(form, torch.where(better[..., None], other, codes).flatten(1), scale, zero)


def _round(groups: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, groups, 32] and the squared error of each group."""
    width, base = _divisor(scale)[..., None], zero.float()[..., None]
    codes = ((groups - base) / width + 8).round().clamp(0, 15)
    error = ((codes - 8) * scale.float()[..., None] + base - groups).square().sum(2)
    return codes.to(torch.uint8), error


def _bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def _divisor(scale: Tensor) -> Tensor:
    """The scale in float32, with 1 in place of 0: all values of such a group are 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale).float()


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Concatenates the outputs of matrices of one form that have the same inputs."""
    assert len({part.form for part in parts}) == 1
    codes, scale, zero = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero"))
    return Quantized(parts[0].form, codes, scale, zero)


def nbytes(outputs: int, inputs: int, form: Form) -> int:
    """Memory of such a matrix in bytes."""
    return outputs * inputs + 2 * outputs if form == "int8" else outputs * inputs // 2 + outputs * (inputs // GROUP) * 4


class QuantizedLinear(nn.Module):
    """x [..., in] -> x W^T [..., out] with a matrix in one of the forms, laid out for the kernels of its device. It cannot
    be moved to another device."""

    codes: Tensor
    scale: Tensor  # int8: [out]; int4: scales and zeros [in / 32, out, 2]

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        super().__init__()
        self.form, self.outputs = weight.form, len(weight.codes)
        codes, scale, zero = weight.codes.to(device), weight.scale.to(device), weight.zero.to(device)
        if self.form == "int8":
            self._fused = device.type != "cuda" or has_int8_product("CUDA")
            packed, scale = codes.contiguous(), scale[:, 0].contiguous()
        else:
            packed, scale = _pack(codes, device), torch.stack((scale, zero), 2).transpose(0, 1).contiguous()
        self.register_buffer("codes", packed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        out: Tensor = self._product(rows).to(x.dtype)
        return out.view(*x.shape[:-1], self.outputs)

    def _product(self, rows: Tensor) -> Any:
        if self.form == "int8":
            if self._fused:
                return torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scale)
            return F.linear(rows, self.codes.to(torch.bfloat16)) * self.scale
        if rows.device.type == "cpu":
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, GROUP, self.scale)
        return torch.cat([torch.ops.aten._weight_int4pack_mm(part, self.codes, GROUP, self.scale) for part in rows.split(ROWS)])


def has_int8_product(key: str) -> bool:
    """Whether this torch has a kernel for products with int8 weights for a dispatch key, such as "CUDA"."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", key))


def _pack(codes: Tensor, device: torch.device) -> Any:
    """Packs codes [out, in] as torch's int4 kernels of a device expect them."""
    if device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8 if codes.shape[1] % 128 == 0 else 2)


Weight = Tensor | QuantizedLinear


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] times the transpose of a matrix [out, in], quantized or not."""
    return weight(x) if isinstance(weight, QuantizedLinear) else F.linear(x, weight)
