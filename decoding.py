"""Faster ways to do what `LanguageModel.decode` does.

The plain path in `model.py` is what counts: compiled, it chooses the same tokens; in 8 bits, tokens
as likely to a fraction of a per cent. The CUDA branch has not been run where Folio is developed.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import FastDecoder, LanguageModel
from sampling import SamplingParams
from utils.device import CompileResult, try_compile
from utils.errors import UserError

# Tokens that one call of the compiled code chooses: calling it costs as much as half a token.
CHOSEN_AT_ONCE = 16
# Tokens one after another from which on compiling pays back: it takes two minutes and saves half a
# millisecond of each.
WORTH_COMPILING = 200_000
# What Inductor is told, by device.
OPTIONS = {
    # One C++ function for all, and no second thread for what is smaller than its start.
    "cpu": {"cpp_wrapper": True, "cpp.min_chunk_size": 4096},
    "cuda": {"triton.cudagraphs": True},
}


def choose_decoding(requested: str, device: torch.device, tokens: int) -> CompileResult:
    """Whether to compile, by `--torch-compile` and the tokens to choose one after another.

    `tokens` is 0 where nobody knows how many it will be.
    """
    if requested == "off":
        return CompileResult("off", "torch_compile is off")
    if requested == "on":
        return CompileResult("inductor", "torch_compile is on")
    if device.type not in OPTIONS:
        return CompileResult("off", f"compiling brings nothing on {device.type.upper()}")
    if tokens < WORTH_COMPILING:
        return CompileResult("off", "too few tokens for compiling to pay back")
    return CompileResult("inductor", "it pays back")


def compile_decode(
    model: LanguageModel,
    wanted: CompileResult,
    requested: str,
    sampling: SamplingParams,
    *,
    rows: int = 1,
) -> tuple[FastDecoder | None, CompileResult, float]:
    """`model.decode` compiled for `rows` texts and one way of sampling, if that works.

    Returns it, or None; what is in effect then; and the seconds that it took.

    Raises `UserError` where it does not work and was asked for.
    """
    if wanted.mode == "off":
        return None, wanted, 0.0
    begun = time.perf_counter()
    device = model.token_embedding.weight.device
    at_once = max(1, min(CHOSEN_AT_ONCE, model.block_size // 2))  # what fits after a window's half

    def compiled() -> FastDecoder:
        decode = torch.compile(
            model.decode, fullgraph=True, dynamic=False, options=OPTIONS.get(device.type)
        )
        if device.type == "cuda":
            decode = _kept(decode)
        return FastDecoder(decode, at_once)

    def probe(fast: FastDecoder) -> None:
        """Both kinds of call: some tokens, and the newer half of a full cache read again."""
        length = model.block_size + 2 * at_once
        stream = model.stream([0], length, sampling, seeds=range(rows), fast=fast)
        for _ in stream:
            pass

    fast, effective = try_compile(compiled, wanted, requested, probe)
    return fast, effective, time.perf_counter() - begun


def _kept(decode: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """What a CUDA graph gives is overwritten by its next run: a copy stays."""

    def call(*args: Any) -> tuple[Tensor, ...]:
        return tuple(result.clone() for result in decode(*args))

    return call


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers from -127 to 127, with a scale for each row.

    A quarter of the memory, which is what one token at a time waits for. As in LLM.int8()
    (arxiv.org/abs/2208.07339), but of the weights alone.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()  # (outputs, inputs)
        largest = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        scale = (largest / 127).bfloat16()  # (outputs,), what the kernel takes
        rounded = (weight / scale[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`, in float32."""
        if x.size(-2) == 1:  # a token at a time: alone or not, its result is the same
            rows = x.flatten(0, -2).bfloat16()
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).float()
            y = y.view(*x.shape[:-1], -1)
        else:  # a prompt: the weights are read once for all of it
            y = F.linear(x, self.weight.float() * self.scale.float()[:, None])
        return y if self.bias is None else y + self.bias


def quantize(model: LanguageModel) -> None:
    """Put the matrices of the blocks into 8 bits, in place. The embedding stays as it is.

    Raises `UserError` where PyTorch or the device has no fast way to multiply them.
    """
    device = model.token_embedding.weight.device
    if device.type != "cpu" or not hasattr(torch, "_weight_int8pack_mm"):
        raise UserError(f"--quantize int8 is for CPUs, and this model is on {device.type}")
    for module in model.blocks.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
