"""Optimizers (AdamW and Muon), the learning rate schedule, and gradient clipping."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from distributed import gather_full_tensor, is_sharded, reduce_norm, shard_like, to_local
from model import LanguageModel
from parameters import ModelConfig

# Muon's learning rate as a multiple of `learning_rate`, which is AdamW's.
MUON_LR_SCALE = 2.0


def create_optimizer(
    model: LanguageModel, config: ModelConfig, dtype: torch.dtype = torch.float32
) -> "AdamW":
    """Create AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay applies to matrices and embeddings, not to vectors (biases and norms). `dtype` is
    that of Muon's matrix products.
    """
    matrices = model.get_block_matrices() if config.optimizer == "muon" else {}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    decay = {"weight_decay": config.weight_decay}
    groups = [
        {"params": [p for p in others if p.dim() >= 2], **decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    if config.optimizer == "adamw":
        return AdamW(groups, **settings)
    # Queries, keys and values are three matrices, stacked in one parameter.
    stacked = [3 if name.endswith("qkv.weight") else 1 for name in matrices]
    muon = {"params": list(matrices.values()), "stacked": stacked, **decay}
    muon |= {"lr_scale": MUON_LR_SCALE, "momentum": config.muon_momentum}
    return Muon([*groups, muon], dtype=dtype, **settings)


class AdamW(torch.optim.Optimizer):
    """AdamW (arxiv.org/abs/1711.05101), using PyTorch's fused kernel if the device has one.

    It computes what `torch.optim.AdamW` does, whose `step` would import torch._dynamo. Each of
    `groups` has a `weight_decay`.
    """

    # The undecorated methods: PyTorch (as of 2.13) excludes them from torch.compile by a decorator
    # that imports torch._dynamo, which takes 1.3 to 2 s. Optimizers are not compiled here.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]):
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        fused = devices <= {"cpu", "cuda", "mps"}
        super().__init__(groups, {"lr": lr, "betas": betas, "fused": fused})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            self._update_group(group)

    def _update_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        adamw(
            [to_local(p) for p in parameters],
            [to_local(p.grad) for p in parameters],
            [to_local(self._get_state(p, "exp_avg")) for p in parameters],
            [to_local(self._get_state(p, "exp_avg_sq")) for p in parameters],
            [],
            [self._get_state(p, "step") for p in parameters],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )

    def _get_state(self, p: nn.Parameter, name: str) -> Tensor:
        """Return a state of p, initialized to zero: a scalar `step`, others in the shape of p."""
        if name not in self.state[p]:
            zero = torch.zeros((), device=p.device) if name == "step" else torch.zeros_like(p)
            self.state[p][name] = zero
        return self.state[p][name]


class Muon(AdamW):
    """Muon for groups of matrices with a `momentum`, and AdamW for the others.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces each matrix's Nesterov
    momentum by approximately the nearest semi-orthogonal matrix, with matrix products in `dtype`.
    PyTorch's Muon takes one matrix at a time; batching those of one shape makes it cheap on a CPU.
    Its groups also have `stacked`, the number of matrices that are stacked in each parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], *, dtype: torch.dtype, **settings: Any):
        super().__init__(groups, **settings)
        self._dtype = dtype

    def _update_group(self, group: dict[str, Any]) -> None:
        if "momentum" not in group:
            super()._update_group(group)
            return
        updates: list[tuple[nn.Parameter, Tensor, float]] = []
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for p, stacked in zip(group["params"], group["stacked"], strict=True):
            if p.grad is None:
                continue
            gradient, momentum = to_local(p.grad), to_local(self._get_state(p, "momentum"))
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"])  # Nesterov momentum
            # Orthogonalization needs all rows of a matrix: gather its shards.
            update = gather_full_tensor(update, p)
            matrices = update.chunk(stacked)
            by_shape.setdefault(tuple(sorted(matrices[0].shape)), []).extend(matrices)
            # Scale so that the change of the output does not depend on the shape.
            outputs, inputs = matrices[0].shape
            updates.append((p, update, group["lr"] * max(1.0, outputs / inputs) ** 0.5))
        for matrices in by_shape.values():
            wide = torch.stack([as_wide(matrix) for matrix in matrices])
            for matrix, orthogonal in zip(matrices, orthogonalize(wide, self._dtype), strict=True):
                as_wide(matrix).copy_(orthogonal)  # in place: each matrix is a view of an update
        for p, update, rate in updates:
            weight = to_local(p).mul_(1 - group["lr"] * group["weight_decay"])
            if is_sharded(p):
                weight.add_(to_local(shard_like(update.mul_(-rate), p)))
            else:
                weight.add_(update, alpha=-rate)


def as_wide(matrix: Tensor) -> Tensor:
    """Return the matrix, transposed if it has more rows than columns."""
    return matrix.mT if matrix.size(0) > matrix.size(1) else matrix


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix, `(N, rows, columns)`, near 1 by Newton-Schulz.

    Five iterations bring them to between 0.7 and 1.2, which trains as well as exactly 1. Wide
    matrices are cheaper than tall ones, as X Xᵀ is rows x rows.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # coefficients from Muon's reference code
    X = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.to(matrices.dtype)


def learning_rate_at(step: int, config: ModelConfig) -> float:
    """Return the learning rate of `step`, counted from 0; a pure function of step and config.

    Linear warmup to `learning_rate` over `warmup_iters` steps, then decay by `lr_schedule` to
    `min_lr` at `lr_decay_iters`, and `min_lr` afterwards; "constant" does not decay. "cosine" is
    arxiv.org/abs/1608.03983 without restarts; "wsd" stays at the peak first
    (arxiv.org/abs/2404.06395).
    """
    peak = config.learning_rate
    floor = peak / 10 if config.min_lr is None else config.min_lr
    end = config.lr_decay_iters or config.max_iters
    assert end is not None, "max_iters is set before the first step"
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


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of each group, times its `lr_scale` (Muon's)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient to `max_norm` if its norm is larger; 0 disables clipping.

    Returns the norm before clipping, a scalar on the device.
    """
    parameters = list(model.parameters())
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, grad_norm)
    return reduce_norm(grad_norm)
