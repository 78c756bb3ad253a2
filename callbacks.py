"""Callbacks observe a run and may stop it: early stopping, and a user's own.

    python train.py --callback my_module:make

`make(config)` returns an object with any of the methods of `Callback`. They are called after each
step, after each evaluation, and at the end. A method that returns a string stops the run, and the
string is the reason. docs/callbacks.md has two worked examples.
"""

import contextlib
import importlib
import json
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from parameters import ModelConfig
from utils.errors import UserError, format_reason
from utils.files import hash_file, is_file
from utils.isolation import Isolated
from utils.output import pluralize
from utils.run_manager import RunDirectory
from utils.tracking.metrics import get_tag

if TYPE_CHECKING:  # a wrong --callback is reported before torch is imported
    from torch import Tensor


OVERFITTING_AFTER = 2  # evaluations with a higher val loss than the best
MIN_RISE = 0.01  # nats


@dataclass(frozen=True)
class Best:
    """The lowest val loss so far, in nats per token, and its step.

    `evaluations_since` counts the evaluations after it, also those before a resume.
    """

    step: int | None = None
    loss: float | None = None
    evaluations_since: int = 0


@dataclass(frozen=True)
class Step:
    """The argument of `after_step`.

    `step` counts the finished steps. `loss` and `grad_norm` are scalar tensors: `float(step.loss)`
    waits for the device, which slows a run if done at every step.
    """

    step: int
    loss: "Tensor"
    grad_norm: "Tensor"
    learning_rate: float
    run_dir: Path
    config: ModelConfig


@dataclass(frozen=True)
class Evaluation:
    """The argument of `after_evaluation`: mean losses in nats per token, or bits per byte."""

    step: int
    train_loss: float
    val_loss: float
    val_bits_per_byte: float
    best: Best
    run_dir: Path
    config: ModelConfig


# The columns of `TrainResult.history`, besides step and seconds: tags in metrics.jsonl, and names.
HISTORY = {
    "evaluations": {
        get_tag("eval_loss", "train"): "train_loss",
        get_tag("eval_loss", "val"): "val_loss",
        get_tag("bits_per_byte", "train"): "train_bits_per_byte",
        get_tag("bits_per_byte", "val"): "val_bits_per_byte",
    },
    "steps": {
        get_tag("loss", "train"): "loss",
        get_tag("learning_rate", "train"): "learning_rate",
        get_tag("grad_norm", "train"): "grad_norm",
        get_tag("tokens_per_second", "train"): "tokens_per_second",
    },
}


@dataclass(frozen=True)
class Overfitting:
    """Val loss has risen by `rise` nats since step `since`, while train loss is lower than it."""

    since: int
    rise: float


def find_overfitting(best: Best, train: float | None, val: float | None) -> Overfitting | None:
    """Return how much val loss has risen, if it has for some evaluations, else None."""
    if best.loss is None or val is None or best.evaluations_since < OVERFITTING_AFTER:
        return None
    rise = val - best.loss
    # If train loss has risen too, the run diverges.
    return Overfitting(best.step, rise) if rise > MIN_RISE and train < best.loss else None


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Losses are means in nats per token, or None if nothing was evaluated; `seconds` is the loop's
    time. `checkpoint` is the bundle to resume from, `export_dir` that of the best model.
    `stopped_by` is the reason if the run ended before its last step, else None. `longest_overlap`
    is the longest stretch of the last sample that stands verbatim in the training text.
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
    overfitting: "Overfitting | None" = None
    longest_overlap: str | None = None

    def history(
        self, of: Literal["evaluations", "steps"] = "evaluations"
    ) -> dict[str, list[float | None]]:
        """Return the logged numbers of this run as columns of one length, for a table or a plot.

        `of` chooses the rows, each with its `step` and `seconds`: the evaluations, or all steps.
        They are two tables, as val losses exist at evaluations only, and a plot would have gaps.
        None is a number that was not finite. The steps before a resume are in the run that made
        them. Raises `UserError` if the run's directory was deleted or moved.
        """
        columns = HISTORY[of]
        path = RunDirectory(self.run_dir).metrics
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        rows = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError, AttributeError):  # cut off, or no object
                if columns.keys() <= (row := json.loads(line)).keys():
                    rows.append(row)
        names = {"step": "step", "seconds": "seconds", **columns}
        return {name: [row[key] for row in rows] for key, name in names.items()}


class Callback:
    """The methods of a callback, all optional; inheriting from this class is optional, too."""

    def after_step(self, step: Step) -> str | None:
        """Observe a step. A returned reason stops the run, after an evaluation and a save."""

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Observe an evaluation. A returned reason stops the run, after a save."""

    def at_end(self, result: TrainResult | None) -> None:
        """Observe the end of the run, once; `result` is None if the run failed."""


@dataclass(frozen=True)
class EarlyStopping(Callback):
    """Stops a run if the val loss has not improved for `patience` evaluations.

    The count is saved with the training state: it continues on resume.
    """

    patience: int

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Return the reason to stop, if the best evaluation is too long ago."""
        best = evaluation.best
        if best.evaluations_since < self.patience:
            return None
        since = pluralize(best.evaluations_since, "evaluation")
        return f"no better val loss in {since} since step {best.step:,} (early_stopping_patience)"


CallbackFactory = Callable[[ModelConfig], object]
METHODS = ("after_step", "after_evaluation", "at_end")


class Callbacks:
    """Calls each callback; one that raises is removed with a warning, and the run continues."""

    def __init__(self, warn: Callable[[str, str], None]):
        self._callbacks: Isolated[object] = Isolated(warn)

    def add(self, factories: Mapping[str, CallbackFactory], config: ModelConfig) -> None:
        """Create callbacks and add them. Raises `UserError` if one cannot be created."""
        for name, make in factories.items():
            try:
                callback = make(config)
            except (Exception, SystemExit) as error:  # the user's code may raise anything
                raise UserError(_format_error(name, error)) from error
            if not any(hasattr(callback, method) for method in METHODS):
                kind = type(callback).__name__
                raise UserError(f"{name} returned {kind}, which has none of {', '.join(METHODS)}")
            self._callbacks.add(name, lambda callback=callback: callback)

    def after_step(self, step: Step) -> str | None:
        """Call all callbacks; return the first reason to stop, or None."""
        return self._find_reason("after_step", step)

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Call all callbacks; return the first reason to stop, or None."""
        return self._find_reason("after_evaluation", evaluation)

    def at_end(self, result: TrainResult | None) -> None:
        """Call all callbacks for the last time; a second call does nothing."""
        self._callbacks.close_each(lambda callback: _call(callback, "at_end", result))

    def _find_reason(self, method: str, argument: Step | Evaluation) -> str | None:
        reasons = self._callbacks.call_each(lambda callback: _call(callback, method, argument))
        return next(filter(None, reasons), None)


def _call(callback: object, method: str, argument: object) -> str | None:
    reason = getattr(callback, method, lambda _: None)(argument)
    if method == "at_end" or reason is None:
        return None
    if not isinstance(reason, str):
        raise TypeError(f"{method} returned {reason!r}: return a string to stop the run, or None")
    return " ".join(reason.split())


# --callback module:make -------------------------------------------------------------------------


def load_callback_factories(references: Sequence[str]) -> dict[str, CallbackFactory]:
    """Import the factories that `--callback` names as `module:make`.

    The working directory is searched first. Raises `UserError` with one line per problem.
    """
    factories, problems = {}, []
    if references and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    for reference in references:
        flag = f"--callback {reference}"
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", reference):
            problems.append(f"{flag}: write it as module:make, such as my_module:make")
            continue
        try:
            factories[flag] = pkgutil.resolve_name(reference)
            if not callable(factories[flag]):
                raise TypeError(f"{reference.partition(':')[2]} is not a function or a class")
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            problems.append(_format_error(flag, error))
    if problems:
        raise UserError(*problems)
    return factories


def describe_callbacks(factories: Mapping[str, CallbackFactory]) -> list[dict[str, str | None]]:
    """Return each callback's name, its file and the file's SHA-256, for the run's record."""
    described = []
    for name, make in factories.items():
        file = getattr(sys.modules.get(getattr(make, "__module__", "")), "__file__", None)
        digest = hash_file(Path(file)) if file and is_file(file) else None
        described.append({"name": name, "file": file, "sha256": digest})
    return described


def _format_error(name: str, error: BaseException) -> str:
    """Return one line: the error, and its file and line in the user's code."""
    library = (__file__, pkgutil.__file__, importlib.__path__[0], "<")
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith(library)]
    place = f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""
    return f"{name}: {type(error).__name__}: {format_reason(error)}{place}"
