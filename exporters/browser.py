"""A page in Chromium: an HTML export, as its reader opens it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A Chromium of a container, that does not call the network at its start.
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--no-first-run", "--disable-quic"),
)
TIMEOUT = 60_000  # milliseconds in which a page must be ready


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None: `FOLIO_CHROMIUM`, or one that is installed."""
    chosen = os.environ.get("FOLIO_CHROMIUM")
    return next(filter(None, map(shutil.which, [chosen] if chosen else NAMES)), None)


class BrowserModel:
    """The model of a page: see `exporters.verify.TargetModel`."""

    def __init__(self, page: Path):
        from playwright.sync_api import sync_playwright  # late: an optional dependency

        self._playwright = sync_playwright().start()
        try:
            chromium = self._playwright.chromium
            self._browser = chromium.launch(executable_path=find_chromium(), args=QUIET)
            self.library = f"Chromium {self._browser.version}"
            self._page = self._browser.new_page()
            self._page.set_default_timeout(TIMEOUT)
            self._page.goto(page.resolve().as_uri())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the browser."""
        self._playwright.stop()  # with all that it started

    def compute_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits `(T, V)` of a text, `(T,)`."""
        logits = self._call("logits", {"ids": ids.tolist()}, "Array.from(result)")
        return np.array(logits, dtype=np.float32).reshape(len(ids), -1)

    def generate(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Return the n most likely tokens that follow `ids`, one after another, `(n,)`."""
        settings = {"count": n, "seed": 0, "sampling": {"temperature": 0}}
        return np.array(self._call("generate", {"prompt": ids.tolist(), **settings}, "result.ids"))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._page.evaluate(
            "(text) => Array.from(app.models[0].tokenizer.encode(text))", text
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""
        return self._page.evaluate("(ids) => app.models[0].tokenizer.decode(ids)", list(ids))

    def _call(self, name: str, values: dict[str, Any], result: str) -> Any:
        """Run a command of the page's engine, and return a part of its result."""
        words = f"([name, values]) => app.call(name, values).then((result) => {result})"
        return self._page.evaluate(words, [name, {"model": 0, **values}])
