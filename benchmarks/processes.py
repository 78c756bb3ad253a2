"""Weak scaling: the time of a step for twice the text on two processes, one thread each.

Alternate: one process with a batch; two independent ones, which measures the machine itself; and
two that share a batch of twice the size, by DDP and by FSDP2.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import CHECKOUT
from bundle import list_runs

TRAIN = str(CHECKOUT / "train.py")
TURNS = 3
STEPS, INTERVAL = 120, 20  # the first interval is warmup
BATCH = 8  # sequences per process
ALONE = [sys.executable, TRAIN, f"--batch-size={BATCH}"]


def run(data: str | None) -> None:
    seconds: dict[str, list[float]] = {"one": [], "two": [], "ddp": [], "fsdp": []}
    for _ in range(TURNS):
        seconds["one"] += measure_steps(data, [ALONE])
        seconds["two"] += measure_steps(data, [ALONE, ALONE])
        for parallel in ("ddp", "fsdp"):
            seconds[parallel] += measure_steps(data, [_build_torchrun_command(parallel)])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"  one process: {median['one'] * 1e3:.1f} ms a step of {BATCH} sequences")
    for name, label in (
        ("two", "two independent processes"),
        ("ddp", f"two processes sharing {2 * BATCH} sequences, ddp"),
        ("fsdp", f"two processes sharing {2 * BATCH} sequences, fsdp"),
    ):
        efficiency = median["one"] / median[name]
        print(f"  {label}: {median[name] * 1e3:.1f} ms a step, {efficiency:.1%} of twice the speed")


def _build_torchrun_command(parallel: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = [f"--batch-size={2 * BATCH}", f"--parallel={parallel}"]
    return [*torchrun, "--nproc-per-node=2", TRAIN, *flags]


def measure_steps(data: str | None, commands: list[list[str]]) -> list[float]:
    """Run commands side by side; return the seconds of a step, one value per interval."""
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
            for second in _read_seconds(list_runs(Path(directory) / str(index))[0])
        ]


def _read_seconds(run_dir: Path) -> list[float]:
    lines = (run_dir / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = {row["step"]: row["seconds"] for row in map(json.loads, lines) if "loss/train" in row}
    return [
        (times[step + INTERVAL - 1] - times[step]) / (INTERVAL - 1)
        for step in range(INTERVAL + 1, STEPS, INTERVAL)
    ]
