"""The commands. Everything is wired here, and nothing imports this."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import cv2

from agent import ask, bench, checkpoint, config, crowd, hours, marks, script, waits, watch
from agent.ask import Answer, Part
from agent.engine import Engine, EngineStopped, RowLost
from agent.ledger import LedgerError
from agent.looking import NoAnswer
from agent.session import Session
from agent.settings import Settings
from agent.tape import Setting
from agent.view import Policy
from model.cache import RowFull
from model.compiled import NotCompiled, compile_steps
from model.gemma import CheckpointError
from model.pixels import BUDGETS
from model.tokenizer import TokenizerError
from model.vad import Vad, VadMissing
from streams.frames import MediaError
from streams.mqtt import BrokerError
from streams.voice import VoiceMissing, open_voice
from web import server
from web.access import Access, NotServed
from web.caller import Caller

COMPLAINTS = (CheckpointError, TokenizerError, MediaError, RowFull, RowLost, EngineStopped, VoiceMissing, VadMissing, NotServed)
OF_CAMERAS = (config.ConfigError, LedgerError, BrokerError, NoAnswer)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except (*COMPLAINTS, *OF_CAMERAS) as complaint:
        print(f"attend: {complaint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Part(argparse.Action):
    """--text, --image, --audio and --video keep the order in which they were given."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: object, option: str | None = None) -> None:
        assert option is not None
        namespace.parts = [*(namespace.parts or []), Part(option.removeprefix("--"), str(value))]  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attend", description="An agent that listens and watches while you speak.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    asking = commands.add_parser("ask", help="one question from files", description=ask.__doc__)
    _model_options(asking)
    asking.add_argument("--turns", type=Path, metavar="F", help="a scripted conversation (TOML) instead: " + script.FORMAT)
    asking.add_argument("--record", type=Path, metavar="OUT.wav", help="with --turns: both sides in stereo, left the user")
    asking.add_argument("--voice", default="auto", help="with --turns: auto, none, or a voice's name")
    asking.add_argument("--system", metavar="T", help="system prompt")
    for kind, metavar, what in (
        ("text", "T", "typed words"),
        ("image", "F", "a picture: png, jpeg, webp"),
        ("audio", "F", "a sound file: wav, flac, ogg, mp3"),
        ("video", "F", "a video file, of which 32 frames are looked at"),
    ):
        asking.add_argument(f"--{kind}", action=_Part, dest="parts", metavar=metavar, help=f"{what}; repeatable, order counts")
    asking.add_argument("--budget", type=int, choices=BUDGETS, help="soft tokens of a picture (default: the checkpoint's)")
    asking.add_argument("--max-tokens", type=_positive, default=256, metavar="N", help="length of the answer (default 256)")
    asking.add_argument("--greedy", action="store_true", help="always the likeliest token")
    asking.add_argument("--temperature", type=float, metavar="X")
    asking.add_argument("--top-k", type=_positive, metavar="N")
    asking.add_argument("--top-p", type=float, metavar="X")
    asking.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same answer")
    asking.add_argument("--thinking", action="store_true", help="let the model reason before it answers")
    asking.add_argument("--real-time", action="store_true", help="feed the sound as fast as it was spoken")
    asking.add_argument("--mark-image", type=Path, metavar="OUT.png", help="write the last picture with the answer's marks drawn")
    asking.add_argument("--json", action="store_true", help="print one JSON object")
    asking.set_defaults(run=_ask, parts=None)

    serving = commands.add_parser("serve", help="OpenAI Realtime over a websocket", description=server.__doc__)
    _model_options(serving)
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1); any other needs a token")
    serving.add_argument("--port", type=int, default=8765, metavar="N", help="default 8765")
    serving.add_argument("--rows", type=_positive, default=4, metavar="N", help="conversations at once (default 4)")
    serving.add_argument("--voice", default="auto", help="auto, none, or a voice's name")
    serving.add_argument("--policy", default="transcripts", choices=get_args(Policy), help="what a row keeps of finished turns")
    serving.add_argument("--token-file", type=Path, metavar="F", help="a file with the token that clients must have")
    serving.add_argument("--allow-origin", action="append", metavar="O", help="a page elsewhere that may connect; repeatable")
    serving.add_argument("--tls-cert", type=Path, metavar="F", help="certificate chain (PEM)")
    serving.add_argument("--tls-key", type=Path, metavar="F", help="its key (PEM)")
    serving.add_argument("--log-content", action="store_true", help="log what is said too")
    serving.add_argument("--log-json", action="store_true", help="log lines of JSON")
    serving.set_defaults(run=_serve)

    watching = commands.add_parser("watch", help="questions about cameras, over MQTT", description=watch.__doc__)
    _model_options(watching)
    watching.add_argument("--config", type=Path, metavar="F", help=f"TOML; an example: {config.EXAMPLE}")
    watching.add_argument("--camera", action="append", metavar="NAME=SOURCE", help="a camera, without a file or beside it")
    watching.add_argument("--broker", metavar="HOST[:PORT]", help="default 127.0.0.1:1883")
    watching.add_argument("--once", nargs=2, metavar=("CAMERA", "QUESTION"), help="ask without a broker and print the answer")
    watching.add_argument("--json", action="store_true", help="with --once: print one JSON object")
    watching.set_defaults(run=_watch)

    benching = commands.add_parser("bench", help="measure", description="Measurements on this machine.")
    kinds = benching.add_subparsers(required=True, metavar="WHAT")
    model = kinds.add_parser(
        "model", help="the model alone, beside transformers where it is installed", description=bench.__doc__
    )
    model.add_argument(
        "--shape", action="append", choices=sorted(bench.SHAPES), help="repeatable (default: nano, mid, and 12b on a GPU)"
    )
    model.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    model.add_argument("--compile", action="store_true", help="measure compiled steps too, where there is a C++ compiler")
    model.add_argument("--json", action="store_true", help="print one JSON object")
    model.set_defaults(run=_bench_model)
    talking = kinds.add_parser("session", help="whole conversations, many at once, in real time", description=crowd.__doc__)
    _model_options(talking)
    talking.add_argument(
        "--speakers", type=_positive, action="append", metavar="N", help="talk at once; repeatable (default: 1, 4, 16)"
    )
    talking.add_argument("--url", metavar="WS", help="at a server that is running, ws://127.0.0.1:8765/v1/realtime, not in here")
    talking.add_argument("--token-file", type=Path, metavar="F", help="with --url: a file with the server's token")
    talking.add_argument("--chart", type=Path, metavar="OUT.svg", help="measure and draw the first token by length of speech")
    talking.add_argument("--json", action="store_true", help="print one JSON object")
    talking.add_argument("--hours", type=float, metavar="H", help="instead: one conversation of so long, simulated")
    talking.set_defaults(run=_bench_session)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", metavar="DIR|HUB_ID", help="checkpoint (default: nano, which is embedded)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--compile", action="store_true", help="on a CPU, compile first what a step of one row computes; needs a C++ compiler"
    )


def _load(given: argparse.Namespace) -> checkpoint.Loaded:
    loaded = checkpoint.load(given.model, given.device, given.dtype, _progress)
    if given.compile:
        try:
            compile_steps(loaded.model, lambda: print("attend: compiling, half a minute the first time", file=sys.stderr))
        except NotCompiled as reason:
            print(f"attend: not compiled, which is slower and nothing else: {reason}", file=sys.stderr)
    return loaded


def _ask(given: argparse.Namespace) -> int:
    if given.turns:
        return _play(given)
    if not given.parts:
        raise MediaError("nothing to ask: give at least one of --text, --image, --audio and --video")
    looking = any(part.kind in ("image", "video") for part in given.parts)
    if given.mark_image and not looking:
        raise MediaError("--mark-image needs a picture: give an --image or a --video")
    media = ask.read(given.parts)
    begun = perf_counter()
    loaded = _load(given)
    load_ms = (perf_counter() - begun) * 1000
    said = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
    said = {name: value for name, value in said.items() if value is not None}
    try:
        how = replace(loaded.generation, greedy=given.greedy or (loaded.generation.greedy and not said), **said)
    except ValueError as wrong:
        raise MediaError(str(wrong)) from wrong
    answer = asyncio.run(
        ask.ask(
            loaded,
            media,
            how=how,
            system=given.system,
            budget=given.budget,
            most=given.max_tokens,
            seed=given.seed,
            thinking=given.thinking,
            real_time=given.real_time,
            say=(lambda text: None) if given.json else _say,
        )
    )
    answer.timings_ms["load"] = load_ms
    if given.mark_image:
        picture = [shown.pixels for medium in media for shown in medium.pictures][-1]
        _write_picture(given.mark_image, marks.draw(picture, answer.marks)[:, :, ::-1])
    if given.json:
        print(json.dumps(answer.as_json()))
    else:
        _report(answer, given.mark_image)
    return 0


def _play(given: argparse.Namespace) -> int:
    if given.parts or given.mark_image:
        raise MediaError("--turns has its questions and pictures in its file: leave --text, --image, --audio and --video out")
    system, turns = script.read(given.turns)
    voice = open_voice(given.voice)
    loaded = _load(given)
    performance = script.Performance(turns, given.real_time)
    setting = Setting(given.system if given.system is not None else system, thinking=given.thinking)

    async def perform() -> None:
        with Engine(loaded) as engine:
            settings = Settings(setting=setting, most=given.max_tokens, seed=given.seed)
            await performance.run(Session(engine, Vad(), voice, settings))

    asyncio.run(perform())
    if given.record:
        performance.write(given.record)
    if given.json:
        print(json.dumps([exchange.as_json() for exchange in performance.exchanges]))
        return 0
    for number, exchange in enumerate(performance.exchanges, 1):
        print(f"{number}  heard     {exchange.caption or '(typed)'}")
        unheard = f"   (not heard: {exchange.text[exchange.heard :].strip()})" if exchange.heard < len(exchange.text) else ""
        print(f"   answered  {exchange.text[: exchange.heard].strip()}{unheard}")
        for mark in exchange.marks:
            print(f"   mark      {mark.label or 'point'} at {list(mark.box)}")
        first = {name: f"{exchange.stages[name]:.0f} ms" for name in ("first_token", "first_sound") if name in exchange.stages}
        print("   after the turn's end  " + ", ".join(f"{name.replace('_', ' ')} {ms}" for name, ms in first.items()))
    for note in performance.notes:
        print(f"attend: {note}", file=sys.stderr)
    return 0


def _serve(given: argparse.Namespace) -> int:
    token, tls = _token(given.token_file) if given.token_file else None, None
    if given.tls_cert:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(given.tls_cert, given.tls_key)
        except OSError as error:
            raise NotServed(f"the certificate {given.tls_cert} cannot be read: {error}") from error
    access = Access(given.host, token, tuple(given.allow_origin or ()))
    voice = open_voice(given.voice)
    loaded = _load(given)
    logging.basicConfig(format="%(message)s" if given.log_json else "%(asctime)s %(message)s", level=logging.INFO)
    options = server.Options(
        access, given.port, given.model, given.voice, Settings(policy=given.policy), tls, given.log_content, given.log_json
    )

    async def listen() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        with Engine(loaded, given.rows) as engine:
            async with server.Door(engine, Vad(), voice, options).open() as port:
                print(f"ws{'s' if tls else ''}://{given.host}:{port}{server.PATH}", flush=True)
                print(f"the page: http{'s' if tls else ''}://{given.host}:{port}/", flush=True)
                await stop.wait()

    asyncio.run(listen())
    return 0


def _token(file: Path) -> str:
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotServed(f"the token file {file} cannot be read: {error}") from error
    if not token:
        raise NotServed(f"{file} holds no token")
    return token


def _watch(given: argparse.Namespace) -> int:
    told = config.read(given.config, *_given(given))
    loaded = _load(given)

    async def ask_once() -> dict[str, Any]:
        with Engine(loaded, spares=1) as engine:
            return await watch.once(told, engine, given.model, *given.once)

    async def stay() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        with Engine(loaded, spares=told.at_once + 1) as engine:  # one for what is watched for
            await watch.Watch(told, engine, given.model).run(stop)

    if given.once:
        answer = asyncio.run(ask_once())
        print(json.dumps(answer) if given.json else answer["answer"])
        for mark in [] if given.json else answer["marks"]:
            print(f"mark      {mark['label'] or 'point'} at {mark['box_2d']} (top, left, bottom, right in thousandths)")
        return 0
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    asyncio.run(stay())
    return 0


def _given(given: argparse.Namespace) -> tuple[dict[str, str], str | None]:
    cameras = dict(camera.partition("=")[::2] for camera in given.camera or ())
    if not all(name and source for name, source in cameras.items()):
        raise config.ConfigError("--camera wants NAME=SOURCE, as in --camera front=rtsp://10.0.0.5/stream")
    if not given.config and not cameras:
        raise config.ConfigError("there is no camera: give --config attend.toml or --camera NAME=SOURCE")
    return cameras, given.broker


def _write_picture(path: Path, bgr: object) -> None:
    try:
        written = cv2.imwrite(str(path), bgr)  # type: ignore[call-overload]
    except cv2.error:
        written = False
    if not written:
        raise MediaError(f"{path} cannot be written as a picture; its folder must exist and its name end in .png or .jpg")


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _report(answer: Answer, marked: Path | None) -> None:
    print()
    if answer.thought:
        print(f"\nthought   {answer.thought.strip()}")
    if answer.heard is not None:
        print(f"\nheard     {answer.heard}   ({answer.audio_seconds:.1f} s of sound)")
    for mark in answer.marks:
        print(f"mark      {mark.label or 'point'} at {list(mark.box)} (top, left, bottom, right in thousandths)")
    if marked:
        print(f"drawn     {marked}")
    if answer.finish == "length":
        print("cut       the answer reached --max-tokens or the end of the row")
    times = answer.timings_ms
    print(
        f"took      {times['load']:.0f} ms load, {times['append']:.0f} ms listening and looking, "
        f"{times['last_frame_to_first_token']:.0f} ms from the last frame to the first token, {times['per_token']:.1f} ms a token"
    )


def _progress(done: int, total: int) -> None:
    """Only where somebody watches and waits: nano is there in a blink."""
    if total > 1 << 28 and sys.stderr.isatty():
        end = "\n" if done == total else "\r"
        print(f"loading {done / 2**30:.1f} of {total / 2**30:.1f} GiB", end=end, file=sys.stderr, flush=True)


def _bench_model(given: argparse.Namespace) -> int:
    say: Callable[[str], None] = (lambda line: None) if given.json else print
    result = bench.model(given.shape, given.device, say, compiled=given.compile)
    if given.json:
        print(json.dumps(result))
    return 0


def _bench_session(given: argparse.Namespace) -> int:
    from model.nano import people  # the recipe's: only here somebody must ask

    if given.chart and not given.chart.parent.is_dir():
        raise MediaError(f"{given.chart} cannot be written: its folder must exist")
    say: Callable[[str], None] = (lambda line: None) if given.json else partial(print, flush=True)
    if given.url:
        url = given.url + ("&" if "?" in given.url else "?") + "extensions=marks"
        token = _token(given.token_file) if given.token_file else None
        called = asyncio.run(crowd.calls(given.speakers or [1, 4, 16], lambda: Caller(url, token), people.person, say))
        if given.json:
            print(json.dumps(called))
        return 0
    voice, loaded = open_voice("espeak"), _load(given)

    async def measure() -> dict[str, Any]:
        if given.hours:
            return await hours.conversation(loaded, voice, people.person, given.hours, say)
        result = await crowd.session(given.speakers or [1, 4, 16], loaded, voice, people.person, say)
        result |= {"model": given.model, "pictures": await waits.pictures(loaded, people.picture(0, *people.LARGE), say)}
        if given.chart:
            result["first_token"] = await waits.first_token(loaded, people.picture(0, *people.SIZE), say)
        return result

    result = asyncio.run(measure())
    if given.chart and not given.hours:
        waits.write(given.chart, result["first_token"], f"{given.model} on {result['device']}, {result['threads']} threads")
    if given.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
