"""A run, from a text to an export, and every way in which it can end.

trainer.py, budget.py, run_record.py and train.py.

python -m pytest tests/test_trainer.py
"""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CHECKOUT,
    TINY_FLAGS,
    assert_equal,
    assert_same_bits,
    loaded_step,
    train_until,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import budget
import inference
import run_record
import train as train_command
import trainer as trainer_module
from bundle import BUNDLE_FILES, load_tokenizer, read_bundle
from callbacks import Best, Overfitting, TrainResult, find_overfitting
from config import ConfigLoader, LoadedConfig
from generate import generate_tokens
from inference import load_model
from model import LanguageModel
from parameters import ModelConfig
from resume import plan_run
from trainer import Trainer, dry_run, estimate_loss, prepare_trainer, train
from utils import kernels
from utils.command_line import CommandLine, format_flag
from utils.errors import RunError, UserError
from utils.output import Output, run_command
from utils.run_manager import RunDirectory, create_run_directory
from utils.sizes import Size
from utils.tracking.metrics import METRICS, get_chart, get_tag
from utils.tracking.tensorboard import TensorBoardTracker

REAL_STEP = Trainer.training_step


def read_metrics(result: TrainResult) -> list[dict]:
    text = RunDirectory(result.run_dir).metrics.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_losses(result: TrainResult) -> list[float]:
    return [line["loss/train"] for line in read_metrics(result) if "loss/train" in line]


def read_console(run_dir: Path) -> str:
    return (run_dir / "logs" / "console.txt").read_text(encoding="utf-8")


def watch_closing(monkeypatch) -> list[bool]:
    """Return a list that gets an element whenever TensorBoard is closed."""
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


def test_training_lowers_the_loss(tiny, quiet):
    result = train(tiny(max_iters=150, learning_rate=1e-2, n_embd=32), output=quiet)
    assert read_losses(result)[0] > 3
    assert result.val_loss < 1.5
    assert result.exit_status == 0
    assert result.step == 150


GOLDEN = {
    ("modern", "muon", "random"): [3.3322, 3.3299, 3.3249, 3.3192, 3.3153, 3.3122],
    ("gpt2", "adamw", "random"): [3.3351, 3.3277, 3.3213, 3.3288, 3.2955, 3.2969],
    ("modern", "muon", "shifted"): [3.3322, 3.3301, 3.3266, 3.3228, 3.3160, 3.3126],
    ("speedrun", "muon", "shifted"): [3.3322, 3.3308, 3.3270, 3.3228, 3.3168, 3.3128],
}


@pytest.mark.parametrize(("architecture", "optimizer", "order"), GOLDEN)
def test_the_losses_of_a_small_run_are_the_golden_ones(tiny, quiet, architecture, optimizer, order):
    config = tiny(architecture=architecture, optimizer=optimizer, window_order=order)
    losses = read_losses(train(config, output=quiet))
    assert losses == pytest.approx(GOLDEN[architecture, optimizer, order], abs=5e-4)


def test_the_same_config_gives_bit_for_bit_the_same_model(tiny, quiet):
    one, two = (train(tiny(dropout=0.2), output=quiet) for _ in range(2))
    assert read_losses(one) == read_losses(two)
    first, second = (load_file(r.export_dir / "model.safetensors") for r in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_recorded_config_trains_the_same_model_again(tiny, quiet):
    first = train(tiny(dropout=0.1, seed=5, run_tag="first"), output=quiet)
    loaded = ConfigLoader(config_file=str(first.run_dir / "meta" / "full_config.json")).load()
    again = train(loaded.config, loaded=loaded, output=quiet)
    assert read_losses(again) == read_losses(first)
    assert again.run_dir != first.run_dir
    assert "first" not in again.run_dir.name


def test_a_rerun_works_from_any_directory(tiny, quiet, tmp_path, monkeypatch):
    Path("here.txt").write_text("a text beside the run\n" * 200, encoding="utf-8")
    first = train(tiny(data="here.txt"), output=quiet)
    record = (first.run_dir / "meta" / "full_config.json").resolve()
    monkeypatch.chdir(tmp_path)
    loaded = ConfigLoader(config_file=str(record)).load()
    again = train(loaded.config, loaded=loaded, output=quiet)
    monkeypatch.chdir(tmp_path / "cwd")
    again_losses = (tmp_path / again.run_dir / "logs" / "metrics.jsonl").read_text("utf-8")
    assert json.loads(again_losses.splitlines()[0])["loss/train"] == read_losses(first)[0]


def test_a_rerun_on_a_different_text_needs_the_data_flag(tiny, quiet, text_file):
    first = train(tiny(), output=quiet)
    record = str(first.run_dir / "meta" / "full_config.json")
    text_file.write_text("something else entirely, " * 100, encoding="utf-8")
    loaded = ConfigLoader(config_file=record).load()
    with pytest.raises(UserError, match=f"{text_file}.*{first.run_dir.name}.*--data"):
        train(loaded.config, loaded=loaded, output=quiet)
    assert len(list(Path("runs").iterdir())) == 1
    loaded = ConfigLoader({"data": str(text_file)}, record).load()
    assert train(loaded.config, loaded=loaded, output=quiet).step == 6


def test_a_run_tag_that_is_not_unicode_is_recorded(tiny, quiet):
    name = os.fsdecode(b"caf\xe9")
    result = train(tiny(run_tag=name), argv=["--run-tag", name], output=quiet)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["run"]["argv"] == ["--run-tag", name]
    assert result.run_dir.name.endswith("_caf")


@pytest.mark.parametrize("changes", [{"eval_interval": 1}, {"eval_iters": 0}, {"log_interval": 5}])
@pytest.mark.parametrize("sample_interval", [0, 1])
def test_evaluations_and_samples_do_not_change_the_training(tiny, quiet, changes, sample_interval):
    usual = train(tiny(dropout=0.2), output=quiet)
    other = train(tiny(dropout=0.2, **changes, sample_interval=sample_interval), output=quiet)
    assert read_losses(other) == read_losses(usual)


def test_an_evaluation_does_not_depend_on_how_many_windows_are_in_memory(tiny, monkeypatch):
    config = tiny(eval_iters=7)
    trainer = prepare_trainer(config)
    losses = []
    for windows in (1, 1000):
        monkeypatch.setattr(
            trainer_module, "count_parallel_windows", lambda model, windows=windows: windows
        )
        losses.append(trainer.evaluate())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_gives_nearly_the_same_losses_and_is_recorded(tiny, quiet, precision):
    result = train(tiny(precision=precision), output=quiet)
    assert read_losses(result) == pytest.approx(read_losses(train(tiny(), output=quiet)), abs=0.02)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["run"]["precision"] == precision
    weights = load_file(result.export_dir / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_table_of_n_grams_is_not_work_that_makes_compiling_pay_off(tiny, monkeypatch):
    flops = []

    def record(requested, backend, device, amount):
        flops.append(amount)
        return choose(requested, backend, device, amount)

    choose = trainer_module.choose_backend
    monkeypatch.setattr(trainer_module, "choose_backend", record)
    for settings in ({}, {"architecture": "speedrun", "ngram_rows": 10_000}):
        prepare_trainer(tiny(**settings))
    assert flops[0] == flops[1] > 0


def test_a_kernel_that_sees_later_positions_ends_the_run_before_it_starts(tiny, quiet, monkeypatch):
    def leak(q, k, v, dropout_p):
        return v.mean(dim=2, keepdim=True).expand_as(v)

    monkeypatch.setattr(kernels, "apply_causal_attention", leak)
    with pytest.raises(UserError, match=r"bf16.*later positions.*--precision"):
        train(tiny(precision="bf16"), output=quiet)
    assert not Path("runs").exists()


def test_a_fp16_step_with_overflowing_gradients_is_skipped(tiny):
    scaler = torch.amp.GradScaler("cpu", init_scale=1e30)  # everything overflows at this scale
    trainer = prepare_trainer(tiny(precision="fp16"))
    trainer.scaler = scaler
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    _, grad_norm = trainer.training_step(0)
    assert not grad_norm.isfinite()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert scaler.get_scale() < 1e30


@pytest.mark.parametrize("micro", [1, 3])
def test_gradient_accumulation_does_not_change_the_training(tiny, quiet, micro):
    whole = train(tiny(), output=quiet)
    parts = train(tiny(micro_batch_size=micro), output=quiet)
    assert read_losses(parts) == pytest.approx(read_losses(whole), rel=1e-4)
    norms = [[m["grad_norm"] for m in read_metrics(r) if "grad_norm" in m] for r in (whole, parts)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_torch_compile_keeps_the_weight_names_and_is_recorded(tiny, quiet):
    compiled = {"torch_compile": "on", "compile_backend": "aot_eager"}
    result = train(tiny(**compiled), output=quiet)
    plain = train(tiny(), output=quiet)
    assert read_losses(result) == pytest.approx(read_losses(plain), rel=1e-4)
    names = [list(load_file(r.export_dir / "model.safetensors")) for r in (result, plain)]
    assert names[0] == names[1]
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["run"]["torch_compile"] == "aot_eager"
    assert "torch_compile" in record["run"]["torch_compile_reason"]
    record = json.loads((plain.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["run"]["torch_compile"] == "off"
    assert "too short" in record["run"]["torch_compile_reason"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_learning_rate_flag_reaches_the_optimizer(tiny, optimizer):
    """From the command line through parsing, loading, planning and set-up to one training step."""
    flags = {**tiny().model_dump(exclude_unset=True), "optimizer": optimizer, "warmup_iters": 0}
    del flags["learning_rate"]
    argv = [word for name, value in flags.items() for word in (format_flag(name), str(value))]
    settings, _, problems = CommandLine("", ModelConfig).parse([*argv, "--learning-rate", "3e-4"])
    loaded, plan = plan_run(ConfigLoader(settings, problems=problems))
    assert loaded.sources["learning_rate"] == "--learning-rate"
    trainer = prepare_trainer(loaded.config, loaded, plan)
    trainer.training_step(0)
    peaks = {True: 2 * 3e-4, False: 3e-4}  # Muon's learning rate is twice AdamW's
    expected = [peaks["momentum" in group] for group in trainer.optimizer.param_groups]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(expected)
    assert (2 * 3e-4 in expected) == (optimizer == "muon")


# Evaluation and export ------------------------------------------------------------------------


def test_evaluations_are_at_every_interval_and_at_the_last_step(tiny, quiet):
    result = train(tiny(max_iters=7, eval_interval=3), output=quiet)
    evaluated = [line["step"] for line in read_metrics(result) if "eval/val_loss" in line]
    assert evaluated == [3, 6, 7]
    last_only = train(tiny(max_iters=7, eval_interval=0), output=quiet)
    assert [m["step"] for m in read_metrics(last_only) if "eval/val_loss" in m] == [7]


def test_evaluating_a_whole_split_averages_over_every_target(tiny):
    config = tiny(eval_iters=0, batch_size=3)
    trainer = prepare_trainer(config)
    val = torch.from_numpy(trainer.data.splits["val"].astype("int64"))
    total = 0.0
    for start in range(0, len(val) - 1, 16):
        window = val[start : start + 17]
        _, loss = trainer.model(window[None, :-1], window[None, 1:])
        total += loss.item() * (len(window) - 1)
    expected = total / (len(val) - 1)
    assert trainer.evaluate()["val"] == pytest.approx(expected, 1e-5)


def test_the_export_is_the_step_with_the_lowest_val_loss(tiny, quiet, monkeypatch):
    scripted = iter([3.0, 1.0, 2.0])
    schedule = {"lr_schedule": "constant"}
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(scripted)}
        )
        result = train(tiny(max_iters=6, eval_interval=2, **schedule), output=quiet)
    assert (result.best_step, result.best_val_loss, result.val_loss) == (4, 1.0, 2.0)
    state = json.loads((result.export_dir / "training_state.json").read_text(encoding="utf-8"))
    assert (state["step"], state["best_val_loss"]) == (4, 1.0)
    assert "at step 4" in read_console(result.run_dir)
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


def test_losses_are_also_logged_in_bits_per_byte(tiny, quiet, text_file):
    text_file.write_text("é" * 3000, encoding="utf-8")  # two bytes a character
    result = train(tiny(), output=quiet)
    last = [line for line in read_metrics(result) if "eval/val_loss" in line][-1]
    nats = last["eval/val_loss"]
    assert last["eval/val_bits_per_byte"] == pytest.approx(nats / 0.693147 / 2, rel=1e-4)


# The record -----------------------------------------------------------------------------------


def test_the_record_has_the_text_the_command_and_the_sources(tiny, quiet, text_file):
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


def test_epochs_are_recorded_as_steps(tiny, quiet):
    result = train(tiny(max_iters=None, epochs=0.1), output=quiet)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    expected = -(-int(5370 * 0.9) // (10 * 4 * 16))
    assert result.step == record["config"]["max_iters"] == expected
    assert record["config"]["epochs"] is None
    assert record["sources"]["max_iters"] == "epochs 0.1 (train())"


def test_max_minutes_alone_are_recorded_as_steps(tiny, quiet):
    result = train(tiny(max_iters=None, max_minutes=0.01), output=quiet)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert record["config"]["max_iters"] == result.step >= 1
    assert record["config"]["max_minutes"] is None
    assert record["sources"]["max_iters"] == "max_minutes 0.01 (train())"


def test_compiling_is_announced_once_before_its_speed_is_measured(tiny, monkeypatch):
    lines, announced = [], []

    def measure(trainer, **_):
        announced.append(sum("Compiling" in line for line in lines))
        return 1e-3, 1e-3

    monkeypatch.setattr(budget, "measure_speed", measure)
    flags = {"torch_compile": "on", "compile_backend": "aot_eager"}
    prepare_trainer(tiny(max_iters=None, max_minutes=1e-4, **flags), on_progress=lines.append)
    assert announced == [1]
    assert sum("Compiling" in line for line in lines) == 1


def test_max_minutes_with_max_iters_is_a_time_limit(tiny, quiet):
    result = train(tiny(max_iters=10**6, eval_interval=0, max_minutes=0.01), output=quiet)
    assert 1 <= result.step < 10**6
    assert result.exit_status == 0
    text = read_console(result.run_dir)
    assert f"step {result.step:,}" in text
    assert f"--resume {result.run_dir} --device cpu" in text
    assert "max_minutes 0.01" in text
    assert "max_minutes 0.01" in result.stopped_by
    assert (result.export_dir / "model.safetensors").exists()


def test_console_txt_holds_banner_steps_evaluations_sample_and_next_commands(tiny, quiet):
    result = train(tiny(), output=quiet)
    text = read_console(result.run_dir)
    for words in (
        "Model ",
        "Text ",
        "CPU",
        "step 2/6",
        "eval 6/6",
        "sample 0/6",
        "best model (step 6)",
    ):
        assert words in text, words
    assert text.count("--- Sample of") == 1
    assert f"inference.py --run {result.run_dir}" in text


def test_samples_are_printed_at_the_sample_interval(tiny, quiet):
    result = train(tiny(max_iters=9, eval_interval=2, sample_interval=4), output=quiet)
    text = read_console(result.run_dir)
    assert [n for n in range(10) if f"sample {n}/9" in text] == [0, 4, 8]


@pytest.fixture
def rising(monkeypatch) -> None:
    """Evaluations whose val loss rises from the second on, while train loss falls."""
    numbers = itertools.count(1)

    def evaluate(trainer: Trainer) -> dict[str, float]:
        number = next(numbers)
        return {"train": 2 - number / 10, "val": 2 + abs(number - 2) / 10}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


def test_the_last_sample_is_that_of_the_exported_model(tiny, quiet, rising):
    result = train(tiny(max_iters=6, eval_interval=1, learning_rate=0.1), output=quiet)
    lines = RunDirectory(result.run_dir).samples.read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["step"] for sample in samples] == [*range(7), 2]
    assert samples[-1]["exported"]
    exported, at_step_2, last = (samples[k]["text"] for k in (-1, 2, 6))
    assert exported[:10] == at_step_2[:10] != last[:10]


def test_a_val_loss_that_has_risen_is_noted_once_and_with_remedies_at_the_end(tiny, quiet, rising):
    result = train(tiny(max_iters=6, eval_interval=1), output=quiet)
    assert result.overfitting == Overfitting(since=2, rise=pytest.approx(0.4))
    lines = read_console(result.run_dir).splitlines()
    (note,) = [line for line in lines if line.startswith("Note: overfitting")]
    assert "since step 2" in note
    (advice,) = [line for line in lines if line.startswith("Overfitting")]
    assert "since step 2" in advice and "--dropout" in advice
    recorded = json.loads((result.run_dir / "meta" / "result.json").read_text(encoding="utf-8"))
    assert recorded["overfitting"]["since"] == 2


def test_a_val_loss_that_rises_slowly_is_noted_once_too(tiny, quiet, monkeypatch):
    losses = iter([2.0, 2.004, 2.005, 2.05, 2.3, 2.4])
    monkeypatch.setattr(Trainer, "evaluate", lambda _: {"train": 1.0, "val": next(losses)})
    text = read_console(train(tiny(max_iters=6, eval_interval=1), output=quiet).run_dir)
    assert text.count("Note: overfitting") == 1
    assert "from 2.0000 to 2.0500" in text


def test_a_best_model_that_cannot_be_read_again_costs_the_last_sample_only(
    tiny, quiet, monkeypatch
):
    def fail(*_):
        raise UserError("damaged")

    monkeypatch.setattr(run_record, "read_bundle", fail)
    result = train(tiny(), output=quiet)
    assert (result.exit_status, result.longest_overlap) == (0, None)
    assert "damaged" in read_console(result.run_dir)


@pytest.mark.parametrize(
    ("best", "train_loss", "val_loss"),
    [
        (Best(5, 2.0, 1), 1.0, 3.0),  # one worse evaluation may be chance
        (Best(5, 2.0, 4), 1.0, 2.005),  # no worse to speak of
        (Best(5, 2.0, 4), 2.5, 3.0),  # train loss is up too: the run diverges
        (Best(), None, None),
    ],
)
def test_a_val_loss_that_is_not_higher_for_long_is_no_overfitting(best, train_loss, val_loss):
    assert find_overfitting(best, train_loss, val_loss) is None
    assert find_overfitting(Best(5, 2.0, 4), 1.0, 3.0) is not None


def test_the_untrained_models_sample_stands_beside_the_loss_of_a_guess(tiny, quiet):
    result = train(tiny(), output=quiet)
    tokens = load_tokenizer(read_bundle(result.export_dir)).num_tokens
    assert f"loss {math.log(tokens):.2f}" in read_console(result.run_dir)
    resumed = train(tiny(max_iters=8, init_from=str(result.run_dir)), output=quiet)
    text = read_console(resumed.run_dir)
    assert "sample 0/8" in text
    assert "guessing" not in text


def test_the_longest_stretch_that_a_sample_shares_with_the_training_text_is_recorded(
    tiny, quiet, monkeypatch, text_file
):
    text = text_file.read_text(encoding="utf-8")
    sample = text[19::-1] + text[10:40] + text[9::-1]
    monkeypatch.setattr(run_record, "sample_text", lambda *_: sample)
    result = train(tiny(), output=quiet)
    assert text[10:40] in result.longest_overlap
    assert result.longest_overlap in text
    assert f"{len(result.longest_overlap)} characters" in read_console(result.run_dir)


def test_a_run_that_ends_during_warmup_prints_a_note(tiny, quiet):
    short = train(tiny(warmup_iters=7), output=quiet)
    (note,) = [x for x in read_console(short.run_dir).splitlines() if x.startswith("Note:")]
    assert "7" in note
    assert "warmup_iters" in note
    assert "Note:" not in read_console(train(tiny(warmup_iters=6), output=quiet).run_dir)


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a command line."""
    return CommandLine(None, ModelConfig).parse(flags)[0]


def test_settings_by_name_train_as_in_a_notebook_without_a_terminal_or_the_main_thread(
    text_file, monkeypatch
):
    class Cell:
        """A notebook's standard output: no file, and no terminal."""

        written = ""

        def write(self, text):
            self.written += text

        def flush(self):
            pass

    cell = Cell()
    monkeypatch.setattr(sys, "stdout", cell)
    settings = {**read_flags(TINY_FLAGS), "data": text_file, "seed": np.int64(5)}
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, **settings).result()
    assert result.step == 4 and result.run_dir.parent == Path("runs")
    assert cell.written == read_console(result.run_dir)
    record = json.loads((result.run_dir / "meta/full_config.json").read_text(encoding="utf-8"))
    assert (record["config"]["seed"], record["sources"]["seed"]) == (5, "train()")
    assert record["sources"]["beta1"] == "configs/train.yaml"
    with pytest.raises(UserError, match=r"n_layers.*n_layer"):
        train(data=text_file, n_layers=2)
    with pytest.raises(TypeError, match="n_layer"):
        train(ModelConfig(), n_layer=2)


def test_num_threads_sets_pytorchs_threads(tiny, quiet):
    train(tiny(num_threads=2), output=quiet)
    assert torch.get_num_threads() == 2


def test_a_dry_run_does_not_cache_the_sample_corpus(tiny, tmp_path, sample_corpus):
    config = tiny(data=None)
    dry_run(LoadedConfig(config, dict.fromkeys(type(config).model_fields, "default")))
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_prints_six_lines_then_the_settings_if_asked_for_and_writes_nothing(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(budget, "SIZES", (Size(2, 16, 2),))  # its own: no advice
    monkeypatch.setattr(budget, "measure_speed", lambda *args, **kwargs: (1.0, 1.0))
    before = sorted(tmp_path.rglob("*"))
    config = tiny()
    loaded = LoadedConfig(config, dict.fromkeys(type(config).model_fields, "default"))
    lines = dry_run(loaded).splitlines()
    heads = ["Model", "Text", "Steps", "Device", "Memory", "Time"]
    assert [line.split()[0] for line in lines] == heads
    for fact, line in zip(
        ("parameters", "vocabulary", "epochs", "CPU", "B", " ms "), lines, strict=True
    ):
        assert fact in line
    more = dry_run(loaded, show_config=True).splitlines()
    assert [line.split()[0] for line in more[:6]] == heads
    assert any(line.split()[:2] == ["n_layer", "2"] for line in more[6:])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_measures_the_model_that_the_run_would_train(tiny, monkeypatch):
    created, create = [], Trainer.__init__

    def count(trainer, *args, **options):
        created.append(trainer)
        create(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "__init__", count)
    config = tiny()
    dry_run(LoadedConfig(config, dict.fromkeys(type(config).model_fields, "default")))
    assert len(created) == 1  # a second one would take as much memory again


def test_a_dry_run_names_a_size_that_would_learn_more_in_the_same_time(tiny, monkeypatch):
    monkeypatch.setattr(budget, "SIZES", (Size(1, 8, 1), Size(2, 32, 2)))
    monkeypatch.setattr(budget, "measure_speed", lambda *args, **kwargs: (9.0, 9.0))
    config = tiny(n_embd=2, n_head=1, n_layer=1)
    loaded = LoadedConfig(config, dict.fromkeys(type(config).model_fields, "default"))
    last = dry_run(loaded).splitlines()[-1]
    for fact in ("2 layers", "32 channels", "--size auto", "--max-minutes 1"):
        assert fact in last


# Ways to end ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"data": "none.txt"}, {"block_size": 10**6}, {"device": "cuda:7"}]
)
def test_a_users_mistake_leaves_no_run_directory(tiny, quiet, changes):
    with pytest.raises(UserError):
        train(tiny(**changes), output=quiet)
    assert not Path("runs").exists()


def test_a_non_finite_loss_ends_the_run_and_keeps_the_last_good_export(tiny, quiet, monkeypatch):
    def training_step(trainer, index):
        loss, grad_norm = REAL_STEP(trainer, index)
        return (loss * math.nan if index == 3 else loss), grad_norm

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(RunError, match=r"loss.* nan .*step 4"):
        train(tiny(eval_interval=2), output=quiet)
    (run_dir,) = Path("runs").iterdir()
    assert "step 4" in read_console(run_dir).partition("error: ")[2]
    state = json.loads((run_dir / "artifacts/export/training_state.json").read_text("utf-8"))
    assert state["step"] == 2


def test_a_diverging_run_ends_with_the_step(tiny, quiet):
    with pytest.raises(RunError, match=r"(loss|norm).* (nan|inf) .*step \d"):
        train(tiny(learning_rate=1e20, warmup_iters=0, grad_clip=0.0), output=quiet)


def signal_at(monkeypatch, at: int, number: int, times: int = 1):
    """Send this process a signal during step `at`, counted from 0."""

    def training_step(trainer, index):
        if index == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        return REAL_STEP(trainer, index)

    monkeypatch.setattr(Trainer, "training_step", training_step)


STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize(("number", "status"), STATUSES.items())
def test_a_signal_finishes_the_step_saves_and_closes_the_run(
    tiny, quiet, monkeypatch, number, status
):
    signal_at(monkeypatch, 1, number)
    before = signal.getsignal(number)
    result = train(tiny(), output=quiet)
    assert (result.step, result.exit_status) == (2, status)
    assert len(read_losses(result)) == 2
    assert "step 2" in read_console(result.run_dir)
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

    monkeypatch.setattr(trainer_module, "estimate_loss", evaluate)
    result = train(tiny(eval_interval=2), output=quiet)
    assert (result.step, result.exit_status) == (2, 128 + number)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_second_signal_aborts(tiny, quiet, monkeypatch, number, raised):
    signal_at(monkeypatch, 1, number, times=2)
    with pytest.raises(raised) as caught:
        train(tiny(), output=quiet)
    assert getattr(caught.value, "code", 143) == 143
    (run_dir,) = Path("runs").iterdir()
    assert "error: interrupted" in read_console(run_dir)


def test_a_second_sighup_does_not_abort(tiny, quiet, monkeypatch):
    signal_at(monkeypatch, 1, signal.SIGHUP, times=2)
    result = train(tiny(), output=quiet)
    assert (result.step, result.exit_status) == (2, 129)
    assert loaded_step(result.checkpoint) == 2


def test_a_sighup_that_nohup_ignores_stays_ignored(tiny, quiet, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, 1, signal.SIGHUP)
        result = train(tiny(), output=quiet)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.step, result.exit_status) == (6, 0)


def test_a_run_directory_that_is_deleted_meanwhile_is_one_line(text_file, monkeypatch, capsys):
    def training_step(trainer, index):
        if index == 3:
            shutil.rmtree("runs")
        return REAL_STEP(trainer, index)

    def close(tracker):  # as it does if it has events left to write
        raise FileNotFoundError("events.out.tfevents")

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(TensorBoardTracker, "close", close)
    flags = [*TINY_FLAGS, f"--data={text_file}", "--max-iters=20", "--checkpoint-interval=1"]
    assert run_command(train_command.main, flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/" in line and "deleted" in line and "intact" not in line
    assert not Path("runs").exists()


def test_out_of_memory_names_the_settings_to_lower(tiny, quiet, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "training_step", no_memory)
    with pytest.raises(RunError, match="micro_batch_size") as caught:
        train(tiny(), output=quiet)
    for name in ("block_size", "n_embd", "n_layer"):
        assert name in str(caught.value)
    (run_dir,) = Path("runs").iterdir()
    result = json.loads((run_dir / "meta" / "result.json").read_text(encoding="utf-8"))
    assert str(caught.value) in result["error"]
    assert str(caught.value) in read_console(run_dir)


def test_out_of_memory_names_the_values_of_the_run_that_failed(tiny):
    requested, settled = tiny(n_layer=1), tiny(n_layer=7)
    with pytest.raises(RunError, match=r"n_layer \(7\)"):
        with run_record.translate_failures(requested), run_record.translate_failures(settled):
            raise MemoryError


@pytest.mark.parametrize("sizes", [{"n_layer": 2**31 - 1}, {"n_embd": 2**21}])
def test_a_model_that_cannot_fit_is_refused_before_anything_is_allocated(tiny, quiet, sizes):
    (name,) = sizes
    with pytest.raises(UserError, match=rf"{name} {sizes[name]}.*memory"):
        train(tiny(**sizes), output=quiet)
    assert not Path("runs").exists()


def test_a_failed_allocation_is_an_out_of_memory_error(tiny, quiet, monkeypatch):
    monkeypatch.setattr(budget, "check_memory", lambda *_, **options: None)
    with pytest.raises(RunError, match="out of memory"):
        train(tiny(n_embd=2**21), output=quiet)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["metrics", "console"])
def test_a_full_disk_ends_the_run_with_one_line(tiny, quiet, monkeypatch, name):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    def on_a_full_disk(runs_dir, run_id):
        run = create_run_directory(runs_dir, run_id)
        getattr(run, name).symlink_to("/dev/full")
        return run

    monkeypatch.setattr(run_record, "create_run_directory", on_a_full_disk)
    closed = watch_closing(monkeypatch)
    with pytest.raises(RunError, match="No space left on device"):
        train(tiny(), output=quiet)
    (run_dir,) = Path("runs").iterdir()
    if name == "metrics":  # console.txt comes before the trackers
        assert closed == [True]
        assert "No space left" in read_console(run_dir).partition("error: ")[2]


def test_a_report_that_a_full_disk_refuses_does_not_fail_the_run(tiny, quiet, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_record, "write_report", refuse)
    monkeypatch.setattr(Output, "print_warning", refuse)  # console.txt is on the same disk
    assert train(tiny(), output=quiet).step == 6


def test_a_disk_too_full_for_tensorboard_is_one_warning(text_file):
    resource = pytest.importorskip("resource")
    # The histograms exceed 1 MB. The report, with the code's uncommitted changes, does not.
    flags = [*TINY_FLAGS, "--max-iters=60", "--eval-interval=30", "--histogram-interval=1"]
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "train.py"), "--data", str(text_file), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("warning: TensorBoard ")


CALLS = [*("__init__", "log_config", "log_metrics", "log_histograms", "log_text", "flush", "close")]


@pytest.mark.parametrize("call", CALLS)
def test_a_failing_tracker_is_one_warning_and_leaves_the_run_bit_for_bit_identical(
    tiny, quiet, monkeypatch, call
):
    def broken(*args, **kwargs):
        raise OSError("disk gone")

    config = tiny(dropout=0.2, histogram_interval=2, sample_interval=3)
    plain = train(config, output=quiet)
    monkeypatch.setattr(TensorBoardTracker, call, broken)
    result = train(config, output=quiet)
    assert result.step == 6
    assert_same_bits(plain.checkpoint, result.checkpoint)
    assert read_losses(plain) == read_losses(result)
    text = read_console(result.run_dir)
    (warning,) = [line for line in text.splitlines() if "warning:" in line]
    assert "TensorBoard" in warning
    assert "disk gone" in warning


def test_histograms_and_samples_do_not_change_the_training(tiny, quiet):
    without = train(tiny(dropout=0.2, histogram_interval=0), output=quiet)
    with_all = train(tiny(dropout=0.2, histogram_interval=1, sample_interval=1), output=quiet)
    assert read_losses(without) == read_losses(with_all)
    weights = [load_file(r.checkpoint / "model.safetensors") for r in (without, with_all)]
    assert_equal(*weights)


def test_tensorboard_has_everything_that_a_run_logs_once(tiny, quiet):
    result = train(tiny(histogram_interval=2, sample_interval=3), output=quiet)
    (events,) = RunDirectory(result.run_dir).tensorboard.iterdir()
    guidance = {"scalars": 0, "histograms": 0, "tensors": 0}
    events = EventAccumulator(str(events), size_guidance=guidance).Reload()
    logged: dict[str, list] = {}
    for line in read_metrics(result):
        for name, value in line.items():
            if name not in ("step", "seconds"):
                logged.setdefault(name, []).append((line["step"], value))
    tags = [(n, subset) for n, metric in METRICS.items() for subset in metric.subsets]
    charts = {get_tag(*tag): get_chart(*tag) for tag in tags}
    assert set(events.Tags()["scalars"]) == {charts[tag] for tag in logged}
    for tag, values in logged.items():
        read = [(event.step, event.value) for event in events.Scalars(charts[tag])]
        assert read == [(step, pytest.approx(value)) for step, value in values], tag
    names = [name for name, _ in load_model(result.export_dir)[0].named_parameters()]
    kinds = ("parameters", "parameter_gradients")
    expected = {f"{kind}/{name}" for kind in kinds for name in names}
    assert set(events.Tags()["histograms"]) == expected
    for tag in expected:
        assert [event.step for event in events.Histograms(tag)] == [2, 4, 6]
    samples = events.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [0, 3, 6]
    assert [event.step for event in events.Tensors("sample_exported/text_summary")] == [6]
    config = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"| {name} |" in config for name in ("n_layer", "learning_rate", "seed"))
    about = events.Tensors("setup/text_summary")[0].tensor_proto.string_val[0].decode()
    for word in ('"commit"', '"branch"', '"dirty"', '"python"', result.run_dir.name, '"lineage"'):
        assert word in about


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_gradient_is_in_the_histograms_and_stops_the_run(
    tiny, quiet, monkeypatch, poison
):
    """The histogram counts the non-finite values; then the norm stops the run, before a save."""

    def training_step(trainer, index):
        loss, grad_norm = REAL_STEP(trainer, index)
        if index == 4:
            next(trainer.model.parameters()).grad.view(-1)[:3] = poison
            grad_norm = grad_norm * poison
        return loss, grad_norm

    monkeypatch.setattr(Trainer, "training_step", training_step)
    with pytest.raises(RunError, match=r"norm.* (nan|inf) .*step 5"):
        train(tiny(histogram_interval=5), output=quiet)
    (run_dir,) = Path("runs").iterdir()
    text = RunDirectory(run_dir).metrics.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["nonfinite"] for line in lines if "nonfinite" in line] == [3]
    (events,) = RunDirectory(run_dir).tensorboard.iterdir()
    events = EventAccumulator(str(events)).Reload()
    (histogram,) = events.Histograms("parameter_gradients/token_embedding.weight")
    assert histogram.step == 5
    assert "warning" not in read_console(run_dir)
    model = load_model(run_dir)[0]  # that of step 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, RunError])
def test_trackers_are_closed_after_any_failure(tiny, quiet, monkeypatch, error):
    closed = watch_closing(monkeypatch)

    def fail(*_):
        raise error("x")

    monkeypatch.setattr(Trainer, "training_step", fail)
    with pytest.raises(error):
        train(tiny(), output=quiet)
    assert closed == [True]


def test_ctrl_c_exits_the_command_with_130_and_saves_a_model(text_file):
    flags = [*TINY_FLAGS, "--max-iters=1000000", "--eval-interval=0", "--log-interval=10"]
    status, out, err = train_until(signal.SIGINT, "--data", str(text_file), *flags)
    assert (status, err) == (130, "")
    assert "Stopped after step" in out
    (run_dir,) = Path("runs").iterdir()
    assert loaded_step(run_dir) > 0


# GPT-2's tokens -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_with_gpt2_tokens_trains_generates_and_resumes(tiny, quiet, gpt2_vocabulary, folio):
    config = tiny(tokenizer="gpt2", n_embd=4, n_layer=1, max_iters=2, model_name="bpe")
    result = train(config.model_copy(update={"eval_interval": 0}), output=quiet)
    bundle = Path("checkpoints/bpe")
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer == {"format_version": 1, "token_kind": "gpt2"}
    assert json.loads((bundle / "config.json").read_text("utf-8"))["vocab_size"] == 50304
    assert "tokens (" in read_console(result.run_dir)
    # From another process, without the network: tiktoken's cache has what it needs.
    flags = ["--device=cpu", "--max-new-tokens=20", "--temperature=2", "--prompt=Zoë €"]
    done = folio("inference.py", "--model-name", "bpe", *flags)
    assert (done.returncode, done.stdout[:5]) == (0, "Zoë €"), done.stderr
    done = folio("train.py", "--model-name", "bpe", "--max-iters", "3")
    assert done.returncode == 0, done.stderr


# A BPE of one's own ---------------------------------------------------------------------------


def test_a_model_with_its_own_bpe_resumes_bit_for_bit_and_generates(tiny, quiet, capsys):
    config = tiny(tokenizer="bpe", vocab_size=300, model_name="own", sample_interval=0)
    whole = train(config.model_copy(update={"model_name": "whole"}), output=quiet)
    train(config.model_copy(update={"max_iters": 3, "lr_decay_iters": 6}), output=quiet)
    loaded, plan = plan_run(ConfigLoader({"model_name": "own", "max_iters": 6}))
    resumed = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    assert resumed.step == whole.step == 6
    assert_same_bits(Path("checkpoints/whole"), Path("checkpoints/own"))
    flags = ["--device=cpu", "--max-new-tokens=20", "--engine=torch", "--prompt=Zoë 漢"]
    assert inference.main(["--model-name", "own", *flags]) == 0
    assert capsys.readouterr().out.startswith("Zoë 漢")


def test_padding_is_never_sampled():
    model = LanguageModel(ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=4), 64, 3)
    torch.nn.init.zeros_(model.token_embedding.weight)  # all ids are equally likely
    ids = generate_tokens(model, [0], 10, seeds=range(50))
    assert set(ids.flatten().tolist()) == {0, 1, 2}
