"""Which MQTT broker to connect to, and how: its settings, checked as a whole, and its address as people write it."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from .address import is_host

Text = Annotated[str, Meta(min_length=1, max_length=1_000)]
Port = Annotated[int, Meta(ge=1, le=65_535)]


class BrokerError(RuntimeError):
    """The broker cannot be used as configured: one sentence. `setting` is the name of the field that is wrong."""

    def __init__(self, why: str, setting: str = "host") -> None:
        super().__init__(why)
        self.setting = setting


class BrokerConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    host: Text = "127.0.0.1"  # a name or an IP address
    port: Port | None = None  # 1883, or 8883 with TLS
    user: Text | None = None
    password_file: Text | None = None
    password_env: Text | None = None  # the name of an environment variable
    client_id: Text | None = None  # attend-<node> unless given; two at one broker must differ
    tls: bool = False
    ca: Text | None = None  # a file of certificates; the system's own unless given
    protocol: Literal["5", "3.1.1"] = "5"

    def check(self) -> None:
        """Raises BrokerError for what can be told before connecting, as a missing file or environment variable."""
        if not is_host(self.host):
            raise BrokerError("this is neither the name of a host nor an IP address")
        if self.password_file and self.password_env:
            raise BrokerError("give either password_file or password_env", "password_env")
        if not self.user and (self.password_file or self.password_env):
            raise BrokerError("a password is of no use without user", "user")
        self.password()
        self.ssl_context()

    def password(self) -> str | None:
        """Raises BrokerError."""
        if self.password_file:
            try:
                return Path(os.path.expanduser(self.password_file)).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise BrokerError(f"the password file {self.password_file} cannot be read: {why}", "password_file") from error
        if self.password_env:
            if self.password_env not in os.environ:
                why = f"the environment variable {self.password_env}, which should hold the password, is not set"
                raise BrokerError(why, "password_env")
            return os.environ[self.password_env]
        return None

    def ssl_context(self) -> ssl.SSLContext | None:
        """None without TLS. Raises BrokerError."""
        if not self.tls:
            if self.ca:
                raise BrokerError(f"ca = {self.ca!r} is of no use without tls = true: all would go in the clear", "ca")
            return None
        try:
            return ssl.create_default_context(cafile=self.ca and os.path.expanduser(self.ca))
        except OSError as error:
            raise BrokerError(f"the certificates in {self.ca} cannot be read: {error.strerror or error}", "ca") from error


def parse_broker(address: str) -> dict[str, Any]:
    """`host`, and where the address says so `port` and `tls`, of: host, host:1883, 10.0.0.2, ::1, [::1]:1883, mqtt://host,
    mqtts://host:8883. Raises BrokerError, which quotes nothing of it: it may hold a password."""
    scheme, separator, rest = address.strip().rpartition("://")
    if separator and scheme.lower() not in ("mqtt", "mqtts"):
        raise BrokerError("a broker's address is HOST[:PORT], mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    if "@" in rest:
        raise BrokerError("a broker's address holds no user and password: give user and password_file in the configuration")
    rest = rest.removesuffix("/")
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", rest)
    if bracketed:
        host, port = bracketed[1], bracketed[2]
    elif rest.count(":") > 1:  # an IPv6 address, which leaves no room for a port
        host, port = rest, None
    else:
        host, _, port = rest.partition(":") if ":" in rest else (rest, "", None)
    if not is_host(host) or (bracketed and ":" not in host):
        raise BrokerError("this is no host: write a name, an IP address, or [IPv6 address]:port")
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) <= 65_535):
        raise BrokerError("a port is a number from 1 to 65535")
    return {"host": host} | ({"port": int(port)} if port else {}) | ({"tls": True} if scheme.lower() == "mqtts" else {})
