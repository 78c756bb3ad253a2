"""Generation: sampling, the KV cache, prefill and decoding, and streaming beyond the context.

tokens = generate_tokens(model, prompt, 200, SamplingParams(temperature=0.8), seeds=[1])
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import LanguageModel
from utils.errors import UserError
from utils.kernels import apply_cached_attention

# ----------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token, in the order of application.

    Raises `UserError` if a value is out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        legal = {
            "repetition_penalty from 0.01 to 100": 0.01 <= self.repetition_penalty <= 100,
            "temperature of 0 or more": 0 <= self.temperature < math.inf,
            "top_k of 1 or more": self.top_k is None or self.top_k >= 1,
            "top_p above 0, at most 1": 0 < self.top_p <= 1,
            "min_p from 0 to below 1": 0 <= self.min_p < 1,
        }
        if wrong := [words for words, is_legal in legal.items() if not is_legal]:
            raise UserError(f"sampling needs a {' and a '.join(wrong)}")


DEFAULT_SAMPLING = SamplingParams()
Prompt = Sequence[int] | np.ndarray | Tensor
UNIFORMS_PER_SEED = 1024  # drawn at once


def sample_token(
    logits: Tensor, draw: Tensor, sampling: SamplingParams, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample a token for each row of the logits, `(B, V)`.

    `draw`, `(B,)`, is uniform in [0, 1). `seen`, `(B, V)` bool, marks the tokens of the text, for
    the repetition penalty only. Returns the tokens, `(B, 1)` int64, and their log-probabilities
    before `sampling`, `(B, 1)`.
    """
    log_probs = logits.log_softmax(dim=-1)
    if seen is not None:
        logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)
    else:
        logits = apply_temperature(logits, sampling.temperature)
        if sampling.top_k is not None:
            logits = filter_top_k(logits, sampling.top_k)
        if sampling.top_p < 1:
            logits = filter_top_p(logits, sampling.top_p)
        if sampling.min_p > 0:
            logits = filter_min_p(logits, sampling.min_p)
        token = invert_cdf(logits.softmax(dim=-1), draw)
    return token, log_probs.gather(-1, token)


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalize the tokens in `seen`: arxiv.org/abs/1909.05858, section 4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide the logits by the temperature, however small, so that their softmax is never NaN."""
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens and any that tie with the last; set the others to -inf."""
    smallest_kept = logits.topk(min(k, logits.size(-1))).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens with total probability p (arxiv.org/abs/1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of more likely tokens; first: 0
    too_many = (before >= p) & (before > 0)  # the most likely token stays, however small p is
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, too_many)
    return logits.masked_fill(dropped, -math.inf)


def filter_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the most likely (arxiv.org/abs/2407.01082)."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def invert_cdf(probabilities: Tensor, draw: Tensor) -> Tensor:
    """Return the token at which the cumulative distribution passes `draw`, `(B, 1)` int64.

    One uniform number per row and no generator, so that a row depends neither on the other rows
    nor on the device.
    """
    cdf = probabilities.cumsum(dim=-1)  # (B, V)
    # Rounding must not carry a draw past the end, to tokens of probability 0.
    target = draw[:, None].clamp(max=1 - 2**-20) * cdf[:, -1:]
    return (cdf <= target).sum(dim=-1, keepdim=True)


def iter_uniforms(seeds: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield uniform numbers in [0, 1) without end, `(B,)`: one per seed.

    A seed's numbers depend neither on the other seeds nor on the device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        columns = [torch.rand(UNIFORMS_PER_SEED, generator=generator) for generator in generators]
        yield from torch.stack(columns, dim=1).to(device)


# ----------------------------------------------------------------------------------------------
# KV cache and decoding


class LayerCache(NamedTuple):
    """One layer's part of the KV cache."""

    keys: Tensor  # (B, H, T, D)
    values: Tensor  # (B, H, T, D)
    mask: Tensor  # (t, T): 0 at positions to attend to, -inf elsewhere

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Append keys and values at `positions`, then attend to all of the cache."""
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        return apply_cached_attention(q, self.keys, self.values, self.mask)


class KVCache:
    """Keys and values of `rows` texts, B, for all layers.

    Allocated for a full context at once: nothing grows or moves, so that decoding can be compiled.
    """

    def __init__(self, model: LanguageModel, rows: int):
        weight, n_head = model.token_embedding.weight, model.blocks[0].attention.n_head
        T, C = model.block_size, weight.size(1)
        shape = (rows, n_head, T, C // n_head)  # (B, H, T, D)
        like = {"dtype": weight.dtype, "device": weight.device}
        self.keys = [torch.zeros(shape, **like) for _ in model.blocks]
        self.values = [torch.zeros(shape, **like) for _ in model.blocks]
        self.positions = torch.arange(T, device=weight.device)

    def get_layers(self, positions: Tensor) -> list[LayerCache]:
        """Return each layer's part, for new tokens at `positions`, `(t,)`."""
        is_future = self.positions > positions[:, None]  # (t, T), later or not filled yet
        mask = torch.zeros_like(is_future, dtype=self.keys[0].dtype)
        mask = mask.masked_fill(is_future, -math.inf)
        return [LayerCache(*pair, mask) for pair in zip(self.keys, self.values, strict=True)]


def decode_tokens(
    model: LanguageModel,
    idx: Tensor,
    positions: Tensor,
    cache: KVCache,
    draws: Tensor,
    sampling: SamplingParams,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generate n tokens: run `idx`, then each generated token but the last, through the model.

    `idx`, `(B, t)` int64, are ids that are not in the cache yet, a prompt (prefill) or one token,
    at `positions`, `(t,)` int64. `draws`, `(n, B)`, are uniform in [0, 1). The cache, and `seen`,
    `(B, num_tokens)` bool, which marks the tokens of the text, are updated in place.

    Returns the tokens, `(B, n)` int64, and their log-probabilities before `sampling`, `(B, n)`.
    """
    tokens, log_probs = [], []
    for draw in draws:
        logits = model.compute_next_logits(idx, positions, cache)[:, : model.num_tokens]
        idx, log_prob = sample_token(logits, draw, sampling, seen)  # (B, 1)
        positions = positions[-1:] + 1
        if seen is not None:
            seen.scatter_(1, idx, True)
        tokens.append(idx)
        log_probs.append(log_prob)
    return torch.cat(tokens, dim=1), torch.cat(log_probs, dim=1)


class FastDecoder(NamedTuple):
    """A compiled `decode_tokens` of one model."""

    decode: Callable[..., tuple[Tensor, Tensor]]
    num_tokens: int  # generated per call


@torch.inference_mode()
def stream_tokens(
    model: LanguageModel,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: SamplingParams = DEFAULT_SAMPLING,
    *,
    seeds: Sequence[int] = (0,),
    fast: FastDecoder | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate continuations of a prompt, one text per seed, token by token.

    The model sees the last `block_size` tokens of the prompt. When the KV cache is full, the newer
    half of the window is prefilled anew at positions from 0, and the older half is dropped: the
    model always sees at least half a context, at positions that it was trained on, and half a
    context of decoding costs one prefill of half a context.

    Args:
        model: its mode is restored at the end.
        prompt: one or more ids: `(T,)`, or `(B, T)` with a row for each seed.
        max_new_tokens: for each text.
        sampling: how to choose each token.
        seeds: one for each of the B texts. A seed's text does not depend on the other seeds.
        fast: compiled decoding, used for all calls that have its shapes.

    Yields:
        the next tokens, `(B, n)` int64, and their log-probabilities before `sampling`, `(B, n)`;
        n is 1, or `fast.num_tokens`.
    """
    T = model.block_size
    ids = expand_prompt(model, prompt, len(seeds))
    if ids.size(1) == 0:
        raise UserError("a prompt needs at least one token")
    uniforms = iter_uniforms(seeds, ids.device)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros((len(seeds), model.vocab_size), dtype=torch.bool, device=ids.device)
        seen = seen.scatter_(1, ids, True)[:, : model.num_tokens]
    cache = KVCache(model, len(seeds))
    was_training = model.training
    model.eval()
    try:
        recent = unread = ids[:, -T:]  # the window, and its tokens that are not in the cache
        position = done = 0
        while done < max_new_tokens:
            if position == T:  # the cache is full
                unread, position = recent[:, T // 2 :], 0
            decode, number = functools.partial(decode_tokens, model), 1
            room = min(T - position, max_new_tokens - done)
            if fast is not None and unread.size(1) == 1 and fast.num_tokens <= room:
                decode, number = fast
            elif fast is not None and done > 0 and position == 0:  # half a window, as compiled
                decode = fast.decode
            tokens, log_probs = decode(
                # Contiguous, as compiled code is specialized on strides.
                unread.clone(memory_format=torch.contiguous_format),
                cache.positions[position : position + unread.size(1)],
                cache,
                torch.stack(list(itertools.islice(uniforms, number))),
                sampling,
                seen,
            )
            position += unread.size(1) + number - 1
            recent = torch.cat((recent, tokens), dim=1)[:, -T:]
            unread, done = tokens[:, -1:], done + number
            yield tokens, log_probs
    finally:
        model.train(was_training)


def generate_tokens(
    model: LanguageModel,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: SamplingParams = DEFAULT_SAMPLING,
    *,
    seeds: Sequence[int] = (0,),
) -> Tensor:
    """Return prompt and continuation, `(B, T + max_new_tokens)` int64: see `stream_tokens`."""
    ids = expand_prompt(model, prompt, len(seeds))
    parts = stream_tokens(model, ids, max_new_tokens, sampling, seeds=seeds)
    return torch.cat([ids, *(tokens for tokens, _ in parts)], dim=1)


def expand_prompt(model: LanguageModel, prompt: Prompt, rows: int) -> Tensor:
    """Return the prompt on the model's device as `(rows, T)` int64."""
    device = model.token_embedding.weight.device
    return torch.as_tensor(prompt).to(device, torch.int64).expand(rows, -1)
