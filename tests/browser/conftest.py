"""Fixtures of the browser tests: Chromium, its pages, and a model's page.

python -m pytest -m browser tests/browser
FOLIO_SCREENSHOTS=/tmp/shots python -m pytest -m browser tests/browser    # save screenshots

Needs the extra `browser` and a Chromium (`apt-get install chromium`, or FOLIO_CHROMIUM=path).
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import LINES
from model_page import export_page

from exporters.browser import QUIET, find_chromium
from parameters import ModelConfig
from trainer import train
from utils.output import Output

playwright = pytest.importorskip("playwright.sync_api")

MILLISECONDS = 60_000  # how long a page may take to show something


@pytest.fixture(scope="session")
def browser() -> Iterator["playwright.Browser"]:
    path = find_chromium()
    assert path, "no Chromium: apt-get install chromium, or set FOLIO_CHROMIUM"
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def picture() -> Callable[["playwright.Page", str], None]:
    """Save a screenshot of a page if FOLIO_SCREENSHOTS is set."""

    def take(page: "playwright.Page", name: str) -> None:
        if directory := os.environ.get("FOLIO_SCREENSHOTS"):
            Path(directory).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)

    return take


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., "playwright.Page"]]:
    """Open an address. The page's `errors` are its scripts', `calls` its requests.

    `warnings` are the errors and warnings of its console. `script` runs before the page's own.
    """
    contexts = []

    def open_it(address: str, width: int = 1280, script: str = "", **options) -> "playwright.Page":
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.set_default_timeout(MILLISECONDS)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.errors, page.calls, page.warnings = [], [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: page.calls.append(request.url))

        def log(message: "playwright.ConsoleMessage") -> None:
            if message.type in ("error", "warning"):
                page.warnings.append(message.text)

        page.on("console", log)
        page.goto(address)
        return page

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The directory of a run of 120 steps, all of whose evaluated steps are kept."""
    place = tmp_path_factory.mktemp("trained")
    text = place / "play.txt"
    text.write_text(LINES * 30, encoding="utf-8")
    config = ModelConfig(
        data=str(text),
        runs_dir=str(place / "runs"),
        n_embd=32,
        n_head=2,
        n_layer=2,
        block_size=32,
        batch_size=8,
        max_iters=120,
        warmup_iters=10,
        eval_interval=20,
        eval_iters=2,
        keep_every=40,
        sample_interval=0,
        device="cpu",
        precision="fp32",
    )
    return train(config, output=Output(quiet=True)).run_dir


@pytest.fixture(scope="session")
def trained_page(trained) -> Path:
    """A page of that run with three of its steps."""
    return export_page(trained, trained.parent.parent / "page", "--checkpoints=3")


@pytest.fixture(scope="session")
def plain_page(trained) -> Path:
    """A page of that run's best step alone."""
    return export_page(trained, trained.parent.parent / "plain")
