"""Load the settings of a run, and record the source of each value.

Sources, highest priority first:

    command line  >  --config FILE  >  checkpoint  >  configs/  >  config.json (legacy)  >  defaults

The checkpoint counts only when a run resumes or fine-tunes. The other sources decide which
checkpoint that is, so they are read first and merged once it is known.

Every value is checked against the schema in `parameters.py`, whatever its source, and all problems
are reported together. Nothing here imports torch, so that a typo is reported at once.
"""

import contextlib
import copy
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from parameters import (
    ALIASES,
    BY_ARCHITECTURE,
    DEFAULT_VOCAB_SIZE,
    GROUPS,
    SHAPE_SETTINGS,
    ModelConfig,
    find_conflicts,
)
from utils.checks import describe_unknown, format_name, format_value, validate_values
from utils.command_line import format_flag
from utils.data_files import find_data_problem, resolve_data_path
from utils.errors import UserError, format_reason
from utils.files import find_text_file_problem, is_present, read_regular
from utils.run_manager import RECORD_VERSION

CHECKOUT = Path(__file__).resolve().parent
CONFIG_FILES = ("model.json", "train.yaml", "data.yaml", "tensorboard.json")
LEGACY_FILE = "config.json"
# Values that were hard-coded before these settings existed, for runs recorded at that time.
VALUES_BEFORE_SETTING = {
    "optimizer": "adamw",
    "precision": "fp32",
    "compile_backend": "aot_eager",
    "split_by": "position",
    "window_order": "random",
    "size": None,
}
# Bytes of a configuration file. PyYAML reads a list at 50 KB a second; a run's record is JSON.
MAX_JSON_BYTES, MAX_YAML_BYTES = 1 << 20, 1 << 17
LENGTH_SETTINGS = ("max_iters", "epochs", "max_minutes")


class Setting(NamedTuple):
    """A value and the source it came from, as shown to the user."""

    value: Any
    source: str


Layer = dict[str, Setting]  # the settings from one source
DEFAULTS = {n: Setting(info.default, "default") for n, info in ModelConfig.model_fields.items()}


@dataclass(frozen=True)
class CheckpointSettings:
    """The settings saved in a checkpoint; those in `fixed` cannot be changed in its model."""

    path: str
    values: dict[str, Any]
    fixed: frozenset[str]


@dataclass(frozen=True)
class LoadedConfig:
    """The merged settings and the source of each.

    `notes` are lines for the user. `changes` lists what differs from the checkpoint, as
    `name old → new (source)`. `rerun_of` is the `run` part of a full_config.json that `--config`
    named.
    """

    config: ModelConfig
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    rerun_of: dict[str, Any] | None = None


def upgrade_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in settings that older versions did not record."""
    upgraded = {**VALUES_BEFORE_SETTING, **settings}
    if isinstance(upgraded.get("torch_compile"), bool):
        upgraded["torch_compile"] = "on" if upgraded["torch_compile"] else "off"
    return upgraded


class ConfigLoader:
    """Reads every source of settings except the checkpoint; `load` merges them.

    Args:
        flags: settings from the command line, parsed and validated.
        config_file: the argument of `--config`.
        problems: problems found earlier, reported with the others.
        configs_dir: the directory of `CONFIG_FILES`; the checkout's own by default.
        working_dir: the directory that may hold a legacy `config.json`.
    """

    def __init__(
        self,
        flags: Mapping[str, Any] | None = None,
        config_file: str | None = None,
        problems: Sequence[str] = (),
        *,
        configs_dir: Path = CHECKOUT / "configs",
        working_dir: Path = Path(),
    ):
        self.problems = list(problems)
        self.rerun_of: dict[str, Any] | None = None
        flag_layer = {n: Setting(value, format_flag(n)) for n, value in (flags or {}).items()}
        file_layer = self._read_named_file(config_file) if config_file is not None else {}
        self._requested = [flag_layer, file_layer]  # these override a checkpoint
        self._configs = self._read_configs(configs_dir)
        self._legacy = self._read_legacy(working_dir / LEGACY_FILE)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], source: str) -> "ConfigLoader":
        """Return a loader whose settings of highest priority come from Python code.

        They are checked as those of a file are, but may be paths and numbers of NumPy.
        """
        problems: list[str] = []
        plain = {name: _to_plain(value) for name, value in settings.items()}
        layer = _check_layer(plain, source, problems)
        values = {name: setting.value for name, setting in layer.items()}
        return cls(problems=problems).override(values, source)

    def get(self, name: str) -> Setting:
        """Return a setting, ignoring any checkpoint."""
        return _merge_layers(*self._requested, self._configs, self._legacy, DEFAULTS)[name]

    def override(self, values: Mapping[str, Any], source: str) -> "ConfigLoader":
        """Return a copy in which `values` have the highest priority."""
        changed = copy.copy(self)
        top = {name: Setting(value, source) for name, value in values.items()}
        changed._requested = [top, *self._requested]
        return changed

    def load(
        self, checkpoint: CheckpointSettings | None = None, problems: Sequence[str] = ()
    ) -> LoadedConfig:
        """Merge all sources. Raises `UserError` with a line for each problem in any of them."""
        problems = [*self.problems, *problems]
        saved: Layer = {}
        if checkpoint is not None:
            problems += self._find_fixed_conflicts(checkpoint)
            known = {n: v for n, v in checkpoint.values.items() if n in ModelConfig.model_fields}
            problems += [
                f"{checkpoint.path}: unknown setting {name}: update Folio"
                for name in checkpoint.values
                if name not in known
            ]
            saved = _check_layer(known, checkpoint.path, problems)
        merged = _merge_layers(*self._requested, saved, self._configs, self._legacy, DEFAULTS)
        if "size" in saved:  # a resumed model already has a size
            merged["size"] = saved["size"]
        values = {name: setting.value for name, setting in merged.items()}
        # Only null settings that the architecture determines are missing from `merged`.
        architecture = merged["architecture"]
        by_architecture = f"architecture {architecture.value} ({architecture.source})"
        sources = {
            name: merged[name].source if name in merged else by_architecture
            for name in ModelConfig.model_fields
        }
        if checkpoint is not None and values["size"] == "auto":
            problems.append(
                f"size auto ({sources['size']}) is for a new model: the shape of that in "
                f"{checkpoint.path} cannot change"
            )
        # Those of configs/ stand in two files, one of which sets the default shape.
        for layer in (*self._requested, self._legacy):
            shape = [name for name in SHAPE_SETTINGS if name in layer]
            if shape and values["size"] == "auto" and layer.get("size") == merged["size"]:
                problems.append(
                    f"size auto ({sources['size']}) and {', '.join(shape)} are set: auto chooses "
                    f"{', '.join(SHAPE_SETTINGS)}, so remove one or the other"
                )
        for names, problem in find_conflicts(values):
            problems.append(f"{problem} ({', '.join(f'{n}: {sources[n]}' for n in names)})")
        if values.get("data") is not None and (problem := find_data_problem(values["data"])):
            is_recorded = checkpoint is not None and sources["data"] == checkpoint.path
            remedy = "; give the text's path with --data FILE" if is_recorded else ""
            problems.append(f"{format_name(values['data'])} ({sources['data']}): {problem}{remedy}")
        directory, name = Path(values["checkpoints_dir"]), values["model_name"]
        if name is not None and (problem := find_case_problem(directory, name)):
            problems.append(f"model_name {name} ({sources['model_name']}): {problem}")
        if problems:
            raise UserError(*problems)
        config = ModelConfig(**values)
        changes = _list_changes(config, checkpoint, sources) if checkpoint is not None else []
        notes = []
        if shadowed := [name for name in self._legacy if name in self._configs]:
            notes = [
                f"Note: configs/ overrides {', '.join(shadowed)} of {LEGACY_FILE}; "
                f"--config {LEGACY_FILE} gives that file priority"
            ]
        return LoadedConfig(config, sources, notes, changes, self.rerun_of)

    def _find_fixed_conflicts(self, checkpoint: CheckpointSettings) -> list[str]:
        return [
            f"{name} {format_value(value)} ({source}) conflicts with {name} "
            f"{format_value(checkpoint.values[name])} of {checkpoint.path}, which cannot change: "
            "remove this setting, or train a new model"
            for name, (value, source) in _merge_layers(*self._requested).items()
            if name in checkpoint.fixed and value != checkpoint.values[name]
        ]

    def _read_named_file(self, name: str) -> Layer:
        """Read the file of `--config`: flat settings, or a run's full_config.json."""
        values = self._read(Path(name), name)
        parts = {part: values.get(part) for part in ("config", "sources", "run")}
        if values.keys() - {"format_version"} == parts.keys():
            version = values.get("format_version", RECORD_VERSION)
            if version != RECORD_VERSION:
                self.problems.append(
                    f"{name}: format_version {format_value(version)} is not supported "
                    f"(this version reads {RECORD_VERSION}): update Folio"
                )
                return {}
            if not all(isinstance(part, dict) for part in parts.values()):
                self.problems.append(
                    f"{name}: not a run's record: `config`, `sources` and `run` must be objects"
                )
                return {}
            self.rerun_of, values = values["run"], upgrade_settings(values["config"])
        return _check_layer(values, name, self.problems)

    def _read_configs(self, directory: Path) -> Layer:
        """Read the files of configs/ as one source; a key may appear in only one file."""
        merged: Layer = {}
        for name in CONFIG_FILES:
            if not is_present(directory / name):
                continue
            shown = f"configs/{name}"
            layer = _check_layer(self._read(directory / name, shown), shown, self.problems)
            self.problems += [
                f"{key} is set in both {merged[key].source} and {shown}: remove one"
                for key in layer.keys() & merged.keys()
            ]
            merged |= layer
        return merged

    def _read_legacy(self, path: Path) -> Layer:
        values = self._read(path, LEGACY_FILE) if is_present(path) else {}
        if "format_version" in values:  # a bundle's config.json: the working directory is a bundle
            return {}
        return _check_layer(values, LEGACY_FILE, self.problems)

    def _read(self, path: Path, shown: str) -> dict[str, Any]:
        try:
            return read_config_file(path, shown)
        except UserError as error:
            self.problems += error.problems
            return {}


def _check_layer(values: Mapping[str, Any], source: str, problems: list[str]) -> Layer:
    """Check the keys and values of one source, and resolve aliases."""
    known: dict[str, Any] = {}
    unknown: list[tuple[Any, Any]] = []
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if key == "$schema":
            continue
        if name not in ModelConfig.model_fields:
            unknown.append((key, value))
        elif name in known:
            alias = next(alias for alias, target in ALIASES.items() if target == name)
            problems.append(f"{source}: {alias} is an alias of {name}: remove one")
        else:
            known[name] = value
    problems += describe_unknown(f"{source}: unknown key", unknown, ModelConfig.model_fields)
    valid, wrong = validate_values(ModelConfig, known, label=lambda name: f"{source}: {name}")
    problems += wrong
    return {name: Setting(value, source) for name, value in valid.items()}


def _to_plain(value: Any) -> Any:
    """Return a path as text, and a number of NumPy or PyTorch as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _merge_layers(*layers: Layer) -> Layer:
    """Merge layers, the first of which has the highest priority.

    A setting is left out if its value is null and the architecture determines it.
    """
    merged: Layer = {}
    for layer in map(_complete_layer, layers):
        merged |= {name: setting for name, setting in layer.items() if name not in merged}
    return {
        n: each for n, each in merged.items() if each.value is not None or n not in BY_ARCHITECTURE
    }


def _complete_layer(layer: Layer) -> Layer:
    """Return a layer with the nulls that it implies.

    max_iters, epochs and max_minutes all set the number of steps: a source that sets any of them
    sets the rest to null, so that `--epochs 2` does not conflict with a default. A source that sets
    the shape of the model sets `size` to null.
    """
    for name in SHAPE_SETTINGS:
        if name in layer:
            layer = {"size": Setting(None, layer[name].source), **layer}
    for name in LENGTH_SETTINGS:
        if name in layer and layer[name].value is not None:
            unset = Setting(None, layer[name].source)
            return {**dict.fromkeys(LENGTH_SETTINGS, unset), **layer}
    return layer


def _list_changes(
    config: ModelConfig, checkpoint: CheckpointSettings, sources: Mapping[str, str]
) -> list[str]:
    changes = []
    for name, old in checkpoint.values.items():
        new = getattr(config, name)
        is_path = name == "data" and old is not None and new is not None
        if new != old and not (is_path and resolve_data_path(new) == resolve_data_path(old)):
            changes.append(f"{name} {format_value(old)} → {format_value(new)} ({sources[name]})")
    return changes


def find_case_problem(directory: Path, name: str) -> str | None:
    """Return why a new file or directory must not have this name, or None."""
    with contextlib.suppress(OSError):
        names = [path.name for path in directory.iterdir()]
        for other in [] if name in names else names:
            if other.lower() == name.lower():
                return (
                    f"{directory / other} differs from it in upper and lower case only, which "
                    "some systems take for the same name: choose another one"
                )
    return None


def format_settings(loaded: LoadedConfig) -> str:
    """Format every setting with its value and source, by group: the output of `--show-config`."""
    lines = []
    fallbacks = {
        "min_lr": f"learning_rate / 10 = {loaded.config.learning_rate / 10:g}",
        "lr_decay_iters": "max_iters",
        "micro_batch_size": "batch_size",
        "data": "input.txt, else Shakespeare",
    }
    if loaded.config.tokenizer == "bpe":
        fallbacks["vocab_size"] = f"{DEFAULT_VOCAB_SIZE}, or all there are"
    for group, settings in GROUPS.items():
        lines.append(group)
        for name in settings.model_fields:
            value = getattr(loaded.config, name)
            shown = format_value(value)
            if value is None and name in fallbacks:
                shown = f"null: {fallbacks[name]}"
            if loaded.config.size == "auto" and name in SHAPE_SETTINGS:
                shown = "chosen by size auto"
            lines.append(f"  {name:<20} {shown:<36} {loaded.sources[name]}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# Files


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """Reads numbers by the rules of YAML 1.2, and rejects duplicate keys.

    PyYAML follows YAML 1.1, which reads `1e-3` as a string, `017` as 15 and `1:30` as 90. The
    words yes, no, on and off keep their YAML 1.1 meaning.
    """

    yaml_implicit_resolvers = {
        first: [rule for rule in rules if not rule[0].endswith((":int", ":float"))]
        + [("tag:yaml.org,2002:int", _INT), ("tag:yaml.org,2002:float", _FLOAT)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        _reject_duplicates([each for each in node.value if isinstance(each[0], yaml.ScalarNode)])
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Reject merge keys: nested ones grow exponentially, and flat settings need none."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem="merge keys (<<) are not supported", problem_mark=key.start_mark
                )
        super().flatten_mapping(node)


def _reject_duplicates(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return key-value pairs (of JSON, or YAML's nodes) as a dict; reject duplicate keys."""
    for key, count in Counter(getattr(key, "value", key) for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"duplicate key {format_name(key)}: remove one")
    return dict(pairs)


def read_config_file(path: Path, shown: str | None = None) -> dict[str, Any]:
    """Read a flat YAML or JSON file without validation.

    Raises `UserError`, which calls the file `shown`, if it is missing, unreadable or not a mapping.
    """
    shown = shown or str(path)
    if problem := find_text_file_problem(path):
        raise UserError(f"{shown}: {problem}")
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"{shown}: a configuration file's name must end in .yaml, .yml or .json")
    try:
        limit = MAX_JSON_BYTES if path.suffix == ".json" else MAX_YAML_BYTES
        raw = read_regular(path, limit + 1)
        if len(raw) > limit:
            raise ValueError(f"it has more than {limit:,} bytes")
        text = raw.decode("utf-8").removeprefix("\ufeff")
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=_reject_duplicates)
        else:
            values = yaml.load(text, _Loader)  # a SafeLoader
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{shown}, line {error.lineno}: not JSON: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{shown}{line}: not YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{shown}: cannot be read: nested too deeply") from None
    except Exception as error:  # PyYAML's constructors may raise anything
        raise UserError(f"{shown}: cannot be read: {format_reason(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{shown}: expected `key: value` settings, got {format_value(values)}")
    return values
