"""Drawing the next token, beside transformers' own cuts."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from model.sampling import Generation, draw


def test_the_likeliest_token_is_never_a_suppressed_one() -> None:
    logits = torch.arange(10.0)
    token, logp = draw(logits, Generation(frozenset({1}), suppressed=(9, 8), greedy=True))
    assert token == 7
    assert logp == pytest.approx(float(logits[:8].log_softmax(-1)[7]), abs=1e-6)


@pytest.mark.parametrize("temperature,top_k,top_p", [(1.0, 64, 0.95), (0.5, 5, 1.0), (2.0, 64, 0.3), (1.0, 1, 0.01)])
def test_what_can_be_drawn_and_how_often_is_as_transformers_cuts_it(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(200, generator=torch.Generator().manual_seed(3))
    scores = logits[None].clone()
    scores[:, [4, 7]] = float("-inf")
    for cut in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        scores = cut(None, scores)
    wanted = scores[0].softmax(-1)
    how = Generation(frozenset({1}), (4, 7), temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.bincount(torch.tensor([draw(logits, how, generator)[0] for _ in range(4000)]), minlength=200) / 4000
    assert set(drawn.nonzero().flatten().tolist()) <= set(wanted.nonzero().flatten().tolist())
    assert (drawn - wanted).abs().max() < 0.04


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_that_draw_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Generation(frozenset({1}), (), **wrong)  # type: ignore[arg-type]
