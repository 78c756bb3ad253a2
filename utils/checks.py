"""Validation of values by the schema, and the messages about wrong ones."""

import contextlib
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from parameters import DEVICE_PATTERN, NAME_PATTERN, Settings
from utils.errors import escape_unprintable

# The end of a message that begins with the setting's name, by the type of pydantic's error.
REQUIREMENTS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string_type": "must be text (put it in quotes)",
    "string_unicode": "must be valid Unicode text",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    DEVICE_PATTERN: "must be auto, cpu, mps, cuda or cuda:N",
    NAME_PATTERN: "must be letters, digits, '.', '_' and '-', a letter or digit first",
}

MAX_UNKNOWN = 20  # names that are reported one by one
MAX_NAME = 300  # characters of a name that is shown as it is
# Names of the same settings in other programs.
SYNONYMS = {
    "learning_rate": "lr max_lr peak_lr eta",
    "min_lr": "lr_min min_learning_rate",
    "lr_schedule": "schedule scheduler lr_scheduler lr_decay decay_lr",
    "batch_size": "bs batch bsz",
    "micro_batch_size": "micro_batch device_batch_size gradient_accumulation_steps grad_accum",
    "max_iters": "iters iterations steps max_steps num_steps n_steps total_steps num_iterations",
    "epochs": "epoch num_epochs n_epochs max_epochs num_train_epochs",
    "warmup_iters": "warmup warmup_steps num_warmup_steps",
    "weight_decay": "wd decay",
    "grad_clip": "clip clip_grad max_grad_norm max_norm gradient_clip_val",
    "early_stopping_patience": "patience early_stopping",
    "block_size": "context ctx context_length context_size seq_len max_seq_len sequence_length "
    "window n_ctx n_positions",
    "n_embd": "embd dim d_model model_dim width n_dim emb_dim embed_dim embedding_size hidden_size",
    "n_head": "head heads num_heads n_heads num_attention_heads",
    "n_layer": "layer layers num_layers n_layers depth num_hidden_layers",
    "data": "dataset text input file corpus data_dir train_data data_path",
    "tokenizer": "token_kind vocab vocabulary",
    "vocab_size": "n_vocab vocab_len num_merges",
    "eval_interval": "eval_every eval_steps val_interval",
    "checkpoint_interval": "save_interval save_every save_steps",
    "runs_dir": "out_dir output_dir out log_dir save_dir",
    "model_name": "name",
    "run_tag": "tag run_name experiment",
    "init_from": "finetune fine_tune pretrained from_pretrained",
    "precision": "dtype fp16 bf16 amp mixed_precision",
    "device": "gpu cuda",
    "num_threads": "threads workers num_workers",
    "torch_compile": "compile",
    "max_new_tokens": "length max_tokens num_tokens max_length",
    "num_samples": "samples n_samples",
    "temperature": "temp",
    "trials": "n_trials num_trials",
    "study": "study_name",
}


def format_value(value: Any) -> str:
    """Return a value as JSON (true, null, "text"), cut to 60 characters, all of them printable.

    No more of it is formatted, as a few nested YAML anchors stand for billions of values.
    """
    text = ""
    with contextlib.suppress(TypeError, ValueError):  # a circle, a number of too many digits
        for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
            text += part
            if len(text) > 60:
                break
        else:
            return escape_unprintable(text)
    return escape_unprintable(text[:57]) + "..."


def _format_error(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as the end of a line that begins with the setting's name."""
    kind, limits = error["type"], error.get("ctx", {})
    keys = (limits.get("pattern"), kind, kind.partition("_")[0])
    template = next((REQUIREMENTS[key] for key in keys if key in REQUIREMENTS), None)
    shown = {
        name: format(limit, "g") if isinstance(limit, float) else str(limit).replace("'", "")
        for name, limit in limits.items()
    }
    message = template.format(**shown) if template else error["msg"].removeprefix("Value error, ")
    return f"{message}, got {format_value(error['input'])}"


def format_name(key: Any) -> str:
    """Return a key or a path for a one-line message; as JSON unless it is short, printable text."""
    is_plain = isinstance(key, str) and key.isprintable() and 0 < len(key) <= MAX_NAME
    return key if is_plain else format_value(key)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` for a misspelt name or a synonym, or nothing if none is known."""
    # Without their dashes, as these would make all flags similar.
    bare = {candidate.lstrip("-").replace("-", "_"): candidate for candidate in known}
    word = name.lstrip("-").replace("-", "_").lower()
    same = next((target for target, others in SYNONYMS.items() if word in others.split()), None)
    if same in bare:
        return f"; did you mean {bare[same]}?"
    matches = difflib.get_close_matches(word, list(bare), n=1, cutoff=0.6)
    return f"; did you mean {bare[matches[0]]}?" if matches else ""


def describe_unknown(
    prefix: str, unknown: Sequence[tuple[Any, Any]], known: Iterable[str]
) -> list[str]:
    """Return a message for each unknown name, with a hint; for the first `MAX_UNKNOWN` only.

    `unknown` has names and their values.
    """
    problems = []
    for name, value in unknown[:MAX_UNKNOWN]:
        is_section = isinstance(value, Mapping)
        hint = (
            ": settings are flat, without sections"
            if is_section
            else suggest_name(str(name), known)
        )
        problems.append(f"{prefix} {format_name(name)}{hint}")
    if (more := len(unknown) - MAX_UNKNOWN) > 0:
        problems.append(f"{prefix}s: {more:,} more")
    return problems


def validate_values(
    schema: type[Settings], values: Mapping[str, Any], *, label: Callable, strings: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Validate one layer of settings: return the valid values, and a message for each other one.

    `strings` converts text from a command line; values from a file must have the right type.
    `label(name)` begins the message.
    """
    validate = schema.model_validate_strings if strings else schema.model_validate
    wrong: dict[str, str] = {}
    try:
        settings = validate(dict(values), strict=not strings, context={"single_source": True})
    except ValidationError as failure:
        for error in failure.errors():
            wrong.setdefault(str(error["loc"][0]), _format_error(error))
        right = {name: value for name, value in values.items() if name not in wrong}
        settings = validate(right, strict=not strings, context={"single_source": True})
    valid = {name: getattr(settings, name) for name in values if name not in wrong}
    return valid, [f"{label(name)} {problem}" for name, problem in wrong.items()]
