"""Trackers: one small interface to TensorBoard and Aim."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from utils.isolation import Isolated

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


def _forward(method: str) -> Callable[..., None]:
    def call(self: "CompositeTracker", *arguments: Any) -> None:
        self._trackers.call_each(lambda tracker: getattr(tracker, method)(*arguments))

    return call


class CompositeTracker:
    """Pass every call on to several trackers; one that raises is dropped with one warning.

    `factories` create the trackers; `warn` is called with a warning and its traceback.
    """

    def __init__(
        self, factories: Mapping[str, Callable[[], Tracker]], warn: Callable[[str, str], None]
    ):
        self._trackers: Isolated[Tracker] = Isolated(warn, discard=lambda tracker: tracker.close())
        for name, create in factories.items():
            self._trackers.add(name, create)

    log_config = _forward("log_config")
    log_metrics = _forward("log_metrics")
    log_histograms = _forward("log_histograms")
    log_text = _forward("log_text")
    flush = _forward("flush")

    def close(self) -> None:
        """Close every tracker."""
        self._trackers.close_each(lambda tracker: tracker.close())
