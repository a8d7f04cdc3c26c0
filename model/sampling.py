"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
import torch
from torch import Tensor

from model.batch import upload


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Defaults are Gemma 4's; a checkpoint's generation_config.json overrides them."""

    stop: frozenset[int]
    suppressed: tuple[int, ...]  # never drawn, not even greedily
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"a temperature is above 0, not {self.temperature}; say greedy for the likeliest token")
        if self.top_k < 1 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k is at least 1 and top_p above 0 and at most 1, not {self.top_k} and {self.top_p}")


Sampler = Callable[[Tensor, Sequence[SamplingParams], Sequence[float]], Tensor]  # what `sample` is


def sample(logits: Tensor, generations: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """The next tokens of float32 logits [S, vocabulary], and their log-probabilities before temperature and cuts: float32
    [2, S], still on the device. Not a number where the logits are none.

    In transformers' order: suppressed, temperature, top-k, top-p. Then the inverse of the cumulative distribution at one
    number of each row, uniform in [0, 1) and drawn on the host: so a seed gives the same tokens alone and in company, and on
    every device (to rounding)."""
    masks = [_suppressed(ids, logits.shape[-1], logits.device) for ids in dict.fromkeys(g.suppressed for g in generations)]
    if len(masks) > 1:
        masks = [torch.stack([_suppressed(g.suppressed, logits.shape[-1], logits.device) for g in generations])]
    logits = logits + masks[0]
    kept = [1 if g.greedy else min(g.top_k, logits.shape[-1]) for g in generations]
    asked = [(g.temperature, k, g.top_p, u) for g, k, u in zip(generations, kept, uniforms, strict=True)]
    temperature, top_k, top_p, uniform = upload(np.array(asked, np.float32), logits.device)[..., None].unbind(1)
    top, ids = logits.topk(max(kept))
    cut = torch.arange(max(kept), device=logits.device) >= top_k
    probability = (top / temperature).masked_fill(cut, -torch.inf).softmax(-1)
    # A token stays while those before it hold less than top_p: the first always stays.
    probability = probability.masked_fill(probability.cumsum(-1) - probability >= top_p, 0)
    below = probability.cumsum(-1)
    place = (below <= uniform * below[:, -1:]).sum(-1, keepdim=True)
    place = place.minimum((probability > 0).sum(-1, keepdim=True) - 1).clamp_min(0)  # a number that float32 rounds to 1
    logp = top.gather(-1, place) - logits.logsumexp(-1, keepdim=True)
    return torch.cat((ids.gather(-1, place).float(), logp), -1).t()  # ids below 2^24 are exact


@lru_cache(maxsize=8)
def _suppressed(ids: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """What is added to the logits [size] of ids that are never drawn."""
    with torch.inference_mode(False):
        mask = torch.zeros(size)
        mask[list(ids)] = -torch.inf
        return mask.to(device)


def sample_one(logits: Tensor, sampling: SamplingParams, generator: Random | None = None) -> tuple[int, float]:
    """`sample` of one row [vocabulary], on the host."""
    token, logp = sample(logits[None], [sampling], [(generator or Random()).random()])[:, 0].tolist()
    return int(token), logp
