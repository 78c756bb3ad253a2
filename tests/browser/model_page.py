"""Functions that the tests of a model's page share: making, opening and calling it."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import export
from exporters import card
from exporters.html import create_tensors, find_block, restore_weights, to_json
from exporters.source import load_source
from model import LanguageModel
from utils.output import run_command

VIEWS = (
    *("next", "surprise", "training", "attention", "lens", "compare", "machine"),
    *("memorization", "card"),
)


def export_page(model: Path, out: Path, *flags: str) -> Path:
    """Export a model as a page, and return its path. Its card has a short sample."""
    runs = model.parent if model.parent.name == "runs" else out
    words = [str(model), "--format=html", f"--out={out}", f"--runs-dir={runs}", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "SAMPLE_TOKENS", 60)
        assert run_command(export.main, words) == 0
    (page,) = out.resolve().glob("*.html")
    return page


def round_model(bundle: Path, dtype: str = "fp16") -> LanguageModel:
    """Return the model of a bundle with the rounded weights of its page, without padding ids."""
    source = load_source(bundle)
    model = LanguageModel(source.config, source.tokenizer.num_tokens).eval()
    model.load_state_dict(restore_weights(create_tensors(source, dtype)))
    return model


def settle(page, milliseconds: int = 150) -> None:
    """Wait until the view on display has been computed."""
    page.wait_for_timeout(milliseconds)  # a typed text is computed a moment later
    page.locator("main:not([aria-busy])").wait_for()


def open_view(page, name: str) -> None:
    """Click the link to a view."""
    page.locator("nav a").nth(VIEWS.index(name)).click()
    settle(page, 30)


def compute_logits(page, ids: list[int]) -> np.ndarray:
    """Compute logits `(T, V)` in the page."""
    content = page.evaluate(
        "(ids) => app.call('logits', { ids }).then((all) => new Uint8Array(all.buffer).toBase64())",
        ids,
    )
    logits = np.frombuffer(base64.b64decode(content), dtype=np.float32)
    return logits.reshape(len(ids), -1)


@torch.no_grad()
def compute_log_probs(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Compute the log-probability of each id but the first, `(T - 1,)`, in bits."""
    log_probs = model(ids)[0][0, :-1].double().log_softmax(dim=-1) / np.log(2)
    return log_probs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def generate(page, prompt: list[int], count: int, seed: int = 0, **sampling: float) -> list[int]:
    """Generate tokens in the page; `sampling` has the names of its engine."""
    args = {"prompt": prompt, "count": count, "seed": seed, "sampling": sampling}
    return page.evaluate("(args) => app.call('generate', args).then(({ ids }) => ids)", args)


def read_data(page: Path) -> dict:
    """Return the JSON of a page."""
    return json.loads(find_block(page.read_bytes(), "folio-page"))


def write_data(page: Path, data: dict | str) -> bytes:
    """Return the page with other JSON: an object, or a text as it is."""
    content = page.read_bytes()
    text = data if isinstance(data, str) else to_json(data)
    return content.replace(find_block(content, "folio-page"), text.encode())


def get_bars(page) -> list[float]:
    """Return the probabilities that the bars of Next show, in percent; 0 if cut or below 0.1."""
    shares = page.locator(".bars .share").all_inner_texts()
    return [float(share.split()[0]) if share[0].isdigit() else 0.0 for share in shares]


def assert_works(page) -> None:
    """Assert that Next shows a distribution and Step appends to the text, without an error."""
    open_view(page, "next")
    text = page.locator("#text")
    before = text.input_value()
    assert abs(sum(get_bars(page)) - 100) < 2
    page.get_by_role("button", name="Step").click()
    settle(page)
    assert text.input_value().startswith(before)
    assert len(text.input_value()) == len(before) + 1
    assert page.get_by_role("alert").is_hidden()
    assert page.errors == []
