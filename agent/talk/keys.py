"""The terminal's input and signals: single keys, Ctrl-C, and standard error kept free of what C libraries print."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from streams.frames import MediaError

try:
    import termios
    import tty
except ImportError:  # not a Unix: single keys cannot be read
    termios = None  # type: ignore[assignment]


@contextmanager
def pressed(keys: bytes, tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` on the running loop for each press of one of `keys`. Raises MediaError where standard input is no terminal."""
    loop, file = asyncio.get_running_loop(), sys.stdin.fileno()
    if termios is None or not os.isatty(file):
        raise MediaError("--push-to-talk needs a terminal whose keys it can hear")
    _before[:] = termios.tcgetattr(file)

    def read() -> None:
        for key in os.read(file, 64):
            if key in keys:
                tell()

    tty.setcbreak(file)  # Ctrl-C stays what it is
    loop.add_reader(file, read)
    try:
        yield
    finally:
        loop.remove_reader(file)
        termios.tcsetattr(file, termios.TCSADRAIN, _before)  # type: ignore[arg-type]
        _before.clear()


@contextmanager
def interrupted(stop: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`, which ends the conversation cleanly; the second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Future[None]] = []

    def interrupt() -> None:
        if stopping:
            _leave()
        stopping.append(asyncio.ensure_future(stop()))

    names = (signal.SIGINT, signal.SIGTERM)
    for name in names:
        loop.add_signal_handler(name, interrupt)
    try:
        yield
    finally:
        for name in names:
            loop.remove_signal_handler(name)


_before: list[object] = []  # of the terminal, while keys are read one by one


def _leave() -> None:
    if _before:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, _before)  # type: ignore[arg-type]
    os._exit(130)


@contextmanager
def own_terminal() -> Iterator[TextIO]:
    """Standard output. What C libraries write to standard error meanwhile is discarded: PortAudio and ALSA print many lines there
    about what is reported here in one sentence. Python's own standard error stays."""
    errors, real = sys.stderr, os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        with open(os.dup(real), "w", buffering=1) as sys.stderr:
            yield sys.stdout
    finally:
        sys.stderr = errors
        os.dup2(real, 2)
        os.close(real)
