"""The interface of the decoding engines, and the settings of sampling.

decode_torch.py has PyTorch's, for any device; decode_numba.py has plain loops, for a CPU.
generate.py streams text from either. Nothing here needs torch.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from utils.errors import UserError


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


class Decoder(Protocol):
    """Continues B texts, and holds their KV cache."""

    tokens_per_call: int
    """How many tokens to generate in the next call: enough that the call itself costs little."""

    def decode(
        self, ids: np.ndarray, position: int, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generate n tokens: run `ids`, then each generated token but the last, through the model.

        `ids`, `(B, t)` int64, are not in the cache yet: a prompt (prefill), or the token that was
        generated last. The first is at `position`; the cache has those before it. `draws`,
        `(n, B)` float32, are uniform in [0, 1).

        Returns the tokens, `(B, n)` int64, and their log-probabilities before any filter,
        `(B, n)` float32.
        """


class Engine(Protocol):
    """Runs one model."""

    name: str
    block_size: int

    def create_decoder(self, prompt: np.ndarray, sampling: SamplingParams) -> Decoder:
        """Create a decoder of B texts, with an empty cache.

        The repetition penalty counts the tokens of `prompt`, `(B, T)` int64, as generated.
        """
