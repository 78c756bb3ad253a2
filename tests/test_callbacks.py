"""callbacks.py: objects that observe a run and may stop it.

python -m pytest tests/test_callbacks.py
"""

import hashlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import CHECKOUT, TINY_FLAGS, assert_same_bits, resume_run

import trainer as trainer_module
from bundle import read_state
from callbacks import Callback, load_callback_factories
from optim import learning_rate_at
from trainer import train
from utils.errors import Aborted, NothingToDo, RunError, UserError
from utils.isolation import Isolated
from utils.run_manager import RunDirectory


class Recorder(Callback):
    """Records its calls as (place, step), and returns the given reasons to stop."""

    def __init__(self, reasons: dict | None = None):
        self.reasons, self.calls = reasons or {}, []

    def after_step(self, step):
        self.calls.append(("step", step.step))
        self.last_step = step
        return self.reasons.get(("step", step.step))

    def after_evaluation(self, evaluation):
        self.calls.append(("evaluation", evaluation.step))
        self.last_evaluation = evaluation
        return self.reasons.get(("evaluation", evaluation.step))

    def at_end(self, result):
        self.calls.append(("end", result and result.step))


def read_console(run_dir: Path) -> str:
    return (run_dir / "logs" / "console.txt").read_text(encoding="utf-8")


def set_val_losses(monkeypatch, *losses: float) -> None:
    """Make the evaluations return these val losses."""
    values = iter(losses)
    monkeypatch.setattr(
        trainer_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(values)}
    )


# Calls -----------------------------------------------------------------------------------------


def test_a_callback_is_called_after_each_step_each_evaluation_and_at_the_end(tiny, quiet):
    recorder = Recorder()
    result = train(tiny(), output=quiet, callbacks={"recorder": lambda _: recorder})
    steps = [("step", n) for n in range(1, 7)]
    assert recorder.calls == [
        *steps[:3], ("evaluation", 3), *steps[3:], ("evaluation", 6), ("end", 6)
    ]  # fmt: skip
    step, evaluation = recorder.last_step, recorder.last_evaluation
    assert math.isfinite(float(step.loss))
    assert float(step.grad_norm) > 0
    assert step.learning_rate == learning_rate_at(5, step.config)
    assert step.run_dir == evaluation.run_dir == result.run_dir
    assert (evaluation.train_loss, evaluation.val_loss) == (result.train_loss, result.val_loss)
    assert evaluation.best.step == result.best_step
    assert evaluation.config.max_iters == 6


def test_lines_of_the_metrics_that_are_damaged_are_no_rows_of_the_history(tiny, quiet):
    result = train(tiny(), output=quiet)
    path, before = RunDirectory(result.run_dir).metrics, result.history("steps")
    with path.open("ab") as file:
        file.write(b'3\n[]\n{"step": 9\n\xff\n')
    assert result.history("steps") == before
    path.unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        result.history()


def test_the_history_of_a_run_is_a_table_without_gaps_for_evaluations_and_for_steps(tiny, quiet):
    recorder = Recorder()
    result = train(tiny(), output=quiet, callbacks={"recorder": lambda _: recorder})
    evaluations, steps = result.history(), result.history("steps")
    assert evaluations["step"][-2:] == [3, 6] and steps["step"] == [1, 2, 3, 4, 5, 6]
    assert evaluations["train_loss"][-1] == recorder.last_evaluation.train_loss
    assert evaluations["val_loss"][-1] == result.val_loss
    assert evaluations["val_bits_per_byte"][-1] == recorder.last_evaluation.val_bits_per_byte
    assert steps["loss"][-1] == pytest.approx(float(recorder.last_step.loss))
    assert steps["grad_norm"][-1] == pytest.approx(float(recorder.last_step.grad_norm))
    assert steps["learning_rate"][-1] == recorder.last_step.learning_rate
    for table in (evaluations, steps):
        assert {len(column) for column in table.values()} == {len(table["step"])}
        assert all(math.isfinite(value) for column in table.values() for value in column)
        assert table["seconds"] == sorted(table["seconds"])


def test_an_object_needs_only_the_methods_it_uses(tiny, quiet):
    seen = []
    only_steps = SimpleNamespace(after_step=lambda step: seen.append(step.step))
    train(tiny(), output=quiet, callbacks={"mine": lambda _: only_steps})
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("place", "step"), [("step", 4), ("evaluation", 3)])
def test_a_returned_reason_stops_the_run_after_an_evaluation_and_a_save(tiny, quiet, place, step):
    recorder = Recorder({(place, step): "reached the target"})
    result = train(tiny(), output=quiet, callbacks={"recorder": lambda _: recorder})
    assert result.step == step
    assert result.exit_status == 0
    assert result.stopped_by == "reached the target"
    assert result.checkpoint.name == f"step_{step:08}"
    assert recorder.calls[-2:] == [("evaluation", step), ("end", step)]
    text = read_console(result.run_dir)
    assert re.search(rf"Stopped after step {step} in \d:\d\d: reached the target\.", text)
    assert f"--- Sample of the best model (step {step}) ---" in text
    assert "--resume" in text


def test_a_run_that_a_callback_stopped_resumes_bit_for_bit(tiny, quiet):
    uninterrupted = train(tiny(), output=quiet)
    stopper = Recorder({("step", 4): "wait"})
    part = train(tiny(), output=quiet, callbacks={"stopper": lambda _: stopper})
    rest = resume_run(part.run_dir)
    assert_same_bits(uninterrupted.checkpoint, rest.checkpoint)


@pytest.mark.parametrize("place", ["after_step", "after_evaluation", "at_end"])
def test_a_callback_that_raises_costs_one_warning_and_changes_no_number(tiny, quiet, place):
    def broken(*_):
        raise ZeroDivisionError("a bug\nof mine")

    plain = train(tiny(), output=quiet)
    result = train(
        tiny(), output=quiet, callbacks={"mine": lambda _: SimpleNamespace(**{place: broken})}
    )
    assert_same_bits(plain.checkpoint, result.checkpoint)
    text = read_console(result.run_dir)
    assert text.count("warning: mine ") == 1
    assert "ZeroDivisionError" in text  # the traceback
    assert "test_callbacks.py" in text


def test_a_returned_value_that_is_no_string_costs_a_warning_and_stops_nothing(tiny, quiet):
    yes = SimpleNamespace(after_step=lambda step: True)
    result = train(tiny(), output=quiet, callbacks={"mine": lambda _: yes})
    assert result.step == 6
    assert "after_step returned True" in read_console(result.run_dir)


def test_a_callback_that_calls_sys_exit_is_removed_and_the_run_continues(tiny, quiet):
    leaves = SimpleNamespace(after_step=lambda step: sys.exit(0))
    result = train(tiny(), output=quiet, callbacks={"mine": lambda _: leaves})
    assert (result.step, result.exit_status) == (6, 0)
    assert "warning: mine " in read_console(result.run_dir)


def test_a_second_sigterm_passes_through_isolated_calls():
    isolated = Isolated(warn=lambda *_: pytest.fail("warned"))
    isolated.add("one", object)

    def aborted(_):
        raise Aborted(143)

    with pytest.raises(Aborted):
        isolated.call_each(aborted)


def test_a_removed_member_is_discarded_and_a_closed_one_is_not():
    discarded, warned = [], []
    isolated = Isolated(warn=lambda *warning: warned.append(warning), discard=discarded.append)
    isolated.add("one", lambda: 1)
    isolated.add("zero", lambda: 0)
    assert isolated.call_each(lambda number: 1 / number) == [1]
    assert discarded == [0]
    called = []
    isolated.close_each(called.append)
    isolated.close_each(called.append)
    assert called == [1]
    assert discarded == [0]
    assert len(warned) == 1


def test_at_end_is_called_once_even_if_interrupted(tiny, quiet):
    calls = []

    def interrupted(result):
        calls.append(result)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            tiny(),
            output=quiet,
            callbacks={"mine": lambda _: SimpleNamespace(at_end=interrupted)},
        )
    assert len(calls) == 1


def test_a_callbacks_reason_takes_precedence_over_the_time_limit(tiny, quiet):
    stopper = Recorder({("step", 1): "a callback's reason"})
    result = train(tiny(max_minutes=1e-9), output=quiet, callbacks={"s": lambda _: stopper})
    assert result.stopped_by == "a callback's reason"


@pytest.mark.parametrize("error", [RunError, KeyboardInterrupt])
def test_at_end_is_called_with_none_if_the_run_failed(tiny, quiet, monkeypatch, error):
    def fail(*_):
        raise error("x")

    monkeypatch.setattr(trainer_module.Trainer, "training_step", fail)
    recorder = Recorder()
    with pytest.raises(error):
        train(tiny(), output=quiet, callbacks={"recorder": lambda _: recorder})
    assert recorder.calls == [("end", None)]


# Early stopping --------------------------------------------------------------------------------


def test_early_stopping_waits_for_the_given_number_of_evaluations(tiny, quiet, monkeypatch):
    set_val_losses(monkeypatch, 2.0, 1.9, 1.95, 1.9, 1.8, 1.85, 1.81, 1.8, 1.7, 1.6)
    config = tiny(max_iters=10, eval_interval=1, early_stopping_patience=3)
    result = train(config, output=quiet)
    assert (result.step, result.best_step, result.exit_status) == (8, 5, 0)
    assert "3 evaluations since step 5" in result.stopped_by
    assert "early_stopping_patience" in read_console(result.run_dir)


def test_without_patience_a_run_never_stops_early(tiny, quiet, monkeypatch):
    set_val_losses(monkeypatch, *[1.0, *[2.0] * 9])
    assert train(tiny(max_iters=10, eval_interval=1), output=quiet).step == 10


def test_the_early_stopping_count_continues_on_resume(tiny, quiet, monkeypatch):
    losses = (2.0, 1.9, 1.95, 1.96, 1.97, 1.98)
    set_val_losses(monkeypatch, *losses)
    config = tiny(max_iters=9, eval_interval=1, early_stopping_patience=3)
    uninterrupted = train(config, output=quiet)
    assert uninterrupted.step == 5

    set_val_losses(monkeypatch, *losses)
    stopper = Recorder({("evaluation", 4): "wait"})  # two evaluations after the best
    part = train(config, output=quiet, callbacks={"stopper": lambda _: stopper})
    assert read_state(part.checkpoint).get_fact("evaluations_since_best") == 2
    rest = resume_run(part.run_dir)
    assert rest.step == 5
    assert rest.stopped_by == uninterrupted.stopped_by


def test_resuming_on_another_text_resets_the_best_loss(tiny, quiet, monkeypatch, tmp_path):
    set_val_losses(monkeypatch, 1.0, 2.0, 2.0, 1.9, 2.0)
    config = tiny(max_iters=9, eval_interval=1, early_stopping_patience=1)
    part = train(config, output=quiet)
    other = tmp_path / "other.txt"
    other.write_text("to be, or not to be: that is the question. " * 90, encoding="utf-8")
    rest = resume_run(part.run_dir, {"data": str(other)})
    assert (part.step, rest.step) == (2, 5)


def test_resuming_a_run_that_stopped_early_needs_another_patience(tiny, quiet, monkeypatch):
    set_val_losses(monkeypatch, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    config = tiny(max_iters=9, eval_interval=1, early_stopping_patience=1)
    part = train(config, output=quiet)
    assert "--early-stopping-patience 0 " in read_console(part.run_dir)
    with pytest.raises(NothingToDo, match="--early-stopping-patience"):
        resume_run(part.run_dir)
    assert resume_run(part.run_dir, {"early_stopping_patience": 2}).step == 3


# --callback ------------------------------------------------------------------------------------

MODULE = """
import json
from pathlib import Path

class Mine:
    def __init__(self, config):
        self.config = config
    def after_evaluation(self, evaluation):
        return "far enough" if evaluation.step == 2 else None
    def at_end(self, result):
        result = {"max_iters": self.config.max_iters, "step": result.step}
        Path("result.json").write_text(json.dumps(result))

def broken(config):
    raise RuntimeError("no account\\nsecond line")

number = 7
"""


@pytest.fixture
def my_module(monkeypatch):
    """A module of the user's in the working directory."""
    Path("my_callbacks.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_callbacks", None)


@pytest.mark.parametrize(
    ("reference", "fact"),
    [
        ("my_callbacks", "module:make"),
        ("my_callbacks:", "module:make"),
        ("no_such_module:make", "no_such_module"),
        ("my_callbacks:mke", "mke"),
        ("my_callbacks:number", "number"),
        ("broken_module:make", "ZeroDivisionError: division by zero (broken_module.py:2)"),
        ("leaving_module:make", "SystemExit: goodbye (leaving_module.py:2)"),
        ("misspelt:make", "SyntaxError: "),
    ],
)
def test_a_callback_that_cannot_be_imported_is_an_error_in_one_line(my_module, reference, fact):
    Path("broken_module.py").write_text("x = 1\nx / 0\n", encoding="utf-8")
    Path("leaving_module.py").write_text("import sys\nsys.exit('goodbye')\n", encoding="utf-8")
    Path("misspelt.py").write_text("def make(:\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(fact)) as caught:
        load_callback_factories([reference])
    (problem,) = caught.value.problems
    assert problem.startswith(f"--callback {reference}: ")
    assert "\n" not in problem


def test_all_wrong_callbacks_are_reported_together(my_module):
    with pytest.raises(UserError) as caught:
        load_callback_factories(["a:b", "my_callbacks:Mine", "c"])
    assert len(caught.value.problems) == 2


def unprintable(config):
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError("not even this")

    raise Odd


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (lambda config: 1 / 0, "mine: ZeroDivisionError: division by zero (test_callbacks.py:"),
        (lambda config: sys.exit("bye"), "mine: SystemExit: bye"),
        (unprintable, "mine: Odd: Odd"),
        (lambda config: None, "mine returned NoneType, which has none of after_step"),
    ],
)
def test_a_callback_that_cannot_be_created_is_an_error_in_one_line_and_no_run(
    tiny, quiet, make, facts
):
    with pytest.raises(UserError, match=re.escape(facts)) as caught:
        train(tiny(), output=quiet, callbacks={"mine": make})
    (problem,) = caught.value.problems
    assert "\n" not in problem
    assert not Path("runs").exists()


def test_callbacks_created_before_one_that_fails_get_at_end(tiny, quiet):
    recorder = Recorder()
    with pytest.raises(UserError):
        train(tiny(), output=quiet, callbacks={"one": lambda _: recorder, "two": lambda _: None})
    assert recorder.calls == [("end", None)]


def test_a_callback_is_created_once_with_the_resolved_config(tiny, quiet):
    made = []

    def make(config):
        made.append(config.max_iters)
        return Recorder()

    with pytest.raises(UserError):
        train(tiny(device="cuda:9"), output=quiet, callbacks={"mine": make})
    assert made == []
    result = train(tiny(max_iters=None, epochs=0.1), output=quiet, callbacks={"mine": make})
    assert made == [result.step]
    with pytest.raises(NothingToDo):
        resume_run(result.run_dir, callbacks={"mine": make})
    assert len(made) == 1


@pytest.mark.slow
def test_the_flag_imports_from_the_working_directory_and_is_recorded(my_module, folio, text_file):
    flags = ["--callback=my_callbacks:Mine", "--callback", "my_callbacks:Mine"]
    done = folio("train.py", "--data", text_file, *TINY_FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    assert "Stopped after step 2" in done.stdout
    assert "far enough" in done.stdout
    assert json.loads(Path("result.json").read_text(encoding="utf-8")) == {
        "max_iters": 4,
        "step": 2,
    }
    (run,) = Path("runs").iterdir()
    record = json.loads((run / "meta" / "full_config.json").read_text(encoding="utf-8"))
    (callback,) = record["run"]["callbacks"]  # the same one twice is one
    assert callback["name"] == "--callback my_callbacks:Mine"
    module = Path("my_callbacks.py").resolve()
    assert callback["file"] == str(module)
    assert callback["sha256"] == hashlib.sha256(module.read_bytes()).hexdigest()
    assert "--callback my_callbacks:Mine " in done.stdout
    again = folio("train.py", "--config", run / "meta" / "full_config.json")
    assert "--callback my_callbacks:Mine" in again.stdout


def test_a_wrong_callback_exits_with_2_before_a_run_directory_exists(folio, text_file):
    done = folio("train.py", "--data", text_file, *TINY_FLAGS, "--callback", "nowhere:make")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --callback nowhere:make: ModuleNotFoundError")
    assert done.stderr.count("\n") == 1
    assert not Path("runs").exists()


def test_callback_is_a_flag_and_no_setting_in_a_file(folio, text_file):
    Path("mine.yaml").write_text("callback: my_callbacks:Mine\n", encoding="utf-8")
    done = folio("train.py", "--data", text_file, "--config", "mine.yaml")
    assert done.returncode == 2
    assert "callback" in done.stderr


# The examples in docs/callbacks.md ---------------------------------------------------------------

DOCUMENT = (CHECKOUT / "docs" / "callbacks.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture
def examples(monkeypatch):
    """The examples as modules in the working directory, and a fake wandb that records calls."""
    for name, source in EXAMPLES:
        Path(f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    logged: list = []
    run = SimpleNamespace(
        name=None,
        log=lambda values, step: logged.append((step, values)),
        finish=lambda exit_code=0: logged.append(("finish", exit_code)),
    )

    def init(**settings):
        logged.append(("init", settings))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    yield logged
    for name, _ in EXAMPLES:
        sys.modules.pop(name, None)


def test_the_document_has_two_examples_and_their_flags():
    assert [name for name, _ in EXAMPLES] == ["target_loss", "to_wandb"]
    for name in ("target_loss", "to_wandb"):
        assert f"--callback {name}:make" in DOCUMENT


def test_the_target_loss_example_stops_the_run(examples, tiny, quiet, monkeypatch):
    set_val_losses(monkeypatch, 2.0, 1.4, 1.3)
    callbacks = load_callback_factories(["target_loss:make"])
    result = train(tiny(max_iters=9), output=quiet, callbacks=callbacks)
    assert result.step == 6
    assert "1.4" in result.stopped_by


def test_the_wandb_example_logs_losses(examples, tiny, quiet):
    config = tiny(max_iters=6, log_interval=2)
    result = train(config, output=quiet, callbacks=load_callback_factories(["to_wandb:make"]))
    assert "warning" not in read_console(result.run_dir)
    assert examples[0][0] == "init"
    assert examples[0][1]["config"]["n_layer"] == 2
    logged = dict(examples[1:-1])
    assert any("eval/val_loss" in values for _, values in examples[1:-1])
    assert any("loss/train" in values for _, values in examples[1:-1])
    assert logged.keys() <= set(range(1, 7))
    assert examples[-1] == ("finish", 0)


def test_a_callback_that_reads_every_loss_changes_no_number(tiny, quiet):
    plain = train(tiny(dropout=0.2), output=quiet)
    seen = []
    reads = SimpleNamespace(after_step=lambda step: seen.append(float(step.loss)))
    watched = train(tiny(dropout=0.2), output=quiet, callbacks={"reader": lambda _: reads})
    assert len(seen) == 6
    assert_same_bits(plain.checkpoint, watched.checkpoint)
