"""Which device a run uses, in which precision, and how the model is compiled for it.

The CUDA and MPS branches are short because they have not been run where Folio is developed;
their choice is tested, their arithmetic is not.
"""

import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from utils.errors import UserError
from utils.output import pluralize
from utils.ranks import Ranks

_T = TypeVar("_T")


def choose_device(requested: str, ranks: Ranks | None = None) -> torch.device:
    """The device for `--device`: auto is CUDA, else MPS, else the CPU.

    Of several processes on a machine each takes a CUDA device of its own, or all the CPU.

    Raises `UserError` where the device asked for is not there.
    """
    if ranks is not None and ranks.size > 1:
        return _choose_among(requested, ranks)
    if requested == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(requested)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {requested}: PyTorch sees no CUDA device here; try --device auto"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {requested}: PyTorch sees {torch.cuda.device_count()} CUDA devices here, "
            "counted from cuda:0"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch sees no Apple GPU here; try --device auto")
    return device


def _choose_among(requested: str, ranks: Ranks) -> torch.device:
    """The device of one of several processes."""
    if requested == "mps" or ":" in requested:
        raise UserError(
            f"--device {requested} is one device, and there are {ranks.size} processes: "
            "take --device auto, cuda or cpu"
        )
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if ranks.local_size > torch.cuda.device_count():
        raise UserError(
            f"{ranks.local_size} processes on this machine need a CUDA device each, and PyTorch "
            f"sees {torch.cuda.device_count()} here: start fewer, or take --device cpu"
        )
    return torch.device("cuda", ranks.local_rank)


def describe_device(device: torch.device) -> str:
    """What the banner says: `CPU (2 threads)`, `CUDA (the card's name)`, `MPS`."""
    if device.type == "cuda":
        return f"CUDA ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "MPS"
    return f"CPU ({pluralize(torch.get_num_threads(), 'thread')})"


def get_processor_name() -> str:
    """The CPU's name as its system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def get_peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: by tensors on CUDA, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ----------------------------------------------------------------------------------------------
# Precision


def choose_precision(requested: str, device: torch.device) -> str:
    """The precision for `--precision`: auto is bf16 where the processor itself multiplies in it.

    Elsewhere bfloat16 is emulated, and slower than float32.
    """
    if requested != "auto":
        return requested
    if device.type == "cuda":
        # From compute capability 8.0 on; `is_bf16_supported` also counts emulation.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bf16 = device.type == "cpu" and has_amx()
    return "bf16" if has_bf16 else "fp32"


def has_amx() -> bool:
    """Whether the CPU has tiles to multiply bfloat16 in (Intel's AMX)."""
    asks = getattr(torch.cpu, "_is_amx_tile_supported", None)  # of PyTorch 2.6 and later
    return bool(asks and asks())


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Where matrix products are computed in `precision`, from weights that stay in float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def set_tf32(device: torch.device, requested: str) -> None:
    """On CUDA, let what remains in float32 be multiplied as TF32, unless fp32 was asked for."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if requested == "fp32" else "high")


# ----------------------------------------------------------------------------------------------
# torch.compile


# Floating-point operations of a whole run from which on compiling it pays back, measured on the
# CPU: half a minute for a quarter less time. A GPU needs more of them to be busy for as long.
WORTH_COMPILING = {"cpu": 3e13, "cuda": 3e15}


@dataclass(frozen=True)
class CompileResult:
    """What became of torch.compile: the backend in effect, or `off`, and why.

    `fell_back` where it was to be compiled, and that did not work.
    """

    mode: str = "off"
    reason: str = ""
    fell_back: bool = False


def choose_backend(
    requested: str, backend: str, device: torch.device, operations: float
) -> CompileResult:
    """Which backend `--torch-compile` and `--compile-backend` mean on a device.

    `operations` is what the whole run computes, from its first step: so one that goes on to the
    same end chooses the same.
    """
    if requested == "off":
        return CompileResult("off", "torch_compile is off")
    if backend == "auto":
        backend = "aot_eager" if device.type == "mps" else "inductor"
    if requested == "on":
        return CompileResult(backend, "torch_compile is on")
    if device.type not in WORTH_COMPILING:
        return CompileResult("off", f"compiling brings nothing on {device.type.upper()}")
    if device.type == "cpu" and sys.platform == "win32":
        return CompileResult("off", "on Windows it is only done when asked for")
    if operations < WORTH_COMPILING[device.type]:
        return CompileResult("off", "the run is too short for compiling to pay back")
    return CompileResult(backend, "it pays back within the run")


def compile_model(
    model: nn.Module, wanted: CompileResult, requested: str, probe: Callable[[Callable], None]
) -> tuple[Callable, CompileResult]:
    """The model's call, compiled as `wanted` if that works, and what is in effect then.

    Nothing is compiled before the first call, and the backward pass only when it is needed: so
    `probe(learner)` makes a step of both. What it draws from the generators of the CPU and of
    CUDA is put back.

    Raises `UserError` where it does not work and was asked for by name.
    """
    if wanted.mode == "off":
        return model, wanted
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}

    def probe_apart(learner: Callable) -> None:
        with torch.random.fork_rng(devices=devices):
            probe(learner)

    def compiled() -> Callable:
        return torch.compile(model, backend=wanted.mode, dynamic=False)

    learner, effective = try_compile(compiled, wanted, requested, probe_apart)
    return (model if learner is None else learner), effective


def try_compile(
    compiled: Callable[[], _T],
    wanted: CompileResult,
    requested: str,
    probe: Callable[[_T], None],
) -> tuple[_T | None, CompileResult]:
    """What `compiled()` gives, if `probe` of it works, or else None; and what is in effect then.

    Raises `UserError` where it does not work and was asked for by name.
    """
    # What other models of this process have left would count against the limit on recompiling.
    torch.compiler.reset()
    try:
        result = compiled()
        probe(result)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        if requested == "on":
            raise UserError(
                f"torch_compile is on, and {wanted.mode} does not work here ({reason}): install "
                "what it needs, which is a C++ compiler on a CPU, or set torch_compile to off"
            ) from error
        reason = f"{wanted.mode} does not work here ({reason})"
        return None, CompileResult("off", reason, fell_back=True)
    return result, wanted


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch wraps what went wrong in its own words, and a page of advice.
    return lines[0][:200] if lines else "no reason given"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator raises a plain RuntimeError, and so does a size beyond all memory.
    words = ("allocate memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
