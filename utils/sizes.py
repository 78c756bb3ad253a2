"""The size of model that is predicted to reach the lowest loss on a text in a given time.

The scaling law is that of Hoffmann et al. (arxiv.org/abs/2203.15556), and for text that is read
more than once that of Muennighoff et al. (arxiv.org/abs/2305.16264). docs/LOG.md has the runs that
its constants were fitted to: models of an earlier default recipe with 0.6 to 10.6 million weights
in their blocks.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Size(NamedTuple):
    """The shape of a model: the names are those of the settings."""

    n_layer: int
    n_embd: int
    n_head: int

    @property
    def num_weights(self) -> int:
        """The weights of the blocks' matrices, approximately."""
        return 12 * self.n_layer * self.n_embd**2


class SizeEstimate(NamedTuple):
    """A size, and how many optimizer steps of it fit into the time."""

    size: Size
    steps: int
    loss: float  # predicted, in nats per character


SIZES = (
    Size(2, 64, 2),
    Size(3, 128, 4),
    Size(4, 160, 5),
    Size(6, 192, 6),
    Size(6, 256, 8),
    Size(6, 384, 12),
    Size(8, 512, 16),
    Size(12, 768, 24),
)
# loss = FLOOR + WEIGHTS_FACTOR / weights^WEIGHTS_POWER + TOKENS_FACTOR / tokens^TOKENS_POWER, in
# nats per character of Shakespeare's plays. Other texts have other losses.
FLOOR = 1.35
WEIGHTS_FACTOR, WEIGHTS_POWER = 2030.0, 0.75
TOKENS_FACTOR, TOKENS_POWER = 3055.0, 0.70
MIN_GAIN = 0.01  # nats: a smaller gain is not suggested
# Each further epoch adds fewer effective tokens; all of them together as many as this many epochs
# (Muennighoff et al.). The law has no term for overfitting.
USEFUL_REPEATS = 15.0


def predict_loss(num_weights: int, tokens: float, text_tokens: int) -> float:
    """Predict the validation loss after training on `tokens` of a text of `text_tokens`."""
    repeats = max(0.0, tokens / text_tokens - 1)
    effective = min(tokens, text_tokens)
    effective += text_tokens * USEFUL_REPEATS * -math.expm1(-repeats / USEFUL_REPEATS)
    by_weights = WEIGHTS_FACTOR / num_weights**WEIGHTS_POWER
    return FLOOR + by_weights + TOKENS_FACTOR / effective**TOKENS_POWER


def choose_size(
    count_steps: Callable[[Size], int],
    tokens_per_step: int,
    text_tokens: int,
    sizes: Iterable[Size],
) -> SizeEstimate:
    """Return the size with the lowest predicted loss.

    `sizes` begin with the smallest. `count_steps(size)` returns how many steps fit into the time, 0
    if the model does not fit into memory. Sizes are tried until a larger one is predicted to be
    worse.
    """
    best: SizeEstimate | None = None
    for size in sizes:
        steps = count_steps(size)
        tokens = max(1, steps) * tokens_per_step
        estimate = SizeEstimate(size, steps, predict_loss(size.num_weights, tokens, text_tokens))
        if best is not None and (steps == 0 or estimate.loss >= best.loss):
            break
        best = estimate
    return best
