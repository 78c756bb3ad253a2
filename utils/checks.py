"""Values against the schema, and what is said of those that are wrong."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from parameters import DEVICE_PATTERN, NAME_PATTERN, Settings

PATTERNS_IN_WORDS = {
    DEVICE_PATTERN: "must be auto, cpu, mps, cuda or cuda:N",
    NAME_PATTERN: "must be letters, digits, '.', '_' and '-', a letter or digit first",
}


def format_value(value: Any) -> str:
    """A value as its user wrote it: true rather than True, null rather than None; cut if long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _problem(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as the end of a sentence that begins with the setting's name."""
    kind, limits = error["type"], error.get("ctx", {})
    if kind.startswith("int_"):
        must = "must be a whole number"
    elif kind.startswith("float_"):
        must = "must be a number"
    elif kind.startswith("bool_"):
        must = "must be true or false"
    elif kind == "string_type":
        must = "must be text (put it in quotes)"
    elif kind == "string_unicode":
        must = "must be valid Unicode text"
    elif kind == "string_too_short":
        must = "must not be empty"
    elif kind == "finite_number":
        must = "must be a finite number"
    elif kind == "literal_error":
        must = f"must be {limits['expected']}".replace("'", "")
    elif kind == "string_pattern_mismatch":
        must = PATTERNS_IN_WORDS[limits["pattern"]]
    elif kind == "string_too_long":
        must = f"must have at most {limits['max_length']} characters"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        ((bound, limit),) = limits.items()
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        must = f"must be {words[bound]} {limit if isinstance(limit, int) else format(limit, 'g')}"
    else:
        must = error["msg"]
    return f"{must}, got {format_value(error['input'])}"


def format_name(key: Any) -> str:
    """A key or a path as it may be printed: as it is, unless that would break the line."""
    return key if isinstance(key, str) and key and key.isprintable() else format_value(key)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for a misspelt name, or nothing where nothing is near."""
    # Without their dashes, which would make all flags alike.
    bare = {candidate.lstrip("-"): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lstrip("-"), list(bare), n=1, cutoff=0.6)
    return f"; did you mean {bare[matches[0]]}?" if matches else ""


def validate_values(
    schema: type[Settings], values: Mapping[str, Any], *, strings: bool, label: Callable
) -> tuple[dict[str, Any], list[str]]:
    """Check one layer by itself: the values that are right, and a line for each that is not.

    `strings` converts a command line's text; a file's values must have the right type already.
    `label(name)` begins the line.
    """
    validate = schema.model_validate_strings if strings else schema.model_validate
    wrong: dict[str, str] = {}
    try:
        settings = validate(dict(values), strict=not strings, context={"one_layer": True})
    except ValidationError as failure:
        for error in failure.errors():
            wrong.setdefault(str(error["loc"][0]), _problem(error))
        right = {name: value for name, value in values.items() if name not in wrong}
        settings = validate(right, strict=not strings, context={"one_layer": True})
    checked = {name: getattr(settings, name) for name in values if name not in wrong}
    return checked, [f"{label(name)} {problem}" for name, problem in wrong.items()]
