"""Generation: streaming of text of any length from a model.

tokens = generate_tokens(model, prompt, 200, SamplingParams(temperature=0.8), seeds=[1])

Nothing here needs torch, unless the model is PyTorch's.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine import Engine, SamplingParams
from utils.errors import UserError

if TYPE_CHECKING:
    from model import LanguageModel

DEFAULT_SAMPLING = SamplingParams()
Prompt = "Sequence[int] | np.ndarray | Tensor"
UNIFORMS_PER_SEED = 1024  # drawn at once, or fewer if there are thousands of seeds


def stream_tokens(
    model: "LanguageModel | Engine",
    prompt: Prompt,
    max_new_tokens: int,
    sampling: SamplingParams = DEFAULT_SAMPLING,
    *,
    seeds: Sequence[int] = (0,),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Generate continuations of a prompt, one text per seed, a few tokens at a time.

    The model sees the last `block_size` tokens of the prompt. When the KV cache is full, the newer
    half of the window is prefilled anew at positions from 0, and the older half is dropped: the
    model always sees at least half a context, at positions that it was trained on, and half a
    context of decoding costs one prefill of half a context.

    Args:
        model: a model, which PyTorch runs, or an engine.
        prompt: one or more ids: `(T,)`, or `(B, T)` with a row for each seed.
        max_new_tokens: for each text.
        sampling: how to choose each token.
        seeds: one for each of the B texts. A seed's text does not depend on the other seeds,
            but for the rounding of sums.

    Yields:
        the next tokens, `(B, n)` int64, and their log-probabilities before `sampling`, `(B, n)`
        float32.
    """
    engine = get_engine(model)
    T = engine.block_size
    ids = expand_prompt(prompt, len(seeds))
    if ids.shape[1] == 0:
        raise UserError("a prompt needs at least one token")
    uniforms = iter_uniforms(seeds)
    decoder = engine.create_decoder(ids, sampling)
    recent = unread = ids[:, -T:]  # the window, and its tokens that are not in the cache
    position = done = 0
    while done < max_new_tokens:
        if position == T:  # the cache is full
            unread, position = recent[:, T // 2 :], 0
        t = unread.shape[1]
        # The last token generated needs no place in the cache yet.
        number = min(decoder.tokens_per_call, T - position - t + 1, max_new_tokens - done)
        draws = np.stack(list(itertools.islice(uniforms, number)))
        tokens, log_probs = decoder.decode(np.ascontiguousarray(unread), position, draws)
        position += t + number - 1
        recent = np.concatenate((recent, tokens), axis=1)[:, -T:]
        unread, done = tokens[:, -1:], done + number
        yield tokens, log_probs


def generate_tokens(
    model: "LanguageModel | Engine",
    prompt: Prompt,
    max_new_tokens: int,
    sampling: SamplingParams = DEFAULT_SAMPLING,
    *,
    seeds: Sequence[int] = (0,),
) -> np.ndarray:
    """Return prompt and continuation, `(B, T + max_new_tokens)` int64: see `stream_tokens`."""
    ids = expand_prompt(prompt, len(seeds))
    parts = stream_tokens(model, ids, max_new_tokens, sampling, seeds=seeds)
    return np.concatenate([ids, *(tokens for tokens, _ in parts)], axis=1)


def get_engine(model: "LanguageModel | Engine") -> Engine:
    """Return the engine itself, or PyTorch's for a model."""
    if hasattr(model, "create_decoder"):
        return model
    from decode_torch import TorchEngine  # late, as it needs torch

    return TorchEngine(model)


def expand_prompt(prompt: Prompt, rows: int) -> np.ndarray:
    """Return the prompt as `(rows, T)` int64."""
    if hasattr(prompt, "cpu"):  # a tensor, on any device
        prompt = prompt.cpu()
    ids = np.asarray(prompt, dtype=np.int64)
    return np.broadcast_to(ids, (rows, ids.shape[-1]))


def iter_uniforms(seeds: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield uniform numbers in [0, 1) without end, `(B,)` float32: one per seed.

    A seed's numbers do not depend on the other seeds. They are those of `torch.rand` on a CPU: the
    24 low bits of each output of the Mersenne Twister, whose seed has 32 bits.
    """
    twisters = [np.random.RandomState(seed & 0xFFFF_FFFF) for seed in seeds]
    size = max(1, min(UNIFORMS_PER_SEED, 1_000_000 // len(seeds)))
    while True:
        columns = [twister.randint(0, 2**32, size, dtype=np.uint32) for twister in twisters]
        low_bits = np.stack(columns, axis=1) & 0xFF_FFFF
        yield from low_bits.astype(np.float32) * np.float32(2**-24)
