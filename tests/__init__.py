"""What must be so before torch and transformers are imported: no network, a torchvision that can be imported, and thread pools as
the commands have them."""

import importlib.util
import os
import sys

# Also for the processes that tests start.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def mend_torchvision():
    """A torchvision built for CUDA finds its operators missing beside a CPU torch; no test calls them, but transformers
    imports torchvision wherever it is installed, and then nothing of its models can be had."""
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return library  # its operators go when it goes
    return None


torchvision_operators = mend_torchvision() if importlib.util.find_spec("torchvision") else None

from agent import pools  # noqa: E402

pools.limit()
