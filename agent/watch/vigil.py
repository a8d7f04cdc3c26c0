"""Tell me when: a condition on a camera's picture is looked at again and again, and told when it begins and when it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import msgspec

from agent.engine import RowLost
from agent.watch.asked import LARGEST, Asker, Refused, place
from agent.watch.config import ConfigError, Watched, decoded
from agent.watch.ledger import Ledger
from agent.watch.looking import Looker, NoAnswer
from model.cache import NoRow, RowFull
from streams.camera import Camera, Shot
from streams.frames import MediaError
from streams.mqtt import Publication

TROUBLE = (NoAnswer, RowFull, RowLost, NoRow, MediaError)  # of one look, which is told or left
WATCHES = 32  # at once

log = logging.getLogger("attend.watch")


@dataclass
class Hysteresis:
    """So many looks in a row have to agree before anything changes. Pure."""

    looks: int
    active: bool = False
    _agree: int = 0

    def see(self, holds: bool | None) -> Literal["began", "ended"] | None:
        """None of `holds` is no look at all: what is so stays so."""
        if holds is None:
            return None
        self._agree = self._agree + 1 if holds != self.active else 0
        if self._agree < self.looks:
            return None
        self.active, self._agree = holds, 0
        return "began" if holds else "ended"


@dataclass(eq=False)
class _Kept:
    watched: Watched
    state: Hysteresis
    task: asyncio.Task[None] | None = None


class Vigil:
    """`tell` is given a camera and, when something began or ended, what is to be told of it, the picture, and a further topic;
    what it returns is written down together with the new state."""

    def __init__(
        self,
        looker: Looker,
        ledger: Ledger,
        cameras: dict[str, Camera],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        tell: Callable[[str, dict[str, Any] | None, Shot | None, str | None], list[Publication]],
    ) -> None:
        self._looker, self._ledger, self._cameras, self._spawn, self._tell = looker, ledger, cameras, spawn, tell
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._looks = asyncio.Semaphore(1)
        self.resting = ledger.resting()

    def begin(self) -> None:
        for camera, id, watched, active in self._ledger.watches():
            if camera in self._cameras:
                self._keep(camera, id, watched, active)

    def order(self, camera: str, payload: bytes, own: str) -> None:
        """Plain text, or JSON if it begins with a brace. Raises Refused."""
        text = payload.decode(errors="replace").strip()
        try:
            if len(payload) > LARGEST:
                raise ConfigError(f"an order has at most {LARGEST:,} bytes")
            watched = decoded(text.encode() if text.startswith("{") else msgspec.json.encode({"condition": text}), Watched)
            if watched.reply_to and not place(watched.reply_to, own):
                raise ConfigError("nothing can be published to this reply topic")
        except ConfigError as error:
            raise Refused(f"this cannot be watched for: {error}", Asker()) from error
        id = watched.id or sha256(watched.condition.encode()).hexdigest()[:12]
        known = self._kept.get((camera, id))
        if known and known.watched == watched:
            return
        if not known and len(self._kept) >= WATCHES:
            raise Refused(f"busy: {WATCHES} things are watched for already", Asker(id=id, reply_to=watched.reply_to))
        if known and known.task:
            known.task.cancel()
        self._ledger.watch(camera, id, watched, active=False)
        self._keep(camera, id, watched, active=False)
        self._tell(camera, None, None, None)

    def forget(self, camera: str, id: str) -> None:
        """Without an id all of the camera's."""
        for key in [key for key in self._kept if key[0] == camera and id in ("", key[1])]:
            if task := self._kept.pop(key).task:
                task.cancel()
            self._ledger.unwatch(*key)
        self._tell(camera, None, None, None)

    def rest(self, camera: str, resting: bool) -> None:
        self._ledger.rest(camera, resting)
        self.resting = self._ledger.resting()
        self._tell(camera, None, None, None)

    def listed(self, camera: str) -> list[dict[str, Any]]:
        kept = [(id, kept) for (of, id), kept in self._kept.items() if of == camera]
        return [{"id": id, "condition": each.watched.condition, "active": each.state.active} for id, each in kept]

    def _keep(self, camera: str, id: str, watched: Watched, active: bool) -> None:
        kept = self._kept[camera, id] = _Kept(watched, Hysteresis(watched.looks, active))
        kept.task = self._spawn(self._watch(camera, id, kept))

    async def _watch(self, camera: str, id: str, kept: _Kept) -> None:
        looked, watched = 0.0, kept.watched
        while True:
            shot = None if camera in self.resting else await asyncio.to_thread(self._cameras[camera].newest)
            if shot and shot.at > looked:
                looked = shot.at
                try:
                    async with self._looks:
                        holds, text = await self._looker.holds(shot, watched.condition)
                except TROUBLE as error:
                    log.warning("the camera %s could not be looked at: %s", camera, error)
                    holds, text = None, ""
                if change := kept.state.see(holds):
                    told = {"event_type": change, "id": id, "camera": camera, "condition": watched.condition, "answer": text}
                    out = self._tell(camera, told | {"at": time.time(), "frames": [round(shot.at, 3)]}, shot, watched.reply_to)
                    self._ledger.watch(camera, id, watched, change == "began", out)
            await asyncio.sleep(watched.interval_s)
