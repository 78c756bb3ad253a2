"""What a second process brings: twice the text in how much more time (weak scaling), on one thread.

In turns: one process with a batch; two that know nothing of each other, which is what the machine
itself loses; and two that share a batch twice as large, by DDP and by FSDP2.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bundle import list_runs

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
TURNS = 3
STEPS, INTERVAL = 120, 20  # the first interval warms up
BATCH = 8  # sequences for each process


def run(data: str | None) -> None:
    seconds: dict[str, list[float]] = {"one": [], "two apart": [], "ddp": [], "fsdp": []}
    for _ in range(TURNS):
        seconds["one"] += measured(data, [_alone()])
        seconds["two apart"] += measured(data, [_alone(), _alone()])
        for parallel in ("ddp", "fsdp"):
            seconds[parallel] += measured(data, [_together(parallel)])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"  one process: {median['one'] * 1e3:.1f} ms a step of {BATCH} sequences")
    for name, words in (
        ("two apart", "two processes apart"),
        ("ddp", f"two that share {2 * BATCH} sequences, ddp"),
        ("fsdp", f"two that share {2 * BATCH} sequences, fsdp"),
    ):
        efficiency = median["one"] / median[name]
        print(f"  {words}: {median[name] * 1e3:.1f} ms a step, {efficiency:.1%} of twice the speed")


def _alone() -> list[str]:
    return [sys.executable, str(TRAIN), f"--batch-size={BATCH}"]


def _together(parallel: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = [f"--batch-size={2 * BATCH}", f"--parallel={parallel}"]
    return [*torchrun, "--nproc-per-node=2", str(TRAIN), *flags]


def measured(data: str | None, commands: list[list[str]]) -> list[float]:
    """The seconds of a step, a figure an interval, of commands that run side by side."""
    flags = f"--max-iters={STEPS} --log-interval={INTERVAL} --eval-interval=0 --eval-iters=1"
    flags += " --checkpoint-interval=0 --histogram-interval=0 --num-threads=1 --torch-compile=off"
    text = [f"--data={data}"] if data else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            subprocess.Popen(
                [*command, *flags.split(), *text, f"--runs-dir={directory}/{index}"],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for index, command in enumerate(commands)
        ]
        assert [process.wait() for process in processes] == [0] * len(commands)
        return [
            second
            for index in range(len(commands))
            for second in _seconds(list_runs(Path(directory) / str(index))[0])
        ]


def _seconds(run_dir: Path) -> list[float]:
    lines = (run_dir / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = {row["step"]: row["seconds"] for row in map(json.loads, lines) if "loss/train" in row}
    return [
        (times[step + INTERVAL - 1] - times[step]) / (INTERVAL - 1)
        for step in range(INTERVAL + 1, STEPS, INTERVAL)
    ]
