"""The record of a run: its directory and metadata, its log and samples, and how it ended."""

import contextlib
import os
import platform
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

import resume
from bundle import (
    WEIGHTS_FILE,
    is_bundle,
    list_checkpoints,
    parse_step,
    read_bundle,
    read_state,
)
from callbacks import TrainResult, describe_callbacks
from checkpoint import load_weights
from config import CHECKOUT, LoadedConfig
from data import Dataset
from distributed import translate_peer_errors
from generate import SamplingParams, generate_tokens
from model import LanguageModel
from optim import learning_rate_at
from parameters import ModelConfig
from utils import summary
from utils.device import describe_device, get_processor_name
from utils.errors import EndedOnAnotherRank, RunError, UserError, format_reason
from utils.evaluation import enter_evaluation_mode
from utils.isolation import Isolated
from utils.memory import is_out_of_memory
from utils.output import Output
from utils.overlap import find_longest_overlap
from utils.report import write_report
from utils.run_manager import (
    RunDirectory,
    create_run_directory,
    create_run_id,
    read_record,
    write_metadata,
    write_result,
)
from utils.tracking import Tracker
from utils.tracking.aim import AimTracker, get_aim_repo
from utils.tracking.run_logger import RunLogger
from utils.tracking.tensorboard import TensorBoardTracker

if TYPE_CHECKING:
    from trainer import Trainer

LAST_SAMPLE_TOKENS = 400  # of the best model, at the end of a run
SAMPLE_TEMPERATURE = 0.8
# The minimum length of a reported overlap of a sample with the training text, in tokens, by the
# tokenizer's unit; 2 for units that are not listed.
MIN_OVERLAP = {"character": 8}
MAX_SEARCHED = 1 << 27  # tokens of the training text that are searched for it: some seconds


# ----------------------------------------------------------------------------------------------
# The start: directory, metadata, log


def open_run(
    trainer: "Trainer", loaded: LoadedConfig | None, argv: Sequence[str], output: Output
) -> RunDirectory:
    """Create the run directory with its `console.txt` and `meta/`, and print the banner."""
    config, data, plan = trainer.config, trainer.data, trainer.plan
    run = create_run_directory(Path(config.runs_dir), create_run_id(plan.run_tag))
    output.record_to(run.console)
    output.print(summary.format_banner(trainer, loaded.changes if loaded else []))
    output.print(f"Run     {run.path}\n")
    if warning := summary.format_text_warning(trainer):
        output.print_warning(warning)
    last_rate = learning_rate_at(config.max_iters - 1, config)
    for note in summary.list_notes(trainer, loaded.rerun_of if loaded else None, last_rate):
        output.print(f"Note: {note}\n")
    parent = plan.bundle if not plan.is_resume else None
    init_from = str(parent.path.resolve()) if parent is not None else None
    recorded = config.model_copy(update={"data": data.path, "init_from": init_from})
    machine = {
        "device": describe_device(trainer.device),
        "processor": get_processor_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "torch build": "\n  " + torch.__config__.show().strip().replace("\n", "\n  "),
    }
    about = describe_run(trainer, run.run_id, argv)
    write_metadata(run.meta, CHECKOUT, recorded, trainer.sources, about, machine)
    return run


def describe_run(trainer: "Trainer", run_id: str, argv: Sequence[str]) -> dict[str, Any]:
    """Return the `run` part of full_config.json."""
    plan, data = trainer.plan, trainer.data
    resumed_from = None
    if plan.is_resume:
        resumed_from = {
            "run_id": plan.bundle.state.run_id,
            "step": plan.start_step,
            "weights_sha256": plan.bundle.state.files[WEIGHTS_FILE],
            "path": str(resume.find_kept_checkpoint(plan, Path(trainer.config.runs_dir)).resolve()),
        }
    return {
        "run_id": run_id,
        "argv": list(argv),
        "callbacks": describe_callbacks(trainer.callbacks),
        "started": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "resumed_from": resumed_from,
        "model_name": plan.named_model.name if plan.named_model else None,
        "lineage": [ancestor.model_dump() for ancestor in plan.lineage],
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "tokens": data.num_tokens,
            "unit": data.tokenizer.unit,
            "vocab_size": data.tokenizer.vocab_size,
        },
        "parameters": trainer.model.count_parameters(),
        "device": str(trainer.device),
        "processes": trainer.world.size,
        "threads": torch.get_num_threads(),
        "precision": trainer.precision,
        "torch_compile": trainer.compile_result.mode,
        "torch_compile_reason": trainer.compile_result.reason,
    }


def open_log(trainer: "Trainer", run: RunDirectory, output: Output) -> RunLogger:
    """Open metrics.jsonl, samples.jsonl, TensorBoard and, if requested, Aim; log the settings.

    Ranks above 0 log to os.devnull: every rank must see a non-finite loss, and fail.
    """
    config, is_main = trainer.config, trainer.world.is_main

    def warn(text: str, details: str) -> None:
        if run.path.exists():  # else the run ends with an error that says so
            output.print_warning(text, details)

    trackers: Isolated[Tracker] = Isolated(warn, lambda tracker: tracker.close())
    if is_main:
        trackers.add("TensorBoard", lambda: TensorBoardTracker(run.tensorboard))
        if config.aim_logging:
            trackers.add("Aim", lambda: AimTracker(get_aim_repo(config), run.run_id))
        record = read_record(run.path)
        about = {"run_dir": str(run.path.resolve()), "python": platform.python_version()}
        about |= {"git": record["git"], **record["run"], "sources": record["sources"]}
        trackers.call_each(lambda tracker: tracker.log_config(record["config"], about))
    return RunLogger(
        run.metrics if is_main else Path(os.devnull),
        run.samples if is_main else Path(os.devnull),
        trackers,
        output,
        config,
        first_step=trainer.plan.start_step,
        may_overflow=trainer.precision == "fp16",
    )


# ----------------------------------------------------------------------------------------------
# Samples


def sample_text(model: LanguageModel, data: Dataset, config: ModelConfig, length: int) -> str:
    """Generate `length` tokens from the default prompt, with the run's seed."""
    tokenizer = data.tokenizer
    prompt = tokenizer.encode(tokenizer.default_prompt)
    sampling = SamplingParams(temperature=SAMPLE_TEMPERATURE)
    with enter_evaluation_mode(model):  # once, rather than for each token
        ids = generate_tokens(model, prompt, length, sampling, seeds=[config.seed])
    return tokenizer.decode(ids[0, prompt.size :])


def log_best_sample(trainer: "Trainer", result: TrainResult, log: RunLogger) -> TrainResult:
    """Log a sample of the exported model, unless the run was interrupted.

    Returns the result with the longest stretch that the sample shares with the training text.
    """
    if result.exit_status or not is_bundle(result.export_dir):
        return result
    trainer.optimizer.zero_grad(set_to_none=True)  # makes room for another model
    data, tokenizer = trainer.data, trainer.data.tokenizer
    try:
        bundle = read_bundle(result.export_dir, WEIGHTS_FILE)
        model = LanguageModel(bundle.config, bundle.vocab_size, tokenizer.num_tokens)
        load_weights(bundle, model)
        text = sample_text(model.to(trainer.device), data, trainer.config, LAST_SAMPLE_TOKENS)
    except (UserError, RuntimeError, MemoryError) as error:
        if not isinstance(error, (UserError, RunError)) and not is_out_of_memory(error):
            raise
        # The model is trained and saved: this must not end the run as failed.
        log.output.print_warning(f"no sample of the best model: {format_reason(error)}")
        return result
    log.log_best_sample(bundle.state.step, text)
    ids, training = tokenizer.encode(text), data.splits["train"][:MAX_SEARCHED]
    shared = find_longest_overlap(ids, training, MIN_OVERLAP.get(tokenizer.unit, 2))
    return replace(result, longest_overlap=tokenizer.decode(ids[shared]))


# ----------------------------------------------------------------------------------------------
# The end


def record_result(
    trainer: "Trainer", result: TrainResult, run: RunDirectory, output: Output
) -> None:
    """Print how the run ended and the commands that come next, and write result.json."""
    best = {"val": result.best_val_loss} if result.best_val_loss is not None else {}
    is_stopped = result.step < trainer.config.max_iters
    stopped_early = is_stopped and resume.is_stopped_early(
        read_state(result.checkpoint), trainer.config
    )
    bits = trainer.data.compute_bits_per_byte(best).get("val")
    output.print(summary.format_result(trainer, result, bits, stopped_early=stopped_early))
    write_result(run.meta / "result.json", asdict(result))


@contextlib.contextmanager
def record_end(trainer: "Trainer", run: RunDirectory, output: Output) -> Iterator[None]:
    """Write report.html at the end; if the run fails, also why, and print how to resume it.

    A `UserError` becomes a `RunError`: after the start, a mistake is a failure of the run. Rank 0
    reports these for all ranks. After a second signal, only the way to resume is printed.
    """
    if not trainer.world.is_main:
        try:
            yield
        except (RunError, UserError) as error:
            raise EndedOnAnotherRank(RunError.exit_status) from error
        return
    try:
        with translate_failures(trainer.config), translate_peer_errors():
            yield
    except BaseException as error:
        if isinstance(error, Exception):  # not for KeyboardInterrupt and SystemExit
            with contextlib.suppress(OSError):  # a full disk must not hide the reason
                write_result(run.meta / "result.json", {"error": format_reason(error)})
            try_write_report(run, output)
        with contextlib.suppress(OSError):
            if checkpoints := list_checkpoints(run.path):
                output.print(
                    f"\nLast checkpoint: step {parse_step(checkpoints[-1])}. Resume from it:\n"
                    f"  {summary.format_resume_command(trainer, run.path)}"
                )
        if isinstance(error, UserError):
            raise RunError(str(error)) from error
        raise
    try_write_report(run, output)


def try_write_report(run: RunDirectory, output: Output) -> None:
    """Write report.html, unless the run was deleted; if that fails, only print a warning."""
    if not run.path.exists():
        return
    try:
        write_report(run.report, run.path)
    except Exception as error:
        with contextlib.suppress(OSError):  # console.txt may be on the same full disk
            output.print_warning(
                f"{run.report} cannot be written: {format_reason(error)}", traceback.format_exc()
            )


# ----------------------------------------------------------------------------------------------
# Failures


@contextlib.contextmanager
def translate_failures(config: ModelConfig) -> Iterator[None]:
    """Turn failures of the system, of its memory or a disk, into a `RunError`."""
    try:
        yield
    except RunError:  # translated already, with the settings of the run
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            "out of memory: lower micro_batch_size (now "
            f"{config.micro_batch_size or config.batch_size}; does not change results), "
            f"block_size ({config.block_size}), n_embd ({config.n_embd}) or "
            f"n_layer ({config.n_layer})"
        ) from error
    except (OSError, SafetensorError) as error:
        # safetensors writes in Rust, and puts the system's reason last.
        reason = getattr(error, "strerror", None) or str(error).split("error: ")[-1]
        where = getattr(error, "filename", None)
        raise RunError(
            f"a file cannot be read or written: {f'{where}: ' if where else ''}{reason}"
        ) from error


@contextlib.contextmanager
def record_failure(output: Output) -> Iterator[None]:
    """Write to console.txt why a run ended, which only the terminal shows otherwise."""
    try:
        yield
    except (RunError, KeyboardInterrupt, SystemExit) as error:
        with contextlib.suppress(OSError):  # a full disk cannot hold the record either
            output.record(f"error: {error if isinstance(error, RunError) else 'interrupted'}")
        raise
