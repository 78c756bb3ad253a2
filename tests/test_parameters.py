"""parameters.py: the schema.

python -m pytest tests/test_parameters.py
"""

import json

import jsonschema
import pytest
from helpers import CHECKOUT
from pydantic import ValidationError

from parameters import GROUPS, ModelConfig, Settings, build_json_schema, find_conflicts


def test_every_setting_has_a_meaning_a_default_and_one_group():
    names = [name for group in GROUPS.values() for name in group.model_fields]
    assert sorted(names) == sorted(ModelConfig.model_fields)
    for name, info in ModelConfig.model_fields.items():
        assert info.description, name
        assert not info.is_required(), name


def test_the_defaults_are_legal():
    assert not list(find_conflicts(ModelConfig().model_dump()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 0),
        ("n_embd", True),
        ("n_embd", "128"),
        ("n_embd", 128.0),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", 0.0),
        ("bias", 1),
        ("lr_schedule", "cos"),
        ("seed", -1),
        ("seed", 2**63),
        ("device", "gpu"),
        ("device", "cuda:007"),
        ("device", "cuda:٣"),
        ("max_iters", 2**31),
        ("num_threads", 2000),
        ("epochs", 1e308),
        ("data", ""),
        ("train_split", 1.0),
        ("train_split", 0.0),
        ("runs_dir", ""),
        ("no_such_setting", 1),
    ],
)
def test_a_value_out_of_type_or_range_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        ModelConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd 10 is not divisible by n_head 4"),
        ({"train_split": 0.9, "test_split": 0.1}, "leave nothing for validation"),
        ({"min_lr": 0.1, "learning_rate": 0.01}, "min_lr 0.1 is above learning_rate 0.01"),
        ({"max_iters": 5, "epochs": 1.0}, "max_iters and epochs both"),
        ({"max_iters": None}, "nothing says how long to train"),
    ],
)
def test_values_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**settings)


def test_epochs_or_minutes_alone_replace_the_default_number_of_steps():
    assert ModelConfig(epochs=2.0).max_iters is None
    assert ModelConfig(max_minutes=1.0).max_iters is None
    assert ModelConfig(max_minutes=1.0, max_iters=7).max_iters == 7


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        ModelConfig().seed = 1


def test_schema_json_is_fresh():
    shipped = (CHECKOUT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert json.loads(shipped) == build_json_schema(), "python parameters.py > configs/schema.json"


def test_schema_json_accepts_what_folio_accepts_and_refuses_a_typo():
    validator = jsonschema.Draft202012Validator(build_json_schema())
    validator.check_schema(build_json_schema())
    assert validator.is_valid({"$schema": "./schema.json", "n_layer": 2, "input_file": "x.txt"})
    assert validator.is_valid(ModelConfig().model_dump())
    assert not validator.is_valid({"n_layers": 2})
    assert not validator.is_valid({"n_layer": "two"})


def test_settings_of_other_commands_share_the_strictness():
    class Example(Settings):
        count: int = 1

    with pytest.raises(ValidationError):
        Example(count="2")
