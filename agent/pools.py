"""Limits the thread pools of the libraries in this process."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits

from model import threads
from streams.opencv import cv2


def limit() -> None:
    """Gives each library one thread, where its default is every core: torch (except for the model's passes, which set their own
    number), OpenCV, and numpy's BLAS, which the voice activity detection uses on the event loop."""
    assert threads.USUAL, "model.threads has to read torch's default before it is changed here"
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threadpool_limits(limits=1, user_api="blas")
