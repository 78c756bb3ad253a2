"""callbacks.py: what may look at a run, and stop it.

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
from conftest import CHECKOUT, TINY_FLAGS, assert_same_bits

import train as train_module
from bundle import read_state
from callbacks import Callback, load_callback_factories
from optim import learning_rate_at
from start import plan_run
from train import train
from utils.errors import Aborted, NothingToDo, RunError, UserError
from utils.isolation import Isolated


class Watcher(Callback):
    """Remembers what it was told, and answers as it is told to."""

    def __init__(self, answers: dict | None = None):
        self.answers, self.told = answers or {}, []

    def after_step(self, step):
        self.told.append(("step", step.step))
        self.last_step = step
        return self.answers.get(("step", step.step))

    def after_evaluation(self, evaluation):
        self.told.append(("evaluation", evaluation.step))
        self.last_evaluation = evaluation
        return self.answers.get(("evaluation", evaluation.step))

    def at_end(self, result):
        self.told.append(("end", result and result.step))


def console(run_dir: Path) -> str:
    return (run_dir / "logs" / "console.txt").read_text(encoding="utf-8")


def scripted(monkeypatch, *losses: float) -> None:
    """Let the evaluations find these val losses."""
    values = iter(losses)
    monkeypatch.setattr(
        train_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(values)}
    )


# The three places ------------------------------------------------------------------------------


def test_a_callback_is_called_after_each_step_each_evaluation_and_at_the_end(tiny, quiet):
    watcher = Watcher()
    result = train(tiny(), output=quiet, callbacks={"watcher": lambda _: watcher})
    steps = [("step", n) for n in range(1, 7)]
    assert watcher.told == [
        *steps[:3], ("evaluation", 3), *steps[3:], ("evaluation", 6), ("end", 6)
    ]  # fmt: skip
    step, evaluation = watcher.last_step, watcher.last_evaluation
    assert math.isfinite(float(step.loss))
    assert float(step.grad_norm) > 0
    assert step.learning_rate == learning_rate_at(5, step.config)
    assert step.run_dir == evaluation.run_dir == result.run_dir
    assert (evaluation.train_loss, evaluation.val_loss) == (result.train_loss, result.val_loss)
    assert evaluation.best.step == result.best_step
    assert evaluation.config.max_iters == 6


def test_an_object_needs_only_the_methods_it_uses(tiny, quiet):
    seen = []
    only_steps = SimpleNamespace(after_step=lambda step: seen.append(step.step))
    train(tiny(), output=quiet, callbacks={"mine": lambda _: only_steps})
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("place", "step"), [("step", 4), ("evaluation", 3)])
def test_a_sentence_stops_the_run_which_is_evaluated_saved_and_told(tiny, quiet, place, step):
    watcher = Watcher({(place, step): "enough is enough"})
    result = train(tiny(), output=quiet, callbacks={"watcher": lambda _: watcher})
    assert result.step == step
    assert result.exit_status == 0
    assert result.stopped_by == "enough is enough"
    assert result.checkpoint.name == f"step_{step:08}"
    assert watcher.told[-2:] == [("evaluation", step), ("end", step)]
    text = console(result.run_dir)
    assert re.search(rf"Stopped after step {step} in \d:\d\d: enough is enough\.", text)
    assert f"--- Sample at step {step} ---" in text
    assert "--resume" in text


def test_what_a_callback_stopped_goes_on_to_the_same_bits(tiny, quiet):
    whole = train(tiny(), output=quiet)
    stopper = Watcher({("step", 4): "wait"})
    part = train(tiny(), output=quiet, callbacks={"stopper": lambda _: stopper})
    loaded, start = plan_run({}, resume=str(part.run_dir))
    rest = train(loaded.config, loaded=loaded, start=start, output=quiet)
    assert_same_bits(whole.checkpoint, rest.checkpoint)


@pytest.mark.parametrize("place", ["after_step", "after_evaluation", "at_end"])
def test_a_callback_that_raises_costs_one_warning_and_changes_no_number(tiny, quiet, place):
    def broken(*_):
        raise ZeroDivisionError("a bug\nof mine")

    plain = train(tiny(), output=quiet)
    result = train(
        tiny(), output=quiet, callbacks={"mine": lambda _: SimpleNamespace(**{place: broken})}
    )
    assert_same_bits(plain.checkpoint, result.checkpoint)
    text = console(result.run_dir)
    assert text.count("warning: mine failed and is left out from here on: a bug") == 1
    assert "ZeroDivisionError" in text  # the traceback, for whoever has to mend it
    assert "test_callbacks.py" in text


def test_an_answer_that_is_no_sentence_is_a_mistake_and_stops_nothing(tiny, quiet):
    yes = SimpleNamespace(after_step=lambda step: True)
    result = train(tiny(), output=quiet, callbacks={"mine": lambda _: yes})
    assert result.step == 6
    assert "after_step returned True" in console(result.run_dir)


def test_a_callback_that_exits_is_left_out_like_any_other(tiny, quiet):
    leaves = SimpleNamespace(after_step=lambda step: sys.exit(0))
    result = train(tiny(), output=quiet, callbacks={"mine": lambda _: leaves})
    assert (result.step, result.exit_status) == (6, 0)
    assert "warning: mine failed and is left out from here on: 0" in console(result.run_dir)


def test_what_a_second_sigterm_raises_is_nobodys_failure():
    isolated = Isolated(warn=lambda *_: pytest.fail("warned"))
    isolated.add("one", object)

    def aborted(_):
        raise Aborted(143)

    with pytest.raises(Aborted):
        isolated.call_each(aborted)


def test_what_is_dropped_is_discarded_and_what_is_dismissed_is_not():
    discarded, warned = [], []
    isolated = Isolated(warn=lambda *words: warned.append(words), discard=discarded.append)
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


def test_at_end_is_called_once_even_if_it_is_interrupted(tiny, quiet):
    told = []

    def interrupted(result):
        told.append(result)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            tiny(),
            output=quiet,
            callbacks={"mine": lambda _: SimpleNamespace(at_end=interrupted)},
        )
    assert len(told) == 1


def test_the_time_limit_takes_no_callbacks_reason_away(tiny, quiet):
    stopper = Watcher({("step", 1): "my own reason"})
    result = train(tiny(max_minutes=1e-9), output=quiet, callbacks={"s": lambda _: stopper})
    assert result.stopped_by == "my own reason"


@pytest.mark.parametrize("error", [RunError, KeyboardInterrupt])
def test_callbacks_hear_of_the_end_of_a_run_that_failed(tiny, quiet, monkeypatch, error):
    def fail(*_):
        raise error("x")

    monkeypatch.setattr(train_module, "training_step", fail)
    watcher = Watcher()
    with pytest.raises(error):
        train(tiny(), output=quiet, callbacks={"watcher": lambda _: watcher})
    assert watcher.told == [("end", None)]


# Early stopping --------------------------------------------------------------------------------


def test_early_stopping_waits_for_as_many_evaluations_as_it_is_told(tiny, quiet, monkeypatch):
    scripted(monkeypatch, 2.0, 1.9, 1.95, 1.9, 1.8, 1.85, 1.81, 1.8, 1.7, 1.6)
    config = tiny(max_iters=10, eval_interval=1, early_stopping_patience=3)
    result = train(config, output=quiet)
    assert (result.step, result.best_step, result.exit_status) == (8, 5, 0)
    assert "no better val loss in 3 evaluations since step 5" in result.stopped_by
    assert "(early_stopping_patience)" in console(result.run_dir)


def test_without_patience_a_run_never_stops_early(tiny, quiet, monkeypatch):
    scripted(monkeypatch, *[1.0, *[2.0] * 9])
    assert train(tiny(max_iters=10, eval_interval=1), output=quiet).step == 10


def test_the_count_of_early_stopping_survives_a_resume(tiny, quiet, monkeypatch):
    losses = (2.0, 1.9, 1.95, 1.96, 1.97, 1.98)
    scripted(monkeypatch, *losses)
    config = tiny(max_iters=9, eval_interval=1, early_stopping_patience=3)
    whole = train(config, output=quiet)
    assert whole.step == 5

    scripted(monkeypatch, *losses)
    stopper = Watcher({("evaluation", 4): "wait"})  # two evaluations after the best
    part = train(config, output=quiet, callbacks={"stopper": lambda _: stopper})
    assert read_state(part.checkpoint).get_fact("evaluations_since_best") == 2
    loaded, start = plan_run({}, resume=str(part.run_dir))
    assert loaded.config.early_stopping_patience == 3
    rest = train(loaded.config, loaded=loaded, start=start, output=quiet)
    assert rest.step == 5
    assert rest.stopped_by == whole.stopped_by


def test_on_another_text_the_best_counts_anew_and_nothing_is_over(
    tiny, quiet, monkeypatch, tmp_path
):
    scripted(monkeypatch, 1.0, 2.0, 2.0, 1.9, 2.0)
    config = tiny(max_iters=9, eval_interval=1, early_stopping_patience=1)
    part = train(config, output=quiet)
    other = tmp_path / "other.txt"
    other.write_text("to be, or not to be: that is the question. " * 90, encoding="utf-8")
    loaded, start = plan_run({"data": str(other)}, resume=str(part.run_dir))
    rest = train(loaded.config, loaded=loaded, start=start, output=quiet)
    assert (part.step, rest.step) == (2, 5)


def test_a_run_that_stopped_early_has_nothing_more_to_do_until_told_to_wait(
    tiny, quiet, monkeypatch
):
    scripted(monkeypatch, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    config = tiny(max_iters=9, eval_interval=1, early_stopping_patience=1)
    part = train(config, output=quiet)
    assert "--early-stopping-patience 0   # go on from here" in console(part.run_dir)
    loaded, start = plan_run({}, resume=str(part.run_dir))
    with pytest.raises(NothingToDo, match=r"was stopped early.*--early-stopping-patience N"):
        train(loaded.config, loaded=loaded, start=start, output=quiet)
    loaded, start = plan_run({"early_stopping_patience": 2}, resume=str(part.run_dir))
    rest = train(loaded.config, loaded=loaded, start=start, output=quiet)
    assert rest.step == 3


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
        told = {"max_iters": self.config.max_iters, "step": result.step}
        Path("told.json").write_text(json.dumps(told))

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
    ("reference", "words"),
    [
        ("my_callbacks", "write it as module:make"),
        ("my_callbacks:", "write it as module:make"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("my_callbacks:mke", "my_callbacks.py has no function mke"),
        ("my_callbacks:number", "my_callbacks.py has no function number"),
        ("broken_module:make", "ZeroDivisionError: division by zero (broken_module.py:2)"),
        ("leaving_module:make", "SystemExit: goodbye (leaving_module.py:2)"),
        ("misspelt:make", "SyntaxError: "),
    ],
)
def test_a_callback_that_cannot_be_had_is_one_line(my_module, reference, words):
    Path("broken_module.py").write_text("x = 1\nx / 0\n", encoding="utf-8")
    Path("leaving_module.py").write_text("import sys\nsys.exit('goodbye')\n", encoding="utf-8")
    Path("misspelt.py").write_text("def make(:\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        load_callback_factories([reference])
    (problem,) = caught.value.problems
    assert problem.startswith(f"--callback {reference}: ")
    assert "\n" not in problem


def test_all_wrong_callbacks_are_told_together(my_module):
    with pytest.raises(UserError) as caught:
        load_callback_factories(["a:b", "my_callbacks:Mine", "c"])
    assert len(caught.value.problems) == 2


def unprintable(config):
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError("not even this")

    raise Odd


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda config: 1 / 0, "mine: ZeroDivisionError: division by zero (test_callbacks.py:"),
        (lambda config: sys.exit("bye"), "mine: SystemExit: bye"),
        (unprintable, "mine: Odd: Odd"),
        (lambda config: None, "mine returned NoneType, which has none of after_step"),
    ],
)
def test_a_callback_that_cannot_be_made_is_one_line_and_no_run(tiny, quiet, make, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        train(tiny(), output=quiet, callbacks={"mine": make})
    (problem,) = caught.value.problems
    assert "\n" not in problem
    assert not Path("runs").exists()


def test_those_made_before_one_that_cannot_be_hear_that_there_is_no_run(tiny, quiet):
    watcher = Watcher()
    with pytest.raises(UserError):
        train(tiny(), output=quiet, callbacks={"one": lambda _: watcher, "two": lambda _: None})
    assert watcher.told == [("end", None)]


def test_a_callback_is_made_once_there_is_a_run_with_its_settled_settings(tiny, quiet):
    made = []

    def make(config):
        made.append(config.max_iters)
        return Watcher()

    with pytest.raises(UserError):
        train(tiny(device="cuda:9"), output=quiet, callbacks={"mine": make})
    assert made == []
    result = train(tiny(max_iters=None, epochs=0.1), output=quiet, callbacks={"mine": make})
    assert made == [result.step]
    loaded, start = plan_run({}, resume=str(result.run_dir))
    with pytest.raises(NothingToDo):
        train(loaded.config, loaded=loaded, start=start, output=quiet, callbacks={"mine": make})
    assert len(made) == 1


def test_the_flag_finds_modules_of_the_working_directory_and_is_recorded(
    my_module, folio, text_file
):
    flags = ["--callback=my_callbacks:Mine", "--callback", "my_callbacks:Mine"]
    done = folio("train.py", "--data", text_file, *TINY_FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    assert "Stopped after step 2" in done.stdout
    assert "far enough" in done.stdout
    assert json.loads(Path("told.json").read_text(encoding="utf-8")) == {"max_iters": 4, "step": 2}
    (run,) = Path("runs").iterdir()
    record = json.loads((run / "meta" / "full_config.json").read_text(encoding="utf-8"))
    (callback,) = record["run"]["callbacks"]  # the same one twice is one
    assert callback["name"] == "--callback my_callbacks:Mine"
    module = Path("my_callbacks.py").resolve()
    assert callback["file"] == str(module)
    assert callback["sha256"] == hashlib.sha256(module.read_bytes()).hexdigest()
    assert "--callback my_callbacks:Mine   # go on from here" in done.stdout
    again = folio("train.py", "--config", run / "meta" / "full_config.json")
    assert "Note: the run that is made again here had --callback my_callbacks:Mine" in again.stdout


def test_a_wrong_callback_exits_with_2_before_there_is_a_run(folio, text_file):
    done = folio("train.py", "--data", text_file, *TINY_FLAGS, "--callback", "nowhere:make")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --callback nowhere:make: ModuleNotFoundError: No module named 'nowhere'\n"
    )
    assert not Path("runs").exists()


def test_callback_is_a_flag_and_never_a_key(folio, text_file):
    Path("mine.yaml").write_text("callback: my_callbacks:Mine\n", encoding="utf-8")
    done = folio("train.py", "--data", text_file, "--config", "mine.yaml")
    assert done.returncode == 2
    assert "callback" in done.stderr


# The examples of the documentation -------------------------------------------------------------

DOCUMENT = (CHECKOUT / "docs" / "callbacks.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture
def examples(monkeypatch):
    """The examples as modules in the working directory, and a Weights & Biases that remembers."""
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


def test_the_document_has_two_worked_examples_and_the_flags_that_use_them():
    assert [name for name, _ in EXAMPLES] == ["target_loss", "to_wandb"]
    for name in ("target_loss", "to_wandb"):
        assert f"--callback {name}:make" in DOCUMENT


def test_the_example_that_stops_at_a_target_loss_does(examples, tiny, quiet, monkeypatch):
    scripted(monkeypatch, 2.0, 1.4, 1.3)
    callbacks = load_callback_factories(["target_loss:make"])
    result = train(tiny(max_iters=9), output=quiet, callbacks=callbacks)
    assert result.step == 6
    assert "1.4" in result.stopped_by


def test_the_example_that_logs_to_weights_and_biases_does(examples, tiny, quiet):
    config = tiny(max_iters=6, log_interval=2)
    result = train(config, output=quiet, callbacks=load_callback_factories(["to_wandb:make"]))
    assert "left out" not in console(result.run_dir)
    assert examples[0][0] == "init"
    assert examples[0][1]["config"]["n_layer"] == 2
    logged = dict(examples[1:-1])
    assert any("eval/val_loss" in values for _, values in examples[1:-1])
    assert any("loss/train" in values for _, values in examples[1:-1])
    assert logged.keys() <= set(range(1, 7))
    assert examples[-1] == ("finish", 0)


def test_a_callback_that_looks_at_every_loss_changes_no_number(tiny, quiet):
    plain = train(tiny(dropout=0.2), output=quiet)
    seen = []
    looks = SimpleNamespace(after_step=lambda step: seen.append(float(step.loss)))
    watched = train(tiny(dropout=0.2), output=quiet, callbacks={"looks": lambda _: looks})
    assert len(seen) == 6
    assert_same_bits(plain.checkpoint, watched.checkpoint)
