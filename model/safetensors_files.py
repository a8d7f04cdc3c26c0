"""Safetensors files as a source of weights: plain tensors, and matrices as compressed-tensors packs them in four bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import CheckpointError
from model.quantized import GROUP, Form, Quantized


def open_safetensors(stack: ExitStack, folder: Path) -> SafetensorsFiles:
    """Of a folder with one file or shards; the stack closes them. Raises CheckpointError."""
    scheme = read_json(folder / "config.json").get("quantization_config") if (folder / "config.json").exists() else None
    if scheme is not None:
        _check_scheme(folder, scheme)
    return SafetensorsFiles(stack, _files(folder))


class SafetensorsFiles:
    """Plain tensors; and matrices as compressed-tensors packs them, eight codes of four bits to an int32, the lowest first."""

    def __init__(self, stack: ExitStack, files: list[Path]) -> None:
        self._stored: dict[str, tuple[Any, str]] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as broken:
                raise CheckpointError(f"{file} is truncated or not a safetensors file: {broken}") from broken
            for stored in handle.keys():
                name = _disk_name(stored)
                if name is not None:
                    self._stored[name] = (handle, stored)
        self._packed = {name.removesuffix("_packed") for name in self._stored if name.endswith(".weight_packed")}
        for name in self._packed:
            for part in ("scale", "shape"):
                if f"{name}_{part}" not in self._stored:
                    raise CheckpointError(f"the checkpoint holds {name}_packed and lacks {name}_{part}")
            if name in self._stored:
                raise CheckpointError(f"the checkpoint holds the tensor {name} twice: plain, and packed in four bits")

    def names(self) -> set[str]:
        parts = {f"{name}_{part}" for name in self._packed for part in ("packed", "scale", "shape")}
        return self._packed | (self._stored.keys() - parts)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._shape(name)
        packed, scale = self._shape(f"{name}_packed"), self._shape(f"{name}_scale")
        if len(packed) != 2 or scale != (packed[0], packed[1] * 8 // GROUP):
            raise CheckpointError(
                f"the tensors {name}_packed {list(packed)} and {name}_scale {list(scale)} do not belong together"
            )
        return packed[0], packed[1] * 8

    def form(self, name: str) -> Form | None:
        return "int4" if name in self._packed else None

    def read(self, name: str) -> Tensor | Quantized:
        if name not in self._packed:
            return self._tensor(name)
        packed, scale = self._tensor(f"{name}_packed"), self._tensor(f"{name}_scale").to(torch.bfloat16)
        codes = (packed[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        return Quantized("int4", codes.flatten(1).to(torch.uint8), scale, torch.zeros_like(scale))

    def _shape(self, name: str) -> tuple[int, ...]:
        handle, stored = self._stored[name]
        return tuple(handle.get_slice(stored).get_shape())

    def _tensor(self, name: str) -> Tensor:
        handle, stored = self._stored[name]
        tensor: Tensor = handle.get_tensor(stored)
        return tensor


def _check_scheme(folder: Path, scheme: Mapping[str, Any]) -> None:
    """Of compressed-tensors' formats attend reads what Google publishes: four bits, groups of 32, symmetric."""
    try:
        kinds = [group["weights"] for group in scheme["config_groups"].values()]
        scheme_is_known = scheme["quant_method"] == "compressed-tensors" and scheme["format"] == "pack-quantized"
        known = scheme_is_known and all(
            (kind["num_bits"], kind["type"], kind["group_size"], kind["symmetric"]) == (4, "int", GROUP, True) for kind in kinds
        )
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        what = " ".join(str(scheme[key]) for key in ("quant_method", "format") if key in scheme) or "an unknown scheme"
        raise CheckpointError(
            f"{folder}/config.json says that the weights are quantized by {what}; attend reads compressed-tensors "
            "pack-quantized with 4 bits in symmetric groups of 32, GGUF files, and plain weights, which --weights int4 rounds"
        )


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


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise CheckpointError(f"{index} has no weight_map")
        files = sorted({folder / str(name) for name in where.values()})
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{folder} has no {file.name}")
    return files


def read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise CheckpointError(f"{path} is not valid JSON: {broken}") from broken
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return raw
