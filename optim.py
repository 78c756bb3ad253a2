"""Which optimizer, and how large a step it takes."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from model import LanguageModel
from parameters import ModelConfig

# Muon's learning rate for each unit of AdamW's, which is what `learning_rate` means.
MUON_RATE = 2.0
# The quintic iteration of Muon's author, and how often it is made.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def create_optimizer(
    model: LanguageModel, config: ModelConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW:
    """AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest.

    Both decay matrices and embeddings, and leave vectors, which are biases and norms, free.
    AdamW (arxiv.org/abs/1711.05101) has its fused form where the device has one. `dtype` is what
    Muon computes in.
    """
    matrices = list(model.block_matrices().values()) if config.optimizer == "muon" else []
    ours = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in ours]
    decayed = {"weight_decay": config.weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], **decayed},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    kind: type[torch.optim.AdamW] = torch.optim.AdamW
    if matrices:
        kind = Muon
        groups.append({"params": matrices, "rate": MUON_RATE, **decayed})
        settings |= {"momentum": config.muon_momentum, "dtype": dtype}
    try:
        return kind(groups, fused=True, **settings)
    except RuntimeError:  # PyTorch has no fused kernel for this device
        return kind(groups, **settings)


class Muon(torch.optim.AdamW):
    """Muon for the parameters of its last group, all of them matrices, and AdamW for the others.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) follows the mean of the gradients
    with all its directions made equally long: the nearest matrix with orthogonal rows or columns.
    PyTorch's own takes one matrix at a time; here those of one shape go together, which is what
    makes it cheap on a CPU.

    Args:
        groups: of parameters, as for AdamW.
        momentum: the decay of the gradients' mean, which is Nesterov's.
        dtype: what the matrices are multiplied in.
        settings: AdamW's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, momentum: float, dtype: torch.dtype, **settings: Any
    ):
        super().__init__(groups, **settings)
        self._momentum = momentum
        self._dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        """Take a step with the gradients that are there; they stay."""
        group = self.param_groups[-1]
        gradients = [p.grad for p in group["params"]]
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():
            self._step_together(parameters, group)
        # AdamW leaves alone what has no gradient.
        for parameter in group["params"]:
            parameter.grad = None
        super().step()
        for parameter, gradient in zip(group["params"], gradients, strict=True):
            parameter.grad = gradient

    def _step_together(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update matrices of one shape, `(outputs, inputs)`."""
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:  # AdamW looks for a "step" in every state that it loads
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
        means = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - self._momentum)
        ahead = torch._foreach_lerp(gradients, means, self._momentum)
        updates = orthogonalised(torch.stack(ahead), self._dtype)
        # So that the change of an output is as large whatever the matrix's shape.
        outputs, inputs = parameters[0].shape
        rate = group["lr"] * max(1.0, outputs / inputs) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates.unbind(), alpha=-rate)


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix near 1, `(N, rows, columns)`, by Newton and Schulz.

    Five iterations bring them to between 0.7 and 1.2, which is as good as 1 to an optimizer.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if is_tall else matrices  # the Gram matrix is the smaller of the two
    X = (X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return (X.mT if is_tall else X).to(matrices.dtype)


def learning_rate_at(step: int, config: ModelConfig) -> float:
    """The learning rate of the update number `step`, counted from 0: nothing else decides it.

    A line up to `learning_rate` over `warmup_iters` updates, then `lr_schedule` down to `min_lr`
    at `lr_decay_iters`, and `min_lr` from there on. The cosine is arxiv.org/abs/1608.03983's,
    without restarts; "wsd" stays at the peak first (arxiv.org/abs/2404.06395).
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
    if config.lr_schedule == "wsd":
        progress = max(0.0, 1 - (1 - progress) / config.lr_decay_fraction)
    if config.lr_schedule in ("linear", "wsd"):
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


def update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int, config: ModelConfig
) -> None:
    """Apply the gradients that are there, at the learning rate of `step`.

    In fp16, `scaler` leaves a step out whose gradients overflowed.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config) * group.get("rate", 1.0)
    scaler.step(optimizer)
    scaler.update()
