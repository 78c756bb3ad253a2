"""The schema of the settings: parameters.py.

python -m pytest tests/test_parameters.py
"""

import json

import jsonschema
import pytest
from helpers import CHECKOUT
from pydantic import ValidationError

from parameters import GROUPS, MAX_RATE, ModelConfig, Settings, build_json_schema, find_conflicts
from trainer import train
from utils.errors import RunError

PATHS = ("data", "runs_dir", "checkpoints_dir", "cache_dir", "aim_repo", "init_from", "run_tag")
ALMOST_1 = 1 - 2**-53


def test_every_setting_has_a_description_a_default_and_one_group():
    names = [name for group in GROUPS.values() for name in group.model_fields]
    assert sorted(names) == sorted(ModelConfig.model_fields)
    for name, info in ModelConfig.model_fields.items():
        assert info.description, name
        assert not info.is_required(), name


def test_the_defaults_do_not_conflict():
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
        ("learning_rate", 1e300),
        ("eval_iters", 2**31 - 1),
        ("min_lr", 1e300),
        ("weight_decay", 1e300),
        ("grad_clip", 1e300),
        *((name, bad) for name in PATHS for bad in ("a\0b", "a\ud800")),
        *(("model_name", name) for name in ("con", "NUL", "com1.x", "dante.", "last", "Auto")),
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
def test_a_value_of_the_wrong_type_or_range_is_an_error(name, value):
    with pytest.raises(ValidationError, match=name):
        ModelConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"n_embd": 10, "n_head": 4}, ["n_embd 10", "n_head 4"]),
        ({"n_embd": 12, "n_head": 4}, ["n_embd 12", "n_head 4", "even"]),
        ({"bias": True}, ["architecture", "bias"]),
        ({"train_split": 0.9, "test_split": 0.1}, ["train_split 0.9", "test_split 0.1"]),
        ({"min_lr": 0.1, "learning_rate": 0.01}, ["min_lr 0.1", "learning_rate 0.01"]),
        ({"max_iters": 5, "epochs": 1.0}, ["max_iters", "epochs"]),
        ({"max_iters": None}, ["max_iters", "epochs", "max_minutes"]),
        (
            {"early_stopping_patience": 2, "eval_interval": 0},
            ["early_stopping_patience", "eval_interval"],
        ),
    ],
)
def test_conflicting_values_are_an_error(settings, facts):
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**settings)
    assert all(fact in str(caught.value) for fact in facts)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_greatest_legal_rates_are_in_the_range_of_an_optimizer_step(tiny, quiet, optimizer):
    greatest = {
        "learning_rate": MAX_RATE,
        "min_lr": MAX_RATE,
        "weight_decay": 1e6,
        "beta1": ALMOST_1,
    }
    greatest |= {"beta2": ALMOST_1, "muon_momentum": ALMOST_1, "grad_clip": MAX_RATE}
    with pytest.raises(RunError, match="loss"):  # it diverges, with one line
        train(tiny(**greatest, optimizer=optimizer, warmup_iters=0), output=quiet)


@pytest.mark.parametrize(
    "name", ["dante", "Dante-2", "context", "com10", "nullx", "a.con", "lasting"]
)
def test_an_ordinary_name_of_a_model_is_accepted(name):
    assert ModelConfig(model_name=name).model_name == name


def test_epochs_or_max_minutes_alone_replace_the_default_max_iters():
    assert ModelConfig(epochs=2.0).max_iters is None
    assert ModelConfig(max_minutes=1.0).max_iters is None
    assert ModelConfig(max_minutes=1.0, max_iters=7).max_iters == 7


def test_a_config_is_immutable():
    with pytest.raises(ValidationError):
        ModelConfig().seed = 1


def test_schema_json_is_up_to_date():
    shipped = (CHECKOUT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert json.loads(shipped) == build_json_schema(), "python parameters.py > configs/schema.json"


def test_schema_json_accepts_the_settings_and_rejects_a_typo():
    validator = jsonschema.Draft202012Validator(build_json_schema())
    validator.check_schema(build_json_schema())
    assert validator.is_valid({"$schema": "./schema.json", "n_layer": 2, "input_file": "x.txt"})
    assert validator.is_valid(ModelConfig().model_dump())
    assert not validator.is_valid({"n_layers": 2})
    assert not validator.is_valid({"n_layer": "two"})


def test_subclasses_of_settings_are_strict_too():
    class Example(Settings):
        count: int = 1

    with pytest.raises(ValidationError):
        Example(count="2")
