"""`attend serve`: the Realtime server and the page."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import logging
import os
import signal
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import get_args

from agent.checkpoint import LENGTH
from agent.commands import options
from agent.commands.options import Commands
from agent.conversation_config import ConversationConfig
from agent.engine import Engine, total_rows
from agent.view import Policy
from model.vad import Vad
from streams.voice import open_voice
from web import server
from web.access import Access, NotServed
from web.pages import PATH


def add(commands: Commands) -> None:
    serving = commands.add_parser("serve", help="OpenAI Realtime over a websocket", description=server.__doc__)
    options.model(serving)
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1); any other needs a token")
    serving.add_argument("--port", type=int, default=8765, metavar="N", help="default 8765")
    serving.add_argument("--rows", type=options.rows, default=4, metavar="N|auto", help="conversations at once (default 4)")
    serving.add_argument("--length", type=options.positive, metavar="N", help="positions of each (default 8192; auto: what fits)")
    serving.add_argument("--voice", default="auto", help="auto, none, or a voice's name")
    serving.add_argument("--policy", default="transcripts", choices=get_args(Policy), help="what a row keeps of finished turns")
    serving.add_argument("--token-file", type=Path, metavar="F", help="a file with the token that clients must have")
    serving.add_argument("--allow-origin", action="append", metavar="O", help="a page elsewhere that may connect; repeatable")
    serving.add_argument("--tls-cert", type=Path, metavar="F", help="certificate chain (PEM)")
    serving.add_argument("--tls-key", type=Path, metavar="F", help="its key (PEM)")
    serving.add_argument("--log-content", action="store_true", help="log what is said too")
    serving.add_argument("--log-json", action="store_true", help="log lines of JSON")
    serving.set_defaults(run=_serve)


def _return_large_buffers() -> None:
    """Makes malloc return buffers of 4 MB and more to the system when they are freed. glibc raises that limit to 32 MB by itself,
    and kept 200 MB after a client that had sent a dozen photos of 24 megapixels was gone."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD


def _serve(given: argparse.Namespace) -> int:
    _return_large_buffers()
    token, tls = options.token(given.token_file) if given.token_file else None, None
    if given.tls_cert:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(given.tls_cert, given.tls_key)
        except OSError as error:
            raise NotServed(f"the certificate {given.tls_cert} cannot be read: {error}") from error
    access = Access(given.host, token, tuple(given.allow_origin or ()))
    voice, vad = open_voice(given.voice), Vad()
    logging.basicConfig(format="%(message)s" if given.log_json else "%(asctime)s %(message)s", level=logging.INFO)
    server_options = server.Options(
        access,
        given.port,
        given.model,
        given.voice,
        ConversationConfig(policy=given.policy),
        tls,
        given.log_content,
        given.log_json,
    )

    async def listen() -> bool:
        """Serves until a signal. Returns whether the model was loaded by then."""
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        running = server.Server(None, vad, voice, server_options)

        def on_progress(part: float) -> None:
            running.loaded = part

        def load() -> Engine:
            rows, length = (given.rows, given.length or LENGTH) if given.rows else options.planned(given)
            return Engine(options.load(given, on_progress, rows=total_rows(rows), length=length), rows, length)

        with ExitStack() as stack:
            async with running.open() as port:
                print(f"ws{'s' if tls else ''}://{given.host}:{port}{PATH}", flush=True)
                print(f"the page: http{'s' if tls else ''}://{given.host}:{port}/", flush=True)
                work = ThreadPoolExecutor(1, "loading")
                loading = asyncio.get_running_loop().run_in_executor(work, load)
                stopped = asyncio.create_task(stop.wait())
                await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
                if loading.done():
                    engine = stack.enter_context(await loading)
                    gc.freeze()  # these stay: looking through them took 100 ms, which was audible
                    running.enter(engine)
                    failed = asyncio.create_task(engine.stopped())
                    await asyncio.wait((failed, stopped), return_when=asyncio.FIRST_COMPLETED)
                    if failed.done():
                        raise failed.result()
                await stopped
        return loading.done()

    if not asyncio.run(listen()):
        os._exit(0)  # does not wait until 22 GiB are loaded; a thread that is in torch when Python ends would abort the process
    return 0
