"""A door over MQTT: an event becomes a question about a camera, an answer and a publication.

What comes is written down before the broker is told that it came, and an answer with all that is published of it is
written down before any of it leaves. So a crash at any moment loses nothing and answers nothing twice.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import msgspec

from agent import marks
from agent.engine import Engine
from agent.marks import Mark
from agent.watch import discovery, triggers
from agent.watch.asked import Asker, Query, Refused, answer, chosen, copies, marked, publications, read_ask
from agent.watch.config import Config, ConfigError, Schedule, escaped
from agent.watch.ledger import Ledger, LedgerError
from agent.watch.looking import SMALL, Looker, Said
from agent.watch.vigil import TROUBLE, Vigil
from streams.camera import PUSHED, Camera, Health, Shot
from streams.frames import MediaError
from streams.mqtt import Line, Message, Publication
from streams.pictures import PICTURE_BYTES, decode_picture

FIRST_PICTURE = 10.0  # seconds that a question waits for a camera that has just been opened
STALE = 10.0  # seconds after which a picture is too old to answer from, but where pictures come when there is something
SAME = 600.0  # seconds in which an id means the same question
SECONDS_TO_LEAVE = 2.0

log = logging.getLogger("attend.watch")


def open_cameras(config: Config, changed: Callable[[str, Health], None] = lambda name, health: None) -> dict[str, Camera]:
    """Raises ConfigError."""
    cameras: dict[str, Camera] = {}
    for name, source in config.camera.items():
        try:
            cameras[name] = Camera(source.opened, config.keep, partial(changed, name))
        except MediaError as error:
            close(cameras)
            raise ConfigError(f"the camera {name} cannot be used: {error}") from error
    return cameras


def close(cameras: dict[str, Camera]) -> None:
    for camera in cameras.values():
        camera.close()


def look(camera: Camera, query: Query) -> list[Shot]:
    """The pictures to answer from, the oldest first. Blocks. Raises MediaError where there is none that is fresh."""
    newest = camera.newest(wait=FIRST_PICTURE)
    if newest is None:
        raise MediaError(camera.health.why)
    now = time.time()
    if now - newest.at > STALE and camera.source != PUSHED:
        raise MediaError(f"the newest picture is {now - newest.at:.0f} s old: {camera.health.why}")
    if not query.look_back_s:
        return [newest]
    kept = camera.around(query.moment, query.look_back_s, max(0.0, now - query.moment))
    return chosen([*[shot for shot in kept if shot.at < newest.at], newest], query.frames, query.moment)


def drawn(shot: Shot, found: Sequence[Mark]) -> bytes:
    """The picture as a JPEG, with the marks on it. Blocks."""
    if not found:
        return shot.jpeg
    pixels = marks.draw(decode_picture(shot.jpeg, "the picture"), found)
    return cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def finished(query: Query, model: str, said: Said, shots: Sequence[Shot], begun: float, stage: str = "final") -> dict[str, Any]:
    """An answer as it is published; `begun`: when it was its turn."""
    now = time.time()
    timings = {"waited": (begun - query.asked) * 1000, "first_token": said.first_token_ms}
    timings |= {"model": said.model_ms, "total": (now - query.asked) * 1000}
    more: dict[str, Any] = {} if said.value is None else {"value": said.value}
    more |= {"answer": said.text, "stage": stage, "marks": marked(said.marks), "frames": [round(shot.at, 3) for shot in shots]}
    return answer(query, model, now, **more, timings_ms={name: round(ms, 1) for name, ms in timings.items()})


async def once(config: Config, engine: Engine, model: str, name: str, question: str) -> dict[str, Any]:
    """One question without a broker. Raises ConfigError and whatever goes wrong with one question."""
    if name not in config.camera:
        raise ConfigError(f"there is no camera {name}; there are {', '.join(config.camera)}")
    if config.camera[name].topic:
        raise ConfigError(f"the pictures of the camera {name} come over MQTT, so it cannot be asked without a broker")
    config = msgspec.structs.replace(config, camera={name: config.camera[name]}, trigger=())
    asked = Message("ask", msgspec.json.encode({"question": question}))
    query = read_ask(asked, name, config, f"agent/{escaped(config.node)}/", time.time())
    cameras = open_cameras(config)
    try:
        shots = await asyncio.to_thread(look, cameras[name], query)
        said = await Looker(engine, config.system).ask(shots, question, budget=query.budget, schema=query.schema)
        return finished(query, model, said, shots, query.asked)
    finally:
        await asyncio.to_thread(close, cameras)


class Watch:
    """`run` until `stop` is set."""

    def __init__(self, config: Config, engine: Engine, model: str) -> None:
        """Raises LedgerError, BrokerError."""
        self.config, self.model = config, model
        self._node = escaped(config.node)
        self._base = f"agent/{self._node}"
        self._looker = Looker(engine, config.system)
        self._names = {escaped(name): name for name in config.camera}
        self._queues: dict[str, asyncio.Queue[tuple[Query, bool]]] = {name: asyncio.Queue() for name in config.camera}
        self._waiting = 0  # bounds the queues, all of them together
        self._places = asyncio.Semaphore(config.at_once)
        self._triggers = triggers.Triggers(config)
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._unsent, self._dirty = asyncio.Event(), asyncio.Event()
        self._untold: dict[str, Publication] = {}  # how things are, of each topic the newest
        will = Publication(f"{self._base}/status", b"offline", retain=True)
        self._line = Line(config.broker, f"attend-{self._node}", self._topics(), will, self._take)
        self._ledger = Ledger(Path(config.state), self._node)
        self._cameras: dict[str, Camera] = {}
        self._vigil = Vigil(self._looker, self._ledger, self._cameras, self._spawn, self._watched)

    def _topics(self) -> list[str]:
        verbs = ("ask", "look", "watch", "unwatch", "watching/set")
        own = [f"{self._base}/{camera}/{verb}" for camera in self._names for verb in verbs]
        pictures = [source.topic for source in self.config.camera.values() if source.topic]
        birth = [f"{self.config.discovery}/status"] if self.config.discovery else []
        return [*dict.fromkeys([*own, *pictures, *birth, *triggers.topics(self.config)])]

    async def run(self, stop: asyncio.Event) -> None:
        """Raises EngineStopped, LedgerError, BrokerError, ConfigError."""
        loop = asyncio.get_running_loop()

        def changed(name: str, health: Health) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._seen, name, health)

        stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
        try:
            self._cameras |= open_cameras(self.config, changed)
            for query, begun in self._ledger.open():
                self._enqueue(query, begun)
            line = self._spawn(self._line.run(self._greet))
            for work in (self._send(), self._tell(), *map(self._work, self._cameras)):
                self._spawn(work)
            for number, trigger in enumerate(self.config.trigger):
                if isinstance(trigger, Schedule):
                    self._spawn(self._keep_time(number))
            self._vigil.begin()
            ends: list[asyncio.Future[Any]] = [stopping, self._broken]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks - {line}:
                task.cancel()
            with suppress(TimeoutError):  # who leaves in order has no last will
                async with asyncio.timeout(SECONDS_TO_LEAVE):
                    await self._line.publish(self._line.will)
        finally:
            stopping.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(stopping, *self._tasks, return_exceptions=True)
            await asyncio.to_thread(close, self._cameras)
            self._ledger.close()
        if self._broken.done():
            error = self._broken.result()
            if isinstance(error, sqlite3.Error):
                raise LedgerError(f"what was asked cannot be written down any more: {error}") from error
            raise error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._broken.done():
            self._broken.set_result(error)

    # -- what comes in

    def _take(self, message: Message) -> None:
        """On the event loop, and never blocks; what cannot be used is told or left, and ends nothing."""
        now, topic = time.time(), message.topic
        if topic == f"{self.config.discovery}/status":
            if message.payload == b"online":
                self._greet()
            return
        if message.retained:  # it was asked, or taken, long ago
            return
        for name, source in self.config.camera.items():
            if topic == source.topic and len(message.payload) <= PICTURE_BYTES:
                self._cameras[name].push(message.payload)
        if topic.startswith(f"{self._base}/"):
            camera, _, verb = topic.removeprefix(f"{self._base}/").partition("/")
            if camera in self._names:
                self._ordered(self._names[camera], verb, message, now)
        for query in self._triggers.take(message, now):
            if self._accept(query, message, None):
                self._triggers.fired(query, now)

    def _ordered(self, camera: str, verb: str, message: Message, now: float) -> None:
        try:
            match verb:
                case "ask":
                    self._accept(read_ask(message, camera, self.config, f"{self._base}/", now), message, SAME)
                case "look":  # whatever it says: the camera's own question
                    message = replace(message, payload=b"")
                    self._accept(read_ask(message, camera, self.config, f"{self._base}/", now), message, SAME)
                case "watch":
                    self._vigil.order(camera, message.payload, f"{self._base}/")
                case "unwatch":
                    self._vigil.forget(camera, message.payload.decode(errors="replace").strip())
                case "watching/set" if message.payload in (b"ON", b"OFF"):
                    self._vigil.rest(camera, message.payload == b"OFF")
        except Refused as error:
            self._refuse(camera, str(error), error.by)

    def _accept(self, query: Query, message: Message | None, again_after: float | None) -> bool:
        """Whether it is news, and there was room."""
        if message and message.again and self._ledger.recent(query.key.rpartition("/")[0] + "/", query.asked - SAME):
            return False
        if self._waiting >= self.config.queue and not self._ledger.knows(query.key):
            self._refuse(query.camera, "busy", query.by, "busy", query.question)
            return False
        if not self._ledger.accept(query, again_after):
            return False
        self._enqueue(query, begun=False)
        return True

    def _enqueue(self, query: Query, begun: bool) -> None:
        if query.camera not in self._queues:
            self._ledger.answered(query.key, [])  # of a camera that is no longer configured
            return
        self._waiting += 1
        self._queues[query.camera].put_nowait((query, begun))

    def _refuse(self, camera: str, why: str, by: Asker, kind: str = "failed", question: str | None = None) -> None:
        given = {"id": by.id, "camera": camera, "question": question, "error": why, "stage": "final", "at": time.time()}
        self._ledger.put(publications(self._at(camera), False, given, kind, by))
        self._unsent.set()

    # -- answers

    async def _work(self, camera: str) -> None:
        """One camera's questions, one after the other."""
        while True:
            query, begun = await self._queues[camera].get()
            async with self._places:
                self._waiting -= 1
                out = await self._answered(query, begun)
            self._ledger.answered(query.key, out)
            self._unsent.set()

    async def _answered(self, query: Query, begun: bool) -> list[Publication]:
        """All that is to be published of an answer, but for its first line, which leaves at once."""
        started, at, retain = time.time(), self._at(query.camera), self.config.camera[query.camera].retain
        try:
            async with asyncio.timeout(query.until - started):
                shots = await asyncio.to_thread(look, self._cameras[query.camera], query)
                if query.quick and not begun:
                    said = await self._looker.ask(shots[-1:], query.question, budget=SMALL, brief=True)
                    first = finished(query, self.model, said, shots[-1:], started, "first")
                    self._ledger.answered(query.key, copies(at, retain, first, query.by), "first")
                    self._unsent.set()
                said = await self._looker.ask(shots, query.question, budget=query.budget, schema=query.schema)
            given = finished(query, self.model, said, shots, started)
            picture = await asyncio.to_thread(drawn, shots[-1], said.marks)
        except (TimeoutError, *TROUBLE) as error:
            late = f"too late: an answer was wanted within {query.until - query.asked:.0f} s"
            why = late if isinstance(error, TimeoutError) else str(error)
            return publications(at, retain, answer(query, self.model, time.time(), error=why), "failed", query.by)
        return publications(at, retain, given, "answered", query.by, picture)

    def _watched(self, camera: str, told: dict[str, Any] | None, shot: Shot | None, to: str | None) -> list[Publication]:
        """How a camera's watches are now; and what is published of one that began or ended."""
        self._state(f"{self._at(camera)}/watches", msgspec.json.encode(self._vigil.listed(camera)))
        self._state(f"{self._at(camera)}/watching", b"OFF" if camera in self._vigil.resting else b"ON")
        if told is None or shot is None:
            return []
        self._unsent.set()
        body, retain = msgspec.json.encode(told | {"model": self.model}), self.config.camera[camera].retain
        out = [Publication(f"{self._at(camera)}/image", shot.jpeg, retain), Publication(f"{self._at(camera)}/event", body)]
        return [*out, Publication(to, body)] if to else out

    def _at(self, camera: str) -> str:
        return f"{self._base}/{escaped(camera)}"

    # -- what goes out

    async def _send(self) -> None:
        """What is written down, in order."""
        while True:
            self._unsent.clear()
            while unsent := self._ledger.unsent():
                n, publication = unsent
                await self._line.publish(publication)
                self._ledger.sent(n)
            await self._unsent.wait()

    async def _tell(self) -> None:
        """How things are, of each topic the newest."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            while self._untold:
                await self._line.publish(self._untold.pop(next(iter(self._untold))))

    def _state(self, topic: str, payload: bytes) -> None:
        self._untold[topic] = Publication(topic, payload, retain=True)
        self._dirty.set()

    def _greet(self) -> None:
        """Everything anew, for a broker that may have forgotten it, or for Home Assistant when it was born."""
        for name, camera in self._cameras.items():
            if self.config.discovery:
                topic, payload = discovery.device(self.config, name, self._node, self._base, self.model)
                self._state(topic, msgspec.json.encode(payload))
            self._seen(name, camera.health)
            self._watched(name, None, None, None)
        self._state(f"{self._base}/status", b"online")

    def _seen(self, name: str, health: Health) -> None:
        there = health.state in ("live", "black", "frozen") or self.config.camera[name].topic is not None
        self._state(f"{self._at(name)}/status", b"online" if there else b"offline")
        self._state(f"{self._at(name)}/health", msgspec.json.encode(health))
        log.info("the camera %s: %s", name, health.why)

    async def _keep_time(self, number: int) -> None:
        while True:
            due, query = self._triggers.scheduled(number, time.time())
            while (left := due - time.time()) > 0:
                await asyncio.sleep(min(left, 30.0))  # the clock may be put right meanwhile
            now = time.time()
            self._accept(msgspec.structs.replace(query, asked=now, until=now + self.config.deadline_s), None, None)
