"""Where a run's settings come from.

`ConfigLoader` lays layers over one another, the highest first, and remembers for each setting
which one it came from:

    the command line  >  --config FILE  >  configs/  >  config.json (legacy)  >  the defaults

The settings that a model was saved with, where a run goes on from one, stand between --config and
configs/. Which model that is may itself be set in any of these layers: so they are read first, and
merged when it is found.

Every value is checked against the schema in `parameters.py`, in whichever layer it stands, and
all problems are reported together. A command runs this before it imports torch, so that a typing
error is answered at once.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from parameters import ALIASES, DERIVED, GROUPS, ModelConfig, find_conflicts
from utils.checks import format_name, format_value, suggest_name, validate_values
from utils.command_line import format_flag
from utils.data_files import find_data_problem, resolve_data_path
from utils.errors import UserError
from utils.files import find_text_file_problem
from utils.run_manager import RECORD_VERSION

CHECKOUT = Path(__file__).resolve().parent
CONFIG_FILES = ("model.json", "train.yaml", "data.yaml", "tensorboard.json")
LEGACY_FILE = "config.json"
# What Folio did before there was a setting for it: what was recorded then goes on with it.
IMPLIED = {
    "optimizer": "adamw",
    "precision": "fp32",
    "compile_backend": "aot_eager",
    "split_by": "position",
    "window_order": "random",
}
LENGTH_SETTINGS = ("max_iters", "epochs", "max_minutes")


@dataclass(frozen=True)
class Layer:
    """One source of settings: its values, and the name of each value's origin."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedSettings:
    """The settings that a model was saved with.

    `origin` names the model. `binding` are the settings that can't be changed in it: what the
    command line or `--config` says otherwise is an error. The files of configs/ are mere defaults.
    """

    origin: str
    values: dict[str, Any]
    binding: frozenset[str]


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration, where each value came from, and what the user should be told."""

    config: ModelConfig
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    """What differs from the settings that the model was saved with: `name old → new (source)`."""
    rerun_of: dict[str, Any] | None = None
    """The `run` record of the full_config.json that `--config` named, if it named one."""


def upgrade_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that were once recorded, as they are written now."""
    now = {**IMPLIED, **settings}
    if isinstance(now.get("torch_compile"), bool):
        now["torch_compile"] = "on" if now["torch_compile"] else "off"
    return now


# ----------------------------------------------------------------------------------------------
# Files


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people write them, and no key twice.

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
    if problem := find_text_file_problem(path):
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
        raise UserError(f"{shown}: expected `key: value` settings, found {format_value(values)}")
    return values


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
        """Read all layers and merge them, for a run that begins with new weights.

        The arguments are those of `read`, the errors those of `Layers.merged`.
        """
        return self.read(flags, config_file, problems).merged()

    def read(
        self,
        flags: Mapping[str, Any] | None = None,
        config_file: str | None = None,
        problems: Sequence[str] = (),
    ) -> "Layers":
        """Read and check each layer by itself.

        Args:
            flags: the settings given on the command line, already of their types.
            config_file: what `--config` names.
            problems: what is already known to be wrong, to be reported with the rest.
        """
        problems = list(problems)
        rerun_of: dict[str, Any] | None = None
        flag_values = dict(flags or {})
        asked = [Layer(flag_values, {name: format_flag(name) for name in flag_values})]
        if config_file is not None:
            layer, rerun_of = self._config_file_layer(Path(config_file), problems)
            asked.append(layer)
        configs = self._configs_layer(problems)
        return Layers(asked, configs, self._legacy_layer(problems), problems, rerun_of)

    def _config_file_layer(
        self, path: Path, problems: list[str]
    ) -> tuple[Layer, dict[str, Any] | None]:
        """The file that `--config` names: flat settings, or the full_config.json of a run."""
        values = self._read(path, str(path), problems)
        rerun_of = None
        parts = {name: values.get(name) for name in ("config", "sources", "run")}
        if values.keys() - {"format_version"} == parts.keys():
            version = values.get("format_version", RECORD_VERSION)
            if version != RECORD_VERSION:
                problems.append(
                    f"{path}: format_version {format_value(version)}, and this Folio reads "
                    f"{RECORD_VERSION}: update Folio"
                )
                return Layer(), None
            if not all(isinstance(part, dict) for part in parts.values()):
                problems.append(f"{path}: not the record of a run: its parts must be objects")
                return Layer(), None
            rerun_of, values = values["run"], upgrade_settings(values["config"])
        return _checked_layer(values, str(path), problems), rerun_of

    def _configs_layer(self, problems: list[str]) -> Layer:
        """The files of configs/, which are one layer: a key may stand in one of them only."""
        merged = Layer()
        for name in CONFIG_FILES:
            path = self.configs_dir / name
            if not path.exists():
                continue
            shown = f"configs/{name}"
            layer = _checked_layer(self._read(path, shown, problems), shown, problems)
            for key in layer.values.keys() & merged.values.keys():
                problems.append(f"{key} stands in both {merged.origins[key]} and {shown}")
            merged.values.update(layer.values)
            merged.origins.update(layer.origins)
        return merged

    def _legacy_layer(self, problems: list[str]) -> Layer:
        path = self.working_dir / LEGACY_FILE
        if not path.exists():
            return Layer()
        values = self._read(path, LEGACY_FILE, problems)
        if "format_version" in values:  # a model's config.json, and we are in its directory
            return Layer()
        return _checked_layer(values, LEGACY_FILE, problems)

    @staticmethod
    def _read(path: Path, shown: str, problems: list[str]) -> dict[str, Any]:
        try:
            return read_config_file(path, shown)
        except UserError as error:
            problems += error.problems
            return {}


@dataclass(frozen=True)
class Layers:
    """The layers of a configuration, each checked by itself.

    `asked` is what this one command asks for: its flags, and the file that `--config` names.
    """

    asked: list[Layer]
    configs: Layer
    legacy: Layer
    problems: list[str]
    rerun_of: dict[str, Any] | None

    def setting(self, name: str) -> Any:
        """What a setting is, if no saved model has a say in it."""
        for layer in (*self.asked, self.configs, self.legacy):
            if name in layer.values:
                return layer.values[name]
        return ModelConfig.model_fields[name].default

    def origin(self, name: str) -> str:
        """Where that setting comes from."""
        for layer in (*self.asked, self.configs, self.legacy):
            if name in layer.values:
                return layer.origins[name]
        return "default"

    def merged(
        self, saved: SavedSettings | None = None, problems: Sequence[str] = ()
    ) -> LoadedConfig:
        """Lay the layers over one another, those of a saved model among them.

        Raises:
            UserError: with a line for each problem in any layer, `problems` included.
        """
        problems = [*self.problems, *problems]
        layers = [*self.asked, self.configs, self.legacy]
        if saved is not None:
            problems += self._conflicts_with(saved)
            newer = [name for name in saved.values if name not in ModelConfig.model_fields]
            problems += [
                f"{saved.origin}: has the setting {name}, of a newer Folio: update this one"
                for name in newer
            ]
            known = {name: value for name, value in saved.values.items() if name not in newer}
            layer = _checked_layer(known, saved.origin, problems)
            layers.insert(len(self.asked), layer)
        values, sources = _laid_over_one_another([_without_derived(layer) for layer in layers])
        sources = {name: sources.get(name, "default") for name in ModelConfig.model_fields}
        defaults = {name: info.default for name, info in ModelConfig.model_fields.items()}
        for names, problem in find_conflicts({**defaults, **values}):
            origins = ", ".join(f"{name}: {sources[name]}" for name in names)
            problems.append(f"{problem} ({origins})")
        if values.get("data") is not None:
            if problem := find_data_problem(values["data"]):
                is_recorded = saved is not None and sources["data"] == saved.origin
                remedy = "; name the text with --data FILE" if is_recorded else ""
                shown = format_name(values["data"])
                problems.append(f"{shown} ({sources['data']}): {problem}{remedy}")
        if problems:
            raise UserError(*problems)
        config = ModelConfig(**values)
        for name in DERIVED - values.keys():
            sources[name] = f"architecture {config.architecture} ({sources['architecture']})"
        changes = _changes(config, saved, sources) if saved is not None else []
        return LoadedConfig(config, sources, self._notes(), changes, self.rerun_of)

    def _conflicts_with(self, saved: SavedSettings) -> list[str]:
        asked, origins = _laid_over_one_another([_without_derived(layer) for layer in self.asked])
        return [
            f"{name} {format_value(value)} ({origins[name]}) is not the "
            f"{format_value(saved.values[name])} of {saved.origin}, where it is fixed for good: "
            "leave it out, or train another model"
            for name, value in asked.items()
            if name in saved.binding and value != saved.values[name]
        ]

    def _notes(self) -> list[str]:
        keys = [key for key in self.legacy.values if key in self.configs.values]
        if not keys:
            return []
        return [
            f"{LEGACY_FILE}: {', '.join(keys)} also set in configs/, which counts; "
            f"to use {LEGACY_FILE} instead: --config {LEGACY_FILE}"
        ]


def _checked_layer(values: Mapping[str, Any], origin: str, problems: list[str]) -> Layer:
    """Check the keys and values of one file, and resolve other names of a setting."""
    known: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if key == "$schema":
            continue
        if name not in ModelConfig.model_fields:
            hint = suggest_name(str(key), ModelConfig.model_fields)
            problems.append(f"{origin}: unknown key {format_name(key)}{hint}")
        elif name in known:
            alias = next(alias for alias, target in ALIASES.items() if target == name)
            problems.append(f"{origin}: {alias} is another name of {name}: remove one")
        else:
            known[name] = value
    right, wrong = validate_values(
        ModelConfig, known, strings=False, label=lambda name: f"{origin}: {name}"
    )
    problems += wrong
    return Layer(right, dict.fromkeys(right, origin))


def _laid_over_one_another(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the layers, the first of which is the highest, and where each came from.

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


def _without_derived(layer: Layer) -> Layer:
    """The layer without what it leaves to the architecture by a null."""
    kept = {n: v for n, v in layer.values.items() if v is not None or n not in DERIVED}
    return Layer(kept, layer.origins)


def _changes(config: ModelConfig, saved: SavedSettings, sources: Mapping[str, str]) -> list[str]:
    changes = []
    for name, old in saved.values.items():
        new = getattr(config, name)  # all of them are settings, or we would not come here
        if name == "data" and old is not None and new is not None:
            if resolve_data_path(new) == resolve_data_path(old):
                continue
        if new != old:
            changes.append(f"{name} {format_value(old)} → {format_value(new)} ({sources[name]})")
    return changes


def format_settings(loaded: LoadedConfig) -> str:
    """Every setting with its value and source, grouped and aligned: what `--show-config` prints."""
    lines = []
    followed = {
        "min_lr": f"learning_rate / 10 = {loaded.config.learning_rate / 10:g}",
        "lr_decay_iters": "max_iters",
        "micro_batch_size": "batch_size",
        "data": "input.txt, else Shakespeare",
    }
    for group, settings in GROUPS.items():
        lines.append(group)
        for name in settings.model_fields:
            value = getattr(loaded.config, name)
            shown = format_value(value)
            if value is None and name in followed:
                shown = f"null: {followed[name]}"
            lines.append(f"  {name:<20} {shown:<36} {loaded.sources[name]}")
    return "\n".join(lines)
