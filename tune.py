"""Search for better settings: a study of many runs, which learns from each where to look next.

    python tune.py --space configs/search/first.yaml --trials 20 --data dante.txt --max-iters 300
    optuna-dashboard runs/studies/first.log

Each trial is an ordinary run of train.py, whose settings are flags here too and hold for all
trials; the space names those to search, and their ranges. The same command, started once more here
or on another machine that shares the directory, is another worker of the same study; started
again after it was stopped or killed, it goes on. The best settings become a file for --config.
"""

import importlib.util
import sys
from collections.abc import Sequence

from callbacks import load_callback_factories
from config import ConfigLoader
from parameters import ALIASES, GROUPS, ModelConfig
from study import StudySettings, create_recipe, read_space
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.output import Output, run_command
from utils.ranks import Ranks


class TuneConfig(StudySettings, ModelConfig):
    """All flags: those of the study, and those of each of its runs."""


ACTIONS = (
    Action("config", "Take settings from a YAML or JSON file; the space's count for more.", "FILE"),
    Action(
        "callback",
        "Call an object of your own in every run; may be repeated. See docs/callbacks.md.",
        "MODULE:MAKE",
        repeats=True,
    ),
)


def main(argv: Sequence[str]) -> int:
    """The command: settle the settings and the space, work on the study, and tell what it found."""
    if Ranks.from_environment().size > 1:
        raise UserError("a study's workers are no processes of torchrun's: start each by itself")
    groups = {"study": StudySettings, **GROUPS}
    command_line = CommandLine(__doc__, TuneConfig, ACTIONS, groups, ALIASES)
    flags, actions, problems = command_line.parse(argv)
    own = {name: flags.pop(name) for name in StudySettings.model_fields if name in flags}
    order = StudySettings(**own)
    space = read_space(order.space, flags, problems)
    layers = ConfigLoader().read(flags, actions.get("config"), problems)
    recipe = create_recipe(order, space, layers)
    makers = load_callback_factories(actions.get("callback", []))
    if importlib.util.find_spec("optuna") is None:
        raise UserError("tune.py needs Optuna: pip install --constraint constraints.txt '.[tune]'")

    # Only here is Optuna imported: the rest of this file, as a module. torch is, with a trial.
    from tune import work

    return work(recipe, Output(), argv, makers)


if __name__ == "__main__":
    sys.exit(run_command(main))

# ----------------------------------------------------------------------------------------------
# The study. The command above does not come this far: it imports what follows.

import contextlib
import gc
import json
import math
import os
import shlex
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import yaml
from filelock import FileLock
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import (
    JournalFileBackend,
    JournalFileOpenLock,
    JournalFileSymlinkLock,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from bundle import list_checkpoints
from callbacks import CallbackFactory, Evaluation, Step
from config import LoadedConfig
from parameters import Run
from resume import ResumePlan
from study import DRAWS, Choices, Range, Recipe
from utils.checks import format_value
from utils.errors import NothingToDo, RunError, format_reason
from utils.files import make_directory, write_atomic
from utils.output import align_columns, format_command, format_duration, pluralize
from utils.run_manager import read_record
from utils.workers import Worker, is_alive

SQLITE = (".db", ".sqlite", ".sqlite3")
STORAGE_ERRORS = (OSError, ValueError, KeyError, SQLAlchemyError, OptunaError)
BEGINS = {0: "study", 4: "trial"}  # the op_code of a journal's lines, which number them
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
# The median rule needs some trials to compare with, and no more than that: it serves as well where
# a run has two evaluations, while successive halving would need several rungs of them.
TRIALS_BEFORE_PRUNING = 5
RANDOM_TRIALS = 10  # before TPE has something to go by
TRIES = 50  # proposals of TPE, until one is possible
FINE = 10**6  # values of a range
DEATHS = 3  # of workers in a trial, after which it is given up
FAILURES = 3  # one after another, which end a worker
WORTH_COMPARING = 6  # complete trials, for importances
LISTED = 5  # of the best trials


def work(
    recipe: Recipe,
    output: Output,
    argv: Sequence[str] = (),
    makers: Mapping[str, CallbackFactory] | None = None,
) -> int:
    """Run trials of the study until there are enough, and tell what it found; the exit status.

    Args:
        recipe: the study.
        output: what prints.
        argv: the command line, for the runs' records.
        makers: callbacks of the user's own, for each run.

    Raises:
        UserError: the storage cannot be used, or has a study of that name with another space.
        RunError: trials failed one after another, or the storage can no longer be written.
    """
    if recipe.combinations is not None and len(recipe.combinations) == recipe.trials:
        output.print(f"Note: the space has {pluralize(recipe.trials, 'combination')}, and no more")
    with _quiet_optuna(), Worker(workers_of(recipe.storage)) as worker:
        with _explained(recipe.storage):
            study = open_study(recipe)
        desk = Desk(recipe, study, worker.name)
        output.print(progress(desk))
        failures = 0
        while (claim := desk.claim()) is not None:
            output.print(described_claim(claim))
            began = time.monotonic()
            end = run_trial(desk, claim, argv, makers or {})
            desk.finish(claim, end)
            output.print(described_end(claim, end, time.monotonic() - began, recipe))
            if end.exit_status:
                output.print("Stopped: the same command goes on from here.")
                return end.exit_status
            failures = failures + 1 if end.error else 0
            if failures == FAILURES:
                count = pluralize(FAILURES, "trial")
                raise type(end.error)(f"{count} failed one after another, the last: {end.reason}")
            _clear_memory()
        output.print(results(desk))
    return 0


def _clear_memory() -> None:
    """Leave nothing of a trial to the next: neither its model nor what was compiled for it."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # it compiles one function so often, and then no more
        import torch

        torch.compiler.reset()


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Within the block, Optuna says nothing by itself."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _explained(storage: Path) -> Iterator[None]:
    """Turn what a storage raises into one line."""
    try:
        yield
    except UserError:
        raise
    except STORAGE_ERRORS as error:
        reason = getattr(error, "strerror", None) or format_reason(error)
        raise RunError(
            f"{storage} cannot be used: {reason}; the runs are all there, and what was recorded "
            "of them stays"
        ) from error


# ----------------------------------------------------------------------------------------------
# The storage


def workers_of(storage: Path) -> Path:
    """Where the workers of a storage keep their locks."""
    return storage.with_name(f"{storage.name}.workers")


def open_study(recipe: Recipe) -> optuna.Study:
    """Open the study, or begin it. It records its space and its fixed settings.

    Raises `UserError` where the storage cannot be opened, or has another study of that name.
    """
    with _claim_lock(recipe.storage):  # as two that make the same tables get into each other's way
        storage = open_storage(recipe.storage)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=TRIALS_BEFORE_PRUNING)
        is_there = recipe.study in optuna.get_all_study_names(storage)
        begin = optuna.load_study if is_there else optuna.create_study
        study = begin(study_name=recipe.study, storage=storage, pruner=pruner)
        now = {"space": recipe.declared, "fixed": recipe.fixed, "measure": recipe.measure}
        then = study.user_attrs.get("folio")
        if then is None:
            if study.get_trials(deepcopy=False):
                raise UserError(
                    f"{recipe.storage} has a study {recipe.study} that was not begun by tune.py: "
                    "choose another name with --study"
                )
            study.set_user_attr("folio", now)
    # As the file has it: JSON makes lists of tuples.
    if then is not None and (changes := _changes(then, json.loads(json.dumps(now)))):
        raise UserError(
            f"study {recipe.study} in {recipe.storage} was begun with other settings: "
            f"{'; '.join(changes)}: put that back, or begin another study with --study NAME"
        )
    return study


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a study as it was begun and as it is asked for."""
    changes = []
    for part, where in (("space", "in the space"), ("fixed", "")):
        old, new = then.get(part, {}), now[part]
        for name in {**old, **new}:
            shown = f"{name} {where}".rstrip()
            if name not in new:
                if part == "space" or name not in now["space"]:
                    changes.append(f"{shown} was {format_value(old[name])}, and is not there now")
            elif name not in old:
                if part == "space" or name not in then.get("space", {}):
                    changes.append(f"{shown} was not there, and is {format_value(new[name])}")
            elif old[name] != new[name]:
                changes.append(
                    f"{shown} was {format_value(old[name])}, and is {format_value(new[name])}"
                )
    return changes


def open_storage(path: Path) -> BaseStorage:
    """A journal, or SQLite where the file is called `.db`.

    A journal is sound on the file systems that machines share, and SQLite on local ones alone.

    Raises `UserError` where the file cannot be opened, or is damaged.
    """
    try:
        make_directory(path.parent)
        if path.suffix in SQLITE:
            url = f"sqlite:///{path.resolve()}"
            return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        # The whole path: Optuna looks for a lock that was left behind through a link to it.
        whole = str(path.resolve())
        lock = JournalFileOpenLock(whole) if os.name == "nt" else JournalFileSymlinkLock(whole)
        mend_journal(path, lock)
        return JournalStorage(JournalFileBackend(whole, lock))
    except UserError:
        raise
    except (OSError, SQLAlchemyError, OptunaError) as error:
        reason = getattr(error, "strerror", None) or format_reason(error)
        raise UserError(
            f"{path} cannot be opened: {reason}; --storage FILE names another"
        ) from None
    except Exception as error:  # whatever replaying a journal of somebody else's raises
        raise UserError(
            f"{path} is no journal of Optuna's, or a damaged one ({format_reason(error)}); "
            "--storage FILE names another"
        ) from None


def mend_journal(path: Path, lock: JournalFileSymlinkLock | JournalFileOpenLock) -> None:
    """Cut off the part of a line that a crash has left at a journal's end.

    The next line would be added to it, and neither could be read. Raises `UserError` where another
    line is damaged, or one is missing without which the trials that follow have wrong numbers.
    """
    if not path.exists():
        return
    lock.acquire()  # nobody is in the middle of a line
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content and (whole or content.startswith(b"{")):
            with open(path, "rb+") as file:
                file.truncate(len(whole))
            content = whole
    finally:
        lock.release()
    begun = dict.fromkeys(BEGINS.values(), 0)
    for number, line in enumerate(content.splitlines(), start=1):
        problem = None
        try:
            entry = json.loads(line)
        except ValueError:
            problem = "not a journal of Optuna's, or damaged there"
            entry = None
        if isinstance(entry, dict):
            if entry.get("op_code") in BEGINS:
                begun[BEGINS[entry["op_code"]]] += 1
            for kind, count in begun.items():
                if entry.get(f"{kind}_id", -1) >= count:
                    problem = f"damaged, as the line that begins its {kind} is missing"
        if problem is not None:
            raise UserError(
                f"{path}, line {number}: {problem}: put back a copy, or begin anew with another "
                "--storage FILE; the runs are all there"
            )


def _claim_lock(storage: Path) -> FileLock:
    """Held while a worker looks for something to do. It dies with the process."""
    return FileLock(workers_of(storage) / "claim.lock")


# ----------------------------------------------------------------------------------------------
# Which trial is whose


@dataclass(frozen=True)
class Claim:
    """A trial that is this worker's, the settings it tries, and the trials that it goes on with.

    `earlier` are those whose workers were stopped or died in them, the last one first.
    """

    trial: optuna.Trial
    params: dict[str, Any]
    earlier: tuple[FrozenTrial, ...] = ()

    @property
    def number(self) -> int:
        """The trial's number in its study."""
        return self.trial.number


@dataclass(frozen=True)
class End:
    """How a trial ended: done, with its value; handed back; or failed."""

    state: TrialState
    value: float | None = None
    reason: str | None = None
    run_dir: Path | None = None
    step: int | None = None
    is_handed_back: bool = False
    is_lost: bool = False  # as its worker is
    exit_status: int = 0
    error: UserError | RunError | None = None


class Desk:
    """Where workers get their trials: one at a time, each to one of them.

    A trial that is running belongs to the worker whose name it bears. Where that worker is no
    more, the trial has failed, and is owed: whoever comes next begins a trial with the same
    settings, which goes on from its last checkpoint. All of it is decided under one lock, so that a
    running trial without a name is one whose worker died before it could put it there.
    """

    def __init__(self, recipe: Recipe, study: optuna.Study, worker: str):
        self.recipe = recipe
        self.study = study
        self._worker = worker
        self._storage = study._storage

    def claim(self) -> Claim | None:
        """Take a trial; None where there are enough that are done or running.

        Raises `RunError` where the storage cannot be used.
        """
        recipe, study = self.recipe, self.study
        with _explained(recipe.storage), _claim_lock(recipe.storage):
            self._bury_the_dead()
            trials = study.get_trials(deepcopy=False)
            taken = [trial for trial in trials if trial.state is not TrialState.FAIL]
            # One waits where a worker died right after it had put it there.
            if not any(trial.state is TrialState.WAITING for trial in taken):
                if len(taken) >= recipe.trials:
                    return None
                if owed := self._owed(trials):
                    study.enqueue_trial(settings_of(owed[0]), {"continues": owed[0].number})
            study.sampler = PossibleSampler(recipe, len(trials))
            trial = study.ask({name: distribution(v) for name, v in recipe.space.items()})
            trial.set_user_attr("worker", self._worker)
            params = {name: trial.params[name] for name in recipe.space}
            return Claim(trial, params, self._earlier(trial.user_attrs.get("continues")))

    def finish(self, claim: Claim, end: End) -> None:
        """Record how a trial ended. One that was given to another worker meanwhile stays as it is.

        Raises `RunError` where the storage cannot be used.
        """
        with _explained(self.recipe.storage):
            self._tell(claim.trial._trial_id, claim.number, end)

    def agreed(self, name: str, value: Any) -> Any:
        """What the first worker to come here had for `name`, and so all must have."""
        with _claim_lock(self.recipe.storage):
            if name not in self.study.user_attrs:
                self.study.set_user_attr(name, value)
            return self.study.user_attrs[name]

    def counted(self, *states: TrialState) -> int:
        """How many trials are in one of these states."""
        return len(self.study.get_trials(deepcopy=False, states=states))

    def knows(self, trial: FrozenTrial) -> bool:
        """Whether all that a trial tries is recorded; a journal may lack a line."""
        return settings_of(trial).keys() == self.recipe.space.keys()

    def _tell(self, trial_id: int, number: int, end: End) -> None:
        told = {"reason": end.reason, "handed_back": end.is_handed_back, "lost": end.is_lost}
        told["run_dir"] = end.run_dir and str(end.run_dir)
        with contextlib.suppress(UpdateFinishedTrialError):
            for name, value in told.items():
                if value:
                    self._storage.set_trial_user_attr(trial_id, name, value)
            self.study.tell(number, end.value, end.state, skip_if_finished=True)

    def _bury_the_dead(self) -> None:
        directory = workers_of(self.recipe.storage)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            name = trial.user_attrs.get("worker")
            if name is not None and is_alive(directory, name):
                continue
            died = [each for each in self._earlier(trial.number) if each.user_attrs.get("lost")]
            is_owed = self.knows(trial)
            reason = (
                f"its worker {name} ended in it" if name else "its worker ended before it began"
            )
            if len(died) + 1 >= DEATHS:
                is_owed = False
                reason += f", as {len(died)} did before: given up"
            end = End(TrialState.FAIL, reason=reason, is_handed_back=is_owed, is_lost=True)
            self._tell(trial._trial_id, trial.number, end)

    def _owed(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The trials that were handed back, and that no other goes on with."""
        continued = {trial.user_attrs.get("continues") for trial in trials}
        return [
            trial
            for trial in trials
            if trial.state is TrialState.FAIL
            and trial.user_attrs.get("handed_back")
            and trial.number not in continued
            and self.knows(trial)
        ]

    def _earlier(self, number: int | None) -> tuple[FrozenTrial, ...]:
        """The trial of that number, that with which it goes on, and so on."""
        trials, chain = self.study.get_trials(deepcopy=False), []
        later = len(trials)
        while isinstance(number, int) and number < later:  # or a line is missing
            chain.append(trials[number])
            later, number = number, trials[number].user_attrs.get("continues")
        return tuple(chain)


def settings_of(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial tries; or was to try, where its worker died before it could say so."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


# ----------------------------------------------------------------------------------------------
# What to try next


def distribution(values: Choices | Range) -> BaseDistribution:
    """Optuna's word for it."""
    if isinstance(values, Choices):
        return CategoricalDistribution(values.values)
    if isinstance(values.low, int):
        return IntDistribution(values.low, int(values.high), values.log, int(values.step or 1))
    # Of finer steps Optuna's arithmetic cannot tell that they are steps: the sampler sees to them.
    is_fine = values.count is not None and values.count > FINE
    return FloatDistribution(values.low, values.high, values.log, None if is_fine else values.step)


class PossibleSampler(BaseSampler):
    """Optuna's TPE, of all settings together, which proposes no combination that is in conflict.

    What it draws follows from the study's seed and the number of the trial, whichever worker asks.
    That others are running counts against what is near them, so that workers spread out.
    """

    def __init__(self, recipe: Recipe, number: int):
        self._recipe = recipe
        seed = zlib.crc32(f"{recipe.base.seed} {number}".encode())
        self._random = RandomSampler(seed)
        with warnings.catch_warnings():  # they were experimental before Optuna 5
            warnings.simplefilter("ignore", ExperimentalWarning)
            # The best of many candidates; where that is impossible, as it may be time and again,
            # any that TPE holds for good.
            self._best, self._any = (
                TPESampler(
                    n_startup_trials=RANDOM_TRIALS,
                    n_ei_candidates=candidates,
                    seed=seed,
                    multivariate=True,
                    constant_liar=True,
                )
                for candidates in (24, 1)
            )

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All that is searched: the trials of a study differ in nothing else."""
        return {name: distribution(values) for name, values in self._recipe.space.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A combination that is possible, and new where that can be."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.WAITING)
        trials = study.get_trials(deepcopy=False, states=states)
        tried = [settings_of(each) for each in trials if each.number != trial.number]
        for number in range(TRIES + DRAWS):
            params = {}
            if number < TRIES:
                sampler = self._any if number else self._best
                params = sampler.sample_relative(study, trial, search_space)
            for name in search_space if not params else ():
                params[name] = self.sample_independent(study, trial, name, search_space[name])
            for name, values in self._recipe.space.items():
                if isinstance(values, Range):
                    params[name] = values.nearest(params[name])
            if params not in tried and self._recipe.is_possible(params):
                return params
        left = [each for each in self._recipe.combinations or () if each not in tried]
        if not left:
            raise UserError(f"study {self._recipe.study}: no new combination was found")
        return left[0]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """Any value."""
        return self._random.sample_independent(study, trial, name, distribution)


# ----------------------------------------------------------------------------------------------
# A trial


class Watch:
    """The callback that reports a run's val losses to the study, and stops one that lags behind."""

    def __init__(self, desk: Desk, trial: optuna.Trial, values: Mapping[int, float]):
        self.values = dict(values)
        self.run_dir: Path | None = None
        self.max_iters = math.inf
        self.is_pruned = False
        self.is_given_away = False
        self.problem: UserError | None = None
        self._desk = desk
        self._trial = trial
        for step, value in values.items():
            self._told(lambda step=step, value=value: trial.report(value, step))

    def after_step(self, step: Step) -> str | None:
        """Record which run is the trial's, and see that all trials learn from one text."""
        if self.run_dir is not None:
            return None
        self.run_dir, self.max_iters = step.run_dir, step.config.max_iters
        return self._told(lambda: self._begun(step.run_dir))

    def _begun(self, run_dir: Path) -> str | None:
        text = read_record(run_dir)["run"]["data"]
        first = self._desk.agreed("data", text)
        if first["sha256"] != text["sha256"]:
            study = self._desk.recipe.study
            self.problem = UserError(
                f"{text['name']} is not the text of study {study} ({first['name']}, another "
                "SHA-256): name that with --data FILE, or another study with --study NAME"
            )
            return str(self.problem)
        self._trial.set_user_attr("run_dir", str(run_dir))
        return None

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Report the loss; a sentence where the run is worse than half of the others were."""
        value = getattr(evaluation, self._desk.recipe.measure)
        self.values[evaluation.step] = value
        return self._told(lambda: self._reported(value, evaluation.step))

    def _reported(self, value: float, step: int) -> str | None:
        self._trial.report(value, step)
        # Before a run's half its rank says little: rates that end well are behind at first.
        if not self.max_iters / 2 <= step < self.max_iters or not self._trial.should_prune():
            return None
        self.is_pruned = True
        return f"behind the median of study {self._desk.recipe.study} at this step"

    def _told(self, tell: Callable[[], str | None]) -> str | None:
        """Tell the study; a sentence where the run is to stop.

        A storage that cannot be written just now costs no run: its end will tell the value.
        """
        try:
            return tell()
        except UpdateFinishedTrialError:  # this machine was asleep, and taken for dead
            self.is_given_away = True
            return "its trial was given to another worker meanwhile"
        except STORAGE_ERRORS:
            return None


def run_trial(
    desk: Desk, claim: Claim, argv: Sequence[str], makers: Mapping[str, CallbackFactory]
) -> End:
    """Train what a trial asks for, from where its dead worker was if there was one."""
    from trainer import train  # here, as an answer that needs no trial needs no torch

    (loaded, start), values = beginning(desk.recipe, claim)
    watch = Watch(desk, claim.trial, values)
    try:
        result = train(
            loaded.config,
            loaded=loaded,
            plan=plan,
            argv=argv,
            output=Output(quiet=True),
            callbacks={f"study {desk.recipe.study}": lambda _: watch, **makers},
        )
    except NothingToDo:  # its worker died after the last step, before it could tell
        if not values:
            return End(TrialState.FAIL, reason="its worker ended, and no val loss is known")
        return End(TrialState.COMPLETE, min(values.values()), run_dir=earlier_run(claim))
    except (UserError, RunError) as error:
        return End(TrialState.FAIL, reason=format_reason(error), run_dir=watch.run_dir, error=error)
    except (KeyboardInterrupt, SystemExit):
        aborted = End(TrialState.FAIL, reason="it was aborted", is_handed_back=True)
        desk.finish(claim, aborted)
        raise
    if watch.problem is not None:
        desk.finish(claim, End(TrialState.FAIL, reason=str(watch.problem), is_handed_back=True))
        raise watch.problem
    about = {"run_dir": result.run_dir, "step": result.step, "exit_status": result.exit_status}
    if result.exit_status and result.stopped_by is None and result.step < watch.max_iters:
        reason = f"it was stopped after step {result.step}"
        return End(TrialState.FAIL, reason=reason, is_handed_back=True, **about)
    if watch.is_given_away:
        return End(TrialState.FAIL, reason=result.stopped_by, **about)
    value = min(watch.values.values(), default=math.nan)
    if not math.isfinite(value):
        error = RunError(f"val loss {value}")
        return End(TrialState.FAIL, reason=str(error), error=error, **about)
    if watch.is_pruned:
        return End(TrialState.PRUNED, reason=result.stopped_by, **about)
    return End(TrialState.COMPLETE, value, reason=result.stopped_by, **about)


def beginning(
    recipe: Recipe, claim: Claim
) -> tuple[tuple[LoadedConfig, ResumePlan], dict[int, float]]:
    """What a trial's run begins with, and the values that were reported until there, by steps.

    That is the newest checkpoint of the trials that it goes on with, or new weights.
    """
    for earlier in claim.earlier:
        for checkpoint in reversed(checkpoints_of(earlier, recipe)):
            with contextlib.suppress(UserError):  # damaged, or removed: the one before it will do
                planned = recipe.plan(claim.params, claim.number, checkpoint)
                reported = earlier.intermediate_values.items()
                return planned, {s: value for s, value in reported if s <= planned[1].step}
    return recipe.plan(claim.params, claim.number, None), {}


def checkpoints_of(trial: FrozenTrial, recipe: Recipe) -> list[Path]:
    """The checkpoints of a trial's run; none where the run is on another machine."""
    run_dir = trial.user_attrs.get("run_dir")
    if not isinstance(run_dir, str):
        return []
    return list_checkpoints(Path(recipe.base.runs_dir) / Path(run_dir).name)


def earlier_run(claim: Claim) -> Path | None:
    """The run of the trial that this one goes on with."""
    runs = [trial.user_attrs["run_dir"] for trial in claim.earlier if "run_dir" in trial.user_attrs]
    return Path(runs[0]) if runs else None


# ----------------------------------------------------------------------------------------------
# What is said


def progress(desk: Desk) -> str:
    """Where a study stands."""
    recipe = desk.recipe
    done, running = desk.counted(*DONE), desk.counted(TrialState.RUNNING)
    of = pluralize(recipe.trials, "trial")
    busy = f", {running} running" if running else ""
    return (
        f"Study  {recipe.study}, in {recipe.storage}: {done} of {of} done{busy}\n"
        f"Space  {', '.join(recipe.space)}\n"
    )


def described_claim(claim: Claim) -> str:
    """A trial that begins."""
    words = [f"{name} {shown(value)}" for name, value in claim.params.items()]
    goes_on = f"goes on with trial {claim.earlier[0].number}: " if claim.earlier else ""
    return f"trial {claim.number}  {goes_on}{'  '.join(words)}"


def described_end(claim: Claim, end: End, seconds: float, recipe: Recipe) -> str:
    """How a trial ended."""
    if end.state is TrialState.COMPLETE:
        became = f"{unit(recipe)} {end.value:.4f}" + (f" ({end.reason})" if end.reason else "")
    elif end.state is TrialState.PRUNED:
        became = f"pruned after step {end.step}: {end.reason}"
    else:
        became = f"{'handed back' if end.is_handed_back else 'failed'}: {end.reason}"
    where = f"  {end.run_dir}" if end.run_dir else ""
    return f"trial {claim.number}  {became}  {format_duration(seconds)}{where}"


def unit(recipe: Recipe) -> str:
    """What a trial's value is."""
    return "bits per byte" if recipe.measure == "val_bits_per_byte" else "val loss"


def shown(value: Any) -> str:
    """A value of a setting, short."""
    return f"{value:.4g}" if isinstance(value, float) else format_value(value).strip('"')


def results(desk: Desk) -> str:
    """The best trials, which settings mattered, and the commands that come next.

    The best trial's settings are written to the recipe's `preset`.

    Raises `UserError` where that cannot be written.
    """
    recipe = desk.recipe
    with _explained(recipe.storage):
        complete = desk.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        pruned, running = desk.counted(TrialState.PRUNED), desk.counted(TrialState.RUNNING)
        ended = desk.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    handed_on = sum(bool(trial.user_attrs.get("handed_back")) for trial in ended)
    failed = len(ended) - handed_on
    counts = [f"{len(complete)} complete", f"{pruned} pruned"]
    counts += [f"{handed_on} handed on to another worker"] if handed_on else []
    counts += [f"{failed} failed"] if failed else []
    counts += [f"{running} still running in other workers"] if running else []
    lines = ["", f"Study {recipe.study}: {', '.join(counts)}."]
    known = [trial for trial in complete if desk.knows(trial)]
    if left_out := len(complete) - len(known):
        trials = pluralize(left_out, "complete trial")
        lines += [f"{recipe.storage} is damaged: {trials} left out, as not all settings are there."]
    dashboard = dashboard_command(recipe.storage)
    if not known:
        return "\n".join([*lines, "No trial is complete, and so none is the best.", *dashboard])
    best = sorted(known, key=lambda trial: (trial.value, trial.number))[:LISTED]
    rows = [["trial", unit(recipe), *recipe.space, "run"]]
    for trial in best:
        values = [shown(settings_of(trial)[name]) for name in recipe.space]
        rows.append([str(trial.number), f"{trial.value:.4f}", *values, run_of_trial(trial)])
    lines += ["", align_columns(rows, right=range(len(recipe.space) + 2)), ""]
    lines += [importances(desk.study, list(recipe.space), len(known)), ""]
    write_preset(recipe, best[0])
    preset = shlex.quote(str(recipe.preset))
    runs = " ".join(shlex.quote(run_of_trial(trial)) for trial in best[:3])
    lines += [f"The best trial's settings are in {recipe.preset}", "", "Next:"]
    lines += [f"  {format_command('train.py')} --config {preset}"]
    lines += [f"  {format_command('report.py')} {runs}", *dashboard]
    return "\n".join(lines)


def run_of_trial(trial: FrozenTrial) -> str:
    """The directory of a trial's run."""
    return str(trial.user_attrs.get("run_dir", "–"))


def importances(study: optuna.Study, settings: list[str], complete: int) -> str:
    """How much each setting has to do with being among the best trials (PED-ANOVA)."""
    if complete < WORTH_COMPARING:
        return f"Importances of the settings need {WORTH_COMPARING} complete trials."
    with warnings.catch_warnings():  # they say what is said above
        warnings.simplefilter("ignore")
        evaluator = PedAnovaImportanceEvaluator()
        shares = get_param_importances(study, evaluator=evaluator, params=settings)
    rows = [[f"  {name}", f"{share:.2f}"] for name, share in shares.items()]
    return f"Importances, of 1 in all, from {complete} complete trials:\n" + align_columns(
        rows, right=[1]
    )


def dashboard_command(storage: Path) -> list[str]:
    """How to look at the study in a browser."""
    command = format_command("optuna-dashboard")
    where = f"sqlite:///{storage}" if storage.suffix in SQLITE else str(storage)
    is_there = command != "optuna-dashboard" or shutil.which(command)
    install = "" if is_there else "   # pip install optuna-dashboard"
    return [f"  {command} {shlex.quote(where)}{install}"]


def write_preset(recipe: Recipe, best: FrozenTrial) -> None:
    """Write the best trial's settings as a file for `--config`.

    It has what was searched, and whatever else is not as parameters.py has it.

    Raises `UserError` where it cannot be written.
    """
    loaded = recipe.settled(settings_of(best))
    values = {
        name: getattr(loaded.config, name)
        for name, info in ModelConfig.model_fields.items()
        if name not in Run.model_fields
        and (name in recipe.space or getattr(loaded.config, name) != info.default)
        and not loaded.sources[name].startswith("architecture ")
    }
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    header = [
        f"The best of study {recipe.study}: trial {best.number}, {unit(recipe)} {best.value:.4f}",
        f"Run {Path(run_of_trial(best)).name}; written {when}",
        "",
        f"    python train.py --config {recipe.preset}",
    ]
    text = "".join(f"# {line}".rstrip() + "\n" for line in header)
    text += "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    try:
        make_directory(recipe.preset.parent)
        write_atomic(recipe.preset, text)
    except OSError as error:
        raise UserError(
            f"{recipe.preset} cannot be written: {error.strerror}; name another place with --output"
        ) from None
