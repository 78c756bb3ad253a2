"""start.py: named models, fine-tuning, lineage, and every way to ask for a model that is not there.

That what goes on is exactly the same is the subject of test_resume.py.

python -m pytest tests/test_start.py
"""

import gzip
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from conftest import CHECKOUT, LINES, TINY_FLAGS, assert_same_bits
from safetensors.torch import load_file

import checkpoint as checkpoint_module
import store
import trainer as trainer_module
from bundle import BUNDLE_FILES, get_model_info
from callbacks import TrainResult
from checkpoint import load_model
from config import ConfigLoader
from resume import lock_named_model, plan_run
from trainer import Trainer, dry_run, train
from utils.errors import NothingToDo, RunError, UserError
from utils.stop import StopRequest

DANTE = Path("checkpoints/dante")
SLOW_KINDS = ("directory", "gz", "zst")  # what differs in them is quick to test in test_store.py


@pytest.fixture
def go(tiny, quiet):
    """Run the command with these flags, as `plan_run` and `train` do. Fresh models are tiny ones."""

    def run(resume=None, *, fresh=False, overwrite=False, reset_optimizer=False, **flags):
        if fresh:
            flags = {**tiny().model_dump(exclude_unset=True), **flags}
        loaded, plan = plan_run(
            ConfigLoader(flags), resume=resume, overwrite=overwrite, reset_optimizer=reset_optimizer
        )
        return train(loaded.config, loaded=loaded, plan=plan, output=quiet)

    return run


def state(directory: Path) -> dict:
    return json.loads((directory / "training_state.json").read_text(encoding="utf-8"))


def console(result: TrainResult) -> str:
    return (result.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")


def fingerprint(*places: Path) -> dict:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for place in places
        for path in place.rglob("*")
    }


def stop(monkeypatch, at: int, number: int = signal.SIGTERM) -> None:
    def interrupted(setup, index):
        if index == at:
            os.kill(os.getpid(), number)
        return Trainer.training_step(setup, index)

    monkeypatch.setattr(trainer_module.Trainer, "training_step", interrupted)


# Named models ---------------------------------------------------------------------------------


def test_a_named_model_remembers_its_text_and_its_shape_and_goes_on(go, text_file):
    first = go(fresh=True, model_name="dante", n_layer=3, max_iters=4, learning_rate=3e-4)
    assert state(DANTE)["training_config"]["start_step"] == 0
    second = go(model_name="dante", max_iters=8, learning_rate=1e-4)
    now = state(DANTE)
    assert (now["step"], now["run_id"]) == (8, second.run_dir.name)
    assert (
        now["training_config"] | {"max_iters": 8, "learning_rate": 1e-4, "start_step": 4}
        == (now["training_config"])
    )
    assert json.loads((DANTE / "config.json").read_text("utf-8"))["n_layer"] == 3
    assert now["training_config"]["data"] == str(text_file)
    assert sorted(path.name for path in DANTE.iterdir()) == sorted(BUNDLE_FILES)
    assert "max_iters 4 → 8 (--max-iters)" in console(second)
    assert first.run_dir != second.run_dir
    info = get_model_info("dante")
    assert info["training_state"]["training_config"]["learning_rate"] == 1e-4


def test_a_named_model_is_there_from_step_0_and_always_at_its_last_step(go, monkeypatch):
    steps = []

    def watched(setup, index):
        steps.append(state(DANTE)["step"])
        return Trainer.training_step(setup, index)

    monkeypatch.setattr(trainer_module.Trainer, "training_step", watched)
    go(fresh=True, model_name="dante", max_iters=7, checkpoint_interval=2, eval_interval=0)
    assert steps == [0, 0, 2, 2, 4, 4, 6]
    assert state(DANTE)["step"] == 7
    begun = state(DANTE)
    assert begun["training_config"]["best_step"] == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_publishes_the_named_model(go, monkeypatch, number):
    with monkeypatch.context() as patch:
        stop(patch, 2, number)
        result = go(fresh=True, model_name="dante", max_iters=100, checkpoint_interval=0)
    assert (state(DANTE)["step"], result.exit_status) == (3, 128 + number)
    assert f"--resume {result.run_dir} --device cpu   # go on from here" in console(result)


def test_the_named_model_holds_the_last_step_and_the_export_the_best(go, monkeypatch):
    scripted = iter([1.0, 2.0])
    monkeypatch.setattr(
        trainer_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(scripted)}
    )
    result = go(fresh=True, model_name="dante", max_iters=4, eval_interval=2)
    assert (state(DANTE)["step"], state(result.export_dir)["step"]) == (4, 2)
    assert state(DANTE)["best_val_loss"] == 1.0


def test_training_that_is_done_says_so_and_changes_nothing(go):
    go(fresh=True, model_name="dante", max_iters=4)
    before = fingerprint(Path.cwd())
    for flags in ({}, {"max_iters": 4}, {"max_iters": 3}, {"epochs": 0.001}):
        with pytest.raises(NothingToDo, match=r"dante is at step 4 already.*--max-iters N goes on"):
            go(model_name="dante", **flags)
    assert fingerprint(Path.cwd()) == before


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/tmp/x", ".hidden", "-x", "a b", "ä", "a\nb", "x" * 101]
)
def test_a_name_that_could_lead_out_of_its_directory_is_refused(folio, text_file, name):
    done = folio("train.py", f"--model-name={name}", "--data", text_file, *TINY_FLAGS)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model-name must ")
    assert list(Path.cwd().iterdir()) == []


def test_two_processes_on_one_name_are_refused_and_the_lock_dies_with_its_process(go):
    go(fresh=True, model_name="dante", max_iters=2)
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import resume\n"
        "with start.name_locked(pathlib.Path('checkpoints/dante')):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(CHECKOUT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        before = fingerprint(Path("runs"), DANTE)
        with pytest.raises(UserError, match="dante is being trained by another process"):
            go(model_name="dante", max_iters=4)
        assert fingerprint(Path("runs"), DANTE) == before
        process.kill()
    assert go(model_name="dante", max_iters=4).step == 4


def test_a_name_that_another_process_has_advanced_meanwhile_is_not_overwritten(go, quiet):
    go(fresh=True, model_name="dante", max_iters=2)
    loaded, plan = plan_run(ConfigLoader({"model_name": "dante", "max_iters": 6}))
    go(model_name="dante", max_iters=4)
    with pytest.raises(UserError, match="dante was changed by another process just now: try again"):
        train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    assert state(DANTE)["step"] == 4


def test_a_lock_that_cannot_be_made_is_one_line():
    Path("checkpoints").touch()
    with pytest.raises(
        UserError, match=r"checkpoints/dante cannot be written: .*--checkpoints-dir"
    ):
        with lock_named_model(DANTE):
            pass


def test_starting_a_name_over_needs_overwrite(go):
    go(fresh=True, model_name="dante", max_iters=2)
    with pytest.raises(UserError, match=r"n_embd 32 \(--n-embd\) is not the 16 of checkpoints/dan"):
        go(model_name="dante", n_embd=32)
    result = go(fresh=True, model_name="dante", max_iters=2, n_embd=32, overwrite=True)
    assert load_model(DANTE)[0].token_embedding.weight.shape[1] == 32
    assert state(DANTE)["run_id"] == result.run_dir.name


def test_a_model_begun_anew_that_diverges_has_destroyed_nothing(go):
    go(fresh=True, model_name="dante", max_iters=4)
    before = fingerprint(DANTE)
    with pytest.raises(RunError):
        go(fresh=True, model_name="dante", overwrite=True, learning_rate=1e30, warmup_iters=0,
           grad_clip=0.0)  # fmt: skip
    assert fingerprint(DANTE) == before


def test_a_model_without_its_state_is_not_begun_anew_unasked(go):
    go(fresh=True, model_name="dante", max_iters=2)
    (DANTE / "training_state.json").unlink()
    before = fingerprint(DANTE)
    with pytest.raises(UserError, match=r"holds files of a model, but no training_state\.json"):
        go(fresh=True, model_name="dante")
    assert fingerprint(DANTE) == before
    assert go(fresh=True, model_name="dante", overwrite=True).step == 6


@pytest.mark.parametrize("link", ["latest", "checkpoints/alias"])
def test_a_link_to_a_named_model_is_that_model_with_its_one_lock(go, link):
    go(fresh=True, model_name="dante", max_iters=2)
    Path(link).symlink_to(DANTE.resolve())
    with (
        lock_named_model(DANTE),
        pytest.raises(UserError, match="dante is being trained by another"),
    ):
        go(link, max_iters=4)
    if link != "latest":
        with (
            lock_named_model(DANTE),
            pytest.raises(UserError, match="dante is being trained by ano"),
        ):
            go(model_name="alias", max_iters=4)
    go(link, max_iters=4)
    assert state(DANTE)["training_config"]["model_name"] == "dante"
    assert state(DANTE)["step"] == 4
    assert [path.name for path in Path("checkpoints").glob(".*")] == [".dante.lock"]


def test_overwriting_leaves_the_old_model_until_the_new_one_is_there(go):
    go(fresh=True, model_name="dante", max_iters=2)
    before = fingerprint(DANTE)
    with pytest.raises(UserError):
        go(fresh=True, model_name="dante", overwrite=True, data="nowhere.txt")
    assert fingerprint(DANTE) == before


def test_overwrite_takes_the_place_of_a_damaged_model(go):
    go(fresh=True, model_name="dante", max_iters=2)
    (DANTE / "training_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"training_state\.json: damaged: not JSON"):
        go(model_name="dante")
    go(fresh=True, model_name="dante", max_iters=2, overwrite=True)
    assert state(DANTE)["step"] == 2


# What binds and what may change ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"n_layer": 3}, "n_layer 3 (--n-layer) is not the 2 of"),
        ({"batch_size": 8}, "batch_size 8 (--batch-size) is not the 4 of"),
        ({"dropout": 0.5}, "dropout 0.5 (--dropout) is not the 0.0 of"),
        ({"bias": True}, "bias true (--bias) is not the false of"),
        ({"tokenizer": "gpt2"}, 'tokenizer "gpt2" (--tokenizer) is not the "char" of'),
    ],
)
def test_what_fixes_the_model_cannot_be_changed_on_a_resume(go, flags, said):
    first = go(fresh=True, max_iters=2)
    before = fingerprint(Path("runs"))
    with pytest.raises(UserError, match=re.escape(said)):
        go(str(first.run_dir), max_iters=4, **flags)
    assert fingerprint(Path("runs")) == before


def test_a_config_file_conflicts_as_a_flag_does_and_all_conflicts_are_told_together(go):
    first = go(fresh=True, max_iters=2)
    Path("my.yaml").write_text("n_layer: 3\nblock_size: 16\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        plan_run(ConfigLoader({"n_head": 1}, "my.yaml"), resume=str(first.run_dir))
    assert [problem.split(" is not")[0] for problem in caught.value.problems] == [
        "n_head 1 (--n-head)",
        "n_layer 3 (my.yaml)",
    ]


def test_a_flag_counts_for_more_than_the_file_also_where_they_could_conflict(go):
    first = go(fresh=True, max_iters=2)
    Path("my.yaml").write_text("n_layer: 3\n", encoding="utf-8")
    loaded, _ = plan_run(
        ConfigLoader({"n_layer": 2, "max_iters": 4}, "my.yaml"), resume=str(first.run_dir)
    )
    assert loaded.config.n_layer == 2


def test_auto_takes_the_checkpoint_before_a_damaged_one(go):
    first = go(fresh=True, max_iters=4, checkpoint_interval=2)
    (first.checkpoint / "training_state.json").write_text("", encoding="utf-8")
    _, start = plan_run(ConfigLoader({"max_iters": 6}), resume="auto")
    assert start.step == 3


def test_the_same_value_and_the_device_are_no_conflict(go):
    first = go(fresh=True, max_iters=2)
    assert go(str(first.run_dir), max_iters=4, n_layer=2, device="cpu").step == 4


def test_the_defaults_in_configs_do_not_conflict(go):
    """configs/model.json says n_layer 4, and the model has 2: nobody asked for 4."""
    first = go(fresh=True, max_iters=2)
    loaded, _ = plan_run(ConfigLoader({"max_iters": 4}), resume=str(first.run_dir))
    assert loaded.config.n_layer == 2
    assert loaded.sources["n_layer"] == str(first.checkpoint)


def test_another_text_is_said_loudly(go, capsys, tmp_path, tiny):
    first = go(fresh=True, max_iters=2)
    other = tmp_path / "other.txt"
    other.write_text(LINES * 31, encoding="utf-8")
    second = go(str(first.run_dir), max_iters=4, data=str(other))
    assert "ANOTHER TEXT" in console(second)
    assert "ANOTHER TEXT" in capsys.readouterr().err
    same = tmp_path / "copy.txt"
    shutil.copy(tiny().data, same)
    third = go(str(first.run_dir), max_iters=4, data=str(same))
    assert "ANOTHER TEXT" not in console(third)


def test_a_text_that_has_gone_is_asked_for(go, text_file, tmp_path):
    first = go(fresh=True, max_iters=2)
    text_file.rename(tmp_path / "moved.txt")
    with pytest.raises(UserError, match=r"play\.txt .*no such file; name the text with --data"):
        go(str(first.run_dir), max_iters=4)
    moved = str(tmp_path / "moved.txt")
    assert go(str(first.run_dir), max_iters=4, data=moved).step == 4


@pytest.mark.parametrize(
    "kind", ["glob", "stdin", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW_KINDS)]
)
def test_a_text_of_any_kind_trains_as_one_file_does_and_is_found_again(
    go, tmp_path, tiny, monkeypatch, kind
):
    text = Path(tiny().data).read_bytes()
    whole = go(fresh=True, max_iters=4)
    if kind == "stdin":
        data = "-"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    elif kind in ("directory", "glob"):
        (tmp_path / "cwd" / "texts").mkdir()
        Path("texts/a.txt").write_bytes(text[:2000])
        Path("texts/b.txt").write_bytes(text[2000:])
        data = "texts" if kind == "directory" else "texts/*.txt"
    else:
        packed = gzip.compress(text) if kind == "gz" else zstandard.compress(text)
        data = f"play.{kind}"
        Path(data).write_bytes(packed)
    first = go(fresh=True, max_iters=2, data=data, token_store="on")
    assert (
        state(first.checkpoint)["training_config"]["data_sha256"]
        == hashlib.sha256(text).hexdigest()
    )
    run = str(first.run_dir.resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "iter_chunks", None)  # nothing is read again
    second = go(run, max_iters=4)
    assert "ANOTHER TEXT" not in console(second)
    assert second.val_loss == whole.val_loss


def test_where_the_cache_is_belongs_to_the_machine_and_not_to_the_model(go, tmp_path):
    first = go(fresh=True, max_iters=2, cache_dir=str(tmp_path / "here"), token_store="on")
    assert "cache_dir" not in state(first.checkpoint)["training_config"]
    record = json.loads((first.run_dir / "meta" / "full_config.json").read_bytes())
    assert "cache_dir" not in record["config"]
    (tmp_path / "here").rename(tmp_path / "gone")
    assert go(str(first.run_dir), max_iters=3).step == 3
    assert (tmp_path / "cache" / "folio" / "texts").is_dir()


def test_the_order_of_windows_is_the_models_and_a_resume_keeps_it(go):
    whole = go(fresh=True, max_iters=3, window_order="shuffled")
    first = go(fresh=True, max_iters=1, window_order="shuffled")
    second = go(str(first.run_dir), max_iters=3)
    assert_same_bits(whole.checkpoint, second.checkpoint)


def test_a_model_of_the_sample_corpus_goes_on_with_it_beside_an_input_txt(
    go, quiet, monkeypatch, tiny
):
    monkeypatch.setattr("data.sample_corpus", lambda cache, **where: LINES * 40)
    first = go(fresh=True, data=None, max_iters=2)
    Path("input.txt").write_text("something else\n" * 100, encoding="utf-8")
    second = go(str(first.run_dir), max_iters=4)
    assert "Shakespeare's plays" in console(second)


def test_characters_that_a_resumed_model_does_not_know_are_listed(go, tmp_path):
    first = go(fresh=True, max_iters=2)
    other = tmp_path / "other.txt"
    other.write_text(LINES * 30 + "ééß", encoding="utf-8")
    for how in ("error", "extend"):
        with pytest.raises(UserError, match=r"'ß' \(once\), 'é' \(2 times\).*drop leaves them"):
            go(str(first.run_dir), max_iters=4, data=str(other), on_new_chars=how)
    dropped = go(str(first.run_dir), max_iters=4, data=str(other), on_new_chars="drop")
    assert "left out: 'ß' (once), 'é' (2 times)" in console(dropped)


# What can be resumed --------------------------------------------------------------------------


def test_last_is_the_newest_run_and_a_run_may_be_named_in_three_ways(go):
    go(fresh=True, max_iters=2)
    newest = go(fresh=True, max_iters=3)
    names = ("last", newest.run_dir.name, str(newest.run_dir), str(newest.checkpoint))
    for name in names:
        _, start = plan_run(ConfigLoader({"max_iters": 9}), resume=name)
        assert start.bundle.path.resolve() == newest.checkpoint.resolve()


def test_last_without_a_checkpoint_names_the_newest_run_that_has_one(go):
    with pytest.raises(UserError, match="--resume last: no run in runs"):
        go("last")
    older = go(fresh=True, max_iters=2)
    newer = Path("runs/29990101_000000_killed")
    (newer / "artifacts" / "checkpoints").mkdir(parents=True)
    expected = f"the run {newer} has no checkpoint; the newest that has one is {older.run_dir}"
    with pytest.raises(UserError, match=re.escape(expected)):
        go("last")
    shutil.rmtree(older.run_dir)
    with pytest.raises(UserError, match="no other run has one"):
        go("last")


def test_auto_resumes_if_there_is_something_to_resume_and_begins_if_not(go, monkeypatch):
    with monkeypatch.context() as patch:
        stop(patch, 2)
        first = go("auto", fresh=True)
    (Path("runs/29990101_000000") / "artifacts" / "checkpoints").mkdir(parents=True)
    second = go("auto")
    assert (first.step, second.step) == (3, 6)
    assert f"Resume {first.checkpoint}" in console(second)
    with pytest.raises(NothingToDo):
        go("auto")


def test_auto_with_a_tag_looks_at_runs_of_that_tag_alone(go):
    go(fresh=True, max_iters=2, run_tag="big")
    small = go("auto", fresh=True, max_iters=2, run_tag="small", n_layer=1)
    assert small.step == 2
    _, start = plan_run(ConfigLoader({"run_tag": "big", "max_iters": 4}), resume="auto")
    assert start.bundle.config.n_layer == 2


def test_a_tag_is_the_whole_tag_and_outlives_a_resume(go):
    go(fresh=True, max_iters=2, run_tag="lr_1")
    assert go("auto", fresh=True, max_iters=3, run_tag="lr").step == 3
    resumed = go("last", max_iters=5)
    assert "_lr" in resumed.run_dir.name
    assert state(resumed.checkpoint)["training_config"]["run_tag"] == "lr"
    _, start = plan_run(ConfigLoader({"max_iters": 9, "run_tag": "lr"}), resume="auto")
    assert start.step == 5


def test_auto_with_a_parent_goes_on_with_a_child_of_it_alone(go, purgatorio):
    go(fresh=True, model_name="base", max_iters=2)
    go(fresh=True, max_iters=3)
    settings = {"data": purgatorio, "max_iters": 4, "warmup_iters": 1, "device": "cpu"}
    child = go("auto", init_from="base", **settings)
    assert state(child.checkpoint)["lineage"][0]["name"] == "base"
    settings["max_iters"] = 6
    assert (
        state(go("auto", init_from="base", **settings).checkpoint)["training_config"]["start_step"]
        == 4
    )


def test_auto_with_a_name_resumes_the_name_and_fine_tunes_only_once(go):
    go(fresh=True, model_name="dante", max_iters=2)
    child = {"model_name": "child", "init_from": "dante", "max_iters": 4}
    child["data"] = get_model_info("dante")["training_state"]["training_config"]["data"]
    go("auto", **child)
    with pytest.raises(NothingToDo):
        go("auto", **child)
    assert state(Path("checkpoints/child"))["step"] == 4
    assert len(state(Path("checkpoints/child"))["lineage"]) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"resume": "nowhere"}, "nowhere: no such model: neither nowhere nor runs/nowhere nor"),
        ({"resume": "."}, "--resume .: . is neither a run nor a bundle"),
        ({"resume": "last", "init_from": "x"}, "--resume goes on with a model, --init-from begins"),
        ({"reset_optimizer": True}, "there is nothing to resume, and so to reset"),
        ({"overwrite": True}, "--overwrite needs --model-name"),
        ({"init_from": "nobody", "model_name": "x"}, "nobody: no such model: neither nobody nor"),
    ],
)
def test_what_cannot_be_begun_is_one_clear_line(go, flags, words):
    with pytest.raises(UserError) as caught:
        go(**flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(Path.cwd().iterdir()) == []


def test_an_export_has_no_optimizer_and_says_so(go):
    first = go(fresh=True, max_iters=4)
    with pytest.raises(UserError, match=r"an export, without optimizer state.*--reset-optimizer"):
        go(str(first.export_dir), max_iters=6)
    again = go(str(first.export_dir), max_iters=6, reset_optimizer=True)
    assert again.step == 6
    assert "with a new optimizer" in console(again)


def test_a_damaged_optimizer_state_is_an_error_that_names_the_flag_that_goes_on(go):
    first = go(fresh=True, max_iters=4)
    (first.checkpoint / "optimizer.pt").write_bytes(b"")
    before = fingerprint(Path("runs"))
    with pytest.raises(UserError, match=r"optimizer\.pt: not the file .*--reset-optimizer"):
        go("last", max_iters=6)
    assert fingerprint(Path("runs")) == before
    (first.checkpoint / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"optimizer\.pt: not there.*--reset-optimizer"):
        go("last", max_iters=6)
    assert go("last", max_iters=6, reset_optimizer=True).step == 6


def test_resuming_a_run_of_a_named_model_advances_the_name(go, monkeypatch):
    with monkeypatch.context() as patch:
        stop(patch, 2)
        go(fresh=True, model_name="dante")
    go("last")
    assert state(DANTE)["step"] == 6


def test_a_name_is_not_taken_back_to_an_older_step_or_another_run_without_overwrite(go):
    first = go(fresh=True, model_name="dante", max_iters=4, keep_checkpoints=None)
    go(model_name="dante", max_iters=6)
    older = first.run_dir / "artifacts" / "checkpoints" / "step_00000003"
    for reference in (str(first.run_dir), str(older)):
        with pytest.raises(UserError, match=r"dante is at step 6 of run .*, and .* or add --overw"):
            go(reference, max_iters=8)
    other = go(str(older), max_iters=8, model_name="virgil")
    assert (state(DANTE)["step"], state(Path("checkpoints/virgil"))["step"]) == (6, 8)
    assert other.step == 8
    go(str(older), max_iters=5, overwrite=True)
    assert state(DANTE)["step"] == 5


def test_a_kill_between_a_checkpoint_and_its_copy_to_the_name_loses_nothing(go, monkeypatch):
    go(fresh=True, model_name="dante", max_iters=2)
    real = checkpoint_module.copy_bundle

    def killed(source, target, **options):
        if target == DANTE:
            raise KeyboardInterrupt
        real(source, target, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_module, "copy_bundle", killed)
        go(model_name="dante", max_iters=4)
    assert state(DANTE)["step"] == 2
    assert go("last", max_iters=6).step == 6
    assert state(DANTE)["step"] == 6
    assert state(DANTE)["training_config"]["start_step"] == 3


def test_a_bundle_moved_away_trains_no_model_of_that_name_here(go, tmp_path):
    go(fresh=True, model_name="dante", max_iters=2)
    DANTE.rename(tmp_path / "gift")
    result = go(str(tmp_path / "gift"), max_iters=4)
    assert result.step == 4
    assert not DANTE.exists()


def test_a_signal_at_the_worst_moment_saves_the_step(go, monkeypatch):
    """Between the look that decides on saving and the one that decides on leaving."""
    looks = []

    def late(self):
        looks.append(None)
        return len(looks) > 5

    monkeypatch.setattr(StopRequest, "requested", property(late))
    scripted = iter([1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(
        trainer_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(scripted)}
    )
    result = go(fresh=True, max_iters=100, eval_interval=1, checkpoint_interval=0)
    assert state(result.checkpoint)["step"] == result.step


def test_a_run_that_fails_or_is_aborted_says_what_it_has_saved(go, monkeypatch, capsys, tiny):
    def aborted(setup, index):
        if index == 5:
            raise KeyboardInterrupt
        return Trainer.training_step(setup, index)

    monkeypatch.setattr(trainer_module.Trainer, "training_step", aborted)
    loaded, plan = plan_run(
        ConfigLoader(tiny(checkpoint_interval=2).model_dump(exclude_unset=True))
    )
    with pytest.raises(KeyboardInterrupt):
        train(loaded.config, loaded=loaded, plan=plan)
    shown = capsys.readouterr().out
    (run,) = Path("runs").iterdir()
    assert "The last checkpoint is that of step 4; go on from it with\n" in shown
    assert shown.splitlines()[-1].endswith(f"train.py --resume {run} --device cpu")


# The best, and which checkpoints are kept -----------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    def give(*losses: float) -> None:
        values = iter(losses)
        monkeypatch.setattr(
            trainer_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(values)}
        )

    return give


def steps_kept(result: TrainResult) -> list[int]:
    found = (result.run_dir / "artifacts" / "checkpoints").iterdir()
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def test_the_last_checkpoints_and_the_best_are_kept(go, scripted):
    scripted(3.0, 1.0, *[2.0] * 8)
    result = go(fresh=True, max_iters=10, eval_interval=1, checkpoint_interval=1)
    assert steps_kept(result) == [2, 9, 10]
    scripted(*range(10, 0, -1))
    result = go(fresh=True, max_iters=10, eval_interval=1, keep_checkpoints=3, keep_every=4)
    assert steps_kept(result) == [4, 8, 9, 10]
    scripted(*[1.0] * 20)
    result = go(fresh=True, max_iters=6, keep_checkpoints=None, checkpoint_interval=2)
    assert steps_kept(result) == [2, 3, 4, 6]


def test_checkpoints_come_at_their_interval_whether_or_not_anything_is_evaluated(go):
    result = go(
        fresh=True, max_iters=9, eval_interval=0, checkpoint_interval=4, keep_checkpoints=None
    )
    assert steps_kept(result) == [4, 8, 9]


def test_a_resumed_run_that_gets_no_better_exports_the_best_of_before(go, scripted):
    scripted(1.0, 2.0)
    first = go(fresh=True, max_iters=4, eval_interval=2)
    scripted(3.0)
    second = go("last", max_iters=6, eval_interval=0)
    assert (second.best_step, second.best_val_loss) == (2, 1.0)
    one, two = (load_file(r.export_dir / "model.safetensors") for r in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert state(second.checkpoint)["best_val_loss"] == 1.0


def test_a_best_that_cannot_be_had_or_compared_counts_anew(go, scripted, tmp_path):
    scripted(1.0, 2.0)
    first = go(fresh=True, max_iters=4, eval_interval=2)
    scripted(3.0)
    measured = go(str(first.run_dir), max_iters=6, eval_interval=0, eval_iters=3)
    assert measured.best_val_loss == 3.0
    assert "was measured in another way" in console(measured)
    first.checkpoint.rename(tmp_path / "gift")
    shutil.rmtree("runs")
    scripted(4.0)
    moved = go(str(tmp_path / "gift"), max_iters=6, eval_interval=0)
    assert moved.best_val_loss == 4.0
    assert "is not at hand" in console(moved)


# Fine-tuning and lineage ----------------------------------------------------------------------


@pytest.fixture
def purgatorio(tmp_path):
    path = tmp_path / "purgatorio.txt"
    path.write_text(LINES.swapcase().lower().replace(",", "") * 40, encoding="utf-8")
    return str(path)


def test_a_child_begins_at_step_0_with_the_weights_of_its_parent(go, purgatorio, monkeypatch):
    go(fresh=True, model_name="dante", max_iters=4, learning_rate=1e-2)
    before = fingerprint(DANTE)
    parent = load_file(DANTE / "model.safetensors")
    seen = {}

    def watched(setup, index):
        if index == 0:
            seen.update({k: v.clone() for k, v in setup.model.state_dict().items()})
            assert not setup.optimizer.state
        return Trainer.training_step(setup, index)

    monkeypatch.setattr(trainer_module.Trainer, "training_step", watched)
    result = go(
        init_from="dante", model_name="child", data=purgatorio, max_iters=3, warmup_iters=1,
        batch_size=2, dropout=0.1, device="cpu", eval_iters=1,
    )  # fmt: skip
    assert all(torch.equal(parent[name], seen[name]) for name in parent)
    assert fingerprint(DANTE) == before
    child = state(Path("checkpoints/child"))
    assert (child["step"], child["training_config"]["start_step"]) == (3, 0)
    config = json.loads(Path("checkpoints/child/config.json").read_text("utf-8"))
    assert (config["batch_size"], config["dropout"], config["n_embd"]) == (2, 0.1, 16)
    assert child["best_val_loss"] == result.best_val_loss
    assert child["training_config"]["learning_rate"] == 1e-2, "its settings are not the parent's"


def test_lineage_names_all_ancestors_the_parent_first(go, purgatorio, text_file):
    go(fresh=True, model_name="grandmother", max_iters=2)
    small = {"warmup_iters": 1, "device": "cpu", "eval_iters": 1, "data": purgatorio}
    go(init_from="grandmother", model_name="mother", max_iters=3, **small)
    go(init_from="mother", model_name="child", max_iters=4, **small)
    go(model_name="child", max_iters=5)
    lineage = state(Path("checkpoints/child"))["lineage"]
    assert [(a["name"], a["step"]) for a in lineage] == [("mother", 3), ("grandmother", 2)]
    for ancestor in lineage:
        there = state(Path("checkpoints") / ancestor["name"])
        assert ancestor["weights_sha256"] == there["files"]["model.safetensors"]
        assert ancestor["data_sha256"] == there["training_config"]["data_sha256"]
        assert ancestor["run_id"] == there["run_id"]
    (newest, *_) = sorted(Path("runs").iterdir(), reverse=True)
    record = json.loads((newest / "meta" / "full_config.json").read_text("utf-8"))
    assert record["run"]["lineage"] == lineage


def test_a_parent_may_be_a_run_or_any_bundle_and_the_child_needs_no_name(go, purgatorio):
    first = go(fresh=True, max_iters=2)
    settings = {"data": purgatorio, "max_iters": 2, "warmup_iters": 1, "eval_iters": 1}
    child = go(init_from=str(first.run_dir), device="cpu", **settings)
    assert state(child.checkpoint)["lineage"][0]["name"] == first.run_dir.name


def test_a_shape_of_its_own_is_refused_for_a_child(go, purgatorio):
    go(fresh=True, model_name="dante", max_iters=2)
    with pytest.raises(UserError, match=r"n_layer 3 \(--n-layer\) is not the 2 of checkpoints/dan"):
        go(init_from="dante", model_name="child", data=purgatorio, n_layer=3)
    assert not Path("checkpoints/child").exists()


def test_a_child_does_not_take_its_parents_place(go, purgatorio):
    go(fresh=True, model_name="dante", max_iters=2)
    with pytest.raises(UserError, match="a child cannot take its parent's place"):
        go(init_from="dante", model_name="dante", overwrite=True, data=purgatorio)


def test_fine_tuning_onto_a_name_that_is_there_is_refused(go, purgatorio):
    go(fresh=True, model_name="dante", max_iters=2)
    with pytest.raises(
        UserError, match=r"dante exists already, and init_from dante \(--init-from\)"
    ):
        go(init_from="dante", model_name="dante", data=purgatorio)


def test_new_characters_are_listed_dropped_or_learned(go, tmp_path):
    go(fresh=True, model_name="dante", max_iters=3)
    parent = load_file(DANTE / "model.safetensors")
    text = tmp_path / "new.txt"
    text.write_text(LINES * 30 + "é" * 12 + "ß", encoding="utf-8")
    small = {"data": str(text), "max_iters": 2, "warmup_iters": 1, "eval_iters": 1, "device": "cpu"}
    small |= {"init_from": "dante"}
    with pytest.raises(UserError, match=r"'ß' \(once\), 'é' \(12 times\).*extend adds them"):
        go(model_name="a", **small)
    assert not Path("checkpoints/a").exists()

    go(model_name="dropped", on_new_chars="drop", **small)
    chars = json.loads((DANTE / "tokenizer.json").read_text("utf-8"))["chars"]
    same = json.loads(Path("checkpoints/dropped/tokenizer.json").read_text("utf-8"))["chars"]
    assert same == chars
    go(model_name="dropped", max_iters=3)  # and remembers to drop them

    # Before the first step, the old rows are the parent's to the byte.
    loaded, plan = plan_run(
        ConfigLoader({**small, "model_name": "extended", "on_new_chars": "extend"})
    )
    setup = trainer_module.prepare_trainer(loaded.config, loaded, plan)
    rows = setup.model.token_embedding.weight
    assert torch.equal(rows[: len(chars)], parent["token_embedding.weight"])
    assert rows.shape[0] == len(chars) + 2
    result = go(model_name="extended", on_new_chars="extend", **small)
    extended = json.loads(Path("checkpoints/extended/tokenizer.json").read_text("utf-8"))["chars"]
    assert extended == [*chars, "ß", "é"]
    assert "2 characters added to its vocabulary" in console(result)
    assert go(model_name="extended", max_iters=3).step == 3


def test_the_record_of_a_fine_tuning_trains_the_same_child_again(go, purgatorio, quiet):
    go(fresh=True, model_name="dante", max_iters=3)
    settings = {"data": purgatorio, "max_iters": 3, "warmup_iters": 1, "device": "cpu"}
    child = go(init_from="dante", model_name="child", **settings)
    record = str(child.run_dir / "meta" / "full_config.json")
    loaded, plan = plan_run(ConfigLoader({}, record))
    again = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    one, two = (load_file(r.checkpoint / "model.safetensors") for r in (child, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    go(model_name="dante", max_iters=4)
    loaded, plan = plan_run(ConfigLoader({}, record))
    with pytest.raises(UserError, match=r"not the model that .* began with \(dante, step 3"):
        train(loaded.config, loaded=loaded, plan=plan, output=quiet)


def test_the_record_of_a_resumed_run_asks_for_what_it_went_on_from(go, quiet):
    first = go(fresh=True, max_iters=2)
    second = go("last", max_iters=4)
    record = str(second.run_dir / "meta" / "full_config.json")
    loaded, plan = plan_run(ConfigLoader({}, record))
    with pytest.raises(UserError, match=rf"went on from step 2 .* --resume .*{first.run_dir}"):
        train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    loaded, plan = plan_run(ConfigLoader({}, record), resume=str(first.checkpoint))
    again = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    assert_same_bits(second.checkpoint, again.checkpoint)


@pytest.mark.parametrize("lineage", ["x", ["x"], {"a": 1}, 5, []])
def test_a_record_that_was_edited_by_hand_breaks_nothing(go, quiet, lineage, purgatorio):
    go(fresh=True, model_name="dante", max_iters=2)
    settings = {"data": purgatorio, "max_iters": 2, "warmup_iters": 1, "device": "cpu"}
    child = go(init_from="dante", **settings)
    path = child.run_dir / "meta" / "full_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["run"]["lineage"] = lineage
    path.write_text(json.dumps(record), encoding="utf-8")
    loaded, plan = plan_run(ConfigLoader({}, str(path)))
    assert train(loaded.config, loaded=loaded, plan=plan, output=quiet).step == 2


# Odd places -----------------------------------------------------------------------------------


def test_copies_of_checkpoints_and_renamed_runs_are_in_nobodys_way(go):
    first = go(fresh=True, max_iters=2)
    copy = first.run_dir / "artifacts" / "checkpoints" / "step_00000002_good"
    shutil.copytree(first.checkpoint, copy)
    first.run_dir.rename("runs/a_good_one")
    second = go(fresh=True, max_iters=3)
    os.utime("runs/a_good_one", (0, 0))
    _, start = plan_run(ConfigLoader({"max_iters": 9}), resume="last")
    assert start.bundle.path == second.checkpoint
    assert go("a_good_one", max_iters=4).step == 4
    assert copy.exists() is False
    assert Path("runs/a_good_one/artifacts/checkpoints/step_00000002_good").exists()


def test_a_run_goes_on_from_within_its_checkpoints_or_the_model_itself(go, monkeypatch, text_file):
    first = go(fresh=True, model_name="dante", max_iters=2)
    here = Path.cwd()
    places = {"runs_dir": str(here / "runs"), "checkpoints_dir": str(here / "checkpoints")}
    monkeypatch.chdir(first.run_dir / "artifacts" / "checkpoints")
    assert go(first.checkpoint.name, max_iters=4, **places).step == 4
    assert state(here / DANTE)["step"] == 4
    monkeypatch.chdir(here / DANTE)  # where the model's config.json is none of settings
    assert go(".", max_iters=6, **places).step == 6
    assert state(here / DANTE)["step"] == 6


def test_a_directory_of_a_models_name_is_in_nobodys_way(go):
    go(fresh=True, model_name="dante", max_iters=2)
    Path("dante").mkdir()
    assert go("dante", max_iters=4).step == 4


@pytest.mark.parametrize("reference", ["a" * 300, "a\0b", "x/" * 3000, "nowhere/at/all"])
def test_paths_that_cannot_be_are_no_models(go, reference):
    for flags in ({"resume": reference}, {"init_from": reference}):
        with pytest.raises(UserError, match="no such model") as caught:
            go(**flags)
        assert "\n" not in str(caught.value)


def test_a_full_disk_while_the_optimizer_is_written_is_one_line_and_loses_nothing(folio, text_file):
    # Of AdamW's two moments, which make optimizer.pt the largest file there is.
    flags = [*TINY_FLAGS, "--model-name=dante", "--optimizer=adamw", "--n-embd=48"]
    folio("train.py", "--data", text_file, *flags, check=True)
    before = fingerprint(DANTE)
    limit = (DANTE / "optimizer.pt").stat().st_size - 2000
    done = folio(
        "train.py", "--model-name=dante", "--max-iters=6",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "error: the run's files cannot be written: File too large; what was saved before is "
        "untouched\n"
    )
    assert fingerprint(DANTE) == before


# From Python, and the rest --------------------------------------------------------------------


def test_a_config_made_in_python_names_a_model_too(tiny, quiet):
    train(tiny(model_name="dante"), output=quiet)
    assert state(DANTE)["step"] == 6
    with pytest.raises(UserError, match=r"dante exists already, with settings of its own: plan"):
        train(tiny(model_name="dante"), output=quiet)
    with pytest.raises(UserError, match="n_layer is not that of checkpoints/dante"):
        train(tiny(init_from="dante", n_layer=1), output=quiet)
    child = train(tiny(init_from="dante", model_name="child"), output=quiet)
    assert state(child.checkpoint)["lineage"][0]["name"] == "dante"


def test_a_dry_run_of_a_resume_tells_what_is_left_and_writes_nothing(go):
    first = go(fresh=True, max_iters=2)
    before = fingerprint(Path.cwd())
    loaded, plan = plan_run(ConfigLoader({"max_iters": 6}), resume=str(first.run_dir))
    text = dry_run(loaded, plan)
    assert "Steps  2 to 6 of 4 x 16" in text
    assert f"Resume {first.checkpoint}, step 2" in text
    assert fingerprint(Path.cwd()) == before


def test_show_config_names_the_bundle_as_a_source(folio, text_file):
    folio("train.py", "--data", text_file, *TINY_FLAGS, "--model-name=dante", check=True)
    shown = folio("train.py", "--model-name=dante", "--seed=3", "--show-config").stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert lines["n_embd"].split() == ["n_embd", "16", "checkpoints/dante"]
    assert lines["max_iters"].split() == ["max_iters", "4", "checkpoints/dante"]
    assert lines["seed"].split() == ["seed", "3", "--seed"]


def test_the_command_says_that_there_is_nothing_to_do_and_exits_with_0(folio, text_file):
    folio("train.py", "--data", text_file, *TINY_FLAGS, check=True)
    done = folio("train.py", "--resume", "last")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"runs/.* is at step 4 already, and max_iters is 4: .*\n", done.stdout)
    assert len(list(Path("runs").iterdir())) == 1


def test_the_command_that_is_printed_at_ctrl_c_goes_on(folio, text_file):
    command = [sys.executable, str(CHECKOUT / "train.py"), "--data", str(text_file), *TINY_FLAGS]
    command += ["--max-iters=100000", "--model-name=dante", "--checkpoints-dir=my models"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGINT)
        told = process.stdout.read()
    assert process.returncode == 130
    command = told.partition("Next:\n")[2].splitlines()[2].partition("#")[0]
    reached = state(Path("my models/dante"))["step"]
    done = subprocess.run(
        f"{command} --max-iters {reached + 3}", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert state(Path("my models/dante"))["step"] == reached + 3
