"""The record of an export, `export.json`: what it was made from, and the SHA-256 of each file.

Nothing here needs torch.
"""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from bundle import MAX_JSON_BYTES
from utils import files
from utils.errors import UserError

if TYPE_CHECKING:
    from exporters.source import ExportSource

EXPORTS_DIR = Path("exports")
RECORD_FILE = "export.json"
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ExportRecord(BaseModel, extra="forbid", frozen=True, strict=True):
    """The content of `export.json`.

    `run_id`, `step` and `weights_sha256` are those of the bundle that was exported.
    """

    format_version: Literal[1] = 1
    format: Literal["hf", "onnx", "gguf", "html"]
    dtype: str
    name: str
    run_id: str | None
    step: int
    weights_sha256: Digest
    files: dict[str, Digest]


def hash_files(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an export but its record, by name; of a directory, ""."""
    paths = [path for path in files.glob_files(directory, "*") if path.name != RECORD_FILE]
    return {
        path.name: "" if files.is_directory(path) else files.hash_file(path)
        for path in sorted(paths)
    }


def write_record(
    directory: Path, source: "ExportSource", format: str, dtype: str, name: str
) -> None:
    """Write `export.json` into a directory that is otherwise complete."""
    state = source.bundle.state
    record = ExportRecord(
        format=format,
        dtype=dtype,
        name=name,
        run_id=state.run_id,
        step=state.step,
        weights_sha256=source.weights_sha256,
        files=hash_files(directory),
    )
    text = json.dumps(record.model_dump(), indent=2) + "\n"
    files.write_durable(directory / RECORD_FILE, text.encode("utf-8"))


def read_record(directory: Path) -> ExportRecord:
    """Read `export.json`. Raises `UserError` if it is missing or not valid."""
    path = directory / RECORD_FILE
    try:
        return ExportRecord.model_validate_json(files.read_regular(path, MAX_JSON_BYTES))
    except OSError:
        raise UserError(f"{directory}: not an export of Folio: it has no {RECORD_FILE}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {key}: {problem['msg']}") from None


def find_pages(run_id: str, exports_dir: Path = EXPORTS_DIR) -> list[Path]:
    """Return the HTML exports in a directory that were made of a run's models."""
    pages = []
    for place in sorted(files.glob_files(exports_dir, "*")):
        with contextlib.suppress(UserError):  # not an export
            record = read_record(place)
            if (record.format, record.run_id) == ("html", run_id):
                pages += [place / name for name in record.files if name.endswith(".html")]
    return [page for page in pages if files.is_file(page)]


def find_changes(directory: Path, record: ExportRecord) -> list[str]:
    """Return one line for each file of an export that was changed, removed or added since.

    Raises `UserError` if a file cannot be read.
    """
    try:
        found = hash_files(directory)
    except OSError as error:
        raise UserError(
            f"{error.filename or directory}: cannot be read: {error.strerror}"
        ) from None
    changes = [f"{name} is missing" for name in record.files if name not in found]
    changes += [f"{name} was added" for name in found if name not in record.files]
    changes += [
        f"{name} was changed"
        for name, digest in found.items()
        if record.files.get(name, digest) != digest
    ]
    return changes
