import asyncio
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import soundfile

from streams import files
from streams.files import MediaError, decode_picture, play, read_audio, read_picture, read_video
from streams.frames import FRAME, RATE, Audio, Framer, Image

ROOT = pathlib.Path(__file__).parent.parent
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def tone(rate, seconds=1.0, hertz=440, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def strongest(samples):
    """(hertz, level) of the loudest sine, the ends left out: there a resampler rings."""
    samples = samples[1600:-1600]
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * RATE / len(samples), np.sqrt(2 * np.mean(samples**2))


def noise(count, peak=0.9):
    return np.random.default_rng(0).uniform(-peak, peak, count).astype(np.float32)


# frames


def test_frames_refuse_what_is_not_a_frame():
    assert Audio(np.zeros(640, np.float32), at=1280).end == 1920
    for wrong in (np.zeros(4), np.zeros(4, np.int16), np.zeros((4, 1), np.float32), np.full(4, 2000, np.float32)):
        with pytest.raises(AssertionError):
            Audio(wrong, at=0)
    for poison in (np.nan, np.inf):
        with pytest.raises(MediaError, match="sample 7 holds NaN or infinity"):
            Audio(np.array([0, poison], np.float32), at=7)
    Image(np.zeros((1, 1, 3), np.uint8), at=0)
    for shape, kind in (((4, 4), np.uint8), ((4, 4, 4), np.uint8), ((0, 4, 3), np.uint8), ((4, 4, 3), np.float32)):
        with pytest.raises(AssertionError):
            Image(np.zeros(shape, kind), at=0)


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


# sound


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000, 96000])
def test_a_tone_keeps_its_pitch_level_and_length(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(rate), rate)
    samples = read_audio(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and len(samples) == RATE
    hertz, level = strongest(samples)
    assert abs(hertz - 440) < 2
    assert abs(level - 0.5) < 0.002


def test_above_8_kHz_nothing_is_folded_back(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(48000, hertz=11000), 48000)
    assert np.abs(read_audio(tmp_path / "a.wav")[1600:-1600]).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "subtype", "error"),
    [
        ("a.wav", "PCM_U8", 1 / 120),
        ("a.wav", "PCM_16", 1 / 32000),
        ("a.wav", "PCM_24", 1e-6),
        ("a.wav", "PCM_32", 1e-6),
        ("a.wav", "FLOAT", 0),
        ("a.wav", "DOUBLE", 0),
        ("a.wav", "ALAW", 0.03),
        ("a.wav", "ULAW", 0.03),
        ("a.flac", "PCM_16", 1 / 32000),
        ("a.flac", "PCM_24", 1e-6),
        ("a.aiff", "PCM_16", 1 / 32000),
    ],
)
def test_every_depth_is_read_at_the_same_level(tmp_path, name, subtype, error):
    soundfile.write(tmp_path / name, tone(RATE), RATE, subtype=subtype)
    assert np.abs(read_audio(tmp_path / name) - tone(RATE)).max() <= error


@pytest.mark.parametrize(("name", "subtype"), [("a.ogg", "VORBIS"), ("a.ogg", "OPUS"), ("a.mp3", "MPEG_LAYER_III")])
def test_lossy_files_are_read(tmp_path, name, subtype):
    soundfile.write(tmp_path / name, tone(48000, 2), 48000, subtype=subtype)
    samples = read_audio(tmp_path / name)
    assert abs(len(samples) - 2 * RATE) < RATE / 10
    hertz, level = strongest(samples)
    assert abs(hertz - 440) < 2 and abs(level - 0.5) < 0.01


def test_channels_are_averaged(tmp_path):
    left, right = tone(RATE), noise(RATE)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


def test_the_content_counts_not_the_name(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    (tmp_path / "a.wav").rename(tmp_path / "a.raw")
    assert len(read_audio(tmp_path / "a.raw")) == RATE


def test_overshoot_is_clipped_and_never_normalised(tmp_path):
    samples = np.array([0.001, -1.5, 1.5, 0.25], np.float32)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    assert read_audio(tmp_path / "a.wav").tolist() == np.clip(samples, -1, 1).tolist()
    square = np.sign(tone(44100, hertz=1000)).astype(np.float32)  # full scale before resampling, above it after
    soundfile.write(tmp_path / "b.wav", square, 44100)
    assert np.abs(read_audio(tmp_path / "b.wav")).max() == 1


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_sound_that_is_not_numbers_is_refused(tmp_path, poison):
    samples = tone(RATE, 10)
    samples[-5] = poison
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"bad\.wav holds NaN or infinite samples$"):
        read_audio(tmp_path / "bad.wav")


def test_sound_in_another_unit_is_refused(tmp_path):
    soundfile.write(tmp_path / "int16.wav", tone(RATE) * 32767, RATE, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"int16\.wav holds float samples of ±\d+\.?\d* where full scale is ±1$"):
        read_audio(tmp_path / "int16.wav")


def test_a_rate_that_no_microphone_has_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(RATE), 4000)
    with pytest.raises(MediaError, match=r"a\.wav has 4,000 samples a second; 8,000 to 192,000 are read"):
        read_audio(tmp_path / "a.wav")


def test_sound_longer_than_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 10)
    soundfile.write(tmp_path / "a.wav", np.zeros(10 * RATE), RATE)
    assert len(read_audio(tmp_path / "a.wav")) == 10 * RATE
    soundfile.write(tmp_path / "b.wav", np.zeros(10 * RATE + 1), RATE)
    with pytest.raises(MediaError, match=r"b\.wav is longer than 10 seconds"):
        read_audio(tmp_path / "b.wav")


@pytest.mark.parametrize("read", [read_audio, read_picture, read_video])
def test_what_is_not_a_file_with_content_is_refused(tmp_path, read):
    with pytest.raises(MediaError, match=r"none\.x cannot be read: No such file or directory$"):
        read(tmp_path / "none.x")
    with pytest.raises(MediaError, match="is not a file$"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.x")
    with pytest.raises(MediaError, match=r"pipe\.x is not a file$"):
        read(tmp_path / "pipe.x")
    (tmp_path / "empty.x").touch()
    with pytest.raises(MediaError, match=r"empty\.x is empty$"):
        read(str(tmp_path / "empty.x"))


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.raw", "a.txt"])
def test_text_is_no_sound(tmp_path, name):
    (tmp_path / name).write_text("hello\nworld\n" * 100)
    with pytest.raises(MediaError, match=rf"{name} is not a sound file that can be read: Format not recognised$"):
        read_audio(tmp_path / name)


def test_a_file_with_no_sound_in_it_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    with pytest.raises(MediaError, match=r"a\.wav holds no sound$"):
        read_audio(tmp_path / "a.wav")


def test_a_cut_wav_is_what_is_left_of_it_and_nothing_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "half.wav").write_bytes(data[: 44 + RATE])
    assert len(read_audio(tmp_path / "half.wav")) == RATE // 2
    for length in (1, 20, 44):
        (tmp_path / "cut.wav").write_bytes(data[:length])
        with pytest.raises(MediaError, match=r"cut\.wav (holds no sound|is not a sound file)"):
            read_audio(tmp_path / "cut.wav")


def test_a_cut_flac_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(RATE), RATE)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"cut\.flac is not a sound file that can be read"):
        read_audio(tmp_path / "cut.flac")


# sound as if live


class Clock:
    def __init__(self):
        self.now = 1000.0
        self.slept = []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def played(samples, clock, real_time, work=0.0):
    async def consume():
        frames = []
        async for frame in play(samples, real_time=real_time, clock=clock, sleep=clock.sleep):
            frames.append((clock.now - 1000.0, frame))
            clock.now += work
        return frames

    return asyncio.run(consume())


def test_in_real_time_a_frame_comes_when_its_last_sample_would_have(tmp_path):
    samples = noise(RATE + 1)
    frames = played(samples, Clock(), real_time=True)
    assert [frame.at for _, frame in frames] == [FRAME * i for i in range(26)]
    np.testing.assert_allclose([when for when, _ in frames], [0.04 * (i + 1) for i in range(26)])
    whole = np.concatenate([frame.samples for _, frame in frames])
    assert (whole[: RATE + 1] == samples).all() and (whole[RATE + 1 :] == 0).all()


def test_a_slow_consumer_is_not_made_later(tmp_path):
    clock = Clock()
    frames = played(noise(RATE), clock, real_time=True, work=0.03)
    np.testing.assert_allclose([when for when, _ in frames], [0.04 * (i + 1) for i in range(25)])
    late = played(noise(RATE), Clock(), real_time=True, work=0.05)
    np.testing.assert_allclose([when for when, _ in late], [0.04 + 0.05 * i for i in range(25)])


def test_at_once_no_time_passes_but_others_get_their_turn():
    clock = Clock()
    assert len(played(noise(RATE), clock, real_time=False)) == 25
    assert clock.slept == [0.0] * 25


# pictures


def halves(left=RED, right=BLUE, height=40, width=80):
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2], picture[:, width // 2 :] = left, right
    return picture


def encoded(suffix, picture, *parameters):
    channels = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, channels[picture.shape[2]])
    ok, data = cv2.imencode(suffix, picture, list(parameters))
    assert ok
    return data.tobytes()


def chunk(kind, body, length=None):
    return struct.pack(">I", len(body) if length is None else length) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *more):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def exif(orientation):
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0) + b"\0" * 4


def with_exif(suffix, picture, orientation):
    if suffix == ".jpg":
        data, body = encoded(suffix, picture), b"Exif\0\0" + exif(orientation)
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    data = encoded(suffix, picture, *([cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []))
    if suffix == ".png":
        return data[:33] + chunk(b"eXIf", exif(orientation)) + data[33:]
    body = data[12:]  # a simple WebP wrapped in an extended one
    size = (picture.shape[1] - 1).to_bytes(3, "little") + (picture.shape[0] - 1).to_bytes(3, "little")
    flags = 8 | (16 if picture.shape[2] == 4 else 0)
    body = b"VP8X" + struct.pack("<II", 10, flags) + size + body + b"EXIF" + struct.pack("<I", 26) + exif(orientation)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def assert_near(pixel, colour):
    assert np.abs(np.asarray(pixel, int) - colour).max() <= 6, (pixel, colour)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_is_rgb(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(encoded(suffix, halves()))
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.dtype == np.uint8 and picture.shape == (40, 80, 3) and picture.flags.c_contiguous
    assert_near(picture[20, 10], RED)
    assert_near(picture[20, 70], BLUE)


@pytest.mark.parametrize(
    ("suffix", "alpha"), [(".jpg", False), (".png", False), (".png", True), (".webp", False), (".webp", True)]
)
def test_a_picture_is_upright(suffix, alpha):
    stored = halves()
    stored[:20, :40] = GREEN  # so that turning and mirroring differ
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }
    for orientation, expected in upright.items():
        written = np.dstack([stored, np.full((40, 80), 255, np.uint8)]) if alpha else stored
        picture = decode_picture(with_exif(suffix, written, orientation), "a")
        assert picture.shape == expected.shape
        for y, x in ((0.1, 0.1), (0.1, 0.9), (0.9, 0.1), (0.9, 0.9)):
            at = int(y * picture.shape[0]), int(x * picture.shape[1])
            assert_near(picture[at], expected[at])


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_transparency_shows_white(suffix):
    picture = np.dstack([halves(), np.full((40, 80), 255, np.uint8)])
    picture[:20, :, 3] = 0
    picture[20:30, :, 3] = 128
    seen = decode_picture(encoded(suffix, picture, *([cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else [])), "a")
    assert seen.shape == (40, 80, 3)
    for y, left, right in ((5, WHITE, WHITE), (25, (255, 127, 127), (127, 127, 255)), (35, RED, BLUE)):
        assert seen[y, 10].tolist() == list(left)
        assert seen[y, 70].tolist() == list(right)


def test_a_palette_with_a_transparent_colour_shows_white():
    header = struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0)
    body = [chunk(b"PLTE", bytes(RED + BLUE)), chunk(b"tRNS", b"\xff\0"), chunk(b"IDAT", zlib.compress(b"\0\0\x01"))]
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(body) + chunk(b"IEND", b"")
    assert decode_picture(data, "a").tolist() == [[list(RED), list(WHITE)]]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_grey_becomes_rgb(suffix):
    grey = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 16, axis=0)
    picture = decode_picture(encoded(suffix, grey), "a")
    assert picture.shape == (16, 64, 3)
    assert (picture == picture[..., :1]).all()
    assert np.abs(picture[..., 0].astype(int) - grey).max() <= 6


def test_sixteen_bits_keep_the_upper_eight():
    deep = np.random.default_rng(0).integers(0, 65536, (9, 9), dtype=np.uint16)
    assert (decode_picture(encoded(".png", deep), "a") == (deep >> 8)[..., None]).all()
    deep = np.dstack([deep, deep, deep, np.full_like(deep, 65535)])
    assert (decode_picture(encoded(".png", deep), "a") == deep[..., :3] >> 8).all()


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_of_an_animation_the_first_frame_is_seen(suffix):
    animation = cv2.Animation()
    animation.frames = [np.full((20, 30, 3), level, np.uint8) for level in (10, 200)]
    animation.durations = np.array([100, 100])
    ok, data = cv2.imencodeanimation(suffix, animation)
    assert ok
    assert_near(decode_picture(data.tobytes(), "a")[10, 10], (10, 10, 10))


@pytest.fixture
def no_decoding(monkeypatch):
    def decoded(*arguments):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(cv2, "imdecode", decoded)
    monkeypatch.setattr(cv2, "imdecodeWithMetadata", decoded)


def forged_jpeg():
    data = bytearray(encoded(".jpg", halves()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 16000, 16000)
    return bytes(data)


def forged_webp():
    data = bytearray(with_exif(".webp", halves(), 1))
    data[24:30] = (15999).to_bytes(3, "little") * 2
    return bytes(data)


@pytest.mark.parametrize("bomb", [png(16000, 16000), forged_jpeg(), forged_webp()], ids=["png", "jpeg", "webp"])
def test_too_many_pixels_are_refused_before_decoding(bomb, no_decoding):
    with pytest.raises(MediaError, match=r"^bomb has 16,000×16,000 pixels, more than 16,777,216$"):
        decode_picture(bomb, "bomb")


def test_cv2_has_the_same_limit(tmp_path):
    """A second fence, should a decoder find another size than the header that was read here. It stands only where
    streams.files comes before the first import of cv2, hence a fresh interpreter."""
    (tmp_path / "bomb.png").write_bytes(png(16000, 16000))
    code = "import sys, streams.files, cv2; cv2.imread(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "bomb.png")], capture_output=True, text=True, cwd=ROOT)
    assert "CV_IO_MAX_IMAGE_PIXELS" in run.stderr, run.stderr


@pytest.mark.parametrize("kind", [b"IDAT", b"tEXt", b"eXIf", b"zzzz", b"IEND"])
def test_a_png_chunk_that_claims_gigabytes_is_refused_before_decoding(kind, no_decoding):
    # cv2 5.0 allocates and clears what the chunk claims: 4 GB and 9 s for 3 kB
    with pytest.raises(MediaError, match="^bomb is damaged or cut short$"):
        decode_picture(png(80, 64, chunk(kind, b"", length=0xF0000000)), "bomb")


def test_a_jpeg_of_endless_scans_is_refused_before_decoding(no_decoding):
    data = encoded(".jpg", halves(), cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(MediaError, match="^bomb is a JPEG of more than 64 scans$"):
        decode_picture(data[:-2] + scan * 60 + data[-2:], "bomb")


def test_too_many_bytes_are_refused_without_reading_them_all(tmp_path, no_decoding):
    with open(tmp_path / "big.png", "wb") as file:
        file.write(png(10, 10))
        file.truncate(files.PICTURE_BYTES + 1)
    with pytest.raises(MediaError, match=r"big\.png has more than 33,554,432 bytes$"):
        read_picture(tmp_path / "big.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_cut_picture_is_refused_wherever_it_is_cut(suffix):
    picture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8), (0, 0), 2)
    data = encoded(suffix, picture)
    for length in [*range(1, 40), *(len(data) * i // 20 for i in range(1, 20)), len(data) - 2, len(data) - 1]:
        with pytest.raises(MediaError, match=r"^a (is damaged or cut short|is not a PNG, JPEG or WebP picture)$"):
            decode_picture(data[:length], "a")


def test_bytes_after_the_picture_do_no_harm():
    for suffix in (".png", ".jpg"):
        assert_near(decode_picture(encoded(suffix, halves()) + b"\0" * 100, "a")[20, 10], RED)


@pytest.mark.parametrize("data", [b"hello\nworld\n" * 50, b"GIF89a" + b"\0" * 50, b"BM" + b"\0" * 50, b"x", b""])
def test_other_bytes_are_no_picture(tmp_path, data, no_decoding):
    with pytest.raises(MediaError, match=r"^a\.png is not a PNG, JPEG or WebP picture$"):
        decode_picture(data, "a.png")


# video


COUNT, FPS = 100, 25


def numbered(index, height=48):
    """A frame that tells its index in eight black or white stripes, which no codec blurs into another number."""
    stripes = [255 * (index >> bit & 1) for bit in range(8)]
    return np.repeat(np.array(stripes, np.uint8), 8)[None, :, None].repeat(height, axis=0).repeat(3, axis=2)


def write_video(path, frames, code="MJPG"):
    height, width = frames[0].shape[:2]
    video = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*code), FPS, (width, height))
    if not video.isOpened():
        pytest.skip(f"this cv2 cannot write {code}")
    for frame in frames:
        video.write(frame[..., ::-1].copy())
    video.release()
    return path


def write_numbered(path, code="MJPG", count=COUNT):
    return write_video(path, [numbered(index) for index in range(count)], code)


def indices(video):
    return [sum((picture[24, 8 * bit + 4, 1] > 127) << bit for bit in range(8)) for _, picture in video]


@pytest.mark.parametrize(("name", "code"), [("a.avi", "MJPG"), ("a.mp4", "mp4v"), ("a.mkv", "MJPG"), ("a.webm", "VP80")])
def test_frames_are_spread_over_the_video_with_their_times(tmp_path, name, code):
    video = read_video(write_numbered(tmp_path / name, code))
    expected = [i * COUNT // 32 for i in range(32)]
    assert indices(video) == expected
    assert [seconds for seconds, _ in video] == [index / FPS for index in expected]
    assert all(picture.dtype == np.uint8 and picture.shape == (48, 64, 3) for _, picture in video)


def test_a_video_is_rgb(tmp_path):
    _, picture = read_video(write_video(tmp_path / "a.avi", [halves()] * 3))[1]
    assert np.abs(picture[20, 10].astype(int) - RED).max() < 20
    assert np.abs(picture[20, 70].astype(int) - BLUE).max() < 20


def test_a_short_video_gives_every_frame(tmp_path):
    video = read_video(write_numbered(tmp_path / "a.avi", count=5))
    assert indices(video) == [0, 1, 2, 3, 4]
    assert indices(read_video(tmp_path / "a.avi", frames=2)) == [0, 2]
    assert indices(read_video(tmp_path / "a.avi", frames=1)) == [0]


@pytest.mark.parametrize("claimed", [0, 40, 1000])
def test_the_count_in_the_header_is_not_believed(tmp_path, claimed, monkeypatch):
    write_numbered(tmp_path / "a.avi")

    class Liar:
        def __init__(self, *arguments):
            self.capture = VideoCapture(*arguments)

        def get(self, what):
            return claimed if what == cv2.CAP_PROP_FRAME_COUNT else self.capture.get(what)

        def __getattr__(self, name):
            return getattr(self.capture, name)

    VideoCapture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Liar)
    assert indices(read_video(tmp_path / "a.avi")) == [i * COUNT // 32 for i in range(32)]


def test_a_cut_video_is_what_is_left_of_it(tmp_path):
    data = write_numbered(tmp_path / "a.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    seen = indices(read_video(tmp_path / "cut.mkv"))
    left = indices(read_video(tmp_path / "cut.mkv", frames=1000))
    assert 20 < len(left) < 80 and left == list(range(len(left)))
    assert seen == sorted({i * len(left) // 32 for i in range(32)})


def test_a_video_is_upright(tmp_path):
    path = write_video(tmp_path / "a.mp4", [halves(height=48, width=64)] * 10, "mp4v")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the track's matrix: a quarter turn clockwise
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    picture = read_video(path)[0][1]
    assert picture.shape == (64, 48, 3)
    assert np.abs(picture[8, 24].astype(int) - RED).max() < 20
    assert np.abs(picture[56, 24].astype(int) - BLUE).max() < 20


def test_a_video_longer_than_the_bound_is_refused(tmp_path, monkeypatch):
    write_numbered(tmp_path / "a.avi")
    monkeypatch.setattr(files, "LONGEST", 4)
    assert len(read_video(tmp_path / "a.avi")) == 32
    monkeypatch.setattr(files, "LONGEST", 3)
    with pytest.raises(MediaError, match=r"a\.avi is longer than 3 seconds$"):
        read_video(tmp_path / "a.avi")


def test_a_video_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    write_numbered(tmp_path / "a.avi")
    monkeypatch.setattr(files, "PICTURE_PIXELS", 1000)
    with pytest.raises(MediaError, match=r"a\.avi has 64×48 pixels, more than 1,000$"):
        read_video(tmp_path / "a.avi")


@pytest.mark.parametrize("name", ["a.mp4", "a.txt"])  # FFmpeg plays a .txt as a film of a terminal
@pytest.mark.parametrize("data", [b"hello\nworld\n" * 50, b"GoPro\n" * 50, b"#EXTM3U\n#EXTINF:2,\na.avi\n"])
def test_text_is_no_video(tmp_path, name, data):
    write_numbered(tmp_path / "a.avi")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MediaError, match=rf"{name} is not an MP4, MOV, Matroska, WebM, AVI or MPEG video$"):
        read_video(tmp_path / name)


def test_a_picture_or_sound_is_no_video(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(".png", halves()))
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    for name in ("a.png", "a.wav"):
        with pytest.raises(MediaError, match="is not an MP4"):
            read_video(tmp_path / name)


def test_a_container_without_pictures_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + b"\0\0\0\x08free" * 30)
    with pytest.raises(MediaError, match=r"a\.mp4 is not a video that can be decoded$"):
        read_video(tmp_path / "a.mp4")
