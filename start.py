"""What a run begins with: new weights, a bundle to go on with, or a parent to fine-tune.

`plan_run` turns a command's flags into settings and a `ResumePlan`. It reads small files alone, writes
nothing and needs no torch, so that a mistake is answered at once.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bundle import (
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    Ancestor,
    Bundle,
    TrainingState,
    find_directory,
    find_run_of,
    find_usable_bundle,
    has_model_files,
    is_bundle,
    is_run,
    list_checkpoints,
    list_runs,
    read_bundle,
    read_state,
)
from config import ConfigLoader, LoadedConfig, SavedSettings, upgrade_settings
from parameters import NAME_PATTERN, Architecture, ModelConfig
from utils.errors import NothingToDo, UserError
from utils.files import make_directory, remove_if_empty
from utils.output import pluralize
from utils.run_manager import RunDirectory, RunIDGenerator


@dataclass(frozen=True)
class ResumePlan:
    """What a run begins with.

    `bundle` is what it goes on with (`is_resume`) or is fine-tuned from; without one, the weights
    are new. `named_model` is the directory of the model that the run trains, if it has a name, and
    `replaced` the state of the bundle that is there now. `run_tag` outlives a resume.
    """

    bundle: Bundle | None = None
    is_resume: bool = False
    reset_optimizer: bool = False
    named_model: Path | None = None
    replaced: TrainingState | None = None
    run_tag: str | None = None

    @property
    def step(self) -> int:
        """The updates that were made before this run."""
        return self.bundle.state.step if self.bundle and self.is_resume else 0

    @property
    def previous_runs(self) -> list[dict[str, Any]]:
        """The runs that this one goes on with, and the step at which each was left."""
        if self.bundle is None or not self.is_resume:
            return []
        state = self.bundle.state
        last = {"run_id": state.run_id, "step": state.step}
        return [*(state.get_fact("previous_runs") or []), last]

    @property
    def lineage(self) -> list[Ancestor]:
        """The models that this one descends from, its parent first."""
        if self.bundle is None:
            return []
        state = self.bundle.state
        if self.is_resume:
            return state.lineage
        parent = Ancestor(
            name=get_model_name(self.bundle),
            step=state.step,
            weights_sha256=state.files[WEIGHTS_FILE],
            data_sha256=state.get_fact("data_sha256"),
            run_id=state.run_id,
        )
        return [parent, *state.lineage]

    @property
    def continued_run(self) -> Path | None:
        """The directory of the run whose checkpoint this one goes on with."""
        return find_run_of(self.bundle.path) if self.bundle and self.is_resume else None

    @property
    def saved_settings(self) -> SavedSettings | None:
        """The settings that come with the bundle, and which of them it fixes."""
        if self.bundle is None:
            return None
        config, state = self.bundle.config, self.bundle.state
        fixed = {name: getattr(config, name) for name in Architecture.model_fields}
        fixed["tokenizer"] = self.bundle.tokenizer.get("token_kind")
        if not self.is_resume:
            binding = frozenset(fixed) - {"dropout"}
            return SavedSettings(str(self.bundle.path), fixed, binding)
        fixed["batch_size"] = config.batch_size
        values = {**upgrade_settings(state.settings), **fixed}
        return SavedSettings(str(self.bundle.path), values, frozenset(fixed))


def plan_run(
    flags: Mapping[str, Any] | None = None,
    config_file: str | None = None,
    problems: Sequence[str] = (),
    *,
    resume: str | None = None,
    overwrite: bool = False,
    reset_optimizer: bool = False,
    loader: ConfigLoader | None = None,
) -> tuple[LoadedConfig, ResumePlan]:
    """Settle what a run begins with, and all its settings.

    Args:
        flags: the settings given on the command line, already of their types.
        config_file: what `--config` names.
        problems: what is already known to be wrong, to be reported with the rest.
        resume: a run, a bundle, a named model, `last`, or `auto`.
        overwrite: begin a named model anew, or put another in its place.
        reset_optimizer: go on with a new optimizer.
        loader: where the files of settings are looked for.

    Raises:
        UserError: with a line for each problem.
    """
    flags = dict(flags or {})
    layers = (loader or ConfigLoader()).read(flags, config_file, problems)
    start, more_problems = ResumePlan(), []
    if resume is not None and resume != "auto" and flags.get("init_from"):
        more_problems.append("--resume goes on with a model, --init-from begins one: choose one")
    else:
        try:
            start = choose_start(
                layers.setting,
                layers.origin,
                resume=resume,
                overwrite=overwrite,
                reset_optimizer=reset_optimizer,
            )
        except UserError as error:
            more_problems += error.problems
    return layers.merged(start.saved_settings, more_problems), start


def choose_start(
    setting: Callable[[str], Any],
    origin: Callable[[str], str],
    *,
    resume: str | None = None,
    overwrite: bool = False,
    reset_optimizer: bool = False,
) -> ResumePlan:
    """What a run with these settings begins with.

    `setting(name)` gives the settings that say where to look, `model_name`, `init_from` and so on,
    and `origin(name)` where they come from.

    Raises:
        UserError: there is no such model, it is damaged, or its name is taken.
    """
    runs_dir, checkpoints_dir = Path(setting("runs_dir")), Path(setting("checkpoints_dir"))
    name, init_from, tag = setting("model_name"), setting("init_from"), setting("run_tag")
    named_model = _resolved(checkpoints_dir / name, checkpoints_dir) if name is not None else None
    exists = named_model is not None and is_bundle(named_model)
    if named_model and not exists and not overwrite and has_model_files(named_model):
        raise UserError(
            f"{named_model}: holds files of a model, but no training_state.json: put that back, "
            "or begin the model anew with --overwrite"
        )
    parent = None
    if init_from is not None and (resume is None or resume == "auto"):
        found = find_directory(init_from, runs_dir, checkpoints_dir)
        parent = read_bundle(find_usable_bundle(found))

    there = named_model if exists and not overwrite else None
    if there is not None and init_from is not None and resume is None:
        raise UserError(
            f"{there} exists already, and init_from {init_from} ({origin('init_from')}) would "
            "begin it: go on with it without that, or with --resume auto; begin it anew with "
            "--overwrite; or choose another --model-name"
        )
    if resume is None or (resume == "auto" and named_model is not None):
        directory = there
    elif resume == "auto":
        directory = _newest_checkpoint(runs_dir, tag, parent)
    else:
        directory = _checkpoint_meant(resume, runs_dir, checkpoints_dir)
    if directory is not None:
        start = _resumed(read_bundle(directory), reset_optimizer)
        named_model = _named_model_of(start.bundle, named_model, checkpoints_dir, overwrite)
        start = replace(start, run_tag=tag or start.run_tag)
    else:
        if resume is None and reset_optimizer:
            raise UserError("--reset-optimizer: there is nothing to resume, and so to reset")
        start = ResumePlan(parent, run_tag=tag)
    if overwrite and named_model is None:
        raise UserError("--overwrite needs --model-name, the model to begin anew")
    if parent is not None and named_model is not None and directory is None:
        if parent.path.resolve() == named_model.resolve():
            raise UserError(f"{named_model}: a child cannot take its parent's place: choose a name")
    return replace(start, named_model=named_model, replaced=_state_at(named_model))


def _resumed(bundle: Bundle, reset_optimizer: bool) -> ResumePlan:
    state = bundle.state
    if state.optimizer_file is None and not reset_optimizer:
        raise UserError(
            f"{bundle.path}: an export, without optimizer state to go on with: resume a "
            "checkpoint, or add --reset-optimizer"
        )
    return ResumePlan(bundle, True, reset_optimizer, run_tag=state.get_fact("run_tag"))


def plan_from_config(config: ModelConfig) -> ResumePlan:
    """What a run begins with whose settings were made in Python and are complete.

    Raises `UserError` where a model that is there has settings of its own.
    """
    start = choose_start(lambda name: getattr(config, name), lambda name: "train()")
    if start.is_resume:
        raise UserError(
            f"{start.named_model} exists already, with settings of its own: "
            "plan() in start.py settles what to go on with"
        )
    if saved := start.saved_settings:
        for name in saved.binding:
            if getattr(config, name) != saved.values[name]:
                raise UserError(
                    f"{name} is not that of {saved.origin}: plan() in start.py sees to it"
                )
    return start


# ----------------------------------------------------------------------------------------------
# What is checked later, when all is known


def check_steps_left(config: ModelConfig, start: ResumePlan) -> None:
    """Raise `NothingToDo` where a resumed model has had all its steps."""
    if start.is_resume and config.max_iters is not None and config.max_iters <= start.step:
        raise NothingToDo(
            f"{start.bundle.path} is at step {start.step} already, and max_iters is "
            f"{config.max_iters}: nothing to do; --max-iters N goes on to step N"
        )


def check_not_stopped_early(config: ModelConfig, start: ResumePlan) -> None:
    """Raise `NothingToDo` where a resumed model has waited for a better val loss long enough."""
    if start.is_resume and is_stopped_early(start.bundle.state, config):
        raise NothingToDo(
            f"{start.bundle.path} was stopped early, as its val loss did not fall in "
            f"{pluralize(start.bundle.state.get_fact('evaluations_since_best'), 'evaluation')}: nothing "
            "to do; --early-stopping-patience N waits for more of them (0: for ever)"
        )


def is_stopped_early(state: TrainingState, config: ModelConfig) -> bool:
    """Whether a training has waited for a better val loss as long as `config` lets it."""
    since = state.get_fact("evaluations_since_best") or 0
    return 0 < config.early_stopping_patience <= since


def check_rerun(loaded: LoadedConfig, start: ResumePlan, data_name: str, data_sha256: str) -> None:
    """Refuse to call it the same run again where something is not what the record says.

    Raises `UserError` for another text, another parent, or a run that went on from a checkpoint.
    """
    record = loaded.rerun_of
    if record is None or start.is_resume:
        return
    run_id = record.get("run_id")
    if isinstance(resumed_from := record.get("resumed_from"), dict):
        raise UserError(
            f"{run_id} went on from step {resumed_from.get('step')} of run "
            f"{resumed_from.get('run_id')}: to do that again, add --resume "
            f"{resumed_from.get('path')}"
        )
    data = record.get("data")
    if isinstance(data, dict) and not loaded.sources["data"].startswith("--"):
        if data.get("sha256") != data_sha256:
            raise UserError(
                f"{data_name} is not the text that {run_id} was trained on ({data.get('name')}, "
                "another SHA-256): name that with --data FILE, or any other"
            )
    lineage = record.get("lineage")
    if start.bundle and isinstance(lineage, list) and lineage and isinstance(lineage[0], dict):
        parent = lineage[0]
        if not loaded.sources["init_from"].startswith("--"):
            if parent.get("weights_sha256") != start.bundle.state.files[WEIGHTS_FILE]:
                raise UserError(
                    f"{start.bundle.path} is not the model that {run_id} began with "
                    f"({parent.get('name')}, step {parent.get('step')}, another SHA-256): "
                    "name that with --init-from, or any other"
                )


def check_unchanged(start: ResumePlan) -> None:
    """Raise `UserError` where another process has trained the named model since we looked."""
    if _state_at(start.named_model) != start.replaced:
        raise UserError(f"{start.named_model} was changed by another process just now: try again")


def read_start_bundle(start: ResumePlan) -> Bundle | None:
    """The bundle with the bytes of its weights, and of its optimizer where that is needed.

    Raises `UserError` where a file is missing or damaged, or the bundle is another one by now.
    """
    if start.bundle is None:
        return None
    names = [WEIGHTS_FILE]
    if start.is_resume and not start.reset_optimizer:
        names.append(OPTIMIZER_FILE)
    bundle = read_bundle(start.bundle.path, *names)
    if bundle.state != start.bundle.state:
        raise UserError(f"{bundle.path} was changed by another process just now: try again")
    return bundle


@contextlib.contextmanager
def lock_named_model(named_model: Path | None) -> Iterator[None]:
    """Hold the lock of a named model. It is the operating system's, and dies with the process.

    Raises `UserError` where another process holds it, or the model's directory cannot be written.
    """
    if named_model is None:
        yield
        return
    real = named_model.resolve()  # whatever links lead there, the lock is one
    path = real.parent / f".{real.name}.lock"
    lock = FileLock(path)
    try:
        make_directory(real.parent)
        lock.acquire(blocking=False)
        make_directory(real)  # with the lock in hand, as is its removal
        if not os.access(real, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except Timeout:
        raise UserError(
            f"{named_model} is being trained by another process (which holds {path}): wait for "
            "it, or choose another --model-name"
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(
            f"{named_model} cannot be written: {error.strerror}; name another place with "
            "--checkpoints-dir"
        ) from None
    try:
        yield
    finally:
        remove_if_empty(real)  # if nothing was saved
        lock.release()


# ----------------------------------------------------------------------------------------------
# Which bundle


def get_model_name(bundle: Bundle) -> str:
    """What a model is called: its directory's name, the name it was trained under, or its run."""
    known = bundle.state.get_fact("model_name") or bundle.state.run_id
    return str(known) if find_run_of(bundle.path) and known else bundle.path.resolve().name


def _resolved(named_model: Path, checkpoints_dir: Path) -> Path:
    """The directory itself, where a name in `checkpoints_dir` is a link to another name in it."""
    real = named_model.resolve()
    return checkpoints_dir / real.name if real.parent == checkpoints_dir.resolve() else named_model


def _state_at(directory: Path | None) -> TrainingState | None:
    """The state of the bundle in `directory`; None where there is none, or a damaged one."""
    with contextlib.suppress(UserError):
        return read_state(directory) if directory is not None else None
    return None


def _newest_checkpoint(
    runs_dir: Path, tag: str | None = None, parent: Bundle | None = None
) -> Path | None:
    """The last checkpoint of the newest run that has one.

    Of those with this tag, or of the children of this parent, if there is one.
    """
    word = RunIDGenerator.sanitize(tag or "")
    for run in list_runs(runs_dir):
        for checkpoint in reversed(list_checkpoints(run)):
            state = _state_at(checkpoint)
            if state is None:  # damaged: the one before it will do
                continue
            has_tag = not word or RunIDGenerator.sanitize(state.get_fact("run_tag") or "") == word
            hashes = [ancestor.weights_sha256 for ancestor in state.lineage[:1]]
            if has_tag and (parent is None or hashes == [parent.state.files[WEIGHTS_FILE]]):
                return checkpoint
            break
    return None


def find_kept_checkpoint(start: ResumePlan, runs_dir: Path) -> Path:
    """Where what is resumed stays as it is: for a named model, in its run's checkpoint."""
    assert start.bundle is not None
    state = start.bundle.state
    checkpoint = RunDirectory(runs_dir / str(state.run_id)).get_checkpoint(state.step)
    return checkpoint if is_bundle(checkpoint) else start.bundle.path


def _checkpoint_meant(reference: str, runs_dir: Path, checkpoints_dir: Path) -> Path:
    """The bundle that `--resume` names: itself, or the last checkpoint of a run."""
    if reference == "last":
        runs = list_runs(runs_dir)
        if not runs:
            raise UserError(f"--resume last: no run in {runs_dir}")
        directory = runs[0]
    else:
        directory = find_directory(reference, runs_dir, checkpoints_dir)
    if is_bundle(directory):
        return directory
    if checkpoints := list_checkpoints(directory):
        return checkpoints[-1]
    if not is_run(directory):
        raise UserError(f"--resume {reference}: {directory} is neither a run nor a bundle")
    other = _newest_checkpoint(runs_dir)
    newest = "no other run has one"
    if other is not None:
        newest = (
            f"the newest that has one is {find_run_of(other)} (--resume auto finds it by itself)"
        )
    raise UserError(f"--resume {reference}: the run {directory} has no checkpoint; {newest}")


def _named_model_of(
    bundle: Bundle, named_model: Path | None, checkpoints_dir: Path, overwrite: bool
) -> Path | None:
    """The named model that a resumed run advances.

    That is the one asked for, or the one that the bundle is or its run trained.

    Raises `UserError` where that would take the model back, or put another in its place.
    """
    real = bundle.path.resolve()
    if named_model is None:
        name = bundle.state.get_fact("model_name")
        if real.parent == checkpoints_dir.resolve():
            named_model = checkpoints_dir / real.name
        elif (
            find_run_of(bundle.path) and isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)
        ):
            named_model = _resolved(checkpoints_dir / name, checkpoints_dir)
    if named_model is None or not is_bundle(named_model) or overwrite:
        return named_model
    if named_model.resolve() == real:
        return named_model
    try:
        there, here = read_state(named_model), bundle.state
    except UserError as error:
        raise UserError(f"{error}; --overwrite puts {bundle.path} in its place") from None
    previous = [(run["run_id"], run["step"]) for run in here.get_fact("previous_runs") or []]
    passed = [*previous, (here.run_id, here.step)]
    if not any(there.run_id == run_id and there.step <= step for run_id, step in passed):
        raise UserError(
            f"{named_model} is at step {there.step} of run {there.run_id}, and {bundle.path} "
            f"at step {here.step} of run {here.run_id}: go on with the former by --model-name "
            f"{named_model.name}, choose another --model-name, or add --overwrite"
        )
    return named_model
