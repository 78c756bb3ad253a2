"""Evaluation, for training and evaluate.py: the mode of a model, and the size of a batch."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

# Elements of the largest tensor in an evaluation, approximately. A CPU is fastest within its cache.
MAX_ELEMENTS, MAX_ELEMENTS_CPU = 1 << 22, 1 << 18


def count_parallel_windows(model: nn.Module) -> int:
    """Return how many windows to evaluate in one batch, or 0; the number affects rounding only."""
    weight = model.token_embedding.weight  # (V, C)
    elements = MAX_ELEMENTS_CPU if weight.device.type == "cpu" else MAX_ELEMENTS
    return elements // (model.block_size * max(weight.shape))


@contextlib.contextmanager
def enter_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Disable gradients and dropout, and restore the model's mode at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
