"""bundle.py and checkpoint.py: a model on disk, whole or not at all.

python -m pytest tests/test_bundle.py
"""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CHECKOUT
from safetensors import safe_open

from bundle import BUNDLE_FILES, find_bundle, newest_export, read_bundle
from checkpoint import load_model, save_export
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import create_tokenizer
from utils.errors import UserError

CONFIG = ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=4, batch_size=3)
STATE = {"step": 7, "run_id": "r", "val_loss": 1.5}


@pytest.fixture
def export(tmp_path):
    """An export, with the model that is in it."""
    torch.manual_seed(0)
    model, tokenizer = LanguageModel(CONFIG, 3), create_tokenizer("abc")
    save_export(tmp_path / "export", model, tokenizer, CONFIG, STATE)
    return tmp_path / "export", model


def test_an_export_holds_exactly_its_four_files(export):
    assert sorted(path.name for path in export[0].iterdir()) == sorted(BUNDLE_FILES)
    assert not [path for path in export[0].parent.iterdir() if path.name.startswith(".")]


def test_config_json_is_the_architecture_and_names_no_run(export):
    config = json.loads((export[0] / "config.json").read_text(encoding="utf-8"))
    expected = "batch_size block_size vocab_size n_embd n_head n_layer dropout bias device"
    assert set(expected.split()) <= config.keys()
    assert config.keys() - set(expected.split()) == {"architecture", "tie_weights", "activation"}
    assert (config["vocab_size"], config["batch_size"], config["device"]) == (3, 3, "cpu")


def test_the_state_has_the_hash_of_each_other_file(export):
    state = json.loads((export[0] / "training_state.json").read_text(encoding="utf-8"))
    assert state["step"] == 7
    assert state["files"].keys() == set(BUNDLE_FILES) - {"training_state.json"}
    for name, digest in state["files"].items():
        assert hashlib.sha256((export[0] / name).read_bytes()).hexdigest() == digest


def test_the_weights_name_the_step_and_no_compiler(export):
    with safe_open(export[0] / "model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7"
        assert not [name for name in file.keys() if "_orig_mod" in name]  # noqa: SIM118


def test_a_model_is_loaded_from_its_export_alone_wherever_it_is_moved(export, tmp_path):
    directory, model = export
    moved = shutil.move(directory, tmp_path / "elsewhere")
    loaded, tokenizer, state = load_model(tmp_path / "elsewhere")
    idx = torch.tensor([[0, 1, 2]])
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    assert not loaded.training
    assert tokenizer.decode([2, 0]) == "ca"
    assert state["val_loss"] == 1.5
    assert moved


def test_a_new_export_replaces_the_old_one_and_a_failed_one_leaves_it(export, monkeypatch):
    directory, model = export
    save_export(directory, model, create_tokenizer("abc"), CONFIG, {**STATE, "step": 8})
    assert load_model(directory)[2]["step"] == 8

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_safetensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_export(directory, model, create_tokenizer("abc"), CONFIG, {**STATE, "step": 9})
    assert load_model(directory)[2]["step"] == 8
    assert [path.name for path in directory.parent.iterdir() if path.name[0] == "."] == []


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_missing_file_is_named(export, name):
    (export[0] / name).unlink()
    with pytest.raises(UserError, match=rf"not a model: {name} not there"):
        load_model(export[0])


@pytest.mark.parametrize("name", BUNDLE_FILES)
@pytest.mark.parametrize("content", [b"", b"\xff{", b"[]", b"{}"])
def test_a_damaged_file_is_named(export, name, content):
    (export[0] / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        load_model(export[0])
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused(export):
    path = export[0] / "training_state.json"
    path.write_text('{"format_version": 99}', encoding="utf-8")
    with pytest.raises(UserError, match="format_version 99, this Folio reads 1"):
        read_bundle(export[0])


def test_files_of_two_models_are_not_one_model(export):
    (export[0] / "tokenizer.json").write_text('{"token_kind": "char", "chars": ["a"]}')
    with pytest.raises(UserError, match="not of one model"):
        load_model(export[0])


def test_an_unknown_key_of_a_newer_architecture_is_refused(export):
    path = export[0] / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "rotary": True}), encoding="utf-8")
    with pytest.raises(UserError, match="not the architecture of a Folio model"):
        read_bundle(export[0])


def test_the_newest_export_of_all_runs_is_found(export, tmp_path):
    with pytest.raises(UserError, match="no trained model"):
        newest_export(tmp_path / "runs")
    for run in ("b", "a"):
        (tmp_path / "runs" / run / "artifacts").mkdir(parents=True)
        shutil.copytree(export[0], tmp_path / "runs" / run / "artifacts" / "export")
        (tmp_path / "runs" / run / "artifacts" / "export" / "training_state.json").touch()
    assert newest_export(tmp_path / "runs") == tmp_path / "runs" / "a" / "artifacts" / "export"
    assert find_bundle(tmp_path / "runs" / "b").name == "export"
    assert find_bundle(export[0]) == export[0]


def test_bundles_are_read_without_torch(export):
    code = (
        "import sys, bundle, pathlib; bundle.read_bundle(pathlib.Path(sys.argv[1])); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(export[0])], check=True, cwd=CHECKOUT)
