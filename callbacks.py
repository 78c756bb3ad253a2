"""What may look at a run, and stop it: early stopping, and callbacks of your own.

    python train.py --callback my_module:make

`make(config)` returns an object with any of the methods of `Callback`. They are called at the
three places where everything else is: after a step, after an evaluation, and at the end. A method
that returns a sentence stops the run, and the sentence is its reason. docs/callbacks.md has two
worked examples.
"""

import hashlib
import importlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import ModelConfig
from utils.errors import UserError, format_reason
from utils.isolation import Isolated
from utils.output import pluralize

if TYPE_CHECKING:  # a mistake in --callback is answered before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Best:
    """The lowest val loss so far, in nats per token, and the step that had it.

    `evaluations_since` counts the evaluations after it, resumed runs included.
    """

    step: int | None = None
    loss: float | None = None
    evaluations_since: int = 0


@dataclass(frozen=True)
class Step:
    """What is known after a step.

    `step` counts the steps done. `loss` and `grad_norm` are scalar tensors that may still be in
    the making: `float(step.loss)` waits for the device, which slows a run if done at every step.
    """

    step: int
    loss: "Tensor"
    grad_norm: "Tensor"
    learning_rate: float
    run_dir: Path
    config: ModelConfig


@dataclass(frozen=True)
class Evaluation:
    """What is known after an evaluation: means in nats per token, and in bits per byte."""

    step: int
    train_loss: float
    val_loss: float
    val_bits_per_byte: float
    best: Best
    run_dir: Path
    config: ModelConfig


@dataclass(frozen=True)
class TrainResult:
    """What became of a run.

    Losses are means in nats per token, and None where nothing was evaluated; `seconds` is the
    loop's time. `checkpoint` is the bundle to go on with, `export_dir` that of the best model.
    `stopped_by` says why a run ended before its last step, if it did.
    """

    run_dir: Path
    export_dir: Path
    checkpoint: Path | None
    step: int
    train_loss: float | None
    val_loss: float | None
    best_step: int | None
    best_val_loss: float | None
    seconds: float
    exit_status: int
    stopped_by: str | None


class Callback:
    """What a callback may do. Need not be inherited from: methods that are not there do nothing."""

    def after_step(self, step: Step) -> str | None:
        """Look at a step. A sentence ends the run, after an evaluation and a save."""

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Look at an evaluation. A sentence ends the run, after a save."""

    def at_end(self, result: TrainResult | None) -> None:
        """Called once, however the run ends; with None where it failed."""


class EarlyStopping(Callback):
    """Stops a run whose val loss has not fallen for `patience` evaluations.

    The count is part of the training's state: a resumed run counts on.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Stop where the best is too long ago."""
        best = evaluation.best
        if best.evaluations_since < self.patience:
            return None
        since = pluralize(best.evaluations_since, "evaluation")
        return f"no better val loss in {since} since step {best.step:,} (early_stopping_patience)"


CallbackFactory = Callable[[ModelConfig], object]
PLACES = ("after_step", "after_evaluation", "at_end")


class Callbacks:
    """Calls each callback at each place. One that raises is left out, and the run goes on.

    Args:
        callbacks: objects, under the names that warnings give them.
        warn: what a warning and its traceback are handed to.
    """

    def __init__(self, callbacks: Mapping[str, object], warn: Callable[[str, str], None]):
        self._callbacks: Isolated[object] = Isolated(warn)
        for name, callback in callbacks.items():
            self._add(name, callback)

    def add(self, makers: Mapping[str, CallbackFactory], config: ModelConfig) -> None:
        """Add what each maker makes of the settings. Raises `UserError` where one cannot."""
        for name, make in makers.items():
            try:
                callback = make(config)
            except (Exception, SystemExit) as error:  # whatever the user's own code raises
                raise UserError(_told(name, error)) from error
            if not any(hasattr(callback, place) for place in PLACES):
                raise UserError(
                    f"{name} returned {type(callback).__name__}, which has none of "
                    f"{', '.join(PLACES)}"
                )
            self._add(name, callback)

    def after_step(self, step: Step) -> str | None:
        """Tell all callbacks; return the first reason to stop, if there is one."""
        return self._reason("after_step", step)

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Tell all callbacks; return the first reason to stop, if there is one."""
        return self._reason("after_evaluation", evaluation)

    def at_end(self, result: TrainResult | None) -> None:
        """Tell all callbacks that the run is over, each once, whoever calls again."""
        self._callbacks.close_each(lambda callback: _answer(callback, "at_end", result))

    def _add(self, name: str, callback: object) -> None:
        self._callbacks.add(name, lambda: callback)

    def _reason(self, place: str, what: Any) -> str | None:
        answers = self._callbacks.call_each(lambda callback: _answer(callback, place, what))
        return next((answer for answer in answers if answer), None)


def _answer(callback: object, place: str, what: Any) -> str | None:
    answer = getattr(callback, place, lambda _: None)(what)
    if place != "at_end" and answer is not None and not isinstance(answer, str):
        raise TypeError(f"{place} returned {answer!r}: a sentence stops the run, None goes on")
    return " ".join(answer.split()) if isinstance(answer, str) else None


# ----------------------------------------------------------------------------------------------
# --callback module:make


def load_callback_factories(references: Sequence[str]) -> dict[str, CallbackFactory]:
    """What `--callback` names, `module:make` each: functions that make a callback of the settings.

    Modules are looked for in the working directory first.

    Raises `UserError` for those that cannot be had, a line each.
    """
    makers, problems = {}, []
    for reference in references:
        flag = f"--callback {reference}"
        match = re.fullmatch(r"(?P<module>\w+(\.\w+)*):(?P<make>\w+)", reference)
        if match is None:
            problems.append(f"{flag}: write it as module:make, such as my_module:make")
            continue
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
        try:
            module = importlib.import_module(match["module"])
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            problems.append(_told(flag, error))
            continue
        makers[flag] = getattr(module, match["make"], None)
        if not callable(makers[flag]):
            where = getattr(module, "__file__", None) or match["module"]
            problems.append(f"{flag}: {where} has no function {match['make']}")
    if problems:
        raise UserError(*problems)
    return makers


def describe_callbacks(makers: Mapping[str, CallbackFactory]) -> list[dict[str, str | None]]:
    """For the record: each one's name, and the file that it comes from with its SHA-256."""
    described = []
    for name, make in makers.items():
        file = getattr(sys.modules.get(getattr(make, "__module__", "")), "__file__", None)
        is_there = file is not None and Path(file).is_file()
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if is_there else None
        described.append({"name": name, "file": file, "sha256": digest})
    return described


def _told(name: str, error: BaseException) -> str:
    """One line: what was raised, and where in the user's code."""
    ours = str(Path(__file__).resolve())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != ours
        and not frame.filename.startswith("<")
        and "importlib" not in frame.filename
    ]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{name}: {type(error).__name__}: {format_reason(error)}{where}"
