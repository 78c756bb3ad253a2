"""Which optimizer, and how large a step it takes."""

import math

import torch
from torch import Tensor, nn

from parameters import ModelConfig


def create_optimizer(model: nn.Module, config: ModelConfig) -> torch.optim.AdamW:
    """AdamW (arxiv.org/abs/1711.05101) in its fused form where the device has one.

    Matrices and embeddings decay; vectors, which are biases and norms, do not.
    """
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    free = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    try:
        return torch.optim.AdamW(groups, fused=True, **settings)
    except RuntimeError:  # PyTorch has no fused kernel for this device
        return torch.optim.AdamW(groups, **settings)


def learning_rate_at(step: int, config: ModelConfig) -> float:
    """The learning rate of the update number `step`, counted from 0: nothing else decides it.

    A line up to `learning_rate` over `warmup_iters` updates, then `lr_schedule` down to `min_lr`
    at `lr_decay_iters`, and `min_lr` from there on. The cosine is arxiv.org/abs/1608.03983's,
    without restarts.
    """
    peak = config.learning_rate
    floor = peak / 10 if config.min_lr is None else config.min_lr
    end = config.lr_decay_iters or config.max_iters
    assert end is not None, "max_iters is settled before the first step"
    if step < config.warmup_iters:
        return peak * (step + 1) / config.warmup_iters
    if config.lr_schedule == "constant":
        return peak
    if step >= end:
        return floor
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)
    if config.lr_schedule == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(model: nn.Module, longest: float) -> Tensor:
    """Scale the gradient down to the norm `longest`, where it is longer; 0 leaves it as it is.

    Returns its norm before, a scalar on the device.
    """
    parameters = list(model.parameters())
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if longest > 0:
        nn.utils.clip_grads_with_norm_(parameters, longest, grad_norm)
    return grad_norm


def update(optimizer: torch.optim.Optimizer, step: int, config: ModelConfig) -> None:
    """Apply the gradients that are there, at the learning rate of `step`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    optimizer.step()
