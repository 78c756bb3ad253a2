"""Causal attention on CUDA, as model.py calls it, for the shapes that the settings allow.

python -m pytest -m gpu tests/gpu/test_gpu_attention.py
"""

import math

import pytest
import torch

from utils.device import DTYPES, autocast, configure_matmul, use_deterministic_kernels
from utils.kernels import apply_causal_attention

pytestmark = pytest.mark.gpu

B, H = 2, 2
HEAD_SIZES = (1, 2, 3, 5, 7, 8, 16, 20, 24, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256)
LENGTHS = (1, 2, 3, 7, 8, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 1000, 1024)
# Norm of the error, as a fraction of the norm of the result.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
for_each_precision = pytest.mark.parametrize("precision", TOLERANCE)


def draw(length: int, size: int, precision: str, device: str) -> torch.Tensor:
    """Draw queries, keys and values as the model has them: `(B, T, 3, H, D)`."""
    generator = torch.Generator().manual_seed(length * 1000 + size)
    qkv = torch.randn(B, length, 3, H, size, generator=generator)
    return qkv.to(device, DTYPES[precision]).requires_grad_()


def attend(qkv: torch.Tensor, precision: str) -> torch.Tensor:
    """Attend as `CausalSelfAttention` does, with views of one tensor: `(B, H, T, D)`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with autocast(qkv.device, precision):
        return apply_causal_attention(q, k, v, 0.0)


def attend_plainly(qkv: torch.Tensor) -> torch.Tensor:
    """Attend by a masked softmax in float64."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, T)
    is_future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(is_future, -math.inf).softmax(dim=-1) @ v


def compare(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> list[str]:
    """Return a description of the error if it is too large."""
    if not found.isfinite().all():
        return [f"{name} has {(~found.isfinite()).sum().item()} values that are not finite"]
    error = (found.double() - expected).norm().item()
    allowed = tolerance * (expected.norm().item() + 0.01 * math.sqrt(expected.numel()))
    return [f"{name} is off by {error:.1e}, allowed {allowed:.1e}"] if error > allowed else []


def check(length: int, size: int, precision: str, device: str) -> list[str]:
    qkv, tolerance = draw(length, size, precision, device), TOLERANCE[precision]
    y = attend(qkv, precision)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (gradient,) = torch.autograd.grad(y, qkv, weight)
    plain = attend_plainly(qkv)
    (plain_gradient,) = torch.autograd.grad(plain, qkv, weight.double())
    problems = compare("output", y, plain, tolerance)
    parts = zip("qkv", gradient.unbind(2), plain_gradient.unbind(2), strict=True)
    for name, found, expected in parts:
        problems += compare(f"gradient of {name}", found, expected.double(), tolerance)
    changed = qkv.detach().clone()
    changed[:, -1] += 1  # the last token
    after = attend(changed.requires_grad_(), precision)
    if not torch.equal(after[:, :, :-1], y[:, :, :-1]):
        problems.append("an output depends on a later token")
    return problems


@for_each_precision
def test_attention_is_the_plain_masked_softmax_for_every_head_size_and_length(device, precision):
    problems = [
        f"head size {size}, length {length}: {problem}"
        for size in HEAD_SIZES
        for length in LENGTHS
        for problem in check(length, size, precision, device)
    ]
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:60])


@for_each_precision
def test_the_gradients_of_attention_are_the_same_bits_each_time(device, precision):
    configure_matmul(torch.device(device), "fp32")
    different = []
    for size in (16, 64, 128):
        for length in (64, 128, 256, 512, 1024):
            qkv = draw(length, size, precision, device)
            with use_deterministic_kernels(qkv.device):
                y = attend(qkv, precision)
                results = [
                    torch.autograd.grad(y, qkv, y.detach(), retain_graph=True)[0] for _ in "1234"
                ]
            names = [
                name
                for name, *parts in zip("qkv", *(r.unbind(2) for r in results), strict=True)
                if not all(torch.equal(parts[0], part) for part in parts[1:])
            ]
            if names:
                different.append(f"head size {size}, length {length}: {', '.join(names)}")
    assert not different, "\n".join(different)
