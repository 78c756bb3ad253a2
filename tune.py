"""Search for better settings: a study of many runs, with Optuna.

    python tune.py --space configs/search/first.yaml --trials 20 --data dante.txt --max-iters 300
    optuna-dashboard sqlite:///runs/studies/first.db

Each trial is an ordinary run of train.py. The settings of train.py are flags here too and hold for
all trials; the space lists the settings to search. The same command, started again, is another
worker of the study; on several machines with `--storage postgresql+psycopg://host/name`. If a
worker is stopped or killed, its trial is retried from the last checkpoint.
"""

import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import sys
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bundle import list_checkpoints
from callbacks import CallbackFactory, Evaluation, Step, load_callback_factories
from config import ConfigLoader, LoadedConfig, read_config_file
from parameters import (
    ALIASES,
    DERIVED,
    GROUPS,
    Architecture,
    Data,
    ModelConfig,
    ModelName,
    Positive,
    Run,
    Settings,
    Training,
)
from resume import ResumePlan, resolve_start
from utils.checks import format_name, format_value, suggest_name, validate_values
from utils.command_line import Action, CommandLine, format_flag
from utils.errors import NothingToDo, RunError, UserError, format_reason
from utils.files import make_directory, write_atomic
from utils.output import (
    Output,
    align_columns,
    format_command,
    format_duration,
    pluralize,
    run_command,
)
from utils.ranks import Ranks
from utils.run_manager import read_record

if TYPE_CHECKING:  # Optuna is imported once the settings are known to be good
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

# Settings that may be searched. The others define how and on what text a trial is measured.
SEARCHABLE = (set(Architecture.model_fields) | set(Training.model_fields) | {"tokenizer"}) - {
    *("eval_interval", "eval_iters", "early_stopping_patience", "seed"),
    *("epochs", "max_minutes", "micro_batch_size"),
}
RANGE_KEYS = ("low", "high", "log", "step")
MAX_STEPS = 10**6  # of a range: with more, Optuna cannot tell its values apart
MAX_LISTED = 1000  # combinations up to which all legal ones are listed
DRAWS = 300  # random combinations that are tried to find a legal one

DONE = ("COMPLETE", "PRUNED")  # Optuna's names of the states of trials
ALIVE = (*DONE, "RUNNING", "WAITING")
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # without a heartbeat, after which a worker counts as dead
POLL_SECONDS = 2  # between two checks for trials that other workers left
MAX_RETRIES = 5  # of a trial whose workers die
MAX_FAILURES = 3  # in a row, after which a worker ends
OPEN_ATTEMPTS = 5  # as workers that create the tables at the same time collide

# The median rule needs few trials to compare with and works with two evaluations in a run;
# successive halving would need several rungs of them.
TRIALS_BEFORE_PRUNING = 5
RANDOM_TRIALS = 10  # before TPE has enough to model
TPE_ATTEMPTS = 50  # proposals of TPE for one trial, until one is legal and new
TRIALS_FOR_IMPORTANCE = 6
BEST_SHOWN = 5


class StudySettings(Settings):
    """The study, and where it is stored."""

    space: str | None = None
    """The YAML file of the settings to search and their ranges: configs/search/ has one."""

    study: ModelName | None = None
    """The study's name. null: the name of the space's file."""

    trials: Positive = 20
    """Complete or pruned trials of the whole study, over all workers."""

    storage: str | None = None
    """SQLite file, or a database URL for several machines. null: studies/<study>.db in runs_dir."""

    output: str | None = None
    """File for the best trial's settings. null: studies/<study>.yaml in runs_dir."""


class TuneConfig(StudySettings, ModelConfig):
    """All flags: those of the study, and those of each of its runs."""


ACTIONS = (
    Action("config", "Take settings from a YAML or JSON file; the space overrides it.", "FILE"),
    Action(
        "callback",
        "Call an object of your own in every run; may be repeated. See docs/callbacks.md.",
        "MODULE:MAKE",
        repeats=True,
    ),
)


# ----------------------------------------------------------------------------------------------
# The search space

Values = list[Any] | dict[str, Any]  # choices, or a range with RANGE_KEYS


def read_space(
    file: str | None, flags: Mapping[str, Any], problems: list[str]
) -> dict[str, Values]:
    """Read a search space; append a line to `problems` for each mistake in it.

    `flags` are the settings that are fixed for all trials.
    """
    if file is None:
        problems.append("--space FILE is missing: the settings to search and their ranges")
        return {}
    try:
        declared = read_config_file(Path(file))
    except UserError as error:
        problems += error.problems
        return {}
    declared.pop("$schema", None)
    if not declared:
        problems.append(f"{file}: no setting to search")
    space: dict[str, Values] = {}
    for name, values in declared.items():
        label = f"{file}: {format_name(name)}"
        if name not in ModelConfig.model_fields:
            hint = suggest_name(str(name), SEARCHABLE)
            problems.append(f"{file}: unknown key {format_name(name)}{hint}")
        elif name not in SEARCHABLE:
            flag = format_flag(name)
            problems.append(f"{label} cannot be searched, only set for all trials: {flag}")
        elif name in flags:
            problems.append(f"{label} is searched, and {format_flag(name)} fixes it: remove one")
        else:
            space[name] = _check_values(name, values, label, problems)
    return space


def _check_values(name: str, values: Any, label: str, problems: list[str]) -> Values:
    """Return the choices or the range as the setting's type; append to `problems` if illegal."""
    is_range = isinstance(values, dict)
    if not is_range and not (isinstance(values, list) and len(values) > 1):
        problems.append(
            f"{label} must be a list of two or more choices, or {{low: …, high: …}}, got "
            f"{format_value(values)}; a value for all trials is a flag: {format_flag(name)}"
        )
        return []
    given = {end: values.get(end) for end in RANGE_KEYS[:2]} if is_range else enumerate(values)
    checked, found = {}, []
    for key, value in dict(given).items():
        where = f"{label}: {key}" if is_range else label
        settings, wrong = validate_values(
            ModelConfig, {name: value}, strings=False, label=lambda _, where=where: where
        )
        checked[key] = settings.get(name)
        found += wrong
    if is_range and not found:
        checked |= {key: values[key] for key in values.keys() - checked.keys()}
        problem = _find_range_problem(checked)
        found = [f"{label}: {problem}"] if problem else []
    elif not found and len(set(map(format_value, checked.values()))) < len(checked):
        found = [f"{label} has a choice twice: {format_value(values)}"]
    problems += found
    if not is_range:
        return list(checked.values())
    return {
        key: value for key, value in checked.items() if value is not None and value is not False
    }


def _find_range_problem(values: Mapping[str, Any]) -> str | None:
    low, high, log, step = (values.get(key) for key in RANGE_KEYS)
    if unknown := [format_name(key) for key in values if key not in RANGE_KEYS]:
        return f"unknown {', '.join(unknown)}; a range has low, high, log and step"
    if type(low) not in (int, float) or type(high) is not type(low):
        return "low and high must be numbers; other settings have a list of choices"
    if low >= high:
        return f"low {low:g} must be below high {high:g}"
    if log is not None and not isinstance(log, bool):
        return f"log must be true or false, got {format_value(log)}"
    if log and (low <= 0 or step is not None):
        return f"log needs a low above 0, and no step: remove one, or change low {low:g}"
    if step is None:
        return None
    is_number = isinstance(step, (int, type(low))) and not isinstance(step, bool)
    if not is_number or not 0 < step < math.inf:
        noun = "whole number" if isinstance(low, int) else "number"
        return f"step must be a {noun} above 0, got {format_value(step)}"
    if (high - low) / step > MAX_STEPS:
        return f"step {step:g} is too small for {low:g} to {high:g}: remove it"
    # Exact decimals: 0.1 + 3 * 0.2 is more than 0.7 in binary.
    exact_low, exact_high, exact_step = (Fraction(str(number)) for number in (low, high, step))
    if (exact_high - exact_low) % exact_step:
        return f"high {high:g} must be low {low:g} plus a multiple of step {step:g}"
    return None


def list_values(values: Values) -> Sequence[Any] | None:
    """Return all values of a setting, None if they are uncountable."""
    if isinstance(values, list):
        return values
    low, high, step = values["low"], values["high"], values.get("step")
    if isinstance(low, int):
        return range(low, high + 1, step or 1)
    if step is None:
        return None
    return [min(low + step * n, high) for n in range(round((high - low) / step) + 1)]


# ----------------------------------------------------------------------------------------------
# The study


@dataclass(frozen=True)
class Search:
    """The settings that all trials of a study share, and the space in which they differ.

    `base` is one legal configuration; `combinations` are all legal ones, if they are few.
    """

    study: str
    space: Mapping[str, Values]
    loader: ConfigLoader
    trials: int
    storage: str  # an SQLite file or a URL
    preset: Path
    base: ModelConfig = field(default_factory=ModelConfig)
    combinations: Sequence[dict[str, Any]] | None = None

    @property
    def measure(self) -> str:
        """The loss to minimize. Losses per token compare only between runs of one tokenizer."""
        return "val_bits_per_byte" if "tokenizer" in self.space else "val_loss"

    @property
    def shown_storage(self) -> str:
        """The storage without a password."""
        return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", self.storage)

    def is_legal(self, params: Mapping[str, Any]) -> bool:
        """Return whether the schema accepts this combination."""
        try:
            return bool(settle(self, params))
        except UserError:
            return False


def settle(
    search: Search, params: Mapping, number: int | None = None, checkpoint: Path | None = None
) -> tuple[LoadedConfig, ResumePlan]:
    """Return the settings and the plan of the run of trial `number`, which tries `params`.

    Raises `UserError` if the settings conflict, or the checkpoint to resume from is damaged.
    """
    values, origin = dict(params), f"study {search.study}"
    if number is not None:
        values["run_tag"] = f"{search.study}_{number}"
        origin = f"trial {number} of {origin}"
    resume = None if checkpoint is None else str(checkpoint)
    loader = search.loader.override(values, origin)
    plan = resolve_start(loader.get, loader.get_source, resume=resume)
    return loader.load(plan.checkpoint_settings), plan


def create_search(
    order: StudySettings, space: Mapping[str, Values], loader: ConfigLoader
) -> Search:
    """Return the checked search; raise `UserError` with a line for each problem."""
    problems = list(loader.problems)
    for name in ("run_tag", "model_name"):
        if loader.get(name) is not None:
            problems.append(
                f"{name} ({loader.get_source(name)}): trials name their runs: remove it"
            )
    study = order.study or Path(order.space or "study").stem
    _, wrong = validate_values(StudySettings, {"study": study}, strings=False, label=format_flag)
    studies = Path(loader.get("runs_dir")) / "studies"
    storage = order.storage or str(studies / f"{study}.db")
    journal = Path(storage).with_suffix(".log")
    is_default = order.storage is None and not Path(storage).exists()
    if Path(storage) == journal or (is_default and journal.is_file()):
        wrong.append(
            f"{journal}: studies are no longer journals: `optuna-dashboard {journal}` shows it, "
            "Optuna's JournalStorage and copy_study() convert it; --study NAME starts another one"
        )
    if problems or wrong:
        raise UserError(*problems, *wrong)
    preset = Path(order.output) if order.output else studies / f"{study}.yaml"
    search = Search(study, space, loader, order.trials, storage, preset)
    search = replace(search, base=_find_legal_config(search, {}))
    for name, values in space.items():
        for value in values if isinstance(values, list) else ():
            try:
                _find_legal_config(search, {name: value})
            except UserError as error:
                problem = f"is legal in no combination: {error.problems[0]}"
                problems.append(f"{order.space}: {name} {format_value(value)} {problem}")
    if problems:
        raise UserError(*problems)
    listed = [list_values(values) for values in space.values()]
    if None in listed or math.prod(map(len, listed)) > MAX_LISTED:
        return search
    every = (dict(zip(space, each, strict=True)) for each in itertools.product(*listed))
    legal = [each for each in every if search.is_legal(each)]
    return replace(search, combinations=legal, trials=min(search.trials, len(legal)))


def _find_legal_config(search: Search, pinned: Mapping[str, Any]) -> ModelConfig:
    """Return a legal random combination that contains `pinned`. Raises the last `UserError`."""
    generator = random.Random(0)
    listed = {name: list_values(values) for name, values in search.space.items()}
    failure = UserError()
    for _ in range(DRAWS):
        params = {n: generator.choice(v) for n, v in listed.items() if v is not None}
        for name in search.space.keys() - params.keys():
            params[name] = generator.uniform(search.space[name]["low"], search.space[name]["high"])
        try:
            return settle(search, {**params, **pinned})[0].config
        except UserError as error:
            failure = error
    raise failure


def open_study(search: Search) -> "Study":
    """Open or create the study, whose heartbeats in the database show which workers are alive.

    Raises `UserError` if the storage cannot be opened, or its study has another space.
    """
    import optuna
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    # Heartbeats and retries are called experimental since 2021.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)

    class Storage(optuna.storages.RDBStorage):
        def record_heartbeat(self, trial_id: int) -> None:
            with contextlib.suppress(*get_storage_errors()):  # the next one may succeed
                super().record_heartbeat(trial_id)

    is_url, name = "://" in search.storage, search.study
    url = search.storage if is_url else f"sqlite:///{Path(search.storage).resolve()}"
    options: dict[str, Any] = {
        # Seconds to wait for the writes of other workers.
        "engine_kwargs": {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
        "heartbeat_interval": HEARTBEAT_SECONDS,
        "grace_period": GRACE_SECONDS,
        "heartbeat_stale_trial_callback": RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
    }
    pruner = optuna.pruners.MedianPruner(n_startup_trials=TRIALS_BEFORE_PRUNING)
    own = {"sampler": create_sampler(search), "pruner": pruner, "study_name": name}
    for attempt in range(OPEN_ATTEMPTS):
        try:
            if not is_url:
                make_directory(Path(search.storage).parent)
            study = optuna.create_study(storage=Storage(url, **options), load_if_exists=True, **own)
            break
        except (*get_storage_errors(), ImportError, ValueError, RuntimeError) as error:
            if attempt == OPEN_ATTEMPTS - 1:
                reason = getattr(error, "strerror", None) or format_reason(error)
                driver = "; PostgreSQL: psycopg" if isinstance(error, ImportError) else ""
                remedy = "--storage names another SQLite file or database URL"
                where = search.shown_storage
                raise UserError(f"{where} cannot be opened: {reason}{driver}; {remedy}") from None
            time.sleep(0.3 * random.random())
    check_study(search, study)
    return study


def check_study(search: Search, study: "Study") -> None:
    """Record the space and the fixed settings in a new study.

    Raises `UserError`, with all changes in one line, if the study has others.
    """
    derived = DERIVED if "architecture" in search.space else frozenset()
    names = {*SEARCHABLE, *Data.model_fields, *Training.model_fields, "init_from"}
    names -= {"data", "micro_batch_size", *search.space, *derived}
    fixed = {n: getattr(search.base, n) for n in ModelConfig.model_fields if n in names}
    record = json.loads(json.dumps({"space": search.space, "fixed": fixed}))  # as it is read back
    where = f"study {search.study} in {search.shown_storage}"
    if "folio" not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise UserError(f"{where} is not one of tune.py: choose another name with --study")
        study.set_user_attr("folio", record)
    records = (study.user_attrs["folio"], record)
    old, new = ({**each["fixed"], **each["space"]} for each in records)
    changes = [
        f"{name} was {format_value(old.get(name, 'absent'))} and is now "
        f"{format_value(new.get(name, 'absent'))}"
        for name in {**old, **new}
        if name not in old or name not in new or old[name] != new[name]
    ]
    if changes:
        shown = "; ".join(changes)
        raise UserError(
            f"{where} has other settings: {shown}: restore them, or name another study with --study"
        )


def get_storage_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a storage that cannot be read or written."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    return (OSError, SQLAlchemyError, OptunaError)


def select_trials(study: "Study", *states: str) -> list["FrozenTrial"]:
    """Return the trials that are in one of these states."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in states]


def create_sampler(search: Search) -> Any:
    """Return TPE over all settings together, limited to legal and new combinations.

    A proposal depends on the seed, the trial's number and earlier trials, not on the worker.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.samplers import BaseSampler, RandomSampler, TPESampler

    distributions: dict[str, Any] = {}
    for name, values in search.space.items():
        if isinstance(values, list):
            distributions[name] = CategoricalDistribution(values)
        else:
            kind = IntDistribution if isinstance(values["low"], int) else FloatDistribution
            distributions[name] = kind(**values)

    class LegalSampler(BaseSampler):
        def infer_relative_search_space(self, study: "Study", trial: "FrozenTrial") -> dict:
            return distributions

        def sample_relative(self, study: "Study", trial: "FrozenTrial", space: dict) -> dict:
            tried = [t.params for t in select_trials(study, *ALIVE) if t.number != trial.number]
            for attempt in range(TPE_ATTEMPTS + DRAWS):
                seed = zlib.crc32(f"{search.base.seed} {trial.number} {attempt}".encode())
                # TPE's best of many candidates first. If that is illegal or not new, it would be so
                # again: take any that TPE samples. `constant_liar` keeps workers apart.
                random_trials = RANDOM_TRIALS if attempt < TPE_ATTEMPTS else sys.maxsize
                candidates = {
                    "n_startup_trials": random_trials,
                    "n_ei_candidates": 1 if attempt else 24,
                }
                sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True, **candidates)
                params = sampler.sample_relative(study, trial, space) or {
                    name: sampler.sample_independent(study, trial, name, distribution)
                    for name, distribution in space.items()
                }
                if params not in tried and search.is_legal(params):
                    return params
            untried = [each for each in search.combinations or () if each not in tried]
            return random.Random(seed).choice(untried) if untried else params

        def sample_independent(self, *arguments: Any) -> Any:
            return RandomSampler().sample_independent(*arguments)

    return LegalSampler()


def wait_for_place(search: Search, study: "Study", output: Output) -> bool:
    """Return True once a trial is missing, False once the study is complete.

    While other workers run the last trials, poll: one of them may die.
    """
    import optuna

    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(MAX_RETRIES)
    first_seen: dict[int, float] = {}
    while True:
        optuna.storages.fail_stale_trials(study)
        done, running = len(select_trials(study, *DONE)), select_trials(study, "RUNNING")
        if done >= search.trials or done + len(running) < search.trials:
            return done < search.trials
        if not first_seen:
            output.print(f"Waiting for {pluralize(len(running), 'trial')} of other workers")
        for trial in running:
            seen = first_seen.setdefault(trial.number, time.monotonic())
            # For Optuna a worker that died before its first heartbeat is never stale.
            is_old = time.monotonic() - seen > GRACE_SECONDS
            if is_old and trial.user_attrs.get("started") != trial.number:
                with contextlib.suppress(ValueError, RuntimeError):  # another worker was faster
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    retry(study, study.get_trials()[trial.number])
        time.sleep(POLL_SECONDS)


# ----------------------------------------------------------------------------------------------
# A trial


class TrialFailedError(Exception):
    """Ends a trial without a value; its text is the reason."""


@dataclass
class TrialRun:
    """One trial: the objective of `study.optimize`, and a callback of its run.

    `values` are the val losses by step; `ending` is the exception that then ends the worker.
    """

    search: Search
    study: "Study"
    output: Output
    argv: Sequence[str]
    callbacks: Mapping[str, CallbackFactory]
    trial: "Trial | None" = None
    values: dict[int, float] = field(default_factory=dict)
    max_iters: float = math.inf
    run_dir: Path | None = None
    reason: str | None = None
    is_pruned: bool = False
    is_handed_back: bool = False
    failure: UserError | RunError | None = None
    ending: BaseException | None = None

    def run(self) -> None:
        """Ask for a trial and run it; record and print how it ended."""
        from optuna.storages import RetryHeartbeatStaleTrialCallback

        started = time.monotonic()
        try:
            self.study.optimize(self._run_objective, n_trials=1, catch=(TrialFailedError,))
        except Exception as error:
            # Optuna cannot end a trial that another worker failed while this machine slept.
            is_bug = self.trial is None or error is self.ending
            if is_bug or self._read_trial().state.name != "FAIL":
                raise
            self.reason, self.is_handed_back = "another worker has it", False
        trial = self._read_trial()
        text = trial.state.name.lower()
        if self.is_handed_back:
            RetryHeartbeatStaleTrialCallback()(self.study, trial)
            text = "handed back"
        text = f"{self.search.measure} {trial.value:.4f}" if text == "complete" else text
        text += f" ({self.reason})" if self.reason else ""
        seconds = format_duration(time.monotonic() - started)
        self.output.print(f"trial {trial.number}  {text}  {seconds}  {self.run_dir or ''}".rstrip())

    def _read_trial(self) -> "FrozenTrial":
        return self.study.get_trials()[self.trial.number]

    def _run_objective(self, trial: "Trial") -> float:
        """Train; return the lowest val loss, or raise TrialPruned or TrialFailedError."""
        from optuna import TrialPruned

        self.trial = trial
        trial.set_user_attr("worker", f"{platform.node()}:{os.getpid()}")
        trial.set_user_attr("started", trial.number)  # a retry has the attributes of its trial
        try:
            self._check_place()
            return self._train()
        except (TrialFailedError, TrialPruned) as error:
            self.reason = str(error)
            raise
        except (KeyboardInterrupt, SystemExit) as aborted:
            self.reason, self.ending, self.is_handed_back = "aborted", aborted, True
            raise TrialFailedError(self.reason) from None
        except Exception as error:
            self.ending = error
            raise
        finally:
            with contextlib.suppress(*get_storage_errors()):
                trial.set_user_attr("reason", self.reason)

    def _check_place(self) -> None:
        """Record the trial's settings; raise TrialFailedError if it must not run.

        Workers share no lock, and two may ask at the same time. So each first records its trial
        and then reads the others': those beyond the study's number withdraw, the last one first;
        of two with the same settings at least one does.
        """
        search, trial = self.search, self.trial
        for name, values in search.space.items():
            if isinstance(values, list):
                trial.suggest_categorical(name, values)
            else:
                is_int = isinstance(values["low"], int)
                (trial.suggest_int if is_int else trial.suggest_float)(name, **values)
        others = [t for t in select_trials(self.study, *ALIVE) if t.number != trial.number]
        if sum(other.number < trial.number for other in others) >= search.trials:
            raise TrialFailedError("withdrawn: other workers have the last trials")
        same = [other.number for other in others if other.params == trial.params]
        if same or not search.is_legal(trial.params):
            self.failure = UserError("no new legal combination was found: widen the space")
            reason = f"the settings of trial {same[0]}" if same else "illegal settings"
            raise TrialFailedError(f"withdrawn: {reason}")

    def _train(self) -> float:
        from optuna import TrialPruned

        from trainer import train

        search, number = self.search, self.trial.number
        loaded, plan, self.values, failed = find_start(search, self.study, number)
        retries = "" if failed is None else f"retries trial {failed} from step {plan.start_step}: "
        shown = "  ".join(f"{n} {format_short(v)}" for n, v in self.trial.params.items())
        self.output.print(f"trial {number}  {retries}{shown}")
        for step, value in self.values.items():
            self.trial.report(value, step)
        callbacks = {f"study {search.study}": lambda _: self, **self.callbacks}
        options = {"output": Output(quiet=True), "callbacks": callbacks}
        try:
            result = train(loaded.config, loaded=loaded, plan=plan, argv=self.argv, **options)
        except NothingToDo as error:  # the worker died before it recorded the value
            if not self.values:
                raise TrialFailedError(str(error)) from None
            self.run_dir = self.trial.user_attrs.get("run_dir")
            return min(self.values.values())
        except (UserError, RunError) as error:
            self.failure = error
            raise TrialFailedError(format_reason(error)) from None
        if self.ending is not None:
            raise TrialFailedError(str(self.ending))
        self.reason = result.stopped_by
        if result.exit_status:
            self.ending = SystemExit(result.exit_status)
            if result.stopped_by is None and result.step < self.max_iters:
                self.is_handed_back = True
                raise TrialFailedError(f"stopped after step {result.step}")
        value = min(self.values.values(), default=math.nan)
        if not math.isfinite(value):
            self.failure = RunError(f"val loss {value}")
            raise TrialFailedError(str(self.failure))
        if self.is_pruned:
            raise TrialPruned(self.reason)
        return value

    def after_step(self, step: Step) -> str | None:
        """Record the run; return a reason to stop if another trial has another text."""
        if self.run_dir is not None:
            return None
        self.run_dir, self.max_iters = step.run_dir, step.config.max_iters
        text = read_record(self.run_dir)["run"]["data"]
        inherited = self.trial.user_attrs.get("data")
        with contextlib.suppress(*get_storage_errors()):
            # First record the text, then compare: of two workers at least one sees the other's.
            self.trial.set_user_attr("data", inherited or text)
            texts = [t.user_attrs.get("data") for t in select_trials(self.study, *ALIVE)]
            other = next((t for t in texts if t and t["sha256"] != text["sha256"]), None)
            if other is None:
                self.trial.set_user_attr("run_dir", str(self.run_dir))
                return None
            self.trial.set_user_attr("data", inherited)
            self.is_handed_back = True
            self.ending = UserError(
                f"{text['name']} is not the text of study {self.search.study} ({other['name']}, "
                "another SHA-256): --data FILE names that, --study NAME another study"
            )
        return str(self.ending) if self.ending else None

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Report the loss; return a reason to stop if it is behind the median of the trials.

        A storage that fails for a while stops no run: the end of the trial records the value.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        step, value = evaluation.step, getattr(evaluation, self.search.measure)
        self.values[step] = value
        try:
            self.trial.report(value, step)
            # Ranks in the first half say little: learning rates that end well start behind.
            is_second_half = self.max_iters / 2 <= step < self.max_iters
            self.is_pruned = is_second_half and self.trial.should_prune()
        except UpdateFinishedTrialError:
            return "another worker has its trial"
        except get_storage_errors():
            return None
        return f"behind the median of the study at step {step}" if self.is_pruned else None


def find_start(
    search: Search, study: "Study", number: int
) -> tuple[LoadedConfig, ResumePlan, dict[int, float], int | None]:
    """Return what a trial's run starts from, the losses up to there, and the trial it retries.

    A retry resumes from the newest usable checkpoint of the failed trials. Without one, as when
    their runs are on another machine, it trains from scratch.
    """
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    trials = study.get_trials(deepcopy=False)
    history = RetryHeartbeatStaleTrialCallback.retry_history(trials[number])
    failed, params = history[-1] if history else None, trials[number].params
    for earlier in (trials[each] for each in reversed(history)):
        run_dir = Path(search.base.runs_dir) / Path(earlier.user_attrs.get("run_dir") or "-").name
        for checkpoint in reversed(list_checkpoints(run_dir)):
            with contextlib.suppress(UserError):  # damaged or removed
                loaded, plan = settle(search, params, number, checkpoint)
                reported = earlier.intermediate_values.items()
                return loaded, plan, {s: v for s, v in reported if s <= plan.start_step}, failed
    return *settle(search, params, number), {}, failed


# ----------------------------------------------------------------------------------------------
# The command


def work(
    search: Search, output: Output, argv: Sequence[str], callbacks: Mapping[str, CallbackFactory]
) -> int:
    """Run trials until the study has enough, print its results, and return the exit status.

    `argv` is the command line, for the runs' records; `callbacks` are added to each run.
    Raises `UserError` if the study cannot be used, `RunError` if trials or the storage fail.
    """
    argv = [word.replace(search.storage, search.shown_storage) for word in argv]
    study = open_study(search)
    done, running = len(select_trials(study, *DONE)), len(select_trials(study, "RUNNING"))
    trials = f"{done} of {pluralize(search.trials, 'trial')} done, {running} running"
    output.print(f"Study  {search.study}, in {search.shown_storage}: {trials}")
    output.print(f"Space  {', '.join(search.space)}\n")
    if len(search.combinations or ()) == search.trials:
        output.print(f"Note: the space has only {pluralize(search.trials, 'combination')}")
    failures = 0
    while wait_for_place(search, study, output):
        check_study(search, study)  # again: another worker may have created it as well
        trial = TrialRun(search, study, output, argv, callbacks)
        trial.run()
        if isinstance(trial.ending, SystemExit):
            output.print("Stopped: the same command continues the study.")
            return trial.ending.code
        if trial.ending is not None:
            raise trial.ending
        failures = failures + 1 if trial.failure else 0
        if failures == MAX_FAILURES:
            count = pluralize(MAX_FAILURES, "trial")
            raise type(trial.failure)(f"{count} failed in a row, the last: {trial.failure}")
        gc.collect()
        if "torch._dynamo" in sys.modules:  # which compiles a function only so many times
            sys.modules["torch"].compiler.reset()
    output.print(format_results(search, study))
    return 0


def format_short(value: Any) -> str:
    """Format a setting's value with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else format_value(value).strip('"')


def format_results(search: Search, study: "Study") -> str:
    """Write the best trial's settings; format the best trials, importances and next commands.

    Raises `UserError` if the settings cannot be written.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    complete = select_trials(study, "COMPLETE")
    pruned, failed = (len(select_trials(study, state)) for state in ("PRUNED", "FAIL"))
    lines = [f"\nStudy {search.study}: {len(complete)} complete, {pruned} pruned"]
    lines[0] += f"; {failed} failed, withdrawn or retried." if failed else "."
    is_url = "://" in search.storage
    url = search.shown_storage if is_url else f"sqlite:///{search.storage}"
    dashboard = f"  {format_command('optuna-dashboard')} {shlex.quote(url)}"
    if not complete:
        return "\n".join([*lines, "No trial is complete, so there is no best one.", dashboard])
    best = sorted(complete, key=lambda trial: (trial.value, trial.number))[:BEST_SHOWN]
    run_dirs = [str(trial.user_attrs.get("run_dir")) for trial in best]
    rows = [["trial", search.measure, *search.space, "run"]]
    for trial, run_dir in zip(best, run_dirs, strict=True):
        values = [format_short(trial.params[name]) for name in search.space]
        rows.append([str(trial.number), f"{trial.value:.4f}", *values, run_dir])
    lines += ["", align_columns(rows, right=range(len(search.space) + 2)), ""]
    if len(complete) >= TRIALS_FOR_IMPORTANCE:
        with warnings.catch_warnings(action="ignore"):
            evaluator = PedAnovaImportanceEvaluator()
            shares = get_param_importances(study, evaluator=evaluator, params=list(search.space))
        rows = [[f"  {name}", f"{share:.2f}"] for name, share in shares.items()]
        lines += ["Importances (PED-ANOVA, sum 1):", align_columns(rows, right=[1]), ""]
    write_preset(search, best[0])
    lines += [f"Best settings: {search.preset}", "", "Next:"]
    lines += [f"  {format_command('train.py')} --config {shlex.quote(str(search.preset))}"]
    lines += [f"  {format_command('report.py')} {shlex.join(run_dirs[:3])}", dashboard]
    return "\n".join(lines)


def write_preset(search: Search, best: "FrozenTrial") -> None:
    """Write the searched settings, and others that differ from the defaults, for `--config`.

    Raises `UserError` if the file cannot be written.
    """
    loaded, _ = settle(search, best.params)
    values = {
        name: getattr(loaded.config, name)
        for name, info in ModelConfig.model_fields.items()
        if name not in Run.model_fields
        and (name in search.space or getattr(loaded.config, name) != info.default)
        and not loaded.sources[name].startswith("architecture ")
    }
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    text = (
        f"# Best of study {search.study}: trial {best.number}, {search.measure} {best.value:.4f}\n"
        f"# Run {best.user_attrs.get('run_dir')}; written {when}\n#\n"
        f"#     python train.py --config {search.preset}\n\n"
        + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    )
    try:
        make_directory(search.preset.parent)
        write_atomic(search.preset, text)
    except OSError as error:
        raise UserError(
            f"{search.preset} cannot be written: {error.strerror}; name another file with --output"
        ) from None


def main(argv: Sequence[str]) -> int:
    """Check the settings and the space, then work on the study."""
    if Ranks.from_environment().size > 1:
        raise UserError("tune.py does not run under torchrun: start each worker by itself")
    groups = {"study": StudySettings, **GROUPS}
    command_line = CommandLine(__doc__, TuneConfig, ACTIONS, groups, ALIASES)
    flags, actions, problems = command_line.parse(argv)
    own = {name: flags.pop(name) for name in StudySettings.model_fields if name in flags}
    order = StudySettings(**own)
    space = read_space(order.space, flags, problems)
    loader = ConfigLoader(flags, actions.get("config"), problems)
    search = create_search(order, space, loader)
    callbacks = load_callback_factories(actions.get("callback", []))
    if importlib.util.find_spec("optuna") is None:
        raise UserError("tune.py needs Optuna: pip install --constraint constraints.txt '.[tune]'")
    try:
        return work(search, Output(), argv, callbacks)
    except get_storage_errors() as error:
        raise RunError(
            f"{search.shown_storage} cannot be used: {format_reason(error.__cause__ or error)}; "
            "runs and recorded trials are kept: the same command continues the study"
        ) from error


if __name__ == "__main__":
    sys.exit(run_command(main))
