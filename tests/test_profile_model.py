"""profile_model.py: where the time goes, told truthfully.

python -m pytest tests/test_profile_model.py
"""

import json
import traceback

import pytest
import torch
from helpers import TINY_FLAGS

import profile_model
import trainer as trainer_module
from checkpoint import load_model
from config import ConfigLoader
from model import compute_gated_width
from profile_model import Stopwatch, as_json, described, profile_inference, profile_training
from resume import plan_run
from trainer import PHASES, train
from utils.tracking.run_log import RunLogger


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch):
    """The peak is measured in a moment, which is long enough for tests."""
    monkeypatch.setattr(profile_model, "PEAK_SIZES", (256,))


@pytest.fixture
def small(tiny):
    """Large enough that Python's own time between the parts is small."""
    return tiny(n_embd=64, block_size=64, batch_size=8, micro_batch_size=4)


def test_the_parts_of_a_step_sum_to_the_step(small):
    report = profile_training(small, steps=20)
    (section,) = report.sections
    assert [phase.name for phase in section.phases] == [*PHASES, "logging"]
    assert sum(phase.share for phase in section.phases) == pytest.approx(1, abs=0.05)
    for phase in section.phases:
        assert phase.low <= phase.median <= phase.high


def test_the_fetch_of_many_steps_numbers_is_within_the_steps_that_are_timed(small, monkeypatch):
    fetched, real = [], RunLogger.fetch

    def fetch(log):
        caller = [frame.name for frame in traceback.extract_stack()]
        fetched.append("_seconds" in caller)
        real(log)

    monkeypatch.setattr(RunLogger, "flush_steps", fetch)
    profile_training(small.model_copy(update={"log_interval": 10}), steps=20)
    as_it_is, phase_by_phase = fetched.count(True), fetched.count(False)
    assert as_it_is >= 2
    assert phase_by_phase >= 2


def test_it_is_the_real_step_that_is_measured(small, monkeypatch):
    """The function of step.py itself; the gradient it leaves is that of a training step."""
    assert profile_model.training_step is trainer_module.Trainer.training_step
    calls = []
    real = trainer_module.Trainer.training_step

    def counted(setup, number, *phase):
        calls.append(number)
        return real(setup, number, *phase)

    monkeypatch.setattr(profile_model, "training_step", counted)
    profile_training(small, steps=3)
    # The first call, warm-up, as it is, part by part, under the profiler, for the count.
    assert len(calls) == 1 + profile_model.WARM_UP + 3 + 3 + profile_model.TRACED + 1


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_the_operations_are_those_of_the_textbook(tiny, architecture, batches):
    """2 for each weight and token forward and 4 backward; and the two products of attention."""
    own = {"architecture": architecture, "optimizer": "adamw"}
    config = tiny(batch_size=4, micro_batch_size=4 // batches, **own)
    (section,) = profile_training(config, steps=2).sections
    B, T, C, L = 4, config.block_size, config.n_embd, config.n_layer
    V = profile_model.load_data(config).tokenizer.vocab_size
    mlp = 8 * C * C if architecture == "gpt2" else 3 * C * compute_gated_width(C)
    weights = L * (4 * C * C + mlp) + V * C
    assert section.flops == 6 * B * T * weights + 3 * L * 4 * B * T * T * C


def test_the_operations_of_muon_are_counted_too(tiny):
    """Five times X X', A A and B X, of matrices with fewer rows than columns."""
    plain, muon = (
        profile_training(tiny(optimizer=optimizer), steps=2).sections[0].flops
        for optimizer in ("adamw", "muon")
    )
    C, L = tiny().n_embd, tiny().n_layer
    shapes = [(C, C)] * 4 + [(C, compute_gated_width(C))] * 3
    assert muon - plain == L * sum(5 * 2 * (2 * r * r * c + r**3) for r, c in shapes)


def test_every_kind_of_operator_that_people_look_for_has_a_share(small):
    (section,) = profile_training(small, steps=2).sections
    kinds = {operator.name: operator.share for operator in section.categories}
    wanted = {
        f"{what} {way}" for what in ("linear", "attention") for way in ("forward", "backward")
    }
    assert (
        wanted | {"norm forward", "norm backward", "optimizer", "gradient clipping", "data"}
        <= kinds.keys()
    )
    assert sum(kinds.values()) == pytest.approx(1)
    assert kinds["linear backward"] > kinds["loss backward"]
    names = [operator.name for operator in section.operators]
    assert "aten::mm" in names
    assert len(names) == profile_model.TOP


def test_what_stands_between_steps_is_shown_with_its_share_of_a_run(small):
    config = small.model_copy(update={"sample_interval": 0})
    between = {each.name: each for each in profile_training(config, steps=2).periodic}
    assert between.keys() == {"evaluation", "checkpoint", "histograms", "sample"}
    assert between["evaluation"].interval == config.eval_interval
    assert all(each.seconds > 0 for each in between.values())
    assert 0 < sum(each.share for each in between.values()) < 1
    per_step = {each.name: each.seconds / (each.interval or 1e9) for each in between.values()}
    step = per_step["evaluation"] / between["evaluation"].share - sum(per_step.values())
    assert step > 0, "what is left of a run is its steps"
    assert between["sample"].share == 0


def test_prefill_and_decode_are_measured_apart(small):
    prefill, decode = profile_inference(small, steps=3).sections
    assert (prefill.tokens, decode.tokens) == (small.block_size, 1)
    assert prefill.tokens_per_second > decode.tokens_per_second
    assert prefill.flops > 0
    assert any("attention" in operator.name for operator in prefill.categories)
    for section in (prefill, decode):
        names = {operator.name for operator in section.categories}
        assert not any("backward" in name or "loss" in name for name in names)


def test_profiling_leaves_nothing_behind(small, tmp_path):
    profile_training(small, steps=2)
    assert list((tmp_path / "cwd").iterdir()) == []


def test_aim_hears_nothing_of_a_profile(small, tmp_path):
    pytest.importorskip("aim")
    profile_training(small.model_copy(update={"aim_logging": True}), steps=2)
    assert list((tmp_path / "cwd").iterdir()) == []


def test_the_vocabulary_is_that_of_the_model_that_a_run_would_begin_with(tiny, quiet, tmp_path):
    train(tiny(model_name="dante"), output=quiet)
    few = tmp_path / "few.txt"
    few.write_text("to be or not to be " * 100, encoding="utf-8")
    loaded, plan = plan_run(ConfigLoader({"init_from": "dante", "data": str(few), "device": "cpu"}))
    parent = load_model("dante")[0]
    report = profile_training(loaded.config, 2, plan=plan)
    assert report.parameters == parent.num_parameters()


def test_the_stopwatch_adds_up_a_part_that_comes_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("profile_model.time.perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.step():
            for _ in range(2):
                with watch.phase("data"):
                    now[0] += 1
                with watch.phase("forward"):
                    now[0] += 3
            now[0] += 2
    data, forward = watch.timings()
    assert (data.name, data.median, data.share) == ("data", 2, 0.2)
    assert (forward.name, forward.median, forward.share) == ("forward", 6, 0.6)


def test_the_report_for_people_and_for_programs_says_the_same(small):
    report = profile_training(small, steps=3)
    values = json.loads(as_json(report))
    text = described(report)
    (section,) = values["sections"]
    assert values["parameters"] == report.parameters
    assert f"{report.parameters:,} parameters" in text
    assert f"{section['tokens_per_second']:,.0f} tokens/s" in text
    assert f"{section['share_of_peak'] * 100:.0f} % of the peak" in text
    assert section["flops_per_second"] == pytest.approx(
        section["flops"] / section["timing"]["median"]
    )
    assert values["peak_flops_per_second"] > 0
    assert values["peak_memory"] > 1_000_000


def test_the_command_prints_a_table_and_takes_all_settings(folio, text_file):
    done = folio("profile_model.py", "--data", text_file, *TINY_FLAGS, "--steps", "3")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (
        "forward",
        "backward",
        "optimizer",
        "gradient clipping",
        "% of the peak",
        "aten::",
    ):
        assert word in done.stdout


@pytest.mark.slow
def test_the_command_writes_json_and_a_trace(folio, text_file, tmp_path):
    flags = ["--steps=3", "--json", "--chrome-trace", tmp_path / "trace.json", "--compile"]
    flags += ["--compile-backend=aot_eager"]
    done = folio("profile_model.py", "--data", text_file, *TINY_FLAGS, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads(done.stdout)
    assert values["torch_compile"] == "aot_eager"
    assert values["sections"][0]["flops"] > 0
    names = {
        event.get("name")
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    assert {"forward", "backward", "optimizer", "aten::mm"} <= names
    done = folio("profile_model.py", "--data", text_file, *TINY_FLAGS, "--no-compile", "--json",
                 "--steps=2", "--inference")  # fmt: skip
    assert json.loads(done.stdout)["torch_compile"] == "off"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "1"], "--steps must be a whole number from 2 to 100000, got 1"),
        (["--steps", "many"], "got many"),
        (
            ["--chrome-trace", "no/such/place.json"],
            "--chrome-trace no/such/place.json is not a file",
        ),
        (["--n-head", "3"], "not divisible"),
        (["--device", "cuda:9"], "CUDA"),
    ],
)
def test_a_mistake_is_one_line(folio, text_file, flags, words):
    done = folio("profile_model.py", "--data", text_file, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
