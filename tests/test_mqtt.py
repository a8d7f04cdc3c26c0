"""The connection to a real broker: what is received is acknowledged, what is published arrives, and it reconnects."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiomqtt
import pytest

from streams.broker import BrokerConfig
from streams.mqtt import Message, MqttConnection, Publication
from tests.broker import Mosquitto, Sub, certified, until

WILL = Publication("gone", b"offline", retain=True)


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("impatient")]


@asynccontextmanager
async def connected(connection: MqttConnection) -> AsyncIterator[asyncio.Task[None]]:
    running = asyncio.create_task(connection.run())
    try:
        await until(lambda: connection.connections or running.done())
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Relay:
    """A cable to a port of this machine, which can be cut."""

    def __init__(self, port: int) -> None:
        self._port, self._ends = port, list[asyncio.StreamWriter]()

    async def open(self) -> int:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection("127.0.0.1", self._port)
        self._ends += [writer, onward]
        await asyncio.gather(self._pass(reader, onward), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    def close(self) -> None:
        self._server.close()
        self.cut()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_messages_go_both_ways(broker, protocol):
    got: list[Message] = []
    connection = MqttConnection(BrokerConfig(port=broker.port, protocol=protocol), "me", ["in/+"], WILL, got.append)
    sub = Sub(broker, "out")
    async with connected(connection):
        broker.pub("in/a", bytes(range(256)) * 4000)
        await until(lambda: got)
        assert (got[0].topic, got[0].payload) == ("in/a", bytes(range(256)) * 4000) and not got[0].retained and not got[0].again
        await connection.publish(Publication("out", b"x" * 1_500_000))
        await until(lambda: sub.got)
        assert sub.got[0].payload == b"x" * 1_500_000
    sub.close()


async def test_properties_of_mqtt_5_arrive(broker):
    got: list[Message] = []
    async with connected(MqttConnection(BrokerConfig(port=broker.port), "me", ["in"], WILL, got.append)):
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

    async with connected(MqttConnection(BrokerConfig(port=broker.port), "me", ["in"], WILL, dies)) as running:
        broker.pub("in", "hello")
        await until(running.done)
    async with connected(MqttConnection(BrokerConfig(port=broker.port), "me", ["in"], WILL, got.append)):
        await until(lambda: got)
        assert got[0].payload == b"hello" and got[0].again
        broker.pub("in", "more")
        await until(lambda: len(got) == 2)
        assert not got[1].again
    async with connected(MqttConnection(BrokerConfig(port=broker.port), "me", ["in"], WILL, got.append)):
        broker.pub("in", "last")
        await until(lambda: got[-1].payload == b"last")
        assert len(got) == 3, "what was taken does not come again"


async def test_a_broker_that_restarts_is_found_and_what_waited_is_published(broker):
    got: list[Message] = []
    connection = MqttConnection(BrokerConfig(port=broker.port), "me", ["in"], WILL, got.append)
    async with connected(connection):
        broker.stop()
        await until(lambda: not connection.connected)
        waiting = asyncio.create_task(connection.publish(Publication("out", b"late", retain=True)))
        broker.start()
        await asyncio.wait_for(waiting, 60)
        sub = Sub(broker, "out")
        await until(lambda: sub.got)
        broker.pub("in", "x")
        await until(lambda: got)
        assert connection.connections == 2
        sub.close()


async def test_a_connection_ends_even_if_disconnecting_fails(broker, monkeypatch):
    leave = aiomqtt.Client.__aexit__

    async def stalls(client: aiomqtt.Client, *why: Any) -> None:
        await leave(client, *why)
        raise aiomqtt.MqttError("Operation timed out")

    monkeypatch.setattr(aiomqtt.Client, "__aexit__", stalls)
    connection = MqttConnection(BrokerConfig(port=broker.port), "me", ["in"], WILL, lambda message: None)
    running = asyncio.create_task(connection.run())
    await until(lambda: connection.connected)
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=20)
    assert done and running.cancelled()


async def test_the_last_will_is_told_when_the_connection_is_lost_and_not_when_it_is_closed(broker):
    sub = Sub(broker, "gone")
    async with connected(MqttConnection(BrokerConfig(port=broker.port), "me", [], WILL, lambda message: None)):
        pass
    assert not sub.got
    relay = Relay(broker.port)
    connection = MqttConnection(BrokerConfig(port=await relay.open()), "me", [], WILL, lambda message: None)
    async with connected(connection):
        relay.cut()
        await until(lambda: sub.got)
        assert sub.got[0].payload == b"offline"
    relay.close()
    sub.close()


async def test_a_wrong_password_is_tried_again_until_it_is_right(broker, tmp_path):
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(tmp_path / "users"), "me", "right"], check=True)
    broker.stop()
    broker = Mosquitto(tmp_path, f"allow_anonymous false\npassword_file {tmp_path}/users")
    broker.start()
    secret = tmp_path / "secret"
    secret.write_text("wrong")
    config = BrokerConfig(port=broker.port, user="me", password_file=str(secret))
    connection = MqttConnection(config, "me", [], WILL, lambda message: None)
    running = asyncio.create_task(connection.run())
    await until(lambda: "not authorised" in (tmp_path / "mosquitto.log").read_text())
    assert not running.done() and not connection.connections
    secret.write_text("right\n")
    await until(lambda: connection.connections)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    broker.stop()


async def test_over_tls(broker, tmp_path):
    ours, key = certified(tmp_path)
    broker.encrypt(ours, key)
    got: list[Message] = []
    sub = Sub(broker, "out")
    connection = MqttConnection(BrokerConfig(port=broker.secure, tls=True, ca=str(ours)), "me", ["in"], WILL, got.append)
    async with connected(connection):
        broker.pub("in", "hello")
        await until(lambda: got)
        await connection.publish(Publication("out", b"x" * 1_500_000))
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
    connection = MqttConnection(BrokerConfig(port=broker.secure, tls=True, ca=ca), "me", [], WILL, lambda message: None)
    running = asyncio.create_task(connection.run())
    await until(lambda: "is not trusted" in caplog.text)
    assert f"({why}" in caplog.text and "set ca to the file" in caplog.text
    assert not running.done() and not connection.connections and " as me " not in (tmp_path / "mosquitto.log").read_text()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
