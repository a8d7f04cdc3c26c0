"""A noisy neighbour: answers to one client while another puts load on the server, one kind of load at a time, over real sockets.

The other client adds thousands of history items, imports a long history, shows the largest pictures one after the other, or
floods the server with pings. Each answer to the first client is timed from its question to its last token. The server is a
process of its own, whose memory is read before and after.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from agent.bench.figures import Figure, line
from agent.bench.load_test import Spread
from agent.bench.waits import Say
from streams.opencv import cv2

ITEMS, WORDS, PICTURES, PINGS = 5000, 30_000, 12, 200_000
SIZES = ((4000, 6000), (3500, 4700))  # pixels of the pictures: the first size that the server accepts is used
QUESTION = "how many squares are there"
PAUSE = 0.1  # seconds between an answer and the next question
LEAST = 40  # answers per kind of load
Burden = Callable[[ClientConnection], Coroutine[Any, Any, None]]


@asynccontextmanager
async def served(model: str) -> AsyncIterator[tuple[str, int]]:
    """Runs a server as a process; gives its address and process id."""
    command = sys.executable, "-m", "agent", "serve", "--model", model, "--port", "0", "--voice", "none"
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    try:
        assert server.stdout
        yield (await server.stdout.readline()).decode().strip(), server.pid
    finally:
        server.terminate()
        await server.wait()


async def measure(model: str, say: Say) -> dict[str, Any]:
    """Measures a server with this model, started for it."""
    async with served(model) as (url, process):
        return await burdens(url, process, say, KINDS)


async def burdens(url: str, process: int, say: Say, kinds: Mapping[str, Burden]) -> dict[str, Any]:
    """Passes the lines of a table to `say`, and returns all figures. `process`: the server's id."""
    figures: list[Spread | Figure] = []
    say(f"{'an answer, from its question to its end':44}{'median':>14}{'p95':>12}{'p99':>12}")
    async with _connected(url) as client:
        for _ in range(LEAST):
            await _answer(client)
        before = _resident(process)
        for name, burden in {"nobody else is there": _none, **kinds}.items():
            figures.append(Spread.of(name, name, await _answers_during(url, client, burden)))
            say(f"{figures[-1]}  memory {(_resident(process) - before) / 2**20:+,.0f} MiB")
        await asyncio.sleep(1)
        for _ in range(LEAST):
            await _answer(client)
    figures.append(kept := Figure("kept", "memory that the server has kept", "MiB", (_resident(process) - before) / 2**20))
    say(line(kept))
    return {figure.key: asdict(figure) for figure in figures}


async def _answers_during(url: str, client: ClientConnection, burden: Burden) -> list[float]:
    """Milliseconds of each answer, until the load is over and there were enough answers."""
    found: list[float] = []
    async with _connected(url) as other:
        work = asyncio.create_task(burden(other))
        while not work.done() or (burden is _none and len(found) < LEAST):
            found.append(1000 * await _answer(client))
            await asyncio.sleep(PAUSE)
        await work
    return found


async def _answer(connection: ClientConnection) -> float:
    begin = perf_counter()
    await connection.send(_item("user", "input_text", QUESTION))
    await connection.send(json.dumps({"type": "response.create", "response": {"output_modalities": ["text"]}}))
    done = await _until(connection, "response.done")
    assert done["response"]["status"] == "completed", done
    return perf_counter() - begin


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[ClientConnection]:
    while True:
        connection = await connect(url, compression=None, max_size=None, proxy=None, ping_interval=None)
        first = json.loads(await connection.recv())
        if first["type"] == "session.created":
            break
        await asyncio.sleep(0.1)  # the model is still being loaded, or no row is free yet
    try:
        yield connection
    finally:
        await connection.close()


# ---- the kinds of load


async def _none(connection: ClientConnection) -> None:
    pass


async def _items(connection: ClientConnection) -> None:
    await _history(connection, [f"the red circle is on the left of the blue square, number {n}" for n in range(ITEMS)])


async def _long(connection: ClientConnection) -> None:
    words = [f"word{n % 997}" for n in range(WORDS)]
    await _history(connection, [" ".join(words[at : at + 400]) for at in range(0, WORDS, 400)])
    await connection.send(json.dumps({"type": "response.create", "response": {"output_modalities": ["text"]}}))
    await _until(connection, "response.done")


async def _history(connection: ClientConnection, texts: list[str]) -> None:
    async def send() -> None:
        for n, text in enumerate(texts):
            await connection.send(_item(*(("user", "input_text"), ("assistant", "output_text"))[n % 2], text))

    sending = asyncio.create_task(send())
    for _ in texts:
        await _until(connection, "conversation.item.done")
    await sending


async def _pictures(connection: ClientConnection) -> None:
    for size in SIZES:
        item = await asyncio.to_thread(_picture, *size)
        await connection.send(item)
        if (await _until(connection, "conversation.item.done", "error"))["type"] != "error":
            break
    for _ in range(PICTURES):
        await connection.send(item)
        await _until(connection, "conversation.item.done", "error")
    await connection.send(json.dumps({"type": "response.create", "response": {"output_modalities": ["text"]}}))
    await _until(connection, "response.done")


async def _pings(connection: ClientConnection) -> None:
    async def read() -> None:
        with suppress(ConnectionClosed):
            async for _ in connection:
                pass

    reading, transport = asyncio.create_task(read()), connection.transport
    frames = b"\x89\x80\0\0\0\0" * 1000
    with suppress(TimeoutError, ConnectionClosed):
        async with asyncio.timeout(10):
            for _ in range(PINGS // 1000):
                transport.write(frames)
                while transport.get_write_buffer_size() > 1 << 16:
                    await asyncio.sleep(0.01)
    transport.abort()
    await reading


KINDS: dict[str, Burden] = {
    f"another adds {ITEMS:,} items": _items,
    f"another imports {WORDS:,} words": _long,
    "another shows large pictures": _pictures,
    "another floods with pings": _pings,
}


def _item(role: str, kind: str, text: str) -> str:
    item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}
    return json.dumps({"type": "conversation.item.create", "item": item})


def _picture(height: int, width: int) -> str:
    noise = np.random.default_rng(0).integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8)
    file = cv2.imencode(".jpg", cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))[1].tobytes()
    part = {"type": "input_image", "image_url": "data:image/jpeg;base64," + base64.b64encode(file).decode()}
    return json.dumps({"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [part]}})


async def _until(connection: ClientConnection, *types: str) -> dict[str, Any]:
    starts = tuple(f'{{"type": "{kind}"' for kind in types)
    while not (message := await connection.recv()).startswith(starts):  # type: ignore[arg-type]
        pass
    event: dict[str, Any] = json.loads(message)
    return event


def _resident(process: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
