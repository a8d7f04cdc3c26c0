"""`@openai/agents-realtime`, as it comes from its registry, against a real server: a stock client of another language."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import checkpoint
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from streams.voice import open_voice
from tests.serving import DEMO, SETTINGS, question, serving
from tests.talk import jpeg

ROOT = Path(__file__).parent.parent
MODULES = ROOT / "build" / "node"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: the package nodejs has it"),
    pytest.mark.skipif(
        not (MODULES / "node_modules").is_dir(), reason="`make build/node/stamp` fetches @openai/agents-realtime from npm"
    ),
]


async def lives(port: int, scenario: str, folder: Path, picture: bytes = b"") -> dict[str, Any]:
    sound, image = folder / "sound", folder / "picture"
    sound.write_text("\n".join(question()))
    image.write_text("data:image/jpeg;base64," + base64.b64encode(picture or jpeg()).decode())
    url = f"ws://127.0.0.1:{port}/v1/realtime?model=nano"
    command = ["node", str(ROOT / "tests" / "agents.cjs"), str(MODULES), url, scenario, str(sound), str(image)]
    node = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    try:
        out, wrong = await node.communicate()
    finally:
        if node.returncode is None:
            node.kill()
            await node.wait()
    assert node.returncode == 0, wrong.decode()[-2000:]
    lived: dict[str, Any] = json.loads(out)
    assert lived["errors"] == [], lived["errors"]
    return lived


def words(response: dict[str, Any]) -> str:
    return str(response["output"][0]["content"][0]["transcript"])


async def test_typed(engine, mind, tmp_path):
    mind.says("There are two.")
    async with serving(engine) as port:
        lived = await lives(port, "typed", tmp_path)
    (response,) = lived["responses"]
    assert response["status"] == "completed" and words(response) == "There are two."
    assert lived["heard"] == 3 * 300, "milliseconds of its voice"
    assert [item["role"] for item in lived["history"]] == ["user", "assistant"]
    assert lived["history"][1]["content"][0]["transcript"] == "There are two."


async def test_talk_over_an_answer_truncates_it_and_is_answered(engine, mind, tmp_path):
    mind.says("word " * 30, "Yes.")
    async with serving(engine, clock=time.monotonic, settings=replace(SETTINGS, max_tokens=300)) as port:
        lived = await lives(port, "interruption", tmp_path)
    assert lived["interrupted"] == 1 and words(lived["responses"][-1]) == "Yes."
    kinds = lived["kinds"]
    assert kinds.index("response.done") < kinds.index("input_audio_buffer.speech_started"), "it was sent faster than it is played"
    assert kinds.count("conversation.item.truncated") == 1


async def test_a_function_is_called_and_its_output_used(engine, mind, tmp_path):
    mind.says('<|tool_call>call:look{at:<|"|>left<|"|>}<tool_call|><|tool_response>', "A ball.")
    async with serving(engine) as port:
        lived = await lives(port, "function", tmp_path)
    assert lived["looked"] == ["left"]
    call, answer = lived["responses"]
    assert call["output"][0]["type"] == "function_call" and words(answer) == "A ball."
    done = [item for item in lived["history"] if item["type"] == "function_call"]
    assert [(item["name"], item["output"]) for item in done] == [("look", "a ball")]


async def test_a_spoken_question_about_a_picture_is_answered_by_nano(tmp_path):
    shown = (DEMO / "picture.jpg").read_bytes()
    with Engine(checkpoint.load("nano"), length=2048) as running:
        async with serving(running, open_voice("espeak"), settings=ConversationConfig(seed=0), clock=time.monotonic) as port:
            lived = await lives(port, "spoken", tmp_path, shown)
    answer = words(lived["responses"][0])
    assert answer.startswith("The orange square is ") and lived["heard"] > 500
    spoken = [item for item in lived["history"] if item["type"] == "message" and item["content"][0]["type"] == "input_audio"]
    assert spoken[0]["content"][0]["transcript"] == "where is the orange square"
    assert lived["responses"][0]["usage"]["input_token_details"]["image_tokens"] > 0
