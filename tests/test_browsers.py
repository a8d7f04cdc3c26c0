"""The page in Firefox and in WebKitGTK, before a real server with nano; each test says what its engine ran."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browsers import ROOM, Firefox, WebKit, missing
from tests.soundcard import MISSING, Card
from tests.test_page import DEMO, PATIENCE, Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason="install the apt packages pulseaudio, pulseaudio-utils"),
]
firefox = pytest.mark.skipif(bool(missing("firefox-esr")), reason="install the apt package firefox-esr")
webkit = pytest.mark.skipif(bool(missing("WebKitWebDriver", "Xvfb")), reason="install the apt packages webkit2gtk-driver, xvfb")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--rows", "2")
    yield server
    server.stop()


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    card = Card(tmp_path)
    yield card
    card.close()


def sound(card: Card) -> dict[str, str]:
    return {"PULSE_SERVER": f"unix:{card.spk.socket}"}


async def until(browser: Firefox | WebKit, function: str) -> Any:
    """What a function in the page returns, as soon as that is something."""
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline:
        if value := await browser.evaluate(function):
            return value
    raise AssertionError(f"never came: {function}; the page says {await browser.evaluate('() => document.body.innerText')!r}")


async def answer(browser: Firefox | WebKit, number: int) -> str:
    """The text of the answer of this number, once all its words can be read."""
    return str(await until(browser, READ.replace("NUMBER", str(number - 1))))


READ = """() => {
  const answer = document.querySelectorAll("li.agent")[NUMBER];
  return answer?.querySelector(".times") && !answer.querySelector(".coming") && answer.querySelector(".text").textContent;
}"""
MARKED = "() => document.querySelector('#shown').hidden && document.querySelector('.seen .mark')?.textContent"


@firefox
async def test_firefox_hears_a_spoken_question_looks_through_its_camera_and_plays_the_answer(server, card, tmp_path) -> None:
    room = ["sink_name=room", f"sink_properties=device.description={ROOM}"]  # what is played into it, Firefox hears
    subprocess.run(["pactl", f"--server=unix:{card.spk.socket}", "load-module", "module-null-sink", *room], check=True)
    async with Firefox(tmp_path, sound(card)) as browser:
        await browser.open(server.url)
        await browser.click("#start")
        await until(browser, "() => document.body.dataset.state === 'listening' && document.body.classList.contains('sees')")
        speak = ["paplay", f"--server=unix:{card.spk.socket}", "--device=room", str(DEMO / "question.wav")]
        await asyncio.to_thread(subprocess.run, speak, check=True)
        assert (await answer(browser, 1)).strip()
        asked = "() => document.querySelector('li.user .text:not(.awaited)')?.textContent"
        assert "orange square" in await until(browser, asked)
        assert await browser.evaluate("() => document.querySelector('.seen img').naturalWidth > 0")
        assert len(card.loud()) > 30, "0.3 s of the answer were played"
        assert await browser.evaluate("() => document.querySelector('#notice').hidden") and not browser.said


@firefox
async def test_firefox_without_a_sound_device_shows_the_words_and_says_why(server, tmp_path) -> None:
    async with Firefox(tmp_path, {"PULSE_SERVER": f"unix:{tmp_path}/nothing"}) as browser:
        await browser.open(server.url)
        await browser.type("#text", "hello")  # before anything is open
        assert await answer(browser, 1) == "Hello, I am listening."
        await until(browser, "() => /plays no sound/.test(document.querySelector('#notice').innerText)")
        await browser.type("#text", "what is your name")
        assert (await answer(browser, 2)).strip()
        assert "first sound" not in await browser.evaluate("() => [...document.querySelectorAll('.times')].at(-1).textContent")
        await browser.click("#suggestions button:nth-of-type(2)")
        assert "orange square" in await answer(browser, 3) and "orange square" in await until(browser, MARKED)
        await browser.click("#remedy")  # try again: there is still none
        await until(browser, "() => document.querySelector('#notice').hidden")
        await until(browser, "() => /plays no sound/.test(document.querySelector('#notice').innerText)")
        assert not browser.said


@webkit
async def test_webkit_takes_typed_questions_and_a_picture_and_plays_the_answers(server, card, tmp_path) -> None:
    async with WebKit(tmp_path, sound(card)) as browser:
        await browser.open(server.url)
        await browser.click("#start")
        await until(browser, "() => /There is no camera here/.test(document.querySelector('#notice').textContent)")
        await browser.type("#text", "hello")
        assert await answer(browser, 1) == "Hello, I am listening."
        assert len(card.loud()) > 30, "0.3 s of the answer were played"
        await browser.give("#file", DEMO / "picture.jpg")
        await until(browser, "() => !document.querySelector('#shown').hidden")
        await browser.type("#text", "where is the orange square")
        assert "orange square" in await answer(browser, 2) and "orange square" in await until(browser, MARKED)
        await browser.click("#suggestions button:nth-of-type(4)")
        assert "square" in await answer(browser, 3)
