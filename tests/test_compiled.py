"""Compiled steps are the uncompiled ones, sooner."""

import pytest
import torch

from model import compiled as model_compiled
from model.cache import Cache
from model.compiled import NotCompiled, compile_steps
from model.gemma import Config, Gemma
from model.weights import NANO, lay_out, read_config
from tests import tiny

WINDOW, SLACK = 6, 5
TINY = tiny.Recipe(layers="ssfsf", hidden=32, kv=2, full_kv=1, head_dim=8, full_head_dim=16, window=WINDOW)


def random_model(config: Config) -> Gemma:
    torch.manual_seed(0)
    model = Gemma(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p.shape[-1] ** -0.5)
        else:
            p.uniform_(0.5, 1.5).mul_(p.numel() ** -0.5 if name.endswith("q_norm") else 1)
    lay_out(model)
    return model


def twin(model: Gemma) -> Gemma:
    with torch.device("meta"):
        other = Gemma(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize(
    ("config", "counts"),
    [(Config.from_json(TINY.hub_json()), [40]), (read_config(NANO), [1, 3, 508, 7, 70])],
    ids=["tiny", "nano"],
)
def test_compiled_steps_equal_uncompiled_ones(config: Config, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty row past the window, several times round the rings of the tiny one; in any row, and after rows that
    stepped together. nano's window is 512: chunks lead up to it."""
    model, made = random_model(config), []
    compiled, once = twin(model), model_compiled._compile
    monkeypatch.setattr(model_compiled, "_compile", lambda block: made.append(block) or once(block))
    compile_steps(compiled)
    assert len(made) == 2 < len(config.layers), "one graph for each kind of layer"
    called = []
    for block in compiled.blocks:
        run = block.step
        block.step = lambda *rest, run=run: called.append(1) or run(*rest)
    slack = SLACK if config.window == WINDOW else 64
    caches = [Cache(config, 3, 700, slack=slack) for _ in range(2)]
    rows = [[cache.claim() for _ in range(3)] for cache in caches]
    generator, steps = torch.Generator().manual_seed(1), 0
    for place in (0, 2):
        for chunk in counts:
            for size in [chunk] if chunk > 100 else [1] * chunk:
                for part in torch.randn(1, size, config.hidden_size, generator=generator).split(slack + 1, 1):
                    pair = zip((model, compiled), caches, rows, strict=True)
                    ours, theirs = (one.extend(cache, [row[place]], part) for one, cache, row in pair)
                    close(theirs, ours)
                    steps += size == 1
    assert len(called) > steps * len(config.layers) / 3, "hardly any step was compiled"
    together = torch.randn(2, 1, config.hidden_size, generator=generator)
    for x in (together, together[:1]):
        pair = zip((model, compiled), caches, rows, strict=True)
        ours, theirs = (one.extend(cache, [row[0], row[2]][: len(x)], x) for one, cache, row in pair)
        close(theirs, ours)
    torch.compiler.reset()


def test_without_a_compiler_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = random_model(Config.from_json(TINY.hub_json())), []
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NotCompiled, match="there is no no-such-compiler here; on Debian and Ubuntu: apt-get install g"):
        compile_steps(model, lambda: told.append(1))
    assert not told and all(block.step is None for block in model.blocks)


def test_other_types_than_float32_are_refused() -> None:
    with pytest.raises(NotCompiled, match="float32"):
        compile_steps(random_model(Config.from_json(TINY.hub_json())).bfloat16())
