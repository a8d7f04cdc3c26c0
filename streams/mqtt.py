"""The connection to an MQTT broker: it reconnects, acknowledges messages only once they are safe, and publishes in order.

aiomqtt 2 does not reconnect, acknowledges messages that nobody has processed, and hides whether a message was sent before; those
three are done here, with the paho client that it keeps in `_client`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiomqtt
from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY, Client, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from .broker import BrokerConfig, BrokerError

LARGEST = 4 << 20  # bytes of a message
PAUSES = (0.5, 30.0)  # seconds before the broker is tried again: the first, doubled up to the last
TIMEOUT = 10.0  # seconds for the broker to answer
SESSION_EXPIRY = 300  # seconds for which the broker keeps messages while there is no connection
INBOX = 1_000  # messages not processed yet; a broker sends some 20 before it wants them acknowledged

log = logging.getLogger("attend.mqtt")
logging.getLogger("attend.mqtt.paho").setLevel(logging.CRITICAL + 1)  # it logs payloads and addresses


@dataclass(frozen=True, slots=True)
class Message:
    """A message that came. `again`: the broker has sent it before and does not know whether it arrived."""

    topic: str
    payload: bytes = field(repr=False)
    retained: bool = False
    again: bool = False
    reply_to: str | None = None
    correlation: bytes | None = None
    expiry_s: float | None = None
    mid: int = 0  # the broker's number, the same when it sends it again


@dataclass(frozen=True, slots=True)
class Publication:
    topic: str
    payload: bytes = field(repr=False)
    retain: bool = False
    qos: int = 1
    correlation: bytes | None = None


class MqttConnection:
    """`receive` is called on the event loop with each message and must not block; when it returns, the message is acknowledged.
    If the process dies before that, the broker sends it again.

    `name`: the client id, unless the configuration gives one. `topics`: what is subscribed to. `will`: what the broker publishes
    if the connection breaks."""

    def __init__(
        self, broker: BrokerConfig, name: str, topics: Sequence[str], will: Publication, receive: Callable[[Message], None]
    ) -> None:
        self._broker, self._name, self._topics, self.will, self._receive = broker, name, topics, will, receive
        self._client: aiomqtt.Client | None = None
        self._up = asyncio.Event()
        self.connections = 0  # that were made so far

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    async def run(self, connected: Callable[[], None] = lambda: None) -> None:
        """Never returns; end it by cancelling. `connected` is called after each connection, once the topics are subscribed."""
        pause = PAUSES[0]
        while True:
            try:
                inbox: asyncio.Queue[MQTTMessage] = asyncio.Queue(INBOX)
                client = self._open()
                self._deliver_to(client, inbox)
                async with client:
                    if options := [(topic, self._options()) for topic in self._topics]:
                        await client.subscribe(options, timeout=TIMEOUT)
                    _still_wanted()
                    self._client, self.connections, pause = client, self.connections + 1, PAUSES[0]
                    self._up.set()
                    log.info("connected to the broker %s", self._broker.host)
                    connected()
                    await self._listen(client, inbox)
            except (aiomqtt.MqttError, OSError, BrokerError) as error:
                _still_wanted()
                log.warning("no connection to the broker %s: %s", self._broker.host, _why(error))
            finally:
                self._up.clear()
                self._client = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    async def publish(self, it: Publication) -> None:
        """Returns when the broker has it, however often it has to be asked."""
        while True:
            await self._up.wait()
            if self._client is None:
                continue
            try:
                await self._client.publish(it.topic, it.payload, it.qos, it.retain, self._properties(it), timeout=TIMEOUT)
                return _still_wanted()
            except (aiomqtt.MqttError, ValueError) as error:
                if isinstance(error, ValueError):
                    log.error("%s cannot be published to: %s", it.topic, error)
                    return None
                await asyncio.sleep(0.05)  # until `run` has noticed

    def _open(self) -> aiomqtt.Client:
        b, five = self._broker, self._broker.protocol == "5"
        properties = None
        if five:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval, properties.MaximumPacketSize = SESSION_EXPIRY, LARGEST + 1024
        return aiomqtt.Client(
            b.host,
            b.port or (8883 if b.tls else 1883),
            username=b.user,
            password=b.password(),  # read anew: it may have been changed
            identifier=b.client_id or self._name,
            protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
            clean_session=None if five else False,
            clean_start=False if five else MQTT_CLEAN_START_FIRST_ONLY,  # 3.1.1 has no such flag, and wants the default
            properties=properties,
            will=aiomqtt.Will(self.will.topic, self.will.payload, 1, retain=True),
            tls_context=b.ssl_context(),  # so may this
            timeout=TIMEOUT,
            keepalive=20,
            max_queued_incoming_messages=1,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],  # or every question waits for a delayed ACK
            logger=logging.getLogger("attend.mqtt.paho"),
        )

    def _options(self) -> Any:
        return SubscribeOptions(qos=1) if self._broker.protocol == "5" else 1

    def _deliver_to(self, client: aiomqtt.Client, inbox: asyncio.Queue[MQTTMessage]) -> None:
        def came(_: Client, __: object, message: MQTTMessage) -> None:
            with suppress(asyncio.QueueFull):  # not acknowledged, so it comes again
                inbox.put_nowait(message)

        client._client.manual_ack_set(True)
        client._client.on_message = came

    async def _listen(self, client: aiomqtt.Client, inbox: asyncio.Queue[MQTTMessage]) -> None:
        lost = asyncio.ensure_future(anext(client.messages))  # brings nothing but the end of the connection
        try:
            while True:
                getting = asyncio.ensure_future(inbox.get())
                await asyncio.wait({getting, lost}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    getting.cancel()
                    await lost
                    return
                message = getting.result()
                self._receive(_message(message))
                if message.qos:
                    client._client.ack(message.mid, message.qos)
        finally:
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)

    def _properties(self, it: Publication) -> Properties | None:
        if self._broker.protocol != "5" or it.correlation is None:
            return None
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.CorrelationData = it.correlation
        return properties


def _still_wanted() -> None:
    """Raises a cancellation that was swallowed: by a failed disconnect, or by asyncio.wait_for in aiomqtt, which on Python 3.11
    swallows one that arrives together with the result. The connection then went on for ever."""
    if (task := asyncio.current_task()) and task.cancelling():
        raise asyncio.CancelledError


def _why(error: Exception) -> str:
    if isinstance(cause := error.__context__, ssl.SSLCertVerificationError):
        why = cause.verify_message.rstrip(".")
        return f"its certificate is not trusted ({why}); set ca to the file with the certificate that signed it"
    return str(error) or type(error).__name__


def _message(message: MQTTMessage) -> Message:
    given = message.properties
    expiry = getattr(given, "MessageExpiryInterval", None)
    return Message(
        message.topic,
        bytes(message.payload),
        bool(message.retain),
        bool(message.dup),
        getattr(given, "ResponseTopic", None),
        getattr(given, "CorrelationData", None),
        None if expiry is None else float(expiry),
        message.mid,
    )
