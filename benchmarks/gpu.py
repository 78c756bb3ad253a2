"""Training and generation on a GPU: time to a validation loss, speed and peak memory.

    python -m benchmarks.gpu --data tinyshakespeare.txt
    python -m benchmarks.gpu --data tinyshakespeare.txt --presets workstation_gpu nanogpt_gpu \
        --repeat 3 --decode 0 -- --eval-iters 0

Each training is a process of its own, from a cold start; seconds count from its start. The loss is
that of the preset's evaluations, or over the whole split with `-- --eval-iters 0`. Prints one JSON
object per process.
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
from pathlib import Path

import torch

from benchmarks import CHECKOUT, get_commit
from callbacks import Callback, Evaluation, TrainResult
from parameters import ModelConfig
from utils.device import choose_device, describe_device, get_peak_memory

PRESETS = CHECKOUT / "configs" / "presets"
TARGET = 1.4697  # nanoGPT's published validation loss
FACTS = "recorded.json"


class Recorder(Callback):
    """Records the time of each evaluation and the peak memory, in the process that trains."""

    def __init__(self, config: ModelConfig):
        self.device = choose_device(config.device)
        self.evaluations: list[tuple[float, int, float]] = []  # (time, step, val loss)

    def after_evaluation(self, evaluation: Evaluation) -> None:  # noqa: D102
        self.evaluations.append((time.time(), evaluation.step, evaluation.val_loss))

    def at_end(self, result: TrainResult | None) -> None:  # noqa: D102
        if result is not None:
            facts = {"device": describe_device(self.device), "torch": torch.__version__}
            facts["peak_memory"] = get_peak_memory(self.device)
            facts["evaluations"] = self.evaluations
            (result.run_dir / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train each preset, generate with its model, and print the figures."""
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="Tiny Shakespeare, see docs/benchmarks.md"
    )
    parser.add_argument("--presets", nargs="+", default=["workstation_gpu"], metavar="NAME|FILE")
    parser.add_argument("--target", type=float, default=TARGET, metavar="LOSS", help=f"[{TARGET}]")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="seeds per preset [1]")
    parser.add_argument("--decode", type=int, default=2000, metavar="N", help="tokens; 0: none")
    parser.add_argument("flags", nargs="*", help="after --: further flags of train.py")
    arguments = parser.parse_args(argv)
    for preset in arguments.presets:
        for number in range(arguments.repeat):
            with tempfile.TemporaryDirectory() as directory:
                flags = ["--data", str(Path(arguments.data).resolve()), *arguments.flags]
                flags += ["--seed", str(1337 + number)] if number else []
                facts = time_training(preset, flags, arguments.target, Path(directory))
                print(json.dumps({"commit": get_commit(), "preset": preset, **facts}), flush=True)
                if arguments.decode and number == 0:
                    facts = time_generation(Path(directory), arguments.decode)
                    print(json.dumps({"preset": preset, **facts}), flush=True)
    return 0


def run_process(script: str, flags: Sequence[str], directory: Path) -> tuple[str, float, float]:
    """Run a command in `directory`; return its output, its start (Unix time) and its seconds."""
    # A cold start, without code compiled earlier.
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    environment = {**os.environ, **{name: str(directory / at) for name, at in caches.items()}}
    command = [sys.executable, str(CHECKOUT / script), *flags]
    options = {"cwd": directory, "env": environment, "capture_output": True, "text": True}
    start = time.time()
    done = subprocess.run(command, **options, check=False)
    seconds = time.time() - start
    if done.returncode != 0:
        sys.exit(f"{script} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout, start, seconds


def time_training(preset: str, flags: Sequence[str], target: float, directory: Path) -> dict:
    """Train in a separate process, and return its figures."""
    config = Path(preset) if preset.endswith(".yaml") else PRESETS / f"{preset}.yaml"
    flags = ["--config", str(config.resolve()), "--callback", "benchmarks.gpu:Recorder", *flags]
    _, start, seconds = run_process("train.py", flags, directory)
    (run,) = (directory / "runs").glob("[0-9]*")
    facts = json.loads((run / FACTS).read_text(encoding="utf-8"))
    record = json.loads((run / "meta" / "full_config.json").read_text(encoding="utf-8"))
    rows = map(json.loads, (run / "logs" / "metrics.jsonl").read_text("utf-8").splitlines())
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    speed = statistics.median(speeds[len(speeds) // 2 :])  # the steady state
    evaluations = facts.pop("evaluations")
    reached = [at - start for at, _, loss in evaluations if loss <= target]
    tokens = record["config"]["batch_size"] * record["config"]["block_size"]  # in a step
    return {
        **facts,
        **{name: record["run"][name] for name in ("precision", "torch_compile", "parameters")},
        "seconds": round(seconds, 2),
        "steps": len(speeds),
        f"seconds_to_{target:g}": round(reached[0], 2) if reached else None,
        "best_val_loss": round(min(loss for _, _, loss in evaluations), 4),
        "steps_per_second": round(speed / tokens, 2),
        "tokens_per_second": round(speed),
    }


def time_generation(directory: Path, tokens: int) -> dict:
    """Generate one text with the model in `directory`, and return its figures."""
    flags = ["--json", f"--max-new-tokens={tokens}", "--engine=torch"]  # auto may take the CPU
    out, _, seconds = run_process("inference.py", flags, directory)
    facts = {name: json.loads(out)[name] for name in ("engine", "tokens_per_second")}
    return {**facts, "seconds": round(seconds, 2)}


if __name__ == "__main__":
    sys.exit(main())
