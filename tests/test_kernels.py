"""utils/kernels.py, utils/quantization.py: each kernel against the expression that it replaces.

python -m pytest tests/test_kernels.py
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from utils.errors import UserError
from utils.kernels import (
    RMS_EPSILON,
    apply_cached_attention,
    apply_causal_attention,
    apply_rms_norm,
    attend_one_query,
)
from utils.quantization import Int8Linear, quantize


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_()


def assert_same_values_and_gradients(function, reference, *inputs: torch.Tensor) -> None:
    results = []
    for each in (function, reference):
        output = each(*inputs)
        weights = draw(*output.shape, seed=1).detach()
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 48), (2, 2, 3, 5, 16)])
def test_rms_norm_agrees_with_pytorchs_forward_and_backward(shape):
    assert_same_values_and_gradients(
        apply_rms_norm, lambda x: F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON), draw(*shape)
    )


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = apply_rms_norm(x)
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(x.grad).all()


def test_causal_attention_agrees_with_pytorchs_forward_and_backward():
    inputs = [draw(2, 3, 7, 16, seed=seed) for seed in range(3)]
    assert_same_values_and_gradients(
        lambda q, k, v: apply_causal_attention(q, k, v, 0.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *inputs,
    )


def test_causal_attention_computes_in_float32_on_a_cpu_under_autocast():
    q, k, v = (draw(2, 3, 7, 16, seed=seed).detach() for seed in range(3))
    v = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = apply_causal_attention(q, k, v, 0.0)
    assert y.dtype == torch.float32
    assert torch.equal(y, apply_causal_attention(q, k, v.float(), 0.0))


def test_attention_of_one_query_agrees_with_pytorchs():
    q, keys, values = draw(2, 3, 1, 16), draw(2, 3, 9, 16, seed=1), draw(2, 3, 9, 16, seed=2)
    mask = torch.zeros(1, 9)
    mask[:, 5:] = -torch.inf
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    torch.testing.assert_close(attend_one_query(q, keys, values, mask), expected)
    assert torch.equal(apply_cached_attention(q, keys, values, mask), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (2, 1, 48), (3, 7, 48)])
def test_an_int8_layer_is_within_2_percent_of_its_float32_layer(bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        expected, y = linear(x), Int8Linear(linear)(x)
    assert y.shape == expected.shape
    assert y.dtype == torch.float32
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_int8_kernel_of_pytorch_agrees_with_the_dequantized_product():
    """`torch._weight_int8pack_mm` is private: this fails if its arguments or meaning change."""
    layer = Int8Linear(nn.Linear(48, 80, bias=False))
    x = draw(5, 48).detach().bfloat16()
    expected = F.linear(x.float(), layer.weight.float() * layer.scale.float()[:, None])
    y = torch._weight_int8pack_mm(x, layer.weight, layer.scale)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.02)


def test_int8_weights_use_the_whole_range_and_a_row_of_zeros_stays_zero():
    linear = nn.Linear(16, 4, bias=False)
    nn.init.zeros_(linear.weight[1])
    quantized = Int8Linear(linear)
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight[1].abs().max() == 0
    assert quantized.weight.abs().amax(dim=1).tolist()[0] >= 126
    assert torch.isfinite(quantized(torch.randn(1, 16))).all()


class Network(nn.Module):
    """A module with `blocks`, and a layer outside of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 8)


def test_only_the_linear_layers_of_the_blocks_are_quantized_and_only_on_a_cpu():
    network = Network()
    quantize(network)
    kinds = [type(module) for module in network.modules()]
    assert (kinds.count(Int8Linear), kinds.count(nn.Linear)) == (2, 1)
    with pytest.raises(UserError, match="--quantize int8"):
        quantize(Network().to("meta"))
