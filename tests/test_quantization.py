"""utils/quantization.py: int8 weights.

python -m pytest tests/test_quantization.py
"""

import numpy as np
import pytest
import torch
from helpers import LINES
from torch import nn

from model import LanguageModel
from parameters import ModelConfig
from tokenizer import create_tokenizer
from utils.quantization import quantize_rows, round_to_int8


def test_int8_weights_use_the_whole_range_and_differ_by_at_most_half_a_step():
    weight = np.random.default_rng(0).standard_normal((3, 4, 50)).astype(np.float32)
    rounded, scale = quantize_rows(weight)
    assert rounded.dtype == np.int8
    assert (np.abs(rounded.astype(int)).max(axis=-1) == 127).all()
    assert (np.abs(rounded * scale[..., None] - weight) <= 0.501 * scale[..., None]).all()


def test_a_row_of_zeros_stays_zero():
    rounded, scale = quantize_rows(np.zeros((2, 8), dtype=np.float32))
    assert not (rounded * scale[:, None]).any()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("architecture", ["modern", "speedrun"])
def test_only_the_linear_layers_of_the_blocks_are_rounded(architecture):
    shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "block_size": 4}
    model = LanguageModel(ModelConfig(architecture=architecture, **shape), 5)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_to_int8(model)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == set(model.get_block_matrices())


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "speedrun"])
def test_the_int8_loss_is_within_half_a_percent_of_the_float32_loss(architecture):
    ids = torch.from_numpy(create_tokenizer(LINES).encode(LINES).astype("int64"))
    windows = ids.unfold(0, 25, 5)  # (B, T + 1)
    idx, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_head": 2, "n_layer": 2, "block_size": 24}
    model = LanguageModel(ModelConfig(architecture=architecture, **shape), 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(idx, targets)[1].backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(idx, targets)[1].item()
        round_to_int8(model)
        assert expected < 2.5, "the model has learned"
        assert model(idx, targets)[1].item() == pytest.approx(expected, rel=0.005)
