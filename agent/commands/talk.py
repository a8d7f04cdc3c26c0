"""`attend talk`, `attend devices` and `attend replay`."""

from __future__ import annotations

import argparse
import asyncio
import json
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, TextIO
from urllib.parse import urljoin

from agent import recording, replay
from agent.commands import options
from agent.commands.options import Commands
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.session import Session
from agent.suggestions import trying
from agent.talk import devices, door, keys
from agent.talk.terminal import Terminal
from agent.tape import SystemPrompt
from agent.turns import TurnDetectionConfig
from model.vad import Vad
from streams import portaudio
from streams.frames import MediaError
from streams.voice import open_voice
from web.client import RealtimeClient, address

SUGGESTIONS_TIMEOUT = 3.0  # seconds in which a server must answer
LOOKS: Mapping[str, Literal["off", "end", "live"]] = {"off": "off", "turn": "end", "live": "live"}


def add(commands: Commands) -> None:
    talking = commands.add_parser("talk", help="with this machine's microphone and speaker", description=door.__doc__)
    options.model(talking)
    _device_options(talking)
    talking.add_argument("--server", metavar="WS", help="talk to a running attend serve, ws://host:8765, which has the model")
    talking.add_argument("--token-file", type=Path, metavar="F", help="with --server: a file with the server's token")
    talking.add_argument(
        "--look", default="turn", choices=tuple(LOOKS), help="at the camera: never, as a turn ends (default), as it begins too"
    )
    talking.add_argument("--push-to-talk", action="store_true", help="the space bar opens a turn, and closes it")
    talking.add_argument("--voice", default="auto", help="auto, none, or a voice's name")
    talking.add_argument("--say", metavar="T", help="an opening line")
    talking.add_argument("--system", metavar="T", help="system prompt")
    talking.add_argument("--greedy", action="store_true", help="always the likeliest token")
    talking.add_argument("--record", type=Path, metavar="OUT.wav", help="both sides in stereo, and a log beside it for replay")
    talking.add_argument("--marks", type=Path, metavar="DIR", help="a folder for pictures with the marks drawn")
    talking.add_argument("--plain", action="store_true", help="plain lines, as without a terminal")
    talking.set_defaults(run=_talk)

    listing = commands.add_parser("devices", help="microphones, speakers and cameras", description=devices.__doc__)
    _device_options(listing)
    listing.add_argument("--check", action="store_true", help="try those that talk would take: hear, say and see something")
    listing.set_defaults(run=_devices)

    replaying = commands.add_parser("replay", help="replay a recorded conversation and compare", description=replay.__doc__)
    replaying.add_argument("recording", type=Path, metavar="FILE", help="what talk --record wrote")
    options.model(replaying, None)
    replaying.set_defaults(run=_replay)


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mic", metavar="NAME", help="number or part of the name of a microphone (see attend devices)")
    parser.add_argument("--speaker", metavar="NAME", help="the same of a speaker")
    parser.add_argument("--camera", metavar="SOURCE", help="number of a camera, a video, a picture, or an rtsp:// address")


def _talk(given: argparse.Namespace) -> int:
    backend: _RemoteBackend | _LocalBackend = _RemoteBackend(given) if given.server else _LocalBackend(given)

    async def converse(out: TextIO) -> str | None:
        async with AsyncExitStack() as stack:
            view = stack.enter_context(Terminal(out, lively=out.isatty() and not given.plain))
            camera = given.camera if given.look != "off" else None
            opened = await stack.enter_async_context(door.open_devices(view, given.mic, given.speaker, camera, backend.spoken))
            files = door.RecordingFiles.begin(given.record, backend.head()) if given.record else None
            if files:
                stack.callback(files.close)
            conversation = stack.enter_context(backend.conversation(files))
            talk = door.RoomConversation(view, opened, files, given.say, given.marks)
            if given.push_to_talk:
                stack.enter_context(keys.pressed(b" ", talk.key))
            stack.enter_context(keys.interrupted(talk.stop))
            view.note(door.advice(opened))
            for line in backend.suggestions:
                view.note(line)
            await talk.run(conversation)
            return talk.failed

    with keys.own_terminal() as out:
        failed = asyncio.run(converse(out))
    return 1 if failed else 0


class _RemoteBackend:
    """A conversation with a server. Raises MediaError for options that only the server can decide."""

    def __init__(self, given: argparse.Namespace) -> None:
        decided = {"--say": given.say, "--system": given.system, "--greedy": given.greedy, "--look live": given.look == "live"}
        if told := [name for name, value in decided.items() if value]:
            raise MediaError(f"{told[0]} is not for a conversation at a server: leave it out, or leave --server out")
        token = options.token(given.token_file) if given.token_file else None
        self.spoken = given.voice != "none"
        self._url, self._client = given.server, RealtimeClient(given.server, token, self.spoken, given.push_to_talk)
        self.suggestions = _suggested(given.server)

    def head(self) -> dict[str, object]:
        return {"model": self._url}

    @contextmanager
    def conversation(self, files: door.RecordingFiles | None) -> Iterator[door.ConversationBackend]:
        yield self._client


def _suggested(url: str) -> list[str]:
    """What the server's model suggests to try; nothing if it cannot be read: the conversation then reports the error."""
    page = urljoin(address(url).replace("ws", "http", 1), "../")
    try:
        with urllib.request.urlopen(urljoin(page, "suggestions.json"), timeout=SUGGESTIONS_TIMEOUT) as answer:
            told = json.loads(answer.read(1 << 16))
        return [told["about"], trying(tuple(told["questions"]), urljoin(page, told["picture"]))]
    except (OSError, ValueError, KeyError, TypeError):
        return []


class _LocalBackend:
    """A conversation with a model in this process."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model, self.voice = given.model, open_voice(given.voice)
        self.spoken, self.loaded = self.voice is not None, options.load(given)
        self.suggestions = self.loaded.suggestions.lines() if self.loaded.suggestions else []
        sampling = replace(self.loaded.generation, greedy=self.loaded.generation.greedy or given.greedy)
        detection, setting = TurnDetectionConfig(hands_free=not given.push_to_talk), SystemPrompt(given.system)
        self.settings = ConversationConfig(detection=detection, setting=setting, camera=LOOKS[given.look], sampling=sampling)

    def head(self) -> dict[str, object]:
        assert self.settings.sampling
        return recording.head(self.model, self.settings, self.settings.sampling, self.voice)

    @contextmanager
    def conversation(self, files: door.RecordingFiles | None) -> Iterator[door.ConversationBackend]:
        with Engine(self.loaded) as engine:
            voice = recording.LoggedVoice(self.voice, files.log) if self.voice and files else self.voice
            session = Session(engine, Vad(), voice, self.settings)
            if files:
                files.session = session
            yield session


def _devices(given: argparse.Namespace) -> int:
    async def look(out: TextIO) -> int:
        found = await asyncio.to_thread(portaudio.devices)
        print(*devices.lines(found, devices.cameras()), sep="\n", file=out, flush=True)
        if not given.check:
            return 0
        return await devices.check(found, given.mic, given.speaker, given.camera, open_voice(), out)

    with keys.own_terminal() as out:
        return asyncio.run(look(out))


def _replay(given: argparse.Namespace) -> int:
    log = replay.read(given.recording)
    given.model = given.model or log.head["model"]
    loaded = options.load(given)

    async def compare() -> list[replay.Compared]:
        with Engine(loaded) as engine:
            return await replay.replay(log, engine)

    compared = asyncio.run(compare())
    for number, one in enumerate(compared, 1):
        print(f"{number}  {'the same' if one.same else 'not the same'} {len(one.then)} ids: {one.text.strip()}")
    return 0 if all(one.same for one in compared) else 1
