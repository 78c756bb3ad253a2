"""optim.py: the schedule and the update.

python -m pytest tests/test_optim.py
"""

import pytest
import torch

from model import LanguageModel
from optim import clip_gradients, create_optimizer, learning_rate_at, update
from parameters import ModelConfig


def config(**changes) -> ModelConfig:
    settings = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110}
    return ModelConfig(**{**settings, **changes})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
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


def make(**changes):
    settings = ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=4, bias=True, **changes)
    torch.manual_seed(0)
    model = LanguageModel(settings, 5)
    return settings, model, create_optimizer(model, settings)


def test_matrices_decay_and_vectors_do_not():
    _, model, optimizer = make(weight_decay=0.3)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_the_optimizer_is_fused_on_the_cpu():
    assert make()[2].param_groups[0]["fused"]


def test_where_no_fused_kernel_exists_the_plain_one_is_used(monkeypatch):
    real = torch.optim.AdamW

    def without_fused(*args, fused=False, **settings):
        if fused:
            raise RuntimeError("no fused kernel")
        return real(*args, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", without_fused)
    assert not make()[2].param_groups[0].get("fused")


@pytest.mark.parametrize(("clip", "expected"), [(0.5, 0.5), (1e9, None), (0.0, None)])
def test_gradients_longer_than_grad_clip_are_scaled_down(clip, expected, monkeypatch):
    settings, model, optimizer = make(grad_clip=clip)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    length = model.num_parameters() ** 0.5
    seen = []
    monkeypatch.setattr(
        optimizer,
        "step",
        lambda: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()),
    )
    norm = clip_gradients(model, settings.grad_clip)
    update(optimizer, 0, settings)
    assert norm.item() == pytest.approx(length, rel=1e-5)
    assert seen[0].item() == pytest.approx(expected or length, rel=1e-5)


def test_the_learning_rate_is_applied_anew_at_every_update():
    settings, model, optimizer = make(learning_rate=0.5, warmup_iters=10)
    for group in optimizer.param_groups:
        group["lr"] = 99.0  # as after loading an old optimizer
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update(optimizer, 4, settings)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
