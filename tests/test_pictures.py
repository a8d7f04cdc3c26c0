"""Pictures from files: upright, within their limits, and what is refused before it is decoded."""

import io
import pathlib
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from streams import pictures
from streams.pictures import MediaError, decode_picture, read_picture

ROOT = pathlib.Path(__file__).parent.parent
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


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
    with pytest.raises(MediaError, match=r"^bomb has 16,000×16,000 pixels, more than 67,108,864$"):
        decode_picture(bomb, "bomb")


def test_cv2_has_the_same_limit(tmp_path):
    """A second fence, should a decoder find another size than the header that was read here. It stands only where
    streams.pictures comes before the first import of cv2, hence a fresh interpreter."""
    (tmp_path / "bomb.png").write_bytes(png(16000, 16000))
    code = "import sys, streams.pictures, cv2; cv2.imread(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "bomb.png")], capture_output=True, text=True, cwd=ROOT)
    assert "CV_IO_MAX_IMAGE_PIXELS" in run.stderr, run.stderr


@pytest.mark.parametrize("kind", [b"IDAT", b"tEXt", b"eXIf", b"zzzz", b"IEND"])
def test_a_png_chunk_that_claims_gigabytes_is_refused_before_decoding(kind, no_decoding):
    # cv2 5.0 allocates and clears what the chunk claims: 4 GB and 9 s for 3 kB
    with pytest.raises(MediaError, match="^bomb is damaged or cut short$"):
        decode_picture(png(80, 64, chunk(kind, b"", length=0xF0000000)), "bomb")


@pytest.mark.parametrize("progressive", [0, 1])
def test_a_photo_with_a_film_behind_it_is_a_photo(progressive):
    """As phones write motion photos: the film holds the bytes of a scan's marker a hundred times."""
    photo = encoded(".jpg", halves(), cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    film = b"\0\0\0\x18ftypmp42" + np.random.default_rng(0).bytes(8 << 20) + b"\xff\xda\xff\xc0" * 100
    assert (decode_picture(photo + film, "a") == decode_picture(photo, "a")).all()


def test_what_is_inside_of_a_segment_is_no_scan():
    """A thumbnail or a depth map in a segment of its own."""
    body, photo = b"MPF\0" + b"\xff\xda" * 3_000, encoded(".jpg", halves())
    segment = b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body
    assert (decode_picture(photo[:2] + segment + photo[2:], "a") == decode_picture(photo, "a")).all()


def photo(width, height, suffix=".jpg", *parameters, alpha=False):
    picture = halves(height=height, width=width)
    picture[: height // 2, : width // 2] = GREEN
    return encoded(suffix, np.dstack([picture, np.full((height, width), 255, np.uint8)]) if alpha else picture, *parameters)


@pytest.mark.parametrize(
    ("size", "suffix", "parameters", "alpha"),
    [
        ((5712, 4284), ".jpg", (), False),
        ((8160, 6120), ".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), False),
        ((9248, 6936), ".jpg", (), False),
        ((5712, 4284), ".png", (cv2.IMWRITE_PNG_COMPRESSION, 1), False),
        ((6016, 3384), ".png", (cv2.IMWRITE_PNG_COMPRESSION, 1), True),
        ((5712, 4284), ".webp", (cv2.IMWRITE_WEBP_QUALITY, 50), False),
    ],
)
def test_photos_as_large_as_phones_take_them_are_made_smaller(size, suffix, parameters, alpha):
    width, height = size
    seen = decode_picture(photo(width, height, suffix, *parameters, alpha=alpha), "a")
    h, w = seen.shape[:2]
    assert h * w <= pictures.DECODED_PIXELS and h * w > pictures.DECODED_PIXELS // 4
    assert abs(w / h - width / height) < 0.001 and seen.dtype == np.uint8 and seen.flags.c_contiguous
    for y, x, colour in ((0.1, 0.1, GREEN), (0.9, 0.1, RED), (0.1, 0.9, BLUE), (0.9, 0.9, BLUE)):
        assert_near(seen[int(y * h), int(x * w)], colour)


def test_a_large_photo_is_upright():
    data, body = photo(5712, 4284), b"Exif\0\0" + exif(6)
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    seen = decode_picture(data, "a")
    assert seen.shape == (2856, 2142, 3)
    assert_near(seen[100, 2000], GREEN)
    assert_near(seen[2700, 1000], BLUE)


def test_the_larger_a_jpeg_the_fewer_scans_it_may_have(no_decoding):
    data = photo(9248, 6936, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(MediaError, match="^bomb is a JPEG of more than 16 scans$"):
        decode_picture(data[:-2] + scan * 20 + data[-2:], "bomb")


def test_a_jpeg_of_endless_scans_is_refused_before_decoding(no_decoding):
    data = encoded(".jpg", halves(), cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(MediaError, match="^bomb is a JPEG of more than 64 scans$"):
        decode_picture(data[:-2] + scan * 60 + data[-2:], "bomb")


def test_too_many_bytes_are_refused_without_reading_them_all(tmp_path, no_decoding):
    with open(tmp_path / "big.png", "wb") as file:
        file.write(png(10, 10))
        file.truncate(pictures.PICTURE_BYTES + 1)
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


# photos of phones


def phone_photo(kind, picture, orientation=1, **how):
    """HEIC as libheif writes it, AVIF as libavif does; both keep the orientation in the container, and HEIC in its EXIF too."""
    image, tags, file = Image.fromarray(picture), Image.Exif(), io.BytesIO()
    tags[0x112] = orientation
    if kind == "HEIF":
        pillow_heif.from_pillow(image).save(file, exif=tags.tobytes(), **how)
    else:
        image.save(file, kind, exif=tags, **how)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "name"), [("HEIF", "a.heic"), ("AVIF", "a.jpg")])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_heic_or_avif_photo_is_read_and_upright(tmp_path, kind, name, orientation):
    stored = halves(height=120, width=200)
    stored[:60, :100] = GREEN
    (tmp_path / name).write_bytes(phone_photo(kind, stored, orientation, quality=95))
    seen, expected = (
        read_picture(tmp_path / name),
        {1: stored, 3: np.rot90(stored, 2), 6: np.rot90(stored, -1), 8: np.rot90(stored)},
    )
    assert seen.shape == expected[orientation].shape
    for y, x in ((0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8)):
        at = int(y * seen.shape[0]), int(x * seen.shape[1])
        assert np.abs(seen[at].astype(int) - expected[orientation][at]).max() <= 12


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_transparency_of_a_heic_or_avif_shows_white(tmp_path, kind):
    picture = np.dstack([halves(height=120, width=200), np.full((120, 200), 255, np.uint8)])
    picture[:60, :, 3] = 0
    (tmp_path / "a").write_bytes(phone_photo(kind, picture, quality=95))
    seen = read_picture(tmp_path / "a")
    for at, colour in (((20, 50), WHITE), ((100, 50), RED), ((100, 150), BLUE)):
        assert np.abs(seen[at].astype(int) - colour).max() <= 12


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_a_heic_or_avif_that_is_cut_or_too_large_is_refused(tmp_path, kind, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    data = phone_photo(kind, picture)
    for length in (30, 100, len(data) // 2, len(data) - 20):
        (tmp_path / "a").write_bytes(data[:length])
        with pytest.raises(MediaError, match="a is damaged or cut short$"):
            read_picture(tmp_path / "a")
    monkeypatch.setattr(pictures, "PICTURE_PIXELS", 10_000)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(MediaError, match="a has 200×120 pixels, more than 10,000$"):
        read_picture(tmp_path / "a")


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_what_comes_over_a_network_is_told_how_to_convert(kind):
    with pytest.raises(MediaError, match="^it is a HEIC or AVIF photo, .*export or share it as a JPEG$"):
        decode_picture(phone_photo(kind, halves(height=120, width=200)), "it")
