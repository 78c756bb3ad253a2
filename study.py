"""What a study is: the settings that it searches, their ranges, and what all its trials share.

The space is a YAML file of settings, each with a list of choices or a range. It is checked against
the same schema as every value, and by the same rules for what goes together, before any trial runs.
"""

import itertools
import math
import random
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from start import ResumePlan, choose_start, plan_run

from config import ConfigLoader, Layer, Layers, LoadedConfig, read_config_file
from parameters import (
    DERIVED,
    Architecture,
    Data,
    ModelConfig,
    ModelName,
    Positive,
    Settings,
    Training,
)
from utils.checks import format_name, format_value, suggest_name, validate_values
from utils.command_line import format_flag
from utils.errors import UserError

# What may be searched: what is learned, and how. The rest says where and on what it is measured.
SEARCHED = (set(Architecture.model_fields) | set(Training.model_fields) | {"tokenizer"}) - {
    *("eval_interval", "eval_iters", "early_stopping_patience", "seed"),
    *("epochs", "max_minutes", "micro_batch_size"),
}
DRAWS = 300  # combinations that are tried to see which of a space's are possible
COUNTED = 1000  # combinations of a space, of which each is looked at
STEPS = 10**12  # in a range: with more, its numbers could not be told from each other


class StudySettings(Settings):
    """The study, and where it is kept."""

    space: str | None = None
    """The YAML file of the settings to search and their ranges: configs/search/ has one."""

    study: ModelName | None = None
    """The study's name. null: that of the space's file."""

    trials: Positive = 20
    """Trials of the whole study, whoever runs them, that end or are stopped for their val loss."""

    storage: str | None = None
    """The study's file: a journal, or SQLite (.db). null: studies/<study>.log in runs_dir."""

    output: str | None = None
    """Where the best trial's settings are written. null: studies/<study>.yaml in runs_dir."""


# ----------------------------------------------------------------------------------------------
# The space


@dataclass(frozen=True)
class Choices:
    """Some values of a setting."""

    values: tuple[Any, ...]

    def draw(self, generator: random.Random) -> Any:
        """Any of them."""
        return generator.choice(self.values)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.values)

    @property
    def all(self) -> Sequence[Any]:
        """All of them."""
        return self.values

    @property
    def declared(self) -> list[Any]:
        """As the file has it."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """The values of a setting from `low` to `high`, both included; `step` apart, if it is given."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def draw(self, generator: random.Random) -> int | float:
        """Any of them; which are likelier is the sampler's business."""
        if self.count is None:
            return generator.uniform(self.low, self.high)
        return self._at(generator.randrange(self.count))

    @property
    def count(self) -> int | None:
        """How many there are; None where they cannot be counted."""
        if isinstance(self.low, int):
            return int(self.high - self.low) // int(self.step or 1) + 1
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    @property
    def all(self) -> Sequence[int | float] | None:
        """All of them, which may be very many; None where they cannot be counted."""
        return None if self.count is None else [self._at(number) for number in range(self.count)]

    def nearest(self, value: int | float) -> int | float:
        """The one that is nearest to `value`."""
        if self.count is None:
            return value
        return self._at(round((value - self.low) / (self.step or 1)))

    def _at(self, number: int) -> int | float:
        # Not what the sum is rounded to: 0.1 + 3 * 0.2 is more than 0.7.
        is_last = self.count is not None and number == self.count - 1
        return self.high if is_last else self.low + (self.step or 1) * number

    @property
    def declared(self) -> dict[str, Any]:
        """As the file has it."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


Space = Mapping[str, Choices | Range]


def read_space(file: str | None, flags: Mapping[str, Any], problems: list[str]) -> Space:
    """Read and check a search space; `flags` are what holds for all trials.

    What is wrong with it is added to `problems`, a line each.
    """
    if file is None:
        problems.append("--space FILE is missing: the settings to search and their ranges")
        return {}
    try:
        declared = read_config_file(Path(file))
    except UserError as error:
        problems += error.problems
        return {}
    declared.pop("$schema", None)
    if not declared:
        problems.append(f"{file}: names no setting to search")
    space: dict[str, Choices | Range] = {}
    for name, values in declared.items():
        label = f"{file}: {format_name(name)}"
        if name not in ModelConfig.model_fields:
            hint = suggest_name(str(name), SEARCHED)
            problems.append(f"{file}: unknown key {format_name(name)}{hint}")
        elif name not in SEARCHED:
            problems.append(
                f"{label} cannot be searched, as it is not about what the model learns, or says "
                "how that is measured: give it as a flag"
            )
        elif name in flags:
            problems.append(f"{label} is searched, and {format_flag(name)} fixes it: leave one out")
        else:
            found: list[str] = []
            read = _range if isinstance(values, dict) else _choices
            searched = read(name, values, label, found)
            problems += found
            if not found:
                space[name] = searched
    return space


def _choices(name: str, values: Any, label: str, problems: list[str]) -> Choices:
    if not isinstance(values, list):
        problems.append(
            f"{label} must be a list of choices, or {{low: …, high: …}}, got {format_value(values)}; "
            f"one value for all trials is a flag: {format_flag(name)}"
        )
        return Choices(())
    legal = [_legal(name, value, label, problems) for value in values]
    if not problems and len(set(map(format_value, legal))) < max(2, len(legal)):
        twice = "has fewer than two choices" if len(legal) < 2 else "has a choice twice"
        problems.append(f"{label} {twice}: {format_value(values)}")
    return Choices(tuple(legal))


def _range(name: str, values: Mapping[str, Any], label: str, problems: list[str]) -> Range:
    nothing = Range(0, 0)
    kind = _number(ModelConfig.model_fields[name].annotation)
    if kind is None:
        problems.append(f"{label} has no range, as it is no number: give a list of choices")
        return nothing
    if unknown := values.keys() - {"low", "high", "log", "step"}:
        shown = ", ".join(sorted(map(format_name, unknown)))
        problems.append(f"{label} has low, high, log and step, and not {shown}")
    ends = {}
    for end in ("low", "high"):
        if end not in values:
            problems.append(f"{label} lacks its {end}")
        else:
            told = f"{label}: {end}"
            value = _legal(name, values[end], told, problems)
            if value is None and values[end] is None:
                problems.append(f"{told} must be a number, got null")
            elif value is not None:
                ends[end] = kind(value)
    log, step = values.get("log", False), values.get("step")
    if not isinstance(log, bool):
        problems.append(f"{label}: log must be true or false, got {format_value(log)}")
    is_step = isinstance(step, (int, kind)) and not isinstance(step, bool)
    is_step = is_step and 0 < step < math.inf
    if step is not None and not is_step:
        what = "whole number" if kind is int else "number"
        problems.append(f"{label}: step must be a {what} above 0, got {format_value(step)}")
    if problems:
        return nothing
    low, high = ends["low"], ends["high"]
    step = None if step is None else kind(step)
    if low >= high:
        problems.append(f"{label}: low {low:g} must be below high {high:g}")
    elif log and step is not None:
        problems.append(f"{label}: log and step do not go together: leave one out")
    elif log and low <= 0:
        problems.append(f"{label}: with log, low must be above 0, got {low:g}")
    elif step is not None and (high - low) / step > STEPS:
        problems.append(
            f"{label}: step {step:g} is too small for {low:g} to {high:g}: leave it out"
        )
    elif step is not None and (_exact(high) - _exact(low)) % _exact(step):
        problems.append(f"{label}: high {high:g} is not low {low:g} and a multiple of {step:g}")
    return Range(low, high, log, step)


def _exact(number: int | float) -> Fraction:
    """The number that the file has, and not the float that is nearest to it."""
    return Fraction(str(number))


def _legal(name: str, value: Any, label: str, problems: list[str]) -> Any:
    """The value as the setting has it; None where it is no legal one, which is told."""
    right, wrong = validate_values(ModelConfig, {name: value}, strings=False, label=lambda _: label)
    problems += wrong
    return right.get(name)


def _number(annotation: Any) -> type[int] | type[float] | None:
    """The type of a setting's numbers; None where its values are none."""
    if annotation in (int, float):
        return annotation
    inner = [each for each in get_args(annotation) if each is not types.NoneType]
    return _number(inner[0]) if inner else None


# ----------------------------------------------------------------------------------------------
# What a trial is


class _Fixed(ConfigLoader):
    """Layers that were read once: what a file says later changes no study that goes on."""

    def __init__(self, layers: Layers):
        super().__init__()
        self._layers = layers

    def read(self, *arguments: Any) -> Layers:
        return self._layers


@dataclass(frozen=True)
class Recipe:
    """All that a study's trials have in common, and the space that they differ in."""

    study: str
    space: Space
    layers: Layers
    start: ResumePlan
    trials: int
    storage: Path
    preset: Path
    base: ModelConfig  # the settings of one combination that is possible
    combinations: Sequence[dict[str, Any]] | None = None  # all possible ones, if they are few

    @property
    def measure(self) -> str:
        """What a trial is judged by. Losses per token compare where the tokens are the same."""
        return "val_bits_per_byte" if "tokenizer" in self.space else "val_loss"

    @property
    def declared(self) -> dict[str, Any]:
        """The space, as its file has it."""
        return {name: values.declared for name, values in self.space.items()}

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that decide what a trial learns, and are the same in all of them."""
        derived = DERIVED if "architecture" in self.space else frozenset()
        names = {*SEARCHED, *Data.model_fields, *Training.model_fields, "init_from"}
        names -= {"data", "micro_batch_size", *self.space, *derived}
        return {
            name: getattr(self.base, name) for name in ModelConfig.model_fields if name in names
        }

    def settled(self, params: Mapping[str, Any]) -> LoadedConfig:
        """The settings of the trial that tries `params`. Raises `UserError` for conflicts."""
        return self._with(params, f"study {self.study}").merged(self.start.saved_settings)

    def is_possible(self, params: Mapping[str, Any]) -> bool:
        """Whether these go together."""
        try:
            self.settled(params)
        except UserError:
            return False
        return True

    def plan(
        self, params: Mapping[str, Any], number: int, checkpoint: Path | None
    ) -> tuple[LoadedConfig, ResumePlan]:
        """The settings and the beginning of the run that is trial `number`'s.

        Raises `UserError` where that cannot be: for a checkpoint that is damaged, say.
        """
        tagged = {**params, "run_tag": f"{self.study}_{number}"}
        layers = self._with(tagged, f"trial {number} of study {self.study}")
        resume = None if checkpoint is None else str(checkpoint)
        return plan_run(resume=resume, loader=_Fixed(layers))

    def _with(self, values: Mapping[str, Any], origin: str) -> Layers:
        layer = Layer(dict(values), dict.fromkeys(values, origin))
        return replace(self.layers, asked=[layer, *self.layers.asked])


def create_recipe(order: StudySettings, space: Space, layers: Layers) -> Recipe:
    """Check what is asked for: that there are possible combinations, each choice in one of them.

    Raises `UserError` with a line for each problem.
    """
    problems = [
        f"{name} ({layers.origin(name)}): each run of a study is named by its trial: leave it out"
        for name in ("run_tag", "model_name")
        if layers.setting(name) is not None
    ]
    if layers.problems or problems:
        raise UserError(*layers.problems, *problems)
    assert order.space is not None
    name = order.study or Path(order.space).stem
    _, wrong = validate_values(StudySettings, {"study": name}, strings=False, label=format_flag)
    if order.storage and "://" in order.storage:
        wrong.append(f"--storage {order.storage} is no file: name a journal, or SQLite (.db)")
    if wrong:
        raise UserError(*wrong)
    studies = Path(layers.setting("runs_dir")) / "studies"
    recipe = Recipe(
        study=name,
        space=space,
        layers=layers,
        start=choose_start(layers.setting, layers.origin),
        trials=order.trials,
        storage=Path(order.storage) if order.storage else studies / f"{name}.log",
        preset=Path(order.output) if order.output else studies / f"{name}.yaml",
        base=ModelConfig(),
    )
    recipe = replace(recipe, base=_possible(recipe, {}))
    for setting, choices in space.items():
        for value in choices.values if isinstance(choices, Choices) else ():
            try:
                _possible(recipe, {setting: value})
            except UserError as error:
                shown = f"{order.space}: {setting} {format_value(value)}"
                wrong.append(f"{shown} is possible in no trial: {error.problems[0]}")
    if wrong:
        raise UserError(*wrong)
    counts = [searched.count for searched in space.values()]
    if None in counts or math.prod(counts) > COUNTED:
        return recipe
    values = [searched.all for searched in space.values()]
    combinations = [dict(zip(space, each, strict=True)) for each in itertools.product(*values)]
    combinations = [each for each in combinations if recipe.is_possible(each)]
    trials = min(recipe.trials, len(combinations))
    return replace(recipe, combinations=combinations, trials=trials)


def _possible(recipe: Recipe, pinned: Mapping[str, Any]) -> ModelConfig:
    """The settings of a possible combination with `pinned` in it. Raises the last `UserError`."""
    generator = random.Random(0)
    why = UserError()
    for _ in range(DRAWS):
        drawn = {name: values.draw(generator) for name, values in recipe.space.items()}
        try:
            return recipe.settled({**drawn, **pinned}).config
        except UserError as error:
            why = error
    raise why
