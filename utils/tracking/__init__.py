"""Trackers: one small interface to TensorBoard and Aim."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # needs torch, and report.py reads utils.tracking.metrics without it
    from utils.tracking.histograms import Histogram


class Tracker(Protocol):
    """Record a run's numbers, whose names `utils/tracking/metrics.py` declares, and its texts."""

    def log_config(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Record the settings, and the run's origin (git, lineage, sources). Called once."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, subset: str) -> None:
        """Record numbers of `subset`, train or val, after `step`. They may be NaN or infinite."""

    def log_histograms(self, histograms: "Mapping[str, Histogram]", step: int) -> None:
        """Record histograms of named tensors after `step`."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Record a text, such as a sample, after `step`."""

    def flush(self) -> None:
        """Make the recorded data visible to readers."""

    def close(self) -> None:
        """Flush and release everything. Called once, however the run ends."""
