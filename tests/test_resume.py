"""The promise of the project: a run that is stopped anywhere goes on to the same bits.

Training for 2N steps at once, and training for N, stopping and resuming, are the same training:
the same weights, the same optimizer state, the same loss in every line of the log, bit for bit.
Exactly the same means: on the same machine, with the same PyTorch, as many threads and the same
mode of torch.compile.

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

import trainer as trainer_module
from bundle import list_checkpoints, list_runs
from callbacks import TrainResult
from config import ConfigLoader
from resume import plan_run
from trainer import Trainer, train

N = 6
# Both halves follow the schedule of the whole: it ends at 2N, wherever one of them does.
SETTINGS = {"lr_decay_iters": 2 * N, "eval_interval": 3, "log_interval": 2}

VARIANTS = [
    pytest.param({"dropout": dropout, "micro_batch_size": micro}, id=f"dropout {dropout}, {what}")
    for dropout in (0.0, 0.2)
    for micro, what in ((None, "whole batches"), (3, "accumulated"))
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
def in_one_go(tiny, quiet):
    """Train for 2N steps."""

    def run(**changes) -> TrainResult:
        config = tiny(**{**SETTINGS, "max_iters": 2 * N, **changes})
        return train(config.model_copy(update={"runs_dir": "whole"}), output=quiet)

    return run


@pytest.fixture
def resume(quiet):
    """Go on with a run, a bundle or a named model; keywords are what one would type as flags."""

    def run(what: str | Path | None, **flags) -> TrainResult:
        loaded, plan = plan_run(ConfigLoader({"device": "cpu", **flags}), resume=what and str(what))
        return train(loaded.config, loaded=loaded, plan=plan, output=quiet)

    return run


def stop_after(step: int, monkeypatch) -> None:
    """Send ourselves Ctrl-C during the step that ends with `step` updates made."""

    def interrupted(setup, index):
        if index == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return Trainer.training_step(setup, index)

    monkeypatch.setattr(trainer_module.Trainer, "training_step", interrupted)


def logged(*runs: Path) -> dict[tuple[int, str], float]:
    """Every loss that the runs logged, by step and name; where two logged it, both must agree."""
    values: dict[tuple[int, str], float] = {}
    for run in runs:
        for line in (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a process that was killed while it wrote
                continue
            for name, value in row.items():
                if name not in ("step", "seconds", "tokens_per_second"):
                    assert values.setdefault((row["step"], name), value) == value
    return values


def assert_same_story(one: Path, other: Path) -> None:
    """All that the states say is the same, but for the runs and the times that it took."""
    states = [json.loads((b / "training_state.json").read_bytes()) for b in (one, other)]
    for state in states:
        del state["run_id"], state["files"]  # the weights' metadata names the run
        for name in ("start_step", "previous_runs", "run_tag", "state_sha256"):
            del state["training_config"][name]
    assert states[0] == states[1]


@pytest.mark.parametrize("changes", VARIANTS)
def test_twice_n_steps_are_n_steps_and_n_more(tiny, quiet, in_one_go, resume, changes):
    whole = in_one_go(**changes)
    first = train(tiny(**{**SETTINGS, "max_iters": N, **changes}), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N)
    assert_same_bits(whole.checkpoint, second.checkpoint)
    assert logged(first.run_dir, second.run_dir) == logged(whole.run_dir)


@pytest.mark.parametrize("changes", VARIANTS[:5])
def test_twice_n_steps_are_some_steps_ctrl_c_and_the_rest(
    tiny, quiet, in_one_go, resume, monkeypatch, changes
):
    changes = {**changes, "lr_decay_iters": None}
    whole = in_one_go(**changes)
    with monkeypatch.context() as patch:
        stop_after(N + 1, patch)  # where nothing is due
        first = train(tiny(**{**SETTINGS, "max_iters": 2 * N, **changes}), output=quiet)
    assert (first.step, first.exit_status) == (N + 1, 130)
    second = resume("last")
    assert_same_story(whole.checkpoint, second.checkpoint)
    assert_same_bits(whole.checkpoint, second.checkpoint)
    assert logged(first.run_dir, second.run_dir) == logged(whole.run_dir)


def test_a_run_stopped_after_every_single_step_is_the_same_run(
    tiny, quiet, in_one_go, resume, monkeypatch
):
    whole = in_one_go(dropout=0.2)
    runs = []
    for step in range(1, 2 * N + 1):
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            if step == 1:
                config = tiny(**{**SETTINGS, "max_iters": 2 * N, "dropout": 0.2})
                result = train(config, output=quiet)
            else:
                result = resume("last")
        runs.append(result.run_dir)
        assert result.step == step
    assert_same_bits(whole.checkpoint, result.checkpoint)
    assert_same_story(whole.checkpoint, result.checkpoint)
    assert logged(*runs) == logged(whole.run_dir)


@pytest.mark.parametrize("eval_interval", [0, 1, 4])
def test_evaluating_more_or_less_often_after_a_resume_changes_nothing_that_is_learned(
    tiny, quiet, in_one_go, resume, eval_interval
):
    whole = in_one_go(dropout=0.2)
    first = train(tiny(**{**SETTINGS, "max_iters": N, "dropout": 0.2}), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N, eval_interval=eval_interval)
    assert_same_bits(whole.checkpoint, second.checkpoint)
    both, one = logged(first.run_dir, second.run_dir), logged(whole.run_dir)
    trained = {key for key in one if key[1] in ("loss/train", "grad_norm", "learning_rate")}
    assert {key: both[key] for key in trained} == {key: one[key] for key in trained}


def test_torch_compile_resumes_exactly_too(tiny, quiet, in_one_go, resume):
    compiled = {"torch_compile": "on", "compile_backend": "aot_eager", "dropout": 0.2}
    whole = in_one_go(**compiled)
    first = train(tiny(**{**SETTINGS, "max_iters": N, **compiled}), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N)
    assert_same_bits(whole.checkpoint, second.checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_inductor_compiles_resumes_exactly_too(
    tiny, quiet, in_one_go, resume, tmp_path, monkeypatch, precision
):
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compiled = {"torch_compile": "on", "compile_backend": "inductor"}
    settings = {"precision": precision, "dropout": 0.2, **compiled}
    whole = in_one_go(**settings)
    first = train(tiny(**{**SETTINGS, "max_iters": N, **settings}), output=quiet)
    torch._dynamo.reset()  # as another process would, it compiles anew
    second = resume(first.run_dir, max_iters=2 * N)
    assert_same_bits(whole.checkpoint, second.checkpoint)
    assert logged(first.run_dir, second.run_dir) == logged(whole.run_dir)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_what_was_saved_with_torch_compile_goes_on_without_and_the_other_way_round(
    tiny, quiet, in_one_go, resume, compiled_first
):
    whole = in_one_go()
    modes = ("on", "off") if compiled_first else ("off", "on")
    own = {"torch_compile": modes[0], "compile_backend": "aot_eager"}
    first = train(tiny(**{**SETTINGS, "max_iters": N, **own}), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N, torch_compile=modes[1])
    both, one = logged(first.run_dir, second.run_dir), logged(whole.run_dir)
    assert both.keys() == one.keys()
    assert list(both.values()) == pytest.approx([one[key] for key in both], rel=1e-4)


def test_a_resume_says_in_what_else_it_computes_and_nothing_of_what_stays(tiny, quiet, resume):
    first = train(tiny(**SETTINGS, max_iters=N), output=quiet)
    changed = {"precision": "bf16", "torch_compile": "on", "compile_backend": "aot_eager"}
    second = resume(first.run_dir, max_iters=N + 1, **changed)
    assert (
        "Note: computed in fp32, with torch.compile off until now, and in bf16, with torch.compile "
        "aot_eager from here on: as good, and not the same to the bit\n"
    ) in (second.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")
    third = resume(second.run_dir, max_iters=N + 2)
    assert "Note: computed" not in (third.run_dir / "logs/console.txt").read_text(encoding="utf-8")


def test_a_named_model_goes_on_to_the_same_bits(tiny, quiet, in_one_go, resume):
    whole = in_one_go(dropout=0.2)
    config = tiny(**{**SETTINGS, "max_iters": N, "dropout": 0.2, "model_name": "dante"})
    train(config, output=quiet)
    resume(None, model_name="dante", max_iters=2 * N)
    assert_same_bits(whole.checkpoint, Path("checkpoints/dante"))


def test_a_named_model_that_never_came_to_a_checkpoint_begins_at_step_0_again(
    tiny, quiet, in_one_go, resume, monkeypatch
):
    whole = in_one_go(dropout=0.2)

    def dies(setup, index):
        if index == 2:
            raise KeyboardInterrupt
        return Trainer.training_step(setup, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module.Trainer, "training_step", dies)
        changes = {"max_iters": 2 * N, "dropout": 0.2, "model_name": "dante"}
        train(tiny(**{**SETTINGS, **changes}), output=quiet)
    resume(None, model_name="dante")
    assert_same_bits(whole.checkpoint, Path("checkpoints/dante"))


def test_a_bundle_moved_away_on_its_own_goes_on_to_the_same_bits(
    tiny, quiet, in_one_go, resume, tmp_path, monkeypatch
):
    whole = in_one_go(dropout=0.2)
    first = train(tiny(**{**SETTINGS, "max_iters": N, "dropout": 0.2}), output=quiet)
    (tmp_path / "elsewhere").mkdir()
    moved = first.checkpoint.rename(tmp_path / "elsewhere" / "gift")
    monkeypatch.chdir(tmp_path / "elsewhere")
    second = resume(moved, max_iters=2 * N)
    assert_same_bits(tmp_path / "cwd" / whole.checkpoint, second.checkpoint)


# SIGKILL --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_killed_again_and_again_ends_with_the_same_bits(text_file):
    """Real processes, killed at moments that nobody chose, and `--resume auto` until it is done."""
    flags = [*TINY_FLAGS, "--data", str(text_file), "--dropout=0.2", "--max-iters=1000"]
    flags += ["--eval-interval=50", "--checkpoint-interval=10", "--run-tag=x"]
    command = [sys.executable, str(CHECKOUT / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin(runs_dir: str) -> subprocess.Popen:
        words = [*command, "--resume=auto", "--runs-dir", runs_dir]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)

    with begin("whole") as process:
        assert "Done: 1,000 steps" in process.stdout.read()
    chance = random.Random(1)
    kills = 0
    while True:
        with begin("killed") as process:
            if kills < 3:
                for line in process.stdout:  # until it trains
                    if line.startswith("step"):
                        break
                time.sleep(chance.uniform(0, 0.4))
                process.kill()
                kills += process.wait() == -signal.SIGKILL
            rest = process.stdout.read()
        if "Done: 1,000 steps" in rest:
            break
        assert kills < 10
    assert kills == 3
    assert_same_bits(*(list_checkpoints(list_runs(Path(d))[0])[-1] for d in ("whole", "killed")))
    whole, killed = (logged(*list_runs(Path(d))) for d in ("whole", "killed"))
    assert killed == whole


# What may change, and what it then does -------------------------------------------------------


def test_the_learning_rate_is_that_of_the_settings_and_not_of_the_saved_optimizer(
    tiny, quiet, resume
):
    constant = {"lr_schedule": "constant", "warmup_iters": 0}
    first = train(tiny(max_iters=N, learning_rate=1e-3, **constant), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N, learning_rate=1e-4, weight_decay=0.5)
    rates = [
        value for (_, name), value in logged(second.run_dir).items() if name == "learning_rate"
    ]
    assert rates == [1e-4] * N
    text = (second.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")
    assert "max_iters 6 → 12 (--max-iters)" in text
    assert "learning_rate 0.001 → 0.0001 (--learning-rate)" in text
    assert "weight_decay 0.1 → 0.5 (--weight-decay)" in text
    assert text.count(" → ") == 3


def test_a_lower_weight_decay_reaches_the_optimizer(tiny, quiet, resume):
    one, two = (train(tiny(max_iters=N, run_tag=tag), output=quiet) for tag in "ab")
    kept = resume(one.run_dir, max_iters=2 * N)
    free = resume(two.run_dir, max_iters=2 * N, weight_decay=0.0)
    kept, free = (load_file(r.checkpoint / "model.safetensors") for r in (kept, free))
    assert not torch.equal(kept["token_embedding.weight"], free["token_embedding.weight"])


def test_a_resume_is_a_new_run_linked_to_the_old_one_and_the_old_one_stays_as_it_was(
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


def test_steps_go_on_counting_so_that_no_step_stands_twice(tiny, quiet, resume):
    first = train(tiny(max_iters=N), output=quiet)
    second = resume(first.run_dir, max_iters=2 * N)
    steps = [step for step, name in logged(second.run_dir) if name == "loss/train"]
    assert steps == list(range(N + 1, 2 * N + 1))


@pytest.mark.parametrize("what", ["epochs", "max_minutes"])
def test_other_lengths_work_on_a_resume(tiny, quiet, resume, what):
    first = train(tiny(max_iters=N), output=quiet)
    value = {"epochs": 0.1, "max_minutes": 0.005}[what]
    second = resume(first.run_dir, **{what: value})
    assert second.step > N
