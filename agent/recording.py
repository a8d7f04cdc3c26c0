"""A recorded conversation: both sides as a stereo wav, and a log beside it from which it can be replayed (agent/replay.py).

The log has one JSON object per line, in the order of events; `at` is the number of microphone frames before it:

    {"attend": 2, "model": …, …}                     first: model and settings
    {"at": 57, "input": "PlaybackPosition", …}       inputs, without audio, which is the wav's left channel
    {"at": 57, "event": "AnswerDone", …, "ids": […]} events, without audio
    {"at": 57, "picture": 3, "data": …}              those input pictures that were attached to a turn
    {"at": 57, "said": "Yes,", "chunks": […]}        TTS output: its length, and where each word began
"""

from __future__ import annotations

import base64
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import soundfile
import soxr

from agent import events, tape
from agent.conversation_config import ConversationConfig
from agent.events import Event, Input
from agent.session import Session
from model.sampling import SamplingParams
from streams.frames import FRAME, RATE, Audio, MediaError
from streams.voice import SpeechChunk, Stream, Voice

LATE = 3  # frames that a resampler may hold back

FORMAT = 2  # of the log; 1 had other names for events and settings


class Recording:
    """A wav at 16 kHz, the user left and the agent right, written during the conversation."""

    def __init__(self, path: Path) -> None:
        """Raises MediaError if it cannot be written."""
        try:
            self._file = soundfile.SoundFile(path, "w", RATE, 2, "PCM_16", format="WAV")
        except soundfile.LibsndfileError as error:
            raise MediaError(f"{path} cannot be written: {error.error_string.strip(' .')}") from error
        self._resampler: Any = None  # while the agent speaks
        self._rate = 0
        self._played = False  # since the last frame
        self._user: deque[np.ndarray] = deque()  # frames not written yet: the agent's side is some frames late in the resampler
        self._agent = np.zeros(0, np.float32)  # at 16 kHz, of the same time

    def play(self, rate: int, pcm: np.ndarray) -> None:
        """Adds what was played during the user's next frame."""
        if self._resampler is None or rate != self._rate:
            self._flush()
            self._rate, self._resampler = rate, soxr.ResampleStream(rate, RATE, 1, dtype="float32")
            self._agent = np.pad(self._agent, (0, max(0, len(self._user) * FRAME - len(self._agent))))
        self._agent = np.concatenate([self._agent, self._resampler.resample_chunk(pcm)])
        self._played = True

    def hear(self, frame: np.ndarray) -> None:
        """Adds a frame of the user."""
        if not self._played:
            self._flush()
        self._played = False
        self._user.append(frame)
        if len(self._user) > LATE:
            self._write()

    def _flush(self) -> None:
        if self._resampler:
            self._agent = np.concatenate([self._agent, self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)])
            self._resampler = None

    def _write(self) -> None:
        piece, self._agent = self._agent[:FRAME], self._agent[FRAME:]
        sides = np.stack([self._user.popleft(), np.pad(piece, (0, FRAME - len(piece)))], 1) * 32768
        self._file.write(np.rint(sides).clip(-32768, 32767).astype(np.int16))

    def close(self) -> None:
        self._flush()
        while self._user:
            self._write()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class EventLog:
    """Writes the log. Methods are called on the event loop, except `said`, which is called in a voice's thread."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Raises MediaError if it cannot be written."""
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise MediaError(f"{path} cannot be written: {error.strerror}") from error
        self.at = 0
        self._lock = threading.Lock()  # voices speak in threads
        self._shown: deque[tuple[int, bytes]] = deque(maxlen=64)
        self._pictures = 0
        self._write({"attend": FORMAT, **head})

    def input(self, item: Input) -> None:
        """Logs an input."""
        if isinstance(item, Audio):
            self.at += 1
        elif isinstance(item, events.PictureInput):
            self._pictures += 1
            self._shown.append((self._pictures, item.data))
            self._write({"at": self.at, "input": "PictureInput", "live": item.live, "picture": self._pictures})
        else:
            self._write({"at": self.at, "input": type(item).__name__, **plain(item)})

    def event(self, event: Event, session: Session | None) -> None:
        """Logs an event. `session`: whose tape has the ids of its answers; None for a server's conversation."""
        if isinstance(event, events.PictureAttached):
            for number, data in self._shown:
                if data is event.data:
                    self._write({"at": self.at, "picture": number, "data": base64.b64encode(data).decode()})
        line: dict[str, Any] = {"at": self.at, "event": type(event).__name__}
        if isinstance(event, events.AnswerDone) and session:
            line["ids"] = ids(session, event.answer)
        if isinstance(event, events.AudioDelta):
            line |= {"answer": event.answer, "sample": event.sample, "samples": len(event.pcm)}
        else:
            line |= plain(event)
        self._write(line)

    def said(self, text: str, chunks: list[SpeechChunk]) -> None:
        """Logs the TTS output of a text."""
        listed = [[len(chunk.pcm), [[word.start, word.end, word.sample] for word in chunk.words]] for chunk in chunks]
        self._write({"at": self.at, "said": text, "chunks": listed})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._lock, suppress(ValueError):  # the log was closed while a voice still spoke
            self._file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()


class LoggedVoice:
    """A voice whose output is logged."""

    def __init__(self, voice: Voice, log: EventLog) -> None:
        self.rate, self._voice, self._log = voice.rate, voice, log

    def speak(self, text: str, before: str = "") -> Stream:
        def make(put: Callable[[SpeechChunk], bool], over: threading.Event) -> None:
            chunks = []
            with self._voice.speak(text, before) as stream:
                for chunk in stream:
                    chunks.append(chunk)
                    if not put(chunk):
                        break
            self._log.said(text, chunks)

        return Stream(make)


def beside(path: Path) -> Path:
    """The path of a recording's log."""
    return path.with_suffix(".jsonl")


def head(model: str, settings: ConversationConfig, sampling: SamplingParams, voice: Voice | None) -> dict[str, Any]:
    """The first line of the log: model, voice and settings."""
    values = {name: getattr(settings, name) for name in ("policy", "camera", "picture", "seed", "max_tokens")}
    nested = {"budget": settings.budget, "turn_detection": settings.detection, "setting": settings.setting, "sampling": sampling}
    return {
        "model": model,
        "rate": voice.rate if voice else 0,
        **values,
        **{name: plain(thing) for name, thing in nested.items()},
    }


def ids(session: Session, answer: int) -> list[int]:
    """All ids that were sampled for the answer at this index of the tape."""
    found: list[int] = []
    for entry in session.record.tape.entries[answer + 1 :]:
        if isinstance(entry, tape.Asked | tape.Opened):
            break
        if isinstance(entry, tape.Answered):
            found += entry.ids
    return found


def plain(thing: Any) -> dict[str, Any]:
    """A dataclass as JSON, without audio and pictures."""
    assert is_dataclass(thing) and not isinstance(thing, type)
    named = {field.name: getattr(thing, field.name) for field in fields(thing) if field.name not in ("data", "pcm", "samples")}
    return {name: _listed(value) for name, value in named.items()}


def _listed(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, tuple):
        return [_listed(part) for part in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value
