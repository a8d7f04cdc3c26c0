"""Sound and video files, written by the same libraries that phones, browsers and recorders use."""

import asyncio
import os
import struct
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import soundfile
from av.stream import Disposition

from streams import media_files
from streams.frames import FRAME, RATE, MediaError
from streams.media_files import play, read_audio, read_soundtrack, read_video
from streams.pictures import read_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def tone(rate, seconds=1.0, hertz=440, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def strongest(samples):
    """(hertz, level) of the loudest sine, the ends left out: there a resampler rings."""
    samples = samples[1600:-1600]
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * RATE / len(samples), np.sqrt(2 * np.mean(samples**2))


def noise(count, peak=0.9):
    return np.random.default_rng(0).uniform(-peak, peak, count).astype(np.float32)


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
    monkeypatch.setattr(media_files, "LONGEST", 10)
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


@pytest.mark.parametrize(("name", "subtype"), [("a.flac", None), ("a.mp3", None), ("a.ogg", "OPUS"), ("a.aiff", None)])
def test_so_is_any_other_file_that_a_recorder_did_not_finish(tmp_path, name, subtype):
    soundfile.write(tmp_path / name, tone(RATE, 10), RATE, subtype=subtype)
    data = (tmp_path / name).read_bytes()
    (tmp_path / f"cut-{name}").write_bytes(data[: len(data) // 2])
    samples = read_audio(tmp_path / f"cut-{name}")
    assert 3.5 * RATE < len(samples) < 6.5 * RATE
    assert abs(strongest(samples)[0] - 440) < 2


@pytest.mark.parametrize("length", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("riff", [0, 36, 0xFFFFFFFF])
def test_a_wav_whose_length_was_never_filled_in_is_read_to_its_end(tmp_path, length, riff):
    """A recorder that was killed leaves 0, a pipe 0xFFFFFFFF or about half of it."""
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"data")
    data[4:8], data[at + 4 : at + 8] = struct.pack("<I", riff), struct.pack("<I", length)
    (tmp_path / "a.wav").write_bytes(data)
    assert np.abs(read_audio(tmp_path / "a.wav") - tone(RATE)).max() <= 1 / 32000


def test_so_is_an_rf64(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE, format="RF64")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"ds64") + 8
    data[at : at + 24] = bytes(24)
    (tmp_path / "a.wav").write_bytes(data)
    assert np.abs(read_audio(tmp_path / "a.wav")[:RATE] - tone(RATE)).max() <= 1 / 32000


def id3(claimed, padding):
    """A tag that says it has `claimed` bytes of padding, and has `padding`."""
    frame = b"TIT2" + struct.pack(">I", 5) + b"\0\0" + b"\0Test"
    size = len(frame) + claimed
    return b"ID3\x03\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + frame + b"\0" * padding


@pytest.mark.parametrize("before", [id3(0, 0), id3(2048, 2048), id3(0, 3000), id3(100, 100_000), id3(0, 400_000), b"\0" * 5000])
def test_an_mp3_with_padding_before_its_first_frame_is_read(tmp_path, before):
    soundfile.write(tmp_path / "a.mp3", tone(48000, 2), 48000)
    (tmp_path / "a.mp3").write_bytes(before + (tmp_path / "a.mp3").read_bytes())
    samples = read_audio(tmp_path / "a.mp3")
    assert abs(len(samples) - 2 * RATE) < RATE / 10
    assert abs(strongest(samples)[0] - 440) < 2 and abs(strongest(samples)[1] - 0.5) < 0.02


@pytest.mark.parametrize("lost", [1, 100, 777, 1000, 4000])
def test_an_mp3_that_begins_in_the_middle_of_a_frame_is_read(tmp_path, lost):
    """A piece of a stream, or a file cut by its size."""
    soundfile.write(tmp_path / "a.mp3", tone(48000, 4), 48000)
    (tmp_path / "a.mp3").write_bytes((tmp_path / "a.mp3").read_bytes()[lost:])
    samples = read_audio(tmp_path / "a.mp3")
    assert 3 * RATE < len(samples) < 4.1 * RATE
    assert abs(strongest(samples)[0] - 440) < 2 and abs(strongest(samples)[1] - 0.5) < 0.05


@pytest.mark.parametrize(
    ("left", "right", "level"), [(1, -1, 0.5), (1, -0.9, 0.5), (-0.8, 1, 0.5), (1, 0, 0.25), (1, 0.5, 0.375)]
)
def test_channels_that_cancel_each_other_are_heard_by_the_louder_one(tmp_path, left, right, level):
    sound = tone(44100, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left * sound, right * sound], axis=1), 44100)
    samples = read_audio(tmp_path / "a.wav")
    hertz, heard = strongest(samples)
    assert len(samples) == 2 * RATE and abs(hertz - 440) < 2 and abs(heard - level) < 0.005


def test_silence_in_two_channels_is_silence(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((RATE, 2)), RATE)
    assert not read_audio(tmp_path / "a.wav").any()


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


# recordings of phones and browsers

SOUND = {
    "m4a": ("aac", "mp4"),
    "mp4": ("aac", "mp4"),
    "mov": ("aac", "mov"),
    "aac": ("aac", "adts"),
    "3gp": ("libopencore_amrnb", "3gp"),
    "webm": ("libopus", "webm"),
    "mkv": ("flac", "matroska"),
    "avi": ("libmp3lame", "avi"),
    "ts": ("aac", "mpegts"),
}
PICTURES = {"mp4": "libx264", "mov": "libx264", "webm": "libvpx", "mkv": "libx264", "avi": "mpeg4", "ts": "libx264"}


def record(path, sound=None, pictures=(), rate=48000, sound_at=0.0, turned=0):
    """A file as FFmpeg writes it. `sound`: float32 [n] or [channels, n], or pieces of it with their seconds; `pictures`: uint8
    [H, W, 3] with their seconds."""
    codec, container = SOUND[path.suffix[1:]]
    with av.open(str(path), "w", format=container) as out:
        if pictures:
            height, width = pictures[0][1].shape[:2]
            video = out.add_stream(PICTURES[path.suffix[1:]], rate=1000, width=width, height=height, pix_fmt="yuv420p")
            video.codec_context.time_base = Fraction(1, 1000)
            video.codec_context.max_b_frames = 0
        if sound is not None:
            pieces = sound if isinstance(sound, list) else [(sound_at, sound)]
            channels = np.atleast_2d(pieces[0][1])
            audio = out.add_stream(codec, rate=rate, layout={1: "mono", 2: "stereo"}[len(channels)])
        for at, picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(1000 * at), Fraction(1, 1000)
            out.mux(video.encode(frame))
        if pictures:
            out.mux(video.encode(None))
        if sound is not None:
            for at, piece in pieces:
                frame = av.AudioFrame.from_ndarray(np.atleast_2d(piece).astype(np.float32), "fltp", audio.layout.name)
                frame.pts, frame.sample_rate, frame.time_base = round(at * rate), rate, Fraction(1, rate)
                out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
    return path


@pytest.mark.parametrize("kind", SOUND)
def test_what_phones_and_browsers_record_is_read(tmp_path, kind):
    rate = 8000 if kind == "3gp" else 48000
    samples = read_audio(record(tmp_path / f"a.{kind}", tone(rate, 3), rate=rate))
    assert abs(len(samples) - 3 * RATE) < RATE / 10
    hertz, level = strongest(samples)
    assert abs(hertz - 440) < 2 and abs(level - 0.5) < 0.1


def test_a_pause_in_the_times_of_a_recording_is_silence(tmp_path):
    """A browser writes nothing while a recording is paused, nor, in some codecs, while nobody speaks."""
    path = record(tmp_path / "a.webm", [(0.0, tone(48000, 1)), (3.0, tone(48000, 1))])
    samples = read_audio(path)
    assert abs(len(samples) - 4 * RATE) < RATE / 20
    loud = np.abs(samples[: 4 * RATE // 400 * 400]).reshape(-1, 400).max(axis=1) > 0.2
    assert loud[5:35].all() and not loud[45:115].any() and loud[125:155].all()


def test_the_picture_on_the_cover_of_a_song_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as out:
        audio, cover = out.add_stream("aac", rate=48000, layout="mono"), out.add_stream("mjpeg", rate=1, width=64, height=48)
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(halves(), format="rgb24")))
        out.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(tone(48000, 2)[None], "fltp", "mono")
        frame.sample_rate = 48000
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    assert abs(len(read_audio(tmp_path / "a.m4a")) - 2 * RATE) < RATE / 10
    with pytest.raises(MediaError, match=r"a\.m4a is not a video that can be decoded$"):
        read_video(tmp_path / "a.m4a")


# video


COUNT, FPS = 100, 25


def halves(left=RED, right=BLUE, height=48, width=64):
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2], picture[:, width // 2 :] = left, right
    return picture


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
    _, picture = read_video(write_video(tmp_path / "a.avi", [halves(height=40, width=80)] * 3))[1]
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
    monkeypatch.setattr(media_files, "LONGEST", 4)
    assert len(read_video(tmp_path / "a.avi")) == 32
    monkeypatch.setattr(media_files, "LONGEST", 3)
    with pytest.raises(MediaError, match=r"a\.avi is longer than 3 seconds$"):
        read_video(tmp_path / "a.avi")


def test_a_video_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    write_numbered(tmp_path / "a.avi")
    monkeypatch.setattr(media_files, "PICTURE_PIXELS", 1000)
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
    cv2.imwrite(str(tmp_path / "a.png"), halves())
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    for name in ("a.png", "a.wav"):
        with pytest.raises(MediaError, match="is not an MP4"):
            read_video(tmp_path / name)


def test_a_container_without_pictures_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + b"\0\0\0\x08free" * 30)
    with pytest.raises(MediaError, match=r"a\.mp4 is not a video that can be decoded$"):
        read_video(tmp_path / "a.mp4")


def flash(begin, end, sound_at=0.0):
    """A film of 6 s in which a light and a tone go on and off together: pictures of 10 a second, and sound from `sound_at` on."""
    at = np.arange(round((6 - sound_at) * 48000)) / 48000 + sound_at
    sound = np.where((begin <= at) & (at < end), 0.5 * np.sin(2 * np.pi * 440 * at), 0).astype(np.float32)
    return [(n / 10, np.full((48, 64, 3), 255 * (begin <= n / 10 < end), np.uint8)) for n in range(60)], sound


@pytest.mark.parametrize(
    ("kind", "sound_at"), [*((kind, 0.0) for kind in PICTURES), *((kind, 1.5) for kind in PICTURES if kind != "avi")]
)
def test_the_sound_of_a_film_is_in_step_with_its_pictures(tmp_path, kind, sound_at):
    pictures, sound = flash(2.0, 4.0, sound_at)
    path = record(tmp_path / f"a.{kind}", sound, pictures, sound_at=sound_at)
    light = [at for at, picture in read_video(path, 60) if picture.mean() > 127]
    samples = read_soundtrack(path)
    loud = np.flatnonzero(np.abs(samples) > 0.2) / RATE
    assert abs(len(samples) / RATE - 6) < 0.1
    assert abs(light[0] - 2.0) < 0.03 and abs(light[-1] - 3.9) < 0.03
    assert abs(loud[0] - light[0]) < 0.02 and abs(loud[-1] - light[-1] - 0.1) < 0.02


def test_sound_before_the_first_picture_is_left_out(tmp_path):
    pictures, sound = flash(2.0, 4.0)
    path = record(tmp_path / "a.mkv", sound, pictures[10:])
    assert next(at for at, picture in read_video(path, 50) if picture.mean() > 127) == 1.0
    samples = read_soundtrack(path)
    assert abs(np.flatnonzero(np.abs(samples) > 0.2)[0] / RATE - 1.0) < 0.02 and abs(len(samples) / RATE - 5) < 0.1


def test_a_film_without_sound_has_none(tmp_path):
    path = record(tmp_path / "a.mp4", None, flash(2.0, 4.0)[0])
    assert len(read_soundtrack(path)) == 0
    with pytest.raises(MediaError, match=r"a\.mp4 holds no sound$"):
        read_audio(path)


@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv"])
def test_pictures_at_uneven_times_have_their_true_times(tmp_path, kind):
    times = [0.0, 0.04, 0.08, 0.5, 2.0, 2.033, 2.066, 7.25, 7.3, 40.0]
    path = record(tmp_path / f"a.{kind}", None, [(at, numbered(n)) for n, at in enumerate(times)])
    video = read_video(path)
    assert indices(video) == list(range(10)) and [seconds for seconds, _ in video] == times


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_film_that_was_taken_with_the_phone_turned_is_upright(tmp_path, turn):
    path = record(tmp_path / "a.mov", tone(48000), [(n / 10, halves()) for n in range(10)])
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    picture, expected = read_video(path)[0][1], np.rot90(halves(), -turn // 90)
    assert picture.shape == expected.shape
    height, width = picture.shape[:2]
    for at in ((height // 5, width // 5), (height // 5, width * 4 // 5), (height * 4 // 5, width // 5)):
        assert np.abs(picture[at].astype(int) - expected[at]).max() < 20


def test_pictures_larger_than_a_model_can_see_are_made_smaller(tmp_path):
    path = record(tmp_path / "a.mp4", None, [(n / 10, halves(height=2160, width=3840)) for n in range(3)])
    _, picture = read_video(path)[0]
    assert picture.shape == (1086, 1930, 3)
    assert np.abs(picture[500, 400].astype(int) - RED).max() < 20 and np.abs(picture[500, 1500].astype(int) - BLUE).max() < 20


@pytest.mark.parametrize("kind", ["webm", "mkv"])
def test_a_film_that_a_browser_did_not_finish_is_what_is_left_of_it(tmp_path, kind):
    pictures, sound = flash(1.0, 2.0)
    grain = np.random.default_rng(0).integers(0, 64, (60, 48, 64, 3), dtype=np.uint8)
    pictures = [(at, picture ^ noise) for (at, picture), noise in zip(pictures, grain, strict=True)]
    data = record(tmp_path / f"a.{kind}", sound, pictures).read_bytes()
    (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) // 2])
    video, samples = read_video(tmp_path / f"cut.{kind}", 60), read_soundtrack(tmp_path / f"cut.{kind}")
    assert 10 < len(video) < 50 and 1 < len(samples) / RATE < 5
