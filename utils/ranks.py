"""Which of several processes this one is, as torchrun tells it."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """The place of a process among those that torchrun has started; alone, the first of one.

    `rank` counts them on all machines, `local_rank` those on this one.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As the environment says, whose names torchrun has made a custom."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        if not all(os.environ.get(name, "").isdecimal() for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))


ALONE = Ranks()
