"""A command's flags, generated from a schema."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from parameters import Settings
from utils.checks import describe_unknown, format_value, validate_values
from utils.errors import UserError
from utils.files import is_file

_NO_VALUE = object()
_BOOL, _TEXT = "true|false", "TEXT"
# Flags that may stand alone and have a `--no-` form: the value of each form.
_SWITCHES = {_BOOL: ("true", "false"), "auto|on|off": ("on", "off")}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _HelpFormatter(argparse.HelpFormatter):
    """A formatter that prints the placeholder of a value once, and a switch's forms as one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags, metavar = action.option_strings, action.metavar
        if metavar in _SWITCHES:
            flags = ["--[no-]" + flag[2:] for flag in flags]
            metavar = None if metavar == _BOOL else f"[{metavar}]"
        return " ".join(filter(None, (", ".join(flags), metavar)))


def format_flag(name: str) -> str:
    """Return the flag of a setting, such as `--max-iters` for `max_iters`."""
    return "--" + name.replace("_", "-")


def _get_metavar(annotation: Any) -> str:
    """Return the placeholder of a value in `--help`: N, X, TEXT or the choices."""
    options = [option for option in get_args(annotation) if option is not NoneType]
    if get_origin(annotation) is Literal:
        return "|".join(str(option) for option in options)
    if options:  # Optional, or Annotated inside it
        return _get_metavar(options[0])
    return {bool: _BOOL, int: "N", float: "X"}.get(annotation, _TEXT)


@dataclass(frozen=True)
class Action:
    """A flag of one command that is not a setting, such as `--config FILE` or `--dry-run`.

    The value of a flag that `repeats` is a list.
    """

    name: str
    meaning: str
    metavar: str | None = None
    repeats: bool = False


class CommandLine:
    """A command's flags, generated from a schema: `--help`, parsing and error messages.

    `--kebab-case` and `--snake_case` are the same flag, abbreviations are not accepted, and a
    boolean is `--flag`, `--no-flag` or `--flag false`. The first paragraph of `description`, a
    command's docstring, heads `--help`. `operands` are any number of arguments without a flag; the
    value is a list.
    """

    def __init__(
        self,
        description: str | None,
        schema: type[Settings],
        actions: Sequence[Action] = (),
        groups: Mapping[str, type[Settings]] | None = None,
        aliases: Mapping[str, str] | None = None,
        operands: Action | None = None,
    ):
        self.schema, self._aliases = schema, aliases or {}
        self._metavars: dict[str, str | None] = {}
        self._flags = ["--help"]
        usage = "python %(prog)s [--setting VALUE ...]"
        self._parser = _Parser(
            description=(description or "").strip().partition("\n\n")[0],  # None by python -OO
            usage=usage + (f" [{operands.metavar} ...]" if operands else ""),
            formatter_class=partial(_HelpFormatter, max_help_position=36, width=100),
            allow_abbrev=False,
            add_help=False,
        )
        command = self._parser.add_argument_group("command")
        command.add_argument("-h", "--help", action="help", help="Show this page and exit.")
        if operands is not None:
            name, metavar = operands.name, operands.metavar
            self._metavars[name] = metavar
            command.add_argument(name, nargs="*", metavar=metavar, help=operands.meaning)
        for action in actions:
            self._add_flag(command, action)
        for title, group in (groups or {"": schema}).items():
            section = self._parser.add_argument_group(f"{title} settings".lstrip(), group.__doc__)
            for name, info in group.model_fields.items():
                default = format_value(info.default).replace('"', "")
                meaning = f"{info.description} [{default}]"
                self._add_flag(section, Action(name, meaning, _get_metavar(info.annotation)))

    def _add_flag(self, group: Any, action: Action) -> None:
        name, metavar, meaning = action.name, action.metavar, action.meaning.replace("%", "%%")
        names = [name, *(alias for alias, target in self._aliases.items() if target == name)]
        self._metavars[name] = metavar

        def add(prefix: str, **options: Any) -> None:
            flags = [format_flag(prefix + each) for each in names]
            self._flags += flags
            group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, **options)

        if metavar is None:
            add("", action="store_true", help=meaning)
            return
        # A missing value is reported after parsing, together with all other problems.
        how = "append" if action.repeats else "store"
        alone = _SWITCHES[metavar][0] if metavar in _SWITCHES else _NO_VALUE
        add("", action=how, nargs="?", const=alone, metavar=metavar, help=meaning)
        if metavar in _SWITCHES:
            add("no_", action="store_const", const=_SWITCHES[metavar][1], help=argparse.SUPPRESS)

    def parse(self, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Split `argv` into (settings, actions, problems). `--help` prints and exits with 0."""
        try:
            known, unknown = self._parser.parse_known_args(self._normalize(argv))
        except UserError as error:
            return {}, {}, list(error.problems)
        problems, fields = self._find_unknown_flags(unknown), self.schema.model_fields
        texts: dict[str, str] = {}
        nulls: dict[str, None] = {}  # pydantic's validation of strings has no null
        actions: dict[str, Any] = {}
        for name, value in vars(known).items():
            metavar, parts = self._metavars[name], value if isinstance(value, list) else [value]
            if any(v is _NO_VALUE or (v == "" and metavar != _TEXT) for v in parts):
                flag = format_flag(name)
                dash = f"; one that begins with a dash is written {flag}=VALUE"
                shown = flag if flag in self._flags else metavar  # an operand has no flag
                problems.append(f"{shown} needs a value{dash if metavar == _TEXT else ''}")
            elif name not in fields:
                actions[name] = value
            elif value == "null" and NoneType in get_args(fields[name].annotation):
                nulls[name] = None
            else:
                texts[name] = value
        values, wrong = validate_values(self.schema, texts, strings=True, label=format_flag)
        return {**values, **nulls}, actions, problems + wrong

    def _normalize(self, argv: Sequence[str]) -> list[str]:
        """Turn `--snake_case` into `--kebab-case`, and join a negative number to its flag.

        argparse parses `-1e-3` as a flag unless an equals sign precedes it.
        """
        words: list[str] = []
        for word in argv:
            is_negative = re.match(r"-(\d|\.\d|inf|nan)", word)
            if is_negative and words and words[-1] in self._flags:
                words[-1] += "=" + word
            elif word.startswith("--"):
                name, equals, value = word.partition("=")
                words.append(name.replace("_", "-") + equals + value)
            else:
                words.append(word)
        return words

    def _find_unknown_flags(self, unknown: Sequence[str]) -> list[str]:
        flags, words, after_unknown_flag = [], [], False
        for word in unknown:
            name, equals, _ = word.partition("=")
            is_flag = word.startswith("-")
            if is_flag:
                flags.append((name, None))
            elif not after_unknown_flag:  # otherwise it is that flag's value
                words.append(word)
            after_unknown_flag = is_flag and not equals
        problems = describe_unknown("unknown flag", flags, self._flags)
        if words:
            more = f" and {len(words) - 1:,} more" if words[1:] else ""
            hint = "; quote a pattern: --data 'texts/*.txt'" if is_file(words[0]) else ""
            shown = f"unexpected argument {format_value(words[0])}{more}"
            problems.append(f"{shown}: settings are --flags{hint}")
        return problems
