"""A real browser for tests: Debian's Chromium, headless, driven by Playwright's Python client."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page_fluidity import find_chromium

AXE = Path(__file__).parent / "vendored" / "axe.min.js"
# Addresses; anything else is a fault.
ALLOWED = ("file:", "data:", "about:", "blob:", "http://127.0.0.1")


class Browser:
    """Chromium. Pages of one width and colour scheme share what was loaded: scripts are read and
    compiled once for all of them."""

    def __init__(self, chromium: Any):
        self.chromium = chromium
        self.contexts: dict[tuple[int, str], Any] = {}

    def new_page(self, width: int, scheme: str) -> Any:
        """An empty tab."""
        if (width, scheme) not in self.contexts:
            self.contexts[width, scheme] = self.chromium.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
        return self.contexts[width, scheme].new_page()


@contextmanager
def start_browser() -> Iterator[Browser]:
    """A running browser; a test that has none is skipped with a sentence."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium on this machine; apt-get install chromium brings it")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield Browser(chromium)
        finally:
            chromium.close()


PATIENCE = 90  # seconds: other tests have the processor, too


class Tab:
    """A tab with one page; `faults` are errors on the console and addresses that it asked for."""

    def __init__(
        self, browser: Browser, place: Path | str, width: int = 1280, scheme: str = "light",
        ready: str = "html[data-ready]",
    ):  # fmt: skip
        """`place` is a file or an address, `ready` selects what is there once it can be used."""
        self.page = browser.new_page(width, scheme)
        self.faults: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._on_request)
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.goto(place.as_uri() if isinstance(place, Path) else place)
        self.page.wait_for_selector(ready)

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.faults.append(message.text)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(ALLOWED):
            self.faults.append(request.url)

    def pixels(self, side: int, rows: int, columns: int) -> list[list[int]]:
        """The colour at the middle of each patch of a picture, a quarter off its centre."""
        return self.page.evaluate(
            """([side, rows, columns]) => {
              const canvas = document.querySelectorAll("#panels canvas")[side];
              const [w, h] = [canvas.width / columns, canvas.height / rows];
              const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              return Array.from({ length: rows * columns }, (_, i) => {
                const x = Math.round((i % columns + 0.25) * w);
                const y = Math.round((Math.floor(i / columns) + 0.25) * h);
                const at = 4 * (y * canvas.width + x);
                return [...all.data.slice(at, at + 3)];
              });
            }""",
            [side, rows, columns],
        )

    def wait_for_text(self, selector: str, text: str) -> None:
        """Until the first element there reads `text`. A page's policy forbids `wait_for_function`,
        which evaluates a string in the page at each frame."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector).first).to_have_text(text)

    def violations(self) -> list[str]:
        """What axe-core finds of impact serious or critical."""
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        result = self.page.evaluate("async () => await axe.run(document)")
        return [
            f"{each['id']}: {node['html'][:120]} {node.get('failureSummary', '')[:200]}"
            for each in result["violations"]
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]

    def close(self) -> None:
        self.page.close()
