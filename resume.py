"""The start of a run: scratch, a checkpoint to resume, or a parent model to fine-tune.

`plan_run` turns a command's flags into settings and a `ResumePlan`. It reads small files only,
writes nothing and does not import torch, so that a mistake is answered at once.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bundle import (
    BUNDLE_FILES,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    Ancestor,
    Bundle,
    TrainingState,
    find_directory,
    find_run_of,
    find_usable_bundle,
    is_bundle,
    is_run,
    list_checkpoints,
    list_runs,
    read_bundle,
    read_state,
)
from config import CheckpointSettings, ConfigLoader, LoadedConfig, Setting, upgrade_settings
from parameters import NAME_PATTERN, Architecture, ModelConfig
from utils.errors import NothingToDo, UserError
from utils.files import is_file, make_directory, remove_if_empty
from utils.output import pluralize
from utils.run_manager import RunDirectory


@dataclass(frozen=True)
class ResumePlan:
    """The start of a run, and the named model that it trains.

    Attributes:
        bundle: the checkpoint to resume (`is_resume`) or the parent to fine-tune; None: scratch.
        named_model: the directory of the named model to train, if it has a name.
        replaced: the state of the bundle that is in `named_model` now, if there is one.
        run_tag: the run's tag; a resumed run keeps that of its checkpoint.
    """

    bundle: Bundle | None = None
    is_resume: bool = False
    reset_optimizer: bool = False
    named_model: Path | None = None
    replaced: TrainingState | None = None
    run_tag: str | None = None

    @property
    def start_step(self) -> int:
        """Number of steps trained before this run."""
        return self.bundle.state.step if self.bundle and self.is_resume else 0

    @property
    def previous_runs(self) -> list[dict[str, Any]]:
        """The runs that this one continues, and the step at which each ended."""
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
        # In its run, the name that it was trained under; elsewhere, its directory's.
        name = state.get_fact("model_name") or state.run_id
        is_in_run = find_run_of(self.bundle.path) is not None
        parent = Ancestor(
            name=str(name) if name and is_in_run else self.bundle.path.resolve().name,
            step=state.step,
            weights_sha256=state.files[WEIGHTS_FILE],
            data_sha256=state.get_fact("data_sha256"),
            run_id=state.run_id,
        )
        return [parent, *state.lineage]

    @property
    def checkpoint_settings(self) -> CheckpointSettings | None:
        """The settings that the bundle brings, and which of them are fixed."""
        if self.bundle is None:
            return None
        config, state = self.bundle.config, self.bundle.state
        fixed = {name: getattr(config, name) for name in Architecture.model_fields}
        kind = self.bundle.tokenizer.get("token_kind")
        fixed |= {
            "tokenizer": kind,
            "vocab_size": self.bundle.vocab_size if kind == "bpe" else None,
        }
        if not self.is_resume:
            names = frozenset(fixed) - {"dropout"}
            return CheckpointSettings(str(self.bundle.path), fixed, names)
        fixed["batch_size"] = config.batch_size
        values = {**upgrade_settings(state.settings), **fixed}
        return CheckpointSettings(str(self.bundle.path), values, frozenset(fixed))


def plan_run(
    loader: ConfigLoader,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    reset_optimizer: bool = False,
) -> tuple[LoadedConfig, ResumePlan]:
    """Decide what a run starts from, and merge all its settings.

    `resume` is a run, a bundle, a named model, `last`, or `auto`. Raises `UserError` with a line
    for each problem.
    """
    plan, problems = ResumePlan(), []
    parent, source = loader.get("init_from")
    if resume not in (None, "auto") and parent and source == "--init-from":
        problems = ["--resume continues a model, --init-from creates one: use one of them"]
    else:
        try:
            plan = resolve_start(
                loader.get, resume=resume, overwrite=overwrite, reset_optimizer=reset_optimizer
            )
        except UserError as error:
            problems = list(error.problems)
    return loader.load(plan.checkpoint_settings, problems), plan


def plan_from_config(config: ModelConfig) -> ResumePlan:
    """Plan a run whose settings were made in Python and are complete.

    Raises `UserError` if there is a checkpoint whose settings would count.
    """
    plan = resolve_start(lambda name: Setting(getattr(config, name), "train()"))
    if plan.is_resume:
        raise UserError(
            f"{plan.named_model} exists, with settings of its own: use plan_run() of resume.py"
        )
    if saved := plan.checkpoint_settings:
        for name in saved.fixed:
            if getattr(config, name) != saved.values[name]:
                raise UserError(f"{name} differs from {saved.path}: use plan_run() of resume.py")
    return plan


# ----------------------------------------------------------------------------------------------
# resume x name x init_from x overwrite


def resolve_start(
    get: Callable[[str], Setting],
    *,
    resume: str | None = None,
    overwrite: bool = False,
    reset_optimizer: bool = False,
) -> ResumePlan:
    """Decide what a run starts from.

    `get(name)` returns a setting: model_name, init_from, run_tag, runs_dir, checkpoints_dir. M is
    the named model, P the parent (init_from), "new" stands for fine-tuning P, or for training from
    scratch without P:

        resume  M        P    overwrite  starts from
        ------  -------  ---  ---------  ------------------------------------------------
        none    no name  any  no         new
        none    no name  any  yes        error: --overwrite needs --model-name
        none    missing  any  any        new, creates M
        none    exists   no   no         resumes M
        none    exists   yes  no         error: M exists
        none    exists   any  yes        new, replaces M (error: P is M)
        auto    no name  any  no         newest checkpoint of this tag and P, else new
        auto    no name  any  yes        error: --overwrite needs --model-name
        auto    missing  any  any        new, creates M
        auto    exists   any  no         resumes M
        auto    exists   any  yes        new, replaces M (error: P is M)
        REF     no name  no   no         resumes REF
        REF     no name  no   yes        error: --overwrite needs --model-name
        REF     missing  no   any        resumes REF, creates M
        REF     exists   no   no         resumes REF; error if M is another training
        REF     exists   no   yes        resumes REF, replaces M

    Without a name, a resumed checkpoint's M is the named model that its run trained, if any.

    Raises:
        UserError: the combination is an error, a model is missing or damaged, or M is taken.
    """
    runs_dir, checkpoints_dir = Path(get("runs_dir").value), Path(get("checkpoints_dir").value)
    tag, (init_from, source) = get("run_tag").value, get("init_from")
    named_model = resolve_named_model(get("model_name").value, checkpoints_dir, overwrite)
    parent = None
    if init_from is not None and resume in (None, "auto"):
        parent_path = find_directory(init_from, runs_dir, checkpoints_dir)
        parent = read_bundle(find_usable_bundle(parent_path))
    kept_model = named_model if named_model and is_bundle(named_model) and not overwrite else None
    if kept_model and parent and resume is None:
        raise UserError(
            f"{kept_model} exists, and init_from {init_from} ({source}) creates a model: resume it "
            "without init_from or with --resume auto, replace it with --overwrite, or choose "
            "another --model-name"
        )
    if resume is None or (resume == "auto" and named_model is not None):
        checkpoint = kept_model
    elif resume == "auto":
        checkpoint = _find_newest_checkpoint(runs_dir, tag, parent)
    else:
        checkpoint = resolve_checkpoint(resume, runs_dir, checkpoints_dir)
    if checkpoint is not None:
        bundle = read_bundle(checkpoint)
        if bundle.state.optimizer_file is None and not reset_optimizer:
            raise UserError(
                f"{bundle.path}: an export, without optimizer state: resume a checkpoint, or add "
                "--reset-optimizer"
            )
        named_model = resolve_advanced_model(bundle, named_model, checkpoints_dir, overwrite)
        tag = tag or bundle.state.get_fact("run_tag")
    elif resume is None and reset_optimizer:
        raise UserError("--reset-optimizer: there is no checkpoint to resume")
    else:
        bundle = parent
    if overwrite and named_model is None:
        raise UserError("--overwrite needs --model-name, the model to replace")
    if checkpoint is None and bundle is not None and named_model is not None:
        if bundle.path.resolve() == named_model.resolve():
            raise UserError(f"{named_model}: cannot replace its own parent: choose another name")
    return ResumePlan(
        bundle,
        is_resume=checkpoint is not None,
        reset_optimizer=checkpoint is not None and reset_optimizer,
        named_model=named_model,
        replaced=_read_state_if_valid(named_model),
        run_tag=tag,
    )


def resolve_named_model(name: str | None, checkpoints_dir: Path, overwrite: bool) -> Path | None:
    """Return the directory of a named model, which may not exist yet.

    Raises `UserError` if it has files of a model, but no bundle.
    """
    if name is None:
        return None
    named_model = _follow_link(checkpoints_dir / name, checkpoints_dir)
    has_files = any(is_file(named_model / name) for name in BUNDLE_FILES)
    if has_files and not is_bundle(named_model) and not overwrite:
        raise UserError(
            f"{named_model}: has files of a model, but no training_state.json: restore that file, "
            "or replace the model with --overwrite"
        )
    return named_model


def resolve_checkpoint(resume: str, runs_dir: Path, checkpoints_dir: Path) -> Path:
    """Return the bundle that `--resume` names: itself, or the last checkpoint of a run."""
    if resume == "last":
        runs = list_runs(runs_dir)
        if not runs:
            raise UserError(f"--resume last: no run in {runs_dir}")
        directory = runs[0]
    else:
        directory = find_directory(resume, runs_dir, checkpoints_dir)
    if is_bundle(directory):
        return directory
    if checkpoints := list_checkpoints(directory):
        return checkpoints[-1]
    if not is_run(directory):
        raise UserError(f"--resume {resume}: {directory} is neither a run nor a bundle")
    other = _find_newest_checkpoint(runs_dir)
    hint = "neither has any other run"
    if other is not None:
        hint = f"the newest run that has one is {find_run_of(other)} (--resume auto finds it)"
    raise UserError(f"--resume {resume}: the run {directory} has no checkpoint; {hint}")


def resolve_advanced_model(
    bundle: Bundle, named_model: Path | None, checkpoints_dir: Path, overwrite: bool
) -> Path | None:
    """Return the named model that a resumed run advances.

    It is the requested one, or the one that the bundle is or that its run trained.

    Raises `UserError` if that would move the model back, or replace another training.
    """
    real = bundle.path.resolve()
    if named_model is None:
        name = bundle.state.get_fact("model_name")
        if real.parent == checkpoints_dir.resolve():
            named_model = checkpoints_dir / real.name
        elif (
            find_run_of(bundle.path) and isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)
        ):
            named_model = _follow_link(checkpoints_dir / name, checkpoints_dir)
    if named_model is None or overwrite or not is_bundle(named_model):
        return named_model
    if named_model.resolve() == real:
        return named_model
    try:
        there, here = read_state(named_model), bundle.state
    except UserError as error:
        raise UserError(f"{error}; --overwrite replaces it by {bundle.path}") from None
    previous = [(run["run_id"], run["step"]) for run in here.get_fact("previous_runs") or []]
    passed = [*previous, (here.run_id, here.step)]
    if not any(there.run_id == run_id and there.step <= step for run_id, step in passed):
        raise UserError(
            f"{named_model} is at step {there.step} of run {there.run_id}, but {bundle.path} is at "
            f"step {here.step} of run {here.run_id}: resume the named model with --model-name "
            f"{named_model.name}, choose another --model-name, or add --overwrite"
        )
    return named_model


def find_kept_checkpoint(plan: ResumePlan, runs_dir: Path) -> Path:
    """Return a copy of the resumed bundle that stays: of a named model, its run's checkpoint."""
    assert plan.bundle is not None
    state = plan.bundle.state
    checkpoint = RunDirectory(runs_dir / str(state.run_id)).get_checkpoint(state.step)
    return checkpoint if is_bundle(checkpoint) else plan.bundle.path


def _follow_link(named_model: Path, checkpoints_dir: Path) -> Path:
    """Resolve a name that is a link to another name in `checkpoints_dir`."""
    real = named_model.resolve()
    return checkpoints_dir / real.name if real.parent == checkpoints_dir.resolve() else named_model


def _read_state_if_valid(directory: Path | None) -> TrainingState | None:
    with contextlib.suppress(UserError):
        return read_state(directory) if directory is not None else None
    return None


def _find_newest_checkpoint(
    runs_dir: Path, tag: str | None = None, parent: Bundle | None = None
) -> Path | None:
    """Return the last valid checkpoint of the newest run that has one.

    Only runs with this tag, and children of this parent, count, if these are given.
    """
    for run in list_runs(runs_dir):
        for checkpoint in reversed(list_checkpoints(run)):
            state = _read_state_if_valid(checkpoint)
            if state is None:
                continue
            has_tag = not tag or state.get_fact("run_tag") == tag
            hashes = [ancestor.weights_sha256 for ancestor in state.lineage[:1]]
            if has_tag and (parent is None or hashes == [parent.state.files[WEIGHTS_FILE]]):
                return checkpoint
            break
    return None


# ----------------------------------------------------------------------------------------------
# Checks that need the loaded text, and locks


def check_steps_left(config: ModelConfig, plan: ResumePlan) -> None:
    """Raise `NothingToDo` if a resumed model has been trained for `max_iters` steps already."""
    if plan.is_resume and config.max_iters is not None and config.max_iters <= plan.start_step:
        raise NothingToDo(
            f"{plan.bundle.path} is at step {plan.start_step} already, and max_iters is "
            f"{config.max_iters}: nothing to do; --max-iters N trains up to step N"
        )


def check_not_stopped_early(config: ModelConfig, plan: ResumePlan) -> None:
    """Raise `NothingToDo` if early stopping has ended the training of a resumed model."""
    if plan.is_resume and is_stopped_early(plan.bundle.state, config):
        evaluations = plan.bundle.state.get_fact("evaluations_since_best")
        raise NothingToDo(
            f"{plan.bundle.path} was stopped early, after {pluralize(evaluations, 'evaluation')} "
            "without a better val loss: nothing to do; raise --early-stopping-patience (0: never "
            "stop early)"
        )


def is_stopped_early(state: TrainingState, config: ModelConfig) -> bool:
    """Return whether the patience of early stopping is used up."""
    since_best = state.get_fact("evaluations_since_best") or 0
    return 0 < config.early_stopping_patience <= since_best


def check_rerun(loaded: LoadedConfig, plan: ResumePlan, data_name: str, data_sha256: str) -> None:
    """Check that a rerun from a run's record has the same text and the same parent.

    Raises `UserError` if it has not, or if the recorded run was resumed from a checkpoint.
    """
    record = loaded.rerun_of
    if record is None or plan.is_resume:
        return
    run_id = record.get("run_id")
    if isinstance(resumed_from := record.get("resumed_from"), dict):
        raise UserError(
            f"{run_id} was resumed from step {resumed_from.get('step')} of run "
            f"{resumed_from.get('run_id')}: to repeat that, add --resume {resumed_from.get('path')}"
        )
    inputs = [("--data", data_name, data_sha256, record.get("data"), "sha256")]
    if plan.bundle is not None and isinstance(record.get("lineage"), list):
        sha256, parent = plan.bundle.state.files[WEIGHTS_FILE], [*record["lineage"], None][0]
        inputs.append(("--init-from", plan.bundle.path, sha256, parent, "weights_sha256"))
    for flag, name, sha256, recorded, key in inputs:
        is_flag = loaded.sources[flag[2:].replace("-", "_")].startswith("--")
        if isinstance(recorded, dict) and recorded.get(key) != sha256 and not is_flag:
            raise UserError(
                f"{name} differs from what {run_id} used ({recorded.get('name')}"
                f"{f', step {step}' if (step := recorded.get('step')) else ''}; another SHA-256): "
                f"pass that one, or any other, with {flag}"
            )


def check_unchanged(plan: ResumePlan) -> None:
    """Raise `UserError` if another process has trained the named model since it was planned."""
    if _read_state_if_valid(plan.named_model) != plan.replaced:
        raise UserError(f"{plan.named_model} was just changed by another process: try again")


def read_start_bundle(plan: ResumePlan) -> Bundle | None:
    """Read the bundle again, with the bytes of its weights and, if needed, of its optimizer.

    Raises `UserError` if a file is missing or damaged, or if the bundle has changed.
    """
    if plan.bundle is None:
        return None
    names = [WEIGHTS_FILE]
    if plan.is_resume and not plan.reset_optimizer:
        names.append(OPTIMIZER_FILE)
    bundle = read_bundle(plan.bundle.path, *names)
    if bundle.state != plan.bundle.state:
        raise UserError(f"{bundle.path} was just changed by another process: try again")
    return bundle


@contextlib.contextmanager
def lock_named_model(named_model: Path | None) -> Iterator[None]:
    """Hold a named model's lock: the operating system's, which is released with the process.

    Raises `UserError` if another process holds it, or if the directory cannot be written.
    """
    if named_model is None:
        yield
        return
    real = named_model.resolve()  # one lock for a model, whatever links lead to it
    path = real.parent / f".{real.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            make_directory(real.parent)
            stack.enter_context(FileLock(path).acquire(blocking=False))
            make_directory(real)
            stack.callback(remove_if_empty, real)  # if nothing was saved; still under the lock
            if not os.access(real, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except Timeout:
            raise UserError(
                f"{named_model} is being trained by another process (which holds {path}): wait "
                "for it, or choose another --model-name"
            ) from None
        except OSError as error:
            raise UserError(
                f"{named_model} cannot be written: {error.strerror}; choose another place with "
                "--checkpoints-dir"
            ) from None
        yield
