"""One client's socket beside another's: what is sent without end is read in turn with what others send, over real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial
from typing import Any

import pytest

from agent.session import MAX_DEFERRED
from agent.tape import Typed
from model.forward import ForwardPass
from tests.serving import SETTINGS, VAD, fast, get, plain, say, serving, text, until, works
from tests.test_faults import Raw
from web.connection import Allowance
from web.server import WAITING, Options, Server
from web.socket import FRAMES, PIECE


def test_an_allowance_is_of_a_second_and_says_how_long_to_wait():
    now = [0.0]
    allowance = Allowance(100, lambda: now[0])
    assert allowance.take(100) == 0 and allowance.take(50) == 0.5
    now[0] = 10.0
    assert allowance.take(100) == 0 and allowance.take(1) == 0.01, "a pause is worth one second at most"


async def test_a_flood_of_pings_is_read_in_pieces_and_the_line_goes_on(engine, mind):
    """One that is read whole held the event loop for a second."""
    async with serving(engine) as port:
        raw = await Raw.connect(port)
        count = 3 * FRAMES
        for _ in range(count):
            raw.send(9, b"")
        raw.send(1, json.dumps({"type": "input_audio_buffer.clear"}).encode())
        pongs = 0
        await works(port, mind)  # another is answered before all of them are
        while (frame := await raw.frame())[0] == 10 or json.loads(frame[1])["type"] != "input_audio_buffer.cleared":
            pongs += frame[0] == 10
        assert pongs == count, "and nothing of it is lost"
        raw.writer.transport.abort()


async def test_a_large_message_arrives_whole(engine, mind):
    async with serving(engine) as port, plain(port) as connection:
        await until(connection, "session.created")
        await say(connection, "nonsense", event_id="one", filling="x" * (50 * PIECE))
        await say(connection, "nonsense", event_id="two")
        assert [(await until(connection, "error"))[-1]["error"]["event_id"] for _ in range(2)] == ["one", "two"]


async def test_a_message_of_a_million_values_is_refused_unread(engine):
    async with serving(engine) as port, plain(port) as connection:
        await until(connection, "session.created")
        await say(connection, "nonsense", filling=[[]] * 1_000_000)
        error = (await until(connection, "error"))[-1]["error"]
        assert error["code"] == "invalid_json" and "more than 50,000 values" in error["message"]


async def test_sockets_that_never_finish_their_handshake_keep_nobody_out(engine, mind):
    async with serving(engine) as port:
        slow = []
        for _ in range(150):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"G")
            slow.append((reader, writer))
        await works(port, mind)
        assert (await get(port, "/healthz"))[0] == 200
        gone = 150 + 2 - (engine.rows + WAITING)
        for reader, _ in slow[: gone - 1]:
            assert await reader.read() == b"", "the oldest goes"
        assert not slow[-1][0].at_eof(), "not the newest"
        for _, writer in slow:
            writer.close()


# ---- what one conversation has queued


async def test_a_history_is_written_into_the_row_once_however_many_items_it_has(engine, mind, monkeypatch):
    """Item by item the row was cut back and written anew every few hundred items: another's answer waited 21 s for it."""
    written, forward = 0, ForwardPass.__call__

    def counted(self: ForwardPass, chunks: Any, x: Any) -> Any:
        nonlocal written
        written += len(x)
        return forward(self, chunks, x)

    monkeypatch.setattr(ForwardPass, "__call__", counted)
    async with serving(engine) as port, plain(port) as connection:
        await until(connection, "session.created")
        hold = threading.Event()
        engine.call(partial(hold.wait, 30))
        for n in range(600):
            await say(connection, "conversation.item.create", item={**text(f"the number {n} is in the history"), "id": f"i{n}"})
            await until(connection, "conversation.item.done")
        hold.set()
        mind.says("Yes.")
        await say(connection, "response.create", response={"output_modalities": ["text"]})
        assert (await until(connection, "response.done"))[-1]["response"]["status"] == "completed"
        assert 0 < written <= SETTINGS.budget.row, "of 15,000 positions only what a row holds, and that once"
        await works(port, mind)


@pytest.mark.slow
async def test_what_comes_while_an_answer_is_given_waits_and_nothing_of_it_is_lost(engine, mind):
    door = Server(engine, VAD, None, Options(port=0, settings=SETTINGS, clock=fast))
    async with asyncio.timeout(120), door.open() as port, plain(port) as connection:
        mind.says("One two three four five.")
        mind.stop_after(2)
        await say(connection, "response.create", response={"output_modalities": ["text"]})
        await until(connection, "response.output_text.delta")

        async def send() -> None:
            for n in range(MAX_DEFERRED + 500):
                await say(connection, "conversation.item.create", item=text(f"item {n}"))

        sending, heard = asyncio.create_task(send()), list[dict[str, Any]]()
        (session,) = door.sessions
        while not session.full:
            heard += await until(connection, "conversation.item.done")
        mind.go_on()
        while sum(event["type"] == "conversation.item.done" for event in heard) < MAX_DEFERRED + 500 + 1:  # the answer is one too
            heard += await until(connection, "conversation.item.done")
        await sending
        assert not [event for event in heard if event["type"] == "error"]
        typed: list[str] = []
        while len(typed) < MAX_DEFERRED + 500:
            await asyncio.sleep(0)
            typed = [entry.text for entry in session.record.tape.entries if isinstance(entry, Typed)]
        assert typed == [f"item {n}" for n in range(MAX_DEFERRED + 500)]
