"""Train a model: the run, the loop, the step and the evaluation.

`train` is a run from start to end. `Trainer.run_loop` is the training loop: steps, evaluations,
checkpoints. `Trainer.training_step` is the step itself: batch, forward, backward, gradient
accumulation, clipping, schedule, update. `profile_model.py` measures this same step.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import budget
import resume
from bundle import (
    TRAINING_SETTINGS,
    Bundle,
    TrainingState,
    copy_bundle,
    find_kept_step,
    find_run_of,
    load_tokenizer,
)
from callbacks import (
    Best,
    CallbackFactory,
    Callbacks,
    EarlyStopping,
    Evaluation,
    Step,
    TrainResult,
    find_overfitting,
)
from checkpoint import CheckpointWriter, load_weights, restore_training_state
from config import ConfigLoader, LoadedConfig, format_settings, upgrade_settings
from data import (
    Batch,
    Dataset,
    count_windows,
    get_batch,
    iter_evaluation_batches,
    load_dataset,
    split_micro_batches,
)
from distributed import (
    SINGLE_PROCESS,
    World,
    check_same_settings,
    defer_gradient_sync,
    derive_seed,
    gather_to_main,
    open_world,
    shard_model,
    wrap_ddp,
)
from model import LanguageModel
from optim import clip_gradients, create_optimizer, learning_rate_at, set_learning_rate
from parameters import SHAPE_SETTINGS, ModelConfig
from run_record import (
    log_best_sample,
    open_log,
    open_run,
    record_end,
    record_failure,
    record_result,
    sample_text,
    translate_failures,
)
from utils import summary
from utils.device import (
    DTYPES,
    CompileResult,
    autocast,
    choose_backend,
    choose_device,
    choose_precision,
    compile_model,
    configure_matmul,
    describe_device,
    get_peak_memory,
    use_deterministic_kernels,
)
from utils.errors import UserError
from utils.evaluation import count_parallel_windows, enter_evaluation_mode
from utils.kernels import is_attention_causal
from utils.memory import keep_freed_memory
from utils.output import Output
from utils.ranks import Ranks
from utils.run_manager import RunDirectory
from utils.stop import StopRequest
from utils.threads import CoreBinding
from utils.tracking.aim import require_aim
from utils.tracking.run_logger import RunLogger

PHASES = ("data", "forward", "backward", "gradient clipping", "optimizer")  # of a training step
SAMPLE_TOKENS = 40  # during training: all samples take less than 1 % of the default run
MIN_MINUTES_TO_COMPILE = 4.0  # below this time limit, compiling takes longer than it saves


def train(
    config: ModelConfig | None = None,
    *,
    loaded: LoadedConfig | None = None,
    plan: resume.ResumePlan | None = None,
    argv: Sequence[str] = (),
    output: Output | None = None,
    callbacks: Mapping[str, CallbackFactory] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a model in a new run directory. Under torchrun, all processes call this.

    `train(data="dante.txt", max_iters=500)` is `train.py --data dante.txt --max-iters 500`, also in
    a notebook. Outside the main thread, a signal does not stop it after a step.

    Args:
        config: all settings. None: `settings`, and those of all other sources.
        loaded: the settings and their sources, for the record. None: `config` was made in Python.
        plan: the start of the run, from `resume.plan_run`. None: `init_from`, else scratch.
        argv: the command line, for the record.
        output: the console; `Output(quiet=True)` prints nothing.
        callbacks: functions of the settings that return a callback (callbacks.py), by name.
        settings: some settings, instead of `config`.

    Raises:
        UserError: a setting, the device, the text, `runs_dir` or the initial model cannot be used,
            a callback cannot be created, Aim is requested but not installed, or another process
            trains the named model. Raised before a run directory is created.
        NothingToDo: the model to resume has been trained for `max_iters` steps, or early stopping
            has ended its training. Nothing changed.
        RunError: the run cannot go on: non-finite loss, full disk, out of memory, a dead process.
        EndedOnAnotherRank: another rank raised one of these.
        KeyboardInterrupt, SystemExit: a second Ctrl-C, or SIGTERM.
    """
    output = output or Output()
    if config is None and (loaded or plan):
        raise TypeError("give train() the config, too, that belongs to loaded and plan")
    if config is None:
        loaded, plan = resume.plan_run(ConfigLoader.from_settings(settings, "train()"))
        config = loaded.config
        for note in loaded.notes:
            output.print(note)
    elif settings:
        raise TypeError(f"give {', '.join(settings)} to ModelConfig(), or train() no config")
    try:
        with (
            record_failure(output),
            translate_failures(config),
            open_world(config) as world,
        ):
            trainer = prepare_trainer(
                config, loaded, plan, callbacks, world=world, on_progress=output.print
            )
            with (
                world.enter_on_main(resume.lock_named_model(trainer.plan.named_model)),
                StopRequest(is_one_of_several=world.size > 1) as stop,
            ):
                world.broadcast_from_main(resume.check_unchanged, trainer.plan)
                with open_callbacks(trainer, output) as called:
                    run = world.broadcast_from_main(open_run, trainer, loaded, argv, output)
                    with record_end(trainer, run, output):
                        with contextlib.closing(open_log(trainer, run, output)) as log:
                            result = trainer.run_loop(run, log, called, output, stop)
                            result = world.broadcast_from_main(
                                log_best_sample, trainer, result, log
                            )
                        called.at_end(result)
                        world.broadcast_from_main(record_result, trainer, result, run, output)
            return result
    finally:
        output.close()


class Trainer:
    """A model and everything needed to train it.

    Attributes:
        config: the settings; `max_iters` is not None.
        sources: the source of each setting.
        plan: the start: scratch, a checkpoint or a parent.
        callbacks: factories of the user's callbacks, by name.
        model: the network, not compiled: for evaluation, sampling and saving, whose shapes vary.
        train_model: the model that the training step calls, possibly compiled and wrapped in DDP.
        scaler: the loss scaler of fp16; disabled otherwise.
        precision: that of matrix products: fp32, bf16 or fp16.
        compile_result: the outcome of torch.compile.
    """

    def __init__(
        self,
        config: ModelConfig,
        data: Dataset,
        device: torch.device,
        plan: resume.ResumePlan | None = None,
        bundle: Bundle | None = None,
        *,
        sources: Mapping[str, str] | None = None,
        callbacks: Mapping[str, CallbackFactory] | None = None,
        on_progress: Callable[[str], None] | None = None,
        world: World = SINGLE_PROCESS,
    ):
        """Create a model and its optimizer, and load the plan's bundle. All ranks call this.

        `bundle` is the plan's with the bytes of its files, which stay in memory while the caller
        keeps it. `on_progress` is called with a line before the model is compiled.
        """
        self.config, self.data, self.device, self.world = config, data, device, world
        self.plan = plan or resume.ResumePlan()
        self.sources, self.callbacks = sources or {}, callbacks or {}
        self.overfits_since: int | None = None
        torch.manual_seed(config.seed)
        self.model = LanguageModel(config, data.tokenizer.vocab_size, data.tokenizer.num_tokens)
        if bundle is not None:
            load_weights(bundle, self.model)
        if self.is_sharded:
            shard_model(self.model, device)
        self.model.to(device)
        if world.rank > 0:  # so that dropout masks differ between ranks
            torch.manual_seed(derive_seed(config.seed, world.rank, self.plan.start_step))
        self.precision = choose_precision(config.precision, device)
        check_causality(config, device, self.precision)
        self.optimizer = create_optimizer(self.model, config, DTYPES[self.precision])
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.train_model, self.compile_result = self.create_train_model(on_progress)
        if bundle is not None and self.plan.is_resume and not self.plan.reset_optimizer:
            # Last: this restores the RNG state, which everything above may have advanced.
            restore_training_state(bundle, self.model, self.optimizer, self.scaler, world)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a shard of the model only."""
        return self.world.size > 1 and self.config.parallel == "fsdp"

    def create_train_model(
        self, on_progress: Callable[[str], None] | None
    ) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], CompileResult]:
        """Compile the model if enabled and supported; wrap it in DDP if there are several ranks.

        Raises `UserError` if compiling was requested and does not work.
        """
        config, world = self.config, self.world
        if self.is_sharded:
            return self.model, CompileResult("off", "parallel is fsdp")
        tokens = (config.max_iters or 1) * config.tokens_per_step
        # FLOPs of the whole run: 6 per parameter and token (arxiv.org/abs/2001.08361), without the
        # table of n-grams, which may have most of the parameters and is in no product.
        table = self.model.ngram_embedding
        parameters = self.model.count_parameters() - (0 if table is None else table.weight.numel())
        flops = 6.0 * parameters * tokens
        if config.max_minutes is not None and config.max_minutes < MIN_MINUTES_TO_COMPILE:
            flops = 0.0
        backend = choose_backend(config.torch_compile, config.compile_backend, self.device, flops)
        if backend.mode != "off" and on_progress:
            on_progress(f"Compiling the model ({backend.mode}), which can take a minute …")

        def probe(train_model: Callable) -> None:
            """Run forward and backward once with each micro-batch size."""
            micro_batches = split_micro_batches(config, world.get_rows(config.batch_size))
            for rows in {rows.stop - rows.start: rows for rows in micro_batches}.values():
                inputs, targets = self.load_batch(0, rows)
                with use_deterministic_kernels(self.device):
                    with autocast(self.device, self.precision):
                        _, loss = train_model(inputs, targets)
                    loss.backward()
            self.model.zero_grad()

        model, result = compile_model(self.model, backend, config.torch_compile, probe)
        return wrap_ddp(model, self.device, world), result

    def run_loop(
        self,
        run: RunDirectory,
        log: RunLogger,
        callbacks: Callbacks,
        output: Output,
        stop: StopRequest,
    ) -> TrainResult:
        """Train from `plan.start_step` to `max_iters`; log, evaluate and save along the way."""
        config, world = self.config, self.world
        best = world.broadcast_from_main(restore_best, self, run, output)
        checkpoints = self.open_checkpoints(run)
        losses: dict[str, float | None] = {"train": None, "val": None}
        last_evaluated = last_sampled = self.plan.start_step
        time_limit = config.max_minutes * 60 if config.max_minutes else math.inf  # seconds
        start_time = time.monotonic()

        def save(step: int) -> None:
            val_loss = losses["val"] if step == last_evaluated else None
            checkpoints.save(self.get_state(run, step, val_loss, best))

        checkpoints.create_named_model(self.get_state(run, self.plan.start_step, None, best))
        # A sharded model cannot begin with inference: its first all-gather must be of training.
        if config.sample_interval and self.plan.start_step == 0 and not self.is_sharded:
            note = "" if self.plan.bundle else summary.format_guess(self.data.tokenizer)
            log.log_sample(0, sample_text(self.model, self.data, config, SAMPLE_TOKENS), note)
        log.reset_timer()
        alone_on_cpu = world.size == 1 and self.device.type == "cpu"
        cores = CoreBinding(torch.get_num_threads() if alone_on_cpu else 0, output.print)
        with output.show_progress(config.max_iters, self.plan.start_step), cores:
            for index in range(self.plan.start_step, config.max_iters):
                loss, grad_norm = self.training_step(index)
                step = index + 1  # the number of steps done
                learning_rate = learning_rate_at(index, config)
                if is_due(step, config.histogram_interval):
                    # Before log_step, which ends the run on a non-finite loss.
                    log.log_histograms(step, collect_weights_and_gradients(self.model, world))
                log.log_step(step, loss, grad_norm, learning_rate)
                cores.update()
                stop_reason = callbacks.after_step(
                    Step(step, loss, grad_norm, learning_rate, run.path, config)
                )
                if stop_reason is None and time.monotonic() - start_time > time_limit:
                    stop_reason = f"the time limit of max_minutes {config.max_minutes:g} is reached"
                interrupted, stop_reason = agree_to_stop(world, stop, stop_reason)

                is_last = step == config.max_iters or stop_reason is not None
                should_evaluate = is_last or is_due(step, config.eval_interval)
                should_save = is_due(step, config.checkpoint_interval, config.keep_every)
                if not (should_evaluate or should_save or interrupted):
                    continue
                log.flush_steps()  # a non-finite loss among them ends the run before a save
                if interrupted:
                    how = " (Ctrl-C again aborts)" if world.size == 1 else ""
                    output.print(f"Stopping after step {step}: saving{how}")
                    if should_evaluate:
                        save(step)  # first: the user may not wait for the evaluation
                if should_evaluate:
                    last_evaluated = step
                    losses = self.evaluate()
                    best, reason = self.log_evaluation(step, losses, best, run, log, callbacks)
                    interrupted, stop_reason = agree_to_stop(world, stop, stop_reason or reason)
                    is_last = is_last or stop_reason is not None
                if should_save or is_last or interrupted or best.step == step:
                    save(step)
                is_sample_due = 0 < config.sample_interval <= step - last_sampled
                if should_evaluate and is_sample_due and not interrupted:
                    last_sampled = step
                    text = sample_text(self.model, self.data, config, SAMPLE_TOKENS)
                    log.log_sample(step, text)
                if is_last or interrupted:
                    break
                log.reset_timer()
        return TrainResult(
            run_dir=run.path,
            export_dir=run.export,
            checkpoint=checkpoints.newest,
            step=step,
            train_loss=losses["train"],
            val_loss=losses["val"],
            best_step=best.step,
            best_val_loss=best.loss,
            seconds=time.monotonic() - start_time,
            exit_status=stop.exit_status,
            stopped_by=stop_reason if step < config.max_iters else None,
            overfitting=find_overfitting(best, losses["train"], losses["val"]),
        )

    def training_step(
        self, index: int, phase: Callable[[str], AbstractContextManager] = nullcontext
    ) -> tuple[Tensor, Tensor]:
        """Run one optimizer step on batch `index`; each rank processes its rows in micro-batches.

        Returns the mean loss over the whole batch and the gradient norm before clipping, scalars
        that stay on the device. The clipped gradients stay in `.grad` until the next step.
        `phase(name)` returns a context manager, which is entered around each of PHASES: a profiler
        gives its own.
        """
        config, world = self.config, self.world
        batch_loss = torch.zeros((), device=self.device)
        with phase("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        own_rows = world.get_rows(config.batch_size)
        for rows in split_micro_batches(config, own_rows):
            with phase("data"):
                inputs, targets = self.load_batch(index, rows)
            is_last = rows.stop == own_rows.stop
            with (
                defer_gradient_sync(self.train_model, is_last=is_last),
                use_deterministic_kernels(self.device),
            ):
                with phase("forward"), autocast(self.device, self.precision):
                    _, loss = self.train_model(inputs, targets)
                    # Weighted by the micro-batch's share of this rank's rows: the gradients add up
                    # to that of their mean loss.
                    loss = loss * (inputs.size(0) / (own_rows.stop - own_rows.start))
                with phase("backward"):
                    self.scaler.scale(loss).backward()
            batch_loss += loss.detach() / world.size
        world.all_reduce_sum(batch_loss)
        with phase("gradient clipping"):
            self.scaler.unscale_(self.optimizer)
            grad_norm = clip_gradients(self.model, config.grad_clip)
        with phase("optimizer"):
            set_learning_rate(self.optimizer, learning_rate_at(index, config))
            self.scaler.step(self.optimizer)  # in fp16, skipped if gradients have overflowed
            self.scaler.update()
        return batch_loss, grad_norm

    def load_batch(self, index: int, rows: slice) -> Batch:
        """Return rows of training batch `index` on the device: inputs and targets, `(B, T)`."""
        inputs, targets = get_batch(self.data.splits["train"], index, self.config, rows)
        if self.device.type == "cuda":  # from pinned memory: the copy does not wait for the device
            inputs, targets = (part.contiguous().pin_memory() for part in (inputs, targets))
        return tuple(part.to(self.device, non_blocking=True) for part in (inputs, targets))

    def evaluate(self, eval_iters: int | None = None) -> dict[str, float]:
        """Return the mean loss of the train and val splits, in nats per token.

        `eval_iters` takes the place of the setting.
        """
        config = self.config
        if eval_iters is not None:
            config = config.model_copy(update={"eval_iters": eval_iters})
        return estimate_loss(self.model, self.data, config, self.precision, self.world)

    def log_evaluation(
        self,
        step: int,
        losses: Mapping[str, float],
        best: Best,
        run: RunDirectory,
        log: RunLogger,
        callbacks: Callbacks,
    ) -> tuple[Best, str | None]:
        """Log an evaluation and pass it to the callbacks.

        Returns the best evaluation so far, and a callback's reason to stop, if any.
        """
        bits = self.data.compute_bits_per_byte(losses)
        is_best = best.loss is None or losses["val"] < best.loss
        log.log_evaluation(step, losses, bits, is_best=is_best)
        if is_best:
            best = Best(step, losses["val"])
        else:
            best = replace(best, evaluations_since=best.evaluations_since + 1)
            if find_overfitting(best, **losses) and self.overfits_since != best.step:
                self.overfits_since = best.step  # noted once
                log.output.print(summary.format_overfitting(best, losses["val"]))
        evaluation = Evaluation(
            step=step,
            train_loss=losses["train"],
            val_loss=losses["val"],
            val_bits_per_byte=bits["val"],
            best=best,
            run_dir=run.path,
            config=self.config,
        )
        return best, callbacks.after_evaluation(evaluation)

    def open_checkpoints(self, run: RunDirectory) -> CheckpointWriter:
        """Create the writer of the run's checkpoints, its export, and the named model."""
        return CheckpointWriter(
            run,
            self.plan.named_model,
            self.model,
            self.optimizer,
            self.scaler,
            self.data.tokenizer,
            self.config,
            self.world,
        )

    def get_state(
        self, run: RunDirectory, step: int, val_loss: float | None, best: Best
    ) -> TrainingState:
        """Build the state that a checkpoint after `step` records."""
        config, plan = self.config, self.plan
        settings = {name: getattr(config, name) for name in TRAINING_SETTINGS}
        facts = {
            "start_step": plan.start_step,
            "previous_runs": plan.previous_runs,
            "best_step": best.step,
            "evaluations_since_best": best.evaluations_since,
            "data_sha256": self.data.sha256,
            "computed_in": self.precision,
            "compiled_by": self.compile_result.mode,
            "processes": self.world.size,
            "model_name": plan.named_model.name if plan.named_model else None,
            "run_tag": plan.run_tag,
        }
        return TrainingState(
            step=step,
            optimizer_file=None,
            best_val_loss=best.loss,
            val_loss=val_loss,
            run_id=run.run_id,
            lineage=plan.lineage,
            training_config={**settings, "data": self.data.path, **facts},
        )


def is_due(step: int, *intervals: int) -> bool:
    """Return whether `step` is a multiple of one of `intervals`; 0 is never due."""
    return any(interval > 0 and step % interval == 0 for interval in intervals)


def agree_to_stop(world: World, stop: StopRequest, reason: str | None) -> tuple[bool, str | None]:
    """Agree across ranks whether to stop: on a signal to any rank, or for rank 0's reason.

    A later signal takes effect at the next call: a rank that acted alone would deadlock the others.
    """
    if world.size == 1:
        return stop.requested, reason
    has_reason = int(reason is not None and world.is_main)
    signal, has_reason = world.all_reduce_max(stop.signal, has_reason)
    stop.signal = stop.signal or signal
    return bool(signal), (world.broadcast(reason) if has_reason else None)


def estimate_loss(
    model: LanguageModel,
    data: Dataset,
    config: ModelConfig,
    precision: str = "fp32",
    world: World = SINGLE_PROCESS,
) -> dict[str, float]:
    """Return the mean loss of the train and val splits on their fixed windows, in nats per token.

    The windows are divided among the ranks. If `eval_iters` is 0, train has at most as many as val.
    """
    rows = count_parallel_windows(model) * world.size
    most = count_windows(data.splits["val"], config)
    losses, device = {}, next(model.parameters()).device
    with enter_evaluation_mode(model):
        for split in ("train", "val"):
            total, count = torch.zeros((), device=device), 0
            tokens = data.splits[split]
            for inputs, targets in iter_evaluation_batches(tokens, config, rows, most):
                count += targets.numel()
                has_own = world.rank < len(inputs)
                # All ranks must call a sharded model: one without a window repeats rank 0's.
                own = slice(world.rank if has_own else 0, None, world.size)
                with autocast(device, precision):
                    _, loss = model(inputs[own].to(device), targets[own].to(device))
                total += loss * (targets[own].numel() if has_own else 0)
            losses[split] = world.all_reduce_sum(total).item() / count
    return losses


def collect_weights_and_gradients(
    model: LanguageModel, world: World = SINGLE_PROCESS
) -> dict[str, Tensor]:
    """Return every parameter and its clipped gradient; if sharded, gathered on rank 0 alone."""
    parameters = dict(model.named_parameters())
    gradients = {f"gradients/{n}": p.grad for n, p in parameters.items() if p.grad is not None}
    tensors = {f"parameters/{name}": p for name, p in parameters.items()} | gradients
    collected = {name: gather_to_main(tensor, world) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in collected.items() if tensor is not None}


# ----------------------------------------------------------------------------------------------
# Set-up and resume


def prepare_trainer(
    config: ModelConfig,
    loaded: LoadedConfig | None = None,
    plan: resume.ResumePlan | None = None,
    callbacks: Mapping[str, CallbackFactory] | None = None,
    *,
    world: World = SINGLE_PROCESS,
    on_progress: Callable[[str], None] | None = None,
) -> Trainer:
    """Create everything that a run needs before its first step. All ranks call this.

    Raises `UserError` for a device, a text or a bundle that cannot be used, and `NothingToDo`.
    """
    plan = plan or resume.plan_from_config(config)
    check_same_settings(world, (config, plan.bundle and plan.bundle.state))
    resume.check_steps_left(config, plan)
    if config.aim_logging:
        require_aim(config)
    device = open_device(config)
    if loaded is not None:
        sources = dict(loaded.sources)
    else:
        given = config.model_fields_set
        sources = {n: "train()" if n in given else "default" for n in ModelConfig.model_fields}
    bundle = resume.read_start_bundle(plan)

    def load() -> Dataset:
        return load_dataset(
            config,
            tokenizer=load_tokenizer(bundle) if bundle else None,
            may_extend=not plan.is_resume,
            # A model trained on the sample corpus resumes on it, whatever input.txt is there now.
            use_sample_corpus=plan.is_resume and sources["data"] == str(plan.bundle.path),
            on_progress=on_progress,
        )

    data = world.run_on_all_ranks(load)
    create_trainer = partial(
        Trainer, data=data, device=device, world=world, on_progress=on_progress
    )
    if config.size == "auto":
        if on_progress:
            on_progress("Measuring the speed of models of several sizes …")
        config = budget.settle_size(config, data, device, world, create_trainer)
        for name in SHAPE_SETTINGS:
            sources[name] = f"size auto ({sources['size']})"
    budget.check_memory_of_rank(config, data, device, world)
    if loaded is not None:
        resume.check_rerun(loaded, plan, data.name, data.sha256)
    precision = choose_precision(config.precision, device)
    if plan.is_resume and is_comparable(config, data, precision, plan.bundle.state):
        resume.check_not_stopped_early(config, plan)
    settled, setting = budget.settle_length(config, data, plan.start_step, create_trainer)
    if setting != "max_iters":
        sources["max_iters"] = f"{setting} {getattr(config, setting):g} ({sources[setting]})"
        resume.check_steps_left(settled, plan)
    with translate_failures(settled):
        return create_trainer(
            settled,
            plan=plan,
            bundle=bundle,
            sources=sources,
            callbacks=callbacks,
            # Compiled already, to be measured: a second time takes seconds.
            on_progress=None if setting == "max_minutes" else on_progress,
        )


def open_device(config: ModelConfig) -> torch.device:
    """Choose the device, and configure it, CPU threads and memory. Raises `UserError`."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config.device, Ranks.from_environment())
    if device.type == "cpu":
        keep_freed_memory()
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # so that plain "cuda" means this device
    configure_matmul(device, config.precision)
    return device


def check_causality(config: ModelConfig, device: torch.device, precision: str) -> None:
    """Raise `UserError` if attention sees later positions or is not finite."""
    D = config.n_embd // config.n_head
    with use_deterministic_kernels(device):  # which training uses
        is_causal = is_attention_causal(
            config.n_head, config.block_size, D, device, DTYPES[precision]
        )
    if not is_causal:
        raise UserError(
            f"attention in {precision} on {describe_device(device)} sees later positions or is not "
            "finite, which is a bug of PyTorch: a model would learn nothing. Use another "
            "--precision or --device, or update PyTorch"
        )


def restore_best(trainer: Trainer, run: RunDirectory, output: Output) -> Best:
    """Return the best evaluation before a resumed run, and copy its model to the run's export.

    If that model is missing or damaged, or was evaluated differently, the best is reset.
    """
    plan, config = trainer.plan, trainer.config
    if not plan.is_resume or plan.bundle.state.best_val_loss is None:
        return Best()
    state = plan.bundle.state
    since = state.get_fact("evaluations_since_best") or 0
    best = Best(state.get_fact("best_step"), state.best_val_loss, since)
    comparable = is_comparable(config, trainer.data, trainer.precision, state)
    earlier_run = find_run_of(plan.bundle.path) or Path(config.runs_dir) / str(state.run_id)
    if comparable and best.step and (place := find_kept_step(earlier_run, best.step)):
        with contextlib.suppress(UserError):  # damaged, or just removed by its own run
            copy_bundle(place, run.export, with_optimizer=False)
            return best
    why = "is missing or damaged" if comparable else "was evaluated differently"
    output.print(
        f"Note: the best model so far (step {best.step}) {why}, so the best val loss is reset\n"
    )
    return Best()


def is_comparable(config: ModelConfig, data: Dataset, precision: str, state: TrainingState) -> bool:
    """Return whether val losses of a run with `config` are comparable with those of `state`."""
    measure = ("eval_iters", "train_split", "test_split", "split_by", "on_new_chars")
    recorded = upgrade_settings(state.settings)
    return (
        data.sha256 == state.get_fact("data_sha256")
        and precision == (state.get_fact("computed_in") or "fp32")
        and all(recorded.get(name) == getattr(config, name) for name in measure)
    )


@contextlib.contextmanager
def open_callbacks(trainer: Trainer, output: Output) -> Iterator[Callbacks]:
    """Create early stopping, if requested, and the user's callbacks, on rank 0 only.

    `at_end` is called even if the run fails. Raises `UserError` if a callback cannot be created.
    """
    patience = trainer.config.early_stopping_patience
    own = {"early stopping": lambda _: EarlyStopping(patience)} if patience else {}
    callbacks = Callbacks(output.print_warning)
    try:
        factories = {**own, **trainer.callbacks}
        trainer.world.broadcast_from_main(callbacks.add, factories, trainer.config)
        yield callbacks
    finally:
        callbacks.at_end(None)  # no-op for callbacks that already received a result


def dry_run(
    loaded: LoadedConfig,
    plan: resume.ResumePlan | None = None,
    on_progress: Callable[[str], None] | None = None,
    *,
    show_config: bool = False,
) -> str:
    """Return the banner of a run, its memory and time, and with `show_config` every setting.

    Writes only caches that the run reuses: an encoded text, or standard input.
    """
    with translate_failures(loaded.config), open_world(loaded.config) as world:
        trainer = prepare_trainer(loaded.config, loaded, plan, world=world, on_progress=on_progress)
        speed = budget.measure_speed(trainer)
        peak_memory = get_peak_memory(trainer.device)
        suggestion = None
        if loaded.config.size is None:
            create = partial(Trainer, data=trainer.data, device=trainer.device, world=world)
            suggestion = budget.suggest_size(trainer, *speed, create)
    banner = summary.format_banner(trainer, loaded.changes)
    estimate = summary.format_estimate(trainer, *speed, peak_memory)
    settings = format_settings(LoadedConfig(trainer.config, trainer.sources))
    lines = [
        banner,
        estimate,
        *([suggestion] if suggestion else []),
        *(["", settings] if show_config else []),
    ]
    return "\n".join(lines)
