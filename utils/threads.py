"""The CPU threads of a run beside other programs: bind each thread to a core while they compete.

OpenMP's threads spin while they wait for each other at the end of each parallel loop. If another
program takes a core, the scheduler soon runs two of them on one core in turns, and every loop waits
for a time slice: steps take four times as long, or more. Bound to a core each, the threads lose
only what the other program takes, a factor of two. Results do not change.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

# If the user has set one of these, threads stay where OpenMP puts them.
OPENMP_PLACES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
INTERVAL = 1.0  # seconds between two measurements
COMPETING = 0.2  # share of the time that a thread waits for a core; alone it is 0.00 to 0.02
ALONE = 0.02
THREADS = Path("/proc/self/task")


def read_threads() -> dict[int, tuple[float, float]]:
    """Return, by thread id, the seconds that each thread has run and has waited for a core.

    From Linux's `/proc` (`schedstat`); empty on other systems.
    """
    times = {}
    with contextlib.suppress(OSError, ValueError):
        for thread in THREADS.iterdir():
            with contextlib.suppress(FileNotFoundError):  # the thread has just ended
                ran, waited, _ = (thread / "schedstat").read_text(encoding="ascii").split()
                times[int(thread.name)] = (int(ran) / 1e9, int(waited) / 1e9)
    return times


class CoreBinding:
    """Bind threads to a core each while they compete with another program for the cores.

    A context manager: on exit the threads are free again. `update` is called after each step.
    Threads are bound only if there are as many as cores, so that there is no core to choose, which
    the scheduler does better.

    Args:
        num_threads: the threads that compute. 0: do nothing.
        on_progress: called with a line when threads first have to wait.
    """

    def __init__(self, num_threads: int, on_progress: Callable[[str], None]):
        self._num_threads, self._on_progress = num_threads, on_progress
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        can_bind = 1 < num_threads == len(self._cores)
        self._may_bind = can_bind and not any(name in os.environ for name in OPENMP_PLACES)
        self._bound: list[int] = []  # thread ids
        self._is_noted = False
        self._before, self._time = read_threads(), time.monotonic()

    def __enter__(self) -> "CoreBinding":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._release()

    def update(self) -> None:
        """Bind the threads if they have waited for cores since the last call, or release them."""
        seconds = time.monotonic() - self._time
        if not self._num_threads or not self._before or seconds < INTERVAL:
            return
        if not (now := read_threads()):
            return
        since = {thread: self._before.get(thread, (0.0, 0.0)) for thread in now}
        waiting = max(now[thread][1] - since[thread][1] for thread in now) / seconds
        busiest = sorted(now, key=lambda thread: since[thread][0] - now[thread][0])
        self._before, self._time = now, time.monotonic()
        if waiting > COMPETING:
            if self._may_bind and not self._bound:
                self._bind(busiest[: self._num_threads])
            if not self._is_noted:
                self._is_noted = True
                self._on_progress(self._describe(waiting))
        elif waiting < ALONE:
            self._release()

    def _bind(self, threads: list[int]) -> None:
        for thread, core in zip(threads, self._cores, strict=False):
            with contextlib.suppress(OSError):  # the thread has ended, or the system forbids it
                os.sched_setaffinity(thread, {core})
                self._bound.append(thread)

    def _release(self) -> None:
        # Threads that were started meanwhile have inherited the core of the thread that did.
        for thread in {*self._bound, *read_threads()} if self._bound else ():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, self._cores)
        self._bound = []

    def _describe(self, waiting: float) -> str:
        if self._cores and self._num_threads > len(self._cores):
            cores = len(self._cores)
            return f"Note: {self._num_threads} threads compete for {cores} cores: lower num_threads"
        line = "Note: another program is using the processor: "
        line += f"a thread waits {waiting:.0%} of the time"
        if self._bound:
            return f"{line}, so each is now bound to a core, which does not change results"
        if self._num_threads > 1:
            return f"{line}; fewer threads than {self._num_threads} (--num-threads) may wait less"
        return line
