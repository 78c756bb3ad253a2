"""benchmarks/: what the README's figures come from still runs.

python -m pytest tests/test_benchmarks.py
"""

import re

import pytest
from conftest import CHECKOUT, TINY_FLAGS

import benchmarks.logging_cost
from benchmarks import corpus, generation, time_to_loss

LEADERBOARD_COLUMNS = "seconds loss recipe what date commit machine".split()


def test_the_cost_of_the_record_is_measured(tiny, text_file, monkeypatch, capsys):
    pytest.importorskip("aim")
    monkeypatch.setattr(benchmarks.logging_cost, "STEPS", 5)
    monkeypatch.setattr(benchmarks.logging_cost, "BLOCK", 8)
    monkeypatch.setattr(benchmarks.logging_cost, "ModelConfig", tiny)
    benchmarks.logging_cost.run(str(text_file))
    told = capsys.readouterr().out
    for words in (
        "ms without a log",
        "TensorBoard:",
        "TensorBoard and Aim:",
        "the page at the end",
    ):
        assert words in told


@pytest.fixture
def timed(text_file, tmp_path, monkeypatch):
    """Call the benchmark with a recipe that takes a second; returns its status and leaderboard."""
    recipe = tmp_path / "tiny.yaml"
    settings = [flag[2:].replace("-", "_").replace("=", ": ") for flag in TINY_FLAGS]
    recipe.write_text("\n".join(settings) + "\n", encoding="utf-8")
    leaderboard = tmp_path / "LEADERBOARD.md"
    leaderboard.write_text("| seconds |\n|---|\n", encoding="utf-8")
    monkeypatch.setattr(time_to_loss, "LEADERBOARD", leaderboard)
    monkeypatch.setattr(time_to_loss, "current_commit", lambda: "0123abc")

    def run(*flags: str) -> tuple[int, str]:
        arguments = ["--data", str(text_file), "--config", str(recipe), *flags]
        return time_to_loss.main(arguments), leaderboard.read_text(encoding="utf-8")

    return run


def test_the_time_to_a_loss_is_that_of_whole_processes_and_recorded_on_request(timed, capsys):
    status, leaderboard = timed("--target=9", "--seeds=2", "--record", "a first row")
    assert status == 0
    *lines, median = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["seed 101", "seed 102"]
    for line in lines:
        for words in ("seconds, 4 steps, 256 tokens, val loss 3.", "fp32, torch.compile off"):
            assert words in line
    assert re.fullmatch(r"median: \d+\.\d seconds, val loss 3\.\d{4} \(target 9\)", median)
    *before, row = leaderboard.splitlines()
    assert before == ["| seconds |", "|---|"]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert re.fullmatch(r"\d+\.\d s \(\d+\.\d to \d+\.\d\)", cells[0])
    assert cells[2:4] == ["`tiny`", "a first row"]
    assert len(cells) == len(LEADERBOARD_COLUMNS)


def test_a_row_belongs_to_a_commit(timed, monkeypatch, capsys):
    monkeypatch.setattr(time_to_loss, "current_commit", lambda: "0123abc-dirty")
    with pytest.raises(SystemExit):
        timed("--record", "who knows")
    assert "--record is for what is committed" in capsys.readouterr().err


def test_a_loss_above_the_target_is_a_failure_and_no_row(timed, capsys):
    status, leaderboard = timed("--target=0.1", "--record", "too good to be true")
    assert status == 1
    assert "the target was not reached" in capsys.readouterr().out
    assert len(leaderboard.splitlines()) == 2


def test_a_recipe_that_fails_says_what_train_said(timed):
    with pytest.raises(SystemExit, match="n_embd 15 is not divisible by n_head 2"):
        timed("--", "--n-embd", "15")


def test_how_fast_models_generate_is_measured(monkeypatch, capsys):
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8}
    monkeypatch.setattr(generation, "SHAPES", {"tiny": shape, "": shape})
    small = {"REPEATS": 1, "SECONDS": 0.01, "COMPILE": "off", "SIDE_BY_SIDE": 3, "LONG": 50}
    for name, value in small.items():
        monkeypatch.setattr(generation, name, value)
    generation.run(None)
    told = capsys.readouterr().out
    for words in (
        r"one text, fp32, plain: [\d,]+ characters/s; reading its 0\.0 MB of weights",
        r"one text, int8, plain: ",
        r"3 texts, fp32, plain: [\d,]+ characters/s, \d+\.\d times one by the plain path",
        r"50 characters of the default model, plain, each tenth: ([\d,]+(, )?){10} characters/s",
        r"the first character of the default model, from the shell: \d\.\d\d s",
    ):
        assert re.search(words, told), words


@pytest.mark.slow
def test_what_a_large_text_costs_is_measured(monkeypatch, capsys):
    for name, value in {"BYTES": 3_000_000, "SMALL_BYTES": 200_000, "REPEATS": 1}.items():
        monkeypatch.setattr(corpus, name, value)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    corpus.run(None)
    told = capsys.readouterr().out
    for words in (
        r"0\.003 GB encoded in \d+\.\d s: \d+ MB/s, at most \d+ MB in memory",
        r"the first step: after \d+\.\d\d s on 1 MB, and after \d+\.\d\d s on it",
        r"anonymous memory of training: [+-]\d+\.\d MB over that on 1 MB",
    ):
        assert re.search(words, told), words
