"""Loads a checkpoint from a folder or the hub, and saves one.

On disk the tensors have the names of Google's files (`layout`). In memory the projections of the same input form one matrix, so
several names on disk fill slices of one parameter. Every tensor is copied from the mapped file straight to its place on the
target device. Files are safetensors, plain or compressed-tensors' W4A16, or GGUF (model/gguf_files.py). The layers' matrices may
be held in eight or four bits (model/quantized.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.cache import NO_ROWS, Room
from model.config import CheckpointError, GemmaConfig, LayerConfig
from model.gemma import Gemma
from model.gguf_files import GgufFiles
from model.quantized import Form, Quantized, QuantizedLinear, joined, nbytes, quantize, suits
from model.safetensors_files import SafetensorsFiles, open_safetensors, read_json
from model.sampling import SamplingParams

NANO = Path(__file__).parent / "nano"
CONFIG_FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer*.json")
FILES = ("*.safetensors", "*.safetensors.index.json", *CONFIG_FILES)

PASSES = 1 << 29  # bytes of a GPU that activations and libraries take besides weights and rows
SMALL = 1 << 27  # parameters: a CPU reads so many in float32 in the 40 ms of a frame, and nano's steps are as fast as on a GPU


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file goes in memory: rows `start` to `stop` of a parameter."""

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None


def layout(config: GemmaConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint by its name on disk (677 for the 12B, no lm_head: it is tied)."""
    h, v = config.hidden_size, config.vision_size
    text, patch = "model.language_model.", 3 * config.patch**2
    places = {
        f"{text}embed_tokens.weight": Place("embedding", (config.vocab_size, h)),
        f"{text}norm.weight": Place("norm", (h,)),
        "model.vision_embedder.patch_ln1.weight": Place("vision.norm1.weight", (patch,)),
        "model.vision_embedder.patch_ln1.bias": Place("vision.norm1.bias", (patch,)),
        "model.vision_embedder.patch_dense.weight": Place("vision.dense.weight", (v, patch)),
        "model.vision_embedder.patch_dense.bias": Place("vision.dense.bias", (v,)),
        "model.vision_embedder.patch_ln2.weight": Place("vision.norm2.weight", (v,)),
        "model.vision_embedder.patch_ln2.bias": Place("vision.norm2.bias", (v,)),
        "model.vision_embedder.pos_embedding": Place("vision.places", (config.grid, 2, v)),
        "model.vision_embedder.pos_norm.weight": Place("vision.norm3.weight", (v,)),
        "model.vision_embedder.pos_norm.bias": Place("vision.norm3.bias", (v,)),
        "model.embed_vision.embedding_projection.weight": Place("vision.project.weight", (h, v)),
        "model.embed_audio.embedding_projection.weight": Place("audio", (h, config.frame)),
    }
    for i, layer in enumerate(config.layers):
        for name, place in _block(config, layer).items():
            parameter = f"blocks.{i}.{place.parameter}"
            places[f"{text}layers.{i}.{name}"] = Place(parameter, place.shape, place.start, place.stop)
    return places


def _block(config: GemmaConfig, layer: LayerConfig) -> dict[str, Place]:
    h, m, d = config.hidden_size, config.intermediate_size, layer.head_dim
    q, kv = config.heads * d, layer.kv_heads * d
    places = {
        "input_layernorm.weight": Place("input_norm", (h,)),
        "post_attention_layernorm.weight": Place("post_attention_norm", (h,)),
        "pre_feedforward_layernorm.weight": Place("pre_mlp_norm", (h,)),
        "post_feedforward_layernorm.weight": Place("post_mlp_norm", (h,)),
        "layer_scalar": Place("scale", (1,)),
        "mlp.gate_proj.weight": Place("mlp.gate_up", (m, h), 0, m),
        "mlp.up_proj.weight": Place("mlp.gate_up", (m, h), m, 2 * m),
        "mlp.down_proj.weight": Place("mlp.down", (h, m)),
        "self_attn.q_norm.weight": Place("attention.q_norm", (d,)),
        "self_attn.k_norm.weight": Place("attention.k_norm", (d,)),
        "self_attn.q_proj.weight": Place("attention.qkv", (q, h), 0, q),
        "self_attn.k_proj.weight": Place("attention.qkv", (kv, h), q, q + kv),
        "self_attn.o_proj.weight": Place("attention.out", (h, q)),
    }
    if not layer.shared_kv:
        places["self_attn.v_proj.weight"] = Place("attention.qkv", (kv, h), q + kv, q + 2 * kv)
    return places


def size(config: GemmaConfig) -> int:
    """The number of parameters."""
    return sum(_numel(place.shape) for place in layout(config).values())


def read_config(folder: Path) -> GemmaConfig:
    """Reads config.json. Raises CheckpointError."""
    return GemmaConfig.from_json(read_json(folder / "config.json"))


def read_generation(folder: Path, config: GemmaConfig) -> SamplingParams:
    """Sampling defaults of the checkpoint, from generation_config.json. The ids that begin, end or stand for a picture or sound
    are suppressed even where the file does not say so: their rows of the embedding table hold projections, and the real model
    would emit them once per 500 tokens. Raises CheckpointError."""
    path = folder / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    stop_ids = (raw.get("eos_token_id"), read_json(folder / "config.json").get("eos_token_id"), 1)
    stop = next(ids for ids in stop_ids if ids is not None)
    media = config.media
    unwanted = {media.eoi, media.eoa, media.image, media.video, media.audio, media.boi, media.boa}
    try:
        return SamplingParams(
            stop=frozenset(stop if isinstance(stop, list) else [stop]),
            suppressed=tuple(sorted(unwanted | set(raw.get("suppress_tokens") or ()))),
            greedy=not raw.get("do_sample", True),
            temperature=float(raw.get("temperature", 1.0)),
            top_k=int(raw.get("top_k", 64)),
            top_p=float(raw.get("top_p", 0.95)),
        )
    except (TypeError, ValueError) as wrong:
        raise CheckpointError(f"{path} holds a value that cannot be used: {wrong}") from wrong


def read_budget(folder: Path) -> int:
    """Soft tokens that one picture may take, from processor_config.json (280 where it does not say)."""
    path = folder / "processor_config.json"
    raw = read_json(path) if path.exists() else {}
    return int(raw.get("image_processor", {}).get("max_soft_tokens", raw.get("image_seq_length", 280)))


def locate(name: str, files: Sequence[str] = FILES) -> Path:
    """The folder of a checkpoint, which is named by a folder, "nano" for the embedded one, or a hub id, whose `files` are
    downloaded (an interrupted download is resumed). Raises CheckpointError."""
    if name == "nano":
        return NANO
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name} is neither a folder with a checkpoint nor a hub id like google/gemma-4-12B-it")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as failed:
        reason = (str(failed).strip() or type(failed).__name__).splitlines()[0]
        raise CheckpointError(f"{name} is no folder here and could not be fetched from the hub: {reason}") from failed


def find_device(name: str, size: float) -> torch.device:
    """A device by name. "auto" is a GPU, if there is one and the model's `size` in parameters is too large for a CPU. Raises
    CheckpointError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if size > SMALL and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    except (RuntimeError, KeyError):
        raise CheckpointError(f"there is no device {name}; say auto, cpu, cuda, cuda:1 or mps") from None
    if (device.index or 0) >= there:
        count = f"{there or 'no'} {device.type} device{'' if there == 1 else 's'}"
        raise CheckpointError(f"there is no device {name} here, where torch finds {count}; say --device cpu")
    return device


def load(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    room: Room = NO_ROWS,
    *,
    weights: Form | None = None,
    head: Form | None = None,
    config: Path | None = None,
) -> Gemma:
    """Loads the model of a folder to `device`, ready to run.

    `dtype` None: bfloat16 on a GPU, float32 on a CPU, which is faster there. `weights`: the form in which the layers' matrices
    are held; None: as in the files. `head`: the form of a copy of the embedding table that logits are computed with; None: the
    table itself. `config`: the folder with config.json, if it is another. `progress` receives bytes done and in all. `room`:
    the rows for which there must be memory too. Raises CheckpointError for files or sizes that do not fit, before it takes
    memory."""
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    known = read_config(config or folder)
    places = layout(known)
    with ExitStack() as stack:
        source = _open(stack, folder)
        _check(source, places)
        matrices = _by_parameter(places)
        forms = _forms(matrices, places, source, weights)
        sizes = {name: _held_bytes(name, parts, places, forms, dtype) for name, parts in matrices.items()}
        total = sum(sizes.values()) + (nbytes(known.vocab_size, known.hidden_size, head) if head else 0)
        _check_memory(total, room, known, dtype, device)
        with torch.device("meta"):
            model = Gemma(known).to(dtype)
        for name in forms:
            _replace(model, name, None)
        model.to_empty(device=device)
        lay_out(model)
        parameters, done = dict(model.named_parameters()), 0
        for name, parts in matrices.items():
            if form := forms.get(name):
                held = joined([_quantized(source.read(part), form) for part in parts])
                _replace(model, name, QuantizedLinear(held, device))
            for part in () if form else parts:
                place, value = places[part], source.read(part)
                value = value.dequantize() if isinstance(value, Quantized) else value
                parameters[name].detach()[place.start : place.stop].copy_(value)
            done += sizes[name]
            progress(done, total)
        if head:
            model.head = QuantizedLinear(quantize(model.embedding.detach(), head), device)
            progress(total, total)
    return model.eval().requires_grad_(False)


def _by_parameter(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """The names on disk that make up each parameter, in the order of its rows."""
    found: dict[str, list[str]] = {}
    for name in sorted(places, key=lambda name: places[name].start):
        found.setdefault(places[name].parameter, []).append(name)
    return found


def _forms(
    matrices: Mapping[str, list[str]], places: Mapping[str, Place], source: Source, wanted: Form | None
) -> dict[str, Form]:
    """The form of each of the layers' matrices that is quantized. If the parts of one matrix differ in the files, it takes the
    widest of their forms."""
    forms: dict[str, Form] = {}
    for parameter, parts in matrices.items():
        if not (parameter.startswith("blocks.") and all(len(places[part].shape) == 2 for part in parts)):
            continue
        stored = {source.form(part) for part in parts}
        form = wanted or (None if stored == {None} else "int4" if stored == {"int4"} else "int8")
        outputs, inputs = sum(places[part].shape[0] for part in parts), places[parts[0]].shape[1]
        if form:
            forms[parameter] = form if suits(outputs, inputs, form) else "int8"
    return forms


def _held_bytes(
    parameter: str, parts: list[str], places: Mapping[str, Place], forms: Mapping[str, Form], dtype: torch.dtype
) -> int:
    if form := forms.get(parameter):
        return nbytes(sum(places[part].shape[0] for part in parts), places[parts[0]].shape[1], form)
    return sum(_numel(places[part].shape) for part in parts) * dtype.itemsize


def _quantized(value: Tensor | Quantized, form: Form) -> Quantized:
    if isinstance(value, Quantized):
        return value if value.form == form else quantize(value.dequantize(), form)
    return quantize(value, form)


def _replace(model: Gemma, name: str, held: QuantizedLinear | None) -> None:
    """Puts a quantized matrix in the place of a parameter; None: removes the parameter, so that it takes no memory."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._parameters:
        delattr(module, attribute)
    if held is not None:
        setattr(module, attribute, held)


def lay_out(model: Gemma) -> None:
    """On a CPU in float32, stores the layers' matrices as [in, out] in memory, with the same shapes: nano's step takes 7 % less
    time, a chunk of eleven positions 11 % less. Not in bfloat16: a product of the 12B would take 33 times as long with AVX2."""
    if model.device.type == "cpu" and model.dtype == torch.float32:
        for p in model.blocks.parameters():
            if p.dim() == 2:
                p.data = p.data.t().contiguous().t()


class Source(Protocol):
    """The tensors of a checkpoint's files, under the hub's names."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def form(self, name: str) -> Form | None:
        """The form in which a matrix is stored; None: not quantized."""

    def read(self, name: str) -> Tensor | Quantized: ...


def _open(stack: ExitStack, folder: Path) -> Source:
    if found := sorted(folder.glob("*.gguf")):
        if list(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder} holds both GGUF and safetensors files; keep one kind in a folder")
        return GgufFiles(found)
    return open_safetensors(stack, folder)


def _check(source: Source, places: Mapping[str, Place]) -> None:
    found = source.names()
    missing, extra = sorted(places.keys() - found), sorted(found - places.keys())
    if missing:
        raise CheckpointError(f"the checkpoint lacks the tensor {missing[0]}{_more(missing)}")
    if extra:
        raise CheckpointError(f"the checkpoint holds the tensor {extra[0]}{_more(extra)}, which its config.json has no place for")
    for name, place in places.items():
        if (shape := source.shape(name)) != place.shape:
            raise CheckpointError(f"the tensor {name} is {list(shape)}; its config.json asks for {list(place.shape)}")
        if source.form(name) and not name.endswith("_proj.weight") and isinstance(source, SafetensorsFiles):
            raise CheckpointError(f"the tensor {name} is packed in four bits; only the layers' matrices may be")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def weight_bytes(config: GemmaConfig, form: Form | None, dtype: torch.dtype) -> int:
    """Memory of all weights in bytes, with the layers' matrices in `form`."""
    places = layout(config).values()
    others = sum(_numel(place.shape) for place in places if not place.parameter.startswith("blocks."))
    return layer_bytes(config, form, dtype) + others * dtype.itemsize


def layer_bytes(config: GemmaConfig, form: Form | None, dtype: torch.dtype) -> int:
    """Memory of the layers alone in bytes; every pass reads them."""
    shapes = [place.shape for place in layout(config).values() if place.parameter.startswith("blocks.")]
    plain = sum(_numel(shape) for shape in shapes if form is None or len(shape) != 2) * dtype.itemsize
    return plain + sum(nbytes(*shape, form) for shape in shapes if form and len(shape) == 2)


def _check_memory(weights: int, room: Room, config: GemmaConfig, dtype: torch.dtype, device: torch.device) -> None:
    free, rows = free_memory(device), room.rows * room.bytes_per_row(config, dtype)
    if free is None or weights + rows <= free:
        return
    needs = f"the model needs {weights / 2**30:.1f} GiB"
    if room.rows:
        needs += f" and {room.rows} rows of {room.length:,} positions {rows / 2**30:.1f}"
    fitting: list[Form] = [form for form in ("int8", "int4") if weight_bytes(config, form, dtype) + rows <= free]
    instead = f"; --weights {fitting[0]} would fit" if fitting else "; attend plan says what would fit"
    raise CheckpointError(f"{needs}, {free / 2**30:.1f} free on {device}{instead}")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device for weights and rows; None where the system does not say."""
    if device.type == "cuda":
        return max(0, int(torch.cuda.mem_get_info(device)[0]) - PASSES)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def save(model: Gemma, config_json: dict[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes config.json and model.safetensors under the hub's names. The file is replaced at once, never half written."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {
        name: parameters[place.parameter].detach()[place.start : place.stop].to(dtype).cpu().contiguous()
        for name, place in layout(model.config).items()
    }
    unfinished = folder / "model.safetensors.part"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # save_file makes it private
    unfinished.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
