"""The text that a training run prints at its start and at its end.

Functions take the run's `Trainer`, and return lines without printing them.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import ModelConfig
from utils.command_line import format_flag
from utils.device import describe_device
from utils.output import (
    format_bytes,
    format_char_counts,
    format_command,
    format_duration,
    pluralize,
)
from utils.ranks import Ranks
from utils.run_manager import RunDirectory, sanitize_tag
from utils.tracking.aim import get_aim_repo

if TYPE_CHECKING:
    from callbacks import Best, TrainResult
    from data import Dataset
    from tokenizer import Tokenizer
    from trainer import Trainer
    from utils.sizes import SizeEstimate


MANY_EPOCHS = 10  # without dropout, val loss rises long before (docs/LOG.md)
ENOUGH_DROPOUT = 0.2


def format_banner(trainer: "Trainer", changes: Sequence[str] = ()) -> str:
    """Format what is trained, on what, and how; `changes` are the settings a resume changes."""
    config, data, plan = trainer.config, trainer.data, trainer.plan
    sizes = ", ".join(f"{tokens.size:,} {split}" for split, tokens in data.splits.items())
    unit = data.tokenizer.unit
    shape = f"{pluralize(config.n_layer, 'layer')}, {pluralize(config.n_head, 'head')}"
    model = f"{trainer.model.count_parameters():,} parameters: {shape}, {config.n_embd} channels"
    text = f"{data.name}: {data.num_tokens:,} {unit}s ({sizes})"
    rows = [
        ("Model", f"{model}, context {config.block_size}"),
        ("Text", f"{text}, vocabulary {data.tokenizer.num_tokens:,}"),
    ]
    if data.left_out:
        rows.append(("", f"dropped {format_char_counts(data.left_out)}"))
    if plan.is_resume:
        reset = ", with a new optimizer" if plan.reset_optimizer else ""
        rows.append(("Resumed", f"from {plan.bundle.path} (step {plan.start_step:,}){reset}"))
        rows += [("", change) for change in changes]
    elif plan.bundle is not None:
        rows.append(("Parent", f"{plan.bundle.path} (step {plan.bundle.state.step:,})"))
        added = data.tokenizer.num_tokens - plan.bundle.vocab_size
        if data.tokenizer.token_kind == "char" and added:
            rows.append(("", f"{pluralize(added, 'character')} added to the vocabulary"))
    if plan.named_model is not None:
        rows.append(("Name", str(plan.named_model)))
    start = f"{plan.start_step:,} to " if plan.start_step else ""
    mode = trainer.compile_result.mode
    device = f"{describe_device(trainer.device)}, {trainer.precision}"
    device += "" if mode == "off" else f", torch.compile {mode}"
    if trainer.world.size > 1:
        device += f", {trainer.world.size} processes ({config.parallel})"
    epochs = count_epochs(config, trainer.data, config.max_iters - plan.start_step)
    batch = f"batch {config.batch_size} x {config.block_size} {unit}s"
    rows.append(("Steps", f"{start}{config.max_iters:,}, {batch} ({epochs:.2g} epochs)"))
    rows.append(("Device", device))
    return "\n".join(f"{label:<7} {value}" for label, value in rows)


def count_epochs(config: ModelConfig, data: "Dataset", steps: int) -> float:
    """Return how many times `steps` read the training text."""
    return steps * config.tokens_per_step / data.splits["train"].size


def format_text_warning(trainer: "Trainer") -> str | None:
    """Return a warning if a resumed model continues on a different text."""
    plan, data = trainer.plan, trainer.data
    known = plan.bundle.state.get_fact("data_sha256") if plan.is_resume else None
    if known is None or known == data.sha256:
        return None
    before = plan.bundle.state.settings.get("data") or "the sample corpus"
    return (
        f"DIFFERENT TEXT: {data.name} (SHA-256 {data.sha256[:12]}…) is not the text this model was "
        f"trained on so far ({before}, SHA-256 {known[:12]}…)"
    )


def list_notes(
    trainer: "Trainer", rerun_of: Mapping[str, Any] | None, last_rate: float
) -> Iterator[str]:
    """Yield what a user may not expect of the run that starts.

    `rerun_of` is the record that the run repeats, `last_rate` the learning rate of its last step.
    """
    config, result, tag = trainer.config, trainer.compile_result, trainer.plan.run_tag
    if tag and (name := sanitize_tag(tag)) != tag:
        yield f"the run directory is named {name or 'without a tag'}, for the tag {tag}"
    had = [each["name"] for each in (rerun_of or {}).get("callbacks") or [] if each.get("name")]
    if missing := [name for name in had if name not in trainer.callbacks]:
        yield f"the repeated run had {', '.join(missing)}: add it to repeat the run exactly"
    if changed := _compare_computation(trainer):
        yield f"{changed}: results after this point will not match the original run bitwise"
    if result.fell_back:
        yield f"training without torch.compile: {result.reason}"
    epochs = count_epochs(config, trainer.data, config.max_iters)  # with the steps before a resume
    if epochs > MANY_EPOCHS and config.dropout < ENOUGH_DROPOUT:
        yield (
            f"{epochs:.0f} epochs at dropout {config.dropout:g}: the model will memorize so short "
            "a text; --config configs/presets/small_text.yaml is for texts of this size"
        )
    if config.warmup_iters > config.max_iters:
        yield (
            f"the run ends during its warmup of {config.warmup_iters} steps, at learning rate "
            f"{last_rate:g}: lower warmup_iters"
        )


def _compare_computation(trainer: "Trainer") -> str | None:
    """Describe how a resumed run computes differently from before: `precision bf16 → fp32, …`."""
    state = trainer.plan.bundle.state if trainer.plan.is_resume else None
    if state is None or state.get_fact("compiled_by") is None:  # not recorded by old versions
        return None
    before = (
        state.get_fact("computed_in") or "fp32",
        state.get_fact("compiled_by"),
        state.get_fact("processes") or 1,
    )
    now = (trainer.precision, trainer.compile_result.mode, trainer.world.size)
    names = ("precision", "torch.compile", "processes")
    changes = [f"{n} {b} → {a}" for n, b, a in zip(names, before, now, strict=True) if a != b]
    return ", ".join(changes) or None


def format_guess(tokenizer: "Tokenizer") -> str:
    """Describe the loss of a model that has learned nothing."""
    tokens = tokenizer.num_tokens
    return f"untrained: loss {math.log(tokens):.2f} = ln {tokens:,} is guessing"


def format_overfitting(best: "Best", val_loss: float) -> str:
    """Describe how val loss has risen, and what helps."""
    return (
        f"Note: overfitting: val loss has risen since step {best.step:,}, from {best.loss:.4f} to "
        f"{val_loss:.4f}, while the model memorizes the training text"
    )


def format_result(
    trainer: "Trainer", result: "TrainResult", best_bits: float | None, *, stopped_early: bool
) -> str:
    """Format how a run ended, and the commands that come next.

    `best_bits` is the best val loss in bits per byte; `stopped_early` means by early stopping.
    """
    is_stopped = result.step < trainer.config.max_iters
    ended = f"Stopped after step {result.step:,}" if is_stopped else f"Done: {result.step:,} steps"
    why = f": {result.stopped_by}" if result.stopped_by else ""
    heading = f"\n{ended} in {format_duration(result.seconds)}{why}."
    rows = []
    if result.best_val_loss is not None:
        heading += (
            f" Best val loss {result.best_val_loss:.4f} "
            f"({_format_evaluation_size(trainer.config)}; {best_bits:.3f} bits per byte) at step "
            f"{result.best_step:,}."
        )
        rows.append(("Best model:", str(result.export_dir)))
    rows.append(("Last checkpoint:", str(result.checkpoint)))
    if trainer.plan.named_model is not None:
        rows.append(("Named model:", f"{trainer.plan.named_model} (step {result.step:,})"))
    rows.append(("Report:", str(RunDirectory(result.run_dir).report)))
    places = [f"{label:<17} {place}" for label, place in rows]
    findings = list(_list_findings(trainer, result))
    run = shlex.quote(str(result.run_dir))
    commands = [
        (f"{format_command('inference.py')} {_format_model_flags(trainer, run)}", ""),
        (f"{format_command('tensorboard')} --logdir {shlex.quote(trainer.config.runs_dir)}", ""),
    ]
    if trainer.config.aim_logging:
        repo = shlex.quote(get_aim_repo(trainer.config))
        commands.append((f"{format_command('aim')} up --repo {repo}", ""))
    if is_stopped:
        patience = " --early-stopping-patience 0" if stopped_early else ""
        commands.append((format_resume_command(trainer, result.run_dir) + patience, "resume"))
    elif not trainer.plan.is_resume:
        record = f"{run}/meta/full_config.json{_format_callback_flags(trainer)}"
        commands.append((f"{_format_train_command()} --config {record}", "repeat this run"))
    lines = [f"  {command}{f'   # {what}' if what else ''}" for command, what in commands]
    return "\n".join([heading, *findings, *places, "", "Next:", *lines])


def _list_findings(trainer: "Trainer", result: "TrainResult") -> Iterator[str]:
    """Yield what the run shows about overfitting and about text learned by heart."""
    if (found := result.overfitting) is not None:
        yield (
            f"Overfitting: val loss has risen by {found.rise:.2f} since step {found.since:,}. More "
            "text would help, more dropout (--dropout), a smaller model (--n-embd), fewer steps "
            "(--early-stopping-patience 3), or --config configs/presets/small_text.yaml."
        )
    if text := result.longest_overlap:
        yield (
            f"Longest stretch of the sample that stands in the training text: {len(text)} "
            f"characters: {json.dumps(text, ensure_ascii=False)}"
        )


def _format_model_flags(trainer: "Trainer", run: str) -> str:
    """Return the flags of inference.py that name the trained model, as the user named it."""
    config, named_model = trainer.config, trainer.plan.named_model
    if named_model is None or named_model.parent != Path(config.checkpoints_dir):
        return f"--run {run}"
    flags = f"--model-name {shlex.quote(named_model.name)}"
    for name in ("runs_dir", "checkpoints_dir"):
        if (value := getattr(config, name)) != ModelConfig.model_fields[name].default:
            flags += f" {format_flag(name)} {shlex.quote(value)}"
    return flags


def _format_evaluation_size(config: ModelConfig) -> str:
    """Return how much of a split training's evaluation reads: `20 batches` or `whole split`."""
    batches = config.eval_iters
    return f"{batches:,} batch{'' if batches == 1 else 'es'}" if batches else "whole split"


def format_resume_command(trainer: "Trainer", run_dir: Path) -> str:
    """Return the command that resumes the run where it stopped."""
    command = f"{_format_train_command()} --resume {shlex.quote(str(run_dir))}"
    # Settings that no checkpoint has.
    for name in ("device", "runs_dir", *(["checkpoints_dir"] if trainer.plan.named_model else [])):
        value = getattr(trainer.config, name)
        if value != ModelConfig.model_fields[name].default:
            command += f" {format_flag(name)} {shlex.quote(value)}"
    return command + _format_callback_flags(trainer)


def _format_train_command() -> str:
    """Return the command that starts train.py as this process was started: alone or by torchrun."""
    ranks = Ranks.from_environment()
    if ranks.size == 1:
        return format_command("train.py")
    nodes = ranks.size // ranks.local_size
    several = f" --nnodes={nodes} …" if nodes > 1 else ""
    script = format_command("train.py").split(" ", 1)[1]
    return f"{format_command('torchrun')}{several} --nproc-per-node={ranks.local_size} {script}"


def _format_callback_flags(trainer: "Trainer") -> str:
    """Return the flags of the run's callbacks: no checkpoint and no record executes code."""
    return "".join(f" {name}" for name in trainer.callbacks if name.startswith("--callback "))


def count_evaluations(trainer: "Trainer") -> int:
    """Return how many evaluations a run has."""
    steps = trainer.config.max_iters - trainer.plan.start_step
    return math.ceil(steps / (trainer.config.eval_interval or steps))


def estimate_seconds(trainer: "Trainer", step_seconds: float, evaluation_seconds: float) -> float:
    """Return the seconds of a run, from those of a step and of an evaluation."""
    steps = trainer.config.max_iters - trainer.plan.start_step
    return steps * step_seconds + count_evaluations(trainer) * evaluation_seconds


def format_suggestion(better: "SizeEstimate", loss: float, seconds: float) -> str:
    """Format a size that is predicted to reach less than `loss` in as many seconds."""
    size = better.size
    return (
        f"Size    {size.n_layer} layers of {size.n_embd} channels would reach a val loss about "
        f"{loss - better.loss:.2f} lower in this time: --size auto "
        f"--max-minutes {round(seconds / 60)}"
    )


def format_estimate(
    trainer: "Trainer", step_seconds: float, evaluation_seconds: float, peak_memory: int | None
) -> str:
    """Format the memory and the time that a run would take.

    `peak_memory` is in bytes.
    """
    evaluations = count_evaluations(trainer)
    seconds = estimate_seconds(trainer, step_seconds, evaluation_seconds)
    # float32: weights, gradients, and two moments of AdamW or one of Muon
    size = sum(
        4 * (3 if "momentum" in group else 4) * parameter.numel()
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    )
    scope = "this whole process" if trainer.device.type == "cpu" else "the device"
    peak = f"; peak of {scope}: {format_bytes(peak_memory)}" if peak_memory else ""
    return (
        f"Memory  {format_bytes(size)} for weights, gradients and optimizer state{peak}\n"
        f"Time    about {format_duration(seconds)}: {step_seconds * 1000:.1f} ms per step, "
        f"{pluralize(evaluations, 'evaluation')} of {evaluation_seconds:.1f} s"
    )
