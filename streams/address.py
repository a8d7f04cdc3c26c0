"""Addresses of cameras: whether one can be used, and what of it may be shown.

An address carries secrets in more places than one: before the @, and in the query (?usr=…&pwd=…). A password in which /, ?
or # is not percent-encoded even looks like host, port and path. So only what is certain not to be a secret is ever shown.
"""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import unquote

from .frames import MediaError

SCHEMES = ("rtsp", "rtsps", "http", "https")
ENCODE = "in a user name, password or query write @ as %40, / as %2F, ? as %3F, # as %23, : as %3A and a blank as %20"

# As FFmpeg and urllib take an address apart: the authority ends at the first /, ? or #, and the user at the last @ in it.
ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?:(?P<user>[^/?#]*)@)?"
    r"(?P<host>\[[^\]/?#@]*\]|[^/?#@:\[\]]*)(?::(?P<port>[^/?#@]*))?(?P<path>/[^?#]*)?(?P<query>[?#].*)?",
    re.DOTALL,
)
LOGIN = re.compile(r"[^/\\]*:.*@", re.DOTALL)  # user:password@ at the beginning of what has no scheme


def check_source(source: int | str) -> None:
    """Raises MediaError for a device number, path or address that can never be a camera. The message holds no secret."""
    if isinstance(source, int):
        if source < 0:
            raise MediaError("a camera's number is 0 or more")
        return
    if not source or not source.isprintable():
        raise MediaError("a camera's source is empty or holds control characters")
    if "://" not in source:
        if re.match(r"(rtsps?|https?):", source, re.I) or (LOGIN.match(source) and not os.path.exists(source)):
            raise MediaError("this source looks like an address without its scheme: write rtsp://user:password@host/path")
        return
    scheme = source.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise MediaError(f"{display(source)} is no camera: give a device, a video file, or an rtsp:// or http:// address")
    match = ADDRESS.fullmatch(source)
    if match is None or not _usable(match["host"], match["port"]):
        raise MediaError(f"this {scheme}:// address names no host, or no port that can be; {ENCODE}")
    if match["user"] is None and match["port"] and _hides_login(match):
        raise MediaError(f"in this {scheme}:// address the user name or password cannot be told from host and path; {ENCODE}")
    if " " in source or (scheme in ("http", "https") and (not source.isascii() or "#" in source)):
        raise MediaError(f"{display(source)} holds characters that an address cannot hold; {ENCODE}")


def display(source: int | str) -> str:
    """A camera's source as it may be shown: of an address the scheme, host, port and path, or less where these are uncertain."""
    if isinstance(source, int):
        return f"camera {source}"
    if "://" not in source:
        return LOGIN.sub("…@", source, count=1) if LOGIN.match(source) else source
    match = ADDRESS.fullmatch(source)
    if match is None or not _usable(match["host"], match["port"]) or _hides_login(match):
        scheme = source.partition("://")[0]
        return f"{scheme}://…" if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]{0,9}", scheme) else "…"
    port = f":{match['port']}" if match["port"] else ""
    path = re.sub(r"/[^/]*[=&].*", "/…", match["path"] or "", flags=re.DOTALL)  # /user=me&password=secret&channel=1
    return f"{match['scheme']}://{match['host']}{port}{path}"


def without_login(address: str) -> tuple[tuple[str, str] | None, str, str]:
    """User and password, decoded, if it has them; the host; and the address without them. Of one that `check_source` passed."""
    match = ADDRESS.fullmatch(address)
    assert match, "check_source comes first"
    user, _, password = (match["user"] or "").partition(":")
    port = f":{match['port']}" if match["port"] else ""
    plain = f"{match['scheme']}://{match['host']}{port}{match['path'] or '/'}{match['query'] or ''}"
    return ((unquote(user), unquote(password)) if user else None), match["host"].strip("[]"), plain


def may_need_encoding(source: str) -> bool:
    """Whether an address that failed holds characters which may not mean what was meant: a second @, a #, a bare %, …"""
    match = ADDRESS.fullmatch(source)
    assert match, "check_source comes first"
    rest = (match["path"] or "") + (match["query"] or "")
    return bool("@" in rest or "#" in rest or re.search(r"[^\w.~!$&'()*+,;=:%-]|%(?![0-9A-Fa-f]{2})", match["user"] or ""))


def _hides_login(match: re.Match[str]) -> bool:
    """Whether what stands before the last @ may be a login that holds a /, ? or #. An IP address is a host, and no login."""
    path, query = match["path"] or "", match["query"] or ""
    return "@" in path or ("@" in query and not _is_ip(match["host"]))


def _usable(host: str, port: str | None) -> bool:
    if port and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) <= 65_535):
        return False
    return _is_ip(host) if host.startswith("[") else is_host(host)


def is_host(text: str) -> bool:
    """Whether this can be the name or the IP address of a machine."""
    if _is_ip(text):
        return not text.startswith("[")
    try:
        return bool(re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", text)) and len(text.encode("idna")) <= 253
    except UnicodeError:
        return False


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]").partition("%25")[0].partition("%")[0])
    except ValueError:
        return False
    return True
