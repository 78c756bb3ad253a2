"""DDP and FSDP2 over NCCL: the losses of a plain process, and resume.

python -m pytest -m gpu tests/gpu/test_gpu_distributed.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CHECKOUT, TINY_FLAGS

import train
from bundle import list_checkpoints, list_runs
from utils.output import run_command

pytestmark = pytest.mark.gpu

KINDS = {
    "ddp, modern, muon": ["--parallel=ddp", "--histogram-interval=2"],
    "fsdp, modern, muon": ["--parallel=fsdp", "--histogram-interval=2"],
    "ddp, gpt2, adamw": ["--parallel=ddp", "--architecture=gpt2", "--optimizer=adamw"],
    "fsdp, gpt2, adamw": ["--parallel=fsdp", "--architecture=gpt2", "--optimizer=adamw"],
}
for_each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def torchrun(size: int, script: str, flags: list[str]) -> str:
    """Run a script under torchrun, and return what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={size}", str(CHECKOUT / script), *flags]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def read_values() -> dict[tuple[int, str], float]:
    """Return every value that the newest run logged, by step and name."""
    text = (list_runs(Path("runs"))[0] / "logs" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = map(json.loads, text.splitlines())
    ignored = ("step", "seconds", "tokens_per_second")
    return {(row["step"], name): row[name] for row in rows for name in row if name not in ignored}


@pytest.fixture
def flags(text_file, device) -> list[str]:
    """Four steps in fp32, with micro-batches; the schedule is that of eight."""
    own = [f"--data={text_file}", f"--device={device}", "--lr-decay-iters=8"]
    return [*TINY_FLAGS, *own, "--micro-batch-size=2", "--torch-compile=off"]


def check_training(size: int, script: str, flags: list[str], device: str) -> str:
    """Train and resume in one process and in several; compare all that was logged."""
    resume = ["--resume=last", f"--device={device}", "--max-iters=8"]
    values, printed = [], ""
    for launch in (train.main, None):
        for words in (flags, resume):
            if launch is not None:
                assert run_command(launch, words) == 0
            else:
                printed += torchrun(size, script, words)
            values.append(read_values())
        assert list_checkpoints(list_runs(Path("runs"))[0])[-1].name == "step_00000008"
    for expected, found in zip(values[:2], values[2:], strict=True):
        assert len(expected) > 10
        assert found == pytest.approx(expected, abs=2e-5), printed
    return printed


@for_each_kind
def test_a_process_group_of_one_rank_trains_and_resumes_as_a_plain_process(flags, device, kind):
    printed = check_training(1, "tests/gpu/one_rank.py", [*flags, *kind], device)
    assert "nccl" in printed and "gloo" in printed


@for_each_kind
def test_two_gpus_train_and_resume_as_one_does(flags, device, kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("PyTorch sees a single CUDA device")
    assert "2 processes" in check_training(2, "train.py", [*flags, *kind], device)
