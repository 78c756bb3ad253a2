"""utils/kernels.py: each kernel against the expression that it replaces.

python -m pytest tests/test_kernels.py
"""

import subprocess
import sys

import pytest
import torch
from helpers import CHECKOUT
from torch.nn import functional as F

from utils.kernels import (
    ATTENTION_BLOCK,
    RMS_EPSILON,
    apply_causal_attention,
    apply_dropout,
    apply_normed_rotary,
    apply_rms_norm,
    attend_in_blocks,
    is_attention_causal,
)


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
        apply_rms_norm,
        lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, eps=RMS_EPSILON),
        draw(*shape),
        draw(shape[-1], seed=2),
    )


def test_compiled_rms_norm_has_gradients_in_float32_under_autocast():
    x, weight = draw(64, 128), draw(128, seed=2)
    compiled = torch.compile(apply_rms_norm, backend="aot_eager")

    def apply_with_autocast(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(x, weight)

    assert_same_values_and_gradients(apply_with_autocast, apply_rms_norm, x, weight)


def rotate_plainly(qk, weights, cos, sin):
    x = F.rms_norm(qk, qk.shape[-1:], eps=RMS_EPSILON) * weights[:, None, None, None, :]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 2), (2, 3, 2, 5, 8)])
def test_normed_rotary_agrees_with_the_plain_expression_forward_and_backward(shape):
    T, D = shape[-2:]
    angles = torch.outer(torch.arange(T), 0.5 ** torch.arange(D // 2))
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1) for f in (torch.cos, torch.sin))
    qk, weights = draw(*shape), draw(2, D, seed=2)
    assert_same_values_and_gradients(
        lambda qk, weights: apply_normed_rotary(qk, weights, cos, sin),
        lambda qk, weights: rotate_plainly(qk, weights, cos, sin),
        qk,
        weights,
    )
    with torch.no_grad():
        result = apply_normed_rotary(qk, weights, cos, sin)
        torch.testing.assert_close(result, rotate_plainly(qk, weights, cos, sin))


def test_normed_rotary_takes_queries_and_keys_as_views_of_one_product():
    product = draw(3, 5, 3 * 2 * 8)
    qk = product.view(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)[:2]  # (2, B, H, T, D)
    cos, sin = torch.ones(5, 8), torch.zeros(5, 8)
    y = apply_normed_rotary(qk, torch.ones(2, 8), cos, sin)
    torch.testing.assert_close(y, F.rms_norm(qk, (8,), eps=RMS_EPSILON))


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = apply_rms_norm(x, torch.ones(8))
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_dropout_drops_each_element_with_probability_p_and_scales_the_others(p):
    torch.manual_seed(0)
    x = torch.ones(400, 1001, requires_grad=True)  # not a multiple of four numbers
    y = apply_dropout(x, p)
    dropped = (y == 0).float()
    error = 5 * (p * (1 - p) / 100_000) ** 0.5
    for lane in range(4):  # the four numbers of one draw are independent
        assert dropped.flatten()[lane::4].mean() == pytest.approx(p, abs=error)
    both = dropped.flatten()[:-1:4] * dropped.flatten()[1::4]
    assert both.mean() == pytest.approx(p * p, abs=error)
    drawn = round(p * 65536) / 65536  # in 16 bits
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - drawn)]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())  # the same elements, the same factor


def test_dropout_keeps_the_dtype_and_repeats_with_the_generator():
    x = torch.ones(3, 5, dtype=torch.bfloat16)
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(apply_dropout(x, 0.5))
    assert masks[0].dtype == torch.bfloat16
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], apply_dropout(x, 0.5))  # the generator has advanced


def test_dropout_of_nearly_all_drops_nearly_all():
    torch.manual_seed(0)
    y = apply_dropout(torch.ones(100_000), 1 - 1e-7)
    assert (y != 0).float().mean() < 1e-3
    assert torch.isfinite(y).all()


def test_dropout_scales_by_the_probability_that_it_draws_with():
    torch.manual_seed(0)
    y = apply_dropout(torch.ones(2_000_000), 1 - 1.4 / 65536)  # rounded to 1 - 1 / 65536
    assert set(y.unique().tolist()) == {0.0, 65536.0}


def test_no_dropout_draws_no_numbers():
    state = torch.get_rng_state()
    x = torch.ones(3)
    assert torch.equal(apply_dropout(x, 0.0), x)
    assert torch.equal(state, torch.get_rng_state())


def test_causal_attention_agrees_with_pytorchs_forward_and_backward():
    inputs = [draw(2, 3, 7, 16, seed=seed) for seed in range(3)]
    assert_same_values_and_gradients(
        lambda q, k, v: apply_causal_attention(q, k, v, 0.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *inputs,
    )


def attend_under_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return apply_causal_attention(q, k, v.bfloat16(), 0.0)


def test_causal_attention_without_gradients_is_in_float32_on_a_cpu_under_autocast():
    q, k, v = (draw(2, 3, 7, 16, seed=seed).detach() for seed in range(3))
    with torch.no_grad():
        y = attend_under_autocast(q, k, v)
    assert y.dtype == torch.float32
    assert torch.equal(y, apply_causal_attention(q, k, v.bfloat16().float(), 0.0))


@pytest.mark.parametrize("T", [1, ATTENTION_BLOCK, 2 * ATTENTION_BLOCK + 44])
def test_causal_attention_of_training_in_bf16_agrees_with_pytorchs_in_float32(T):
    def compute(attention):
        inputs = [draw(2, 3, T, 32, seed=seed).bfloat16().float() for seed in range(3)]
        inputs = [x.detach().requires_grad_() for x in inputs]
        y = attention(*inputs)
        weights = draw(*y.shape, seed=3).detach()
        return (y, *torch.autograd.grad((y.float() * weights).sum(), inputs))

    ours = compute(attend_under_autocast)
    theirs = compute(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True))
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm() + 1e-5  # bf16 has 8 bits


def test_causal_attention_of_training_is_bitwise_the_same_compiled():
    compiled = torch.compile(attend_under_autocast, backend="aot_eager")
    results = []
    for function in (attend_under_autocast, compiled):
        inputs = [draw(2, 3, ATTENTION_BLOCK + 5, 16, seed=seed) for seed in range(3)]
        y = function(*inputs)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_of_training_does_not_read_uninitialized_memory():
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
    try:
        inputs = [draw(2, 3, ATTENTION_BLOCK + 5, 16, seed=seed) for seed in range(3)]
        y = attend_under_autocast(*inputs)
        gradients = torch.autograd.grad(y.float().sum(), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (y, *gradients))


@pytest.mark.parametrize(("D", "expected"), [(8, torch.bfloat16), (7, torch.float32)])
def test_attention_that_would_keep_too_many_probabilities_is_in_float32(D, expected):
    y = attend_under_autocast(*(draw(1, 1, 128, D, seed=seed) for seed in range(3)))
    assert y.dtype == expected


def test_the_operators_of_attention_declare_their_outputs():
    q, k, v = (draw(2, 3, ATTENTION_BLOCK + 5, 16, seed=seed).detach() for seed in range(3))
    y, probabilities = attend_in_blocks(q, k, v)
    ours, checks = torch.ops.folio, ("test_schema", "test_faketensor")
    backward = (y, q, k, v, probabilities)
    torch.library.opcheck(ours.attend_in_blocks.default, (q, k, v), test_utils=checks)
    torch.library.opcheck(ours.attend_in_blocks_backward.default, backward, test_utils=checks)


def test_the_operators_survive_a_reload_of_their_file_as_in_a_notebook():
    code = (
        "import importlib, torch; from utils import kernels\n"
        "importlib.reload(kernels)\n"
        "x = torch.ones(1, 1, 4, 16)\n"
        "assert torch.equal(torch.ops.folio.attend_in_blocks(x, x, x)[0], x)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "D"), [(1, 2), (2, 32), (7, 10), (256, 64), (5000, 16)])
def test_attention_is_found_to_be_causal(dtype, T, D):
    assert is_attention_causal(2, T, D, CPU, dtype)


@pytest.mark.parametrize("offset", [1, 200])
def test_attention_that_sees_later_positions_is_found(monkeypatch, offset):
    def leak(q, k, v, dropout_p, is_causal):
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(offset)
        return attention(q, k, v, attn_mask=mask)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", leak)
    assert not is_attention_causal(2, 256, 32, CPU, torch.float16)


@pytest.mark.parametrize("position", [0, -1])
def test_attention_that_is_not_finite_is_found(monkeypatch, position):
    def attend(q, k, v, **settings):
        y = torch.zeros_like(v)
        y[:, :, position] = torch.nan
        return y

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    assert not is_attention_causal(2, 8, 32, CPU, torch.float32)
