"""What stock clients compare with: every code, word and close code that they match on, and their ways over a real socket."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from tests.realtime import Client
from tests.serving import plain, question, say, serving, stock, text, until
from tests.talk import jpeg
from tests.test_protocol import client, refused
from tests.test_protocol import text as words

# Read in the sources of pipecat 1.14.0, livekit-agents 1.8.9, openai-agents 0.24.0, @openai/agents-realtime 0.20.0,
# speech-to-speech 1.1.0 and openai 3.54.0: of each client what it compares an error with, and what it then does.
COMPARED = [
    ("pipecat", "code", "response_cancel_not_active", "goes on; any other code ends its conversation"),
    ("pipecat", "code", "conversation_already_has_active_response", "goes on"),
    ("pipecat", "code", "item_retrieve_invalid_item_id", "fails the retrieval that event_id names (rci_ITEM)"),
    ("livekit", "message", "Cancellation failed", "ignores it"),
    ("livekit", "code", "item_create_duplicate_item_id", "takes the item as created"),
    ("livekit", "code", "input_audio_buffer_commit_empty", "ignores it where there is turn detection"),
    ("livekit", "event_id", "chat_ctx_delete_1", "fails the change of its history that waits"),
    ("openai-agents", "event_id", "response_create_1", "takes back the response.create that waits"),
    ("speech-to-speech", "code", "conversation_already_has_active_response", "asks again when the response is over"),
    ("@openai/agents-realtime", "event_id", "mine", "tells which event was wrong"),
]


def error_of(c: Client, type: str, **fields: Any) -> dict[str, Any]:
    return refused(c.say(type, **fields))


def provoked(value: str) -> dict[str, Any]:
    """The error that a client would compare with it."""
    c = client()
    match value:
        case "response_cancel_not_active" | "Cancellation failed":
            return error_of(c, "response.cancel")
        case "conversation_already_has_active_response":
            c.say("response.create")
            return error_of(c, "response.create")
        case "item_retrieve_invalid_item_id":
            return error_of(c, "conversation.item.retrieve", item_id="nobody", event_id="rci_nobody")
        case "item_create_duplicate_item_id":
            c.say("conversation.item.create", item=words("x", id="i1"))
            return error_of(c, "conversation.item.create", item=words("x", id="i1"))
        case "input_audio_buffer_commit_empty":
            return error_of(c, "input_audio_buffer.commit")
        case "chat_ctx_delete_1":
            return error_of(c, "conversation.item.delete", item_id="nobody", event_id=value)
        case "response_create_1":
            return error_of(c, "response.create", response={"max_output_tokens": 0}, event_id=value)
    return error_of(c, "nonsense", event_id=value)


@pytest.mark.parametrize(("name", "field", "value", "then"), COMPARED)
def test_what_clients_compare_with_is_what_they_get(name, field, value, then):
    error = provoked(value)
    assert error[field].startswith(value) if field == "message" else error[field] == value


@pytest.mark.parametrize(
    ("type", "fields", "code"),
    [
        ("conversation.item.delete", {"item_id": "no"}, "item_delete_invalid_item_id"),
        ("conversation.item.truncate", {"item_id": "no", "content_index": 0, "audio_end_ms": 0}, "item_truncate_invalid_item_id"),
        ("conversation.item.retrieve", {"item_id": "no"}, "item_retrieve_invalid_item_id"),
    ],
)
def test_an_item_that_is_not_there_has_a_code_for_each_event(type, fields, code):
    assert error_of(client(), type, **fields)["code"] == code


# ---- push-to-talk by clients whose microphone stays open


async def listening(connection: ClientConnection, going: asyncio.Event) -> None:
    """A microphone that never pauses."""
    silence = base64.b64encode(bytes(960)).decode()
    while not going.is_set():
        await say(connection, "input_audio_buffer.append", audio=silence)
        await asyncio.sleep(0)


async def push_to_talk(connection: ClientConnection) -> None:
    await say(connection, "session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})


async def test_push_to_talk_with_an_open_microphone(engine, mind):
    async with serving(engine) as port, plain(port) as connection:
        await push_to_talk(connection)
        going = asyncio.Event()
        for _ in range(5):
            mind.says("It is red.")
            for piece in question(silence=0):
                await say(connection, "input_audio_buffer.append", audio=piece)
            await say(connection, "input_audio_buffer.commit")
            await say(connection, "response.create")
            open_microphone = asyncio.create_task(listening(connection, going))
            done = (await until(connection, "response.done"))[-1]["response"]
            going.set()
            await open_microphone
            going.clear()
            assert (done["status"], done["output"][0]["content"][0]["transcript"]) == ("completed", "It is red.")
            await say(connection, "input_audio_buffer.clear")


async def test_a_turn_that_was_committed_during_an_answer_comes_before_what_is_asked_after_it(engine, mind):
    async with serving(engine) as port, plain(port) as connection:
        await push_to_talk(connection)
        for n in range(8):
            mind.says("One two.", f"Answer {n}.")
            await say(connection, "conversation.item.create", item=text("Count."))
            await say(connection, "response.create")
            await until(connection, "response.created")
            for piece in question(silence=0)[: 8 + n]:
                await say(connection, "input_audio_buffer.append", audio=piece)
            await say(connection, "input_audio_buffer.commit")
            await until(connection, "response.done")
            await say(connection, "response.create")
            done = (await until(connection, "response.done"))[-1]["response"]
            assert (done["status"], done["output"][0]["content"][0]["transcript"]) == ("completed", f"Answer {n}.")
            assert done["usage"]["input_token_details"]["audio_tokens"] > 0, "the turn that it answers"


async def test_typed_asks_with_half_said_sound_in_the_buffer(engine, mind):
    mind.says("Yes.", "Red.")
    async with serving(engine) as port, plain(port) as connection:
        await push_to_talk(connection)
        pieces = question(silence=0)
        for piece in pieces[:10]:
            await say(connection, "input_audio_buffer.append", audio=piece)
        await say(connection, "conversation.item.create", item=text("Are you there?"))
        await say(connection, "response.create")
        done = (await until(connection, "response.done"))[-1]["response"]
        assert done["usage"]["input_token_details"]["audio_tokens"] == 0
        for piece in pieces[10:]:
            await say(connection, "input_audio_buffer.append", audio=piece)
        await say(connection, "input_audio_buffer.commit")
        await say(connection, "response.create")
        done = (await until(connection, "response.done"))[-1]["response"]
        assert abs(done["usage"]["input_token_details"]["audio_tokens"] - 2.5 * len(pieces)) <= 2, "all of it, and once"


async def test_a_soak_of_typed_asks_with_a_noisy_microphone_loses_none(engine, mind):
    click = base64.b64encode(b"\xff\x5f\x00\xa0" * 1200).decode()
    async with serving(engine) as port, plain(port) as connection:
        for n in range(20):
            mind.says(f"Answer {n}.")
            await say(connection, "input_audio_buffer.append", audio=click)
            await say(connection, "conversation.item.create", item=text("Well?"))
            await say(connection, "response.create")
            await say(connection, "input_audio_buffer.append", audio=click)
            done = (await until(connection, "response.done"))[-1]["response"]
            assert (done["status"], done["output"][0]["content"][0]["transcript"]) == ("completed", f"Answer {n}.")


# ---- livekit truncates at 0 ms: it cancels, and deletes the item, in one burst


async def test_cancel_and_delete_in_one_burst(engine, mind):
    async with serving(engine) as port, stock(port) as connection:
        mind.says("One two three four five six.")
        mind.stop_after(2)
        await connection.response.create()
        async for event in connection:
            if event.type == "response.output_audio_transcript.delta":
                await connection.response.cancel()
                await connection.conversation.item.delete(item_id=event.item_id)
                break
        kinds = []
        async for event in connection:
            kinds.append(event.type)
            assert event.type != "error", event
            if event.type == "conversation.item.deleted":
                break
        assert kinds.index("response.done") < kinds.index("conversation.item.deleted")
        mind.go_on()


# ---- messages as large as the protocol allows


async def test_no_message_of_the_protocol_ends_its_conversation(engine, mind):
    sound = base64.b64encode(bytes(15 << 20)).decode()
    photo = base64.b64encode(jpeg() + bytes(6_400_000)).decode()
    huge = base64.b64encode(jpeg() + bytes(36 << 20)).decode()
    async with serving(engine) as port, plain(port) as connection:
        await push_to_talk(connection)
        await say(connection, "input_audio_buffer.append", audio=sound)
        assert (await until(connection, "error"))[-1]["error"]["code"] == "input_audio_buffer_full"
        content = [{"type": "input_image", "image_url": f"data:image/jpeg;base64,{photo}"}]
        await say(connection, "conversation.item.create", item={"type": "message", "role": "user", "content": content})
        await until(connection, "conversation.item.done")
        content = [{"type": "input_image", "image_url": f"data:image/jpeg;base64,{huge}"}]
        await say(connection, "conversation.item.create", item={"type": "message", "role": "user", "content": content})
        assert (await until(connection, "error"))[-1]["error"]["code"] == "string_above_max_length"
        mind.says("Yes.")
        await say(connection, "response.create")
        await until(connection, "response.done")
