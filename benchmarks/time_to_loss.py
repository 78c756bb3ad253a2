"""How long `train.py` takes to a val loss: the whole process, from a cold start to its end.

    python -m benchmarks.time_to_loss --data tinyshakespeare.txt --target 1.898 --seeds 3
    python -m benchmarks.time_to_loss --data tinyshakespeare.txt --target 1.55 \
        --config configs/presets/laptop_cpu.yaml --record "what changed"

The loss is measured once, at the end of the schedule, over the whole validation split. The exit
status is 1 if the median of the seeds is above the target. `--record` adds a line to
docs/LEADERBOARD.md, which belongs to the commit that it measures: commit first.
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

from benchmarks import current_commit
from utils.device import get_processor_name

CHECKOUT = Path(__file__).resolve().parent.parent
PRESETS = CHECKOUT / "configs" / "presets"
LEADERBOARD = CHECKOUT / "docs" / "LEADERBOARD.md"
FIRST_SEED = 101  # the presets were chosen by other seeds
# One evaluation, of the whole split, at the end; nothing else may stop the clock.
MEASURED = ("--eval-interval", "0", "--eval-iters", "0", "--early-stopping-patience", "0")


@dataclass(frozen=True)
class Attempt:
    """One process: its seconds from start to exit, what it did, and the loss it reached."""

    seed: int
    seconds: float
    steps: int
    tokens: int
    loss: float
    precision: str
    torch_compile: str
    threads: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run each seed, print what it took, and record the median if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="Tiny Shakespeare")
    parser.add_argument("--target", type=float, default=1.898, metavar="LOSS", help="[1.898]")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many [1]")
    parser.add_argument(
        "--config", default=str(PRESETS / "cpu_seconds.yaml"), metavar="FILE", help="the recipe"
    )
    parser.add_argument("--record", metavar="WHAT", help="add a line, with what changed")
    parser.add_argument("flags", nargs="*", help="after --: further flags of train.py")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    if arguments.record and current_commit().endswith("-dirty"):
        parser.error("--record is for what is committed, so that a row can be made again")
    attempts = []
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        attempts.append(attempt(arguments.data, arguments.config, seed, arguments.flags))
        print(described(attempts[-1]), flush=True)
    seconds = statistics.median(a.seconds for a in attempts)
    loss = statistics.median(a.loss for a in attempts)
    print(f"median: {seconds:.1f} seconds, val loss {loss:.4f} (target {arguments.target:g})")
    if loss > arguments.target:
        print("the target was not reached")
        return 1
    if arguments.record:
        record(LEADERBOARD, Path(arguments.config).stem, arguments.record, attempts)
    return 0


def attempt(data: str, config: str, seed: int, flags: Sequence[str]) -> Attempt:
    """Train in a process of its own, in a directory that is thrown away."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(CHECKOUT / "train.py"), "--config", config, "--data", data]
        command += ["--seed", str(seed), "--runs-dir", directory, *MEASURED, *flags]
        # A cold start: nothing that was compiled before may help.
        cold = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(directory) / ".inductor")}
        began = time.perf_counter()
        done = subprocess.run(command, env=cold, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode != 0:
            sys.exit(f"train.py ended with status {done.returncode}:\n{done.stderr}")
        (run,) = Path(directory).glob("[0-9]*")
        result = json.loads((run / "meta" / "result.json").read_text(encoding="utf-8"))
        record = json.loads((run / "meta" / "full_config.json").read_text(encoding="utf-8"))
    settings = record["config"]
    return Attempt(
        seed=seed,
        seconds=seconds,
        steps=result["step"],
        tokens=result["step"] * settings["batch_size"] * settings["block_size"],
        loss=result["val_loss"],
        precision=record["run"]["precision"],
        torch_compile=record["run"]["torch_compile"],
        threads=record["run"]["threads"],
    )


def described(attempt: Attempt) -> str:
    """One line about one process."""
    return (
        f"seed {attempt.seed}: {attempt.seconds:.1f} seconds, {attempt.steps:,} steps, "
        f"{attempt.tokens:,} tokens, val loss {attempt.loss:.4f} "
        f"({attempt.precision}, torch.compile {attempt.torch_compile})"
    )


def record(leaderboard: Path, recipe: str, what: str, attempts: Sequence[Attempt]) -> None:
    """Add the medians, with the spread, as a row at the end of the leaderboard's table."""
    seconds = sorted(a.seconds for a in attempts)
    losses = sorted(a.loss for a in attempts)
    cells = (
        f"{statistics.median(seconds):.1f} s ({seconds[0]:.1f} to {seconds[-1]:.1f})",
        f"{statistics.median(losses):.4f} ({losses[0]:.4f} to {losses[-1]:.4f})",
        f"`{recipe}`",
        what,
        str(date.today()),
        f"`{current_commit()}`",
        f"{get_processor_name()}, {attempts[0].threads} threads, {attempts[0].precision}",
    )
    with open(leaderboard, "a", encoding="utf-8") as file:
        file.write(f"| {' | '.join(cells)} |\n")


if __name__ == "__main__":
    sys.exit(main())
