"""Kernels: faster forms of plain PyTorch expressions, each with the expression that it replaces.

`tests/test_kernels.py` compares each with that expression.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

RMS_EPSILON = 1e-6  # Qwen3's
ATTENTION_BLOCK = 128  # positions
# BlockedAttention keeps up to T probabilities for each token and head: it is used if T is at most
# this times D, the head's channels.
MAX_PROBABILITIES_PER_CHANNEL = 16
MAX_CHECKED = 1024  # positions: the check of longer contexts would take more than milliseconds


def apply_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide `(..., C)` by its root mean square along the last dimension, times `weight`, `(C,)`.

    Replaces `F.rms_norm(x, x.shape[-1:], weight, eps=RMS_EPSILON)` on the CPU, where PyTorch's
    makes twice as many passes over memory.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], weight, eps=RMS_EPSILON)
    if torch.is_grad_enabled():
        return FusedRMSNorm.apply(x, weight)
    return _normalize(x)[0] * weight  # a token generated is a few microseconds sooner


def _normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x divided by its root mean square, and 1 over that, `(..., 1)`."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.size(-1)
    scale = mean_square.add_(RMS_EPSILON).rsqrt_()
    return x * scale, scale


class FusedRMSNorm(torch.autograd.Function):
    """`apply_rms_norm` for the CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        """`(..., C)` to the same shape."""
        normed, scale = _normalize(x)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and the weight."""
        normed, scale, weight = ctx.saved_tensors
        product = gradient * normed
        # No matrix product: torch.compile would compute it in the autocast dtype.
        along = (product * weight).mean(dim=-1, keepdim=True)  # (..., 1)
        x_gradient = (gradient * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return x_gradient, product.flatten(0, -2).sum(dim=0)


def apply_normed_rotary(qk: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalize queries and keys, then rotate them, in float32: `(2, B, H, T, D)`.

    `weights`, `(2, D)`, are those of the norms of queries and of keys; `cos` and `sin`, `(T, D)`,
    those of the angles. In training on the CPU, a function that makes a third fewer passes over
    memory replaces the expression below, and without gradients `_normalize` replaces `F.rms_norm`.
    """
    x = qk.float()
    is_cpu, has_gradients = x.device.type == "cpu", torch.is_grad_enabled()
    if is_cpu and has_gradients and not torch.compiler.is_compiling():
        return FusedNormedRotary.apply(x, weights, cos, sin)
    plain = not is_cpu or has_gradients
    normed = F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON) if plain else _normalize(x)[0]
    x = normed * weights[:, None, None, None, :]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class FusedNormedRotary(torch.autograd.Function):
    """`apply_normed_rotary` for the CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`(2, B, H, T, D)` to the same shape."""
        normed, scale = _normalize(x)
        ctx.save_for_backward(normed, scale, weights, cos, sin)
        return _rotate(normed * weights[:, None, None, None, :], cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the weights. To rotate by -a is the inverse."""
        normed, scale, weights, cos, sin = ctx.saved_tensors
        gradient = _rotate(gradient, cos, -sin)
        product = gradient * normed
        gradient.mul_(weights[:, None, None, None, :])
        along = (gradient * normed).mean(dim=-1, keepdim=True)  # (2, B, H, T, 1)
        x_gradient = gradient.addcmul_(normed, along, value=-1).mul_(scale)
        return x_gradient, product.sum(dim=(1, 2, 3)), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels d and d + D/2 of `(..., T, D)`."""
    half = x.size(-1) // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[:, :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[:, half:])
    return y


def apply_dropout(x: Tensor, p: float) -> Tensor:
    """Set each element of x to 0 with probability p, and divide the others by 1 - p.

    Replaces `F.dropout(x, p)`. On the CPU, PyTorch draws a number for each element, one after the
    other, which is several times slower than to draw 64 bits for four of them: there, p is rounded
    to a multiple of 1 / 65536.
    """
    if x.device.type != "cpu" or p == 0:
        return F.dropout(x, p)
    draws = torch.randint(-(1 << 63), (1 << 63) - 1, ((x.numel() + 3) // 4,), dtype=torch.int64)
    dropped = min(round(p * 65536), 65535)  # of the 65536 values; all of them would not fit int16
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return x * keep * (65536 / (65536 - dropped))


def apply_causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Attend from each position to itself and those before it, `(B, H, T, D)`.

    Replaces `F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)` in the
    dtype of v. On the CPU, PyTorch's kernel is slow in bfloat16, above all backward: matrix
    products replace it in training, unless there is dropout or they would take too much memory.
    Otherwise the CPU computes attention in float32, and the result is float32.
    """
    is_cpu, (T, D) = q.device.type == "cpu", q.shape[2:]
    is_bf16_training = v.dtype == torch.bfloat16 and torch.is_grad_enabled() and dropout_p == 0
    if is_cpu and is_bf16_training and T <= MAX_PROBABILITIES_PER_CHANNEL * D:
        # Contiguous, else the products of both passes would copy each of them.
        return BlockedAttention.apply(*(x.to(v.dtype).contiguous() for x in (q, k, v)))
    dtype = torch.float32 if is_cpu else v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)


class BlockedAttention(torch.autograd.Function):
    """Causal attention by matrix products in the dtype of its inputs, for training on the CPU."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: queries, keys, values and the result are `(B, H, T, D)`."""
        is_compiling = torch.compiler.is_compiling()
        forward = torch.ops.folio.attend_in_blocks if is_compiling else attend_in_blocks
        y, probabilities = forward(q, k, v)
        ctx.save_for_backward(q, k, v, *probabilities)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of queries, keys and values."""
        q, k, v, *probabilities = ctx.saved_tensors
        is_compiling = torch.compiler.is_compiling()
        ours = torch.ops.folio.attend_in_blocks_backward
        backward = ours if is_compiling else attend_in_blocks_backward
        return backward(gradient, q, k, v, probabilities)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return causal attention, `(B, H, T, D)`, and the probabilities of each block of positions.

    A block has ATTENTION_BLOCK positions, and attends to the keys up to its last one, so that
    fewer masked scores are computed: its probabilities are `(B H, positions, keys)`.
    """
    shape, (T, D) = q.shape, q.shape[2:]
    q, k, v = (x.reshape(-1, T, D) for x in (q, k, v))  # (B H, T, D)
    mask = q.new_full((T, T), -torch.inf).triu_(1)
    y, probabilities = torch.empty_like(q), []
    for start in range(0, T, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, T)
        keys = k[:, :end].mT
        scores = torch.baddbmm(mask[start:end, :end], q[:, start:end], keys, alpha=D**-0.5)
        probabilities.append(torch.softmax(scores, dim=-1))
        torch.bmm(probabilities[-1], v[:, :end], out=y[:, start:end])
    return y.view(shape), probabilities


def attend_in_blocks_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    shape, (T, D) = q.shape, q.shape[2:]
    gradient, q, k, v = (x.reshape(-1, T, D) for x in (gradient, q, k, v))  # (B H, T, D)
    gradients = q_gradient, k_gradient, v_gradient = [torch.empty_like(x) for x in (q, k, v)]
    scale, end = D**-0.5, T
    for p in reversed(probabilities):
        start = end - p.size(1)
        block_gradient = gradient[:, start:end]
        p_gradient = torch.bmm(block_gradient, v[:, :end].mT)
        # Private in PyTorch (as of 2.13), and twice as fast as the same in public operators.
        score_gradient = torch._softmax_backward_data(p_gradient, p, -1, p.dtype)
        # The last block attends to all keys: its products replace what was in memory.
        beta = 0 if end == T else 1
        q_gradient[:, start:end].baddbmm_(score_gradient, k[:, :end], beta=0, alpha=scale)
        k_gradient[:, :end].baddbmm_(score_gradient.mT, q[:, start:end], beta=beta, alpha=scale)
        v_gradient[:, :end].baddbmm_(p.mT, block_gradient, beta=beta)
        end = start
    return tuple(x.view(shape) for x in gradients)


def _define_operators() -> torch.library.Library:
    """Define operators for torch.compile, which would generate slower code for these functions.

    Eager training calls the functions, so that a profile shows their products. The operators are
    removed when nothing refers to the returned library any more.
    """
    library = torch.library.Library("folio", "FRAGMENT")
    qkv, results = "Tensor q, Tensor k, Tensor v", "(Tensor, Tensor, Tensor)"
    for schema, function in (
        (f"({qkv}) -> (Tensor, Tensor[])", attend_in_blocks),
        (f"(Tensor gradient, {qkv}, Tensor[] p) -> {results}", attend_in_blocks_backward),
    ):
        library.define(function.__name__ + schema)
        library.impl(function.__name__, function, "CPU")
        library.impl(function.__name__, function, "Meta")  # the shapes of the outputs
    return library


_OPERATORS = None  # if this file is reloaded, an operator cannot be defined twice
_OPERATORS = _define_operators()  # keeps them defined


def is_attention_causal(H: int, T: int, D: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether attention in `dtype` on this device leaves out later positions, and is finite.

    If it does not leave them out, the model sees the token that it has to predict: its loss falls
    to near 0, and it generates nonsense. This has been reported of MPS in half precision. Checked
    as in training, but without dropout, and with at most MAX_CHECKED positions: a longer context
    may use another kernel.
    """
    T = min(T, MAX_CHECKED)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn((2, 1, H, T, D), generator=generator).to(device)
    v = torch.zeros(1, H, T, D, device=device, dtype=dtype)
    v[:, :, -1] = 1000  # the last position, which only the last output may see
    with torch.enable_grad():  # the kernel may depend on it
        y = apply_causal_attention(q.requires_grad_(), k, v, 0.0)
    # A later position would add some 1000 / T.
    return bool((y[:, :, :-1].abs() < 0.05).all() and y.isfinite().all())
