"""The bundle: one directory with a model and all that is needed to use it or to go on with it.

    config.json           the architecture, which never changes
    model.safetensors     the weights
    tokenizer.json        text to ids and back
    training_state.json   which step this is, how good, where it came from, and each file's SHA-256
    optimizer.pt          the optimizer's and the random generators' state; an export has none

A run's checkpoints, its export and a named model are all bundles. Nothing here needs torch.

A bundle is published as a whole. The new files are written into `.tmp-PID-HOST/` in its directory;
renaming that to `.next-PID-HOST/` is the commit; then they move up, `training_state.json` last.
Whoever reads takes the files that have not moved up yet from there, so that a process may be
killed at any instruction, and the directory is the old bundle or the new one. Other files in it are
left alone. What a killed process leaves behind is finished or removed by the next save.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from parameters import GROUPS, Architecture, Count, ModelConfig
from utils.errors import UserError
from utils.files import (
    copy_durable,
    glob_files,
    is_directory,
    is_file,
    is_process_running,
    make_directory,
    move,
    move_if_exists,
    remove_file,
    remove_if_empty,
    sync,
    write_durable,
    write_with,
)

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "training_state.json"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)  # what every bundle has beside its state
BUNDLE_FILES = (*MODEL_FILES, OPTIMIZER_FILE, STATE_FILE)

# Recorded in config.json beside the architecture; neither of them fixes the network's shape.
_ALSO_RECORDED = ("batch_size", "device")
# What config.json did not have at first, and no model of that time needs.
_ADDED_LATER = {"rope_theta"}
# `training_config` has the settings that may change from one resume to the next. config.json and
# tokenizer.json have the others; a run's name and place are its own, and so is its device.
_RECORDED_ELSEWHERE = ("architecture", "beginning", "run")
TRAINING_SETTINGS = tuple(
    name
    for group, settings in GROUPS.items()
    for name in settings.model_fields
    if group not in _RECORDED_ELSEWHERE and name not in (*_ALSO_RECORDED, "tokenizer")
)
# What else stands in `training_config`: facts about the training, and no settings.
TRAINING_FACTS = (
    "start_step",  # of the run that saved this
    "previous_runs",  # those that this one goes on with: run_id and step, the first one first
    "best_step",
    "evaluations_since_best",
    "data_sha256",
    "computed_in",  # the precision in effect
    "compiled_by",  # torch.compile's backend in effect, or off
    "processes",  # how many trained it side by side
    "model_name",
    "run_tag",
    "state_sha256",
)


_CHECKPOINT = re.compile(r"step_[0-9]{8,}")
_OURS = re.compile(r"\.(?:tmp|next)-(?P<process>[0-9]+)-(?P<host>.*)")
_T = TypeVar("_T")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Ancestor(_Strict):
    """A model that another one was fine-tuned from, as it was then."""

    name: str
    step: Count
    weights_sha256: str
    data_sha256: str | None
    run_id: str | None


class TrainingState(_Strict):
    """`training_state.json`. Losses are means in nats per token.

    `val_loss` is that of this very step, and None where it was not measured there.
    """

    format_version: Literal[1] = FORMAT_VERSION
    step: Count
    optimizer_file: Literal["optimizer.pt"] | None
    best_val_loss: float | None
    val_loss: float | None
    run_id: str | None
    lineage: list[Ancestor]
    files: dict[str, str] = {}
    training_config: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in `training_config`."""
        return {k: v for k, v in self.training_config.items() if k not in TRAINING_FACTS}

    def get_fact(self, name: str) -> Any:
        """One of `TRAINING_FACTS`; None where it is not known."""
        return self.training_config.get(name)


class NoModelError(UserError):
    """A run that has saved no model yet."""


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked.

    Of `config`, the architecture and `batch_size` are the model's; the rest are mere defaults.
    `contents` has the bytes of the larger files that were asked for: what was checked is what is
    used, whatever another process may publish meanwhile.
    """

    path: Path
    config: ModelConfig
    vocab_size: int
    device: str
    tokenizer: dict[str, Any]
    state: TrainingState
    contents: dict[str, bytes] = field(default_factory=dict, repr=False)


# ----------------------------------------------------------------------------------------------
# Writing


def write_bundle(
    directory: Path,
    *,
    config: ModelConfig,
    vocab_size: int,
    device: str,
    tokenizer: Mapping[str, Any],
    state: TrainingState,
    save_weights: Callable[[Path], None],
    save_optimizer: Callable[[Path], None],
) -> None:
    """Publish a bundle in `directory`, in the place of the one that may be there.

    `save_weights(path)` and `save_optimizer(path)` write those files. `state.files` and
    `state.optimizer_file` are filled in here.

    Raises what the writers and the system raise; what stood in `directory` is untouched then.
    """
    architecture = {name: getattr(config, name) for name in Architecture.model_fields}
    recorded = {"batch_size": config.batch_size, "vocab_size": vocab_size, "device": device}
    with _publication(directory) as building:
        _write_json(building / CONFIG_FILE, {**architecture, **recorded})
        _write_json(building / TOKENIZER_FILE, tokenizer)
        for name, save in ((WEIGHTS_FILE, save_weights), (OPTIMIZER_FILE, save_optimizer)):
            write_with(building / name, save, like=building / CONFIG_FILE)
        files = {name: _sha256(building / name) for name in (*MODEL_FILES, OPTIMIZER_FILE)}
        _write_state(building, state, files)


def copy_bundle(source: Path, target: Path, *, with_optimizer: bool = True) -> None:
    """Publish in `target` what stands in `source`; without the optimizer's state, as an export.

    Raises `UserError` where a file of `source` is missing, damaged, or replaced meanwhile.
    """
    state = read_state(source)
    dropped = () if with_optimizer else (OPTIMIZER_FILE,)
    files = {name: digest for name, digest in state.files.items() if name not in dropped}
    with _publication(target) as building:
        for name, digest in files.items():
            try:
                copied = copy_durable(_located(source, name), building / name)
            except FileNotFoundError:
                copied = None
            if copied != digest:
                raise UserError(f"{source / name}: missing, or not the file that was saved there")
        _write_state(building, state, files)


def _write_state(building: Path, state: TrainingState, files: dict[str, str]) -> None:
    optimizer_file = OPTIMIZER_FILE if OPTIMIZER_FILE in files else None
    update = {"files": files, "optimizer_file": optimizer_file}
    content = state.model_copy(update=update).model_dump()
    content["training_config"]["state_sha256"] = compute_state_digest(content)
    _write_json(building / STATE_FILE, content)


def compute_state_digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of `training_state.json` itself: of its values, but for this one."""
    training = {k: v for k, v in content["training_config"].items() if k != "state_sha256"}
    values = {**content, "training_config": training, "format_version": FORMAT_VERSION}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2) + "\n"
    write_durable(path, text.encode("utf-8"))


@contextlib.contextmanager
def _publication(directory: Path) -> Iterator[Path]:
    """Yield a directory to fill; when the block ends, its files become those of `directory`.

    Where anything raises before the commit, `directory` is as it was.
    """
    is_new = not directory.exists()
    make_directory(directory)
    for committed in _committed(directory):
        with contextlib.suppress(UserError):  # damaged since: it goes the way of the old bundle
            _finish(directory, committed)
        _remove_files(committed)
    clean_up(directory)
    building = directory / f".tmp-{_this_process()}"
    committed = directory / f".next-{_this_process()}"
    try:
        make_directory(building)
        yield building
        sync(building)
        move(building, committed)
    except BaseException:
        _remove_building(building)
        if is_new:
            remove_if_empty(directory)
        raise
    _finish(directory, committed)


def _committed(directory: Path) -> list[Path]:
    """The `.next-PID-HOST/` in a bundle's directory: one at most, unless somebody made another."""
    return [path for path in glob_files(directory, ".next-*") if _OURS.fullmatch(path.name)]


def _finish(directory: Path, committed: Path) -> None:
    """Move the files that are committed to where they belong.

    Another process may be at it, too: whichever comes first moves a file.

    Raises `UserError` where the committed state is damaged.
    """
    content = None
    if is_file(committed / STATE_FILE):  # the last to move: else all have
        with contextlib.suppress(FileNotFoundError):
            content = (committed / STATE_FILE).read_bytes()
    if content is not None:
        files = _parsed_state(committed / STATE_FILE, content).files
        sync(directory)  # the commit must be on the disk before the old bundle changes
        for name in (*MODEL_FILES, OPTIMIZER_FILE):
            if name in files:
                move_if_exists(committed / name, directory / name)
            else:
                remove_file(directory / name)
        sync(directory)  # and all others before the state, without which the rest says nothing
        move_if_exists(committed / STATE_FILE, directory / STATE_FILE)
    remove_if_empty(committed)


def _remove_files(directory: Path) -> None:
    """Remove a bundle's files from one of our own directories, and the directory with them."""
    for name in BUNDLE_FILES:
        remove_file(directory / name)
    remove_if_empty(directory)


def _remove_building(directory: Path) -> None:
    """Remove a `.tmp-PID-HOST/` and what was begun in it.

    safetensors writes to a temporary file of its own, which a kill leaves beside the others.
    """
    for path in glob_files(directory, ".tmp??????"):
        remove_file(path)
    _remove_files(directory)


def remove_bundle(directory: Path) -> None:
    """Remove a bundle; files of others stay, and so the directory then."""
    removed = directory / ".removed"
    places = [*_committed(directory), directory]
    for place in places:
        move_if_exists(place / STATE_FILE, removed)  # from here on, this is no bundle
    for place in places:
        _remove_files(place)
    remove_file(removed)
    remove_if_empty(directory)


def clean_up(directory: Path) -> None:
    """Finish or remove what processes that are no more have begun where a bundle is.

    What living processes are doing there is left alone, and so are files of others.
    """
    for path in glob_files(directory, ".tmp-*"):
        if _is_abandoned(path):
            _remove_building(path)
    for path in _committed(directory):
        if _is_abandoned(path):
            # Damaged, or another user's: for a person to look at. Or removed by now.
            with contextlib.suppress(UserError, OSError):
                _finish(directory, path)
    if is_file(directory / ".removed") and not is_bundle(directory):
        remove_bundle(directory)
    remove_if_empty(directory)


def _this_process() -> str:
    return f"{os.getpid()}-{_host()}"


def _host() -> str:
    """What process numbers are told apart in: this machine, or the container on it."""
    namespace = ""
    with contextlib.suppress(OSError):  # Linux alone has it
        namespace = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    return f"{platform.node()}-{namespace}"


def _is_abandoned(temporary: Path) -> bool:
    """Whether the process that made a `.tmp-PID-HOST/` or `.next-PID-HOST/` is no more.

    Of another machine's processes nobody can tell; a day without a sign is enough.
    """
    ours = _OURS.fullmatch(temporary.name)
    if ours is None:
        return False
    if ours["host"] == _host():
        return int(ours["process"]) == os.getpid() or not is_process_running(int(ours["process"]))
    with contextlib.suppress(OSError):
        return time.time() - temporary.stat().st_mtime > 86_400
    return False


# ----------------------------------------------------------------------------------------------
# Reading


def read_bundle(directory: Path, *names: str) -> Bundle:
    """Read a bundle, and check that its files are those that were saved together.

    Of the larger files, `model.safetensors` and `optimizer.pt`, the `names` are read too.

    Raises `UserError` that names the file that is missing, changed, damaged or too new.
    """
    return _undisturbed(directory, lambda: _read(directory, names))


def read_state(directory: Path) -> TrainingState:
    """Read `training_state.json` alone. Raises `UserError` where it is none that we know."""
    return _undisturbed(directory, lambda: _read_state(directory))


def _undisturbed(directory: Path, read: Callable[[], _T]) -> _T:
    """Read, and once more where another process has published meanwhile.

    Only what stays as it is can be at fault.
    """
    while True:
        before = _glance(directory)
        try:
            return read()
        except (UserError, FileNotFoundError):
            if _glance(directory) == before:
                raise


def _glance(directory: Path) -> Any:
    """What changes whenever a bundle is being published."""
    found = []
    for place in (directory, *_committed(directory)):
        for name in BUNDLE_FILES:
            with contextlib.suppress(OSError):
                stat = (place / name).stat()
                found.append((str(place / name), stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return found


def _read(directory: Path, names: tuple[str, ...]) -> Bundle:
    state = _read_state(directory)
    for name in {**dict.fromkeys(MODEL_FILES), **dict.fromkeys(names)}:
        if not is_file(_located(directory, name)):
            raise UserError(
                f"{directory / name}: not there: the model is incomplete{_remedy(name)}"
            )
    contents = {name: _checked(directory, name, state) for name in names}
    values = _parsed(directory / CONFIG_FILE, _checked(directory, CONFIG_FILE, state))
    tokenizer = _parsed(directory / TOKENIZER_FILE, _checked(directory, TOKENIZER_FILE, state))
    vocab_size = values.pop("vocab_size", None)
    known = {*Architecture.model_fields, *_ALSO_RECORDED}
    missing = known - values.keys()
    if not isinstance(vocab_size, int) or values.keys() - known or missing - _ADDED_LATER:
        raise UserError(f"{directory / CONFIG_FILE}: not the architecture of a Folio model")
    device = values.pop("device")  # recorded, never binding: a model loads on any
    try:
        config = ModelConfig(**values)
    except ValidationError as error:
        raise UserError(f"{directory / CONFIG_FILE}: {_first_problem(error)}") from None
    return Bundle(directory, config, vocab_size, str(device), tokenizer, state, contents)


def _read_state(directory: Path) -> TrainingState:
    if not is_directory(directory):
        raise UserError(f"{directory}: no such model directory")
    try:
        content = _located(directory, STATE_FILE).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{directory}: not a Folio model: {STATE_FILE} is not there") from None
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{directory / STATE_FILE}: cannot be read: {reason}") from None
    return _parsed_state(directory / STATE_FILE, content)


def _parsed_state(path: Path, content: bytes) -> TrainingState:
    """What `training_state.json` says, checked. Raises `UserError` that names `path`."""
    values = _parsed(path, content)
    try:
        state = TrainingState(format_version=FORMAT_VERSION, **values)
    except ValidationError as error:
        problem = _first_problem(error)
        raise UserError(f"{path}: not the state of a Folio model: {problem}") from None
    if state.get_fact("state_sha256") != compute_state_digest(values):
        raise UserError(f"{path}: damaged, or changed by hand: it is not as it was saved")
    if not set(MODEL_FILES) <= state.files.keys() <= set(BUNDLE_FILES):
        raise UserError(f"{path}: does not record the files of a Folio model")
    return state


def _located(directory: Path, name: str) -> Path:
    """Where a file of the bundle is: among the committed ones, if it has not moved up yet."""
    for committed in _committed(directory):
        if is_file(committed / STATE_FILE) and is_file(committed / name):
            return committed / name
    return directory / name


def _checked(directory: Path, name: str, state: TrainingState) -> bytes:
    """A file's content, compared with the SHA-256 that was recorded when all were written."""
    try:
        content = _located(directory, name).read_bytes()
    except OSError as error:
        raise UserError(f"{directory / name}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != state.files.get(name):
        raise UserError(
            f"{directory / name}: not the file that was saved with this model: it was changed, "
            f"damaged, or comes from another one{_remedy(name)}"
        )
    return content


def _remedy(name: str) -> str:
    if name == OPTIMIZER_FILE:
        return "; --reset-optimizer goes on with a new optimizer"
    return "; take another checkpoint, or a copy"


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    """The object in a JSON file, without its `format_version`, which must be one that we read."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: damaged: not a JSON object")
    version = values.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "update Folio" if newer else "not a file that Folio wrote"
        raise UserError(
            f"{path}: format_version {version!r}, and this Folio reads {FORMAT_VERSION}: {remedy}"
        )
    return values


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------
# Telling


def get_model_info(
    reference: str | Path, *, checkpoints_dir: str = "checkpoints", runs_dir: str = "runs"
) -> dict[str, Any]:
    """All that a bundle says of its model, without its weights: what `inspect_model.py` shows.

    `reference` is a named model's name, a run's id, or a path. The dict has `path`, `config`,
    `tokenizer`, `parameters` (`reduce_norm`, and by part), `bytes`, `saved` (seconds since 1970), and
    `training_state`, as in
    `info["training_state"]["training_config"]["learning_rate"]`.

    Raises `UserError` where there is no such model, or it is damaged.
    """
    found = find_directory(str(reference), Path(runs_dir), Path(checkpoints_dir))
    directory = find_usable_bundle(found)
    return _undisturbed(directory, lambda: _model_info(directory))


def _model_info(directory: Path) -> dict[str, Any]:
    bundle = _read(directory, ())
    state = bundle.state
    architecture = {name: getattr(bundle.config, name) for name in Architecture.model_fields}
    recorded = {"batch_size": bundle.config.batch_size, "vocab_size": bundle.vocab_size}
    files = [_located(directory, name) for name in state.files]
    return {
        "path": str(directory),
        "config": {**architecture, **recorded, "device": bundle.device},
        "tokenizer": bundle.tokenizer,
        "parameters": _count_parameters(directory),
        "bytes": sum(path.stat().st_size for path in files if is_file(path)),
        "saved": _located(directory, STATE_FILE).stat().st_mtime,
        "training_state": state.model_dump(),
    }


def check_files(directory: Path) -> None:
    """Compare every file of a bundle with its SHA-256. Raises `UserError` that names the file."""
    _undisturbed(directory, lambda: _check_files(directory))


def _check_files(directory: Path) -> None:
    state = _read(directory, ()).state
    for name, digest in state.files.items():
        path = _located(directory, name)
        if not is_file(path) or _sha256(path) != digest:
            raise UserError(
                f"{directory / name}: missing, or not the file that was saved with this model"
                f"{_remedy(name)}"
            )


def _count_parameters(directory: Path) -> dict[str, int]:
    """How many numbers are learned, in all and by part, from the safetensors header alone.

    The file begins with the header's length in eight bytes, little-endian, and the header in JSON
    (github.com/huggingface/safetensors#format).
    """
    path = _located(directory, WEIGHTS_FILE)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        shapes = {k: tensor["shape"] for k, tensor in header.items() if k != "__metadata__"}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / WEIGHTS_FILE}: no safetensors file: {error}") from None
    parts = {"total": sum(sizes.values()), "token_embedding": 0, "position_embedding": 0}
    parts |= {"attention": 0, "mlp": 0, "norms": 0}  # in the order of model.py
    for name, size in sizes.items():
        # blocks.3.attention.qkv.weight counts as attention, and attention_norm as norms
        words = [word for word in name.split(".") if not word.isdecimal() and word != "blocks"]
        part = "norms" if words[0].endswith("norm") else words[0]
        parts[part] = parts.get(part, 0) + size
    return parts


# ----------------------------------------------------------------------------------------------
# Finding


def is_bundle(directory: Path) -> bool:
    """Whether a bundle stands in `directory`: one that was published, whole or since damaged."""
    # Looked for where it ends up both first and last: it may move up while we look.
    places = (directory, *_committed(directory), directory)
    return any(is_file(place / STATE_FILE) for place in places)


def has_model_files(directory: Path) -> bool:
    """Whether files of a bundle are in `directory`, though maybe not all of one."""
    return any(is_file(directory / name) for name in BUNDLE_FILES)


def is_run(directory: Path) -> bool:
    """Whether `directory` is a run's."""
    return is_directory(directory / "artifacts")


def list_runs(runs_dir: Path) -> list[Path]:
    """The run directories in `runs_dir`, the newest first."""

    def began(run: Path) -> tuple[str, int]:
        # A run's name begins with the time, unless somebody has renamed it.
        made = run.stat().st_mtime_ns
        if re.match(r"\d{8}_\d{6}", run.name):
            return run.name[:15], made
        return time.strftime("%Y%m%d_%H%M%S", time.localtime(made / 1e9)), made

    found = {}
    for run in filter(is_run, _listed(runs_dir)):
        with contextlib.suppress(FileNotFoundError):  # removed while we look
            found[run] = began(run)
    return sorted(found, key=found.__getitem__, reverse=True)


def find_run_of(bundle: Path) -> Path | None:
    """The run directory that a checkpoint or an export is in, if it is in one."""
    for path in (bundle, bundle.resolve()):
        if path.name == "export" and path.parent.name == "artifacts":
            return path.parent.parent
        if _CHECKPOINT.fullmatch(path.name) and path.parent.name == "checkpoints":
            if path.parent.parent.name == "artifacts":
                return path.parent.parent.parent
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, by their steps."""
    found = [path for path in _listed(run / "artifacts" / "checkpoints") if is_bundle(path)]
    named = [path for path in found if _CHECKPOINT.fullmatch(path.name)]
    return sorted(named, key=parse_step)


def parse_step(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step_"))


def list_named_models(checkpoints_dir: Path) -> list[Path]:
    """The named models in `checkpoints_dir`, by their names."""
    return sorted(path for path in _listed(checkpoints_dir) if is_bundle(path))


def _listed(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if is_directory(path)]
    except OSError:
        return []


def find_directory(reference: str, runs_dir: Path, checkpoints_dir: Path) -> Path:
    """What a user means: a path, a run's id or a named model's name. Raises `UserError`."""
    places = [Path(reference)]
    if len(Path(reference).parts) == 1:  # a mere word
        places += [runs_dir / reference, checkpoints_dir / reference]
    there = [place for place in places if is_directory(place)]
    # A directory that happens to have a model's name stands in nobody's way.
    for place in there:
        if is_bundle(place) or is_run(place):
            return place
    if there:
        return there[0]
    looked = " nor ".join(map(str, places))
    raise UserError(
        f"{reference}: no such model: "
        + (f"neither {looked} is there" if len(places) > 1 else "no such directory")
    )


def find_named_model(name: str, checkpoints_dir: Path) -> Path:
    """The named model of that name. Raises `UserError`, which lists those that there are."""
    directory = checkpoints_dir / name
    if not is_directory(directory):
        others = ", ".join(path.name for path in list_named_models(checkpoints_dir))
        raise UserError(
            f"{directory}: no such named model; "
            + (f"there are: {others}" if others else "none yet")
        )
    return directory


def find_usable_bundle(directory: Path) -> Path:
    """The bundle to generate with: `directory` itself, or a run's best, or else its newest.

    Raises `UserError` where there is none.
    """
    if is_bundle(directory):
        return directory
    export = directory / "artifacts" / "export"
    if is_bundle(export):
        return export
    if checkpoints := list_checkpoints(directory):
        return checkpoints[-1]
    if is_run(directory):
        raise NoModelError(f"{directory}: this run has saved no model yet")
    raise UserError(f"{directory}: not a Folio model: {STATE_FILE} is not there")


def find_newest_usable_bundle(runs_dir: Path) -> Path:
    """The model of the newest run that has one. Raises `UserError` where there is none."""
    for run in list_runs(runs_dir):
        with contextlib.suppress(UserError):
            return find_usable_bundle(run)
    raise UserError(
        f"{runs_dir}: no trained model in there yet; train one with `python train.py`, "
        "or name one with --run or --model-name"
    )
