"""What a camera does to a picture, in a camera's order: light, lens, movement, sensor, sharpening, and JPEG."""

from __future__ import annotations

import numpy as np

from streams.opencv import cv2


def shoot(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 RGB in 0..255 [H, W, 3] as uint8: how a camera of any quality shows it."""
    height, width = picture.shape[:2]
    picture = picture * _light(rng, height, width)
    if rng.random() < 0.6:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.3, 1.4)))
    if rng.random() < 0.15:
        picture = cv2.filter2D(picture, -1, _movement(rng))
    noise = rng.standard_normal((height, width, 1), np.float32) * np.float32(0.8)
    noise = noise + rng.standard_normal((height, width, 3), np.float32) * np.float32(0.6)
    if rng.random() < 0.4:  # a small sensor averages over its colour filter, which makes its noise coarse
        noise = cv2.GaussianBlur(noise, (0, 0), 0.8) * np.float32(2)
    read, shot = rng.uniform(0.3, 5), rng.uniform(0, 0.5)
    picture = picture + noise * np.sqrt(read**2 + shot**2 * np.maximum(picture, 0)).astype(np.float32)
    if rng.random() < 0.3:
        picture = picture + (picture - cv2.GaussianBlur(picture, (0, 0), 1.5)) * np.float32(rng.uniform(0.2, 1))
    return jpeg(np.clip(picture, 0, 255).astype(np.uint8), rng)


def jpeg(picture: np.ndarray, rng: np.random.Generator, share: float = 0.8) -> np.ndarray:
    """Most pictures come as JPEG, of any quality."""
    if rng.random() > share:
        return picture
    quality = int(rng.integers(75, 99) if rng.random() < 0.6 else rng.integers(25, 75))
    _, coded = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return np.ascontiguousarray(decoded[:, :, ::-1])


def _light(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Where the light comes from, its tint, which the white balance mostly takes away, and the exposure."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    across = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle)
    light = 1 + np.float32(depth) * across
    if rng.random() < 0.5:
        radius = (x / width - 0.5) ** 2 + (y / height - 0.5) ** 2
        light *= 1 - np.float32(rng.uniform(0, 0.5)) * radius
    warmth = rng.normal(0, 0.025)
    tint = np.array([1 + warmth, 1 + rng.normal(0, 0.008), 1 - warmth], np.float32)
    field: np.ndarray = (light * np.float32(rng.uniform(0.75, 1.1)))[:, :, None] * tint
    return field.astype(np.float32)


def _movement(rng: np.random.Generator) -> np.ndarray:
    size = int(rng.integers(3, 6))
    kernel = np.zeros((size, size), np.float32)
    middle = (size - 1) / 2
    angle = rng.uniform(0, np.pi)
    for step in np.linspace(-middle, middle, 3 * size):
        kernel[round(middle + step * np.sin(angle)), round(middle + step * np.cos(angle))] = 1
    smear: np.ndarray = kernel / kernel.sum()
    return smear
