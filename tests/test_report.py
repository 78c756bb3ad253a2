"""report.py and utils/report/: the page of a run, the comparison of several, the picture.

python -m pytest tests/test_report.py
"""

import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import CHECKOUT

import run_record
import trainer as trainer_module
from callbacks import TrainResult
from config import ConfigLoader
from parameters import ModelConfig
from report import choose_labels, find_run, write_comparison
from resume import plan_run
from trainer import train
from utils.errors import RunError, UserError
from utils.report import TEMPLATES, format_date, list_settings, render, runs, write_report
from utils.report.charts import COLORS, DASHES, Line, _format_ticks, compute_chart
from utils.report.runs import STEP_LOSS, VAL, LoggedRun
from utils.run_manager import RunDirectory

WIDTH, HEIGHT = 1040, 320  # of a chart
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page's text, the addresses it refers to, and whether its elements are closed in order."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.words, self.addresses, self.open, self.tags = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def page_of(result: TrainResult) -> Page:
    return Page(RunDirectory(result.run_dir).report)


def change_run(run_dir: Path, change: Callable[[dict], object]) -> None:
    """Change the `run` part of a run's record."""
    path = run_dir / "meta" / "full_config.json"
    record = json.loads(path.read_bytes())
    change(record["run"])
    path.write_text(json.dumps(record), encoding="utf-8")


def list_steps(run: LoggedRun) -> list[int]:
    return [step for step, _ in run.get_points(STEP_LOSS)]


# The page of a run -----------------------------------------------------------------------------


def test_a_run_ends_with_a_report_of_its_losses_settings_code_and_samples(tiny, quiet, text_file):
    config = tiny(run_tag="shown", sample_interval=3, learning_rate=2e-3)
    argv = ["--run-tag", "shown", "--learning-rate", "2e-3"]
    result = train(config, argv=argv, output=quiet)
    page = page_of(result)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    for words in (
        result.run_dir.name,
        f"{result.best_val_loss:.4f}",
        "6 steps",
        "Loss",
        "Learning rate",
        "Gradient norm",
        "python train.py --run-tag shown --learning-rate 2e-3",
        record["run"]["data"]["sha256"],
        "commit:",
        "branch:",
    ):
        assert words in page.text, words
    for name in ModelConfig.model_fields:
        if name in record["config"]:
            assert f" {name} " in page.text
    samples = RunDirectory(result.run_dir).samples.read_text(encoding="utf-8").splitlines()
    assert len(samples) == 4  # before training, at two evaluations, and of the exported model
    for line in samples:
        sample = json.loads(line)
        assert f"Step {sample['step']}" in page.text
        assert " ".join(sample["text"].split()) in page.text


def test_the_report_has_the_model_the_text_and_the_date_as_people_write_them(tiny, quiet):
    result = train(tiny(), output=quiet)
    change_run(result.run_dir, lambda run: run.update(started="2026-01-09T08:05:59.123+01:00"))
    write_report(Path("page.html"), result.run_dir)
    text = Page(Path("page.html")).text
    for fact in ("2 layers, 2 heads, 16 channels, context 16", "play.txt", "9 January 2026, 08:05"):
        assert fact in text
    assert format_date("some day") == "some day"


def test_losses_are_per_character_unless_tokens_are_longer(tiny, quiet):
    result = train(tiny(), output=quiet)
    text = page_of(result).text.partition("Provenance")[0]
    assert "nats per character" in text
    assert "Characters per second" in text
    assert "token" not in text
    change_run(result.run_dir, lambda run: run["data"].update(unit="token"))
    write_report(Path("page.html"), result.run_dir)
    text = Page(Path("page.html")).text.partition("Provenance")[0]
    assert "nats per token" in text
    assert "nats per character" not in text


def test_only_settings_that_differ_from_their_defaults_are_shown_unfolded(tiny, quiet):
    page = page_of(train(tiny(learning_rate=2e-3), output=quiet))
    shown, _, folded = page.text.rpartition("Settings")[2].partition("at their defaults")
    field = ModelConfig.model_fields["learning_rate"]
    for fact in ("learning_rate 0.002", f"default {field.default}", field.description):
        assert fact in " ".join(shown.split())
    assert "weight_decay" not in shown
    field = ModelConfig.model_fields["weight_decay"]
    assert f"weight_decay {field.default}" in folded
    assert field.description in folded


@pytest.mark.parametrize("architecture", ["modern", "gpt2", "speedrun"])
def test_nothing_that_follows_from_a_default_counts_as_changed(architecture):
    config = ModelConfig(architecture=architecture).model_dump()
    config["data"] = "/found/input.txt"
    record = {"config": config, "sources": {"data": "default", "activation": "architecture"}}
    changed = [setting.name for setting in list_settings(record) if setting.is_changed]
    assert changed == ([] if architecture == "modern" else ["architecture"])


def test_samples_are_shown_from_the_first_to_the_last_and_long_ones_between_are_folded(tiny, quiet):
    result = train(tiny(), output=quiet)
    texts = {0: "long " * 50, 1: "long " * 50, 2: "short", 3: "long " * 50, 6: "long " * 50}
    lines = [json.dumps({"step": step, "text": text}) for step, text in texts.items()]
    RunDirectory(result.run_dir).samples.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_report(Path("page.html"), result.run_dir)
    source = Path("page.html").read_text(encoding="utf-8")
    details = re.findall(r"<details( open)?><summary>Step (\d+)", source)
    assert details == [(" open", "0"), ("", "1"), (" open", "2"), ("", "3"), (" open", "6")]
    val_loss = f"{dict(LoggedRun(result.run_dir).get_points(VAL))[3]:.4f}"
    assert f"Step 3, val loss {val_loss}" in source
    with open(RunDirectory(result.run_dir).samples, "a", encoding="utf-8") as file:
        file.write('{"step": 3, "text": "To be", "exported": true}\n')
    write_report(Path("page.html"), result.run_dir)
    source = Path("page.html").read_text(encoding="utf-8")
    assert f"<details open><summary>Best model: step 3, val loss {val_loss}" in source


def test_the_report_has_the_longest_overlap_and_overfitting_if_they_were_recorded(tiny, quiet):
    result = train(tiny(), output=quiet)
    path = result.run_dir / "meta" / "result.json"
    record = json.loads(path.read_bytes())
    found = {
        "longest_overlap": "to be <or not>",
        "overfitting": {"since": 3, "rise": 0.125},
    }

    def write(result: dict) -> str:
        path.write_text(json.dumps(result), encoding="utf-8")
        write_report(Path("page.html"), path.parent.parent)
        return Page(Path("page.html")).text.partition("Provenance")[0]

    plain = write({name: value for name, value in record.items() if name not in found})
    assert "training text" not in plain
    assert "Overfitting" not in plain
    text = write({**record, **found})
    overlap = text.partition("training text")[2]
    assert "14 characters" in overlap
    assert "to be <or not>" in overlap
    assert re.search(r"risen by 0\.125\d* since step 3", text)


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_a_number_too_large_to_be_true_ends_no_report_with_a_traceback(tiny, quiet, number):
    result = train(tiny(), output=quiet)
    samples = RunDirectory(result.run_dir).samples
    with samples.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": number, "text": "forged"}) + "\n")
    write_report(Path("page.html"), result.run_dir)
    assert "forged" not in Page(Path("page.html")).text.partition("Provenance")[0]
    path = result.run_dir / "meta" / "result.json"
    record = json.loads(path.read_bytes())
    record["overfitting"] = {"since": number, "rise": 1}
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="since"):
        write_report(Path("page.html"), result.run_dir)


def test_only_the_first_sample_of_a_new_model_is_untrained(tiny, quiet):
    new = train(tiny(), output=quiet)
    assert "untrained" in page_of(new).text
    tuned = train(tiny(init_from=str(new.run_dir)), output=quiet)
    assert "Step 0" in page_of(tuned).text
    assert "untrained" not in page_of(tuned).text.partition("Provenance")[0]


@pytest.mark.parametrize(
    ("tokenizer", "unit"), [("char", "character"), ("gpt2", "token"), ("bpe", "token")]
)
def test_a_run_that_did_not_record_its_unit_has_that_of_its_tokenizer(tiny, quiet, tokenizer, unit):
    result = train(tiny(), output=quiet)
    change_run(result.run_dir, lambda run: run["data"].pop("unit"))
    path = result.run_dir / "meta" / "full_config.json"
    record = json.loads(path.read_bytes())
    record["config"]["tokenizer"] = tokenizer
    path.write_text(json.dumps(record), encoding="utf-8")
    assert LoggedRun(result.run_dir).unit == unit


def test_the_second_untagged_run_of_a_second_has_no_tag(tiny, quiet):
    for tag in (None, None, "x"):
        result = train(tiny(run_tag=tag), output=quiet)
        assert LoggedRun(result.run_dir).tag == (tag or "")


def test_a_report_refers_to_no_other_file_or_address(tiny, quiet):
    result = train(tiny(), output=quiet)
    source = RunDirectory(result.run_dir).report.read_text(encoding="utf-8")
    assert page_of(result).addresses == []
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in source


def test_text_of_a_model_or_a_user_is_escaped(tiny, quiet, text_file):
    text_file.write_text("<script>alert(1)</script>&amp; \n" * 200, encoding="utf-8")
    hostile = '"><img src=x onerror=alert(1)>'
    result = train(tiny(run_tag="x"), argv=["--run-tag", hostile], output=quiet)
    page = page_of(result)
    assert page.tags.count("script") == 1  # the page's own
    assert "img" not in page.tags
    assert hostile in page.text.replace("'\"'\"'", "'")


def test_the_report_of_a_resumed_run_shows_all_steps_and_samples_of_the_training(tiny, quiet):
    part = train(tiny(max_iters=3), output=quiet)
    with open(RunDirectory(part.run_dir).samples, "a", encoding="utf-8") as file:
        file.write('{"step": 3, "text": "To be", "exported": true}\n')
    loaded, plan = plan_run(ConfigLoader({"max_iters": 6}), resume=str(part.run_dir))
    rest = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    run = LoggedRun(rest.run_dir)
    assert list_steps(run) == [1, 2, 3, 4, 5, 6]
    seconds = [second for second, _ in run.get_points(STEP_LOSS, "seconds")]
    assert seconds == sorted(seconds)
    assert {3, 6} <= {sample.step for sample in run.samples}
    assert [sample for sample in run.samples[:-1] if sample.is_best] == []
    assert run.resumed_runs == [part.run_dir.name]
    assert f"resumed runs: {part.run_dir.name}" in page_of(rest).text
    assert f"run {part.run_dir.name}, step 3" in page_of(rest).text


def test_the_report_of_a_fine_tuned_model_names_its_ancestors(tiny, quiet, text_file):
    train(tiny(model_name="dante"), output=quiet)
    flags = {"init_from": "dante", "data": str(text_file), "max_iters": 2, "device": "cpu"}
    loaded, plan = plan_run(ConfigLoader(flags))
    child = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    assert "Lineage dante, step 6" in page_of(child).text


def test_a_failed_run_has_a_report_with_the_reason(tiny, quiet, monkeypatch):
    real = trainer_module.Trainer.training_step

    def diverging(setup, step):
        loss, grad_norm = real(setup, step)
        return (loss * float("nan") if step == 4 else loss), grad_norm

    monkeypatch.setattr(trainer_module.Trainer, "training_step", diverging)
    with pytest.raises(RunError):
        train(tiny(), output=quiet)
    (run_dir,) = Path("runs").iterdir()
    text = Page(run_dir / "report.html").text
    for fact in ("4 steps of 6", "nan", "step 5"):
        assert fact in text
    assert json.loads((run_dir / "meta" / "result.json").read_bytes()).keys() == {"error"}


def test_the_report_and_result_json_have_the_reason_why_a_run_ended(tiny, quiet):
    reason = SimpleNamespace(after_step=lambda step: "far <enough>" if step.step == 4 else None)
    result = train(tiny(), output=quiet, callbacks={"mine": lambda _: reason})
    assert "4 steps of 6: far <enough>" in page_of(result).text
    assert "Callbacks mine" in page_of(result).text
    record = json.loads((result.run_dir / "meta" / "result.json").read_bytes())
    assert record["stopped_by"] == "far <enough>"
    assert record["best_val_loss"] == result.best_val_loss
    (result.run_dir / "meta" / "result.json").unlink()  # as a kill would have left it
    write_report(Path("page.html"), result.run_dir)
    assert "4 steps of 6: still running, or killed" in Page(Path("page.html")).text


def test_steps_after_the_resumed_checkpoint_are_left_out(tiny, quiet):
    whole = train(tiny(checkpoint_interval=1, keep_checkpoints=None), output=quiet)
    checkpoint = RunDirectory(whole.run_dir).get_checkpoint(2)
    loaded, plan = plan_run(ConfigLoader({"max_iters": 5}), resume=str(checkpoint))
    rest = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    assert list_steps(LoggedRun(rest.run_dir)) == [1, 2, 3, 4, 5]


def test_a_moved_run_still_finds_the_run_that_it_resumed(tiny, quiet):
    part = train(tiny(max_iters=3), output=quiet)
    loaded, plan = plan_run(ConfigLoader({"max_iters": 6}), resume=str(part.run_dir))
    rest = train(loaded.config, loaded=loaded, plan=plan, output=quiet)
    moved = rest.run_dir.rename(Path("elsewhere").resolve())
    assert list_steps(LoggedRun(moved)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "text", ["a\u2028b\x85c\u2029", "tab\t\x00\x1b[31mred", "\u202eright to left", "]]>&lt;"]
)
def test_a_report_shows_any_sample_without_control_characters(tiny, quiet, text):
    result = train(tiny(), output=quiet)
    line = json.dumps({"step": 3, "text": text}, ensure_ascii=False)
    RunDirectory(result.run_dir).samples.write_text(line + "\n", encoding="utf-8")
    write_report(Path("page.html"), result.run_dir)
    assert "Samples" in Page(Path("page.html")).text
    content = Path("page.html").read_bytes()
    assert not any(byte in content for byte in b"\x00\x1b")


GARBAGE = [
    *('{"step": "x"}', '{"step": 7, "loss/train": "NaN", "seconds": "x"}', "[" * 100_000, "null"),
    '{"step": 7, "loss/train": 1e308, "tokens_per_second": -1e308, "seconds": 1' + "0" * 400 + "}",
    '{"step": 7, "eval/val_loss": 0.0, "eval/val_bits_per_byte": "q"}',
]


@pytest.mark.parametrize("line", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_metrics_or_samples_is_left_out(tiny, quiet, line):
    result = train(tiny(), output=quiet)
    for path in (RunDirectory(result.run_dir).metrics, RunDirectory(result.run_dir).samples):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    write_comparison(Path("page.html"), [LoggedRun(result.run_dir)] * 2)
    write_report(Path("page.html"), result.run_dir)
    assert "best val loss" in Page(Path("page.html")).text


@pytest.mark.parametrize(
    "change",
    [
        {"resumed_from": {"step": "x"}},
        {"lineage": 5},
        {"lineage": [{"name": "x"}]},
        {"data": "x"},
        {"argv": [1]},
        {"parameters": "many"},
    ],
)
def test_a_damaged_record_is_an_error_that_names_the_file_and_the_key(tiny, quiet, folio, change):
    result = train(tiny(), output=quiet)
    path = result.run_dir / "meta" / "full_config.json"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "run": {**record["run"], **change}}), encoding="utf-8")
    done = folio("report.py", "last")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for fact in ("full_config.json", "damaged", next(iter(change))):
        assert fact in done.stderr


def test_a_damaged_result_is_an_error_that_names_the_file_and_the_key(tiny, quiet):
    path = train(tiny(), output=quiet).run_dir / "meta" / "result.json"
    for content, fact in (('{"seconds": "x"}', "seconds"), ("{", "JSON")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=rf"result\.json.*{fact}"):
            write_report(Path("page.html"), path.parent.parent)


def test_records_that_refer_to_each_other_in_a_circle_are_read_once(tiny, quiet):
    runs = [train(tiny(run_tag=tag), output=quiet).run_dir for tag in "ab"]
    for run, other in (runs, reversed(runs)):
        path = run / "meta" / "full_config.json"
        record = json.loads(path.read_bytes())
        record["run"]["resumed_from"] = {"run_id": other.name, "step": 3, "path": ""}
        path.write_text(json.dumps(record), encoding="utf-8")
    assert LoggedRun(runs[0]).resumed_runs == [runs[1].name]


def test_a_report_that_cannot_be_written_costs_a_warning_and_not_the_run(tiny, quiet, monkeypatch):
    def broken(*_):
        raise OSError("no room")

    monkeypatch.setattr(run_record, "write_report", broken)
    result = train(tiny(), output=quiet)
    console = RunDirectory(result.run_dir).console.read_text(encoding="utf-8")
    assert console.count("warning:") == 1
    for fact in ("report.html", "no room"):
        assert fact in console


def test_a_line_cut_off_by_a_kill_is_left_out(tiny, quiet):
    result = train(tiny(), output=quiet)
    metrics = RunDirectory(result.run_dir).metrics
    metrics.write_bytes(metrics.read_bytes()[:-9])
    write_report(Path("page.html"), result.run_dir)
    assert len(LoggedRun(result.run_dir).get_points(VAL)) == 1


def test_a_run_without_a_step_has_a_report(tiny, quiet):
    result = train(tiny(), output=quiet)
    for name in ("metrics", "samples", "console"):
        getattr(RunDirectory(result.run_dir), name).unlink()
    write_report(Path("page.html"), result.run_dir)
    assert "No loss yet." in Page(Path("page.html")).text


def test_an_old_run_without_seconds_and_with_few_facts_has_a_report(tiny, quiet):
    result = train(tiny(), output=quiet)
    run = RunDirectory(result.run_dir)
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        del line["seconds"]
    run.metrics.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    path = run.meta / "full_config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["run"] = {"run_id": "r"}
    path.write_text(json.dumps(record), encoding="utf-8")
    write_report(Path("page.html"), result.run_dir)
    assert f"{result.best_val_loss:.4f}" in Page(Path("page.html")).text


# Several runs ----------------------------------------------------------------------------------


def test_each_of_many_runs_has_its_own_color_and_dashes(tiny, quiet):
    result = train(tiny(), output=quiet)
    paths = [Path(shutil.copytree(result.run_dir, f"place{n}/same_name")) for n in range(8)]
    write_comparison(Path("many.html"), list(map(LoggedRun, paths)))
    source = Path("many.html").read_text(encoding="utf-8")
    pattern = r'<polyline class="line dash-(\d)\W[^>]*--line-(\d)\)'
    dashes, colors = zip(*re.findall(pattern, source)[:8], strict=True)
    assert len(set(zip(dashes, colors, strict=True))) == 8
    assert len(set(dashes[:6])) == DASHES == 6  # for who cannot see the colors
    assert len(set(colors[:6])) == COLORS == 6
    for path in paths:
        assert f">{path}<" in source  # as their names are the same


def test_runs_in_a_comparison_are_labeled_by_tag_if_it_is_unique(tiny, quiet):
    run_dir = train(tiny(), output=quiet).run_dir
    names = ("20260131_000000_wide", "20260131_000001_x", "20260131_000002_x", "20260131_000003")
    paths = [Path(shutil.copytree(run_dir, name)) for name in names]
    assert choose_labels(list(map(LoggedRun, paths))) == ["wide", *names[1:]]


def test_runs_with_different_tokenizers_are_compared_by_bits_per_byte(tiny, quiet):
    one = train(tiny(), output=quiet).run_dir
    other = Path(shutil.copytree(one, "other"))
    change_run(other, lambda run: run["data"].update(unit="token"))
    write_comparison(Path("page.html"), [LoggedRun(one), LoggedRun(other)])
    text = Page(Path("page.html")).text
    assert "bits per byte, logarithmic" in text
    assert "nats per" not in text


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"tokenizer": "gpt2"}, {"tokenizer": "gpt2"}, True),
        ({"tokenizer": "gpt2"}, {"tokenizer": "bpe", "vocab_size": 512}, False),
        ({"tokenizer": "bpe", "vocab_size": 512}, {"tokenizer": "bpe", "vocab_size": None}, True),
        ({"tokenizer": "bpe"}, {"tokenizer": "bpe", "train_split": 0.5}, False),
    ],
)
def test_losses_per_token_are_compared_between_runs_of_one_tokenizer(
    tiny, quiet, one, other, is_same
):
    first = train(tiny(), output=quiet).run_dir
    runs = [first, Path(shutil.copytree(first, "other"))]
    for run, changes in zip(runs, (one, other), strict=True):
        change_run(run, lambda facts: facts["data"].update(unit="token"))
        path = run / "meta" / "full_config.json"
        record = json.loads(path.read_bytes())
        record["config"].update(changes)
        path.write_text(json.dumps(record), encoding="utf-8")
    write_comparison(Path("page.html"), list(map(LoggedRun, runs)))
    assert ("nats per token" in Page(Path("page.html")).text) == is_same


def test_a_comparison_shows_each_run_and_only_the_differences(tiny, quiet):
    one = train(tiny(run_tag="narrow"), output=quiet)
    other = train(tiny(run_tag="wide", n_embd=32), output=quiet)
    write_comparison(Path("both.html"), [LoggedRun(one.run_dir), LoggedRun(other.run_dir)])
    page = Page(Path("both.html"))
    for result in (one, other):
        assert result.run_dir.name in page.text
        assert f"{result.best_val_loss:.4f}" in page.text
    differing = page.text.partition("Differences")[2]
    assert "n_embd 16 32" in differing
    assert "n_layer" not in differing
    assert "Validation loss by time" in page.text


# The command -----------------------------------------------------------------------------------


def test_the_command_writes_the_report_of_a_run_or_a_comparison(tiny, quiet, folio):
    runs = [train(tiny(run_tag=tag), output=quiet).run_dir for tag in ("a", "b")]
    RunDirectory(runs[1]).report.unlink()
    done = folio("report.py", "last")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(RunDirectory(runs[1]).report)
    assert RunDirectory(runs[1]).report.exists()
    done = folio("report.py", runs[0].name, runs[1])
    # Among the runs, where git ignores it.
    assert done.stdout.strip() == str(runs[0].parent / "comparison.html")
    assert (runs[0].parent / "comparison.html").exists()
    assert find_run("last", runs[0].parent) == runs[1]
    done = folio("report.py", runs[0].name, "--output", "mine.html")
    assert Path(done.stdout.strip()).exists()


def test_a_picture_is_an_svg_with_the_curves_and_the_sample_in_light_and_dark(tiny, quiet, folio):
    result = train(tiny(run_tag="<&>"), output=quiet)
    line = RunDirectory(result.run_dir).samples.read_text(encoding="utf-8").splitlines()[-1]
    sample = json.loads(line)["text"].strip()
    assert folio("report.py", "last", "--output", "run.svg").returncode == 0
    source = Path("run.svg").read_text(encoding="utf-8")
    words = " ".join(ElementTree.fromstring(source).itertext())
    for fact in (f"{result.best_val_loss:.4f}", "step", "loss", *sample.split()[:3]):
        assert fact in words
    assert source.count("<polyline") == 3
    assert "prefers-color-scheme: dark" in source
    assert "href" not in source
    done = folio("report.py", result.run_dir, _copy(result.run_dir), "--output", "runs.svg")
    assert (done.returncode, done.stdout) == (2, "")
    assert "runs.svg" in done.stderr


def _copy(run_dir: Path) -> Path:
    return Path(shutil.copytree(run_dir, "copy"))


def test_the_picture_in_the_docs_is_small():
    picture = CHECKOUT / "docs" / "images" / "default_run.svg"
    ElementTree.parse(picture)
    assert picture.stat().st_size < 150_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such run"),
        (["last"], "no run in runs"),
        ([], "no run in runs"),
        (["--output"], "--output"),
    ],
)
def test_a_missing_run_is_an_error_of_one_line(folio, arguments, words):
    done = folio("report.py", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_output_that_cannot_be_written_is_an_error_of_one_line(tiny, quiet, folio):
    train(tiny(), output=quiet)
    for place in ("no/such/directory/page.html", "."):
        done = folio("report.py", "--output", place)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"{place} cannot be written" in done.stderr


# Charts ----------------------------------------------------------------------------------------


def draw(lines, **options) -> str:
    size = {"width": WIDTH, "height": HEIGHT}
    chart = compute_chart(lines, title="Loss", x_label="step", **{**size, **options})
    return render("chart.svg.jinja", chart=chart).decode()


def chart(points, **options) -> ElementTree.Element:
    noisy = options.pop("noisy", False)
    return ElementTree.fromstring(draw([Line("a", points, 1, noisy=noisy)], **options))


def drawn(svg: ElementTree.Element) -> list[tuple[float, float]]:
    points = svg.find("polyline").get("points").split()
    return [tuple(map(float, point.split(","))) for point in points]


def test_x_grows_to_the_right_and_y_upwards():
    (x1, y1), (x2, y2), (x3, y3) = drawn(chart([(0, 1.0), (5, 2.0), (10, 3.0)]))
    assert x1 < x2 < x3
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 > y2 > y3  # SVG counts downwards


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis():
    (_, y1), (_, y2), (_, y3) = drawn(chart([(0, 1.0), (1, 2.0), (2, 4.0)], logarithmic=True))
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)


def test_a_long_noisy_line_is_drawn_as_means_in_a_band():
    svg = chart([(n, n % 2) for n in range(100_000)], noisy=True)
    points = drawn(svg)
    assert 100 < len(points) < 1000
    assert svg.find("polygon") is not None
    heights = [y for _, y in points[5:-5]]
    assert max(heights) - min(heights) < 2  # pixels, at the mean of zeros and ones


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)],
        [(1, 2.0), (2, 2.0)],
        [(0, 0.0), (1, 0.0)],
        [(1, float("nan")), (2, 1.0), (3, float("inf"))],
        [(1, 1e-9), (2, 1e9)],
        [(1, -3.0), (2, 5.0)],
    ],
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_numbers_give_coordinates_within_the_chart(points, logarithmic):
    line = Line("a", points, 1)
    mark = points[0] if points[0][1] < 1 else None
    svg = draw([line], mark=mark, logarithmic=logarithmic)
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()
    if "<svg" in svg:
        root = ElementTree.fromstring(svg)
        for x, y in drawn(root):
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_ticks_are_round_numbers():
    svg = chart([(0, 1.43), (2250, 4.31)], logarithmic=True)
    labels = [text.text for text in svg.findall("text")]
    assert "1.5" in labels
    assert "4" in labels
    assert "2,000" in labels
    assert len(labels) < 25


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("ratio", [1.001, 1.2, 1.49, 1.7, 2.2, 2.99, 3.1, 7, 40, 1e5])
@pytest.mark.parametrize("low", [0.31, 1.0, 1.43, 9.7, 17_300])
def test_an_axis_of_a_small_chart_has_several_ticks_which_all_differ(low, ratio, logarithmic):
    lines = [Line("a", [(1, low), (880, low * ratio)], 1)]
    size = {"width": 340, "height": 220}
    values = compute_chart(lines, title="a", x_label="step", logarithmic=logarithmic, **size)
    for ticks in (values["x_ticks"], values["y_ticks"]):
        labels = [label for _, label in ticks]
        assert 2 <= len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 5000, 10_000], ["0", "5k", "10k"]),
        ([0, 2500, 5000], ["0", "2,500", "5,000"]),
        ([0, 2.5e-4, 5e-4], ["0", "2.5e-4", "5e-4"]),
        ([0, 2e6, 20e6], ["0", "2M", "20M"]),
    ],
)
def test_the_ticks_of_an_axis_have_one_unit_and_are_exact(values, labels):
    assert _format_ticks(values) == labels


def test_an_axis_can_start_at_0():
    points = [(50, 16_000.0), (880, 17_000.0)]
    assert _list_labels(chart(points)).count("0") == 1  # of the steps
    assert _list_labels(chart(points, from_zero=True)).count("0") == 2


def _list_labels(svg: ElementTree.Element) -> list[str]:
    return [text.text for text in svg.findall("text")]


def test_a_mark_has_its_value_beside_it():
    points = [(1, 3.0), (2, 1.23456), (3, 2.0)]
    svg = chart(points, mark=points[1])
    (ring,) = [circle for circle in svg.findall("circle") if circle.get("class") == "mark"]
    (text,) = [text for text in svg.findall("text") if "1.2346" in text.text]
    assert abs(float(text.get("y")) - float(ring.get("cy"))) < 30


def test_lines_have_labels_at_their_ends_which_do_not_overlap():
    lines = [Line(f"run {n}", [(1, 3.0), (9, 2 + n / 100)], 1) for n in range(30)]
    svg = ElementTree.fromstring(draw(lines, labeled=True))
    labels = [text for text in svg.findall("text") if text.get("class") == "label"]
    assert sorted(text.text for text in labels) == sorted(line.label for line in lines)
    heights = sorted(float(text.get("y")) for text in labels)
    assert all(b - a >= 12 for a, b in pairwise(heights))
    height = float(svg.get("viewBox").split()[3])
    assert heights[0] > 0 and heights[-1] < height
    # The highest line has the highest label.
    assert min(labels, key=lambda text: float(text.get("y"))).text == "run 29"


# Machado, Oliveira, Fernandes 2009: full deficiency, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.072175],
        [0.0193339, 0.119192, 0.9503041],
    ]
)


def _to_linear(color: str) -> np.ndarray:
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _to_lab(linear: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ linear.clip(0, 1) / (TO_XYZ @ np.ones(3))
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colors_of_lines_differ_for_every_kind_of_color_vision(scheme, deficiency):
    style = (TEMPLATES / "chart.css").read_text(encoding="utf-8")
    part = style.partition("@media")[0 if scheme == "light" else 2]
    colors = dict(re.findall(r"--(line-[1-6]|card): (#\w{6})", part))
    card = (TO_XYZ @ _to_linear(colors.pop("card")))[1]
    assert len(colors) == COLORS
    for color in colors.values():
        luminance = (TO_XYZ @ _to_linear(color))[1]
        low, high = sorted((luminance, card))
        assert (high + 0.05) / (low + 0.05) >= 3  # WCAG's contrast for graphics
    seen = [_to_lab(DEFICIENCIES[deficiency] @ _to_linear(color)) for color in colors.values()]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 25  # CIELAB


# Files that cost much -----------------------------------------------------------------------------


def test_a_long_metrics_file_is_thinned_but_for_its_evaluations_and_its_end(
    tiny, quiet, monkeypatch
):
    result = train(tiny(), output=quiet)
    evaluations = sum(VAL in line for line in LoggedRun(result.run_dir).metrics)
    with open(RunDirectory(result.run_dir).metrics, "a", encoding="utf-8") as file:
        for step in range(7, 5_000):
            file.write(json.dumps({"step": step, STEP_LOSS: 1.0, "seconds": step}) + "\n")
    monkeypatch.setattr(runs, "MAX_LINES", 100)
    run = LoggedRun(result.run_dir)
    assert 100 <= len(run.metrics) < 300
    assert run.last_step == run.get_points(STEP_LOSS)[-1][0] == 4_999
    assert sum(VAL in line for line in run.metrics) == evaluations


@pytest.mark.parametrize("name", ["metrics", "samples", "console"])
def test_memory_for_a_file_without_line_ends_is_bounded(tiny, quiet, name):
    result = train(tiny(), output=quiet)
    os.truncate(getattr(RunDirectory(result.run_dir), name), 1 << 28)  # sparse
    tracemalloc.start()
    try:
        LoggedRun(result.run_dir)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *(("meta/full_config.json", 2), ("meta/git.txt", 0), ("meta/env.txt", 0)),
        *(("meta/result.json", 0), ("logs/metrics.jsonl", 0), ("logs/samples.jsonl", 0)),
    ],
)
def test_a_pipe_in_the_place_of_a_file_of_a_run_does_not_block(tiny, quiet, folio, name, status):
    path = train(tiny(), output=quiet).run_dir / name
    path.unlink()
    os.mkfifo(path)
    done = folio("report.py", timeout=60)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert (path.name in done.stderr) == (status != 0)
