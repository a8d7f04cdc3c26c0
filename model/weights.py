"""Checkpoints: a folder or a hub id -> Gemma, and back.

On disk a checkpoint has the names of Google's files (`layout`); in memory the projections that read the same input lie in
one matrix, so several names fill slices of one parameter. Every tensor goes from the mapped file straight into its place
on the target device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.cache import NO_ROWS, Room
from model.gemma import CheckpointError, Config, Gemma, Layer
from model.sampling import Generation

NANO = Path(__file__).parent / "nano"
FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer*.json",
)


PASSES = 1 << 29  # bytes of a GPU that passes and its libraries take beside weights and rows
SMALL = 1 << 27  # numbers: a CPU reads them in float32 in the 40 ms of a frame, and nano's steps are no slower there


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file lies in memory: rows `start` to `stop` of a parameter."""

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None


def layout(config: Config) -> dict[str, Place]:
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


def _block(config: Config, layer: Layer) -> dict[str, Place]:
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


def size(config: Config) -> int:
    """Numbers in all tensors."""
    return sum(_numel(place.shape) for place in layout(config).values())


def _disk_name(name: str) -> str | None:
    """The hub's name of a tensor for any name that writers use; None for tensors that are not ours to read."""
    vestiges = ("lm_head.", "model.lm_head.", "model.embed_vision.embedding.", "model.embed_audio.embedding.")
    if name.startswith(vestiges):
        return None
    if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):  # text-only exports
        return "model.language_model." + name.removeprefix("model.")
    name = name.replace("model.embed_vision.multimodal_embedder.", "model.embed_vision.")
    for part in ("patch_ln1.", "patch_dense.", "patch_ln2.", "pos_embedding", "pos_norm."):
        if name.startswith(f"model.embed_vision.{part}"):
            return name.replace("model.embed_vision.", "model.vision_embedder.", 1)
    return name


def read_config(folder: Path) -> Config:
    return Config.from_json(_read_json(folder / "config.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise CheckpointError(f"{path} is not valid JSON: {broken}") from broken
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return raw


def read_generation(folder: Path, config: Config) -> Generation:
    """Sampling defaults of the checkpoint. The ids that close a picture or sound are suppressed even where the file
    forgets them: their rows of the table hold projections, and the real model would emit them once per 500 tokens."""
    path = folder / "generation_config.json"
    raw = _read_json(path) if path.exists() else {}
    said = (raw.get("eos_token_id"), _read_json(folder / "config.json").get("eos_token_id"), 1)
    stop = next(ids for ids in said if ids is not None)
    media = config.media
    never = {media.eoi, media.eoa, media.image, media.video, media.audio, media.boi, media.boa}
    try:
        return Generation(
            stop=frozenset(stop if isinstance(stop, list) else [stop]),
            suppressed=tuple(sorted(never | set(raw.get("suppress_tokens") or ()))),
            greedy=not raw.get("do_sample", True),
            temperature=float(raw.get("temperature", 1.0)),
            top_k=int(raw.get("top_k", 64)),
            top_p=float(raw.get("top_p", 0.95)),
        )
    except (TypeError, ValueError) as wrong:
        raise CheckpointError(f"{path} holds a value that cannot be used: {wrong}") from wrong


def read_budget(folder: Path) -> int:
    """Soft tokens that one picture may take, as processor_config.json says (280 where it does not)."""
    path = folder / "processor_config.json"
    raw = _read_json(path) if path.exists() else {}
    return int(raw.get("image_processor", {}).get("max_soft_tokens", raw.get("image_seq_length", 280)))


def locate(name: str) -> Path:
    """A folder on disk, "nano" for the embedded checkpoint, or a hub id, which is fetched (resuming, with progress)."""
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
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as failed:
        reason = (str(failed).strip() or type(failed).__name__).splitlines()[0]
        raise CheckpointError(f"{name} is no folder here and could not be fetched from the hub: {reason}") from failed


def find_device(name: str, size: float) -> torch.device:
    """A device by name; "auto": a GPU for a model of more numbers than a CPU is quick enough for. Raises CheckpointError where it
    is not there."""
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
) -> Gemma:
    """The model of a folder on `device`, ready to run. `dtype` None: bfloat16 on a GPU, float32 on a CPU, which is faster
    there. `progress` is told bytes done and in all; `room` is what rows will take beside the weights. Raises CheckpointError for
    anything that does not fit, before memory is taken."""
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    config = read_config(folder)
    files = _files(folder)
    places = layout(config)
    with ExitStack() as stack:
        found = dict(_found(stack, files))
        _check(found, places)
        total = sum(_numel(place.shape) for place in places.values()) * dtype.itemsize
        _check_memory(total, room, config, dtype, device)
        with torch.device("meta"):
            model = Gemma(config).to(dtype)
        model.to_empty(device=device)
        lay_out(model)
        parameters, done = dict(model.named_parameters()), 0
        for name, place in places.items():
            handle, stored = found[name]
            target = parameters[place.parameter].detach()
            target[place.start : place.stop].copy_(handle.get_tensor(stored))
            done += _numel(place.shape) * dtype.itemsize
            progress(done, total)
    return model.eval().requires_grad_(False)


def lay_out(model: Gemma) -> None:
    """On a CPU the layers' matrices stand in memory as [in, out], behind the same shapes: nano's step takes 7 % less so, a
    chunk of eleven positions 11 %. Not in bfloat16, where a product of the 12B's would take 33 times as long under AVX2."""
    if model.device.type == "cpu" and model.dtype == torch.float32:
        for p in model.blocks.parameters():
            if p.dim() == 2:
                p.data = p.data.t().contiguous().t()


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = _read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise CheckpointError(f"{index} has no weight_map")
        files = sorted({folder / str(name) for name in where.values()})
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{folder} has no {file.name}")
    return files


def _found(stack: ExitStack, files: list[Path]) -> Iterator[tuple[str, tuple[Any, str]]]:
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as broken:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {broken}") from broken
        for stored in handle.keys():
            name = _disk_name(stored)
            if name is not None:
                yield name, (handle, stored)


def _check(found: dict[str, tuple[Any, str]], places: dict[str, Place]) -> None:
    missing, extra = sorted(places.keys() - found.keys()), sorted(found.keys() - places.keys())
    if missing:
        raise CheckpointError(f"the checkpoint lacks the tensor {missing[0]}{_more(missing)}")
    if extra:
        raise CheckpointError(f"the checkpoint holds the tensor {extra[0]}{_more(extra)}, which its config.json has no place for")
    for name, place in places.items():
        handle, stored = found[name]
        shape = tuple(handle.get_slice(stored).get_shape())
        if shape != place.shape:
            raise CheckpointError(f"the tensor {name} is {list(shape)}; its config.json asks for {list(place.shape)}")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _check_memory(weights: int, room: Room, config: Config, dtype: torch.dtype, device: torch.device) -> None:
    free, rows = free_memory(device), room.rows * room.bytes_per_row(config, dtype)
    if free is None or weights + rows <= free:
        return
    told = f"the model needs {weights / 2**30:.1f} GiB"
    if room.rows:
        told += f" and {room.rows} rows of {room.length:,} positions {rows / 2**30:.1f}"
    raise CheckpointError(f"{told}, {free / 2**30:.1f} free on {device}")


def free_memory(device: torch.device) -> int | None:
    """Bytes that weights and rows can take on a device; None where the system does not say."""
    if device.type == "cuda":
        return max(0, int(torch.cuda.mem_get_info(device)[0]) - PASSES)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def save(model: Gemma, config_json: dict[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes config.json and model.safetensors under the hub's names. The file appears whole or not at all."""
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
