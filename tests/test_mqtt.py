"""The line to a real broker: what is taken is acknowledged, what is published arrives, and it comes back."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiomqtt
import pytest

from streams.mqtt import Broker, BrokerError, Line, Message, Publication, can_publish_to
from tests.broker import Mosquitto, Sub, certified, until

WILL = Publication("gone", b"offline", retain=True)


pytestmark = pytest.mark.usefixtures("impatient")


@asynccontextmanager
async def connected(line: Line) -> AsyncIterator[asyncio.Task[None]]:
    running = asyncio.create_task(line.run())
    try:
        await until(lambda: line.connections or running.done())
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_messages_go_both_ways(broker, protocol):
    got: list[Message] = []
    line = Line(Broker(port=broker.port, protocol=protocol), "me", ["in/+"], WILL, got.append)
    sub = Sub(broker, "out")
    async with connected(line):
        broker.pub("in/a", bytes(range(256)) * 4000)
        await until(lambda: got)
        assert (got[0].topic, got[0].payload) == ("in/a", bytes(range(256)) * 4000) and not got[0].retained and not got[0].again
        await line.publish(Publication("out", b"x" * 1_500_000))
        await until(lambda: sub.got)
        assert sub.got[0].payload == b"x" * 1_500_000
    sub.close()


async def test_properties_of_mqtt_5_arrive(broker):
    got: list[Message] = []
    async with connected(Line(Broker(port=broker.port), "me", ["in"], WILL, got.append)):
        given = [
            "response-topic",
            "back",
            "-D",
            "publish",
            "correlation-data",
            "xyz",
            "-D",
            "publish",
            "message-expiry-interval",
            "90",
        ]
        broker.pub("in", "hello", "-V", "5", "-D", "publish", *given)
        await until(lambda: got)
        assert (got[0].reply_to, got[0].correlation, got[0].expiry_s) == ("back", b"xyz", 90.0)


async def test_what_was_not_taken_to_the_end_comes_again(broker):
    """The process dies with a message in its hands: so does a `take` that raises."""
    got: list[Message] = []

    def dies(message: Message) -> None:
        raise KeyError(message.topic)

    async with connected(Line(Broker(port=broker.port), "me", ["in"], WILL, dies)) as running:
        broker.pub("in", "hello")
        await until(running.done)
    async with connected(Line(Broker(port=broker.port), "me", ["in"], WILL, got.append)):
        await until(lambda: got)
        assert got[0].payload == b"hello" and got[0].again
        broker.pub("in", "more")
        await until(lambda: len(got) == 2)
        assert not got[1].again
    async with connected(Line(Broker(port=broker.port), "me", ["in"], WILL, got.append)):
        broker.pub("in", "last")
        await until(lambda: got[-1].payload == b"last")
        assert len(got) == 3, "what was taken does not come again"


async def test_a_broker_that_restarts_is_found_and_what_waited_is_published(broker):
    got: list[Message] = []
    line = Line(Broker(port=broker.port), "me", ["in"], WILL, got.append)
    async with connected(line):
        broker.stop()
        await until(lambda: not line._up.is_set())
        waiting = asyncio.create_task(line.publish(Publication("out", b"late", retain=True)))
        broker.start()
        await asyncio.wait_for(waiting, 60)
        sub = Sub(broker, "out")
        await until(lambda: sub.got)
        broker.pub("in", "x")
        await until(lambda: got)
        assert line.connections == 2
        sub.close()


async def test_a_line_ends_even_if_its_broker_does_not_let_it_go(broker, monkeypatch):
    leave = aiomqtt.Client.__aexit__

    async def stalls(client: aiomqtt.Client, *why: Any) -> None:
        await leave(client, *why)
        raise aiomqtt.MqttError("Operation timed out")

    monkeypatch.setattr(aiomqtt.Client, "__aexit__", stalls)
    line = Line(Broker(port=broker.port), "me", ["in"], WILL, lambda message: None)
    running = asyncio.create_task(line.run())
    await until(line._up.is_set)
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=20)
    assert done and running.cancelled()


async def test_the_last_will_is_told_when_the_connection_is_lost_and_not_when_it_is_closed(broker):
    sub = Sub(broker, "gone")
    async with connected(Line(Broker(port=broker.port), "me", [], WILL, lambda message: None)):
        pass
    assert not sub.got
    line = Line(Broker(port=broker.port), "me", [], WILL, lambda message: None)
    async with connected(line):
        assert line._client
        line._client._client.socket().shutdown(2)
        await until(lambda: sub.got)
        assert sub.got[0].payload == b"offline"
    sub.close()


async def test_a_wrong_password_is_tried_again_until_it_is_right(broker, tmp_path):
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(tmp_path / "users"), "me", "right"], check=True)
    broker.stop()
    broker = Mosquitto(tmp_path, f"allow_anonymous false\npassword_file {tmp_path}/users")
    broker.start()
    secret = tmp_path / "secret"
    secret.write_text("wrong")
    line = Line(Broker(port=broker.port, user="me", password_file=str(secret)), "me", [], WILL, lambda message: None)
    running = asyncio.create_task(line.run())
    await until(lambda: "not authorised" in (tmp_path / "mosquitto.log").read_text())
    assert not running.done() and not line.connections
    secret.write_text("right\n")
    await until(lambda: line.connections)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    broker.stop()


async def test_over_tls(broker, tmp_path):
    ours, key = certified(tmp_path)
    broker.encrypt(ours, key)
    got: list[Message] = []
    sub = Sub(broker, "out")
    line = Line(Broker(port=broker.secure, tls=True, ca=str(ours)), "me", ["in"], WILL, got.append)
    async with connected(line):
        broker.pub("in", "hello")
        await until(lambda: got)
        await line.publish(Publication("out", b"x" * 1_500_000))
        await until(lambda: sub.got)
    sub.close()


# paho leaves the socket of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*unclosed <ssl.SSLSocket", "ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("names", "vouches", "why"),
    [
        ("DNS:localhost,IP:127.0.0.1", "theirs", "self-signed certificate"),
        ("DNS:localhost,IP:127.0.0.1", None, "self-signed certificate"),
        ("DNS:elsewhere.example", "ours", "IP address mismatch"),
    ],
)
async def test_a_broker_that_nobody_vouches_for_is_told_nothing(broker, tmp_path, caplog, names, vouches, why):
    files = {name: certified(tmp_path, name, names) for name in ("ours", "theirs")}
    broker.encrypt(*files["ours"])
    ca = str(files[vouches][0]) if vouches else None
    line = Line(Broker(port=broker.secure, tls=True, ca=ca), "me", [], WILL, lambda message: None)
    running = asyncio.create_task(line.run())
    await until(lambda: "is not trusted" in caplog.text)
    assert f"({why}" in caplog.text and "ca is to name the file" in caplog.text
    assert not running.done() and not line.connections and " as me " not in (tmp_path / "mosquitto.log").read_text()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"tls": True, "ca": "no/such/file"}, "no/such/file cannot be read: No such file"),
        ({"tls": True, "ca": __file__}, "cannot be read: .* no certificate"),
        ({"ca": __file__}, "is of no use without tls = true"),
    ],
)
async def test_certificates_that_are_none_are_told_before_anything_begins(how, complaint):
    with pytest.raises(BrokerError, match=complaint):
        Line(Broker(**how), "me", [], WILL, lambda message: None)


@pytest.mark.parametrize(
    ("topic", "can"),
    [("a/b", True), ("", False), ("a/+", False), ("a/#", False), ("$SYS/a", False), ("a\0b", False), ("\ud800", False)],
)
def test_topics_that_nobody_can_publish_to_are_known(topic, can):
    assert can_publish_to(topic) is can
    assert not can_publish_to("a" * 251)
