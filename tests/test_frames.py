"""Sound in frames, on a clock that counts samples."""

import numpy as np
import pytest

from streams.frames import Audio, Framer, MediaError


def noise(count, peak=0.9):
    return np.random.default_rng(0).uniform(-peak, peak, count).astype(np.float32)


def test_frames_refuse_what_is_not_a_frame():
    assert Audio(np.zeros(640, np.float32), at=1280).end == 1920
    for wrong in (np.zeros(4), np.zeros(4, np.int16), np.zeros((4, 1), np.float32), np.full(4, 2000, np.float32)):
        with pytest.raises(AssertionError):
            Audio(wrong, at=0)
    for poison in (np.nan, np.inf):
        with pytest.raises(MediaError, match="sample 7 holds NaN or infinity"):
            Audio(np.array([0, poison], np.float32), at=7)


@pytest.mark.parametrize("chunk", [1, 7, 639, 640, 641, 5000])
def test_any_chunks_become_the_same_frames(chunk):
    samples = noise(3333)
    framer = Framer(640)
    frames = [frame for i in range(0, len(samples), chunk) for frame in framer.push(samples[i : i + chunk])]
    assert len(frames) == 5
    frames += framer.flush()
    assert [len(frame) for frame in frames] == [640] * 6
    whole = np.concatenate(frames)
    assert (whole[:3333] == samples).all() and (whole[3333:] == 0).all()
    assert framer.flush() == []


def test_a_frame_survives_the_buffer_it_came_in():
    buffer = np.ones(640, np.float32)
    (frame,) = Framer(640).push(buffer)
    buffer[:] = 0
    assert (frame == 1).all()
