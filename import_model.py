"""Import a model of another program: nanoGPT's checkpoint, or a GPT-2 or Qwen3 of Transformers.

    python import_model.py out-shakespeare-char/ckpt.pt --model-name shakespeare
    python import_model.py ckpt.pt --meta data/shakespeare_char/meta.pkl --out models/shakespeare
    python import_model.py gpt2/ --model-name gpt2     # config.json, safetensors, tokenizer.json

The result is a bundle without optimizer state, for every other command: `inference.py`,
`evaluate.py`, `inspect_model.py`, and `train.py --init-from`. No code of the file is run.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from bundle import (
    BUNDLE_FILES,
    IMPORTED,
    STATE_FILE,
    Ancestor,
    Bundle,
    TrainingState,
    is_bundle,
    write_bundle,
)
from parameters import ModelName, PathText, Settings
from resume import lock_named_model
from utils.checks import format_name
from utils.command_line import Action, CommandLine
from utils.errors import RunError, UserError
from utils.files import is_directory, is_present
from utils.output import Output, format_command, pluralize, run_command

if TYPE_CHECKING:
    from importers.source import ImportedModel


class ImportConfig(Settings):
    """The bundle to write, and the characters of nanoGPT's checkpoint."""

    model_name: ModelName | None = None
    """The named model to create in checkpoints_dir."""

    out: PathText | None = None
    """A directory for the bundle, instead of a named model."""

    checkpoints_dir: PathText = "checkpoints"
    """The directory of the named models."""

    meta: PathText | None = None
    """nanoGPT's meta.pkl, its characters. null: beside ckpt.pt, or in ../data/DATASET/."""


ACTIONS = (Action("overwrite", "Replace the model that is there."),)
OPERAND = Action("source", "nanoGPT's ckpt.pt, or a directory that Transformers wrote.", "SOURCE")


def find_source(operands: Sequence[str], meta: str | None) -> Path:
    """Return the file or the directory to import. Raises `UserError` if it cannot be one."""
    if len(operands) != 1:
        raise UserError("name one model to import: nanoGPT's ckpt.pt, or a directory")
    source = Path(operands[0])
    shown = format_name(str(source))
    if not is_present(source):
        raise UserError(f"{shown}: no such file or directory")
    if is_directory(source) and is_bundle(source):
        raise UserError(f"{shown}: a Folio model already: every command takes it as it is")
    if is_directory(source) and meta is not None:
        raise UserError("--meta is for nanoGPT's ckpt.pt: a directory has its tokenizer.json")
    return source


def find_target(config: ImportConfig, overwrite: bool) -> Path:
    """Return the directory of the new bundle.

    Raises `UserError` if it holds a model already and that is not to be replaced.
    """
    if (config.model_name is None) == (config.out is None):
        raise UserError("the new model needs a place: --model-name NAME, or --out DIR")
    if config.out is not None:
        target = Path(config.out)
    else:
        target = Path(config.checkpoints_dir) / str(config.model_name)
    for place in (target, target.parent):
        if is_present(place) and not is_directory(place):
            raise UserError(
                f"{place} is not a directory: choose another with --out or --model-name"
            )
    if is_bundle(target):
        if not overwrite:
            raise UserError(f"{target} exists: choose another, or replace it with --overwrite")
    elif found := [name for name in BUNDLE_FILES if is_present(target / name)]:
        raise UserError(
            f"{target}: has {found[0]} and no {STATE_FILE}, so it is not a Folio model, and is not "
            "replaced: choose another directory"
        )
    return target


def write_imported(imported: "ImportedModel", target: Path) -> None:
    """Publish an imported model as the bundle `target`, at step 0 of no run."""
    ancestor = Ancestor(
        name=f"{IMPORTED}{imported.name}",
        step=imported.step,
        weights_sha256=imported.weights_sha256,
        data_sha256=None,
        run_id=None,
    )
    state = TrainingState(
        step=0,
        optimizer_file=None,
        best_val_loss=None,
        val_loss=None,
        run_id=None,
        lineage=[ancestor],
        training_config={"start_step": 0},
    )
    bundle = Bundle(target, imported.config, imported.vocab_size, "cpu", imported.tokenizer, state)
    write_bundle(bundle, save_weights=imported.save_weights)


def main(argv: Sequence[str]) -> int:
    """Check the flags, read the model of the other program, and write the bundle."""
    command_line = CommandLine(__doc__, ImportConfig, ACTIONS, operands=OPERAND)
    flags, actions, problems = command_line.parse(argv)
    if problems:
        raise UserError(*problems)
    config, output = ImportConfig(**flags), Output()
    source = find_source(actions.get("source", []), config.meta)
    target = find_target(config, overwrite="overwrite" in actions)

    # These bring torch: imported once the settings are known to be good.
    from importers.huggingface import read_directory
    from importers.nanogpt import read_checkpoint

    if is_directory(source):
        imported = read_directory(source)
    else:
        imported = read_checkpoint(source, Path(config.meta) if config.meta else None)
    is_named = target.parent.resolve() == Path(config.checkpoints_dir).resolve()
    try:
        with lock_named_model(target if is_named else None):
            find_target(config, overwrite="overwrite" in actions)  # another import may be done
            write_imported(imported, target)
    except (OSError, SafetensorError) as error:
        # safetensors writes in Rust, and puts the system's reason last.
        reason = getattr(error, "strerror", None) or str(error).split("error: ")[-1]
        raise RunError(f"{target}: cannot be written: {reason}") from None
    count = sum(tensor.numel() for tensor in imported.weights.values())
    kind = "characters" if imported.tokenizer["token_kind"] == "char" else "tokens"
    output.print(
        f"Imported {format_name(imported.name)}: {imported.config.architecture}, "
        f"{pluralize(count, 'parameter')}, {imported.vocab_size:,} {kind}"
    )
    for note in imported.notes:
        output.print_note(note)
    output.print(f"Model: {format_name(str(target))}")
    output.print(f"Next:  {format_command('inference.py')} {shlex.quote(str(target))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
