"""Show what a model is, how it was trained, and which models it descends from.

    python inspect_model.py                                    # all runs and named models
    python inspect_model.py --model-name dante
    python inspect_model.py --run 20260131_235959_baseline --json
    python inspect_model.py dante_base dante_purgatorio        # side by side: what differs

Weights are never loaded, and torch neither: the files' headers say enough.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundle import (
    TRAINING_FACTS,
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
from utils.output import (
    Output,
    align_columns,
    format_age,
    format_bytes,
    format_command,
    pluralize,
    run_command,
)


class InspectConfig(Settings):
    """Where models are looked for."""

    runs_dir: str = "runs"
    """Where runs are."""

    checkpoints_dir: str = "checkpoints"
    """Where named models are."""


ACTIONS = (
    Action("model_name", "A named model; may be repeated.", "NAME", repeats=True),
    Action("run", "A run's id or directory: its best model; may be repeated.", "RUN", repeats=True),
    Action("json", "Print JSON."),
)
OPERANDS = Action("models", "Names, runs or paths of models; two or more are compared.", "MODEL")


def main(argv: Sequence[str]) -> int:
    """The command: find the models, read what they say of themselves, and show it."""
    command_line = CommandLine(__doc__, InspectConfig, ACTIONS, operands=OPERANDS)
    flags, actions, problems = command_line.parse(argv)
    if problems:
        raise UserError(*problems)
    config = InspectConfig(**flags)
    output = Output()
    checkpoints_dir = Path(config.checkpoints_dir)
    references = [
        *(str(find_named_model(name, checkpoints_dir)) for name in actions.get("model_name", [])),
        *actions.get("run", []),
        *actions.get("models", []),
    ]
    models = [model_info(reference, config) for reference in references]
    if not references:
        models, empty, damaged = all_models(config)
        for problem in damaged:
            output.print_warning(problem)
    if "json" in actions:
        output.print(json.dumps(models[0] if len(references) == 1 else models, indent=2))
    elif not references:
        output.print(listed(models, empty))
    elif len(models) == 1:
        output.print(described(models[0]))
    else:
        output.print(compared(models))
    return 0


def model_info(reference: str, config: InspectConfig) -> dict[str, Any]:
    """What a model says of itself, all of its files checked. Raises `UserError`."""
    info = get_model_info(
        reference, checkpoints_dir=config.checkpoints_dir, runs_dir=config.runs_dir
    )
    check_files(Path(info["path"]))
    return info


def all_models(
    config: InspectConfig,
) -> tuple[list[dict[str, Any]], list[Path], list[str]]:
    """The models of all runs and names, the lowest val loss first; and what else there is.

    That is the runs that have saved no model, and what is wrong with damaged ones.
    """
    models, empty, problems = [], [], []
    places = [*list_named_models(Path(config.checkpoints_dir)), *list_runs(Path(config.runs_dir))]
    for place in places:
        try:
            models.append(get_model_info(find_usable_bundle(place)))
        except NoModelError:
            empty.append(place)
        except UserError as error:
            problems += error.problems
    models.sort(key=_loss)
    return models, empty, problems


def _loss(info: Mapping[str, Any]) -> float:
    """What models are sorted by: the val loss, or the best one where it was not measured."""
    losses = [info["training_state"][name] for name in ("val_loss", "best_val_loss")]
    return next((loss for loss in losses if loss is not None), math.inf)


# ----------------------------------------------------------------------------------------------
# What is shown


def listed(models: Sequence[Mapping[str, Any]], empty: Sequence[Path]) -> str:
    """A line for each model, and for each run without one."""
    if not models and not empty:
        return f"No models yet: train one with `{format_command('train.py')}`"
    rows = [("model", "val loss", "step", "parameters", "size", "saved", "text")]
    for info in models:
        state = info["training_state"]
        text = state["training_config"].get("data")
        row = (
            _place(info),
            _shown_loss(state),
            f"{state['step']:,}",
            f"{info['parameters']['total']:,}",
            format_bytes(info["bytes"]),
            format_age(time.time() - info["saved"]),
            format_name(Path(text).name) if text else "Shakespeare's plays",
        )
        rows.append(row)
    rows += [(str(run), "–", "–", "–", "–", "no model yet", "") for run in empty]
    return align_columns(rows, right=(1, 2, 3, 4))


def described(info: Mapping[str, Any]) -> str:
    """One model in full."""
    config, state = info["config"], info["training_state"]
    training = state["training_config"]
    previous = training.get("previous_runs") or []
    parts = [f"{part} {n:,}" for part, n in info["parameters"].items() if part != "total" and n]
    shown = ["dropout", "bias", "tie_weights", "activation", "batch_size"]
    if config["architecture"] == "modern":
        shown.append("rope_theta")
    rows = [
        ("model", info["path"]),
        ("", f"{format_bytes(info['bytes'])}, saved {format_age(time.time() - info['saved'])}"),
        (
            "architecture",
            f"{config['architecture']}: {pluralize(config['n_layer'], 'layer')}, "
            f"{pluralize(config['n_head'], 'head')}, {config['n_embd']} channels, "
            f"context {config['block_size']}, vocabulary {config['vocab_size']:,}",
        ),
        ("", _settings(config, *shown)),
        ("parameters", f"{info['parameters']['total']:,}"),
        ("", ", ".join(parts)),
        ("tokenizer", _tokenizer(info)),
        ("training", _training(state)),
        ("", f"run {state['run_id']}, begun at step {training.get('start_step')}"),
        *(("", f"after run {r['run_id']}, up to step {r['step']}") for r in reversed(previous)),
        ("text", format_name(training.get("data") or "Shakespeare's plays")),
        ("", f"SHA-256 {training.get('data_sha256')}"),
    ]
    settings = [name for name in training if name not in (*TRAINING_FACTS, "data")]
    for first in range(0, len(settings), 4):
        title = "settings" if first == 0 else ""
        rows.append((title, _settings(training, *settings[first : first + 4])))
    rows += [("lineage" if index == 0 else "", line) for index, line in enumerate(_tree(info))]
    return align_columns(rows)


def _settings(values: Mapping[str, Any], *names: str) -> str:
    return ", ".join(f"{name} {format_value(values[name])}".replace('"', "") for name in names)


def _tokenizer(info: Mapping[str, Any]) -> str:
    chars = info["tokenizer"].get("chars")
    if chars is None:
        return info["tokenizer"]["token_kind"]
    shown = format_value("".join(chars))
    return f"{info['tokenizer']['token_kind']}: {pluralize(len(chars), 'character')}: {shown}"


def _place(info: Mapping[str, Any]) -> str:
    """The run or the named model that a bundle is of."""
    return str(find_run_of(Path(info["path"])) or info["path"])


def _shown_loss(state: Mapping[str, Any]) -> str:
    """The val loss; in brackets the best until then, where this step was not evaluated."""
    if state["val_loss"] is None and state["best_val_loss"] is not None:
        return f"({_in_nats(state['best_val_loss'])})"
    return _in_nats(state["val_loss"])


def _in_nats(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _training(state: Mapping[str, Any]) -> str:
    training = state["training_config"]
    words = [f"step {state['step']} of {training.get('max_iters')}"]
    words.append(f"val loss {_in_nats(state['val_loss'])}")
    if state["best_val_loss"] is not None:
        words.append(f"best {_in_nats(state['best_val_loss'])} at step {training.get('best_step')}")
    has = "with" if state["optimizer_file"] else "without"
    return ", ".join(words) + f"; {has} optimizer state to go on with"


def _tree(info: Mapping[str, Any]) -> list[str]:
    """The model and its ancestors, each one a branch of the next."""
    path = Path(info["path"])
    lines = [f"{(find_run_of(path) or path.resolve()).name}, step {info['training_state']['step']}"]
    for depth, ancestor in enumerate(info["training_state"]["lineage"]):
        lines.append(
            f"{'    ' * depth}└── {ancestor['name']}, step {ancestor['step']}: "
            f"weights {ancestor['weights_sha256'][:12]}…, text "
            f"{(ancestor['data_sha256'] or 'unknown')[:12]}…"
        )
    return lines


def compared(models: Sequence[Mapping[str, Any]]) -> str:
    """What differs between models, side by side."""
    columns = [_flat(info) for info in models]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [["", *(_place(info) for info in models)]]
    for name in names:
        values = [column.get(name) for column in columns]
        if any(value != values[0] for value in values):
            rows.append([name, *map(_cell, values)])
    if len(rows) == 1:
        return align_columns(rows) + "\nno difference"
    return align_columns(rows)


def _cell(value: Any) -> str:
    """A value in a column: short, as most are looked at for their beginning."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = format_value(value).strip('"')
    return text if len(text) <= 40 else text[:39] + "…"


def _flat(info: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that two models may differ in."""
    state = info["training_state"]
    lineage = [f"{ancestor['name']} at {ancestor['step']}" for ancestor in state["lineage"]]
    chars = info["tokenizer"].get("chars")
    not_compared = ("state_sha256", "previous_runs")
    training = state["training_config"]
    return {
        **info["config"],
        "parameters": info["parameters"]["total"],
        "token_kind": info["tokenizer"]["token_kind"],
        "characters": "".join(chars) if chars else None,
        "step": state["step"],
        "val_loss": state["val_loss"],
        "best_val_loss": state["best_val_loss"],
        "run_id": state["run_id"],
        **{name: value for name, value in training.items() if name not in not_compared},
        "lineage": " < ".join(lineage) or None,
        "weights_sha256": state["files"]["model.safetensors"],
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
