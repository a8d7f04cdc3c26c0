"""Drawing the next token, beside transformers' own cuts."""

import math
from random import Random

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from model.sampling import SamplingParams, sample, sample_one


def test_the_likeliest_token_is_never_a_suppressed_one() -> None:
    logits = torch.arange(10.0)
    token, logp = sample_one(logits, SamplingParams(frozenset({1}), suppressed=(9, 8), greedy=True))
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
    sampling = SamplingParams(frozenset({1}), (4, 7), temperature=temperature, top_k=top_k, top_p=top_p)
    generator = Random(1)
    tokens, logps = sample(logits.repeat(4000, 1), [sampling] * 4000, [generator.random() for _ in range(4000)])
    drawn = torch.bincount(tokens.long(), minlength=200) / 4000
    assert set(drawn.nonzero().flatten().tolist()) <= set(wanted.nonzero().flatten().tolist())
    assert (drawn - wanted).abs().max() < 0.04
    allowed = logits.index_fill(0, torch.tensor([4, 7]), -torch.inf)
    assert torch.allclose(logps, allowed.log_softmax(-1)[tokens.long()], atol=1e-5)


PARAMS = [
    SamplingParams(frozenset({1}), (4, 7)),
    SamplingParams(frozenset({1}), (4, 7), greedy=True),
    SamplingParams(frozenset({1}), (4, 7), temperature=0.5, top_k=5, top_p=1.0),
    SamplingParams(frozenset({1}), (4, 7), temperature=3.0, top_k=150, top_p=1.0),
    SamplingParams(frozenset({1}), (5,), temperature=2.0, top_p=0.5),
]


def test_a_seed_gives_the_same_tokens_alone_and_in_company() -> None:
    logits = 3 * torch.randn(40, 200, generator=torch.Generator().manual_seed(3))
    params, generators = [PARAMS[i % len(PARAMS)] for i in range(40)], [Random(i) for i in range(40)]
    together = sample(logits, params, [generator.random() for generator in generators]).t().tolist()
    for row, sampling, (token, logp), seed in zip(logits, params, together, range(40), strict=True):
        assert sample_one(row, sampling, Random(seed)) == (int(token), pytest.approx(logp, abs=1e-5))


@pytest.mark.parametrize("sampling", PARAMS)
def test_the_ends_of_the_uniform_numbers_draw_the_first_and_the_last_token_that_are_left(sampling: SamplingParams) -> None:
    logits = torch.arange(200.0).flip(0)[None] / 10
    first, last = (int(sample(logits, [sampling], [uniform])[0]) for uniform in (0.0, 1 - 2**-53))  # which float32 rounds to 1
    assert first == 0
    scores = logits.clone()
    scores[:, list(sampling.suppressed)] = -torch.inf
    for cut in (
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(sampling.top_k),
        TopPLogitsWarper(sampling.top_p),
    ):
        scores = cut(None, scores)
    assert last == (0 if sampling.greedy else int(scores.isfinite().nonzero()[-1, 1]))


def test_logits_that_are_no_numbers_spoil_their_own_row_alone() -> None:
    logits = torch.randn(2, 200)
    logits[0, 3] = torch.nan
    spoilt, well = sample(logits, [PARAMS[0]] * 2, [0.5, 0.5])[1].tolist()
    assert math.isnan(spoilt) and math.isfinite(well)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_that_draw_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        SamplingParams(frozenset({1}), (), **wrong)  # type: ignore[arg-type]
