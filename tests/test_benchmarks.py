"""benchmarks/: the benchmarks behind the README's figures run.

python -m pytest tests/test_benchmarks.py
"""

import json
import re
import sys

import pytest
from helpers import CHECKOUT, LINES, TINY_FLAGS

import benchmarks.logging_cost
from benchmarks import (
    corpus,
    encoding,
    exports,
    generation,
    gpu,
    processes,
    saving,
    startup,
    time_to_loss,
)
from trainer import train

LEADERBOARD_COLUMNS = "seconds loss recipe what date commit machine".split()


def test_logging_cost_is_measured(tiny, text_file, monkeypatch, capsys):
    pytest.importorskip("aim")
    monkeypatch.setattr(benchmarks.logging_cost, "LOGGED_STEPS", 5)
    monkeypatch.setattr(benchmarks.logging_cost, "TIMED_STEPS", 8)
    monkeypatch.setattr(benchmarks.logging_cost, "ModelConfig", tiny)
    benchmarks.logging_cost.run(str(text_file))
    printed = capsys.readouterr().out
    for name in ("a step", "TensorBoard:", "TensorBoard and Aim:", "a sample", "the report"):
        assert re.search(rf"{name}.* ms", printed), name


@pytest.fixture
def timed(text_file, tmp_path, monkeypatch):
    """Return a function that runs the benchmark on a tiny preset: exit status, leaderboard."""
    recipe = tmp_path / "tiny.yaml"
    settings = [flag[2:].replace("-", "_").replace("=", ": ") for flag in TINY_FLAGS]
    recipe.write_text("\n".join(settings) + "\n", encoding="utf-8")
    leaderboard = tmp_path / "LEADERBOARD.md"
    leaderboard.write_text("| seconds |\n|---|\n", encoding="utf-8")
    monkeypatch.setattr(time_to_loss, "LEADERBOARD", leaderboard)
    monkeypatch.setattr(time_to_loss, "get_commit", lambda: "0123abc")

    def run(*flags: str) -> tuple[int, str]:
        arguments = ["--data", str(text_file), "--config", str(recipe), *flags]
        return time_to_loss.main(arguments), leaderboard.read_text(encoding="utf-8")

    return run


@pytest.mark.slow
def test_exports_are_compared_by_loss_text_and_speed(tiny, quiet, monkeypatch, capsys):
    run = train(tiny(), output=quiet).run_dir
    monkeypatch.setattr(exports, "EXPORTS", [("hf", "fp32"), ("gguf", "fp16")])
    monkeypatch.setattr(exports, "ROUNDS", 1)
    exports.main([str(run)])
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"val loss (\d\.\d+)", printed)]
    assert len(losses) == 3 and max(losses) - min(losses) < 0.01
    assert len(re.findall(r"tokens/s", printed)) == 4


@pytest.mark.slow
def test_time_to_loss_runs_every_seed_and_records_the_median_on_request(timed, capsys):
    flags = ("--", "--max-iters", "3")
    status, leaderboard = timed("--target=9", "--seeds=2", "--record", "a first row", *flags)
    assert status == 0
    *lines, median = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["seed 101", "seed 102"]
    for line in lines:
        for fact in ("3 steps", "192 tokens", "val loss 3.", "fp32", "torch.compile off"):
            assert fact in line
    assert re.search(r"\d+\.\d seconds.* 3\.\d{4} .*9", median)
    *before, row = leaderboard.splitlines()
    assert before == ["| seconds |", "|---|"]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert re.fullmatch(r"\d+\.\d s \(\d+\.\d to \d+\.\d\)", cells[0])
    assert cells[2:4] == ["`tiny --max-iters 3`", "a first row"]
    assert len(cells) == len(LEADERBOARD_COLUMNS)


def test_a_row_needs_a_clean_checkout(timed, monkeypatch, capsys):
    monkeypatch.setattr(time_to_loss, "get_commit", lambda: "0123abc-dirty")
    with pytest.raises(SystemExit):
        timed("--record", "who knows")
    assert "--record" in capsys.readouterr().err


@pytest.mark.slow
def test_a_loss_above_the_target_exits_with_1_and_adds_no_row(timed, capsys):
    status, leaderboard = timed("--target=0.1", "--record", "too good to be true")
    assert status == 1
    assert "target" in capsys.readouterr().out
    assert len(leaderboard.splitlines()) == 2


def test_a_failed_training_prints_the_message_of_train(timed):
    with pytest.raises(SystemExit, match="n_embd 15 "):
        timed("--", "--n-embd", "15")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "is_reached"), [("9", True), ("0.1", False)])
def test_the_gpu_benchmark_measures_a_whole_training(text_file, capsys, target, is_reached):
    preset = text_file.with_suffix(".yaml")
    settings = [flag[2:].replace("-", "_").replace("=", ": ") for flag in TINY_FLAGS]
    preset.write_text("\n".join(settings) + "\n", encoding="utf-8")
    words = ["--data", str(text_file), "--presets", str(preset), "--target", target]
    assert gpu.main([*words, "--decode=8", "--", "--max-iters=6"]) == 0
    facts, generation = map(json.loads, capsys.readouterr().out.splitlines())
    assert generation["engine"] in ("torch", "numba") and generation["tokens_per_second"] > 0
    assert facts["device"].startswith("CPU") and facts["steps"] == 6
    assert 2 < facts["best_val_loss"] < 4 and facts["peak_memory"] > 1e6
    assert facts["steps_per_second"] > 0 and facts["tokens_per_second"] > 0
    seconds = facts[f"seconds_to_{target}"]
    assert (0 < seconds < facts["seconds"]) if is_reached else seconds is None


@pytest.fixture
def llama2c(tmp_path) -> str:
    """A program that prints what llama2.c does, if the files have the sizes that it expects."""
    program = tmp_path / "run"
    program.write_text(
        f"""#!{sys.executable}
import struct, sys
C, F, L, H, _, V, T = struct.unpack("7i", open(sys.argv[1], "rb").read(28))
weights = 2 * -V * C + L * (4 * C * C + 3 * C * F + 2 * C) + C + T * C // H
assert V < 0 and len(open(sys.argv[1], "rb").read()) == 28 + 4 * weights
print("achieved tok/s: 1000.000000", file=sys.stderr)
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.slow
def test_generation_speed_is_measured(monkeypatch, capsys, llama2c):
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 16}
    monkeypatch.setattr(generation, "SHAPES", {"tiny": shape, "default": {}})
    small = {"ROUNDS": 1, "SECONDS": 0.01, "LLAMA2C_RUNS": 2, "SIDE_BY_SIDE": 3, "LONG": 50}
    for name, value in small.items():
        monkeypatch.setattr(generation, name, value)
    generation.run(None, llama2c)
    printed = capsys.readouterr().out
    for pattern in (
        r"numba: [\d,]+ tokens/s",
        r"numba, int8: [\d,]+ tokens/s",
        r"llama2\.c, threads: 1: 1,000 tokens/s",
        r"numba / llama2\.c: \d+\.\d\d",
        r"3 texts by numba / one by torch: \d+\.\d",
        r"\b50 .*: ([\d,]+(, )?){10}",
        r"busy loop [\d,]+: \d\.\d\d",
        r"very first start \d+\.\d s, later \d\.\d\d s",
    ):
        assert re.search(pattern, printed), pattern


@pytest.mark.slow
def test_the_cost_of_a_large_corpus_is_measured(monkeypatch, capsys):
    for name, value in {"BYTES": 3_000_000, "SMALL_BYTES": 200_000, "REPEATS": 1}.items():
        monkeypatch.setattr(corpus, name, value)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    corpus.run(None)
    printed = capsys.readouterr().out
    for pattern in (
        r"0\.003 GB encoded in \d+\.\d s: \d+ MB/s.*; at most \d+ MB in memory",
        r"the first step: after \d+\.\d\d s on 1 MB, and after \d+\.\d\d s on it",
        r"anonymous memory of training: [+-]\d+\.\d MB over that on 1 MB",
    ):
        assert re.search(pattern, printed), pattern


@pytest.mark.slow
def test_start_up_encoding_and_saving_are_measured(tiny, text_file, monkeypatch, capsys):
    for module in (startup, encoding):
        monkeypatch.setattr(module, "REPEATS", 1)
    monkeypatch.setattr(encoding, "load_sample_corpus", lambda: LINES)
    monkeypatch.setattr(saving, "ModelConfig", tiny)
    monkeypatch.setattr(saving, "_measure_memory", str)  # in a process of its own
    for module in (startup, encoding, saving):
        module.run(str(text_file))
    printed = capsys.readouterr().out
    for pattern in (
        r"--help +\d+\.\d\d s, at most",
        r"encode +\d+ MB/s",
        r"decode +\d+ MB/s",
        r"\d+ saves of \d+ ms, every \d+ steps: \d+\.\d\d % of a run",
    ):
        assert re.search(pattern, printed), pattern


@pytest.mark.slow
def test_the_memory_of_saving_is_measured(text_file):
    assert re.search(r"57 M parameters: .* s; .* grew by ", saving._measure_memory(str(text_file)))


@pytest.mark.slow
def test_weak_scaling_is_measured(text_file, monkeypatch, capsys):
    for name, value in {"TURNS": 1, "STEPS": 6, "INTERVAL": 2}.items():
        monkeypatch.setattr(processes, name, value)
    processes.run(str(text_file))
    printed = capsys.readouterr().out
    for pattern in (r"one process: \d+\.\d ms", r"ddp: \d+\.\d ms", r"fsdp: \d+\.\d ms"):
        assert re.search(pattern, printed), pattern
