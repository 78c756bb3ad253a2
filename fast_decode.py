"""Compiled decoding: `generate.decode_tokens` by torch.compile, several tokens per call.

It generates the same tokens as the plain function, which defines what is right.
"""

import functools
import time
from collections.abc import Callable

import torch

from generate import FastDecoder, SamplingParams, decode_tokens, stream_tokens
from model import LanguageModel
from utils.device import CompileResult, choose_backend, try_compile

# Tokens per call of the compiled code: a call costs as much as half a token.
TOKENS_PER_CALL = 16
# Tokens in sequence from which on compiling pays off, as it takes two minutes and saves half a
# millisecond per token.
MIN_TOKENS_TO_COMPILE = {"cpu": 200_000, "cuda": 200_000}
# One C++ function for everything, and no second thread for loops shorter than its start. On CUDA,
# Inductor skips CUDA graphs, as the KV cache is changed in place.
CPU_OPTIONS = {"cpp_wrapper": True, "cpp.min_chunk_size": 4096}


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
        options = CPU_OPTIONS if device.type == "cpu" else None
        compiled = torch.compile(decode_tokens, fullgraph=True, dynamic=False, options=options)
        fast = FastDecoder(functools.partial(compiled, model), number)
        # Make both kinds of call: several tokens, and the prefill of half a window.
        length = model.block_size + 2 * number
        for _ in stream_tokens(model, [0], length, sampling, seeds=range(rows), fast=fast):
            pass
        return fast

    fast, effective = try_compile(compile_and_probe, wanted, requested)
    seconds = time.perf_counter() - start
    on_progress(f"compiled in {seconds:.0f} s" if fast else f"not compiled: {effective.reason}")
    return fast, effective
