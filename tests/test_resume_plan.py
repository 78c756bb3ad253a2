"""The start of a run: named models, resuming, fine-tuning, lineage. resume.py.

That a resumed run is bit-for-bit identical is tested in test_resume.py.

python -m pytest tests/test_resume_plan.py
"""

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zstandard
from helpers import CHECKOUT, LINES, TINY_FLAGS, assert_same_bits, save_bundle
from safetensors.torch import load_file

import checkpoint as checkpoint_module
import trainer as trainer_module
from bundle import BUNDLE_FILES, Ancestor, list_runs
from callbacks import TrainResult
from config import ConfigLoader, Setting
from inference import load_model
from inspect_model import get_model_info
from parameters import ModelConfig
from resume import ResumePlan, lock_named_model, plan_run, resolve_start
from trainer import Trainer, dry_run, train
from utils.errors import NothingToDo, RunError, UserError
from utils.run_manager import sanitize_tag
from utils.stop import StopRequest

DANTE = Path("checkpoints/dante")
SLOW_KINDS = ("directory", "gz", "zst")  # test_corpus.py tests their differences faster
REAL_STEP = Trainer.training_step


@pytest.fixture
def start_run(tiny, quiet):
    """Return a function that plans a run and trains; `fresh` adds the flags of a tiny model."""

    def run(resume=None, *, fresh=False, overwrite=False, reset_optimizer=False, **flags):
        if fresh:
            flags = {**tiny().model_dump(exclude_unset=True), **flags}
        loaded, plan = plan_run(
            ConfigLoader(flags), resume=resume, overwrite=overwrite, reset_optimizer=reset_optimizer
        )
        return train(loaded.config, loaded=loaded, plan=plan, output=quiet)

    return run


def read_training_state(directory: Path) -> dict:
    return json.loads((directory / "training_state.json").read_text(encoding="utf-8"))


def read_console(result: TrainResult) -> str:
    return (result.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")


def take_snapshot(*places: Path) -> dict:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for place in places
        for path in place.rglob("*")
    }


def signal_at(monkeypatch, at: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during step `at`, counted from 0."""

    def training_step(trainer, index):
        if index == at:
            os.kill(os.getpid(), number)
        return REAL_STEP(trainer, index)

    monkeypatch.setattr(Trainer, "training_step", training_step)


# The truth table ------------------------------------------------------------------------------

REFERENCE = Path("runs/20260101_000000/artifacts/checkpoints/step_00000007")
PARENT = Path("checkpoints/parent")
NAMED_MODELS = {"no name": None, "missing": Path("checkpoints/virgil"), "exists": DANTE}
COMBINATIONS = list(
    itertools.product(("none", "auto", "REF"), NAMED_MODELS, ("no", "yes"), ("no", "yes"))
)


def find_outcomes(*combination: str) -> list[str]:
    """Return the outcomes of the rows of `resolve_start`'s table that match a combination."""
    table = resolve_start.__doc__.split("starts from\n")[1].split("\n\n")[0]
    rows = [re.split(r"  +", line.strip(), maxsplit=4) for line in table.splitlines()[1:]]
    assert all(len(row) == 5 for row in rows)
    return [
        outcome
        for *row, outcome in rows
        if all(cell in ("any", value) for cell, value in zip(row, combination, strict=True))
    ]


@pytest.mark.parametrize(("resume", "name", "parent", "overwrite"), COMBINATIONS)
def test_every_combination_starts_as_listed_in_the_table_of_resolve_start(
    resume, name, parent, overwrite
):
    save_bundle(PARENT, step=3)
    weights = read_training_state(PARENT)["files"]["model.safetensors"]
    child = Ancestor(
        name="parent", step=3, weights_sha256=weights, data_sha256="0" * 64, run_id="r"
    )
    save_bundle(REFERENCE, step=7, run_id="20260101_000000", lineage=[child])
    save_bundle(DANTE, step=5, run_id="20260101_000000")
    settings = {
        "model_name": NAMED_MODELS[name] and NAMED_MODELS[name].name,
        "init_from": "parent" if parent == "yes" else None,
        "run_tag": None,
        "runs_dir": "runs",
        "checkpoints_dir": "checkpoints",
    }

    def plan() -> ResumePlan:
        reference = {"none": None, "auto": "auto", "REF": str(REFERENCE)}[resume]
        return resolve_start(
            lambda name: Setting(settings[name], "--flag"),
            resume=reference,
            overwrite=overwrite == "yes",
        )

    outcomes = find_outcomes(resume, name, parent, overwrite)
    if resume == "REF" and parent == "yes":  # plan_run rejects --resume with --init-from
        assert outcomes == []
        return
    (outcome,) = outcomes
    if outcome.startswith("error"):
        with pytest.raises(UserError):
            plan()
        return
    checkpoints = {"resumes M": DANTE, "resumes REF": REFERENCE, "newest checkpoint": REFERENCE}
    resumed = [path for start, path in checkpoints.items() if outcome.startswith(start)]
    start = (resumed or [PARENT if parent == "yes" else None])[0]
    found = plan()
    assert found.is_resume == bool(resumed)
    assert (found.bundle and found.bundle.path) == start
    assert found.named_model == NAMED_MODELS[name]
    assert (found.replaced is not None) == (name == "exists")
    assert ("creates M" in outcome) == (name == "missing")
    assert ("replaces M" in outcome) == (name == "exists" and overwrite == "yes")
    assert "new" in outcome or resumed


# Named models ---------------------------------------------------------------------------------


def test_a_named_model_resumes_with_its_own_text_and_architecture(start_run, text_file):
    first = start_run(fresh=True, model_name="dante", n_layer=3, max_iters=4, learning_rate=3e-4)
    assert read_training_state(DANTE)["training_config"]["start_step"] == 0
    second = start_run(model_name="dante", max_iters=8, learning_rate=1e-4)
    now = read_training_state(DANTE)
    assert (now["step"], now["run_id"]) == (8, second.run_dir.name)
    assert (
        now["training_config"] | {"max_iters": 8, "learning_rate": 1e-4, "start_step": 4}
        == (now["training_config"])
    )
    assert json.loads((DANTE / "config.json").read_text("utf-8"))["n_layer"] == 3
    assert now["training_config"]["data"] == str(text_file)
    assert sorted(path.name for path in DANTE.iterdir()) == sorted(BUNDLE_FILES)
    assert "max_iters 4 → 8 (--max-iters)" in read_console(second)
    assert first.run_dir != second.run_dir
    info = get_model_info("dante")
    assert info["training_state"]["training_config"]["learning_rate"] == 1e-4


def test_a_named_model_exists_from_step_0_and_holds_the_last_checkpoint(start_run, monkeypatch):
    steps = []

    def training_step(trainer, index):
        steps.append(read_training_state(DANTE)["step"])
        return REAL_STEP(trainer, index)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    start_run(fresh=True, model_name="dante", max_iters=7, checkpoint_interval=2, eval_interval=0)
    assert steps == [0, 0, 2, 2, 4, 4, 6]
    assert read_training_state(DANTE)["step"] == 7
    assert read_training_state(DANTE)["training_config"]["best_step"] == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_named_model(start_run, monkeypatch, number):
    with monkeypatch.context() as patch:
        signal_at(patch, 2, number)
        result = start_run(fresh=True, model_name="dante", max_iters=100, checkpoint_interval=0)
    assert (read_training_state(DANTE)["step"], result.exit_status) == (3, 128 + number)
    assert f"train.py --resume {result.run_dir} --device cpu" in read_console(result)


def test_the_named_model_holds_the_last_step_and_the_export_the_best(start_run, monkeypatch):
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(
        trainer_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(losses)}
    )
    result = start_run(fresh=True, model_name="dante", max_iters=4, eval_interval=2)
    assert (read_training_state(DANTE)["step"], read_training_state(result.export_dir)["step"]) == (
        4,
        2,
    )
    assert read_training_state(DANTE)["best_val_loss"] == 1.0


def test_resuming_a_finished_training_changes_nothing(start_run):
    start_run(fresh=True, model_name="dante", max_iters=4)
    before = take_snapshot(Path.cwd())
    for flags in ({}, {"max_iters": 4}, {"max_iters": 3}, {"epochs": 0.001}):
        with pytest.raises(NothingToDo, match=r"dante .*step 4.*--max-iters"):
            start_run(model_name="dante", **flags)
    assert take_snapshot(Path.cwd()) == before


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/tmp/x", ".hidden", "-x", "a b", "ä", "a\nb", "x" * 101]
)
def test_a_model_name_that_is_not_a_plain_name_is_an_error(folio, text_file, name):
    done = folio("train.py", f"--model-name={name}", "--data", text_file, *TINY_FLAGS)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model-name ")
    assert len(done.stderr.splitlines()) == 1
    assert list(Path.cwd().iterdir()) == []


def test_one_process_trains_a_named_model_and_its_lock_is_released_when_it_dies(start_run):
    start_run(fresh=True, model_name="dante", max_iters=2)
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import resume\n"
        "with resume.lock_named_model(pathlib.Path('checkpoints/dante')):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(CHECKOUT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        before = take_snapshot(Path("runs"), DANTE)
        with pytest.raises(UserError, match="checkpoints/dante"):
            start_run(model_name="dante", max_iters=4)
        assert take_snapshot(Path("runs"), DANTE) == before
        process.kill()
    assert start_run(model_name="dante", max_iters=4).step == 4


def test_a_named_model_that_changed_after_planning_is_not_overwritten(start_run, quiet):
    start_run(fresh=True, model_name="dante", max_iters=2)
    loaded, plan = plan_run(ConfigLoader({"model_name": "dante", "max_iters": 6}))
    start_run(model_name="dante", max_iters=4)
    with pytest.raises(UserError, match="checkpoints/dante"):
        train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    assert read_training_state(DANTE)["step"] == 4


def test_a_lock_that_cannot_be_created_is_one_line():
    Path("checkpoints").touch()
    with pytest.raises(UserError, match=r"checkpoints/dante .*--checkpoints-dir"):
        with lock_named_model(DANTE):
            pass


def test_replacing_a_named_model_needs_overwrite(start_run):
    start_run(fresh=True, model_name="dante", max_iters=2)
    with pytest.raises(UserError, match=r"n_embd 32 \(--n-embd\).* 16 of checkpoints/dante"):
        start_run(model_name="dante", n_embd=32)
    result = start_run(fresh=True, model_name="dante", max_iters=2, n_embd=32, overwrite=True)
    assert load_model(DANTE)[0].token_embedding.weight.shape[1] == 32
    assert read_training_state(DANTE)["run_id"] == result.run_dir.name


def test_an_overwriting_run_that_diverges_leaves_the_old_model(start_run):
    start_run(fresh=True, model_name="dante", max_iters=4)
    before = take_snapshot(DANTE)
    with pytest.raises(RunError):
        diverging = {"learning_rate": 1e20, "warmup_iters": 0, "grad_clip": 0.0}
        start_run(fresh=True, model_name="dante", overwrite=True, **diverging)
    assert take_snapshot(DANTE) == before


def test_a_model_without_training_state_is_replaced_only_with_overwrite(start_run):
    start_run(fresh=True, model_name="dante", max_iters=2)
    (DANTE / "training_state.json").unlink()
    before = take_snapshot(DANTE)
    with pytest.raises(UserError, match=r"dante.*training_state\.json.*--overwrite"):
        start_run(fresh=True, model_name="dante")
    assert take_snapshot(DANTE) == before
    assert start_run(fresh=True, model_name="dante", overwrite=True).step == 6


@pytest.mark.parametrize("link", ["latest", "checkpoints/alias"])
def test_a_link_to_a_named_model_is_that_model_and_shares_its_lock(start_run, link):
    start_run(fresh=True, model_name="dante", max_iters=2)
    Path(link).symlink_to(DANTE.resolve())
    with (
        lock_named_model(DANTE),
        pytest.raises(UserError, match=r"dante .*another process"),
    ):
        start_run(link, max_iters=4)
    if link != "latest":
        with (
            lock_named_model(DANTE),
            pytest.raises(UserError, match=r"dante .*another process"),
        ):
            start_run(model_name="alias", max_iters=4)
    start_run(link, max_iters=4)
    assert read_training_state(DANTE)["training_config"]["model_name"] == "dante"
    assert read_training_state(DANTE)["step"] == 4
    assert [path.name for path in Path("checkpoints").glob(".*")] == [".dante.lock"]


def test_a_failed_start_with_overwrite_leaves_the_old_model(start_run):
    start_run(fresh=True, model_name="dante", max_iters=2)
    before = take_snapshot(DANTE)
    with pytest.raises(UserError):
        start_run(fresh=True, model_name="dante", overwrite=True, data="nowhere.txt")
    assert take_snapshot(DANTE) == before


def test_overwrite_replaces_a_damaged_model(start_run):
    start_run(fresh=True, model_name="dante", max_iters=2)
    (DANTE / "training_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"training_state\.json.*JSON"):
        start_run(model_name="dante")
    start_run(fresh=True, model_name="dante", max_iters=2, overwrite=True)
    assert read_training_state(DANTE)["step"] == 2


# What a resume may change, and what not -------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "requested", "saved"),
    [
        ({"n_layer": 3}, "n_layer 3 (--n-layer)", "n_layer 2 of"),
        ({"batch_size": 8}, "batch_size 8 (--batch-size)", "batch_size 4 of"),
        ({"dropout": 0.5}, "dropout 0.5 (--dropout)", "dropout 0.0 of"),
        ({"bias": True}, "bias true (--bias)", "bias false of"),
        ({"tokenizer": "gpt2"}, 'tokenizer "gpt2" (--tokenizer)', 'tokenizer "char" of'),
        ({"vocab_size": 300}, "vocab_size 300 (--vocab-size)", "vocab_size null of"),
    ],
)
def test_a_resume_cannot_change_the_architecture_or_the_batch_size(
    start_run, flags, requested, saved
):
    first = start_run(fresh=True, max_iters=2)
    before = take_snapshot(Path("runs"))
    with pytest.raises(UserError) as caught:
        start_run(str(first.run_dir), max_iters=4, **flags)
    problem = caught.value.problems[0]
    assert problem.startswith(requested)
    assert f"{saved} {first.checkpoint}" in problem
    assert take_snapshot(Path("runs")) == before


def test_a_resumed_or_fine_tuned_model_keeps_its_own_bpe(start_run):
    def read_merges(name: str) -> list:
        text = Path("checkpoints", name, "tokenizer.json").read_text(encoding="utf-8")
        content = json.loads(text)
        assert content.keys() == {"format_version", "token_kind", "merges"}
        return content["merges"]

    first = start_run(fresh=True, max_iters=2, tokenizer="bpe", vocab_size=300, model_name="own")
    merges = read_merges("own")
    config = json.loads(Path("checkpoints/own/config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], len(merges)) == (300, 44)
    assert "(300" in read_console(first) or "vocabulary 300" in read_console(first)
    assert (
        "tokens (" in read_console(first) and "character" not in read_console(first).split("Run")[0]
    )
    with pytest.raises(UserError) as caught:
        start_run(max_iters=4, model_name="own", vocab_size=280)
    assert "vocab_size 280 (--vocab-size)" in caught.value.problems[0]
    assert "vocab_size 300 of checkpoints/own" in caught.value.problems[0]
    # A text whose own BPE would be another.
    Path("other.txt").write_text("Nel mezzo del cammin di nostra vita " * 99, encoding="utf-8")
    start_run(max_iters=4, model_name="own", data="other.txt")
    start_run(max_iters=2, init_from="own", model_name="child", data="other.txt", train_split=0.5)
    assert read_merges("own") == read_merges("child") == merges
    start_run(max_iters=5, model_name="own", vocab_size=300, tokenizer="bpe")  # the same values


def test_vocab_size_without_bpe_is_an_error_that_names_both():
    with pytest.raises(UserError, match=r"vocab_size 300.*bpe.*char"):
        plan_run(ConfigLoader({"vocab_size": 300}))


def test_conflicts_of_flags_and_config_file_are_reported_together(start_run):
    first = start_run(fresh=True, max_iters=2)
    Path("my.yaml").write_text("n_layer: 3\nblock_size: 16\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        plan_run(ConfigLoader({"n_head": 1}, "my.yaml"), resume=str(first.run_dir))
    assert [problem.split(" conflicts")[0] for problem in caught.value.problems] == [
        "n_head 1 (--n-head)",
        "n_layer 3 (my.yaml)",
    ]


def test_a_flag_overrides_a_conflicting_value_of_the_config_file(start_run):
    first = start_run(fresh=True, max_iters=2)
    Path("my.yaml").write_text("n_layer: 3\n", encoding="utf-8")
    loaded, _ = plan_run(
        ConfigLoader({"n_layer": 2, "max_iters": 4}, "my.yaml"), resume=str(first.run_dir)
    )
    assert loaded.config.n_layer == 2


def test_auto_skips_a_damaged_checkpoint(start_run):
    first = start_run(fresh=True, max_iters=4, checkpoint_interval=2)
    (first.checkpoint / "training_state.json").write_text("", encoding="utf-8")
    _, plan = plan_run(ConfigLoader({"max_iters": 6}), resume="auto")
    assert plan.start_step == 3


def test_an_equal_value_and_the_device_do_not_conflict(start_run):
    first = start_run(fresh=True, max_iters=2)
    assert start_run(str(first.run_dir), max_iters=4, n_layer=2, device="cpu").step == 4


def test_the_defaults_of_configs_do_not_conflict(start_run):
    """configs/model.json sets n_layer 3, and the model has 2: only a request for 3 conflicts."""
    first = start_run(fresh=True, max_iters=2)
    loaded, _ = plan_run(ConfigLoader({"max_iters": 4}), resume=str(first.run_dir))
    assert loaded.config.n_layer == 2
    assert loaded.sources["n_layer"] == str(first.checkpoint)


def test_resuming_on_a_different_text_is_a_warning(start_run, capsys, tmp_path, tiny):
    first = start_run(fresh=True, max_iters=2)
    other = tmp_path / "other.txt"
    other.write_text(LINES * 31, encoding="utf-8")
    second = start_run(str(first.run_dir), max_iters=4, data=str(other))
    assert str(other) in read_console(second).partition("warning: ")[2].splitlines()[0]
    assert "DIFFERENT TEXT" in capsys.readouterr().err
    same = tmp_path / "copy.txt"
    shutil.copy(tiny().data, same)
    third = start_run(str(first.run_dir), max_iters=4, data=str(same))
    assert "warning: " not in read_console(third)


def test_a_missing_text_is_an_error_that_names_the_data_flag(start_run, text_file, tmp_path):
    first = start_run(fresh=True, max_iters=2)
    text_file.rename(tmp_path / "moved.txt")
    with pytest.raises(UserError, match=r"play\.txt .*--data"):
        start_run(str(first.run_dir), max_iters=4)
    moved = str(tmp_path / "moved.txt")
    assert start_run(str(first.run_dir), max_iters=4, data=moved).step == 4


@pytest.mark.parametrize(
    "kind", ["glob", "stdin", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW_KINDS)]
)
def test_a_text_of_any_kind_trains_like_one_file_and_is_found_on_resume(
    start_run, tmp_path, tiny, monkeypatch, kind
):
    text = Path(tiny().data).read_bytes()
    uninterrupted = start_run(fresh=True, max_iters=4)
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
    first = start_run(fresh=True, max_iters=2, data=data, token_store="on")
    assert (
        read_training_state(first.checkpoint)["training_config"]["data_sha256"]
        == hashlib.sha256(text).hexdigest()
    )
    run = str(first.run_dir.resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("corpus.iter_chunks", None)  # the text is not read again
    second = start_run(run, max_iters=4)
    assert "warning: " not in read_console(second)
    assert second.val_loss == uninterrupted.val_loss


def test_cache_dir_is_not_part_of_a_checkpoint_or_a_record(start_run, tmp_path):
    first = start_run(fresh=True, max_iters=2, cache_dir=str(tmp_path / "here"), token_store="on")
    assert "cache_dir" not in read_training_state(first.checkpoint)["training_config"]
    record = json.loads((first.run_dir / "meta" / "full_config.json").read_bytes())
    assert "cache_dir" not in record["config"]
    (tmp_path / "here").rename(tmp_path / "gone")
    assert start_run(str(first.run_dir), max_iters=3).step == 3
    assert (tmp_path / "cache" / "folio" / "texts").is_dir()


def test_a_resume_keeps_the_window_order(start_run):
    uninterrupted = start_run(fresh=True, max_iters=3, window_order="shuffled")
    first = start_run(fresh=True, max_iters=1, window_order="shuffled")
    second = start_run(str(first.run_dir), max_iters=3)
    assert_same_bits(uninterrupted.checkpoint, second.checkpoint)


def test_a_model_of_the_sample_corpus_resumes_on_it_even_if_input_txt_exists(
    start_run, sample_corpus
):
    first = start_run(fresh=True, data=None, max_iters=2)
    Path("input.txt").write_text("something else\n" * 100, encoding="utf-8")
    second = start_run(str(first.run_dir), max_iters=4)
    assert "Shakespeare's plays" in read_console(second)


def test_characters_missing_from_a_resumed_vocabulary_are_listed(start_run, tmp_path):
    first = start_run(fresh=True, max_iters=2)
    other = tmp_path / "other.txt"
    other.write_text(LINES * 30 + "ééß", encoding="utf-8")
    for how in ("error", "extend"):
        with pytest.raises(UserError, match=r"'ß' \(once\), 'é' \(2 times\).*drop"):
            start_run(str(first.run_dir), max_iters=4, data=str(other), on_new_chars=how)
    dropped = start_run(str(first.run_dir), max_iters=4, data=str(other), on_new_chars="drop")
    assert "'ß' (once), 'é' (2 times)" in read_console(dropped)


# What can be resumed --------------------------------------------------------------------------


def test_resume_accepts_last_a_run_id_a_run_directory_and_a_checkpoint(start_run):
    start_run(fresh=True, max_iters=2)
    newest = start_run(fresh=True, max_iters=3)
    names = ("last", newest.run_dir.name, str(newest.run_dir), str(newest.checkpoint))
    for name in names:
        _, plan = plan_run(ConfigLoader({"max_iters": 9}), resume=name)
        assert plan.bundle.path.resolve() == newest.checkpoint.resolve()


def test_last_without_a_checkpoint_names_the_newest_run_that_has_one(start_run):
    with pytest.raises(UserError, match=r"--resume last: .* runs"):
        start_run("last")
    older = start_run(fresh=True, max_iters=2)
    newer = Path("runs/29990101_000000_killed")
    (newer / "artifacts" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{newer}.*{older.run_dir}"):
        start_run("last")
    shutil.rmtree(older.run_dir)
    with pytest.raises(UserError) as caught:
        start_run("last")
    assert str(newer) in str(caught.value)
    assert str(older.run_dir) not in str(caught.value)


def test_auto_resumes_a_checkpoint_if_there_is_one_and_else_trains_from_scratch(
    start_run, monkeypatch
):
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        first = start_run("auto", fresh=True)
    (Path("runs/29990101_000000") / "artifacts" / "checkpoints").mkdir(parents=True)
    second = start_run("auto")
    assert (first.step, second.step) == (3, 6)
    assert f"{first.checkpoint} (step 3)" in read_console(second)
    with pytest.raises(NothingToDo):
        start_run("auto")


def test_auto_with_a_tag_considers_runs_of_that_tag_only(start_run):
    start_run(fresh=True, max_iters=2, run_tag="big")
    small = start_run("auto", fresh=True, max_iters=2, run_tag="small", n_layer=1)
    assert small.step == 2
    _, plan = plan_run(ConfigLoader({"run_tag": "big", "max_iters": 4}), resume="auto")
    assert plan.bundle.config.n_layer == 2


def test_auto_compares_whole_tags_and_a_resume_keeps_the_tag(start_run):
    start_run(fresh=True, max_iters=2, run_tag="lr_1")
    assert start_run("auto", fresh=True, max_iters=3, run_tag="lr").step == 3
    resumed = start_run("last", max_iters=5)
    assert "_lr" in resumed.run_dir.name
    assert read_training_state(resumed.checkpoint)["training_config"]["run_tag"] == "lr"
    _, plan = plan_run(ConfigLoader({"max_iters": 9, "run_tag": "lr"}), resume="auto")
    assert plan.start_step == 5


@pytest.mark.parametrize(("one", "other"), [("🚀", "???"), ("lr+1", "lr-1"), ("a/b", "a-b")])
def test_auto_compares_tags_as_they_were_given(start_run, one, other):
    result = start_run("auto", fresh=True, max_iters=2, run_tag=one)
    has_note = f"the run directory is named {sanitize_tag(one)}" in read_console(result)
    assert has_note == (one != sanitize_tag(one))
    assert start_run("auto", fresh=True, max_iters=3, run_tag=other).step == 3
    for tag, step in ((one, 2), (other, 3)):
        _, plan = plan_run(ConfigLoader({"max_iters": 9, "run_tag": tag}), resume="auto")
        assert plan.start_step == step


def test_auto_resumes_the_last_run_whatever_the_time_zone(start_run, monkeypatch):
    """Also in the hour that a change of the clock repeats."""
    with monkeypatch.context() as patch:
        for number, zone in enumerate(("Asia/Tokyo", "UTC", "America/Los_Angeles", "UTC")):
            patch.setenv("TZ", zone)
            time.tzset()
            result = start_run("auto", fresh=number == 0, max_iters=2 + number, run_tag="job")
            assert result.step == 2 + number
    time.tzset()
    assert len(list(Path("runs").iterdir())) == 4


def test_a_run_is_newer_than_the_one_it_resumed_though_the_clock_went_back(start_run):
    first = start_run(fresh=True, max_iters=2)
    second = start_run("auto", max_iters=3)
    record = first.run_dir / "meta" / "full_config.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    content["run"]["started"] = "2999-01-01T00:00:00+00:00"
    record.write_text(json.dumps(content), encoding="utf-8")
    assert list_runs(Path("runs")) == [second.run_dir, first.run_dir]
    # A forged circle of runs ends.
    record = second.run_dir / "meta" / "full_config.json"
    content["run"]["resumed_from"] = {"run_id": second.run_dir.name}
    (first.run_dir / "meta" / "full_config.json").write_text(json.dumps(content), encoding="utf-8")
    assert set(list_runs(Path("runs"))) == {second.run_dir, first.run_dir}
    for forged in (
        {"run": []},
        {"run": {"started": 5}},
        {"run": {**content["run"], "resumed_from": "x"}},
    ):
        record.write_text(json.dumps(forged), encoding="utf-8")
        assert set(list_runs(Path("runs"))) == {second.run_dir, first.run_dir}


def test_a_long_chain_of_resumed_runs_is_listed_at_once(tmp_path):
    names = [f"20260101_000000_{number}" for number in range(3000)]
    for number, name in enumerate(names):
        (tmp_path / name / "artifacts").mkdir(parents=True)
        (tmp_path / name / "meta").mkdir()
        resumed_from = {"run_id": names[number - 1]} if number else None
        record = {"run": {"started": "2026-01-01T00:00:00+00:00", "resumed_from": resumed_from}}
        (tmp_path / name / "meta" / "full_config.json").write_text(json.dumps(record), "utf-8")
    assert [run.name for run in list_runs(tmp_path)] == names[::-1]


def test_auto_with_a_parent_resumes_children_of_that_parent_only(start_run, purgatorio):
    start_run(fresh=True, model_name="base", max_iters=2)
    start_run(fresh=True, max_iters=3)
    settings = {"data": purgatorio, "max_iters": 4, "warmup_iters": 1, "device": "cpu"}
    child = start_run("auto", init_from="base", **settings)
    assert read_training_state(child.checkpoint)["lineage"][0]["name"] == "base"
    settings["max_iters"] = 6
    resumed = start_run("auto", init_from="base", **settings)
    assert read_training_state(resumed.checkpoint)["training_config"]["start_step"] == 4


def test_auto_with_a_name_fine_tunes_once_and_then_resumes(start_run):
    start_run(fresh=True, model_name="dante", max_iters=2)
    child = {"model_name": "child", "init_from": "dante", "max_iters": 4}
    child["data"] = get_model_info("dante")["training_state"]["training_config"]["data"]
    start_run("auto", **child)
    with pytest.raises(NothingToDo):
        start_run("auto", **child)
    assert read_training_state(Path("checkpoints/child"))["step"] == 4
    assert len(read_training_state(Path("checkpoints/child"))["lineage"]) == 1


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ({"resume": "nowhere"}, ["nowhere: no such model", "runs/nowhere"]),
        ({"resume": "."}, ["--resume ."]),
        ({"resume": "last", "init_from": "x"}, ["--resume", "--init-from"]),
        ({"reset_optimizer": True}, ["--reset-optimizer"]),
        ({"overwrite": True}, ["--overwrite", "--model-name"]),
        ({"init_from": "nobody", "model_name": "x"}, ["nobody: no such model"]),
    ],
)
def test_an_impossible_start_is_one_line(start_run, flags, facts):
    with pytest.raises(UserError) as caught:
        start_run(**flags)
    assert all(fact in str(caught.value) for fact in facts)
    assert "\n" not in str(caught.value)
    assert list(Path.cwd().iterdir()) == []


def test_resuming_an_export_needs_reset_optimizer(start_run):
    first = start_run(fresh=True, max_iters=4)
    with pytest.raises(UserError, match=f"{first.export_dir}.*--reset-optimizer"):
        start_run(str(first.export_dir), max_iters=6)
    again = start_run(str(first.export_dir), max_iters=6, reset_optimizer=True)
    assert again.step == 6
    assert "new optimizer" in read_console(again)


def test_a_damaged_optimizer_state_is_an_error_that_names_reset_optimizer(start_run):
    first = start_run(fresh=True, max_iters=4)
    (first.checkpoint / "optimizer.pt").write_bytes(b"")
    before = take_snapshot(Path("runs"))
    with pytest.raises(UserError, match=r"optimizer\.pt: .*--reset-optimizer"):
        start_run("last", max_iters=6)
    assert take_snapshot(Path("runs")) == before
    (first.checkpoint / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"optimizer\.pt: .*--reset-optimizer"):
        start_run("last", max_iters=6)
    assert start_run("last", max_iters=6, reset_optimizer=True).step == 6


def test_a_named_model_whose_new_optimizer_has_not_stepped_resumes(start_run, monkeypatch):
    first = start_run(fresh=True, max_iters=4)
    again = {"model_name": "dante", "max_iters": 6}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # after the named model was created
            start_run(str(first.checkpoint), reset_optimizer=True, **again)
    assert read_training_state(DANTE)["step"] == 4
    assert start_run(**again).step == 6


def test_resuming_a_run_of_a_named_model_advances_that_model(start_run, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        start_run(fresh=True, model_name="dante")
    start_run("last")
    assert read_training_state(DANTE)["step"] == 6


def test_only_overwrite_moves_a_named_model_back_or_to_another_run(start_run):
    first = start_run(fresh=True, model_name="dante", max_iters=4, keep_checkpoints=None)
    start_run(model_name="dante", max_iters=6)
    older = first.run_dir / "artifacts" / "checkpoints" / "step_00000003"
    for reference in (str(first.run_dir), str(older)):
        with pytest.raises(UserError, match=r"dante .*step 6 .*--model-name.*--overwrite"):
            start_run(reference, max_iters=8)
    other = start_run(str(older), max_iters=8, model_name="virgil")
    assert (
        read_training_state(DANTE)["step"],
        read_training_state(Path("checkpoints/virgil"))["step"],
    ) == (6, 8)
    assert other.step == 8
    start_run(str(older), max_iters=5, overwrite=True)
    assert read_training_state(DANTE)["step"] == 5


def test_a_kill_between_a_checkpoint_and_its_copy_to_the_named_model_loses_nothing(
    start_run, monkeypatch
):
    start_run(fresh=True, model_name="dante", max_iters=2)
    real = checkpoint_module.copy_bundle

    def killed(source, target, **options):
        if target == DANTE:
            raise KeyboardInterrupt
        real(source, target, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_module, "copy_bundle", killed)
        start_run(model_name="dante", max_iters=4)
    assert read_training_state(DANTE)["step"] == 2
    assert start_run("last", max_iters=6).step == 6
    assert read_training_state(DANTE)["step"] == 6
    assert read_training_state(DANTE)["training_config"]["start_step"] == 3


def test_resuming_a_moved_bundle_does_not_create_its_named_model(start_run, tmp_path):
    start_run(fresh=True, model_name="dante", max_iters=2)
    DANTE.rename(tmp_path / "gift")
    result = start_run(str(tmp_path / "gift"), max_iters=4)
    assert result.step == 4
    assert not DANTE.exists()


def test_a_signal_between_two_checks_still_saves_the_step(start_run, monkeypatch):
    """The signal comes after the check that decides to save, before the one that ends the loop."""
    checks = []

    def late(self):
        checks.append(None)
        return len(checks) > 5

    monkeypatch.setattr(StopRequest, "requested", property(late))
    losses = iter([1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(
        trainer_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(losses)}
    )
    result = start_run(fresh=True, max_iters=100, eval_interval=1, checkpoint_interval=0)
    assert read_training_state(result.checkpoint)["step"] == result.step


def test_an_aborted_run_prints_its_last_checkpoint_and_the_resume_command(
    start_run, monkeypatch, capsys, tiny
):
    def training_step(trainer, index):
        if index == 5:
            raise KeyboardInterrupt
        return REAL_STEP(trainer, index)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    loaded, plan = plan_run(
        ConfigLoader(tiny(checkpoint_interval=2).model_dump(exclude_unset=True))
    )
    with pytest.raises(KeyboardInterrupt):
        train(loaded.config, loaded=loaded, plan=plan)
    shown = capsys.readouterr().out
    (run,) = Path("runs").iterdir()
    *_, checkpoint, command = shown.splitlines()
    assert "step 4" in checkpoint
    assert command.endswith(f"train.py --resume {run} --device cpu")


# The best model, and which checkpoints are kept -----------------------------------------------


@pytest.fixture
def script_losses(monkeypatch):
    """Return a function that sets the val losses of the next evaluations."""

    def set_losses(*losses: float) -> None:
        values = iter(losses)
        monkeypatch.setattr(
            trainer_module, "estimate_loss", lambda *_: {"train": 1.0, "val": next(values)}
        )

    return set_losses


def find_note(result: TrainResult) -> str:
    return next(line for line in read_console(result).splitlines() if line.startswith("Note: "))


def list_kept_steps(result: TrainResult) -> list[int]:
    found = (result.run_dir / "artifacts" / "checkpoints").iterdir()
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def test_the_last_checkpoints_and_the_best_are_kept(start_run, script_losses):
    script_losses(3.0, 1.0, *[2.0] * 8)
    result = start_run(fresh=True, max_iters=10, eval_interval=1, checkpoint_interval=1)
    assert list_kept_steps(result) == [2, 9, 10]
    script_losses(*range(10, 0, -1))
    result = start_run(fresh=True, max_iters=10, eval_interval=1, keep_checkpoints=3, keep_every=4)
    assert list_kept_steps(result) == [4, 8, 9, 10]
    script_losses(*[1.0] * 20)
    result = start_run(fresh=True, max_iters=6, keep_checkpoints=None, checkpoint_interval=2)
    assert list_kept_steps(result) == [2, 3, 4, 6]


def test_checkpoints_are_saved_at_their_interval_without_evaluations(start_run):
    result = start_run(
        fresh=True, max_iters=9, eval_interval=0, checkpoint_interval=4, keep_checkpoints=None
    )
    assert list_kept_steps(result) == [4, 8, 9]


def test_a_resumed_run_without_improvement_exports_the_earlier_best(start_run, script_losses):
    script_losses(1.0, 2.0)
    first = start_run(fresh=True, max_iters=4, eval_interval=2)
    script_losses(3.0)
    second = start_run("last", max_iters=6, eval_interval=0)
    assert (second.best_step, second.best_val_loss) == (2, 1.0)
    one, two = (load_file(r.export_dir / "model.safetensors") for r in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_training_state(second.checkpoint)["best_val_loss"] == 1.0


def test_the_best_val_loss_is_reset_if_its_model_is_missing_or_not_comparable(
    start_run, script_losses, tmp_path
):
    script_losses(1.0, 2.0)
    first = start_run(fresh=True, max_iters=4, eval_interval=2)
    script_losses(3.0)
    measured = start_run(str(first.run_dir), max_iters=6, eval_interval=0, eval_iters=3)
    assert measured.best_val_loss == 3.0
    assert "step 2" in find_note(measured)
    first.checkpoint.rename(tmp_path / "gift")
    shutil.rmtree("runs")
    script_losses(4.0)
    moved = start_run(str(tmp_path / "gift"), max_iters=6, eval_interval=0)
    assert moved.best_val_loss == 4.0
    assert "step 2" in find_note(moved)


# Fine-tuning and lineage ----------------------------------------------------------------------


@pytest.fixture
def purgatorio(tmp_path):
    path = tmp_path / "purgatorio.txt"
    path.write_text(LINES.swapcase().lower().replace(",", "") * 40, encoding="utf-8")
    return str(path)


def test_fine_tuning_starts_at_step_0_with_the_weights_of_the_parent(
    start_run, purgatorio, monkeypatch
):
    start_run(fresh=True, model_name="dante", max_iters=4, learning_rate=2e-2)
    before = take_snapshot(DANTE)
    parent = load_file(DANTE / "model.safetensors")
    initial = {}

    def training_step(trainer, index):
        if index == 0:
            initial.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
            assert not trainer.optimizer.state
        return REAL_STEP(trainer, index)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    result = start_run(
        init_from="dante", model_name="child", data=purgatorio, max_iters=3, warmup_iters=1,
        batch_size=2, dropout=0.1, device="cpu", eval_iters=1,
    )  # fmt: skip
    assert all(torch.equal(parent[name], initial[name]) for name in parent)
    assert take_snapshot(DANTE) == before
    child = read_training_state(Path("checkpoints/child"))
    assert (child["step"], child["training_config"]["start_step"]) == (3, 0)
    config = json.loads(Path("checkpoints/child/config.json").read_text("utf-8"))
    assert (config["batch_size"], config["dropout"], config["n_embd"]) == (2, 0.1, 16)
    assert child["best_val_loss"] == result.best_val_loss
    own = ModelConfig.model_fields["learning_rate"].default  # not its parent's
    assert child["training_config"]["learning_rate"] == own


def test_lineage_lists_all_ancestors_the_parent_first(start_run, purgatorio, text_file):
    start_run(fresh=True, model_name="grandmother", max_iters=2)
    small = {"warmup_iters": 1, "device": "cpu", "eval_iters": 1, "data": purgatorio}
    start_run(init_from="grandmother", model_name="mother", max_iters=3, **small)
    start_run(init_from="mother", model_name="child", max_iters=4, **small)
    start_run(model_name="child", max_iters=5)
    lineage = read_training_state(Path("checkpoints/child"))["lineage"]
    assert [(a["name"], a["step"]) for a in lineage] == [("mother", 3), ("grandmother", 2)]
    for ancestor in lineage:
        there = read_training_state(Path("checkpoints") / ancestor["name"])
        assert ancestor["weights_sha256"] == there["files"]["model.safetensors"]
        assert ancestor["data_sha256"] == there["training_config"]["data_sha256"]
        assert ancestor["run_id"] == there["run_id"]
    (newest, *_) = sorted(Path("runs").iterdir(), reverse=True)
    record = json.loads((newest / "meta" / "full_config.json").read_text("utf-8"))
    assert record["run"]["lineage"] == lineage


def test_the_parent_may_be_a_run_and_the_child_needs_no_name(start_run, purgatorio):
    first = start_run(fresh=True, max_iters=2)
    settings = {"data": purgatorio, "max_iters": 2, "warmup_iters": 1, "eval_iters": 1}
    child = start_run(init_from=str(first.run_dir), device="cpu", **settings)
    assert read_training_state(child.checkpoint)["lineage"][0]["name"] == first.run_dir.name


def test_fine_tuning_cannot_change_the_architecture(start_run, purgatorio):
    start_run(fresh=True, model_name="dante", max_iters=2)
    with pytest.raises(UserError, match=r"n_layer 3 \(--n-layer\).* 2 of checkpoints/dante"):
        start_run(init_from="dante", model_name="child", data=purgatorio, n_layer=3)
    assert not Path("checkpoints/child").exists()


def test_a_child_cannot_overwrite_its_parent(start_run, purgatorio):
    start_run(fresh=True, model_name="dante", max_iters=2)
    with pytest.raises(UserError, match="checkpoints/dante"):
        start_run(init_from="dante", model_name="dante", overwrite=True, data=purgatorio)


def test_fine_tuning_into_an_existing_name_is_an_error(start_run, purgatorio):
    start_run(fresh=True, model_name="dante", max_iters=2)
    with pytest.raises(UserError, match=r"dante .*init_from dante \(--init-from\).*--overwrite"):
        start_run(init_from="dante", model_name="dante", data=purgatorio)


def test_new_characters_are_an_error_dropped_or_added(start_run, tmp_path):
    start_run(fresh=True, model_name="dante", max_iters=3)
    parent = load_file(DANTE / "model.safetensors")
    text = tmp_path / "new.txt"
    text.write_text(LINES * 30 + "é" * 12 + "ß", encoding="utf-8")
    small = {"data": str(text), "max_iters": 2, "warmup_iters": 1, "eval_iters": 1, "device": "cpu"}
    small |= {"init_from": "dante"}
    with pytest.raises(UserError, match=r"'ß' \(once\), 'é' \(12 times\).*extend"):
        start_run(model_name="a", **small)
    assert not Path("checkpoints/a").exists()

    start_run(model_name="dropped", on_new_chars="drop", **small)
    chars = json.loads((DANTE / "tokenizer.json").read_text("utf-8"))["chars"]
    same = json.loads(Path("checkpoints/dropped/tokenizer.json").read_text("utf-8"))["chars"]
    assert same == chars
    start_run(model_name="dropped", max_iters=3)  # the setting is resumed, too

    # Before the first step, the old rows are bit-for-bit those of the parent.
    loaded, plan = plan_run(
        ConfigLoader({**small, "model_name": "extended", "on_new_chars": "extend"})
    )
    trainer = trainer_module.prepare_trainer(loaded.config, loaded, plan)
    rows = trainer.model.token_embedding.weight
    assert torch.equal(rows[: len(chars)], parent["token_embedding.weight"])
    assert rows.shape[0] == len(chars) + 2
    result = start_run(model_name="extended", on_new_chars="extend", **small)
    extended = json.loads(Path("checkpoints/extended/tokenizer.json").read_text("utf-8"))["chars"]
    assert extended == [*chars, "ß", "é"]
    assert "2 characters added" in read_console(result)
    assert start_run(model_name="extended", max_iters=3).step == 3


def test_the_record_of_a_fine_tuning_repeats_it_bit_for_bit(start_run, purgatorio, quiet):
    start_run(fresh=True, model_name="dante", max_iters=3)
    settings = {"data": purgatorio, "max_iters": 3, "warmup_iters": 1, "device": "cpu"}
    child = start_run(init_from="dante", model_name="child", **settings)
    record = str(child.run_dir / "meta" / "full_config.json")
    loaded, plan = plan_run(ConfigLoader({}, record))
    again = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    one, two = (load_file(r.checkpoint / "model.safetensors") for r in (child, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    start_run(model_name="dante", max_iters=4)
    loaded, plan = plan_run(ConfigLoader({}, record))
    with pytest.raises(UserError, match=r"dante.*\(dante, step 3.*--init-from"):
        train(loaded.config, loaded=loaded, plan=plan, output=quiet)


def test_the_record_of_a_resumed_run_needs_the_checkpoint_that_it_resumed(start_run, quiet):
    first = start_run(fresh=True, max_iters=2)
    second = start_run("last", max_iters=4)
    record = str(second.run_dir / "meta" / "full_config.json")
    loaded, plan = plan_run(ConfigLoader({}, record))
    with pytest.raises(UserError, match=rf"step 2 .*--resume .*{first.run_dir}"):
        train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    loaded, plan = plan_run(ConfigLoader({}, record), resume=str(first.checkpoint))
    again = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    assert_same_bits(second.checkpoint, again.checkpoint)


@pytest.mark.parametrize("lineage", ["x", ["x"], {"a": 1}, 5, []])
def test_a_record_with_an_edited_lineage_still_trains(start_run, quiet, lineage, purgatorio):
    start_run(fresh=True, model_name="dante", max_iters=2)
    settings = {"data": purgatorio, "max_iters": 2, "warmup_iters": 1, "device": "cpu"}
    child = start_run(init_from="dante", **settings)
    path = child.run_dir / "meta" / "full_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["run"]["lineage"] = lineage
    path.write_text(json.dumps(record), encoding="utf-8")
    loaded, plan = plan_run(ConfigLoader({}, str(path)))
    assert train(loaded.config, loaded=loaded, plan=plan, output=quiet).step == 2


# Odd places -----------------------------------------------------------------------------------


def test_copied_checkpoints_and_renamed_runs_do_not_disturb_a_resume(start_run):
    first = start_run(fresh=True, max_iters=2)
    copy = first.run_dir / "artifacts" / "checkpoints" / "step_00000002_good"
    shutil.copytree(first.checkpoint, copy)
    first.run_dir.rename("runs/a_good_one")
    second = start_run(fresh=True, max_iters=3)
    os.utime("runs/a_good_one", (0, 0))
    _, plan = plan_run(ConfigLoader({"max_iters": 9}), resume="last")
    assert plan.bundle.path == second.checkpoint
    assert start_run("a_good_one", max_iters=4).step == 4
    assert copy.exists() is False
    assert Path("runs/a_good_one/artifacts/checkpoints/step_00000002_good").exists()


def test_a_run_resumes_from_within_its_own_directories(start_run, monkeypatch, text_file):
    first = start_run(fresh=True, model_name="dante", max_iters=2)
    here = Path.cwd()
    places = {"runs_dir": str(here / "runs"), "checkpoints_dir": str(here / "checkpoints")}
    monkeypatch.chdir(first.run_dir / "artifacts" / "checkpoints")
    assert start_run(first.checkpoint.name, max_iters=4, **places).step == 4
    assert read_training_state(here / DANTE)["step"] == 4
    monkeypatch.chdir(here / DANTE)  # the config.json here is the model's, not a file of settings
    assert start_run(".", max_iters=6, **places).step == 6
    assert read_training_state(here / DANTE)["step"] == 6


def test_a_directory_with_a_models_name_does_not_hide_the_model(start_run):
    start_run(fresh=True, model_name="dante", max_iters=2)
    Path("dante").mkdir()
    assert start_run("dante", max_iters=4).step == 4


@pytest.mark.parametrize("reference", ["a" * 300, "a\0b", "x/" * 3000, "nowhere/at/all"])
def test_an_impossible_path_is_an_unknown_model(start_run, reference):
    for flags in ({"resume": reference}, {"init_from": reference}):
        with pytest.raises(UserError, match="no such model") as caught:
            start_run(**flags)
        assert "\n" not in str(caught.value)


def test_a_full_disk_during_a_save_is_one_line_and_leaves_the_old_bundle(folio, text_file):
    # AdamW's two moments make optimizer.pt the largest file.
    flags = [*TINY_FLAGS, "--model-name=dante", "--optimizer=adamw", "--n-embd=48"]
    folio("train.py", "--data", text_file, *flags, check=True)
    before = take_snapshot(DANTE)
    limit = (DANTE / "optimizer.pt").stat().st_size - 2000
    done = folio(
        "train.py", "--model-name=dante", "--max-iters=6",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "File too large" in line
    assert take_snapshot(DANTE) == before


# From Python, and the rest --------------------------------------------------------------------


def test_a_config_made_in_python_may_have_a_model_name_and_a_parent(tiny, quiet):
    train(tiny(model_name="dante"), output=quiet)
    assert read_training_state(DANTE)["step"] == 6
    with pytest.raises(UserError, match=r"dante .*plan_run"):
        train(tiny(model_name="dante"), output=quiet)
    with pytest.raises(UserError, match=r"n_layer .*checkpoints/dante"):
        train(tiny(init_from="dante", n_layer=1), output=quiet)
    child = train(tiny(init_from="dante", model_name="child"), output=quiet)
    assert read_training_state(child.checkpoint)["lineage"][0]["name"] == "dante"


def test_a_dry_run_of_a_resume_prints_the_steps_left_and_writes_nothing(start_run):
    first = start_run(fresh=True, max_iters=2)
    before = take_snapshot(Path.cwd())
    loaded, plan = plan_run(ConfigLoader({"max_iters": 6}), resume=str(first.run_dir))
    text = dry_run(loaded, plan)
    assert "2 to 6" in text
    assert f"{first.checkpoint} (step 2)" in text
    assert take_snapshot(Path.cwd()) == before


def test_show_config_names_the_checkpoint_as_a_source(folio, text_file):
    folio("train.py", "--data", text_file, *TINY_FLAGS, "--model-name=dante", check=True)
    shown = folio("train.py", "--model-name=dante", "--seed=3", "--show-config").stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert lines["n_embd"].split() == ["n_embd", "16", "checkpoints/dante"]
    assert lines["max_iters"].split() == ["max_iters", "4", "checkpoints/dante"]
    assert lines["seed"].split() == ["seed", "3", "--seed"]


def test_nothing_to_do_is_one_line_and_exit_status_0(folio, text_file):
    folio("train.py", "--data", text_file, *TINY_FLAGS, check=True)
    done = folio("train.py", "--resume", "last")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"runs/.*step 4.*max_iters.*4.*--max-iters.*\n", done.stdout)
    assert len(list(Path("runs").iterdir())) == 1


def test_the_command_printed_at_ctrl_c_resumes_the_run(folio, text_file):
    command = [sys.executable, str(CHECKOUT / "train.py"), "--data", str(text_file), *TINY_FLAGS]
    command += ["--max-iters=100000", "--model-name=dante", "--checkpoints-dir=my models"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
    assert process.returncode == 130
    command = printed.partition("Next:\n")[2].splitlines()[2].partition("#")[0]
    reached = read_training_state(Path("my models/dante"))["step"]
    done = subprocess.run(
        f"{command} --max-iters {reached + 3}", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert read_training_state(Path("my models/dante"))["step"] == reached + 3
