"""Files: the checks that a user's path deserves, and writes that are whole or not there at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def text_file_problem(path: Path) -> str | None:
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


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one."""
    # Names of files may hold bytes that are no text; in JSON, the escape is read back as they were.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
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

    Files that others put into `directory` stay in it. Where anything raises, `directory` is as it
    was. (Killed between its two renames, it stands beside itself as `.<name>.<process>.old`.)
    """
    building = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    retired = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        if directory.exists():
            _copy_missing(directory, building)
            directory.rename(retired)
        building.rename(directory)
    except BaseException:
        if retired.exists() and not directory.exists():
            retired.rename(directory)
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _copy_missing(source: Path, target: Path) -> None:
    """Copy what is in `source` and not in `target`; links stay links."""
    for path in source.iterdir():
        if not (target / path.name).exists():
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, target / path.name, symlinks=True)
            else:
                shutil.copy2(path, target / path.name, follow_symlinks=False)


def make_durable(path: Path, like: Path) -> None:
    """Give a file that a library wrote the permissions of `like`, and see it on the disk."""
    path.chmod(like.stat().st_mode)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
