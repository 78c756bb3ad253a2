"""Show a model's architecture, tokenizer, training state and lineage.

    python inspect_model.py                                    # all runs and named models
    python inspect_model.py --model-name dante
    python inspect_model.py --run 20260131_235959_baseline --json
    python inspect_model.py dante_base dante_purgatorio        # compare side by side

Neither weights nor torch are loaded: the files' headers are enough.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundle import (
    NoModelError,
    check_files,
    find_named_model,
    find_run_of,
    find_usable_bundle,
    get_model_info,
    list_named_models,
    list_runs,
)
from parameters import Settings
from utils.checks import format_name, format_value
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.output import Output, format_bytes, format_command, pluralize, run_command
from utils.tables import align_columns

DEFAULT_DATA = "Shakespeare's plays"  # trained on if `data` is null


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
)
OPERANDS = Action("models", "Names, runs or paths of models; two or more are compared.", "MODEL")


def load_all_models(
    config: InspectConfig, output: Output
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return all models by validation loss, and the runs without one; warn of damaged ones."""
    models, empty = [], []
    named_models = list_named_models(Path(config.checkpoints_dir))
    for place in [*named_models, *list_runs(Path(config.runs_dir))]:
        try:
            models.append(get_model_info(find_usable_bundle(place)))
        except NoModelError:
            empty.append(place)
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
        data = state["training_config"].get("data")
        row = (
            _get_place(info),
            _format_loss(state),
            f"{state['step']:,}",
            f"{info['parameters']['total']:,}",
            format_bytes(info["bytes"]),
            _format_age(time.time() - info["saved"]),
            format_name(Path(data).name) if data else DEFAULT_DATA,
        )
        rows.append(row)
    rows += [(str(run), "–", "–", "–", "–", "no model yet", "") for run in empty]
    return align_columns(rows, right=(1, 2, 3, 4))


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
    chars = {"chars": "".join(tokenizer["chars"])} if "chars" in tokenizer else {}
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
            ("Data", training.get("data") or DEFAULT_DATA),
            ("Parameters", f"{parameters['total']:,}"),
            *((f"  {part}", f"{n:,}") for part, n in parameters.items() if part != "total" and n),
        ],
        "MODEL CONFIG": info["config"].items(),
        "TOKENIZER": {**tokenizer, **chars, "vocab_size": info["config"]["vocab_size"]}.items(),
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
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
