"""Size and speed of a model's HTML page, in headless Chromium on one core.

    python -m benchmarks.page runs/20260131_235959_baseline

The second model has 10.6 million parameters after one step of training: nanoGPT's shape.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

import export
from benchmarks import get_commit
from exporters import html
from exporters.browser import QUIET, find_chromium
from inference import InferenceConfig, find_model
from parameters import ModelConfig
from trainer import train
from utils.device import get_processor_name
from utils.output import Output, run_command

ROUNDS = 5
NANOGPT = {"n_layer": 6, "n_head": 6, "n_embd": 384}
# Calls the page's engine as its view Next does: from the default prompt, at temperature 0.8.
GENERATE = """(count) => app.call("generate", {
    prompt: app.model.tokenizer.encode(app.model.default_prompt),
    count, seed: 1337, sampling: { temperature: 0.8 },
}).then(({ ids, seconds }) => ids.length / seconds)"""
# Milliseconds since the navigation began until the first bar is there.
WATCH = """new MutationObserver(() => {
    if (!window.firstBar && document.querySelector(".bars li")) window.firstBar = performance.now();
}).observe(document, { childList: true, subtree: true })"""
WAIT = """new Promise((resolve) => {
    const look = () => (window.firstBar ? resolve(window.firstBar) : setTimeout(look, 10));
    look();
})"""


def measure_page(chromium: Browser, page: Path, count: int) -> None:
    """Print size, time to the first probabilities, and tokens a second of one page."""
    first, rates = [], []
    for _ in range(ROUNDS):
        opened = chromium.new_page()
        opened.add_init_script(WATCH)
        opened.goto(page.resolve().as_uri())
        first.append(opened.evaluate(WAIT) / 1000)
        opened.evaluate(GENERATE, count)  # the compilers of JavaScript and WebAssembly warm up
        rates.append(opened.evaluate(GENERATE, count))
        opened.close()
    rates.sort()
    print(
        f"{page.stem}: {page.stat().st_size:,} bytes; first probabilities after "
        f"{statistics.median(first):.2f} s ({min(first):.2f} to {max(first):.2f}); "
        f"{statistics.median(rates):,.0f} characters/s ({rates[0]:,.0f} to {rates[-1]:,.0f})",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("model", help="a run, a bundle or a named model")
    bundle = find_model(InferenceConfig(), [parser.parse_args(argv).model]).path
    print(f"{get_processor_name()}, {date.today()}, commit {get_commit()}")
    print(f"the page without data: {len(html.render_page('', []).encode('utf-8')):,} bytes")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        settings = {"max_iters": 1, "eval_iters": 1, "runs_dir": f"{place}/runs"}
        large = train(ModelConfig(**NANOGPT, **settings), output=Output(quiet=True)).run_dir
        for model, name in ((bundle, "model"), (large, "nanogpt")):
            out = f"{place}/{name}-html"
            words = [str(model), "--format=html", f"--out={out}", "--checkpoints=1"]
            assert run_command(export.main, words) == 0
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # inherited by the browser
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=QUIET)
        print(f"Chromium {chromium.version}")
        for name, count in (("model", 8000), ("nanogpt", 500)):
            measure_page(chromium, next(Path(f"{place}/{name}-html").glob("*.html")), count)
        chromium.close()


if __name__ == "__main__":
    main()
