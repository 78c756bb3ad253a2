"""Train in a process group of a single rank, which Folio otherwise skips: NCCL, DDP, FSDP2.

torchrun --standalone --nproc-per-node=1 tests/gpu/one_rank.py --parallel=fsdp FLAGS OF TRAIN.PY
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import distributed

import distributed as distribution
import train
import trainer
from utils.output import run_command


class Several(int):
    """The number 1, which claims to be more than 1, so that every collective is called."""

    def __eq__(self, other: object) -> bool:
        return other is self

    def __gt__(self, other: int) -> bool:
        return other == 1 or int(self) > other

    __hash__ = int.__hash__


class SingleRank(distribution.Ranks):
    """The ranks of torchrun's environment, with a size that is `Several`."""

    @classmethod
    def from_environment(cls) -> distribution.Ranks:
        return distribution.Ranks(0, 0, Several(1), 1)


def run(argv: list[str]) -> int:
    """Run train.py, and print the backends of its process group."""
    destroy = distributed.destroy_process_group

    def destroy_process_group() -> None:
        print("backends:", distributed.get_backend_config(), flush=True)
        destroy()

    distributed.destroy_process_group = destroy_process_group
    distribution.Ranks = trainer.Ranks = SingleRank
    return run_command(train.main, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
