"""Memory: check that a model fits, configure the allocator, recognize a lack of memory.

Nothing here needs torch, unless the device is a GPU.
"""

import contextlib
import ctypes
import os
import sys
from typing import TYPE_CHECKING

from parameters import ModelConfig
from utils.errors import UserError
from utils.output import format_bytes

if TYPE_CHECKING:
    import torch

# Bytes of activations per channel, layer and token that a training step keeps for its backward
# pass: 70 were measured in bf16 (docs/SCALING.md), so less than this is impossible.
MIN_ACTIVATION_BYTES = 40
MIN_LAYER_BYTES = 20_000  # a layer's modules in Python

# Parameters of glibc's `mallopt` (malloc.h): the size from which a block is mapped by itself, and
# the free memory at the end of the heap from which it is returned to the system.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
MAX_KEPT_BYTES = 1 << 30
MAX_KEPT_BLOCK = 32 << 20  # where glibc refuses higher values of M_MMAP_THRESHOLD (before 2.35)


def check_memory(
    config: ModelConfig,
    vocab_size: int,
    device: "torch.device | None",
    training_rows: int = 0,
    texts: int = 0,
) -> None:
    """Raise `UserError` if the model cannot fit into the memory of the device.

    The estimate is a lower bound: a refused model cannot fit, an accepted one may still fail.
    `device` None is the CPU. `training_rows` is the number of sequences in one forward and backward
    pass, 0 for inference, and `texts` the number that are generated at the same time.
    """
    available = _get_total_memory(device)
    needed = _estimate_bytes(config, vocab_size, training_rows)
    if available is not None and texts > 1 and needed < available:
        cache = 8 * config.n_layer * config.block_size * config.n_embd  # float32 keys and values
        if needed + texts * cache > available:
            raise UserError(
                f"{texts} samples at once take at least {format_bytes(needed + texts * cache)} of "
                f"memory, and there are {format_bytes(available)}: generate fewer"
            )
    if available is not None and needed > available:
        batch = "batch_size" if config.micro_batch_size is None else "micro_batch_size"
        ngrams = [] if config.ngram_rows is None else ["ngram_rows"]
        sizes = ("n_layer", "n_embd", "block_size", *ngrams, *([batch] if training_rows else []))
        values = ", ".join(f"{name} {getattr(config, name)}" for name in sizes)
        verb = "train" if training_rows else "use"
        raise UserError(
            f"to {verb} a model with {values} and a vocabulary of {vocab_size} takes at least "
            f"{format_bytes(needed)} of memory, and there are {format_bytes(available)}: lower "
            "one of them"
        )


def keep_freed_memory() -> None:
    """Make this process keep memory that it frees, rather than return it to the system.

    Each training step on the CPU allocates the same tensors again. glibc would return much of their
    memory, and the system clears each page when it is next used: 4 to 15 % of a step (docs/LOG.md).
    Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # without glibc
        mallopt = ctypes.CDLL(None).mallopt
        # It returns 0 if it refuses a value.
        if mallopt(M_MMAP_THRESHOLD, MAX_KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, MAX_KEPT_BLOCK):
            mallopt(M_TRIM_THRESHOLD, MAX_KEPT_BYTES)


def _estimate_bytes(config: ModelConfig, vocab_size: int, training_rows: int) -> int:
    """Return a lower bound of the bytes for weights and, in training, gradients and activations."""
    L, C, T, V = config.n_layer, config.n_embd, config.block_size, vocab_size
    embeddings = (1 if config.tie_weights else 2) * V * C + (config.ngram_rows or 0) * C
    if config.architecture == "gpt2":
        embeddings += T * C
    weights = 12 * L * C * C + embeddings
    tables = 0 if config.architecture == "gpt2" else 8 * L * T * (C // config.n_head)
    needed = 4 * weights + tables + MIN_LAYER_BYTES * L
    if training_rows:
        # Gradients and one moment, in float32; logits and their gradient.
        needed += 8 * weights + training_rows * T * (MIN_ACTIVATION_BYTES * L * C + 8 * V)
    return needed


def _get_total_memory(device: "torch.device | None") -> int | None:
    """Return the bytes of memory of the device, or None if that is not known."""
    if device is not None and device.type == "cuda":
        import torch  # late: decoding in loops does without

        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports a lack of memory, on any device."""
    # torch.OutOfMemoryError is a RuntimeError. The CPU's allocator raises a plain one, and so do a
    # size beyond all memory, the CUDA driver and cuBLAS (CUBLAS_STATUS_ALLOC_FAILED).
    words = ("out of memory", "allocate memory", "Storage size calculation overflowed")
    words += ("STATUS_ALLOC_FAILED",)
    is_reported = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or is_reported
