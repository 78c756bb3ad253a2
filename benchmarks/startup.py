"""How soon a command answers: `--help`, and a mistake."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
REPEATS = 7


def run(data: str | None) -> None:
    for flags in (["--help"], ["--no-such-flag"], ["--config", "none.yaml"]):
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            subprocess.run([sys.executable, TRAIN, *flags], capture_output=True, check=False)
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        print(f"  train.py {flags[-1]:<15} {median:.2f} s, at most {max(seconds):.2f} s")
