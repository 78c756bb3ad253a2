"""One training step, and one evaluation.

What stands here is what a run does again and again: `train.py` calls it in its loop, and
`profile_model.py` measures the very same.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from callbacks import CallbackFactory
from data import Dataset, count_windows, get_batch, iter_evaluation_batches, split_micro_batches
from distributed import SINGLE_PROCESS, World, defer_gradient_sync
from model import LanguageModel
from optim import clip_gradients, learning_rate_at, set_learning_rate
from parameters import ModelConfig
from start import ResumePlan
from utils.device import CompileResult, autocast
from utils.evaluation import compute_loss, count_parallel_windows, evaluation_mode

# The parts of a step, in their order.
PHASES = ("data", "forward", "backward", "gradient clipping", "optimizer")


@dataclass(frozen=True)
class Setup:
    """What a run needs before its first step. `config.max_iters` is settled.

    `learner` is the model, the model compiled, or what shares its gradients with other processes:
    the same weights. A step calls it; evaluations, samples and checkpoints take the model as it is,
    whose shapes may change.
    """

    config: ModelConfig
    sources: dict[str, str]
    start: ResumePlan
    device: torch.device
    data: Dataset
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    learner: Callable[..., tuple[Tensor, Tensor | None]]
    compiled: CompileResult
    world: World = SINGLE_PROCESS
    callbacks: Mapping[str, CallbackFactory] = field(default_factory=dict)


def training_step(
    setup: Setup,
    step: int,
    phase: Callable[[str], AbstractContextManager] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Learn from the batch of `step`, each process from its own rows, a micro-batch at a time.

    Returns the mean loss over the whole batch and the norm of its gradient before clipping, both
    scalars that are still on the device. The gradient itself, as clipped, stays with the
    parameters until the next step.

    Args:
        setup: the model and all that trains it.
        step: the number of the update, counted from 0.
        phase: surrounds each of `PHASES`, for those who measure.
    """
    config, tokens = setup.config, setup.data.splits["train"]
    total = torch.zeros((), device=setup.device)
    with phase("optimizer"):
        setup.optimizer.zero_grad(set_to_none=True)
    mine = setup.world.get_rows(config.batch_size)
    for rows in split_micro_batches(config, mine):
        with phase("data"):
            inputs, targets = get_batch(
                tokens,
                step,
                seed=config.seed,
                batch_size=config.batch_size,
                block_size=config.block_size,
                rows=rows,
                order=config.window_order,
            )
            inputs, targets = inputs.to(setup.device), targets.to(setup.device)
        with defer_gradient_sync(setup.learner, is_last=rows.stop == mine.stop):
            with phase("forward"), autocast(setup.device, setup.precision):
                _, loss = setup.learner(inputs, targets)
                # Each micro-batch counts by its rows: their number changes nothing but memory.
                loss = loss * (inputs.size(0) / (mine.stop - mine.start))
            with phase("backward"):
                setup.scaler.scale(loss).backward()
        total += loss.detach() / setup.world.size
    setup.world.all_reduce_sum(total)
    with phase("gradient clipping"):
        setup.scaler.unscale_(setup.optimizer)
        grad_norm = clip_gradients(setup.model, config.grad_clip)
    with phase("optimizer"):
        set_learning_rate(setup.optimizer, learning_rate_at(step, config))
        setup.scaler.step(setup.optimizer)  # in fp16, skipped if gradients have overflowed
        setup.scaler.update()
    return total, grad_norm


def estimate_loss(
    model: LanguageModel,
    data: Dataset,
    config: ModelConfig,
    precision: str = "fp32",
    world: World = SINGLE_PROCESS,
) -> dict[str, float]:
    """The mean loss of the train and val splits, in nats per token, on their fixed windows.

    As many windows at once as are quick, and each process some of them; how many changes nothing
    but rounding. Where `eval_iters` is 0, train is measured on as many windows as val has.
    """
    rows = count_parallel_windows(model) * world.size
    most = count_windows(data.splits["val"], config)
    losses = {}
    with evaluation_mode(model):
        for split in ("train", "val"):
            total, count = torch.zeros((), device=next(model.parameters()).device), 0
            tokens = data.splits[split]
            for inputs, targets in iter_evaluation_batches(tokens, config, rows=rows, most=most):
                count += targets.numel()
                # All ranks must call a sharded model: one without a window repeats another.
                has_own = world.rank < len(inputs)
                own = slice(world.rank if has_own else 0, None, world.size)
                loss = compute_loss(model, inputs[own], targets[own], precision)
                total += loss * (targets[own].numel() * has_own)
            losses[split] = world.all_reduce_sum(total).item() / count
    return losses


def bits_per_byte(losses: dict[str, float], data: Dataset) -> dict[str, float]:
    """Losses as bits for each byte of the text: comparable between models of any tokenizer."""
    return {s: loss / math.log(2) / data.bytes_per_token[s] for s, loss in losses.items()}
