"""Two browsers besides Chromium, as Debian ships them, and the few things a test does with a page: the same names for both.

Firefox speaks WebDriver BiDi over a websocket (Playwright drives only builds of its own, and newer Firefoxes than the ESR);
WebKitGTK's MiniBrowser is driven over WebDriver's HTTP by WebKitWebDriver. Both are driven from the outside, with real clicks
and keys, which count as gestures of a user.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's reference, by WebDriver's specification
ENTER = "\ue007"
ROOM = "Room"  # description of PulseAudio's sink
PREFERENCES = {  # of Firefox: no first-run pages, and nothing is fetched from anywhere
    "app.update.disabledForTesting": True,
    "browser.aboutwelcome.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "browser.region.network.url": "",
    "datareporting.policy.dataSubmissionEnabled": False,
    "dom.min_background_timeout_value": 10,
    "extensions.systemAddon.update.enabled": False,
    "media.audio_loopback_dev": f"Monitor of {ROOM}",  # the microphone, where PulseAudio has such a sink; else a tone is
    "media.autoplay.default": 5,  # a page plays nothing before a gesture, which is what most people have
    "media.gmp-manager.updateEnabled": False,
    "media.navigator.permission.disabled": True,  # the microphone and the camera are given without asking
    "media.navigator.streams.fake": True,  # a moving pattern for a camera
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,",
    "toolkit.telemetry.server": "",
}


def missing(*programs: str) -> str:
    """The names of those that are not installed."""
    return ", ".join(program for program in programs if not shutil.which(program))


class Firefox:
    """Debian's firefox-esr, without a window, with a profile of its own in `folder`."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.said: list[str] = []  # errors of the page's console
        self._folder, self._environment = folder, {**os.environ, **(environment or {})}
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    async def __aenter__(self) -> Firefox:
        preferences = (f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in PREFERENCES.items())
        (self._folder / "user.js").write_text("".join(preferences))
        command = ["firefox-esr", "--headless", "--no-remote", "--profile", str(self._folder), "--remote-debugging-port", "0"]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env={**self._environment, "HOME": str(self._folder), "MOZ_HEADLESS_WIDTH": "1280", "MOZ_HEADLESS_HEIGHT": "900"},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stderr
        async for line in self._process.stderr:
            if found := re.search(rb"WebDriver BiDi listening on (ws://\S+)", line):
                break
        else:
            raise AssertionError("firefox-esr did not start")
        self._drain = asyncio.create_task(self._process.stderr.read())  # or it stops when the pipe is full
        self._socket = await connect(f"{found[1].decode()}/session", max_size=None)
        self._reading = asyncio.create_task(self._read())
        await self._send("session.new", capabilities={})
        await self._send("session.subscribe", events=["log.entryAdded"])
        contexts = (await self._send("browsingContext.getTree"))["contexts"]
        self._context = contexts[0]["context"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await asyncio.gather(self._reading, self._drain, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message)
            if told["type"] == "event":
                if told["params"].get("level") == "error":
                    self.said.append(str(told["params"].get("text")))
                continue
            future = self._waiting.pop(told["id"])
            if not future.done():
                future.set_result(told)

    async def _send(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        answer = await self._waiting[number]
        assert answer["type"] == "success", f"{method}: {answer.get('error')}: {answer.get('message')}"
        return answer["result"]

    async def open(self, url: str) -> None:
        await self._send("browsingContext.navigate", context=self._context, url=url, wait="complete")

    async def before(self, script: str) -> None:
        """Runs in every page before its own scripts."""
        await self._send("script.addPreloadScript", functionDeclaration=f"() => {{ {script} }}")

    async def evaluate(self, function: str) -> Any:
        """What a function in the page returns, by way of JSON."""
        expression = f"Promise.resolve(({function})()).then((value) => JSON.stringify(value ?? null))"
        return json.loads((await self._evaluate(expression))["value"])

    async def _evaluate(self, expression: str) -> Any:
        target = {"context": self._context}
        done = await self._send("script.evaluate", expression=expression, target=target, awaitPromise=True)
        assert done["type"] == "success", done["exceptionDetails"]["text"]
        return done["result"]

    async def _element(self, selector: str) -> dict[str, Any]:
        found = await self._evaluate(f"document.querySelector({json.dumps(selector)})")
        assert found["type"] == "node", f"the page has no {selector}"
        return {"sharedId": found["sharedId"]}

    async def click(self, selector: str) -> None:
        await self._evaluate(f"document.querySelector({json.dumps(selector)})?.scrollIntoView({{ block: 'nearest' }})")
        origin = {"type": "element", "element": await self._element(selector)}
        steps = [{"type": "pointerMove", "x": 0, "y": 0, "origin": origin}, {"type": "pointerDown", "button": 0}]
        pointer = {"type": "pointer", "id": "mouse", "actions": [*steps, {"type": "pointerUp", "button": 0}]}
        await self._send("input.performActions", context=self._context, actions=[pointer])

    async def type(self, selector: str, words: str) -> None:
        """And presses Enter."""
        await self.click(selector)
        steps = [{"type": kind, "value": key} for key in (*words, ENTER) for kind in ("keyDown", "keyUp")]
        await self._send("input.performActions", context=self._context, actions=[{"type": "key", "id": "keys", "actions": steps}])

    async def give(self, selector: str, file: Path) -> None:
        """A file to a field for files."""
        await self._send("input.setFiles", context=self._context, element=await self._element(selector), files=[str(file)])

    async def shot(self, path: Path) -> None:
        image = await self._send("browsingContext.captureScreenshot", context=self._context)
        path.write_bytes(base64.b64decode(image["data"]))


class WebKit:
    """MiniBrowser of Debian's WebKitGTK, on an X server without a screen."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder, self._environment = folder, {**os.environ, **(environment or {})}

    async def __aenter__(self) -> WebKit:
        (ours, theirs), port = os.pipe(), _free_port()
        screen = ["Xvfb", "-displayfd", str(theirs), "-screen", "0", "1280x1000x24", "-nolisten", "tcp"]
        quiet = {"stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.DEVNULL}
        self._screen = await asyncio.create_subprocess_exec(*screen, pass_fds=[theirs], **quiet)
        os.close(theirs)
        with os.fdopen(ours) as told:
            display = (await asyncio.to_thread(told.readline)).strip()
        assert display, "Xvfb did not start"
        there = {"DISPLAY": f":{display}", "HOME": str(self._folder), "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1"}
        command = ["WebKitWebDriver", f"--port={port}"]
        self._driver = await asyncio.create_subprocess_exec(
            *command, env={**self._environment, **there, "LIBGL_ALWAYS_SOFTWARE": "1"}, start_new_session=True, **quiet
        )
        self._url = f"http://127.0.0.1:{port}/session"
        await _listening(port)
        browsers = sorted(Path("/usr/lib").glob("*/webkit*gtk-*/MiniBrowser"))  # by the version of its interface
        options = {"binary": str(browsers[-1]), "args": ["--automation"]}
        session = await self._send("POST", "", capabilities={"alwaysMatch": {"webkitgtk:browserOptions": options}})
        self._url += f"/{session['sessionId']}"
        return self

    async def __aexit__(self, *_: object) -> None:
        with suppress(AssertionError):
            await self._send("DELETE", "")
        os.killpg(self._driver.pid, signal.SIGKILL)
        self._screen.terminate()
        await asyncio.gather(self._driver.wait(), self._screen.wait())

    async def _send(self, method: str, path: str, **parameters: Any) -> Any:
        body = json.dumps(parameters).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self._url}{path}", body, {"Content-Type": "application/json"}, method=method)

        def answer() -> Any:
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    return json.load(response)["value"]
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{method} {path}: {error.read().decode()}") from error

        return await asyncio.to_thread(answer)

    async def open(self, url: str) -> None:
        await self._send("POST", "/url", url=url)

    async def evaluate(self, function: str) -> Any:
        """What a function in the page returns, by way of JSON."""
        script = (
            f"const told = arguments[0]; Promise.resolve(({function})()).then((value) => told(JSON.stringify(value ?? null)))"
        )
        return json.loads(await self._send("POST", "/execute/async", script=script, args=[]))

    async def _element(self, selector: str) -> str:
        return str((await self._send("POST", "/element", using="css selector", value=selector))[ELEMENT])

    async def click(self, selector: str) -> None:
        await self._send("POST", f"/element/{await self._element(selector)}/click")

    async def type(self, selector: str, words: str) -> None:
        """And presses Enter."""
        await self._send("POST", f"/element/{await self._element(selector)}/value", text=words + ENTER)

    async def give(self, selector: str, file: Path) -> None:
        """A file to a field for files."""
        await self._send("POST", f"/element/{await self._element(selector)}/value", text=str(file))

    async def shot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(await self._send("GET", "/screenshot")))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def _listening(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
