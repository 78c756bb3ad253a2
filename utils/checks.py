"""Validation of values by the schema, and the messages about wrong ones."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from parameters import DEVICE_PATTERN, NAME_PATTERN, Settings

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


def format_value(value: Any) -> str:
    """Return a value as JSON (true, null, "text"), cut to 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _format_error(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as the end of a line that begins with the setting's name."""
    kind, limits = error["type"], error.get("ctx", {})
    keys = (limits.get("pattern"), kind, kind.partition("_")[0])
    template = next((REQUIREMENTS[key] for key in keys if key in REQUIREMENTS), None)
    shown = {
        name: format(limit, "g") if isinstance(limit, float) else str(limit).replace("'", "")
        for name, limit in limits.items()
    }
    message = template.format(**shown) if template else error["msg"]
    return f"{message}, got {format_value(error['input'])}"


def format_name(key: Any) -> str:
    """Return a key or a path for a one-line message: unchanged if printable, else as JSON."""
    return key if isinstance(key, str) and key and key.isprintable() else format_value(key)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` for a misspelt name, or nothing if no known name is similar."""
    # Without their dashes, as these would make all flags similar.
    bare = {candidate.lstrip("-"): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lstrip("-"), list(bare), n=1, cutoff=0.6)
    return f"; did you mean {bare[matches[0]]}?" if matches else ""


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
