"""utils/command_line.py: every form of a flag, `--help`, and the error messages.

python -m pytest tests/test_command_line.py
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from helpers import CHECKOUT

import train
from parameters import ALIASES, GROUPS, ModelConfig
from utils.checks import SYNONYMS
from utils.command_line import Action, CommandLine
from utils.output import run_command


@pytest.fixture
def command_line():
    actions = [Action("config", "A file.", "FILE"), Action("dry_run", "Try.")]
    return CommandLine("Train.", ModelConfig, actions, GROUPS, ALIASES)


@pytest.mark.parametrize("name", list(ModelConfig.model_fields))
def test_every_setting_is_a_flag_in_kebab_and_snake_case(command_line, name):
    (schema,) = [ModelConfig.model_json_schema()["properties"][name]]
    kinds = {kind.get("type") for kind in schema.get("anyOf", [schema])}
    options = schema.get("anyOf", [schema])
    choices = [c for kind in options for c in kind.get("enum", [kind.get("const")]) if c]
    value = "1" if "integer" in kinds else "0.5" if "number" in kinds else "cpu"
    value = str(choices[0]) if choices else "true" if "boolean" in kinds else value
    value = {"rope_theta": "1.5", "vocab_size": "257"}.get(name, value)
    kebab = command_line.parse([f"--{name.replace('_', '-')}", value])
    snake = command_line.parse([f"--{name}={value}"])
    assert kebab == snake
    assert name in kebab[0]
    assert kebab[2] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bias"], True),
        (["--no-bias"], False),
        (["--no_bias"], False),
        (["--bias", "false"], False),
        (["--bias=false"], False),
        (["--bias", "true"], True),
        (["--bias", "--no-bias"], False),
    ],
)
def test_a_boolean_flag_takes_every_usual_form(command_line, words, expected):
    values, _, problems = command_line.parse(words)
    assert values == {"bias": expected}
    assert not problems


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--torch-compile"], "on"),
        (["--no-torch-compile"], "off"),
        (["--torch-compile", "auto"], "auto"),
        (["--torch-compile", "on"], "on"),
        (["--torch-compile=off"], "off"),
        (["--torch-compile", "true"], "on"),
        (["--torch-compile", "false"], "off"),
    ],
)
def test_a_switch_takes_every_form_of_a_boolean_and_auto(command_line, words, expected):
    values, _, problems = command_line.parse(words)
    assert values == {"torch_compile": expected}
    assert not problems


def test_values_are_converted_and_null_is_none(command_line):
    words = ["--learning-rate", "1e-3", "--min-lr", "null", "--micro-batch-size", "null"]
    values, _, problems = command_line.parse([*words, "--run-tag", "a b"])
    expected = {"learning_rate": 0.001, "min_lr": None, "micro_batch_size": None, "run_tag": "a b"}
    assert values == expected
    assert not problems


def test_none_is_a_file_name_and_null_is_no_value(command_line):
    assert command_line.parse(["--data", "none"])[0] == {"data": "none"}
    assert command_line.parse(["--data", "null"])[0] == {"data": None}


def test_input_file_is_another_name_of_data(command_line):
    assert command_line.parse(["--input-file", "x.txt"])[0] == {"data": "x.txt"}


def test_actions_are_returned_apart_from_the_settings(command_line):
    assert command_line.parse(["--config", "x.yaml", "--dry-run"])[:2] == (
        {},
        {"config": "x.yaml", "dry_run": True},
    )


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--max-itres", "5"], ["--max-itres", "--max-iters"]),
        (["--max-itres=5"], ["--max-itres", "--max-iters"]),
        (["--max-iter", "5"], ["unknown flag", "--max-iters"]),  # no abbreviations
        (["--zzz"], ["--zzz"]),
        (["--lr", "1"], ["--lr", "did you mean --learning-rate?"]),
        (["--bs=1"], ["--bs", "did you mean --batch-size?"]),
        (["--context=1"], ["--context", "did you mean --block-size?"]),
        (["--num_heads=1"], ["--num-heads", "did you mean --n-head?"]),
        (["--layers=1"], ["--layers", "did you mean --n-layer?"]),
        (["--embd=1"], ["--embd", "did you mean --n-embd?"]),
        (["--dim=1"], ["--dim", "did you mean --n-embd?"]),
        (["--epochs=2x"], ["--epochs", "number", '"2x"']),
        (["--vocab-size=65"], ["--vocab-size", "257", '"65"']),
        (["--data", "a.txt", __file__, __file__], ["1 more", "quote", "--data '"]),
        (["5"], ['"5"', "--flags"]),
        (["--max-iters"], ["--max-iters needs a value"]),
        (["--config"], ["--config needs a value"]),
        (["--config="], ["--config needs a value"]),
        (["--run-tag"], ["--run-tag needs a value", "--run-tag=VALUE"]),
        (["--data="], ["--data", "empty"]),
        (["--dry-run", "-5"], ["--dry-run", "'-5'"]),
        (["--dry-run=x"], ["--dry-run", "'x'"]),
        (["--no-bias=x"], ["--no-bias", "'x'"]),
        (["--max-iters", "many"], ["--max-iters", "whole number", '"many"']),
        (["--max-iters", "1.5"], ["--max-iters", "whole number", '"1.5"']),
        (["--learning-rate", "-1e-3"], ["--learning-rate", "above 0,", '"-1e-3"']),
        (["--learning-rate", "nan"], ["--learning-rate", "finite", '"nan"']),
        (["--learning-rate", "-inf"], ["--learning-rate", "finite", '"-inf"']),
        (["--bias", "maybe"], ["--bias", "true or false", '"maybe"']),
        (["--lr-schedule", "cos"], ["constant, linear, cosine or wsd", '"cos"']),
    ],
)
def test_a_mistake_is_one_line_with_the_flag_and_the_reason(command_line, words, facts):
    (problem,) = command_line.parse(words)[2]
    assert "\n" not in problem
    for fact in facts:
        assert fact in problem


def test_help_is_generated_from_the_schema(command_line, capsys):
    with pytest.raises(SystemExit) as left:
        command_line.parse(["--help"])
    assert left.value.code == 0
    page = " ".join(capsys.readouterr().out.split())
    assert page.isascii()  # for terminals that cannot show anything else
    for name, info in ModelConfig.model_fields.items():
        is_switch = bool in (info.annotation, *get_args(info.annotation))
        is_switch = is_switch or name in ("torch_compile", "token_store")
        flag = f"--[no-]{name}" if is_switch else f"--{name}"
        assert flag.replace("_", "-") in page
        assert " ".join(info.description.split()) in page
    for group in GROUPS:
        assert f"{group} settings" in page


def test_every_synonym_is_one_settings_and_no_setting_itself():
    words = [word for others in SYNONYMS.values() for word in others.split()]
    assert len(words) == len(set(words))
    assert not set(words) & ModelConfig.model_fields.keys()


def test_many_unknown_flags_are_counted(command_line):
    problems = command_line.parse([f"--n-laye{i}" for i in range(1000)])[2]
    assert len(problems) == 21
    assert "980" in problems[-1]


@pytest.mark.parametrize("options", [["-OO"], ["-P"]])  # no docstrings; PYTHONSAFEPATH
def test_help_works_with_options_of_python(options):
    done = subprocess.run(
        [sys.executable, *options, str(CHECKOUT / "train.py"), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    assert done.returncode == 0, done.stderr
    for info in ModelConfig.model_fields.values():
        assert info.description.split()[0] in done.stdout


# Names and values that anyone may type ----------------------------------------------------------

LONG = "x" * 5000


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31m", "a\x9b", "a\u2028b", "a\u202eb", "a\udc80"])
@pytest.mark.parametrize(
    "flags",
    [
        "--device={}",
        "--{}=1",
        "{}",
        "--config={}.yaml",
        "--resume={}",
        "--init-from={}",
        "--data={}",
    ],
)
def test_a_mistake_with_control_characters_is_one_printable_line(flags, text, capsys):
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's
    assert run_command(train.main, [flags.format(text)]) == 2
    (line,) = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert line.startswith("error: ") and line.isprintable()


@pytest.mark.parametrize(
    "flags", [f"--{LONG}", f"--device={LONG}", f"--resume={LONG}", f"--init-from={LONG}", LONG]
)
def test_a_mistake_of_thousands_of_characters_is_a_short_line(flags, capsys):
    assert run_command(train.main, [flags]) == 2
    assert len(capsys.readouterr().err) < 400


def test_an_unknown_key_of_thousands_of_characters_is_a_short_line(capsys):
    Path("long.json").write_text(f'{{"{LONG}": 1}}', encoding="utf-8")
    assert run_command(train.main, ["--config=long.json"]) == 2
    assert len(capsys.readouterr().err) < 400
