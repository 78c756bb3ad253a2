"""Which optimizer, and how large a step it takes."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from distributed import gather_full_tensor, is_sharded, reduce_norm, shard_like, to_local
from model import LanguageModel
from parameters import ModelConfig

# Muon's learning rate for each unit of AdamW's, which is what `learning_rate` means.
MUON_RATE = 2.0
# The quintic iteration of Muon's author, and how often it is made.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def create_optimizer(
    model: LanguageModel, config: ModelConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest.

    Both decay matrices and embeddings, and leave vectors, which are biases and norms, free.
    AdamW (arxiv.org/abs/1711.05101) has its fused form where the device has one. `dtype` is what
    Muon computes in.
    """
    matrices = model.get_block_matrices() if config.optimizer == "muon" else {}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    decayed = {"weight_decay": config.weight_decay}
    groups = [
        {"params": [p for p in others if p.dim() >= 2], **decayed},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    rates = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    _spare_dynamo()
    if config.optimizer == "muon":
        # Queries, keys and values are three matrices, one above the other in one parameter.
        stacked = [3 if name.endswith("qkv.weight") else 1 for name in matrices]
        muon = {"params": list(matrices.values()), "stacked": stacked, **decayed}
        muon |= {"rate": MUON_RATE, "momentum": config.muon_momentum}
        return Muon([*groups, muon], dtype=dtype, **rates)
    try:
        return torch.optim.AdamW(groups, fused=True, **rates)
    except RuntimeError:  # PyTorch has no fused kernel for this device
        return torch.optim.AdamW(groups, **rates)


def _spare_dynamo() -> None:
    """Spare a run the second that PyTorch's optimizers take to import what torch.compile needs.

    They import it when they are made, to be left out of what is compiled; no optimizer of this
    process is left out from here on, and Folio compiles none. In a PyTorch that does this in
    another way, nothing happens.
    """
    for method in vars(torch.optim.Optimizer).values():
        if function := getattr(method, "__wrapped__", None):
            function.__dynamo_disable = function


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have a `momentum`, of matrices all, and AdamW for the others.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) follows the mean of the gradients
    with all its directions made equally long: the nearest matrix with orthogonal rows or columns.
    PyTorch's own takes one matrix at a time; here those of one shape go together, which is what
    makes it cheap on a CPU.

    Args:
        groups: of parameters, each with its `weight_decay`; of Muon's parameters, `stacked` says
            how many matrices stand one above the other in each.
        dtype: what the matrices are multiplied in.
        lr: the learning rate.
        betas: AdamW's decay of the gradient's and the squared gradient's running mean.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        dtype: torch.dtype,
        lr: float,
        betas: tuple[float, float],
    ):
        kinds = {parameter.device.type for group in groups for parameter in group["params"]}
        fused = kinds <= {"cpu", "cuda", "mps"}
        super().__init__(groups, {"lr": lr, "betas": betas, "fused": fused})
        self._dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        """Take a step with the gradients that are there."""
        for group in self.param_groups:
            if "momentum" in group:
                self._step_muon(group)
            else:
                self._step_adamw(group)

    def _step_muon(self, group: dict[str, Any]) -> None:
        """Update all matrices; those of one shape, or of its transpose, are computed together."""
        known = zip(group["params"], group["stacked"], strict=True)
        stacked = {p: number for p, number in known if p.grad is not None}
        if not stacked:
            return
        matrices = list(stacked)
        gradients = [to_local(p.grad) for p in matrices]
        means = [to_local(mean) for mean in self._states("momentum", matrices)]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, means, group["momentum"])  # Nesterov's
        torch._foreach_mul_(
            [to_local(p) for p in matrices], 1 - group["lr"] * group["weight_decay"]
        )
        # What is sharded is made whole for this: all rows of a matrix have a say in each other.
        ahead = [gather_full_tensor(change, p) for p, change in zip(matrices, ahead, strict=True)]
        targets = [torch.zeros(p.shape, device=p.device) if is_sharded(p) else p for p in matrices]
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for target, number, change in zip(targets, stacked.values(), ahead, strict=True):
            for pair in zip(target.chunk(number), change.chunk(number), strict=True):
                by_shape.setdefault(tuple(sorted(pair[0].shape)), []).append(pair)
        for pairs in by_shape.values():
            changes = torch.stack([as_wide(change) for _, change in pairs])
            for (matrix, _), change in zip(pairs, orthogonalize(changes, self._dtype), strict=True):
                # So that the change of an output is as large whatever the matrix's shape.
                outputs, inputs = matrix.shape
                rate = group["lr"] * max(1.0, outputs / inputs) ** 0.5
                as_wide(matrix).add_(change, alpha=-rate)
        for p, target in zip(matrices, targets, strict=True):
            if is_sharded(p):
                to_local(p).add_(to_local(shard_like(target, p)))

    def _step_adamw(self, group: dict[str, Any]) -> None:
        """Update by PyTorch's AdamW."""
        parameters = [p for p in group["params"] if p.grad is not None]
        adamw(
            [to_local(p) for p in parameters],
            [to_local(p.grad) for p in parameters],
            [to_local(mean) for mean in self._states("exp_avg", parameters)],
            [to_local(mean) for mean in self._states("exp_avg_sq", parameters)],
            [],
            self._states("step", parameters),
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )

    def _states(self, name: str, parameters: list[nn.Parameter]) -> list[Tensor]:
        """What is remembered of each parameter, zero at first: a number, or one for each weight."""
        for p in parameters:
            if name not in self.state[p]:
                zero = torch.zeros((), device=p.device) if name == "step" else torch.zeros_like(p)
                self.state[p][name] = zero
        return [self.state[p][name] for p in parameters]


def as_wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose: whichever has no more rows than columns."""
    return matrix.mT if matrix.size(0) > matrix.size(1) else matrix


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix near 1, `(N, rows, columns)`, by Newton and Schulz.

    Five iterations bring them to between 0.7 and 1.2, which is as good as 1 to an optimizer. Of
    fewer rows than columns it is cheaper.
    """
    a, b, c = NEWTON_SCHULZ
    X = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.to(matrices.dtype)


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
    return reduce_norm(grad_norm)


def apply_update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int, config: ModelConfig
) -> None:
    """Apply the gradients that are there, at the learning rate of `step`.

    In fp16, `scaler` leaves a step out whose gradients overflowed.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config) * group.get("rate", 1.0)
    scaler.step(optimizer)
    scaler.update()


def set_learning_rate(optimizer, learning_rate):
    """Shim."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate", 1.0)
