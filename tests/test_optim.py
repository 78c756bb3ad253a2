"""optim.py: the schedule, gradient clipping, AdamW and Muon.

python -m pytest tests/test_optim.py
"""

import inspect
import subprocess
import sys

import pytest
import torch
from helpers import CHECKOUT

from model import LanguageModel
from optim import (
    MUON_LR_SCALE,
    AdamW,
    clip_gradients,
    create_optimizer,
    learning_rate_at,
    orthogonalize,
    set_learning_rate,
)
from parameters import ModelConfig


def config(**changes) -> ModelConfig:
    settings = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110}
    settings["lr_schedule"] = "cosine"
    return ModelConfig(**{**settings, **changes})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warmup_is_linear_to_the_peak(schedule):
    rates = [learning_rate_at(step, config(lr_schedule=schedule)) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)],
)
def test_after_warmup_the_learning_rate_decays_to_min_lr(schedule, halfway, end):
    settings = config(lr_schedule=schedule)
    assert learning_rate_at(10, settings) == pytest.approx(1.0)
    assert learning_rate_at(60, settings) == pytest.approx(halfway)
    assert learning_rate_at(110, settings) == pytest.approx(end)
    assert learning_rate_at(9999, settings) == pytest.approx(end)
    rates = [learning_rate_at(step, settings) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_decay_is_slow_at_both_ends():
    assert learning_rate_at(35, config()) == pytest.approx(0.1 + 0.9 * 0.8535534)


def test_wsd_is_constant_and_then_linear():
    settings = config(lr_schedule="wsd", lr_decay_fraction=0.25)
    rates = [learning_rate_at(step, settings) for step in (10, 60, 85, 97.5, 110)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1])
    whole = config(lr_schedule="wsd", lr_decay_fraction=1.0)
    linear = config(lr_schedule="linear")
    for step in range(120):
        assert learning_rate_at(step, whole) == pytest.approx(learning_rate_at(step, linear))


def test_null_settings_follow_from_the_others():
    assert learning_rate_at(110, config(min_lr=None)) == pytest.approx(0.1)
    stretched = config(max_iters=210)
    assert learning_rate_at(110, stretched) == pytest.approx(0.55)
    assert learning_rate_at(110, config(max_iters=210, lr_decay_iters=110)) == pytest.approx(0.1)


def test_a_run_may_be_shorter_than_its_warmup():
    short = config(max_iters=5, warmup_iters=100)
    assert [learning_rate_at(s, short) for s in range(5)] == pytest.approx(
        [0.01, 0.02, 0.03, 0.04, 0.05]
    )
    assert learning_rate_at(100, short) == pytest.approx(0.1)


def test_without_warmup_the_first_step_is_at_the_peak():
    assert learning_rate_at(0, config(warmup_iters=0)) == pytest.approx(1.0)


GPT2 = {"architecture": "gpt2", "bias": True, "optimizer": "adamw"}


def make(**changes):
    settings = ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=4, **changes)
    torch.manual_seed(0)
    model = LanguageModel(settings, 5)
    return settings, model, create_optimizer(model, settings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
def test_matrices_decay_and_vectors_do_not(architecture, optimizer):
    _, model, made = make(weight_decay=0.3, architecture=architecture, optimizer=optimizer)
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in made.param_groups)
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() == 2 else 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_is_fused_on_the_cpu(optimizer):
    assert make(optimizer=optimizer)[2].param_groups[0]["fused"]


def test_a_device_without_a_fused_kernel_gets_the_plain_one():
    settings = ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=4, optimizer="adamw")
    optimizer = create_optimizer(LanguageModel(settings, 5).to("meta"), settings)
    assert not optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize(("clip", "expected"), [(0.5, 0.5), (1e9, None), (0.0, None)])
def test_gradients_are_scaled_down_to_grad_clip(clip, expected):
    _, model, _ = make(grad_clip=clip, **GPT2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model.count_parameters() ** 0.5
    norm = clip_gradients(model, clip)
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(before, rel=1e-5)
    assert after.item() == pytest.approx(expected or before, rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_learning_rate_is_set_in_all_groups_and_scaled_for_muons(kind):
    _, _, optimizer = make(optimizer=kind)
    for group in optimizer.param_groups:
        group["lr"] = 99.0  # as after loading an old optimizer
    set_learning_rate(optimizer, 0.25)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == ([0.25, 0.25, 0.25 * MUON_LR_SCALE] if kind == "muon" else [0.25, 0.25])


def draw_gradients(model: LanguageModel, step: int) -> None:
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_bit_for_bit_that_of_pytorch(fused):
    """`torch.optim.adamw.adamw` is hardly documented: this fails if its meaning changes."""
    _, model, ours = make(**GPT2, weight_decay=0.1, learning_rate=0.01)
    _, reference, _ = make(**GPT2)
    groups = [
        {"params": [p for p in reference.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = ours.param_groups[0]["betas"]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=betas, fused=fused)
    for group in ours.param_groups:
        group["fused"] = fused
    for step in range(4):
        for each, optimizer in ((model, ours), (reference, theirs)):
            draw_gradients(each, step)
            optimizer.step()
        ours.load_state_dict(ours.state_dict())
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        for name, value in theirs.state[expected].items():
            assert torch.equal(ours.state[parameter][name], value)


def test_no_training_step_imports_torchs_compiler():
    """Not in fp32, nor in bf16, whose attention is an operator in compiled code only.

    `optim.AdamW` calls four methods of PyTorch undecorated: this fails if others need it too.
    """
    code = (
        "import sys, torch, optim\n"
        "from model import LanguageModel\n"
        "from parameters import ModelConfig\n"
        "for name in ('adamw', 'muon'):\n"
        "    config = ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=4, optimizer=name)\n"
        "    model = LanguageModel(config, 5)\n"
        "    optimizer = optim.create_optimizer(model, config)\n"
        "    optimizer.zero_grad(set_to_none=True)\n"
        "    ids = torch.zeros(2, 4, dtype=torch.long)\n"
        "    for enabled in (False, True):\n"
        "        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):\n"
        "            loss = model(ids, ids)[1]\n"
        "        loss.backward()\n"
        "    optimizer.step()\n"
        "    optimizer.load_state_dict(optimizer.state_dict())\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


@pytest.mark.parametrize("name", ["add_param_group", "zero_grad", "state_dict", "load_state_dict"])
def test_the_methods_that_pytorch_decorates_are_its_own_undecorated(name):
    assert getattr(AdamW, name) is inspect.unwrap(getattr(torch.optim.Optimizer, name))
    assert not hasattr(getattr(AdamW, name), "__wrapped__")


# Muon -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 8, 8), (3, 24, 8), (2, 8, 24), (1, 1, 7)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_their_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = orthogonalize(matrices, torch.float64)
    U, values, Vh = torch.linalg.svd(matrices, full_matrices=False)
    new_values = torch.linalg.svdvals(result)
    large = values > values.max() / 50  # five iterations do not lift the smallest to 1
    assert ((new_values.min(dim=1).values > 0.3) | ~large.all(dim=1)).all()
    assert new_values.max() < 1.3
    nearest = U @ Vh
    alike = (result * nearest).sum(dim=(1, 2)) / (
        result.norm(dim=(1, 2)) * nearest.norm(dim=(1, 2))
    )
    assert alike.min() > 0.9


def test_a_batch_of_matrices_is_orthogonalized_like_each_alone():
    matrices = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalize(m[None], torch.float32) for m in matrices])
    torch.testing.assert_close(orthogonalize(matrices, torch.float32), alone)


def test_a_step_of_muon_agrees_with_pytorchs_within_5_percent():
    """PyTorch's multiplies in bfloat16, so they differ by a few percent of a step."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    _, model, ours = make(weight_decay=0.1, muon_momentum=0.9, learning_rate=0.01)
    # Queries, keys and values are one parameter here, and three matrices there.
    parts = {n: 3 if "qkv" in n else 1 for n in model.get_block_matrices()}
    copies = {
        name: [part.detach().clone().requires_grad_() for part in p.chunk(parts[name])]
        for name, p in model.get_block_matrices().items()
    }
    theirs = torch.optim.Muon(
        [copy for each in copies.values() for copy in each],
        lr=0.01 * MUON_LR_SCALE,
        weight_decay=0.1,
        momentum=0.9,
        nesterov=True,
    )
    ours.param_groups[-1]["lr"] = 0.01 * MUON_LR_SCALE
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        before = {name: torch.cat(each).detach() for name, each in copies.items()}
        for name, parameter in model.get_block_matrices().items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            for copy, part in zip(copies[name], parameter.grad.chunk(parts[name]), strict=True):
                copy.grad = part.clone()
        ours.step()
        theirs.step()
        for name, parameter in model.get_block_matrices().items():
            taken = (parameter - before[name]).norm()
            assert (parameter - torch.cat(copies[name])).norm() < 0.05 * taken, name
            for copy, part in zip(copies[name], parameter.chunk(parts[name]), strict=True):
                copy.data.copy_(part)


def test_muon_updates_all_but_the_blocks_matrices_by_adamw():
    parameters = {}
    for kind in ("muon", "adamw"):
        settings, model, optimizer = make(optimizer=kind, warmup_iters=0, max_iters=100)
        for step in range(3):
            draw_gradients(model, step)
            set_learning_rate(optimizer, learning_rate_at(step, settings))
            optimizer.step()
        parameters[kind] = dict(model.named_parameters())
    matrices = model.get_block_matrices()
    for name, parameter in parameters["muon"].items():
        is_same = torch.equal(parameter, parameters["adamw"][name])
        assert is_same is (name not in matrices), name


def test_gradients_are_unchanged_by_a_step_of_muon_and_without_gradients_nothing_happens():
    _, model, optimizer = make()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert (parameter.grad == 1).all()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
