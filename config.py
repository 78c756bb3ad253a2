"""Where a run's settings come from.

`ConfigLoader` lays five layers over one another, the highest first, and remembers for each
setting which one it came from:

    the command line  >  --config FILE  >  configs/  >  config.json (legacy)  >  the defaults

Every value is checked against the schema in `parameters.py`, in whichever layer it stands, and
all problems are reported together. A command runs this before it imports torch, so that a typing
error is answered at once.
"""

import argparse
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import ValidationError

from parameters import ALIASES, GROUPS, ModelConfig, Settings, conflicts
from utils.errors import UserError
from utils.files import text_file_problem

CHECKOUT = Path(__file__).resolve().parent
CONFIG_FILES = ("model.json", "train.yaml", "data.yaml", "tensorboard.json")
LEGACY_FILE = "config.json"
LENGTH_SETTINGS = ("max_iters", "epochs", "max_minutes")


@dataclass(frozen=True)
class Layer:
    """One source of settings: its values, and the name of each value's origin."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration, where each value came from, and what the user should be told."""

    config: ModelConfig
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)
    rerun_of: dict[str, Any] | None = None
    """The `run` record of the full_config.json that `--config` named, if it named one."""


# ----------------------------------------------------------------------------------------------
# Files


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of everyday, and no key twice.

    PyYAML reads YAML 1.1, where `1e-3` is text, `017` is fifteen and `1:30` is ninety. These are
    the numbers of YAML 1.2; its words (yes, no, on, off) stay what PyYAML takes them for.
    """

    yaml_implicit_resolvers = {
        first: [rule for rule in rules if not rule[0].endswith((":int", ":float"))]
        + [("tag:yaml.org,2002:int", _INT), ("tag:yaml.org,2002:float", _FLOAT)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            raise _DuplicateKey(key)
        return super().construct_mapping(node, deep)


class _DuplicateKey(ValueError):
    """A key that stands twice in one file."""


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKey(key)
        values[key] = value
    return values


def read_config_file(path: Path, shown: str | None = None) -> dict[str, Any]:
    """Read a YAML or JSON file of flat keys, without judging them.

    Raises `UserError`, which calls the file `shown`, where it is missing, unreadable, or no
    mapping.
    """
    shown = shown or str(path)
    if problem := text_file_problem(path):
        raise UserError(f"{shown}: {problem}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=_json_object)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.load(text, _Loader)  # a SafeLoader
        else:
            raise UserError(f"{shown}: a configuration file ends in .yaml, .yml or .json")
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 text (byte {error.start})") from None
    except _DuplicateKey as error:
        raise UserError(f"{shown}: the key {error} stands twice: remove one") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{shown}, line {error.lineno}: not JSON: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{shown}{line}: not YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{shown}: cannot be read: nested too deeply") from None
    except Exception as error:  # PyYAML lets through whatever its conversions raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{shown}: cannot be read: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{shown}: expected `key: value` settings, found {_shown(values)}")
    return values


# ----------------------------------------------------------------------------------------------
# Checks


def _shown(value: Any) -> str:
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
        must = "must be auto, cpu, mps, cuda or cuda:N"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        ((bound, limit),) = limits.items()
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        must = f"must be {words[bound]} {limit if isinstance(limit, int) else format(limit, 'g')}"
    else:
        must = error["msg"]
    return f"{must}, got {_shown(error['input'])}"


def _key(key: Any) -> str:
    """A key as it may be printed: as it is, unless that would break the line."""
    return key if isinstance(key, str) and key.isprintable() and key else _shown(key)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for a misspelt name, or nothing where nothing is near."""
    # Without their dashes, which would make all flags alike.
    bare = {candidate.lstrip("-"): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lstrip("-"), list(bare), n=1, cutoff=0.6)
    return f"; did you mean {bare[matches[0]]}?" if matches else ""


def _checked(
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


# ----------------------------------------------------------------------------------------------
# The command line

_NO_VALUE = object()
_BOOL = "true|false"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line like all others, without a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """Flags in one column, meanings in the next, and each value's name said once."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.metavar == _BOOL:
            return ", ".join("--[no-]" + flag[2:] for flag in action.option_strings)
        value = f" {action.metavar}" if action.metavar else ""
        return ", ".join(action.option_strings) + value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(annotation: Any) -> str:
    """What stands for a value in `--help`: N, X, TEXT or the choices."""
    options = [option for option in get_args(annotation) if option is not NoneType]
    if get_origin(annotation) is Literal:
        return "|".join(str(option) for option in options)
    if options:  # Optional, or Annotated inside it
        return _metavar(options[0])
    return {bool: _BOOL, int: "N", float: "X"}.get(annotation, "TEXT")


@dataclass(frozen=True)
class Action:
    """A flag of one command that is not a setting, such as `--config FILE` or `--dry-run`."""

    name: str
    meaning: str
    metavar: str | None = None


class CommandLine:
    """A command's flags, generated from a schema: `--help`, parsing, and every complaint.

    `--kebab-case` and `--snake_case` are the same flag, abbreviations are not accepted, and a
    boolean is `--flag`, `--no-flag` or `--flag false`.

    Args:
        description: a command's docstring; its first paragraph heads `--help`.
        schema: the settings.
        actions: the command's other flags.
        groups: how `--help` groups the settings; all in one group by default.
        aliases: further names of settings.
    """

    def __init__(
        self,
        description: str,
        schema: type[Settings],
        actions: Sequence[Action] = (),
        groups: Mapping[str, type[Settings]] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        self.schema = schema
        self.actions = {action.name: action for action in actions}
        self.aliases = dict(aliases or {})
        self.parser = _Parser(
            description=description.strip().partition("\n\n")[0],
            usage="python %(prog)s [--setting VALUE ...]",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        about = self.parser.add_argument_group("command")
        about.add_argument("-h", "--help", action="help", help="Show this page and exit.")
        for action in actions:
            self._add(about, action.name, action.metavar, action.meaning)
        for title, group in (groups or {"settings": schema}).items():
            section = self.parser.add_argument_group(f"{title} settings", group.__doc__)
            for name, info in group.model_fields.items():
                default = f" [{_shown(info.default)}]".replace('"', "")
                self._add(
                    section, name, _metavar(info.annotation), (info.description or "") + default
                )

    def _add(self, group: Any, name: str, metavar: str | None, meaning: str) -> None:
        flags = [_flag(name), *(_flag(a) for a, target in self.aliases.items() if target == name)]
        shared = {"dest": name, "default": argparse.SUPPRESS}
        meaning = meaning.replace("%", "%%")
        if metavar is None:
            group.add_argument(*flags, action="store_true", help=meaning, **shared)
            return
        # A flag without its value is noticed after parsing, so that all problems come together.
        group.add_argument(
            *flags, nargs="?", const=_NO_VALUE, metavar=metavar, help=meaning, **shared
        )
        if metavar == _BOOL:
            group.add_argument(
                _flag("no_" + name),
                action="store_const",
                const="false",
                help=argparse.SUPPRESS,
                **shared,
            )

    def parse(self, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Split `argv` into (settings, actions, problems). `--help` prints and exits with 0."""
        try:
            known, unknown = self.parser.parse_known_args(self._normalised(argv))
        except UserError as error:
            return {}, {}, list(error.problems)
        problems = self._unknown_flags(unknown)
        texts: dict[str, str | None] = {}
        actions: dict[str, Any] = {}
        for name, value in vars(known).items():
            is_bool = name in self.schema.model_fields and self._is_bool(name)
            if value in (_NO_VALUE, "") and not is_bool and name not in self._texts():
                problems.append(f"{_flag(name)} needs a value")
            elif value is _NO_VALUE and not is_bool:
                problems.append(
                    f"{_flag(name)} needs a value; one that begins with a dash is written "
                    f"{_flag(name)}=VALUE"
                )
            elif name in self.actions:
                actions[name] = value
            elif value is _NO_VALUE:
                texts[name] = "true"
            else:
                null = value == "null" or (value == "none" and name not in self._texts())
                texts[name] = None if null and self._nullable(name) else value
        # pydantic's string mode has no null, so nulls are checked as values.
        nulls = {name: None for name, value in texts.items() if value is None}
        texts = {name: value for name, value in texts.items() if value is not None}
        values, wrong = _checked(self.schema, texts, strings=True, label=_flag)
        return {**values, **nulls}, actions, problems + wrong

    def _is_bool(self, name: str) -> bool:
        return self.schema.model_fields[name].annotation is bool

    def _texts(self) -> set[str]:
        """The settings that take any text: `none` may be a file's name, `null` stays null."""
        fields = self.schema.model_fields.items()
        return {name for name, info in fields if _metavar(info.annotation) == "TEXT"}

    def _nullable(self, name: str) -> bool:
        return NoneType in get_args(self.schema.model_fields[name].annotation)

    def _normalised(self, argv: Sequence[str]) -> list[str]:
        """Fold `--snake_case` into `--kebab-case`, and join a negative number to its flag.

        argparse takes `-1e-3` for a flag, unless an equals sign ties it to the one before.
        """
        takes_value = {
            flag
            for action in self.parser._actions
            for flag in action.option_strings
            if action.nargs == "?"
        }
        words: list[str] = []
        for word in argv:
            is_negative = re.fullmatch(r"-(\d|\.\d|inf|nan).*", word)
            if is_negative and words and words[-1] in takes_value:
                words[-1] += "=" + word
            elif word.startswith("--"):
                name, equals, value = word.partition("=")
                words.append(name.replace("_", "-") + equals + value)
            else:
                words.append(word)
        return words

    def _unknown_flags(self, unknown: Sequence[str]) -> list[str]:
        flags = [flag for action in self.parser._actions for flag in action.option_strings]
        problems, after_unknown_flag = [], False
        for word in unknown:
            name = word.partition("=")[0]
            if word.startswith("-"):
                problems.append(f"unknown flag {_key(name)}{nearest(name, flags)}")
            elif not after_unknown_flag:  # what follows an unknown flag was its value
                problems.append(f"unexpected argument {_shown(word)}: settings are --flags")
            after_unknown_flag = word.startswith("-") and "=" not in word
        return problems


# ----------------------------------------------------------------------------------------------
# The layers


class ConfigLoader:
    """Builds one `ModelConfig` from the layers, with the source of each value.

    Args:
        configs_dir: the folder that holds `CONFIG_FILES`; the checkout's own by default.
        working_dir: where a legacy `config.json` is looked for.
    """

    def __init__(self, configs_dir: Path = CHECKOUT / "configs", working_dir: Path | None = None):
        self.configs_dir = Path(configs_dir)
        self.working_dir = Path(working_dir or ".")

    def load(
        self,
        flags: Mapping[str, Any] | None = None,
        config_file: str | None = None,
        problems: Sequence[str] = (),
    ) -> LoadedConfig:
        """Merge all layers.

        Args:
            flags: the settings given on the command line, already of their types.
            config_file: what `--config` names.
            problems: what is already known to be wrong, to be reported with the rest.

        Raises:
            UserError: with a line for each problem in any layer.
        """
        problems = list(problems)
        rerun_of: dict[str, Any] | None = None
        flag_values = dict(flags or {})
        layers = [Layer(flag_values, {name: _flag(name) for name in flag_values})]
        if config_file is not None:
            layer, rerun_of = self._config_file_layer(Path(config_file), problems)
            layers.append(layer)
        configs = self._configs_layer(problems)
        legacy = self._legacy_layer(problems)
        layers += [configs, legacy]

        values, sources = self._merged(layers)
        sources = {name: sources.get(name, "default") for name in ModelConfig.model_fields}
        defaults = {name: info.default for name, info in ModelConfig.model_fields.items()}
        for names, problem in conflicts({**defaults, **values}):
            origins = ", ".join(f"{name}: {sources[name]}" for name in names)
            problems.append(f"{problem} ({origins})")
        if values.get("data") is not None:
            if problem := text_file_problem(Path(values["data"])):
                problems.append(f"{_key(values['data'])} ({sources['data']}): {problem}")
        if problems:
            raise UserError(*problems)
        return LoadedConfig(
            ModelConfig(**values), sources, self._shadowed(legacy, configs), rerun_of
        )

    def _config_file_layer(
        self, path: Path, problems: list[str]
    ) -> tuple[Layer, dict[str, Any] | None]:
        """The file that `--config` names: flat settings, or the full_config.json of a run."""
        values = self._read(path, str(path), problems)
        rerun_of = None
        if values.keys() == {"config", "sources", "run"}:
            if not all(isinstance(part, dict) for part in values.values()):
                problems.append(f"{path}: not the record of a run: its parts must be objects")
                return Layer(), None
            rerun_of, values = values["run"], values["config"]
        return self._layer(values, str(path), problems), rerun_of

    def _configs_layer(self, problems: list[str]) -> Layer:
        """The files of configs/, which are one layer: a key may stand in one of them only."""
        merged = Layer()
        for name in CONFIG_FILES:
            path = self.configs_dir / name
            if not path.exists():
                continue
            shown = f"configs/{name}"
            layer = self._layer(self._read(path, shown, problems), shown, problems)
            for key in layer.values.keys() & merged.values.keys():
                problems.append(f"{key} stands in both {merged.origins[key]} and {shown}")
            merged.values.update(layer.values)
            merged.origins.update(layer.origins)
        return merged

    def _legacy_layer(self, problems: list[str]) -> Layer:
        path = self.working_dir / LEGACY_FILE
        if not path.exists():
            return Layer()
        return self._layer(self._read(path, LEGACY_FILE, problems), LEGACY_FILE, problems)

    @staticmethod
    def _read(path: Path, shown: str, problems: list[str]) -> dict[str, Any]:
        try:
            return read_config_file(path, shown)
        except UserError as error:
            problems += error.problems
            return {}

    @staticmethod
    def _layer(values: Mapping[str, Any], origin: str, problems: list[str]) -> Layer:
        """Check the keys and values of one file, and resolve other names of a setting."""
        known: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key, key)
            if key == "$schema":
                continue
            if name not in ModelConfig.model_fields:
                hint = nearest(str(key), ModelConfig.model_fields)
                problems.append(f"{origin}: unknown key {_key(key)}{hint}")
            elif name in known:
                alias = next(alias for alias, target in ALIASES.items() if target == name)
                problems.append(f"{origin}: {alias} is another name of {name}: remove one")
            else:
                known[name] = value
        right, wrong = _checked(
            ModelConfig, known, strings=False, label=lambda name: f"{origin}: {name}"
        )
        problems += wrong
        return Layer(right, dict.fromkeys(right, origin))

    @staticmethod
    def _merged(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
        """Lay the layers over one another, the first highest.

        The length of a run is one thing under three names: where a layer sets any of them, the
        lower layers' are dropped, so that `--epochs 2` is not in conflict with a default.
        """
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        length_is_set = False
        for layer in layers:
            sets_length = any(layer.values.get(name) is not None for name in LENGTH_SETTINGS)
            for name, value in layer.values.items():
                if name in values or (name in LENGTH_SETTINGS and length_is_set):
                    continue
                values[name] = value
                sources[name] = layer.origins[name]
            if sets_length and not length_is_set:
                length_is_set = True
                decided = next(n for n in LENGTH_SETTINGS if layer.values.get(n) is not None)
                for name in LENGTH_SETTINGS:
                    values.setdefault(name, None)
                    sources.setdefault(name, layer.origins[decided])
        return values, sources

    @staticmethod
    def _shadowed(legacy: Layer, configs: Layer) -> list[str]:
        keys = [key for key in legacy.values if key in configs.values]
        if not keys:
            return []
        return [
            f"{LEGACY_FILE}: {', '.join(keys)} also set in configs/, which counts; "
            f"to use {LEGACY_FILE} instead: --config {LEGACY_FILE}"
        ]


def describe(loaded: LoadedConfig) -> str:
    """Every setting with its value and source, grouped and aligned: what `--show-config` prints."""
    lines = []
    followed = {
        "min_lr": f"learning_rate / 10 = {loaded.config.learning_rate / 10:g}",
        "lr_decay_iters": "max_iters",
        "micro_batch_size": "batch_size",
        "data": "input.txt, else Shakespeare",
    }
    for group, settings in GROUPS.items():
        lines.append(f"{group}")
        for name in settings.model_fields:
            value = getattr(loaded.config, name)
            shown = _shown(value)
            if value is None and name in followed:
                shown = f"null: {followed[name]}"
            lines.append(f"  {name:<18} {shown:<32} {loaded.sources[name]}")
    return "\n".join(lines)
