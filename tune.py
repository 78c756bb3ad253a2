"""Search for better settings: a study of many runs, with Optuna.

    python tune.py --space configs/search/first.yaml --trials 20 --data dante.txt --max-iters 300
    optuna-dashboard sqlite:///runs/studies/first.db

Each trial is an ordinary run of train.py. The settings of train.py are flags here too and hold for
all trials; the space lists the settings to search. The same command, started again, is another
worker of the study. If a worker is stopped or killed, its trial is retried from its checkpoint.
"""

import contextlib
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bundle import list_checkpoints
from callbacks import CallbackFactory, Evaluation, Step, load_callback_factories
from config import ConfigLoader, LoadedConfig, find_case_problem, read_config_file
from corpus import open_corpus
from parameters import (
    ALIASES,
    BY_ARCHITECTURE,
    GROUPS,
    ModelConfig,
    ModelName,
    PathText,
    Positive,
    Settings,
)
from resume import ResumePlan, resolve_start
from train import ACTIONS
from utils.checks import describe_unknown, format_name, format_value, validate_values
from utils.command_line import CommandLine, format_flag
from utils.data_files import STANDARD_INPUT
from utils.errors import NothingToDo, RunError, UserError, format_reason
from utils.files import DIRECTORY, is_directory, is_present, make_directory, write_atomic
from utils.output import Output, format_command, pluralize, run_command
from utils.ranks import Ranks
from utils.search_space import check_values, list_values
from utils.tables import align_columns

if TYPE_CHECKING:  # Optuna is imported once the settings are known to be good
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

# Settings that determine a trial's loss: the same in all trials of a study, unless searched.
MEASURED = {
    name
    for group in ("architecture", "data", "training", "initialization")
    for name in GROUPS[group].model_fields
} - {"data", "micro_batch_size"}
# Those that may be searched. The others define how and on what text a trial is measured.
SEARCHABLE = MEASURED - {
    *(GROUPS["data"].model_fields.keys() - {"tokenizer", "vocab_size"}),
    *("eval_interval", "eval_iters", "early_stopping_patience", "seed"),
    *("epochs", "max_minutes", "size", "init_from"),
}
MAX_LISTED = 1000  # combinations up to which all legal ones are listed
DRAWS = 200  # random combinations that are tried to find a legal one

DONE = ("COMPLETE", "PRUNED")  # Optuna's names of the states of trials
ALIVE = (*DONE, "RUNNING", "WAITING")
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60  # without a heartbeat, after which a worker counts as dead
POLL_SECONDS = 2  # between two checks for trials that other workers left
MAX_RETRIES = 5  # of a trial whose workers die
MAX_FAILURES = 3  # in a row, after which a worker ends

Space = dict[str, list[Any] | dict[str, Any]]  # choices, or arguments of Optuna's distributions


class StudySettings(Settings):
    """The study, and where it is stored."""

    space: PathText | None = None
    """The YAML file of the settings to search and their ranges: configs/search/ has one."""

    study: ModelName | None = None
    """The study's name. null: the name of the space's file."""

    trials: Positive = 20
    """Complete or pruned trials of the whole study, over all workers."""

    storage: PathText | None = None
    """SQLite file, or a database URL for several machines. null: studies/<study>.db in runs_dir."""

    output: PathText | None = None
    """File for the best trial's settings. null: studies/<study>.yaml in runs_dir."""


class TuneConfig(StudySettings, ModelConfig):
    """All flags: those of the study, and those of each of its runs."""


def read_space(file: str | None, flags: Mapping[str, Any], problems: list[str]) -> Space:
    """Read a search space of settings that `flags` do not fix; append mistakes to `problems`."""
    if file is None:
        problems.append("--space FILE is missing: the settings to search and their ranges")
        return {}
    try:
        declared = read_config_file(Path(file))
    except UserError as error:
        problems += error.problems
        return {}
    if not declared:
        problems.append(f"{file}: no setting to search")
    space: Space = {}
    unknown = []
    for name, values in declared.items():
        label, flag = f"{file}: {format_name(name)}", format_flag(str(name))
        if name not in ModelConfig.model_fields:
            unknown.append((name, values))
        elif name not in SEARCHABLE:
            problems.append(f"{label} cannot be searched, only set: {flag}")
        elif name in flags:
            problems.append(f"{label} is searched, and {flag} fixes it: remove one")
        else:
            space[name] = check_values(name, values, label, problems)
    problems += describe_unknown(f"{file}: unknown key", unknown, SEARCHABLE)
    return space


@dataclass(frozen=True)
class Search:
    """The settings that all trials share, a legal `base`, and the space in which they differ."""

    study: str
    space: Space
    loader: ConfigLoader
    trials: int
    storage: str  # a database URL
    shown_storage: str  # the same without a password
    measure: str  # the loss to minimize
    preset: Path
    base: ModelConfig = field(default_factory=ModelConfig)
    example: dict[str, Any] = field(default_factory=dict)  # a legal combination
    combinations: Sequence[dict[str, Any]] | None = None  # all legal ones, if they are few

    def settle(
        self, params: Mapping[str, Any], number: int = 0, checkpoint: Path | None = None
    ) -> tuple[LoadedConfig, ResumePlan]:
        """Return the settings and the plan of a trial's run. Raises `UserError` on a conflict."""
        values = {**params, "run_tag": f"{self.study}_{number}"}
        loader = self.loader.override(values, f"trial {number} of study {self.study}")
        plan = resolve_start(loader.get, resume=checkpoint and str(checkpoint))
        return loader.load(plan.checkpoint_settings), plan

    def is_legal(self, params: Mapping[str, Any]) -> bool:
        """Return whether the schema accepts this combination."""
        with contextlib.suppress(UserError):
            return bool(self.settle(params))
        return False


def create_search(order: StudySettings, space: Space, loader: ConfigLoader) -> Search:
    """Return the checked search; raise `UserError` with a line for each problem."""
    problems = list(loader.problems)
    for name in ("run_tag", "model_name"):
        if loader.get(name).value is not None:
            problems.append(f"{loader.get(name).source}: {name}: trials name their runs: remove it")
    if loader.get("size").value is not None:
        problems.append(
            f"{loader.get('size').source}: size: the trials of a study have one shape, unless the "
            "space has n_layer, n_embd or n_head: remove it"
        )
    study = order.study or Path(order.space or "study").stem
    problems += validate_values(StudySettings, {"study": study}, label=format_flag)[1]
    studies = Path(loader.get("runs_dir").value) / "studies"
    storage = order.storage or str(studies / f"{study}.db")
    if order.storage is None and (problem := find_case_problem(studies, f"{study}.db")):
        problems.append(f"study {study}: {problem}")
    for flag, place in (("--output", order.output), ("--storage", order.storage)):
        if place and is_directory(Path(place)):
            problems.append(f"{flag} {place}: {DIRECTORY}")
    parent = Path(order.output).parent if order.output else studies
    if is_present(parent) and not is_directory(parent):
        problems.append(f"{parent}: is no directory: name another file with --output")
    journal = Path(storage).parent / f"{Path(storage).stem}.log"
    is_default = order.storage is None and not Path(storage).exists()
    if Path(storage) == journal or (is_default and journal.is_file()):
        problems.append(
            f"{journal}: studies are no longer journals: `optuna-dashboard {journal}` shows it, "
            "Optuna's JournalStorage and copy_study() convert it; --study NAME starts another one"
        )
    if problems:
        raise UserError(*problems)
    url = storage if "://" in storage else f"sqlite:///{storage}"
    preset = Path(order.output) if order.output else studies / f"{study}.yaml"
    shown = re.sub(r"(://[^:/]*):.*@", r"\1:***@", url)  # a password may have an @
    shown = re.sub(r"([?&][^=&]*=)[^&]*", r"\1***", shown)
    # Losses per token compare only between runs of one tokenizer.
    is_mixed = not space.keys().isdisjoint({"tokenizer", "vocab_size"})
    measure = "val_bits_per_byte" if is_mixed else "val_loss"
    search = Search(study, space, loader, order.trials, url, shown, measure, preset)
    choices = [list_values(values) for values in space.values()]
    is_listed = tuple not in map(type, choices) and math.prod(map(len, choices)) <= MAX_LISTED
    sample = (map(random.Random(seed).choice, choices) for seed in range(DRAWS))
    drawn = itertools.product(*choices) if is_listed else sample
    tried = [dict(zip(space, each, strict=True)) for each in drawn]
    legal = [params for params in tried if search.is_legal(params)]
    example = (legal or tried)[0]
    base = search.settle(example)[0].config  # raises the reason if none is legal
    if base.data == STANDARD_INPUT:
        raise UserError(
            "--data -: each trial reads the text again, and standard input can be read only once: "
            "save it to a file"
        )
    if is_listed:
        search = replace(search, combinations=legal, trials=min(order.trials, len(legal)))
    return replace(search, base=base, example=example)


def open_study(search: Search) -> "Study":
    """Open or create the study. Raises `UserError` if it cannot be opened, or is another one."""
    import optuna
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    # Heartbeats and retries are called experimental since 2021.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    kind, _, path = search.storage.partition(":///")
    for _ in range(4):  # workers that create the tables at the same time collide
        try:
            if kind == "sqlite":
                make_directory(Path(path).parent)
            storage = optuna.storages.RDBStorage(
                search.storage,
                # Seconds to wait for the writes of other workers.
                engine_kwargs={"connect_args": {"timeout": 60}} if kind == "sqlite" else None,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
            )
            return optuna.create_study(
                storage=storage,
                study_name=search.study,
                sampler=create_sampler(search),
                pruner=optuna.pruners.MedianPruner(),  # successive halving needs more evaluations
                load_if_exists=True,
            )
        except Exception as error:  # each database driver has its own
            reason = format_reason(error)
            time.sleep(0.3 * random.random())
    raise UserError(f"{search.shown_storage} cannot be opened: {reason}: see --storage")


def check_study(search: Search, study: "Study") -> None:
    """Record space, text and fixed settings. Raises `UserError` if the study has others."""
    derived = BY_ARCHITECTURE if "architecture" in search.space else frozenset()
    fixed = search.base.model_dump(include=MEASURED - search.space.keys() - derived)
    data = search.base.data or ("input.txt" if Path("input.txt").exists() else None)
    options = {"cache_dir": search.base.cache_dir, "token_store": search.base.token_store}
    fixed["data_sha256"] = open_corpus(data, **options).sha256
    record = json.loads(json.dumps({"space": search.space, "fixed": fixed}))  # as it is read back
    where = f"study {search.study} in {search.shown_storage}"
    if "folio" not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise UserError(f"{where} is not one of tune.py: choose another name with --study")
        study.set_user_attr("folio", record)
    old, new = ({**each["fixed"], **each["space"]} for each in (study.user_attrs["folio"], record))
    old.setdefault("data_sha256", new["data_sha256"])  # of a study of an earlier version
    changes = [
        f"{name} was {format_value(was)} and is now {format_value(now)}"
        for name in {**old, **new}
        if (was := old.get(name, "absent")) != (now := new.get(name, "absent"))
    ]
    if changes:
        remedy = "restore them, or name another study with --study"
        raise UserError(f"{where} has other settings: {'; '.join(changes)}: {remedy}")


def select_trials(study: "Study", *states: str) -> list["FrozenTrial"]:
    """Return the trials that are in one of these states."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in states]


def list_failed(study: "Study") -> list[dict[str, Any]]:
    """Return the settings that failed and are not retried; a trial that withdrew has not run."""
    alive = [trial.params for trial in select_trials(study, *ALIVE)]
    return [
        trial.params
        for trial in select_trials(study, "FAIL")
        if trial.params not in alive
        and not str(trial.user_attrs.get("reason")).startswith("withdrawn")
    ]


def _suggest_values(trial: Any, space: Space) -> None:
    for name, values in space.items():
        if isinstance(values, list):
            trial.suggest_categorical(name, values)
        elif isinstance(values["low"], int):
            trial.suggest_int(name, **values)
        else:
            trial.suggest_float(name, **values)


def check_place(search: Search, study: "Study", trial: "Trial") -> None:
    """Withdraw by an error; as each trial is recorded first, of two workers at least one does."""
    others = [t for t in select_trials(study, *ALIVE) if t.number != trial.number]
    if sum(other.number < trial.number for other in others) >= search.trials:
        raise NothingToDo("withdrawn: other workers have the last trials")
    same = [other.number for other in others if other.params == trial.params]
    if same or not search.is_legal(trial.params):
        kind = f"the settings of trial {same[0]}" if same else "illegal settings"
        raise UserError(f"withdrawn: {kind}; if that is all, widen the space")


def create_sampler(search: Search) -> Any:
    """Return TPE over all settings that proposes only legal and new combinations."""
    from optuna.samplers import RandomSampler, TPESampler
    from optuna.trial import FixedTrial

    example = FixedTrial(search.example)
    _suggest_values(example, search.space)

    class LegalSampler(RandomSampler):
        def infer_relative_search_space(self, study: "Study", trial: "FrozenTrial") -> dict:
            # Optuna never counts a trial without a heartbeat as stale. Private: read from 5.0.0.
            study._storage.record_heartbeat(trial._trial_id)
            return example.distributions

        def sample_relative(self, study: "Study", trial: "FrozenTrial", space: dict) -> dict:
            tried = [t.params for t in select_trials(study, *ALIVE) if t.number != trial.number]
            tried += list_failed(study)  # they would fail again
            options = {"multivariate": True, "constant_liar": True}  # which keeps workers apart
            for attempt in range(DRAWS):
                seed = zlib.crc32(f"{search.base.seed} {trial.number} {attempt}".encode())
                # TPE's best of 24 candidates first. If that is illegal or not new, it would be so
                # again: take any that TPE samples.
                sampler = TPESampler(n_ei_candidates=1 if attempt else 24, seed=seed, **options)
                params = sampler.sample_relative(study, trial, space) or {
                    name: sampler.sample_independent(study, trial, name, distribution)
                    for name, distribution in space.items()
                }
                if params not in tried and search.is_legal(params):
                    return params
            untried = [each for each in search.combinations or () if each not in tried]
            return random.Random(seed).choice(untried) if untried else params

    return LegalSampler()


def wait_for_place(search: Search, study: "Study", output: Output) -> bool:
    """Wait until a trial is missing, or return False: poll, as other workers may die."""
    import optuna

    check_study(search, study)
    for polls in itertools.count():
        optuna.storages.fail_stale_trials(study)
        done, running = len(select_trials(study, *DONE)), select_trials(study, "RUNNING")
        wanted, failed = search.trials, list_failed(study)
        if search.combinations is not None:
            wanted = min(wanted, sum(each not in failed for each in search.combinations))
        if done >= wanted or done + len(running) < wanted:
            return done < wanted
        if polls == 0:
            output.print(f"Waiting for {pluralize(len(running), 'trial')} of other workers")
        time.sleep(POLL_SECONDS)


@dataclass
class TrialRun:
    """One trial: the objective of `study.optimize`, and a callback of its run."""

    search: Search
    study: "Study"
    output: Output
    argv: Sequence[str]
    callbacks: Mapping[str, CallbackFactory]
    values: dict[int, float] = field(default_factory=dict)  # val losses by step
    run_dir: Path | None = None
    outcome: Exception | None = None  # is raised after the run
    exit_status: int = 0  # of the worker, if it is stopped and hands the trial back

    def run(self) -> UserError | RunError | None:
        """Ask for a trial and run it; print how it ended, and return why it failed."""
        from optuna.storages import RetryHeartbeatStaleTrialCallback

        failure = None
        try:
            self.study.optimize(self, n_trials=1, catch=(NothingToDo,), gc_after_trial=True)
        except (UserError, RunError) as error:
            failure = error
        except Exception:
            self.study.get_trials()  # raises the reason if the storage failed
            # Optuna cannot end a trial that another worker failed while this machine was asleep.
            if not isinstance(self.outcome, RunError):
                raise
        trial = self.study.get_trials()[self.trial.number]
        reason = trial.user_attrs.get("reason") or self.outcome or trial.value
        self.output.print(f"trial {trial.number}  {trial.state.name}: {reason}  {self.run_dir}")
        if self.exit_status:
            RetryHeartbeatStaleTrialCallback()(self.study, trial)
            self.output.print("Stopped: the same command continues the study.")
        return failure

    def __call__(self, trial: "Trial") -> float:
        """Train, and return the lowest val loss."""
        self.trial, reason = trial, None
        trial.set_user_attr("worker", f"{platform.node()}:{os.getpid()}")
        try:
            _suggest_values(trial, self.search.space)
            check_place(self.search, self.study, trial)
            value, reason = self._train()
            return value
        except (KeyboardInterrupt, SystemExit) as aborted:
            self.exit_status, reason = getattr(aborted, "code", 130), "aborted"
            raise RunError(reason) from None
        except Exception as error:
            reason = format_reason(error)
            raise
        finally:
            with contextlib.suppress(Exception):  # as that ends the trial without it
                trial.set_user_attr("reason", reason)

    def _train(self) -> tuple[float, str | None]:
        """Return the lowest val loss, and the reason if the run ended before its last step."""
        from trainer import train

        search, trial, reason = self.search, self.trial, None
        loaded, plan, self.values, failed = find_start(search, self.study, trial.number)
        retry = "" if failed is None else f"retries trial {failed} from step {plan.start_step}: "
        shown = "  ".join(f"{name} {_format_short(value)}" for name, value in trial.params.items())
        self.output.print(f"trial {trial.number}  {retry}{shown}")
        for step, value in self.values.items():
            trial.report(value, step)
        callbacks = {f"study {search.study}": lambda _: self, **self.callbacks}
        options = {"output": Output(quiet=True), "callbacks": callbacks}
        # Nothing to do: the worker died after the last step, before it recorded the value.
        with contextlib.suppress(NothingToDo):
            result = train(loaded.config, loaded=loaded, plan=plan, argv=self.argv, **options)
            if result.exit_status:
                self.exit_status = result.exit_status
                raise RunError(f"stopped after step {result.step}")
            if self.outcome is not None:
                raise self.outcome
            reason = result.stopped_by
        value = min(self.values.values(), default=math.nan)
        if not math.isfinite(value):
            raise RunError(f"val loss {value}")
        return value, reason

    def after_step(self, step: Step) -> None:
        """Record the run's directory, for a retry."""
        if self.run_dir is None:
            self.run_dir = step.run_dir
            with contextlib.suppress(Exception):  # a storage that fails for a while stops no run
                self.trial.set_user_attr("run_dir", str(step.run_dir))

    def after_evaluation(self, evaluation: Evaluation) -> str | None:
        """Report the loss; return a reason to stop if it is behind the median of the trials."""
        import optuna

        step, value = evaluation.step, getattr(evaluation, self.search.measure)
        self.values[step] = value
        try:
            self.trial.report(value, step)
            # Ranks in the first half say little: learning rates that end well start behind.
            max_iters = evaluation.config.max_iters
            if max_iters / 2 <= step < max_iters and self.trial.should_prune():
                self.outcome = optuna.TrialPruned(f"behind the median of the study at step {step}")
        except optuna.exceptions.UpdateFinishedTrialError:
            self.outcome = RunError("another worker has it")
        except Exception:  # a storage that fails for a while stops no run
            return None
        return str(self.outcome) if self.outcome else None


def find_start(
    search: Search, study: "Study", number: int
) -> tuple[LoadedConfig, ResumePlan, dict[int, float], int | None]:
    """Return what a trial's run starts from, the losses up to there, and the trial it retries."""
    trials = study.get_trials(deepcopy=False)
    params, history = trials[number].params, trials[number].system_attrs.get("retry_history", [])
    for failed in (trials[each] for each in reversed(history)):
        run_dir = Path(search.base.runs_dir) / Path(failed.user_attrs.get("run_dir") or "-").name
        for checkpoint in reversed(list_checkpoints(run_dir)):
            with contextlib.suppress(UserError):  # damaged or removed
                loaded, plan = search.settle(params, number, checkpoint)
                losses = failed.intermediate_values.items()
                return loaded, plan, {s: v for s, v in losses if s <= plan.start_step}, history[-1]
    return *search.settle(params, number), {}, history[-1] if history else None


def _format_short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value).strip('"')


def format_results(search: Search, study: "Study") -> str:
    """Write the best trial's settings; format the best trials, importances and next commands."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    states = ("COMPLETE", "PRUNED", "FAIL")
    counts = ", ".join(f"{len(select_trials(study, state))} {state.lower()}" for state in states)
    lines = [f"\nStudy {search.study}: {counts}"]
    dashboard = f"  {format_command('optuna-dashboard')} {shlex.quote(search.shown_storage)}"
    best = sorted(select_trials(study, "COMPLETE"), key=lambda trial: (trial.value, trial.number))
    rows = [["trial", search.measure, *search.space, "run"]]
    for trial in best[:5]:
        values = [_format_short(trial.params[name]) for name in search.space]
        run_dir = str(trial.user_attrs.get("run_dir"))
        rows.append([str(trial.number), f"{trial.value:.4f}", *values, run_dir])
    lines += ["", align_columns(rows, right=range(len(search.space) + 2)), ""]
    if len(best) > 5:  # else they say nothing
        with warnings.catch_warnings(action="ignore"):
            shares = get_param_importances(
                study, params=list(search.space), evaluator=PedAnovaImportanceEvaluator()
            )
        table = [[f"  {name}", f"{share:.2f}"] for name, share in shares.items()]
        lines += ["Importances (PED-ANOVA, sum 1):", align_columns(table, right=[1]), ""]
    write_preset(search, best[0])
    lines += [f"Best settings: {search.preset}", "", "Next:"]
    lines += [f"  {format_command('train.py')} --config {shlex.quote(str(search.preset))}"]
    return "\n".join([*lines, dashboard])


def write_preset(search: Search, best: "FrozenTrial") -> None:
    """Write the settings that are searched or not default. Raises `UserError` if it cannot."""
    loaded, _ = search.settle(best.params)
    values = {
        name: value
        for name, value in loaded.config.model_dump(exclude=set(GROUPS["run"].model_fields)).items()
        if (name in search.space or value != ModelConfig.model_fields[name].default)
        and not loaded.sources[name].startswith("architecture ")
    }
    origin = f"trial {best.number}, {search.measure} {best.value:.4f}"
    text = f"# Best of study {search.study}: {origin}, run {best.user_attrs.get('run_dir')}\n"
    text += yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    try:
        make_directory(search.preset.parent)
        write_atomic(search.preset, text)
    except OSError as error:
        raise UserError(
            f"{search.preset} cannot be written, see --output: {error.strerror}"
        ) from None


def main(argv: Sequence[str]) -> int:
    """Check the settings and the space, then work on the study."""
    if Ranks.from_environment().size > 1:
        raise UserError("tune.py does not run under torchrun: start each worker by itself")
    groups = {"study": StudySettings, **GROUPS}
    own_actions = [action for action in ACTIONS if action.name in ("config", "callback")]
    command_line = CommandLine(__doc__, TuneConfig, own_actions, groups, ALIASES)
    flags, actions, problems = command_line.parse(argv)
    names = StudySettings.model_fields.keys() & flags.keys()
    order = StudySettings(**{name: flags.pop(name) for name in names})
    space = read_space(order.space, flags, problems)
    loader = ConfigLoader(flags, actions.get("config"), problems)
    search = create_search(order, space, loader)
    callbacks = load_callback_factories(actions.get("callback", []))
    if importlib.util.find_spec("optuna") is None:
        raise UserError("tune.py needs Optuna: pip install --constraint constraints.txt '.[tune]'")

    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        argv = [word.replace(search.storage, search.shown_storage) for word in argv]
        study, output = open_study(search), Output()
        trials = f"{len(select_trials(study, *DONE))} of {pluralize(search.trials, 'trial')} done"
        output.print(f"Study  {search.study}, in {search.shown_storage}: {trials}")
        size = f": {len(search.combinations)} combinations" if search.combinations else ""
        output.print(f"Space  {', '.join(search.space)}{size}\n")
        failures = 0
        while wait_for_place(search, study, output):
            trial = TrialRun(search, study, output, argv, callbacks)
            failure = trial.run()
            if trial.exit_status:
                return trial.exit_status
            failures = failures + 1 if failure else 0
            if failures == MAX_FAILURES:
                break
            if "torch._dynamo" in sys.modules:  # which compiles a function only so many times
                sys.modules["torch"].compiler.reset()
        if has_result := bool(select_trials(study, "COMPLETE")):
            output.print(format_results(search, study))
        if failures == MAX_FAILURES:
            raise type(failure)(f"{MAX_FAILURES} trials failed in a row, the last: {failure}")
        if not has_result:
            raise RunError("no trial is complete: all combinations failed: change the space")
        return 0
    except (OSError, SQLAlchemyError, OptunaError) as error:
        raise RunError(
            f"{search.shown_storage} cannot be used: {format_reason(error.__cause__ or error)}; "
            "runs and recorded trials are kept: the same command continues the study"
        ) from error


if __name__ == "__main__":
    sys.exit(run_command(main))
