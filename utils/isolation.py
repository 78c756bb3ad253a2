"""What watches a run, and may fail without hurting it."""

import contextlib
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

from utils.errors import Aborted, format_reason

_Watcher = TypeVar("_Watcher")
_Answer = TypeVar("_Answer")


class Isolated(Generic[_Watcher]):
    """Trackers or callbacks: one that raises is dropped, with one warning, and the others go on.

    Args:
        warn: takes the warning, one line, and the traceback, for the record.
        discard: is tried on one that is dropped while the run goes on.
    """

    def __init__(
        self,
        warn: Callable[[str, str], None],
        discard: Callable[[_Watcher], object] = lambda watcher: None,
    ):
        self._warn = warn
        self._discard = discard
        self._watchers: dict[str, _Watcher] = {}

    def add(self, name: str, make: Callable[[], _Watcher]) -> None:
        """Add what `make` returns, under the name that a warning would give it."""
        try:
            self._watchers[name] = make()
        except Exception as error:
            self._tell(name, error)

    def call_each(self, call: Callable[[_Watcher], _Answer]) -> list[_Answer]:
        """Call each that is left, in order, and return what they answered."""
        answers = []
        for name, watcher in list(self._watchers.items()):
            try:
                answers.append(call(watcher))
            except (Exception, SystemExit) as error:
                del self._watchers[name]
                self._tell(name, error)
                with contextlib.suppress(Exception):
                    self._discard(watcher)
        return answers

    def close_each(self, call: Callable[[_Watcher], object]) -> None:
        """Call each that is left for the last time, and let go of it."""
        while self._watchers:
            name = next(iter(self._watchers))
            watcher = self._watchers.pop(name)  # first: whatever interrupts, it is not called again
            try:
                call(watcher)
            except (Exception, SystemExit) as error:
                self._tell(name, error)

    def _tell(self, name: str, error: BaseException) -> None:
        if isinstance(error, Aborted):
            raise error
        self._warn(
            f"{name} failed and is left out from here on: {format_reason(error)}",
            "".join(traceback.format_exception(error)),
        )
