"""Kernels: faster forms of plain PyTorch expressions, each with the expression that it replaces.

`tests/test_kernels.py` compares each with that expression.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

RMS_EPSILON = 1e-6  # Qwen3's


def apply_rms_norm(x: Tensor) -> Tensor:
    """Divide `(..., C)` by its root mean square along the last dimension.

    Replaces `F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)` on the CPU, where PyTorch's makes twice
    as many passes over memory.
    """
    if x.device.type == "cpu":
        return FusedRMSNorm.apply(x)
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)


class FusedRMSNorm(torch.autograd.Function):
    """`apply_rms_norm` for the CPU."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """`(..., C)` to the same shape."""
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.size(-1)
        scale = mean_square.add_(RMS_EPSILON).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """Remove the gradient's component along y, then scale: (g - y mean(g y)) / rms(x)."""
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale)


def apply_causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Attend from each position to itself and those before it, `(B, H, T, D)`.

    Replaces `F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)` in the
    dtype of v; on the CPU it computes in float32, as PyTorch's kernel there is five times slower
    in bfloat16.
    """
    dtype = torch.float32 if q.device.type == "cpu" else v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
