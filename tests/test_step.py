"""The decode step on a CPU gives what the general forward pass gives."""

import pytest
import torch

from model.cache import Cache
from model.config import GemmaConfig
from model.gemma import Gemma
from model.step import Step
from model.weights import NANO, lay_out, read_config
from tests import tiny

WINDOW, SLACK = 6, 5
TINY = tiny.Recipe(layers="ssfsf", hidden=32, kv=2, full_kv=1, head_dim=8, full_head_dim=16, window=WINDOW)


def random_model(config: GemmaConfig) -> Gemma:
    torch.manual_seed(0)
    model = Gemma(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p.shape[-1] ** -0.5)
        else:
            p.uniform_(0.5, 1.5).mul_(p.numel() ** -0.5 if name.endswith("q_norm") else 1)
    lay_out(model)
    return model


def close(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "counts"),
    [(GemmaConfig.from_json(TINY.hub_json()), [40]), (read_config(NANO), [1, 3, 508, 7, 70])],
    ids=["tiny", "nano"],
)
def test_a_step_is_what_the_general_way_computes(config, counts, monkeypatch):
    """From an empty row to past the window, and several times round the rings of the tiny model; for one row and several, of any
    length, with other rows between them. nano's window is 512: chunks fill most of it."""
    model, called = random_model(config), []
    taken = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, *given: called.append(len(given[0])) or taken(self, *given))
    slack = SLACK if config.window == WINDOW else 64
    plain, quick = (Cache(config, 6, 700, slack=slack) for _ in range(2))
    rows = {cache: [cache.claim() for _ in range(6)] for cache in (plain, quick)}

    def both(places: list[int], x: torch.Tensor) -> None:
        with monkeypatch.context() as without, torch.inference_mode():
            ours = model.extend(quick, [rows[quick][place] for place in places], x)
            without.setattr(Step, "suits", lambda *_: False)
            close(ours, model.extend(plain, [rows[plain][place] for place in places], x))

    generator, steps = torch.Generator().manual_seed(1), 0
    for place in (0, 2):
        for chunk in counts:
            for size in [chunk] if chunk > 100 else [1] * chunk:
                for part in torch.randn(1, size, config.hidden_size, generator=generator).split(slack + 1, 1):
                    both([place], part)
                    steps += size == 1
    assert len(called) == steps
    for places in ([0, 2], [0, 1, 2, 3], [1, 3], [0], [5, 1, 3, 4], [1], [4, 5, 3], [0, 4]) * 5:
        both(places, torch.randn(len(places), 1, config.hidden_size, generator=generator))
    assert {*called} == {1, 2, 3, 4} and len(called) == steps + 40


def test_listening_leaves_the_same_in_the_row_as_answering():
    config = read_config(NANO)
    model, cache = random_model(config), Cache(config, 2, 50)
    heard, asked = cache.claim(), cache.claim()
    for x in torch.randn(20, 1, 1, config.hidden_size, generator=torch.Generator().manual_seed(1)):
        assert model.extend(cache, [heard], x, wanted=False) is None
        assert model.extend(cache, [asked], x) is not None
    for kept in (*cache.keys, *cache.values):
        assert torch.equal(kept[0], kept[1]) and kept[0].any()


def test_numbers_far_from_zero_raise_nothing():
    config = read_config(NANO)
    model, cache = random_model(config), Cache(config, 1, 50)
    for block in model.blocks:
        block.pre_mlp_norm *= 1e4
    row, x = cache.claim(), torch.randn(1, 1, config.hidden_size)
    hidden = model.extend(cache, [row], x)
    assert hidden is not None and torch.isfinite(hidden).all()


def test_other_types_than_float32_take_the_general_way():
    config = GemmaConfig.from_json(TINY.hub_json())
    model, cache = random_model(config).bfloat16(), Cache(config, 1, 50, dtype=torch.bfloat16)
    assert model.extend(cache, [cache.claim()], torch.randn(1, 1, config.hidden_size).bfloat16()) is not None
    assert cache.forward is not None and cache.forward._step is None
