"""Weights in eight and four bits: exact products, readers of three formats, and a sentence for each file that does not fit."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from model.cache import Cache
from model.config import CheckpointError
from model.quantized import GROUP, QuantizedLinear, joined, nbytes, quantize
from model.weights import load
from tests import tiny

FORMS = ("int8", "int4")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny.write(tiny.RECIPES["hub"], tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(checkpoint.folder, tmp_path / "checkpoint"))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_matrix_of_a_layer(name):
    return ".layers." in name and name.endswith("_proj.weight")


def held(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


# ---- rounding and products


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_is_rounded_to_the_nearest_code(form):
    weight = random(48, 96)
    rounded = quantize(weight, form)
    steps = rounded.scale.float().abs().repeat_interleave(96 // rounded.scale.shape[1], 1)
    assert ((rounded.dequantize() - weight).abs() <= 0.51 * steps + 1e-6).float().mean() > 0.99  # all but clamped ends
    assert (rounded.dequantize() - weight).norm() < (0.01 if form == "int8" else 0.1) * weight.norm()


def test_four_bits_give_back_weights_that_were_trained_for_them():
    """A grid around 0 with the largest value at its end, which is what quantization-aware training for Q4_0 leaves."""
    codes = torch.randint(1, 16, (16, 4, GROUP), generator=torch.Generator().manual_seed(1))
    codes[:, :, 5] = 0  # the end of the grid
    scale = random(16, 4).to(torch.bfloat16).float()
    weight = ((codes - 8) * scale[..., None]).flatten(1)
    assert torch.equal(quantize(weight, "int4").dequantize(), weight)


@pytest.mark.parametrize("weight", [torch.zeros(16, 32), torch.full((16, 32), 3.0), -torch.arange(32.0).expand(16, 32)])
@pytest.mark.parametrize("form", FORMS)
def test_groups_without_a_spread_stay_finite(weight, form):
    assert torch.allclose(quantize(weight, form).dequantize(), weight, atol=1.1)
    assert quantize(weight, form).dequantize().isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 16, 130])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_that_of_the_dequantized_matrix(form, rows):
    weight, x = quantize(random(64, 128), form), random(rows, 2, 128, seed=1).to(torch.bfloat16)
    expected = F.linear(x.float(), weight.dequantize())
    product = QuantizedLinear(weight, torch.device("cpu"))(x.float())
    assert product.dtype == torch.float32 and product.shape == (rows, 2, 64)
    assert (product - expected).abs().max() < 0.01 * expected.abs().max()  # bfloat16's rounding of the result


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_takes_the_memory_that_is_counted(form):
    layer = QuantizedLinear(quantize(random(64, 128), form), torch.device("cpu"))
    assert sum(buffer.nbytes for buffer in layer.buffers()) == nbytes(64, 128, form)


@pytest.mark.parametrize("form", FORMS)
def test_matrices_are_joined_by_their_outputs(form):
    one, other = random(16, 64), random(32, 64, seed=1)
    both = joined([quantize(one, form), quantize(other, form)])
    assert torch.equal(both.dequantize(), quantize(torch.cat((one, other)), form).dequantize())


# ---- a model


def logits(model, prompt):
    return model.logits(tiny.at_once(model, prompt.embed(model), prompt.blocks))


def dequantized(model, plain):
    """`plain`, with the matrices that `model` computes with."""
    for name, layer in held(model).items():
        identity = torch.eye(plain.get_parameter(name).shape[1])
        plain.get_parameter(name).data = layer(identity).t().contiguous()
    return plain


@pytest.mark.parametrize("form", FORMS)
def test_a_model_rounded_on_load_computes_with_the_rounded_matrices(checkpoint, form):
    small, prompt = load(checkpoint.folder, weights=form), tiny.conversation(4)
    assert len(held(small)) == 4 * len(small.blocks)
    expected = logits(dequantized(small, load(checkpoint.folder)), prompt)
    seen = logits(small, prompt)  # activations are rounded to bfloat16 as well, which a random model makes much of
    assert (seen - expected).abs().mean() < 0.1 * expected.std()
    assert (seen.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8


@pytest.mark.parametrize("form", FORMS)
def test_frames_one_by_one_are_the_whole_prompt_with_small_weights(checkpoint, form):
    model, prompt = load(checkpoint.folder, weights=form), tiny.conversation(4)
    cache, x = Cache(model.config, 1, 128, slack=16), prompt.embed(model)
    fed = tiny.feed(model, cache, cache.claim(), x, prompt.blocks)
    assert (fed - tiny.at_once(model, x, prompt.blocks)).abs().mean() < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_the_head_may_be_small_too(checkpoint, form):
    model, prompt = load(checkpoint.folder, head=form), tiny.conversation(4)
    hidden = tiny.at_once(model, prompt.embed(model), prompt.blocks)
    expected = F.linear(hidden.to(torch.bfloat16).float(), quantize(model.embedding, form).dequantize())
    assert not held(model).keys() - {"head"}
    assert (model.logits(hidden) - expected).abs().max() < 0.02 * expected.abs().max()


# ---- compressed-tensors' W4A16


SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}}
    },
    "ignore": ["lm_head"],
}


def pack(folder, change=lambda scheme: None):
    """The layers' matrices of a folder as compressed-tensors packs them, and an untied copy of the head; returns the matrices."""
    stored, packed, matrices = load_file(folder / "model.safetensors"), {}, {}
    for name, tensor in stored.items():
        if not is_matrix_of_a_layer(name):
            packed[name] = tensor
            continue
        groups = tensor.unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(2) / 7.5).to(torch.bfloat16)
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
        matrices[name] = (codes * scale.float()[..., None]).flatten(1)
        packed[f"{name}_packed"] = pack_to_int32(codes.flatten(1).to(torch.int8), 4)
        packed[f"{name}_scale"], packed[f"{name}_shape"] = scale, torch.tensor(tensor.shape)
    packed["lm_head.weight"] = stored["model.language_model.embed_tokens.weight"].clone()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    scheme = json.loads(json.dumps(SCHEME))
    change(scheme)
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": scheme}))
    return matrices


def with_matrices(folder, tmp_path, matrices):
    """A plain checkpoint with these matrices."""
    target = tmp_path / "plain"
    shutil.copytree(folder, target)
    save_file(load_file(target / "model.safetensors") | matrices, target / "model.safetensors", metadata={"format": "pt"})
    return load(target)


def same(model, plain):
    for name, layer in held(model).items():
        weight = plain.get_parameter(name)
        assert torch.equal(layer(torch.eye(weight.shape[1])).t(), weight.to(torch.bfloat16).float()), name
    ours = dict(model.named_parameters())
    assert all(torch.equal(ours[name], weight) for name, weight in plain.named_parameters() if name in ours)


def test_a_w4a16_checkpoint_is_read_as_it_is(checkpoint, folder, tmp_path):
    matrices = pack(folder)
    model = load(folder)
    assert {layer.form for layer in held(model).values()} == {"int4"} and len(held(model)) == 4 * len(model.blocks)
    same(model, with_matrices(checkpoint.folder, tmp_path, matrices))


def forget(name):
    def change(folder):
        stored = load_file(folder / "model.safetensors")
        del stored[next(key for key in stored if key.endswith(name))]
        save_file(stored, folder / "model.safetensors")

    return change


def shorten(folder):
    stored = load_file(folder / "model.safetensors")
    name = next(key for key in stored if key.endswith("_scale"))
    save_file(stored | {name: stored[name][:, :1].clone()}, folder / "model.safetensors")


def add_plain(folder):
    stored = load_file(folder / "model.safetensors")
    name = next(key for key in stored if key.endswith("_packed")).removesuffix("_packed")
    save_file(stored | {name: torch.zeros(2, 2)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (forget("weight_scale"), "weight_packed and lacks .*weight_scale"),
        (forget("weight_shape"), "weight_packed and lacks .*weight_shape"),
        (forget("weight_packed"), "lacks the tensor .*_proj.weight"),
        (shorten, "do not belong together"),
        (add_plain, "twice: plain, and packed"),
    ],
)
def test_a_broken_w4a16_checkpoint_is_refused_by_name(folder, spoil, said):
    pack(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda scheme: scheme.update(format="nvfp4-pack-quantized"),
        lambda scheme: scheme.update(quant_method="bitsandbytes"),
        lambda scheme: scheme["config_groups"]["group_0"]["weights"].update(group_size=128),
        lambda scheme: scheme["config_groups"]["group_0"]["weights"].update(symmetric=False),
        lambda scheme: scheme.pop("config_groups"),
    ],
)
def test_another_scheme_is_refused_with_what_can_be_read(folder, change):
    pack(folder, change)
    with pytest.raises(CheckpointError, match="attend reads compressed-tensors pack-quantized with 4 bits"):
        load(folder)


# ---- GGUF


def gguf_name(name):
    from model.gguf_files import _BLOCK, _OTHERS

    whole = {hub: theirs for theirs, hub in _OTHERS.items()}
    if name in whole:
        return whole[name]
    layer, part = name.removeprefix("model.language_model.layers.").split(".", 1)
    parts = {f"{hub}.weight": theirs for theirs, hub in _BLOCK.items()} | {"layer_scalar": "layer_output_scale"}
    return f"blk.{layer}.{parts[part]}.weight"


def by_channel(tensor):
    return tensor.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2)


def to_gguf(folder, kind, embeddings="BF16", projectors=True, architecture="gemma4"):
    """The folder's weights as llama.cpp's conversion writes them; returns the matrices as gguf reads them back."""
    stored, matrices = load_file(folder / "model.safetensors"), {}
    model = gguf.GGUFWriter(folder / "model.gguf", architecture)
    others = gguf.GGUFWriter(folder / "mmproj-model.gguf", "clip")
    model.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    for name, tensor in stored.items():
        quantized = gguf.GGMLQuantizationType[kind if is_matrix_of_a_layer(name) else "F32"]
        if name.endswith("embed_tokens.weight"):
            quantized = gguf.GGMLQuantizationType[embeddings]
        if name.endswith("pos_embedding"):
            tensor = tensor.transpose(0, 1).contiguous()
        if name.endswith(("patch_dense.weight", "patch_ln1.weight", "patch_ln1.bias")):
            tensor = by_channel(tensor).contiguous()
        data = gguf.quantize(tensor.numpy(), quantized)
        if is_matrix_of_a_layer(name):
            matrices[name] = torch.from_numpy(np.array(gguf.dequantize(data, quantized)))
        writer = model if name.startswith("model.language_model.") else others
        writer.add_tensor(gguf_name(name), data, raw_dtype=quantized)
    for writer in (model, others) if projectors else (model,):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (folder / "model.safetensors").unlink()
    return matrices


@pytest.mark.parametrize(("kind", "form", "bound"), [("Q4_0", "int4", 0.006), ("Q4_1", "int4", 0.01), ("Q8_0", "int8", 0.01)])
def test_gguf_files_are_read(checkpoint, folder, kind, form, bound):
    matrices = to_gguf(folder, kind)
    model = load(folder)
    assert {layer.form for layer in held(model).values()} == {form}
    plain = checkpoint.model
    for name in ("norm", "audio", "vision.places", "vision.dense.weight", "vision.norm1.bias", "blocks.1.scale"):
        assert torch.allclose(model.get_parameter(name), plain.get_parameter(name), atol=1e-6), name
    assert torch.allclose(model.embedding, plain.embedding, rtol=0.01)
    for i, block in enumerate(model.blocks):
        expected = matrices[f"model.language_model.layers.{i}.mlp.down_proj.weight"]
        weight = block.mlp.down(torch.eye(expected.shape[1])).t()
        assert (weight - expected).norm() < bound * expected.norm()


def test_plain_gguf_files_are_the_same_model(checkpoint, folder):
    to_gguf(folder, "F32", embeddings="F32")
    prompt = tiny.conversation(4)
    assert torch.equal(logits(load(folder), prompt), logits(checkpoint.model, prompt))


def test_q4_0_keeps_every_code(folder):
    matrices = to_gguf(folder, "Q4_0")
    model = load(folder)
    expected = matrices["model.language_model.layers.0.mlp.down_proj.weight"].unflatten(1, (-1, GROUP))
    weight = model.blocks[0].mlp.down(torch.eye(expected.shape[1] * GROUP)).t().unflatten(1, (-1, GROUP))
    step = (expected.abs().amax(2, keepdim=True) / 8).clamp(min=1e-6)
    assert torch.equal((weight / step).round(), (expected / step).round())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"projectors": False}, "no mmproj"), ({"architecture": "llama"}, 'architecture "llama"')],
)
def test_gguf_files_that_do_not_fit_are_refused(folder, arguments, said):
    to_gguf(folder, "Q8_0", **arguments)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


@pytest.mark.parametrize("keep", [0, 3, 200, 5000])
def test_a_truncated_gguf_file_is_refused(folder, keep):
    to_gguf(folder, "Q8_0")
    file = folder / "model.gguf"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.gguf is truncated or not a GGUF file"):
        load(folder)


def test_two_models_in_a_folder_are_refused(folder):
    to_gguf(folder, "Q8_0")
    shutil.copy(folder / "model.gguf", folder / "model-other.gguf")
    with pytest.raises(CheckpointError, match="once more; keep the files of one model"):
        load(folder)


def test_two_kinds_of_files_in_a_folder_are_refused(checkpoint, folder):
    to_gguf(folder, "Q8_0")
    shutil.copy(checkpoint.folder / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="both GGUF and safetensors"):
        load(folder)


def test_rounding_on_load_goes_over_what_the_files_have(folder):
    to_gguf(folder, "Q8_0")
    assert {layer.form for layer in held(load(folder, weights="int4")).values()} == {"int4"}
