"""Say where the time of a training step goes, and how near it comes to what this machine can do.

    python profile_model.py
    python profile_model.py --n-layer 6 --compile
    python profile_model.py --inference
    python profile_model.py --json --chrome-trace trace.json

Takes all settings of train.py, and runs its very step, on a new model that is thrown away. Steps
as they are in a run alternate with steps whose phases are timed, each waiting for the device.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from parameters import ALIASES, GROUPS, ModelConfig
from resume import plan_run
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.output import Output, run_command

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


def main(argv: Sequence[str]) -> int:
    """The command: settle the settings as train.py does, measure, and print."""
    aliases = {**ALIASES, "compile": "torch_compile"}
    command_line = CommandLine(__doc__, ModelConfig, ACTIONS, GROUPS, aliases)
    flags, actions, problems = command_line.parse(argv)
    steps = actions.get("steps", "50")
    if not steps.isdecimal() or not 2 <= int(steps) <= 100_000:
        problems.append(f"--steps must be a whole number from 2 to 100000, got {steps}")
    trace = Path(actions["chrome_trace"]) if "chrome_trace" in actions else None
    if trace is not None and (trace.is_dir() or not trace.resolve().parent.is_dir()):
        problems.append(f"--chrome-trace {trace} is not a file in a directory that exists")
    if problems:
        raise UserError(*problems)
    loaded, plan = plan_run(flags, actions.get("config"), problems)

    # Only here is torch imported: the rest of this file, as a module.
    from profile_model import as_json, described, profile_inference, profile_training

    profile = profile_inference if "inference" in actions else profile_training
    report = profile(loaded.config, int(steps), trace, start)
    Output().print(as_json(report) if "json" in actions else described(report))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

# ----------------------------------------------------------------------------------------------
# The measuring. The command above does not come this far: it imports what follows.

import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode

from callbacks import Best
from checkpoint import load_tokenizer
from data import load_dataset
from generate import KVCache, SamplingParams, decode_tokens
from optim import learning_rate_at
from resume import ResumePlan, read_start_bundle
from trainer import (
    PHASES,
    SAMPLE_TOKENS,
    Trainer,
    collect_weights_and_gradients,
    create_trainer,
    open_device,
    open_log,
    sample_text,
    time_evaluation,
    translate_failures,
)
from utils.device import DTYPES, describe_device, get_peak_memory, synchronize
from utils.output import align_columns, format_bytes
from utils.run_manager import RunDirectory, RunDirectoryCreator, write_full_config
from utils.tracking.run_log import RunLogger

LABELS = (*PHASES, "logging")  # of what is timed in a step
WARM_UP = 5  # steps
TRACED = 5  # steps, or tokens, under PyTorch's profiler
TOP = 12  # operators that are listed
PEAK_SIZES = (512, 1024, 2048)  # of the square matrices whose product is timed


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, or of one phase of it: mean, quartiles, and the phase's share of all."""

    name: str
    mean: float
    low: float
    median: float
    high: float
    share: float

    @classmethod
    def of(cls, name: str, seconds: Sequence[float], total: float) -> "Timing":
        """Of the seconds that a phase took in each step, and what all steps took together."""
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(name, statistics.fmean(seconds), *quartiles, sum(seconds) / total)


@dataclass(frozen=True)
class Operator:
    """An operator, or a category of them: seconds and calls a step, and its share of all."""

    name: str
    seconds: float
    calls: float
    share: float


@dataclass(frozen=True)
class PeriodicWork:
    """What is done every `interval` steps (0: at the end alone), and its share of such a run."""

    name: str
    seconds: float
    interval: int
    share: float


@dataclass(frozen=True)
class Section:
    """What was measured of one kind of work: a training step, a prefill, or a decoded token."""

    title: str
    timing: Timing  # of the whole, undisturbed
    tokens: int
    flops: int
    phases: list[Timing]
    categories: list[Operator]
    operators: list[Operator]

    @property
    def tokens_per_second(self) -> float:
        """At the median."""
        return self.tokens / self.timing.median

    @property
    def flops_per_second(self) -> float:
        """At the median."""
        return self.flops / self.timing.median


@dataclass(frozen=True)
class Report:
    """All that is printed. Times are in seconds, memory in bytes, shares are parts of 1."""

    device: str
    precision: str
    torch_compile: str
    parameters: int
    first_call: float
    get_peak_memory: int | None
    peak_flops_per_second: float
    sections: list[Section]
    periodic: list[PeriodicWork]


class Stopwatch:
    """Adds up what each part of a step took, having waited for the device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._current: Counter[str] = Counter()
        self.steps: list[float] = []
        self.parts: list[Counter[str]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Surround a whole step."""
        self._current = Counter()
        began = self._now()
        yield
        self.steps.append(self._now() - began)
        self.parts.append(self._current)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Surround a part of a step; one that comes again in the step is added."""
        began = self._now()
        yield
        self._current[name] += self._now() - began

    def timings(self) -> list[Timing]:
        """Each part's, in the order of a step."""
        names = [name for name in LABELS if any(name in part for part in self.parts)]
        total = sum(self.steps)
        return [Timing.of(name, [part[name] for part in self.parts], total) for name in names]

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


Phase = Callable[[str], AbstractContextManager]
Work = Callable[[Trainer, Phase], None]


def profile_training(
    config: ModelConfig, steps: int, trace: Path | None = None, start: ResumePlan | None = None
) -> Report:
    """Measure `steps` steps of training, and what stands between them in a run.

    Of `start`, only the vocabulary is taken.
    """
    with (
        translate_failures(config, Output(quiet=True)),
        tempfile.TemporaryDirectory(prefix="folio-profile-") as directory,
    ):
        # The numbers are fetched within the steps that are measured, however few these are.
        interval = min(config.log_interval, steps)
        own = {"log_interval": interval, "aim_repo": directory}
        setup = _set_up(config.model_copy(update=own), start)
        first_call = _seconds(setup, lambda: Trainer.training_step(setup, 0))
        run = RunDirectoryCreator(Path(directory)).create("profile")
        write_full_config(run.meta / "full_config.json", setup.config, {}, {})
        numbers = itertools.count(1)
        with contextlib.closing(open_log(setup, run, Output(quiet=True))) as log:

            def step(setup: Trainer, phase: Phase) -> None:
                number = next(numbers)
                loss, grad_norm = Trainer.training_step(setup, number, phase)
                with phase("logging"):
                    log.log_step(
                        number + 1, loss, grad_norm, learning_rate_at(number, setup.config)
                    )

            tokens = config.batch_size * config.block_size
            title = f"Training: {config.batch_size} x {config.block_size} tokens a step"
            section = _section(title, tokens, setup, step, steps, trace)
            periodic = _periodic_work(setup, run, log, section.timing.median)
        return _report(setup, first_call, [section], periodic)


def profile_inference(
    config: ModelConfig, steps: int, trace: Path | None = None, start: ResumePlan | None = None
) -> Report:
    """Measure reading a prompt of `block_size` tokens, and each token written after it.

    As inference.py does it, which compiles nothing and computes in float32.
    """
    config = config.model_copy(update={"torch_compile": "off", "precision": "fp32"})
    with translate_failures(config, Output(quiet=True)):
        setup = _set_up(config, start)
        model = setup.model.eval()
        prompt = torch.zeros(1, config.block_size, dtype=torch.long, device=setup.device)
        draw, cache = torch.zeros(1, 1, device=setup.device), KVCache(model, 1)

        @torch.inference_mode()
        def prefill(setup: Trainer, phase: Phase) -> None:
            decode_tokens(model, prompt, cache.positions, cache, draw, SamplingParams())

        @torch.inference_mode()
        def decode(setup: Trainer, phase: Phase) -> None:
            decode_tokens(
                model, prompt[:, -1:], cache.positions[-1:], cache, draw, SamplingParams()
            )

        first_call = _seconds(setup, lambda: prefill(setup, contextlib.nullcontext))
        length = config.block_size
        sections = []
        for name, title, tokens, work in (
            ("prefill", f"Prefill: a prompt of {length} tokens at once", length, prefill),
            ("decode", f"Decode: one token more, with {length - 1} in the cache", 1, decode),
        ):
            beside = trace and trace.with_stem(f"{trace.stem}_{name}")
            sections.append(_section(title, tokens, setup, work, steps, beside))
        return _report(setup, first_call, sections, [])


def _set_up(config: ModelConfig, start: ResumePlan | None) -> Trainer:
    """A new model of these settings, and all that trains it, with the vocabulary of `start`."""
    settled = {"max_iters": config.max_iters or 1_000_000, "epochs": None, "max_minutes": None}
    config = config.model_copy(update=settled)
    device = open_device(config)
    bundle = read_start_bundle(start or ResumePlan())
    tokenizer = load_tokenizer(bundle) if bundle else None
    data = load_dataset(config, tokenizer=tokenizer, may_extend=True)
    return create_trainer(config, {}, data, device, ResumePlan())


def _section(
    title: str, tokens: int, setup: Trainer, work: Work, steps: int, trace: Path | None
) -> Section:
    """Time `work` as it is and phase by phase, in turns; then watch it by PyTorch's profiler.

    In turns, so that whatever else the machine does slows both alike, and now one first and now
    the other, so that what comes at every so many steps comes to both.
    """
    for _ in range(WARM_UP):
        work(setup, contextlib.nullcontext)
    seconds: list[float] = []
    stopwatch = Stopwatch(setup.device)
    for turn in range(steps):
        for is_phased in (turn % 2 == 1, turn % 2 == 0):
            if is_phased:
                with stopwatch.step():
                    work(setup, stopwatch.phase)
            else:
                seconds.append(_seconds(setup, lambda: work(setup, contextlib.nullcontext)))
    categories, operators = _operators(setup, work, trace)
    return Section(
        title=title,
        timing=Timing.of("step", seconds, sum(seconds)),
        tokens=tokens,
        flops=_flops(setup, work),
        phases=stopwatch.timings(),
        categories=categories,
        operators=operators,
    )


def _seconds(setup: Trainer, call: Callable[[], object]) -> float:
    synchronize(setup.device)
    began = time.perf_counter()
    call()
    synchronize(setup.device)
    return time.perf_counter() - began


def _periodic_work(
    setup: Trainer, run: RunDirectory, log: RunLogger, step: float
) -> list[PeriodicWork]:
    """Time once what a run does between its steps of `step` seconds, and its share of the run."""
    config, model = setup.config, setup.model
    checkpoints = open_checkpoints(setup, run)
    state = training_state(setup, run, 1, None, Best())
    evaluation = time_evaluation(setup)
    checkpoint = _seconds(setup, lambda: checkpoints.save(state))
    histograms = _seconds(
        setup, lambda: log.log_histograms(1, collect_weights_and_gradients(model))
    )
    text = _seconds(setup, lambda: sample_text(model, setup.data, config, SAMPLE_TOKENS))
    rows = (
        ("evaluation", evaluation, config.eval_interval),
        ("checkpoint", checkpoint, config.checkpoint_interval),
        ("histograms", histograms, config.histogram_interval),
        ("sample", text, config.sample_interval),
    )
    per_step = {name: seconds / every if every else 0.0 for name, seconds, every in rows}
    whole = step + sum(per_step.values())
    return [PeriodicWork(name, s, every, per_step[name] / whole) for name, s, every in rows]


def matrix_product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The most floating-point operations a second that a product of square matrices reached."""
    best = 0.0
    for size in PEAK_SIZES:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(4):  # the first one warms up
            synchronize(device)
            began = time.perf_counter()
            torch.mm(a, b)
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _flops(setup: Trainer, work: Work) -> int:
    """The floating-point operations of `work`'s matrix products, counted by PyTorch.

    On a model of its own that is not compiled, with attention as plain products: the counter does
    not know the CPU's fused attention, nor what a compiler makes of it.
    """
    config = setup.config.model_copy(update={"torch_compile": "off"})
    plain = create_trainer(config, {}, setup.data, setup.device, ResumePlan())
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        work(plain, contextlib.nullcontext)
    return counter.get_total_flops()


def _report(
    setup: Trainer, first_call: float, sections: list[Section], periodic: list[PeriodicWork]
) -> Report:
    return Report(
        device=describe_device(setup.device),
        precision=setup.precision,
        torch_compile=setup.compiled.mode,
        parameters=setup.model.count_parameters(),
        first_call=first_call,
        peak_memory=get_peak_memory(setup.device),
        peak_flops_per_second=matrix_product_peak(setup.device, DTYPES[setup.precision]),
        sections=sections,
        periodic=periodic,
    )


# ----------------------------------------------------------------------------------------------
# Operators


def _operators(
    setup: Trainer, work: Work, trace: Path | None
) -> tuple[list[Operator], list[Operator]]:
    """Categories of operators, and the operators that take most, by PyTorch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells that it starts and stops
    on_gpu = setup.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(TRACED):
            work(setup, record_function)
        synchronize(setup.device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    spent = [
        (event, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.events()
    ]
    categories = _summed((category_of(event), time) for event, time in spent)
    operators = _summed((event.name, time) for event, time in spent)
    # The phases are in the trace too, with the time that is Python's between their operators.
    return categories, [each for each in operators if each.name not in LABELS][:TOP]


def _summed(events: Iterable[tuple[str, float]]) -> list[Operator]:
    """Microseconds by name, as seconds and calls a step, the longest first."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for name, microseconds in events:
        spent[name] += microseconds
        calls[name] += 1
    total = sum(spent.values()) or 1
    return [
        Operator(name, micro / 1e6 / TRACED, calls[name] / TRACED, micro / total)
        for name, micro in spent.most_common()
    ]


# What people look for, by what stands in an operator's name.
CATEGORIES = (
    ("attention", ("attention", "sdpa")),
    ("linear", ("::mm", "::addmm", "::bmm", "::linear", "::matmul")),
    ("norm", ("_norm", "Normalised")),
    ("activation", ("gelu", "silu", "relu")),
    ("loss", ("nll_loss", "cross_entropy", "LogSoftmaxBackward", "log_softmax_backward")),
    ("sampling", ("softmax", "cumsum", "argmax")),
    ("embedding", ("embedding", "index_select")),
)


def category_of(event: FunctionEvent) -> str:
    """The category of an operator, by its name and by the phase of the step that called it."""
    callers = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        callers.append(parent.name)
        parent = parent.cpu_parent
    for phase in ("data", "gradient clipping", "optimizer", "logging"):
        if phase in callers:
            return phase
    # On CUDA autograd has a thread of its own, which no phase surrounds.
    is_backward = "backward" in callers or any("autograd::engine" in name for name in callers)
    for name, words in CATEGORIES:
        if any(word in caller for word in words for caller in callers):
            return f"{name} {'backward' if is_backward else 'forward'}"
    return "other"  # copies, sums, and the calls themselves


# ----------------------------------------------------------------------------------------------
# What is shown


def as_json(report: Report) -> str:
    """The report for programs."""
    content = asdict(report)
    for section, values in zip(report.sections, content["sections"], strict=True):
        values["tokens_per_second"] = section.tokens_per_second
        values["flops_per_second"] = section.flops_per_second
        values["share_of_peak"] = section.flops_per_second / report.peak_flops_per_second
    return json.dumps(content, indent=2)


def described(report: Report) -> str:
    """The report for people."""
    memory = format_bytes(report.peak_memory) if report.peak_memory else "unknown"
    whose = "the process's" if report.device.startswith("CPU") else "the device's"
    lines = [
        f"Device  {report.device}, {report.precision}, torch.compile {report.torch_compile}; "
        "the first step took "
        f"{report.first_call * 1000:,.0f} ms",
        f"Model   {report.parameters:,} parameters; {memory} is {whose} peak memory",
        f"Peak    {report.peak_flops_per_second / 1e9:,.1f} GFLOP/s is what a product of "
        f"{report.precision} matrices reached just now",
    ]
    for section in report.sections:
        lines += ["", *_described_section(section, report.peak_flops_per_second)]
    if report.periodic:
        rows = [("between steps", "ms", "every", "% of a run")]
        rows += [
            (
                each.name,
                f"{each.seconds * 1000:,.1f}",
                f"{each.interval:,} steps" if each.interval else "end",
                f"{each.share * 100:.1f}",
            )
            for each in report.periodic
        ]
        lines += ["", align_columns(rows, right=(1, 2, 3))]
    return "\n".join(lines)


def _described_section(section: Section, peak: float) -> Iterator[str]:
    timing = section.timing
    yield section.title
    yield (
        f"{timing.median * 1000:,.2f} ms is the median (the middle half: "
        f"{timing.low * 1000:,.2f} to {timing.high * 1000:,.2f}), "
        f"{section.tokens_per_second:,.0f} tokens/s"
    )
    yield (
        f"{section.flops / 1e9:,.3g} GFLOP in matrix products: "
        f"{section.flops_per_second / 1e9:,.1f} GFLOP/s, "
        f"{section.flops_per_second / peak * 100:.0f} % of the peak"
    )
    if section.phases:
        rows = [("phase", "mean ms", "median", "middle half", "% of a step")]
        rows += [
            (
                phase.name,
                f"{phase.mean * 1000:.2f}",
                f"{phase.median * 1000:.2f}",
                f"{phase.low * 1000:.2f} to {phase.high * 1000:.2f}",
                f"{phase.share * 100:.1f}",
            )
            for phase in section.phases
        ]
        yield "\n" + align_columns(rows, right=(1, 2, 3, 4))
    for title, operators in (
        ("category of operators", section.categories),
        ("operator", section.operators),
    ):
        rows = [(title, "ms", "calls", "%")]
        rows += [
            (each.name, f"{each.seconds * 1000:.2f}", f"{each.calls:g}", f"{each.share * 100:.1f}")
            for each in operators
        ]
        yield "\n" + align_columns(rows, right=(1, 2, 3))
