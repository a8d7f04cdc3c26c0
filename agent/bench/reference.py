"""Imports transformers, the reference of benchmarks and tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_operators: list[torch.library.Library] = []  # the operators exist as long as these objects


def transformers(say: Callable[[str], None]) -> Any:
    """The library, or None unless a version with Gemma 4 Unified is installed."""
    try:
        mend_torchvision()
        found: Any = import_module("transformers")
        found.utils.logging.set_verbosity_error()
        found.utils.logging.disable_progress_bar()
        return found if found.Gemma4UnifiedForConditionalGeneration else None
    except AttributeError:
        return None
    except (ImportError, RuntimeError) as broken:  # RuntimeError: an import inside transformers failed
        if not isinstance(broken, ModuleNotFoundError) or broken.name != "transformers":
            say(f"transformers cannot be imported: {str(broken).strip().splitlines()[-1]}")
        return None


def mend_torchvision() -> None:
    """Makes torchvision importable. Built for CUDA, it fails beside a CPU torch because its operators are missing; they are not
    called here, but transformers imports torchvision if it is installed, and its models cannot be used without that."""
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(library)
        import_module("torchvision")
