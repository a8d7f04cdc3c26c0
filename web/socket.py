"""A client's socket, parsed in small pieces, so that a client who sends without end cannot occupy the event loop."""

from __future__ import annotations

import asyncio

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode

from web.connection import Allowance

PIECE = 4096  # bytes parsed at once: 256 KB of pings, which asyncio reads at once, blocked everybody for a second
FRAMES = 500  # pings, pongs and fragments of a client per second; what is beyond that is read later
MESSAGE = (Opcode.TEXT, Opcode.BINARY)


class PacedSocket(ServerConnection):
    """Lets other tasks run between two pieces. The unparsed rest is at most what asyncio reads at once: reading pauses until it
    is parsed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._rest = bytearray()  # read, and not parsed yet
        self._frames, self._allowance = 0, Allowance(FRAMES)
        self._next: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        # The library pauses reading while messages wait; it must not resume while there is an unparsed rest.
        self.recv_messages.pause = self.recv_messages.resume = self._schedule

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if self._next is None:
            self._parse()
        self._schedule()

    def _parse(self) -> None:
        self._next = None
        if not self.recv_messages.paused:
            piece = bytes(self._rest[:PIECE])
            del self._rest[:PIECE]
            super().data_received(piece)
        self._schedule()

    def _schedule(self) -> None:
        """Schedules the next parse, and pauses or resumes reading."""
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
        if self._rest:  # only a TLS connection can end while reading is paused
            rest, self._rest = bytes(self._rest), bytearray()
            super().data_received(rest)
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest.clear()
        if self._next:
            self._next.cancel()
        super().connection_lost(exc)
