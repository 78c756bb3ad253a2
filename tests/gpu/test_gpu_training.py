"""Training on CUDA: precision, torch.compile, bitwise resume, memory, devices, logs.

python -m pytest -m gpu tests/gpu/test_gpu_training.py
"""

import contextlib
import gc
import json
import math
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch
from helpers import TINY_FLAGS, loaded_step, train_until
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import budget
import profile_model
import train
from bundle import list_runs
from config import ConfigLoader
from model import LanguageModel
from resume import plan_run
from trainer import open_device, prepare_trainer
from utils.device import choose_device, get_peak_memory
from utils.output import format_bytes, run_command

pytestmark = pytest.mark.gpu

N = 4  # steps before a resume
MODERN = {"architecture": "modern", "optimizer": "muon", "activation": "silu"}
GPT2 = {"architecture": "gpt2", "optimizer": "adamw", "bias": True}
SPEEDRUN = {**MODERN, "architecture": "speedrun"}
COMPILED = {"torch_compile": "on", "compile_backend": "inductor"}
KINDS = {
    "modern, fp32": {**MODERN, "precision": "fp32"},
    "modern, bf16": {**MODERN, "precision": "bf16"},
    "modern, fp16": {**MODERN, "precision": "fp16"},
    "gpt2, fp32": {**GPT2, "precision": "fp32"},
    "gpt2, bf16": {**GPT2, "precision": "bf16"},
    "gpt2, fp16": {**GPT2, "precision": "fp16"},
    "modern, bf16, compiled": {**MODERN, "precision": "bf16", **COMPILED},
    "modern, fp16, compiled": {**MODERN, "precision": "fp16", **COMPILED},
    "speedrun, bf16": {**SPEEDRUN, "precision": "bf16"},
    "speedrun, bf16, compiled": {**SPEEDRUN, "precision": "bf16", **COMPILED},
    "gpt2, fp32, compiled": {**GPT2, "precision": "fp32", **COMPILED},
    "gpt2, bf16, compiled": {**GPT2, "precision": "bf16", **COMPILED},
}
for_each_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
LOSS_TOLERANCE = {"fp32": 2e-3, "bf16": 3e-2, "fp16": 2e-2}  # nats, in the first steps


def read_rows(run: Path) -> list[dict]:
    text = (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_steps(run: Path) -> list[dict]:
    """Return the row of each training step."""
    return [row for row in read_rows(run) if "loss/train" in row]


def read_losses(run: Path) -> list[float]:
    """Return the training loss of each step."""
    return [row["loss/train"] for row in read_steps(run)]


def read_record(run: Path) -> dict:
    return json.loads((run / "meta" / "full_config.json").read_bytes())["run"]


def initialize_matrices(model: torch.nn.Module) -> None:
    """Draw all matrices anew: the head of `modern` starts at zero, and so do most gradients."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)


def load_optimizer(bundle: Path) -> dict:
    return torch.load(bundle / "optimizer.pt", map_location="cpu", weights_only=True)


def list_differences(one: Path, other: Path) -> list[str]:
    """Describe each tensor that is not the same bits in both bundles."""
    states = [load_optimizer(bundle) for bundle in (one, other)]
    contents = [dict(load_file(bundle / "model.safetensors")) for bundle in (one, other)]
    for content, state in zip(contents, states, strict=True):
        content |= {f"generator {name}": value for name, value in state["generators"].items()}
        for name, values in state["state"].items():
            content |= {f"{key} of {name}": value for key, value in values.items()}
        content["scaler"] = torch.tensor(list(state["scaler"].values()), dtype=torch.float64)
    assert contents[0].keys() == contents[1].keys()
    pairs = ((name, tensor, contents[1][name]) for name, tensor in contents[0].items())
    return [
        f"{name}: by {(a.double() - b.double()).abs().max().item():.1e}"
        for name, a, b in pairs
        if not torch.equal(a, b)
    ]


# Losses ---------------------------------------------------------------------------------------


@for_each_kind
def test_training_follows_the_losses_of_a_cpu_in_float32(run, changes):
    precision = changes["precision"]
    on_cpu = {"device": "cpu", "precision": "fp32", "torch_compile": "off"}
    expected = read_losses(run(**{**changes, **on_cpu}).run_dir)
    result = run(**changes)
    losses = read_losses(result.run_dir)
    facts = f"\nlosses   {losses}\nexpected {expected}"
    assert len(losses) == len(expected) == 8 and all(map(math.isfinite, losses)), facts
    assert losses[-1] < losses[0] - 0.2, facts
    # fp16 may skip a step at the start, until its loss scale fits.
    is_complete = all(row["grad_norm"] is not None for row in read_steps(result.run_dir)[:3])
    assert is_complete or precision == "fp16", facts
    count = 4 if is_complete else 1
    assert losses[:count] == pytest.approx(expected[:count], abs=LOSS_TOLERANCE[precision]), facts
    record = read_record(result.run_dir)
    mode = "inductor" if changes.get("torch_compile") == "on" else "off"
    assert (record["precision"], record["torch_compile"]) == (precision, mode), record
    console = (result.run_dir / "logs" / "console.txt").read_text(encoding="utf-8")
    (line,) = re.findall("^Device .*", console, re.MULTILINE)
    assert precision in line and torch.cuda.get_device_name() in line
    assert ("inductor" in line) == (mode == "inductor")


def test_fp32_logits_are_those_of_a_cpu(make_config, device):
    for architecture in (MODERN, GPT2, SPEEDRUN):
        config = make_config(**architecture, precision="fp32")
        model = LanguageModel(config, 65).eval()
        initialize_matrices(model)
        idx = torch.randint(65, (2, config.block_size))
        with torch.no_grad():
            expected = model(idx)[0]
            open_device(config)
            logits = model.to(device)(idx.to(device))[0].cpu()
        assert (logits - expected).abs().max() < 1e-4, architecture


def test_fp32_multiplies_in_float32_and_other_precisions_may_use_tf32(make_config):
    torch.manual_seed(0)
    a, b = torch.randn(2, 512, 512)
    errors = {}
    for precision in ("fp32", "auto", "bf16"):
        device = open_device(make_config(precision=precision))
        product = (a.to(device) @ b.to(device)).double().cpu()
        errors[precision] = (product - a.double() @ b.double()).abs().max().item()
        expected = "highest" if precision == "fp32" else "high"
        assert torch.get_float32_matmul_precision() == expected
    assert errors["fp32"] < 5e-4, errors
    if torch.cuda.get_device_capability() >= (8, 0):
        assert errors["auto"] > errors["fp32"] * 4, errors


# Bits -----------------------------------------------------------------------------------------


@for_each_kind
def test_two_identical_runs_give_the_same_bits(run, changes):
    changes = {**changes, "dropout": 0.2, "max_iters": 2 * N}
    differences = list_differences(*(run(**changes).checkpoint for _ in range(2)))
    assert not differences, differences[:12]


@for_each_kind
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_run(run, resume, changes):
    changes = {**changes, "dropout": 0.2}
    uninterrupted = run(**changes, max_iters=2 * N)
    first = run(**changes, max_iters=N)
    flags = {name: changes[name] for name in (*COMPILED, "precision") if name in changes}
    second = resume(first, max_iters=2 * N, device=read_record(first.run_dir)["device"], **flags)
    differences = list_differences(uninterrupted.checkpoint, second.checkpoint)
    losses = read_losses(uninterrupted.run_dir)
    resumed = read_losses(first.run_dir) + read_losses(second.run_dir)
    assert not differences, f"{differences[:12]}\n{losses}\n{resumed}"
    assert losses == resumed


@pytest.mark.parametrize("architecture", [MODERN, GPT2], ids=["modern", "gpt2"])
def test_two_compiled_runs_of_a_larger_model_give_the_same_bits(run, architecture):
    # From some millions of elements, Inductor computes the gradients of norms by other kernels.
    shape = {"n_embd": 384, "n_head": 6, "batch_size": 64, "max_iters": N}
    changes = {**architecture, **shape, **COMPILED, "precision": "bf16", "dropout": 0.2}
    differences = list_differences(*(run(**changes).checkpoint for _ in range(2)))
    assert not differences, differences[:12]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_gradients_of_a_batch_are_the_same_bits_each_time(make_config, device, precision):
    different = []
    for architecture in (MODERN, GPT2, SPEEDRUN):
        for length in (64, 256, 1024):
            changes = {"block_size": length, "train_split": 0.6, "optimizer": "adamw"}
            config = make_config(**{**architecture, **changes}, precision=precision)
            trainer = prepare_trainer(config)
            initialize_matrices(trainer.model)
            gradients = []
            for _ in range(4):
                # A small scale: gradients that overflow are NaN, which equals nothing.
                is_scaled = precision == "fp16"
                trainer.scaler = torch.amp.GradScaler(device, init_scale=64.0, enabled=is_scaled)
                with contextlib.suppress(StopIteration), pytest.MonkeyPatch.context() as patch:
                    patch.setattr(trainer.optimizer, "step", lambda: None)
                    trainer.training_step(0)
                named = trainer.model.named_parameters()
                gradients.append({name: parameter.grad.clone() for name, parameter in named})
            assert all(gradient.any() for gradient in gradients[0].values()), gradients[0].keys()
            different += [
                f"{architecture['architecture']}, context {length}: {name}"
                for name, gradient in gradients[0].items()
                if not all(torch.equal(gradient, other[name]) for other in gradients[1:])
            ]
    assert not different, "\n".join(different)


# Between devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_bundle_goes_from_cpu_to_gpu_and_back(run, resume, device, dropout):
    settings = {**MODERN, "dropout": dropout}
    on_cpu = read_losses(run(**settings, device="cpu", max_iters=3 * N).run_dir)
    first = run(**settings, device="cpu", max_iters=N)
    second = resume(first, device=device, max_iters=2 * N)
    third = resume(second, device="cpu", max_iters=3 * N)
    losses = [loss for part in (first, second, third) for loss in read_losses(part.run_dir)]
    # Dropout masks differ between devices.
    assert losses == pytest.approx(on_cpu, abs=0.25 if dropout else 5e-3), f"{losses}\n{on_cpu}"
    assert [read_record(part.run_dir)["device"] for part in (first, third)] == ["cpu", "cpu"]
    assert read_record(second.run_dir)["device"].startswith(device)


@pytest.mark.parametrize("trained_on", ["cpu", "device"])
def test_weights_optimizer_and_generators_are_restored_exactly(run, device, trained_on):
    first = run(**MODERN, dropout=0.2, device=device if trained_on == "device" else "cpu")
    loaded, plan = plan_run(ConfigLoader({"device": device, "max_iters": 9}), resume="last")
    trainer = prepare_trainer(loaded.config, loaded, plan)
    saved = load_optimizer(first.checkpoint)
    weights = load_file(first.checkpoint / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert parameter.device.type == device and torch.equal(parameter.cpu(), weights[name])
        for key, value in trainer.optimizer.state[parameter].items():
            assert value.device.type == device, (name, key, value.device)
            assert torch.equal(value.cpu(), saved["state"][name][key]), (name, key)
    generators = saved["generators"]
    assert generators.keys() == ({"cpu"} if trained_on == "cpu" else {"cpu", device})
    assert torch.equal(torch.get_rng_state(), generators["cpu"])
    if trained_on == "device":
        assert torch.equal(torch.cuda.get_rng_state(), generators[device])


# The device -----------------------------------------------------------------------------------


@pytest.fixture
def command(text_file, device, capsys):
    """Return a function that runs train.py: exit status, stdout, stderr."""

    def run(*flags: str) -> tuple[int, str, str]:
        given = [flag for flag in TINY_FLAGS if not flag.startswith("--device")]
        words = [*given, f"--data={text_file}", f"--device={device}", *flags]
        status = run_command(train.main, words)
        return status, *capsys.readouterr()

    return run


def test_a_device_by_number_auto_and_one_that_is_missing(command, device):
    assert choose_device("auto").type == device
    assert command(f"--device={device}:0", "--run-tag=numbered")[0] == 0
    assert read_record(list_runs(Path("runs"))[0])["device"] == f"{device}:0"
    status, _, error = command(f"--device={device}:9")
    assert status == 2 and len(error.splitlines()) == 1, error
    assert f"{device}:9" in error and "--device auto" in error


def test_a_dry_run_reports_the_peak_of_the_device_and_micro_batches_lower_it(command, device):
    peaks, used = [], []
    for micro in (4096, 512):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # by earlier tests
        status, out, error = command(
            "--dry-run", "--batch-size=4096", f"--micro-batch-size={micro}"
        )
        assert status == 0, error
        peaks.append(torch.cuda.max_memory_allocated())
        assert get_peak_memory(torch.device(device)) == peaks[-1]
        assert f"peak of the device: {format_bytes(peaks[-1])}" in out, (peaks, out)
        used.append(peaks[-1] - before)
    assert used[1] < 0.6 * used[0], used


def test_out_of_memory_is_one_line_and_exit_status_1(command, monkeypatch):
    assert "of memory" in command("--n-embd=2048", "--batch-size=4194304")[2]  # refused at once
    monkeypatch.setattr(budget, "check_memory", lambda *_: None)
    # One tensor of 512 GiB: the first allocation of the first step fails at once.
    big = ["--n-embd=2048", "--batch-size=4194304", "--torch-compile=off", "--max-iters=1"]
    big += ["--window-order=random"]  # a batch of so many shuffled passes takes a minute
    before = torch.cuda.memory_allocated()
    status, out, error = command(*big)
    assert status == 1 and len(error.splitlines()) == 1, out + error
    assert "out of memory" in error and "micro_batch_size" in error
    run = list_runs(Path("runs"))[0]
    assert json.loads((run / "meta" / "result.json").read_bytes()).keys() == {"error"}
    gc.collect()
    assert torch.cuda.memory_allocated() < before + 2**27, "the failed run holds its weights"
    assert command()[0] == 0, "the next run trains"


@pytest.mark.parametrize(
    "changes", [MODERN, GPT2, SPEEDRUN, {**MODERN, **COMPILED}],
    ids=["modern", "gpt2", "speedrun", "modern, compiled"],
)  # fmt: skip
def test_a_training_step_does_not_wait_for_the_device(make_config, changes):
    settings = {"precision": "bf16", "dropout": 0.2, "micro_batch_size": 2}
    trainer = prepare_trainer(make_config(**changes, **settings))
    for index in range(3):
        trainer.training_step(index)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.training_step(3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{each.filename}:{each.lineno}" for each in caught if "called a sync" in str(each)]
    assert not waits, waits


def test_sigterm_saves_a_checkpoint_that_loads(text_file, device):
    flags = [*TINY_FLAGS, f"--data={text_file}", f"--device={device}"]
    status, out, error = train_until(
        signal.SIGTERM, *flags, "--max-iters=1000000", "--log-interval=1"
    )
    assert status == 128 + signal.SIGTERM, out + error
    assert loaded_step(list_runs(Path("runs"))[0]) > 0


# Logs -----------------------------------------------------------------------------------------


def test_every_step_gradient_norms_histograms_and_samples_are_logged(run):
    result = run(**MODERN, max_iters=6, log_interval=4, histogram_interval=3, sample_interval=3)
    rows = read_steps(result.run_dir)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in rows), rows
    events = EventAccumulator(str(result.run_dir / "logs" / "tensorboard"))
    events.Reload()
    assert len(events.Tags()["histograms"]) > 10, events.Tags()
    assert (result.run_dir / "report.html").exists()
    assert (result.run_dir / "logs" / "samples.jsonl").stat().st_size > 0


@pytest.mark.parametrize("more", [[], ["--inference"]])
def test_a_step_and_generation_are_profiled(text_file, device, capsys, more):
    flags = [*TINY_FLAGS, f"--data={text_file}", f"--device={device}", "--steps=2", "--json"]
    assert run_command(profile_model.main, [*flags, *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"].startswith(device.upper()) and report["peak_memory"] > 0
    for section in report["sections"]:
        names = [operator["name"] for operator in section["operators"]]
        assert section["flops_per_second"] > 0 and any("aten::" in name for name in names), names
        # A kernel's time is that of the operator that launched it: listed once.
        assert not any(word in name for name in names for word in ("void ", "Memcpy")), names
