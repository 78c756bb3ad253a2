"""Isolate a run from failures of its trackers and callbacks."""

import contextlib
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

from utils.errors import Aborted, format_reason

_Member = TypeVar("_Member")
_Result = TypeVar("_Result")


class Isolated(Generic[_Member]):
    """Trackers or callbacks: one that raises is removed with one warning; the others continue.

    Args:
        warn: receives the warning, one line, and the traceback.
        discard: is called with one that was removed during the run, its errors ignored.
    """

    def __init__(
        self,
        warn: Callable[[str, str], None],
        discard: Callable[[_Member], object] = lambda member: None,
    ):
        self._warn = warn
        self._discard = discard
        self._members: dict[str, _Member] = {}

    def add(self, name: str, make: Callable[[], _Member]) -> None:
        """Add the result of `make()`, or warn that `name` failed."""
        try:
            self._members[name] = make()
        except Exception as error:
            self._warn_of(name, error)

    def call_each(self, call: Callable[[_Member], _Result]) -> list[_Result]:
        """Call `call` with each member, in order, and return the results."""
        results = []
        for name, member in list(self._members.items()):
            try:
                results.append(call(member))
            except (Exception, SystemExit) as error:
                del self._members[name]
                self._warn_of(name, error)
                with contextlib.suppress(Exception):
                    self._discard(member)
        return results

    def close_each(self, call: Callable[[_Member], object]) -> None:
        """Remove each member and call `call` with it, once even if this is interrupted."""
        while self._members:
            name = next(iter(self._members))
            member = self._members.pop(name)
            try:
                call(member)
            except (Exception, SystemExit) as error:
                self._warn_of(name, error)

    def _warn_of(self, name: str, error: BaseException) -> None:
        if isinstance(error, Aborted):
            raise error
        self._warn(
            f"{name} failed and is left out from here on: {format_reason(error)}",
            "".join(traceback.format_exception(error)),
        )
