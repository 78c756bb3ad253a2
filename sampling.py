"""How the next token is chosen: small functions of the logits, and of nothing else.

Each takes logits `(B, V)`, and gives them back changed. What is not to be drawn becomes -inf.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose, in the order in which it is applied.

    Raises `UserError` for a value that means nothing.
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
UNIFORMS_PER_BATCH = 1024


def sample_token(
    logits: Tensor, draw: Tensor, sampling: SamplingParams, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row.

    Args:
        logits: the model's, `(B, V)`.
        draw: a number in [0, 1) for each row, `(B,)`: which token that means, the logits say.
        sampling: how.
        seen: which tokens the text has already, `(B, V)` bool; for a repetition penalty alone.

    Returns:
        the tokens, `(B, 1)` int64, and the logarithm of the probability that the model itself
        gave each, `(B, 1)`: before `sampling` changed anything.
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
    """Make what was `seen` less likely: arxiv.org/abs/1909.05858, section 4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Below 1 the likely become likelier, above 1 all become alike.

    With the largest logit at 0 and the divisor above 0, a tiny temperature gives 0 or -inf to the
    softmax, and never NaN.
    """
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest, and what is as likely as the last of them; more than V means all."""
    smallest_kept = logits.topk(min(k, logits.size(-1))).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest that have the share p together (arxiv.org/abs/1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier have: 0 for the first
    too_many = (before >= p) & (before > 0)  # the likeliest stays, however small p is
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, too_many)
    return logits.masked_fill(dropped, -math.inf)


def filter_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep what is at least p times as likely as the likeliest (arxiv.org/abs/2407.01082)."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def invert_cdf(probabilities: Tensor, draw: Tensor) -> Tensor:
    """The token that `draw` falls on, where each has its share of [0, 1): `(B, 1)` int64.

    One number for each row, and no generator: so that a row never depends on its neighbours, nor
    on the device.
    """
    reached = probabilities.cumsum(dim=-1)  # (B, V)
    # Rounding must not carry a draw past the end, where tokens may stand that are not to be drawn.
    target = draw[:, None].clamp(max=1 - 2**-20) * reached[:, -1:]
    return (reached <= target).sum(dim=-1, keepdim=True)


def iter_uniforms(seeds: Sequence[int]) -> Iterator[Tensor]:
    """Numbers in [0, 1) without end, `UNIFORMS_PER_BATCH` for each seed: `(DRAWN_AT_ONCE, B)`.

    They are the seed's own, whatever the others and the device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        rows = [torch.rand(UNIFORMS_PER_BATCH, generator=generator) for generator in generators]
        yield torch.stack(rows, dim=1)
