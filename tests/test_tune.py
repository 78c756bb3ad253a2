"""Hyper-parameter search: the space, the trials, several workers, retries, and the storage.

python -m pytest tests/test_tune.py
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import optuna
import pytest
import torch
from helpers import CHECKOUT, LINES, TINY_FLAGS
from optuna.trial import TrialState

import trainer as trainer_module
import tune
from callbacks import Best, Evaluation, Step, TrainResult
from config import ConfigLoader
from parameters import ModelConfig
from utils.errors import RunError, UserError
from utils.output import run_command
from utils.run_manager import create_run_directory, create_run_id

SPACE = """
learning_rate: {low: 1e-4, high: 1e-1, log: true}
n_layer: {low: 1, high: 3}
n_head: [2, 4]
"""
STORAGE = "runs/studies/space.db"


class Killed(BaseException):
    """Ends a worker like SIGKILL: nothing is recorded, and its trial stays RUNNING."""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return the command with its own text and space; it returns the exit status."""
    Path("text.txt").write_text(LINES * 30, encoding="utf-8")
    Path("space.yaml").write_text(SPACE, encoding="utf-8")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(tune, "POLL_SECONDS", 0.02)

    def run(*flags: str, space: str | None = None) -> int:
        if space is not None:
            Path("space.yaml").write_text(space, encoding="utf-8")
        given = ["--space", "space.yaml", "--data", "text.txt", "--device", "cpu", *flags]
        return run_command(tune.main, given)

    return run


class FakeTrain:
    """Replaces train(): makes a run directory and reports losses that a test may set."""

    def __init__(self):
        self.calls = []
        self.before = lambda number, config: None
        self.losses = lambda number, config: [3.0, 2.0, config.learning_rate]
        self.after = lambda number, result: result

    def __call__(self, config, *, loaded, plan, argv, output, callbacks):
        number = len(self.calls)
        self.calls.append((config, loaded, plan, argv))
        self.before(number, config)
        run = create_run_directory(Path(config.runs_dir), create_run_id(plan.run_tag))
        (run.meta / "git.txt").write_text("", encoding="utf-8")
        called = [make(config) for make in callbacks.values()]
        config = config.model_copy(update={"max_iters": 30})
        loss, reason = torch.tensor(1.0), None
        for each in called:
            reason = each.after_step(Step(1, loss, loss, 0.1, run.path, config)) or reason
        step = 1
        for step, value in zip((10, 20, 30), self.losses(number, config), strict=False):
            if reason:
                break
            evaluation = Evaluation(step, value, value, 2 * value, Best(), run.path, config)
            for each in called:
                reason = each.after_evaluation(evaluation) or reason
        reason = reason if step < 30 else None
        result = TrainResult(run.path, run.export, None, step, 1.0, 1.0, step, 1.0, 1.0, 0, reason)
        return self.after(number, result)


@pytest.fixture
def trained(monkeypatch) -> FakeTrain:
    fake = FakeTrain()
    monkeypatch.setattr(trainer_module, "train", fake)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return fake


def load(storage: str = STORAGE, name: str = "space") -> optuna.Study:
    url = storage if "://" in storage else f"sqlite:///{storage}"
    return optuna.load_study(study_name=name, storage=url)


def read_trials(storage: str = STORAGE, name: str = "space"):
    return load(storage, name).trials


def select_done(trials) -> list:
    return [trial for trial in trials if trial.state.name in tune.DONE]


def kill_in(*numbers: int):
    def before(call, config):
        if call in numbers:
            raise Killed

    return before


def pass_grace_period(storage: str = STORAGE) -> None:
    """Date all heartbeats an hour back."""
    with contextlib.closing(sqlite3.connect(storage)) as connection, connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")


# ----------------------------------------------------------------------------------------------
# The space


@pytest.mark.parametrize(
    "space, facts",
    [
        ("", "space.yaml: empty"),
        ("{}", "space.yaml: setting"),
        ("lerning_rate: [1.0, 2.0]", "lerning_rate learning_rate?"),
        ("device: [cpu, cuda]", "device --device"),
        ("eval_iters: [1, 2]", "eval_iters --eval-iters"),
        ("data: [a, b]", "data --data"),
        ("n_layer: 3", "n_layer low: high: 3 --n-layer"),
        ("n_layer: [3]", "n_layer two [3]"),
        ("n_layer: [3, 4, 3]", "n_layer different [3, 4, 3]"),
        ("n_layer: [3, four]", 'n_layer whole number, "four"'),
        ("n_layer: [0, 1]", "n_layer least 1, 0"),
        ("dropout: {low: 0.5, high: 1.0}", "dropout: high below 1, 1.0"),
        ("dropout: {low: -1, high: 0.5}", "dropout: low least 0, -1"),
        ("n_layer: {low: 1.5, high: 3}", "n_layer: low whole number, 1.5"),
        ("n_layer: {low: one, high: 3}", 'n_layer: low whole number, "one"'),
        ("n_layer: {low: 4, high: 2}", 'n_layer "low": 4, "high": 2'),
        ("n_layer: {low: 2, high: 2}", 'n_layer "low": 2, "high": 2'),
        ("n_layer: {low: 2}", "n_layer: high number"),
        ("n_layer: {low: 2, high: 4, stop: 1}", 'n_layer "stop"'),
        ("n_layer: {low: 2, high: 5, step: 2}", 'n_layer step "high": 5'),
        ("beta1: {low: 0.1, high: 0.7, step: 0.25}", 'beta1 step "step": 0.25'),
        ("beta1: {low: 0.1, high: 0.7, step: .inf}", "beta1 step Infinity"),
        ("n_layer: {low: 2, high: 5, step: 0}", 'n_layer step "step": 0'),
        ("n_layer: {low: 2, high: 5, step: 0.5}", 'n_layer step "step": 0.5'),
        ("n_layer: {low: 2, high: 6, step: 1, log: true}", "n_layer log: step"),
        ("n_layer: {low: 2, high: 6, log: 1}", 'n_layer log: "log": 1'),
        ("weight_decay: {low: 0, high: 1, log: true}", "weight_decay log: low above 0"),
        ("min_lr: {low: null, high: 1.0}", "min_lr numbers"),
        ("optimizer: {low: muon, high: adamw}", "optimizer numbers list choices"),
        ("bias: {low: false, high: true}", "bias numbers list choices"),
        ("n_head: [3, 5]", "n_embd 128 n_head"),
        ("n_layer: [1, 2\nn_head: [1]", "space.yaml, line 2: YAML"),
    ],
)
def test_a_wrong_space_is_one_line_with_key_value_and_remedy(
    command, trained, capsys, space, facts
):
    assert command(space=space) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for fact in facts.split():
        assert fact in line
    assert not Path("runs").exists()


def test_all_mistakes_are_reported_together(command, trained, capsys):
    flags = ["--n-layer", "2", "--n-embd", "no", "--run-tag", "mine", "--storage", "a.log"]
    assert command(*flags, space="n_layer: [1, 2]\nn_hed: [1, 2]\nn_head: [0, 1]") == 2
    lines = capsys.readouterr().err.splitlines()
    facts = ("--n-layer", "n_hed", "n_head", "--n-embd", "--run-tag", "a.log")
    assert len(lines) == len(facts)
    assert all(any(fact in line for line in lines) for fact in facts)


def test_a_study_cannot_choose_a_size_for_each_trial(command, trained, capsys):
    assert command("--size", "auto", "--max-minutes", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--size" in line


def test_a_missing_space_and_a_missing_optuna_are_one_line(command, trained, capsys, monkeypatch):
    assert run_command(tune.main, []) == 2
    assert "--space FILE" in capsys.readouterr().err
    assert command("--space", "none.yaml") == 2
    assert "none.yaml: no such file" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command() == 2
    assert "pip install" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_mistakes_are_reported_before_optuna_or_torch_is_imported():
    code = "import sys, tune\nassert tune.run_command(tune.main, ['--space', 'none.yaml']) == 2\n"
    code += "sys.exit('optuna' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


def test_the_shipped_spaces_are_right():
    for path in (CHECKOUT / "configs" / "search").iterdir():
        problems: list[str] = []
        space = tune.read_space(str(path), {}, problems)
        assert not problems
        order = tune.StudySettings(space=str(path))
        tune.create_search(order, space, ConfigLoader())
        assert f"python tune.py --space configs/search/{path.name}" in path.read_text("utf-8")


def test_a_range_may_spell_out_its_defaults():
    Path("space.yaml").write_text("n_layer: {low: 1, high: 3, log: false, step: null}", "utf-8")
    problems: list[str] = []
    space = tune.read_space("space.yaml", {}, problems)
    assert (space, problems) == ({"n_layer": {"low": 1, "high": 3}}, [])


@pytest.mark.parametrize(
    "low, high, step", [(0.1, 0.7, 0.2), (0.0, 0.3, 0.1), (0.2, 0.9, 0.07), (0, 6, 3), (2, 5, 1)]
)
def test_a_range_has_all_its_steps_and_ends_exactly_at_high(low, high, step):
    name = "beta1" if isinstance(low, float) else "warmup_iters"
    Path("space.yaml").write_text(f"{name}: {{low: {low}, high: {high}, step: {step}}}", "utf-8")
    problems: list[str] = []
    space = tune.read_space("space.yaml", {}, problems)
    assert not problems
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(300):
        tune._suggest_values(study.ask(), space)
    drawn = {trial.params[name] for trial in study.trials}
    assert len(drawn) == round((high - low) / step) + 1
    assert (min(drawn), max(drawn)) == (low, high)


@pytest.mark.slow
def test_only_legal_and_new_combinations_are_proposed(command, trained, capsys):
    space = "n_embd: [12, 16, 20, 24, 28]\nn_head: [2, 4, 6]\ntie_weights: [null, true]"
    assert command("--trials", "12", space=space) == 0
    trials = read_trials()
    assert len(select_done(trials)) == len(trials) == 12
    assert all(trial.params["n_embd"] / trial.params["n_head"] % 2 == 0 for trial in trials)
    assert len({trial.params["n_head"] for trial in trials}) == 3
    assert {trial.params["tie_weights"] for trial in trials} == {None, True}
    capsys.readouterr()
    assert command("--trials", "100") == 0  # ends once all combinations were tried
    assert "18 combinations" in capsys.readouterr().out
    trials = read_trials()
    assert len(trials) == len({json.dumps(trial.params) for trial in trials}) == 2 * (5 + 2 + 2)


@pytest.mark.slow
def test_the_seed_determines_the_proposals(command, trained):
    for name, seed, trials in (("a", 1, 12), ("b", 1, 12), ("c", 2, 1)):
        assert command("--study", name, "--seed", str(seed), "--trials", str(trials)) == 0
    a, b, c = ([t.params for t in read_trials(f"runs/studies/{n}.db", n)] for n in "abc")
    assert a == b
    assert a[0] != c[0]
    assert len({json.dumps(params) for params in a}) == 12


# ----------------------------------------------------------------------------------------------
# Trials


@pytest.mark.slow
def test_a_study_ends_with_a_preset_of_its_best_trial(command, trained, capsys):
    flags = ["--max-iters", "30", "--trials", "8"]
    assert command(*flags) == 0
    printed = capsys.readouterr().out
    trials = read_trials()
    assert len(select_done(trials)) == len(trials) == len(trained.calls) == 8
    runs = [trial.user_attrs["run_dir"] for trial in trials]
    assert len(set(runs)) == 8
    assert all(run.endswith(f"_space_{t.number}") for run, t in zip(runs, trials, strict=True))
    best = min((t for t in trials if t.state is TrialState.COMPLETE), key=lambda t: t.value)
    assert f"\n{best.number:>5}" in printed
    assert "Importances" in printed
    assert f"optuna-dashboard sqlite:///{STORAGE}" in printed
    preset = Path("runs/studies/space.yaml")
    assert f"train.py --config {preset}" in printed
    loaded = ConfigLoader(config_file=str(preset)).load()
    config, *_ = trained.calls[best.number]
    own = {"runs_dir", "run_tag"}
    assert loaded.config.model_dump(exclude=own) == config.model_dump(exclude=own)
    text = preset.read_text("utf-8")
    assert f"trial {best.number}, val_loss {best.value:.4f}" in text
    assert "bias" not in text
    assert trained.calls[0][1].sources["n_layer"] == "trial 0 of study space"
    assert command(*flags) == 0  # nothing is left to do
    assert "8 of 8 trials done" in capsys.readouterr().out
    assert len(trained.calls) == 8
    assert command(*flags, "--trials", "10") == 0  # more may be requested later
    assert len(select_done(read_trials())) == len(trained.calls) == 10


@pytest.mark.parametrize("storage", ["elsewhere/mine.db", "sqlite:///mine.db"])
def test_a_study_in_a_named_storage(command, trained, capsys, storage):
    assert command("--storage", storage, "--trials", "1") == 0
    shown = storage if "://" in storage else f"sqlite:///{storage}"
    assert f"optuna-dashboard {shown}" in capsys.readouterr().out
    assert command("--storage", storage, "--trials", "2") == 0
    trials = read_trials(storage)
    assert len(select_done(trials)) == len(trained.calls) == 2
    assert [t.params["n_layer"] for t in trials] == [c.n_layer for c, *_ in trained.calls]


def test_a_trial_behind_the_median_is_pruned_in_its_second_half(command, trained):
    trained.losses = lambda number, config: [3, 2, 1] if number < 5 else [4, 3, 0.5]
    assert command("--max-iters", "30", "--trials", "6") == 0
    *others, last = read_trials()
    assert {trial.state for trial in others} == {TrialState.COMPLETE}
    assert last.state is TrialState.PRUNED
    assert last.intermediate_values == {10: 4, 20: 3}


def test_a_trial_is_never_pruned_at_its_last_evaluation(command, trained):
    trained.losses = lambda number, config: [3, 2, 1] if number < 5 else [3, 2, 9]
    assert command("--max-iters", "30", "--trials", "6") == 0
    last = read_trials()[5]
    assert last.intermediate_values == {10: 3, 20: 2, 30: 9}
    assert (last.state, last.value) == (TrialState.COMPLETE, 2)


@pytest.mark.parametrize(
    ("space", "flags"),
    [("tokenizer: [char, gpt2]", []), ("vocab_size: [300, 400]", ["--tokenizer", "bpe"])],
)
def test_tokenizers_are_compared_in_bits_per_byte(command, trained, space, flags):
    assert command("--trials", "9", *flags, space=space) == 0
    assert len(trained.calls) == 2
    best = 2 * ModelConfig().learning_rate  # what the stand-in for training returns
    assert {trial.value for trial in read_trials()} == {best}
    assert f"val_bits_per_byte {best:.4f}" in Path("runs/studies/space.yaml").read_text("utf-8")


def test_a_failed_trial_is_recorded_and_replaced(command, trained, capsys):
    def before(number, config):
        if number in (1, 2):
            raise RunError("loss is not finite at step 3")

    trained.before = before
    assert command("--trials", "3") == 0
    states = [trial.state.name for trial in read_trials()]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert read_trials()[1].user_attrs["reason"] == "loss is not finite at step 3"
    assert "loss is not finite at step 3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_combination_that_failed_is_never_run_again(command, trained, capsys, failing):
    failed = [(heads, rate) for rate in (0.02, 0.01) for heads in (1, 2)][:failing]

    def before(number, config):
        if (config.n_head, config.learning_rate) in failed:
            raise RunError("the loss is nan")

    trained.before = before
    space = "n_head: [1, 2]\nlearning_rate: [0.01, 0.02]\n"
    status = command("--trials", "9", "--n-embd", "8", space=space)
    runs = [(config.n_head, config.learning_rate) for config, *_ in trained.calls]
    assert len(runs) == len(set(runs))
    printed = capsys.readouterr()
    if failing < 3:  # else three failures in a row may end it before all have run
        assert len(runs) == 4
        assert status == 0
        assert Path("runs/studies/space.yaml").exists()
        assert command("--trials", "9", "--n-embd", "8") == 0  # there is nothing left to run
        assert len(trained.calls) == 4
    else:
        assert status == 1
        assert "failed" in printed.err


def test_the_results_are_printed_before_failures_end_the_worker(command, trained, capsys):
    def before(number, config):
        if number:
            raise RunError("the loss is nan")

    trained.before = before
    assert command("--trials", "9") == 1
    printed = capsys.readouterr()
    assert "1 complete, 0 pruned, 3 fail" in printed.out
    assert Path("runs/studies/space.yaml").exists()


def test_the_name_of_a_study_that_some_systems_cannot_hold_is_refused(command, trained, capsys):
    Path("runs/studies").mkdir(parents=True)
    Path("runs/studies/Dante.db").touch()
    for name in ("dante", "con", "last", "dante."):
        assert command("--study", name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "study" in line
        assert name in line
    assert not trained.calls


@pytest.mark.parametrize("error, status", [(RunError, 1), (UserError, 2)])
def test_three_failures_in_a_row_end_the_worker(command, trained, capsys, error, status):
    def before(number, config):
        raise error("no such device")

    trained.before = before
    assert command("--trials", "9") == status
    assert len(trained.calls) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 trials" in line
    assert line.endswith("no such device")


@pytest.mark.parametrize("flag", ["--output", "--storage"])
@pytest.mark.parametrize("place", [".", "..", "directory"])
def test_a_directory_in_place_of_a_file_is_an_error_before_any_trial(
    command, trained, capsys, flag, place
):
    Path("directory").mkdir()
    assert command("--trials", "1", flag, place) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{flag} {place}" in line
    assert not trained.calls


@pytest.mark.parametrize("place", ["file/best.yaml", "long" * 99 + "/best.yaml"])
def test_a_place_for_the_preset_that_cannot_be_is_an_error_before_any_trial(
    command, trained, capsys, place
):
    Path("file").write_text("", encoding="utf-8")
    assert command("--trials", "1", "--output", place) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output" in line
    assert not trained.calls


def test_a_preset_that_cannot_be_written_is_one_line(command, trained, capsys, monkeypatch):
    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune, "write_atomic", fail)
    assert command("--trials", "1", "--output", "best.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "best.yaml" in line
    assert "--output" in line
    assert len(select_done(read_trials())) == 1


def test_standard_input_is_refused_as_the_text_of_a_study(command, trained, capsys):
    assert command("--trials", "1", "--data", "-") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "standard input" in line
    assert not trained.calls and not Path("runs").exists()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@server:secret@host/db",
        "postgresql://user:sec/ret@host/db",
        "postgresql://user:secret@host/db",
        "postgresql://host/db?user=me&password=secret",
        "postgresql://user:s@sec@host/db",
        "mssql+pyodbc:///?odbc_connect=SERVER%3Dhost/db;PWD%3Dsecret",
    ],
)
def test_no_message_has_the_password_of_a_storage(command, url):
    order = tune.StudySettings(storage=url)
    search = tune.create_search(order, {"n_layer": [1]}, ConfigLoader({}))
    assert search.storage == url
    assert "sec" not in search.shown_storage and "***" in search.shown_storage


def test_optuna_prints_nothing_itself(command, trained, capfd):
    assert command("--trials", "1") == 0
    assert capfd.readouterr().err == ""


def test_torchrun_is_an_error(command, monkeypatch, capsys):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    assert command() == 2
    assert "torchrun" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------
# Workers


@pytest.mark.slow
def test_workers_share_the_trials_and_none_runs_twice(command, trained):
    trained.before = lambda number, config: time.sleep(0.02)
    statuses = []
    workers = [
        threading.Thread(target=lambda: statuses.append(command("--trials", "9"))) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert statuses == [0, 0]
    done = select_done(read_trials())
    assert len(done) == len(trained.calls) == 9
    assert len({json.dumps(trial.params) for trial in done}) == 9
    assert len({trial.user_attrs["run_dir"] for trial in done}) == 9


def test_of_two_workers_that_ask_for_the_last_trial_one_withdraws(command, trained, monkeypatch):
    real, answers = tune.wait_for_place, []

    def wait_for_place(*arguments):
        answers.append(real(*arguments))
        return answers[-1] or answers.count(False) == 1  # once, as if there were a place

    monkeypatch.setattr(tune, "wait_for_place", wait_for_place)
    assert command("--trials", "2") == 0
    *done, withdrawn = read_trials()
    assert len(done) == len(select_done(done)) == len(trained.calls) == 2
    assert withdrawn.state is TrialState.FAIL
    assert "withdrawn" in withdrawn.user_attrs["reason"]


def test_a_trial_with_the_settings_of_another_withdraws(command, trained):
    assert command("--trials", "1") == 0
    load().enqueue_trial(read_trials()[0].params)
    assert command("--trials", "2") == 0
    trials = read_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "trial 0" in trials[1].user_attrs["reason"]
    assert len(trained.calls) == 2


@pytest.mark.slow
def test_the_trial_of_a_killed_worker_is_retried(command, trained, capsys):
    trained.before = kill_in(3)
    with pytest.raises(Killed):
        command("--trials", "6")
    assert read_trials()[3].state is TrialState.RUNNING
    pass_grace_period()
    assert command("--trials", "6") == 0
    assert "retries trial 3" in capsys.readouterr().out
    trials = read_trials()
    assert len(trials) == 7
    assert len(select_done(trials)) == 6
    dead, retry = trials[3], trials[4]
    assert dead.state is TrialState.FAIL
    assert retry.params == dead.params
    assert retry.system_attrs["failed_trial"] == 3


def test_the_last_worker_waits_for_a_trial_whose_worker_may_die(command, trained, monkeypatch):
    trained.before = kill_in(0)
    with pytest.raises(Killed):
        command("--trials", "2")
    timer = threading.Timer(1, pass_grace_period)
    timer.start()
    assert command("--trials", "2") == 0
    timer.join()
    trials = read_trials()
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[2].params == trials[0].params


def test_a_worker_killed_while_it_asks_for_a_trial_costs_nothing(command, trained, monkeypatch):
    assert command("--trials", "1") == 0
    with monkeypatch.context() as patched:
        patched.setattr(tune, "check_place", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            command("--trials", "2")
    pass_grace_period()
    assert command("--trials", "2") == 0
    assert [trial.state.name for trial in read_trials()] == ["COMPLETE", "FAIL", "COMPLETE"]


@pytest.mark.slow
def test_a_trial_that_kills_its_workers_is_not_retried_for_ever(command, trained, monkeypatch):
    monkeypatch.setattr(tune, "MAX_RETRIES", 2)
    trained.before = kill_in(1, 2, 3)
    for _ in range(3):
        with pytest.raises(Killed):
            command("--trials", "3")
        pass_grace_period()
    assert command("--trials", "3") == 0
    trials = read_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", *["FAIL"] * 3, *["COMPLETE"] * 2]
    assert trials[1].params == trials[2].params == trials[3].params != trials[4].params


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_workers_trial_is_handed_back(command, trained, capsys, number, status):
    losses = trained.losses

    def after(call, result):
        stopped = {**vars(result), "step": 10, "exit_status": status}
        return TrainResult(**stopped) if call == 1 else result

    trained.after = after
    trained.losses = lambda call, config: [3.0] if call == 1 else losses(call, config)
    assert command("--trials", "3") == status
    assert "the same command" in capsys.readouterr().out
    assert [trial.state.name for trial in read_trials()] == ["COMPLETE", "FAIL", "WAITING"]
    assert command("--trials", "3") == 0
    trials = read_trials()
    assert len(select_done(trials)) == 3
    assert trials[2].params == trials[1].params
    assert trials[2].system_attrs["failed_trial"] == 1


def test_an_aborted_workers_trial_is_handed_back(command, trained):
    def before(number, config):
        if number == 0:
            raise KeyboardInterrupt

    trained.before = before
    assert command("--trials", "2") == 130
    assert command("--trials", "2") == 0
    assert [trial.state.name for trial in read_trials()] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_worker_whose_trial_was_failed_by_another_goes_on(command, trained, capsys):
    """As on a machine that was asleep, and counted as dead."""

    def before(number, config):
        if number == 1:
            load().tell(1, state=TrialState.FAIL)

    trained.before = before
    assert command("--trials", "2") == 0
    assert [trial.state.name for trial in read_trials()] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "another worker has it" in capsys.readouterr().out


def test_a_storage_that_fails_for_a_while_stops_no_run(command, trained, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "report", lambda *_: (_ for _ in ()).throw(OSError))
        assert command("--trials", "2") == 0
    trials = read_trials()
    assert [trial.value for trial in trials] == [t.params["learning_rate"] for t in trials]


def test_a_storage_that_fails_for_good_is_one_line(command, trained, capsys):
    def before(number, config):
        if number == 1:
            with contextlib.closing(sqlite3.connect(STORAGE)) as connection, connection:
                connection.execute("DROP TABLE trial_values")

    trained.before = before
    assert command("--trials", "3") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert STORAGE in line


# ----------------------------------------------------------------------------------------------
# The storage


def test_a_study_with_another_space_or_settings_is_an_error(command, trained, capsys):
    flags = ["--trials", "2", "--storage", "a.db"]
    assert command(*flags) == 0
    for changed, facts in (
        (SPACE.replace("high: 3", "high: 4"), ("n_layer", '"high": 3', '"high": 4')),
        (SPACE + "beta1: [0.8, 0.9]", ("beta1", "[0.8, 0.9]")),
        (SPACE.replace("n_head: [2, 4]", ""), ("n_head", "[2, 4]", "4")),
    ):
        capsys.readouterr()
        assert command(*flags, space=changed) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert all(fact in line for fact in (*facts, "--study"))
    assert command(*flags, "--max-iters", "20", "--beta2", "0.9", space=SPACE) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(fact in line for fact in ("max_iters", "1250", "20", "beta2", "0.9"))
    assert command(*flags, "--num-threads", "1", "--no-aim-logging") == 0  # not about training
    assert len(trained.calls) == 2


def test_a_worker_with_another_text_is_refused(command, trained, capsys):
    assert command("--trials", "1") == 0
    capsys.readouterr()
    Path("other.txt").write_text(LINES * 31, encoding="utf-8")
    assert command("--trials", "2", "--data", "other.txt") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(fact in line for fact in ("data_sha256", "--study"))
    shutil.copy("text.txt", "copy.txt")
    assert command("--trials", "2", "--data", "copy.txt") == 0
    assert [trial.state.name for trial in read_trials()] == ["COMPLETE", "COMPLETE"]


def test_a_study_of_another_program_is_an_error(command, trained, capsys):
    study = optuna.create_study(storage="sqlite:///a.db", study_name="space")
    study.optimize(lambda trial: 1.0, n_trials=1)
    assert command("--storage", "a.db") == 2
    assert "--study" in capsys.readouterr().err


@pytest.mark.slow
def test_a_storage_that_cannot_be_opened_is_one_line(command, trained, capsys):
    Path("directory.db").mkdir()
    Path("file").write_text("", encoding="utf-8")
    Path("text.db").write_text("no database " * 99, encoding="utf-8")
    content = Path("text.db").read_bytes()
    for storage, fact in (
        ("directory.db", "directory.db"),
        ("file/a.db", "file/a.db"),
        ("text.db", "text.db"),
        ("nosuch://a/b", "nosuch://a/b"),
        ("postgresql+nosuch://a:secret@b/c", "a:***@b/c"),
        ("postgresql+psycopg://a:secret@127.0.0.1:1/c", "a:***@127.0.0.1:1/c"),
    ):
        assert command("--storage", storage) == 2, storage
        (line,) = capsys.readouterr().err.splitlines()
        assert fact in line
        assert "--storage" in line
        assert "secret" not in line
    assert Path("text.db").read_bytes() == content
    assert not trained.calls


def test_an_old_journal_is_one_line_that_says_how_to_read_it(command, trained, capsys):
    journal = Path("runs/studies/space.log")
    journal.parent.mkdir(parents=True)
    journal.write_text('{"op_code": 0}\n', encoding="utf-8")
    for flags in ([], ["--storage", "other.log"]):
        assert command(*flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        name = "other.log" if flags else str(journal)
        assert all(fact in line for fact in (name, "optuna-dashboard", "copy_study", "--study"))
    assert command("--storage", "new.db", "--trials", "1") == 0


# ----------------------------------------------------------------------------------------------
# Real trainings


@pytest.mark.slow
def test_a_retried_trial_resumes_from_its_checkpoint(command, monkeypatch):
    """Real trainings: the same values as without the kill, and no step twice."""
    flags = [*TINY_FLAGS, "--max-iters=8", "--checkpoint-interval=2", "--histogram-interval=0"]
    flags += ["--trials=1", "--num-threads=1"]
    space = "learning_rate: {low: 1e-3, high: 1e-2}"
    assert command(*flags, "--study", "whole", space=space) == 0
    real = trainer_module.train

    def mortal(*arguments, callbacks, **others):
        class Reaper:
            def after_step(self, step):
                if step.step == 5:
                    raise Killed

        return real(*arguments, callbacks={**callbacks, "reaper": lambda _: Reaper()}, **others)

    storage = "runs/studies/killed.db"
    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "train", mortal)
        with pytest.raises(Killed):
            command(*flags, "--study", "killed", space=space)
    pass_grace_period(storage)
    assert command(*flags, "--study", "killed", space=space) == 0
    whole = read_trials("runs/studies/whole.db", "whole")
    dead, retry = read_trials(storage, "killed")
    assert retry.params == dead.params == whole[0].params
    assert retry.intermediate_values == whole[0].intermediate_values
    assert retry.value == whole[0].value
    record = json.loads(Path(retry.user_attrs["run_dir"], "meta/full_config.json").read_bytes())
    assert record["run"]["resumed_from"]["run_id"] == Path(dead.user_attrs["run_dir"]).name
    assert record["run"]["resumed_from"]["step"] == 4
    # Killed after its last step, before the value was recorded: nothing is left to train.
    flags += ["--study", "killed", "--trials", "2"]
    with monkeypatch.context() as patched:
        kill = lambda *_, **__: (_ for _ in ()).throw(Killed)  # noqa: E731
        patched.setattr(trainer_module, "train", lambda *a, **k: real(*a, **k) and kill())
        with pytest.raises(Killed):
            command(*flags, space=space)
    pass_grace_period(storage)
    assert command(*flags, space=space) == 0
    *_, dead, retry = read_trials(storage, "killed")
    assert dead.state is TrialState.FAIL
    assert retry.value == min(dead.intermediate_values.values())
    assert retry.user_attrs["run_dir"] == dead.user_attrs["run_dir"]


@pytest.fixture
def postgresql():
    """Start a PostgreSQL server of our own; return the URL of its database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [shutil.which("initdb")]
    if not found[-1]:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="no driver: pip install 'psycopg[binary]'")
    with tempfile.TemporaryDirectory() as directory:
        yield from run_postgresql(Path(found[-1]).parent, Path(directory))


def run_postgresql(binaries: Path, data: Path):
    options = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        with contextlib.suppress(LookupError):
            shutil.chown(data, "postgres")
            options["user"] = "postgres"
        if not options:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [str(binaries / program), "-D", str(data), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=data, **options)

    run("initdb", "-A", "trust", "-U", "folio")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
    run("pg_ctl", "-w", "-l", str(data / "log"), "-o", settings, "start")
    try:
        yield f"postgresql+psycopg://folio:secret@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-w", "-m", "immediate", "stop")


@pytest.mark.slow
def test_twenty_trials_in_sqlite_survive_a_killed_worker():
    run_twenty_trials(STORAGE)


@pytest.mark.slow
def test_twenty_trials_in_postgresql_survive_a_killed_worker(postgresql):
    run_twenty_trials(postgresql)


def run_twenty_trials(storage: str) -> None:
    """Two workers, real processes; one gets SIGKILL within a trial, and is started again."""
    Path("text.txt").write_text(LINES * 30, encoding="utf-8")
    Path("space.yaml").write_text(
        "learning_rate: {low: 1e-4, high: 1e-1, log: true}\nn_layer: {low: 1, high: 3}\n",
        encoding="utf-8",
    )
    flags = ["--space=space.yaml", "--data=text.txt", "--trials=20", f"--storage={storage}"]
    flags += [flag for flag in TINY_FLAGS if not flag.startswith("--n-layer")]
    flags += ["--max-iters=400", "--eval-interval=100", "--checkpoint-interval=40"]
    processes, began = [], time.monotonic()

    def start() -> subprocess.Popen:
        command = [sys.executable, str(CHECKOUT / "tune.py"), *flags, "--histogram-interval=0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
        return processes[-1]

    def is_in_the_middle(process: subprocess.Popen) -> bool:
        """Whether it runs the fourth trial or a later one, and has evaluated it."""
        try:
            trials = read_trials(storage)
        except Exception:  # its tables are being created
            return False
        return any(
            trial.state is TrialState.RUNNING
            and trial.user_attrs.get("worker", "").endswith(f":{process.pid}")
            and trial.number > 3
            and trial.intermediate_values
            for trial in trials
        )

    try:
        first, second = start(), start()
        while not is_in_the_middle(first):
            assert first.poll() is None
            assert time.monotonic() < began + 300
            time.sleep(0.2)
        first.kill()
        first.wait()
        again = start()
        for process in (second, again):
            printed, _ = process.communicate(timeout=900)
            assert process.returncode == 0
            assert "Study space: " in printed
            assert "secret" not in printed
    finally:
        for process in processes:
            process.kill()
            process.wait()
    print(f"{storage}: {time.monotonic() - began:.0f} s")
    trials = read_trials(storage)
    done = select_done(trials)
    assert len(done) == 20
    withdrawn = [t for t in trials if "withdrawn" in (t.user_attrs.get("reason") or "")]
    (dead,) = [trial for trial in trials if trial not in done and trial not in withdrawn]
    assert dead.state is TrialState.FAIL
    assert dead.user_attrs["worker"].endswith(f":{first.pid}")
    (retry,) = [trial for trial in trials if "failed_trial" in trial.system_attrs]
    assert retry.system_attrs["failed_trial"] == dead.number
    assert retry.params == dead.params
    record = json.loads(Path(retry.user_attrs["run_dir"], "meta/full_config.json").read_bytes())
    assert record["run"]["resumed_from"]["run_id"] == Path(dead.user_attrs["run_dir"]).name
    assert "secret" not in json.dumps(record)  # the password of the storage
    assert len({json.dumps(trial.params) for trial in done}) == 20
    runs = sorted(trial.user_attrs["run_dir"] for trial in (*done, dead))
    assert runs == sorted(str(path) for path in Path("runs").iterdir() if path.name != "studies")
    owners = {trial.user_attrs["worker"].rpartition(":")[2] for trial in done}
    assert {str(second.pid), str(again.pid)} <= owners
    for trial in done:
        result = json.loads(Path(trial.user_attrs["run_dir"], "meta/result.json").read_bytes())
        assert result["best_val_loss"] == pytest.approx(min(trial.intermediate_values.values()))
