"""decoding.py: the faster paths against the plain one.

python -m pytest tests/test_decoding.py
"""

import shutil

import pytest
import torch
from helpers import LINES
from torch import nn

from decoding import Int8Linear, choose_decoding, compile_decode, quantize
from model import KVCache, LanguageModel
from parameters import ModelConfig
from sampling import SamplingParams
from tokenizer import create_tokenizer
from utils.device import CompileResult
from utils.errors import UserError

CPU = torch.device("cpu")
INDUCTOR = CompileResult("inductor", "torch_compile is on")


def make(architecture: str = "modern", **changes) -> LanguageModel:
    """A model whose weights all matter, and whose greedy text does not just repeat itself."""
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_head": 2, "n_layer": 2, "block_size": 24, **changes}
    model = LanguageModel(ModelConfig(architecture=architecture, **settings), 40, 37)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.mark.parametrize(
    ("requested", "tokens", "device", "mode"),
    [
        ("off", 10**9, "cpu", "off"),
        ("on", 1, "cpu", "inductor"),
        ("auto", 500, "cpu", "off"),
        ("auto", 10**6, "cpu", "inductor"),
        ("auto", 10**6, "cuda", "inductor"),
        ("auto", 10**6, "mps", "off"),
    ],
)
def test_auto_compiles_where_it_pays_back(requested, tokens, device, mode):
    assert choose_decoding(requested, torch.device(device), tokens).mode == mode


def test_what_does_not_compile_falls_back_with_a_reason_or_is_refused(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    fast, compiled, _ = compile_decode(make(), INDUCTOR, "auto", SamplingParams())
    assert fast is None
    assert compiled.fell_back
    assert "no compiler here" in compiled.reason
    with pytest.raises(UserError, match="torch_compile is on, and inductor does not work here"):
        compile_decode(make(), INDUCTOR, "on", SamplingParams())


def test_off_compiles_nothing():
    off = CompileResult("off", "")
    assert compile_decode(make(), off, "off", SamplingParams()) == (None, off, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sampling", "rows"),
    [
        ("gpt2", SamplingParams(temperature=0), 1),
        ("modern", SamplingParams(temperature=0), 1),
        ("modern", SamplingParams(temperature=0.9), 3),
        (
            "gpt2",
            SamplingParams(repetition_penalty=1.2, temperature=1.5, top_k=9, top_p=0.9, min_p=0.02),
            1,
        ),
    ],
)
def test_compiled_decoding_chooses_the_tokens_of_the_plain_path(architecture, sampling, rows):
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    model = make(architecture)
    fast, compiled, seconds = compile_decode(model, INDUCTOR, "on", sampling, rows=rows)
    assert (compiled.mode, seconds > 0) == ("inductor", True)
    for prompt, length in (([1, 2, 3], 100), (list(range(30)), 61)):
        plain, quick = (
            list(model.stream(prompt, length, sampling, seeds=range(rows), fast=f))
            for f in (None, fast)
        )
        assert len(quick) < 0.7 * len(plain), "several tokens at once"
        for index in (0, 1):
            expected = torch.cat([part[index] for part in plain], dim=1)
            out = torch.cat([part[index] for part in quick], dim=1)
            if index == 0:
                assert torch.equal(out, expected)
                assert len(set(out.flatten().tolist())) > 5
            else:
                torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (2, 1, 48), (3, 7, 48)])
def test_an_8_bit_layer_is_near_to_the_one_it_stands_for(bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        expected, y = linear(x), Int8Linear(linear)(x)
    assert y.shape == expected.shape
    assert y.dtype == torch.float32
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_8_bit_weights_are_whole_and_no_row_of_zeros_breaks_them():
    linear = nn.Linear(16, 4, bias=False)
    nn.init.zeros_(linear.weight[1])
    quantized = Int8Linear(linear)
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight[1].abs().max() == 0
    assert quantized.weight.abs().amax(dim=1).tolist()[0] >= 126
    assert torch.isfinite(quantized(torch.randn(1, 16))).all()


def learnt(architecture: str) -> tuple[LanguageModel, torch.Tensor, torch.Tensor]:
    """A model that knows something of a text, and windows of that text."""
    ids = torch.from_numpy(create_tokenizer(LINES).encode(LINES).astype("int64"))
    windows = ids.unfold(0, 25, 5)  # (B, T + 1)
    idx, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    model = make(architecture, n_embd=64)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        model(idx, targets)[1].backward()
        optimizer.step()
    return model, idx, targets


def loss_by_decoding(model: LanguageModel, idx: torch.Tensor, targets: torch.Tensor) -> float:
    """The mean loss where each text is read by itself, a token at a time."""
    losses = []
    for row, row_targets in zip(idx, targets, strict=True):
        cache = KVCache(model, 1)
        for position in range(row.numel()):
            place = cache.positions[position : position + 1]
            logits = model.compute_next_logits(row[None, place], place, cache)
            losses.append(nn.functional.cross_entropy(logits, row_targets[place]))
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_the_loss_in_8_bits_is_that_of_the_weights_within_half_a_per_cent(architecture):
    model, idx, targets = learnt(architecture)
    with torch.no_grad():
        expected = model(idx, targets)[1].item()
        quantize(model)
        together = model(idx, targets)[1].item()
        # A token at a time is another way through the layer.
        cache_loss = loss_by_decoding(model, idx, targets)
    assert expected < 2.5, "it has learnt something"
    assert together == pytest.approx(expected, rel=0.005)
    assert cache_loss == pytest.approx(expected, rel=0.005)


def test_only_the_blocks_matrices_are_quantized_and_only_on_a_cpu():
    model = make()
    quantize(model)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 2 * 5
    assert model.token_embedding.weight.dtype == torch.float32
    with pytest.raises(UserError, match="--quantize int8 is for CPUs"):
        quantize(make().to("meta"))
