"""An append-only file of checksummed records, which survives kill -9. The records' content is opaque here."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from zlib import crc32


class JournalError(RuntimeError):
    """A journal cannot be written or read; the message is one sentence and names the file."""


class Journal:
    """An append-only file that only its owner can read: a line with format and version, then records of length, checksum of the
    length, checksum of the body, and body. The first body is the head. Each record is one write, so that a killed process leaves
    at most the last one torn; only `rewrite` waits for the disk (fsync)."""

    MAGIC = b"attend tape 1\n"
    HEADER = struct.Struct("<III")

    def __init__(self, path: Path, bound: int, head: bytes, size: int | None = None) -> None:
        """A new file; with `size`, the existing one, truncated to that many bytes. Raises JournalError."""
        self.path, self.bound, self._head = path, bound, head
        self._file, self.size = self._open(path, new=size is None), size or 0
        if size is None:
            self._write(self.MAGIC + self._record(head))
        else:
            self._file.truncate(size)

    def room(self, body: bytes) -> bool:
        """Whether another record with this body stays within `bound` bytes."""
        return self.size + self.HEADER.size + len(body) <= self.bound

    def append(self, body: bytes) -> None:
        """Writes one more record. Raises JournalError."""
        self._write(self._record(body))

    def rewrite(self, bodies: Iterable[bytes]) -> None:
        """Replaces the file by one with these bodies, atomically. Raises JournalError; the old file then stays."""
        path, old = self.path.with_name(self.path.name + ".new"), (self._file, self.size)
        path.unlink(missing_ok=True)
        self._file, self.size = self._open(path, new=True), 0
        try:
            self._write(self.MAGIC + self._record(self._head))
            for body in bodies:
                self._write(self._record(body))
            os.fsync(self._file.fileno())
            path.replace(self.path)
        except (OSError, JournalError) as error:
            self._file.close()
            self._file, self.size = old
            raise JournalError(f"the journal {self.path} cannot be rewritten: {error}") from error
        old[0].close()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _open(path: Path, new: bool) -> FileIO:
        try:
            file = os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if new else 0), 0o600)
            os.fchmod(file, 0o600)
        except OSError as error:
            raise JournalError(f"the journal {path} cannot be opened: {error.strerror}") from error
        return FileIO(file, "r+")

    @classmethod
    def _record(cls, body: bytes) -> bytes:
        return cls.HEADER.pack(len(body), crc32(struct.pack("<I", len(body))), crc32(body)) + body

    def _write(self, data: bytes) -> None:
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self.size)
            raise JournalError(f"the journal {self.path} cannot be written: {error.strerror}") from error
        self.size += len(data)


def records(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yields each body and the byte where its record ends. Stops at a torn end: an incomplete record, or a wrong one with only
    zeros after it (blocks that were allocated when the power failed). Raises JournalError for any other damage."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise JournalError(f"the journal {path} cannot be opened: {error.strerror}") from error
    with file:
        if file.read(len(Journal.MAGIC)) != Journal.MAGIC:
            raise JournalError(f"{path} is not a conversation journal that this version can read")
        end = len(Journal.MAGIC)
        while len(header := file.read(Journal.HEADER.size)) == Journal.HEADER.size:
            length, check, checksum = Journal.HEADER.unpack(header)
            known = check == crc32(header[:4])
            body = file.read(length) if known else b""
            if known and len(body) < length:
                return
            if not known or crc32(body) != checksum:
                if file.read().strip(b"\0"):
                    raise JournalError(f"the journal {path} is damaged at byte {end:,}")
                return
            end += len(header) + length
            yield body, end
