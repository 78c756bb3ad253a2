"""Several processes, one run: who is who, what they agree on, and who holds which weights.

    torchrun --nproc-per-node=2 train.py --run-tag two

torchrun starts the processes and tells each its rank; PyTorch's engine carries what they say to
one another, over gloo between CPUs and NCCL between GPUs. Each learns from its own rows of every
batch, and all take the same step: so a run is the same training on one process or many, but for
rounding. Rank 0 alone prints and writes.

The NCCL branches are short because they have not been run where Folio is developed.
"""

import contextlib
import ctypes
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from utils.errors import EndedOnAnotherRank, NothingToDo, RunError, UserError
from utils.ranks import Ranks

_T = TypeVar("_T")

# How long a process waits for the others: for as long as one may take to encode a large text. It
# need not be short. A process that dies is noticed at once, as its connections close.
PATIENCE = timedelta(hours=12)
# Seconds in which gloo's thread can let go of the last messages. PyTorch 2.13 frees the connections
# with Python's lock held, and waits there for that thread, which may be waiting for the lock: the
# process would hang. Where a neighbour has died, some messages never come: then nothing is freed.
FREED_AFTER = 0.1


@dataclass(frozen=True)
class World:
    """The processes that train one model together; by itself, a single one.

    Whatever is said below of "all" is done by all of them in the same order, or they wait for one
    another for ever.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes: rank 0."""
        return self.rank == 0

    def get_rows(self, batch_size: int) -> slice:
        """The rows of a batch of `batch_size` that this process learns from."""
        each = batch_size // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all, in place of this one."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The largest of what all give, number by number."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)  # on the CPU, so that no GPU is waited for
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: _T) -> list[_T]:
        """What all have, by rank, for rank 0; an empty list for the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main else []
        distributed.gather_object(value, values if self.is_main else None)
        return values

    def broadcast_from_main(self, make: Callable[[], _T]) -> _T:
        """What rank 0 alone makes, for all.

        Where it fails there, all end: rank 0 by that exception, the others by `EndedOnAnotherRank`.
        """
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]  # what was made, and the exit status where it was not
        try:
            if self.is_main:
                told[0] = make()
        except BaseException as error:
            told[1] = _status_of(error)
            raise
        finally:
            distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if told[1] is not None:
            raise EndedOnAnotherRank(told[1])
        return told[0]

    def run_on_all_ranks(self, make: Callable[[], _T]) -> _T:
        """What each makes for itself. Where one must give up, all do, and rank 0 says why."""
        if self.size == 1:
            return make()
        failure: BaseException | None = None
        try:
            made = make()
        except (UserError, RunError, NothingToDo) as error:
            failure = error
        told: list[Any] = [None] * self.size
        problems = failure and (type(failure), getattr(failure, "problems", (str(failure),)))
        distributed.all_gather_object(told, problems)
        if failure is not None and self.is_main:
            raise failure
        for rank, problems in enumerate(told):
            if problems is not None and self.is_main:
                kind, lines = problems
                raise kind(*(f"rank {rank}: {line}" for line in lines))
            if problems is not None:
                raise EndedOnAnotherRank(problems[0].exit_status)
        return made

    @contextlib.contextmanager
    def enter_on_main(self, manager: AbstractContextManager) -> Iterator[None]:
        """Within what rank 0 alone enters, such as a lock."""
        with contextlib.ExitStack() as stack:
            self.broadcast_from_main(lambda: stack.enter_context(manager) and None)
            yield


SINGLE_PROCESS = World()


def _status_of(error: BaseException) -> int:
    return getattr(error, "exit_status", 1)


@contextlib.contextmanager
def open_world(config: ModelConfig) -> Iterator[World]:
    """The processes that torchrun has started, connected until the block ends; else one.

    Raises `UserError` where they cannot share a batch, or a device.
    """
    ranks = Ranks.from_environment()
    if ranks.size == 1:
        yield SINGLE_PROCESS
        return
    check_world_size(config, ranks.size)
    device = choose_device(config.device, ranks)
    # What stays on the CPU, such as these processes' agreements, goes over gloo in any case.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with translate_peer_errors():
        distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        with translate_peer_errors():
            yield World(ranks.rank, ranks.size)
            distributed.barrier()  # torchrun ends the others when one has left
    finally:
        time.sleep(FREED_AFTER)
        distributed.destroy_process_group()


@contextlib.contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Turn what PyTorch says where another process is gone into a `RunError`.

    The connections are kept until the process ends: see `FREED_AFTER`.
    """
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "NCCL", "Connection")  # DDP wraps what those raise
        is_lost = isinstance(error, distributed.DistError) or any(w in str(error) for w in words)
        if isinstance(error, RunError) or not is_lost:
            raise
        if distributed.is_initialized():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(distributed.group.WORLD))
        raise RunError(
            "another process of this run has ended, and the others cannot go on without it; "
            "--resume goes on from the last checkpoint"
        ) from error


def check_world_size(config: ModelConfig, size: int) -> None:
    """Raise `UserError` where `size` processes cannot train as `config` says."""
    if rest := config.batch_size % size:
        below, above = config.batch_size - rest, config.batch_size - rest + size
        batches = f"{below} or {above}" if below else f"{above}"
        sizes = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        raise UserError(
            f"{size} processes cannot share a batch_size of {config.batch_size}: take a batch_size "
            f"of {batches}, or start {_or(sizes)} processes"
        )
    if config.data == STANDARD_INPUT:
        raise UserError("standard input goes to one process alone: keep the text in a file")
    if config.parallel == "fsdp":
        if config.precision == "fp16":
            raise UserError("parallel fsdp does not go with precision fp16: take bf16 or fp32")
        if config.torch_compile == "on":
            raise UserError("parallel fsdp does not go with torch_compile on: take auto or off")


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))


def check_same_settings(world: World, settings: Any) -> None:
    """Raise `UserError` where a process was started with other settings than rank 0."""
    others = world.gather(settings)
    different = [rank for rank, other in enumerate(others) if other != others[0]]

    def complain() -> None:
        if different:
            raise UserError(
                f"rank {different[0]} has other settings than rank 0, or begins with another "
                "model: start all with the same command, where they find the same files"
            )

    world.broadcast_from_main(complain)


def derive_seed(seed: int, rank: int, step: int) -> int:
    """What a process whose generator no bundle has kept draws its dropout from."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0])


# ----------------------------------------------------------------------------------------------
# The weights


def wrap_ddp(learner: Callable, device: torch.device, world: World) -> Callable:
    """The learner, which from now on averages its gradients over all processes (DDP).

    arxiv.org/abs/2006.15704. All begin with the weights of rank 0.
    """
    if world.size == 1:
        return learner
    assert isinstance(learner, nn.Module)
    devices = [device] if device.type == "cuda" else None
    # The buffers are constants, which need not be sent at each step. PyTorch warns that this flag
    # will have another name, which its older releases do not know.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return DistributedDataParallel(
            learner, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def shard_model(model: LanguageModel, device: torch.device) -> None:
    """Leave each process its part of every weight, in place (FSDP2, arxiv.org/abs/2304.11277).

    A block's weights are gathered when it is computed, and let go again.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = DeviceMesh.from_group(distributed.group.WORLD, device.type)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "compute_next_logits")


@contextlib.contextmanager
def defer_gradient_sync(learner: Callable, is_last: bool) -> Iterator[None]:
    """Around a micro-batch: only after the last one does DDP share gradients.

    FSDP shares those of each, as it has no room for whole ones to wait in.
    """
    waits = isinstance(learner, DistributedDataParallel) and not is_last
    with learner.no_sync() if waits else contextlib.nullcontext():
        yield


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone."""
    return hasattr(tensor, "full_tensor")  # a DTensor: its class takes half a second to import


def to_local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, where it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


# A sharded tensor's own `full_tensor` is not used for its rows. What it sends is an
# "ALLGATHER_COALESCED", and in PyTorch 2.13 each of gloo's two threads writes the name of what it
# has done into the same string, without a lock. A name of more than 15 characters is memory of its
# own; where both are done at once both free it, and the process crashes, then or later. The names
# of what is sent here are short. docs/LOG.md has the whole story.


def gather_full_tensor(rows: Tensor, like: Tensor) -> Tensor:
    """The tensor of which each process gives its rows, sharded as `like` is, if it is."""
    if not is_sharded(like):
        return rows
    rows = _as_many_rows(rows, like)
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows)
    return torch.cat(parts)[: len(like)]


def gather_to_main(tensor: Tensor, world: World) -> Tensor | None:
    """The whole of a sharded tensor, on rank 0 and in its main memory; None elsewhere."""
    if not is_sharded(tensor):
        return tensor
    rows = _as_many_rows(to_local(tensor).detach(), tensor)
    parts = [torch.empty_like(rows) for _ in range(world.size)] if world.is_main else None
    distributed.gather(rows, parts)
    if parts is None:
        return None
    # A copy, so that no file has the zeros that were sent, too.
    return torch.cat(parts)[: len(tensor)].to("cpu", copy=True)


def _as_many_rows(rows: Tensor, like: Tensor) -> Tensor:
    """A process's rows of `like`, and as many zeros as make what all processes send equally large.

    FSDP deals the rows out in order: as many to each, until the last have fewer or none.
    """
    sent = rows.new_zeros(-(-len(like) // distributed.get_world_size()), *like.shape[1:])
    sent[: len(rows)] = rows
    return sent


def reduce_norm(norm: Tensor) -> Tensor:
    """The norm of all parts together, where each process knows its own's alone."""
    return norm.full_tensor() if is_sharded(norm) else norm


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is sharded, if it is; each process has the whole one."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
