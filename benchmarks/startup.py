"""Start-up time of a command: `--help` and two mistakes."""

import statistics
import subprocess
import sys
import time

from benchmarks import CHECKOUT

REPEATS = 7


def run(data: str | None) -> None:
    for flags in (["--help"], ["--no-such-flag"], ["--config", "none.yaml"]):
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, CHECKOUT / "train.py", *flags], capture_output=True, check=False
            )
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        print(f"  train.py {flags[-1]:<15} {median:.2f} s, at most {max(seconds):.2f} s")
