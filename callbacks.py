"""What may look at a run, and stop it: early stopping, and callbacks of your own.

    python train.py --callback my_module:make

`make(config)` returns an object with any of the methods of `Callback`. They are called at the
three places where everything else is: after a step, after an evaluation, and at the end. A method
that returns a sentence stops the run, and the sentence is its reason. docs/callbacks.md has two
worked examples.
"""

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parameters import ModelConfig
from utils.errors import UserError
from utils.isolation import Isolated
from utils.output import plural


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
    loss: Tensor
    grad_norm: Tensor
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
        since = plural(best.evaluations_since, "evaluation")
        return f"no better val loss in {since} since step {best.step:,} (early_stopping_patience)"


class Callbacks:
    """Calls each callback at each place. One that raises is left out, and the run goes on.

    Args:
        callbacks: objects, under the names that warnings give them.
        warn: what a warning and its traceback are handed to.
    """

    def __init__(self, callbacks: Mapping[str, object], warn: Callable[[str, str], None]):
        self._callbacks: Isolated[object] = Isolated(warn)
        for name, callback in callbacks.items():
            self._callbacks.add(name, lambda callback=callback: callback)

    def after_step(self, step: Step) -> str | None:
        """Tell all callbacks; return the first reason to stop, if there is one."""
        return self._call("after_step", step)

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Tell all callbacks; return the first reason to stop, if there is one."""
        return self._call("after_evaluation", evaluation)

    def at_end(self, result: TrainResult | None) -> None:
        """Tell all callbacks that the run is over."""
        self._call("at_end", result)

    def _call(self, place: str, what: Any) -> str | None:
        answers = self._callbacks.each(lambda callback: _answer(callback, place, what))
        return next((answer for answer in answers if answer), None)


def _answer(callback: object, place: str, what: Any) -> str | None:
    answer = getattr(callback, place, lambda _: None)(what)
    if answer is not None and not isinstance(answer, str):
        raise TypeError(f"{place} returned {answer!r}: a sentence stops the run, None goes on")
    return answer


def load_callbacks(references: Sequence[str], config: ModelConfig) -> dict[str, object]:
    """Make the callbacks that `--callback` names, `module:make` each.

    Modules are looked for in the working directory first.

    Raises `UserError` for those that cannot be had, a line each.
    """
    callbacks, problems = {}, []
    for reference in references:
        try:
            callbacks[f"--callback {reference}"] = _made(reference, config)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return callbacks


def _made(reference: str, config: ModelConfig) -> object:
    match = re.fullmatch(r"(?P<module>\w+(\.\w+)*):(?P<make>\w+)", reference)
    flag = f"--callback {reference}"
    if match is None:
        raise UserError(f"{flag}: write it as module:make, such as my_module:make")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    # Whatever the user's own code raises is told as one line, with the place it was raised at.
    try:
        make = getattr(importlib.import_module(match["module"]), match["make"])
        return make(config)
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = Path(place.tb_frame.f_code.co_filename) if place is not None else Path()
        at = f" ({where.name}:{place.tb_lineno})" if place and where.name != __file__ else ""
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{flag}: {type(error).__name__}: {reason}{at}") from error
