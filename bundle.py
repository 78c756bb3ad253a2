"""The bundle: one directory that holds a model and all that is needed to use it.

    config.json           the architecture
    model.safetensors     the weights
    tokenizer.json        text to ids and back
    training_state.json   which step this is, how good, and where it came from

Nothing here needs torch.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from parameters import Architecture, ModelConfig
from utils.errors import UserError
from utils.files import directory_written_whole, make_durable, write_atomic

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
STATE_FILE = "training_state.json"
BUNDLE_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, STATE_FILE)

# Recorded in config.json beside the architecture; neither of them fixes the network's shape.
_ALSO_RECORDED = ("batch_size", "device")


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read: everything but its weights, which stay in `path`.

    Of `config`, the architecture and `batch_size` are the model's; the rest are mere defaults.
    """

    path: Path
    config: ModelConfig
    vocab_size: int
    tokenizer: dict[str, Any]
    state: dict[str, Any]

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.path / WEIGHTS_FILE


def write_bundle(
    directory: Path,
    *,
    config: ModelConfig,
    vocab_size: int,
    device: str,
    tokenizer: Mapping[str, Any],
    state: Mapping[str, Any],
    save_weights: Callable[[Path], None],
) -> None:
    """Write a bundle into `directory`, in the place of the one that is there.

    `save_weights(path)` writes the safetensors file. `state` gets `format_version` and `files`,
    the SHA-256 of each other file.
    """
    architecture = {name: getattr(config, name) for name in Architecture.model_fields}
    recorded = {"batch_size": config.batch_size, "vocab_size": vocab_size, "device": device}
    with directory_written_whole(directory) as building:
        _write_json(building / CONFIG_FILE, {**architecture, **recorded})
        save_weights(building / WEIGHTS_FILE)
        make_durable(building / WEIGHTS_FILE, like=building / CONFIG_FILE)
        _write_json(building / TOKENIZER_FILE, tokenizer)
        names = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)
        files = {name: _sha256(building / name) for name in names}
        _write_json(
            building / STATE_FILE, {"format_version": FORMAT_VERSION, **state, "files": files}
        )


def read_bundle(directory: Path) -> Bundle:
    """Read a bundle, all but its weights, and check that all its files are of one model.

    Raises `UserError` that names the file that is missing, changed, damaged or too new.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    missing = [name for name in BUNDLE_FILES if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory}: not a model: {', '.join(missing)} not there")
    state = _read_json(directory / STATE_FILE)
    if state.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory / STATE_FILE}: format_version {state.get('format_version')!r}, "
            f"this Folio reads {FORMAT_VERSION}"
        )
    _check_files(directory, state.get("files"))
    values = _read_json(directory / CONFIG_FILE)
    vocab_size = values.pop("vocab_size", None)
    known = {*Architecture.model_fields, *_ALSO_RECORDED}
    if not isinstance(vocab_size, int) or values.keys() != known:
        raise UserError(f"{directory / CONFIG_FILE}: not the architecture of a Folio model")
    del values["device"]  # recorded, never binding: a model loads on any
    try:
        config = ModelConfig(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{directory / CONFIG_FILE}: {where}: {problem['msg']}") from None
    return Bundle(directory, config, vocab_size, _read_json(directory / TOKENIZER_FILE), state)


def _check_files(directory: Path, recorded: Any) -> None:
    """Compare each file with the SHA-256 that was recorded when all were written together."""
    if not isinstance(recorded, dict):
        raise UserError(f"{directory / STATE_FILE}: cannot be read: no record of the other files")
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        if _sha256(directory / name) != recorded.get(name):
            raise UserError(
                f"{directory / name}: not the file that was saved with this model: it was changed, "
                "damaged, or comes from another one"
            )


def newest_export(runs_dir: Path) -> Path:
    """The export of the newest run in `runs_dir` that has one.

    Raises `UserError` where there is none.
    """
    states = runs_dir.glob(f"*/artifacts/export/{STATE_FILE}")
    newest = max(states, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None:
        raise UserError(
            f"{runs_dir}: no trained model in there yet; train one with `python train.py`, "
            "or name one with --run"
        )
    return newest.parent


def find_bundle(path: Path) -> Path:
    """The bundle that a user means by `path`: a bundle itself, or a run directory's export."""
    export = path / "artifacts" / "export"
    return export if export.is_dir() else path


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be read: not a JSON object")
    return content


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
