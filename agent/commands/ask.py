"""`attend ask`: one question, or a scripted conversation."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from agent import ask, marks, recording, script
from agent.ask import AskResult, QuestionPart
from agent.commands import options
from agent.commands.options import Commands
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.session import Session
from agent.tape import SystemPrompt
from model.pixels import BUDGETS
from model.vad import Vad
from streams.frames import MediaError
from streams.opencv import cv2
from streams.pictures import decode_picture
from streams.voice import open_voice


class _AppendPart(argparse.Action):
    """--text, --image, --audio and --video keep the order in which they are given."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: object, option: str | None = None) -> None:
        assert option is not None
        namespace.parts = [*(namespace.parts or []), QuestionPart(option.removeprefix("--"), str(value))]  # type: ignore[arg-type]


def add(commands: Commands) -> None:
    asking = commands.add_parser("ask", help="one question from files", description=ask.__doc__)
    options.model(asking)
    asking.add_argument("--turns", type=Path, metavar="F", help="a scripted conversation (TOML) instead: " + script.FORMAT)
    asking.add_argument("--record", type=Path, metavar="OUT.wav", help="with --turns: both sides in stereo, left the user")
    asking.add_argument("--voice", default="auto", help="with --turns: auto, none, or a voice's name")
    asking.add_argument("--system", metavar="T", help="system prompt")
    for kind, metavar, what in (
        ("text", "T", "typed words"),
        ("image", "F", "a picture: png, jpeg, webp, heic or avif, of up to 32 MiB and 67 megapixels"),
        ("audio", "F", "a sound file, or the sound of a video: wav, flac, ogg, mp3, m4a, webm and others, of up to an hour"),
        ("video", "F", "a video: mp4, mov, webm, mkv, avi or mpeg, of which 32 pictures are looked at and the sound is heard"),
    ):
        asking.add_argument(
            f"--{kind}", action=_AppendPart, dest="parts", metavar=metavar, help=f"{what}; repeatable, order counts"
        )
    asking.add_argument("--no-sound", action="store_true", help="leave the sound of a --video out")
    asking.add_argument("--budget", type=int, choices=BUDGETS, help="soft tokens of a picture (default: the checkpoint's)")
    asking.add_argument(
        "--max-tokens", type=options.positive, default=256, metavar="N", help="length of the answer (default 256)"
    )
    asking.add_argument("--greedy", action="store_true", help="always the likeliest token")
    asking.add_argument("--temperature", type=float, metavar="X")
    asking.add_argument("--top-k", type=options.positive, metavar="N")
    asking.add_argument("--top-p", type=float, metavar="X")
    asking.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same answer")
    asking.add_argument("--thinking", action="store_true", help="let the model reason before it answers")
    asking.add_argument("--real-time", action="store_true", help="feed the sound as fast as it was spoken")
    asking.add_argument("--mark-image", type=Path, metavar="OUT.png", help="write the last picture with the answer's marks drawn")
    asking.add_argument("--json", action="store_true", help="print one JSON object")
    asking.set_defaults(run=_ask, parts=None)


def _ask(given: argparse.Namespace) -> int:
    if given.turns:
        return _play(given)
    if not given.parts:
        raise MediaError("nothing to ask: give at least one of --text, --image, --audio and --video")
    looking = any(part.kind in ("image", "video") for part in given.parts)
    if given.mark_image and not looking:
        raise MediaError("--mark-image needs a picture: give an --image or a --video")
    question = ask.read(given.parts, soundtracks=not given.no_sound)
    begun = perf_counter()
    loaded = options.load(given, budget=given.budget)
    load_ms = (perf_counter() - begun) * 1000
    options_given = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
    chosen = {name: value for name, value in options_given.items() if value is not None}
    try:
        sampling = replace(loaded.generation, greedy=given.greedy or (loaded.generation.greedy and not chosen), **chosen)
    except ValueError as wrong:
        raise MediaError(str(wrong)) from wrong
    answer = asyncio.run(
        ask.ask(
            loaded,
            question,
            sampling=sampling,
            system=given.system,
            budget=given.budget,
            max_tokens=given.max_tokens,
            seed=given.seed,
            thinking=given.thinking,
            real_time=given.real_time,
            on_text=(lambda text: None) if given.json else _print_text,
        )
    )
    answer.timings_ms["load"] = load_ms
    if given.mark_image:
        assert question.last_picture
        picture = decode_picture(question.last_picture, "the picture")
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
    loaded = options.load(given)
    track = recording.Recording(given.record) if given.record else None
    performance = script.Performance(turns, given.real_time, recording=track)
    setting = SystemPrompt(given.system if given.system is not None else system, thinking=given.thinking)

    async def perform() -> None:
        with Engine(loaded) as engine:
            settings = ConversationConfig(setting=setting, max_tokens=given.max_tokens, seed=given.seed)
            await performance.run(Session(engine, Vad(), voice, settings))

    with track or nullcontext():
        asyncio.run(perform())
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


def _report(answer: AskResult, marked: Path | None) -> None:
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


def _write_picture(path: Path, bgr: object) -> None:
    try:
        written = cv2.imwrite(str(path), bgr)  # type: ignore[call-overload]
    except cv2.error:
        written = False
    if not written:
        raise MediaError(f"{path} cannot be written as a picture; its folder must exist and its name end in .png or .jpg")


def _print_text(text: str) -> None:
    print(text, end="", flush=True)
