"""Device, precision and torch.compile of a run.

tests/gpu tests the CUDA branches on a GPU. The MPS branches have never been run: the choice of the
device is tested, its arithmetic is not.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from utils.errors import UserError, format_reason
from utils.memory import is_out_of_memory
from utils.output import pluralize
from utils.ranks import Ranks

_T = TypeVar("_T")


def choose_device(requested: str, ranks: Ranks | None = None) -> torch.device:
    """Return the device for `--device`: auto is CUDA, else MPS, else the CPU.

    Under torchrun every rank has its own CUDA device, or all ranks share the CPU. Raises
    `UserError` if the device is not available.
    """
    ranks = ranks or Ranks()
    if requested == "auto":
        has_mps = ranks.size == 1 and torch.backends.mps.is_available()
        requested = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    device = torch.device(requested)
    if device.type == "cpu":
        return device
    if ranks.size > 1:
        if device != torch.device("cuda"):
            raise UserError(
                f"--device {requested} is one device, and there are {ranks.size} processes: "
                "take --device auto, cuda or cpu"
            )
        device = torch.device("cuda", ranks.local_rank)
    is_cuda = device.type == "cuda"
    number = torch.cuda.device_count() if is_cuda else int(torch.backends.mps.is_available())
    if max(device.index or 0, ranks.local_size - 1) >= number:
        found = pluralize(number, f"{device.type.upper()} device")
        who, remedy = "", "try --device auto"
        if ranks.size > 1:
            who = f" for {ranks.local_size} processes on this machine"
            remedy = "start fewer, or try --device cpu"
        raise UserError(f"--device {requested}{who}: PyTorch sees {found} here; {remedy}")
    return device


def describe_device(device: torch.device) -> str:
    """Return `CPU (2 threads)`, `CUDA (the GPU's name)` or `MPS`."""
    if device.type == "cuda":
        return f"CUDA ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "MPS"
    return f"CPU ({pluralize(torch.get_num_threads(), 'thread')})"


def get_processor_name() -> str:
    """Return the CPU's name as its system reports it."""
    return _read_cpuinfo("model name") or platform.processor() or platform.machine()


def _read_cpuinfo(key: str) -> str:
    """Return the first value of a key in Linux's /proc/cpuinfo, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, before a clock is read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def get_peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes: of tensors on CUDA, of the whole process otherwise."""
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
    """Return the precision for `--precision`: auto is bf16 if the processor multiplies in it.

    Other processors emulate bfloat16, which is slower than float32.
    """
    if requested != "auto":
        return requested
    if device.type == "cuda":
        # Compute capability 8.0 and later; `is_bf16_supported` also counts emulation.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bf16 = device.type == "cpu" and has_bf16_instructions()
    return "bf16" if has_bf16 else "fp32"


def has_bf16_instructions() -> bool:
    """Return whether the CPU has instructions for products in bfloat16, as Linux reports it.

    Intel's AMX multiplies matrices; AVX512-BF16, which AMD has too, adds up pairs of products, and
    makes a step of the default model a third faster than float32 (docs/LOG.md).
    """
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_read_cpuinfo("flags").split())


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a context in which matrix products are in `precision`; weights stay in float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def configure_matmul(device: torch.device, requested: str) -> None:
    """On CUDA, allow TF32 for float32 matrix products, unless `--precision fp32` was given.

    cuBLAS gives the same bits each time with a workspace of fixed size; call this before its first
    product.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_float32_matmul_precision("highest" if requested == "fp32" else "high")


@contextlib.contextmanager
def use_deterministic_kernels(device: torch.device) -> Iterator[None]:
    """On CUDA, give the same bits each time: by default, some backward passes add atomically.

    For a training step, not for a whole run: histograms and sampling have no such kernels.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ----------------------------------------------------------------------------------------------
# torch.compile


# Floating-point operations of a run from which compiling it saves time. Measured: on a CPU,
# compiling takes half a minute and saves a quarter of the time; on an H200, 15 s and half of it.
MIN_FLOPS_TO_COMPILE = {"cpu": 3e13, "cuda": 2e15}


@dataclass(frozen=True)
class CompileResult:
    """The backend of torch.compile in effect, or `off`, and the reason."""

    mode: str = "off"
    reason: str = ""
    fell_back: bool = False  # compiling was chosen and failed


def choose_backend(
    requested: str,
    backend: str,
    device: torch.device,
    amount: float,
    worthwhile: Mapping[str, float] = MIN_FLOPS_TO_COMPILE,
) -> CompileResult:
    """Return the backend for `--torch-compile` and `--compile-backend` on a device.

    `worthwhile` is the amount of work from which on compiling pays off, by type of device.
    Training counts the whole run from step 0, so that a resumed run chooses the same.
    """
    if requested == "off":
        return CompileResult("off", "torch_compile is off")
    if backend == "auto":
        backend = "aot_eager" if device.type == "mps" else "inductor"
    if requested == "on":
        return CompileResult(backend, "torch_compile is on")
    if device.type not in worthwhile:
        return CompileResult("off", f"compiling saves no time on {device.type.upper()}")
    if device.type == "cpu" and sys.platform == "win32":
        return CompileResult("off", "on Windows it needs torch_compile on")
    if amount < worthwhile[device.type]:
        return CompileResult("off", "the run is too short for compiling to pay off")
    return CompileResult(backend, "it pays off within the run")


def compile_model(
    model: nn.Module, wanted: CompileResult, requested: str, probe: Callable[[Callable], None]
) -> tuple[Callable, CompileResult]:
    """Return the model compiled as `wanted`, or itself if that fails, and the result in effect.

    torch compiles at the first forward and the first backward pass, so `probe(train_model)` makes
    a step of both. Its draws from the random number generators of CPU and CUDA are undone.
    Raises `UserError` if it fails and `requested` is "on".
    """
    if wanted.mode == "off":
        return model, wanted
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}

    def compile_and_probe() -> Callable:
        train_model = torch.compile(model, backend=wanted.mode, dynamic=False)
        with torch.random.fork_rng(devices=devices):
            probe(train_model)
        return train_model

    train_model, effective = try_compile(compile_and_probe, wanted, requested)
    return (model if train_model is None else train_model), effective


def try_compile(
    compile_and_probe: Callable[[], _T], wanted: CompileResult, requested: str
) -> tuple[_T | None, CompileResult]:
    """Return `compile_and_probe()`, or None if it fails, and the result in effect.

    Raises `UserError` if it fails and `requested` is "on".
    """
    torch.compiler.reset()  # earlier models of this process count against the recompile limit
    try:
        return compile_and_probe(), wanted
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {format_reason(error)[:200]}"
        reason = f"{wanted.mode} does not work here ({reason})"
        if requested == "on":
            raise UserError(
                f"torch_compile is on, and {reason}: install what it needs, which is a C++ "
                "compiler on a CPU, or set torch_compile to off"
            ) from error
        return None, CompileResult("off", reason, fell_back=True)
