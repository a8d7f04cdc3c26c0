"""Checkpoints: the real one's list of tensors, every name that writers use, and a sentence for everything that does not fit."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import weights
from model.config import CheckpointError, GemmaConfig
from model.gemma import Gemma
from model.sampling import SamplingParams
from model.weights import layout, load, locate, read_budget, read_config, read_generation, save
from tests import tiny
from tests.tiny import REAL


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny.write(tiny.RECIPES["hub"], tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(checkpoint.folder, tmp_path / "checkpoint"))


def rewrite(folder, change):
    """The folder with its tensors as `change` leaves them."""
    held = load_file(folder / "model.safetensors")
    save_file(change(held) or held, folder / "model.safetensors", metadata={"format": "pt"})


def same_weights(model, other):
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


# ---- the real checkpoint


def real_tensors():
    """Names and shapes of google/gemma-4-12B as published, spelled out."""
    text, found = "model.language_model.", {}
    for i in range(48):
        full = i % 6 == 5
        q, kv, head = (8192, 512, 512) if full else (4096, 2048, 256)
        found |= {
            f"{text}layers.{i}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (3840,),
                "post_attention_layernorm.weight": (3840,),
                "pre_feedforward_layernorm.weight": (3840,),
                "post_feedforward_layernorm.weight": (3840,),
                "layer_scalar": (1,),
                "mlp.gate_proj.weight": (15360, 3840),
                "mlp.up_proj.weight": (15360, 3840),
                "mlp.down_proj.weight": (3840, 15360),
                "self_attn.q_norm.weight": (head,),
                "self_attn.k_norm.weight": (head,),
                "self_attn.q_proj.weight": (q, 3840),
                "self_attn.k_proj.weight": (kv, 3840),
                "self_attn.v_proj.weight": None if full else (kv, 3840),
                "self_attn.o_proj.weight": (3840, q),
            }.items()
            if shape
        }
    vision = "model.vision_embedder."
    return found | {
        f"{text}embed_tokens.weight": (262144, 3840),
        f"{text}norm.weight": (3840,),
        f"{vision}patch_ln1.weight": (6912,),
        f"{vision}patch_ln1.bias": (6912,),
        f"{vision}patch_dense.weight": (3840, 6912),
        f"{vision}patch_dense.bias": (3840,),
        f"{vision}patch_ln2.weight": (3840,),
        f"{vision}patch_ln2.bias": (3840,),
        f"{vision}pos_embedding": (1120, 2, 3840),
        f"{vision}pos_norm.weight": (3840,),
        f"{vision}pos_norm.bias": (3840,),
        "model.embed_vision.embedding_projection.weight": (3840, 3840),
        "model.embed_audio.embedding_projection.weight": (3840, 640),
    }


def size_of_file(shapes):
    """Bytes of one bfloat16 safetensors file: 8, the header padded to 8, the data in order of name."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in sorted(shapes.items()):
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + at


def test_the_12b_has_its_published_names_shapes_and_sizes():
    ours = {name: place.shape for name, place in layout(GemmaConfig.from_json(REAL)).items()}
    assert ours == real_tensors()
    assert len(ours) == 677
    total = sum(torch.Size(shape).numel() for shape in ours.values())
    assert (total, 2 * total) == (11_959_730_224, 23_919_460_448)
    assert size_of_file(ours) == 23_919_549_408


def test_size_of_a_file_is_what_save_writes(checkpoint, tmp_path):
    """So the number above means something."""
    save(checkpoint.model, tiny.RECIPES["hub"].hub_json(), tmp_path)
    shapes = {name: place.shape for name, place in layout(checkpoint.model.config).items()}
    assert (tmp_path / "model.safetensors").stat().st_size == size_of_file(shapes)


@pytest.mark.parametrize("raw", [REAL, *(recipe.hub_json() for recipe in tiny.RECIPES.values())], ids=["12b", *tiny.RECIPES])
def test_the_tensors_of_a_checkpoint_fill_every_parameter_exactly_once(raw):
    config = GemmaConfig.from_json(raw)
    with torch.device("meta"):
        parameters = dict(Gemma(config).named_parameters())
    filled = {name: [] for name in parameters}
    for place in layout(config).values():
        whole = parameters[place.parameter]
        assert whole[place.start : place.stop].shape == place.shape
        filled[place.parameter].append((place.start, whole.shape[0] if place.stop is None else place.stop))
    for name, parts in filled.items():
        edges = [0, *(edge for part in sorted(parts) for edge in part), parameters[name].shape[0]]
        assert all(stop == start for stop, start in zip(edges[::2], edges[1::2], strict=True)), name


# ---- what writers write


def shard(folder, count=3):
    """The checkpoint in `count` files and an index, as writers split it."""
    held = load_file(folder / "model.safetensors")
    names, where = sorted(held), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: held[name] for name in names[i::count]}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names[i::count], file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(t.numel() * 4 for t in held.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_load_as_one_file_does(checkpoint, folder):
    shard(folder)
    same_weights(load(folder), checkpoint.model)


@pytest.mark.parametrize(
    "how",
    [{}, {"save_original_format": False}, {"max_shard_size": "200KB"}],
    ids=["hub names", "module names", "shards"],
)
def test_what_transformers_saves_loads(checkpoint, tmp_path, how):
    checkpoint.reference.save_pretrained(tmp_path, **how)
    assert (tmp_path / "model.safetensors").exists() == ("max_shard_size" not in how)
    same_weights(load(tmp_path), checkpoint.model)


def text_only_prefix(held):
    return {name.replace("model.language_model.", "model."): tensor for name, tensor in held.items()}


def module_names(held):
    names = {
        name: name.replace("embed_vision.", "embed_vision.multimodal_embedder.").replace("vision_embedder.", "embed_vision.")
        for name in held
    }
    return {names[name]: tensor for name, tensor in held.items()}


def vestiges(held):
    extra = ("lm_head.weight", "model.embed_vision.embedding.weight", "model.embed_audio.embedding.weight")
    return held | {name: torch.randn(320, 64) for name in extra}


def reversed_order(held):
    return dict(reversed(held.items()))


@pytest.mark.parametrize("change", [text_only_prefix, module_names, vestiges, reversed_order], ids=lambda change: change.__name__)
def test_names_that_other_writers_use_load_the_same(checkpoint, folder, change):
    rewrite(folder, change)
    same_weights(load(folder), checkpoint.model)


def test_a_model_is_loaded_ready_to_run_and_in_the_type_asked_for(checkpoint):
    said = []
    model = load(checkpoint.folder, dtype=torch.bfloat16, progress=lambda done, total: said.append((done, total)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    total = 2 * sum(p.numel() for p in model.parameters())
    assert said[-1] == (total, total)
    assert said == sorted(said)
    assert {p.dtype for p in load(checkpoint.folder).parameters()} == {torch.float32}
    same_weights(model, tiny.load(checkpoint.folder).bfloat16())


# ---- save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hub", "twelve layers"])
def test_saved_then_loaded_is_equal_for_us_and_for_transformers(tmp_path, name, dtype):
    model = tiny.write(tiny.RECIPES[name], tmp_path).model
    save(model, tiny.RECIPES[name].config_json(), tmp_path / "new" / "folder", dtype)
    folder = tmp_path / "new" / "folder"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {{torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]}
    again = load(folder)
    same_weights(again, model.to(dtype).float())
    prompt = tiny.conversation(model.config.window)
    ours = again.logits(tiny.at_once(again, prompt.embed(again), prompt.blocks))
    torch.testing.assert_close(ours, tiny.trained_logits(tiny.transformers_loads(folder), prompt), atol=1e-3, rtol=0)


def test_a_save_that_fails_leaves_the_checkpoint_that_was_there(checkpoint, folder, monkeypatch):
    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half a fi")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(checkpoint.model, {}, folder)
    monkeypatch.undo()
    same_weights(load(folder), checkpoint.model)
    save(checkpoint.model, tiny.RECIPES["hub"].hub_json(), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


# ---- what does not fit


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert [word for word in words if word not in said] == []
    return said


NORM = "model.language_model.norm.weight"
SCALAR = "model.language_model.layers.1.layer_scalar"


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda held: {name: held[name] for name in held if name != SCALAR})
    assert refused(folder, SCALAR) == f"the checkpoint lacks the tensor {SCALAR}"


def test_several_missing_tensors_are_counted(folder):
    rewrite(folder, lambda held: {name: held[name] for name in held if "layer_scalar" not in name})
    refused(folder, "lacks the tensor model.language_model.layers.0.layer_scalar and 5 more")


def test_an_extra_tensor_is_named(folder):
    rewrite(folder, lambda held: held | {"model.audio_tower.weight": torch.zeros(3)})
    refused(folder, "model.audio_tower.weight", "no place")


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    rewrite(folder, lambda held: held | {NORM: torch.zeros(65)})
    refused(folder, NORM, "[65]", "[64]")


def test_a_layer_too_many_in_config_json_names_what_it_lacks(folder):
    change_config(folder, lambda raw: raw["text_config"]["layer_types"].append("full_attention"))
    refused(folder, "lacks the tensor model.language_model.layers.6.", "and 12 more")


@pytest.mark.parametrize("left", [0, 4, 200, -1, -4000])
def test_a_truncated_file_is_named(folder, left):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(folder, str(file), "truncated or not a safetensors file")


def test_a_file_that_is_no_safetensors_file_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    refused(folder, "model.safetensors", "not a safetensors file")


def test_a_truncated_shard_is_named(folder):
    shard(folder)
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(folder, file.name)


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00003-of-00003.safetensors").unlink()
    refused(folder, str(folder), "has no model-00003-of-00003.safetensors")


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": []}', "{}", '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_refused(folder, index):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder)


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, str(folder), "has no model.safetensors")


def test_a_folder_without_config_json_is_no_checkpoint(folder):
    (folder / "config.json").unlink()
    refused(folder, str(folder), "config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", '{"model_type": '])
def test_broken_json_names_its_file(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, str(folder / "config.json"))


def change_config(folder, change):
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("kind", ["gemma4", "llama", None])
def test_another_model_type_is_named(folder, kind):
    change_config(folder, lambda raw: raw.update(model_type=kind))
    refused(folder, str(kind), "gemma4_unified")


@pytest.mark.parametrize(
    "path", ["text_config", "audio_config", "boi_token_id", "text_config.hidden_size", "text_config.layer_types"]
)
def test_a_missing_key_of_config_json_is_named(folder, path):
    *parents, key = path.split(".")

    def drop(raw):
        for parent in parents:
            raw = raw[parent]
        del raw[key]

    change_config(folder, drop)
    refused(folder, "config.json has no", key)


def test_rope_of_an_unknown_type_is_named(folder):
    change_config(folder, lambda raw: raw["text_config"]["rope_parameters"]["full_attention"].update(rope_type="yarn"))
    refused(folder, "RoPE", "yarn")


@pytest.mark.parametrize("value", [None, 3, [], "text"])
def test_a_section_of_the_wrong_type_is_refused(folder, value):
    change_config(folder, lambda raw: raw.update(text_config=value))
    refused(folder, "config.json")


def test_too_little_memory_is_said_in_numbers_before_any_is_taken(folder, monkeypatch):
    monkeypatch.setattr(weights, "free_memory", lambda device: 2**20 // 2)
    monkeypatch.setattr(Gemma, "to_empty", lambda *_, **__: pytest.fail("took memory"))
    assert re.fullmatch(r"the model needs \d+\.\d GiB, 0\.0 free on cpu; .* would fit", refused(folder))


def test_what_is_needed_of_memory_is_the_size_in_the_type_asked_for(folder, monkeypatch):
    needed = 2 * sum(torch.Size(place.shape).numel() for place in layout(read_config(folder)).values())
    monkeypatch.setattr(weights, "free_memory", lambda device: needed)
    load(folder, dtype=torch.bfloat16)
    refused(folder, "GiB")


def test_free_memory_is_known_here():
    assert 2**20 < weights.free_memory(torch.device("cpu")) < 2**50


LOADING = """
import sys
from pathlib import Path
import torch
from model.weights import load

def held():  # what the process has taken for itself; pages of a mapped file are the system's to drop
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

kept = [load(Path(sys.argv[1]))]  # a first load imports 30 MB of torch
for dtype in (torch.bfloat16, torch.float32):
    before, most = held(), [0]
    kept.append(load(Path(sys.argv[2]), dtype=dtype, progress=lambda done, total: most.append(held())))
    size = sum(p.numel() * p.element_size() for p in kept[-1].parameters())
    print(size, max(most) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_no_second_copy(checkpoint, tmp_path):
    """A file of 112 MB, its largest tensor 8 MB, as it is and widened."""
    raw = tiny.Recipe(layers="sssssf", hidden=1024, head_dim=64, full_head_dim=64, hub=True).hub_json()
    raw["text_config"] |= {"vocab_size": 4_000, "intermediate_size": 2_560}
    with torch.device("meta"):
        model = Gemma(GemmaConfig.from_json(raw))
    save(model.to_empty(device="cpu"), raw, tmp_path)
    command = [sys.executable, "-c", LOADING, checkpoint.folder, tmp_path]
    script = subprocess.run(command, capture_output=True, text=True, check=True)
    loads = [tuple(map(int, line.split())) for line in script.stdout.splitlines()]
    assert [size // 10**6 for size, _ in loads] == [111, 223]
    for size, taken in loads:
        assert 0.9 * size < taken < 1.2 * size, loads


# ---- where a checkpoint is


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, answered here: what was asked for, and what it says."""

    class Hub:
        asked, answer = [], str(tmp_path)

    def fetch(name, **how):
        Hub.asked.append((name, how))
        if isinstance(Hub.answer, Exception):
            raise Hub.answer
        return Hub.answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    Hub.asked = []
    return Hub


def test_a_folder_is_itself(tmp_path, hub, monkeypatch):
    (tmp_path / "google" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate(str(tmp_path)) == tmp_path
    assert locate("google/gemma") == Path("google/gemma")
    assert not hub.asked


def test_a_folder_under_the_home_is_found(tmp_path, hub, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/models") == tmp_path / "models"


def test_nano_is_the_embedded_checkpoint(hub):
    assert locate("nano") == Path(weights.__file__).parent / "nano"
    assert not hub.asked


def test_a_hub_id_is_fetched_with_what_a_checkpoint_needs(tmp_path, hub):
    assert locate("google/gemma-4-12B-it") == tmp_path
    [(name, how)] = hub.asked
    assert name == "google/gemma-4-12B-it"
    for file in ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        assert any(Path(file).match(pattern) for pattern in how["allow_patterns"]), file
    for file in ("generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert any(Path(file).match(pattern) for pattern in how["allow_patterns"]), file
    for file in ("pytorch_model.bin", "README.md", "code.py", "model.gguf"):
        assert not any(Path(file).match(pattern) for pattern in how["allow_patterns"]), file


@pytest.mark.parametrize(
    "answer",
    [
        LocalEntryNotFoundError("cannot find it on disk\nand no connection"),
        HFValidationError("Repo id must use alphanumeric chars"),
        ConnectionError(),
        OSError("No space left on device"),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_a_hub_that_fails_says_why_in_one_line(hub, answer):
    hub.answer = answer
    with pytest.raises(CheckpointError) as caught:
        locate("google/no-such-model")
    said = str(caught.value)
    assert said.startswith("google/no-such-model is no folder here and could not be fetched from the hub: ")
    assert "\n" not in said
    assert not said.endswith(": ")


@pytest.mark.parametrize("name", ["nonsense", "", "/no/such/folder", "./here", "../there/it", "a/b/c", "~/nothing", __file__])
def test_nonsense_is_refused_in_one_sentence(hub, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder with a checkpoint nor a hub id"):
        locate(name)
    assert not hub.asked


# ---- sampling defaults

MEDIA = (300, 301, 302, 303, 304, 305, 306)


def generation(folder, said):
    if said is not None:
        (folder / "generation_config.json").write_text(json.dumps(said))
    return read_generation(folder, read_config(folder))


@pytest.mark.parametrize(("said", "stop"), [([1, 106, 50], {1, 106, 50}), (106, {106})])
def test_stop_ids_are_a_list_or_one(folder, said, stop):
    assert generation(folder, {"eos_token_id": said}).stop == stop


@pytest.mark.parametrize(("said", "stop"), [([1, 106], {1, 106}), (7, {7}), (None, {1})])
@pytest.mark.parametrize("file", [None, {}, {"eos_token_id": None}])
def test_stop_ids_are_those_of_config_json_where_the_file_does_not_say(folder, said, stop, file):
    change_config(folder, lambda raw: raw.update(eos_token_id=said))
    assert generation(folder, file).stop == stop


@pytest.mark.parametrize("said", [None, {}, {"suppress_tokens": None}, {"suppress_tokens": [301]}])
def test_the_ids_of_media_are_never_sampled(folder, said):
    assert generation(folder, said).suppressed == MEDIA


def test_ids_that_the_file_suppresses_are_added(folder):
    assert generation(folder, {"suppress_tokens": [5, 301]}).suppressed == (5, *MEDIA)


def test_sampling_is_what_the_file_says(folder):
    said = {"do_sample": False, "temperature": 0.7, "top_k": 8, "top_p": 0.5, "eos_token_id": 1}
    assert generation(folder, said) == SamplingParams(frozenset({1}), MEDIA, True, 0.7, 8, 0.5)
    assert generation(folder, {"eos_token_id": 1}) == SamplingParams(frozenset({1}), MEDIA)


@pytest.mark.parametrize("said", [{"temperature": "hot"}, {"temperature": 0}, {"top_k": []}, {"top_p": 2}, {"eos_token_id": {}}])
def test_a_sampling_value_that_cannot_be_used_names_its_file(folder, said):
    with pytest.raises(CheckpointError, match=r"generation_config\.json holds a value that cannot be used"):
        generation(folder, said)


@pytest.mark.parametrize(
    ("said", "budget"),
    [
        (None, 280),
        ({}, 280),
        ({"image_processor": {"max_soft_tokens": 70}, "image_seq_length": 280}, 70),
        ({"image_seq_length": 140}, 140),
    ],
)
def test_the_budget_of_a_picture_is_what_the_file_says(folder, said, budget):
    if said is not None:
        (folder / "processor_config.json").write_text(json.dumps(said))
    assert read_budget(folder) == budget


def test_a_broken_generation_config_names_its_file(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json is not valid JSON"):
        read_generation(folder, read_config(folder))
