"""The one place that imports OpenCV: `from streams.opencv import cv2`.

OpenCV and the FFmpeg inside it read their limits and log levels from the environment while they are imported, so whichever
module imports cv2 first decides them for the whole process.
"""

import os

os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(1 << 26)  # the second limit, should a header that was checked first be untrue
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # else each failed attempt to open a camera writes to stderr
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET: FFmpeg prints addresses with their passwords

import cv2

PICTURE_PIXELS = int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"])  # 67 million: phones take photos of 50

__all__ = ["PICTURE_PIXELS", "cv2"]
