"""Stop a run between two steps on Ctrl-C, SIGTERM or SIGHUP."""

import signal
import threading
from types import FrameType

from utils.errors import Aborted


class StopRequest:
    """Within the block, the first Ctrl-C, SIGTERM or SIGHUP requests a stop and the second aborts.

    SIGHUP means that the terminal was closed. It never aborts, as the shell and the system may both
    send it, and stays ignored where `nohup` has set it so.

    The loop reads `requested` after each step. Outside the main thread, where Python allows no
    signal handlers, nothing changes.

    Args:
        is_one_of_several: whether torchrun started this process. torchrun forwards each signal to
            all processes, which may have it from the terminal already: a second one does not abort.
            It also sends SIGTERM to the remaining processes when one has ended, so SIGTERM stays
            handled after the block: a process can still print how the run ended.
    """

    HANGUP = getattr(signal, "SIGHUP", None)  # None on Windows
    SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))

    def __init__(self, *, is_one_of_several: bool = False) -> None:
        self._is_one_of_several = is_one_of_several
        self._previous: dict[int, object] = {}
        self.signal = 0  # that requested the stop

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if number != self.HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            if not (number == signal.SIGTERM and self._is_one_of_several):
                signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self.signal != 0

    @property
    def exit_status(self) -> int:
        """0, or as in a shell: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signal if self.requested else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested or self._is_one_of_several:
            self.signal = self.signal or number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif number != self.HANGUP:
            raise Aborted(128 + number)
