"""Isolate a run from failures of its trackers and callbacks."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
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
        with self._warn_on_failure(name):
            self._members[name] = make()

    def call_each(self, call: Callable[[_Member], _Result]) -> list[_Result]:
        """Call `call` with each member, in order, and return the results."""
        results = []
        for name, member in list(self._members.items()):
            with self._warn_on_failure(name):
                results.append(call(member))
                continue
            del self._members[name]
            with contextlib.suppress(Exception):
                self._discard(member)
        return results

    def close_each(self, call: Callable[[_Member], object]) -> None:
        """Remove each member and call `call` with it, once even if this is interrupted."""
        while self._members:
            with self._warn_on_failure(name := next(iter(self._members))):
                call(self._members.pop(name))

    @contextlib.contextmanager
    def _warn_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Aborted:
            raise
        except (Exception, SystemExit) as error:
            message = f"{name} failed and is left out from here on: {format_reason(error)}"
            self._warn(message, traceback.format_exc())
