"""A conversation through this machine's microphone, speaker, camera and terminal.

The microphone is the clock: keys, camera pictures and what was played are handed on with its next frame. It gives frames
without end, silence while the device is unplugged, so a conversation goes on whatever happens to the devices.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agent import events, marks
from agent.events import Event, Input
from agent.marks import Mark
from agent.recording import EventLog, Recording, beside
from agent.session import Session
from agent.talk.terminal import Terminal
from streams import portaudio
from streams.address import check_source
from streams.camera import Camera, Health, Shot
from streams.echo import EchoCanceller
from streams.frames import FRAME, Audio, MediaError
from streams.opencv import cv2
from streams.pictures import decode_picture, load_picture
from streams.sound import Microphone, Speaker

CAMERA_INTERVAL = 0.5  # seconds between pictures of the camera
LOSS_NOTES = 250  # frames between two notes about lost sound
PENDING = 64  # inputs that may wait for the next frame
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif")


class ConversationBackend(Protocol):
    """A `Session` of this process, or the client in web/ of a session at a server."""

    async def run(self, inputs: AsyncIterator[Input], emit: Callable[[Event], Awaitable[None]]) -> None: ...


@dataclass(frozen=True)
class Devices:
    """The open devices. None: there is none of this kind."""

    microphone: Microphone
    speaker: Speaker | None = None
    echo: EchoCanceller | None = None
    camera: Camera | None = None


@dataclass
class RecordingFiles:
    """The files of --record: sound and log. `session`: the one whose token ids are logged; None at a server."""

    recording: Recording
    log: EventLog
    session: Session | None = None

    @classmethod
    def begin(cls, path: Path, head: Mapping[str, Any]) -> RecordingFiles:
        """Opens the wav at `path`, and its log with `head` as the first line. Raises MediaError where they cannot be written."""
        if path.suffix != ".wav":
            raise MediaError(f"{path} cannot be the recording: its name must end in .wav")
        return cls(Recording(path), EventLog(beside(path), head))

    def close(self) -> None:
        self.recording.close()
        self.log.close()


@dataclass
class PlaybackQueue:
    """Sound that was sent to the speaker and was not played yet."""

    queue: deque[events.AudioDelta] = field(default_factory=deque)
    taken: int = 0  # samples of the first that were

    def append(self, said: events.AudioDelta) -> None:
        if self.queue and (self.queue[-1].answer, self.queue[-1].sample + len(self.queue[-1].pcm)) != (said.answer, said.sample):
            self.queue.clear()  # the rest was cleared, and nobody heard it
        if not self.queue:
            self.taken = 0
        self.queue.append(said)

    def played(self, answer: int, sample: int) -> Iterator[tuple[int, np.ndarray]]:
        """The pieces [samples], each with its rate, that were played since the last call; `sample`: where the speaker is."""
        while self.queue and self.queue[0].answer == answer:
            said = self.queue[0]
            end = min(sample - said.sample, len(said.pcm))
            if end > self.taken:
                yield said.rate, said.pcm[self.taken : end]
                self.taken = end
            if end < len(said.pcm):
                return
            self.queue.popleft()
            self.taken = 0


class RoomConversation:
    """One conversation. `opening` is spoken first; `folder`: where pictures with marks are written. Each may be None."""

    def __init__(
        self,
        terminal: Terminal,
        devices: Devices,
        files: RecordingFiles | None = None,
        opening: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.terminal, self.microphone, self.speaker = terminal, devices.microphone, devices.speaker
        self.echo, self.camera = devices.echo, devices.camera
        self._files, self._folder = files, folder
        self._pending: deque[Input] = deque(maxlen=PENDING)
        if opening:
            self._pending.append(events.SayText(opening))
        self._pressed = self._stopping = False
        self.failed: str | None = None  # why it is over
        self._answer: int | None = None
        self._reported: tuple[int, int] | None = None
        self._playback = PlaybackQueue()
        self._frames = self._next_note = self._lost = 0
        self._looked: dict[int, bytes] = {}  # the newest picture that was
        self._marks: dict[int, list[Mark]] = {}  # of the answer, by picture
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, conversation: ConversationBackend) -> None:
        """Returns after `stop`, or when the conversation fails (`failed` says why)."""
        for work in (self.speaker and self.speaker.keep_open(), self.camera and self._watch_camera(self.camera)):
            if work:
                self._spawn(work)
        try:
            await conversation.run(self._inputs(), self._emit)
        finally:
            if self.speaker:
                self.speaker.clear()
            drawing = [task for task in self._tasks if task.get_name() == "drawing"]
            await asyncio.gather(*drawing, return_exceptions=True)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        self._stopping = True
        await self.microphone.close()

    def key(self) -> None:
        """Push to talk: a key press opens the turn, and the next one closes it, as a terminal does not report key releases."""
        self._pressed = not self._pressed
        self._pending.append(events.PushToTalkStart() if self._pressed else events.PushToTalkEnd())

    # -- in

    async def _inputs(self) -> AsyncIterator[Input]:
        async for frame in self.microphone.frames():
            if self._stopping:
                return
            frame = self.echo.clean(frame) if self.echo else frame
            self.terminal.hear(frame)
            self._count_losses()
            while self._pending:
                yield self._logged(self._pending.popleft())
            yield self._logged(Audio(frame, self._frames * FRAME))
            self._frames += 1
            if heard := self._heard():
                yield self._logged(heard)
            if self._files:
                self._files.recording.hear(frame)

    def _logged(self, item: Input) -> Input:
        if self._files:
            self._files.log.input(item)
        return item

    def _heard(self) -> events.PlaybackPosition | None:
        heard = self.speaker.heard if self.speaker else None
        if heard is None or heard == self._reported or heard[0] != self._answer:
            return None
        self._reported = heard
        self.terminal.heard(*heard)
        for rate, pcm in self._playback.played(*heard):
            if self._files:
                self._files.recording.play(rate, pcm)
        return events.PlaybackPosition(*heard)

    def _count_losses(self) -> None:
        lost = self.microphone.overflows + self.microphone.dropped
        if lost > self._lost and self._frames >= self._next_note:
            self.terminal.note(f"sound of the microphone was lost {lost - self._lost} times: this machine is too busy")
            self._lost, self._next_note = lost, self._frames + LOSS_NOTES

    async def _watch_camera(self, camera: Camera) -> None:
        last: Shot | None = None
        while True:
            shot = await asyncio.to_thread(camera.newest)
            if shot and shot is not last:
                last = shot
                self._pending = deque([item for item in self._pending if not isinstance(item, events.PictureInput)], PENDING)
                self._pending.append(events.PictureInput(shot.jpeg, live=True))
            await asyncio.sleep(CAMERA_INTERVAL)

    # -- out

    async def _emit(self, event: Event) -> None:
        if self._files:
            self._files.log.event(event, self._files.session)
        match event:
            case events.AnswerStarted():
                self._answer, self._marks = event.answer, {}
            case events.AudioDelta() if self.speaker:
                self.speaker.play(event.answer, event.sample, event.pcm, event.rate)
                self._playback.append(event)
            case events.OutputCleared() if self.speaker:
                self.speaker.clear()
            case events.SessionFailed():
                self.failed = event.message
            case events.PictureAttached():
                self._looked = {event.picture: event.data}
            case events.MarkAdded() if event.picture is not None:
                self._marks.setdefault(event.picture, []).append(event.mark)
            case events.AnswerDone():
                self._answer = None
                for picture, found in self._marks.items():
                    if self._folder and picture in self._looked:
                        self._spawn(self._draw_marks(self._folder, self._looked[picture], found), "drawing")
        self.terminal.tell(event)

    async def _draw_marks(self, folder: Path, picture: bytes, found: list[Mark]) -> None:
        path = folder / f"{datetime.now():%Y-%m-%d-%H%M%S-%f}.png"

        def write() -> bool:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return bool(cv2.imwrite(str(path), marks.draw(decode_picture(picture, "the picture"), found)[:, :, ::-1]))
            except (OSError, cv2.error, MediaError):
                return False

        written = await asyncio.to_thread(write)
        self.terminal.note(f"the marks are drawn in {path}" if written else f"{path} cannot be written")

    def _spawn(self, work: Awaitable[None], name: str | None = None) -> None:
        task = asyncio.ensure_future(work)
        if name:
            task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def open_devices(
    terminal: Terminal, mic: str | None, speaker: str | None, camera: str | None, spoken: bool
) -> AsyncIterator[Devices]:
    """Opens this machine's devices by name or number; without a voice (`spoken` False) there is no speaker. Raises SoundError and
    MediaError."""
    found = await asyncio.to_thread(portaudio.devices)
    microphone = Microphone(portaudio.choose(found, "microphone", mic), terminal.note)
    echo = EchoCanceller() if spoken else None
    loud = Speaker(portaudio.choose(found, "speaker", speaker), terminal.note, echo.far if echo else None) if spoken else None
    eye = open_camera(camera, terminal.note) if camera is not None else None
    try:
        await microphone.open()
        if loud:
            await loud.open()
        yield Devices(microphone, loud, echo, eye)
    finally:
        await microphone.close()
        if loud:
            await loud.close()
        if eye:
            await asyncio.to_thread(eye.close)


def open_camera(source: str, note: Callable[[str], None]) -> Camera:
    """A device's number, a video, an address, or a picture file, which acts as a camera that always sees the same.

    `note` is called on the running loop. Raises MediaError for what cannot be a camera."""
    loop = asyncio.get_running_loop()

    def changed(health: Health) -> None:
        if health.state != "opening":
            loop.call_soon_threadsafe(note, f"camera: {health.why}")

    if not source.lower().endswith(PICTURES) or "://" in source:
        return Camera(int(source) if source.isdecimal() else source, changed=changed)
    check_source(source)
    picture = load_picture(source)
    decode_picture(picture, source)
    camera = Camera(None)
    camera.push(picture)
    return camera


def advice(devices: Devices) -> str:
    """One line: the devices in use, and what helps against echo."""
    heard = f"listening to {devices.microphone.device}"
    if devices.speaker is None or devices.echo is None:
        return f"{heard}; answers are written"
    if devices.microphone.device.cancels:
        how = "the system takes its echo out"
    elif devices.echo.cancels:
        how = "its echo is taken out; a headset is better still"
    else:
        how = "a headset is best: beside a loudspeaker one must speak up to interrupt"
    return f"{heard}, speaking to {devices.speaker.device}: {how}"
