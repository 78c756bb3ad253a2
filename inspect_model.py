"""Show a model's architecture, tokenizer, training state and lineage.

    python inspect_model.py                                    # all runs and named models
    python inspect_model.py --model-name dante
    python inspect_model.py --run 20260131_235959_baseline --json
    python inspect_model.py dante_base dante_purgatorio        # compare side by side
    python inspect_model.py dante --verify exports/dante-hf    # is this export still that model?

Neither weights nor torch are loaded, except by --verify: the files' headers are enough.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundle import (
    CONFIG_SETTINGS,
    STATE_FILE,
    DamageError,
    TrainingState,
    find_best_bundle,
    find_directory,
    find_file,
    find_run_of,
    find_usable_bundle,
    is_bundle,
    list_runs,
    read_bundle,
    read_weights_header,
    retry_if_published,
)
from parameters import Settings
from utils.checks import format_name, format_value
from utils.command_line import Action, CommandLine
from utils.data_files import SAMPLE_CORPUS
from utils.errors import UserError
from utils.files import glob_files, hash_file, is_directory, is_file
from utils.output import Output, format_bytes, format_command, pluralize, run_command
from utils.tables import align_columns


class InspectConfig(Settings):
    """The places of models."""

    runs_dir: str = "runs"
    """Directory of runs."""

    checkpoints_dir: str = "checkpoints"
    """Directory of named models."""


ACTIONS = (
    Action("model_name", "A named model; may be repeated.", "NAME", repeats=True),
    Action("run", "A run's id or directory: its best model; may be repeated.", "RUN", repeats=True),
    Action("json", "Print JSON."),
    Action(
        "verify", "Compare an export, or a .gguf file, with the model it was made from.", "PATH"
    ),
)
OPERANDS = Action("models", "Names, runs or paths of models; two or more are compared.", "MODEL")


def list_named_models(checkpoints_dir: Path) -> list[Path]:
    """Return the named models in `checkpoints_dir` in the order of their names."""
    return sorted(filter(is_bundle, glob_files(checkpoints_dir, "*")))


def find_named_model(name: str, checkpoints_dir: Path) -> Path:
    """Return the named model's directory. Raises `UserError` that lists the named models."""
    directory = checkpoints_dir / name
    if not is_directory(directory):
        others = ", ".join(path.name for path in list_named_models(checkpoints_dir))
        raise UserError(f"{directory}: no such named model; there are: {others or 'none yet'}")
    return directory


@retry_if_published
def check_files(directory: Path) -> None:
    """Compare every file of a bundle with its SHA-256. Raises `UserError` that names the file."""
    for name, digest in read_bundle(directory).state.files.items():
        path = find_file(directory, name)
        if not is_file(path) or hash_file(path) != digest:
            raise DamageError(directory / name)


def get_model_info(
    reference: str | Path, *, checkpoints_dir: str = "checkpoints", runs_dir: str = "runs"
) -> dict[str, Any]:
    """Return everything that a bundle records about its model, without loading the weights.

    `reference` is a named model's name, a run's id, or a path. The dict has `path`, `config`,
    `tokenizer`, `parameters` (counts: `total` and by part), `bytes`, `saved` (seconds since 1970)
    and `training_state`, as in `info["training_state"]["training_config"]["learning_rate"]`.

    Raises `UserError` if there is no such model or it is damaged.
    """
    directory = find_directory(str(reference), Path(runs_dir), Path(checkpoints_dir))
    return _collect_model_info(find_usable_bundle(directory))


@retry_if_published
def _collect_model_info(directory: Path) -> dict[str, Any]:
    bundle = read_bundle(directory)
    config = bundle.config.model_dump(include=CONFIG_SETTINGS)
    files = [find_file(directory, name) for name in bundle.state.files]
    return {
        "path": str(directory),
        "config": {**config, "vocab_size": bundle.vocab_size, "device": bundle.device},
        "tokenizer": bundle.tokenizer,
        "parameters": _count_parameters(directory),
        "bytes": sum(path.stat().st_size for path in files if is_file(path)),
        "saved": find_file(directory, STATE_FILE).stat().st_mtime,
        "training_state": bundle.state.model_dump(),
    }


def _count_parameters(directory: Path) -> dict[str, int]:
    """Count parameters, in total and by part, from the safetensors header alone."""
    header = read_weights_header(directory)
    sizes = {name: math.prod(shape) for name, (_, shape) in header.items()}
    parts = {"total": sum(sizes.values()), "token_embedding": 0, "ngram_embedding": 0}
    parts |= {"position_embedding": 0, "attention": 0, "mlp": 0, "norms": 0}  # as in model.py
    for name, size in sizes.items():
        # blocks.3.attention.qkv.weight counts as attention, and attention_norm as norms
        words = [word for word in name.split(".") if not word.isdecimal() and word != "blocks"]
        part = words[0] if words else name
        part = "norms" if part.endswith("norm") else part
        parts[part] = parts.get(part, 0) + size
    return parts


def load_all_models(
    config: InspectConfig, output: Output
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return all models by validation loss, and the runs without one; warn of damaged ones."""
    models, empty = [], []
    named_models = list_named_models(Path(config.checkpoints_dir))
    for place in [*named_models, *list_runs(Path(config.runs_dir))]:
        try:
            bundle = find_usable_bundle(place)
        except UserError:  # a run that has saved none yet
            empty.append(place)
            continue
        try:
            models.append(get_model_info(bundle))
        except UserError as error:
            for problem in error.problems:
                output.print_warning(problem)
    return sorted(models, key=_get_loss), empty


def _get_loss(info: Mapping[str, Any]) -> float:
    """Return the validation loss, or the best one if this step was not evaluated."""
    losses = [info["training_state"][name] for name in ("val_loss", "best_val_loss")]
    return next((loss for loss in losses if loss is not None), math.inf)


def format_table(models: Sequence[Mapping[str, Any]], empty: Sequence[Path]) -> str:
    """Return a line for each model and for each run without one."""
    if not models and not empty:
        return f"No models yet: train one with `{format_command('train.py')}`"
    rows = [("model", "val loss", "step", "parameters", "size", "saved", "data")]
    for info in models:
        state = info["training_state"]
        data = _get_data(state)
        row = (
            _get_place(info),
            _format_loss(state),
            f"{state['step']:,}",
            f"{info['parameters']['total']:,}",
            format_bytes(info["bytes"]),
            _format_age(time.time() - info["saved"]),
            format_name(Path(data).name),
        )
        rows.append(row)
    rows += [(str(run), "–", "–", "–", "–", "no model yet", "") for run in empty]
    return align_columns(rows, right=(1, 2, 3, 4))


def _get_data(state: Mapping[str, Any]) -> str:
    """Return the `data` that a model was trained on."""
    if TrainingState(**state).is_imported:
        return "unknown, as the model was imported"
    return state["training_config"].get("data") or SAMPLE_CORPUS


def _format_age(seconds: float) -> str:
    """Return `12 seconds ago`, `3 hours ago` or `40 days ago`."""
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            return f"{pluralize(int(seconds // size), unit)} ago"
    return f"{pluralize(max(0, int(seconds)), 'second')} ago"


def _get_place(info: Mapping[str, Any]) -> str:
    return str(find_run_of(Path(info["path"])) or info["path"])


def _format_loss(state: Mapping[str, Any]) -> str:
    """Return the validation loss, or in brackets the best one if this step was not evaluated."""
    if state["val_loss"] is None and state["best_val_loss"] is not None:
        return f"({_format_nats(state['best_val_loss'])})"
    return _format_nats(state["val_loss"])


def _format_nats(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def format_model(info: Mapping[str, Any]) -> str:
    """Return sections of one `key: value` a line."""
    state, tokenizer, parameters = info["training_state"], info["tokenizer"], info["parameters"]
    training = state["training_config"]
    shown = {**tokenizer, "vocab_size": info["config"]["vocab_size"]}
    if "chars" in tokenizer:
        shown["chars"] = "".join(tokenizer["chars"])
    if "merges" in tokenizer:
        shown["merges"] = pluralize(len(tokenizer["merges"]), "merge")
    lineage = [
        (
            ancestor["name"],
            f"step {ancestor['step']}, weights SHA-256 {ancestor['weights_sha256']}, "
            f"data SHA-256 {ancestor['data_sha256'] or 'unknown'}",
        )
        for ancestor in state["lineage"]
    ]
    sections = {
        "MODEL": [
            ("Path", info["path"]),
            ("Size", format_bytes(info["bytes"])),
            ("Saved", _format_age(time.time() - info["saved"])),
            ("Data", _get_data(state)),
            ("Parameters", f"{parameters['total']:,}"),
            *((f"  {part}", f"{n:,}") for part, n in parameters.items() if part != "total" and n),
        ],
        "MODEL CONFIG": info["config"].items(),
        "TOKENIZER": shown.items(),
        "TRAINING STATE": [
            ("Last recorded training step", state["step"]),
            ("Validation loss", _format_nats(state["val_loss"])),
            ("Best validation loss", _format_nats(state["best_val_loss"])),
            ("Run", state["run_id"]),
            ("Optimizer state", "saved" if state["optimizer_file"] else "not saved"),
            ("Training configuration", ""),
            *((f"  {k}", v if isinstance(v, str) else json.dumps(v)) for k, v in training.items()),
        ],
        "LINEAGE": lineage or [("Parent", "none, trained from scratch")],
        "FILES": state["files"].items(),
    }
    lines = []
    for title, rows in sections.items():
        lines += ["", f"=== {title} ==="]
        for key, value in rows:
            lines.append(f"{format_name(key)}:" + ("" if value == "" else f" {format_name(value)}"))
    return "\n".join(lines[1:])


def format_comparison(models: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the values that differ between models."""
    columns = [_flatten(info) for info in models]
    rows = [["", *(_get_place(info) for info in models)]]
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name) for column in columns]
        if any(value != values[0] for value in values):
            rows.append([name, *map(_format_cell, values)])
    return align_columns(rows) + ("\nno difference" if len(rows) == 1 else "")


def _format_cell(value: Any) -> str:
    """Return a value in at most 40 characters."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = format_value(value).strip('"')
    return text if len(text) <= 40 else text[:39] + "…"


def _flatten(info: Mapping[str, Any]) -> dict[str, Any]:
    state, chars = info["training_state"], info["tokenizer"].get("chars")
    lineage = [f"{ancestor['name']} at {ancestor['step']}" for ancestor in state["lineage"]]
    hidden = ("state_sha256", "previous_runs")
    return {
        **info["config"],
        "parameters": info["parameters"]["total"],
        "token_kind": info["tokenizer"]["token_kind"],
        "characters": "".join(chars) if chars else None,
        **{name: state[name] for name in ("step", "val_loss", "best_val_loss", "run_id")},
        **{k: v for k, v in state["training_config"].items() if k not in hidden},
        "lineage": " < ".join(lineage) or None,
        "weights_sha256": state["files"]["model.safetensors"],
    }


def find_candidates(references: Sequence[str | Path], config: InspectConfig) -> list[Path]:
    """Return the bundles that export.py may have exported for a model: itself, and its best step.

    Raises `UserError` if more than one model is named, or there is no such model.
    """
    if len(references) > 1:
        raise UserError("--verify compares with one model: name one")
    runs_dir, checkpoints_dir = Path(config.runs_dir), Path(config.checkpoints_dir)
    found = []
    for reference in references:
        bundle = find_usable_bundle(find_directory(str(reference), runs_dir, checkpoints_dir))
        found += [bundle, find_best_bundle(bundle, runs_dir)]
    return [bundle for bundle in found if bundle is not None]


def main(argv: Sequence[str]) -> int:
    """Find the models, read their headers and print them."""
    command_line = CommandLine(__doc__, InspectConfig, ACTIONS, operands=OPERANDS)
    flags, actions, problems = command_line.parse(argv)
    if problems:
        raise UserError(*problems)
    config, output = InspectConfig(**flags), Output()
    checkpoints_dir = Path(config.checkpoints_dir)
    references = [find_named_model(name, checkpoints_dir) for name in actions.get("model_name", [])]
    references += [*actions.get("run", []), *actions.get("models", [])]
    if "verify" in actions:
        from exporters.verify import verify_export  # late: it brings torch

        places = find_candidates(references, config)
        lines, is_same = verify_export(Path(actions["verify"]), places, Path(config.runs_dir))
        for line in lines:
            output.print(line)
        return output.exit_status if is_same else 1
    models = [get_model_info(reference, **config.model_dump()) for reference in references]
    for info in models:
        check_files(Path(info["path"]))
    if not references:
        models, empty = load_all_models(config, output)
    if "json" in actions:
        output.print(json.dumps(models[0] if len(references) == 1 else models, indent=2))
    elif not references:
        output.print(format_table(models, empty))
    elif len(models) == 1:
        output.print(format_model(models[0]))
    else:
        output.print(format_comparison(models))
    return output.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
