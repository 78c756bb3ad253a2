"""Compiled decoding: `generate.decode_tokens` by torch.compile, several tokens per call.

It generates the same tokens as the plain function, which defines what is right.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from generate import FastDecoder, SamplingParams, decode_tokens, stream_tokens
from model import LanguageModel
from utils.device import CompileResult, choose_backend, try_compile

# Tokens per call of the compiled code: a call costs as much as half a token.
TOKENS_PER_CALL = 16
# Tokens in sequence from which on compiling pays off, as it takes two minutes and saves half a
# millisecond per token.
MIN_TOKENS_TO_COMPILE = {"cpu": 200_000, "cuda": 200_000}
INDUCTOR_OPTIONS = {
    # One C++ function for everything, and no second thread for loops shorter than its start.
    "cpu": {"cpp_wrapper": True, "cpp.min_chunk_size": 4096},
    "cuda": {"triton.cudagraphs": True},  # never run where Folio is developed
}


def compile_decode(
    model: LanguageModel,
    requested: str,
    sampling: SamplingParams,
    tokens: int = 0,
    *,
    rows: int = 1,
    on_progress: Callable[[str], None] = lambda line: None,
) -> tuple[FastDecoder | None, CompileResult]:
    """Compile `decode_tokens` for `rows` texts, if `requested`, or if auto and it pays off.

    `tokens` is the number to generate in sequence, 0 if unknown. Returns the decoder, or None, and
    the mode in effect. Raises `UserError` if it does not compile and `requested` is "on".
    """
    device = model.token_embedding.weight.device
    wanted = choose_backend(requested, "inductor", device, tokens, MIN_TOKENS_TO_COMPILE)
    if wanted.mode == "off":
        return None, wanted
    on_progress("compiling, which may take a minute or two")
    start = time.perf_counter()
    number = max(1, min(TOKENS_PER_CALL, model.block_size // 2))  # fits after half a window

    def compile_and_probe() -> FastDecoder:
        options = INDUCTOR_OPTIONS.get(device.type)
        compiled = torch.compile(decode_tokens, fullgraph=True, dynamic=False, options=options)

        def decode(*args: Any) -> tuple[Tensor, ...]:
            results = compiled(model, *args)
            # The next replay of a CUDA graph overwrites its results.
            return tuple(r.clone() for r in results) if device.type == "cuda" else results

        fast = FastDecoder(decode, number)
        # Make both kinds of call: several tokens, and the prefill of half a window.
        length = model.block_size + 2 * number
        for _ in stream_tokens(model, [0], length, sampling, seeds=range(rows), fast=fast):
            pass
        return fast

    fast, effective = try_compile(compile_and_probe, wanted, requested)
    seconds = time.perf_counter() - start
    on_progress(f"compiled in {seconds:.0f} s" if fast else f"not compiled: {effective.reason}")
    return fast, effective
