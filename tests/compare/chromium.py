"""A headless Chromium, driven by its DevTools protocol: what a page draws, says on its console, and does when used."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0")


class Tab:
    """One page. complaints: errors and warnings of its console, among them what its content policy refused."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.ids, self.complaints = socket, itertools.count(1), list[str]()
        self.requested: list[str] = []

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events that come before it are noted."""
        own = next(self.ids)
        await self.socket.send_json({"id": own, "method": method, "params": params})
        while (message := await self.socket.receive_json(timeout=240)).get("id") != own:
            self._note(message.get("method"), message.get("params", {}))
        assert "error" not in message, message
        return message["result"]

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif event == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    async def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """The value of an expression once it is true."""
        for _ in range(2400):
            if value := await self.ask(expression):
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"never true: {expression}")

    async def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])
        await self.send("Page.navigate", url=page.resolve().as_uri())
        await self.until("document.readyState === 'complete'")

    async def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        for at in (x - 1, x):
            await self.send("Input.dispatchMouseEvent", type="mouseMoved", x=at, y=y)

    async def press(self, key: str, text: str = "") -> None:
        code = {"Tab": 9, " ": 32, "ArrowDown": 40, "Enter": 13}[key]
        more = {"text": text} if text else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **more)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        shot = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


def drive(profile: Path, use: Callable[[Tab], Awaitable[None]]) -> None:
    """Start Chromium with an empty profile, hand its tab to `use`, and end it."""

    async def session() -> None:
        port = profile / "DevToolsActivePort"
        for _ in range(2400):
            if port.exists() and port.read_text().count("\n"):
                break
            await asyncio.sleep(0.1)
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
                tabs = await answer.json()
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with http.ws_connect(address, max_msg_size=0) as socket:
                await use(Tab(socket))

    command = [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asyncio.run(session())
    finally:
        browser.terminate()
        browser.wait(timeout=120)
        time.sleep(0.2)
