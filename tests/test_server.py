"""A real server on a real socket: stock clients, who may come in, and what happens to others when one misbehaves."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from agent import checkpoint
from agent.__main__ import main
from agent.commands import options
from agent.conversation_config import ConversationConfig
from agent.engine import Engine
from agent.session import Session
from agent.tape import Answered, Heard
from agent.view import Budget
from streams.voice import open_voice
from tests.broker import free_port
from tests.serving import (
    DEMO,
    LOADED,
    SETTINGS,
    TEN,
    UPGRADE,
    VAD,
    fast,
    free,
    get,
    plain,
    question,
    say,
    serving,
    stock,
    text,
    until,
    works,
)
from tests.talk import Beeps, jpeg
from web import server
from web.access import Access, NotServed
from web.server import Options, Server

TOKEN = "a long secret"


# ---- stock clients


async def done(connection):
    """The end of the next response."""
    async for event in connection:
        if event.type == "response.done":
            return event
    raise AssertionError("the connection was closed")


async def test_a_typed_question_is_answered_aloud(engine, mind):
    mind.says("There are two red balls.")
    async with serving(engine) as port, stock(port) as connection:
        await connection.conversation.item.create(item=text("How many?"))
        await connection.response.create(response={"metadata": {"n": "1"}})
        kinds, sound = [], b""
        async for event in connection:
            kinds.append(event.type)
            sound += base64.b64decode(event.delta) if event.type == "response.output_audio.delta" else b""
            if event.type == "response.done":
                break
        assert event.response.status == "completed" and event.response.metadata == {"n": "1"}
        assert event.response.output[0].content[0].transcript == "There are two red balls."
        assert event.response.usage.output_tokens == mind.steps
        assert len(sound) == 5 * 2400 * 3 * 2  # 300 ms for each word, at 24 kHz
        assert kinds[:5] == [
            "session.created",
            "conversation.item.added",
            "conversation.item.created",
            "conversation.item.done",
            "response.created",
        ]


async def test_a_spoken_question_with_a_picture_by_server_vad(engine, mind):
    mind.says("Red.")
    mind.hears("What is on the left?")
    async with serving(engine) as port, stock(port) as connection:
        await connection.session.update(
            session={"type": "realtime", "audio": {"input": {"transcription": {"model": "whisper-1"}}}}
        )
        address = "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()
        picture = {"type": "input_image", "image_url": address}
        await connection.conversation.item.create(item={"type": "message", "role": "user", "content": [picture]})
        for piece in question():
            await connection.input_audio_buffer.append(audio=piece)
        seen, transcripts = {}, []
        while not {"response.done", "conversation.item.input_audio_transcription.completed"} <= seen.keys():
            event = await connection.recv()
            seen.setdefault(event.type, event)
        assert 0 < seen["input_audio_buffer.speech_started"].audio_start_ms < 1000
        assert seen["input_audio_buffer.speech_stopped"].item_id == seen["input_audio_buffer.committed"].item_id
        assert seen["conversation.item.input_audio_transcription.completed"].transcript == "What is on the left?"
        assert seen["response.done"].response.output[0].content[0].transcript == "Red."
        assert "error" not in seen and not transcripts


async def test_push_to_talk(engine, mind):
    mind.says("Red.")
    async with serving(engine) as port, stock(port) as connection:
        await connection.session.update(session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
        for piece in question(silence=0):
            await connection.input_audio_buffer.append(audio=piece)
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        async for event in connection:
            assert event.type not in ("error", "input_audio_buffer.speech_started")
            if event.type == "response.done":
                break
        assert event.response.output[0].content[0].transcript == "Red."
        assert event.response.usage.input_token_details.audio_tokens > 20


async def test_a_function_is_called_and_its_result_used(engine, mind):
    mind.says('<|tool_call>call:look{at:<|"|>left<|"|>}<tool_call|><|tool_response>')
    tool = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
    async with serving(engine) as port, stock(port) as connection:
        await connection.session.update(session={"type": "realtime", "tools": [tool]})
        await connection.conversation.item.create(item=text("Look left."))
        await connection.response.create()
        event = await done(connection)
        call = event.response.output[0]
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "look", {"at": "left"})
        mind.says("A ball.")
        await connection.conversation.item.create(
            item={"type": "function_call_output", "call_id": call.call_id, "output": "a ball"}
        )
        await connection.response.create()
        event = await done(connection)
        assert event.response.output[0].content[0].transcript == "A ball."


async def test_a_function_that_must_be_called(engine, mind):
    mind.says('at:<|"|>left<|"|>}<tool_call|><|tool_response>')
    tool = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
    async with serving(engine) as port, stock(port) as connection:
        await connection.session.update(session={"type": "realtime", "tools": [tool], "tool_choice": "required"})
        await connection.response.create()
        event = await done(connection)
        call = event.response.output[0]
        assert (call.name, json.loads(call.arguments)) == ("look", {"at": "left"})


async def test_a_response_beside_the_conversation(engine, mind):
    async with serving(engine) as port, stock(port) as connection:
        mind.says("About balls.")
        question = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is it about?"}]}
        beside = {"conversation": "none", "input": [question], "output_modalities": ["text"], "metadata": {"topic": "it"}}
        await connection.response.create(response=beside)
        kinds = []
        async for event in connection:
            kinds.append(event.type)
            if event.type == "response.done":
                break
        assert event.response.conversation_id is None and event.response.metadata == {"topic": "it"}
        assert event.response.output[0].content[0].text == "About balls."
        assert not any(kind.startswith("conversation.item") for kind in kinds)
        mind.says("Yes.")
        await connection.response.create()
        event = await done(connection)
        assert event.response.output[0].content[0].transcript == "Yes."


async def test_who_is_not_to_interrupt_is_heard_after_the_answer(engine, mind):
    async with serving(engine) as port, plain(port) as connection:
        patient = {"type": "server_vad", "interrupt_response": False}
        await say(connection, "session.update", session={"audio": {"input": {"turn_detection": patient}}})
        mind.says("One two.", "Three.")
        mind.stop_after(2)
        await say(connection, "response.create")
        await until(connection, "response.output_audio_transcript.delta")
        for piece in question():
            await say(connection, "input_audio_buffer.append", audio=piece)
        await say(connection, "input_audio_buffer.commit")  # an error, since nothing is heard yet: all before it has been taken
        assert not any(event["type"] == "input_audio_buffer.speech_started" for event in await until(connection, "error"))
        mind.go_on()
        heard = await until(connection, "response.done")
        assert heard[-1]["response"]["status"] == "completed"
        heard = await until(connection, "response.done")
        assert heard[-1]["response"]["output"][0]["content"][0]["transcript"] == "Three."
        assert [event["type"] for event in heard if event["type"] in TURN] == TURN


async def test_silence_after_an_answer_brings_the_next_one(engine, mind):
    async with serving(engine) as port, plain(port) as connection:
        idle = {"type": "server_vad", "idle_timeout_ms": 5000}
        await say(connection, "session.update", session={"audio": {"input": {"turn_detection": idle}}})
        mind.says("Hello.", "Are you there?")
        await say(connection, "response.create")
        await until(connection, "response.done")
        silence = base64.b64encode(bytes(48_000)).decode()
        heard: list[dict[str, Any]] = []
        while not any(event["type"] == "response.done" for event in heard):
            await say(connection, "input_audio_buffer.append", audio=silence)
            await say(connection, "conversation.item.retrieve", item_id="nobody")
            heard += await until(connection, "error")
        kinds = [event["type"] for event in heard]
        assert kinds.index("input_audio_buffer.timeout_triggered") < kinds.index("response.created")
        triggered = heard[kinds.index("input_audio_buffer.timeout_triggered")]
        assert triggered["audio_end_ms"] - triggered["audio_start_ms"] == 5000


async def test_cancel_and_on(engine, mind):
    async with serving(engine) as port, stock(port) as connection:
        mind.says("One two three four five.")
        mind.stop_after(2)
        await connection.response.create()
        async for event in connection:
            if event.type == "response.output_audio_transcript.delta":
                await connection.response.cancel()
            if event.type == "response.done":
                break
        mind.go_on()
        assert event.response.status == "cancelled" and event.response.status_details.reason == "client_cancelled"
        await connection.send({"type": "nonsense", "event_id": "mine"})
        async for event in connection:
            if event.type == "error":
                break
        assert event.error.event_id == "mine"
        mind.says("Yes.")
        await connection.response.create()
        event = await done(connection)
        assert event.response.output[0].content[0].transcript == "Yes."


TURN = ["input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", "response.created", "response.done"]


async def test_talk_over_an_answer_whose_response_is_done_is_answered_and_the_client_says_what_was_heard(engine, mind):
    mind.says("word " * 30, "Yes.")
    async with (
        serving(engine, clock=time.monotonic, settings=replace(SETTINGS, max_tokens=300)) as port,
        stock(port) as connection,
    ):
        await connection.response.create()
        event = await done(connection)
        assert event.response.status == "completed", "all of it was sent long before all of it was played"
        item = event.response.output[0].id
        mind.hears("where is it")
        for piece in question():
            await connection.input_audio_buffer.append(audio=piece)
        kinds = []
        async for event in connection:
            kinds.append(event.type)
            if event.type == "input_audio_buffer.speech_started":
                await connection.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=650)
            if event.type == "response.done":
                break
        assert event.response.output[0].content[0].transcript == "Yes."
        assert [kind for kind in kinds if kind in TURN] == TURN and "conversation.item.truncated" in kinds


async def test_talk_over_an_answer_interrupts_it_where_sound_is_sent_as_it_is_played(engine, mind):
    mind.says(TEN, "Yes.")
    mind.hears("where is it")
    async with serving(engine, clock=time.monotonic) as port, plain(port, "?extensions=playback") as connection:
        await say(connection, "response.create")
        await until(connection, "response.output_audio.delta")
        for piece in question():
            await say(connection, "input_audio_buffer.append", audio=piece)
        heard = await until(connection, "response.done")
        done = heard[-1]["response"]
        assert done["status_details"]["reason"] == "turn_detected"
        said = done["output"][0]
        assert said["status"] == "incomplete" and len(said["content"][0]["transcript"].split()) < 10
        heard += await until(connection, "response.done")
        assert heard[-1]["response"]["status"] == "completed"
        assert [event["type"] for event in heard if event["type"] in TURN] == ["response.done", *TURN]


# ---- who may come in


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_nobody_listens_to_a_network_without_a_token(host):
    with pytest.raises(NotServed, match="token"):
        Access(host)
    assert Access(host, TOKEN)


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:8765", True), ("localhost:8765", True), ("[::1]:8765", True), ("localhost", True),
        ("attend.example.org", True), ("evil.example", False), ("127.0.0.1.evil.example", False),
        ("192.168.1.5", False), ("", False), (None, False), ("[", False),
    ],
)  # fmt: skip
def test_the_host_is_one_that_was_meant(host, known):
    assert Access(origins=("https://attend.example.org",)).host_known(host) is known


def test_a_server_on_a_network_is_known_by_its_address():
    access = Access("0.0.0.0", TOKEN)
    assert access.host_known("192.168.1.5:8765") and access.host_known("attend.local") and not access.host_known("evil.example")


@pytest.mark.parametrize(
    ("origins", "known"),
    [
        ([], True), (["http://127.0.0.1:8765"], True), (["https://127.0.0.1:8765"], True), (["https://friend.example"], True),
        (["http://127.0.0.1:9999"], False), (["http://evil.example"], False), (["null"], False), ([""], False),
        (["file://"], False), (["http://127.0.0.1:8765.evil.example"], False), (["http://127.0.0.1:8765"] * 2, False),
    ],
)  # fmt: skip
def test_origins(origins, known):
    assert Access(origins=("https://friend.example",)).origin_known(origins, "127.0.0.1:8765") is known


async def test_pages_of_others_stay_outside(engine, mind):
    async with serving(engine) as port:
        for origin in ("http://evil.example", "null", f"http://localhost:{port}"):
            with pytest.raises(InvalidStatus) as refused:
                await plain(port, origin=origin)
            assert refused.value.response.status_code == 403
        assert (await get(port, "/v1/realtime", *UPGRADE, host="evil.example"))[0] == 403
        async with plain(port, origin=f"http://127.0.0.1:{port}") as connection:
            await until(connection, "session.created")
        await free(engine)
        assert b'attend_refused_total{why="origin"} 3.0' in (await get(port, "/metrics"))[1]


async def test_a_token_in_each_of_its_forms(engine, caplog):
    caplog.set_level(logging.DEBUG)
    access = Access(token=TOKEN.replace(" ", "-"))
    key = access.token
    async with serving(engine, access=access) as port:
        wrong: list[dict[str, Any]] = [
            {},
            {"additional_headers": {"Authorization": "Bearer wrong"}},
            {"additional_headers": {"Authorization": f"Basic {key}"}},
            {"additional_headers": {"Cookie": f"attend={key}"}},
            {"subprotocols": ["realtime", "openai-insecure-api-key.wrong"]},
        ]
        for given in wrong:
            with pytest.raises(InvalidStatus) as refused:
                await plain(port, **given)
            assert refused.value.response.status_code == 401
        status, answer = await get(port, f"/?token={key}")
        cookie = answer.split(b"Set-Cookie: ")[1].split(b"\r\n")[0].decode()
        assert status == 303 and "HttpOnly; SameSite=Strict" in cookie and str(key) not in cookie
        right: list[dict[str, Any]] = [
            {"additional_headers": {"Authorization": f"Bearer {key}"}},
            {"additional_headers": {"Cookie": cookie.split(";")[0]}},
            {"subprotocols": ["realtime", f"openai-insecure-api-key.{key}", "openai-beta.realtime-v1"]},
        ]
        for given in right:
            async with plain(port, **given) as connection:
                await until(connection, "session.created")
                assert connection.subprotocol == ("realtime" if "subprotocols" in given else None)
            await free(engine)
        assert (await get(port, "/?token=wrong"))[0] == 401
        assert (await get(port, "/metrics"))[0] == 401 and (await get(port, "/healthz"))[0] == 200
    ours = [record.getMessage() for record in caplog.records if record.name != "websockets.client"]
    assert any("start" in line for line in ours) and not any(str(key) in line for line in ours)


# ---- pages


async def test_health_readiness_and_metrics(engine, mind):
    async with serving(engine) as port:
        assert (await get(port, "/healthz"))[0] == 200
        status, answer = await get(port, "/readyz")
        assert status == 200 and json.loads(answer.split(b"\r\n\r\n")[1]) == {"ready": True, "rows": 2, "free": 2}
        async with plain(port), plain(port) as second:
            await until(second, "session.created")
            assert (await get(port, "/readyz"))[0] == 503
        await free(engine)
        await works(port, mind)
        page = (await get(port, "/metrics"))[1]
        assert (
            b"attend_step_seconds" in page
            and b"attend_conversations_total 3.0" in page
            and b"attend_first_token_seconds_count 1.0" in page
        )


async def test_nothing_but_the_page_is_given_away(engine, tmp_path):
    folder = tmp_path / "static"
    folder.mkdir()
    (folder / "index.html").write_text("<h1>attend</h1>")
    (folder / "app.js").write_text("let a")
    (tmp_path / "secret").write_text("secret")
    async with serving(engine, static=folder) as port:
        status, answer = await get(port, "/")
        assert status == 200 and answer.endswith(b"<h1>attend</h1>") and b"Content-Security-Policy: default-src 'self'" in answer
        assert b"Content-Type: text/javascript" in (await get(port, "/app.js"))[1]
        for path in (
            "/../secret",
            "/%2e%2e/secret",
            "//secret",
            "/..%2fsecret",
            "/static/../../secret",
            "/" + "a/../" * 9 + "secret",
        ):
            status, answer = await get(port, path)
            assert status == 404 and b"secret" not in answer.replace(path.encode(), b"")
        assert (await get(port, "/", method="HEAD"))[1].endswith(b"\r\n\r\n")
        assert (await get(port, "/", method="DELETE"))[0] == 405


# ---- faults and attacks: afterwards a fresh conversation works


JUNK = [
    "",
    "[]",
    "null",
    "{",
    '{"type": 5}',
    '{"a": NaN}',
    "[" * 50_000,
    '{"type": "session.update", "session": 5}',
    "\u2028",
    "x" * 9999,
]


async def test_junk_is_answered_and_the_conversation_goes_on(engine, mind):
    async with serving(engine) as port:
        async with plain(port) as connection:
            await until(connection, "session.created")
            for message in [*JUNK, b"binary", b"\xff" * 1000]:
                await connection.send(message)
                assert (await until(connection, "error"))[-1]["error"]["type"] == "invalid_request_error"
            mind.says("Yes.")
            await say(connection, "response.create")
            await until(connection, "response.done")
        await free(engine)
        await works(port, mind)


async def test_a_message_that_is_too_long_ends_its_conversation_alone(engine, mind):
    async with serving(engine) as port, plain(port) as other:
        await until(other, "session.created")
        connection = await plain(port)
        await until(connection, "session.created")
        with pytest.raises(ConnectionClosed) as closed:
            await connection.send("x" * (server.MESSAGE + 1))
            await connection.recv()
        assert closed.value.rcvd and closed.value.rcvd.code == 1009
        await free(engine, 1)
        await works(port, mind)
        await say(other, "input_audio_buffer.clear")
        await until(other, "input_audio_buffer.cleared")


async def test_more_conversations_than_rows(engine, mind):
    async with serving(engine) as port:
        async with plain(port) as one, plain(port) as two:
            await until(one, "session.created")
            await until(two, "session.created")
            async with plain(port) as three:
                error = (await until(three, "error"))[-1]["error"]
                assert error["code"] == "session_limit_reached" and "2 places" in error["message"]
                with pytest.raises(ConnectionClosed) as closed:
                    await three.recv()
                assert closed.value.rcvd and closed.value.rcvd.code == 1013
        await free(engine)
        await works(port, mind)


async def test_who_asks_for_it_waits_in_line(engine, mind):
    async with serving(engine) as port, plain(port) as one, plain(port) as two:
        await until(one, "session.created")
        await until(two, "session.created")
        async with plain(port, "?extensions=queue") as third:
            assert json.loads(await third.recv())["before"] == 0
            async with plain(port, "?extensions=queue") as fourth, plain(port, "?extensions=queue") as fifth:
                assert [json.loads(await later.recv())["before"] for later in (fourth, fifth)] == [1, 2]
                async with plain(port) as hasty:
                    assert "3 wait" in (await until(hasty, "error"))[-1]["error"]["message"]
                await fourth.close()
                assert json.loads(await fifth.recv())["before"] == 1
                await two.close()
                assert json.loads(await third.recv())["type"] == "session.created"
                assert json.loads(await fifth.recv())["before"] == 0
    await free(engine)


async def test_a_client_that_goes_in_mid_answer_gives_its_row_back(engine, mind):
    async with serving(engine) as port:
        for rudely in (False, True):
            mind.says("One two three four five.")
            mind.stop_after(2)
            async with plain(port) as connection:
                await say(connection, "response.create")
                await until(connection, "response.output_audio_transcript.delta")
                if rudely:
                    connection.transport.abort()
            mind.go_on()
            await free(engine)
        await works(port, mind)


async def test_who_sends_and_does_not_read_waits_alone(engine, mind):
    async with serving(engine) as port:
        async with plain(port) as connection:
            connection.transport.pause_reading()
            flood = asyncio.create_task(_flood(connection))
            await works(port, mind)
            flood.cancel()
            connection.transport.abort()
        await free(engine)
        await works(port, mind)


async def _flood(connection: ClientConnection) -> None:
    while True:
        await say(connection, "nonsense", event_id="x" * 500)


async def test_a_storm_of_sockets_leaves_the_door_open(engine, mind):
    async with serving(engine) as port:
        storm = [await asyncio.open_connection("127.0.0.1", port) for _ in range(server.WAITING + 40)]
        gone = [reader for reader, _ in storm[: len(storm) - engine.rows - server.WAITING]]  # the oldest
        assert {await reader.read() for reader in gone} <= {b""}
        for _, writer in storm:
            writer.transport.abort()
        status = 0
        while status != 200:
            try:
                status, _ = await get(port, "/healthz")
            except (ConnectionError, IndexError):
                await asyncio.sleep(0)
        await works(port, mind)


async def test_a_fault_of_ours_ends_one_conversation_with_one_error(engine, mind, monkeypatch, caplog):
    async def broken(self: Session, inputs: Any, emit: Any) -> None:
        raise ZeroDivisionError("a secret of ours")

    async with serving(engine) as port:
        with monkeypatch.context() as patch:
            patch.setattr(Session, "run", broken)
            async with plain(port) as connection:
                heard = await until(connection, "error")
                assert heard[-1]["error"]["code"] == "fault" and "secret" not in json.dumps(heard)
                with pytest.raises(ConnectionClosed) as closed:
                    await connection.recv()
                assert closed.value.rcvd and closed.value.rcvd.code == 1011
        assert "a secret of ours" in caplog.text


async def test_a_server_that_goes_says_so_in_mid_answer(engine, mind):
    mind.says("One two three four five.")
    mind.stop_after(2)
    door = Server(engine, VAD, Beeps(), Options(port=0, settings=SETTINGS, clock=fast))
    async with asyncio.timeout(60):
        async with door.open() as port:
            connection = await plain(port)
            await say(connection, "response.create")
            await until(connection, "response.output_audio_transcript.delta")
        with pytest.raises(ConnectionClosed) as closed:
            await until(connection, "response.done")
        assert closed.value.rcvd and closed.value.rcvd.code == 1012
        mind.go_on()
        await free(engine)


async def test_a_port_that_is_taken(engine):
    async with serving(engine) as port:
        with pytest.raises(NotServed, match=f"port {port}"):
            async with serving(engine, port=port):
                pass


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--host", "0.0.0.0"], "give a --token-file"),
        (["--token-file", "no/such/file"], "cannot be read"),
        (["--tls-cert", "no/such/file"], "cannot be read"),
    ],
)
def test_a_server_that_cannot_begin_says_why(arguments, complaint, capsys):
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("attend: ") and complaint in said and said.count("\n") == 1


@pytest.mark.slow
async def test_the_command_answers_and_goes_when_it_is_told():
    """Also after it was killed, at once and at the same port, to which others still hold lines that are dead."""
    port = free_port()
    command = [sys.executable, "-m", "agent", "serve", "--port", str(port), "--voice", "none", "--rows", "1", "--log-json"]
    root, quiet = Path(checkpoint.__file__).parents[1], asyncio.subprocess.DEVNULL
    dead: list[asyncio.StreamWriter] = []
    async with asyncio.timeout(120):
        for end in (signal.SIGKILL, signal.SIGTERM):
            serve = await asyncio.create_subprocess_exec(*command, cwd=root, stdout=asyncio.subprocess.PIPE, stderr=quiet)
            assert serve.stdout
            address = (await serve.stdout.readline()).decode().strip()
            assert f":{port}/" in address
            _, held = await asyncio.open_connection("127.0.0.1", port)
            dead.append(held)
            async with connect(address, compression=None, proxy=None) as connection:
                for words in ("How many circles are there?", "And how many squares?"):
                    await say(connection, "conversation.item.create", item=text(words))
                    await say(connection, "response.create")
                    done = (await until(connection, "response.done"))[-1]["response"]
                    assert done["status"] == "completed" and done["output"][0]["content"][0]["text"]
                serve.send_signal(end)
                with pytest.raises(ConnectionClosed) as closed:
                    await connection.recv()
                assert end == signal.SIGKILL or (closed.value.rcvd and closed.value.rcvd.code == 1012)
            async with asyncio.timeout(5):
                assert await serve.wait() == (0 if end == signal.SIGTERM else -end)
    for held in dead:
        held.close()


@pytest.mark.slow
async def test_nano_answers_a_spoken_question_about_a_picture():
    with Engine(checkpoint.load("nano"), length=2048) as engine:
        voice = open_voice("espeak")
        async with serving(engine, voice, settings=ConversationConfig(seed=0)) as port, stock(port) as connection:
            address = "data:image/jpeg;base64," + base64.b64encode((DEMO / "picture.jpg").read_bytes()).decode()
            item = {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": address}]}
            await connection.session.update(
                session={"type": "realtime", "audio": {"input": {"transcription": {"model": "whisper-1"}}}}
            )
            await connection.conversation.item.create(item=item)
            for piece in question():
                await connection.input_audio_buffer.append(audio=piece)
            seen, sound = {}, 0
            while not {"response.done", "conversation.item.input_audio_transcription.completed"} <= seen.keys():
                event = await connection.recv()
                seen[event.type] = event
                sound += len(base64.b64decode(event.delta)) // 2 if event.type == "response.output_audio.delta" else 0
        assert seen["conversation.item.input_audio_transcription.completed"].transcript == "where is the orange square"
        answer = seen["response.done"].response.output[0].content[0].transcript
        assert answer.startswith("The orange square is ") and sound > 24_000


# ---- what was heard


async def test_what_a_client_says_was_heard_is_what_the_tape_keeps(engine, mind):
    mind.says("One two three four.")
    door = Server(engine, VAD, Beeps(), Options(port=0, settings=SETTINGS, clock=fast))
    async with asyncio.timeout(60), door.open() as port, plain(port) as connection:
        await say(connection, "response.create")
        item = (await until(connection, "response.done"))[-1]["response"]["output"][0]["id"]
        await say(connection, "conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=650)
        assert (await until(connection, "conversation.item.truncated"))[-1]["audio_end_ms"] == 650
        (session,) = door.sessions
        while not (heard := [entry for entry in session.record.tape.entries if isinstance(entry, Heard)]):
            await asyncio.sleep(0)
        answer = session.record.tape.entries[heard[-1].of]
        assert isinstance(answer, Answered)
        assert LOADED.tokenizer.decode(list(answer.ids[: heard[-1].ids])).strip() == "One two"


# ---- extensions and the log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("README.md", ["I am attend, running the nano model."]),
        ("web/README.md", ["looked at table", "mark on table orange square [", "first token after "]),
    ],
)
async def test_the_examples_of_the_readmes(page, printed, capsys):
    root = DEMO.parents[2]
    (code,) = re.findall(r"^```python\n(.*?)^```", (root / page).read_text(), re.DOTALL | re.MULTILINE)
    with Engine(checkpoint.load("nano"), length=2048) as engine:
        async with serving(engine, None, settings=ConversationConfig(seed=0)) as port:
            code = code.replace(":8765/", f":{port}/").replace("model/nano/demo", str(DEMO))
            await asyncio.to_thread(exec, code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(printed) and all(map(str.startswith, lines, printed)), lines


def test_there_is_no_example_in_a_readme_that_is_not_run():
    root = DEMO.parents[2]
    pages = [page for folder in ("agent", "model", "streams", "tests", "web") for page in (root / folder).rglob("README.md")]
    assert [page for page in pages if "```python" in page.read_text()] == [root / "web" / "README.md"]


async def test_extensions_by_the_address(engine, mind):
    mind.says("Yes.")
    async with serving(engine) as port, plain(port, "?model=nano&extensions=camera,timeline,no") as connection:
        address = "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()
        await say(connection, "attend.camera.frame", image_url=address, frame_id="f1")
        for piece in question():
            await say(connection, "input_audio_buffer.append", audio=piece)
        heard = await until(connection, "attend.timeline")
        assert "f1" in [event["frame_id"] for event in heard if event["type"] == "attend.camera.looked"]
        assert heard[-1]["stages_ms"]["first_token"] > 0


async def test_the_log_tells_times_and_no_content(engine, mind, caplog):
    caplog.set_level(logging.INFO, "attend.serve")
    for content in (False, True):
        async with serving(engine, log_json=True, log_content=content) as port:
            await works(port, mind)
            await free(engine)
        lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "attend.serve"]
        assert [line["event"] for line in lines] == ["start", "answer", "times", "end"] and len(
            {line["session"] for line in lines}
        ) == 1
        assert lines[1].get("text") == ("Yes." if content else None)
        caplog.clear()


async def test_the_log_tells_once_what_the_model_does_not_remember_any_more(engine, mind, caplog):
    caplog.set_level(logging.INFO, "attend.serve")
    settings = replace(SETTINGS, budget=Budget(ahead=60))
    async with serving(engine, log_json=True, settings=settings) as port, plain(port) as connection:
        for number in range(3):
            mind.says("Yes.")
            await say(connection, "conversation.item.create", item=text(f"Is this the question of number {number}?"))
            await say(connection, "response.create", response={"output_modalities": ["text"]})
            await until(connection, "response.done")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "attend.serve"]
    assert [line["of"] for line in lines if line["event"] == "evicted"] == [["turn 2"], ["turn 6"]]


# ---- a model that is being loaded


async def test_who_comes_while_the_model_is_loaded_waits_for_it(engine, mind):
    door = Server(None, VAD, None, Options(port=0, settings=SETTINGS, clock=fast))
    async with asyncio.timeout(60), door.open() as port, plain(port) as stock, plain(port, "?extensions=queue") as told:
        assert (await get(port, "/healthz"))[0] == 200
        status, body = await get(port, "/readyz")
        assert status == 503 and body.endswith(b'{"ready": false, "loaded": 0.0}')
        status, body = await get(port, "/metrics")
        assert status == 200 and b"attend_rows" not in body
        assert json.loads(await told.recv()) == {"type": "attend.loading", "loaded": 0.0, "event_id": ANY}
        door.loaded = 0.424
        assert json.loads(await told.recv())["loaded"] == 0.42
        assert (await get(port, "/readyz"))[1].endswith(b'{"ready": false, "loaded": 0.42}')
        door.enter(engine)
        for connection in (stock, told):
            assert json.loads(await connection.recv())["type"] == "session.created"
        assert (await get(port, "/readyz"))[1].endswith(b'{"ready": false, "rows": 2, "free": 0}')
        await stock.close()
        await works(port, mind)
        assert b"attend_rows 2.0" in (await get(port, "/metrics"))[1]


async def test_a_server_goes_also_while_its_model_is_loaded():
    door = Server(None, VAD, None, Options(port=0, settings=SETTINGS))
    async with asyncio.timeout(60):
        async with door.open() as port:
            waits = await plain(port, "?extensions=queue")
            await waits.recv()
        with pytest.raises(ConnectionClosed) as closed:
            await waits.recv()
        assert closed.value.rcvd and closed.value.rcvd.code == 1012


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_sentence(monkeypatch, capfd):
    begun, go = threading.Event(), threading.Event()

    def load(given, told, **room):
        told(0.5)
        begun.set()
        assert go.wait(60)
        raise checkpoint.CheckpointError("a shard is missing")

    def visit():
        try:
            assert begun.wait(60)
            port = int(re.search(r"ws://127.0.0.1:(\d+)/", capfd.readouterr().out)[1])
            seen.append(asyncio.run(get(port, "/readyz")))
        finally:
            go.set()

    monkeypatch.setattr(options, "load", load)
    seen: list[tuple[int, bytes]] = []
    visitor = threading.Thread(target=visit)
    visitor.start()
    assert main(["serve", "--port", "0", "--voice", "none"]) == 2
    visitor.join()
    ((status, body),) = seen
    assert status == 503 and body.endswith(b'{"ready": false, "loaded": 0.5}')
    assert capfd.readouterr().err == "attend: a shard is missing\n"


@pytest.mark.slow
async def test_the_command_goes_while_its_model_is_loaded():
    """`load` never ends, and nobody waits for it."""
    never = "lambda *_, **__: threading.Event().wait()"
    never = f"import threading; from agent import __main__, commands; commands.options.load = {never}"
    command = [sys.executable, "-c", f"{never}; __main__.main(['serve', '--port', '0', '--voice', 'none'])"]
    root, pipe = Path(checkpoint.__file__).parents[1], asyncio.subprocess.PIPE
    async with asyncio.timeout(120):
        serve = await asyncio.create_subprocess_exec(*command, cwd=root, stdout=pipe, stderr=pipe)
        assert serve.stdout and serve.stderr
        await serve.stdout.readline()
        serve.send_signal(signal.SIGTERM)
        assert await serve.wait() == 0 and not await serve.stderr.read()
