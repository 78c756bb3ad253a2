"""The bundle: one directory that holds a model and everything needed to use it or resume from it.

    config.json           the architecture, which never changes
    model.safetensors     the weights
    tokenizer.json        text to ids and back
    training_state.json   the step, losses, settings, lineage, and each other file's SHA-256
    optimizer.pt          the state of the optimizer and the random generators; an export has none

A run's checkpoints, its export and a named model are all bundles. Nothing here needs torch.

A bundle is published as a whole. The new files are written to `.tmp-PID-HOST/` in its directory;
renaming that to `.next-PID-HOST/` is the commit; then they are moved up, `training_state.json`
last. Readers take files that have not been moved yet from `.next-PID-HOST/`. So a process may be
killed at any instruction, and the directory is the old bundle or the new one. The next save
finishes or removes the leftovers of a killed process; other files in the directory are left alone.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from config import upgrade_settings
from parameters import GROUPS, Architecture, Count, Initialization, ModelConfig, Positive, Run
from tokenizer import Tokenizer, restore_tokenizer
from utils import files
from utils.checks import format_name, validate_values
from utils.errors import RunError, UserError

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "training_state.json"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)  # every bundle has these and its state
BUNDLE_FILES = (*MODEL_FILES, OPTIMIZER_FILE, STATE_FILE)
IMPORTED = "imported:"  # begins the name of an ancestor that another program trained
RESET_REMEDY = "; --reset-optimizer resumes with a new optimizer"

# config.json has these settings, and vocab_size and device.
CONFIG_SETTINGS = {*Architecture.model_fields, "batch_size"}
# Missing from the config.json of the first releases, whose models do not need them.
_ADDED_LATER = {"rope_theta", "ngram_rows"}
# The settings in `training_config`: those that may change on resume. The others are in config.json
# and tokenizer.json, or belong to one run only (its name, its directories, its device).
TRAINING_SETTINGS = tuple(
    name
    for group in GROUPS.values()
    if group not in (Architecture, Initialization, Run)
    for name in group.model_fields
    if name not in ("batch_size", "device", "tokenizer", "vocab_size")
)
MAX_JSON_BYTES = 1 << 26  # of a bundle's JSON file; a vocabulary of all characters takes 12 MB
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")  # in the terms of safetensors

_OURS = re.compile(r"\.(?:tmp|next)-(?P<process>[0-9]+)-(?P<host>.*)")
_T = TypeVar("_T")


class PreviousRun(BaseModel, extra="forbid", frozen=True, strict=True):
    """A run that was resumed, and the step at which it ended."""

    run_id: str | None
    step: Count


class TrainingFacts(BaseModel, frozen=True, strict=True):
    """The keys of `training_config` that are no settings. Older versions lack some of them."""

    start_step: Count | None = None  # of the run that saved this
    previous_runs: Annotated[list[PreviousRun], Field(max_length=10_000)] | None = None
    best_step: Count | None = None
    evaluations_since_best: Count | None = None
    data_sha256: str | None = None
    computed_in: Literal["fp32", "bf16", "fp16"] | None = None  # the precision in effect
    compiled_by: str | None = None  # torch.compile's backend in effect, or off
    processes: Positive | None = None  # the world size
    model_name: str | None = None
    run_tag: str | None = None
    state_sha256: str | None = None


TRAINING_FACTS = TrainingFacts.model_fields.keys()


class Ancestor(BaseModel, extra="forbid", frozen=True, strict=True):
    """A model that another one was fine-tuned from, at that moment.

    If another program trained it, the name is `imported:`, the program and the name of the file,
    `weights_sha256` that of the file, and `step` 0 if the file has none.
    """

    name: str
    step: Count
    weights_sha256: str
    data_sha256: str | None
    run_id: str | None


class TrainingState(BaseModel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False):
    """The content of `training_state.json`. Losses are means in nats per token.

    `val_loss` is None if this very step was not evaluated.
    """

    format_version: Literal[1] = FORMAT_VERSION
    step: Count
    optimizer_file: Literal["optimizer.pt"] | None
    best_val_loss: float | None
    val_loss: float | None
    run_id: str | None
    lineage: Annotated[list[Ancestor], Field(max_length=10_000)]
    files: dict[str, str] = {}
    training_config: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in `training_config`."""
        return {k: v for k, v in self.training_config.items() if k not in TRAINING_FACTS}

    @property
    def is_imported(self) -> bool:
        """Whether this is a model of another program, not trained by Folio since."""
        origin = self.lineage[0].name if self.lineage else ""
        return self.run_id is None and origin.startswith(IMPORTED)

    def get_fact(self, name: str) -> Any:
        """Return one of `TRAINING_FACTS`, or None if it is not recorded."""
        return self.training_config.get(name)


class TokenizerState(BaseModel, extra="forbid", frozen=True, strict=True):
    """The content of `tokenizer.json`: `chars` of a character tokenizer, or `merges` of a BPE."""

    token_kind: Literal["char", "gpt2", "bpe"]
    chars: list[str] | None = None
    merges: list[list[int]] | None = None


class DamageError(UserError):
    """A file of a bundle is missing, damaged, or comes from another bundle."""

    def __init__(self, path: Path):
        other = "; use another checkpoint, or a copy of this one"
        remedy = RESET_REMEDY if path.name == OPTIMIZER_FILE else other
        super().__init__(
            f"{path}: not the file that was saved with this model: it is missing, damaged, "
            f"or comes from another one{remedy}"
        )


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified, or is to be written.

    `config` has the model's architecture and `batch_size`; its other settings are defaults.
    `contents` has the verified bytes of its files, weights and optimizer only if asked for.
    """

    path: Path
    config: ModelConfig
    vocab_size: int
    device: str
    tokenizer: dict[str, Any]
    state: TrainingState
    contents: dict[str, bytes] = field(default_factory=dict, repr=False)


# Writing -----------------------------------------------------------------------------------------


def write_bundle(
    bundle: Bundle,
    *,
    save_weights: Callable[[Path], None],
    save_optimizer: Callable[[Path], None] | None = None,
) -> None:
    """Publish a bundle at its path, replacing the one that may be there.

    `save_weights(path)` and `save_optimizer(path)` write those files, without the latter it is an
    export; the state's `files` and `optimizer_file` are filled in here. If anything raises, the
    directory is unchanged.
    """
    architecture = bundle.config.model_dump(include=CONFIG_SETTINGS)
    sizes = {"vocab_size": bundle.vocab_size, "device": bundle.device}
    with _publish(bundle.path) as building:
        _write_json(building / CONFIG_FILE, {**architecture, **sizes})
        _write_json(building / TOKENIZER_FILE, bundle.tokenizer)
        names = list(MODEL_FILES)
        files.write_with(building / WEIGHTS_FILE, save_weights, like=building / CONFIG_FILE)
        if save_optimizer is not None:
            files.write_with(building / OPTIMIZER_FILE, save_optimizer, like=building / CONFIG_FILE)
            names.append(OPTIMIZER_FILE)
        hashes = {name: files.hash_file(building / name) for name in names}
        _write_state(building, bundle.state, hashes)


def copy_bundle(source: Path, target: Path, *, with_optimizer: bool = True) -> None:
    """Publish the bundle `source` in `target`, too; as an export if `with_optimizer` is false.

    Raises `UserError` if a file of `source` is missing, damaged, or replaced meanwhile.
    """
    state = read_state(source)
    hashes = {k: v for k, v in state.files.items() if with_optimizer or k != OPTIMIZER_FILE}
    with _publish(target) as building:
        for name, digest in hashes.items():
            path, copied = find_file(source, name), None
            with contextlib.suppress(FileNotFoundError), files.open_regular(path) as file:
                copied = files.copy_durable(file, building / name)
            if copied != digest:
                raise DamageError(source / name)
        _write_state(building, state, hashes)


def _write_state(building: Path, state: TrainingState, hashes: dict[str, str]) -> None:
    optimizer_file = OPTIMIZER_FILE if OPTIMIZER_FILE in hashes else None
    content = {**state.model_dump(), "files": hashes, "optimizer_file": optimizer_file}
    content["training_config"]["state_sha256"] = compute_state_digest(content)
    _write_json(building / STATE_FILE, content)


def compute_state_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the values of `training_state.json`, this digest excluded."""
    training = {k: v for k, v in content["training_config"].items() if k != "state_sha256"}
    values = {**content, "training_config": training, "format_version": FORMAT_VERSION}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2) + "\n"
    files.write_durable(path, text.encode("utf-8"))


@contextlib.contextmanager
def _publish(directory: Path) -> Iterator[Path]:
    """Yield a directory to fill, then publish its files as the bundle `directory`.

    If anything raises before the commit, `directory` is as it was, or removed if it is empty.
    """
    files.make_directory(directory)
    for committed in _find_committed(directory):
        with contextlib.suppress(UserError):  # damaged since: replaced like the old bundle
            _finish(directory, committed)
        _remove_files(committed)
    clean_up(directory.resolve())  # a named model's directory may be the user's own link
    building = directory / f".tmp-{os.getpid()}-{_host()}"
    committed = directory / f".next-{os.getpid()}-{_host()}"
    try:
        files.make_directory(building)
        yield building
        files.sync(building)
        files.move(building, committed)
    except BaseException:
        _remove_building(building)
        files.remove_if_empty(directory)
        raise
    _finish(directory, committed)


def _find_committed(directory: Path) -> list[Path]:
    """Return the `.next-PID-HOST/` in a bundle's directory: usually none, at most one of ours.

    A link of that name was not made here: its files are never moved or removed.
    """
    found = files.glob_files(directory, ".next-*")
    return [path for path in found if _OURS.fullmatch(path.name) and files.is_real_directory(path)]


def _finish(directory: Path, committed: Path) -> None:
    """Move the committed files up into `directory`; another process may be doing the same.

    Raises `UserError` if the committed state is damaged.
    """
    content = None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # moved last: else all were
        content = files.read_regular(committed / STATE_FILE, MAX_JSON_BYTES)
    if content is not None:
        saved = _parse_state(committed / STATE_FILE, content).files
        files.sync(directory)  # the commit must be on the disk before the old bundle changes
        for name in (*MODEL_FILES, OPTIMIZER_FILE):
            if name in saved:
                files.move(committed / name, directory / name, missing_ok=True)
            else:
                files.remove_file(directory / name)
        files.sync(directory)  # and the other files before the state, which makes them a bundle
        files.move(committed / STATE_FILE, directory / STATE_FILE, missing_ok=True)
    files.remove_if_empty(committed)


def _remove_files(directory: Path) -> None:
    """Remove a bundle's files from a directory, and the directory if it is empty then."""
    for name in BUNDLE_FILES:
        files.remove_file(directory / name)
    files.remove_if_empty(directory)


def _remove_building(directory: Path) -> None:
    for path in files.glob_files(directory, ".tmp??????"):  # left by safetensors if it was killed
        files.remove_file(path)
    _remove_files(directory)


def remove_bundle(directory: Path) -> None:
    """Remove a bundle, and its directory unless it has other files. A link is left alone."""
    if not files.is_real_directory(directory):
        return
    removed = directory / ".removed"
    places = [*_find_committed(directory), directory]
    for place in places:
        files.move(place / STATE_FILE, removed, missing_ok=True)  # from here on, this is no bundle
    for place in places:
        _remove_files(place)
    files.remove_file(removed)
    files.remove_if_empty(directory)


def clean_up(directory: Path) -> None:
    """Finish or remove what ended processes left of saves and removals in a bundle's directory.

    The work of running processes, links, and the files of others are left alone.
    """
    if not files.is_own_directory(directory):
        return
    for path in files.glob_files(directory, ".tmp-*"):
        if _is_abandoned(path):
            _remove_building(path)
    for path in _find_committed(directory):
        if _is_abandoned(path):
            # Damaged, or another user's: left for a person to inspect. Or removed by now.
            with contextlib.suppress(UserError, OSError):
                _finish(directory, path)
    if files.is_file(directory / ".removed") and not is_bundle(directory):
        remove_bundle(directory)
    files.remove_if_empty(directory)


def _host() -> str:
    """Return a name for the set of process ids that ours is in: a machine, or a container on it."""
    namespace = ""
    with contextlib.suppress(OSError):  # Linux only
        namespace = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    return f"{platform.node()}-{namespace}"


def _is_abandoned(temporary: Path) -> bool:
    """Return whether the process that made a `.tmp-PID-HOST/` or `.next-PID-HOST/` has ended.

    Processes of other hosts cannot be checked: a day without a change is enough.
    """
    if (ours := _OURS.fullmatch(temporary.name)) and files.is_own_directory(temporary):
        process = int(ours["process"])
        if ours["host"] == _host():
            return process == os.getpid() or not files.is_process_running(process)
        with contextlib.suppress(OSError):
            return time.time() - temporary.stat().st_mtime > 86_400
    return False


# Reading -----------------------------------------------------------------------------------------


def retry_if_published(read: Callable[..., _T]) -> Callable[..., _T]:
    """Make a function of a directory read it again if it failed and a bundle was published there.

    Only files that stay as they are can be at fault.
    """

    @functools.wraps(read)
    def read_unchanged(directory: Path, *arguments: str) -> _T:
        while True:
            before = _stat_files(directory)
            try:
                return read(directory, *arguments)
            except (UserError, FileNotFoundError):
                if _stat_files(directory) == before:
                    raise

    return read_unchanged


def _stat_files(directory: Path) -> list[tuple[str, int, int, int]]:
    """Return facts about a bundle's files that change whenever one is published."""
    found = []
    for place in (directory, *_find_committed(directory)):
        for name in BUNDLE_FILES:
            with contextlib.suppress(OSError):
                stat = (place / name).stat()
                found.append((str(place / name), stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return found


@retry_if_published
def read_bundle(directory: Path, *names: str) -> Bundle:
    """Read a bundle, and verify that its files are those that were saved together.

    The `names` among `model.safetensors` and `optimizer.pt` are read into `contents`.

    Raises `UserError` that names the file that is missing, changed, damaged or too new.
    """
    state = read_state(directory)
    header = read_weights_header(directory)
    contents = {}
    for name in (CONFIG_FILE, TOKENIZER_FILE, *names):
        contents[name] = _read(directory, name)
        if hashlib.sha256(contents[name]).hexdigest() != state.files.get(name):
            raise DamageError(directory / name)
    values = _parse_json(directory / CONFIG_FILE, contents[CONFIG_FILE])
    tokenizer = _parse_json(directory / TOKENIZER_FILE, contents[TOKENIZER_FILE])
    _validate(directory / TOKENIZER_FILE, TokenizerState, tokenizer)
    vocab_size = values.pop("vocab_size", None)
    device = values.pop("device", None)  # recorded, never binding: a model loads on any
    if type(vocab_size) is not int or values.keys() | _ADDED_LATER != CONFIG_SETTINGS:
        raise UserError(f"{directory / CONFIG_FILE}: not the architecture of a Folio model")
    config = _validate(directory / CONFIG_FILE, ModelConfig, values)
    _check_shapes(directory, config, vocab_size, header)
    return Bundle(directory, config, vocab_size, str(device), tokenizer, state, contents)


def read_weights_header(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the dtype and the shape of each tensor in a bundle's `model.safetensors`, by name.

    The file begins with the header's length in eight bytes, little-endian, and the header in JSON
    (github.com/huggingface/safetensors#format). No tensor is read.

    Raises `UserError` if the file is missing or has no such header.
    """
    path = find_file(directory, WEIGHTS_FILE)
    try:
        with files.open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_JSON_BYTES)))
        header.pop("__metadata__", None)
        found = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()}
        for dtype, shape in found.values():
            is_shape = len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in shape)
            if type(dtype) is not str or not is_shape:
                raise ValueError("a dtype is not a name, or a shape is not of sizes")
        return found
    except FileNotFoundError:
        raise DamageError(directory / WEIGHTS_FILE) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{directory / WEIGHTS_FILE}: no safetensors file: {error}") from None


def _check_shapes(
    directory: Path,
    config: ModelConfig,
    vocab_size: int,
    header: Mapping[str, tuple[str, list[int]]],
) -> None:
    """Raise `UserError` if the header has another number of layers or another size.

    Before the model is built: `config.json` may say anything. Loading compares the rest.
    """
    layers = {match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, header) if match}
    _, shape = header.get("token_embedding.weight", ("", []))
    _, ngrams = header.get("ngram_embedding.weight", ("", None))
    expected_ngrams = None if config.ngram_rows is None else [config.ngram_rows, config.n_embd]
    expected = (config.n_layer, [vocab_size, config.n_embd], expected_ngrams)
    if (len(layers), shape, ngrams) != expected:
        found = recorded = ""
        if ngrams != expected_ngrams:
            found = f", n-gram embeddings of {ngrams}"
            recorded = f", ngram_rows {config.ngram_rows}"
        raise UserError(
            f"{directory}: {WEIGHTS_FILE} has {len(layers)} layers, an embedding of {shape}"
            f"{found}, where {CONFIG_FILE} has n_layer {config.n_layer}, vocab_size {vocab_size}, "
            f"n_embd {config.n_embd}{recorded}: these files belong to different models"
        )
    if others := {dtype for dtype, _ in header.values() if dtype not in WEIGHT_DTYPES}:
        raise UserError(
            f"{directory / WEIGHTS_FILE}: weights are floating-point numbers, not "
            f"{', '.join(sorted(others))}"
        )


@retry_if_published
def read_state(directory: Path) -> TrainingState:
    """Read `training_state.json` alone. Raises `UserError` if it is missing or not valid."""
    return _parse_state(directory / STATE_FILE, _read(directory, STATE_FILE))


def _parse_state(path: Path, content: bytes) -> TrainingState:
    values = _parse_json(path, content)
    state = _validate(path, TrainingState, values)
    _validate(path, TrainingFacts, state.training_config)
    # A bundle may set what a resume needs, and not where a run writes or logs.
    if foreign := state.settings.keys() - set(TRAINING_SETTINGS):
        raise UserError(
            f"{path}: training_config has {', '.join(sorted(foreign))}, which no bundle of this "
            "version has: update Folio if a later one wrote it"
        )
    settings = upgrade_settings(state.settings)
    _, problems = validate_values(ModelConfig, settings, label=lambda name: f"{path}: {name}")
    if problems:
        raise UserError(*problems)
    if state.get_fact("state_sha256") != compute_state_digest(values):
        raise UserError(f"{path}: damaged, or changed by hand: it does not match its SHA-256")
    if not set(MODEL_FILES) <= state.files.keys() <= set(BUNDLE_FILES):
        raise UserError(f"{path}: does not record the files of a Folio model")
    return state


def find_file(directory: Path, name: str) -> Path:
    """Return the path of a bundle's file, which may be committed and not moved up yet."""
    for committed in _find_committed(directory):
        if files.is_file(committed / STATE_FILE) and files.is_file(committed / name):
            return committed / name
    return directory / name


def _read(directory: Path, name: str) -> bytes:
    path = find_file(directory, name)
    try:
        with files.open_regular(path) as file:
            if name.endswith(".json") and os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
                raise UserError(f"{directory / name}: larger than any that Folio writes")
            return file.read()
    except FileNotFoundError:
        if name == STATE_FILE:
            raise UserError(f"{directory}: not a Folio model: it has no {STATE_FILE}") from None
        raise DamageError(directory / name) from None
    except OSError as error:
        raise UserError(f"{directory / name}: cannot be read: {error.strerror}") from None


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return the object in a JSON file, its `format_version` checked and removed."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: not JSON: {error}") from None
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r}, and this Folio reads {FORMAT_VERSION}: "
            "update Folio if a later one wrote it"
        )
    return values


def _validate(path: Path, schema: Callable[..., _T], values: Mapping[str, Any]) -> _T:
    try:
        return schema(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        parts = filter(None, (str(path), key, problem["msg"]))
        raise UserError(": ".join(parts)) from None


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """Return the bundle's tokenizer.

    Raises `UserError` if it is not valid, its size is not the model's, or it needs a library that
    is not installed.
    """
    try:
        tokenizer = restore_tokenizer(bundle.tokenizer)
    except UserError as error:
        raise UserError(f"{bundle.path / TOKENIZER_FILE}: {error}") from None
    if tokenizer.vocab_size != bundle.vocab_size:
        raise UserError(
            f"{bundle.path}: tokenizer.json has a vocabulary of {tokenizer.vocab_size} and "
            f"config.json of {bundle.vocab_size}: these files belong to different models"
        )
    return tokenizer


def create_weights_error(path: Path, reason: Exception | None = None) -> UserError | RunError:
    """Return the error for weights that do not fit their model, or if `reason` is None, are NaN."""
    if reason is None:
        return RunError(f"{path}: some weights are NaN or infinite: use an earlier checkpoint")
    last_line = str(reason).strip().splitlines()[-1].strip()
    return UserError(f"{path}: not this model's weights: {last_line}")


# Finding -----------------------------------------------------------------------------------------


def is_bundle(directory: Path) -> bool:
    """Return whether a bundle was published in `directory`; it may be damaged."""
    # `directory` is checked first and last, as the file may be moved up between the checks.
    places = (directory, *_find_committed(directory), directory)
    return any(files.is_file(place / STATE_FILE) for place in places)


def is_run(directory: Path) -> bool:
    """Return whether `directory` is a run directory."""
    return files.is_directory(directory / "artifacts")


def list_runs(runs_dir: Path) -> list[Path]:
    """Return the run directories in `runs_dir`, newest first.

    By the instant of the start that each run recorded, as local times repeat and differ between
    time zones. A run is newer than the one that it resumed, whatever the clock said.
    """
    starts = {run: _read_start(run) for run in filter(is_run, files.glob_files(runs_dir, "*"))}
    ranks: dict[Path, tuple[float, int]] = {}
    for newest in starts:
        run, chain = newest, dict[Path, None]()  # the run, the one that it resumed, and so on
        while run in starts and run not in ranks and run not in chain:
            chain[run] = None
            run = runs_dir / str(starts[run][1])
        for each in reversed(chain):
            instant, depth = ranks.get(runs_dir / str(starts[each][1]), (0.0, 0))
            ranks[each] = max((starts[each][0], 0), (instant, depth + 1))
    return sorted(ranks, key=lambda run: (*ranks[run], run.name), reverse=True)


def _read_start(run: Path) -> tuple[float, str | None]:
    """Return when a run started, in seconds since 1970, and the id of the run that it resumed."""
    with contextlib.suppress(Exception):  # a stranger's record may hold anything
        path = run / "meta" / "full_config.json"
        record = json.loads(files.read_regular(path, MAX_JSON_BYTES))["run"]
        resumed = record.get("resumed_from") or {}
        return datetime.fromisoformat(record["started"]).timestamp(), resumed.get("run_id")
    with contextlib.suppress(ValueError):  # killed before it wrote its record, or damaged since
        return datetime.strptime(run.name[:15], "%Y%m%d_%H%M%S").timestamp(), None
    with contextlib.suppress(OSError):  # removed meanwhile
        return run.stat().st_mtime, None
    return 0.0, None


def find_run_of(bundle: Path) -> Path | None:
    """Return the run directory that a checkpoint or an export is in, or None."""
    for path in (bundle, bundle.resolve()):
        if path.match("artifacts/export"):
            return path.parents[1]
        if path.match("artifacts/checkpoints/step_*"):
            return path.parents[2]
    return None


def find_run_by_id(run_id: str | None, runs_dir: Path) -> Path | None:
    """Return the run of an id that a file of a stranger may have given, or None."""
    if re.fullmatch(r"\w[\w.-]*", run_id or "") and is_run(runs_dir / run_id):
        return runs_dir / run_id
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run in the order of their steps."""
    found = files.glob_files(run / "artifacts" / "checkpoints", "step_*")
    named = [path for path in found if re.fullmatch(r"step_[0-9]{8,}", path.name)]
    return sorted(filter(is_bundle, named), key=parse_step)


def parse_step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def find_directory(reference: str, runs_dir: Path, checkpoints_dir: Path | None) -> Path:
    """Return the directory that a path, a run's id or a named model's name stands for.

    Without `checkpoints_dir`, no named model's. Raises `UserError` if there is none.
    """
    places = [Path(reference)]
    if len(Path(reference).parts) == 1:
        parents = [runs_dir] if checkpoints_dir is None else [runs_dir, checkpoints_dir]
        places += [parent / reference for parent in parents]
    found = [place for place in places if files.is_directory(place)]
    if not found:
        looked_for = ", ".join(format_name(str(place)) for place in places)
        noun = "run" if checkpoints_dir is None else "model"
        raise UserError(f"{format_name(reference)}: no such {noun}; looked for {looked_for}")
    # A directory that merely has a model's name must not hide that model.
    return next((place for place in found if is_bundle(place) or is_run(place)), found[0])


def find_usable_bundle(directory: Path, *, last: bool = False) -> Path:
    """Return the bundle to generate with: `directory` itself, or a run's export, or its newest.

    An export is a run's best model; `last` prefers its newest checkpoint. Raises `UserError` if
    there is none.
    """
    newest = list_checkpoints(directory)[::-1]
    export = directory / "artifacts" / "export"
    for place in (directory, *(newest if last else ()), export, *newest):
        if is_bundle(place):
            return place
    if is_run(directory):
        raise UserError(f"{directory}: this run has saved no model yet")
    raise UserError(f"{directory}: not a Folio model: {STATE_FILE} is not there")


def find_best_bundle(named_model: Path, runs_dir: Path) -> Path | None:
    """Return the best model of the run that saved a named model, which holds the last step.

    None if the last step is the best, or if the run has not kept the best.
    """
    state = read_state(named_model)
    best_step, run = state.get_fact("best_step"), find_run_by_id(state.run_id, runs_dir)
    if best_step in (None, state.step) or run is None:
        return None
    place = find_kept_step(run, best_step)
    is_same = place is not None and read_state(place).best_val_loss == state.best_val_loss
    return place if is_same else None


def find_kept_step(run: Path, step: int) -> Path | None:
    """Return a run's export or checkpoint of a step, or None if it has kept neither."""
    checkpoint = run / "artifacts" / "checkpoints" / f"step_{step:08d}"
    for place in (run / "artifacts" / "export", checkpoint):
        with contextlib.suppress(UserError):  # damaged, or just removed by its own run
            if is_bundle(place) and read_state(place).step == step:
                return place
    return None
