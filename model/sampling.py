"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Generation:
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


def draw(logits: Tensor, how: Generation, generator: torch.Generator | None = None) -> tuple[int, float]:
    """One token of float32 logits [vocabulary], and its log-probability before temperature and cuts.

    In transformers' order: suppressed, temperature, top-k, top-p. The generator lives on the logits' device."""
    logits = logits.index_fill(-1, torch.tensor(how.suppressed, device=logits.device), float("-inf"))
    logp = logits.log_softmax(-1)
    if how.greedy:
        token = int(logp.argmax())
        return token, float(logp[token])
    top, ids = (logits / how.temperature).topk(min(how.top_k, logits.shape[-1]))
    probability = top.softmax(-1)
    # A token stays while those before it hold less than top_p: the first always stays.
    probability = probability.masked_fill(probability.cumsum(-1) - probability >= how.top_p, 0)
    token = int(ids[torch.multinomial(probability, 1, generator=generator)])
    return token, float(logp[token])
