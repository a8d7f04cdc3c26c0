"""The service behind `attend watch`: an event becomes a question about a camera, an answer and a publication.

What comes is written down before the broker is told that it came, and an answer with all that is published of it is
written down before any of it leaves. So a crash at any moment loses nothing and answers nothing twice.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from agent.watch import discovery, triggers
from agent.watch.answers import answer_body, finished_body, publications, replies
from agent.watch.config import ConfigError, ScheduleTrigger, WatchConfig, identifier
from agent.watch.monitor import LOOK_ERRORS, Monitor
from agent.watch.outbox import Outbox, OutboxError
from agent.watch.requests import AskRefused, CameraQuestion, Requester, read_ask, read_monitor_request
from agent.watch.shots import close_cameras, draw_marks, look, open_cameras
from agent.watch.visual_qa import SMALL, VisualQA
from streams.camera import Camera, Health, Shot
from streams.mqtt import Message, MqttConnection, Publication
from streams.pictures import PICTURE_BYTES

SAME_ID = 600.0  # seconds in which an id means the same question
SECONDS_TO_LEAVE = 2.0  # for the broker to take the word that we are offline

log = logging.getLogger("attend.watch")


async def ask_once(config: WatchConfig, visual_qa: VisualQA, model: str, name: str, question: str) -> dict[str, Any]:
    """One question without a broker; the answer as it would be published. Raises ConfigError, and LOOK_ERRORS of the question."""
    if name not in config.camera:
        raise ConfigError(f"there is no camera {name}; there are {', '.join(config.camera)}")
    if config.camera[name].topic:
        raise ConfigError(f"the pictures of the camera {name} come over MQTT, so it cannot be asked without a broker")
    config = msgspec.structs.replace(config, camera={name: config.camera[name]}, trigger=())
    asked = read_ask(Message("ask", msgspec.json.encode({"question": question})), name, config, time.time())
    cameras = open_cameras(config)
    try:
        shots = await asyncio.to_thread(look, cameras[name], asked)
        answer = await visual_qa.ask(shots, question, budget=asked.budget, schema=asked.schema)
        return finished_body(asked, model, answer, shots, asked.asked, time.time())
    finally:
        await asyncio.to_thread(close_cameras, cameras)


class WatchService:
    """`run` until `stop` is set. `model`: its name, as answers give it."""

    def __init__(self, config: WatchConfig, visual_qa: VisualQA, model: str) -> None:
        """Raises OutboxError."""
        self.config, self.model = config, model
        self._visual_qa = visual_qa
        self._names = {identifier(name): name for name in config.camera}
        self._queues: dict[str, asyncio.Queue[tuple[CameraQuestion, bool]]] = {name: asyncio.Queue() for name in config.camera}
        self.waiting = 0  # questions in all queues, which are bounded together
        self._places = asyncio.Semaphore(config.at_once)
        self._triggers = triggers.Triggers(config)
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._unsent, self._dirty = asyncio.Event(), asyncio.Event()
        self._states: dict[str, Publication] = {}  # not published yet, the newest of each topic
        will = Publication(f"{config.base}/status", b"offline", retain=True)
        name = f"attend-{identifier(config.node)}"
        self.connection = MqttConnection(config.broker, name, self._topics(), will, self._receive)
        self.outbox = Outbox(Path(config.state), identifier(config.node))
        self.cameras: dict[str, Camera] = {}
        self._monitor = Monitor(visual_qa, self.outbox, self.cameras, self._spawn, self._report)

    def _topics(self) -> list[str]:
        verbs = ("ask", "look", "watch", "unwatch", "watching/set")
        own = [f"{self.config.at(camera)}/{verb}" for camera in self.config.camera for verb in verbs]
        pictures = [camera.topic for camera in self.config.camera.values() if camera.topic]
        birth = [f"{self.config.discovery}/status"] if self.config.discovery else []
        return [*dict.fromkeys([*own, *pictures, *birth, *triggers.topics(self.config)])]

    async def run(self, stop: asyncio.Event) -> None:
        """Raises EngineStopped, OutboxError, ConfigError."""
        loop = asyncio.get_running_loop()

        def changed(name: str, health: Health) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._publish_health, name, health)

        stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
        try:
            self.cameras |= open_cameras(self.config, changed)
            for question, begun in self.outbox.open():
                self._enqueue(question, begun)
            connection = self._spawn(self.connection.run(self._publish_all))
            for work in (self._send(), self._send_states(), *map(self._work, self.cameras)):
                self._spawn(work)
            for number, trigger in enumerate(self.config.trigger):
                if isinstance(trigger, ScheduleTrigger):
                    self._spawn(self._keep_time(number))
            self._monitor.start()
            ends: list[asyncio.Future[Any]] = [stopping, self._broken]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks - {connection}:
                task.cancel()
            with suppress(TimeoutError):  # an orderly disconnect triggers no last will
                async with asyncio.timeout(SECONDS_TO_LEAVE):
                    await self.connection.publish(self.connection.will)
        finally:
            stopping.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(stopping, *self._tasks, return_exceptions=True)
            await asyncio.to_thread(close_cameras, self.cameras)
            self.outbox.close()
        if self._broken.done():
            error = self._broken.result()
            if isinstance(error, sqlite3.Error):
                raise OutboxError(f"questions cannot be written down any more: {error}") from error
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

    def _receive(self, message: Message) -> None:
        """On the event loop, and never blocks; what cannot be used is answered with an error or ignored, and ends nothing."""
        now, topic = time.time(), message.topic
        if topic == f"{self.config.discovery}/status":
            if message.payload == b"online":
                self._publish_all()
            return
        for name, camera in self.config.camera.items():
            if topic == camera.topic and len(message.payload) <= PICTURE_BYTES:
                self.cameras[name].push(message.payload, retained=message.retained)
        if message.retained:  # it was asked, or taken, long ago
            return
        if topic.startswith(f"{self.config.base}/"):
            camera_id, _, verb = topic.removeprefix(f"{self.config.base}/").partition("/")
            if camera_id in self._names:
                self._command(self._names[camera_id], verb, message, now)
        for question in self._triggers.take(message, now):
            if self._accept(question, message, None):
                self._triggers.fired(question, now)

    def _command(self, camera: str, verb: str, message: Message, now: float) -> None:
        try:
            match verb:
                case "ask":
                    self._accept(read_ask(message, camera, self.config, now), message, SAME_ID)
                case "look":  # whatever it says: the camera's own question
                    message = replace(message, payload=b"")
                    self._accept(read_ask(message, camera, self.config, now), message, SAME_ID)
                case "watch":
                    self._monitor.add(camera, read_monitor_request(message.payload, self.config))
                case "unwatch":
                    self._monitor.remove(camera, message.payload.decode(errors="replace").strip())
                case "watching/set" if message.payload in (b"ON", b"OFF"):
                    self._monitor.pause(camera, message.payload == b"OFF")
        except AskRefused as error:
            self._refuse(camera, str(error), error.by)

    def _accept(self, question: CameraQuestion, message: Message | None, again_after: float | None) -> bool:
        """Whether it is new, and there was room."""
        if message and message.again:
            stem, _, time_of_it = question.key.rpartition("/")
            has_id = time_of_it != f"{question.asked:.3f}"
            if not has_id and self.outbox.recent(f"{stem}/", question.asked - SAME_ID):
                return False
        if self.waiting >= self.config.queue and not self.outbox.knows(question.key):
            self._refuse(question.camera, "busy", question.by, "busy", question.question)
            return False
        if not self.outbox.accept(question, again_after):
            return False
        self._enqueue(question, begun=False)
        return True

    def _enqueue(self, question: CameraQuestion, begun: bool) -> None:
        if question.camera not in self._queues:
            self.outbox.answered(question.key, [])  # of a camera that is no longer configured
            return
        self.waiting += 1
        self._queues[question.camera].put_nowait((question, begun))

    def _refuse(self, camera: str, why: str, by: Requester, event_type: str = "failed", question: str | None = None) -> None:
        body = {"id": by.id, "camera": camera, "question": question, "error": why, "stage": "final", "at": time.time()}
        self.outbox.put(publications(self.config.at(camera), False, body, event_type, by))
        self._unsent.set()

    # -- answers

    async def _work(self, camera: str) -> None:
        """One camera's questions, one after the other."""
        while True:
            question, begun = await self._queues[camera].get()
            async with self._places:
                self.waiting -= 1
                out = await self._answer(question, begun)
            self.outbox.answered(question.key, out)
            self._unsent.set()

    async def _answer(self, question: CameraQuestion, begun: bool) -> list[Publication]:
        """All that is to be published of an answer, but for its first line, which leaves at once. `begun`: it has left before."""
        started, at, retain = time.time(), self.config.at(question.camera), self.config.camera[question.camera].retain
        try:
            async with asyncio.timeout(question.until - started):
                shots = await asyncio.to_thread(look, self.cameras[question.camera], question)
                if question.quick and not begun:
                    answer = await self._visual_qa.ask(shots[-1:], question.question, budget=SMALL, brief=True)
                    first = finished_body(question, self.model, answer, shots[-1:], started, time.time(), "first")
                    self.outbox.answered(question.key, replies(at, retain, first, question.by), "first")
                    self._unsent.set()
                answer = await self._visual_qa.ask(shots, question.question, budget=question.budget, schema=question.schema)
            body = finished_body(question, self.model, answer, shots, started, time.time())
            picture = await asyncio.to_thread(draw_marks, shots[-1], answer.marks)
        except (TimeoutError, *LOOK_ERRORS) as error:
            late = f"too late: an answer was wanted within {question.until - question.asked:.0f} s"
            why = late if isinstance(error, TimeoutError) else str(error)
            return publications(at, retain, answer_body(question, self.model, time.time(), error=why), "failed", question.by)
        return publications(at, retain, body, "answered", question.by, picture)

    def _report(self, camera: str, told: dict[str, Any] | None, shot: Shot | None, to: str | None) -> list[Publication]:
        """Publishes a camera's monitors as they are now. Returns what is to be published of one that began or ended."""
        at, retain = self.config.at(camera), self.config.camera[camera].retain
        self._state(f"{at}/watches", msgspec.json.encode(self._monitor.listed(camera)))
        self._state(f"{at}/watching", b"OFF" if camera in self._monitor.paused else b"ON")
        if told is None or shot is None:
            return []
        self._unsent.set()
        body = msgspec.json.encode(told | {"model": self.model})
        out = [Publication(f"{at}/image", shot.jpeg, retain), Publication(f"{at}/event", body)]
        return [*out, Publication(to, body)] if to else out

    # -- what goes out

    async def _send(self) -> None:
        """Publishes what the outbox holds, in order."""
        while True:
            self._unsent.clear()
            while unsent := self.outbox.unsent():
                number, publication = unsent
                await self.connection.publish(publication)
                self.outbox.sent(number)
            await self._unsent.wait()

    async def _send_states(self) -> None:
        """Publishes states, of each topic the newest."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            while self._states:
                await self.connection.publish(self._states.pop(next(iter(self._states))))

    def _state(self, topic: str, payload: bytes) -> None:
        self._states[topic] = Publication(topic, payload, retain=True)
        self._dirty.set()

    def _publish_all(self) -> None:
        """All states, for a broker that may have forgotten them, or for Home Assistant as it starts."""
        for name, camera in self.cameras.items():
            if self.config.discovery:
                topic, payload = discovery.device(self.config, name, self.model)
                self._state(topic, msgspec.json.encode(payload))
            self._publish_health(name, camera.health)
            self._report(name, None, None, None)
        self._state(f"{self.config.base}/status", b"online")

    def _publish_health(self, name: str, health: Health) -> None:
        there = health.state in ("live", "black", "frozen") or self.config.camera[name].topic is not None
        self._state(f"{self.config.at(name)}/status", b"online" if there else b"offline")
        self._state(f"{self.config.at(name)}/health", msgspec.json.encode(health))
        log.info("the camera %s: %s", name, health.why)

    async def _keep_time(self, number: int) -> None:
        """Asks the questions of one schedule, each when it is due."""
        while True:
            due, question = self._triggers.scheduled(number, time.time())
            while (left := due - time.time()) > 0:
                await asyncio.sleep(min(left, 30.0))  # the clock may be put right meanwhile
            now = time.time()
            self._accept(msgspec.structs.replace(question, asked=now, until=now + self.config.deadline_s), None, None)
