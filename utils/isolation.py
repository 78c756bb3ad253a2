"""Helpers of a run that may fail without hurting it."""

import contextlib
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

_Helper = TypeVar("_Helper")
_Result = TypeVar("_Result")


class Isolated(Generic[_Helper]):
    """Trackers or callbacks: one that raises is dropped, with one warning, and the others go on.

    Args:
        warn: takes the warning, one line, and the traceback, for the record.
        discard: is tried on a helper that is dropped.
    """

    def __init__(
        self,
        warn: Callable[[str, str], None],
        discard: Callable[[_Helper], object] = lambda helper: None,
    ):
        self._warn = warn
        self._discard = discard
        self._helpers: dict[str, _Helper] = {}

    def add(self, name: str, make: Callable[[], _Helper]) -> None:
        """Add what `make` returns, under the name that a warning would give it."""
        try:
            self._helpers[name] = make()
        except Exception as error:
            self._leave_out(name, error)

    def each(self, call: Callable[[_Helper], _Result]) -> list[_Result]:
        """Call every helper that is left, in order, and return what they answered."""
        answers = []
        for name, helper in list(self._helpers.items()):
            try:
                answers.append(call(helper))
            except Exception as error:
                del self._helpers[name]
                self._leave_out(name, error)
                with contextlib.suppress(Exception):
                    self._discard(helper)
        return answers

    def clear(self) -> None:
        """Let go of all helpers."""
        self._helpers.clear()

    def _leave_out(self, name: str, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        self._warn(
            f"{name} failed and is left out from here on: {reason}",
            "".join(traceback.format_exception(error)),
        )
