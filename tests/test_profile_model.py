"""profile_model.py and utils/profiling.py: the time of a step, measured truthfully.

python -m pytest tests/test_profile_model.py
"""

import json
import traceback
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY_FLAGS

import trainer as trainer_module
from config import ConfigLoader
from data import load_dataset
from inference import load_model
from model import GatedMLP
from profile_model import profile
from resume import plan_run
from trainer import PHASES, train
from utils import profiling
from utils.kernels import apply_causal_attention
from utils.profiling import get_category, measure_phases
from utils.tracking.run_logger import RunLogger


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch):
    """Measure the peak in an instant, which is long enough for tests."""
    monkeypatch.setattr(profiling, "PEAK_SIZES", (256,))


@pytest.fixture
def small(tiny):
    """A model so large that Python's own time between the phases is small."""
    return tiny(n_embd=64, block_size=64, batch_size=8, micro_batch_size=4)


def test_the_phases_of_a_step_sum_to_the_step(small):
    (section,) = profile(small, steps=20).sections
    assert [phase.name for phase in section.phases] == [*PHASES, "logging"]
    assert sum(phase.share for phase in section.phases) == pytest.approx(1, abs=0.05)
    for phase in section.phases:
        assert phase.low <= phase.median <= phase.high


def test_the_logger_fetches_its_numbers_within_the_timed_steps_of_both_kinds(small, monkeypatch):
    callers, flush_steps = [], RunLogger.flush_steps

    def flush(log):
        callers.append({frame.name for frame in traceback.extract_stack()})
        flush_steps(log)

    monkeypatch.setattr(RunLogger, "flush_steps", flush)
    profile(small.model_copy(update={"log_interval": 10}), steps=20)
    for function in ("measure_seconds", "measure_phases"):
        assert sum(function in names for names in callers) >= 2


def test_the_measured_step_is_the_trainers_own(small, monkeypatch):
    calls, training_step = [], trainer_module.Trainer.training_step

    def counted(setup, number, *phase):
        calls.append(number)
        return training_step(setup, number, *phase)

    monkeypatch.setattr(trainer_module.Trainer, "training_step", counted)
    profile(small, steps=3)
    # First call, FLOP count, warmup, whole, phase by phase, traced.
    assert len(calls) == 1 + 1 + profiling.WARMUP + 3 + 3 + profiling.TRACED


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_the_flops_are_those_of_the_textbook(tiny, architecture, batches, precision):
    """2 forward and 4 backward for each weight and token, and the two products of attention."""
    changes = {"architecture": architecture, "optimizer": "adamw", "precision": precision}
    config = tiny(batch_size=4, micro_batch_size=4 // batches, **changes)
    (section,) = profile(config, steps=2).sections
    B, T, C, L = 4, config.block_size, config.n_embd, config.n_layer
    V = load_dataset(config).tokenizer.vocab_size
    mlp = 8 * C * C if architecture == "gpt2" else 3 * C * GatedMLP(config).gate.out_features
    weights = L * (4 * C * C + mlp) + V * C
    assert section.flops == 6 * B * T * weights + 3 * L * 4 * B * T * T * C


def test_the_products_in_blocks_of_attention_are_counted():
    """Of 200 positions, 128 have a product with 128 keys, and 72 with 200."""
    B, H, T, D = 2, 3, 200, 16
    products = B * H * (128 * 128 + 72 * 200) * 2 * D
    q, k, v = torch.randn((3, B, H, T, D)).bfloat16()

    def attend(_):
        apply_causal_attention(q.requires_grad_(), k, v, 0.0).sum().backward()

    assert profiling.count_flops(attend) == (2 + 4) * products


def test_the_flops_of_muon_are_counted_too(tiny):
    """Five iterations of X X', A A and B X, for matrices with at most as many rows as columns."""
    plain, muon = (
        profile(tiny(optimizer=optimizer), steps=2).sections[0].flops
        for optimizer in ("adamw", "muon")
    )
    C, L = tiny().n_embd, tiny().n_layer
    shapes = [(C, C)] * 4 + [(C, GatedMLP(tiny()).gate.out_features)] * 3
    assert muon - plain == L * sum(5 * 2 * (2 * r * r * c + r**3) for r, c in shapes)


def test_every_category_of_operators_has_a_share(small):
    (section,) = profile(small, steps=2).sections
    shares = {category.name: category.share for category in section.categories}
    expected = {"optimizer", "gradient clipping", "data"} | {
        f"{layer} {direction}"
        for layer in ("linear", "attention", "norm")
        for direction in ("forward", "backward")
    }
    assert expected <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["linear backward"] > shares["loss backward"]
    names = [operator.name for operator in section.operators]
    assert "aten::mm" in names
    assert len(names) == profiling.TOP


@pytest.mark.parametrize(
    ("callers", "category"),
    [
        (["aten::mul", "backward", "evaluate_function: MulBackward0"], "element-wise backward"),
        (["aten::add", "forward"], "element-wise forward"),
        (["aten::copy_", "aten::_to_copy", "aten::to", "forward"], "copy forward"),
        (["aten::cat", "backward"], "copy backward"),
        (["aten::mul", "FusedRMSNorm", "forward"], "norm forward"),
        (["aten::copy_", "aten::linear", "forward"], "linear forward"),
        (["aten::mul_", "optimizer"], "optimizer"),
        (["forward"], "other"),
    ],
)
def test_an_operator_has_the_category_of_its_name_or_of_its_callers(callers, category):
    event = None
    for name in reversed(callers):
        event = SimpleNamespace(name=name, cpu_parent=event)
    assert get_category(event) == category


def test_periodic_work_is_shown_with_its_share_of_a_run(small):
    config = small.model_copy(update={"sample_interval": 0})
    report = profile(config, steps=2)
    periodic = {work.name: work for work in report.periodic}
    assert periodic.keys() == {"evaluation", "checkpoint", "histograms", "sample"}
    assert periodic["evaluation"].interval == config.eval_interval
    assert all(work.seconds > 0 for work in periodic.values())
    assert periodic["sample"].share == 0
    per_step = {work.name: work.seconds / (work.interval or 1e99) for work in report.periodic}
    total = report.sections[0].timing.median + sum(per_step.values())
    for work in report.periodic:
        assert work.share == pytest.approx(per_step[work.name] / total)


def test_prefill_and_decode_are_separate_sections(small):
    prefill, decode = profile(small, steps=3, inference=True).sections
    assert (prefill.tokens, decode.tokens) == (small.block_size, 1)
    assert prefill.tokens_per_second > decode.tokens_per_second
    assert prefill.flops > 0
    assert any("attention" in operator.name for operator in prefill.categories)
    for section in (prefill, decode):
        names = {operator.name for operator in section.categories}
        assert not any("backward" in name or "loss" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("aim_logging", [False, True])
def test_a_profile_leaves_no_files(small, tmp_path, aim_logging):
    if aim_logging:
        pytest.importorskip("aim")
    profile(small.model_copy(update={"aim_logging": aim_logging}), steps=2)
    assert list((tmp_path / "cwd").iterdir()) == []


def test_the_vocabulary_is_that_of_the_model_to_fine_tune(tiny, quiet, tmp_path):
    train(tiny(model_name="dante"), output=quiet)
    few = tmp_path / "few.txt"
    few.write_text("to be or not to be " * 100, encoding="utf-8")
    loaded, plan = plan_run(ConfigLoader({"init_from": "dante", "data": str(few), "device": "cpu"}))
    report = profile(loaded.config, 2, plan=plan)
    assert report.parameters == load_model("dante")[0].count_parameters()


def test_a_repeated_phase_is_added_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("utils.profiling.time.perf_counter", lambda: now[0])

    def work(phase):
        for _ in range(2):
            with phase("data"):
                now[0] += 1
            with phase("forward"):
                now[0] += 3
        now[0] += 2

    seconds = measure_phases(torch.device("cpu"), work)
    assert seconds == {"data": 2, "forward": 6, "step": 10}


def test_the_tables_and_the_json_have_the_same_numbers(small):
    report = profile(small, steps=3)
    values, text = json.loads(report.format_json()), report.format_tables()
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


@pytest.mark.slow
def test_the_command_prints_tables_and_takes_all_settings(folio, text_file):
    done = folio("profile_model.py", "--data", text_file, *TINY_FLAGS, "--steps", "3")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (*PHASES, "% of the peak", "aten::"):
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
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"forward", "backward", "optimizer", "aten::mm"} <= names
    flags = ["--no-compile", "--json", "--steps=2", "--inference"]
    done = folio("profile_model.py", "--data", text_file, *TINY_FLAGS, *flags)
    assert json.loads(done.stdout)["torch_compile"] == "off"


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--steps", "1"], ["--steps", "2 to 100000", "got 1"]),
        (["--steps", "many"], ["--steps", "got many"]),
        (["--chrome-trace", "no/such/place.json"], ["--chrome-trace no/such/place.json"]),
        (["--chrome-trace", "long" * 99 + "/place.json"], ["--chrome-trace long"]),
        (["--n-head", "3"], ["n_head 3"]),
        (["--device", "cuda:9"], ["--device cuda:9"]),
    ],
)
def test_a_mistake_is_one_line(folio, text_file, flags, facts):
    done = folio("profile_model.py", "--data", text_file, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert all(fact in done.stderr for fact in facts)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("eval_interval", "sample_interval", "period"),
    [(88, 1, 88), (100, 150, 200), (100, 100, 100), (0, 1, 0), (88, 0, 0)],
)
def test_samples_are_made_at_evaluations_so_many_steps_apart(
    tiny, eval_interval, sample_interval, period
):
    config = tiny(eval_interval=eval_interval, sample_interval=sample_interval)
    assert profiling.get_sample_period(config) == period
