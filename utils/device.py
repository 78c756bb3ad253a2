"""Which device a run uses, and how the model is compiled for it.

The CUDA and MPS branches are short because they have not been run where Folio is developed;
their choice is tested, their arithmetic is not.
"""

import platform
import sys
from pathlib import Path

import torch
from torch import nn

from utils.errors import UserError
from utils.output import plural


def choose_device(requested: str) -> torch.device:
    """The device for `--device`: auto is CUDA, else MPS, else the CPU.

    Raises `UserError` where the device asked for is not there.
    """
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


def describe_device(device: torch.device) -> str:
    """What the banner says: `CPU (2 threads)`, `CUDA (the card's name)`, `MPS`."""
    if device.type == "cuda":
        return f"CUDA ({torch.cuda.get_device_name(device)})"
    if device.type == "mps":
        return "MPS"
    return f"CPU ({plural(torch.get_num_threads(), 'thread')})"


def processor_name() -> str:
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


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: by tensors on CUDA, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compile_model(model: nn.Module, wanted: bool) -> str:
    """Compile the model's call in place, if wanted: its parameters keep their names.

    Returns the mode that is in effect, for the record.
    """
    if not wanted:
        return "off"
    model.compile(backend="aot_eager")
    return "aot_eager"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator raises a plain RuntimeError, and so does a size beyond all memory.
    words = ("allocate memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
