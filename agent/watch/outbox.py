"""Questions, answers and what is not published yet, in an SQLite file that survives kill -9 and is bounded.

A question is in one of three states: accepted, first (its quick line is on its way), answered. An answer and all that is to be
published of it are written in one transaction, so after any crash a question is either open or answered, once.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import msgspec

from agent.watch.requests import CameraQuestion, MonitorRequest
from streams.mqtt import Publication

REMEMBERED = 10_000  # answered questions that are recognised if they come again
UNSENT, UNSENT_BYTES = 1_000, 64 << 20  # publications that wait for the broker; beyond these the oldest are dropped

log = logging.getLogger("attend.watch")

TABLES = """
create table if not exists asks (n integer primary key autoincrement, key text unique, state text, asked real, query blob);
create table if not exists outbox (n integer primary key autoincrement, topic text, payload blob, retain int, correlation blob);
create table if not exists watches (camera text, id text, watched blob, active int, primary key (camera, id));
create table if not exists resting (camera text primary key);
"""


class OutboxError(RuntimeError):
    """The file cannot be used: one sentence that names it."""


class Outbox:
    def __init__(self, folder: Path, node: str) -> None:
        """Opens or creates the file of this node. Raises OutboxError, also where another process has it."""
        path = folder.expanduser() / f"{node}.sqlite"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
            self._db.execute("pragma locking_mode = exclusive")
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = normal")
            self._db.executescript(TABLES)
        except (OSError, sqlite3.Error) as error:
            hint = "; does another attend watch run with the same node?" if "locked" in str(error) else ""
            raise OutboxError(f"{path} cannot be used: {error}{hint}") from error
        self.dropped = 0  # publications for which there was no room

    def close(self) -> None:
        self._db.close()

    def accept(self, question: CameraQuestion, again_after: float | None = None) -> bool:
        """Writes a question down. False: its key is known already. A key may be used again where its question was answered, and
        asked `again_after` seconds ago; None: never."""
        encoded = msgspec.json.encode(question)
        with self._db:
            self._db.execute("begin")
            if again_after is not None:
                old = question.asked - again_after
                self._db.execute("delete from asks where key = ? and state = 'answered' and asked < ?", (question.key, old))
            made = self._db.execute(
                "insert or ignore into asks (key, state, asked, query) values (?, 'accepted', ?, ?)",
                (question.key, question.asked, encoded),
            )
            if made.rowcount:
                oldest = (made.lastrowid or 0) - REMEMBERED
                self._db.execute("delete from asks where state = 'answered' and n <= ?", (oldest,))
        return made.rowcount == 1

    def knows(self, key: str) -> bool:
        return self._db.execute("select 1 from asks where key = ?", (key,)).fetchone() is not None

    def recent(self, stem: str, since: float) -> bool:
        """Whether a question came since then whose key begins with `stem`."""
        found = self._db.execute("select 1 from asks where key >= ? and key < ? and asked >= ?", (stem, stem + "~", since))
        return found.fetchone() is not None

    def open(self) -> list[tuple[CameraQuestion, bool]]:
        """The questions not answered yet, the oldest first, and whether the first line of each was given."""
        found = self._db.execute("select query, state from asks where state != 'answered' order by n").fetchall()
        return [(msgspec.json.decode(query, type=CameraQuestion), state == "first") for query, state in found]

    def answered(self, key: str, publications: Iterable[Publication], state: str = "answered") -> None:
        """Writes a question's new state together with all that is to be published of it."""
        with self._db:
            self._db.execute("begin")
            self._db.execute("update asks set state = ? where key = ?", (state, key))
            self._put(publications)

    def put(self, publications: Iterable[Publication]) -> None:
        with self._db:
            self._db.execute("begin")
            self._put(publications)

    def _put(self, publications: Iterable[Publication]) -> None:
        rows = [(it.topic, it.payload, it.retain, it.correlation) for it in publications]
        self._db.executemany("insert into outbox (topic, payload, retain, correlation) values (?, ?, ?, ?)", rows)
        count, size = self._db.execute("select count(*), coalesce(sum(length(payload)), 0) from outbox").fetchone()
        while count > UNSENT or (size > UNSENT_BYTES and count > 1):
            n, length = self._db.execute("select n, length(payload) from outbox order by n limit 1").fetchone()
            self._db.execute("delete from outbox where n = ?", (n,))
            count, size, self.dropped = count - 1, size - length, self.dropped + 1
            log.warning("the broker is away for too long: %d answers, pictures and events were dropped so far", self.dropped)

    def unsent(self) -> tuple[int, Publication] | None:
        """The number and the publication that is next."""
        row = self._db.execute("select n, topic, payload, retain, correlation from outbox order by n limit 1").fetchone()
        return row and (row[0], Publication(row[1], row[2], bool(row[3]), correlation=row[4]))

    def sent(self, n: int) -> None:
        """It is published."""
        self._db.execute("delete from outbox where n = ?", (n,))

    def monitors(self) -> list[tuple[str, str, MonitorRequest, bool]]:
        """Camera, id, the request, and whether its condition holds."""
        rows = self._db.execute("select camera, id, watched, active from watches").fetchall()
        return [
            (camera, id, msgspec.json.decode(watched, type=MonitorRequest), bool(active)) for camera, id, watched, active in rows
        ]

    def monitor(
        self, camera: str, id: str, request: MonitorRequest, active: bool, publications: Iterable[Publication] = ()
    ) -> None:
        """Writes a monitor's state together with all that is to be published of its change."""
        with self._db:
            self._db.execute("begin")
            row = (camera, id, msgspec.json.encode(request), active)
            self._db.execute("insert or replace into watches (camera, id, watched, active) values (?, ?, ?, ?)", row)
            self._put(publications)

    def forget(self, camera: str, id: str) -> None:
        self._db.execute("delete from watches where camera = ? and id = ?", (camera, id))

    def paused(self) -> set[str]:
        """Cameras whose monitors are switched off."""
        return {camera for (camera,) in self._db.execute("select camera from resting")}

    def pause(self, camera: str, paused: bool) -> None:
        order = "insert or ignore into resting values (?)" if paused else "delete from resting where camera = ?"
        self._db.execute(order, (camera,))
