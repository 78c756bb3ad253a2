"""Where a run's numbers go: one small interface, and trackers behind it."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from utils.isolation import Isolated
from utils.tracking.histograms import Histogram


class Tracker(Protocol):
    """Takes what a run has to show. `utils/metrics.py` declares the names of the numbers."""

    def log_config(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Record the settings, and how the run came about: git, lineage, sources. Called once."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, subset: str) -> None:
        """Record numbers of `subset`, train or val, after `step`. They may be NaN or infinite."""

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Record how the values of named tensors are distributed after `step`."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Record a text, such as a sample, after `step`."""

    def flush(self) -> None:
        """Make what was recorded readable by others."""

    def close(self) -> None:
        """Flush and let go. Called once, however the run ends."""


class CompositeTracker:
    """Passes everything on to several trackers, and never lets one of them hurt the run.

    A tracker that raises is dropped: one warning, and the others go on.

    Args:
        makers: what makes each tracker, under the name that warnings give it.
        warn: what a warning and its traceback are handed to.
    """

    def __init__(
        self, makers: Mapping[str, Callable[[], Tracker]], warn: Callable[[str, str], None]
    ):
        self._trackers: Isolated[Tracker] = Isolated(warn, discard=lambda tracker: tracker.close())
        for name, make in makers.items():
            self._trackers.add(name, make)

    def log_config(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Record the settings and the run's origin in every tracker."""
        self._trackers.call_each(lambda tracker: tracker.log_config(config, metadata))

    def log_metrics(self, metrics: Mapping[str, float], step: int, subset: str) -> None:
        """Record numbers after `step` in every tracker."""
        self._trackers.call_each(lambda tracker: tracker.log_metrics(metrics, step, subset))

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Record distributions after `step` in every tracker."""
        self._trackers.call_each(lambda tracker: tracker.log_histograms(histograms, step))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Record a text after `step` in every tracker."""
        self._trackers.call_each(lambda tracker: tracker.log_text(name, text, step))

    def flush(self) -> None:
        """Flush every tracker."""
        self._trackers.call_each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Close every tracker."""
        self._trackers.close_each(lambda tracker: tracker.close())
