"""Files: the checks that a user's path deserves, and writes that are whole or not there at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def text_file_problem(path: Path) -> str | None:
    """What keeps `path` from being read as a text file, or None. Reads its first byte alone."""
    try:
        with open(path, "rb") as file:
            return None if file.read(1) else "the file is empty"
    except FileNotFoundError:
        return "no such file"
    except IsADirectoryError:
        return "a directory, where a file is wanted"
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def directory_written_whole(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; when the block ends it takes the place of `directory`.

    Where the block raises, `directory` is as it was.
    """
    building = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    retired = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        if directory.exists():
            directory.rename(retired)
        building.rename(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)
