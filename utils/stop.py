"""Stopping a run from outside, between two steps."""

import signal
import threading
from types import FrameType

from utils.errors import Aborted


class StopRequest:
    """Within the block, Ctrl-C and SIGTERM ask the run to stop; the second time they abort it.

    `requested` turns true at the first; the loop looks at it after each step. Outside the main
    thread, where Python lets nobody handle signals, nothing changes.

    Args:
        is_one_of_several: whether torchrun has started this process. It passes each signal on to
            all, who may have had it from the terminal already, so a second one does not abort. And
            it sends SIGTERM to those that are left as soon as one has ended, so that goes on being
            unheard after the block: a process may say how the run ended.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, is_one_of_several: bool = False) -> None:
        self._is_one_of_several = is_one_of_several
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._handle) for number in self.SIGNALS
            }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            if not (number == signal.SIGTERM and self._is_one_of_several):
                signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self._signal is not None

    @property
    def signal(self) -> int:
        """The signal that asked for it, or 0."""
        return self._signal or 0

    def request(self, number: int) -> None:
        """Ask as the signal of that number does."""
        self._signal = self._signal or number

    @property
    def exit_status(self) -> int:
        """0, or as a shell counts it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 0 if self._signal is None else 128 + self._signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested or self._is_one_of_several:
            self.request(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Aborted(128 + number)
