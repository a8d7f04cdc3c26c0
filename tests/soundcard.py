"""A virtual sound card: PulseAudio's pipe as a microphone and its null sink as a speaker, each on a server of its own, so that
either can be unplugged. PortAudio finds them through ALSA as "mic" and "spk"."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from streams.frames import FRAME, RATE

MISSING = [name for name in ("pulseaudio", "parec") if not shutil.which(name)]


class Server:
    """One PulseAudio with these modules."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self.folder, self.socket, self._modules = folder, folder / "socket", modules
        folder.mkdir(mode=0o700)
        self.start()

    def start(self) -> None:
        own = {name: str(self.folder) for name in ("XDG_RUNTIME_DIR", "HOME", "PULSE_RUNTIME_PATH")}
        loads = [part for module in self._modules for part in ("-L", module)]
        native = f"module-native-protocol-unix auth-anonymous=1 socket={self.socket}"
        command = ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", "--disable-shm=yes", "--log-level=error"]
        self._process = subprocess.Popen(
            [*command, "-L", native, *loads], env={**os.environ, **own}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 20
        while subprocess.run(["pactl", f"--server=unix:{self.socket}", "info"], capture_output=True, check=False).returncode:
            assert time.monotonic() < until and self._process.poll() is None, "PulseAudio does not start"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for left in (self.socket, self.folder / "pipe"):  # it will not begin with these
            left.unlink(missing_ok=True)


class Card:
    """`say` puts sound into the microphone, which is silent else; `heard` is all that the speaker played, from `begun` on."""

    def __init__(self, folder: Path) -> None:
        pipe = folder / "mic" / "pipe"
        self.mic = Server(folder / "mic", f"module-pipe-source source_name=mic file={pipe} format=s16le rate={RATE} channels=1")
        self.spk = Server(folder / "spk", "module-null-sink sink_name=spk rate=48000 channels=2")
        config = folder / "asound.conf"
        config.write_text(
            "\n".join(
                f'pcm.{name} {{ type pulse server "unix:{server.socket}" hint {{ show on description "{name}" }} }}'
                for name, server in (("mic", self.mic), ("spk", self.spk))
            )
        )
        self.environment = {"ALSA_CONFIG_PATH": f"/usr/share/alsa/alsa.conf:{config}"}
        self._pipe, self._over = pipe, threading.Event()
        self._speech: deque[np.ndarray] = deque()
        self.echo: Callable[[], np.ndarray] | None = None  # a frame of what comes back from the speaker
        self.spoken: list[float] = []  # when each frame was put in
        self.played: list[tuple[float, np.ndarray]] = []  # when it came, frames of 10 ms
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._feed, self._listen)]
        for thread in self._threads:
            thread.start()

    def say(self, pcm: np.ndarray) -> None:
        self._speech.extend(np.pad(pcm, (0, -len(pcm) % FRAME)).reshape(-1, FRAME))

    def said_at(self) -> float:
        """When the sound that `say` was just given began to go in."""
        return self.spoken[-1] + FRAME / RATE if self.spoken else time.monotonic()

    @property
    def silent(self) -> bool:
        return not self._speech

    def _feed(self) -> None:
        rng, due = np.random.default_rng(0), time.monotonic()
        while not self._over.is_set():
            frame = 1e-4 * rng.standard_normal(FRAME)
            if self._speech:
                frame = frame + self._speech.popleft()
            if self.echo:
                frame = frame + self.echo()
            try:
                with_pipe = os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
                fcntl.fcntl(with_pipe, fcntl.F_SETPIPE_SZ, 4096)  # else two seconds of the past lie in it, as nobody records yet
                os.write(with_pipe, np.rint(frame.clip(-1, 1) * 32767).astype("<i2").tobytes())
                os.close(with_pipe)
            except OSError:
                pass  # nobody reads, or the server is gone
            self.spoken.append(time.monotonic())
            due = max(due + FRAME / RATE, time.monotonic() - 1)
            self._over.wait(max(0.0, due - time.monotonic()))

    def _listen(self) -> None:
        while not self._over.is_set():
            command = ["parec", f"--server=unix:{self.spk.socket}", "--device=spk.monitor", "--format=s16le", f"--rate={RATE}"]
            self._parec: Any = subprocess.Popen(
                [*command, "--channels=1", "--raw", "--latency-msec=10"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            while data := self._parec.stdout.read(320):
                self.played.append((time.monotonic(), np.frombuffer(data, "<i2").astype(np.float32) / 32768))
            self._parec.stdout.close()
            self._parec.wait()
            self._over.wait(0.1)

    def recent(self, count: int) -> np.ndarray:
        """The newest samples that were played."""
        pieces = [pcm for _, pcm in self.played[-(count // 160 + 1) :]] or [np.zeros(count, np.float32)]
        return np.pad(np.concatenate(pieces), (count, 0))[-count:]

    def loud(self, after: float = 0.0) -> list[float]:
        """When each 10 ms of sound were played."""
        return [at for at, pcm in list(self.played) if at > after and np.abs(pcm).max(initial=0) > 0.01]

    def close(self) -> None:
        self._over.set()
        for server in (self.mic, self.spk):
            server.kill()
        self._parec.kill()
        for thread in self._threads:
            thread.join(5)
