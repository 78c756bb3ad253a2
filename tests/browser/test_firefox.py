"""A model's page in Firefox, driven by puppeteer-core over WebDriver BiDi.

npm install --no-save --prefix .venv puppeteer-core@24
python -m pytest -m browser tests/browser/test_firefox.py

Skipped without Firefox, Node.js or puppeteer-core.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from model_page import VIEWS, round_model

from engine import SamplingParams
from generate import generate_tokens

pytestmark = pytest.mark.browser
FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
PLACE = Path(sys.prefix)
PROMPT, COUNT = [1, 2, 3], 100
SAMPLED = {"temperature": 1.1, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
OF_PAGE = {"top_k": "topK", "top_p": "topP", "min_p": "minP"}


@pytest.mark.skipif(FIREFOX is None or shutil.which("node") is None, reason="no Firefox or node")
@pytest.mark.skipif(not (PLACE / "node_modules/puppeteer-core").exists(), reason="no puppeteer")
def test_firefox_generates_the_same_texts_and_shows_every_view(trained, trained_page):
    model = round_model(trained / "artifacts" / "export")
    calls, expected = [], []
    for seed, sampling in ((0, {"temperature": 0.0}), (2**31 + 5, SAMPLED)):
        renamed = {OF_PAGE.get(name, name): value for name, value in sampling.items()}
        calls.append({"prompt": PROMPT, "count": COUNT, "seed": seed, "sampling": renamed})
        tokens = generate_tokens(model, PROMPT, COUNT, SamplingParams(**sampling), seeds=[seed])
        expected.append(tokens[0, len(PROMPT) :].tolist())
    script = Path(__file__).parent / "page" / "firefox.mjs"
    words = [PLACE, FIREFOX, trained_page.as_uri(), json.dumps(calls)]
    done = subprocess.run(
        ["node", script, *words], capture_output=True, text=True, check=True, timeout=120
    )
    found = json.loads(done.stdout)
    assert found["texts"] == expected
    assert len(found["titles"]) == len(set(found["titles"])) == len(VIEWS)
    assert found["hasWorker"]
    assert found["messages"] == []
