"""Train a character-level GPT from one text file, and keep the whole record of the run.

    python train.py --run-tag baseline
    python train.py --data dante.txt --max-iters 5000 --n-layer 6

The same from Python: `train(ModelConfig(data="dante.txt"))`, with the defaults of parameters.py;
`ConfigLoader().load({"data": "dante.txt"}).config` reads configs/ too.

`main()` stands first and imports nothing heavy: `--help` and every mistake in the settings are
answered at once. Below it is the run, to be read from top to bottom.
"""

import sys
from collections.abc import Sequence

from config import CHECKOUT, ConfigLoader, LoadedConfig, describe
from parameters import ALIASES, GROUPS, ModelConfig
from utils.command_line import Action, CommandLine
from utils.output import Output, run_command

ACTIONS = (
    Action(
        "config", "Take settings from a YAML or JSON file, or a run's full_config.json.", "FILE"
    ),
    Action("show_config", "Print every setting with its source, and exit."),
    Action("dry_run", "Say what the run would be and take, from a few real steps, and exit."),
)


def main(argv: Sequence[str]) -> int:
    """The command: settle the settings, then train, or tell what training would be."""
    command_line = CommandLine(__doc__, ModelConfig, ACTIONS, GROUPS, ALIASES)
    flags, actions, problems = command_line.parse(argv)
    loaded = ConfigLoader().load(flags, actions.get("config"), problems)
    output = Output()
    for note in loaded.notes:
        output.line(note)
    if "show_config" in actions:
        output.line(describe(loaded))
        return 0

    # Only here is torch imported: the rest of this file, as a module.
    from train import dry_run, train

    if "dry_run" in actions:
        output.line(dry_run(loaded))
        return 0
    return train(loaded.config, loaded=loaded, argv=argv, output=output).exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))

# ----------------------------------------------------------------------------------------------
# The run. The command above does not come this far: it imports what follows.

import contextlib
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoint import save_export
from data import SPLITS, Dataset, evaluation_batches, get_batch, load_data, micro_batches
from model import LanguageModel
from optim import create_optimizer, learning_rate_at, update
from utils.device import (
    choose_device,
    compile_model,
    describe_device,
    is_out_of_memory,
    peak_memory,
    processor_name,
    synchronize,
)
from utils.errors import RunError, UserError
from utils.output import byte_size, command_for, duration, plural
from utils.run_manager import MetadataCapture, RunDirectory, RunDirectoryCreator, RunIDGenerator
from utils.stop import StopRequest
from utils.tracking import CompositeTracker
from utils.tracking.run_log import RunLog
from utils.tracking.tensorboard import TensorBoardTracker

SAMPLE_TOKENS = 400
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class TrainResult:
    """What became of a run. Losses are means in nats per token; `seconds` is the loop's time."""

    run_dir: Path
    export_dir: Path
    step: int
    train_loss: float
    val_loss: float
    best_step: int
    best_val_loss: float
    seconds: float
    exit_status: int


@dataclass(frozen=True)
class Setup:
    """What a run needs before its first step. `config.max_iters` is settled."""

    config: ModelConfig
    sources: dict[str, str]
    device: torch.device
    data: Dataset
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    compile_mode: str


def train(
    config: ModelConfig,
    *,
    loaded: LoadedConfig | None = None,
    argv: Sequence[str] = (),
    output: Output | None = None,
) -> TrainResult:
    """Train a model as `config` says, in a run directory of its own.

    Args:
        config: the settings.
        loaded: where they came from, for the record; `train()` itself if None.
        argv: the command line, for the record.
        output: what prints; `Output(quiet=True)` prints nothing.

    Raises:
        UserError: the device, the text or `runs_dir` cannot be used. No directory was made.
        RunError: the run could not go on: a loss that is not finite, a full disk, no memory.
    """
    output = output or Output()
    try:
        with explained_failures(config, output):
            setup = set_up(config, loaded)
            with StopRequest() as stop:
                run = open_run(setup, loaded, argv, output)
                with contextlib.closing(open_log(setup, run, output)) as log:
                    result = run_steps(setup, run, log, output, stop)
                output.line(summary(result, setup))
            return result
    finally:
        output.close()


def run_steps(
    setup: Setup, run: RunDirectory, log: RunLog, output: Output, stop: StopRequest
) -> TrainResult:
    """The loop: a step, a look at the losses now and then, the best model kept on disk."""
    config, model, data = setup.config, setup.model, setup.data
    best_step, best_val_loss = 0, math.inf
    last_sample = 0
    time_limit = config.max_minutes * 60 if config.max_minutes else math.inf  # seconds
    began = time.monotonic()
    with output.progress(config.max_iters):
        for step in range(config.max_iters):  # the updates done before this one
            loss, grad_norm = training_step(setup, step)
            done = step + 1
            log.step(done, loss, grad_norm, learning_rate_at(step, config))

            out_of_time = time.monotonic() - began > time_limit
            is_last = done == config.max_iters or out_of_time or stop.requested
            if not (is_last or is_due(done, config.eval_interval)):
                continue
            if stop.requested:
                output.line(f"Stopping after step {done}: a last evaluation; Ctrl-C again aborts")
            log.fetch()  # before anything is saved: a loss that is not finite stops the run here
            losses = estimate_loss(model, data, config)
            is_best = losses["val"] < best_val_loss
            log.evaluation(done, losses, bits_per_byte(losses, data), is_best=is_best)
            if is_best:
                best_step, best_val_loss = done, losses["val"]
                export(setup, run, step=done, val_loss=best_val_loss)
            is_last = is_last or stop.requested  # heard during the evaluation
            if is_last or (config.sample_interval and done - last_sample >= config.sample_interval):
                last_sample = done
                log.sample(done, sample(model, data, config))
            if is_last:
                break
            log.resume_clock()
    return TrainResult(
        run_dir=run.path,
        export_dir=run.export,
        step=done,
        train_loss=losses["train"],
        val_loss=losses["val"],
        best_step=best_step,
        best_val_loss=best_val_loss,
        seconds=time.monotonic() - began,
        exit_status=stop.exit_status,
    )


def training_step(setup: Setup, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Learn from the batch of `step`, a micro-batch at a time.

    Returns the mean loss over the whole batch and the norm of its gradient before clipping, both
    scalars that are still on the device.
    """
    config, tokens = setup.config, setup.data.splits["train"]
    total = torch.zeros((), device=setup.device)
    for rows in micro_batches(config):
        inputs, targets = get_batch(
            tokens,
            step,
            seed=config.seed,
            batch_size=config.batch_size,
            block_size=config.block_size,
            rows=rows,
        )
        _, loss = setup.model(inputs.to(setup.device), targets.to(setup.device))
        # Each micro-batch counts by its rows, so that their number changes nothing but memory.
        loss = loss * (inputs.size(0) / config.batch_size)
        loss.backward()
        total += loss.detach()
    grad_norm = update(setup.model, setup.optimizer, step, config)
    return total, grad_norm


@torch.no_grad()
def estimate_loss(model: LanguageModel, data: Dataset, config: ModelConfig) -> dict[str, float]:
    """The mean loss of the train and val splits, in nats per token, on their fixed batches."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = {}
    for split in ("train", "val"):
        total = torch.zeros((), dtype=torch.float32, device=device)
        count = 0
        for inputs, targets in evaluation_batches(data.splits[split], config):
            _, loss = model(inputs.to(device), targets.to(device))
            total += loss * targets.numel()
            count += targets.numel()
        losses[split] = total.item() / count
    model.train(was_training)
    return losses


def bits_per_byte(losses: dict[str, float], data: Dataset) -> dict[str, float]:
    """Losses as bits for each byte of the text: comparable between models of any tokenizer."""
    return {s: loss / math.log(2) / data.bytes_per_token[s] for s, loss in losses.items()}


def is_due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps (0: never) is done after `step`."""
    return interval > 0 and step % interval == 0


def sample(model: LanguageModel, data: Dataset, config: ModelConfig) -> str:
    """Text in the model's own words, from a line's beginning; the same for the same weights."""
    device = next(model.parameters()).device
    prompt = data.tokenizer.encode(data.tokenizer.default_prompt)
    prompt = torch.tensor([prompt.tolist()], device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    ids = model.generate(prompt, SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, generator=generator)
    return data.tokenizer.decode(ids[0, 1:].cpu().numpy())


def export(setup: Setup, run: RunDirectory, *, step: int, val_loss: float) -> None:
    """Write the model as it is now to the run's export."""
    training = setup.config.model_dump(include=set(GROUPS["training"].model_fields))
    state = {
        "step": step,
        "optimizer_file": None,
        "best_val_loss": val_loss,
        "val_loss": val_loss,
        "run_id": run.run_id,
        "lineage": [],
        "training_config": {**training, "start_step": 0},
    }
    save_export(run.export, setup.model, setup.data.tokenizer, setup.config, state)


# ----------------------------------------------------------------------------------------------
# Before the first step


def set_up(config: ModelConfig, loaded: LoadedConfig | None = None, *, cache: bool = True) -> Setup:
    """Make what a run needs before its first step: device, text, model and optimizer.

    Raises `UserError` for a device or a text that cannot be used.
    """
    device = choose_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    data = load_data(config, cache=cache)
    check_rerun(loaded, data)
    settled, length = settle_length(config, data, device)
    sources = dict(loaded.sources) if loaded else sources_in_code(config)
    if length != "max_iters":
        sources["max_iters"] = f"{length} {getattr(config, length):g} ({sources[length]})"
    return create_setup(settled, sources, data, device)


def check_rerun(loaded: LoadedConfig | None, data: Dataset) -> None:
    """Refuse to call it the same run where the recorded text is not the text that is there."""
    if loaded is None or loaded.rerun_of is None or loaded.sources["data"].startswith("--"):
        return
    recorded = loaded.rerun_of.get("data")
    if isinstance(recorded, dict) and recorded.get("sha256") != data.sha256:
        raise UserError(
            f"{data.name} is not the text that {loaded.rerun_of.get('run_id')} was trained on "
            f"({recorded.get('name')}, another SHA-256): name that with --data FILE, or any other"
        )


def sources_in_code(config: ModelConfig) -> dict[str, str]:
    """Where the settings of a config made in Python came from."""
    given = config.model_fields_set
    return {name: "train()" if name in given else "default" for name in ModelConfig.model_fields}


def create_setup(
    config: ModelConfig, sources: dict[str, str], data: Dataset, device: torch.device
) -> Setup:
    """A new model and its optimizer; the same weights for the same seed, on every device."""
    torch.manual_seed(config.seed)
    model = LanguageModel(config, data.tokenizer.vocab_size).to(device)
    return Setup(
        config=config,
        sources=sources,
        device=device,
        data=data,
        model=model,
        optimizer=create_optimizer(model, config),
        compile_mode=compile_model(model, config.torch_compile),
    )


def settle_length(
    config: ModelConfig, data: Dataset, device: torch.device
) -> tuple[ModelConfig, str]:
    """Turn `epochs` or `max_minutes` into `max_iters`, and name the setting that decided.

    A config with a number of steps alone trains the same model on any machine.
    """
    if config.max_iters is not None:
        return config, "max_iters"
    if config.epochs is not None:
        tokens_per_step = config.batch_size * config.block_size
        max_iters = math.ceil(config.epochs * data.splits["train"].size / tokens_per_step)
        settled = {"max_iters": max_iters, "epochs": None}
        return config.model_copy(update=settled), "epochs"
    assert config.max_minutes is not None
    speed = measure_speed(config.model_copy(update={"max_iters": 1}), data, device)
    max_iters = max(1, int(config.max_minutes * 60 / speed.seconds_per_step_with_evaluation))
    settled = {"max_iters": max_iters, "max_minutes": None}
    return config.model_copy(update=settled), "max_minutes"


def open_run(
    setup: Setup, loaded: LoadedConfig | None, argv: Sequence[str], output: Output
) -> RunDirectory:
    """Make the run directory, start its `console.txt`, write its `meta/`, and say what begins."""
    config, data = setup.config, setup.data
    run_id = RunIDGenerator.generate(config.run_tag)
    run = RunDirectoryCreator(Path(config.runs_dir)).create(run_id)
    output.record_to(run.console)
    output.line(banner(setup))
    output.line(f"Run    {run.path}\n")
    if config.warmup_iters >= config.max_iters:
        reached = learning_rate_at(config.max_iters - 1, config)
        output.line(
            f"Note: the run ends within its warm-up of {config.warmup_iters} steps, at a learning "
            f"rate of {reached:g}; lower warmup_iters to learn faster\n"
        )
    record = {
        "run_id": run.run_id,
        "argv": list(argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "resumed_from": None,
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "tokens": data.num_tokens,
            "vocab_size": data.tokenizer.vocab_size,
        },
        "parameters": setup.model.num_parameters(),
        "device": str(setup.device),
        "torch_compile": setup.compile_mode,
    }
    # The text's whole path, so that the record serves from any directory.
    recorded = config.model_copy(update={"data": data.path and str(Path(data.path).resolve())})
    capture = MetadataCapture(run.meta, CHECKOUT)
    capture.capture(recorded, setup.sources, record, machine_record(setup.device))
    return run


def open_log(setup: Setup, run: RunDirectory, output: Output) -> RunLog:
    """The run's log: metrics.jsonl and TensorBoard."""
    config = setup.config
    assert config.max_iters is not None
    tracker = CompositeTracker(
        {"TensorBoard": lambda: TensorBoardTracker(run.tensorboard)}, output.warning
    )
    return RunLog(
        run.metrics,
        tracker,
        output,
        max_iters=config.max_iters,
        tokens_per_step=config.batch_size * config.block_size,
        interval=config.log_interval,
    )


# ----------------------------------------------------------------------------------------------
# What is said


def banner(setup: Setup) -> str:
    """What is trained, on what, with what."""
    config, data = setup.config, setup.data
    sizes = ", ".join(f"{data.splits[s].size:,} {s}" for s in SPLITS if s in data.splits)
    compiled = "" if setup.compile_mode == "off" else f", torch.compile {setup.compile_mode}"
    return (
        f"Model  {setup.model.num_parameters():,} parameters: {plural(config.n_layer, 'layer')}, "
        f"{plural(config.n_head, 'head')}, {config.n_embd} channels, context {config.block_size}\n"
        f"Text   {data.name}: {data.num_tokens:,} characters ({sizes}), "
        f"{data.tokenizer.vocab_size} different\n"
        f"Steps  {config.max_iters:,} of {config.batch_size} x {config.block_size} characters: "
        f"{passes(config, data):.2g} passes over the text\n"
        f"Device {describe_device(setup.device)}{compiled}"
    )


def passes(config: ModelConfig, data: Dataset) -> float:
    """How often a run sees each token of the train split, on average."""
    return config.max_iters * config.batch_size * config.block_size / data.splits["train"].size


def summary(result: TrainResult, setup: Setup) -> str:
    """How a run ended, and the commands that come next."""
    stopped = result.step < (setup.config.max_iters or 0)
    ended = f"Stopped after step {result.step:,}" if stopped else f"Done: {result.step:,} steps"
    bits = bits_per_byte({"val": result.best_val_loss}, setup.data)["val"]
    run = shlex.quote(str(result.run_dir))
    again = "the same settings from the start" if stopped else "the same run again"
    return (
        f"\n{ended} in {duration(result.seconds)}. Best val loss {result.best_val_loss:.4f} "
        f"({bits:.3f} bits per byte), at step {result.best_step:,}.\n"
        f"The best model is in {result.export_dir}\n\n"
        "Next:\n"
        f"  {command_for('inference.py')} --run {run}\n"
        f"  {command_for('tensorboard')} --logdir {shlex.quote(setup.config.runs_dir)}\n"
        f"  {command_for('train.py')} --config {run}/meta/full_config.json   # {again}"
    )


def machine_record(device: torch.device) -> dict[str, str]:
    """What torch knows of the machine, for env.txt."""
    return {
        "device": describe_device(device),
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "torch build": "\n  " + torch.__config__.show().strip().replace("\n", "\n  "),
    }


# ----------------------------------------------------------------------------------------------
# What a run would take


@dataclass(frozen=True)
class Speed:
    """Seconds for one step and for one whole evaluation, and the most bytes held so far."""

    step: float
    evaluation: float
    steps_between_evaluations: float
    peak_memory: int | None

    @property
    def seconds_per_step_with_evaluation(self) -> float:
        """What a long run takes for each of its steps."""
        return self.step + self.evaluation / self.steps_between_evaluations


def measure_speed(config: ModelConfig, data: Dataset, device: torch.device) -> Speed:
    """Time real steps, and a part of an evaluation, of a model that is thrown away."""
    setup = create_setup(config, {}, data, device)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < 20 and time.perf_counter() - began < 5):
        start = time.perf_counter()
        training_step(setup, len(seconds))
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    step = sorted(seconds[1:])[len(seconds[1:]) // 2]  # the first one warms up
    start = time.perf_counter()
    estimate_loss(setup.model, data, config.model_copy(update={"eval_iters": 1}))
    part = time.perf_counter() - start
    # `part` was one batch of each split; a whole evaluation has as many as there are on average.
    tokens = (data.splits["train"].size + data.splits["val"].size) / 2
    evaluation = part * (config.eval_iters or tokens / (config.batch_size * config.block_size))
    return Speed(step, evaluation, config.eval_interval or math.inf, peak_memory(device))


def dry_run(loaded: LoadedConfig) -> str:
    """Every setting, and what the run would take. Leaves nothing behind."""
    with explained_failures(loaded.config, Output(quiet=True)):
        setup = set_up(loaded.config, loaded, cache=False)
        config, data = setup.config, setup.data
        speed = measure_speed(config, data, setup.device)
    evaluations = math.ceil(config.max_iters / (config.eval_interval or config.max_iters))
    seconds = config.max_iters * speed.step + evaluations * speed.evaluation
    # float32 weights, their gradients, and AdamW's two moments
    state = setup.model.num_parameters() * 4 * 4
    whose = "this whole process" if setup.device.type == "cpu" else "the device"
    peak = f"; {whose}: {byte_size(speed.peak_memory)} at its peak" if speed.peak_memory else ""
    return (
        f"{describe(LoadedConfig(config, setup.sources))}\n\n{banner(setup)}\n"
        f"Memory {byte_size(state)} for weights, gradients and optimizer{peak}\n"
        f"Time   about {duration(seconds)}: {speed.step * 1000:.1f} ms a step, "
        f"{plural(evaluations, 'evaluation')} of {speed.evaluation:.1f} s"
    )


# ----------------------------------------------------------------------------------------------
# When the machine refuses


@contextlib.contextmanager
def explained_failures(config: ModelConfig, output: Output) -> Iterator[None]:
    """Turn what the machine refuses (memory, disk) into a `RunError`; record how a run failed."""
    try:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                "out of memory: lower micro_batch_size (now "
                f"{config.micro_batch_size or config.batch_size}; what is learned stays the same), "
                f"block_size ({config.block_size}), n_embd ({config.n_embd}) or "
                f"n_layer ({config.n_layer})"
            ) from error
        except (OSError, SafetensorError) as error:
            # safetensors writes through Rust, and tells the system's reason last.
            reason = getattr(error, "strerror", None) or str(error).split("error: ")[-1]
            raise RunError(
                f"the run's files cannot be written: {reason}; what was saved before is untouched"
            ) from error
    except (RunError, KeyboardInterrupt, SystemExit) as error:
        with contextlib.suppress(OSError):  # where the disk is full, so is the record
            output.record(f"error: {error if isinstance(error, RunError) else 'interrupted'}")
        raise
