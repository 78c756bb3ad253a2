"""An HTML export in a browser: the same numbers and the same texts as in PyTorch.

python -m pytest -m browser tests/browser/test_model_page.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LINES, save_random_model
from model_page import (
    VIEWS,
    compute_logits,
    export_page,
    generate,
    open_view,
    round_model,
    settle,
)

from bundle import read_bundle, write_bundle
from engine import SamplingParams
from exporters.html import count_numbers
from exporters.source import load_source
from generate import generate_tokens
from tokenizer import create_tokenizer

pytestmark = pytest.mark.browser

# Each architecture in each dtype, with each tokenizer and each activation. No head size is a
# multiple of 4, the width of the kernels.
MODERN = {"architecture": "modern", "n_embd": 20, "n_head": 2, "n_layer": 2, "block_size": 16}
GPT2 = {"architecture": "gpt2", "n_embd": 21, "n_head": 3, "n_layer": 2, "block_size": 16}
SPEEDRUN = {**MODERN, "architecture": "speedrun", "ngram_rows": 300}
BIASED = {**GPT2, "bias": True, "n_embd": 15}
UNBIASED = {**GPT2, "bias": False}
CASES = [
    ("fp32", "char", {**MODERN, "activation": "silu", "tie_weights": True}),
    ("fp16", "bpe", {**MODERN, "activation": "gelu", "tie_weights": False}),
    ("int8", "gpt2", {**MODERN, "activation": "gelu_tanh", "tie_weights": False, "block_size": 6}),
    ("fp32", "bpe", {**BIASED, "activation": "gelu_tanh", "tie_weights": False}),
    ("fp16", "gpt2", {**BIASED, "activation": "silu", "tie_weights": True, "block_size": 6}),
    ("int8", "char", {**BIASED, "activation": "gelu", "tie_weights": True}),
    ("fp32", "gpt2", {**UNBIASED, "activation": "gelu", "tie_weights": True, "block_size": 6}),
    ("fp16", "char", {**UNBIASED, "activation": "gelu_tanh", "tie_weights": False}),
    ("int8", "bpe", {**UNBIASED, "activation": "silu", "tie_weights": False}),
    ("fp32", "char", {**SPEEDRUN, "activation": "silu", "tie_weights": False}),
    ("fp16", "bpe", {**SPEEDRUN, "activation": "gelu", "tie_weights": True}),
    ("int8", "gpt2", {**SPEEDRUN, "activation": "silu", "ngram_rows": 16384, "block_size": 6}),
    # More than 2 million parameters: float16 in memory, too.
    ("fp16", "char", {**MODERN, "n_embd": 240, "n_head": 4, "n_layer": 3, "activation": "silu"}),
    ("fp16", "char", {**SPEEDRUN, "n_embd": 240, "n_head": 4, "n_layer": 3}),
]


def save_model(kind: str, **settings) -> Path:
    """Save a random model with a tokenizer of that kind."""
    tokenizer = create_tokenizer(LINES * 3, kind, 300 if kind == "bpe" else None)
    save_random_model(Path("model"), tokenizer, **settings)
    return Path("model")


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "kind", "settings"), CASES)
def test_logits_are_those_of_pytorch(open_page, gpt2_vocabulary, dtype, kind, settings):
    bundle = save_model(kind, **settings)
    page = open_page(export_page(bundle, Path("out"), f"--dtype={dtype}").as_uri())
    model = round_model(bundle, dtype)
    random = np.random.default_rng(0)
    lengths = [1, model.block_size, *random.integers(1, model.block_size + 1, size=18)]
    differences = []
    for length in lengths:
        ids = random.integers(0, model.num_tokens, size=length).tolist()
        expected = model(ids)[0][0].numpy()
        assert expected.std() > 0.5  # so that the bound below means something
        differences.append(np.abs(compute_logits(page, ids) - expected).max())
    print(f"largest difference: {max(differences):.1e}")
    assert max(differences) <= 1e-4
    count = page.evaluate("countNumbers(app.model.config, app.model.num_tokens)")
    bound = count_numbers(load_source(bundle))
    assert count <= bound if kind == "gpt2" else count == bound  # gpt2 has padding rows
    assert page.errors == page.warnings == []


SETTINGS = [
    (0, {"temperature": 0}),
    (1337, {"temperature": 0.8}),
    (1, {"temperature": 1, "top_k": 5}),
    (2, {"temperature": 1.3, "top_p": 0.9}),
    (3, {"temperature": 1, "min_p": 0.05}),
    (2**31 + 5, {"temperature": 1.1, "top_k": 20, "top_p": 0.95, "min_p": 0.01}),
]
PAGE_NAMES = {"temperature": "temperature", "top_k": "topK", "top_p": "topP", "min_p": "minP"}


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("architecture", ["modern", "gpt2", "speedrun"])
def test_texts_are_those_of_pytorch_across_many_windows(open_page, architecture, kind):
    shape = {"architecture": architecture, "n_embd": 24, "n_head": 2, "n_layer": 2}
    bundle = save_model(kind, **shape, block_size=32)
    model = round_model(bundle)
    page = open_page(export_page(bundle, Path("out")).as_uri())
    tokens = set()
    for length, (seed, sampling) in zip((1, 32, 75) * 2, SETTINGS, strict=True):
        prompt = (np.arange(length) % model.num_tokens).tolist()
        params = SamplingParams(**sampling)
        expected = generate_tokens(model, prompt, 300, params, seeds=[seed])[0, length:].tolist()
        given = {PAGE_NAMES[name]: value for name, value in sampling.items()}
        assert generate(page, prompt, 300, seed, **given) == expected
        tokens.update(expected)
    assert len(tokens) > 20  # texts that can differ


def test_the_run_button_writes_the_text_of_the_command_line(open_page, folio):
    bundle = save_model("char", n_embd=24, n_head=2, n_layer=2, block_size=32)
    page = open_page(export_page(bundle, Path("out")).as_uri())
    model, saved = round_model(bundle), read_bundle(bundle)
    write_bundle(replace(saved, path=Path("rounded")), save_weights=model.save_safetensors)
    values = {"Temperature": 1.25, "Top-k": 12, "Top-p": 0.9, "Min-p": 0.02}
    for name, value in values.items():
        page.get_by_label(name).fill(str(value))
    for name, value in {"Seed": 2**31 + 7, "Length": 200}.items():
        page.get_by_label(name).fill(str(value))
        page.keyboard.press("Tab")
    page.locator("#text").fill("To be, ")
    settle(page)
    page.get_by_role("button", name="Run").click()
    page.locator("button:enabled", has_text="Run").wait_for()
    settle(page)
    sampling = [f"--{name.lower()}={value}" for name, value in values.items()]
    words = ["--prompt=To be, ", "--max-new-tokens=200", f"--seed={2**31 + 7}", "--json"]
    done = folio("inference.py", "rounded", *words, *sampling, "--engine=torch")
    text = page.locator("#text").input_value()
    assert text == json.loads(done.stdout)["text"]
    assert len(text) == 207


def test_no_view_sends_a_request_or_logs_an_error(trained_page, open_page):
    page = open_page(trained_page.as_uri())
    settle(page)
    for name in VIEWS:
        open_view(page, name)
        assert page.get_by_role("alert").is_hidden()
    open_view(page, "next")
    page.get_by_label("Temperature").fill("0.5")
    settle(page)
    assert page.errors == page.warnings == []
    assert {address.partition(":")[0] for address in page.calls} <= {"file", "blob", "data"}
    assert page.calls.count(trained_page.as_uri()) == 1


FORBIDDEN = {
    "connect-src": "fetch('https://example.com').catch(() => {})",
    "img-src": "new Image().src = 'https://example.com/a.png'",
    "script-src-elem": "document.body.append(Object.assign(document.createElement('script'), "
    "{ textContent: 'window.hasRun = true' }))",
    "worker-src": "new Worker('data:text/javascript,1')",
    "form-action": "document.body.append(Object.assign(document.createElement('form'), "
    "{ action: 'https://example.com' })); document.body.lastChild.submit()",
}


@pytest.mark.parametrize("directive", FORBIDDEN)
def test_the_policy_of_the_page_forbids_requests(trained_page, open_page, directive):
    page = open_page(trained_page.as_uri())
    violated = page.evaluate(
        f"""() => new Promise((resolve) => {{
            setTimeout(resolve, 5000, "nothing");
            document.onsecuritypolicyviolation = (event) => resolve(event.violatedDirective);
            {FORBIDDEN[directive]};
        }})"""
    )
    assert violated == directive
    assert not page.evaluate("window.hasRun")
