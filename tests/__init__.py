"""What must be so before torch and transformers are imported: no network, a torchvision that can be imported, and thread pools as
the commands have them."""

import os

# Also for the processes that tests start.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from agent import pools
from agent.bench.reference import mend_torchvision

mend_torchvision()
pools.limit()
