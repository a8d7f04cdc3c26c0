"""The thread pools of the libraries in this process."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits

from model import threads
from streams.opencv import cv2


def limit() -> None:
    """One thread for each library, where its default is every core: torch (but for the model's passes, which set their own
    number), OpenCV, and the BLAS of numpy, which the voice activity detection runs on in the event loop."""
    assert threads.USUAL, "read before it is changed here"
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threadpool_limits(limits=1, user_api="blas")
