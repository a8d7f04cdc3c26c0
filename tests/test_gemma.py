"""The networks against transformers, and the numbers that were printed for them."""

from dataclasses import replace

import pytest
import torch

from model.cache import Cache, whole_span
from model.config import CheckpointError, GemmaConfig
from model.functional import rms_norm
from model.gemma import Gemma
from tests import tiny
from tests.tiny import AUDIO, BOA, BOI, EOA, EOI, IMAGE, REAL, Prompt


def close(ours, theirs, tolerance=1e-3):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.fixture(scope="session", params=tiny.RECIPES)
def checkpoint(request, tmp_path_factory):
    return tiny.write(tiny.RECIPES[request.param], tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    return tiny.write(tiny.RECIPES["golden"], tmp_path_factory.mktemp("golden"))


# ---- parity


def test_logits_at_all_positions_match_transformers_whole_and_streamed(checkpoint):
    model = checkpoint.model
    prompt = tiny.conversation(model.config.window)
    assert len(prompt.ids) > 5 * model.config.window
    expected = tiny.trained_logits(checkpoint.reference, prompt)
    with torch.no_grad():
        x = prompt.embed(model)
    close(model.logits(tiny.at_once(model, x, prompt.blocks)), expected)
    cache = Cache(model.config, 1, 100, slack=5)
    close(model.logits(tiny.feed(model, cache, cache.claim(), x, prompt.blocks)), expected)


def test_greedy_ids_and_log_probabilities_match_transformers(checkpoint):
    model, suppressed = checkpoint.model, checkpoint.generation.suppressed
    prompt = tiny.conversation(model.config.window, seed=1)
    ids, logprobs = tiny.generated(checkpoint.reference, prompt, 10, suppressed)
    cache = Cache(model.config, 1, 120, slack=5)
    row = cache.claim()
    with torch.no_grad():
        hidden = tiny.feed(model, cache, row, prompt.embed(model), prompt.blocks, limit=6)[-1]
    for id, expected in zip(ids, logprobs, strict=True):
        logits = model.logits(hidden)
        logits[list(suppressed)] = -torch.inf
        close(logits.log_softmax(-1), expected)
        assert logits.argmax() == id
        hidden = model.extend(cache, [row], model.embed_text(torch.tensor([[id]])))[0, 0]


def test_suppressed_ids_would_win_if_they_were_not_suppressed(golden):
    """Otherwise the test above says nothing of them."""
    prompt = tiny.conversation(8, seed=1)
    logits = golden.model.logits(tiny.at_once(golden.model, prompt.embed(golden.model), prompt.blocks))
    assert set(logits.argmax(-1).tolist()) & set(golden.generation.suppressed)


def test_printed_golden_numbers(golden):
    """What transformers 5.23 printed for these weights."""
    model, generator = golden.model, torch.Generator().manual_seed(7)
    patches = torch.rand(1, 8, 108, generator=generator)[0, :6]
    places = torch.tensor([[x, y] for y in range(2) for x in range(3)])
    frames = 0.3 * torch.randn(1, 12, 20, generator=generator)[0]
    text = [2, 10, 11, 12, 13, 14]
    ids = torch.tensor([*text, BOI, *[IMAGE] * 6, EOI, 20, 21, BOA, *[AUDIO] * 12, EOA, 30, 31, 32])
    prompt = Prompt(ids, ((patches, places),), (frames,))
    with torch.no_grad():
        vision, audio = model.embed_image(patches, places), model.embed_audio(frames)
        said = model.logits(tiny.at_once(model, model.embed_text(ids[:6])))
        logits = model.logits(tiny.at_once(model, prompt.embed(model), prompt.blocks))

    def same(ours, *numbers):
        close(ours[: len(numbers)], torch.tensor(numbers), 3e-4)

    same(said[-1], 0.15136, 3.04181, 0.05582, 0.64976, -1.72165, -0.63278, -2.53698, 1.76687)
    same(vision[0], -0.78972, 0.11838, 0.49567, 3.56384, 0.5727, 0.14017)
    same(vision[5], -0.14624, -0.1503, -1.98983, 2.08187, -2.45533, -1.20366)
    same(audio[0], 1.26956, -0.83015, -1.21027, 0.89152, -1.56013, 0.66437)
    same(logits[9], -0.6576, 5.9842, 3.1229, -0.75172, -1.26611, -1.63988)
    same(logits[32], 2.31633, -2.45026, -0.94002, -0.32179, 0.2097, -1.56944)
    assert logits.abs().max().item() == pytest.approx(9.1314, abs=3e-4)


# ---- what greedy ids cannot see


@pytest.mark.parametrize("mistake", ["softcap", "gelu", "vision eps", "audio eps"])
def test_parity_would_notice(golden, mistake, monkeypatch):
    model = tiny.load(golden.folder)
    prompt = tiny.conversation(8)
    expected = tiny.trained_logits(golden.reference, prompt)
    if mistake == "softcap":
        model.config = replace(model.config, softcap=None)
    elif mistake == "gelu":
        exact = torch.nn.functional.gelu
        monkeypatch.setattr("torch.nn.functional.gelu", lambda x, approximate: exact(x))
    elif mistake == "vision eps":
        model.vision.norm1.eps = 1e-6
    else:
        model.config = replace(model.config, audio_eps=1e-5)
    wrong = model.logits(tiny.at_once(model, prompt.embed(model), prompt.blocks))
    assert (wrong - expected).abs().max() > 3e-3


def test_a_silent_frame_is_exactly_zero(golden):
    assert not golden.model.embed_audio(torch.zeros(3, 20)).any()


@pytest.mark.parametrize(("rms", "share"), [(0.1, 1.0), (1e-2, 0.995), (1e-3, 0.7071), (3e-4, 0.2874), (1e-4, 0.0995)])
def test_loudness_is_kept_only_near_the_noise_floor(golden, rms, share):
    """rms / sqrt(rms^2 + 1e-6)"""
    frame = torch.ones(20) * torch.tensor([1.0, -1.0]).repeat(10)
    loud = golden.model.embed_audio(frame).norm()
    assert (golden.model.embed_audio(rms * frame).norm() / loud).item() == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 62.0), (torch.float32, 3840**0.5)])
def test_text_embeddings_of_the_12b_are_scaled_by(dtype, scale):
    config = replace(GemmaConfig.from_json(REAL), layers=(), vocab_size=2, vision_size=4, patch_size=1, grid=1)
    model = Gemma(config).to(dtype)
    torch.nn.init.ones_(model.embedding)
    assert (model.embed_text(torch.tensor([0, 1])) == torch.tensor(scale, dtype=dtype)).all()


def test_norms_work_in_float32_inside_bfloat16():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 4, 64).bfloat16(), (1 + 0.3 * torch.randn(4, 64)).bfloat16()
    wide = x.float()
    unit = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(rms_norm(x, 1e-6, weight), (unit * weight.float()).bfloat16())
    assert torch.equal(rms_norm(x, 1e-6, weight[0]), (unit * weight[0].float()).bfloat16())
    assert torch.allclose(rms_norm(wide, 1e-6, weight.float()), unit * weight.float(), atol=1e-6)


def test_bfloat16_logits_are_capped_in_float32(golden):
    model = tiny.load(golden.folder, dtype=torch.bfloat16)
    logits = model.logits(torch.randn(3, 64).bfloat16())
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


# ---- masks


@pytest.mark.parametrize("picture", [5, 7, 8, 9, 20], ids=lambda n: f"picture of {n}")
def test_a_picture_sees_itself_within_the_window_and_on_sliding_layers_only(golden, picture):
    config, count = golden.model.config, 40
    block = [0 if 10 <= p < 10 + picture else 1 if p >= 35 else -1 for p in range(count)]
    span = whole_span(config, count, torch.tensor([block]), torch.float32, torch.device("cpu"))
    for layer, reach in span.reaches.items():
        group = config.heads // layer.kv_heads
        open_ = (reach.mask.view(group, count, count) == 0).tolist()
        for q in range(count):
            for k in range(count):
                same = block[q] == block[k] >= 0
                expected = (k <= q or same) and abs(q - k) < config.window if layer.sliding else k <= q
                assert [head[q][k] for head in open_] == [expected] * group


# ---- config.json


@pytest.mark.parametrize("name", tiny.RECIPES)
def test_both_dialects_of_config_json_say_the_same(name):
    hub = tiny.RECIPES[name].hub_json()
    written = tiny.as_transformers_writes(hub)
    assert "per_layer_config" in written["text_config"] and "global_head_dim" not in written["text_config"]
    assert GemmaConfig.from_json(written) == GemmaConfig.from_json(hub)


def test_the_12b_reads_the_same_from_both_dialects():
    config = GemmaConfig.from_json(REAL)
    assert GemmaConfig.from_json(tiny.as_transformers_writes(REAL)) == config
    assert [i for i, layer in enumerate(config.layers) if not layer.sliding] == [5, 11, 17, 23, 29, 35, 41, 47]
    assert {(x.head_dim, x.kv_heads, x.shared_kv, x.theta, x.rotated) for x in config.layers} == {
        (256, 8, False, 1e4, 1.0),
        (512, 1, True, 1e6, 0.25),
    }
    assert (config.patch, config.frame, config.window, config.softcap) == (48, 640, 1024, 30.0)


def test_head_size_of_full_layers_is_512_where_the_file_does_not_say():
    raw = tiny.RECIPES["hub"].hub_json()
    del raw["text_config"]["global_head_dim"]
    assert {x.head_dim for x in GemmaConfig.from_json(raw).layers if not x.sliding} == {512}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_activation", "gelu"),
        ("attention_bias", True),
        ("enable_moe_block", True),
        ("num_kv_shared_layers", 2),
        ("hidden_size_per_layer_input", 256),
        ("use_bidirectional_attention", "all"),
        ("use_double_wide_mlp", True),
        ("tie_word_embeddings", False),
    ],
)
def test_a_feature_of_other_gemmas_is_refused(key, value):
    raw = tiny.Recipe().hub_json()
    (raw if key == "tie_word_embeddings" else raw["text_config"])[key] = value
    with pytest.raises(CheckpointError, match=f"^config.json sets {key}={value!r}, which"):
        GemmaConfig.from_json(raw)


# ---- training


def test_every_parameter_of_a_batch_gets_a_gradient(golden):
    model = tiny.load(golden.folder).requires_grad_(True)
    prompts = [tiny.conversation(8, seed) for seed in (0, 1)]
    x, blocks = torch.stack([p.embed(model) for p in prompts]), torch.stack([p.blocks for p in prompts])
    hidden = model(x, whole_span(model.config, x.shape[1], blocks, x.dtype, x.device))
    ids = torch.stack([p.ids for p in prompts])
    torch.nn.functional.cross_entropy(model.logits(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not without


def test_padding_of_shorter_rows_changes_nothing(golden):
    model = golden.model
    prompts = [tiny.prompt(*parts, seed=i) for i, parts in enumerate([(4, (3, 2), 9), (20, (2, 2), "9", 2), (1,)])]
    count = max(len(p.ids) for p in prompts)
    torch.manual_seed(0)
    x, blocks = 100 * torch.randn(3, count, 64), torch.full((3, count), -1)
    for i, p in enumerate(prompts):
        x[i, : len(p.ids)], blocks[i, : len(p.ids)] = p.embed(model), p.blocks
    hidden = model(x, whole_span(model.config, count, blocks, x.dtype, x.device))
    for i, p in enumerate(prompts):
        close(hidden[i, : len(p.ids)], tiny.at_once(model, p.embed(model), p.blocks))
