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

from callbacks import CallbackFactory, load_callback_factories
from config import LoadedConfig, format_settings
from parameters import ALIASES, GROUPS, ModelConfig
from start import ResumePlan, plan_run
from utils.command_line import Action, CommandLine, format_flag
from utils.output import Output, run_command
from utils.ranks import Ranks

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
    Action(
        "callback",
        "Call an object of your own after steps and evaluations and at the end, which make(config) "
        "in a module of yours returns; may be repeated. See docs/callbacks.md.",
        "MODULE:MAKE",
        repeats=True,
    ),
    Action("overwrite", "Begin the named model anew, or put another in its place."),
    Action("show_config", "Print every setting with its source, and exit."),
    Action("dry_run", "Say what the run would be and take, from a few real steps, and exit."),
)


def main(argv: Sequence[str]) -> int:
    """The command: settle the settings, then train, or tell what training would be."""
    command_line = CommandLine(__doc__, ModelConfig, ACTIONS, GROUPS, ALIASES)
    flags, actions, problems = command_line.parse(argv)
    loaded, start = plan_run(
        flags,
        actions.get("config"),
        problems,
        resume=actions.get("resume"),
        overwrite="overwrite" in actions,
        reset_optimizer="reset_optimizer" in actions,
    )
    output = Output(quiet=Ranks.from_environment().rank > 0)
    for note in loaded.notes:
        output.print(note)
    if "show_config" in actions:
        output.print(format_settings(loaded))
        return 0

    callbacks = load_callback_factories(actions.get("callback", []))

    # Only here is torch imported: the rest of this file, as a module.
    from train import dry_run, train

    if "dry_run" in actions:
        output.print(dry_run(loaded, start, output.print))
        return 0
    result = train(
        loaded.config,
        loaded=loaded,
        start=start,
        argv=argv,
        output=output,
        callbacks=callbacks,
    )
    return result.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))

# ----------------------------------------------------------------------------------------------
# The run. The command above does not come this far: it imports what follows.

import contextlib
import math
import os
import platform
import shlex
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from bundle import TRAINING_SETTINGS, TrainingState, list_checkpoints, parse_step, read_state
from callbacks import Best, Callbacks, EarlyStopping, Evaluation, Step, TrainResult
from checkpoint import CheckpointWriter
from data import Dataset
from distributed import SINGLE_PROCESS, World, gather_to_main, open_world, translate_peer_errors
from model import LanguageModel
from optim import learning_rate_at
from prepare import banner, bring_best, measure_speed, open_run, recorded_path, set_up
from report import write_report
from sampling import SamplingParams
from start import check_unchanged, is_stopped_early, lock_named_model
from step import Setup, bits_per_byte, estimate_loss, training_step
from utils.device import is_out_of_memory
from utils.errors import EndedOnAnotherRank, RunError, UserError, format_reason
from utils.output import format_bytes, format_command, format_duration, pluralize
from utils.run_manager import RunDirectory, read_record, write_result
from utils.stop import StopRequest
from utils.tracking import CompositeTracker
from utils.tracking.aim import AimTracker, get_aim_repo
from utils.tracking.run_logger import RunLogger
from utils.tracking.tensorboard import TensorBoardTracker

SAMPLE_TOKENS = 200  # while the model learns
LAST_SAMPLE_TOKENS = 400
SAMPLE_TEMPERATURE = 0.8


def train(
    config: ModelConfig,
    *,
    loaded: LoadedConfig | None = None,
    start: ResumePlan | None = None,
    argv: Sequence[str] = (),
    output: Output | None = None,
    callbacks: Mapping[str, CallbackFactory] | None = None,
) -> TrainResult:
    """Train a model as `config` says, in a run directory of its own.

    Where torchrun has started several processes, all call this, and train it together.

    Args:
        config: the settings.
        loaded: where they came from, for the record; `train()` itself if None.
        start: what the run begins with, which `plan_run` in start.py settles together with `loaded`;
            if None, new weights, or those that `config.init_from` names.
        argv: the command line, for the record.
        output: what prints; `Output(quiet=True)` prints nothing.
        callbacks: functions, or classes, that are given the settings and make callbacks, as
            callbacks.py describes them, under the names to call them by.

    Raises:
        UserError: the device, the text, `runs_dir` or the model to begin with cannot be used,
            a callback cannot be made, Aim is asked for and not there, or another process trains
            the model of that name. No run directory was made.
        NothingToDo: the model to resume has had `max_iters` steps. Nothing was changed.
        RunError: the run could not go on: a loss that is not finite, a full disk, no memory, or
            another of its processes is gone.
        EndedElsewhere: another process raises one of these.
        KeyboardInterrupt, SystemExit: a second Ctrl-C, or SIGTERM.
    """
    output = output or Output()
    try:
        with explained_failures(config, output), open_world(config) as world:
            setup = set_up(config, loaded, start, callbacks, world=world, tell=output.print)
            with (
                world.enter_on_main(lock_named_model(setup.start.named_model)),
                StopRequest(is_one_of_several=world.size > 1) as stop,
            ):
                world.broadcast_from_main(lambda: check_unchanged(setup.start))
                with open_callbacks(setup, output) as called:
                    run = world.broadcast_from_main(lambda: open_run(setup, loaded, argv, output))
                    with recorded_end(setup, run, output):
                        with contextlib.closing(open_log(setup, run, output)) as log:
                            checkpoints = open_checkpoints(setup, run)
                            session = Session(setup, run, log, called, checkpoints, output, stop)
                            result = run_steps(session)
                        called.at_end(result)
                        world.broadcast_from_main(lambda: conclude(result, setup, run, output))
            return result
    finally:
        output.close()


@dataclass(frozen=True)
class Session:
    """A run that goes on: what it trains, where, and all that hear of it."""

    setup: Setup
    run: RunDirectory
    log: RunLogger
    callbacks: Callbacks
    checkpoints: CheckpointWriter
    output: Output
    stop: StopRequest


def run_steps(session: Session) -> TrainResult:
    """The loop: a step, a look at the losses now and then, and all of it kept on disk."""
    setup, run, log = session.setup, session.run, session.log
    config = setup.config
    best = setup.world.broadcast_from_main(lambda: bring_best(setup, run, session.output))
    losses: dict[str, float | None] = {"train": None, "val": None}
    evaluated = last_sample = setup.start.step
    time_limit = config.max_minutes * 60 if config.max_minutes else math.inf  # seconds
    began = time.monotonic()

    def save(step: int) -> None:
        val_loss = losses["val"] if step == evaluated else None
        session.checkpoints.save(training_state(setup, run, step, val_loss, best))

    unlearned = training_state(setup, run, setup.start.step, None, best)
    session.checkpoints.create_named_model(unlearned)
    with session.output.show_progress(config.max_iters):
        for step in range(setup.start.step, config.max_iters):  # the updates done before this one
            loss, grad_norm = training_step(setup, step)
            done = step + 1
            why_stop = after_step(session, done, loss, grad_norm)
            if time.monotonic() - began > time_limit:
                why_stop = why_stop or f"max_minutes {config.max_minutes:g} is over"
            stopping, why_stop = agreed(session, why_stop)

            is_last = done == config.max_iters or why_stop is not None
            is_evaluated = is_last or is_due(done, config.eval_interval)
            is_saved = is_due(done, config.checkpoint_interval) or is_due(done, config.keep_every)
            if not (is_evaluated or is_saved or stopping):
                continue
            log.flush_steps()  # before anything is saved: a loss that is not finite stops the run here
            if stopping:
                how = " (Ctrl-C again aborts)" if setup.world.size == 1 else ""
                session.output.print(f"Stopping after step {done}: saving{how}")
                if is_evaluated:
                    save(done)  # at once: who asks to stop may not wait for an evaluation
            if is_evaluated:
                evaluated = done
                losses, best, reason = evaluate(session, done, best)
                stopping, why_stop = agreed(session, why_stop or reason)
                is_last = is_last or why_stop is not None
            if is_saved or is_last or stopping or best.step == done:
                save(done)
            if stopping:
                break
            due_again = last_sample + config.sample_interval
            if is_last or (is_evaluated and config.sample_interval and done >= due_again):
                last_sample = done
                length = LAST_SAMPLE_TOKENS if is_last else SAMPLE_TOKENS
                log.log_sample(done, sample(setup.model, setup.data, config, length))
            if is_last:
                break
            log.reset_timer()
    seconds = time.monotonic() - began
    return result_of(session, done, losses, best, seconds, why_stop)


def result_of(
    session: Session,
    step: int,
    losses: Mapping[str, float | None],
    best: Best,
    seconds: float,
    why_stop: str | None,
) -> TrainResult:
    """What became of a run that ends after `step`."""
    return TrainResult(
        run_dir=session.run.path,
        export_dir=session.run.export,
        checkpoint=session.checkpoints.newest,
        step=step,
        train_loss=losses["train"],
        val_loss=losses["val"],
        best_step=best.step,
        best_val_loss=best.loss,
        seconds=seconds,
        exit_status=session.stop.exit_status,
        stopped_by=why_stop if step < session.setup.config.max_iters else None,
    )


def agreed(session: Session, why_stop: str | None) -> tuple[bool, str | None]:
    """Whether the run was asked to stop, and rank 0's reason to: the same for all processes.

    A signal that comes after this is heard the next time. Whoever heeded it alone would leave the
    others waiting.
    """
    world, stop = session.setup.world, session.stop
    if world.size == 1:
        return stop.requested, why_stop
    signal, has_reason = world.all_reduce_max(
        stop.signal, int(why_stop is not None and world.is_main)
    )
    if signal:
        stop.request(signal)
    return bool(signal), world.broadcast_from_main(lambda: why_stop) if has_reason else None


def after_step(session: Session, step: int, loss: Tensor, grad_norm: Tensor) -> str | None:
    """Log a step, and tell the callbacks; return a callback's reason to stop, if it has one."""
    config, log = session.setup.config, session.log
    learning_rate = learning_rate_at(step - 1, config)
    # First, as the log stops a run whose numbers are not finite, and these may tell why.
    if is_due(step, config.histogram_interval):
        log.log_histograms(step, weights_and_gradients(session.setup.model, session.setup.world))
    log.log_step(step, loss, grad_norm, learning_rate)
    told = Step(step, loss, grad_norm, learning_rate, session.run.path, config)
    return session.callbacks.after_step(told)


def weights_and_gradients(model: LanguageModel, world: World = SINGLE_PROCESS) -> dict[str, Tensor]:
    """Every parameter, and its gradient as it was clipped for the last step: for rank 0, whole."""
    parameters = dict(model.named_parameters())
    gradients = {f"gradients/{n}": p.grad for n, p in parameters.items() if p.grad is not None}
    tensors = {f"parameters/{name}": p for name, p in parameters.items()} | gradients
    collected = {name: gather_to_main(tensor, world) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in collected.items() if tensor is not None}


def evaluate(
    session: Session, step: int, best: Best
) -> tuple[dict[str, float | None], Best, str | None]:
    """Measure the losses after `step`, log them, and tell the callbacks.

    Returns the losses, the best until now, and a callback's reason to stop, if it has one.
    """
    setup = session.setup
    losses = estimate_loss(setup.model, setup.data, setup.config, setup.precision, setup.world)
    bits = bits_per_byte(losses, setup.data)
    is_best = best.loss is None or losses["val"] < best.loss
    session.log.log_evaluation(step, losses, bits, is_best=is_best)
    if is_best:
        best = Best(step, losses["val"])
    else:
        best = replace(best, evaluations_since=best.evaluations_since + 1)
    told = Evaluation(
        step=step,
        train_loss=losses["train"],
        val_loss=losses["val"],
        val_bits_per_byte=bits["val"],
        best=best,
        run_dir=session.run.path,
        config=setup.config,
    )
    return losses, best, session.callbacks.after_evaluation(told)


def is_due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps (0: never) is done after `step`."""
    return interval > 0 and step % interval == 0


def sample(model: LanguageModel, data: Dataset, config: ModelConfig, length: int) -> str:
    """`length` tokens in the model's own words, from a line's beginning; its weights decide."""
    tokenizer = data.tokenizer
    prompt = tokenizer.encode(tokenizer.default_prompt)
    ids = model.generate(
        prompt,
        length,
        SamplingParams(temperature=SAMPLE_TEMPERATURE),
        seeds=[config.seed],
    )
    return tokenizer.decode(ids[0, prompt.size :].cpu().numpy())


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
        "evaluations_since_best": best.evaluations_since,
        "data_sha256": setup.data.sha256,
        "computed_in": setup.precision,
        "compiled_by": setup.compiled.mode,
        "processes": setup.world.size,
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


def open_checkpoints(setup: Setup, run: RunDirectory) -> CheckpointWriter:
    """Where the run saves: its own checkpoints and export, and the named model."""
    return CheckpointWriter(
        run,
        setup.start.named_model,
        setup.model,
        setup.optimizer,
        setup.scaler,
        setup.data.tokenizer,
        setup.config,
        setup.world,
    )


def open_log(setup: Setup, run: RunDirectory, output: Output) -> RunLogger:
    """The run's log: metrics.jsonl, TensorBoard and, if asked for, Aim. They know its settings.

    Beside rank 0, a process keeps the same log of the same numbers, and writes it nowhere.
    """
    config = setup.config
    assert config.max_iters is not None
    is_main = setup.world.is_main
    makers = {"TensorBoard": lambda: TensorBoardTracker(run.tensorboard)}
    if config.aim_logging:
        makers["Aim"] = lambda: AimTracker(get_aim_repo(config), run.run_id)
    tracker = CompositeTracker(makers if is_main else {}, output.print_warning)
    if is_main:
        record = read_record(run.path)
        about = {"run_dir": str(run.path.resolve()), "python": platform.python_version()}
        about |= {"git": record["git"], **record["run"], "sources": record["sources"]}
        tracker.log_config(record["config"], about)
    return RunLogger(
        run.metrics if is_main else Path(os.devnull),
        run.samples if is_main else Path(os.devnull),
        tracker,
        output,
        first_step=setup.start.step,
        max_iters=config.max_iters,
        tokens_per_step=config.batch_size * config.block_size,
        interval=config.log_interval,
        may_overflow=setup.precision == "fp16",
    )


@contextlib.contextmanager
def open_callbacks(setup: Setup, output: Output) -> Iterator[Callbacks]:
    """Early stopping, if it is asked for, and the user's own; all hear of a run that fails.

    Beside rank 0, a process has none. Raises `UserError` where one cannot be made.
    """
    patience = setup.config.early_stopping_patience
    own = {"early stopping": EarlyStopping(patience)} if patience else {}
    callbacks = Callbacks(own if setup.world.is_main else {}, output.print_warning)
    try:
        setup.world.broadcast_from_main(lambda: callbacks.add(setup.callbacks, setup.config))
        yield callbacks
    finally:
        callbacks.at_end(None)  # those who have heard of a result already are not told again


# ----------------------------------------------------------------------------------------------
# What is said


def conclude(result: TrainResult, setup: Setup, run: RunDirectory, output: Output) -> None:
    """Say how a run ended, and record it."""
    output.print(summary(result, setup))
    write_result(run.meta / "result.json", asdict(result))


def summary(result: TrainResult, setup: Setup) -> str:
    """How a run ended, and the commands that come next."""
    stopped = result.step < (setup.config.max_iters or 0)
    ended = f"Stopped after step {result.step:,}" if stopped else f"Done: {result.step:,} steps"
    why = f": {result.stopped_by}" if result.stopped_by else ""
    run = shlex.quote(str(result.run_dir))
    lines = [f"\n{ended} in {format_duration(result.seconds)}{why}."]
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
    lines.append(f"The whole run as a page to look at: {RunDirectory(result.run_dir).report}")
    lines += ["", "Next:", f"  {format_command('inference.py')} --run {run}"]
    lines.append(f"  {format_command('tensorboard')} --logdir {shlex.quote(setup.config.runs_dir)}")
    if setup.config.aim_logging:
        repository = get_aim_repo(setup.config)
        lines.append(f"  {format_command('aim')} up --repo {shlex.quote(repository)}")
    if stopped:
        command = resume_command(result.run_dir, setup)
        if is_stopped_early(read_state(result.checkpoint), setup.config):
            command += " --early-stopping-patience 0"
        lines.append(f"  {command}   # go on from here")
    elif not setup.start.is_resume:
        record = f"{run}/meta/full_config.json{callback_flags(setup)}"
        lines.append(f"  {train_command()} --config {record}   # the same run again")
    return "\n".join(lines)


def train_command() -> str:
    """How to start train.py as this process was: alone, or by torchrun."""
    ranks = Ranks.from_environment()
    if ranks.size == 1:
        return format_command("train.py")
    nodes = ranks.size // ranks.local_size
    several = f" --nnodes={nodes} …" if nodes > 1 else ""
    script = format_command("train.py").split(" ", 1)[1]
    return f"{format_command('torchrun')}{several} --nproc-per-node={ranks.local_size} {script}"


def resume_command(run_dir: Path, setup: Setup) -> str:
    """The command that goes on where this run has stopped."""
    command = f"{train_command()} --resume {shlex.quote(str(run_dir))}"
    # What no checkpoint says, as it is the machine's or the user's.
    for name in ("device", "runs_dir", *(["checkpoints_dir"] if setup.start.named_model else [])):
        value = getattr(setup.config, name)
        if value != ModelConfig.model_fields[name].default:
            command += f" {format_flag(name)} {shlex.quote(value)}"
    return command + callback_flags(setup)


def callback_flags(setup: Setup) -> str:
    """The flags that name the run's callbacks again: no checkpoint and no record runs code."""
    return "".join(f" {name}" for name in setup.callbacks if name.startswith("--callback "))


# ----------------------------------------------------------------------------------------------
# What a run would take


def dry_run(
    loaded: LoadedConfig, start: ResumePlan | None = None, tell: Callable[[str], None] | None = None
) -> str:
    """Every setting, and what the run would take. `tell` hears of what takes a while.

    Leaves nothing behind but what the run will find: a large text's ids, or standard input.
    """
    quiet = Output(quiet=True)
    with explained_failures(loaded.config, quiet), open_world(loaded.config) as world:
        setup = set_up(loaded.config, loaded, start, world=world, cache=False, tell=tell)
        config, data = setup.config, setup.data
        speed = measure_speed(config, data, setup.device, world)
    steps = config.max_iters - setup.start.step
    evaluations = math.ceil(steps / (config.eval_interval or steps))
    seconds = steps * speed.step + evaluations * speed.evaluation
    # float32 weights, their gradients, and AdamW's two moments or Muon's one
    state = sum(
        4 * (3 if "momentum" in group else 4) * parameter.numel()
        for group in setup.optimizer.param_groups
        for parameter in group["params"]
    )
    whose = "this whole process" if setup.device.type == "cpu" else "the device"
    peak = f"; {whose}: {format_bytes(speed.peak_memory)} at its peak" if speed.peak_memory else ""
    return (
        f"{format_settings(LoadedConfig(config, setup.sources))}\n\n{banner(setup, loaded)}\n"
        f"Memory {format_bytes(state)} for weights, gradients and optimizer{peak}\n"
        f"Time   about {format_duration(seconds)}: {speed.step * 1000:.1f} ms a step, "
        f"{pluralize(evaluations, 'evaluation')} of {speed.evaluation:.1f} s"
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
            if checkpoints := list_checkpoints(run.path):
                output.print(
                    f"\nThe last checkpoint is that of step {parse_step(checkpoints[-1])}; go on from "
                    f"it with\n  {resume_command(run.path, setup)}"
                )
        if isinstance(error, UserError):
            raise RunError(str(error)) from error
        raise


@contextlib.contextmanager
def recorded_end(setup: Setup, run: RunDirectory, output: Output) -> Iterator[None]:
    """Record how a run has failed, if it does, and draw report.html; but not of one cut short.

    Raises as `told_how_to_go_on` does. Beside rank 0, a process that the run fails in ends in
    silence: rank 0 has met with the same.
    """
    if not setup.world.is_main:
        try:
            yield
        except (RunError, UserError) as error:
            raise EndedOnAnotherRank(RunError.exit_status) from error
        return
    with told_how_to_go_on(setup, run, output):
        try:
            with translate_peer_errors():
                yield
        except Exception as error:
            with contextlib.suppress(OSError):  # a full disk must not hide the reason
                write_result(run.meta / "result.json", {"error": format_reason(error)})
            draw_report(run, output)
            raise
        draw_report(run, output)


def draw_report(run: RunDirectory, output: Output) -> None:
    """Draw report.html, or say why that failed: no run is lost for a picture of it."""
    try:
        write_report(run.report, [run.path])
    except Exception as error:
        output.print_warning(
            f"{run.report} cannot be drawn: {format_reason(error)}", traceback.format_exc()
        )


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
