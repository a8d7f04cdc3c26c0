"""Devices by name, sound that is placed to the sample, the hand-over between threads, and echo that is told from a voice."""

from __future__ import annotations

import asyncio
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from streams import portaudio
from streams.channel import Channel
from streams.echo import LEARN, EchoCanceller
from streams.frames import FRAME, RATE
from streams.portaudio import Device, SoundError
from streams.sound import Speaker

MIC = Device("microphone", 0, "USB Audio: hw:1,0", 48_000, 1, default=True)
PULSE = Device("microphone", 3, "Echo cancelled", 44_100, 1, server="mic.echo-cancel", cancels=True)
OTHER = Device("microphone", 10, "Webcam", 16_000, 1)


def test_the_system_s_own_echo_cancelling_device_is_preferred_and_names_are_parts():
    assert portaudio.choose([MIC, OTHER, PULSE], "microphone") is PULSE
    assert portaudio.choose([MIC, OTHER], "microphone") is MIC
    assert portaudio.choose([MIC, OTHER, PULSE], "microphone", "WEB") is OTHER
    assert portaudio.choose([MIC, OTHER, PULSE], "microphone", "10") is OTHER
    assert portaudio.choose([MIC, OTHER, PULSE], "microphone", "mic.echo-cancel") is PULSE


@pytest.mark.parametrize(
    ("found", "kind", "wanted", "complaint"),
    [
        ([MIC], "speaker", None, "there is no speaker: plug one in"),
        (
            [MIC, OTHER],
            "microphone",
            "banana",
            "there is no microphone 'banana'; --mic takes .* of these: USB Audio: hw:1,0, Webcam",
        ),
    ],
)
def test_a_device_that_is_not_there_is_told_with_the_remedy(found, kind, wanted, complaint):
    with pytest.raises(SoundError, match=complaint):
        portaudio.choose(found, kind, wanted)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (-9985, "the microphone Webcam is busy: close the program that holds it, or choose another with --mic"),
        (-9997, "takes none of the rates 48,000, 44,100, 16,000; choose another with --mic"),
        (-9996, "cannot be opened .*see that it is plugged in"),
    ],
)
def test_what_portaudio_refuses_is_told_with_the_remedy(monkeypatch, code, complaint):
    class PortAudioError(Exception):
        pass

    def refuse(**_):
        raise PortAudioError("Error opening RawInputStream: it says no", code)

    library = SimpleNamespace(RawInputStream=refuse, PortAudioError=PortAudioError, _terminate=int, _initialize=int)
    monkeypatch.setattr(portaudio, "_portaudio", lambda: library)
    with pytest.raises(SoundError, match=complaint):
        portaudio.open_stream(OTHER, lambda *_: None)


def test_a_missing_portaudio_is_told_with_its_package(monkeypatch):
    class Missing:
        def find_spec(self, name, *_):
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(SoundError, match="sudo apt-get install libportaudio2"):
        portaudio.devices()


async def test_a_channel_keeps_the_newest_and_counts_what_it_drops():
    channel: Channel[int] = Channel(3)
    thread = threading.Thread(target=lambda: [channel.put(n) for n in range(5)])
    thread.start()
    thread.join()
    assert [await channel.get() for _ in range(3)] == [2, 3, 4] and channel.dropped == 2
    waiting = asyncio.create_task(channel.get())
    await asyncio.sleep(0)
    threading.Thread(target=channel.put, args=(7,)).start()
    assert await asyncio.wait_for(waiting, 30) == 7


class Driver:
    """What PortAudio does, a block at a time: it plays 100 ms after it has taken."""

    def __init__(self, speaker: Speaker, rate: int) -> None:
        self.speaker, self.rate, self.played = speaker, rate, np.zeros(0, np.float32)
        self.time, self.latency = 0.0, 0.1
        speaker._stream = portaudio.DeviceStream(self, rate, 1)

    def take(self, blocks: int) -> None:
        for _ in range(blocks):
            data = bytearray(2 * self.rate // 50)
            times = SimpleNamespace(currentTime=self.time, outputBufferDacTime=self.time + self.latency)
            self.speaker._give(data, self.rate // 50, times, SimpleNamespace(output_underflow=False))
            self.played = np.append(self.played, np.frombuffer(data, "<i2").astype(np.float32) / 32767)
            self.time += 0.02


@pytest.mark.parametrize("rate", [48_000, 44_100, 16_000])
def test_what_was_heard_is_what_has_sounded_and_in_the_end_all_of_it(rate):
    speaker = Speaker(Device("speaker", 0, "it", rate, 2))
    driver = Driver(speaker, rate)
    pcm = (0.5 * np.sin(np.arange(22_050) / 20)).astype(np.float32)
    for at in range(0, 22_050, 2_205):
        speaker.play(4, at, pcm[at : at + 2_205], 22_050)
    driver.take(25)
    assert speaker.heard is not None and speaker.heard[0] == 4
    assert abs(speaker.heard[1] / 22_050 - 0.4) < 0.025, "100 ms of the 500 that were taken have not sounded"
    driver.take(40)
    assert speaker.heard == (4, 22_050) and speaker.idle
    assert abs(np.count_nonzero(np.abs(driver.played) > 1e-3) / rate - 1) < 0.02


def test_what_is_cleared_fades_at_once_and_what_follows_is_placed_anew():
    speaker = Speaker(Device("speaker", 0, "it", 48_000, 2))
    driver = Driver(speaker, 48_000)
    speaker.play(4, 0, np.full(24_000, 0.5, np.float32), 24_000)
    driver.take(10)
    speaker.clear()
    driver.take(10)
    assert not driver.played[48_000 // 5 + 240 :].any()
    heard = speaker.heard
    assert heard is not None and abs(heard[1] / 24_000 - 0.2) < 0.01
    speaker.play(4, 2_400, np.full(2_400, 0.5, np.float32), 24_000)
    driver.take(20)
    assert speaker.heard == (4, 4_800)


def test_without_a_device_what_is_given_counts_as_heard():
    speaker = Speaker(Device("speaker", 0, "it", 48_000, 2))
    speaker.play(4, 100, np.zeros(50, np.float32), 24_000)
    assert speaker.heard == (4, 150)


def noise(level: float, seed: int) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(FRAME)).astype(np.float32)


def test_only_what_is_louder_than_ever_came_back_passes_while_the_speaker_speaks():
    echo = EchoCanceller(cancel=False)
    frame = noise(0.01, 0)
    echo.far(np.zeros(FRAME, np.float32), RATE)
    assert echo.clean(frame) is frame, "nobody speaks"
    for n in range(3 * LEARN):
        far = noise(0.1, n)
        echo.far(far, RATE)
        assert not echo.clean(0.3 * far).any(), "its own voice"
    echo.far(noise(0.1, 1), RATE)
    assert echo.clean(noise(0.15, 2)).any(), "somebody speaks up"
