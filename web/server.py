"""One port for OpenAI Realtime over a websocket, the page, health and metrics. Each client has a session of its own; a client
that finds no free row waits in a queue or is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from agent import events
from agent.conversation_config import ConversationConfig
from agent.engine import Engine, EngineStopped
from agent.events import Event
from agent.session import Session
from model.cache import NoRow
from model.vad import Vad
from streams.frames import RATE
from streams.voice import Voice
from web.access import Access, NotServed
from web.connection import CLOSING, ClientGone, Connection, End
from web.metrics import Metrics
from web.outgoing import lone_event, server_error
from web.pages import STATIC, Pages, Readiness
from web.protocol import EXTENSIONS, RealtimeProtocol
from web.socket import PacedSocket

MESSAGE = (
    52 << 20
)  # bytes of one: whatever OpenAI takes (15 MiB of audio, 50 MB in all) is read, and at most refused in an `error`
FRAMES = 2  # messages that are read in advance
AHEAD = 10.0  # seconds of audio that are sent before they are played: OpenAI sends audio as it is generated
WAITING = 32  # sockets beyond one per row: HTTP requests, and handshakes that are not finished
POLL = 0.2  # seconds after which waiting clients look again for a row

log = logging.getLogger("attend.serve")
quiet = logging.getLogger("attend.websockets")  # a handshake that fails is the client's problem
quiet.setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True)
class Options:
    access: Access = field(default_factory=Access)
    port: int = 8765
    model: str = "nano"
    voice: str = "default"  # its name
    settings: ConversationConfig = field(default_factory=ConversationConfig)
    tls: ssl.SSLContext | None = None
    log_content: bool = False
    log_json: bool = False
    handshake: float = 10.0  # seconds that a handshake may take
    ping: float = 20.0  # seconds between two pings
    stall: float = 45.0  # seconds without a pong after which the connection is closed
    static: Path = STATIC
    clock: Callable[[], float] = time.monotonic  # for playback; a test's clock runs faster


class Server:
    """The server. It may be open before the model is loaded: until `enter`, waiting clients are sent `loaded`, from 0 to 1."""

    def __init__(self, engine: Engine | None, vad: Vad, voice: Voice | None, options: Options) -> None:
        self.engine: Engine | None = None
        self.vad, self.voice, self.options = vad, voice, options
        self.loaded = 0.0
        self.sessions: set[Session] = set()
        self.metrics = Metrics(self.sessions)
        self.stopping = asyncio.Event()
        self._sockets = 0
        self._handshakes: dict[ServerConnection, None] = {}  # those in progress, the oldest first
        self._queue: list[ServerConnection] = []  # clients that wait for a row; bounded by the number of sockets
        self._pages = Pages(options.access, options.static, self.metrics, options.tls is not None)
        if engine:
            self.enter(engine)

    def enter(self, engine: Engine) -> None:
        """The model is loaded: conversations can start."""
        self.engine = engine
        self.metrics.watch(engine)
        self._pages.suggest(engine.loaded.suggestions)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        """Listens; gives the port. At the end all conversations are closed with 1012. Raises NotServed if it cannot listen."""
        o, outer = self.options, self

        class CountedSocket(PacedSocket):
            """Counts sockets from the first byte on, so that nobody can open an unlimited number. If there are too many, the
            oldest unfinished handshake is closed: clients that send one header byte per second keep nobody out."""

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                outer._sockets += 1
                outer._handshakes[self] = None
                if outer._sockets > (outer.engine.rows if outer.engine else 0) + WAITING:
                    outer.metrics.refused.labels("sockets").inc()
                    oldest = next(iter(outer._handshakes))
                    del outer._handshakes[oldest]
                    oldest.transport.abort()

            def connection_lost(self, exc: Exception | None) -> None:
                outer._sockets -= 1
                outer._handshakes.pop(self, None)
                super().connection_lost(exc)

        try:
            server = await serve(
                self._converse,
                o.access.host,
                o.port,
                create_connection=CountedSocket,
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

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        self._handshakes.pop(connection, None)
        return self._pages.response(request, self._state())

    def _state(self) -> Readiness:
        engine = self.engine
        return Readiness(self.stopping.is_set(), self.loaded, engine.rows if engine else None, engine.free if engine else 0)

    # -- conversations

    async def _converse(self, connection: ServerConnection) -> None:
        name, extensions, settings = secrets.token_hex(8), _extensions(connection), self.options.settings
        settings = settings if "playback" in extensions else replace(settings, ahead=AHEAD)
        raw = connection.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # else the system takes a minute of sound at once
        try:
            session = await self._claim_row(connection, settings)
        except ConnectionClosed:
            return
        except (NoRow, EngineStopped) as error:
            self.metrics.refused.labels("rows").inc()
            await close(connection, End(1013, str(error)), "session_limit_reached")
            return
        self.metrics.conversations.inc()
        self.sessions.add(session)
        begun = time.monotonic()
        self.say("start", name)
        try:
            with session:
                end = await self._connected(connection, session, name, extensions).run()
        finally:
            self.sessions.discard(session)
            self.metrics.dropped.inc(session.dropped)
        seconds, code = round(time.monotonic() - begun, 3), connection.close_code or end.code
        self.say("end", name, code=code, seconds=seconds, why=end.why, frames_dropped=session.dropped)
        if end.fault:
            self.metrics.errors.labels("fault").inc()
            log.error("%s fault", name, exc_info=end.fault)
        elif end.code == 1013:
            self.metrics.errors.labels("unread").inc()
        await close(connection, end, "fault" if end.fault else None)

    def _connected(self, connection: ServerConnection, session: Session, name: str, extensions: frozenset[str]) -> Connection:
        o = self.options
        voice = o.voice if self.voice else None
        protocol = RealtimeProtocol(name, o.model, voice, extensions, o.settings.detection, o.settings.setting.system or "")

        async def messages() -> AsyncIterator[str | bytes]:
            with suppress(ConnectionClosed):
                async for message in connection:
                    yield message

        async def send(event: str) -> None:
            try:
                await connection.send(event)
            except ConnectionClosed as error:
                raise ClientGone from error

        return Connection(session, protocol, messages(), send, self.stopping, partial(self._observe, name), o.clock)

    async def _claim_row(self, connection: ServerConnection, settings: ConversationConfig) -> Session:
        """Waits for the model to be loaded, and claims a row. With the extension `queue` a client also waits for a free row, and
        is sent the progress of loading and its place in the queue. Raises NoRow, EngineStopped or ConnectionClosed."""
        queue, sent, self._queue = "queue" in _extensions(connection), None, [*self._queue, connection]
        try:
            while True:
                if self.engine is None:
                    news: dict[str, Any] = {"type": "attend.loading", "loaded": round(self.loaded, 2)}
                else:
                    before = self._queue.index(connection)
                    try:
                        if before == 0 or before < self.engine.free:
                            return Session(self.engine, self.vad, self.voice, settings)
                        raise NoRow(f"all places are taken, and {before} wait for one")
                    except NoRow:
                        if not queue:
                            raise
                    news = {"type": "attend.queue", "before": before}
                if queue and news != sent:
                    sent = news
                    await connection.send(lone_event(**news))
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await connection.wait_closed()
                    raise ConnectionClosedOK(None, None)
        finally:
            self._queue.remove(connection)

    def _observe(self, name: str, event: Event) -> None:
        self.metrics.count(event)
        match event:
            case events.TurnStopped():
                self.say("turn", name, turn=event.turn, ms=event.end * 1000 // RATE, by=event.why)
            case events.InputTranscribed():
                self.say("caption", name, event.text, turn=event.turn)
            case events.AnswerDone():
                self.say("answer", name, event.text, answer=event.answer, finish=event.finish, tokens=event.tokens)
            case events.AnswerTimings():
                self.say("times", name, answer=event.answer, ms={key: round(ms) for key, ms in event.stages.items()})
            case events.EntriesEvicted():
                self.say("evicted", name, of=[f"{gone.what} {gone.of}" for gone in event.gone])
            case events.OutOfBandEvent(_, inner) if isinstance(
                inner, events.AnswerDone | events.AnswerTimings | events.SessionFailed
            ):
                self._observe(name, inner)
            case events.Notice() | events.SessionFailed():
                self.say("trouble", name, message=event.message)

    def say(self, what: str, name: str, content: str | None = None, **fields: Any) -> None:
        """Writes one line of the log. `content`: text of the conversation, left out unless `log_content` is set."""
        if content is not None and self.options.log_content:
            fields["text"] = content
        if self.options.log_json:
            log.info("%s", json.dumps({"time": round(time.time(), 3), "event": what, "session": name, **fields}))
        else:
            log.info("%s %s %s", name, what, " ".join(f"{key}={value!r}" for key, value in fields.items()))


async def close(connection: ServerConnection, end: End, error: str | None = None) -> None:
    """Closes a connection; with `error`, after an `error` event of this code."""
    if error:
        with suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(CLOSING):
                await connection.send(server_error(end.why, error))
    await connection.close(end.code, end.why.encode()[:120].decode(errors="ignore"))


def _extensions(connection: ServerConnection) -> frozenset[str]:
    query = parse_qs(urlsplit(connection.request.path).query) if connection.request else {}
    return frozenset(name.strip() for value in query.get("extensions", ()) for name in value.split(",")) & set(EXTENSIONS)


def _subprotocol(connection: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol("realtime") if "realtime" in offered else None
