"""Garbage collection, paused while a program creates millions of objects that stay."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Import a large library, or compile, without garbage collection within the block.

    What an import creates stays until the process ends. To search it for garbage, again and again
    while it grows, takes a fifth of the time of importing torch.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Everything now belongs to the oldest generation, which is searched last: else the first
        # collection after the block would search all of it, which takes 0.3 s.
        gc.freeze()
        gc.unfreeze()
        if was_enabled:
            gc.enable()
