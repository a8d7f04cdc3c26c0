"""Addresses of brokers and what belongs to them, before anything is connected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streams.broker import BrokerConfig, BrokerError, parse_broker


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("broker", {"host": "broker"}),
        ("broker.local:1884", {"host": "broker.local", "port": 1884}),
        ("10.0.0.2", {"host": "10.0.0.2"}),
        ("::1", {"host": "::1"}),
        ("fe80::1%eth0", {"host": "fe80::1%eth0"}),
        ("[::1]", {"host": "::1"}),
        ("[::1]:1883", {"host": "::1", "port": 1883}),
        ("mqtt://host", {"host": "host"}),
        ("mqtt://host:1884/", {"host": "host", "port": 1884}),
        ("MQTTS://[2001:db8::5]:8884", {"host": "2001:db8::5", "port": 8884, "tls": True}),
        ("mqtt://::1", {"host": "::1"}),
    ],
)
def test_an_address_is_taken_apart(address: str, parts: dict[str, Any]) -> None:
    assert parse_broker(address) == parts


@pytest.mark.parametrize(
    "address",
    ["", "host:", "host:0", "host:65536", "host:x", "[::1", "[::1]x", "[host]:1", "1:2:3", "a b", "ws://host", "http://host"]
    + ["host/topic", "mqtt://", "me:secret@host", "mqtt://me:secret@host:1883", "secret://host", "host:secret"],
)
def test_what_is_no_address_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(BrokerError) as error:
        parse_broker(address)
    assert "secret" not in str(error.value)


def test_passwords_come_from_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("from file\n")
    monkeypatch.setenv("SECRET", "from environment")
    assert BrokerConfig().password() is None
    assert BrokerConfig(user="me", password_file=str(tmp_path / "secret")).password() == "from file"
    assert BrokerConfig(user="me", password_env="SECRET").password() == "from environment"


@pytest.mark.parametrize(
    ("broker", "setting", "why"),
    [
        ({"host": "a b"}, "host", "neither the name of a host"),
        ({"user": "me", "password_file": "/nowhere"}, "password_file", "/nowhere cannot be read: No such file"),
        ({"user": "me", "password_env": "NOWHERE"}, "password_env", "NOWHERE, which should hold the password, is not set"),
        ({"tls": True, "ca": "no/such/file"}, "ca", "no/such/file cannot be read: No such file"),
        ({"tls": True, "ca": __file__}, "ca", "cannot be read: .* no certificate"),
        ({"ca": __file__}, "ca", "is of no use without tls = true"),
    ],
)
def test_what_is_wrong_is_told_before_anything_begins(broker: dict[str, Any], setting: str, why: str) -> None:
    with pytest.raises(BrokerError, match=why) as error:
        BrokerConfig(**broker).check()
    assert error.value.setting == setting
