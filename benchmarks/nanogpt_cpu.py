"""nanoGPT's small recipe for a CPU: the loss over the whole validation split, and the time.

Trains `configs/presets/nanogpt_cpu.yaml` with three seeds, for two minutes each.
"""

import json
import statistics
import sys
import tempfile

from benchmarks import CHECKOUT
from config import ConfigLoader
from data import load_dataset
from inference import load_model
from trainer import estimate_loss, train
from utils.output import Output

PRESET = CHECKOUT / "configs" / "presets" / "nanogpt_cpu.yaml"
SEEDS = (1337, 1338, 1339)


def run(data: str | None) -> None:
    if data is None:
        print("  skipped: it needs --data tinyshakespeare.txt (docs/benchmarks.md)")
        return
    losses = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as runs_dir:
            flags = {"data": data, "seed": seed, "runs_dir": runs_dir}
            config = ConfigLoader().load(flags, str(PRESET)).config
            result = train(config, output=Output(quiet=True))
            if result.exit_status != 0:  # stopped by a signal
                sys.exit(result.exit_status)
            whole = config.model_copy(update={"eval_iters": 0, "batch_size": 64})
            model, _ = load_model(result.export_dir)
            losses.append(estimate_loss(model, load_dataset(config), whole)["val"])
            lines = (result.run_dir / "logs" / "metrics.jsonl").read_text(encoding="utf-8")
        speeds = [json.loads(line).get("tokens_per_second") for line in lines.splitlines()]
        speed = statistics.median(value for value in speeds if value)
        print(
            f"  seed {seed}: val loss {losses[-1]:.4f} over the whole split, "
            f"{config.batch_size * config.block_size / speed * 1e3:.1f} ms a step, "
            f"{result.seconds:.0f} s in all",
            flush=True,
        )
    print(f"  median val loss {statistics.median(losses):.4f}")
