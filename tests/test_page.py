"""The page in a real Chromium that hears a wav for a microphone and sees a picture for a camera, before a real server with nano.

`attend serve` runs as users run it, in a process of its own, so that it can be ended and begun again.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
from playwright.async_api import Browser, Page, async_playwright

from streams.media_files import read_audio

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "model/nano/demo"
NODE = ROOT / "build/node/node_modules"
AXE = (NODE / "axe-core/axe.min.js").read_text() if (NODE / "axe-core").exists() else ""
SHOTS = ROOT / "artifacts"
CHROMIUM = shutil.which("chromium")
TAP = (Path(__file__).parent / "page/tap.js").read_text()
TAP_WORKLET = (Path(__file__).parent / "page/tap-worklet.js").read_text()
LEAD = 3.0  # seconds before the question, in which the page is opened and started
CAMERA = "document.querySelector('video').srcObject?.getVideoTracks()[0]"
SPOKEN = "() => /[2-9]\\d frames/.test(document.querySelector('.user.open .taking')?.textContent)"  # for most of a second
PATIENCE = 120_000  # milliseconds: the machine may be busy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not AXE, reason="axe-core and typescript are not in build/node: make test puts them there"),
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt-get install chromium"),
]


# ---- what the browser hears and sees


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recordings(tmp_path_factory.mktemp("media"))


def recordings(folder: Path) -> Path:
    """question.wav: the demo's question, once; speech.wav: over and over, without a pause; camera.mjpeg: the demo's picture."""
    question = read_audio(DEMO / "question.wav")
    asked = np.concatenate([np.zeros(int(LEAD * 16_000), np.float32), question])
    loud = np.flatnonzero(np.abs(question) > 0.02)
    soundfile.write(folder / "speech.wav", question[loud[0] : loud[-1]], 16_000, "PCM_16")
    soundfile.write(folder / "question.wav", np.concatenate([asked, np.zeros(40 * 16_000, np.float32)]), 16_000, "PCM_16")
    soundfile.write(folder / "silence.wav", np.zeros(40 * 16_000, np.float32), 16_000, "PCM_16")
    jpeg = cv2.imencode(".jpg", cv2.imread(str(DEMO / "picture.jpg")), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    (folder / "camera.mjpeg").write_bytes(jpeg * 30)
    return folder


HELD = """
import sys
from agent import __main__
from agent.commands import options
load = options.load
options.load = lambda given, told, **room: (told(0.42), sys.stdin.readline(), load(given, **room))[-1]
sys.exit(__main__.main())
"""


class Server:
    """`attend serve` on a port of its own. `held`: the model is loaded as far as 42 % until `go_on`."""

    def __init__(self, *options: str, held: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.options, self.held = options, held
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        how = ["-c", HELD] if self.held else ["-m", "agent"]
        command = [sys.executable, *how, "serve", "--port", str(self.port), "--voice", "espeak", *self.options]
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=quiet)
        assert self.process.stdout and self.process.stdout.readline().startswith(b"ws://")

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--rows", "1")
    yield server
    server.stop()


class Visit:
    """A page, and all that its console said."""

    def __init__(self, page: Page) -> None:
        self.page, self.said = page, list[str]()
        page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))

    async def until(self, script: str, *, what: str = "") -> Any:
        """What a function in the page returns, as soon as that is something."""
        deadline = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < deadline:
            if value := await self.page.evaluate(script):
                return value
            await asyncio.sleep(0.05)
        seen = await self.page.evaluate("() => document.body.innerText")
        raise AssertionError(f"never came: {what or script}; the page says {seen!r}, its console {self.said}")

    async def state(self, *names: str) -> None:
        await self.until(f"() => {list(names)}.includes(document.body.dataset.state)")

    async def answered(self, number: int = 1) -> str:
        """The text of the answer of this number, once it was heard."""
        script = f"""() => {{ const p = document.querySelectorAll('li.agent')[{number - 1}];
            return p?.querySelector('.times') && !p.querySelector('.coming') && p.querySelector('.text').textContent }}"""
        return str(await self.until(script, what=f"answer {number}"))

    async def type(self, words: str) -> None:
        await self.page.fill("#text", words)
        await self.page.press("#text", "Enter")

    async def shot(self, name: str) -> None:
        SHOTS.mkdir(exist_ok=True)
        await self.page.screenshot(path=SHOTS / f"{name}.png")


@asynccontextmanager
async def visiting(
    server: Server,
    media: Path,
    wav: str = "question.wav%noloop",
    flags: tuple[str, ...] = (),
    shown: bool = True,
    recorded: bool = False,
    **how: Any,
) -> AsyncIterator[Visit]:
    """`recorded`: what is said and played is, for which the page's policy is put aside: it lets no worklet of ours in."""
    arguments = [
        "--no-sandbox", "--disable-gpu", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream=device-count=2",
        f"--use-file-for-fake-audio-capture={media / wav}",
        *([f"--use-file-for-fake-video-capture={media / 'camera.mjpeg'}"] if shown else []), *flags,
    ]  # fmt: skip
    async with async_playwright() as playwright:
        browser: Browser = await playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=arguments)
        given = {
            "viewport": {"width": 1280, "height": 800},
            "permissions": ["microphone", "camera"],
            "bypass_csp": recorded,
            **how,
        }
        choices = given.pop("choices", '{"echo": false}')
        context = await browser.new_context(**given)
        if recorded:
            await context.add_init_script(f"window.recorder = {json.dumps(TAP_WORKLET)}")
        await context.add_init_script(TAP)
        await context.add_init_script(f"localStorage.getItem('attend') ?? localStorage.setItem('attend', '{choices}')")
        page = await context.new_page()
        page.set_default_timeout(PATIENCE)
        visit = Visit(page)
        await page.goto(server.url)
        yield visit
        await browser.close()


# ---- what is said, shown and heard


async def test_a_spoken_question_about_what_is_held_up(server: Server, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with visiting(server, media, recorded=True) as visit:
        page = visit.page
        await page.click("#start")
        words = await visit.answered()
        assert words.strip() == "The orange square is at the top."
        assert "orange square" in (await page.inner_text("li.user .text")).lower()
        frame = await visit.until(BOXES)
        (box,) = frame["marks"]
        assert overlap(box["place"], [148 / 640, 40 / 480, 365 / 640, 248 / 480]) > 0.5 and "orange square" in box["label"]
        image = cv2.imdecode(np.frombuffer(base64.b64decode(frame["image"]), np.uint8), cv2.IMREAD_COLOR)
        blue, green, red = image[image.shape[0] * 3 // 10, image.shape[1] * 4 // 10]
        assert red > 120 > green > blue  # the frame that was looked at shows the square there
        heard, given, rate = await tapped(page)
        loud = np.flatnonzero(np.abs(heard) > 0.02)
        first = np.flatnonzero(np.abs(given) > 0.004)
        assert len(first) and np.sqrt(np.mean(given[first[0] :] ** 2)) > 0.003
        assert loud[-1] - loud[0] > rate and first[0] > loud[-1]
        silence = (first[0] - loud[-1]) / rate * 1000
        shown = await page.get_attribute("figure.times", "data-silence")
        with capsys.disabled():
            print(f"\nend of speech to the first sound at the page's output: {silence:.0f} ms (the page itself says {shown} ms)")
        assert silence > 300 and abs(float(shown or 0) - silence) < 700  # both by the browser's audio clock
        assert re.search(r"You spoke for .+: \d+ frames, .+ taken in", await page.inner_text("figure.times"))
        await page.hover("li.agent .name")
        assert await page.locator(".mark.lit").count() == 1
        await page.click(".seen .mark")
        assert await page.locator(".name.kept").count() == 1
        assert sum(await page.evaluate("() => window.shifts")) < 0.1
        await page.mouse.move(2, 2)
        await page.click("li.agent .name")
        await page.click("li.agent .name")
        await states(visit, "answer")
        assert not visit.said


async def states(visit: Visit, name: str) -> None:
    """The page as it is, at two sizes and in light and dark: pictures of it, and what axe finds wrong."""
    page = visit.page
    for size, viewport in (("desk", {"width": 1280, "height": 800}), ("phone", {"width": 390, "height": 844})):
        await page.set_viewport_size(viewport)  # type: ignore[arg-type]
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
            await page.evaluate("() => document.querySelector('#turns').scrollTo(0, 1e6)")
            await visit.shot(f"{name}-{size}-{scheme}")
            assert await page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "it is wider than the screen"
            found = await page.evaluate(f"""() => {{ {AXE}; return axe.run().then(({{ violations }}) => violations
                .filter(({{ impact }}) => ['serious', 'critical'].includes(impact))
                .map(({{ id, nodes }}) => [id, nodes.map(({{ html }}) => html.slice(0, 200))])) }}""")
            assert found == [], (name, size, scheme)
    await page.set_viewport_size({"width": 1280, "height": 800})


BOXES = """async () => {
  const figure = document.querySelector('figure.seen:has(.mark)');
  if (!figure) return null;
  const image = figure.querySelector('img'), all = image.getBoundingClientRect();
  const marks = [...figure.querySelectorAll('.mark')].map((mark) => {
    const { left, top, right, bottom } = mark.getBoundingClientRect();
    return { label: mark.textContent, place: [(left - all.left) / all.width, (top - all.top) / all.height,
      (right - all.left) / all.width, (bottom - all.top) / all.height] };
  });
  const blob = await (await window.fetched(image.src));
  return { marks, image: blob };
}"""


def overlap(one: list[float], other: list[float]) -> float:
    def area(box: list[float]) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    both = area([max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])])
    return both / (area(one) + area(other) - both)


async def tapped(page: Page) -> tuple[Any, Any, int]:
    """Microphone and output as they were in the page: float32, aligned, and their rate."""
    data = await page.evaluate("() => window.tapped()")
    pcm = np.frombuffer(base64.b64decode(data["pcm"]), np.float32).reshape(-1, 2)
    return pcm[:, 0], pcm[:, 1], int(data["rate"])


async def test_typed_interrupted_pressed_and_without_a_camera(server: Server, media: Path) -> None:
    async with visiting(server, media, "silence.wav") as visit:
        page = visit.page
        await states(visit, "start")
        await page.click("#start")
        await visit.state("listening", "muted")
        await visit.until("() => document.body.classList.contains('sees')")
        await visit.type("what do you see")
        await visit.until("""() => { const words = [...document.querySelectorAll('li.agent .text span')];
            const heard = words.filter((word) => !word.classList.contains('coming')).length;
            return heard > 1 && heard < words.length }""")
        await page.locator("#text").blur()
        await page.keyboard.press("Escape")
        await visit.until("() => document.querySelector('li.agent .unheard')")
        await visit.answered()
        assert 0 < await page.locator("li.agent .unheard").count() < await page.locator("li.agent .text span").count()
        assert await page.locator("li.user .seen").count() == 1
        await states(visit, "interrupted")

        await page.click("#look")  # off
        await visit.type("hello")
        assert (await visit.answered(2)).strip()
        assert await page.locator("li.user:nth-of-type(3) .seen").count() == 0
        assert await page.locator(".view .dark").is_visible()

        await page.set_input_files("#file", DEMO / "picture.jpg")
        await visit.until("() => !document.querySelector('#shown').hidden")
        await visit.type("where is the orange square")
        assert "orange square" in await visit.answered(3)
        await visit.until("() => document.querySelector('#shown').hidden && document.querySelector('.seen .mark')")
        assert not visit.said


async def test_talk_over_an_answer_cuts_it_and_who_is_muted_is_not_heard(server: Server, media: Path) -> None:
    async with visiting(server, media, "speech.wav") as visit:
        page = visit.page
        await page.click("#start")
        await visit.state("hearing")
        await visit.until(SPOKEN)
        await states(visit, "hearing")
        await page.click("#mute")  # which ends the sentence
        await visit.answered()
        assert await page.locator(".taking").count() == 0
        await visit.state("muted")

        await visit.type("what do you see")
        await visit.until("() => document.querySelectorAll('li.agent:nth-of-type(4) .text span:not(.coming)').length > 1")
        assert await page.locator("li.user").count() == 2  # nothing was heard all the time
        await page.click("#mute")
        await visit.until("() => document.querySelector('li.agent:nth-of-type(4) .unheard')")
        await visit.until(SPOKEN)
        await page.click("#mute")
        await visit.answered(3)
        words = page.locator("li.agent:nth-of-type(4) .text span")
        assert 0 < await page.locator("li.agent:nth-of-type(4) .unheard").count() < await words.count()

        await page.locator("#mute").blur()
        await page.keyboard.down("Space")  # is heard as long as it is held
        await visit.until(SPOKEN)
        await page.keyboard.up("Space")
        await visit.answered(4)
        await visit.state("muted")
        assert not visit.said


async def test_a_microphone_is_lost_in_the_middle_of_a_sentence_and_plugged_in_again(server: Server, media: Path) -> None:
    async with visiting(server, media, "speech.wav") as visit:
        page = visit.page
        await page.click("#start")
        await visit.state("hearing")
        await visit.until(SPOKEN)
        await page.evaluate("() => { window.heard.stop(); window.heard.dispatchEvent(new Event('ended')) }")
        assert "microphone is gone" in await page.inner_text("#notice")
        await visit.answered()
        await visit.state("typing")
        assert await page.is_disabled("#mute")
        await visit.type("hello")
        assert (await visit.answered(2)).strip()
        await page.evaluate("() => navigator.mediaDevices.dispatchEvent(new Event('devicechange'))")
        await visit.state("hearing")
        assert await page.locator("#notice").is_hidden()
        await visit.until(SPOKEN)
        await page.click("#mute")
        await visit.answered(3)
        assert not visit.said


async def test_devices_are_chosen(server: Server, media: Path) -> None:
    async with visiting(server, media, "silence.wav", shown=False) as visit:
        page = visit.page
        await page.click("#start")
        await visit.state("listening")
        await visit.until("() => document.body.classList.contains('sees')")
        await page.click("#configure")
        await states(visit, "settings")
        chosen = []
        for device in ("microphone", "camera", "speaker"):
            options = page.locator(f"#{device}-choice option")
            await page.select_option(f"#{device}-choice", value=await options.last.get_attribute("value"))
            chosen.append(await page.input_value(f"#{device}-choice"))
            assert chosen[-1] and await options.count() > 2
        await page.check("#press")
        await page.click("#settings button.text")
        await visit.until("() => !document.querySelector('#hold').hidden")
        for used, device in zip(
            ("window.heard.getSettings().deviceId", f"{CAMERA}.getSettings().deviceId", "window.sink()"), chosen, strict=True
        ):
            await visit.until(f"() => {used} === '{device}'")
        await visit.type("hello")
        assert (await visit.answered()).strip()

        await page.reload()  # which forgets nothing
        await page.click("#start")
        await visit.until(f"() => window.heard?.getSettings().deviceId === '{chosen[0]}'")
        kept = "{ ...JSON.parse(localStorage.attend), microphone: 'sold', camera: 'sold' }"
        await page.evaluate(f"() => localStorage.setItem('attend', JSON.stringify({kept}))")
        await page.reload()  # and goes on without what is not there any more
        await page.click("#start")
        await visit.state("listening")
        await visit.until("() => document.body.classList.contains('sees')")
        assert not visit.said


async def test_a_picture_is_pasted_and_another_one_dropped(server: Server, media: Path) -> None:
    permissions = ["microphone", "camera", "clipboard-read", "clipboard-write"]
    async with visiting(server, media, "silence.wav", permissions=permissions) as visit:
        page = visit.page
        png = base64.b64encode(cv2.imencode(".png", cv2.imread(str(DEMO / "picture.jpg")))[1].tobytes()).decode()
        await page.evaluate(COPY, png)
        await page.click("#look")
        await page.click("#start")
        await visit.state("listening")
        await page.focus("#text")
        await page.keyboard.press("Control+V")
        await visit.until("() => !document.querySelector('#shown').hidden")
        await visit.type("where is the orange square")
        assert "orange square" in await visit.answered()
        await visit.until("() => document.querySelector('#shown').hidden && document.querySelector('.seen .mark')")

        await drop(page, DEMO / "picture.jpg")
        await visit.until("() => !document.querySelector('#shown').hidden")
        await page.click("#unshow")
        assert await page.locator("#shown").is_hidden()
        await drop(page, DEMO / "talk.toml")
        await visit.until("() => /no picture/.test(document.querySelector('#notice').innerText)")
        await page.evaluate("() => navigator.clipboard.writeText('words')")
        await page.focus("#text")
        await page.keyboard.press("Control+V")
        assert await page.input_value("#text") == "words" and await page.locator("#shown").is_hidden()
        assert not visit.said


COPY = """(png) => {
  const bytes = Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0));
  return navigator.clipboard.write([new ClipboardItem({ "image/png": new Blob([bytes], { type: "image/png" }) })]);
}"""


async def drop(page: Page, file: Path) -> None:
    """A file, dragged from outside onto the middle of the page."""
    browser = await page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        await browser.send("Input.dispatchDragEvent", {"type": kind, "x": 640, "y": 400, "data": data})


async def test_push_to_talk_asks_what_was_said_while_it_was_held(server: Server, media: Path) -> None:
    async with visiting(server, media, recorded=True, choices='{"echo": false, "press": true}') as visit:
        page = visit.page
        await page.click("#start")
        await visit.until("() => !document.querySelector('#hold').hidden && document.body.dataset.state == 'listening'")
        await page.locator("#start").blur()
        await page.keyboard.down("Space")
        await visit.state("hearing")
        await visit.until("() => window.spoken()")
        await page.keyboard.up("Space")
        assert "orange square" in await visit.answered()
        await visit.until("() => document.querySelector('.seen .mark')")
        assert not visit.said


async def test_a_device_is_lost_and_a_server_restarted(media: Path) -> None:
    server = Server("--rows", "2")
    try:
        async with visiting(server, media, "silence.wav") as visit:
            page = visit.page
            await page.click("#start")
            await visit.state("listening")
            await visit.type("hello")
            first = await visit.answered()
            await visit.until("() => document.body.classList.contains('sees')")
            await page.evaluate(f"() => {{ const track = {CAMERA}; track.stop(); track.dispatchEvent(new Event('ended')) }}")
            await visit.until("() => /camera is gone/.test(document.querySelector('#notice').innerText)")
            assert not visit.said
            server.stop()
            await visit.state("lost")
            assert first in await page.inner_text("#turns")
            await states(visit, "lost")
            server.start()
            await visit.state("listening")
            await visit.type("hello")
            assert await visit.answered(2) and first in await page.inner_text("#turns")
    finally:
        server.stop()


async def test_a_second_tab_waits_until_a_place_is_free(server: Server, media: Path) -> None:
    async with visiting(server, media, "silence.wav") as one, visiting(server, media, "silence.wav") as two:
        await one.page.click("#start")
        await one.state("listening")
        await two.page.click("#start")
        await two.state("busy")
        assert "You are next" in await two.page.inner_text("#notice")
        await states(two, "busy")
        await one.page.click("#start")
        await two.state("listening")
        assert await two.page.locator("#notice").is_hidden()
        assert not one.said + two.said


async def test_a_page_waits_while_the_model_is_loaded(media: Path) -> None:
    server = Server(held=True)
    try:
        async with visiting(server, media, "silence.wav") as visit:
            page = visit.page
            await page.click("#start")
            await visit.state("loading")
            assert await page.get_attribute("#notice progress", "value") == "0.42"
            await states(visit, "loading")
            server.go_on()
            await visit.state("listening")
            assert await page.locator("#notice").is_hidden()
            await visit.type("hello")
            assert (await visit.answered()).strip()
            assert not visit.said
    finally:
        server.stop()


async def test_words_are_shown_when_sound_stops_and_heard_again_when_it_goes_on(server: Server, media: Path) -> None:
    async with visiting(server, media, "silence.wav") as visit:
        page = visit.page
        await page.click("#look")
        await page.click("#start")
        await visit.state("listening")
        await visit.type("hello")
        await visit.answered()
        await page.evaluate("() => window.audio.suspend()")  # as for a telephone call, or a device that is gone
        await visit.type("what is your name")
        assert (await visit.answered(2)).strip()
        await visit.state("typing")
        assert "plays no sound" in await page.inner_text("#notice")
        await visit.type("hello")
        await visit.answered(3)
        assert "first sound" not in await page.locator(".times").nth(2).inner_text(), "the server sends text alone"
        await states(visit, "silent")
        await page.evaluate("() => window.audio.resume()")
        await visit.state("listening")
        assert await page.locator("#notice").is_hidden()
        await visit.type("hello")
        await visit.answered(4)
        assert "first sound" in await page.locator(".times").nth(3).inner_text()
        assert not visit.said


async def test_a_page_whose_browser_has_no_sound_at_all_shows_the_words(server: Server, media: Path) -> None:
    async with visiting(server, media, "silence.wav") as visit:
        await visit.page.evaluate("() => { window.AudioContext = class { constructor() { throw new Error('no sound') } } }")
        await visit.type("hello")
        assert await visit.answered() == "Hello, I am listening."
        assert "plays no sound" in await visit.page.inner_text("#notice")
        assert not visit.said


# ---- what a small model suggests


async def test_what_a_small_model_knows_is_said_and_its_suggestions_are_asked(server: Server, media: Path) -> None:
    async with visiting(server, media, shown=False, choices='{"echo": false, "look": false}') as visit:
        page = visit.page
        await visit.until("() => !document.querySelector('#suggestions').hidden")
        assert "circles, squares" in await page.inner_text("#suggestions p")
        await states(visit, "suggestions")
        questions = page.locator("#suggestions button:not(.example)")
        assert await questions.count() == 3
        for number in (1, 2, 3):
            await questions.nth(number - 1).click()
            assert "Sorry" not in await visit.answered(number)
        assert await page.locator(".seen .mark").count() > 0

        await page.click("#suggestions .example")  # or the picture alone, and a question is spoken
        await visit.until("() => !document.querySelector('#shown').hidden")
        await page.click("#start")
        await visit.state("off")
        await page.click("#start")
        assert "orange square" in await visit.answered(4)
        assert not visit.said


async def test_another_model_suggests_nothing(media: Path, tmp_path: Path) -> None:
    for file in (ROOT / "model/nano").iterdir():
        if file.suffix in (".json", ".safetensors") and file.name != "suggestions.json":
            (tmp_path / file.name).symlink_to(file)
    server = Server("--model", str(tmp_path))
    try:
        async with visiting(server, media, "silence.wav") as visit:
            await visit.page.click("#start")
            await visit.state("listening")
            await visit.until("async () => (await (await fetch('suggestions.json')).text()) === 'null'")
            assert await visit.page.locator("#suggestions").is_hidden()
            assert not visit.said
    finally:
        server.stop()


async def test_an_answer_grows_and_what_stands_there_stays(server: Server, media: Path) -> None:
    async with visiting(server, media, "silence.wav") as visit:
        kept, stands, reads = await visit.page.evaluate(GROWING, ["One", " two", " thr", "ee. ", "Four ", "5"])
        assert kept and reads == "One two three. Four 5"
        assert stands == [["One", "0"], [" two", "4"], [" three.", "8"], [" Four", "15"], [" 5", "20"]]


GROWING = """async (deltas) => {
  const { TranscriptView } = await import("./transcript.js");
  const list = document.createElement("ol");
  const transcript = new TranscriptView(list, document.createElement("div"));
  const entry = { who: "agent", id: "a", text: "", state: "open", shownTo: 0, heardTo: 0, marks: [], to: null, times: null };
  const last = deltas.map((delta) => {
    entry.text += delta;
    transcript.show(entry);
    return list.querySelector("span:last-child");
  });
  const all = [...list.querySelectorAll("span")];
  return [last.every((span) => all.includes(span)), all.map((span) => [span.textContent, span.dataset.at]), list.textContent];
}"""


async def test_who_gets_no_microphone_is_told_what_to_do(server: Server, media: Path) -> None:
    async with visiting(server, media, permissions=[], flags=("--deny-permission-prompts",)) as visit:
        await visit.page.evaluate(
            "() => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', 'NotAllowedError') } }"
        )
        await visit.page.click("#start")
        await visit.state("typing")
        assert "allow it in the browser" in await visit.page.inner_text("#notice")
        await visit.type("hello")
        assert await visit.answered()


# ---- its source


def test_the_modules_are_typed() -> None:
    tsc = NODE / ".bin/tsc"
    done = subprocess.run([tsc, "-p", ROOT / "tests/page/tsconfig.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_everything_comes_from_here() -> None:
    for path in (ROOT / "web/static").iterdir():
        addresses = set(re.findall(r"https?://[\w./]+", path.read_text())) - {"http://www.w3.org/2000/svg", "http://localhost"}
        assert not addresses, (path, addresses)
