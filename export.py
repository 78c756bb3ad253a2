"""Export a model to a directory that other programs open: Transformers, llama.cpp, a browser.

    python export.py --format html --open                          # the newest run, as a page
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
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bundle import find_run_of
from exporters.browser import find_chromium
from exporters.record import (
    EXPORTS_DIR,
    RECORD_FILE,
    find_pages,
    hash_files,
    read_record,
    write_record,
)
from inference import ModelChoice, find_model
from parameters import NAME_PATTERN, Positive
from utils.checks import format_name
from utils.command_line import Action, CommandLine
from utils.errors import RunError, UserError, format_reason
from utils.files import DISK_FULL, is_file, is_present, is_real_directory, make_directory, sync
from utils.output import Output, format_bytes, run_command
from utils.report import write_report
from utils.report.runs import LoggedRun
from utils.run_manager import RunDirectory

EXPORTERS = {"hf": "huggingface", "onnx": "onnx", "gguf": "gguf", "html": "html"}  # modules
DTYPES = {  # the default first
    "hf": ("fp32", "fp16", "bf16"),
    "onnx": ("fp32",),
    "gguf": ("fp32", "fp16", "bf16", "q8_0"),
    "html": ("fp16", "int8", "fp32"),
}
# The libraries that write an export, and the one that opens it for --verify; their extra.
LIBRARIES = {
    "hf": ["tokenizers"],
    "onnx": ["onnx", "onnxscript", "tokenizers"],
    "gguf": ["gguf"],
    "html": [],
}
VERIFIERS = {
    "hf": "transformers",
    "onnx": "onnxruntime",
    "gguf": "xllamacpp",
    "html": "playwright",
}
EXTRAS = {"xllamacpp": "llamacpp", "playwright": "browser"}  # of all others: export
FOR_HTML = {
    "checkpoints": "--checkpoints",
    "memorization": "--[no-]memorization",
    "with": "--with",
    "force": "--force",
    "open": "--open",
}


class ExportConfig(ModelChoice):
    """The model, the format and the place."""

    format: Literal["hf", "onnx", "gguf", "html"] | None = None
    """hf (Transformers), onnx (ONNX Runtime), gguf (llama.cpp) or html (a page for a browser)."""

    out: Annotated[str, Field(min_length=1)] | None = None
    """Directory to create. null: exports/NAME-FORMAT, NAME being the model's."""

    dtype: Literal["fp32", "fp16", "bf16", "q8_0", "int8"] | None = None
    """Type of the weights. hf: fp32, fp16, bf16; onnx: fp32; gguf: fp32, fp16, bf16, q8_0; html:
    fp16, int8, fp32. null: the first of these."""

    checkpoints: Positive = 1
    """html: steps of the run in the page: the exported one, the last, step 0, others between."""

    memorization: bool = True
    """html: hashes of the training text in the page, with which it marks what is copied from it."""


ACTIONS = (
    Action("overwrite", "Replace an export that is there already."),
    Action("with", "html: a second model for the page, to compare.", "MODEL"),
    Action("force", "html: write a page of more than 100 MB."),
    Action("open", "html: open the page in a browser."),
    Action("verify", "Load the export in its target program; compare logits, text and tokens."),
)
PLACES = {"runs_dir", "checkpoints_dir"}
OPERAND = Action("model", "A run, a bundle or a named model: as --run.", "MODEL")


def choose_name(given: str, bundle: Path) -> str:
    """Return a name for the export: the model's, as the user gave it, or that of its directory."""
    directory = find_run_of(bundle) or bundle
    name = given if re.fullmatch(NAME_PATTERN, given) else directory.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-") or "model"


def find_problems(config: ExportConfig, actions: Mapping[str, Any]) -> list[str]:
    """Return one message for each setting that is missing or does not fit the others."""
    if config.format is None:
        return [f"--format is missing: {', '.join(EXPORTERS)}"]
    problems = []
    if config.dtype not in (None, *DTYPES[config.format]):
        legal = ", ".join(DTYPES[config.format])
        problems.append(f"--dtype {config.dtype}: {config.format} exports have {legal}")
    if config.format != "html":
        given = config.model_fields_set | actions.keys()
        others = [flag for name, flag in FOR_HTML.items() if name in given]
        problems += [f"{flag} is for --format html" for flag in others]
    needed = {f"--format {config.format}": LIBRARIES[config.format]}
    if "verify" in actions:
        needed["--verify"] = [VERIFIERS[config.format]]
        if config.format == "html" and not find_chromium():
            problems.append(
                "--verify needs Chromium: install it, or set FOLIO_CHROMIUM to its path"
            )
    for flag, names in needed.items():
        if missing := [name for name in names if not importlib.util.find_spec(name)]:
            extra = EXTRAS.get(missing[0], "export")
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


def choose_models(config: ExportConfig, actions: Mapping[str, Any]) -> dict[str, Path]:
    """Return the bundle to export and that of --with, by the names they have in the export."""
    operands = actions["model"]
    chosen = find_model(config, operands).path
    name = choose_name(config.model_name or config.run or next(iter(operands), ""), chosen)
    if "with" not in actions:
        return {name: chosen}
    other = find_model(ModelChoice(**config.model_dump(include=PLACES)), [actions["with"]]).path
    other_name = choose_name(actions["with"], other)
    return {name: chosen, other_name if other_name != name else f"{name}-2": other}


def link_page(page: Path, run: LoggedRun, output: Output) -> None:
    """Draw the report of a run again, if there is one, with a link to the page."""
    report = RunDirectory(run.path).report
    if is_file(report):
        try:
            write_report(report, run.path, list(dict.fromkeys([*find_pages(run.name), page])))
        except OSError as error:
            output.print_warning(f"{report} has no link to the page: {error.strerror}")


def main(argv: Sequence[str]) -> int:
    """Find the model, write its export, and verify it if that is asked for."""
    command_line = CommandLine(__doc__, ExportConfig, ACTIONS, operands=OPERAND)
    flags, actions, problems = command_line.parse(argv)
    config = ExportConfig(**flags)
    if problems := problems or find_problems(config, actions):
        raise UserError(*problems)
    models = choose_models(config, actions)
    name, bundle = next(iter(models.items()))
    dtype = config.dtype or DTYPES[config.format][0]
    suffix = "" if dtype == DTYPES[config.format][0] else f"-{dtype}"
    out = Path(config.out or EXPORTS_DIR / f"{name}-{config.format}{suffix}")
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: name a new directory")
    overwrite = "overwrite" in actions
    check_target(out, overwrite=overwrite)
    output = Output()
    output.print_note(f"{bundle}: exporting …")

    # These bring torch: imported once the settings are known to be good.
    from exporters.card import create_card, write_card
    from exporters.source import load_run, load_source
    from exporters.verify import compare_with_source

    exporter = importlib.import_module(f"exporters.{EXPORTERS[config.format]}")
    cards = []
    for each, place in models.items():
        source = load_source(place)
        exporter.check(source, dtype)
        run = load_run(source.bundle, Path(config.runs_dir))
        cards.append(create_card(source, run, each))
    source, run = cards[0].source, cards[0].run
    options = {}
    if config.format == "html":
        options = {
            "cards": cards,
            "checkpoints": config.checkpoints,
            "memorization": config.memorization,
            "force": "force" in actions,
            "on_progress": output.print_note,
        }
    with publish(out, overwrite=overwrite) as building:
        exporter.write(source, building, dtype, name, **options)
        write_card(building, cards[0], format=config.format, files=hash_files(building))
        write_record(building, source, config.format, dtype, name)
    size = sum(path.stat().st_size for path in out.iterdir())
    output.print(f"Exported to {out} ({format_bytes(size)})")
    if config.format == "html":
        page = out / f"{name}.html"
        if run is not None:
            link_page(page, run, output)
        if "open" in actions and not webbrowser.open(page.resolve().as_uri()):
            output.print_warning(f"no browser was found: open {page} in one")
    if "verify" in actions:
        try:
            with contextlib.closing(exporter.open_export(out)) as target:
                comparison = compare_with_source(source, target)
        except Exception as error:  # the other program's, which may raise anything
            raise RunError(f"{out}: cannot be verified: {format_reason(error)}") from error
        output.print(comparison.format())
        if not comparison.is_equal(dtype):
            return 1
    return output.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
