"""The rank of this process among those that torchrun started."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Rank and world size over all machines, and on this one; a single process by default."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read the environment variables that torchrun sets."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        if not all(os.environ.get(name, "").isdecimal() for name in names):
            return cls()
        return cls(*(int(os.environ[name]) for name in names))
