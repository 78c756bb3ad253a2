"""benchmarks/: what the README's figures come from still runs.

python -m pytest tests/test_benchmarks.py
"""

import pytest

import benchmarks.logging_cost


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
