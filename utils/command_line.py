"""A command's flags, generated from a schema."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from parameters import Settings
from utils.checks import format_name, format_value, suggest_name, validate_values
from utils.errors import UserError

_NO_VALUE = object()
_BOOL, _TEXT = "true|false", "TEXT"
# Flags that may stand alone, with a `--no-` form: what either of them means.
_SWITCHES = {_BOOL: ("true", "false"), "auto|on|off": ("on", "off")}


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line like all others, without a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """Flags in one column, meanings in the next, and each value's name said once."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.metavar in _SWITCHES:
            value = "" if action.metavar == _BOOL else f" [{action.metavar}]"
            return ", ".join("--[no-]" + flag[2:] for flag in action.option_strings) + value
        value = f" {action.metavar}" if action.metavar else ""
        return (", ".join(action.option_strings) + value).strip()


def format_flag(name: str) -> str:
    """The flag of a setting: `--max-iters` of `max_iters`."""
    return "--" + name.replace("_", "-")


def _metavar(annotation: Any) -> str:
    """What stands for a value in `--help`: N, X, TEXT or the choices."""
    options = [option for option in get_args(annotation) if option is not NoneType]
    if get_origin(annotation) is Literal:
        return "|".join(str(option) for option in options)
    if options:  # Optional, or Annotated inside it
        return _metavar(options[0])
    return {bool: _BOOL, int: "N", float: "X"}.get(annotation, _TEXT)


@dataclass(frozen=True)
class Action:
    """A flag of one command that is not a setting, such as `--config FILE` or `--dry-run`.

    One that `repeats` may be given again and again, and its value is a list.
    """

    name: str
    meaning: str
    metavar: str | None = None
    repeats: bool = False


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
        operands: what may stand without a flag, any number of them; its value is a list.
    """

    def __init__(
        self,
        description: str,
        schema: type[Settings],
        actions: Sequence[Action] = (),
        groups: Mapping[str, type[Settings]] | None = None,
        aliases: Mapping[str, str] | None = None,
        operands: Action | None = None,
    ):
        self.schema = schema
        self._actions = {action.name for action in (*actions, *([operands] if operands else []))}
        self._operands = {operands.name} if operands else set()
        self._aliases = dict(aliases or {})
        self._metavars: dict[str, str | None] = {}
        self._parser = _Parser(
            description=description.strip().partition("\n\n")[0],
            usage="python %(prog)s [--setting VALUE ...]"
            + (f" [{operands.metavar} ...]" if operands else ""),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        about = self._parser.add_argument_group("command")
        about.add_argument("-h", "--help", action="help", help="Show this page and exit.")
        if operands is not None:
            self._metavars[operands.name] = operands.metavar
            about.add_argument(
                operands.name, nargs="*", metavar=operands.metavar, help=operands.meaning
            )
        for action in actions:
            self._add(about, action.name, action.metavar, action.meaning, action.repeats)
        titles = {f"{name} settings": group for name, group in (groups or {}).items()}
        for title, group in (titles or {"settings": schema}).items():
            section = self._parser.add_argument_group(title, group.__doc__)
            for name, info in group.model_fields.items():
                default = format_value(info.default).replace('"', "")
                meaning = f"{info.description} [{default}]"
                self._add(section, name, _metavar(info.annotation), meaning)

    def _add(
        self, group: Any, name: str, metavar: str | None, meaning: str, repeats: bool = False
    ) -> None:
        names = [name, *(alias for alias, target in self._aliases.items() if target == name)]
        flags = [format_flag(each) for each in names]
        shared = {"dest": name, "default": argparse.SUPPRESS}
        self._metavars[name] = metavar
        meaning = meaning.replace("%", "%%")
        if metavar is None:
            group.add_argument(*flags, action="store_true", help=meaning, **shared)
            return
        # A flag without its value is noticed after parsing, so that all problems come together.
        how = "append" if repeats else "store"
        group.add_argument(
            *flags, action=how, nargs="?", const=_NO_VALUE, metavar=metavar, help=meaning, **shared
        )
        if metavar in _SWITCHES:
            group.add_argument(
                *(format_flag("no_" + each) for each in names),
                action="store_const",
                const=_SWITCHES[metavar][1],
                help=argparse.SUPPRESS,
                **shared,
            )

    def parse(self, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Split `argv` into (settings, actions, problems). `--help` prints and exits with 0."""
        try:
            known, unknown = self._parser.parse_known_args(self._normalised(argv))
        except UserError as error:
            return {}, {}, list(error.problems)
        problems = self._unknown_flags(unknown)
        texts: dict[str, str] = {}
        nulls: dict[str, None] = {}  # apart, as pydantic's mode for strings knows no null
        actions: dict[str, Any] = {}
        for name, value in vars(known).items():
            metavar = self._metavars[name]
            if value is _NO_VALUE and metavar in _SWITCHES:
                texts[name] = _SWITCHES[metavar][0]
            elif self._lacks_value(value, metavar):
                dash = f"; one that begins with a dash is written {format_flag(name)}=VALUE"
                shown = metavar if name in self._operands else format_flag(name)
                problems.append(f"{shown} needs a value{dash if metavar == _TEXT else ''}")
            elif name in self._actions:
                actions[name] = value
            elif value == "null" and self._nullable(name):
                nulls[name] = None
            else:
                texts[name] = value
        values, wrong = validate_values(self.schema, texts, strings=True, label=format_flag)
        return {**values, **nulls}, actions, problems + wrong

    @staticmethod
    def _lacks_value(value: Any, metavar: str | None) -> bool:
        values = value if isinstance(value, list) else [value]
        return any(v is _NO_VALUE or (v == "" and metavar != _TEXT) for v in values)

    def _nullable(self, name: str) -> bool:
        return NoneType in get_args(self.schema.model_fields[name].annotation)

    def _normalised(self, argv: Sequence[str]) -> list[str]:
        """Fold `--snake_case` into `--kebab-case`, and join a negative number to its flag.

        argparse takes `-1e-3` for a flag, unless an equals sign ties it to the one before.
        """
        takes_value = {
            flag
            for action in self._parser._actions
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
        flags = [flag for action in self._parser._actions for flag in action.option_strings]
        problems, after_unknown_flag = [], False
        for word in unknown:
            name = word.partition("=")[0]
            if word.startswith("-"):
                problems.append(f"unknown flag {format_name(name)}{suggest_name(name, flags)}")
            elif not after_unknown_flag:  # what follows an unknown flag was its value
                problems.append(f"unexpected argument {format_value(word)}: settings are --flags")
            after_unknown_flag = word.startswith("-") and "=" not in word
        return problems
