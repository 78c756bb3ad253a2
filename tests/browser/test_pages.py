"""The report, its picture, TensorBoard and Aim in a real browser.

python -m pytest -m browser tests/browser/test_pages.py
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from callbacks import TrainResult
from parameters import ModelConfig
from report import write_comparison, write_picture
from trainer import train
from utils.output import Output
from utils.report.runs import LoggedRun
from utils.run_manager import RunDirectory

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture
def run(text_file) -> TrainResult:
    """A run of 120 steps, logged to Aim too."""
    config = ModelConfig(
        data=str(text_file),
        run_tag="seen",
        n_embd=32,
        n_head=2,
        n_layer=2,
        block_size=32,
        batch_size=8,
        max_iters=120,
        warmup_iters=10,
        eval_interval=20,
        eval_iters=2,
        sample_interval=40,
        histogram_interval=40,
        aim_logging=True,
        device="cpu",
    )
    return train(config, output=Output(quiet=True))


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a server of this Python's environment on loopback and return its address."""
    servers = []

    def start(program: str, *words: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(Path(sys.executable).parent / program), *words]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        log = open(f"{program}.log", "w+", encoding="utf-8")
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        servers.append((server, log))
        return f"http://127.0.0.1:{port}"

    yield start
    for server, log in servers:
        os.killpg(server.pid, 9)  # with its workers
        server.wait()
        log.close()


def visit(open_page, address: str) -> "playwright.Page":
    """Open a page of a server, waiting until it listens."""
    for _ in range(120):
        try:
            return open_page(address)
        except playwright.Error as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            time.sleep(0.5)
    raise AssertionError(f"{address}: no answer")


def test_the_report_shows_its_curves_in_light_and_dark(run, open_page, picture):
    address = RunDirectory(run.run_dir).report.resolve().as_uri()
    backgrounds = []
    for scheme in ("light", "dark"):
        page = open_page(address, color_scheme=scheme)
        charts = page.locator("svg.chart:visible")
        assert charts.count() == 4
        length = page.evaluate("document.querySelector('polyline').getTotalLength()")
        assert length > 300  # pixels of a curve
        assert page.get_by_role("heading", name=run.run_dir.name).is_visible()
        assert page.get_by_text(f"{run.best_val_loss:.4f}").first.is_visible()
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        wide = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert wide, "the page scrolls sideways"
        picture(page, f"report_{scheme}")
        charts.first.hover()
        tip = page.locator(".tip:visible")
        assert re.search(
            r"step \d+.*each step [\d.]+.*val loss [\d.]+", tip.inner_text(), re.DOTALL
        )
        assert page.errors == []
        assert page.calls == [address]
    assert backgrounds[0] != backgrounds[1]


def test_the_pages_fit_a_phone_without_a_chart_that_scrolls(run, open_page, picture):
    compared = Path("comparison.html")
    write_comparison(compared, [LoggedRun(run.run_dir)] * 6)
    for path, charts in ((RunDirectory(run.run_dir).report, 4), (compared, 3)):
        page = open_page(path.resolve().as_uri(), screen={"width": 390, "height": 800})
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator("svg.chart:visible").count() == charts
        outside = page.evaluate(
            """() => [...document.querySelectorAll("svg.chart, svg.chart text")].filter((each) => {
                const box = each.getBoundingClientRect();
                return box.left < 0 || box.right > window.innerWidth;
            }).map((each) => each.textContent)"""
        )
        assert outside == []
        picture(page, f"{path.stem}_phone")


def test_the_picture_has_curves_and_text_inside_it_in_light_and_dark(run, open_page):
    target = Path("run.svg")
    write_picture(target, LoggedRun(run.run_dir))
    fills = []
    for scheme in ("light", "dark"):
        page = open_page(target.resolve().as_uri(), color_scheme=scheme)
        assert page.locator("polyline").count() == 3
        fills.append(page.evaluate("getComputedStyle(document.querySelector('rect')).fill"))
        outside = page.evaluate(
            """() => {
                const edge = document.querySelector("rect").getBoundingClientRect();
                return [...document.querySelectorAll("text, polyline")].filter((each) => {
                    const box = each.getBoundingClientRect();
                    return box.left < edge.left || box.right > edge.right
                        || box.top < edge.top || box.bottom > edge.bottom;
                }).map((each) => each.textContent || each.tagName);
            }"""
        )
        assert outside == []
        assert len(page.calls) == 1
    assert fills[0] != fills[1]


def test_a_comparison_shows_a_curve_for_each_run(run, text_file, open_page, picture):
    other = ModelConfig(**{**read_config(run), "n_embd": 16, "run_tag": "narrow"})
    other = train(other, output=Output(quiet=True))
    target = Path("comparison.html")
    write_comparison(target, [LoggedRun(run.run_dir), LoggedRun(other.run_dir)])
    page = open_page(target.resolve().as_uri())
    first = page.locator("svg.chart:visible").first
    assert first.locator("polyline").count() == 2
    colors = {
        first.locator("polyline").nth(index).evaluate("line => getComputedStyle(line).stroke")
        for index in (0, 1)
    }
    assert len(colors) == 2
    assert page.errors == []
    picture(page, "comparison")


def read_config(result: TrainResult) -> dict:
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_bytes())
    return {**record["config"], "aim_logging": False}


def test_tensorboard_shows_the_loss_curves_of_the_run(run, open_page, serve, picture):
    address = serve("tensorboard", "--logdir", "runs")
    page = visit(open_page, f"{address}/?tagFilter=loss#timeseries")
    for tag in ("eval/train_loss", "eval/val_loss", "loss/train"):
        card = page.locator("card-view", has=page.get_by_text(tag, exact=True))
        card.scroll_into_view_if_needed()
        line = card.locator("line-chart svg path").first
        line.wait_for(state="attached")
        assert line.evaluate("path => path.getTotalLength()") > 30  # pixels of a curve
    names = page.locator("runs-data-table tb-data-table-content-row")
    assert names.count() == 1, "one run of Folio is one run of TensorBoard"
    picture(page, "tensorboard")


def test_tensorboard_shows_train_and_val_loss_in_one_chart_and_the_settings(
    run, open_page, serve, picture
):
    address = serve("tensorboard", "--logdir", "runs")
    page = visit(open_page, f"{address}/#custom_scalars")
    page.get_by_text("train and val, evaluated").wait_for()
    picture(page, "tensorboard_custom")
    page = open_page(f"{address}/#hparams")
    page.get_by_text("n_embd").first.wait_for()
    page.get_by_text(re.compile("^seen ")).first.wait_for()  # its tag
    picture(page, "tensorboard_hparams")
    page = open_page(f"{address}/#text")
    names = page.locator(".heading .name")
    names.first.wait_for()
    assert names.first.inner_text().startswith("sample")  # of training, or of the exported model
    picture(page, "tensorboard_text")


def test_aim_lists_the_run_with_its_parameters(run, open_page, serve, picture):
    address = serve("aim", "up", "--repo", ".")
    page = visit(open_page, f"{address}/runs")
    name = page.get_by_text(run.run_dir.name).first
    name.wait_for()
    picture(page, "aim_runs")
    name.click()
    # Aim draws only the lines that fit; a taller window has room for every setting.
    page.set_viewport_size({"width": 1280, "height": 2000})
    page.get_by_text("Run Params").first.click()
    page.get_by_text("n_embd").first.wait_for()
    picture(page, "aim_params")
