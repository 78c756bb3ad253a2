"""Profiles: the time of some work as a whole, by phase and by PyTorch operator, and its FLOP/s."""

import contextlib
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode

from parameters import ModelConfig
from utils.device import synchronize
from utils.output import format_bytes
from utils.tables import align_columns

WARMUP = 5  # calls
TRACED = 5  # calls under PyTorch's profiler
TOP = 12  # operators that are listed
PEAK_SIZES = (512, 1024, 2048)  # of the square matrices whose product is timed

# Categories of operators, by parts of an operator's name.
CATEGORIES = {
    "attention": ("attention", "Attention", "sdpa"),
    "linear": ("::mm", "::addmm", "::bmm", "::linear", "::matmul"),
    "norm": ("_norm", "RMSNorm"),
    "activation": ("gelu", "silu", "relu"),
    "loss": ("nll_loss", "cross_entropy", "LogSoftmaxBackward", "log_softmax_backward"),
    "sampling": ("softmax", "cumsum", "argmax"),
    "embedding": ("embedding", "index_select"),
    # Casts to and from bf16, and tensors that are split, stacked or made contiguous.
    "copy": ("::copy_", "::to", "::cat", "::clone", "::contiguous", "::fill_", "ToCopyBackward"),
    # Of the rotary embedding, the gate and the residual branches, and sums of gradients.
    "element-wise": (
        *("::mul", "::add", "::neg", "::sub", "::div", "::sum", "AccumulateGrad"),
        *("MulBackward", "AddBackward", "NegBackward", "SubBackward", "DivBackward"),
    ),
}

# One call of the work to profile. It enters `phase(name)` for each of its phases.
Work = Callable[[Callable[[str], AbstractContextManager]], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of a call, or of a phase of it with its share: mean and quartiles."""

    name: str
    mean: float
    low: float
    median: float
    high: float
    share: float

    @classmethod
    def from_seconds(cls, name: str, seconds: Sequence[float], total: float) -> "Timing":
        """Summarize the seconds of a phase in each call; `total` is that of all calls."""
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(name, statistics.fmean(seconds), *quartiles, sum(seconds) / total)


@dataclass(frozen=True)
class Operator:
    """An operator, or a category of them: seconds, number and share in a call."""

    name: str
    seconds: float
    calls: float
    share: float


@dataclass(frozen=True)
class PeriodicWork:
    """Work that is done every `interval` steps (0: only at the end), and its share of a run."""

    name: str
    seconds: float
    interval: int
    share: float


@dataclass(frozen=True)
class Section:
    """The profile of one kind of work. The rates are at the median."""

    title: str
    timing: Timing  # without phases
    tokens: int
    flops: int
    phases: list[Timing]
    categories: list[Operator]
    operators: list[Operator]
    tokens_per_second: float
    flops_per_second: float

    def format_tables(self, peak: float) -> Iterator[str]:
        """Yield the lines and tables; `peak` is the FLOP/s that this machine reaches."""
        whole = self.timing
        yield self.title
        yield (
            f"{_ms(whole.median)} ms is the median (quartiles: {_ms(whole.low)} to "
            f"{_ms(whole.high)}), {self.tokens_per_second:,.0f} tokens/s"
        )
        yield (
            f"{self.flops / 1e9:,.3g} GFLOP in matrix products: "
            f"{self.flops_per_second / 1e9:,.1f} GFLOP/s, "
            f"{self.flops_per_second / peak * 100:.0f} % of the peak"
        )
        if self.phases:
            rows = [("phase", "mean ms", "median", "quartiles", "% of a step")]
            for each in self.phases:
                quartiles = f"{_ms(each.low)} to {_ms(each.high)}"
                row = (each.name, _ms(each.mean), _ms(each.median), quartiles, _percent(each.share))
                rows.append(row)
            yield "\n" + align_columns(rows, right=(1, 2, 3, 4))
        tables = {"category of operators": self.categories, "operator": self.operators}
        for title, operators in tables.items():
            rows = [(title, "ms", "calls", "%")]
            for each in operators:
                rows.append((each.name, _ms(each.seconds), f"{each.calls:g}", _percent(each.share)))
            yield "\n" + align_columns(rows, right=(1, 2, 3))


@dataclass(frozen=True)
class Report:
    """A whole profile. Times are in seconds, memory in bytes, shares are fractions of 1."""

    device: str
    precision: str
    torch_compile: str
    parameters: int
    first_call: float
    peak_memory: int | None
    peak_flops_per_second: float
    sections: list[Section]
    periodic: list[PeriodicWork]

    def format_json(self) -> str:
        """Return the report as JSON."""
        content = asdict(self)
        for section in content["sections"]:
            section["share_of_peak"] = section["flops_per_second"] / self.peak_flops_per_second
        return json.dumps(content, indent=2)

    def format_tables(self) -> str:
        """Return the report as tables."""
        memory = format_bytes(self.peak_memory) if self.peak_memory else "unknown"
        owner = "the process's" if self.device.startswith("CPU") else "the device's"
        peak = self.peak_flops_per_second
        lines = [
            f"Device  {self.device}, {self.precision}, torch.compile {self.torch_compile}; "
            f"the first call took {self.first_call * 1e3:,.0f} ms",
            f"Model   {self.parameters:,} parameters; {memory} is {owner} peak memory",
            f"Peak    {peak / 1e9:,.1f} GFLOP/s in a product of {self.precision} matrices, "
            "measured just now",
        ]
        for section in self.sections:
            lines += ["", *section.format_tables(peak)]
        if self.periodic:
            rows = [("between steps", "ms", "every", "% of a run")]
            for work in self.periodic:
                interval = f"{work.interval:,} steps" if work.interval else "end"
                rows.append((work.name, _ms(work.seconds), interval, _percent(work.share)))
            lines += ["", align_columns(rows, right=(1, 2, 3))]
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _percent(share: float) -> str:
    return f"{share * 100:.1f}"


def profile_work(
    title: str,
    work: Work,
    device: torch.device,
    calls: int,
    *,
    tokens: int,
    flops: int,
    phases: Sequence[str] = (),
    trace: Path | None = None,
) -> Section:
    """Time calls of `work`, as a whole and phase by phase, then trace it with PyTorch's profiler.

    `tokens` and `flops` are those of one call; `trace` is a file to write.
    """
    for _ in range(WARMUP):
        work(nullcontext)
    seconds: list[float] = []
    phased: list[Counter[str]] = []
    # Both kinds alternate, so that other load on the machine slows both, and each is first in every
    # second turn, so that work at a regular interval falls on both.
    for turn in range(calls):
        for is_phased in (turn % 2 == 1, turn % 2 == 0):
            if is_phased:
                phased.append(measure_phases(device, work))
            else:
                seconds.append(measure_seconds(device, lambda: work(nullcontext)))
    total = sum(times["step"] for times in phased)
    timing = Timing.from_seconds("step", seconds, sum(seconds))
    categories, operators = trace_operators(device, work, trace)
    return Section(
        title,
        timing,
        tokens,
        flops,
        [Timing.from_seconds(name, [times[name] for times in phased], total) for name in phases],
        categories,
        # The phases are in the trace too, with the time of Python between their operators.
        [operator for operator in operators if operator.name not in phases][:TOP],
        tokens / timing.median,
        flops / timing.median,
    )


def measure_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Return the seconds of one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def measure_phases(device: torch.device, work: Work) -> Counter[str]:
    """Return the seconds of each phase of a call, repeated ones added up, and of the "step"."""
    seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        synchronize(device)
        start = time.perf_counter()
        yield
        synchronize(device)
        seconds[name] += time.perf_counter() - start

    with phase("step"):
        work(phase)
    return seconds


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the highest FLOP/s of a few products of square matrices."""
    best = 0.0
    for size in PEAK_SIZES:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = min(measure_seconds(device, lambda a=a, b=b: torch.mm(a, b)) for _ in range(4))
        best = max(best, 2 * size**3 / seconds)
    return best


def count_flops(work: Work) -> int:
    """Return the floating-point operations of the matrix products in one call.

    `work` must not be compiled, and its attention is computed as plain products: PyTorch's counter
    counts neither compiled code nor the CPU's fused attention. Products with later blocks, which
    `BlockedAttention` leaves out, are not counted.
    """

    def count_baddbmm(_, a: torch.Size, b: torch.Size, **options: object) -> int:
        return 2 * math.prod(a) * b[-1]

    # PyTorch (as of 2.13) counts baddbmm, but not its in-place form.
    formulas = {torch.ops.aten.baddbmm_: count_baddbmm}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter, sdpa_kernel(SDPBackend.MATH):
        work(nullcontext)
    return counter.get_total_flops()


def get_sample_period(config: ModelConfig) -> int:
    """Return the number of steps between samples, which follow evaluations; 0 if there are none."""
    if not (config.sample_interval and config.eval_interval):
        return 0
    return math.ceil(config.sample_interval / config.eval_interval) * config.eval_interval


def compute_shares(step: float, works: Mapping[str, tuple[float, int]]) -> list[PeriodicWork]:
    """Return each work's share of a run; `works` has its seconds and its interval in steps."""
    per_step = {name: seconds / every if every else 0.0 for name, (seconds, every) in works.items()}
    total = step + sum(per_step.values())
    return [PeriodicWork(name, *works[name], each / total) for name, each in per_step.items()]


def trace_operators(
    device: torch.device, work: Work, trace: Path | None = None
) -> tuple[list[Operator], list[Operator]]:
    """Return the categories of operators, and the operators, the slowest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints when it starts and stops
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(TRACED):
            work(record_function)
        synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    # A kernel's time is also that of the operator that launched it: count it once.
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    times = [e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events]
    return _sum_times(map(get_category, events), times), _sum_times((e.name for e in events), times)


def _sum_times(names: Iterable[str], microseconds: Sequence[float]) -> list[Operator]:
    """Sum the times by name; return seconds and number per call, the longest first."""
    times: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for name, time_taken in zip(names, microseconds, strict=True):
        times[name] += time_taken
        numbers[name] += 1
    total = sum(microseconds) or 1
    return [
        Operator(name, each / 1e6 / TRACED, numbers[name] / TRACED, each / total)
        for name, each in times.most_common()
    ]


def get_category(event: FunctionEvent) -> str:
    """Return the category of an operator, from its name and the phase that called it."""
    callers, caller = [], event
    while caller is not None:
        callers.append(caller.name)
        caller = caller.cpu_parent
    for phase in ("data", "gradient clipping", "optimizer", "logging"):
        if phase in callers:
            return phase
    # On CUDA autograd has its own thread, which is in no phase.
    is_backward = "backward" in callers or any("autograd::engine" in name for name in callers)
    for name, words in CATEGORIES.items():
        if any(word in caller for word in words for caller in callers):
            return f"{name} {'backward' if is_backward else 'forward'}"
    return "other"  # views, and the time of Python and autograd between the operators
