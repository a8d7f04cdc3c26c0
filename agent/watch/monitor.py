"""Tell me when: a condition on a camera's picture is checked again and again, and reported when it begins and when it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from agent.engine import RowLost
from agent.watch.outbox import Outbox
from agent.watch.requests import AskRefused, MonitorRequest, Requester
from agent.watch.visual_qa import NoAnswer, VisualQA
from model.cache import NoRow, RowFull
from streams.camera import Camera, Shot
from streams.frames import MediaError
from streams.mqtt import Publication

LOOK_ERRORS = (NoAnswer, RowFull, RowLost, NoRow, MediaError)  # of one look or question, which end nothing else
MOST = 32  # conditions at a time, over all cameras

log = logging.getLogger("attend.watch")


@dataclass
class Hysteresis:
    """So many looks in a row have to agree before the state changes. Pure."""

    looks: int
    active: bool = False
    _agree: int = 0

    def add(self, holds: bool | None) -> Literal["began", "ended"] | None:
        """One look; None of `holds` is no look at all, and changes nothing."""
        if holds is None:
            return None
        self._agree = self._agree + 1 if holds != self.active else 0
        if self._agree < self.looks:
            return None
        self.active, self._agree = holds, 0
        return "began" if holds else "ended"


@dataclass(eq=False)
class _Condition:
    request: MonitorRequest
    state: Hysteresis
    task: asyncio.Task[None] | None = None


class Monitor:
    """All conditions that are monitored. `report` is given a camera and, when a condition began or ended, what is to be told of
    it, the picture, and a further topic; what it returns is written down together with the new state."""

    def __init__(
        self,
        visual_qa: VisualQA,
        outbox: Outbox,
        cameras: dict[str, Camera],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        report: Callable[[str, dict[str, Any] | None, Shot | None, str | None], list[Publication]],
    ) -> None:
        self._visual_qa, self._outbox, self._cameras = visual_qa, outbox, cameras
        self._spawn, self._report = spawn, report
        self._conditions: dict[tuple[str, str], _Condition] = {}
        self._one_look = asyncio.Semaphore(1)
        self.paused = outbox.paused()  # cameras

    def start(self) -> None:
        """Goes on with what was monitored before."""
        for camera, id, request, active in self._outbox.monitors():
            if camera in self._cameras:
                self._begin(camera, id, request, active)

    def add(self, camera: str, request: MonitorRequest) -> None:
        """Raises AskRefused where there are too many."""
        id = request.id or sha256(request.condition.encode()).hexdigest()[:12]
        known = self._conditions.get((camera, id))
        if known and known.request == request:
            return
        if not known and len(self._conditions) >= MOST:
            raise AskRefused(f"busy: {MOST} things are watched for already", Requester(id=id, reply_to=request.reply_to))
        if known and known.task:
            known.task.cancel()
        self._outbox.monitor(camera, id, request, active=False)
        self._begin(camera, id, request, active=False)
        self._report(camera, None, None, None)

    def remove(self, camera: str, id: str) -> None:
        """An empty id removes all of the camera's."""
        for key in [key for key in self._conditions if key[0] == camera and id in ("", key[1])]:
            if task := self._conditions.pop(key).task:
                task.cancel()
            self._outbox.forget(*key)
        self._report(camera, None, None, None)

    def pause(self, camera: str, paused: bool) -> None:
        """Switches a camera's monitors off or on."""
        self._outbox.pause(camera, paused)
        self.paused = self._outbox.paused()
        self._report(camera, None, None, None)

    def listed(self, camera: str) -> list[dict[str, Any]]:
        """The conditions of a camera, and whether each holds."""
        found = [(id, each) for (of, id), each in self._conditions.items() if of == camera]
        return [{"id": id, "condition": each.request.condition, "active": each.state.active} for id, each in found]

    def _begin(self, camera: str, id: str, request: MonitorRequest, active: bool) -> None:
        condition = self._conditions[camera, id] = _Condition(request, Hysteresis(request.looks, active))
        condition.task = self._spawn(self._run(camera, id, condition))

    async def _run(self, camera: str, id: str, condition: _Condition) -> None:
        looked, request = 0.0, condition.request
        while True:
            shot = None if camera in self.paused else await asyncio.to_thread(self._cameras[camera].newest)
            if shot and shot.at > looked and not shot.retained:  # nothing begins or ends in a picture from before
                looked = shot.at
                try:
                    async with self._one_look:
                        holds, text = await self._visual_qa.holds(shot, request.condition)
                except LOOK_ERRORS as error:
                    log.warning("a look at the camera %s failed: %s", camera, error)
                    holds, text = None, ""
                if change := condition.state.add(holds):
                    told = {"event_type": change, "id": id, "camera": camera, "condition": request.condition, "answer": text}
                    out = self._report(camera, told | {"at": time.time(), "frames": [round(shot.at, 3)]}, shot, request.reply_to)
                    self._outbox.monitor(camera, id, request, change == "began", out)
            await asyncio.sleep(request.interval_s)
