"""One port: OpenAI Realtime over a websocket, the page, health and metrics. A door: what is said is said in `Session`s.

Four tasks for a conversation: the session, what comes in, what goes out, and the clock of what was played. The first that
ends is the end of all four. Every queue is bounded; who does not read or sends too much waits alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import mimetypes
import secrets
import socket
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

from agent import events
from agent.engine import Engine, EngineStopped
from agent.events import Event
from agent.session import DoorStuck, Session
from agent.settings import Settings
from model.cache import NoRow
from model.vad import Vad
from streams.voice import Voice
from web.access import COOKIE, Access, NotServed
from web.inbox import Inbox
from web.metrics import Metrics
from web.protocol import EXTENSIONS, Conversation

PATH = "/v1/realtime"
STATIC = Path(__file__).parent / "static"
MESSAGE = 8 << 20  # bytes of one: a telephone's photo in base64
FRAMES = 4  # messages that are read ahead
EVENTS = 500  # of a client in a second; who sends more waits, and
SHARE = 16 << 10  # bytes count as one more
UNSENT = 256  # events
BEHIND = 400  # positions that may wait for the model before more sound is taken
TICK = 0.02  # seconds
AHEAD = 10.0  # seconds of sound that a client has before it has played them: as OpenAI, which sends it as it is made
WAITING = 32  # sockets beyond the conversations: pages, and those that are not through the handshake
CLOSING = 2.0  # seconds
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
        self._line: list[ServerConnection] = []  # those that wait for a row; bounded by the sockets
        self._files = _files(options.static)
        if engine:
            self.enter(engine)

    def enter(self, engine: Engine) -> None:
        """Conversations can begin."""
        self.engine = engine
        self.metrics.watch(engine)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        """The port. At the end conversations are told that the server goes (1012)."""
        o, door = self.options, self

        class Connection(ServerConnection):
            """Counted from the first byte on, so that nobody can open sockets without end."""

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                door._sockets += 1
                super().connection_made(transport)
                if door._sockets > (door.engine.rows if door.engine else 0) + WAITING:
                    door.metrics.refused.labels("sockets").inc()
                    self.transport.abort()

            def connection_lost(self, exc: Exception | None) -> None:
                door._sockets -= 1
                super().connection_lost(exc)

        try:
            server = await serve(
                self._talk,
                o.access.host,
                o.port,
                create_connection=Connection,
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
            await _hang_up(connection, 1013, str(error), "session_limit_reached")
            return
        self.metrics.conversations.inc()
        self.sessions.add(session)
        begun = time.monotonic()
        self.say("start", name)
        line = Line(self, connection, session, name, asked)
        try:
            code, why = await line.run()
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


class Line:
    """One client and its session."""

    def __init__(self, door: Door, connection: ServerConnection, session: Session, name: str, asked: frozenset[str]) -> None:
        self.door, self.connection, self.session, self.name = door, connection, session, name
        o = door.options
        system = o.settings.setting.system or ""
        voice = o.voice if door.voice else None
        self.conversation = Conversation(name, o.model, voice, asked, o.settings.manners, system)
        self._inbox = Inbox(lambda: session.record.row.behind > BEHIND)
        self._unsent: asyncio.Queue[str] = asyncio.Queue(UNSENT)
        self._order = asyncio.Lock()
        self._failed: str | None = None
        raw = connection.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # else the system takes a minute of sound at once

    async def run(self) -> tuple[int, str]:
        """Close code, and why."""
        door, run = self.door, asyncio.create_task(self.session.run(self._inbox.inputs(), self._emit))
        write, going = asyncio.create_task(self._write()), asyncio.create_task(door.stopping.wait())
        tasks = [run, write, going, asyncio.create_task(self._read()), asyncio.create_task(self._play())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        stopping = going.done()
        if run.done() and not write.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSING):
                    await self._unsent.join()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        trouble = next((end for end in ends if isinstance(end, Exception) and not isinstance(end, ConnectionClosed)), None)
        if isinstance(trouble, DoorStuck):
            door.metrics.errors.labels("unread").inc()
            return await _hang_up(self.connection, 1013, str(trouble))
        if trouble is not None:
            door.metrics.errors.labels("fault").inc()
            log.error("%s fault", self.name, exc_info=trouble)
            return await _hang_up(self.connection, 1011, "something is wrong with the server; this conversation is over", "fault")
        if self._failed is not None:
            return await _hang_up(self.connection, 1011, self._failed)
        if stopping:
            return await _hang_up(self.connection, 1012, "the server is going")
        return self.connection.close_code or 1000, "the client has gone"

    async def _read(self) -> None:
        allowed, last = float(EVENTS), time.monotonic()
        async for message in self.connection:
            now = time.monotonic()
            allowed, last = min(EVENTS, allowed + (now - last) * EVENTS) - 1 - len(message) / SHARE, now
            if allowed < 0:
                await asyncio.sleep(-allowed / EVENTS)
            self.conversation.receive(message, self.door.options.clock())
            await self._hand_on()
            await self._inbox.room()

    async def _emit(self, event: Event) -> None:
        self.door.metrics.count(event)
        self._say(event)
        if isinstance(event, events.Failed):
            self._failed = event.message
        self.conversation.tell(event, self.door.options.clock())
        await self._hand_on()

    async def _play(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self.conversation.played(self.door.options.clock())
            await self._hand_on()

    async def _hand_on(self) -> None:
        """To the session and to the client, in order: those that wait for a slow reader do so in a line."""
        async with self._order:
            out, inputs = self.conversation.out[:], self.conversation.inputs[:]
            self.conversation.out.clear()
            self.conversation.inputs.clear()
            self._inbox.put(inputs)
            for event in out:
                await self._unsent.put(json.dumps(event))

    async def _write(self) -> None:
        while True:
            await self.connection.send(await self._unsent.get())
            self._unsent.task_done()

    def _say(self, event: Event) -> None:
        door = self.door
        match event:
            case events.Stopped():
                door.say("turn", self.name, turn=event.turn, ms=(event.end * 1000) // 16_000, by=event.why)
            case events.Captioned():
                door.say("caption", self.name, event.text, turn=event.turn)
            case events.Answered():
                door.say("answer", self.name, event.text, answer=event.answer, finish=event.finish, tokens=event.tokens)
            case events.Timed():
                door.say("times", self.name, answer=event.answer, ms={key: round(ms) for key, ms in event.stages.items()})
            case events.LetGo():
                door.say("let go", self.name, of=[f"{gone.what} {gone.of}" for gone in event.gone])
            case events.Noted() | events.Failed():
                door.say("trouble", self.name, message=event.message)


def _extensions(connection: ServerConnection) -> frozenset[str]:
    query = parse_qs(urlsplit(connection.request.path).query) if connection.request else {}
    return frozenset(name.strip() for value in query.get("extensions", ()) for name in value.split(",")) & set(EXTENSIONS)


async def _hang_up(connection: ServerConnection, code: int, why: str, error: str | None = None) -> tuple[int, str]:
    """`error`: said in an event of this code first."""
    if error:
        wrong = {"type": "server_error", "code": error, "message": why, "param": None, "event_id": None}
        event = json.dumps({"type": "error", "event_id": f"event_{secrets.token_hex(4)}", "error": wrong})
        with suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(CLOSING):
                await connection.send(event)
    await connection.close(code, why.encode()[:120].decode(errors="ignore"))
    return code, why


def _subprotocol(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol("realtime") if "realtime" in offered else None


def _answer(status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", **more: str) -> Response:
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **SAFE, **more}
    return Response(status.value, status.phrase, Headers(headers), body)


def _files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """All there is, by address: nothing that a client says becomes a path."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            found[f"/{path.relative_to(folder).as_posix()}"] = path.read_bytes(), kind
    return {**found, "/": found["/index.html"]} if "/index.html" in found else found
