"""The memory and time that a run takes: how many steps fit, and which size of model."""

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from data import Dataset, count_windows, split_micro_batches
from distributed import World
from parameters import ModelConfig
from utils import summary
from utils.device import synchronize
from utils.errors import UserError
from utils.memory import check_memory, is_out_of_memory
from utils.sizes import MIN_GAIN, SIZES, Size, SizeEstimate, choose_size, predict_loss

if TYPE_CHECKING:
    from trainer import Trainer


def check_memory_of_rank(
    config: ModelConfig, data: Dataset, device: torch.device, world: World
) -> None:
    """Raise `UserError` if this rank's part of a step does not fit into its device's memory."""
    if world.size > 1 and config.parallel == "fsdp":
        return  # each rank holds a shard of the model
    rows = split_micro_batches(config, world.get_rows(config.batch_size))[0]
    check_memory(config, data.tokenizer.vocab_size, device, rows.stop - rows.start)


def settle_length(
    config: ModelConfig,
    data: Dataset,
    start_step: int,
    create_trainer: Callable[[ModelConfig], "Trainer"],
) -> tuple[ModelConfig, str]:
    """Return the config with `max_iters` set, and the name of the setting that determined it.

    A recorded number of steps makes the run reproducible on any machine. `create_trainer` creates a
    model to be measured and thrown away.
    """
    if config.max_iters is not None:
        return config, "max_iters"
    if config.epochs is not None:
        max_iters = math.ceil(config.epochs * data.splits["train"].size / config.tokens_per_step)
        return config.model_copy(update={"max_iters": max_iters, "epochs": None}), "epochs"
    assert config.max_minutes is not None
    seconds = config.max_minutes * 60
    changes: dict[str, Any] = {"max_iters": 1, "max_minutes": None}
    steps = count_steps(create_trainer(config.model_copy(update=changes)), seconds)
    changes["max_iters"] = start_step + max(1, steps)
    if config.torch_compile == "auto":  # so many steps may be worth compiling, which fits more
        trainer = create_trainer(config.model_copy(update=changes))
        if trainer.compile_result.mode != "off":
            changes["max_iters"] = start_step + max(1, count_steps(trainer, seconds))
    return config.model_copy(update=changes), "max_minutes"


def settle_size(
    config: ModelConfig,
    data: Dataset,
    device: torch.device,
    world: World,
    create_trainer: Callable[[ModelConfig], "Trainer"],
) -> ModelConfig:
    """Return the config with the shape that is predicted to reach the lowest loss in `max_minutes`.

    Raises `UserError` if the run would read the text more than `summary.MANY_EPOCHS` times.
    """
    minutes = config.max_minutes
    assert minutes is not None
    estimate = find_best_size(config, data, device, world, minutes * 60, create_trainer)
    epochs = summary.count_epochs(config, data, estimate.steps)
    if epochs > summary.MANY_EPOCHS:
        raise UserError(
            f"size auto: in {minutes:g} minutes, {estimate.size.n_layer} layers of "
            f"{estimate.size.n_embd} channels would read this text {epochs:.0f} times and memorize "
            "it: take --config configs/presets/small_text.yaml, a longer text or a shorter time"
        )
    return config.model_copy(update={**estimate.size._asdict(), "size": None})


def suggest_size(
    trainer: "Trainer",
    step_seconds: float,
    evaluation_seconds: float,
    create_trainer: Callable[[ModelConfig], "Trainer"],
) -> str | None:
    """Return a line about a size with a lower predicted loss in the time of this run, or None.

    The scaling law is of the losses of characters.
    """
    config, data = trainer.config, trainer.data
    seconds = summary.estimate_seconds(trainer, step_seconds, evaluation_seconds)
    is_fitted = config.architecture == "modern" and config.tokenizer == "char"
    if trainer.plan.bundle is not None or seconds < 60 or not is_fitted:
        return None
    better = find_best_size(config, data, trainer.device, trainer.world, seconds, create_trainer)
    num_tokens = config.max_iters * config.tokens_per_step
    own = Size(config.n_layer, config.n_embd, config.n_head)
    loss = predict_loss(own.num_weights, num_tokens, data.splits["train"].size)
    if (
        better.loss > loss - MIN_GAIN
        or summary.count_epochs(config, data, better.steps) > summary.MANY_EPOCHS
    ):
        return None
    return summary.format_suggestion(better, loss, seconds)


def find_best_size(
    config: ModelConfig,
    data: Dataset,
    device: torch.device,
    world: World,
    seconds: float,
    create_trainer: Callable[[ModelConfig], "Trainer"],
) -> SizeEstimate:
    """Measure the speed of larger and larger models, until a larger one is predicted to be worse.

    All ranks call this, and return the same.
    """

    def measure(size: Size) -> int:
        """Return how many steps of a model of this size fit, 0 if it is too large."""
        # Compiling would take longer than the measurement.
        changes = {**size._asdict(), "torch_compile": "off", "max_iters": 1, "size": None}
        candidate = config.model_copy(update=changes)
        try:
            check_memory_of_rank(candidate, data, device, world)
            fits = True
        except UserError:
            fits = False
        if not all(world.all_gather(fits)):
            return 0
        try:
            return count_steps(create_trainer(candidate), seconds, time_limit=1.0)
        except (RuntimeError, MemoryError) as error:
            # The other ranks would wait forever: the error ends the run.
            if world.size > 1 or not is_out_of_memory(error):
                raise
            return 0

    return choose_size(measure, config.tokens_per_step, data.splits["train"].size, SIZES)


def count_steps(trainer: "Trainer", seconds: float, *, time_limit: float = 5.0) -> int:
    """Measure how many steps fit into `seconds`, with their share of the evaluations."""
    step, evaluation = measure_speed(trainer, time_limit=time_limit)
    return int(seconds / (step + evaluation / (trainer.config.eval_interval or math.inf)))


def measure_speed(trainer: "Trainer", *, time_limit: float = 5.0) -> tuple[float, float]:
    """Return the seconds of a training step and of a whole evaluation, those of rank 0.

    Runs 3 to 20 steps, until `time_limit` seconds have passed; they train the model.
    """
    world = trainer.world
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 20 and sum(seconds) < time_limit):
        start = time.perf_counter()
        trainer.training_step(len(seconds))
        synchronize(trainer.device)
        seconds.append(world.broadcast(time.perf_counter() - start))
    median = statistics.median_high(seconds[1:])  # without the first, a warmup
    return world.broadcast((median, time_evaluation(trainer)))


def time_evaluation(trainer: "Trainer") -> float:
    """Estimate the seconds of a whole evaluation from one batch of each split."""
    config = trainer.config
    trainer.evaluate(eval_iters=1)  # warmup
    start = time.perf_counter()
    trainer.evaluate(eval_iters=1)
    seconds = time.perf_counter() - start
    windows = count_windows(trainer.data.splits["val"], config)
    return seconds * (config.eval_iters or windows / config.batch_size)
