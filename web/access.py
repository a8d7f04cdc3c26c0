"""Access control: a loopback address or a token, the expected Host, an allowed Origin. Pure."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import urlsplit

from websockets.datastructures import Headers

KEY = "openai-insecure-api-key."  # how a browser, which cannot set headers, names its key among the subprotocols
COOKIE = "attend"


class NotServed(RuntimeError):
    """The server cannot start, or would be open to everybody; the message is one sentence for the user."""


def loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Access:
    """`host` is what the server listens on, `origins` pages on other hosts that may talk to it."""

    host: str = "127.0.0.1"
    token: str | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.token and not loopback(self.host):
            raise NotServed(f"whoever can reach {self.host} could talk to the model: give a --token-file, or listen on 127.0.0.1")

    def host_known(self, host: str | None) -> bool:
        """Whether `Host` is ours. Refuses DNS rebinding (a foreign name that resolves here); IP addresses cannot be rebound."""
        name = _split(f"//{host or ''}")[0]
        if loopback(name) or name == self.host:
            return True
        if any(name == _split(origin)[0] for origin in self.origins):
            return True
        return not loopback(self.host) and (_address(name) or name.endswith(".local"))

    def origin_known(self, origins: Sequence[str], host: str | None) -> bool:
        """Whether `Origin` is allowed. Only browsers send one, and they always do."""
        if not origins:
            return True
        if len(origins) > 1:
            return False
        return origins[0] in self.origins or (
            origins[0].startswith(("http://", "https://")) and urlsplit(origins[0]).netloc == host
        )

    def authorized(self, headers: Headers) -> bool:
        """Whether the headers carry the token (Authorization, subprotocol) or our cookie; always true without a token."""
        if not self.token:
            return True
        given = [
            value.removeprefix("Bearer ").strip() for value in headers.get_all("Authorization") if value.startswith("Bearer ")
        ]
        offered = ",".join(headers.get_all("Sec-WebSocket-Protocol")).split(",")
        given += [name.strip().removeprefix(KEY) for name in offered if name.strip().startswith(KEY)]
        if any(self.known(key) for key in given):
            return True
        return any(_same(cookie, self.cookie) for cookie in _cookies(headers))

    def known(self, key: str) -> bool:
        return bool(self.token) and _same(key, self.token or "")

    @property
    def cookie(self) -> str:
        """The value of our page's cookie: derived from the token, which it does not reveal."""
        return hmac.new((self.token or "").encode(), b"attend's page", sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    """Compares in constant time, whatever the lengths."""
    return hmac.compare_digest(*(sha256(text.encode(errors="surrogateescape")).digest() for text in (one, other)))


def _cookies(headers: Headers) -> list[str]:
    found = []
    for line in headers.get_all("Cookie"):
        try:
            cookie = SimpleCookie(line)
        except CookieError:
            continue
        found += [cookie[COOKIE].value] if COOKIE in cookie else []
    return found


def _split(url: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "", None


def _address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
