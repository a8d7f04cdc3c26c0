"""One port: OpenAI Realtime over a websocket, the page, health and metrics. A door: what is said is said in `Session`s, one
for each client (web/client.py); who finds no row waits in line or is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import mimetypes
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CONTENT_TYPE_LATEST
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from agent.engine import Engine, EngineStopped
from agent.session import Session
from agent.settings import Settings
from agent.suggestions import Suggestions
from model.cache import NoRow
from model.vad import Vad
from streams.voice import Voice
from web.access import COOKIE, Access, NotServed
from web.client import CLOSING, Client, hang_up
from web.metrics import Metrics
from web.protocol import EXTENSIONS
from web.socket import Connection

PATH = "/v1/realtime"
SUGGESTIONS = "/suggestions.json"
STATIC = Path(__file__).parent / "static"
MESSAGE = 52 << 20  # bytes of one: whatever OpenAI takes, 15 MiB of sound or 50 MB in all, is read, and refused in words
FRAMES = 2  # messages that are read ahead
AHEAD = 10.0  # seconds of sound that a client has before it has played them: as OpenAI, which sends it as it is made
WAITING = 32  # sockets beyond the conversations: pages, and those that are not through the handshake
MOVING = 0.2  # seconds after which those who wait look whether something has moved
SAFE = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

log = logging.getLogger("attend.serve")
quiet = logging.getLogger("attend.websockets")  # what goes wrong in a handshake is the client's affair
quiet.setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True)
class Options:
    access: Access = field(default_factory=Access)
    port: int = 8765
    model: str = "nano"
    voice: str = "default"  # what it is called
    settings: Settings = field(default_factory=Settings)
    tls: ssl.SSLContext | None = None
    log_content: bool = False
    log_json: bool = False
    handshake: float = 10.0  # seconds that it may take
    ping: float = 20.0  # seconds between two
    stall: float = 45.0  # seconds without an answer to one: half a minute is no reason to hang up
    static: Path = STATIC
    clock: Callable[[], float] = time.monotonic  # by which clients play; a test's runs faster


class Door:
    """It may be open before there is an engine; then `loaded`, from 0 to 1, is what those who wait are told until `enter`."""

    def __init__(self, engine: Engine | None, vad: Vad, voice: Voice | None, options: Options) -> None:
        self.engine: Engine | None = None
        self.vad, self.voice, self.options = vad, voice, options
        self.loaded = 0.0
        self.sessions: set[Session] = set()
        self.metrics = Metrics(self.sessions)
        self.stopping = asyncio.Event()
        self._sockets = 0
        self._handshakes: dict[ServerConnection, None] = {}  # those that are not over, the oldest first
        self._line: list[ServerConnection] = []  # those that wait for a row; bounded by the sockets
        self._files = {**_files(options.static), SUGGESTIONS: (b'{"loading": true}', "application/json")}
        if engine:
            self.enter(engine)

    def enter(self, engine: Engine) -> None:
        """Conversations can begin."""
        self.engine = engine
        self.metrics.watch(engine)
        self._files |= _suggested(engine.loaded.suggestions)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        """The port. At the end conversations are told that the server goes (1012)."""
        o, door = self.options, self

        class Counted(Connection):
            """From the first byte on, so that nobody can open sockets without end. Where there are too many, the oldest goes that
            has not finished its handshake: those that send a header byte a second keep nobody out."""

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                door._sockets += 1
                door._handshakes[self] = None
                if door._sockets > (door.engine.rows if door.engine else 0) + WAITING:
                    door.metrics.refused.labels("sockets").inc()
                    oldest = next(iter(door._handshakes))
                    del door._handshakes[oldest]
                    oldest.transport.abort()

            def connection_lost(self, exc: Exception | None) -> None:
                door._sockets -= 1
                door._handshakes.pop(self, None)
                super().connection_lost(exc)

        try:
            server = await serve(
                self._talk,
                o.access.host,
                o.port,
                create_connection=Counted,
                process_request=self._request,
                select_subprotocol=_subprotocol,
                compression=None,
                max_size=MESSAGE,
                max_queue=FRAMES,
                write_limit=1 << 16,
                ping_interval=o.ping,
                ping_timeout=o.stall,
                open_timeout=o.handshake,
                close_timeout=CLOSING,
                server_header=None,
                logger=quiet,
                ssl=o.tls,
            )
        except OSError as error:
            raise NotServed(f"nobody can listen on {o.access.host} port {o.port}: {error.strerror or error}") from error
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            self.stopping.set()
            server.close(code=1012, reason="the server is going")
            with suppress(TimeoutError):
                async with asyncio.timeout(2 * CLOSING):
                    await server.wait_closed()

    # -- requests

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        self._handshakes.pop(connection, None)
        access, headers = self.options.access, request.headers
        hosts, path = headers.get_all("Host"), urlsplit(request.path).path
        host = hosts[0] if len(hosts) == 1 else None
        if not access.host_known(host):
            return self._refused(HTTPStatus.FORBIDDEN, "host", "this is not the host that was meant")
        if request.method not in ("GET", "HEAD"):
            return self._refused(HTTPStatus.METHOD_NOT_ALLOWED, "method", "GET is all there is")
        if path == "/healthz":
            return _answer(HTTPStatus.OK, b"ok\n")
        if not access.origin_known(headers.get_all("Origin"), host):
            return self._refused(HTTPStatus.FORBIDDEN, "origin", "pages of this origin may not come in")
        if path in (PATH, "/metrics", "/readyz") and not access.let_in(headers):
            return self._refused(HTTPStatus.UNAUTHORIZED, "token", "a token is needed, and this is not it")
        if path == PATH:
            return (
                self._refused(HTTPStatus.SERVICE_UNAVAILABLE, "going", "the server is going") if self.stopping.is_set() else None
            )
        if path == "/readyz":
            engine = self.engine
            state = {"rows": engine.rows, "free": engine.free} if engine else {"loaded": round(self.loaded, 2)}
            ready = engine is not None and engine.free > 0
            body = json.dumps({"ready": ready, **state}).encode()
            return _answer(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, body, "application/json")
        if path == "/metrics":
            return _answer(HTTPStatus.OK, self.metrics.page(), CONTENT_TYPE_LATEST)
        return self._page(request, path)

    def _page(self, request: Request, path: str) -> Response:
        if path == "/" and (key := parse_qs(urlsplit(request.path).query).get("token")):
            if not self.options.access.known(key[0]):
                return self._refused(HTTPStatus.UNAUTHORIZED, "token", "a token is needed, and this is not it")
            cookie = f"{COOKIE}={self.options.access.cookie}; HttpOnly; SameSite=Strict; Path=/"
            secure = "; Secure" if self.options.tls else ""
            return _answer(HTTPStatus.SEE_OTHER, b"", **{"Location": "/", "Set-Cookie": cookie + secure})
        if path not in self._files:
            return _answer(HTTPStatus.NOT_FOUND, b"there is nothing here\n")
        body, kind = self._files[path]
        return _answer(HTTPStatus.OK, b"" if request.method == "HEAD" else body, kind)

    def _refused(self, status: HTTPStatus, why: str, message: str) -> Response:
        self.metrics.refused.labels(why).inc()
        return _answer(status, f"{message}\n".encode())

    # -- conversations

    async def _talk(self, connection: ServerConnection) -> None:
        name, asked, settings = secrets.token_hex(8), _extensions(connection), self.options.settings
        settings = settings if "playback" in asked else replace(settings, ahead=AHEAD)
        try:
            session = await self._seat(connection, settings)
        except ConnectionClosed:
            return
        except (NoRow, EngineStopped) as error:
            self.metrics.refused.labels("rows").inc()
            await hang_up(connection, 1013, str(error), "session_limit_reached")
            return
        self.metrics.conversations.inc()
        self.sessions.add(session)
        begun = time.monotonic()
        self.say("start", name)
        try:
            code, why = await Client(self, connection, session, name, asked).run()
        finally:
            self.sessions.discard(session)
            self.metrics.dropped.inc(session.dropped)
        self.say("end", name, code=code, seconds=round(time.monotonic() - begun, 3), why=why, frames_dropped=session.dropped)

    async def _seat(self, connection: ServerConnection, settings: Settings) -> Session:
        """Everybody waits for the model. Who asked for the extension `queue` is told how much of it is there, waits in line for a
        row too, and is told how many are before it."""
        queue, told, self._line = "queue" in _extensions(connection), None, [*self._line, connection]
        try:
            while True:
                if self.engine is None:
                    news: dict[str, Any] = {"type": "attend.loading", "loaded": round(self.loaded, 2)}
                else:
                    before = self._line.index(connection)
                    try:
                        if before == 0 or before < self.engine.free:
                            return Session(self.engine, self.vad, self.voice, settings)
                        raise NoRow(f"all places are taken, and {before} wait for one")
                    except NoRow:
                        if not queue:
                            raise
                    news = {"type": "attend.queue", "before": before}
                if queue and news != told:
                    told = news
                    await connection.send(json.dumps({**news, "event_id": f"event_{secrets.token_hex(4)}"}))
                with suppress(TimeoutError):
                    async with asyncio.timeout(MOVING):
                        await connection.wait_closed()
                    raise ConnectionClosedOK(None, None)
        finally:
            self._line.remove(connection)

    def say(self, what: str, name: str, content: str | None = None, **fields: Any) -> None:
        """One line of the log. `content` is what people said."""
        if content is not None and self.options.log_content:
            fields["text"] = content
        if self.options.log_json:
            log.info("%s", json.dumps({"time": round(time.time(), 3), "event": what, "session": name, **fields}))
        else:
            log.info("%s %s %s", name, what, " ".join(f"{key}={value!r}" for key, value in fields.items()))


def _extensions(connection: ServerConnection) -> frozenset[str]:
    query = parse_qs(urlsplit(connection.request.path).query) if connection.request else {}
    return frozenset(name.strip() for value in query.get("extensions", ()) for name in value.split(",")) & set(EXTENSIONS)


def _subprotocol(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol("realtime") if "realtime" in offered else None


def _answer(status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", **more: str) -> Response:
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **SAFE, **more}
    return Response(status.value, status.phrase, Headers(headers), body)


def _files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """All there is, by address: nothing that a client says becomes a path."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and path.suffix != ".md":
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            found[f"/{path.relative_to(folder).as_posix()}"] = path.read_bytes(), kind
    return {**found, "/": found["/index.html"]} if "/index.html" in found else found


def _suggested(given: Suggestions | None) -> dict[str, tuple[bytes, str]]:
    """What the model's checkpoint suggests to try, for the page: null where it suggests nothing."""
    if given is None:
        return {SUGGESTIONS: (b"null", "application/json")}
    told = {"about": given.about, "picture": "suggestions/picture", "questions": given.questions}
    kind = mimetypes.guess_type(given.picture.name)[0] or "application/octet-stream"
    return {
        SUGGESTIONS: (json.dumps(told).encode(), "application/json"),
        "/suggestions/picture": (given.picture.read_bytes(), kind),
    }
