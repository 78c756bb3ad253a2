"""bundle.py and checkpoint.py: the files of a bundle, loading, and damaged files.

test_crash.py tests crashes of the writer.

python -m pytest tests/test_bundle.py
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    BUNDLE_CONFIG,
    BUNDLE_FILES_OF_EXPORT,
    CHECKOUT,
    DEAD_PROCESS,
    list_names,
    loaded_step,
    resume_run,
    save_bundle,
)
from safetensors import safe_open

import bundle as bundle_module
from bundle import (
    BUNDLE_FILES,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    compute_state_digest,
    copy_bundle,
    find_directory,
    find_run_by_id,
    find_usable_bundle,
    is_bundle,
    read_bundle,
    read_state,
    remove_bundle,
)
from checkpoint import load_weights, restore_training_state
from generate import SamplingParams, generate_tokens
from inference import find_newest_usable_bundle, load_model
from inspect_model import check_files, get_model_info
from model import LanguageModel
from optim import create_optimizer
from utils.errors import RunError, UserError

STATE_FILE = "training_state.json"


@pytest.fixture
def bundle(tmp_path):
    """A bundle and its model."""
    return tmp_path / "bundle", save_bundle(tmp_path / "bundle")


def read_json(directory: Path, name: str) -> dict:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def resume(directory: Path):
    """Load the optimizer's state as a resume does."""
    model = LanguageModel(BUNDLE_CONFIG, 3)
    optimizer = create_optimizer(model, BUNDLE_CONFIG)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    bundle = read_bundle(directory, WEIGHTS_FILE, OPTIMIZER_FILE)
    load_weights(bundle, model)
    restore_training_state(bundle, model, optimizer, scaler)
    return model, optimizer


# Files ----------------------------------------------------------------------------------------


def test_a_bundle_has_five_files_and_an_export_four(bundle, tmp_path):
    assert list_names(bundle[0]) == sorted(BUNDLE_FILES)
    copy_bundle(bundle[0], tmp_path / "export", with_optimizer=False)
    assert list_names(tmp_path / "export") == sorted(BUNDLE_FILES_OF_EXPORT)
    assert read_json(tmp_path / "export", STATE_FILE)["optimizer_file"] is None
    check_files(tmp_path / "export")


def test_config_json_has_the_architecture_and_nothing_of_the_run(bundle):
    config = read_json(bundle[0], "config.json")
    expected = "batch_size block_size vocab_size n_embd n_head n_layer dropout bias device"
    more = {"architecture", "tie_weights", "activation", "rope_theta", "ngram_rows"}
    more.add("format_version")
    assert config.keys() == {*expected.split(), *more}
    assert (config["vocab_size"], config["batch_size"], config["device"]) == (3, 3, "cpu")


def test_every_json_file_has_the_format_version(bundle):
    for name in BUNDLE_FILES:
        if name.endswith(".json"):
            assert read_json(bundle[0], name)["format_version"] == 1


def test_the_state_has_the_documented_fields_and_the_sha256_of_each_other_file(bundle):
    state = read_json(bundle[0], STATE_FILE)
    expected = "format_version step optimizer_file best_val_loss val_loss run_id lineage files"
    assert state.keys() == {*expected.split(), "training_config"}
    assert (state["step"], state["optimizer_file"]) == (7, "optimizer.pt")
    assert state["files"].keys() == set(BUNDLE_FILES) - {STATE_FILE}
    for name, digest in state["files"].items():
        assert hashlib.sha256((bundle[0] / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_file_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_bundle(tmp_path / "bundle")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "bundle").iterdir()}
    assert modes == {0o666 & ~mask}
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_weights_metadata_has_the_step_and_the_run_id(bundle):
    with safe_open(bundle[0] / "model.safetensors", "pt") as file:
        assert (file.metadata()["step"], file.metadata()["run_id"]) == ("7", "r")


def test_the_optimizer_state_is_keyed_by_parameter_name_and_needs_no_pickle(bundle):
    saved = torch.load(bundle[0] / "optimizer.pt", weights_only=True)
    assert saved["optimizer"] == "AdamW"
    assert saved["state"].keys() == dict(bundle[1].named_parameters()).keys()
    assert saved["generators"]["cpu"].dtype == torch.uint8


def test_a_save_replaces_the_old_bundle_and_a_failed_save_leaves_it(bundle, monkeypatch):
    directory, _ = bundle
    save_bundle(directory, step=8)
    assert loaded_step(directory) == 8

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LanguageModel, "save_safetensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_bundle(directory, step=9)
    assert loaded_step(directory) == 8
    assert list_names(directory) == sorted(BUNDLE_FILES)


def test_weights_that_are_not_finite_are_not_saved(bundle, monkeypatch):
    real = LanguageModel.parameters

    def make_infinite(self, *arguments):
        for parameter in real(self, *arguments):
            parameter.data[..., 0] = float("inf")
            yield parameter

    with monkeypatch.context() as patch, pytest.raises(RunError, match="step 8"):
        patch.setattr(LanguageModel, "parameters", make_infinite)
        save_bundle(bundle[0], step=8)
    assert loaded_step(bundle[0]) == 7


def test_a_users_files_in_the_directory_stay(bundle):
    directory, _ = bundle
    (directory / "notes.txt").write_text("mine", encoding="utf-8")
    (directory / "plots").mkdir()
    (directory / "link").symlink_to("nowhere")
    (directory / "plots" / "a.svg").touch()
    save_bundle(directory, step=8)
    assert loaded_step(directory) == 8
    remove_bundle(directory)
    assert list_names(directory) == ["a.svg", "link", "notes.txt", "plots"]


# The golden bundle ----------------------------------------------------------------------------

GOLDEN = CHECKOUT / "tests" / "golden" / "bundle_v1"  # every later version must read it


def test_the_golden_bundle_generates_the_same_text_as_when_it_was_saved():
    model, tokenizer = load_model(GOLDEN)
    state = read_state(GOLDEN)
    ids = generate_tokens(model, tokenizer.encode("To be"), 40, SamplingParams(temperature=0))
    assert tokenizer.decode(ids[0]) == "To be, or not to be, that is the question:\nWh"
    assert (state.step, [ancestor.name for ancestor in state.lineage]) == (600, ["parent"])


def test_the_golden_bundle_resumes_with_the_same_losses_as_when_it_was_saved(text_file):
    flags = {"max_iters": 603, "data": str(text_file), "eval_interval": 0}
    result = resume_run(GOLDEN, flags)
    text = (result.run_dir / "logs" / "metrics.jsonl").read_text(encoding="utf-8")
    losses = [json.loads(line).get("loss/train") for line in text.splitlines()[:3]]
    # Other processors round otherwise; another batch or dropout mask would be far off.
    assert losses == pytest.approx([0.6491, 0.8527, 0.7323], abs=2e-3)
    assert "ANOTHER TEXT" not in (result.run_dir / "logs" / "console.txt").read_text("utf-8")


# Loading --------------------------------------------------------------------------------------


def test_a_moved_bundle_loads(bundle, tmp_path):
    directory, model = bundle
    shutil.move(directory, tmp_path / "elsewhere")
    loaded, tokenizer = load_model(tmp_path / "elsewhere")
    state = read_state(tmp_path / "elsewhere")
    idx = torch.tensor([[0, 1, 2]])
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    assert not loaded.training
    assert tokenizer.decode([2, 0]) == "ca"
    assert state.val_loss == 1.5


def leave_half_published(directory: Path) -> None:
    """Leave the directories of a process that was killed while it built, or published."""
    (directory / f".tmp-{DEAD_PROCESS}").mkdir()
    (directory / f".tmp-{DEAD_PROCESS}" / "config.json").write_text("{", encoding="utf-8")
    (directory / f".next-{DEAD_PROCESS}").mkdir()
    for name in ("optimizer.pt", STATE_FILE):
        (directory / name).rename(directory / f".next-{DEAD_PROCESS}" / name)


def test_loading_writes_nothing(bundle, tmp_path):
    directory, _ = bundle
    save_bundle(directory.with_name("other"))
    leave_half_published(directory.with_name("other"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    load_model(directory)
    resume(directory)
    for place in (directory, directory.with_name("other")):
        get_model_info(place)
        check_files(place)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_users_files_named_like_temporary_directories_stay(bundle):
    (bundle[0] / ".next-2-notes").write_text("mine", encoding="utf-8")
    for name in (".tmp-notes", ".next-steps", ".tmp-1-notes"):
        (bundle[0] / name).mkdir()
        (bundle[0] / name / "mine.txt").write_text("mine", encoding="utf-8")
        os.utime(bundle[0] / name, (0, 0))
    save_bundle(bundle[0], step=8)
    assert len(list(bundle[0].glob(".*/mine.txt"))) == 3
    assert (bundle[0] / ".next-2-notes").read_text(encoding="utf-8") == "mine"
    assert loaded_step(bundle[0]) == 8


def test_a_reader_gets_the_old_or_the_new_bundle_while_one_is_published(bundle, tmp_path):
    directory, _ = bundle
    save_bundle(tmp_path / "other", step=8)
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            while True:
                copy_bundle(tmp_path / "other", directory)
                copy_bundle(tmp_path / "other", directory, with_optimizer=False)
        os._exit(1)
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert is_bundle(directory)
            assert read_state(directory).step in (7, 8)
            assert get_model_info(directory)["parameters"]["total"] == 848
            check_files(directory)
            assert loaded_step(directory) in (7, 8)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_bundle_without_its_optimizer_loads_but_does_not_resume(bundle):
    (bundle[0] / "optimizer.pt").unlink()
    assert loaded_step(bundle[0]) == 7
    with pytest.raises(UserError, match=r"optimizer\.pt: .*--reset-optimizer"):
        resume(bundle[0])


def test_a_reader_retries_if_a_bundle_was_published_meanwhile(bundle, monkeypatch):
    directory, _ = bundle
    real, published = bundle_module._read, []

    def publish_after_read(place, name):
        content = real(place, name)
        if name == STATE_FILE and not published:
            published.append(True)
            save_bundle(directory, step=8)
        return content

    monkeypatch.setattr(bundle_module, "_read", publish_after_read)
    assert loaded_step(directory) == 8


# Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLE_FILES_OF_EXPORT)
def test_a_missing_file_is_named(bundle, name):
    (bundle[0] / name).unlink()
    with pytest.raises(UserError, match=name):
        load_model(bundle[0])


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "a flipped bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "not JSON": lambda content: b"\xff{",
    "a list": lambda content: b"[]",
    "an empty object": lambda content: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_damaged_file_is_named_in_one_line(bundle, name, damage):
    directory, _ = bundle
    (directory / name).write_bytes(damage((directory / name).read_bytes()))
    with pytest.raises(UserError) as caught:
        if name == OPTIMIZER_FILE:
            resume(directory)
        else:
            load_model(directory)
    assert f"{directory / name}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("--reset-optimizer" in str(caught.value)) == (name == OPTIMIZER_FILE)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", STATE_FILE])
@pytest.mark.parametrize(("version", "remedy"), [(2, "update Folio"), ("x", ""), (True, "")])
def test_another_format_version_is_an_error(bundle, name, version, remedy):
    rewrite(bundle[0], name, lambda content: {**content, "format_version": version})
    with pytest.raises(UserError, match=rf"{name}: format_version {version!r}.* 1.*{remedy}"):
        load_model(bundle[0])


def rewrite(directory: Path, name: str, change) -> None:
    """Change a file and update its SHA-256 in the state."""
    (directory / name).write_text(json.dumps(change(read_json(directory, name))), encoding="utf-8")
    rehash(directory, name)


def rehash(directory: Path, name: str) -> None:
    state = read_json(directory, STATE_FILE)
    if name != STATE_FILE:
        state["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    state["training_config"]["state_sha256"] = compute_state_digest(state)
    (directory / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        ("config.json", lambda c: {**c, "rotary": True}, "config.json"),
        ("config.json", lambda c: {k: c[k] for k in c if k != "n_head"}, "config.json"),
        ("config.json", lambda c: {**c, "n_head": "2"}, "config.json: n_head"),
        ("config.json", lambda c: {**c, "n_embd": 16}, "model.safetensors"),
        ("tokenizer.json", lambda c: {**c, "chars": ["a"]}, "tokenizer.json .*config.json"),
        ("tokenizer.json", lambda c: {**c, "chars": 3}, "chars"),
        ("tokenizer.json", lambda c: {**c, "token_kind": "bpe"}, "tokenizer.json: .*merges"),
        ("tokenizer.json", lambda c: {**c, "token_kind": "words"}, "token_kind: .*char"),
        (STATE_FILE, lambda c: {**c, "step": -1}, f"{STATE_FILE}.*: step"),
        (STATE_FILE, lambda c: {**c, "step": True}, f"{STATE_FILE}.*: step"),
        (STATE_FILE, lambda c: {**c, "val_loss": "low"}, f"{STATE_FILE}.*: val_loss"),
        (STATE_FILE, lambda c: {**c, "files": {}}, STATE_FILE),
        (STATE_FILE, lambda c: {**c, "files": {"../x": "0"}}, STATE_FILE),
        (STATE_FILE, lambda c: {**c, "more": 1}, f"{STATE_FILE}.*: more"),
    ],
)
def test_files_that_do_not_fit_together_are_an_error(bundle, name, change, facts):
    rewrite(bundle[0], name, change)
    with pytest.raises(UserError, match=facts) as caught:
        load_model(bundle[0])
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_is_detected(bundle):
    """One bit in every 7th byte (997th of large files); safetensors and torch detect few."""
    directory, _ = bundle
    for name in BUNDLE_FILES:
        content = (directory / name).read_bytes()
        for position in range(0, len(content), 7 if len(content) < 10_000 else 997):
            bit = 1 << position % 8
            flipped = bytes([content[position] ^ bit])
            (directory / name).write_bytes(content[:position] + flipped + content[position + 1 :])
            with pytest.raises(UserError, match=name):
                read_bundle(directory, name)
        (directory / name).write_bytes(content)


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch it_ran",))


def test_a_malicious_pickle_is_an_error_and_runs_nothing(bundle):
    directory, _ = bundle
    torch.save({"format_version": 1, "state": Malicious()}, directory / "optimizer.pt")
    rehash(directory, OPTIMIZER_FILE)
    with pytest.raises(UserError, match=r"UnpicklingError.*--reset-optimizer"):
        resume(directory)
    (directory / "optimizer.pt").write_bytes(pickle.dumps(Malicious()))
    rehash(directory, OPTIMIZER_FILE)
    with pytest.raises(UserError, match="--reset-optimizer"):
        resume(directory)
    assert not Path("it_ran").exists()
    pickle.loads(pickle.dumps(Malicious()))  # pickle would run it
    assert Path("it_ran").exists()


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda s: s.update(optimizer="Muon"), "Muon.*AdamW"),
        (lambda s: s.update(format_version=2), "format_version.* 2"),
        (lambda s: s["state"].popitem(), "parameters"),
        (lambda s: s["generators"].clear(), "generators"),
        (lambda s: s["generators"].update(cpu=torch.zeros(3)), "RNG state must be"),
        (
            lambda s: s["state"]["final_norm.weight"].update(exp_avg=torch.zeros(5)),
            "final_norm.weight",
        ),
        (lambda s: s.pop("generators"), "generators"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_an_error_with_the_flag_to_use(
    bundle, change, facts
):
    directory, _ = bundle
    saved = torch.load(directory / "optimizer.pt", weights_only=True)
    change(saved)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    (directory / "optimizer.pt").write_bytes(buffer.getvalue())
    rehash(directory, OPTIMIZER_FILE)
    with pytest.raises(UserError, match=facts) as caught:
        resume(directory)
    assert "--reset-optimizer" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", '{"model_type": "gpt2"}'])
def test_a_directory_of_another_program_is_not_a_folio_model(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"training_state\.json"):
        load_model(tmp_path)


# Finding --------------------------------------------------------------------------------------


def test_the_newest_run_with_a_model_is_found(tmp_path):
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match=r"python train\.py"):
        find_newest_usable_bundle(runs)
    for name in ("20260101_000000_b", "20260102_000000_a", "20260103_000000"):
        (runs / name / "artifacts" / "checkpoints").mkdir(parents=True)
    save_bundle(runs / "20260101_000000_b" / "artifacts" / "export")
    for step in (3, 4):
        save_bundle(
            runs / "20260102_000000_a" / "artifacts" / "checkpoints" / f"step_0000000{step}"
        )
    assert find_newest_usable_bundle(runs).path.name == "step_00000004"
    save_bundle(runs / "20260102_000000_a" / "artifacts" / "export")
    export = runs / "20260102_000000_a" / "artifacts" / "export"
    assert find_newest_usable_bundle(runs).path == export
    with pytest.raises(UserError, match="20260103_000000"):
        find_usable_bundle(runs / "20260103_000000")


def test_a_reference_is_a_path_a_run_id_or_a_model_name(tmp_path):
    runs, checkpoints = tmp_path / "runs", tmp_path / "checkpoints"
    for place in (runs / "r", checkpoints / "dante", Path("here")):
        place.mkdir(parents=True)
    assert find_directory("r", runs, checkpoints) == runs / "r"
    assert find_directory("dante", runs, checkpoints) == checkpoints / "dante"
    assert find_directory("here", runs, checkpoints) == Path("here")
    with pytest.raises(UserError, match=r"virgil: .*runs/virgil.*checkpoints/virgil"):
        find_directory("virgil", runs, checkpoints)


def test_model_info_has_everything_but_the_weights(bundle):
    directory, model = bundle
    info = get_model_info(directory)
    assert info["training_state"]["training_config"]["learning_rate"] == 3e-3
    assert info["config"]["n_embd"] == 8
    assert info["tokenizer"] == {"token_kind": "char", "chars": ["a", "b", "c"]}
    assert info["parameters"]["total"] == model.count_parameters()
    assert sum(info["parameters"].values()) == 2 * model.count_parameters()
    assert (
        info["bytes"]
        == sum(p.stat().st_size for p in directory.iterdir())
        - (directory / STATE_FILE).stat().st_size
    )


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\4\0\0\0\0\0\0\0x"]
)
def test_an_invalid_safetensors_header_is_an_error_in_one_line(bundle, content):
    (bundle[0] / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: ") as caught:
        get_model_info(bundle[0])
    assert "\n" not in str(caught.value)


def test_bundles_are_read_without_torch(bundle):
    code = (
        "import sys, resume, inspect_model; inspect_model.get_model_info(sys.argv[1]); "
        "assert not {'torch', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle[0])], check=True, cwd=CHECKOUT)


@pytest.mark.parametrize("tag", ["première", "базовый", "v1.0_a-b"])
def test_a_run_is_found_by_its_id_in_any_script(tag):
    run = Path("runs") / f"20260131_235958_{tag}"
    (run / "artifacts").mkdir(parents=True)
    assert find_run_by_id(run.name, Path("runs")) == run
    for elsewhere in ("../runs/" + run.name, f"{run.name}/artifacts", ".", "..", "", None, "a\0"):
        assert find_run_by_id(elsewhere, Path("runs")) is None
