"""Importing large libraries sooner."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Import within the block without looking for garbage meanwhile.

    What an import creates stays until the process ends. Looking for garbage in it, again and again
    while it grows, takes a fifth of the time of importing torch. Nor is it searched later, if the
    block has imported anything: a later call must not keep garbage alive for nothing.
    """
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
