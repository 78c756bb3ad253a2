"""Distributed training: ranks, collectives, DDP and FSDP2.

    torchrun --nproc-per-node=2 train.py --run-tag two

torchrun starts the processes; PyTorch connects them, over gloo between CPUs and NCCL between GPUs.
Each rank trains on its own rows of every batch, and all ranks take the same step: the training is
the same for any world size, up to rounding. Rank 0 alone prints and writes.

The NCCL branches are short because they have not been run where Folio is developed.
"""

import contextlib
import ctypes
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from model import LanguageModel
from parameters import ModelConfig
from utils.data_files import STANDARD_INPUT
from utils.device import choose_device
from utils.errors import EndedOnAnotherRank, NothingToDo, RunError, UserError, format_reason
from utils.ranks import Ranks

_T = TypeVar("_T")

# A rank may wait while another encodes a large text. A long timeout costs nothing: the death of a
# process is noticed at once, as its connections close.
TIMEOUT = timedelta(hours=12)
# PyTorch 2.13 frees gloo's connections while it holds the GIL, and joins a thread that may wait for
# the GIL: a deadlock. Within these seconds the thread finishes with the last messages. After a peer
# has died some never arrive: then the connections are kept (see `translate_peer_errors`).
SECONDS_BEFORE_DESTROY = 0.1


@dataclass(frozen=True)
class World:
    """The processes that train one model together; a single one by default.

    Collectives must be called by all ranks in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that prints and writes."""
        return self.rank == 0

    def get_rows(self, batch_size: int) -> slice:
        """Return the rows of a batch that this rank trains on."""
        rows_per_rank = batch_size // self.size
        return slice(self.rank * rows_per_rank, (self.rank + 1) * rows_per_rank)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Return the maximum over all ranks of each number."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)  # on the CPU: does not wait for a GPU
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return tensor.tolist()

    def all_gather(self, value: _T) -> list[_T]:
        """Return the values of all ranks, by rank."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: _T) -> _T:
        """Broadcast rank 0's value to all ranks."""
        if self.size == 1:
            return value
        message = [value]
        distributed.broadcast_object_list(message, src=0, device=torch.device("cpu"))
        return message[0]

    def broadcast_from_main(self, function: Callable[..., _T], *args: Any) -> _T:
        """Call `function` on rank 0 only, and broadcast its result to all ranks.

        If it raises, rank 0 raises that exception and the other ranks `EndedOnAnotherRank`.
        """
        if self.size == 1:
            return function(*args)
        result = exit_status = None
        try:
            if self.is_main:
                result = function(*args)
        except BaseException as error:
            exit_status = getattr(error, "exit_status", 1)
            raise
        finally:
            result, exit_status = self.broadcast((result, exit_status))
        if exit_status is not None:
            raise EndedOnAnotherRank(exit_status)
        return result

    def run_on_all_ranks(self, function: Callable[[], _T]) -> _T:
        """Call `function` on every rank; if it fails on any, all raise, and rank 0 says why."""
        if self.size == 1:
            return function()
        failure: BaseException | None = None
        try:
            result = function()
        except (UserError, RunError, NothingToDo) as error:
            failure = error
        own = failure and (type(failure), getattr(failure, "problems", (str(failure),)))
        failures = self.all_gather(own)
        if failure is not None and self.is_main:
            raise failure
        for rank, failed in enumerate(failures):
            if failed is not None:
                kind, lines = failed
                if self.is_main:
                    raise kind(*(f"rank {rank}: {line}" for line in lines))
                raise EndedOnAnotherRank(kind.exit_status)
        return result

    @contextlib.contextmanager
    def enter_on_main(self, manager: AbstractContextManager[None]) -> Iterator[None]:
        """Enter a context manager, whose value is None, on rank 0 only."""
        with contextlib.ExitStack() as stack:
            self.broadcast_from_main(stack.enter_context, manager)
            yield


SINGLE_PROCESS = World()


@contextlib.contextmanager
def open_world(config: ModelConfig) -> Iterator[World]:
    """Connect the processes that torchrun started; without torchrun, yield `SINGLE_PROCESS`.

    Raises `UserError` if they cannot share a batch, or a device.
    """
    ranks = Ranks.from_environment()
    if ranks.size == 1:
        yield SINGLE_PROCESS
        return
    check_world_size(config, ranks.size)
    device = choose_device(config.device, ranks)
    # Objects and flags stay on the CPU, and so use gloo in any case.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with translate_peer_errors():
        distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        with translate_peer_errors():
            yield World(ranks.rank, ranks.size)
            distributed.barrier()  # torchrun terminates the others when one has left
    finally:
        time.sleep(SECONDS_BEFORE_DESTROY)
        distributed.destroy_process_group()


@contextlib.contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Turn PyTorch's errors after the death of a peer into a `RunError`.

    Keep the connections open until the process ends: see `SECONDS_BEFORE_DESTROY`.
    """
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "NCCL", "Connection")  # in the text of errors that DDP wraps
        is_peer_error = isinstance(error, distributed.DistError) or any(
            word in str(error) for word in words
        )
        if isinstance(error, RunError) or not is_peer_error:
            raise
        if distributed.is_initialized():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(distributed.group.WORLD))
        reason = format_reason(error)
        raise RunError(
            f"another process of this run has ended, or cannot be reached ({reason}); "
            "--resume continues from the last checkpoint"
        ) from error


def check_world_size(config: ModelConfig, size: int) -> None:
    """Raise `UserError` if `size` processes cannot train with these settings."""
    if rest := config.batch_size % size:
        below, above = config.batch_size - rest, config.batch_size - rest + size
        batches = f"{below} or {above}" if below else f"{above}"
        divisors = [str(n) for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        raise UserError(
            f"batch_size {config.batch_size} is not divisible by {size} processes: set batch_size "
            f"to {batches}, or start {' or '.join(divisors)} processes"
        )
    if config.data == STANDARD_INPUT:
        raise UserError("several processes cannot read standard input: pass the text as a file")
    if config.parallel == "fsdp":
        if config.precision == "fp16":
            raise UserError("parallel fsdp does not support precision fp16: use bf16 or fp32")
        if config.torch_compile == "on":
            raise UserError("parallel fsdp does not support torch_compile on: use auto or off")


def check_same_settings(world: World, settings: Any) -> None:
    """Raise `UserError` if a rank was started with other settings than rank 0."""
    gathered = world.all_gather(settings)
    different = [rank for rank, other in enumerate(gathered) if other != gathered[0]]
    if different and world.is_main:
        raise UserError(
            f"rank {different[0]} has other settings or another checkpoint than rank 0: start all "
            "ranks with the same command, and with access to the same files"
        )
    if different:
        raise EndedOnAnotherRank(UserError.exit_status)


def derive_seed(seed: int, rank: int, step: int) -> int:
    """Derive the dropout seed of a rank whose generator state is in no checkpoint."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0])


# ----------------------------------------------------------------------------------------------
# Data parallelism


def wrap_ddp(train_model: Callable, device: torch.device, world: World) -> Callable:
    """Wrap a model in DDP, which averages gradients over all ranks (arxiv.org/abs/2006.15704)."""
    if world.size == 1:
        return train_model
    assert isinstance(train_model, nn.Module)
    devices = [device] if device.type == "cuda" else None
    # The buffers are constants: no need to broadcast them at each step. PyTorch 2.13 warns that
    # this flag will be renamed; older releases do not have the new name.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(
            train_model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def shard_model(model: LanguageModel, device: torch.device) -> None:
    """Shard the weights over all ranks, in place (FSDP2, arxiv.org/abs/2304.11277).

    A block's weights are gathered for its computation, and freed after it.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = DeviceMesh.from_group(distributed.group.WORLD, device.type)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "compute_next_logits")


@contextlib.contextmanager
def defer_gradient_sync(train_model: Callable, is_last: bool) -> Iterator[None]:
    """Synchronize DDP's gradients after the last micro-batch only.

    FSDP reduces those of each micro-batch: it has no memory for unsharded gradients.
    """
    defers = isinstance(train_model, DistributedDataParallel) and not is_last
    with train_model.no_sync() if defers else contextlib.nullcontext():
        yield


# ----------------------------------------------------------------------------------------------
# Sharded tensors
#
# `DTensor.full_tensor` is not used for matrices. It sends "ALLGATHER_COALESCED"; in PyTorch 2.13
# both of gloo's threads write the name of their last operation into one std::string without a lock
# (ProcessGroupGloo::runLoop). A name of over 15 characters is heap-allocated, freed twice if both
# write at once, and the process crashes. All operations used here have shorter names. The whole
# investigation is in docs/LOG.md.


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a shard of the tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor: importing that class takes 0.5 s


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather_full_tensor(rows: Tensor, like: Tensor) -> Tensor:
    """All-gather the tensor of which each rank has its rows, if `like` is sharded.

    FSDP assigns rows in order: the same number to each rank, and fewer or none to the last ones.
    These are padded with zeros, as all ranks must send equal sizes.
    """
    if not is_sharded(like):
        return rows
    size = distributed.get_world_size()
    padded = rows.new_zeros(-(-len(like) // size), *like.shape[1:])
    padded[: len(rows)] = rows
    shards = [torch.empty_like(padded) for _ in range(size)]
    distributed.all_gather(shards, padded)
    return torch.cat(shards)[: len(like)]


def gather_to_main(tensor: Tensor, world: World) -> Tensor | None:
    """Gather a sharded tensor in rank 0's main memory; return None on other ranks."""
    if not is_sharded(tensor):
        return tensor
    full = gather_full_tensor(to_local(tensor).detach(), tensor)
    return full.to("cpu", copy=True) if world.is_main else None  # without the padding's memory


def reduce_norm(norm: Tensor) -> Tensor:
    """Return the norm over all shards; each rank has that of its own."""
    return norm.full_tensor() if is_sharded(norm) else norm


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, which every rank has, as `like` is sharded."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
