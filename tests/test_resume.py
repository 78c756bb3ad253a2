"""The promise of the project: a run that is stopped anywhere resumes bit-for-bit identically.

Training for 2N steps, and training for N, stopping and resuming for N more, give the same weights,
the same optimizer state and the same loss in every line of the log. This holds on one machine, with
one version of PyTorch, one number of threads and one mode of torch.compile.

python -m pytest tests/test_resume.py
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import CHECKOUT, TINY_FLAGS, assert_same_bits
from safetensors.torch import load_file

from bundle import list_checkpoints, list_runs
from callbacks import TrainResult
from config import ConfigLoader
from resume import plan_run
from trainer import Trainer, train

REAL_STEP = Trainer.training_step
N = 6
# The schedule ends at 2N, so that both halves follow that of the uninterrupted run.
SETTINGS = {"lr_decay_iters": 2 * N, "eval_interval": 3, "log_interval": 2}

VARIANTS = [
    pytest.param({"dropout": dropout, "micro_batch_size": micro}, id=f"dropout {dropout}, {what}")
    for dropout in (0.0, 0.2)
    for micro, what in ((None, "whole batches"), (3, "gradient accumulation"))
] + [
    pytest.param(
        {
            "architecture": architecture,
            "optimizer": optimizer,
            "precision": precision,
            "dropout": 0.2,
        },
        id=f"{architecture}, {optimizer}, {precision}",
    )
    for architecture in ("modern", "gpt2")
    for optimizer in ("muon", "adamw")
    for precision in ("fp32", "bf16", "fp16")
]


@pytest.fixture
def train_uninterrupted(tiny, quiet):
    """Return a function that trains for 2N steps."""

    def run(**changes) -> TrainResult:
        config = tiny(**{**SETTINGS, "max_iters": 2 * N, **changes})
        return train(config.model_copy(update={"runs_dir": "uninterrupted"}), output=quiet)

    return run


@pytest.fixture
def resume(quiet):
    """Return a function that resumes a run, a bundle or a named model; keywords are flags."""

    def run(what: str | Path | None, **flags) -> TrainResult:
        loaded, plan = plan_run(ConfigLoader({"device": "cpu", **flags}), resume=what and str(what))
        return train(loaded.config, loaded=loaded, plan=plan, output=quiet)

    return run


def interrupt_after(step: int, monkeypatch) -> None:
    """Send this process Ctrl-C during a step, the first of which is 1."""

    def training_step(trainer, index):
        if index == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return REAL_STEP(trainer, index)

    monkeypatch.setattr(Trainer, "training_step", training_step)


def read_values(*runs: Path) -> dict[tuple[int, str], float]:
    """Return every value that the runs logged, by step and name; values logged twice are equal."""
    values: dict[tuple[int, str], float] = {}
    for run in runs:
        for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a process that was killed in mid-write
                continue
            for name, value in row.items():
                if name not in ("step", "seconds", "tokens_per_second"):
                    assert values.setdefault((row["step"], name), value) == value
    return values


def read_notes(result: TrainResult) -> list[str]:
    text = (result.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.startswith("Note:")]


def assert_same_facts(one: Path, other: Path) -> None:
    """The training states are equal but for what names the run."""
    states = [json.loads((b / "training_state.json").read_bytes()) for b in (one, other)]
    for state in states:
        del state["run_id"], state["files"]  # the weights' metadata names the run
        for name in ("start_step", "previous_runs", "run_tag", "state_sha256"):
            del state["training_config"][name]
    assert states[0] == states[1]


@pytest.mark.parametrize("changes", VARIANTS)
def test_n_steps_and_n_resumed_steps_are_bit_for_bit_2n_steps(
    tiny, quiet, train_uninterrupted, resume, changes
):
    uninterrupted = train_uninterrupted(**changes)
    first = train(tiny(**{**SETTINGS, "max_iters": N, **changes}), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N)
    assert_same_bits(uninterrupted.checkpoint, second.checkpoint)
    assert read_values(first.run_dir, second.run_dir) == read_values(uninterrupted.run_dir)


@pytest.mark.parametrize("changes", VARIANTS[:5])
def test_a_run_resumed_after_ctrl_c_is_bit_for_bit_the_uninterrupted_run(
    tiny, quiet, train_uninterrupted, resume, monkeypatch, changes
):
    changes = {**changes, "lr_decay_iters": None}
    uninterrupted = train_uninterrupted(**changes)
    with monkeypatch.context() as patch:
        interrupt_after(N + 1, patch)  # no evaluation and no checkpoint is due there
        first = train(tiny(**{**SETTINGS, "max_iters": 2 * N, **changes}), output=quiet)
    assert (first.step, first.exit_status) == (N + 1, 130)
    second = resume("last")
    assert_same_facts(uninterrupted.checkpoint, second.checkpoint)
    assert_same_bits(uninterrupted.checkpoint, second.checkpoint)
    assert read_values(first.run_dir, second.run_dir) == read_values(uninterrupted.run_dir)


def test_a_run_stopped_after_every_step_is_bit_for_bit_the_uninterrupted_run(
    tiny, quiet, train_uninterrupted, resume, monkeypatch
):
    uninterrupted = train_uninterrupted(dropout=0.2)
    runs = []
    for step in range(1, 2 * N + 1):
        with monkeypatch.context() as patch:
            interrupt_after(step, patch)
            if step == 1:
                config = tiny(**{**SETTINGS, "max_iters": 2 * N, "dropout": 0.2})
                result = train(config, output=quiet)
            else:
                result = resume("last")
        runs.append(result.run_dir)
        assert result.step == step
    assert_same_bits(uninterrupted.checkpoint, result.checkpoint)
    assert_same_facts(uninterrupted.checkpoint, result.checkpoint)
    assert read_values(*runs) == read_values(uninterrupted.run_dir)


@pytest.mark.parametrize("eval_interval", [0, 1, 4])
def test_another_eval_interval_after_a_resume_does_not_change_the_training(
    tiny, quiet, train_uninterrupted, resume, eval_interval
):
    uninterrupted = train_uninterrupted(dropout=0.2)
    first = train(tiny(**{**SETTINGS, "max_iters": N, "dropout": 0.2}), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N, eval_interval=eval_interval)
    assert_same_bits(uninterrupted.checkpoint, second.checkpoint)
    both, one = read_values(first.run_dir, second.run_dir), read_values(uninterrupted.run_dir)
    trained = {key for key in one if key[1] in ("loss/train", "grad_norm", "learning_rate")}
    assert {key: both[key] for key in trained} == {key: one[key] for key in trained}


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(tiny, quiet, train_uninterrupted, resume):
    compiled = {"torch_compile": "on", "compile_backend": "aot_eager", "dropout": 0.2}
    uninterrupted = train_uninterrupted(**compiled)
    first = train(tiny(**{**SETTINGS, "max_iters": N, **compiled}), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N)
    assert_same_bits(uninterrupted.checkpoint, second.checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_compiled_by_inductor_resumes_bit_for_bit(
    tiny, quiet, train_uninterrupted, resume, tmp_path, monkeypatch, precision
):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compiled = {"torch_compile": "on", "compile_backend": "inductor"}
    settings = {"precision": precision, "dropout": 0.2, **compiled}
    uninterrupted = train_uninterrupted(**settings)
    first = train(tiny(**{**SETTINGS, "max_iters": N, **settings}), output=quiet)
    torch._dynamo.reset()  # as in another process
    second = resume(first.run_dir, max_iters=2 * N)
    assert_same_bits(uninterrupted.checkpoint, second.checkpoint)
    assert read_values(first.run_dir, second.run_dir) == read_values(uninterrupted.run_dir)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_run_resumes_with_and_without_torch_compile(
    tiny, quiet, train_uninterrupted, resume, compiled_first
):
    uninterrupted = train_uninterrupted()
    modes = ("on", "off") if compiled_first else ("off", "on")
    own = {"torch_compile": modes[0], "compile_backend": "aot_eager"}
    first = train(tiny(**{**SETTINGS, "max_iters": N, **own}), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N, torch_compile=modes[1])
    both, one = read_values(first.run_dir, second.run_dir), read_values(uninterrupted.run_dir)
    assert both.keys() == one.keys()
    assert list(both.values()) == pytest.approx([one[key] for key in both], rel=1e-4)


@pytest.mark.slow
def test_a_resume_notes_a_change_of_precision_or_torch_compile_once(tiny, quiet, resume):
    first = train(tiny(**SETTINGS, max_iters=N), output=quiet)
    changed = {"precision": "bf16", "torch_compile": "on", "compile_backend": "aot_eager"}
    second = resume(first.run_dir, max_iters=N + 1, **changed)
    (note,) = [note for note in read_notes(second) if "torch.compile" in note]
    assert all(word in note for word in ("fp32", "bf16", "off", "aot_eager"))
    third = resume(second.run_dir, max_iters=N + 2)
    assert not [note for note in read_notes(third) if "torch.compile" in note]


def test_a_named_model_resumes_bit_for_bit(tiny, quiet, train_uninterrupted, resume):
    uninterrupted = train_uninterrupted(dropout=0.2)
    config = tiny(**{**SETTINGS, "max_iters": N, "dropout": 0.2, "model_name": "dante"})
    train(config, output=quiet)
    resume(None, model_name="dante", max_iters=2 * N)
    assert_same_bits(uninterrupted.checkpoint, Path("checkpoints/dante"))


def test_a_named_model_killed_before_its_first_checkpoint_restarts_at_step_0(
    tiny, quiet, train_uninterrupted, resume, monkeypatch
):
    uninterrupted = train_uninterrupted(dropout=0.2)

    def training_step(trainer, index):
        if index == 2:
            raise KeyboardInterrupt
        return REAL_STEP(trainer, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", training_step)
        changes = {"max_iters": 2 * N, "dropout": 0.2, "model_name": "dante"}
        train(tiny(**{**SETTINGS, **changes}), output=quiet)
    resume(None, model_name="dante")
    assert_same_bits(uninterrupted.checkpoint, Path("checkpoints/dante"))


def test_a_moved_bundle_resumes_bit_for_bit(
    tiny, quiet, train_uninterrupted, resume, tmp_path, monkeypatch
):
    uninterrupted = train_uninterrupted(dropout=0.2)
    first = train(tiny(**{**SETTINGS, "max_iters": N, "dropout": 0.2}), output=quiet)
    (tmp_path / "elsewhere").mkdir()
    moved = first.checkpoint.rename(tmp_path / "elsewhere" / "gift")
    monkeypatch.chdir(tmp_path / "elsewhere")
    second = resume(moved, max_iters=2 * N)
    assert_same_bits(tmp_path / "cwd" / uninterrupted.checkpoint, second.checkpoint)


# SIGKILL --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_killed_repeatedly_resumes_bit_for_bit(text_file):
    """Real processes, killed at random moments, with `--resume auto` until the run is finished."""
    flags = [*TINY_FLAGS, "--data", str(text_file), "--dropout=0.2", "--max-iters=1000"]
    flags += ["--eval-interval=50", "--checkpoint-interval=10", "--run-tag=x"]
    command = [sys.executable, str(CHECKOUT / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(runs_dir: str) -> subprocess.Popen:
        words = [*command, "--resume=auto", "--runs-dir", runs_dir]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)

    with start("uninterrupted") as process:
        assert "1,000 steps" in process.stdout.read()
    generator = random.Random(1)
    kills = 0
    while True:
        with start("killed") as process:
            if kills < 3:
                for line in process.stdout:  # until the first logged step
                    if line.startswith("step"):
                        break
                time.sleep(generator.uniform(0, 0.4))
                process.kill()
                kills += process.wait() == -signal.SIGKILL
            rest = process.stdout.read()
        if "1,000 steps" in rest:
            break
        assert kills < 10
    assert kills == 3
    assert_same_bits(
        *(list_checkpoints(list_runs(Path(d))[0])[-1] for d in ("uninterrupted", "killed"))
    )
    uninterrupted, killed = (read_values(*list_runs(Path(d))) for d in ("uninterrupted", "killed"))
    assert killed == uninterrupted


# What a resume may change ---------------------------------------------------------------------


def test_a_resume_takes_the_learning_rate_from_the_settings_not_the_optimizer_state(
    tiny, quiet, resume
):
    constant = {"lr_schedule": "constant", "warmup_iters": 0}
    first = train(tiny(max_iters=N, learning_rate=1e-3, weight_decay=0.1, **constant), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N, learning_rate=1e-4, weight_decay=0.5)
    rates = [
        value for (_, name), value in read_values(second.run_dir).items() if name == "learning_rate"
    ]
    assert rates == [1e-4] * N
    text = (second.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")
    assert "max_iters 6 → 12 (--max-iters)" in text
    assert "learning_rate 0.001 → 0.0001 (--learning-rate)" in text
    assert "weight_decay 0.1 → 0.5 (--weight-decay)" in text
    assert text.count(" → ") == 3


def test_a_changed_weight_decay_reaches_the_resumed_optimizer(tiny, quiet, resume):
    one, two = (train(tiny(max_iters=N, run_tag=tag), output=quiet) for tag in "ab")
    same = resume(one.run_dir, max_iters=2 * N)
    none = resume(two.run_dir, max_iters=2 * N, weight_decay=0.0)
    same, none = (load_file(r.checkpoint / "model.safetensors") for r in (same, none))
    assert not torch.equal(same["token_embedding.weight"], none["token_embedding.weight"])


def test_a_resume_is_a_new_run_that_records_the_old_one_and_leaves_it_unchanged(
    tiny, quiet, resume
):
    first = train(tiny(max_iters=N), output=quiet)
    before = {path: path.stat().st_mtime_ns for path in first.run_dir.rglob("*")}
    second = resume(first.run_dir, max_iters=2 * N)
    assert second.run_dir != first.run_dir
    record = json.loads((second.run_dir / "meta" / "full_config.json").read_text("utf-8"))
    weights = first.checkpoint / "model.safetensors"
    assert record["run"]["resumed_from"] == {
        "run_id": first.run_dir.name,
        "step": N,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "path": str(first.checkpoint.resolve()),
    }
    assert record["sources"]["n_embd"] == str(first.checkpoint)
    assert {path: path.stat().st_mtime_ns for path in first.run_dir.rglob("*")} == before
    state = json.loads((second.checkpoint / "training_state.json").read_text("utf-8"))
    assert state["training_config"]["start_step"] == N


def test_a_resumed_run_logs_no_step_again(tiny, quiet, resume):
    first = train(tiny(max_iters=N), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N)
    steps = [step for step, name in read_values(second.run_dir) if name == "loss/train"]
    assert steps == list(range(N + 1, 2 * N + 1))


@pytest.mark.parametrize("what", ["epochs", "max_minutes"])
def test_a_resume_accepts_epochs_and_max_minutes(tiny, quiet, resume, what):
    first = train(tiny(max_iters=N), output=quiet)
    value = {"epochs": 0.1, "max_minutes": 0.005}[what]
    second = resume(first.run_dir, **{what: value})
    assert second.step > N


def test_the_epochs_in_a_banner_are_those_of_its_own_steps_and_the_note_counts_all(
    tiny, quiet, resume
):
    # Of 64 x 16 characters, of 4,698.
    first = train(tiny(max_iters=64, batch_size=64, eval_interval=0), output=quiet)
    text = (first.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")
    assert "(14 epochs)" in text
    assert "14 epochs at dropout" in text
    second = resume(first.run_dir, max_iters=68)
    text = (second.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")
    assert "(0.87 epochs)" in text
    assert "15 epochs at dropout" in text
