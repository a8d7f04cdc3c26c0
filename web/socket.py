"""A client's socket, read in small pieces, so that nobody who sends without end keeps the event loop to himself."""

from __future__ import annotations

import asyncio

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode

from web.connection import Allowance

PIECE = 4096  # bytes that are parsed at once: 256 KB of pings, which asyncio reads at once, held everybody up for a second
FRAMES = 500  # pings, pongs and fragments of a client in a second; who sends more is read later
MESSAGE = (Opcode.TEXT, Opcode.BINARY)


class PacedSocket(ServerConnection):
    """Between two pieces it is the turn of all others. What was read and not parsed yet is at most what asyncio reads at once:
    until then no more is read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._rest = bytearray()  # read, and not parsed yet
        self._frames, self._allowance = 0, Allowance(FRAMES)
        self._next: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        # The library stops reading while messages wait; it must not begin again while there is a rest.
        self.recv_messages.pause = self.recv_messages.resume = self._look

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if self._next is None:
            self._parse()
        self._look()

    def _parse(self) -> None:
        self._next = None
        if not self.recv_messages.paused:
            piece = bytes(self._rest[:PIECE])
            del self._rest[:PIECE]
            super().data_received(piece)
        self._look()

    def _look(self) -> None:
        """Parsing and reading go on as soon as they may."""
        waiting = self.recv_messages.paused
        if self._rest and not waiting and self._next is None:
            frames, self._frames = self._frames, 0
            self._next = self.loop.call_later(self._allowance.take(frames), self._parse)
        if self._rest or waiting:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def process_event(self, event: object) -> None:
        self._frames += isinstance(event, Frame) and not (event.fin and event.opcode in MESSAGE)
        super().process_event(event)  # type: ignore[arg-type]

    def eof_received(self) -> None:
        if self._rest:  # only a TLS line ends while it is not read
            rest, self._rest = bytes(self._rest), bytearray()
            super().data_received(rest)
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest.clear()
        if self._next:
            self._next.cancel()
        super().connection_lost(exc)
