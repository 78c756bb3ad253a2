"""Where a run's numbers go: one small interface, and trackers behind it."""

from collections.abc import Callable, Mapping
from typing import Protocol


class Tracker(Protocol):
    """Takes the scalars of a run, step after step, and text now and then."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record named scalars at `step`."""

    def log_text(self, step: int, name: str, text: str) -> None:
        """Record a text, such as a sample, at `step`."""

    def flush(self) -> None:
        """Make what was recorded readable by others."""

    def close(self) -> None:
        """Flush and let go. Called once, however the run ends."""


class CompositeTracker:
    """Passes everything on to several trackers, and never lets one of them hurt the run.

    A tracker that raises is dropped: one warning, and the others go on.

    Args:
        makers: what makes each tracker, under the name that warnings give it.
        warn: what a warning is handed to.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]], warn: Callable[[str], None]):
        self._warn = warn
        self._trackers: dict[str, Tracker] = {}
        for name, make in makers.items():
            try:
                self._trackers[name] = make()
            except Exception as error:
                self._leave_out(name, error)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record named scalars at `step` in every tracker."""
        self._each(lambda tracker: tracker.log(step, scalars))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Record a text at `step` in every tracker."""
        self._each(lambda tracker: tracker.log_text(step, name, text))

    def flush(self) -> None:
        """Flush every tracker."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._trackers[name]
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        self._warn(f"{name} failed and is left out from here on: {reason}")
