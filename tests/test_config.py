"""config.py: where settings come from, and every complaint about them.

python -m pytest tests/test_config.py
"""

import itertools
import json
import re

import pytest
import yaml
from helpers import CHECKOUT

from config import CONFIG_FILES, ConfigLoader, format_settings, read_config_file
from parameters import GROUPS, ModelConfig
from utils.errors import UserError

LAYERS = ("flag", "config file", "configs", "legacy", "default")
VALUES = {"flag": 11, "config file": 12, "configs": 13, "legacy": 14}


@pytest.fixture
def world(tmp_path):
    """A configs/ directory and a working directory to fill, and a loader that reads them."""

    class Sources:
        configs = tmp_path / "configs"
        cwd = tmp_path / "work"

        def __init__(self):
            self.configs.mkdir()
            self.cwd.mkdir()

        def write(self, name: str, content: str) -> str:
            path = (self.cwd if name == "config.json" else tmp_path) / name
            path.write_text(content, encoding="utf-8")
            return str(path)

        def load(self, flags=None, config_file=None, problems=()):
            loader = ConfigLoader(
                flags, config_file, problems, configs_dir=self.configs, working_dir=self.cwd
            )
            return loader.load()

        def problems(self, *args, **kwargs) -> list[str]:
            with pytest.raises(UserError) as caught:
                self.load(*args, **kwargs)
            return list(caught.value.problems)

    return Sources()


# Layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("upper", "lower"), list(itertools.combinations(LAYERS, 2)))
def test_the_higher_of_any_two_layers_wins_and_is_named(world, upper, lower):
    arguments = {}
    for layer in {upper, lower} - {"default"}:
        if layer == "flag":
            arguments["flags"] = {"n_layer": VALUES[layer]}
        elif layer == "config file":
            arguments["config_file"] = world.write("mine.yaml", f"n_layer: {VALUES[layer]}")
        elif layer == "configs":
            world.write("configs/model.json", json.dumps({"n_layer": VALUES[layer]}))
        else:
            world.write("config.json", json.dumps({"n_layer": VALUES[layer]}))
    loaded = world.load(**arguments)
    assert loaded.config.n_layer == VALUES[upper]
    source = {
        "flag": "--n-layer",
        "config file": arguments.get("config_file"),
        "configs": "configs/model.json",
        "legacy": "config.json",
    }[upper]
    assert loaded.sources["n_layer"] == source
    assert loaded.sources["n_head"] == "default"


def test_an_explicit_false_and_null_in_a_file_are_values(world):
    path = world.write("mine.yaml", "tie_weights: false\nmin_lr: null")
    world.write("configs/train.yaml", "min_lr: 1e-5")
    loaded = world.load(config_file=path)
    assert loaded.config.tie_weights is False
    assert loaded.config.min_lr is None
    assert loaded.sources["min_lr"] == path


@pytest.mark.parametrize("name", ["epochs", "max_minutes"])
def test_a_length_in_a_higher_layer_replaces_another_one_in_a_lower(world, name):
    world.write("configs/train.yaml", "max_iters: 500")
    loaded = world.load({name: 2.0})
    assert loaded.config.max_iters is None
    assert getattr(loaded.config, name) == 2.0
    assert loaded.sources["max_iters"] == "--" + name.replace("_", "-")


def test_max_iters_as_a_flag_replaces_epochs_in_a_file(world):
    loaded = world.load({"max_iters": 5}, world.write("mine.yaml", "epochs: 2.0"))
    assert (loaded.config.max_iters, loaded.config.epochs) == (5, None)


def test_two_lengths_in_one_layer_are_a_conflict_that_names_the_file(world):
    path = world.write("mine.yaml", "epochs: 2.0\nmax_iters: 5")
    assert world.problems(config_file=path) == [
        "max_iters and epochs both say how long to train: set one of them to null "
        f"(max_iters: {path}, epochs: {path})"
    ]


def test_the_shipped_files_state_the_defaults():
    loaded = ConfigLoader().load()
    assert loaded.config == ModelConfig()
    stated = {name for name, source in loaded.sources.items() if source != "default"}
    own = {*GROUPS["run"].model_fields, *GROUPS["initialization"].model_fields}
    assert stated == set(ModelConfig.model_fields) - own


def test_each_shipped_file_holds_its_own_groups():
    groups = {"model.json": ["architecture"], "data.yaml": ["data"]}
    groups |= {"train.yaml": ["training", "saving", "runtime"], "tensorboard.json": ["tracking"]}
    for name in CONFIG_FILES:
        values = read_config_file(CHECKOUT / "configs" / name)
        expected = [key for group in groups[name] for key in GROUPS[group].model_fields]
        assert [key for key in values if key != "$schema"] == expected


def test_the_shipped_files_name_the_schema_for_editors():
    for path in (CHECKOUT / "configs").rglob("*.*"):
        if path.name != "schema.json" and path.parent.name != "search":  # ranges, no values
            named = re.search(
                r'(?:"\$schema": "|\$schema=)([\w./]+)', path.read_text(encoding="utf-8")
            )
            assert named, path
            assert (path.parent / named[1]).resolve() == CHECKOUT / "configs" / "schema.json"


PRESETS = sorted((CHECKOUT / "configs" / "presets").iterdir())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_names_every_setting_that_shapes_its_result_and_says_what_that_is(path):
    assert ConfigLoader(config_file=str(path)).load().config
    assert re.search(r"# Measured[^.]*(\d|\bnot\b)", path.read_text(encoding="utf-8"))
    preset = read_config_file(path)
    assert {"precision", "torch_compile", "compile_backend"} <= preset.keys()
    shaping = {name for g in ("architecture", "training") for name in GROUPS[g].model_fields}
    shaping |= {"train_split", "test_split"}
    assert shaping - set(preset) == {"epochs", "max_minutes"}  # max_iters replaces both


def test_what_the_architecture_decides_is_settled_and_says_so(world):
    loaded = world.load({"architecture": "gpt2", "tie_weights": None})
    assert (loaded.config.tie_weights, loaded.config.activation) == (True, "gelu")
    for name in ("tie_weights", "activation"):
        assert loaded.sources[name] == "architecture gpt2 (--architecture)"
    loaded = world.load({"architecture": "modern", "activation": "gelu"})
    assert (loaded.config.tie_weights, loaded.config.activation) == (False, "gelu")
    assert loaded.sources["activation"] == "--activation"
    assert ModelConfig(n_layer=1).model_fields_set == {"n_layer"}


def test_a_record_of_a_time_with_fewer_settings_means_what_it_meant_then(world):
    config = {"architecture": "gpt2", "learning_rate": 3e-3, "torch_compile": True}
    record = {"format_version": 1, "config": config, "sources": {}, "run": {}}
    loaded = world.load(config_file=world.write("old.json", json.dumps(record)))
    now = loaded.config
    assert (now.optimizer, now.precision) == ("adamw", "fp32")
    assert (now.torch_compile, now.compile_backend) == ("on", "aot_eager")


def test_keys_of_a_legacy_file_that_configs_shadow_are_said_in_one_line(world):
    world.write("configs/model.json", '{"n_layer": 2, "n_head": 2}')
    world.write("config.json", '{"n_layer": 3, "n_head": 4, "dropout": 0.1}')
    loaded = world.load()
    assert loaded.config.dropout == 0.1
    (note,) = loaded.notes
    assert "n_layer, n_head" in note
    assert "dropout" not in note
    assert "--config config.json" in note


def test_a_conflict_names_where_both_values_come_from(world):
    world.write("configs/model.json", '{"n_embd": 128}')
    assert world.problems({"n_head": 3}) == [
        "n_embd 128 is not divisible by n_head 3 (n_embd: configs/model.json, n_head: --n-head)"
    ]


@pytest.mark.parametrize("part", ["config", "sources", "run"])
def test_a_run_record_with_a_part_of_another_type_is_refused(world, part):
    record = {"config": {}, "sources": {}, "run": {}} | {part: 3}
    (problem,) = world.problems(config_file=world.write("r.json", json.dumps(record)))
    assert "not the record of a run" in problem


def test_a_run_record_is_read_as_a_config_file(world):
    record = {"config": {"n_layer": 7}, "sources": {"n_layer": "default"}, "run": {"run_id": "x"}}
    loaded = world.load(config_file=world.write("full_config.json", json.dumps(record)))
    assert loaded.config.n_layer == 7
    assert loaded.rerun_of == {"run_id": "x"}
    newer = world.write("newer.json", json.dumps({**record, "format_version": 2}))
    (problem,) = world.problems(config_file=newer)
    assert problem.endswith("newer.json: format_version 2, and this Folio reads 1: update Folio")


def test_show_config_names_every_setting_and_its_source(world):
    loaded = world.load({"n_layer": 3})
    lines = {line.split()[0]: line for line in format_settings(loaded).splitlines()}
    for name in ModelConfig.model_fields:
        assert lines[name].rstrip().endswith(loaded.sources[name])
    assert "--n-layer" in lines["n_layer"]


# Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", "0.1e-2", ".1e-2", "1.e-3"])
def test_a_float_in_scientific_notation_is_a_number(world, number):
    path = world.write("mine.yaml", f"learning_rate: {number}")
    assert world.load(config_file=path).config.learning_rate == 0.001


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "n_layers: 3", "unknown key n_layers; did you mean n_layer?"),
        ("a.json", '{"n_layers": 3}', "unknown key n_layers; did you mean n_layer?"),
        ("a.yaml", "zzz: 3", "unknown key zzz"),
        ("a.yaml", "3: 3", "unknown key 3"),
        ("a.yaml", "n_layer: 3\nn_layer: 4", "the key n_layer stands twice"),
        ("a.json", '{"n_layer": 3, "n_layer": 4}', "the key n_layer stands twice"),
        ("a.yaml", "data: null\ninput_file: null", "input_file is another name of data"),
        ("a.yaml", "input_file: null\ndata: null", "input_file is another name of data"),
        ("a.yaml", "seed: 017", 'seed must be a whole number, got "017"'),
        ("a.yaml", "seed: 1:30", 'seed must be a whole number, got "1:30"'),
        ("a.yaml", "bias: !!bool x", "cannot be read"),
        ("a.yaml", "seed: !!int ''", "cannot be read"),
        ("a.yaml", '"two\\nlines": 3', 'unknown key "two\\nlines"'),
        ("a.yaml", "null: 3", "unknown key null"),
        ("a.yaml", "seed: 9999999999999999999999", "seed must be below 9223372036854775808"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.yaml", "n_layer: true", "n_layer must be a whole number, got true"),
        ("a.json", '{"learning_rate": true}', "learning_rate must be a number, got true"),
        ("a.yaml", "learning_rate: .nan", "learning_rate must be a finite number, got NaN"),
        ("a.json", '{"learning_rate": Infinity}', "must be a finite number, got Infinity"),
        ("a.yaml", "learning_rate: .inf", "must be a finite number"),
        ("a.yaml", "n_layer: 2.5", "n_layer must be a whole number, got 2.5"),
        ("a.yaml", "n_layer: '2'", 'n_layer must be a whole number, got "2"'),
        ("a.yaml", "n_layer: 0", "n_layer must be at least 1, got 0"),
        ("a.yaml", "dropout: 1.0", "dropout must be below 1, got 1.0"),
        ("a.yaml", "learning_rate: 0", "learning_rate must be above 0, got 0"),
        ("a.yaml", "bias: 1", "bias must be true or false, got 1"),
        ("a.yaml", "run_tag: 5", "run_tag must be text (put it in quotes), got 5"),
        ("a.yaml", "runs_dir: ''", "runs_dir must not be empty"),
        ("a.yaml", "device: gpu", "device must be auto, cpu, mps, cuda or cuda:N"),
        ("a.yaml", "lr_schedule: cos", "lr_schedule must be constant, linear, cosine or wsd"),
        ("a.yaml", "run_tag: 2026-01-01", "run_tag must be text"),
        ("a.yaml", "training:\n  n_layer: 3", "unknown key training"),
        ("a.yaml", "- n_layer", "expected `key: value` settings"),
        ("a.yaml", "n_layer: [1", "line 1: not YAML"),
        ("a.yaml", "!!python/object:os.system {}", "not YAML"),
        ("a.json", "{", "line 1: not JSON"),
        ("a.json", "[]", "expected `key: value` settings"),
        ("a.toml", "n_layer = 3", "ends in .yaml, .yml or .json"),
        ("a.yaml", "", "the file is empty"),
    ],
)
def test_a_bad_file_is_one_clear_line(world, name, content, words):
    path = world.write(name, content)
    (problem,) = world.problems(config_file=path)
    assert problem.startswith(path)
    assert words in problem
    assert "\n" not in problem


def test_a_file_that_cannot_be_read_is_one_clear_line(world, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"n_layer: \xff")
    assert "not UTF-8" in world.problems(config_file=str(tmp_path / "bad.yaml"))[0]
    assert world.problems(config_file="none.yaml") == ["none.yaml: no such file"]
    assert "a directory" in world.problems(config_file=str(tmp_path))[0]


@pytest.mark.parametrize("name", ["model.json", "data.yaml"])
def test_mistakes_in_configs_name_the_file(world, name):
    world.write(f"configs/{name}", '{"n_layers": 3}')
    assert world.problems() == [f"configs/{name}: unknown key n_layers; did you mean n_layer?"]


def test_mistakes_in_a_legacy_file_name_it(world):
    world.write("config.json", '{"n_layers": 3}')
    assert world.problems() == ["config.json: unknown key n_layers; did you mean n_layer?"]


def test_a_key_in_two_of_the_configs_files_is_an_error(world):
    world.write("configs/model.json", '{"seed": 1}')
    world.write("configs/train.yaml", "seed: 2")
    assert world.problems() == ["seed stands in both configs/model.json and configs/train.yaml"]


def test_other_files_in_configs_are_left_alone(world):
    world.write("configs/notes.yaml", "nonsense: 1")
    assert world.load().config == ModelConfig()


def test_a_wrong_value_is_reported_even_where_a_higher_layer_hides_it(world):
    world.write("config.json", '{"n_layer": "many"}')
    assert len(world.problems({"n_layer": 2})) == 1


def test_all_problems_of_all_layers_are_reported_together(world):
    world.write("configs/train.yaml", "learning_rate: fast")
    world.write("config.json", '{"n_layers": 3}')
    path = world.write("mine.yaml", "n_embd: 10\nn_head: 4\ndropout: 2.0")
    problems = world.problems({"data": "none.txt"}, path, ["unknown flag --x"])
    assert len(problems) == 6
    for words in ("--x", "dropout", "learning_rate", "n_layers", "divisible", "none.txt"):
        assert sum(words in problem for problem in problems) == 1, words


def test_a_text_that_is_not_there_is_a_config_error(world, tmp_path):
    assert world.problems({"data": "none.txt"}) == ["none.txt (--data): no such file"]
    (tmp_path / "empty.txt").touch()
    assert "the file is empty" in world.problems({"data": str(tmp_path / "empty.txt")})[0]
    assert "a directory" in world.problems({"data": str(tmp_path)})[0]


def test_a_yaml_dump_of_the_defaults_is_read_back(world):
    path = world.write("all.yaml", yaml.safe_dump(ModelConfig().model_dump()))
    assert world.load(config_file=path).config == ModelConfig()
