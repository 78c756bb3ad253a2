"""bundle.py and checkpoint.py: a model on disk, whole or not at all.

python -m pytest tests/test_bundle.py
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_the_weights_name_the_step_and_may_be_read_by_whoever_may_read_the_rest(export):
    with safe_open(export[0] / "model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7"
    modes = {path.stat().st_mode for path in export[0].iterdir()}
    assert len(modes) == 1


def test_a_model_is_loaded_from_its_export_alone_wherever_it_is_moved(export, tmp_path):
    directory, model = export
    shutil.move(directory, tmp_path / "elsewhere")
    loaded, tokenizer, state = load_model(tmp_path / "elsewhere")
    idx = torch.tensor([[0, 1, 2]])
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    assert not loaded.training
    assert tokenizer.decode([2, 0]) == "ca"
    assert state["val_loss"] == 1.5


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


@pytest.mark.parametrize("which", [1, 2])
def test_publishing_that_is_interrupted_leaves_the_old_export(export, monkeypatch, which):
    directory, model = export
    real, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == which:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_export(directory, model, create_tokenizer("abc"), CONFIG, {**STATE, "step": 9})
    assert load_model(directory)[2]["step"] == 7
    assert not list(directory.parent.glob(".export*"))


def test_files_that_a_user_put_beside_the_model_stay(export):
    directory, model = export
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    (directory / "plots").mkdir()
    (directory / "link").symlink_to("nowhere")
    (directory / "plots" / "a.svg").touch()
    save_export(directory, model, create_tokenizer("abc"), CONFIG, {**STATE, "step": 8})
    assert (directory / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (directory / "plots" / "a.svg").exists()
    assert (directory / "link").is_symlink()
    assert load_model(directory)[2]["step"] == 8


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


@pytest.mark.parametrize("name", sorted(set(BUNDLE_FILES) - {"training_state.json"}))
def test_one_changed_byte_is_noticed(export, name):
    content = bytearray((export[0] / name).read_bytes())
    content[-2] ^= 1
    (export[0] / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: not the file that was saved with this model"):
        load_model(export[0])


def rewrite(directory: Path, name: str, change) -> None:
    """Change a file, and the hash of it in the state too."""
    content = json.loads((directory / name).read_text(encoding="utf-8"))
    (directory / name).write_text(json.dumps(change(content)), encoding="utf-8")
    state = json.loads((directory / "training_state.json").read_text(encoding="utf-8"))
    state["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    (directory / "training_state.json").write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", lambda c: {**c, "rotary": True}, "not the architecture of a Folio model"),
        ("config.json", lambda c: {k: c[k] for k in c if k != "n_head"}, "not the architecture"),
        ("config.json", lambda c: {**c, "n_head": "2"}, "n_head: Input should be a valid integer"),
        ("config.json", lambda c: {**c, "n_embd": 16}, "not the weights of this model"),
        ("tokenizer.json", lambda c: {**c, "chars": ["a"]}, "not of one model"),
        ("tokenizer.json", lambda c: {**c, "chars": 3}, "list of single characters"),
        ("tokenizer.json", lambda c: {**c, "token_kind": "bpe"}, "token_kind 'bpe' is not known"),
    ],
)
def test_files_that_do_not_fit_one_another_are_refused(export, name, change, words):
    rewrite(export[0], name, change)
    with pytest.raises(UserError, match=words) as caught:
        load_model(export[0])
    assert "\n" not in str(caught.value)


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
