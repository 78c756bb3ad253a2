"""Evaluation: the loss of a batch, for training and evaluate.py, and of each token of a text."""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.device import autocast

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


def compute_loss(
    model: nn.Module, inputs: Tensor, targets: Tensor, precision: str = "fp32", *, mean: bool = True
) -> Tensor:
    """Compute the cross-entropy in nats of `targets` given `inputs`, both `(B, T)` int64.

    Returns the mean, a scalar on the model's device, or with `mean=False` each token's, `(B, T)`.
    """
    device = model.token_embedding.weight.device
    inputs, targets = inputs.to(device), targets.to(device)
    with autocast(device, precision):
        if mean:
            return model(inputs, targets)[1]
        logits = model(inputs)[0].float()  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def find_window_starts(num_tokens: int, block_size: int, stride: int) -> np.ndarray:
    """Return the first token of each window, `(W,)` int64, so that the last reaches the end."""
    inputs = num_tokens - 1  # the last token is a target only
    further = max(0, math.ceil((inputs - block_size) / stride))
    return np.arange(1 + further) * stride


def compute_token_losses(
    model: nn.Module,
    tokens: np.ndarray,
    stride: int,
    on_progress: Callable[[int], None] = lambda num_windows: None,
) -> np.ndarray:
    """Compute the loss of each of `tokens`, `(N,)`, but the first: `(N - 1,)` float32, in nats.

    N is at least 2, and `stride` from 1 to the model's `block_size`. `on_progress` is called with
    the number of windows done.
    """
    T, rows = model.block_size, max(1, count_parallel_windows(model))
    losses = np.empty(tokens.size - 1, dtype=np.float32)
    starts = find_window_starts(tokens.size, T, stride)
    full = starts[starts + T < tokens.size]  # windows with T targets; the last may have fewer
    batches = [full[first : first + rows] for first in range(0, full.size, rows)]
    if full.size < starts.size:
        batches.append(starts[-1:])
    done = 0
    with enter_evaluation_mode(model):
        for batch in batches:
            length = min(T, tokens.size - 1 - int(batch[-1]))
            windows = tokens[batch[:, None] + np.arange(length + 1)].astype(np.int64)
            windows = torch.from_numpy(windows)  # (B, length + 1)
            found = compute_loss(model, windows[:, :-1], windows[:, 1:], mean=False)
            for start, row in zip(batch, found.cpu().numpy(), strict=True):
                known = T - stride if start > 0 else 0  # predicted in the windows before
                losses[start + known : start + length] = row[known:]
            done += batch.size
            on_progress(done)
    return losses
