"""Importing large libraries sooner."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Do not look for garbage within the block, and never among the objects that it leaves.

    What an import creates stays until the process ends. Looking for garbage in it, again and again
    while it grows, takes a fifth of the time of importing torch.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
