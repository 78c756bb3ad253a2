"""Loading settings: sources, priorities and errors. config.py.

python -m pytest tests/test_config.py
"""

import itertools
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import CHECKOUT, call_as_other_user

from config import CONFIG_FILES, CheckpointSettings, ConfigLoader, format_settings, read_config_file
from parameters import GROUPS, ModelConfig
from utils.errors import UserError

SOURCES = ("flag", "config file", "configs", "legacy", "default")
VALUES = {"flag": 11, "config file": 12, "configs": 13, "legacy": 14}


@pytest.fixture
def sources(tmp_path):
    """Return a configs/ and a working directory to fill, and a loader that reads them."""

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

        def load(self, flags=None, config_file=None, problems=(), checkpoint=None):
            loader = ConfigLoader(
                flags, config_file, problems, configs_dir=self.configs, working_dir=self.cwd
            )
            return loader.load(checkpoint)

        def problems(self, *args, **kwargs) -> list[str]:
            with pytest.raises(UserError) as caught:
                self.load(*args, **kwargs)
            return list(caught.value.problems)

    return Sources()


def write_config(name: str, content: str) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")


# Size --------------------------------------------------------------------------------------------


def test_a_large_yaml_file_is_refused_before_it_is_parsed_which_takes_seconds():
    Path("large.yaml").write_text(f"a: [{'1, ' * 100_000}]", encoding="utf-8")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"large\.yaml.*bytes"):
        read_config_file(Path("large.yaml"))
    assert time.monotonic() - start < 1


# Priorities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("upper", "lower"), list(itertools.combinations(SOURCES, 2)))
def test_the_source_of_higher_priority_wins_and_is_recorded(sources, upper, lower):
    arguments = {}
    for source in {upper, lower} - {"default"}:
        if source == "flag":
            arguments["flags"] = {"n_layer": VALUES[source]}
        elif source == "config file":
            arguments["config_file"] = sources.write("mine.yaml", f"n_layer: {VALUES[source]}")
        elif source == "configs":
            sources.write("configs/model.json", json.dumps({"n_layer": VALUES[source]}))
        else:
            sources.write("config.json", json.dumps({"n_layer": VALUES[source]}))
    loaded = sources.load(**arguments)
    assert loaded.config.n_layer == VALUES[upper]
    expected = {
        "flag": "--n-layer",
        "config file": arguments.get("config_file"),
        "configs": "configs/model.json",
        "legacy": "config.json",
    }[upper]
    assert loaded.sources["n_layer"] == expected
    assert loaded.sources["n_head"] == "default"


def test_settings_from_python_win_and_may_be_paths_and_numbers_of_numpy():
    values = {"data": CHECKOUT / "LICENSE", "n_layer": np.int64(2), "min_lr": np.float32(0)}
    loaded = ConfigLoader.from_settings({**values, "learning_rate": 1}, "train()").load()
    assert loaded.config.data == str(CHECKOUT / "LICENSE")
    assert (loaded.config.n_layer, loaded.config.learning_rate) == (2, 1.0)
    assert {loaded.sources[name] for name in values} == {"train()"}
    assert loaded.sources["n_head"] == "configs/model.json"


def test_wrong_settings_from_python_are_reported_together():
    loader = ConfigLoader.from_settings({"n_layers": 3, "seed": "one", "n_head": None}, "train()")
    with pytest.raises(UserError) as caught:
        loader.load()
    unknown, *wrong = caught.value.problems
    assert "n_layers" in unknown and "n_layer?" in unknown
    assert sorted(re.findall(r"train\(\): (seed|n_head) must", "\n".join(wrong))) == [
        "n_head",
        "seed",
    ]


def test_false_and_null_in_a_file_are_values(sources):
    path = sources.write("mine.yaml", "tie_weights: false\nmin_lr: null")
    sources.write("configs/train.yaml", "min_lr: 1e-5")
    loaded = sources.load(config_file=path)
    assert loaded.config.tie_weights is False
    assert loaded.config.min_lr is None
    assert loaded.sources["min_lr"] == path


@pytest.mark.parametrize("name", ["epochs", "max_minutes"])
def test_epochs_or_max_minutes_replace_max_iters_of_lower_priority(sources, name):
    sources.write("configs/train.yaml", "max_iters: 500")
    loaded = sources.load({name: 2.0})
    assert loaded.config.max_iters is None
    assert getattr(loaded.config, name) == 2.0
    assert loaded.sources["max_iters"] == "--" + name.replace("_", "-")


def test_max_iters_as_a_flag_replaces_epochs_of_a_file(sources):
    loaded = sources.load({"max_iters": 5}, sources.write("mine.yaml", "epochs: 2.0"))
    assert (loaded.config.max_iters, loaded.config.epochs) == (5, None)


def test_max_iters_and_epochs_in_one_file_conflict(sources):
    path = sources.write("mine.yaml", "epochs: 2.0\nmax_iters: 5")
    (problem,) = sources.problems(config_file=path)
    assert f"(max_iters: {path}, epochs: {path})" in problem


def test_the_shipped_configs_set_every_default():
    loaded = ConfigLoader().load()
    assert loaded.config == ModelConfig()
    stated = {name for name, source in loaded.sources.items() if source != "default"}
    own = {*GROUPS["run"].model_fields, *GROUPS["initialization"].model_fields}
    assert stated == set(ModelConfig.model_fields) - own


def test_each_shipped_config_has_the_settings_of_its_groups():
    groups = {"model.json": ["architecture"], "data.yaml": ["data"]}
    groups |= {"train.yaml": ["training", "saving", "runtime"], "tensorboard.json": ["tracking"]}
    for name in CONFIG_FILES:
        values = read_config_file(CHECKOUT / "configs" / name)
        expected = [key for group in groups[name] for key in GROUPS[group].model_fields]
        assert [key for key in values if key != "$schema"] == expected


def test_the_shipped_configs_link_the_schema_for_editors():
    for path in (CHECKOUT / "configs").rglob("*.*"):
        if path.name != "schema.json" and path.parent.name != "search":  # ranges, no values
            named = re.search(
                r'(?:"\$schema": "|\$schema=)([\w./]+)', path.read_text(encoding="utf-8")
            )
            assert named, path
            assert (path.parent / named[1]).resolve() == CHECKOUT / "configs" / "schema.json"


PRESETS = sorted((CHECKOUT / "configs" / "presets").iterdir())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_sets_all_that_affects_its_result_and_reports_the_result(path):
    assert ConfigLoader(config_file=str(path)).load().config
    heading = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert re.search(r"# Measured[^.]*(\d|\bnot\b)", heading)
    preset = read_config_file(path)
    assert {"precision", "torch_compile", "compile_backend"} <= preset.keys()
    shaping = {name for g in ("architecture", "training") for name in GROUPS[g].model_fields}
    shaping |= {"train_split", "test_split", "window_order"}
    unset = {"epochs", "max_minutes", "size"}  # max_iters and the shape replace these
    unset |= set() if preset["architecture"] == "speedrun" else {"ngram_rows"}
    assert shaping - set(preset) <= unset
    assert preset["max_iters"] or preset["epochs"]


def test_null_settings_take_the_architectures_values_and_record_that_source(sources):
    loaded = sources.load({"architecture": "gpt2", "tie_weights": None})
    assert (loaded.config.tie_weights, loaded.config.activation) == (True, "gelu")
    for name in ("tie_weights", "activation"):
        assert loaded.sources[name] == "architecture gpt2 (--architecture)"
    loaded = sources.load({"architecture": "modern", "activation": "gelu"})
    assert (loaded.config.tie_weights, loaded.config.activation) == (False, "gelu")
    assert loaded.sources["activation"] == "--activation"
    assert ModelConfig(n_layer=1).model_fields_set == {"n_layer"}


def test_null_hides_the_value_of_a_source_of_lower_priority(sources):
    path = sources.write("mine.yaml", "architecture: speedrun\nngram_rows: 99\ntie_weights: true")
    loaded = sources.load({"ngram_rows": None, "architecture": "modern"}, path)
    assert (loaded.config.ngram_rows, loaded.config.tie_weights) == (None, True)
    assert sources.load({"tie_weights": None}, path).config.tie_weights is False


def test_a_record_of_an_old_version_keeps_the_behavior_of_that_version(sources):
    config = {"architecture": "gpt2", "learning_rate": 3e-3, "torch_compile": True}
    record = {"format_version": 1, "config": config, "sources": {}, "run": {}}
    loaded = sources.load(config_file=sources.write("old.json", json.dumps(record)))
    now = loaded.config
    assert (now.optimizer, now.precision) == ("adamw", "fp32")
    assert (now.torch_compile, now.compile_backend) == ("on", "aot_eager")


def test_one_note_lists_the_legacy_keys_that_configs_shadow(sources):
    sources.write("configs/model.json", '{"n_layer": 2, "n_head": 2}')
    sources.write("config.json", '{"n_layer": 3, "n_head": 4, "dropout": 0.1}')
    loaded = sources.load()
    assert loaded.config.dropout == 0.1
    (note,) = loaded.notes
    assert "n_layer, n_head" in note
    assert "dropout" not in note
    assert "--config config.json" in note


def test_a_conflict_names_the_sources_of_both_values(sources):
    sources.write("configs/model.json", '{"n_embd": 128}')
    (problem,) = sources.problems({"n_head": 3})
    assert "n_embd 128" in problem
    assert "n_head 3" in problem
    assert "(n_embd: configs/model.json, n_head: --n-head)" in problem


@pytest.mark.parametrize("part", ["config", "sources", "run"])
def test_a_run_record_with_a_part_of_the_wrong_type_is_an_error(sources, part):
    record = {"config": {}, "sources": {}, "run": {}} | {part: 3}
    path = sources.write("r.json", json.dumps(record))
    (problem,) = sources.problems(config_file=path)
    assert problem.startswith(path)
    assert "record" in problem


def test_config_reads_the_record_of_a_run(sources):
    record = {"config": {"n_layer": 7}, "sources": {"n_layer": "default"}, "run": {"run_id": "x"}}
    loaded = sources.load(config_file=sources.write("full_config.json", json.dumps(record)))
    assert loaded.config.n_layer == 7
    assert loaded.rerun_of == {"run_id": "x"}
    newer = sources.write("newer.json", json.dumps({**record, "format_version": 2}))
    (problem,) = sources.problems(config_file=newer)
    assert "newer.json: format_version 2" in problem
    assert "reads 1" in problem


def test_show_config_lists_every_setting_with_its_source(sources):
    loaded = sources.load({"n_layer": 3})
    lines = {line.split()[0]: line for line in format_settings(loaded).splitlines()}
    for name in ModelConfig.model_fields:
        assert lines[name].rstrip().endswith(loaded.sources[name])
    assert "--n-layer" in lines["n_layer"]


# Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", "0.1e-2", ".1e-2", "1.e-3"])
def test_scientific_notation_in_yaml_is_a_float(sources, number):
    path = sources.write("mine.yaml", f"learning_rate: {number}")
    assert sources.load(config_file=path).config.learning_rate == 0.001


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("a.yaml", "n_layers: 3", ["unknown key n_layers", "did you mean n_layer?"]),
        ("a.json", '{"n_layers": 3}', ["unknown key n_layers", "did you mean n_layer?"]),
        ("a.yaml", "zzz: 3", ["unknown key zzz"]),
        ("a.yaml", "3: 3", ["unknown key 3"]),
        ("a.yaml", "n_layer: 3\nn_layer: 4", ["duplicate key n_layer"]),
        ("a.json", '{"n_layer": 3, "n_layer": 4}', ["duplicate key n_layer"]),
        ("a.yaml", "data: null\ninput_file: null", ["input_file", "alias of data"]),
        ("a.yaml", "input_file: null\ndata: null", ["input_file", "alias of data"]),
        ("a.yaml", "seed: 017", ["seed", 'got "017"']),
        ("a.yaml", "seed: 1:30", ["seed", 'got "1:30"']),
        ("a.yaml", "bias: !!bool x", ["cannot be read"]),
        ("a.yaml", "seed: !!int ''", ["cannot be read"]),
        ("a.yaml", '"two\\nlines": 3', ['unknown key "two\\nlines"']),
        ("a.yaml", "null: 3", ["unknown key null"]),
        ("a.yaml", "seed: 9999999999999999999999", ["seed", "9223372036854775808"]),
        ("a.json", "[" * 100_000, ["nested"]),
        ("a.yaml", "n_layer: true", ["n_layer", "got true"]),
        ("a.json", '{"learning_rate": true}', ["learning_rate", "got true"]),
        ("a.yaml", "learning_rate: .nan", ["learning_rate", "finite", "got NaN"]),
        ("a.json", '{"learning_rate": Infinity}', ["learning_rate", "finite", "got Infinity"]),
        ("a.yaml", "learning_rate: .inf", ["learning_rate", "finite"]),
        ("a.yaml", "n_layer: 2.5", ["n_layer", "got 2.5"]),
        ("a.yaml", "n_layer: '2'", ["n_layer", 'got "2"']),
        ("a.yaml", "n_layer: 0", ["n_layer", "1, got 0"]),
        ("a.yaml", "dropout: 1.0", ["dropout", "1, got 1.0"]),
        ("a.yaml", "learning_rate: 0", ["learning_rate", "0, got 0"]),
        ("a.yaml", "bias: 1", ["bias", "true or false", "got 1"]),
        ("a.yaml", "run_tag: 5", ["run_tag", "quotes", "got 5"]),
        ("a.yaml", "runs_dir: ''", ["runs_dir", "empty"]),
        ("a.yaml", "device: gpu", ["device", "auto, cpu, mps, cuda or cuda:N"]),
        ("a.yaml", "lr_schedule: cos", ["lr_schedule", "constant, linear, cosine or wsd"]),
        ("a.yaml", "run_tag: 2026-01-01", ["run_tag", "text"]),
        ("a.yaml", "training:\n  n_layer: 3", ["unknown key training", "flat"]),
        ("a.yaml", "vocab_size: 65", ["vocab_size", "257, got 65"]),
        ("a.yaml", "lr: 1e-3", ["unknown key lr", "did you mean learning_rate?"]),
        ("a.json", '{"context": 64}', ["unknown key context", "did you mean block_size?"]),
        ("a.yaml", "n_layer: &a [*a]", ["n_layer", "["]),
        ("a.json", '{"seed": 1' + "0" * 5000 + "}", ["a.json"]),
        ("a.yaml", f"seed: {'x' * 2_000_000}", ["bytes"]),
        ("a.yaml", "- n_layer", ["expected"]),
        ("a.yaml", "n_layer: [1", ["line 1", "YAML"]),
        ("a.yaml", "!!python/object:os.system {}", ["YAML"]),
        ("a.json", "{", ["line 1", "JSON"]),
        ("a.json", "[]", ["expected"]),
        ("a.toml", "n_layer = 3", [".yaml, .yml or .json"]),
        ("a.yaml", "", ["empty"]),
    ],
)
def test_a_bad_file_is_one_line_with_the_file_the_key_and_the_value(sources, name, content, facts):
    path = sources.write(name, content)
    (problem,) = sources.problems(config_file=path)
    assert problem.startswith(path)
    assert all(fact in problem for fact in facts), problem
    assert "\n" not in problem


def test_an_unreadable_file_is_one_line(sources, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"n_layer: \xff")
    assert "not UTF-8" in sources.problems(config_file=str(tmp_path / "bad.yaml"))[0]
    assert sources.problems(config_file="none.yaml") == ["none.yaml: no such file"]
    assert "a directory" in sources.problems(config_file=str(tmp_path))[0]


@pytest.mark.parametrize("place", ["pipe.yaml", "/dev/zero", "/proc/kmsg"])
def test_only_a_regular_file_is_read(sources, place):
    os.mkfifo("pipe.yaml")
    signal.alarm(20)  # ends a process that waits
    (problem,) = sources.problems(config_file=place)
    signal.alarm(0)
    assert problem.startswith(place)
    assert re.search("device or a pipe|empty|permitted|denied|no such file", problem)


@pytest.mark.parametrize("place", ["closed/a.yaml", "closed.yaml", "closed"])
def test_a_file_without_permission_is_one_line(shared_directory, place):
    write_config("closed/a.yaml", "seed: 1")
    write_config("closed.yaml", "seed: 1")
    Path("closed").chmod(0)
    Path("closed.yaml").chmod(0)
    error = call_as_other_user(lambda: str(read_config_file(Path(place))))
    Path("closed").chmod(0o700)
    assert error.startswith("UserError")
    assert place in error
    assert "\n" not in error


@pytest.mark.parametrize("closed", ["configs", "work"])
def test_a_directory_without_permission_is_one_line(shared_directory, closed):
    for name in ("configs", "work"):
        Path(name).mkdir()
    Path(closed).chmod(0)
    directories = {"configs_dir": Path("configs"), "working_dir": Path("work")}
    error = call_as_other_user(lambda: str(ConfigLoader(**directories).load()))
    Path(closed).chmod(0o700)
    assert error.startswith("UserError")
    assert "Permission denied" in error


def test_a_byte_order_mark_is_ignored_and_needs_no_codec_that_is_loaded_late(sources):
    assert sources.load(config_file=sources.write("a.yaml", "\ufeffseed: 1")).config.seed == 1
    modules = [*CHECKOUT.glob("*.py"), *CHECKOUT.glob("utils/**/*.py")]
    late = [path.name for path in modules if "-sig" in path.read_text(encoding="utf-8")]
    assert not late


def test_a_message_about_nested_anchors_is_short_and_immediate(sources):
    anchors = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    path = sources.write("a.yaml", "\n".join(["a0: &a0 [x, 2020-01-01]", *anchors, "seed: *a9"]))
    start = time.process_time()
    problems = sources.problems(config_file=path)
    assert time.process_time() - start < 1
    assert "seed" in problems[-1]
    assert all(len(problem) < 200 for problem in problems)


def test_merge_keys_which_grow_exponentially_are_an_error(sources):
    (problem,) = sources.problems(config_file=sources.write("a.yaml", "<<: {seed: 1}"))
    assert "line 1" in problem
    assert "<<" in problem


def test_many_unknown_keys_are_counted(sources):
    path = sources.write("a.json", json.dumps({f"n_laye{i}": 0 for i in range(50_000)}))
    start = time.process_time()
    problems = sources.problems(config_file=path)
    assert time.process_time() - start < 2
    assert len(problems) == 21
    assert "49,980" in problems[-1]


@pytest.mark.parametrize("name", ["model.json", "data.yaml"])
def test_an_unknown_key_in_configs_names_the_file(sources, name):
    sources.write(f"configs/{name}", '{"n_layers": 3}')
    (problem,) = sources.problems()
    assert problem.startswith(f"configs/{name}: unknown key n_layers")


def test_an_unknown_key_in_the_legacy_file_names_the_file(sources):
    sources.write("config.json", '{"n_layers": 3}')
    (problem,) = sources.problems()
    assert problem.startswith("config.json: unknown key n_layers")


def test_a_model_name_that_differs_from_another_only_in_case_is_an_error(sources):
    (sources.cwd / "models" / "dante").mkdir(parents=True)
    flags = {"checkpoints_dir": str(sources.cwd / "models")}
    assert sources.load({**flags, "model_name": "dante"}).config.model_name == "dante"
    assert sources.load({**flags, "model_name": "dante2"})
    (problem,) = sources.problems({**flags, "model_name": "Dante"})
    assert "model_name Dante" in problem
    assert "models/dante" in problem


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
@pytest.mark.parametrize("path", ["a\\u0000b", "a\\ud800"])
def test_a_path_that_no_file_can_have_is_one_line(sources, name, path):
    (problem,) = sources.problems(config_file=sources.write(name, f'{{"runs_dir": "{path}"}}'))
    assert "runs_dir" in problem or "line 1" in problem or "read" in problem


def test_a_key_in_two_files_of_configs_is_an_error(sources):
    sources.write("configs/model.json", '{"seed": 1}')
    sources.write("configs/train.yaml", "seed: 2")
    (problem,) = sources.problems()
    assert all(word in problem for word in ("seed", "configs/model.json", "configs/train.yaml"))


def test_other_files_in_configs_are_ignored(sources):
    sources.write("configs/notes.yaml", "nonsense: 1")
    assert sources.load().config == ModelConfig()


def test_a_wrong_value_is_reported_even_if_a_flag_overrides_it(sources):
    sources.write("config.json", '{"n_layer": "many"}')
    assert len(sources.problems({"n_layer": 2})) == 1


def test_the_problems_of_all_sources_are_reported_together(sources):
    sources.write("configs/train.yaml", "learning_rate: fast")
    sources.write("config.json", '{"n_layers": 3}')
    path = sources.write("mine.yaml", "n_embd: 10\nn_head: 4\ndropout: 2.0")
    problems = sources.problems({"data": "none.txt"}, path, ["unknown flag --x"])
    assert len(problems) == 6
    for fact in ("--x", "dropout", "learning_rate", "n_layers", "n_embd 10", "none.txt"):
        assert sum(fact in problem for problem in problems) == 1, fact


def test_a_text_that_cannot_be_read_is_a_config_error(sources, tmp_path):
    assert sources.problems({"data": "none.txt"}) == ["none.txt (--data): no such file"]
    (tmp_path / "empty.txt").touch()
    assert "the file is empty" in sources.problems({"data": str(tmp_path / "empty.txt")})[0]
    assert "directory" in sources.problems({"data": str(tmp_path)})[0]


def test_a_yaml_dump_of_the_defaults_loads_as_the_defaults(sources):
    path = sources.write("all.yaml", yaml.safe_dump(ModelConfig().model_dump()))
    assert sources.load(config_file=path).config == ModelConfig()


# The size of model: see test_sizes.py ------------------------------------------------------------


def test_a_shape_from_a_source_of_higher_priority_replaces_auto(sources):
    sources.write("configs/train.yaml", "size: auto\nmax_minutes: 1\n")
    assert sources.load({"n_layer": 2}).config.size is None


def test_auto_replaces_a_shape_from_a_source_of_lower_priority(sources):
    sources.write("configs/model.json", '{"n_layer": 2}')
    assert sources.load({"size": "auto", "max_minutes": 1.0}).config.size == "auto"


def test_auto_and_the_default_shape_may_both_stand_in_configs(sources):
    sources.write("configs/model.json", '{"n_layer": 2}')
    sources.write("configs/train.yaml", "size: auto\nmax_minutes: 1\n")
    loaded = sources.load()
    assert loaded.config.size == "auto"
    shown = [line.split() for line in format_settings(loaded).splitlines()]
    assert ["n_layer", "chosen", "by", "size", "auto", "configs/model.json"] in shown


def test_a_resumed_model_keeps_its_shape_whatever_chose_it(sources):
    saved = CheckpointSettings("runs/a", {"n_layer": 2, "size": None}, frozenset({"n_layer"}))
    loaded = sources.load({"size": "auto", "max_minutes": 1.0}, checkpoint=saved)
    assert (loaded.config.size, loaded.config.n_layer) == (None, 2)


@pytest.mark.parametrize(
    "flags",
    [
        {"size": "auto"},
        {"size": "auto", "max_minutes": 1.0, "max_iters": 7},
        {"size": "auto", "max_minutes": 1.0, "n_embd": 64},
    ],
)
def test_auto_without_a_time_or_beside_a_shape_is_an_error(sources, flags):
    (problem,) = sources.problems(flags)
    assert "size auto" in problem
