"""What a run begins with: new weights, a bundle to go on with, or a parent to fine-tune.

`plan` turns a command's flags into settings and a `Start`. It reads small files alone, writes
nothing and needs no torch, so that a mistake is answered at once.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bundle import (
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    Ancestor,
    Bundle,
    TrainingState,
    checkpoints_in,
    find_directory,
    is_bundle,
    read_bundle,
    read_state,
    run_of,
    runs_in,
    usable_bundle,
)
from config import ConfigLoader, LoadedConfig, SavedSettings
from parameters import NAME_PATTERN, Architecture, ModelConfig
from utils.errors import NothingToDo, UserError
from utils.files import make_directory
from utils.run_manager import RunIDGenerator


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    `bundle` is what it goes on with (`is_resume`) or is fine-tuned from; without one, the weights
    are new. `named_model` is the directory of the model that the run trains, if it has a name, and
    `replaced` the state of the bundle that is there now.
    """

    bundle: Bundle | None = None
    is_resume: bool = False
    reset_optimizer: bool = False
    named_model: Path | None = None
    replaced: TrainingState | None = None

    @property
    def step(self) -> int:
        """The updates that were made before this run."""
        return self.bundle.state.step if self.bundle and self.is_resume else 0

    @property
    def lineage(self) -> list[Ancestor]:
        """The models that this one descends from, its parent first."""
        if self.bundle is None:
            return []
        state = self.bundle.state
        if self.is_resume:
            return state.lineage
        parent = Ancestor(
            name=model_name_of(self.bundle),
            step=state.step,
            weights_sha256=state.files[WEIGHTS_FILE],
            data_sha256=state.fact("data_sha256"),
            run_id=state.run_id,
        )
        return [parent, *state.lineage]

    @property
    def continued_run(self) -> Path | None:
        """The directory of the run whose checkpoint this one goes on with."""
        return run_of(self.bundle.path) if self.bundle and self.is_resume else None

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
        return SavedSettings(str(self.bundle.path), {**state.settings, **fixed}, frozenset(fixed))


def plan(
    flags: Mapping[str, Any] | None = None,
    config_file: str | None = None,
    problems: Sequence[str] = (),
    *,
    resume: str | None = None,
    overwrite: bool = False,
    reset_optimizer: bool = False,
    loader: ConfigLoader | None = None,
) -> tuple[LoadedConfig, Start]:
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
    start, more_problems = Start(), []
    if resume is not None and resume != "auto" and flags.get("init_from"):
        more_problems.append("--resume goes on with a model, --init-from begins one: choose one")
    else:
        try:
            start = choose_start(
                layers.setting, resume=resume, overwrite=overwrite, reset_optimizer=reset_optimizer
            )
        except UserError as error:
            more_problems += error.problems
    return layers.merged(start.saved_settings, more_problems), start


def choose_start(
    setting: Callable[[str], Any],
    *,
    resume: str | None = None,
    overwrite: bool = False,
    reset_optimizer: bool = False,
) -> Start:
    """What a run with these settings begins with.

    `setting(name)` gives the settings that say where to look: `model_name`, `init_from` and so on.

    Raises:
        UserError: there is no such model, it is damaged, or its name is taken.
    """
    runs_dir, checkpoints_dir = Path(setting("runs_dir")), Path(setting("checkpoints_dir"))
    name, init_from = setting("model_name"), setting("init_from")
    named_model = checkpoints_dir / name if name is not None else None
    exists = named_model is not None and is_bundle(named_model)

    directory = None
    if resume == "auto":
        if named_model is None:
            directory = _newest_checkpoint(runs_dir, setting("run_tag"))
        elif exists and not overwrite:
            directory = named_model
    elif resume is not None:
        directory = _checkpoint_meant(resume, runs_dir, checkpoints_dir)
    elif exists and not overwrite:
        directory = named_model
        if init_from is not None:
            raise UserError(
                f"{named_model} exists already: go on with it without --init-from, begin it anew "
                "with --overwrite, or choose another --model-name"
            )
    if directory is not None:
        bundle = read_bundle(directory)
        if bundle.state.optimizer_file is None and not reset_optimizer:
            raise UserError(
                f"{directory}: an export, without optimizer state to go on with: resume a "
                "checkpoint, or add --reset-optimizer"
            )
        named_model = _named_model_of(bundle, named_model, checkpoints_dir, overwrite)
        return Start(bundle, True, reset_optimizer, named_model, _state_at(named_model))

    if resume is None and reset_optimizer:
        raise UserError("--reset-optimizer: there is nothing to resume, and so nothing to reset")
    if overwrite and named_model is None:
        raise UserError("--overwrite needs --model-name, the model to begin anew")
    bundle = None
    if init_from is not None:
        parent = find_directory(init_from, runs_dir, checkpoints_dir)
        bundle = read_bundle(usable_bundle(parent))
    return Start(bundle, named_model=named_model, replaced=_state_at(named_model))


def _state_at(directory: Path | None) -> TrainingState | None:
    """The state of the bundle in `directory`; None where there is none, or a damaged one."""
    with contextlib.suppress(UserError):
        return read_state(directory) if directory is not None else None
    return None


def start_of(config: ModelConfig) -> Start:
    """What a run begins with whose settings were made in Python and are complete.

    Raises `UserError` where the settings of a model that is there have a say, and it differs.
    """
    start = choose_start(lambda name: getattr(config, name))
    if saved := start.saved_settings:
        if any(getattr(config, name) != saved.values[name] for name in saved.binding):
            raise UserError(
                f"not the architecture of {saved.origin}: plan() in start.py settles it"
            )
    return start


def check_steps_left(config: ModelConfig, start: Start) -> None:
    """Raise `NothingToDo` where a resumed model has had all its steps."""
    if start.is_resume and config.max_iters is not None and config.max_iters <= start.step:
        raise NothingToDo(
            f"{start.bundle.path} is at step {start.step} already, and max_iters is "
            f"{config.max_iters}: nothing to do; --max-iters N goes on to step N"
        )


def check_unchanged(start: Start) -> None:
    """Raise `UserError` where another process has trained the named model since we looked."""
    if _state_at(start.named_model) != start.replaced:
        raise UserError(f"{start.named_model} was changed by another process just now: try again")


def read_contents(start: Start) -> Bundle:
    """The bundle with the bytes of its weights, and of its optimizer where that is needed.

    Raises `UserError` where a file is missing or damaged, or the bundle is another one by now.
    """
    assert start.bundle is not None
    names = [WEIGHTS_FILE]
    if start.is_resume and not start.reset_optimizer:
        names.append(OPTIMIZER_FILE)
    bundle = read_bundle(start.bundle.path, *names)
    if bundle.state != start.bundle.state:
        raise UserError(f"{bundle.path} was changed by another process just now: try again")
    return bundle


# ----------------------------------------------------------------------------------------------
# Which bundle


def model_name_of(bundle: Bundle) -> str:
    """What a model is called: its directory's name, the name it was trained under, or its run."""
    known = bundle.state.fact("model_name") or bundle.state.run_id
    return str(known) if run_of(bundle.path) and known else bundle.path.resolve().name


def _newest_checkpoint(runs_dir: Path, tag: str | None = None) -> Path | None:
    """The last checkpoint of the newest run that has one; of those with this tag, if one is set."""
    word = RunIDGenerator.sanitised(tag or "")
    for run in runs_in(runs_dir):
        fits = not word or re.fullmatch(rf"{re.escape(word)}(_\d+)?", run.name[16:])
        checkpoints = checkpoints_in(run) if fits else []
        if checkpoints:
            return checkpoints[-1]
    return None


def _checkpoint_meant(reference: str, runs_dir: Path, checkpoints_dir: Path) -> Path:
    """The bundle that `--resume` names: itself, or the last checkpoint of a run."""
    if reference == "last":
        runs = runs_in(runs_dir)
        if not runs:
            raise UserError(f"--resume last: no run in {runs_dir}")
        directory = runs[0]
    else:
        directory = find_directory(reference, runs_dir, checkpoints_dir)
    if is_bundle(directory):
        return directory
    if checkpoints := checkpoints_in(directory):
        return checkpoints[-1]
    if not (directory / "artifacts").is_dir():
        raise UserError(f"--resume {reference}: {directory} is neither a run nor a bundle")
    other = _newest_checkpoint(runs_dir)
    newest = f"the newest that has one is {run_of(other)}" if other else "no other run has one"
    raise UserError(f"--resume {reference}: the run {directory} has no checkpoint; {newest}")


def _named_model_of(
    bundle: Bundle, named_model: Path | None, checkpoints_dir: Path, overwrite: bool
) -> Path | None:
    """The named model that a resumed run advances.

    That is the one asked for, or the one that the bundle is or its run trained.
    """
    if named_model is None:
        name = bundle.state.fact("model_name")
        if bundle.path.resolve().parent == checkpoints_dir.resolve():
            named_model = bundle.path
        elif run_of(bundle.path) and isinstance(name, str) and re.fullmatch(NAME_PATTERN, name):
            named_model = checkpoints_dir / name
    if named_model is None or not is_bundle(named_model) or overwrite:
        return named_model
    if named_model.resolve() != bundle.path.resolve():
        there, here = read_state(named_model), bundle.state
        if there.run_id != here.run_id or there.step > here.step:
            raise UserError(
                f"{named_model} is at step {there.step} of run {there.run_id}, and {bundle.path} "
                f"at step {here.step} of run {here.run_id}: go on with the former by --model-name "
                f"{named_model.name}, choose another --model-name, or add --overwrite"
            )
    return named_model


@contextlib.contextmanager
def name_locked(named_model: Path | None) -> Iterator[None]:
    """Hold the lock of a named model. It is the operating system's, and dies with the process.

    Raises `UserError` where another process holds it, or the directory cannot be written.
    """
    if named_model is None:
        yield
        return
    path = named_model.parent / f".{named_model.name}.lock"
    try:
        make_directory(named_model.parent)
        lock = FileLock(path)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{named_model} is being trained by another process (which holds {path}): wait for "
            "it, or choose another --model-name"
        ) from None
    except OSError as error:
        raise UserError(f"cannot lock {named_model}: {path}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
