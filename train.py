"""Train a character-level GPT from one text file, and keep the whole record of the run.

    python train.py --run-tag baseline
    python train.py --resume last
    python train.py --model-name dante --data dante.txt --max-iters 5000 --n-layer 6
    python train.py --model-name purgatorio --init-from dante --data purgatorio.txt

The same from Python: `train(ModelConfig(data="dante.txt"))`, with the defaults of parameters.py;
`plan({"data": "dante.txt"}, resume="last")` in start.py reads configs/ too, and finds models.

`main()` stands first and imports nothing heavy: `--help` and every mistake in the settings are
answered at once. Below it is the run, to be read from top to bottom.
"""

import sys
from collections.abc import Sequence

from config import CHECKOUT, LoadedConfig, describe
from parameters import ALIASES, GROUPS, ModelConfig
from start import Start, plan
from utils.command_line import Action, CommandLine, flag_of
from utils.output import Output, run_command

ACTIONS = (
    Action(
        "config", "Take settings from a YAML or JSON file, or a run's full_config.json.", "FILE"
    ),
    Action(
        "resume",
        "Go on with a run (its id or directory), a bundle or a named model; with the newest run "
        "(last); or with the newest that there is, if there is one (auto).",
        "RUN|BUNDLE|last|auto",
    ),
    Action("reset_optimizer", "Resume with a new optimizer."),
    Action("overwrite", "Begin the named model anew, or put another in its place."),
    Action("show_config", "Print every setting with its source, and exit."),
    Action("dry_run", "Say what the run would be and take, from a few real steps, and exit."),
)


def main(argv: Sequence[str]) -> int:
    """The command: settle the settings, then train, or tell what training would be."""
    command_line = CommandLine(__doc__, ModelConfig, ACTIONS, GROUPS, ALIASES)
    flags, actions, problems = command_line.parse(argv)
    loaded, start = plan(
        flags,
        actions.get("config"),
        problems,
        resume=actions.get("resume"),
        overwrite="overwrite" in actions,
        reset_optimizer="reset_optimizer" in actions,
    )
    output = Output()
    for note in loaded.notes:
        output.line(note)
    if "show_config" in actions:
        output.line(describe(loaded))
        return 0

    # Only here is torch imported: the rest of this file, as a module.
    from train import dry_run, train

    if "dry_run" in actions:
        output.line(dry_run(loaded, start))
        return 0
    return train(loaded.config, loaded=loaded, start=start, argv=argv, output=output).exit_status


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

from bundle import (
    TRAINING_SETTINGS,
    WEIGHTS_FILE,
    Bundle,
    TrainingState,
    checkpoints_in,
    copy_bundle,
    is_bundle,
    read_state,
    step_of,
)
from checkpoint import Checkpoints, load_checkpoint, load_tokenizer, load_weights
from data import (
    SPLITS,
    Dataset,
    evaluation_batches,
    get_batch,
    listed_characters,
    load_data,
    micro_batches,
)
from model import LanguageModel
from optim import create_optimizer, learning_rate_at, update
from start import (
    check_rerun,
    check_steps_left,
    check_unchanged,
    kept_checkpoint,
    name_locked,
    read_contents,
    start_of,
)
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
    """What became of a run.

    Losses are means in nats per token, and None where nothing was evaluated; `seconds` is the
    loop's time. `checkpoint` is the bundle to go on with, `export_dir` that of the best model.
    """

    run_dir: Path
    export_dir: Path
    checkpoint: Path | None
    step: int
    train_loss: float | None
    val_loss: float | None
    best_step: int | None
    best_val_loss: float | None
    seconds: float
    exit_status: int


@dataclass(frozen=True)
class Best:
    """The lowest val loss so far, in nats per token, and the step that had it."""

    step: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Setup:
    """What a run needs before its first step. `config.max_iters` is settled."""

    config: ModelConfig
    sources: dict[str, str]
    start: Start
    device: torch.device
    data: Dataset
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    compile_mode: str


def train(
    config: ModelConfig,
    *,
    loaded: LoadedConfig | None = None,
    start: Start | None = None,
    argv: Sequence[str] = (),
    output: Output | None = None,
) -> TrainResult:
    """Train a model as `config` says, in a run directory of its own.

    Args:
        config: the settings.
        loaded: where they came from, for the record; `train()` itself if None.
        start: what the run begins with, which `plan` in start.py settles together with `loaded`;
            if None, new weights, or those that `config.init_from` names.
        argv: the command line, for the record.
        output: what prints; `Output(quiet=True)` prints nothing.

    Raises:
        UserError: the device, the text, `runs_dir` or the model to begin with cannot be used, or
            another process trains the model of that name. No run directory was made.
        NothingToDo: the model to resume has had `max_iters` steps. Nothing was changed.
        RunError: the run could not go on: a loss that is not finite, a full disk, no memory.
        KeyboardInterrupt, SystemExit: a second Ctrl-C, or SIGTERM.
    """
    output = output or Output()
    try:
        with explained_failures(config, output):
            setup = set_up(config, loaded, start)
            with name_locked(setup.start.named_model), StopRequest() as stop:
                check_unchanged(setup.start)
                run = open_run(setup, loaded, argv, output)
                with told_how_to_go_on(setup, run, output):
                    with contextlib.closing(open_log(setup, run, output)) as log:
                        result = run_steps(setup, run, log, output, stop)
                output.line(summary(result, setup))
            return result
    finally:
        output.close()


def run_steps(
    setup: Setup, run: RunDirectory, log: RunLog, output: Output, stop: StopRequest
) -> TrainResult:
    """The loop: a step, a look at the losses now and then, and all of it kept on disk."""
    config, model, data = setup.config, setup.model, setup.data
    checkpoints = open_checkpoints(setup, run)
    best = bring_best(setup, run, output)
    losses: dict[str, float | None] = {"train": None, "val": None}
    evaluated = last_sample = setup.start.step
    time_limit = config.max_minutes * 60 if config.max_minutes else math.inf  # seconds
    began = time.monotonic()

    def save(step: int) -> None:
        val_loss = losses["val"] if step == evaluated else None
        checkpoints.save(training_state(setup, run, step, val_loss, best))

    checkpoints.begin_named_model(training_state(setup, run, setup.start.step, None, best))
    with output.progress(config.max_iters):
        for step in range(setup.start.step, config.max_iters):  # the updates done before this one
            loss, grad_norm = training_step(setup, step)
            done = step + 1
            log.step(done, loss, grad_norm, learning_rate_at(step, config))

            out_of_time = time.monotonic() - began > time_limit
            is_last = done == config.max_iters or out_of_time
            is_evaluated = is_last or is_due(done, config.eval_interval)
            is_saved = is_due(done, config.checkpoint_interval) or is_due(done, config.keep_every)
            stopping = stop.requested
            if not (is_evaluated or is_saved or stopping):
                continue
            log.fetch()  # before anything is saved: a loss that is not finite stops the run here
            if stopping:
                output.line(f"Stopping after step {done}: saving (Ctrl-C again aborts)")
                if is_evaluated:
                    save(done)  # at once: who asks to stop may not wait for an evaluation
            if is_evaluated:
                evaluated = done
                losses, best = evaluate(setup, log, done, best)
                stopping = stopping or stop.requested
            if is_saved or is_last or stopping or best.step == done:
                save(done)
            if stopping:
                break
            due_again = last_sample + config.sample_interval
            if is_last or (is_evaluated and config.sample_interval and done >= due_again):
                last_sample = done
                log.sample(done, sample(model, data, config))
            if is_last:
                break
            log.resume_clock()
    return TrainResult(
        run_dir=run.path,
        export_dir=run.export,
        checkpoint=checkpoints.newest,
        step=done,
        train_loss=losses["train"],
        val_loss=losses["val"],
        best_step=best.step,
        best_val_loss=best.loss,
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


def evaluate(
    setup: Setup, log: RunLog, step: int, best: Best
) -> tuple[dict[str, float | None], Best]:
    """Measure and log the losses after `step`; return them, and the best until now."""
    losses = estimate_loss(setup.model, setup.data, setup.config)
    is_best = best.loss is None or losses["val"] < best.loss
    log.evaluation(step, losses, bits_per_byte(losses, setup.data), is_best=is_best)
    return losses, Best(step, losses["val"]) if is_best else best


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
    ids = model.generate(
        prompt,
        SAMPLE_TOKENS,
        temperature=SAMPLE_TEMPERATURE,
        num_tokens=data.tokenizer.num_tokens,
        generator=generator,
    )
    return data.tokenizer.decode(ids[0, 1:].cpu().numpy())


def training_state(
    setup: Setup, run: RunDirectory, step: int, val_loss: float | None, best: Best
) -> TrainingState:
    """What a bundle says of the training so far."""
    config, start = setup.config, setup.start
    settings = {name: getattr(config, name) for name in TRAINING_SETTINGS}
    facts = {
        "start_step": start.step,
        "previous_runs": start.previous_runs,
        "best_step": best.step,
        "data_sha256": setup.data.sha256,
        "model_name": start.named_model.name if start.named_model else None,
        "run_tag": start.run_tag,
    }
    return TrainingState(
        step=step,
        optimizer_file=None,
        best_val_loss=best.loss,
        val_loss=val_loss,
        run_id=run.run_id,
        lineage=start.lineage,
        training_config={**settings, "data": recorded_path(setup.data), **facts},
    )


def recorded_path(data: Dataset) -> str | None:
    """The text's whole path, so that a record serves from any directory."""
    return data.path and str(Path(data.path).resolve())


# ----------------------------------------------------------------------------------------------
# Before the first step


def set_up(
    config: ModelConfig,
    loaded: LoadedConfig | None = None,
    start: Start | None = None,
    *,
    cache: bool = True,
) -> Setup:
    """Make what a run needs before its first step: device, text, model and optimizer.

    Raises `UserError` for a device, a text or a bundle that cannot be used, and `NothingToDo`.
    """
    start = start or start_of(config)
    check_steps_left(config, start)
    device = choose_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    sources = dict(loaded.sources) if loaded else sources_in_code(config)
    bundle = read_contents(start)
    data = load_data(
        config,
        tokenizer=load_tokenizer(bundle) if bundle else None,
        may_extend=not start.is_resume,
        # A model that began with the sample corpus goes on with it, whatever else is there now.
        sample=start.is_resume and sources["data"] == str(start.bundle.path),
        cache=cache,
    )
    if loaded is not None:
        check_rerun(loaded, start, data.name, data.sha256)
    settled, length = settle_length(config, data, device, start)
    if length != "max_iters":
        sources["max_iters"] = f"{length} {getattr(config, length):g} ({sources[length]})"
        check_steps_left(settled, start)
    return create_setup(settled, sources, data, device, start, bundle)


def sources_in_code(config: ModelConfig) -> dict[str, str]:
    """Where the settings of a config made in Python came from."""
    given = config.model_fields_set
    return {name: "train()" if name in given else "default" for name in ModelConfig.model_fields}


def create_setup(
    config: ModelConfig,
    sources: dict[str, str],
    data: Dataset,
    device: torch.device,
    start: Start,
    bundle: Bundle | None = None,
) -> Setup:
    """A model and its optimizer as `start` says; new weights are those of the seed, anywhere.

    `bundle` is that of `start`, with its contents, which are needed for no longer than this.
    """
    torch.manual_seed(config.seed)
    model = LanguageModel(config, data.tokenizer.vocab_size).to(device)
    optimizer = create_optimizer(model, config)
    compile_mode = compile_model(model, config.torch_compile)
    if bundle is not None and start.is_resume and not start.reset_optimizer:
        load_checkpoint(bundle, model, optimizer)  # and with it dropout's generator
    elif bundle is not None:
        load_weights(bundle, model)
    return Setup(config, sources, start, device, data, model, optimizer, compile_mode)


def bring_best(setup: Setup, run: RunDirectory, output: Output) -> Best:
    """The best so far of a training that goes on; its model becomes this run's export.

    Where that model is not at hand, or was measured in another way, the best counts anew.
    """
    start = setup.start
    if not start.is_resume or start.bundle.state.best_val_loss is None:
        return Best()
    state, config = start.bundle.state, setup.config
    best = Best(state.fact("best_step"), state.best_val_loss)
    measure = ("eval_iters", "train_split", "test_split", "on_new_chars")
    is_comparable = setup.data.sha256 == state.fact("data_sha256") and all(
        state.settings.get(name) == getattr(config, name) for name in measure
    )
    earlier = start.continued_run or Path(config.runs_dir) / str(state.run_id)
    for place in (RunDirectory(earlier).export, RunDirectory(earlier).checkpoint(best.step or 0)):
        if is_comparable and is_bundle(place):
            with contextlib.suppress(UserError):  # damaged, or removed by its own run meanwhile
                if read_state(place).step == best.step:
                    copy_bundle(place, run.export, with_optimizer=False)
                    return best
    why = "is not at hand" if is_comparable else "was measured in another way"
    output.line(f"Note: the best model so far (step {best.step}) {why}: the best counts anew\n")
    return Best()


def settle_length(
    config: ModelConfig, data: Dataset, device: torch.device, start: Start
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
    more = max(1, int(config.max_minutes * 60 / speed.seconds_per_step_with_evaluation))
    settled = {"max_iters": start.step + more, "max_minutes": None}
    return config.model_copy(update=settled), "max_minutes"


def open_run(
    setup: Setup, loaded: LoadedConfig | None, argv: Sequence[str], output: Output
) -> RunDirectory:
    """Make the run directory, start its `console.txt`, write its `meta/`, and say what begins."""
    config, data = setup.config, setup.data
    run_id = RunIDGenerator.generate(setup.start.run_tag)
    run = RunDirectoryCreator(Path(config.runs_dir)).create(run_id)
    output.record_to(run.console)
    output.line(banner(setup, loaded))
    output.line(f"Run    {run.path}\n")
    if warning := other_text(setup):
        output.warning(warning)
    if config.warmup_iters > config.max_iters:
        reached = learning_rate_at(config.max_iters - 1, config)
        output.line(
            f"Note: the run ends within its warm-up of {config.warmup_iters} steps, at a learning "
            f"rate of {reached:g}; lower warmup_iters to learn faster\n"
        )
    start = setup.start
    resumed_from = start.bundle and {
        "run_id": start.bundle.state.run_id,
        "step": start.step,
        "weights_sha256": start.bundle.state.files[WEIGHTS_FILE],
        "path": str(kept_checkpoint(start, Path(config.runs_dir)).resolve()),
    }
    record = {
        "run_id": run.run_id,
        "argv": list(argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "resumed_from": resumed_from if start.is_resume else None,
        "model_name": start.named_model.name if start.named_model else None,
        "lineage": [ancestor.model_dump() for ancestor in start.lineage],
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
    parent = start.bundle and not start.is_resume and str(start.bundle.path.resolve())
    recorded = config.model_copy(update={"data": recorded_path(data), "init_from": parent or None})
    capture = MetadataCapture(run.meta, CHECKOUT)
    capture.capture(recorded, setup.sources, record, machine_record(setup.device))
    return run


def open_checkpoints(setup: Setup, run: RunDirectory) -> Checkpoints:
    """Where the run saves: its own checkpoints and export, and the named model."""
    return Checkpoints(
        run,
        setup.start.named_model,
        setup.model,
        setup.optimizer,
        setup.data.tokenizer,
        setup.config,
    )


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
        first_step=setup.start.step,
        max_iters=config.max_iters,
        tokens_per_step=config.batch_size * config.block_size,
        interval=config.log_interval,
    )


# ----------------------------------------------------------------------------------------------
# What is said


def banner(setup: Setup, loaded: LoadedConfig | None = None) -> str:
    """What is trained, on what, with what."""
    config, data, start = setup.config, setup.data, setup.start
    sizes = ", ".join(f"{data.splits[s].size:,} {s}" for s in SPLITS if s in data.splits)
    compiled = "" if setup.compile_mode == "off" else f", torch.compile {setup.compile_mode}"
    unit = data.tokenizer.unit
    lines = [
        f"Model  {setup.model.num_parameters():,} parameters: {plural(config.n_layer, 'layer')}, "
        f"{plural(config.n_head, 'head')}, {config.n_embd} channels, context {config.block_size}",
        f"Text   {data.name}: {data.num_tokens:,} {unit}s ({sizes}), "
        f"{data.tokenizer.num_tokens:,} different",
    ]
    if data.left_out:
        lines.append(f"       left out: {listed_characters(data.left_out)}")
    if start.is_resume:
        lines.append(
            f"Resume {start.bundle.path}, step {start.step:,}"
            + (" with a new optimizer" if start.reset_optimizer else "")
        )
        lines += [f"       {change}" for change in (loaded.changes if loaded else [])]
    elif start.bundle is not None:
        lines.append(f"Parent {start.bundle.path}, step {start.bundle.state.step:,}")
        added = data.tokenizer.num_tokens - start.bundle.vocab_size
        if data.tokenizer.token_kind == "char" and added:
            lines.append(f"       {plural(added, 'character')} added to its vocabulary")
    if start.named_model is not None:
        lines.append(f"Name   {start.named_model}")
    since = f"{start.step:,} to " if start.step else ""
    lines += [
        f"Steps  {since}{config.max_iters:,} of {config.batch_size} x {config.block_size} {unit}s: "
        f"{passes(config, data, start.step):.2g} passes over the text",
        f"Device {describe_device(setup.device)}{compiled}",
    ]
    return "\n".join(lines)


def other_text(setup: Setup) -> str | None:
    """A warning, where a model goes on with another text than the one it was trained on."""
    start, data = setup.start, setup.data
    known = start.bundle.state.fact("data_sha256") if start.is_resume else None
    if known is None or known == data.sha256:
        return None
    before = start.bundle.state.settings.get("data") or "the sample corpus"
    return (
        f"ANOTHER TEXT: {data.name} (SHA-256 {data.sha256[:12]}…) is not what this model was "
        f"trained on until now ({before}, SHA-256 {known[:12]}…)"
    )


def passes(config: ModelConfig, data: Dataset, first_step: int = 0) -> float:
    """How often a run sees each token of the train split, on average."""
    steps = config.max_iters - first_step
    return steps * config.batch_size * config.block_size / data.splits["train"].size


def summary(result: TrainResult, setup: Setup) -> str:
    """How a run ended, and the commands that come next."""
    stopped = result.step < (setup.config.max_iters or 0)
    ended = f"Stopped after step {result.step:,}" if stopped else f"Done: {result.step:,} steps"
    over = f": max_minutes {setup.config.max_minutes} is over"
    why = over if stopped and result.exit_status == 0 else ""
    run = shlex.quote(str(result.run_dir))
    lines = [f"\n{ended} in {duration(result.seconds)}{why}."]
    if result.best_val_loss is not None:
        bits = bits_per_byte({"val": result.best_val_loss}, setup.data)["val"]
        lines[0] += (
            f" Best val loss {result.best_val_loss:.4f} ({bits:.3f} bits per byte), "
            f"at step {result.best_step:,}."
        )
        lines.append(f"The best model is in {result.export_dir}")
    lines.append(f"The last checkpoint, to go on with, is in {result.checkpoint}")
    if setup.start.named_model is not None:
        lines.append(f"{setup.start.named_model} is at step {result.step:,}")
    lines += ["", "Next:", f"  {command_for('inference.py')} --run {run}"]
    lines.append(f"  {command_for('tensorboard')} --logdir {shlex.quote(setup.config.runs_dir)}")
    if stopped:
        lines.append(f"  {resume_command(result.run_dir, setup)}   # go on from here")
    elif not setup.start.is_resume:
        record = f"{run}/meta/full_config.json"
        lines.append(f"  {command_for('train.py')} --config {record}   # the same run again")
    return "\n".join(lines)


def resume_command(run_dir: Path, setup: Setup) -> str:
    """The command that goes on where this run has stopped."""
    command = f"{command_for('train.py')} --resume {shlex.quote(str(run_dir))}"
    # What no checkpoint says, as it is the machine's or the user's.
    for name in ("device", "runs_dir", *(["checkpoints_dir"] if setup.start.named_model else [])):
        value = getattr(setup.config, name)
        if value != ModelConfig.model_fields[name].default:
            command += f" {flag_of(name)} {shlex.quote(value)}"
    return command


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
    setup = create_setup(config, {}, data, device, Start())
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


def dry_run(loaded: LoadedConfig, start: Start | None = None) -> str:
    """Every setting, and what the run would take. Leaves nothing behind."""
    with explained_failures(loaded.config, Output(quiet=True)):
        setup = set_up(loaded.config, loaded, start, cache=False)
        config, data = setup.config, setup.data
        speed = measure_speed(config, data, setup.device)
    steps = config.max_iters - setup.start.step
    evaluations = math.ceil(steps / (config.eval_interval or steps))
    seconds = steps * speed.step + evaluations * speed.evaluation
    # float32 weights, their gradients, and AdamW's two moments
    state = setup.model.num_parameters() * 4 * 4
    whose = "this whole process" if setup.device.type == "cpu" else "the device"
    peak = f"; {whose}: {byte_size(speed.peak_memory)} at its peak" if speed.peak_memory else ""
    return (
        f"{describe(LoadedConfig(config, setup.sources))}\n\n{banner(setup, loaded)}\n"
        f"Memory {byte_size(state)} for weights, gradients and optimizer{peak}\n"
        f"Time   about {duration(seconds)}: {speed.step * 1000:.1f} ms a step, "
        f"{plural(evaluations, 'evaluation')} of {speed.evaluation:.1f} s"
    )


# ----------------------------------------------------------------------------------------------
# When the machine refuses


@contextlib.contextmanager
def told_how_to_go_on(setup: Setup, run: RunDirectory, output: Output) -> Iterator[None]:
    """Where the run ends early, say what it has saved. Whatever fails is the run's from here on.

    Raises `RunError` in the place of a `UserError`: the files that are at fault are its own.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            if checkpoints := checkpoints_in(run.path):
                output.line(
                    f"\nThe last checkpoint is that of step {step_of(checkpoints[-1])}; go on from "
                    f"it with\n  {resume_command(run.path, setup)}"
                )
        if isinstance(error, UserError):
            raise RunError(str(error)) from error
        raise


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
            where = getattr(error, "filename", None)
            raise RunError(
                f"the run's files cannot be written: {f'{where}: ' if where else ''}{reason}; "
                "what was saved before is untouched"
            ) from error
    except (RunError, KeyboardInterrupt, SystemExit) as error:
        with contextlib.suppress(OSError):  # where the disk is full, so is the record
            output.record(f"error: {error if isinstance(error, RunError) else 'interrupted'}")
        raise
