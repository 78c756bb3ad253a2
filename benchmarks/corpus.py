"""The cost of a large text: encoding 2 GB into the cache, and training on it and on 1 MB.

The text has words of random letters, lines of random length, and an accent in some of them. Each
measurement is a new process; those that train alternate, with the encoding in the cache already.
Memory is read from Linux's /proc.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

BYTES = 2_000_000_000
SMALL_BYTES = 1_000_000
REPEATS = 3
_BLOCK = 16_000_000

ENCODE = """
import json, resource, sys, time
from corpus import open_corpus
began = time.perf_counter()
text = open_corpus(sys.argv[1], cache_dir=sys.argv[2], token_store="on")
encoded = text.encode(text.create_tokenizer("char"))
seconds = time.perf_counter() - began
usage = resource.getrusage(resource.RUSAGE_SELF)
cpu = usage.ru_utime + usage.ru_stime
with open("/proc/self/status", encoding="utf-8") as status:
    lines = dict(line.split(":", 1) for line in status)
peak = int(lines["VmHWM"].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))
"""
TRAIN = """
import json, sys, time
began = time.perf_counter()
from parameters import ModelConfig
from trainer import estimate_loss, prepare_trainer
trainer = prepare_trainer(ModelConfig(data=sys.argv[1], cache_dir=sys.argv[2], max_iters=20))
trainer.training_step(0)[0].item()
seconds = time.perf_counter() - began
for step in range(1, 10):
    trainer.training_step(step)
estimate_loss(trainer.model, trainer.data, trainer.config)
with open("/proc/self/status", encoding="utf-8") as status:
    lines = dict(line.split(":", 1) for line in status)
anonymous = int(lines["RssAnon"].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "anonymous": anonymous}))
"""


def run(data: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=".") as directory:
        large, small = Path(directory) / "large.txt", Path(directory) / "small.txt"
        write_text(large, BYTES)
        write_text(small, SMALL_BYTES)
        encoding = _measure(ENCODE, large, directory)
        size, cpu = large.stat().st_size, encoding["cpu"]
        print(
            f"  {size / 1e9:.3f} GB encoded in {encoding['seconds']:.1f} s: "
            f"{size / encoding['seconds'] / 1e6:.0f} MB/s, or {size / cpu / 1e6:.0f} MB per CPU "
            f"second; at most {encoding['peak'] / 1e6:.0f} MB in memory"
        )
        turns = [
            [_measure(TRAIN, text, directory) for text in (small, large)] for _ in range(REPEATS)
        ]
        first = [median(pair[i]["seconds"] for pair in turns) for i in (0, 1)]
        grown = median(pair[1]["anonymous"] - pair[0]["anonymous"] for pair in turns)
        print(f"  the first step: after {first[0]:.2f} s on 1 MB, and after {first[1]:.2f} s on it")
        print(f"  anonymous memory of training: {grown / 1e6:+.1f} MB over that on 1 MB")


def write_text(path: Path, size: int) -> None:
    """Write at most `size` bytes of synthetic text, cut at the end of a line."""
    rng = np.random.default_rng(0)
    block = rng.choice(np.frombuffer(b"eetaoinshrdlu    .,", np.uint8), size=min(_BLOCK, size))
    block[rng.integers(80, size=block.size) == 0] = ord("\n")
    lines = block.tobytes().replace(b".\n", " é.\n".encode())
    with open(path, "wb") as file:
        for _ in range(size // len(lines)):
            file.write(lines)
        file.write(lines[: size % len(lines)].rpartition(b"\n")[0])


def _measure(script: str, text: Path, cache: str) -> dict[str, float]:
    command = [sys.executable, "-c", script, str(text), str(Path(cache) / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
