"""A real mosquitto on a free port, and its own clients."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SOON = 60.0  # seconds; the machine may be busy


async def until(true: Callable[[], Any], what: str = "it") -> Any:
    """Waits for a condition, not for the clock."""
    deadline = time.monotonic() + SOON
    while not (found := true()):
        assert time.monotonic() < deadline, f"{what} has not happened"
        await asyncio.sleep(0.01)
    return found


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


def certified(folder: Path, name: str = "ours", names: str = "DNS:localhost,IP:127.0.0.1") -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("the system package openssl is missing")
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    made += ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    return certificate, key


class Mosquitto:
    def __init__(self, folder: Path, more: str = "") -> None:
        self.program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if not self.program or not shutil.which("mosquitto_rr"):
            pytest.skip("the system packages mosquitto and mosquitto-clients are missing")
        self.port, self.secure, self.folder = free_port(), free_port(), folder
        lines = [f"listener {self.port} 127.0.0.1", "persistence true", f"persistence_location {folder}/", "set_tcp_nodelay true"]
        access = more or "allow_anonymous true"
        (folder / "mosquitto.conf").write_text("\n".join([*lines, "user root", access, ""]))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.program
        with (self.folder / "mosquitto.log").open("ab") as log:
            self.process = subprocess.Popen([self.program, "-c", str(self.folder / "mosquitto.conf")], stdout=log, stderr=log)
        deadline = time.monotonic() + SOON
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "mosquitto.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                threading.Event().wait(0.02)
        raise AssertionError("mosquitto does not listen")

    def listen(self, address: str) -> None:
        """From now on it also listens at this address of this machine. It begins anew."""
        self.stop()
        with (self.folder / "mosquitto.conf").open("a") as config:
            config.write(f"listener {self.port} {address}\n")
        self.start()

    def encrypt(self, certificate: Path, key: Path) -> None:
        """From now on it also listens at `secure`, over TLS. It begins anew."""
        self.stop()
        with (self.folder / "mosquitto.conf").open("a") as config:
            config.write(f"listener {self.secure} 127.0.0.1\ncertfile {certificate}\nkeyfile {key}\n")
        self.start()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(how)
            self.process.wait(SOON)
            self.process = None

    def pub(self, topic: str, payload: object, *more: str) -> None:
        text = payload if isinstance(payload, str | bytes) else json.dumps(payload)
        body = text.encode() if isinstance(text, str) else text
        command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(self.port), "-q", "1", "-t", topic, "-s", *more]
        subprocess.run(command, input=body, check=True, timeout=SOON)

    async def request(self, topic: str, payload: object, version: str, reply: str) -> dict[str, Any]:
        """As mosquitto_rr asks: with a response topic where the version has one."""
        body = payload if isinstance(payload, str) else json.dumps(payload)
        command = ["mosquitto_rr", "-h", "127.0.0.1", "-p", str(self.port), "-V", version, "-q", "1"]
        more = ["-t", topic, "-e", reply, "-m", body, "-W", str(int(SOON))]
        asking = await asyncio.create_subprocess_exec(*command, *more, stdout=-1)
        return json.loads((await asking.communicate())[0])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Got:
    topic: str
    retained: bool
    payload: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.payload)


class Sub:
    """mosquitto_sub, and all that it was given."""

    def __init__(self, broker: Mosquitto, *topics: str) -> None:
        self.got: list[Got] = []
        ready = f"ready/{id(self)}"
        named = [part for topic in (*topics, ready) for part in ("-t", topic)]
        command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(broker.port), "-q", "1", "-F", "%t %r %x", *named]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._ready = threading.Event()
        self._topic = ready
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + SOON
        while not self._ready.wait(0.05):
            assert time.monotonic() < deadline
            broker.pub(ready, "x")

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if not line.endswith("\n"):  # it was closed in the middle of a line
                return
            topic, retained, payload = line.rstrip("\n").split(" ")
            if topic == self._topic:
                self._ready.set()
            else:
                self.got.append(Got(topic, retained == "1", bytes.fromhex(payload)))

    def on(self, end: str) -> list[Got]:
        return [got for got in self.got if got.topic.endswith(end)]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(SOON)
        assert self._process.stdout
        self._process.stdout.close()
