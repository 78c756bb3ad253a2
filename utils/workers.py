"""Which of the processes that share some work are alive, on this machine and on others.

Each holds the lock of a file of its own for as long as it lives. The lock is the operating
system's, and dies with the process; and as locks may not reach from machine to machine, the file's
time is renewed too.
"""

import contextlib
import os
import platform
import re
import threading
import time
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError, format_reason
from utils.files import make_directory, remove_file

RENEWED_EVERY = 20  # seconds
SILENT_FOR = 600  # seconds without a sign, after which another machine's worker is given up


class Worker:
    """Makes this process one of the workers whose files are in `directory`, within the block.

    Raises `UserError` where no file can be made and locked there.
    """

    def __init__(self, directory: Path):
        self.name = f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._path = directory / self.name
        self._lock = FileLock(self._path)
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Worker":
        try:
            make_directory(self._path.parent)
            self._lock.acquire(blocking=False)
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or format_reason(error)
            raise UserError(
                f"{self._path.parent} cannot hold the workers' locks: {reason}"
            ) from None
        self._renewal.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._renewal.join()
        self._lock.release()
        remove_file(self._path)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def is_alive(directory: Path, name: str) -> bool:
    """Whether the worker of that name lives. Clears away the file of one that does not."""
    path = directory / name
    try:
        silent_for = time.time() - path.stat().st_mtime
        lock = FileLock(path)
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except FileNotFoundError:  # it has ended as it should
        return False
    lock.release()
    if name.rsplit("-", 2)[0] != _host() and silent_for < SILENT_FOR:
        return True  # the locks of its machine may not be seen from here
    remove_file(path)
    return False


def _host() -> str:
    return re.sub(r"[^\w.]+", "-", platform.node()) or "localhost"
