"""Files: the checks that a user's path deserves, and writes that are whole or not there at all.

Whatever must survive a crash is written by the functions below and by nothing else, a call of the
operating system at a time: `tests/test_crash.py` stops a process at each one of them.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from utils.errors import UserError

_COPIED_AT_ONCE = 1 << 20  # bytes


def find_text_file_problem(path: Path) -> str | None:
    """What keeps `path` from being read as a text file, or None. Reads its first byte alone."""
    try:
        if path.is_dir():
            return "a directory, where a file is wanted"
        if path.exists() and not path.is_file():  # a pipe would wait for ever, or be used up
            return "a device or a pipe, where a file is wanted"
        with open(path, "rb") as file:
            return None if file.read(1) else "the file is empty"
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def read_file(path: Path) -> bytes:
    """The content of a text file. Raises `UserError` where it cannot be had, or is empty."""
    if problem := find_text_file_problem(path):
        raise UserError(f"{path}: {problem}")
    return path.read_bytes()


def decode_text(raw: bytes, name: str) -> str:
    """UTF-8, a byte order mark dropped, line ends as they are. Raises `UserError` for others."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}: not UTF-8 text (byte {raw[error.start]:#04x} in line {line}): "
            "convert it to UTF-8 first, for example with iconv"
        ) from None
    if not text:
        raise UserError(f"{name}: the file is empty")
    return text


def list_files(directory: str) -> Iterator[str]:
    """The names of all files in a directory and those in it, relative to it, in any order.

    Hidden ones are left out, and so is what is no file. Raises `OSError` where one can't be read.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(directory, folder)) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file():
                    yield name


def glob_files(directory: Path, pattern: str) -> list[Path]:
    """What is in a directory by names like `pattern`; nothing where the directory is not there."""
    try:
        return list(directory.glob(pattern))
    except FileNotFoundError:  # removed just after pathlib had seen it (Python 3.11)
        return []


def is_directory(path: Path) -> bool:
    """Whether a directory is there; False too for a path that no system takes."""
    return os.path.isdir(path)


def is_file(path: Path) -> bool:
    """Whether a file is there; False too for a path that no system takes."""
    return os.path.isfile(path)


def write_durable(path: Path, data: bytes) -> None:
    """Write a file, and return when it is on the disk. A crash may leave a part of it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one."""
    # Names of files may hold bytes that are no text; in JSON, the escape is read back as they were.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durable(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        remove_file(temporary)
        raise


def write_with(path: Path, write: Callable[[Path], None], like: Path) -> None:
    """Have a library write a file; give it the permissions of `like`, and see it on the disk.

    A library may keep a file to its owner alone; those that Python opens follow the umask.
    """
    write(path)
    os.chmod(path, like.stat().st_mode)
    sync(path)


def copy_durable(source: Path, target: Path) -> str:
    """Copy a file's content, and return its SHA-256 when it is on the disk."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while part := reader.read(_COPIED_AT_ONCE):
            digest.update(part)
            writer.write(part)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def spool(reader: IO[bytes], directory: Path) -> Path:
    """Copy what `reader` gives to a file named for its SHA-256, and return that.

    Raises `ValueError` where it gives nothing.
    """
    make_directory(directory)
    for left in glob_files(directory, ".*.tmp"):  # by a process that was killed
        if left.name.split(".")[1].isdigit() and not is_process_running(
            int(left.name.split(".")[1])
        ):
            remove_file(left)
    temporary, digest, size = directory / f".{os.getpid()}.tmp", hashlib.sha256(), 0
    try:
        with open(temporary, "wb") as writer:
            while part := reader.read(_COPIED_AT_ONCE):
                digest.update(part)
                size += len(part)
                writer.write(part)
            writer.flush()
            os.fsync(writer.fileno())
        if size == 0:
            raise ValueError("nothing to keep")
        target = directory / f"{digest.hexdigest()}.txt"
        if not target.exists():  # else what was made of it stays as new as it is
            os.replace(temporary, target)
            sync(directory)
    finally:
        remove_file(temporary)
    return target


def open_at(path: Path, size: int) -> IO[bytes]:
    """Open a file to write on after its first `size` bytes; what it had after them is dropped.

    Where that is all, it is another file: whoever has mapped the one that was there keeps it.
    """
    if size == 0:
        remove_file(path)
    file = open(path, "r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


def sync_file(file: IO[bytes]) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories, and keeps their names in order by itself
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename a file or directory, in the place of the file that may be there."""
    os.replace(source, target)


def move_if_exists(source: Path, target: Path) -> None:
    """Rename a file, in the place of the one that may be there; if it is gone, it has moved."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(source, target)


def make_directory(path: Path) -> None:
    """Make a directory and those it is in, if they are not there; their names are durable."""
    tries = 10
    while not path.is_dir():
        make_directory(path.parent)
        tries -= 1
        try:
            os.mkdir(path)
        except FileExistsError:  # another process was faster
            if not path.is_dir():
                raise
        except FileNotFoundError:  # it has just removed the empty directory above: once more
            if tries == 0:
                raise
            continue
        sync(path.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there and can be."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def remove_if_empty(path: Path) -> None:
    """Remove a directory, if it is there and nothing is in it."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def is_process_running(process: int) -> bool:
    """Whether a process of this number runs on this machine, as far as can be told."""
    if os.name == "nt":  # where asking by signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
