"""Time of `train.py` to a validation loss: the whole process, from a cold start to its end.

    python -m benchmarks.time_to_loss --data tinyshakespeare.txt --target 1.898 --seeds 3
    python -m benchmarks.time_to_loss --data tinyshakespeare.txt --target 1.55 \
        --config configs/presets/laptop_cpu.yaml --record "what changed"

The loss is measured once, at the end of the schedule, over the whole validation split. The exit
status is 1 if the median over the seeds is above the target. `--record` adds a row for the current
commit to docs/LEADERBOARD.md: commit first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks import CHECKOUT, get_commit
from utils.device import get_processor_name

PRESETS = CHECKOUT / "configs" / "presets"
LEADERBOARD = CHECKOUT / "docs" / "LEADERBOARD.md"
FIRST_SEED = 101  # the presets were tuned with other seeds
# One evaluation, of the whole split, at the end.
EVALUATION = ("--eval-interval", "0", "--eval-iters", "0", "--early-stopping-patience", "0")


@dataclass(frozen=True)
class Result:
    """One process: its seconds from start to exit, its loss, and its settings."""

    seed: int
    seconds: float
    steps: int
    tokens: int
    loss: float
    precision: str
    torch_compile: str
    threads: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run each seed, print its result, and record the medians if requested."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="Tiny Shakespeare, see docs/benchmarks.md"
    )
    parser.add_argument("--target", type=float, default=1.898, metavar="LOSS", help="[1.898]")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many [1]")
    parser.add_argument(
        "--config", default=str(PRESETS / "cpu_seconds.yaml"), metavar="FILE", help="the settings"
    )
    parser.add_argument("--record", metavar="CHANGE", help="add a row, with what changed")
    parser.add_argument("flags", nargs="*", help="after --: further flags of train.py")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    if arguments.record and get_commit().endswith("-dirty"):
        parser.error("--record needs a clean checkout, so that the row can be reproduced")
    results = []
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        results.append(time_training(arguments.data, arguments.config, seed, arguments.flags))
        print(format_result(results[-1]), flush=True)
    seconds = statistics.median(result.seconds for result in results)
    loss = statistics.median(result.loss for result in results)
    print(f"median: {seconds:.1f} seconds, val loss {loss:.4f} (target {arguments.target:g})")
    if loss > arguments.target:
        print("the target was not reached")
        return 1
    if arguments.record:
        recipe = " ".join((Path(arguments.config).stem, *arguments.flags))
        add_row(LEADERBOARD, recipe, arguments.record, results)
    return 0


def time_training(data: str, config: str, seed: int, flags: Sequence[str]) -> Result:
    """Train in a separate process and a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(CHECKOUT / "train.py"), "--config", config, "--data", data]
        command += ["--seed", str(seed), "--runs-dir", directory, *EVALUATION, *flags]
        # A cold start, without code compiled earlier.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(directory) / ".inductor")}
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            sys.exit(f"train.py ended with status {done.returncode}:\n{done.stderr}")
        (run,) = Path(directory).glob("[0-9]*")
        result = json.loads((run / "meta" / "result.json").read_text(encoding="utf-8"))
        record = json.loads((run / "meta" / "full_config.json").read_text(encoding="utf-8"))
    settings = record["config"]
    return Result(
        seed=seed,
        seconds=seconds,
        steps=result["step"],
        tokens=result["step"] * settings["batch_size"] * settings["block_size"],
        loss=result["val_loss"],
        precision=record["run"]["precision"],
        torch_compile=record["run"]["torch_compile"],
        threads=record["run"]["threads"],
    )


def format_result(result: Result) -> str:
    """Return one line about one process."""
    return (
        f"seed {result.seed}: {result.seconds:.1f} seconds, {result.steps:,} steps, "
        f"{result.tokens:,} tokens, val loss {result.loss:.4f} "
        f"({result.precision}, torch.compile {result.torch_compile})"
    )


def add_row(leaderboard: Path, recipe: str, change: str, results: Sequence[Result]) -> None:
    """Add the medians and ranges as the last row of the leaderboard's table."""
    seconds = sorted(result.seconds for result in results)
    losses = sorted(result.loss for result in results)
    cells = (
        f"{statistics.median(seconds):.1f} s ({seconds[0]:.1f} to {seconds[-1]:.1f})",
        f"{statistics.median(losses):.4f} ({losses[0]:.4f} to {losses[-1]:.4f})",
        f"`{recipe}`",
        change,
        str(date.today()),
        f"`{get_commit()}`",
        f"{get_processor_name()}, {results[0].threads} threads, {results[0].precision}",
    )
    with open(leaderboard, "a", encoding="utf-8") as file:
        file.write(f"| {' | '.join(cells)} |\n")


if __name__ == "__main__":
    sys.exit(main())
