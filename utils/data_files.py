"""The files that a `data` setting names, the checks on them, and their bytes, decompressed.

`data` is a file, a directory, a glob, or `-` for standard input.
"""

import codecs
import errno
import glob
import gzip
import io
import os
import shlex
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path

from platformdirs import user_cache_path

from utils import files
from utils.errors import UserError
from utils.files import is_directory, is_file, open_regular
from utils.output import format_bytes, pluralize

SAMPLE_CORPUS = "Shakespeare's plays"  # the text if `data` is null
STANDARD_INPUT = "-"
BLOCK_BYTES = 1 << 20  # read at once
SPACE_INTERVAL = 64 << 20  # bytes written between two checks of the free space
SPARE_BYTES = 128 << 20  # to leave free
_COMPRESSED = (".gz", ".zst")
_ENCODING_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Zstandard makes at most 128 KB of each four bytes: this bounds the memory for a hostile file.
_COMPRESSED_BYTES = 1 << 12


def get_cache_dir(cache_dir: str | None) -> Path:
    """Return the cache directory: `cache_dir`, or the user's own for None."""
    return Path(cache_dir) if cache_dir else user_cache_path("folio", appauthor=False)


def is_pattern(data: str) -> bool:
    """Return whether `data` is a glob, and not an existing file with a name like one."""
    return glob.has_magic(data) and not os.path.lexists(data)


def find_data_problem(data: str) -> str | None:
    """Return why `data` cannot be read as a text, or None. Reads one byte at most."""
    if data == STANDARD_INPUT:
        return "there is none" if sys.stdin is None else None
    if not is_directory(Path(data)) and not is_pattern(data):
        return files.find_text_file_problem(Path(data))
    try:
        has_text = any(path.stat().st_size for path in _iter_files(data, set()))
    except (OSError, ValueError) as error:  # ValueError: a null character in the pattern
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return None if has_text else "no file of this directory or pattern has text"


def find_files(data: str, on_progress: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Return the files of a text, sorted by path; hidden files of directories are skipped.

    A file that has several names, by links, is read once: its first name counts. `on_progress` is
    called with a line about the others, and about links to directories, which are not followed.

    Raises `UserError` if a directory cannot be read or a file's name is not text.
    """
    if not is_directory(Path(data)) and not is_pattern(data):
        return [Path(data)]
    try:
        links: set[Path] = set()
        paths = sorted(_iter_files(data, links), key=str)
    except OSError as error:
        raise UserError(f"{data}: cannot be read: {error.strerror}") from None
    if wrong := [name for name in map(str, paths) if not name.isprintable()]:
        raise UserError(f"{data}: a file name is not printable text: {wrong[0]!a}: rename it")
    stats = {path: get_stat(path) for path in paths}
    unique: dict[object, Path] = {}
    for path, stat in stats.items():
        key = (stat.st_dev, stat.st_ino) if stat.st_ino else path.resolve()
        unique.setdefault(key, path)
    if more := len(stats) - len(unique):
        on_progress(f"{data}: {pluralize(more, 'link')} to files that are read already: left out")
    if links:
        count = pluralize(len(links), "link")
        on_progress(f"{data}: {count} to directories not followed, such as {min(links)!s:.99}")
    return list(unique.values())


def _iter_files(data: str, links: set[Path]) -> Iterator[Path]:
    """Yield the files of a directory or a glob, in any order; see `_walk`."""
    if is_directory(Path(data)):
        for folder, names in _walk(data, links):
            shown = (name for name in names if not name.startswith("."))
            yield from filter(is_file, (Path(folder, name) for name in shown))
    else:
        yield from filter(is_file, map(Path, _iter_matches(data, links)))


def _walk(root: str, links: set[Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield each directory, but hidden ones, and its names; add links to directories to `links`."""
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links.update(filter(Path.is_symlink, (Path(folder, name) for name in folders)))
        yield folder, names


def _iter_matches(pattern: str, links: set[Path]) -> Iterator[str]:
    """Yield the paths that match a glob, as `glob.iglob` does, but let `**` follow no links."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)  # noqa: PTH207 (pathlib's finds hidden files too)
        return
    index = parts.index("**")
    start, rest = (str(Path(*each)) for each in (parts[:index], parts[index + 1 :] or ("*",)))
    for root in filter(is_directory, _iter_matches(start, links)):
        for folder, _ in _walk(root, links):
            yield from _iter_matches(str(Path(glob.escape(folder), rest)), links)


def _raise(error: OSError) -> None:
    raise error


def find_overlap_problem(
    data: str, paths: Sequence[Path], written: Iterable[tuple[str, Path]]
) -> str | None:
    """Return why files that Folio writes would be read as part of the text, or None.

    `paths` are the files of `data` now; `written` has settings and the directories they name.
    """
    root = Path(data).resolve() if is_directory(Path(data)) else None
    matches = [path.resolve() for path in paths] if is_pattern(data) else []
    for setting, directory in written:
        place = directory.resolve()
        if root is not None and place.is_relative_to(root):
            is_read = not any(name.startswith(".") for name in place.relative_to(root).parts)
        else:
            is_read = any(place in path.parents for path in matches)
        if is_read:
            return (
                f"{setting} {directory} is inside it, so files that Folio writes would be read as "
                f"text: name the text files only, or choose another {setting}"
            )
    return None


def resolve_data_path(data: str) -> str:
    """Return `data` as an absolute path or glob, as a run records it; `-` is unchanged."""
    if data == STANDARD_INPUT:
        return data
    if is_pattern(data):
        return str(Path(glob.escape(str(Path.cwd())), data))
    return str(Path(data).resolve())


def keep_standard_input(cache: Path) -> Path:
    """Copy standard input to a file of the cache, named for its SHA-256, and return the path.

    Raises `UserError` if it is empty or the cache cannot be written.
    """
    directory = cache / "stdin"
    temporary = directory / f".{os.getpid()}.tmp"
    try:
        files.make_directory(directory)
        for path in files.glob_files(directory, ".*.tmp"):
            process = path.name.split(".")[1]
            if process.isdigit() and not files.is_process_running(int(process)):  # it was killed
                files.remove_file(path)
        kept = directory / f"{files.copy_durable(_SpaceReader(temporary), temporary)}.txt"
        if temporary.stat().st_size == 0:
            raise UserError("standard input: it is empty")
        if not kept.exists():  # else keep its time: caches made from it stay valid
            files.move(temporary, kept)
            files.sync(directory)
    except OSError as error:
        raise UserError(
            f"standard input cannot be written to {cache}: {error.strerror}; "
            "name another directory with --cache-dir"
        ) from None
    finally:
        files.remove_file(temporary)
    return kept


class _SpaceReader(io.RawIOBase):
    """Standard input, to be copied to a file; reading fails before the file's disk is full."""

    def __init__(self, target: Path):
        self._target, self._size = target, 0

    def read(self, size: int = -1) -> bytes:
        content = sys.stdin.buffer.read(size)
        if self._size // SPACE_INTERVAL < (self._size + len(content)) // SPACE_INTERVAL:
            check_space(self._target)
        self._size += len(content)
        return content


def check_space(path: Path, size: int = 0) -> None:
    """Raise `OSError` if the disk of a new file has no space for `size` bytes and some to spare."""
    free = shutil.disk_usage(path.parent).free
    if free < size + SPARE_BYTES:
        wanted = f"{format_bytes(size)} are needed, " if size else ""
        raise OSError(errno.ENOSPC, f"{wanted}{format_bytes(free)} are free", str(path))


def guess_encoding(start: bytes) -> str | None:
    """Return iconv's name for the encoding of a text that begins with `start`; None for UTF-8.

    Without a byte order mark, UTF-16 and UTF-32 have NUL bytes at one place of each character.
    """
    for mark, encoding in _ENCODING_MARKS.items():
        if start.startswith(mark):
            return encoding
    count = len(start) // 4
    nulls = [start[place::4].count(0) for place in range(4)]
    for order, places in (("LE", nulls), ("BE", nulls[::-1])):
        if count > 1 and min(places[3], places[2] * 1.1) >= count > 2 * places[0]:
            return f"UTF-32{order}"
        many, few = places[1] + places[3], places[0] + places[2]
        if many > 1 and many * 25 >= len(start) and few * 20 <= many:
            return f"UTF-16{order}"
    return None


def format_conversion(path: Path, encoding: str) -> str:
    """Return the shell command that converts a text to UTF-8."""
    source, target = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(".utf8.txt")))
    convert, suffix = f"iconv -f {encoding} -t UTF-8", path.suffix.lower()
    if suffix in _COMPRESSED:
        return f"{'gzip' if suffix == '.gz' else 'zstd'} -dc {source} | {convert} > {target}"
    return f"{convert} {source} > {target}"


def has_bytes(paths: Sequence[Path], limit: int) -> bool:
    """Return whether the files have `limit` bytes or more, decompressed.

    Raises `UserError` if a file cannot be read.
    """
    sizes = chain.from_iterable(
        map(len, iter_blocks(path))
        if path.suffix.lower() in _COMPRESSED
        else [get_stat(path).st_size]
        for path in paths
    )
    return any(total >= limit for total in accumulate(sizes))


def get_stat(path: Path) -> os.stat_result:
    """Return the size and times of a file. Raises `UserError` if they cannot be read."""
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def iter_blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed, at most `size` at once; no block is empty.

    Raises `UserError` if the file cannot be read or is damaged.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            for piece in _decompress_zstandard(path):
                yield from (piece[i : i + size] for i in range(0, len(piece), size))
        else:
            with open_regular(path) as raw:
                is_gzip = suffix == ".gz"
                file = gzip.GzipFile(fileobj=io.BufferedReader(raw)) if is_gzip else raw
                yield from iter(lambda: file.read(size) or b"", b"")  # None: it would block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: incomplete or damaged {suffix} file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decompress_zstandard(path: Path) -> Iterator[bytes]:
    # The library's own `stream_reader` does not report a file that ends within a frame.
    import zstandard  # here, as few texts need it

    frame = None
    try:
        with open_regular(path) as file:
            while data := file.read(_COMPRESSED_BYTES):
                while data:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data  # empty within a frame
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        is_wide = "too much memory" in str(error)
        hint = ", more than 128 MB of it: compress it again without --long" if is_wide else ""
        raise EOFError(f"{error}{hint}") from None
    if frame is not None:
        raise EOFError("it ends within a frame")
