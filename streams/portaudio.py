"""The microphones and speakers of this machine, by PortAudio (sounddevice): which there are, and a stream to one of them.

PortAudio is not thread-safe but for its callbacks, and opening and closing may wait for a sound server: what blocks says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["microphone", "speaker"]

BLOCK = 0.02  # seconds in a callback: a frame of 40 ms is due 20 ms sooner than with blocks of its own length
RATES = (48_000, 44_100, 16_000)  # that are tried where a device refuses its own

BUSY, NO_RATE, NO_CHANNELS = -9985, -9997, -9998  # errors of PortAudio


class SoundError(RuntimeError):
    """A microphone or speaker that cannot be used; the message is one sentence for a person and says what to do."""


# ---- which there are


@dataclass(frozen=True)
class Device:
    """A microphone or speaker. `index` is PortAudio's, `rate` its own sample rate in Hz.

    `server`: its name at a PulseAudio or PipeWire server, where PortAudio itself lists only the server.
    """

    kind: Kind
    index: int
    name: str
    rate: int
    channels: int
    default: bool = False
    server: str | None = None
    cancels: bool = False  # the system's echo canceller runs on it

    def __str__(self) -> str:
        return self.server or self.name


def devices() -> list[Device]:
    """All devices, the default one of each kind first. Blocks. Raises SoundError where there is no PortAudio."""
    portaudio, found = _portaudio(), []
    with _lock:
        _look_again()
        listed, default = portaudio.query_devices(), portaudio.default.device
    server: int | None = None
    for index, raw in enumerate(listed):
        server = index if raw["name"] == "pulse" else server
        for kind, place, count in (("microphone", 0, "max_input_channels"), ("speaker", 1, "max_output_channels")):
            if raw[count]:
                rate = round(raw["default_samplerate"]) or RATES[0]
                found.append(Device(kind, index, raw["name"], rate, raw[count], default[place] == index))  # type: ignore[arg-type]
    if server is not None:
        found += _of_server(server)
    return sorted(found, key=lambda device: not device.default)


def _of_server(index: int) -> Iterator[Device]:
    """What stands behind PortAudio's device "pulse"."""
    if not (pactl := shutil.which("pactl")):
        return
    for kind, what in (("microphone", "sources"), ("speaker", "sinks")):
        try:
            asked = subprocess.run([pactl, "-f", "json", "list", what], capture_output=True, timeout=5, check=True)
            listed = json.loads(asked.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            return  # an old pactl, or no server
        for raw in listed:
            if kind == "microphone" and raw.get("monitor_source"):
                continue  # what a speaker plays
            rate = next((int(word[:-2]) for word in raw["sample_specification"].split() if word.endswith("Hz")), RATES[0])
            cancels = "echo-cancel" in f"{raw['driver']} {raw['name']}".replace("_", "-").lower()
            name = raw.get("description") or raw["name"]
            yield Device(kind, index, name, rate, 1, server=raw["name"], cancels=cancels)  # type: ignore[arg-type]


def choose(found: Iterable[Device], kind: Kind, wanted: str | None = None) -> Device:
    """The device that `wanted` names by index or part of its name; else one with echo cancellation, else the default one.

    Raises SoundError where there is none.
    """
    of_kind = [device for device in found if device.kind == kind]
    option = "--mic" if kind == "microphone" else "--speaker"
    if not of_kind:
        raise SoundError(
            f"there is no {kind}: plug one in; where a desktop's sound server has it: sudo apt-get install libasound2-plugins"
        )
    if wanted is None:
        return next((device for device in of_kind if device.cancels), of_kind[0])
    exact = [
        d for d in of_kind if wanted in (d.name, d.server) or (wanted.isdecimal() and d.index == int(wanted) and not d.server)
    ]
    part = [device for device in of_kind if wanted.lower() in f"{device.name} {device.server or ''}".lower()]
    if not (exact or part):
        there = ", ".join(str(device) for device in of_kind)
        raise SoundError(f"there is no {kind} {wanted!r}; {option} takes a number or part of a name of these: {there}")
    return (exact or part)[0]


# ---- PortAudio

_lock = threading.Lock()  # PortAudio is not thread-safe but for its callbacks
_open: set[DeviceStream] = set()


def _portaudio() -> Any:
    """Imported late: it looks for its library, which a server has no use for."""
    try:
        import sounddevice
    except OSError as error:
        raise SoundError("PortAudio is not installed; on Debian and Ubuntu: sudo apt-get install libportaudio2") from error
    return sounddevice


def _look_again() -> None:
    """PortAudio lists devices once, as it begins. It can only begin anew while nothing is open. Under the lock."""
    portaudio = _portaudio()
    if not _open:
        portaudio._terminate()
        portaudio._initialize()


@contextmanager
def _server(device: Device) -> Iterator[None]:
    """A sound server's clients learn from the environment which of its devices is meant, as they connect."""
    name = "PULSE_SOURCE" if device.kind == "microphone" else "PULSE_SINK"
    before = os.environ.get(name)
    if device.server:
        os.environ[name] = device.server
    try:
        yield
    finally:
        if device.server:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


@dataclass(eq=False)
class DeviceStream:
    """An open stream of PortAudio, in int16 at `rate` Hz. `over` is set once it has ended, by itself or by `close`."""

    stream: Any
    rate: int
    channels: int
    over: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Blocks."""
        with _lock:
            if self in _open:
                _open.discard(self)
                self.stream.abort(ignore_errors=True)
                self.stream.close(ignore_errors=True)


def open_stream(device: Device, callback: Callable[[Any, int, Any, Any], None]) -> DeviceStream:
    """Opens a device at the first rate and channel count that it accepts, and starts it. Blocks. Raises SoundError.

    `callback` is PortAudio's (buffer, frames, times, status), called in its own thread for each BLOCK.
    """
    portaudio, error = _portaudio(), None
    make = portaudio.RawInputStream if device.kind == "microphone" else portaudio.RawOutputStream
    with _lock, _server(device):
        _look_again()
        for channels in dict.fromkeys((1, min(2, device.channels))):
            for rate in dict.fromkeys((device.rate, *RATES)):
                over = threading.Event()
                try:
                    stream = make(
                        samplerate=rate,
                        blocksize=round(BLOCK * rate),
                        device=device.index,
                        channels=channels,
                        dtype="int16",
                        latency="low",
                        callback=callback,
                        finished_callback=over.set,
                    )
                except portaudio.PortAudioError as refused:
                    error = refused
                    if _code(refused) not in (NO_RATE, NO_CHANNELS):
                        raise SoundError(_why(device, refused)) from refused
                    continue
                opened = DeviceStream(stream, rate, channels, over)
                _open.add(opened)
                try:
                    stream.start()
                except portaudio.PortAudioError as refused:
                    _open.discard(opened)
                    stream.close(ignore_errors=True)
                    raise SoundError(_why(device, refused)) from refused
                return opened
    assert error is not None
    raise SoundError(_why(device, error)) from error


def _code(error: Exception) -> int | None:
    return error.args[1] if len(error.args) > 1 and isinstance(error.args[1], int) else None


def _why(device: Device, error: Exception) -> str:
    option, which = ("--mic" if device.kind == "microphone" else "--speaker"), f"the {device.kind} {device}"
    if _code(error) == BUSY:
        return f"{which} is busy: close the program that holds it, or choose another with {option}"
    if _code(error) in (NO_RATE, NO_CHANNELS):
        return f"{which} takes none of the rates {', '.join(f'{r:,}' for r in RATES)}; choose another with {option}"
    text = str(error.args[0]).rpartition(": ")[2] if error.args else type(error).__name__
    return f"{which} cannot be opened ({text}): see that it is plugged in, or choose another with {option}"
