"""transformers, beside which the model is measured and tested."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_operators: list[torch.library.Library] = []  # they go when it goes


def transformers(say: Callable[[str], None]) -> Any:
    """The library, where a version is installed that knows Gemma 4 Unified; else None."""
    try:
        mend_torchvision()
        found: Any = import_module("transformers")
        found.utils.logging.set_verbosity_error()
        found.utils.logging.disable_progress_bar()
        return found if found.Gemma4UnifiedForConditionalGeneration else None
    except AttributeError:
        return None
    except (ImportError, RuntimeError) as broken:  # RuntimeError: what transformers makes of an import of its own that failed
        if not isinstance(broken, ModuleNotFoundError) or broken.name != "transformers":
            say(f"transformers cannot be imported: {str(broken).strip().splitlines()[-1]}")
        return None


def mend_torchvision() -> None:
    """A torchvision built for CUDA finds its operators missing beside a CPU torch; nobody here calls them, but transformers
    imports torchvision wherever it is installed, and then nothing of its models can be had."""
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
