"""attend devices: the microphones, speakers and cameras of this machine, and whether they work."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from agent.talk.door import open_camera
from agent.talk.terminal import meter
from streams import portaudio
from streams.address import display
from streams.frames import FRAME, RATE, MediaError
from streams.portaudio import Device, SoundError
from streams.sound import Microphone, Speaker
from streams.voice import Voice

SECONDS = 3  # how long a microphone is listened to, and a camera waited for
SENTENCE = "This is attend. You should hear me now."


def cameras() -> list[str]:
    """Device files of cameras, which may or may not give pictures. Empty on systems other than Linux."""
    found = sorted(Path("/dev").glob("video*"), key=lambda path: (len(path.name), path.name))
    return [str(path) for path in found] if sys.platform == "linux" else []


def lines(found: Sequence[Device], cameras: Sequence[str]) -> Iterator[str]:
    for kind in ("microphone", "speaker"):
        of_kind = [device for device in found if device.kind == kind]
        if not of_kind:
            yield f"{kind:<12}none"
        taken = portaudio.choose(found, kind) if of_kind else None
        for device in of_kind:
            number = "" if device.server else str(device.index)
            more = [f"{device.rate:,} Hz", f"{device.channels} channel{'s' if device.channels > 1 else ''}"]
            more += ["through the sound server"] if device.server else []
            more += ["takes echo out"] if device.cancels else []
            more += ["the one that is taken"] if device is taken else []
            name = f"{device.server} ({device.name})" if device.server and device.name != device.server else device.name
            yield f"{kind:<12}{number:>3}  {name}: {', '.join(more)}"
    for camera in cameras:
        yield f"{'camera':<12}{camera.removeprefix('/dev/video'):>3}  {camera}"
    if not cameras:
        yield f"{'camera':<12}none on this machine; --camera also takes a video, a picture or an rtsp:// address"


async def check(
    found: Sequence[Device], mic: str | None, speaker: str | None, camera: str | None, voice: Voice | None, out: TextIO
) -> int:
    """Tries each device and prints what came of it. Returns the exit code: 1 if one of them does not work."""
    wrong = 0
    for trial in (
        _listen(found, mic, out),
        _say(found, speaker, voice, out),
        *([_look(camera, out)] if camera is not None else []),
    ):
        try:
            await trial
        except (SoundError, MediaError) as error:
            wrong = 1
            print(f"{'wrong':<12}{error}", file=out, flush=True)
    return wrong


async def _listen(found: Sequence[Device], mic: str | None, out: TextIO) -> None:
    device = portaudio.choose(found, "microphone", mic)
    microphone = Microphone(device, lambda message: print(f"{'note':<12}{message}", file=out, flush=True))
    print(f"{'microphone':<12}{device}: say something", file=out, flush=True)
    await microphone.open()
    loudest, count = 0.0, 0
    try:
        async for frame in microphone.frames():
            level = float(np.sqrt(np.mean(frame * frame)))
            loudest, count = max(loudest, level), count + FRAME
            if out.isatty():
                out.write(f"\r{meter(level)} ")
            if count >= SECONDS * RATE:
                break
    finally:
        await microphone.close()
    out.write("\r" if out.isatty() else "")
    heard = f"{20 * np.log10(loudest):.0f} dB at its loudest" if loudest else "nothing but zeros: it may be muted"
    print(f"{'':<12}heard {heard}, lost sound {microphone.overflows + microphone.dropped} times", file=out, flush=True)


async def _say(found: Sequence[Device], name: str | None, voice: Voice | None, out: TextIO) -> None:
    device = portaudio.choose(found, "speaker", name)
    speaker = Speaker(device)
    await speaker.open()
    print(f'{"speaker":<12}{device}: "{SENTENCE}"' if voice else f"{'speaker':<12}{device}: a tone", file=out, flush=True)
    try:
        rate = voice.rate if voice else RATE
        pcm = await asyncio.to_thread(_spoken, voice) if voice else _tone()
        speaker.play(0, 0, pcm, rate)
        async with asyncio.timeout(2 * SECONDS + len(pcm) / rate):
            while speaker.heard != (0, len(pcm)):
                await asyncio.sleep(FRAME / RATE)
    except TimeoutError as error:
        raise SoundError(f"the speaker {device} takes no sound: choose another with --speaker") from error
    finally:
        await speaker.close()
    print(f"{'':<12}said, {len(pcm) / rate:.1f} s", file=out, flush=True)


def _spoken(voice: Voice) -> np.ndarray:
    with voice.speak(SENTENCE) as stream:
        return np.concatenate([chunk.pcm for chunk in stream])


def _tone() -> np.ndarray:
    tone: np.ndarray = (0.2 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
    return tone


async def _look(source: str, out: TextIO) -> None:
    camera = open_camera(source, lambda message: None)
    try:
        shot = await asyncio.to_thread(camera.newest, SECONDS)
        if shot is None:
            raise MediaError(camera.health.why)
        print(f"{'camera':<12}{display(source)}: a picture of {len(shot.jpeg):,} bytes", file=out, flush=True)
    finally:
        await asyncio.to_thread(camera.close)
