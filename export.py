"""Export a model to a directory that other programs open: Transformers, ONNX Runtime, llama.cpp.

    python export.py --format hf                                   # the newest run
    python export.py dante --format gguf --dtype q8_0 --verify
    python export.py runs/20260131_235959_baseline --format onnx --out baseline-onnx

The directory has a model card, README.md. No network is used.
"""

import contextlib
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bundle import find_run_of
from exporters.record import RECORD_FILE, hash_files, read_record, write_record
from inference import ModelChoice, find_model
from parameters import NAME_PATTERN
from utils.checks import format_name
from utils.command_line import Action, CommandLine
from utils.errors import RunError, UserError, format_reason
from utils.files import DISK_FULL, is_present, is_real_directory, make_directory, sync
from utils.output import Output, format_bytes, run_command

EXPORTS_DIR = Path("exports")
EXPORTERS = {"hf": "huggingface", "onnx": "onnx", "gguf": "gguf"}  # modules of exporters/
DTYPES = {
    "hf": ("fp32", "fp16", "bf16"),
    "onnx": ("fp32",),
    "gguf": ("fp32", "fp16", "bf16", "q8_0"),
}
# The libraries that write an export, and the one that opens it for --verify.
LIBRARIES = {"hf": ["tokenizers"], "onnx": ["onnx", "onnxscript", "tokenizers"], "gguf": ["gguf"]}
VERIFIERS = {"hf": "transformers", "onnx": "onnxruntime", "gguf": "xllamacpp"}


class ExportConfig(ModelChoice):
    """The model, the format and the place."""

    format: Literal["hf", "onnx", "gguf"] | None = None
    """hf (Transformers and all that reads its files), onnx (ONNX Runtime) or gguf (llama.cpp)."""

    out: Annotated[str, Field(min_length=1)] | None = None
    """Directory to create. null: exports/NAME-FORMAT, NAME being the model's."""

    dtype: Literal["fp32", "fp16", "bf16", "q8_0"] = "fp32"
    """Type of the weights. hf: fp32, fp16, bf16; onnx: fp32; gguf: all."""


ACTIONS = (
    Action("overwrite", "Replace an export that is there already."),
    Action("verify", "Load the export in its target program; compare logits, text and tokens."),
)
OPERAND = Action("model", "A run, a bundle or a named model: as --run.", "MODEL")


def choose_name(config: ExportConfig, operands: Sequence[str], bundle: Path) -> str:
    """Return a name for the export: the model's, as the user gave it, or that of its directory."""
    given = config.model_name or config.run or next(iter(operands), "")
    directory = find_run_of(bundle) or bundle
    name = given if re.fullmatch(NAME_PATTERN, given) else directory.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-") or "model"


def find_problems(config: ExportConfig, *, verify: bool) -> list[str]:
    """Return one message for each setting that is missing or does not fit the others."""
    if config.format is None:
        return ["--format is missing: hf, onnx or gguf"]
    problems = []
    if config.dtype not in DTYPES[config.format]:
        legal = ", ".join(DTYPES[config.format])
        problems.append(f"--dtype {config.dtype}: {config.format} exports have {legal}")
    needed = {f"--format {config.format}": LIBRARIES[config.format]}
    if verify:
        needed["--verify"] = [VERIFIERS[config.format]]
    for flag, names in needed.items():
        if missing := [name for name in names if not importlib.util.find_spec(name)]:
            extra = "llamacpp" if missing == ["xllamacpp"] else "export"
            problems.append(f"{flag} needs {', '.join(missing)}: `pip install '.[{extra}]'`")
    return problems


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise `UserError` if there is something at `out` that must not be replaced."""
    if not is_present(out):
        return
    if not is_real_directory(out):
        raise UserError(f"{out}: not a directory: choose another --out")
    if not is_present(out / RECORD_FILE):
        raise UserError(f"{out}: exists, and is not an export: choose another --out")
    if not overwrite:
        raise UserError(f"{out}: exists: choose another --out, or add --overwrite to replace it")
    others = {path.name for path in out.iterdir()} - {RECORD_FILE, *read_record(out).files}
    if others:
        names = ", ".join(map(format_name, sorted(others)))
        raise UserError(
            f"{out}: has {names}, which no export wrote: move it, or choose another --out"
        )


@contextlib.contextmanager
def publish(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory to fill, then publish it as `out`, replacing an older export.

    If anything raises, `out` is as it was. Raises `UserError` if `out` cannot be written, or has
    come into being meanwhile, and `RunError` if the disk is full.
    """
    try:
        make_directory(out.parent)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            building, replaced = Path(place) / "new", Path(place) / "old"
            building.mkdir()
            yield building
            for path in building.iterdir():
                sync(path)
            sync(building)
            check_target(out, overwrite=overwrite)
            try:
                if is_present(out):
                    out.rename(replaced)
                building.rename(out)
            except BaseException:  # Ctrl-C, too
                if is_present(replaced) and not is_present(out):
                    replaced.rename(out)
                raise
            sync(out.parent)
    except OSError as error:
        kind = RunError if error.errno in DISK_FULL else UserError
        raise kind(f"{out} cannot be written: {error.strerror or error}") from None


def main(argv: Sequence[str]) -> int:
    """Find the model, write its export, and verify it if that is asked for."""
    command_line = CommandLine(__doc__, ExportConfig, ACTIONS, operands=OPERAND)
    flags, actions, problems = command_line.parse(argv)
    config = ExportConfig(**flags)
    if problems := problems or find_problems(config, verify="verify" in actions):
        raise UserError(*problems)
    chosen = find_model(config, operands := actions["model"])
    name = choose_name(config, operands, chosen.path)
    suffix = "" if config.dtype == "fp32" else f"-{config.dtype}"
    out = Path(config.out or EXPORTS_DIR / f"{name}-{config.format}{suffix}")
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: name a new directory")
    overwrite = "overwrite" in actions
    check_target(out, overwrite=overwrite)
    output = Output()
    output.print_note(f"{chosen.path}: exporting …")

    # These bring torch: imported once the settings are known to be good.
    from exporters.card import write_card
    from exporters.source import load_run, load_source
    from exporters.verify import compare_with_source

    exporter = importlib.import_module(f"exporters.{EXPORTERS[config.format]}")
    source = load_source(chosen.path)
    exporter.check(source, config.dtype)
    run = load_run(source.bundle, Path(config.runs_dir))
    with publish(out, overwrite=overwrite) as building:
        exporter.write(source, building, config.dtype, name)
        write_card(
            building, source, run, format=config.format, name=name, files=hash_files(building)
        )
        write_record(building, source, config.format, config.dtype, name)
    size = sum(path.stat().st_size for path in out.iterdir())
    output.print(f"Exported to {out} ({format_bytes(size)})")
    if "verify" in actions:
        try:
            comparison = compare_with_source(source, exporter.open_export(out))
        except Exception as error:  # the other program's, which may raise anything
            raise RunError(f"{out}: cannot be verified: {format_reason(error)}") from error
        output.print(comparison.format())
        if not comparison.is_equal(config.dtype):
            return 1
    return output.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
