"""optim.py: the schedule and the update.

python -m pytest tests/test_optim.py
"""

import pytest
import torch

from model import LanguageModel
from optim import (
    MUON_RATE,
    apply_update,
    clip_gradients,
    create_optimizer,
    learning_rate_at,
    orthogonalize,
)
from parameters import ModelConfig


def config(**changes) -> ModelConfig:
    settings = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110}
    settings["lr_schedule"] = "cosine"
    return ModelConfig(**{**settings, **changes})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_a_line_to_the_peak(schedule):
    rates = [learning_rate_at(step, config(lr_schedule=schedule)) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)],
)
def test_after_the_warm_up_the_schedule_falls_to_min_lr(schedule, halfway, end):
    settings = config(lr_schedule=schedule)
    assert learning_rate_at(10, settings) == pytest.approx(1.0)
    assert learning_rate_at(60, settings) == pytest.approx(halfway)
    assert learning_rate_at(110, settings) == pytest.approx(end)
    assert learning_rate_at(9999, settings) == pytest.approx(end)
    rates = [learning_rate_at(step, settings) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_the_cosine_is_slow_at_both_ends():
    assert learning_rate_at(35, config()) == pytest.approx(0.1 + 0.9 * 0.8535534)


def test_wsd_is_stable_first_and_then_a_line():
    settings = config(lr_schedule="wsd", lr_decay_fraction=0.25)
    rates = [learning_rate_at(step, settings) for step in (10, 60, 85, 97.5, 110)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1])
    whole = config(lr_schedule="wsd", lr_decay_fraction=1.0)
    linear = config(lr_schedule="linear")
    for step in range(120):
        assert learning_rate_at(step, whole) == pytest.approx(learning_rate_at(step, linear))


def test_null_settings_follow_the_others():
    assert learning_rate_at(110, config(min_lr=None)) == pytest.approx(0.1)
    stretched = config(max_iters=210)
    assert learning_rate_at(110, stretched) == pytest.approx(0.55)
    assert learning_rate_at(110, config(max_iters=210, lr_decay_iters=110)) == pytest.approx(0.1)


def test_a_run_shorter_than_its_warm_up_is_legal():
    short = config(max_iters=5, warmup_iters=100)
    assert [learning_rate_at(s, short) for s in range(5)] == pytest.approx(
        [0.01, 0.02, 0.03, 0.04, 0.05]
    )
    assert learning_rate_at(100, short) == pytest.approx(0.1)


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate_at(0, config(warmup_iters=0)) == pytest.approx(1.0)


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
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


def test_where_no_fused_kernel_exists_the_plain_one_is_used(monkeypatch):
    real = torch.optim.AdamW

    def without_fused(*args, fused=False, **settings):
        if fused:
            raise RuntimeError("no fused kernel")
        return real(*args, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", without_fused)
    assert not make(optimizer="adamw")[2].param_groups[0].get("fused")


@pytest.mark.parametrize(("clip", "expected"), [(0.5, 0.5), (1e9, None), (0.0, None)])
def test_gradients_longer_than_grad_clip_are_scaled_down(clip, expected, monkeypatch):
    settings, model, optimizer = make(grad_clip=clip, **GPT2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    length = model.count_parameters() ** 0.5
    seen = []
    monkeypatch.setattr(
        optimizer,
        "step",
        lambda: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()),
    )
    norm = clip_gradients(model, settings.grad_clip)
    apply_update(optimizer, NO_SCALER, 0, settings)
    assert norm.item() == pytest.approx(length, rel=1e-5)
    assert seen[0].item() == pytest.approx(expected or length, rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_learning_rate_is_applied_anew_at_every_update(kind):
    settings, model, optimizer = make(learning_rate=0.5, warmup_iters=10, optimizer=kind)
    for group in optimizer.param_groups:
        group["lr"] = 99.0  # as after loading an old optimizer
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    apply_update(optimizer, NO_SCALER, 4, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == ([0.25, 0.25, 0.25 * MUON_RATE] if kind == "muon" else [0.25, 0.25])


# Muon -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 8, 8), (3, 24, 8), (2, 8, 24), (1, 1, 7)])
def test_orthogonalised_matrices_have_singular_values_near_one_and_the_same_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = orthogonalize(matrices, torch.float64)
    U, values, Vh = torch.linalg.svd(matrices, full_matrices=False)
    new_values = torch.linalg.svdvals(result)
    large = values > values.max() / 50  # the smallest ones are not lifted all the way
    assert ((new_values.min(dim=1).values > 0.3) | ~large.all(dim=1)).all()
    assert new_values.max() < 1.3
    nearest = U @ Vh
    alike = (result * nearest).sum(dim=(1, 2)) / (
        result.norm(dim=(1, 2)) * nearest.norm(dim=(1, 2))
    )
    assert alike.min() > 0.9


def test_matrices_together_are_as_each_alone():
    matrices = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalize(m[None], torch.float32) for m in matrices])
    torch.testing.assert_close(orthogonalize(matrices, torch.float32), alone)


def test_a_step_of_muon_is_that_of_pytorchs_own():
    """Which multiplies in bfloat16: so they agree to some percent of a step."""
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
        lr=0.01 * MUON_RATE,
        weight_decay=0.1,
        momentum=0.9,
        nesterov=True,
    )
    ours.param_groups[-1]["lr"] = 0.01 * MUON_RATE
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


def test_beside_the_matrices_muon_is_adamw():
    kinds = {}
    for kind in ("muon", "adamw"):
        settings, model, optimizer = make(optimizer=kind, warmup_iters=0, max_iters=100)
        for step in range(3):
            for index, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            apply_update(optimizer, NO_SCALER, step, settings)
        kinds[kind] = dict(model.named_parameters())
    matrices = model.get_block_matrices()
    for name in kinds["muon"]:
        assert torch.equal(kinds["muon"][name], kinds["adamw"][name]) is (name not in matrices), (
            name
        )


def test_gradients_are_still_there_after_a_step_of_muon():
    settings, model, optimizer = make()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad = torch.ones_like(parameter)
    apply_update(optimizer, NO_SCALER, 0, settings)
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    model.zero_grad()
    optimizer.step()  # and without any, nothing happens
