"""train.py: the run, from a text to an export, and every way it can end.

python -m pytest tests/test_train.py
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    CHECKOUT,
    TINY_FLAGS,
    assert_equal,
    assert_same_bits,
    loaded_step,
    train_until,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import step as step_module
import train as train_module
from bundle import BUNDLE_FILES
from callbacks import TrainResult
from checkpoint import load_model
from config import ConfigLoader, LoadedConfig
from generate import generate_tokens
from model import LanguageModel
from parameters import ModelConfig
from prepare import set_up
from step import estimate_loss, training_step
from train import dry_run, train
from utils.errors import RunError, UserError
from utils.run_manager import RunDirectory, RunDirectoryCreator
from utils.tracking.tensorboard import TensorBoardTracker


def metrics(result: TrainResult) -> list[dict]:
    text = RunDirectory(result.run_dir).metrics.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def losses(result: TrainResult) -> list[float]:
    return [line["loss/train"] for line in metrics(result) if "loss/train" in line]


def console(run_dir: Path) -> str:
    return (run_dir / "logs" / "console.txt").read_text(encoding="utf-8")


def closings(monkeypatch) -> list[bool]:
    """A list that grows when TensorBoard is closed, as it then really is."""
    closed, real = [], TensorBoardTracker.close

    def close(self):
        closed.append(True)
        real(self)

    monkeypatch.setattr(TensorBoardTracker, "close", close)
    return closed


# A whole run ----------------------------------------------------------------------------------


def test_a_run_leaves_exactly_the_documented_files(tiny, quiet):
    result = train(tiny(run_tag="my tag"), output=quiet)
    assert result.run_dir.name.endswith("_my-tag")
    files = sorted(
        str(path.relative_to(result.run_dir))
        for path in result.run_dir.rglob("*")
        if path.is_file()
    )
    (events,) = [name for name in files if "tfevents" in name]
    assert events.startswith("logs/tensorboard/")
    files.remove(events)
    last = [f"artifacts/checkpoints/step_00000006/{name}" for name in sorted(BUNDLE_FILES)]
    assert files[:5] == [name.replace("06/", "03/") for name in last]
    assert files[5:10] == last
    assert files[10:] == [
        "artifacts/export/config.json",
        "artifacts/export/model.safetensors",
        "artifacts/export/tokenizer.json",
        "artifacts/export/training_state.json",
        "logs/console.txt",
        "logs/metrics.jsonl",
        "logs/samples.jsonl",
        "meta/env.txt",
        "meta/full_config.json",
        "meta/git.txt",
        "meta/result.json",
        "report.html",
    ]
    assert list(Path("runs").iterdir()) == [result.run_dir]
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["runs"]


def test_the_model_learns(tiny, quiet):
    result = train(tiny(max_iters=150, learning_rate=1e-2, n_embd=32), output=quiet)
    assert losses(result)[0] > 3
    assert result.val_loss < 1.5
    assert result.exit_status == 0
    assert result.step == 150


GOLDEN = {
    "modern": [3.3322, 3.3299, 3.3249, 3.3192, 3.3147, 3.3109],
    "gpt2": [3.3351, 3.3277, 3.3213, 3.3288, 3.2944, 3.2948],
}


@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
def test_the_losses_of_a_small_run_are_the_golden_ones(tiny, quiet, architecture):
    optimizer = {"modern": "muon", "gpt2": "adamw"}[architecture]
    result = train(tiny(architecture=architecture, optimizer=optimizer), output=quiet)
    assert losses(result) == pytest.approx(GOLDEN[architecture], abs=2e-3)


def test_the_same_config_gives_the_same_bits(tiny, quiet):
    one, two = (train(tiny(dropout=0.2), output=quiet) for _ in range(2))
    assert losses(one) == losses(two)
    first, second = (load_file(r.export_dir / "model.safetensors") for r in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_recorded_config_trains_the_same_model_again(tiny, quiet):
    first = train(tiny(dropout=0.1, seed=5, run_tag="first"), output=quiet)
    loaded = ConfigLoader().load(config_file=str(first.run_dir / "meta" / "full_config.json"))
    again = train(loaded.config, loaded=loaded, output=quiet)
    assert losses(again) == losses(first)
    assert again.run_dir != first.run_dir
    assert "first" not in again.run_dir.name


def test_a_rerun_works_from_any_directory(tiny, quiet, tmp_path, monkeypatch):
    Path("here.txt").write_text("a text beside the run\n" * 200, encoding="utf-8")
    first = train(tiny(data="here.txt"), output=quiet)
    record = (first.run_dir / "meta" / "full_config.json").resolve()
    monkeypatch.chdir(tmp_path)
    loaded = ConfigLoader().load(config_file=str(record))
    again = train(loaded.config, loaded=loaded, output=quiet)
    monkeypatch.chdir(tmp_path / "cwd")
    again_losses = (tmp_path / again.run_dir / "logs" / "metrics.jsonl").read_text("utf-8")
    assert json.loads(again_losses.splitlines()[0])["loss/train"] == losses(first)[0]


def test_a_rerun_on_another_text_is_refused_unless_that_is_asked_for(tiny, quiet, text_file):
    first = train(tiny(), output=quiet)
    record = str(first.run_dir / "meta" / "full_config.json")
    text_file.write_text("something else entirely, " * 100, encoding="utf-8")
    loaded = ConfigLoader().load(config_file=record)
    with pytest.raises(UserError, match=f"not the text that {first.run_dir.name} was trained on"):
        train(loaded.config, loaded=loaded, output=quiet)
    assert len(list(Path("runs").iterdir())) == 1
    loaded = ConfigLoader().load({"data": str(text_file)}, record)
    assert train(loaded.config, loaded=loaded, output=quiet).step == 6


def test_names_that_are_no_text_do_not_break_the_record(tiny, quiet):
    name = os.fsdecode(b"caf\xe9")
    result = train(tiny(run_tag=name), argv=["--run-tag", name], output=quiet)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["run"]["argv"] == ["--run-tag", name]
    assert result.run_dir.name.endswith("_caf")


@pytest.mark.parametrize("changes", [{"eval_interval": 1}, {"eval_iters": 0}, {"log_interval": 5}])
@pytest.mark.parametrize("sample_interval", [0, 1])
def test_looking_more_often_changes_nothing_that_is_learned(tiny, quiet, changes, sample_interval):
    usual = train(tiny(dropout=0.2), output=quiet)
    other = train(tiny(dropout=0.2, **changes, sample_interval=sample_interval), output=quiet)
    assert losses(other) == losses(usual)


def test_an_evaluation_is_the_same_however_many_windows_come_at_once(tiny, monkeypatch):
    config = tiny(eval_iters=7)
    setup = set_up(config)
    found = []
    for numbers in (1, 1 << 30):
        monkeypatch.setattr("utils.evaluation.MAX_ELEMENTS_CPU", numbers)
        found.append(estimate_loss(setup.model, setup.data, config))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_learns_nearly_the_same_and_is_recorded(tiny, quiet, precision):
    result = train(tiny(precision=precision), output=quiet)
    assert losses(result) == pytest.approx(losses(train(tiny(), output=quiet)), abs=0.02)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["run"]["precision"] == precision
    weights = load_file(result.export_dir / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_in_fp16_a_step_whose_gradients_overflow_is_left_out(tiny):
    at_once = torch.amp.GradScaler("cpu", init_scale=1e30)  # at which everything overflows
    setup = replace(set_up(tiny(precision="fp16")), scaler=at_once)
    before = {name: p.clone() for name, p in setup.model.named_parameters()}
    _, grad_norm = step_module.training_step(setup, 0)
    assert not grad_norm.isfinite()
    assert all(torch.equal(p, before[name]) for name, p in setup.model.named_parameters())
    assert setup.scaler.get_scale() < 1e30


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_memory_and_not_what_is_learned(tiny, quiet, micro):
    whole = train(tiny(), output=quiet)
    parts = train(tiny(micro_batch_size=micro), output=quiet)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    norms = [[m["grad_norm"] for m in metrics(r) if "grad_norm" in m] for r in (whole, parts)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_torch_compile_keeps_the_names_of_the_weights_and_is_recorded(tiny, quiet):
    compiled = {"torch_compile": "on", "compile_backend": "aot_eager"}
    result = train(tiny(**compiled), output=quiet)
    plain = train(tiny(), output=quiet)
    assert losses(result) == pytest.approx(losses(plain), rel=1e-4)
    names = [list(load_file(r.export_dir / "model.safetensors")) for r in (result, plain)]
    assert names[0] == names[1]
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["run"]["torch_compile"] == "aot_eager"
    assert record["run"]["torch_compile_reason"] == "torch_compile is on"
    record = json.loads((plain.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["run"]["torch_compile"] == "off"
    assert record["run"]["torch_compile_reason"] == "the run is too short for compiling to pay back"


# Evaluation and export ------------------------------------------------------------------------


def test_evaluations_come_every_interval_and_at_the_last_step(tiny, quiet):
    result = train(tiny(max_iters=7, eval_interval=3), output=quiet)
    evaluated = [line["step"] for line in metrics(result) if "eval/val_loss" in line]
    assert evaluated == [3, 6, 7]
    last_only = train(tiny(max_iters=7, eval_interval=0), output=quiet)
    assert [m["step"] for m in metrics(last_only) if "eval/val_loss" in m] == [7]


def test_the_whole_split_evaluation_is_the_mean_over_every_target(tiny):
    config = tiny(eval_iters=0, batch_size=3)
    setup = set_up(config)
    val = torch.from_numpy(setup.data.splits["val"].astype("int64"))
    total = 0.0
    for start in range(0, len(val) - 1, 16):
        window = val[start : start + 17]
        _, loss = setup.model(window[None, :-1], window[None, 1:])
        total += loss.item() * (len(window) - 1)
    expected = total / (len(val) - 1)
    assert estimate_loss(setup.model, setup.data, config)["val"] == pytest.approx(expected, 1e-5)


def test_the_export_is_the_step_with_the_lowest_val_loss(tiny, quiet, monkeypatch):
    scripted = iter([3.0, 1.0, 2.0])
    schedule = {"lr_schedule": "constant"}
    with monkeypatch.context() as patch:
        patch.setattr(
            train_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(scripted)}
        )
        result = train(tiny(max_iters=6, eval_interval=2, **schedule), output=quiet)
    assert (result.best_step, result.best_val_loss, result.val_loss) == (4, 1.0, 2.0)
    state = json.loads((result.export_dir / "training_state.json").read_text(encoding="utf-8"))
    assert (state["step"], state["best_val_loss"]) == (4, 1.0)
    assert "at step 4" in console(result.run_dir)
    four = train(tiny(max_iters=4, eval_interval=0, **schedule), output=quiet)
    best, expected = (load_file(r.export_dir / "model.safetensors") for r in (result, four))
    assert all(torch.equal(best[name], expected[name]) for name in expected)


def test_the_training_state_has_the_documented_fields(tiny, quiet):
    result = train(tiny(), output=quiet)
    state = json.loads((result.export_dir / "training_state.json").read_text(encoding="utf-8"))
    expected = "format_version step optimizer_file best_val_loss val_loss run_id lineage files"
    assert {*expected.split(), "training_config"} == state.keys()
    expected = "max_iters eval_interval eval_iters learning_rate start_step"
    assert set(expected.split()) <= state["training_config"].keys()
    assert state["run_id"] == result.run_dir.name


def test_losses_are_also_told_as_bits_per_byte(tiny, quiet, text_file):
    text_file.write_text("é" * 3000, encoding="utf-8")  # two bytes a character
    result = train(tiny(), output=quiet)
    last = [line for line in metrics(result) if "eval/val_loss" in line][-1]
    nats = last["eval/val_loss"]
    assert last["eval/val_bits_per_byte"] == pytest.approx(nats / 0.693147 / 2, rel=1e-4)


# The record -----------------------------------------------------------------------------------


def test_the_record_names_text_command_and_sources(tiny, quiet, text_file):
    config = tiny()
    sources = dict.fromkeys(type(config).model_fields, "default") | {"n_layer": "--n-layer"}
    argv = ["--n-layer", "2"]
    result = train(config, loaded=LoadedConfig(config, sources), argv=argv, output=quiet)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record.keys() == {"format_version", "config", "sources", "run"}
    assert record["sources"]["n_layer"] == "--n-layer"
    assert record["run"]["argv"] == argv
    assert record["config"]["data"] == str(text_file.resolve())
    assert len(record["run"]["data"]["sha256"]) == 64
    assert "python: 3." in (result.run_dir / "meta" / "env.txt").read_text(encoding="utf-8")
    assert "commit: " in (result.run_dir / "meta" / "git.txt").read_text(errors="replace")


def test_no_secret_of_the_environment_is_recorded(tiny, quiet, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_that_must_not_leak")
    result = train(tiny(), output=quiet)
    for path in result.run_dir.rglob("*"):
        if path.is_file():
            assert b"hf_a_secret_that_must_not_leak" not in path.read_bytes(), path


def test_epochs_become_steps_in_the_record(tiny, quiet):
    result = train(tiny(max_iters=None, epochs=0.1), output=quiet)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    expected = -(-int(5370 * 0.9) // (10 * 4 * 16))
    assert result.step == record["config"]["max_iters"] == expected
    assert record["config"]["epochs"] is None
    assert record["sources"]["max_iters"] == "epochs 0.1 (train())"


def test_max_minutes_alone_become_steps_in_the_record(tiny, quiet):
    result = train(tiny(max_iters=None, max_minutes=0.01), output=quiet)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["config"]["max_iters"] == result.step >= 1
    assert record["config"]["max_minutes"] is None
    assert record["sources"]["max_iters"] == "max_minutes 0.01 (train())"


def test_max_minutes_beside_max_iters_are_a_time_limit(tiny, quiet):
    result = train(tiny(max_iters=10**6, eval_interval=0, max_minutes=0.01), output=quiet)
    assert 1 <= result.step < 10**6
    assert result.exit_status == 0
    assert f"Stopped after step {result.step:,}" in console(result.run_dir)
    assert f"--resume {result.run_dir} --device cpu   # go on from here" in console(result.run_dir)
    assert ": max_minutes 0.01 is over." in console(result.run_dir)
    assert (result.export_dir / "model.safetensors").exists()


def test_console_txt_holds_banner_steps_evaluations_sample_and_next_commands(tiny, quiet):
    result = train(tiny(), output=quiet)
    text = console(result.run_dir)
    for words in ("Model ", "Text ", "Device CPU", "step 2/6", "eval 6/6", "--- sample at step 6"):
        assert words in text, words
    assert text.count("--- sample at") == 1
    assert f"inference.py --run {result.run_dir}" in text


def test_samples_are_printed_at_evaluations_when_asked_for(tiny, quiet):
    result = train(tiny(max_iters=9, eval_interval=2, sample_interval=4), output=quiet)
    text = console(result.run_dir)
    assert [n for n in range(1, 10) if f"--- sample at step {n} ---" in text] == [4, 8, 9]


def test_a_run_within_its_warm_up_says_so(tiny, quiet):
    short = train(tiny(warmup_iters=7), output=quiet)
    assert "Note: the run ends within its warm-up of 7 steps" in console(short.run_dir)
    assert "Note:" not in console(train(tiny(warmup_iters=6), output=quiet).run_dir)


def test_num_threads_is_obeyed(tiny, quiet):
    train(tiny(num_threads=2), output=quiet)
    assert torch.get_num_threads() == 2


def test_a_dry_run_does_not_even_cache_the_corpus(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "data.sample_corpus", lambda *, cache, **where: seen.append(cache) or "a corpus\n" * 500
    )
    config = tiny(data=None)
    dry_run(LoadedConfig(config, dict.fromkeys(type(config).model_fields, "default")))
    assert seen == [False]


def test_a_dry_run_says_what_would_be_and_leaves_nothing(tiny, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    config = tiny()
    said = dry_run(LoadedConfig(config, dict.fromkeys(type(config).model_fields, "default")))
    for words in ("n_layer", "parameters", "Memory ", "passes over the text", "Time ", "ms a step"):
        assert words in said, words
    assert sorted(tmp_path.rglob("*")) == before


# Ways to end ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"data": "none.txt"}, {"block_size": 10**6}, {"device": "cuda:7"}]
)
def test_a_users_mistake_leaves_no_run_directory(tiny, quiet, changes):
    with pytest.raises(UserError):
        train(tiny(**changes), output=quiet)
    assert not Path("runs").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_export(
    tiny, quiet, monkeypatch
):
    def diverging(setup, step):
        loss, grad_norm = training_step(setup, step)
        return (loss * float("nan") if step == 3 else loss), grad_norm

    monkeypatch.setattr(train_module, "training_step", diverging)
    with pytest.raises(RunError, match="the loss is nan at step 4: the run cannot go on"):
        train(tiny(eval_interval=2), output=quiet)
    (run_dir,) = Path("runs").iterdir()
    assert "error: the loss is nan at step 4" in console(run_dir)
    state = json.loads((run_dir / "artifacts/export/training_state.json").read_text("utf-8"))
    assert state["step"] == 2


def test_a_run_that_really_diverges_ends_with_one_line(tiny, quiet):
    with pytest.raises(RunError, match=r"(loss|norm) is (nan|inf) at step \d"):
        train(tiny(learning_rate=1e30, warmup_iters=0, grad_clip=0.0), output=quiet)


def interrupting(monkeypatch, at: int, number: int, times: int = 1):
    """Send ourselves a signal during the step `at`."""

    def step(setup, index):
        if index == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        return training_step(setup, index)

    monkeypatch.setattr(train_module, "training_step", step)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_closes(tiny, quiet, monkeypatch, number, status):
    interrupting(monkeypatch, 1, number)
    before = signal.getsignal(number)
    result = train(tiny(), output=quiet)
    assert (result.step, result.exit_status) == (2, status)
    assert len(losses(result)) == 2
    assert "Stopping after step 2" in console(result.run_dir)
    assert "eval" not in (result.run_dir / "logs" / "metrics.jsonl").read_text(encoding="utf-8")
    assert result.checkpoint == result.run_dir / "artifacts" / "checkpoints" / "step_00000002"
    assert loaded_step(result.checkpoint) == 2
    assert loaded_step(result.run_dir) == 2
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_evaluation_ends_the_run_after_it(tiny, quiet, monkeypatch, number):
    def evaluate(*arguments):
        os.kill(os.getpid(), number)
        return estimate_loss(*arguments)

    monkeypatch.setattr(train_module, "estimate_loss", evaluate)
    result = train(tiny(eval_interval=2), output=quiet)
    assert (result.step, result.exit_status) == (2, 128 + number)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_second_signal_aborts(tiny, quiet, monkeypatch, number, raised):
    interrupting(monkeypatch, 1, number, times=2)
    with pytest.raises(raised) as caught:
        train(tiny(), output=quiet)
    assert getattr(caught.value, "code", 143) == 143
    (run_dir,) = Path("runs").iterdir()
    assert "error: interrupted" in console(run_dir)


def test_out_of_memory_names_the_settings_to_lower(tiny, quiet, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_module, "training_step", no_memory)
    with pytest.raises(RunError, match="lower micro_batch_size") as caught:
        train(tiny(), output=quiet)
    for name in ("block_size", "n_embd", "n_layer"):
        assert name in str(caught.value)


def test_a_real_allocation_that_fails_is_out_of_memory_too(tiny, quiet):
    with pytest.raises(RunError, match="out of memory"):
        train(tiny(n_embd=2**21), output=quiet)
    assert not Path("runs").exists()


def test_a_full_disk_ends_the_run_with_one_line(tiny, quiet, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    real = RunDirectoryCreator.create

    def on_a_full_disk(self, run_id):
        run = real(self, run_id)
        run.metrics.symlink_to("/dev/full")
        return run

    monkeypatch.setattr(RunDirectoryCreator, "create", on_a_full_disk)
    closed = closings(monkeypatch)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        train(tiny(), output=quiet)
    assert closed == [True]
    (run_dir,) = Path("runs").iterdir()
    assert "error: the run's files cannot be written" in console(run_dir)


def test_a_disk_too_full_for_tensorboard_is_one_line(text_file):
    resource = pytest.importorskip("resource")
    flags = [*TINY_FLAGS, "--max-iters=60", "--eval-interval=30", "--histogram-interval=1"]
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "train.py"), "--data", str(text_file), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("warning: TensorBoard failed and is left out from here on")


CALLS = [*("__init__", "log_config", "log_metrics", "log_histograms", "log_text", "flush", "close")]


@pytest.mark.parametrize("call", CALLS)
def test_a_tracker_that_fails_costs_a_warning_and_no_bit_of_the_run(tiny, quiet, monkeypatch, call):
    def broken(*args, **kwargs):
        raise OSError("disk gone")

    config = tiny(dropout=0.2, histogram_interval=2, sample_interval=3)
    plain = train(config, output=quiet)
    monkeypatch.setattr(TensorBoardTracker, call, broken)
    result = train(config, output=quiet)
    assert result.step == 6
    assert_same_bits(plain.checkpoint, result.checkpoint)
    assert losses(plain) == losses(result)
    text = console(result.run_dir)
    assert text.count("warning: TensorBoard failed and is left out from here on: disk gone") == 1
    assert text.count("warning:") == 1


def test_histograms_and_samples_change_no_number(tiny, quiet):
    without = train(tiny(dropout=0.2, histogram_interval=0), output=quiet)
    with_all = train(tiny(dropout=0.2, histogram_interval=1, sample_interval=1), output=quiet)
    assert losses(without) == losses(with_all)
    weights = [load_file(r.checkpoint / "model.safetensors") for r in (without, with_all)]
    assert_equal(*weights)


def test_everything_a_run_logs_is_in_tensorboard_once(tiny, quiet):
    result = train(tiny(histogram_interval=2, sample_interval=3), output=quiet)
    (events,) = RunDirectory(result.run_dir).tensorboard.iterdir()
    guidance = {"scalars": 0, "histograms": 0, "tensors": 0}
    events = EventAccumulator(str(events), size_guidance=guidance).Reload()
    logged: dict[str, list] = {}
    for line in metrics(result):
        for name, value in line.items():
            if name not in ("step", "seconds"):
                logged.setdefault(name, []).append((line["step"], value))
    assert set(events.Tags()["scalars"]) == logged.keys()
    for tag, values in logged.items():
        read = [(event.step, event.value) for event in events.Scalars(tag)]
        assert read == [(step, pytest.approx(value)) for step, value in values], tag
    names = [name for name, _ in load_model(result.export_dir)[0].named_parameters()]
    expected = {f"{kind}/{name}" for kind in ("parameters", "gradients") for name in names}
    assert set(events.Tags()["histograms"]) == expected
    for tag in expected:
        assert [event.step for event in events.Histograms(tag)] == [2, 4, 6]
    samples = events.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [3, 6]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"| {name} |" in config for name in ("n_layer", "learning_rate", "seed"))
    about = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    for word in ('"commit"', '"branch"', '"dirty"', '"python"', result.run_dir.name, '"lineage"'):
        assert word in about


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_histograms_and_stops_the_run(
    tiny, quiet, monkeypatch, poison
):
    """The histogram skips and counts; then the norm stops the run, and the last bundle is good."""
    real = train_module.training_step

    def poisoned(setup, step, *phases):
        loss, grad_norm = real(setup, step, *phases)
        if step == 4:
            next(setup.model.parameters()).grad.view(-1)[:3] = poison
            grad_norm = grad_norm * poison
        return loss, grad_norm

    monkeypatch.setattr(train_module, "training_step", poisoned)
    with pytest.raises(RunError, match=r"gradient's norm is (nan|inf) at step 5"):
        train(tiny(histogram_interval=5), output=quiet)
    (run_dir,) = Path("runs").iterdir()
    text = RunDirectory(run_dir).metrics.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["nonfinite"] for line in lines if "nonfinite" in line] == [3]
    (events,) = RunDirectory(run_dir).tensorboard.iterdir()
    events = EventAccumulator(str(events)).Reload()
    (histogram,) = events.Histograms("gradients/token_embedding.weight")
    assert histogram.step == 5
    assert "warning" not in console(run_dir)
    model = load_model(run_dir)[0]  # that of step 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, RunError])
def test_trackers_are_closed_whatever_happens(tiny, quiet, monkeypatch, error):
    closed = closings(monkeypatch)

    def fail(*_):
        raise error("x")

    monkeypatch.setattr(train_module, "training_step", fail)
    with pytest.raises(error):
        train(tiny(), output=quiet)
    assert closed == [True]


def test_ctrl_c_of_the_real_command_exits_with_130_and_leaves_a_model(text_file):
    flags = [*TINY_FLAGS, "--max-iters=1000000", "--eval-interval=0", "--log-interval=10"]
    status, out, err = train_until(signal.SIGINT, "--data", str(text_file), *flags)
    assert (status, err) == (130, "")
    assert "Stopped after step" in out
    (run_dir,) = Path("runs").iterdir()
    assert loaded_step(run_dir) > 0


# GPT-2's tokens -------------------------------------------------------------------------------


def test_a_model_of_gpt2s_tokens_trains_speaks_and_goes_on(tiny, quiet, gpt2_vocabulary, folio):
    config = tiny(tokenizer="gpt2", n_embd=4, n_layer=1, max_iters=2, model_name="bpe")
    result = train(config.model_copy(update={"eval_interval": 0}), output=quiet)
    bundle = Path("checkpoints/bpe")
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer == {"format_version": 1, "token_kind": "gpt2"}
    assert json.loads((bundle / "config.json").read_text("utf-8"))["vocab_size"] == 50304
    assert "tokens (" in console(result.run_dir)
    # From another process, and without the network: what it needs is in tiktoken's cache.
    flags = ["--device=cpu", "--max-new-tokens=20", "--temperature=2", "--prompt=Zoë €"]
    done = folio("inference.py", "--model-name", "bpe", *flags)
    assert (done.returncode, done.stdout[:5]) == (0, "Zoë €"), done.stderr
    done = folio("train.py", "--model-name", "bpe", "--max-iters", "3")
    assert done.returncode == 0, done.stderr


def test_padding_is_never_sampled():
    model = LanguageModel(ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=4), 64, 3)
    torch.nn.init.zeros_(model.token_embedding.weight)  # all ids are as likely
    ids = generate_tokens(model, [0], 10, seeds=range(50))
    assert set(ids.flatten().tolist()) == {0, 1, 2}
