"""Histograms of tensors, counted once by torch for all trackers."""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 64  # Aim takes at most 512; TensorBoard draws 30
MAX_ABS = 1e38  # torch cannot divide a range beyond float32's into bins


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's finite values in equal bins between `low` and `high`."""

    low: float
    high: float
    counts: list[int]
    sum: float
    sum_squares: float
    nonfinite: int  # NaN and infinite values

    @classmethod
    def from_tensor(cls, tensor: Tensor, bins: int = BINS) -> "Histogram":
        """Count a tensor of any shape and floating dtype, on its device."""
        values = tensor.detach().flatten().float()
        low, high = _compute_range(values)
        nonfinite = 0
        if not (low > -MAX_ABS and high < MAX_ABS):  # also if NaN
            finite = values[values.isfinite()]
            nonfinite = values.numel() - finite.numel()
            values = finite.clamp(-MAX_ABS, MAX_ABS)
            low, high = _compute_range(values) if values.numel() else (0.0, 0.0)
        if low == high:  # torch would choose a width of 2
            margin = abs(low) * 1e-3 or 1e-3
            low, high = low - margin, high + margin
        # In chunks, as histc counts in float32, which stops at 2^24.
        counts = sum(torch.histc(chunk, bins, low, high).long() for chunk in values.split(1 << 24))
        # In float64, as the square of 1e20 overflows float32. MPS has no float64.
        wide = values if values.device.type == "mps" else values.double()
        total, squares = wide.sum().item(), wide.square().sum().item()
        return cls(low, high, counts.tolist(), total, squares, nonfinite)


def _compute_range(values: Tensor) -> tuple[float, float]:
    """Return the minimum and the maximum, or NaN if any value is NaN."""
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high
