"""A study: its space, its trials, who has them, and what becomes of those whose worker dies.

python -m pytest tests/test_tune.py
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import optuna
import pytest
import torch
from helpers import CHECKOUT, LINES, TINY_FLAGS
from optuna.trial import TrialState

import study as study_module
import trainer as trainer_module
import tune
from callbacks import Best, Evaluation, Step, TrainResult
from config import ConfigLoader
from utils import workers
from utils.errors import RunError, UserError
from utils.output import run_command
from utils.run_manager import RunDirectoryCreator, RunIDGenerator

SPACE = """
learning_rate: {low: 1e-4, high: 1e-1, log: true}
n_layer: {low: 1, high: 3}
n_head: [2, 4]
"""


class Killed(BaseException):
    """What a SIGKILL looks like from here: nobody is told, and the lock is free."""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command with a text and a space of its own; returns its exit status."""
    Path("text.txt").write_text(LINES * 30, encoding="utf-8")
    Path("space.yaml").write_text(SPACE, encoding="utf-8")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*flags: str, space: str | None = None) -> int:
        if space is not None:
            Path("space.yaml").write_text(space, encoding="utf-8")
        given = ["--space", "space.yaml", "--data", "text.txt", "--device", "cpu", *flags]
        return run_command(tune.main, given)

    return run


class Trained:
    """Stands for train(): a run directory and its evaluations, of losses that one may set."""

    def __init__(self):
        self.calls = []
        self.before = lambda number, config: None
        self.losses = lambda number, config: [3.0, 2.0, config.learning_rate]
        self.after = lambda number, result: result
        self.text = {"name": "text.txt", "sha256": "a"}

    def __call__(self, config, *, loaded, start, argv, output, callbacks):
        self.calls.append((config, loaded, start))
        self.before(len(self.calls) - 1, config)
        run_id = RunIDGenerator.generate(start.run_tag)
        run = RunDirectoryCreator(Path(config.runs_dir)).create(run_id)
        record = {"config": {}, "sources": {}, "run": {"data": self.text}}
        (run.meta / "full_config.json").write_text(json.dumps(record), encoding="utf-8")
        (run.meta / "git.txt").write_text("", encoding="utf-8")
        called = [make(config) for make in callbacks.values()]
        config = config.model_copy(update={"max_iters": 30})
        loss, why = torch.tensor(1.0), None
        for each in called:
            each.after_step(Step(1, loss, loss, 0.1, run.path, config))
        step, losses = 0, self.losses(len(self.calls) - 1, config)
        for step, value in zip((10, 20, 30), losses, strict=False):
            told = Evaluation(step, value, value, 2 * value, Best(), run.path, config)
            for each in called:
                why = why or each.after_evaluation(told)
            if why:
                break
        why = why if step < 30 else None
        result = TrainResult(run.path, run.export, None, step, 1.0, 1.0, step, 1.0, 1.0, 0, why)
        return self.after(len(self.calls) - 1, result)


@pytest.fixture
def trained(monkeypatch) -> Trained:
    stub = Trained()
    monkeypatch.setattr(trainer_module, "train", stub)
    monkeypatch.setattr(tune, "_clear_memory", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return stub


def trials_of(storage: str = "runs/studies/space.log", name: str = "space"):
    return optuna.load_study(study_name=name, storage=tune.open_storage(Path(storage))).trials


def done(trials) -> list:
    return [trial for trial in trials if trial.state in tune.DONE]


def killed_in(number: int):
    def before(call, config):
        if call == number:
            raise Killed

    return before


# ----------------------------------------------------------------------------------------------
# The space


@pytest.mark.parametrize(
    "space, told",
    [
        ("", "space.yaml: the file is empty"),
        ("{}", "space.yaml: names no setting to search"),
        ("lerning_rate: [1.0, 2.0]", "unknown key lerning_rate; did you mean learning_rate?"),
        ("device: [cpu, cuda]", "device cannot be searched, as it is not about what the model"),
        ("eval_iters: [1, 2]", "eval_iters cannot be searched"),
        ("data: [a, b]", "data cannot be searched"),
        ("n_layer: 3", "n_layer must be a list of choices, or {low: …, high: …}, got 3; one value"),
        ("n_layer: [3]", "n_layer has fewer than two choices: [3]"),
        ("n_layer: [3, 4, 3]", "n_layer has a choice twice: [3, 4, 3]"),
        ("n_layer: [3, four]", 'n_layer must be a whole number, got "four"'),
        ("n_layer: [0, 1]", "n_layer must be at least 1, got 0"),
        ("dropout: {low: 0.5, high: 1.0}", "dropout: high must be below 1, got 1.0"),
        ("dropout: {low: -1, high: 0.5}", "dropout: low must be at least 0, got -1"),
        ("n_layer: {low: 1.5, high: 3}", "n_layer: low must be a whole number, got 1.5"),
        ("n_layer: {low: one, high: 3}", 'n_layer: low must be a whole number, got "one"'),
        ("n_layer: {low: 4, high: 2}", "n_layer: low 4 must be below high 2"),
        ("n_layer: {low: 2, high: 2}", "n_layer: low 2 must be below high 2"),
        ("n_layer: {low: 2}", "n_layer lacks its high"),
        (
            "n_layer: {low: 2, high: 4, stop: 1}",
            "n_layer has low, high, log and step, and not stop",
        ),
        ("n_layer: {low: 2, high: 5, step: 2}", "high 5 is not low 2 and a multiple of 2"),
        ("beta1: {low: 0.1, high: 0.7, step: 0.25}", "high 0.7 is not low 0.1 and a multiple of"),
        ("beta1: {low: 0.1, high: 0.7, step: .inf}", "step must be a number above 0"),
        ("beta1: {low: 0.1, high: 0.7, step: 1.0e-20}", "step 1e-20 is too small for 0.1 to 0.7"),
        ("n_layer: {low: 2, high: 5, step: 0}", "step must be a whole number above 0, got 0"),
        ("n_layer: {low: 2, high: 6, step: 1, log: true}", "log and step do not go together"),
        ("n_layer: {low: 2, high: 6, log: 1}", "log must be true or false, got 1"),
        ("weight_decay: {low: 0, high: 1, log: true}", "with log, low must be above 0, got 0"),
        ("min_lr: {low: null, high: 1.0}", "min_lr: low must be a number, got null"),
        ("optimizer: {low: 1, high: 2}", "optimizer has no range, as it is no number"),
        ("bias: {low: 0, high: 1}", "bias has no range, as it is no number"),
        ("bias: [true, false]", "bias true is possible in no trial: architecture modern has no"),
        ("n_head: [3, 5]", "n_embd 128 is not divisible by n_head"),
        ("n_head: [2, 3]", "n_head 3 is possible in no trial: n_embd 128 is not divisible by"),
        ("n_layer: [1, 2\nn_head: [1]", "space.yaml, line 2: not YAML"),
    ],
)
def test_a_wrong_space_is_one_clear_line_and_leaves_nothing(command, trained, capsys, space, told):
    assert command(space=space) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not Path("runs").exists()


def test_all_problems_are_told_together(command, trained, capsys):
    flags = ["--n-layer", "2", "--n-embd", "no", "--run-tag", "mine", "--storage", "a"]
    assert command(*flags, space="n_layer: [1, 2]\nn_hed: [1, 2]") == 2
    told = capsys.readouterr().err
    assert "error: space.yaml: n_layer is searched, and --n-layer fixes it: leave one out" in told
    assert "unknown key n_hed; did you mean n_head?" in told
    assert "--n-embd must be a whole number" in told
    assert "run_tag (--run-tag): each run of a study is named by its trial: leave it out" in told


def test_a_space_that_cannot_be_had_and_a_missing_optuna(command, trained, capsys, monkeypatch):
    assert run_command(tune.main, []) == 2
    assert "error: --space FILE is missing" in capsys.readouterr().err
    assert command("--space", "none.yaml") == 2
    assert capsys.readouterr().err == "error: none.yaml: no such file\n"
    Path("latin.yaml").write_bytes(b"n_layer: [1, \xff]")
    assert command("--space", "latin.yaml") == 2
    assert capsys.readouterr().err == "error: latin.yaml: not UTF-8 text (byte 13)\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command() == 2
    assert "needs Optuna: pip install" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_shipped_spaces_are_right():
    for path in (CHECKOUT / "configs" / "search").iterdir():
        problems: list[str] = []
        space = study_module.read_space(str(path), {}, problems)
        assert not problems
        order = study_module.StudySettings(space=str(path))
        study_module.create_recipe(order, space, ConfigLoader().read())
        assert f"python tune.py --space configs/search/{path.name}" in path.read_text("utf-8")


@pytest.mark.parametrize(
    "low, high, step", [(0.1, 0.7, 0.2), (0.0, 0.3, 0.1), (0.2, 0.9, 0.07), (0, 6, 3), (2, 5, None)]
)
def test_a_range_has_all_its_steps_and_ends_exactly_at_its_high(low, high, step):
    values = study_module.Range(low, high, step=step)
    assert values.count == len(values.all) == len(set(values.all))
    assert (values.all[0], values.all[-1]) == (low, high)
    assert values.all == pytest.approx([low + (step or 1) * n for n in range(values.count)])
    generator = study_module.random.Random(0)
    assert {values.draw(generator) for _ in range(500)} == set(values.all)
    assert [values.nearest(value) for value in values.all] == values.all
    assert values.nearest(high - 1e-9) == high


def test_a_range_of_very_many_steps_is_never_listed(command, trained, monkeypatch):
    monkeypatch.setattr(study_module.Range, "all", property(lambda _: pytest.fail("is listed")))
    space = "learning_rate: {low: 1.0e-12, high: 1.0e-3, step: 1.0e-12}\nn_layer: [1, 2]"
    assert command("--trials", "12", space=space) == 0
    rates = [trial.params["learning_rate"] for trial in trials_of()]
    assert len(set(rates)) == 12
    assert all(rate == 1e-12 + 1e-12 * round((rate - 1e-12) / 1e-12) for rate in rates)
    assert [config.learning_rate for config, *_ in trained.calls] == rates


def test_only_combinations_that_go_together_are_proposed(command, trained):
    space = "n_embd: [12, 16, 20, 24, 28]\nn_head: [2, 4, 6]\ntie_weights: [null, true]"
    assert command("--trials", "12", space=space) == 0
    trials = trials_of()
    assert len(trials) == 12
    assert {trial.state for trial in trials} <= set(tune.DONE)
    assert all(trial.params["n_embd"] / trial.params["n_head"] % 2 == 0 for trial in trials)
    assert len({trial.params["n_head"] for trial in trials}) == 3
    assert {trial.params["tie_weights"] for trial in trials} == {None, True}
    assert command("--trials", "100") == 0
    trials = trials_of()
    assert len(trials) == len({json.dumps(trial.params) for trial in trials}) == 2 * (5 + 2 + 2)


def test_the_seed_decides_what_is_proposed(command, trained):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert command("--study", name, "--seed", str(seed), "--trials", "12") == 0
    a, b, c = ([t.params for t in trials_of(f"runs/studies/{n}.log", n)] for n in "abc")
    assert a == b
    assert a != c
    assert len({json.dumps(params) for params in a}) == 12


# ----------------------------------------------------------------------------------------------
# Trials


def test_a_study_has_its_trials_its_best_as_a_preset_and_says_what_comes_next(
    command, trained, capsys
):
    flags = ["--max-iters", "30", "--trials", "8"]
    assert command(*flags) == 0
    printed = capsys.readouterr().out
    trials = trials_of()
    assert len(done(trials)) == len(trials) == len(trained.calls) == 8
    runs = [trial.user_attrs["run_dir"] for trial in trials]
    assert len(set(runs)) == 8
    assert all(run.endswith(f"_space_{t.number}") for run, t in zip(runs, trials, strict=True))
    best = min((t for t in trials if t.state is TrialState.COMPLETE), key=lambda t: t.value)
    assert f"\n{best.number:>5}" in printed
    assert "Importances, of 1 in all" in printed
    assert "optuna-dashboard runs/studies/space.log" in printed
    preset = Path("runs/studies/space.yaml")
    assert f"train.py --config {preset}" in printed
    loaded = ConfigLoader().load(config_file=str(preset))
    config, _, _ = trained.calls[best.number]
    own = {"runs_dir", "run_tag"}
    assert loaded.config.model_dump(exclude=own) == config.model_dump(exclude=own)
    text = preset.read_text("utf-8")
    assert f"trial {best.number}, val loss {best.value:.4f}" in text
    assert "bias" not in text
    assert trained.calls[0][1].sources["n_layer"] == "trial 0 of study space"
    assert command(*flags) == 0  # nothing is left to do
    assert "8 of 8 trials done" in capsys.readouterr().out
    assert len(trained.calls) == 8
    assert command(*flags, "--trials", "10") == 0  # more may be asked for
    assert len(done(trials_of())) == len(trained.calls) == 10


def test_a_study_in_sqlite(command, trained, capsys):
    flags = ["--storage", "elsewhere/mine.db"]
    assert command(*flags, "--trials", "1") == 0
    assert "optuna-dashboard sqlite:///elsewhere/mine.db" in capsys.readouterr().out
    assert command(*flags, "--trials", "2") == 0
    trials = trials_of("elsewhere/mine.db")
    assert len(done(trials)) == len(trained.calls) == 2
    assert [trial.params["n_layer"] for trial in trials] == [c.n_layer for c, *_ in trained.calls]


def test_a_trial_that_lags_behind_is_pruned(command, trained):
    trained.losses = lambda number, config: [3, 2, 1] if number < 5 else [4, 3, 0.5]
    assert command("--max-iters", "30", "--trials", "6") == 0
    *others, last = trials_of()
    assert {trial.state for trial in others} == {TrialState.COMPLETE}
    assert last.state is TrialState.PRUNED
    assert last.intermediate_values == {10: 4, 20: 3}  # before its half it is left alone
    assert last.user_attrs["reason"] == "behind the median of study space at this step"


def test_a_trial_is_never_pruned_at_its_last_evaluation(command, trained):
    trained.losses = lambda number, config: [3, 2, 1] if number < 5 else [3, 2, 9]
    assert command("--max-iters", "30", "--trials", "6") == 0
    last = trials_of()[5]
    assert last.intermediate_values == {10: 3, 20: 2, 30: 9}
    assert (last.state, last.value) == (TrialState.COMPLETE, 2)


def test_tokenizers_are_compared_in_bits_per_byte(command, trained, capsys):
    assert command("--trials", "9", space="tokenizer: [char, gpt2]") == 0
    assert len(trained.calls) == 2
    assert {trial.value for trial in trials_of()} == {2 * 0.01}
    printed = capsys.readouterr().out
    assert "bits per byte 0.0200" in printed
    assert "Note: the space has 2 combinations, and no more" in printed


def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(command, trained, capsys):
    def before(number, config):
        if number in (1, 2):
            raise RunError("loss is not finite at step 3")

    trained.before = before
    assert command("--trials", "3") == 0
    assert [trial.state.name for trial in trials_of()] == [
        "COMPLETE",
        "FAIL",
        "FAIL",
        *["COMPLETE"] * 2,
    ]
    assert trials_of()[1].user_attrs["reason"] == "loss is not finite at step 3"
    assert "trial 1  failed: loss is not finite at step 3" in capsys.readouterr().out


@pytest.mark.parametrize("error, status", [(RunError, 1), (UserError, 2)])
def test_three_failures_one_after_another_end_it(command, trained, capsys, error, status):
    def before(number, config):
        raise error("no such device")

    trained.before = before
    assert command("--trials", "9") == status
    assert len(trained.calls) == 3
    told = capsys.readouterr().err
    assert told == "error: 3 trials failed one after another, the last: no such device\n"


# ----------------------------------------------------------------------------------------------
# Workers


def test_workers_that_run_at_the_same_time_share_the_trials(command, trained, capsys):
    def before(number, config):  # while this one trains, there are two others
        if number == 2:
            command("--trials", "9")

    trained.before = before
    assert command("--trials", "9") == 0
    trials = trials_of()
    assert len(trials) == len(done(trials)) == len(trained.calls) == 9
    assert "1 still running in other workers" in capsys.readouterr().out
    owners = [trial.user_attrs["worker"] for trial in trials]
    assert len(set(owners)) == 2
    assert len({trial.user_attrs["run_dir"] for trial in trials}) == 9
    assert [path.name for path in Path("runs/studies/space.log.workers").iterdir()] == [
        "claim.lock"
    ]


def test_the_trial_of_a_worker_that_died_is_given_to_another(command, trained):
    trained.before = killed_in(3)
    storage = "a.log"
    flags = ["--trials", "6", "--storage", storage]
    with pytest.raises(Killed):
        command(*flags)
    assert trials_of(storage)[3].state is TrialState.RUNNING
    assert command(*flags) == 0
    trials = trials_of(storage)
    assert len(trials) == 7
    assert len(done(trials)) == 6
    dead, again = trials[3], trials[4]
    assert dead.state is TrialState.FAIL
    assert re.fullmatch(r"its worker \S+ ended in it", dead.user_attrs["reason"])
    assert again.params == dead.params
    assert again.user_attrs["continues"] == 3
    assert command(*flags) == 0
    assert len(trials_of(storage)) == 7


def test_a_worker_that_died_while_it_claimed_a_trial_costs_nothing(command, trained, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "set_user_attr", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            command("--trials", "3")
    assert command("--trials", "3") == 0
    first, *others = trials_of()
    assert first.user_attrs["reason"] == "its worker ended before it began"
    assert len(done(others)) == len(others) == 3
    # And where it was about to go on with a dead one's, that is still owed.
    trained.before = killed_in(3)
    with pytest.raises(Killed):
        command("--trials", "5")
    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "ask", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            command("--trials", "5")
    assert command("--trials", "5") == 0
    trials = trials_of()
    assert len(done(trials)) == 5
    again = [trial for trial in trials if "continues" in trial.user_attrs]
    assert [trial.params for trial in again] == [
        trials[trial.user_attrs["continues"]].params for trial in again
    ]
    assert len(again) == len(trials) - 5 == 2


def test_a_trial_that_kills_its_workers_is_given_up(command, trained):
    def before(number, config):
        if number in (1, 2, 3):
            raise Killed

    trained.before = before
    for _ in range(3):
        with pytest.raises(Killed):
            command("--trials", "3")
    assert command("--trials", "3") == 0
    trials = trials_of()
    assert [trial.state.name for trial in trials] == ["COMPLETE", *["FAIL"] * 3, *["COMPLETE"] * 2]
    assert trials[1].params == trials[2].params == trials[3].params != trials[4].params
    assert trials[3].user_attrs["reason"].endswith("as 2 did before: given up")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_trial_that_is_stopped_is_handed_back(command, trained, capsys, number, status):
    losses = trained.losses

    def after(call, result):
        stopped = {**vars(result), "step": 10, "exit_status": status}
        return TrainResult(**stopped) if call == 1 else result

    trained.after = after
    trained.losses = lambda call, config: [3.0] if call == 1 else losses(call, config)
    assert command("--trials", "3") == status
    assert "the same command goes on" in capsys.readouterr().out
    assert trials_of()[1].user_attrs["reason"] == "it was stopped after step 10"
    assert command("--trials", "3") == 0
    trials = trials_of()
    assert len(done(trials)) == 3
    assert trials[2].user_attrs["continues"] == 1
    assert trials[2].params == trials[1].params
    assert "3 complete, 0 pruned, 1 handed on to another worker." in capsys.readouterr().out


def test_a_trial_that_is_aborted_is_handed_back(command, trained):
    def before(number, config):
        if number == 0:
            raise KeyboardInterrupt

    trained.before = before
    assert command("--trials", "2") == 130
    assert command("--trials", "2") == 0
    assert [trial.state.name for trial in trials_of()] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_trial_that_was_given_away_is_left_alone(command, trained, monkeypatch):
    """A machine that was asleep, and is taken for dead by another."""

    def before(number, config):
        if number == 1:
            with monkeypatch.context() as patched:
                patched.setattr(tune, "is_alive", lambda *_: False)
                assert command("--trials", "2") == 0

    trained.before = before
    assert command("--trials", "2") == 0
    trials = trials_of()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert len({trial.user_attrs["worker"] for trial in trials[1:]}) == 2


@pytest.mark.filterwarnings("ignore:The reported value is ignored")  # that of the first step
def test_what_was_reported_after_the_checkpoint_is_not_carried_over(command, trained, monkeypatch):
    def after(number, result):
        if number == 0:
            raise Killed
        return result

    def planned(recipe, params, number, checkpoint):
        loaded, plan = real(recipe, params, number, None)
        return loaded, types.SimpleNamespace(run_tag=start.run_tag, step=10 if checkpoint else 0)

    real = study_module.Recipe.plan
    monkeypatch.setattr(study_module.Recipe, "plan", planned)
    monkeypatch.setattr(tune, "checkpoints_of", lambda *_: [Path("step-10")])
    trained.after = after
    trained.losses = lambda number, config: [3.0, 2.0] if number else [2.5, 1.0, 0.1]
    with pytest.raises(Killed):
        command("--trials", "1")
    assert command("--trials", "1") == 0
    dead, again = trials_of()
    assert dead.intermediate_values == {10: 2.5, 20: 1.0, 30: 0.1}
    assert again.intermediate_values == {10: 2.5, 20: 2.0}
    assert again.value == 2.0


def test_two_workers_that_come_at_once_agree_on_one_text(tmp_path):
    """The other one comes while the first has seen that there is none, and not yet put its own."""
    had = []

    class Study:
        _storage = None

        def __init__(self):
            self.user_attrs = {}
            self.calls = 0

        def set_user_attr(self, name, value):
            self.calls += 1
            if self.calls == 1:
                other.start()
                other.join(0.2)
            self.user_attrs[name] = value

    recipe = types.SimpleNamespace(storage=tmp_path / "a.log")
    desk = tune.Desk(recipe, Study(), "any")
    other = threading.Thread(target=lambda: had.append(desk.agreed("data", "theirs")), daemon=True)
    had.append(desk.agreed("data", "ours"))
    other.join(10)
    assert had == ["ours", "ours"]


def test_a_storage_that_cannot_be_written_for_a_while_costs_no_run(command, trained, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "report", lambda *_: (_ for _ in ()).throw(OSError))
        assert command("--trials", "2") == 0
    assert [trial.value for trial in trials_of()] == [
        t.params["learning_rate"] for t in trials_of()
    ]


def test_whether_a_worker_is_alive(tmp_path, monkeypatch):
    directory = tmp_path / "workers"
    with workers.Worker(directory) as worker:
        assert workers.is_alive(directory, worker.name)
    assert not workers.is_alive(directory, worker.name)
    host = worker.name.rsplit("-", 2)[0]
    for name in (f"{host}-1-aa", "other-host-1-aa", "other-host-2-aa"):
        (directory / name).write_bytes(b"")
    long_ago = time.time() - workers.SILENT_FOR - 1
    os.utime(directory / "other-host-2-aa", (long_ago, long_ago))
    assert not workers.is_alive(directory, f"{host}-1-aa")
    assert workers.is_alive(directory, "other-host-1-aa")
    assert not workers.is_alive(directory, "other-host-2-aa")
    assert [path.name for path in directory.iterdir()] == ["other-host-1-aa"]
    monkeypatch.setattr(workers, "RENEWED_EVERY", 0.01)
    with workers.Worker(directory) as worker:
        os.utime(directory / worker.name, (long_ago, long_ago))
        until = time.monotonic() + 20
        while (directory / worker.name).stat().st_mtime <= long_ago + 1:
            assert time.monotonic() < until
            time.sleep(0.01)


# ----------------------------------------------------------------------------------------------
# The storage


def test_a_study_whose_space_or_settings_changed_is_refused(command, trained, capsys):
    storage = "a.log"
    flags = ["--trials", "2", "--storage", storage]
    assert command(*flags) == 0
    before = Path(storage).read_bytes()
    for changed, told in (
        (
            SPACE.replace("high: 3", "high: 4"),
            'n_layer in the space was {"low": 1, "high": 3}, and is',
        ),
        (SPACE + "beta1: [0.8, 0.9]", "beta1 in the space was not there, and is [0.8, 0.9]"),
        (SPACE.replace("n_head: [2, 4]", ""), "n_head in the space was [2, 4], and is not there"),
    ):
        capsys.readouterr()
        assert command(*flags, space=changed) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
        assert line.endswith("put that back, or begin another study with --study NAME")
    assert command(*flags, "--max-iters", "20", space=SPACE) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "with other settings: max_iters was 880, and is 20: put that back" in line
    assert Path(storage).read_bytes() == before
    assert command(*flags, "--num-threads", "1", "--no-aim-logging") == 0  # the machine's business
    assert len(trained.calls) == 2


def test_a_worker_with_another_text_is_refused_and_its_trial_kept(command, trained, capsys):
    assert command("--trials", "1") == 0
    capsys.readouterr()
    trained.text = {"name": "other.txt", "sha256": "b"}
    assert command("--trials", "2") == 2
    told = capsys.readouterr().err
    assert "other.txt is not the text of study space (text.txt, another SHA-256)" in told
    trained.text = {"name": "text.txt", "sha256": "a"}
    assert command("--trials", "2") == 0
    trials = trials_of()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials[2].user_attrs["continues"] == 1
    assert "run_dir" not in trials[1].user_attrs  # nobody goes on with what it learned


def test_a_study_that_somebody_else_began_is_left_alone(command, trained, capsys):
    study = optuna.create_study(storage=tune.open_storage(Path("a.log")), study_name="space")
    study.optimize(lambda trial: 1.0, n_trials=1)
    assert command("--storage", "a.log") == 2
    assert "has a study space that was not begun by tune.py" in capsys.readouterr().err


def test_a_storage_that_cannot_be_opened_is_one_line(command, trained, capsys):
    Path("directory.log").mkdir()
    Path("directory.db").mkdir()
    Path("file").write_text("", encoding="utf-8")
    Path("text.db").write_text("no database " * 99, encoding="utf-8")
    Path("text.log").write_text("no journal\n", encoding="utf-8")
    Path("json.log").write_text('{"a": 1}\n', encoding="utf-8")
    Path("number.log").write_text("1\n", encoding="utf-8")
    contents = {path: path.read_bytes() for path in Path().glob("*.*") if path.is_file()}
    for storage in (
        *("directory.log", "directory.db", "file/a.log", "text.db", "text.log", "json.log"),
        *("number.log", "sqlite:///a.db"),
    ):
        assert command("--storage", storage) == 2, storage
        (line,) = capsys.readouterr().err.splitlines()
        assert storage.split("/")[0] in line
    assert {path: path.read_bytes() for path in contents} == contents
    assert not trained.calls


def test_a_damaged_journal_is_told_and_one_that_was_cut_off_is_mended(command, trained, capsys):
    assert command("--trials", "2", "--storage", "a.log") == 0
    whole = Path("a.log").read_bytes()
    Path("a.log").write_bytes(whole + b'{"op_code":4,"worker_')  # as a power cut leaves it
    assert command("--trials", "3", "--storage", "a.log") == 0
    assert len(done(trials_of("a.log"))) == 3
    lines = Path("a.log").read_bytes().splitlines(keepends=True)
    Path("a.log").write_bytes(b"".join([*lines[:4], lines[4][:9], *lines[5:]]))
    damaged = Path("a.log").read_bytes()
    capsys.readouterr()
    assert command("--trials", "4", "--storage", "a.log") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.log, line 5: not a journal of Optuna's, or damaged there" in line
    assert Path("a.log").read_bytes() == damaged


def without_line(storage: str, *words: str) -> None:
    """Take the first line that has all the words out of a journal."""
    lines = Path(storage).read_bytes().splitlines(keepends=True)
    first = next(line for line in lines if all(word.encode() in line for word in words))
    lines.remove(first)
    Path(storage).write_bytes(b"".join(lines))


def test_a_trial_of_which_a_setting_is_lost_is_left_out(command, trained, capsys):
    assert command("--trials", "11", "--storage", "a.log") == 0
    best = min(trials_of("a.log"), key=lambda trial: trial.value or 9).number
    without_line("a.log", f'"trial_id":{best},', '"param_name":"n_layer"')
    capsys.readouterr()
    assert command("--trials", "12", "--storage", "a.log") == 0  # claim and results
    printed = capsys.readouterr().out
    trials = trials_of("a.log")
    assert len(done(trials)) == len(trials) == 12
    assert "a.log is damaged: 1 complete trial left out, as not all settings are" in printed
    listed = re.findall(r"^ +(\d+)  +\d\.\d{4} ", printed, re.MULTILINE)
    assert listed
    assert str(best) not in listed
    assert all(f"\n  {name} " in printed for name in ("learning_rate", "n_layer", "n_head"))
    assert f"trial {best}," not in Path("runs/studies/space.yaml").read_text("utf-8")


def test_a_dead_workers_trial_of_which_a_setting_is_lost_is_not_gone_on_with(command, trained):
    def before(number, config):
        if number == 0:
            raise KeyboardInterrupt

    trained.before = before
    assert command("--trials", "1", "--storage", "a.log") == 130
    without_line("a.log", '"param_name":"n_layer"')
    assert command("--trials", "1", "--storage", "a.log") == 0
    trials = trials_of("a.log")
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE"]
    assert "continues" not in trials[1].user_attrs
    # Nor does one go on with itself, where the line is missing that began the one before.
    trained.before = killed_in(2)
    with pytest.raises(Killed):
        command("--trials", "2", "--storage", "a.log")
    number = {"op_code": 8, "worker_id": "a", "trial_id": 2, "user_attr": {"continues": 2}}
    with open("a.log", "a") as file:
        file.write(json.dumps(number) + "\n")
    assert command("--trials", "2", "--storage", "a.log") == 0
    assert len(done(trials_of("a.log"))) == 2


@pytest.mark.parametrize(
    "kind, words", [("study", ("study_name",)), ("trial", ("datetime_start",))]
)
def test_a_journal_without_the_line_of_a_study_or_a_trial_is_refused(
    command, trained, capsys, kind, words
):
    assert command("--trials", "2", "--storage", "a.log") == 0
    without_line("a.log", *words)
    damaged = Path("a.log").read_bytes()
    capsys.readouterr()
    assert command("--trials", "3", "--storage", "a.log") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"damaged, as the line that begins its {kind} is missing: put back a copy" in line
    assert Path("a.log").read_bytes() == damaged
    assert len(trained.calls) == 2


def test_a_preset_that_cannot_be_written_is_one_line(command, trained, capsys):
    Path("directory").mkdir()
    assert command("--trials", "1", "--output", "directory") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: directory cannot be written: Is a directory")
    assert len(done(trials_of())) == 1


def test_optunas_own_log_is_as_it_was(command, trained, capfd):
    before = optuna.logging.get_verbosity()
    assert command("--trials", "1") == 0
    assert optuna.logging.get_verbosity() == before
    assert "Trial" not in capfd.readouterr().err


def test_torchrun_is_refused_as_its_processes_would_train_one_model(command, monkeypatch, capsys):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    assert command() == 2
    assert "start each by itself" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------
# Real trainings


def test_a_dead_workers_trial_goes_on_from_its_checkpoint(command, monkeypatch):
    """Real trainings: the same values, as if nobody had died, and no step twice."""
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

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "train", mortal)
        with pytest.raises(Killed):
            command(*flags, "--study", "killed", space=space)
    assert command(*flags, "--study", "killed", space=space) == 0
    whole = trials_of("runs/studies/whole.log", "whole")
    dead, again = trials_of("runs/studies/killed.log", "killed")
    assert again.params == dead.params == whole[0].params
    assert again.intermediate_values == whole[0].intermediate_values
    assert again.value == whole[0].value
    record = json.loads(Path(again.user_attrs["run_dir"], "meta/full_config.json").read_bytes())
    assert record["run"]["resumed_from"]["run_id"] == Path(dead.user_attrs["run_dir"]).name
    assert record["run"]["resumed_from"]["step"] == 4
    # Where it died after its last step, there is nothing left to train.
    with monkeypatch.context() as patched:
        patched.setattr(tune.Desk, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            command(*flags, "--study", "killed", "--trials", "2", space=space)
    assert command(*flags, "--study", "killed", "--trials", "2", space=space) == 0
    *_, dead, again = trials_of("runs/studies/killed.log", "killed")
    assert dead.state is TrialState.FAIL
    assert again.value == min(dead.intermediate_values.values())
    assert again.user_attrs["run_dir"] == dead.user_attrs["run_dir"]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["runs/studies/space.log", "runs/studies/space.db"])
def test_two_workers_one_killed_and_started_again_make_twenty_trials(tmp_path, storage):
    """Real processes: 20 short trials, a SIGKILL in the middle of one, none lost and none twice."""
    Path("text.txt").write_text(LINES * 30, encoding="utf-8")
    Path("space.yaml").write_text(
        "learning_rate: {low: 1e-4, high: 1e-1, log: true}\nn_layer: {low: 1, high: 3}\n",
        encoding="utf-8",
    )
    flags = ["--space=space.yaml", "--data=text.txt", "--trials=20", f"--storage={storage}"]
    flags += [flag for flag in TINY_FLAGS if not flag.startswith("--n-layer")]
    flags += ["--max-iters=400", "--eval-interval=100", "--checkpoint-interval=40"]
    processes = []

    def start() -> subprocess.Popen:
        command = [sys.executable, str(CHECKOUT / "tune.py"), *flags, "--histogram-interval=0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
        return processes[-1]

    def in_the_middle(process: subprocess.Popen) -> list:
        """Its trial, if that has been evaluated and is the fourth or later."""
        if not tune.workers_of(Path(storage)).is_dir():
            return []
        with tune._claim_lock(Path(storage)):  # whoever opens a storage first makes its tables
            trials = trials_of(storage) if Path(storage).exists() else []
        return [
            trial
            for trial in trials
            if trial.state is TrialState.RUNNING
            and f"-{process.pid}-" in trial.user_attrs.get("worker", "")
            and trial.number > 3
            and trial.intermediate_values
        ]

    try:
        first, second = start(), start()
        deadline = time.monotonic() + 120
        while not in_the_middle(first):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.kill()
        first.wait()
        again = start()
        for process in (second, again):
            told, _ = process.communicate(timeout=200)
            assert process.returncode == 0
            assert "Study space: " in told
    finally:
        for process in processes:
            process.kill()
            process.wait()
    trials = trials_of(storage)
    assert len(done(trials)) == 20
    (dead,) = [trial for trial in trials if trial.state not in tune.DONE]
    assert dead.state is TrialState.FAIL
    assert f"-{first.pid}-" in dead.user_attrs["worker"]
    (retried,) = [trial for trial in trials if "continues" in trial.user_attrs]
    assert retried.user_attrs["continues"] == dead.number
    assert retried.params == dead.params
    record = json.loads(Path(retried.user_attrs["run_dir"], "meta/full_config.json").read_bytes())
    assert record["run"]["resumed_from"]["run_id"] == Path(dead.user_attrs["run_dir"]).name
    assert len({json.dumps(trial.params) for trial in done(trials)}) == 20
    runs = sorted(trial.user_attrs["run_dir"] for trial in trials)
    assert runs == sorted(str(path) for path in Path("runs").iterdir() if path.name != "studies")
    owners = {trial.user_attrs["worker"].split("-")[-2] for trial in done(trials)}
    assert {str(second.pid), str(again.pid)} <= owners
    for trial in done(trials):
        result = json.loads(Path(trial.user_attrs["run_dir"], "meta/result.json").read_bytes())
        assert result["best_val_loss"] == pytest.approx(min(trial.intermediate_values.values()))
