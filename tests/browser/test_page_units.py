"""The page's JavaScript, module by module, under node: numbers and ids that Python computed.

python -m pytest -m browser tests/browser/test_page_units.py

The tests are in page/*.test.mjs. Needs node (`apt-get install nodejs`).
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINES
from torch import Tensor

from decode_torch import filter_logits, sample_token
from engine import SamplingParams
from exporters.ngrams import LENGTH, create_memorization, hash_stretches
from exporters.page_data import ARCHITECTURE, describe_tokenizer
from generate import iter_uniforms
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import create_tokenizer

pytestmark = pytest.mark.browser

EXPECTED = 112  # tests
TESTS = sorted((Path(__file__).parent / "page").glob("*.test.mjs"))
MODELS = {
    "modern": {"activation": "silu", "n_embd": 12, "n_head": 2},  # D = 6
    "modern, D = 16": {"activation": "gelu", "n_embd": 16, "n_head": 1},
    "gpt2": {"activation": "gelu_tanh", "n_embd": 15, "n_head": 3, "bias": True},  # D = 5
    "speedrun": {"activation": "silu", "n_embd": 12, "n_head": 2, "ngram_rows": 101},
    "gpt2, no biases": {"activation": "gelu", "n_embd": 14, "n_head": 2, "bias": False},
}
TEXTS = [
    "To be, or not to be: that's the question, isn't it? We'll see, they've said I'D go.",
    "  two  spaces\n\n\nthree line ends \t a tab\r\n and a space at the end ",
    "naïve café Straße ÀÉÎ Ελληνικά Русский עברית العربية हिन्दी ไทย",
    "日本語の文章と中文，한국어",
    "e\u0301\u0308 n\u0303 combining",
    "👨‍👩‍👧 👍🏽 🇫🇷 x😀y",
    "1,234.5 ½ ² ٣٤ Ⅷ 10²",
    "\u00a0no-break\u2003em\u3000wide\u2028line\u2029paragraph\u0085next\u200bzero\ufeffmark",
    "under_score --- ... !!!??? <script> & </script> <!-- \\ \"quoted\" 'single' 's 't'",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f control",
    "𝕳𝖊𝖑𝖑𝖔 𐍈 \U0010ffff \ue000 \u0378",
    "'S 'LL 'ſ 'K ſs",
    "",
    " ",
    "\n",
    "a",
]


def flatten(tensor: Tensor) -> list[float]:
    return tensor.detach().float().flatten().tolist()


@torch.no_grad()
def describe_model(name: str) -> dict[str, Any]:
    """Return a random model, and what its parts make of random inputs."""
    torch.manual_seed(1)
    T, V = 9, 11
    architecture = name.partition(",")[0]
    config = ModelConfig(architecture=architecture, n_layer=1, block_size=T, **MODELS[name])
    model = LanguageModel(config, V).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.4)
    C, D = config.n_embd, config.n_embd // config.n_head
    (block,) = model.blocks
    x, qk = torch.randn(1, T, C), torch.randn(2, 1, 1, T, D)
    ids = torch.randint(V, (T,))
    values = {
        "x": x,
        "norm": model.final_norm(3 * x + 1),
        "attention": block.attention(x, slice(0, T)),
        "mlp": block.mlp(x),
        "block": block(x, slice(0, T)),
        "logits": model(ids)[0],
        "qk": qk,
        "rotated": block.attention.queries_and_keys(qk, slice(0, T)),
    }
    hidden = block.mlp.projection.in_features
    return {
        "config": {**config.model_dump(include=ARCHITECTURE), "hidden": hidden},
        "V": V,
        "ids": ids.tolist(),
        "tensors": {name: flatten(each) for name, each in model.state_dict().items()},
        **{name: flatten(each) for name, each in values.items()},
    }


def list_activations() -> dict[str, list[float]]:
    """Return inputs, and the activations of them in float64."""
    x = torch.cat((torch.linspace(-12, 12, 4801), torch.tensor([-90.0, 90.0, 1e-20, 0.0]))).double()
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    return {"x": x.tolist(), **{name: each(x).tolist() for name, each in functions.items()}}


def list_products() -> list[dict[str, Any]]:
    """Return vectors and rows of all lengths and some strides, with their products."""
    random = np.random.default_rng(0)
    cases = []
    for K in range(1, 41):
        for count in (1, 1 + K % 9, 9):
            row_stride, y_stride = K + (K * count) % 4, 1 + count % 3
            x = random.standard_normal(K, dtype=np.float32)
            rows = random.standard_normal((count, row_stride), dtype=np.float32)
            case = {"x": x, "rows": rows.ravel(), "y": rows[:, :K].astype(float) @ x.astype(float)}
            strides = {"count": count, "rowStride": row_stride, "yStride": y_stride}
            cases.append({**{name: each.tolist() for name, each in case.items()}, **strides})
    return cases


def list_samples() -> list[dict[str, Any]]:
    """Return logits, settings, and what PyTorch's sampling makes of them; -inf is None."""
    torch.manual_seed(2)
    rows = [torch.randn(1, V) * scale for V in (1, 2, 65, 1000) for scale in (0.1, 3, 30)]
    rows += [torch.zeros(1, 8), torch.tensor([[1.0, 5, 5, 2, 5, -3]]), torch.arange(6.0)[None]]
    settings = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1e-45),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=2.5, top_k=1),
        SamplingParams(temperature=1, top_k=3),
        SamplingParams(temperature=1.2, top_k=70, top_p=0.9),
        SamplingParams(temperature=1, top_p=0.5),
        SamplingParams(temperature=1, top_p=1e-9),
        SamplingParams(temperature=0.9, min_p=0.1),
        SamplingParams(temperature=1.1, top_k=40, top_p=0.95, min_p=0.02),
    ]
    draws = [0.0, 1 - 2**-24, *np.random.default_rng(3).random(30, dtype=np.float32).tolist()]
    cases = []
    for logits in rows:
        for sampling in settings:
            tokens = [sample_token(logits, torch.tensor([draw]), sampling)[0] for draw in draws]
            kept = [value if np.isfinite(value) else None for value in filter_all(logits, sampling)]
            cases.append(
                {
                    "logits": logits[0].tolist(),
                    "sampling": {
                        "temperature": sampling.temperature,
                        "topK": sampling.top_k or 0,
                        "topP": sampling.top_p,
                        "minP": sampling.min_p,
                    },
                    "kept": kept,
                    "draws": draws,
                    "tokens": [int(token) for token in tokens],
                }
            )
    return cases


def filter_all(logits: Tensor, sampling: SamplingParams) -> list[float]:
    if sampling.temperature == 0:
        return [0.0 if id == logits.argmax() else -np.inf for id in range(logits.size(-1))]
    return filter_logits(logits, sampling)[0].tolist()


def list_draws() -> dict[int, list[float]]:
    """Return 1,300 random numbers, three blocks of the generator, for each seed."""
    seeds = (0, 1, 1337, 2**31 - 1, 2**31, 2**32 - 1)
    return {seed: [float(next(each)[0]) for _ in range(1300)] for seed, each in iter_seeds(seeds)}


def iter_seeds(seeds):
    return ((seed, iter_uniforms([seed])) for seed in seeds)


def describe_texts() -> list[dict[str, Any]]:
    """Return tokenizers and the ids of texts, some of whose characters are unknown to char."""
    found = []
    for kind in ("char", "bpe", "gpt2"):
        tokenizer = create_tokenizer("".join([LINES, *TEXTS[:6]]) * 3, kind)
        texts = [
            {"text": text, "ids": tokenizer.encode(text, drop=True).tolist()} for text in TEXTS
        ]
        sizes = tokenizer.token_bytes[: tokenizer.num_tokens].tolist()
        unknown = {text: list(dict.fromkeys(text)) for text in TEXTS}
        for text, chars in unknown.items():
            unknown[text] = [char for char in chars if char in tokenizer.count_unknown(text)]
        for each in texts:
            each |= {"decoded": tokenizer.decode(each["ids"]), "unknown": unknown[each["text"]]}
        found.append({"data": describe_tokenizer(tokenizer), "texts": texts, "sizes": sizes})
    return found


def describe_memorization() -> dict[str, Any]:
    """Return the hashes of a text, and each position of another one with its hash."""
    training = LINES * 3 + "👍 naïve \ud83d and \0"
    units = np.frombuffer(training.encode("utf-16-le", "surrogatepass"), dtype="<u2")
    size = units.size - LENGTH + 1
    each = [int(hash_stretches(units[start : start + LENGTH], 1)[0]) for start in range(size)]
    return {"text": training, "hashes": each, "data": create_memorization(training)}


def list_halves() -> list[int]:
    """Return the bits, as float32, of all 65,536 float16 numbers."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return halves.astype(np.float32).view(np.uint32).tolist()


def test_the_modules_compute_what_python_does(gpt2_vocabulary):
    assert shutil.which("node"), "no node: apt-get install nodejs"
    vectors = {
        "models": {name: describe_model(name) for name in MODELS},
        "activations": list_activations(),
        "products": list_products(),
        "samples": list_samples(),
        "draws": list_draws(),
        "tokenizers": describe_texts(),
        "memorization": describe_memorization(),
        "halves": list_halves(),
    }
    for name, value in vectors.items():
        Path(f"{name}.json").write_text(json.dumps(value), encoding="ascii")
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", *map(str, TESTS)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "FOLIO_VECTORS": str(Path.cwd())},
    )
    failures = re.findall(r"^not ok .*?^  \.\.\.$", done.stdout, re.MULTILINE | re.DOTALL)
    assert done.returncode == 0, "\n".join([*failures, done.stderr])
    assert int(re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)[1]) == EXPECTED
