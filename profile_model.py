"""Profile a training step or generation: its time by phase and operator, and its FLOP/s.

    python profile_model.py
    python profile_model.py --n-layer 6 --compile
    python profile_model.py --inference
    python profile_model.py --json --chrome-trace trace.json

Takes all settings of train.py and runs its training step, on a new model that is discarded. Steps
as in a run alternate with steps whose phases are timed, for which each phase waits for the device.
"""

import contextlib
import copy
import itertools
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from callbacks import Best
from config import ConfigLoader
from parameters import ALIASES, GROUPS, ModelConfig
from resume import ResumePlan, plan_run, read_start_bundle
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.files import is_directory
from utils.output import Output, run_command
from utils.run_manager import create_run_directory, write_full_config

if TYPE_CHECKING:
    from trainer import Trainer
    from utils.profiling import PeriodicWork, Report, Section

ACTIONS = (
    Action("config", "Take settings from a YAML or JSON file.", "FILE"),
    Action("steps", "How many steps are measured [50].", "N"),
    Action("inference", "Measure generating text instead, which is never compiled."),
    Action("json", "Print JSON."),
    Action(
        "chrome_trace",
        "Write a trace for chrome://tracing or ui.perfetto.dev; with --inference two, whose names "
        "end in _prefill and _decode.",
        "FILE",
    ),
)


def profile(
    config: ModelConfig,
    steps: int,
    trace: Path | None = None,
    plan: ResumePlan | None = None,
    *,
    inference: bool = False,
) -> "Report":
    """Profile `steps` training steps, and the work between them in a run; or generation.

    Only the vocabulary of `plan` is used. Generation is by PyTorch's engine, in float32.
    """
    from bundle import load_tokenizer
    from data import load_dataset
    from run_record import translate_failures
    from trainer import Trainer, open_device
    from utils.device import DTYPES, describe_device, get_peak_memory
    from utils.profiling import Report, measure_peak

    if config.size is not None:
        raise UserError(f"size {config.size} is for train.py: set n_layer, n_embd and n_head")
    changes = {"max_iters": config.max_iters or 1_000_000, "epochs": None, "max_minutes": None}
    if inference:
        changes |= {"torch_compile": "off", "precision": "fp32"}
    config = config.model_copy(update=changes)
    with translate_failures(config):
        device = open_device(config)
        bundle = read_start_bundle(plan or ResumePlan())
        tokenizer = load_tokenizer(bundle) if bundle else None
        data = load_dataset(config, tokenizer=tokenizer, may_extend=True)
        trainer = Trainer(config, data, device)
        profile_it = profile_generation if inference else profile_training
        first_call, sections, periodic = profile_it(trainer, steps, trace)
        return Report(
            device=describe_device(device),
            precision=trainer.precision,
            torch_compile=trainer.compile_result.mode,
            parameters=trainer.model.count_parameters(),
            first_call=first_call,
            peak_memory=get_peak_memory(device),
            peak_flops_per_second=measure_peak(device, DTYPES[trainer.precision]),
            sections=sections,
            periodic=periodic,
        )


def profile_training(
    trainer: "Trainer", steps: int, trace: Path | None
) -> tuple[float, list["Section"], list["PeriodicWork"]]:
    """Return the seconds of the first step, the profile of a step, and the work between steps."""
    import budget
    import trainer as training
    from optim import learning_rate_at
    from run_record import open_log, sample_text
    from utils.profiling import (
        compute_shares,
        count_flops,
        get_sample_period,
        measure_seconds,
        profile_work,
    )

    device, model, data = trainer.device, trainer.model, trainer.data
    first_call = measure_seconds(device, lambda: trainer.training_step(0))
    with tempfile.TemporaryDirectory(prefix="folio-profile-") as directory:
        # The logger fetches numbers within the measured steps, however few these are.
        interval = min(trainer.config.log_interval, steps)
        changes = {"log_interval": interval, "aim_repo": directory}
        config = trainer.config = trainer.config.model_copy(update=changes)
        run = create_run_directory(Path(directory), "profile")
        write_full_config(run.meta / "full_config.json", config, {}, {})
        numbers = itertools.count(1)
        with contextlib.closing(open_log(trainer, run, Output(quiet=True))) as log:

            def make_step(trainer, phase):
                number = next(numbers)
                loss, grad_norm = trainer.training_step(number, phase)
                with phase("logging"):
                    learning_rate = learning_rate_at(number, config)
                    log.log_step(number + 1, loss, grad_norm, learning_rate)

            uncompiled = copy.copy(trainer)
            uncompiled.train_model = model
            section = profile_work(
                f"Training: {config.batch_size} x {config.block_size} tokens a step",
                partial(make_step, trainer),
                device,
                steps,
                tokens=config.tokens_per_step,
                flops=count_flops(partial(make_step, uncompiled)),
                phases=(*training.PHASES, "logging"),
                trace=trace,
            )
            checkpoints = trainer.open_checkpoints(run)
            state = trainer.get_state(run, 1, None, Best())
            collect = training.collect_weights_and_gradients
            calls = {
                "checkpoint": lambda: checkpoints.save(state),
                "histograms": lambda: log.log_histograms(1, collect(model)),
                "sample": lambda: sample_text(model, data, config, training.SAMPLE_TOKENS),
            }
            works = {"evaluation": (budget.time_evaluation(trainer), config.eval_interval)}
            intervals = (config.checkpoint_interval, config.histogram_interval)
            intervals += (get_sample_period(config),)
            for name, interval in zip(calls, intervals, strict=True):
                works[name] = (measure_seconds(device, calls[name]), interval)
    return first_call, [section], compute_shares(section.timing.median, works)


def profile_generation(
    trainer: "Trainer", steps: int, trace: Path | None
) -> tuple[float, list["Section"], list["PeriodicWork"]]:
    """Profile the prefill of a prompt of `block_size` tokens, and the decoding of a token after it.

    Returns the seconds of the first prefill, both profiles, and no periodic work.
    """
    import numpy as np

    from decode_torch import TorchDecoder
    from generate import SamplingParams
    from utils.profiling import count_flops, measure_seconds, profile_work

    device, model, length = trainer.device, trainer.model.eval(), trainer.config.block_size
    prompt, draws = np.zeros((1, length), dtype=np.int64), np.zeros((1, 1), dtype=np.float32)
    decoder = TorchDecoder(model, prompt, SamplingParams())

    def decode(tokens, phase=None):
        decoder.decode(prompt[:, -tokens:], length - tokens, draws)

    first_call = measure_seconds(device, lambda: decode(length))
    sections = []
    for name, title, tokens in (
        ("prefill", f"Prefill: a prompt of {length} tokens at once", length),
        ("decode", f"Decode: one more token, with {length - 1} in the cache", 1),
    ):
        work = partial(decode, tokens)
        path = trace and trace.with_stem(f"{trace.stem}_{name}")
        counts = {"tokens": tokens, "flops": count_flops(work)}
        sections.append(profile_work(title, work, device, steps, **counts, trace=path))
    return first_call, sections, []


def main(argv: Sequence[str]) -> int:
    """Resolve the settings as train.py does, profile, and print."""
    aliases = {**ALIASES, "compile": "torch_compile"}
    command_line = CommandLine(__doc__, ModelConfig, ACTIONS, GROUPS, aliases)
    flags, actions, problems = command_line.parse(argv)
    steps = actions.get("steps", "50")
    if not steps.isdecimal() or not 2 <= int(steps) <= 100_000:
        problems.append(f"--steps must be a whole number from 2 to 100000, got {steps}")
    trace = Path(actions["chrome_trace"]) if "chrome_trace" in actions else None
    if trace is not None and (is_directory(trace) or not is_directory(trace.parent)):
        problems.append(f"--chrome-trace {trace} is not a file in a directory that exists")
    if problems:
        raise UserError(*problems)
    loaded, plan = plan_run(ConfigLoader(flags, actions.get("config")))
    report = profile(loaded.config, int(steps), trace, plan, inference="inference" in actions)
    output = Output()
    output.print(report.format_json() if "json" in actions else report.format_tables())
    return output.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
