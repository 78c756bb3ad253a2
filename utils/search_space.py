"""The values of a search space: lists of choices, and ranges of numbers."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from parameters import ModelConfig
from utils.checks import format_value, validate_values
from utils.command_line import format_flag


def check_values(name: str, values: Any, label: str, problems: list[str]) -> Any:
    """Return choices or a range with values of the setting's type; append to `problems`."""
    is_range, found = isinstance(values, dict), []
    checked = {"low": None, "high": None, **values} if is_range else values
    keys = ("low", "high") if is_range else range(len(values) if isinstance(values, list) else 0)
    for key in keys:
        where = f"{label}: {key}" if is_range else label
        value = {name: checked[key]}
        settings, wrong = validate_values(ModelConfig, value, label=lambda _, w=where: w)
        checked[key] = settings.get(name)
        found += wrong
    if is_range:
        checked = {k: v for k, v in checked.items() if v is not None and v is not False}
    if not found and not (
        _is_range(checked) if is_range else 1 < len(keys) == len({*map(format_value, checked)})
    ):
        found = [
            f"{label} must be a list of two or more different choices, or numbers {{low: …, high: "
            f"…}}, with log: true if low is above 0, or a step that leads from low to high; got "
            f"{format_value(values)}; a value for all trials is a flag: {format_flag(name)}"
        ]
    problems += found
    return checked


def _is_range(values: Mapping[str, Any]) -> bool:
    low, high, log, step = (values.get(key) for key in ("low", "high", "log", "step"))
    is_known = values.keys() <= {"low", "high", "log", "step"} and isinstance(log, bool | None)
    if not is_known or type(low) not in (int, float) or type(high) is not type(low) or low >= high:
        return False
    if step is None or log:
        return not log or (low > 0 and step is None)
    # Exact decimals: 0.1 + 3 * 0.2 is more than 0.7 in binary.
    is_size = type(step) in (int, type(low)) and 0 < step <= high - low
    return is_size and (Fraction(str(high)) - Fraction(str(low))) % Fraction(str(step)) == 0


def list_values(values: list | dict[str, Any]) -> Sequence[Any]:
    """Return all values of a setting, or the two ends of real numbers as a tuple."""
    if isinstance(values, list):
        return values
    low, high = values["low"], values["high"]
    return range(low, high + 1, values.get("step", 1)) if isinstance(low, int) else (low, high)
