"""The page for people in a browser: what it shows of the server, and a text that comes while one looks on."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from running import Running, running
from tailorbird.serve.interface import ENGINE

pytestmark = pytest.mark.full

BROWSER = next(
    (path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
#: What the driver calls a found element's identifier (https://www.w3.org/TR/webdriver2/#elements).
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
PROMPT, TOKENS = "def add(a, b):", 60
#: Scripts: how long what is written is after each change of it; the last note; the text with its prompt.
WATCHING = """
window.lengths = [];
new MutationObserver(() => {
  const written = document.querySelector("#log .written");
  if (written) window.lengths.push(written.textContent.length);
}).observe(document.getElementById("log"), {subtree: true, childList: true, characterData: true});
"""
LAST_NOTE = "return [...document.querySelectorAll('#log .note')].at(-1).textContent"
TEXT = "return document.querySelector('#log .message.text').textContent"

needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on the PATH")
needs_driver = pytest.mark.skipif(DRIVER is None, reason="there is no ChromeDriver on the PATH")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("adapters"), engine=ENGINE, keys=()) as server:
        server.read_on()
        yield server


@dataclass
class Tab:
    """A page that is driven by WebDriver (https://www.w3.org/TR/webdriver2/)."""

    session: str

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.session + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def element(self, selector: str) -> str:
        found = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        return f"/element/{found[ELEMENT]}"

    def write(self, selector: str, text: str) -> None:
        self.ask("POST", self.element(selector) + "/clear", {})
        self.ask("POST", self.element(selector) + "/value", {"text": text})

    def click(self, selector: str) -> None:
        self.ask("POST", self.element(selector) + "/click", {})

    def run(self, script: str) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, is_there: Callable[[Any], bool] = bool) -> Any:
        """What a script returns, once it is what is waited for."""
        for _ in range(300):
            found = self.run(script)
            if is_there(found):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{script} is still {found!r}")


@contextlib.contextmanager
def tab(url: str, profile: Path) -> Iterator[Tab]:
    driver = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
        root = Tab(f"http://127.0.0.1:{port}")
        options = {"binary": BROWSER, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        made = Tab(f"{root.session}/session/{root.ask('POST', '/session', wanted)['sessionId']}")
        try:
            made.ask("POST", "/url", {"url": url})
            yield made
        finally:
            made.ask("DELETE", "")
    finally:
        driver.kill()
        driver.wait()


def shown(dom: str, id: str) -> str:
    """Text of the element with this id."""
    found = re.search(rf'<(\w+)[^>]*\bid="{id}"[^>]*>(.*?)</\1>', dom, re.DOTALL)
    assert found is not None, id
    return unescape(re.sub(r"<[^>]*>", " ", found[2])).strip()


@needs_browser
def test_models_and_live_figures_are_shown(server: Running, tmp_path: Path) -> None:
    flags = [*FLAGS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *flags, f"{server.url}/"], capture_output=True, text=True, timeout=120, check=True
    )
    dom = done.stdout
    assert shown(dom, "state").startswith("ready, fused")
    assert shown(dom, "model") == "demo"
    assert shown(dom, "batch") == "0, 0"
    assert re.fullmatch(r"\d+ %", shown(dom, "pages"))
    assert re.fullmatch(r"\d+ MiB|[\d.]+ GiB", shown(dom, "memory"))
    assert shown(dom, "rate") == "0.0"
    assert shown(dom, "context") == "512 tokens"


@needs_browser
@needs_driver
def test_a_text_is_written_while_one_looks_on(server: Running, tmp_path: Path) -> None:
    with tab(f"{server.url}/", tmp_path) as page:
        page.wait("return document.getElementById('model').value", lambda found: found == "demo")
        page.run(WATCHING)
        page.write("#tokens", str(TOKENS))
        page.write("#temperature", "0")
        page.write("#text", PROMPT)
        page.click("#send")
        page.wait(LAST_NOTE, lambda found: re.match(r"\d+ tokens, ", found))
        lengths = page.run("return window.lengths")
        assert lengths == sorted(lengths)
        assert len(set(lengths)) > 5  # it came in pieces
        assert page.run(TEXT).startswith(PROMPT)
        assert page.run("return document.querySelectorAll('#log .error').length") == 0
        assert page.run("return document.getElementById('send').textContent") == "Send"
        page.click("#clear")
        assert page.run("return document.getElementById('log').children.length") == 0
