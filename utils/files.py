"""Checks of a user's paths, and writes that a crash leaves whole or undone.

Everything that must survive a crash is written by the functions below, one system call at a time:
`tests/test_crash.py` stops a process at each of them.
"""

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

# They return False also for an invalid path and without permission, where pathlib's raise.
is_directory = os.path.isdir
is_file = os.path.isfile
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DIRECTORY = "a directory, where a file is wanted"
DEVICE = "a device or a pipe, where a file is wanted"


def is_present(path: Path) -> bool:
    """Return whether there is anything of this name, or it is unknown for lack of permission."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # reading it will raise the reason
    return True


def find_text_file_problem(path: Path) -> str | None:
    """Return why `path` cannot be read as a text file, or None. Opens it, but reads nothing."""
    try:
        with open_regular(path) as file:  # the kernel's files, which may block, have no size
            return None if os.fstat(file.fileno()).st_size else "the file is empty"
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        return reason if reason in (DIRECTORY, DEVICE) else f"cannot be read: {reason}"


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file to read its bytes, unbuffered.

    Raises `OSError` for anything else. A pipe or a device could block, have no end or be used up.
    """

    def check(mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, DIRECTORY if stat.S_ISDIR(mode) else DEVICE, str(path))

    check(os.stat(path).st_mode)  # opening a device may have an effect
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb", buffering=0)
    try:
        check(os.fstat(file.fileno()).st_mode)  # it may have been replaced meanwhile
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, limit: int = -1) -> bytes:
    """Read a regular file, at most `limit` bytes. Raises `OSError` for anything else."""
    with open_regular(path) as file:
        return io.BufferedReader(file).read(limit) or b""


def is_real_directory(path: Path) -> bool:
    """Return whether `path` is a directory, and not a link to one."""
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISDIR(os.lstat(path).st_mode)
    return False


def is_own_directory(path: Path) -> bool:
    """Return whether `path` is a directory of this user, and not a link to one."""
    get_user = getattr(os, "geteuid", None)  # Windows has none
    return is_real_directory(path) and (get_user is None or os.lstat(path).st_uid == get_user())


def glob_files(directory: Path, pattern: str) -> list[Path]:
    """Return the paths in a directory that match `pattern`; none if it cannot be read."""
    try:
        return list(directory.glob(pattern))
    except OSError:  # removed just after pathlib had seen it (Python 3.11), or another user's
        return []


def find_only_file(place: Path, pattern: str) -> Path:
    """Return a file itself, or the only one in a directory that matches `pattern`.

    Raises `OSError` if there is none, or several, or if it is not a regular file.
    """
    paths = glob_files(place, pattern) if is_directory(place) else [place]
    if len(paths) != 1:
        reason = f"{len(paths)} files {pattern}, where one is wanted"
        raise OSError(errno.ENOENT, reason, str(place))
    open_regular(paths[0]).close()
    return paths[0]


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durable(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk. A crash may leave a part of it."""
    with open(path, "wb") as file:
        file.write(data)
        sync_file(file)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one."""
    # Names of files may have bytes that are no text; JSON reads the escapes back as these bytes.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"  # `.` has no name to replace
    try:
        write_durable(temporary, data)
        os.replace(temporary, path)
    finally:
        remove_file(temporary)


def write_with(path: Path, write: Callable[[Path], None], like: Path) -> None:
    """Let a library write a file as durably, with the permissions of `like`, not its own."""
    write(path)
    os.chmod(path, like.stat().st_mode)
    sync(path)


def copy_durable(reader: IO[bytes], target: Path) -> str:
    """Copy a stream to a file, wait until it is on the disk, and return its SHA-256."""
    digest = hashlib.sha256()
    with open(target, "wb") as writer:
        while chunk := reader.read(1 << 20):
            digest.update(chunk)
            writer.write(chunk)
        sync_file(writer)
    return digest.hexdigest()


def sync_file(file: IO[bytes]) -> None:
    """Wait until the content of an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories, and orders changes of names itself
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path, *, missing_ok: bool = False) -> None:
    """Rename a file or directory, replacing an existing file."""
    with contextlib.suppress(*[FileNotFoundError] if missing_ok else []):
        os.replace(source, target)


def make_directory(path: Path) -> None:
    """Create a directory and its parents if they do not exist; their names are durable."""
    tries = 10
    while not path.is_dir():
        make_directory(path.parent)
        tries -= 1
        try:
            os.mkdir(path)
        except FileExistsError:  # another process was faster
            if not path.is_dir():
                raise
        except FileNotFoundError:  # another process has just removed the empty parent: retry
            if tries == 0:
                raise
            continue
        sync(path.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if it exists and can be removed."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def remove_if_empty(path: Path) -> None:
    """Remove a directory, if it exists and is empty."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def is_process_running(process: int) -> bool:
    """Return whether a process of this id runs on this machine; True if that is not known."""
    if os.name == "nt":  # os.kill(process, 0) would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
