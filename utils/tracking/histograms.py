"""How the values of a tensor are distributed: counted once, by torch, for every tracker."""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 64  # Aim takes 512 at most; TensorBoard draws 30


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of one width between `low` and `high`.

    Values that are not finite are in no bin; `nonfinite` counts them. `sum` and `sum_squares` are
    those of the finite values.
    """

    low: float
    high: float
    counts: list[int]
    sum: float
    sum_squares: float
    nonfinite: int

    @classmethod
    def from_tensor(cls, tensor: Tensor, bins: int = BINS) -> "Histogram":
        """The histogram of a tensor of any shape and floating type, counted where it lies."""
        values = tensor.detach().flatten().float()
        low, high = _range(values)
        nonfinite = 0
        if not _is_finite(low, high):
            finite = values[values.isfinite()]
            nonfinite = values.numel() - finite.numel()
            # A range beyond float32's cannot be divided into bins.
            values = finite.clamp(-1e38, 1e38)
            low, high = _range(values) if values.numel() else (0.0, 0.0)
        if low == high:  # a width, which torch would choose as 2
            margin = abs(low) * 1e-3 or 1e-3
            low, high = low - margin, high + margin
        # In pieces: histc counts in float32, which stops at 2^24.
        counts = sum(torch.histc(piece, bins, low, high).long() for piece in values.split(1 << 24))
        # In float64: float32 overflows when it squares 1e20. MPS has none of it.
        wide = values if values.device.type == "mps" else values.double()
        return cls(
            low,
            high,
            counts.tolist(),
            wide.sum().item(),
            wide.square().sum().item(),
            nonfinite,
        )

    @property
    def num(self) -> int:
        """How many values were counted."""
        return sum(self.counts)


def _range(values: Tensor) -> tuple[float, float]:
    """The least and the greatest value; NaN where there is one."""
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high


def _is_finite(low: float, high: float) -> bool:
    return low > -1e38 and high < 1e38  # false for NaN too
