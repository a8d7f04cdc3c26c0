"""HTTP responses: the page and its files, health, readiness and metrics; and whether a conversation may be opened."""

from __future__ import annotations

import json
import mimetypes
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CONTENT_TYPE_LATEST
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from agent.suggestions import Suggestions
from web.access import COOKIE, Access
from web.metrics import Metrics

PATH = "/v1/realtime"
SUGGESTIONS = "/suggestions.json"
STATIC = Path(__file__).parent / "static"
SAFE = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Readiness:
    """Whether the server is stopping, how much of the model is loaded (0 to 1), and the rows of its cache once it is loaded."""

    stopping: bool
    loaded: float
    rows: int | None
    free: int

    @property
    def ready(self) -> bool:
        return self.rows is not None and self.free > 0


class Pages:
    """Answers HTTP requests. `static`: the page's folder, which is read once. `secure`: the server uses TLS."""

    def __init__(self, access: Access, static: Path, metrics: Metrics, secure: bool) -> None:
        self._access, self._metrics, self._secure = access, metrics, secure
        self._files = {**_files(static), SUGGESTIONS: (b'{"loading": true}', "application/json")}

    def suggest(self, given: Suggestions | None) -> None:
        """Serves what the loaded checkpoint suggests to try."""
        self._files |= _suggested(given)

    def response(self, request: Request, state: Readiness) -> Response | None:
        """The response to a request; None for a websocket handshake that may go on."""
        access, headers = self._access, request.headers
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
        if path in (PATH, "/metrics", "/readyz") and not access.authorized(headers):
            return self._refused(HTTPStatus.UNAUTHORIZED, "token", "a token is needed, and this is not it")
        match path:
            case str() if path == PATH:
                return self._refused(HTTPStatus.SERVICE_UNAVAILABLE, "going", "the server is going") if state.stopping else None
            case "/readyz":
                return _readiness(state)
            case "/metrics":
                return _answer(HTTPStatus.OK, self._metrics.page(), CONTENT_TYPE_LATEST)
        return self._page(request, path)

    def _page(self, request: Request, path: str) -> Response:
        if path == "/" and (key := parse_qs(urlsplit(request.path).query).get("token")):
            if not self._access.known(key[0]):
                return self._refused(HTTPStatus.UNAUTHORIZED, "token", "a token is needed, and this is not it")
            cookie = f"{COOKIE}={self._access.cookie}; HttpOnly; SameSite=Strict; Path=/{'; Secure' if self._secure else ''}"
            return _answer(HTTPStatus.SEE_OTHER, b"", **{"Location": "/", "Set-Cookie": cookie})
        if path not in self._files:
            return _answer(HTTPStatus.NOT_FOUND, b"there is nothing here\n")
        body, kind = self._files[path]
        return _answer(HTTPStatus.OK, b"" if request.method == "HEAD" else body, kind)

    def _refused(self, status: HTTPStatus, why: str, message: str) -> Response:
        self._metrics.refused.labels(why).inc()
        return _answer(status, f"{message}\n".encode())


def _readiness(state: Readiness) -> Response:
    known = {"loaded": round(state.loaded, 2)} if state.rows is None else {"rows": state.rows, "free": state.free}
    status = HTTPStatus.OK if state.ready else HTTPStatus.SERVICE_UNAVAILABLE
    return _answer(status, json.dumps({"ready": state.ready, **known}).encode(), "application/json")


def _answer(status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", **more: str) -> Response:
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **SAFE, **more}
    return Response(status.value, status.phrase, Headers(headers), body)


def _files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """All files by their URL path, read in advance: nothing that a client sends becomes a file path."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and path.suffix != ".md":
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            found[f"/{path.relative_to(folder).as_posix()}"] = path.read_bytes(), kind
    return {**found, "/": found["/index.html"]} if "/index.html" in found else found


def _suggested(given: Suggestions | None) -> dict[str, tuple[bytes, str]]:
    """The checkpoint's suggestions as the page reads them: null where there are none."""
    if given is None:
        return {SUGGESTIONS: (b"null", "application/json")}
    body = {"about": given.about, "picture": "suggestions/picture", "questions": given.questions}
    kind = mimetypes.guess_type(given.picture.name)[0] or "application/octet-stream"
    return {
        SUGGESTIONS: (json.dumps(body).encode(), "application/json"),
        "/suggestions/picture": (given.picture.read_bytes(), kind),
    }
