"""attend watch with real parts: mosquitto and its clients, videos as cameras, nano as the model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from agent import checkpoint
from agent.__main__ import main
from agent.checkpoint import LoadedModel
from agent.engine import Engine, EngineStopped
from agent.marks import Mark
from agent.watch import config, discovery, shots
from agent.watch.config import WatchConfig, read
from agent.watch.monitor import Hysteresis
from agent.watch.service import WatchService
from agent.watch.visual_qa import VisualAnswer, VisualQA, picture_segments
from model.forward import ForwardPass
from model.weights import NANO
from streams import camera
from streams.broker import BrokerConfig
from streams.camera import Shot
from streams.mqtt import MqttConnection, Publication
from streams.opencv import cv2
from streams.pictures import decode_picture
from tests.broker import SOON, Mosquitto, Sub, certified, until
from tests.talk import written
from tests.test_camera import Rtsp, Snapshots
from tests.test_frigate import event_18, review_18

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # a broker, cameras, and seconds of nano
PICTURE = NANO / "demo" / "picture.jpg"
QUESTION, ANSWER, BOX = "where is the orange square", "The orange square is at the top.", (90, 230, 520, 570)


def video(path: Path, frames: list[np.ndarray], fps: float = 10) -> str:
    """Lossless: nano has never seen what a codec does to a picture."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"FFV1"), fps, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return str(path)


def flat(b: int, g: int, r: int) -> np.ndarray:
    return np.full((96, 128, 3), (b, g, r), np.uint8)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return checkpoint.load("nano")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> str:
    return video(tmp_path_factory.mktemp("videos") / "scene.avi", [cv2.imread(str(PICTURE))] * 20)


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Red for a second, blue for the next one."""
    return video(tmp_path_factory.mktemp("videos") / "turning.avi", [flat(0, 0, 220)] * 10 + [flat(220, 0, 0)] * 10)


@pytest.fixture(autouse=True)
def quick(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera, "RATE", 20.0)


def told(at: Mosquitto, tmp_path: Path, cameras: dict[str, Any], **more: Any) -> WatchConfig:
    data = {"camera": cameras, "broker": {"port": at.port}, "state": str(tmp_path / "state"), "node": "home"} | more
    return config.parse(data, "test")


@asynccontextmanager
async def serving(told: WatchConfig, visual_qa: Any) -> AsyncIterator[WatchService]:
    it, stop = WatchService(told, visual_qa, "nano"), asyncio.Event()
    running = asyncio.create_task(it.run(stop))
    try:
        yield it
    finally:
        stop.set()
        async with asyncio.timeout(SOON):
            await running


@asynccontextmanager
async def attending(loaded: LoadedModel, told: WatchConfig, kind: type[VisualQA] = VisualQA) -> AsyncIterator[WatchService]:
    """With the model."""
    with Engine(loaded, spares=told.at_once + 1, length=2048) as engine:
        async with serving(told, kind(engine, told.system)) as it:
            yield it


class Gate:
    """Answers in place of the model's, which are given when they are let through; what was asked is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Shot], str, dict[str, Any]]] = []
        self.open = asyncio.Event()
        self.trouble: Exception | None = None
        self.at_once = self.most = 0

    async def ask(self, shots: list[Shot], question: str, **how: Any) -> VisualAnswer:
        self.asked.append((list(shots), question, how))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.open.wait()
        finally:
            self.at_once -= 1
        if self.trouble:
            raise self.trouble
        return VisualAnswer(f"answer to {question}", [Mark((100, 100, 500, 500), "it")])

    async def holds(self, shot: Shot, condition: str) -> tuple[None, str]:
        return None, ""


@pytest.fixture
def gate() -> Gate:
    it = Gate()
    it.open.set()
    return it


def memory() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def iou(a: Any, b: Any) -> float:
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, height) * max(0, width)
    return float(both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both))


# ---- a question and its answer


@pytest.mark.parametrize("version", ["5", "311"])
async def test_a_question_is_answered_about_what_is_in_view_with_a_box_at_the_right_place(
    loaded, broker, scene, tmp_path, version
):
    sub = Sub(broker, "agent/home/#")
    protocol = {"5": "5", "311": "3.1.1"}[version]
    broker_config = {"port": broker.port, "protocol": protocol}
    async with attending(loaded, told(broker, tmp_path, {"front": {"source": scene}}, broker=broker_config)):
        await until(lambda: any(got.payload == b"online" for got in sub.on("front/status")))
        ask = {"question": QUESTION, "id": "one"} | ({} if version == "5" else {"reply_to": "back/311"})
        got = await broker.request("agent/home/front/ask", ask, version, f"back/{version}")
        assert got["answer"] == ANSWER and got["id"] == "one" and got["camera"] == "front" and got["question"] == QUESTION
        assert iou(got["marks"][0]["box_2d"], BOX) > 0.8 and got["marks"][0]["label"] == "orange square"
        assert abs(got["frames"][0] - time.time()) < SOON and got["model"] == "nano" and got["stage"] == "final"
        assert 0 < got["timings_ms"]["first_token"] <= got["timings_ms"]["model"] <= got["timings_ms"]["total"]
        await until(lambda: sub.on("front/event") and sub.on("front/image"))
        assert sub.on("front/answer")[0].json == got, "everybody may read it"
        assert sub.on("front/event")[0].json["event_type"] == "answered"
        shown, seen = decode_picture(sub.on("front/image")[0].payload, "it"), decode_picture(PICTURE.read_bytes(), "it")
        assert shown.shape == seen.shape and (np.abs(shown.astype(int) - seen).max(2) > 60).mean() > 0.002, "the box is drawn"
        late = Sub(broker, "agent/home/front/answer", "agent/home/front/image")
        await until(lambda: len(late.got) == 2)
        assert all(got.retained for got in late.got)
        late.close()
    await until(lambda: sub.on("home/status")[-1].payload == b"offline", "a clean stop says offline")
    sub.close()


async def test_a_broker_over_tls_as_a_configuration_names_it(broker, scene, tmp_path, gate):
    certificate, key = certified(tmp_path)
    broker.encrypt(certificate, key)
    file = tmp_path / "attend.toml"
    where = f'[broker]\nport = {broker.secure}\ntls = true\nca = "{certificate}"\n[camera.front]\nsource = "{scene}"\n'
    file.write_text(f'node = "home"\nstate = "{tmp_path}/state"\n{where}')
    sub = Sub(broker, "agent/home/#")
    async with serving(read(file), gate):
        await until(lambda: sub.on("home/status"))
        broker.pub("agent/home/front/ask", "hello")
        assert (await until(lambda: sub.on("/answer")))[0].json["answer"] == "answer to hello"
    sub.close()


async def test_the_correlation_data_comes_back(broker, scene, tmp_path, gate):
    async with serving(told(broker, tmp_path, {"front": {"source": scene}}), gate):
        command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(broker.port), "-V", "5", "-t", "back", "-F", "%D %p", "-C", "1"]
        ready = Sub(broker, "agent/home/status")
        waiting = await asyncio.create_subprocess_exec(*command, stdout=-1)
        await until(lambda: ready.got)
        broker.pub("agent/home/front/ask", "hello", "-V", "5", "-D", "publish", "response-topic", "agent-test/early")
        more = ["-V", "5", "-D", "publish", "response-topic", "back", "-D", "publish", "correlation-data", "xyz"]
        broker.pub("agent/home/front/ask", "hello there", *more)
        printed = (await asyncio.wait_for(waiting.communicate(), SOON))[0].decode()
        assert printed.startswith("xyz {") and "answer to hello there" in printed
        ready.close()


async def test_a_first_line_comes_at_once_and_the_answer_after_it(loaded, broker, scene, tmp_path):
    sub = Sub(broker, "agent/home/front/answer", "agent/home/status")
    async with attending(loaded, told(broker, tmp_path, {"front": {"source": scene, "quick": True, "retain": False}})):
        await until(lambda: sub.on("home/status"))
        broker.pub("agent/home/front/ask", {"question": QUESTION, "id": "q"})
        await until(lambda: len(sub.on("/answer")) == 2)
        first, final = (got.json for got in sub.on("/answer"))
        assert (first["stage"], final["stage"], first["id"], final["id"]) == ("first", "final", "q", "q")
        assert first["answer"].startswith("The orange square is at the top") and final["answer"] == ANSWER and final["marks"]
    sub.close()


async def test_the_button_asks_the_cameras_own_question(broker, scene, tmp_path, gate):
    sub = Sub(broker, "agent/home/#")
    async with serving(told(broker, tmp_path, {"front": {"source": scene, "question": "Who is there?"}}), gate):
        await until(lambda: sub.on("home/status"))
        for _ in range(2):
            broker.pub("agent/home/front/look", "look")
        await until(lambda: len(sub.on("front/event")) == 2, "pressed twice, answered twice")
        assert sub.on("front/answer")[0].json["question"] == "Who is there?"
    sub.close()


async def test_looking_back_shows_what_changed_with_its_times(broker, turning, tmp_path, gate):
    sub = Sub(broker, "agent/home/#")
    async with serving(told(broker, tmp_path, {"front": {"source": turning}}), gate) as it:
        await until(lambda: sub.on("home/status"))
        await until(lambda: len({shot.grey.mean() > 40 for shot in it.cameras["front"].around(time.time(), 60)}) == 2)
        broker.pub("agent/home/front/ask", {"question": "what happened", "look_back_s": 10, "frames": 3})
        got = (await until(lambda: sub.on("/answer")))[0].json
        shots, _, _ = gate.asked[0]
        assert 2 <= len(shots) <= 3 and [round(shot.at, 3) for shot in shots] == got["frames"] == sorted(got["frames"])
        assert len({shot.grey.mean() > 40 for shot in shots}) == 2, "one of each colour, although most are alike"
    sub.close()


def test_several_pictures_stand_in_the_prompt_as_timed_video(loaded):
    shots = [Shot(PICTURE.read_bytes(), 1000.0 + at, (480, 640), np.zeros((18, 32), np.uint8)) for at in (0, 1.5, 62)]

    ids = [part for part in picture_segments(loaded, shots, None) if isinstance(part, tuple)]
    written = [loaded.tokenizer.decode(list(part)) for part in ids]
    assert [text for text in written if ":" in text] == ["00:00 ", " 00:01 ", " 01:02 "]


async def test_a_question_about_a_camera_never_goes_before_what_a_conversation_waits_for(loaded, monkeypatch):
    shot, taken, forward = Shot(PICTURE.read_bytes(), 0.0, (480, 640), np.zeros((18, 32), np.uint8)), [], ForwardPass.__call__

    def counted(self: ForwardPass, chunks: Any, x: Any) -> Any:
        taken.extend((chunk.row.index, chunk.count) for chunk in chunks)
        return forward(self, chunks, x)

    with Engine(loaded, rows=2, spares=1, length=2048) as engine:
        visual_qa = VisualQA(engine, None)
        await visual_qa.ask([shot], QUESTION, brief=True)  # its kept row is the first one now
        live, hold = engine.claim(lambda error: None), threading.Event()
        engine.call(partial(hold.wait, SOON))
        asking = asyncio.create_task(visual_qa.ask([shot], QUESTION))
        await asyncio.sleep(0)
        answering = asyncio.create_task(written(live, tuple(range(20, 50)) * 13, sampling=loaded.generation, max_tokens=1))
        await asyncio.sleep(0)
        engine.pictures.submit(lambda: None).result(SOON)  # the picture is ready to go
        monkeypatch.setattr(ForwardPass, "__call__", counted)
        hold.set()
        assert (await asyncio.wait_for(asking, SOON)).text == ANSWER
        await asyncio.wait_for(answering, SOON)
        mine = live.row.index
    chunks = [(row == mine, count) for row, count in taken if count > 1]
    first = [count for is_mine, count in chunks if is_mine]
    assert sum(first) == 390 and all(is_mine for is_mine, _ in chunks[: len(first)]), "all of the conversation first"
    assert sum(count for _, count in chunks[len(first) :]) >= 60, "and then the picture"


# ---- JSON of a schema

SCHEMA = {"type": "object", "required": ["open"], "properties": {"open": {"type": "boolean"}}, "additionalProperties": False}


def scripted(texts: list[str], asked: list[str]) -> type[VisualQA]:
    """What the model writes, one text for each try, and what it was asked."""

    class Scripted(VisualQA):
        async def write(self, row: Any, wanted: str, answer: VisualAnswer, begun: float, *, brief: bool) -> tuple[str, int]:
            asked.append(wanted)
            return texts[len(asked) - 1], 1

    return Scripted


@pytest.mark.parametrize(
    ("texts", "value", "error"),
    [
        (['{"open": true}'], {"open": True}, None),
        (['```json\n{"open": false}\n```'], {"open": False}, None),
        (["It is open.", '{"open": "yes"}', '{"open": true}'], {"open": True}, None),
        (["no", '{"open": NaN}', '{"open": 1}'], None, "1 is not of type 'boolean' - at `$.open`"),
    ],
)
async def test_an_answer_is_json_of_the_schema_or_an_error_that_says_why(loaded, broker, scene, tmp_path, texts, value, error):
    asked: list[str] = []
    sub = Sub(broker, "agent/home/#")
    async with attending(loaded, told(broker, tmp_path, {"front": {"source": scene}}), scripted(texts, asked)):
        await until(lambda: sub.on("home/status"))
        broker.pub("agent/home/front/ask", {"question": "is it open?", "schema": SCHEMA})
        got = (await until(lambda: sub.on("/answer")))[0].json
        assert got.get("value") == value and len(asked) == len(texts)
        assert error is None or error in got["error"]
        assert "That is not it" in asked[-1] or len(texts) == 1
    sub.close()


async def test_nano_which_writes_no_json_is_told_apart(loaded, broker, scene, tmp_path):
    sub = Sub(broker, "agent/home/#")
    async with attending(loaded, told(broker, tmp_path, {"front": {"source": scene, "schema": SCHEMA}})):
        await until(lambda: sub.on("home/status"))
        broker.pub("agent/home/front/ask", "is it open?")
        assert "after 3 tries the answer is not JSON of the schema" in (await until(lambda: sub.on("/answer")))[0].json["error"]
    sub.close()


# ---- Frigate


def frigate(kind: str, id: str = "1718.5-abc", **more: Any) -> dict[str, Any]:
    begun = {"start_time": time.time() - 0.5, "top_score": 0.8, "score": 0.78}
    return event_18(kind, **({"id": id} | begun | more))


def reviewed(kind: str, id: str, objects: list[str], severity: str, **more: Any) -> dict[str, Any]:
    message = review_18(kind, objects, severity, **more)
    message["after"] |= {"id": id, "start_time": time.time() - 1}
    return message


async def test_frigate_events_get_one_answer_each_at_their_start_with_the_frame_before(broker, turning, tmp_path, gate):
    sub = Sub(broker, "agent/home/#")
    trigger = {"on": "frigate", "camera": "front", "labels": ["person"], "zones": ["porch"], "min_score": 0.6, "look_back_s": 20}
    picture = cv2.imencode(".jpg", flat(0, 255, 0))[1].tobytes()
    broker.pub("frigate/front/person/snapshot", picture, "-r")
    broker.pub("frigate/events", frigate("new", "retained"), "-r")
    cameras = {"front": {"source": turning}, "snap": {"topic": "frigate/front/person/snapshot"}}
    async with serving(told(broker, tmp_path, cameras, trigger=[trigger]), gate) as it:
        await until(lambda: sub.on("home/status"))
        await until(lambda: len({shot.grey.mean() > 40 for shot in it.cameras["front"].around(time.time(), 60)}) == 2)
        began = time.time() - 0.5
        broker.pub("frigate/events", frigate("new", "a", score=0.5, top_score=0.5), "-q", "1")
        broker.pub("frigate/events", frigate("new", "b", label="car"))
        broker.pub("frigate/events", frigate("new", "c", start_time=began))
        broker.pub("frigate/events", frigate("update", "a"))
        for kind in ("update", "update", "end"):
            for id in "abc":
                broker.pub("frigate/events", frigate(kind, id, **({"label": "car"} if id == "b" else {})))
        broker.pub("frigate/front/person/snapshot", picture, "-r")
        broker.pub("agent/home/front/ask", {"question": "the last one", "id": "end"})
        await until(lambda: [got for got in sub.on("/answer") if got.json["id"] == "end"])
        answers = [got.json for got in sub.on("/answer")]
        assert [got["cause"]["id"] for got in answers[:-1]] == ["c", "a"] and len(answers) == 3
        assert answers[0]["frames"][0] < began <= answers[0]["frames"][-1]
    sub.close()


async def test_a_frigate_review_gets_one_answer_while_it_lasts_whatever_its_objects_are_called(broker, scene, tmp_path, gate):
    sub = Sub(broker, "agent/home/#")
    trigger = {"on": "frigate", "camera": "front", "of": "reviews", "severity": "alert", "zones": ["porch"]}
    trigger |= {"labels": ["person", "car"]}
    broker.pub("frigate/reviews", reviewed("new", "retained", ["person"], "alert"), "-r")
    over = {"end_time": time.time(), "metadata": {"title": "A visitor", "scene": "Somebody came and left."}}
    async with serving(told(broker, tmp_path, {"front": {"source": scene}}, trigger=[trigger]), gate):
        await until(lambda: sub.on("home/status"))
        for message in (
            reviewed("new", "a", ["person"], "detection"),
            reviewed("update", "a", ["dog"], "alert"),
            reviewed("update", "a", ["person-verified"], "alert", sub_labels=["Bob"]),
            reviewed("update", "a", ["person-verified", "fedex"], "alert", sub_labels=["Bob"]),
            reviewed("end", "a", ["person-verified"], "alert", end_time=time.time()),
            reviewed("new", "b", ["fedex"], "alert"),
            reviewed("end", "c", ["person"], "alert", end_time=time.time()),
            reviewed("genai", "c", ["person"], "alert", **over),
            reviewed("genai", "d", ["person"], "alert", **over),
            reviewed("new", "e", ["dog-verified"], "alert"),
        ):
            broker.pub("frigate/reviews", message)
        broker.pub("agent/home/front/ask", {"question": "the last one", "id": "end"})
        await until(lambda: [got for got in sub.on("/answer") if got.json["id"] == "end"])
        answers = [got.json for got in sub.on("/answer")]
        assert [got["cause"]["id"] for got in answers[:-1]] == ["a", "b"] and len(answers) == 3
        assert "person" in answers[0]["cause"]["labels"]
    sub.close()


# ---- watching


class RedOrBlue:
    """In place of the model: whether the picture is more red than blue. What the model is asked is tested beside this."""

    async def holds(self, shot: Shot, condition: str) -> tuple[bool, str]:
        r, _, b = decode_picture(shot.jpeg, "it").reshape(-1, 3).mean(0)
        return bool(r > b), "yes" if r > b else "no"


async def test_what_is_watched_for_is_told_once_when_it_begins_and_once_when_it_ends(broker, turning, tmp_path):
    sub = Sub(broker, "agent/home/#", "home/alarm")
    state = told(broker, tmp_path, {"front": {"source": turning}})
    async with serving(state, RedOrBlue()):
        await until(lambda: sub.on("home/status"))
        broker.pub("agent/home/front/watch", {"condition": "it is red", "id": "red", "interval_s": 0.1, "reply_to": "home/alarm"})
        broker.pub("agent/home/front/watch", {"condition": "it is also red", "interval_s": 0.1, "looks": 3})
        await until(lambda: len([got for got in sub.on("front/event") if got.json["id"] == "red"]) >= 4)
        events = [got.json for got in sub.on("front/event") if got.json["id"] == "red"]
        kinds = [event["event_type"] for event in events]
        assert kinds[:4] in (["began", "ended"] * 2, ["ended", "began"] * 2) and kinds[0] == "began"
        await until(lambda: len(sub.on("home/alarm")) >= 4)
        assert [got.json for got in sub.on("home/alarm")][:4] == events[:4]
        assert events[0]["condition"] == "it is red" and events[0]["frames"]
        pictures = [decode_picture(got.payload, "it").reshape(-1, 3).mean(0) for got in sub.on("front/image")]
        assert any(r > b for r, _, b in pictures) and any(b > r for r, _, b in pictures), "each comes with its frame"
        assert await until(lambda: [got for got in sub.on("front/event") if got.json["id"] != "red"])
        broker.pub("agent/home/front/watching/set", "OFF")
        await until(lambda: sub.on("front/watching") and sub.on("front/watching")[-1].payload == b"OFF")
        broker.pub("agent/home/front/unwatch", "red")
        await until(lambda: len(sub.on("front/watches")[-1].json) == 1)
    async with serving(state, RedOrBlue()):
        await until(lambda: sub.on("front/watching")[-1].payload == b"OFF" and len(sub.on("front/watches")[-1].json) == 1)
    sub.close()


async def test_nano_tells_when_a_shape_appears_and_when_it_goes(loaded, broker, tmp_path):
    there = cv2.imread(str(PICTURE))
    top, left, bottom, right = (round(at * size / 1000) for at, size in zip(BOX, there.shape[:2] * 2, strict=True))
    gone, clear = there.copy(), there[2, 2]
    gone[top - 10 : bottom + 10, left - 10 : right + 10] = clear
    film = video(tmp_path / "film.avi", [gone] * 20 + [there] * 20)
    sub = Sub(broker, "agent/home/#")
    async with attending(loaded, told(broker, tmp_path, {"front": {"source": film}})):
        await until(lambda: sub.on("home/status"))
        broker.pub("agent/home/front/watch", {"condition": "tell me when Is there an orange square?", "interval_s": 0.1})
        await until(lambda: len(sub.on("front/event")) >= 3 and len(sub.on("front/image")) >= 3)
        events = [got.json for got in sub.on("front/event")][:3]
        assert [event["event_type"] for event in events] == ["began", "ended", "began"]
        assert [event["answer"].split(",")[0] for event in events] == ["Yes", "No", "Yes"]
        pictures = [decode_picture(got.payload, "it").astype(int) for got in sub.on("front/image")]
        middle = [picture[(top + bottom) // 2, (left + right) // 2] for picture in pictures[:3]]
        assert [abs(colour - clear[::-1]).max() > 60 for colour in middle] == [True, False, True], "each with its frame"
    sub.close()


def test_so_many_looks_have_to_agree():
    state = Hysteresis(2)
    looks = [True, False, True, None, True, True, False, True, False, False]
    assert [state.add(look) for look in looks] == [None, None, None, None, "began", None, None, None, None, "ended"]


@pytest.mark.parametrize(
    ("condition", "asked"),
    [
        ("Is there a red circle?", "Is there a red circle?"),
        ("tell me when is there a star?", "is there a star?"),
        ("Let me know if the kettle boils", 'Is this so in the picture: "the kettle boils"? Answer yes or no.'),
    ],
)
async def test_a_condition_is_asked_as_a_question_of_yes_or_no(loaded, condition, asked):
    questions, answers = [], ["Yes, it is.", "No.", "Sorry, I did not understand."]

    class Answering(VisualQA):
        async def ask(self, shots: Any, question: str, **how: Any) -> VisualAnswer:
            questions.append(question)
            return VisualAnswer(answers[len(questions) - 1])

    with Engine(loaded, length=512) as engine:
        found = [(await Answering(engine, None).holds(None, condition))[0] for _ in range(3)]  # type: ignore[arg-type]
    assert found == [True, False, None] and questions == [asked] * 3


# ---- faults


async def test_a_broker_that_is_absent_at_the_start_is_found_later(broker, scene, tmp_path, gate):
    broker.stop()
    async with serving(told(broker, tmp_path, {"front": {"source": scene}}), gate) as it:
        await until(lambda: it.cameras and it.cameras["front"].newest())
        broker.start()
        sub = Sub(broker, "agent/home/#")
        await until(lambda: sub.on("home/status"))
        broker.pub("agent/home/front/ask", "hello")
        await until(lambda: sub.on("/answer"))
        sub.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_broker_that_goes_in_the_middle_of_a_question_loses_nothing(broker, scene, tmp_path, gate, how):
    gate.open.clear()
    sub = Sub(broker, "agent/home/#")
    async with serving(told(broker, tmp_path, {"front": {"source": scene}}), gate) as it:
        await until(lambda: sub.on("home/status"))
        for n in range(3):
            broker.pub("agent/home/front/ask", {"question": "what", "id": str(n)})
        await until(lambda: gate.asked and it.waiting == 2)
        sub.close()
        broker.stop(how)
        await until(lambda: not it.connection.connected)
        gate.open.set()
        await until(lambda: not it.outbox.open(), "all of it is written down")
        gate.open.clear()
        broker.start()
        after = Sub(broker, "agent/home/front/#")
        await until(lambda: it.connection.connections == 2 and it.outbox.unsent() is None)
        broker.pub("agent/home/front/ask", {"question": "what", "id": "2"})  # it comes again: known
        broker.pub("agent/home/front/ask", {"question": "what", "id": "new"})
        gate.open.set()
        await until(lambda: [got for got in after.on("/answer") if got.json["id"] == "new"])
        finals = [got.json["id"] for got in after.on("/answer")]
        assert [id for id in finals if id != "new"][-1] == "2" and finals.count("2") == 1 and finals.count("new") == 1
        assert len(gate.asked) == 4, "each was put to the model once"
        after.close()


@asynccontextmanager
async def commanded(*arguments: str, **environment: str) -> AsyncIterator[subprocess.Popen[str]]:
    """attend watch as a process of its own, with what it writes on its stdout."""
    command = [sys.executable, "-m", "agent", "watch", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_secrets_of_addresses_are_neither_logged_nor_published_while_cameras_work_and_while_they_do_not(broker, tmp_path):
    rtsp, web = Rtsp(), Snapshots()
    file, sub = tmp_path / "attend.toml", Sub(broker, "#")
    working = {
        "query": f"{rtsp.address}?usr=me&pwd=seCret1",
        "login": f"rtsp://me:p@seCret2@127.0.0.1:{rtsp.port}/ball",
        "http": f"http://me:seCret3%2F@{web.address}?usr=me&pwd=seCret4@",
    }
    failing = {
        "closed": "rtsp://me:p@seCret5@127.0.0.1:1/live?usr=me&pwd=seCret6",
        "unknown": "rtsp://127.0.0.1:1/live?usr=me&pwd=#seCret7",
        "absent": "http://me:100%seCret8@127.0.0.1:1/snap.jpg?pwd=seCret9",
    }
    cameras = "".join(f'[camera.{name}]\nsource = "{source}"\n' for name, source in (working | failing).items())
    file.write_text(f'node = "home"\nstate = "{tmp_path}/state"\n[broker]\nport = {broker.port}\n{cameras}')

    def states() -> dict[str, str]:
        return {got.topic.split("/")[2]: got.json["state"] for got in sub.on("/health")}

    async with commanded("--config", str(file)) as process:
        await until(lambda: states() == dict.fromkeys(working, "live") | dict.fromkeys(failing, "lost"))
        for name in failing:
            broker.pub(f"agent/home/{name}/ask", "hello")
        await until(lambda: len(sub.on("/answer")) == len(failing))
        process.send_signal(signal.SIGTERM)
        logged = process.communicate(timeout=SOON)[0]
    everything = logged + "".join(f"{got.topic} {got.payload.decode(errors='replace')}" for got in sub.got)
    assert "seCret" not in everything and "pwd=" not in everything
    assert f"rtsp://127.0.0.1:{rtsp.port}/ball is live" in everything and f"http://{web.address} is live" in everything
    assert "rtsp://127.0.0.1:1/live cannot be opened" in everything and "write @ as %40, / as %2F" in everything
    assert "WARN" not in logged and "Traceback" not in logged
    sub.close()
    rtsp.end()
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize("address", ["[::1]:{port}", "mqtt://[::1]:{port}", "mqtt://localhost:{port}/"])
async def test_the_command_finds_its_broker_by_any_address(broker, tmp_path, address):
    broker.listen("::1")
    sub = Sub(broker, "agent/attend/status")
    where = ["--camera", f"front={PICTURE}", "--broker", address.format(port=broker.port)]
    async with commanded(*where, HOME=str(tmp_path)):
        assert (await until(lambda: sub.got))[0].payload == b"online"
    sub.close()


def test_a_configuration_that_is_wrong_ends_the_command_with_one_sentence(tmp_path, capsys):
    file = tmp_path / "attend.toml"
    trigger = '[[trigger]]\non = "topic"\ncamera = "front"\ntopic = "home/doorbell_+"\n'
    file.write_text(f'[camera.front]\nsource = "a.mp4"\n{trigger}')
    assert main(["watch", "--config", str(file)]) == 2
    why = "in a topic + stands alone between slashes - at `$.trigger[0].topic`"
    assert capsys.readouterr().err == f"attend: {file}: {why}\n"
    for option in ("rtsp://me:seCret@10.0.0.5/live", "rtsp://10.0.0.5/live?usr=me&pwd=seCret", "front=me:seCret@10.0.0.5/live"):
        assert main(["watch", "--camera", option]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "seCret" not in told


SLOW = """
import asyncio, pathlib, sys
from agent import __main__
from agent.watch import visual_qa
mark = pathlib.Path(sys.argv.pop(1))
async def stuck(self, *given, **how):
    mark.touch()
    await asyncio.Event().wait()
visual_qa.VisualQA.ask = stuck
sys.exit(__main__.main(sys.argv[1:]))
"""


async def test_killed_hard_in_the_middle_of_a_question_it_answers_once_when_it_is_back(broker, scene, tmp_path):
    file, reached = tmp_path / "attend.toml", tmp_path / "reached"
    where = f'node = "home"\nstate = "{tmp_path}/state"\n[broker]\nport = {broker.port}\n'
    file.write_text(f'{where}[camera.front]\nsource = "{scene}"\n')
    command = ["watch", "--config", str(file)]
    sub = Sub(broker, "agent/home/#")
    first = subprocess.Popen([sys.executable, "-c", SLOW, str(reached), *command], cwd=ROOT, start_new_session=True)
    try:
        await until(lambda: sub.on("home/status"))
        for n in range(5):
            broker.pub("agent/home/front/ask", {"question": QUESTION, "id": str(n)})
        await until(reached.exists)
    finally:
        first.kill()
        first.wait()
    await until(lambda: sub.on("home/status")[-1].payload == b"offline", "the last will")
    broker.pub("agent/home/front/ask", {"question": QUESTION, "id": "while away"})
    second = subprocess.Popen([sys.executable, "-m", "agent", *command], cwd=ROOT, start_new_session=True)
    try:
        await until(lambda: [got for got in sub.on("/answer") if got.json["id"] == "while away"])
        assert [got.json["id"] for got in sub.on("/answer")] == ["0", "1", "2", "3", "4", "while away"]
        assert all(got.json["answer"] == ANSWER for got in sub.on("/answer"))
        second.send_signal(signal.SIGTERM)
        assert second.wait(SOON) == 0
        await until(lambda: sub.on("home/status")[-1].payload == b"offline")
    finally:
        second.kill()
        second.wait()
    sub.close()


async def test_a_burst_over_many_cameras_is_answered_or_told_busy_in_order(broker, turning, tmp_path, gate):
    sub = Sub(broker, "agent/home/#")
    cameras = {f"c{n}": {"source": turning, "retain": False} for n in range(8)}
    async with serving(told(broker, tmp_path, cameras, queue=40, at_once=3), gate) as it:
        await until(lambda: sub.on("home/status") and all(each.newest() for each in it.cameras.values()))
        held = memory()
        gate.open.clear()
        command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(broker.port), "-q", "1", "-l"]
        senders = []
        for camera in range(8):
            lines = "".join(
                json.dumps({"question": "what", "id": f"{camera}-{n}"}) + "\n" for n in range(13 if camera < 4 else 12)
            )
            sender = subprocess.Popen([*command, "-t", f"agent/home/c{camera}/ask"], stdin=subprocess.PIPE)
            sender.stdin.write(lines.encode())
            sender.stdin.close()
            senders.append(sender)
        assert all(sender.wait(SOON) == 0 for sender in senders)
        await until(lambda: len([got for got in sub.on("/event") if got.json["event_type"] == "busy"]) >= 100 - 43)
        gate.open.set()
        await until(lambda: len(sub.on("/event")) == 100)
        ids = [got.json["id"] for got in sub.on("/event")]
        assert len(ids) == len(set(ids)) == 100
        for camera in range(8):
            answered = [
                int(got.json["id"].split("-")[1]) for got in sub.on(f"c{camera}/event") if got.json["event_type"] == "answered"
            ]
            assert answered == sorted(answered)
        assert 40 <= len([got for got in sub.on("/event") if got.json["event_type"] == "answered"]) <= 43
        assert gate.most == 3, "no more at once than said"
        assert memory() - held < 200 << 20
    sub.close()


async def test_what_nobody_waits_for_any_more_is_not_asked(broker, scene, tmp_path, gate):
    gate.open.clear()
    sub = Sub(broker, "agent/home/#")
    async with serving(told(broker, tmp_path, {"front": {"source": scene}}), gate):
        await until(lambda: sub.on("home/status"))
        broker.pub("agent/home/front/ask", {"question": "old", "at": time.time() - 100, "deadline_s": 50})
        broker.pub("agent/home/front/ask", {"question": "stuck", "deadline_s": 0.5})
        await until(lambda: len(sub.on("/answer")) == 2)
        assert all("too late" in got.json["error"] for got in sub.on("/answer"))
        assert [question for _, question, _ in gate.asked] == ["stuck"]
    sub.close()


async def test_payloads_of_any_kind_end_nothing(broker, scene, tmp_path, gate):
    sub = Sub(broker, "agent/home/#")
    triggers = [
        {"on": "frigate", "camera": "front"},
        {"on": "topic", "topic": "bell/#", "camera": "front", "field": "a.b", "equals": 1},
    ]
    cameras = {"front": {"source": scene}, "pushed": {"topic": "jpegs"}}
    junk = [
        b"",
        b"\x00",
        b"\xff\xfe",
        b"{",
        b"[" * 100_000,
        b"x" * 70_000,
        "🙂".encode() * 3,
        b'{"type":"new"}',
        b'{"a":{"b":[]}}',
    ]
    junk += [b'{"type":"new","after":{"id":1,"camera":{}}}', b'{"question": 5}', b'{"nonsense": 1}', b'{"id":""}']
    orders = ["budget=71", 'schema={"$ref":"http://example.com/x"}', 'schema={"type":"nope"}', "look_back_s=1e9", "at=1e999"]
    orders += ['schema={"properties":{"a":{"pattern":"(a+)+$"}}}', 'reply_to="a/#"', 'reply_to="agent/home/front/ask"']
    for name, _, value in [order.partition("=") for order in [*orders, 'reply_to="$SYS/x"', 'reply_to="\\ud800"', "frames=0"]]:
        junk.append(f'{{"question":"a","{name}":{value}}}'.encode())
    async with serving(told(broker, tmp_path, cameras, trigger=triggers, queue=1000), gate):
        await until(lambda: sub.on("home/status"))
        verbs = ("ask", "watch", "unwatch", "watching/set", "nothing")
        for topic in (
            *(f"agent/home/front/{verb}" for verb in verbs),
            "jpegs",
            "frigate/events",
            "bell/x",
            "homeassistant/status",
        ):
            for payload in junk:
                if payload:
                    broker.pub(topic, payload)
        broker.pub("agent/home/front/ask", {"question": "still there?", "id": "end"})
        await until(lambda: [got for got in sub.on("front/answer") if got.json["id"] == "end"])
        assert sub.on("front/answer")[-1].json["answer"] == "answer to still there?"
        errors = [got.json["error"] for got in sub.on("front/answer") if "error" in got.json]
        assert any("a reference leads outside" in why for why in errors) and any("at `$.question`" in why for why in errors)
        assert not [got for got in sub.got if got.topic.startswith("agent/home/front/ask") and b'"error"' in got.payload]
    sub.close()


async def test_a_lost_camera_is_told_in_the_answer_and_in_its_state(broker, tmp_path, gate, monkeypatch):
    monkeypatch.setattr(shots, "FIRST_PICTURE", 0.1)
    sub = Sub(broker, "agent/home/#")
    async with serving(told(broker, tmp_path, {"front": {"source": str(tmp_path / "gone.mp4")}}), gate):
        await until(lambda: [got for got in sub.on("front/health") if got.json["state"] == "lost"])
        broker.pub("agent/home/front/ask", "hello")
        assert "gone.mp4 cannot be read" in (await until(lambda: sub.on("/answer")))[0].json["error"]
        assert sub.on("front/status")[-1].payload == b"offline"
    sub.close()


async def test_a_model_that_stops_ends_the_command_with_its_sentence(broker, scene, tmp_path, gate):
    gate.trouble = EngineStopped("the model has stopped: it fell over")
    it = WatchService(told(broker, tmp_path, {"front": {"source": scene}}), gate, "nano")
    running = asyncio.create_task(it.run(asyncio.Event()))
    sub = Sub(broker, "agent/home/status")
    await until(lambda: sub.got)
    broker.pub("agent/home/front/ask", "hello")
    with pytest.raises(EngineStopped, match="it fell over"):
        await asyncio.wait_for(running, SOON)
    await until(lambda: sub.got[-1].payload == b"offline")
    sub.close()


async def test_pictures_that_come_over_mqtt_are_looked_at(loaded, broker, tmp_path):
    sub = Sub(broker, "agent/home/#")
    async with attending(loaded, told(broker, tmp_path, {"front": {"topic": "bell/jpeg"}})) as it:
        await until(lambda: sub.on("home/status"))
        broker.pub("bell/jpeg", PICTURE.read_bytes())
        await until(lambda: it.cameras["front"].newest())
        broker.pub("agent/home/front/ask", QUESTION)
        assert (await until(lambda: sub.on("/answer")))[0].json["answer"] == ANSWER
    sub.close()


async def test_a_snapshot_that_was_retained_before_the_start_is_a_picture_with_its_age(broker, tmp_path, gate):
    sub = Sub(broker, "agent/home/#")
    broker.pub("bell/jpeg", PICTURE.read_bytes(), "-r")
    trigger = {"on": "topic", "topic": "bell/jpeg", "camera": "front"}
    async with serving(told(broker, tmp_path, {"front": {"topic": "bell/jpeg"}}, trigger=[trigger]), gate) as it:
        await until(lambda: [got for got in sub.on("front/health") if got.json["state"] == "live"])
        assert sub.on("front/health")[-1].json["why"] == "the camera has given an older picture, and none since"
        came = it.cameras["front"].newest().at
        broker.pub("agent/home/front/ask", {"question": "who", "id": "old"})
        old = (await until(lambda: sub.on("/answer")))[0].json
        assert old["answer"] == "answer to who" and old["id"] == "old", "and the picture itself asked nothing"
        assert old["retained"] is True and old["frames"] == [round(came, 3)]
        assert abs(old["age_s"] - (old["at"] - came)) < 0.01
        broker.stop()
        broker.start()
        await until(lambda: it.connection.connections == 2)
        broker.pub("agent/home/front/ask", {"question": "who", "id": "older"})
        older = (await until(lambda: [got.json for got in sub.on("/answer") if got.json["id"] == "older"]))[0]
        assert older["frames"] == old["frames"], "given again, it is no younger"
        broker.pub("bell/jpeg", PICTURE.read_bytes(), "-r")
        new = (await until(lambda: [got.json for got in sub.on("/answer") if got.json["id"] is None]))[0]
        assert "retained" not in new and new["frames"][0] > came
    sub.close()


async def test_schedules_and_other_topics_ask_too(broker, scene, tmp_path, gate):
    sub = Sub(broker, "agent/home/#")
    triggers = [
        {"on": "topic", "topic": "bell/+", "camera": "front", "field": "action", "equals": "press", "question": "Who rings?"},
        {"on": "schedule", "camera": "front", "every_s": 1, "question": "All well?"},
    ]
    async with serving(told(broker, tmp_path, {"front": {"source": scene}}, trigger=triggers), gate):
        await until(lambda: sub.on("home/status"))
        broker.pub("bell/front", {"action": "hold"})
        broker.pub("bell/front", {"action": "press"})
        await until(lambda: {got.json["question"] for got in sub.on("/answer")} == {"Who rings?", "All well?"})
        assert len([1 for got in sub.on("/answer") if got.json["question"] == "Who rings?"]) == 1
    sub.close()


# ---- Home Assistant

# What its MQTT integration takes of each platform, as its documentation of 2026.11 says; nothing else is allowed there.
SHARED = {"p", "name", "unique_id", "qos", "icon"}
PLATFORMS = {
    "sensor": ({"state_topic"}, {"value_template", "json_attributes_topic"}),
    "image": ({"image_topic"}, {"content_type"}),
    "event": ({"state_topic", "event_types"}, set()),
    "text": ({"command_topic"}, {"max"}),
    "button": ({"command_topic"}, {"payload_press"}),
    "switch": ({"command_topic"}, {"state_topic"}),
}


async def test_home_assistant_is_told_a_device_for_each_camera_and_again_when_it_is_born(broker, scene, tmp_path, gate):
    sub = Sub(broker, "homeassistant/device/#", "agent/home/#")
    cameras = {"Front door": {"source": scene, "label": "Haustür"}, "back": {"source": scene}}
    async with serving(told(broker, tmp_path, cameras), gate):
        devices = await until(lambda: [*found] if len(found := sub.on("/config")) == 2 else None)
        ids: list[str] = []
        for got in devices:
            payload = got.json
            assert set(payload) == {"dev", "o", "cmps", "avty", "avty_mode"} and payload["o"]["name"] == "attend"
            assert payload["dev"]["ids"] and payload["dev"]["name"] in ("Haustür", "back") and len(payload["avty"]) == 2
            assert re.fullmatch(r"homeassistant/device/[A-Za-z0-9_-]+/config", got.topic)
            assert sorted(part["p"] for part in payload["cmps"].values()) == sorted(PLATFORMS)
            for part in payload["cmps"].values():
                needed, allowed = PLATFORMS[part["p"]]
                assert needed <= set(part) <= needed | allowed | SHARED
                ids.append(part["unique_id"])
                assert not any(set("+#") & set(part[key]) for key in part if key.endswith("_topic"))
            assert payload["cmps"]["ask"]["max"] <= 255
            assert {"answered", "failed", "began", "ended"} <= set(payload["cmps"]["event"]["event_types"])
        assert len(set(ids)) == len(ids) == 12
        door = next(got.json for got in devices if got.json["dev"]["name"] == "Haustür")["cmps"]
        broker.pub(door["ask"]["command_topic"], "who is it? " * 30)
        answered = (await until(lambda: [got for got in sub.got if got.topic == door["answer"]["state_topic"]]))[0].json
        template = jinja2.Environment(autoescape=False).from_string(door["answer"]["value_template"])
        assert len(template.render(value_json=answered)) <= 255 < len(answered["answer"]), "all of it is in the attributes"
        assert template.render(value_json={"error": "busy"}) == "busy"
        event = (await until(lambda: [got for got in sub.got if got.topic == door["event"]["state_topic"]]))[0]
        assert event.json["event_type"] in door["event"]["event_types"] and not event.retained
        broker.pub("homeassistant/status", "online")
        await until(lambda: len(sub.on("/config")) == 4)
    late = Sub(broker, "homeassistant/device/#")
    await until(lambda: len(late.got) == 2)
    assert all(got.retained for got in late.got)
    late.close()
    sub.close()


HOME = ROOT / "build" / "homeassistant" / "bin" / "python"


@pytest.mark.skipif(not HOME.exists(), reason="`make build/homeassistant/stamp` installs Home Assistant from its registry")
@pytest.mark.parametrize(
    "wrong", [None, ("ask", "command_topic", "a/#"), ("event", "state_topic", None), ("look", "icon", "eye")]
)
def test_home_assistants_own_schemas_accept_it(wrong):
    cameras = {"Front door": {"source": "x", "label": "Haustür"}, "back": {"source": 0}}
    told = config.parse({"camera": cameras, "node": "home"}, "it")
    payloads = [discovery.device(told, camera, "nano")[1] for camera in cameras]
    if wrong:
        part, key, value = wrong
        payloads[1]["cmps"][part][key] = value
    command = [str(HOME), str(ROOT / "tests" / "home.py")]
    asked = subprocess.run(command, input=json.dumps(payloads), capture_output=True, text=True, timeout=SOON)
    if wrong:
        assert asked.returncode and f"'{wrong[1]}'" in asked.stderr
    else:
        assert asked.returncode == 0, asked.stderr[-2000:]
        taken = json.loads(asked.stdout)
        assert len(taken) == 12 and {platform for platform, _ in taken} == set(PLATFORMS)


# ---- without a broker


def test_once_asks_without_a_broker(scene, capsys):
    assert main(["watch", "--camera", f"front={scene}", "--once", "front", QUESTION]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{ANSWER}\nmark      orange square at [")
    assert main(["watch", "--camera", f"front={scene}", "--once", "back", QUESTION]) == 2
    assert "there is no camera back; there are front" in capsys.readouterr().err


# ---- how long it takes


async def test_how_long_an_answer_takes(loaded, broker, scene, tmp_path, capsys):
    """Prints, and bounds only what a broken path would exceed: seconds of waiting for a delayed ACK, a poll, or a queue."""
    sub = Sub(broker, "agent/home/front/answer", "agent/home/status")
    first, final, outside = [], [], []
    async with attending(loaded, told(broker, tmp_path, {"front": {"source": scene, "quick": True, "retain": False}})):
        await until(lambda: sub.on("home/status"))
        will = Publication("asker/gone", b"")
        asking = MqttConnection(BrokerConfig(port=broker.port), "asker", [], will, lambda message: None)
        connection = asyncio.create_task(asking.run())
        for n in range(20):
            begun, seen = time.perf_counter(), len(sub.on("/answer"))
            body = json.dumps({"question": QUESTION, "id": str(n)}).encode()
            await asking.publish(Publication("agent/home/front/ask", body))
            await until(lambda seen=seen: len(sub.on("/answer")) == seen + 1)
            first.append((time.perf_counter() - begun) * 1000)
            await until(lambda seen=seen: len(sub.on("/answer")) == seen + 2)
            final.append((time.perf_counter() - begun) * 1000)
            models = sum(got.json["timings_ms"]["model"] for got in sub.on("/answer")[-2:])
            outside.append(1 - models / final[-1])
        connection.cancel()
    lines = []
    for name, times in (("ask → first line", first), ("ask → answer", final)):
        p95 = statistics.quantiles(times, n=20)[18]
        lines.append(f"{name:18} p50 {statistics.median(times):6.0f} ms   p95 {p95:6.0f} ms")
    with capsys.disabled():
        print("\n" + "\n".join(lines) + f"\noutside the model  {statistics.median(outside):.0%}")
    assert statistics.median(outside) < 0.9
    sub.close()
