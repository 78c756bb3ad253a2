"""Which files a `data` setting names, and their text, a part at a time.

A text is a file, all files of a directory, the files that a glob matches, or standard input, which
is kept as a file first. Several files are one text: each follows the one before, in the order of
their paths, without its byte order mark. What ends in .gz or .zst is decompressed while it is
read. However long a text is, only a part of it is ever in memory.
"""

import codecs
import glob
import gzip
import hashlib
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from platformdirs import user_cache_path

from utils.errors import UserError
from utils.files import find_text_file_problem, is_directory, list_files, spool

STANDARD_INPUT = "-"
PART = 1 << 20  # bytes read at once
# Zstandard makes at most 128 KB of each four bytes: this bounds what a hostile file can ask for.
_COMPRESSED_PART = 1 << 12
_WORD_ENDS = re.compile(r"(?<=\S)[ \n]")


@dataclass(frozen=True)
class Chunk:
    """Some of a text, and its bytes in UTF-8.

    It ends `end` bytes into what file number `file` holds, decompressed.
    """

    file: int
    end: int
    size: int
    text: str


def get_cache_dir(cache_dir: str | None) -> Path:
    """The directory that a `cache_dir` setting means."""
    return Path(cache_dir) if cache_dir else user_cache_path("folio", appauthor=False)


# ----------------------------------------------------------------------------------------------
# Which files


def find_data_problem(data: str) -> str | None:
    """What keeps `data` from being read as a text, or None. Reads one byte at most."""
    if data == STANDARD_INPUT:
        return "there is none" if sys.stdin is None else None
    if not is_directory(Path(data)) and not is_pattern(data):
        return find_text_file_problem(Path(data))
    try:
        has_text = any(path.stat().st_size for path in _found(data))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if has_text:
        return None
    is_there = "a directory, in which" if is_directory(Path(data)) else "a pattern, for which"
    return f"{is_there} no file with text is found"


def find_files(data: str) -> list[Path]:
    """The files that make up a text, in their order; hidden ones are not among those found.

    Raises `UserError` for a directory that cannot be read, or a name that is no text.
    """
    if not is_directory(Path(data)) and not is_pattern(data):
        return [Path(data)]
    try:
        files = sorted(_found(data), key=str)
    except OSError as error:
        raise UserError(f"{data}: cannot be read: {error.strerror}") from None
    if wrong := [name for name in map(str, files) if not name.isprintable()]:
        raise UserError(f"{data}: a file's name is no text: {wrong[0]!a}: rename it")
    return files


def _found(data: str) -> Iterator[Path]:
    """The files of a directory or a pattern, in any order."""
    if is_directory(Path(data)):
        yield from (Path(data, name) for name in list_files(data))
    else:
        names = glob.iglob(data, recursive=True)  # noqa: PTH207 (pathlib's finds hidden files too)
        yield from (path for path in map(Path, names) if path.is_file())


def find_overlap_problem(
    data: str, files: Sequence[Path], written: Iterable[tuple[str, Path]]
) -> str | None:
    """What is wrong with a text among whose files are, or will be, such as Folio writes; or None.

    Args:
        data: what names the text.
        files: its files.
        written: settings, and directories below which each has something written.
    """
    root = Path(data).resolve() if is_directory(Path(data)) else None
    found = [str(path.resolve()) for path in files] if is_pattern(data) else []
    for setting, directory in written:
        place = directory.resolve()
        if root is not None and place.is_relative_to(root):
            is_read = not any(name.startswith(".") for name in place.relative_to(root).parts)
        else:
            is_read = any(name.startswith(f"{place}{os.sep}") for name in found)
        if is_read:
            return (
                f"{setting} {directory} lies in it, and what Folio writes would be read as text: "
                f"name the texts alone, or another {setting}"
            )
    return None


def is_pattern(data: str) -> bool:
    """Whether `data` is a glob, and not the name of a file that happens to look like one."""
    return glob.has_magic(data) and not os.path.lexists(data)


def resolve_data_path(data: str) -> str:
    """`data` as it can be found from any directory: what a run records."""
    if data == STANDARD_INPUT:
        return data
    if is_pattern(data):
        return data if Path(data).is_absolute() else str(Path(glob.escape(str(Path.cwd())), data))
    return str(Path(data).resolve())


def keep_standard_input(cache: Path) -> Path:
    """Write standard input to a file of the cache that is named for its SHA-256, and return that.

    Raises `UserError` where it is empty, or the cache cannot be written.
    """
    try:
        return spool(sys.stdin.buffer, cache / "stdin")
    except OSError as error:
        raise UserError(
            f"standard input cannot be kept in {cache}: {error.strerror}; "
            "name another place with --cache-dir"
        ) from None
    except ValueError:
        raise UserError("standard input: there is no text in it") from None


# ----------------------------------------------------------------------------------------------
# Their text


def iter_chunks(
    files: Sequence[Path],
    *,
    size: int = PART,
    whole_words: bool = False,
    start: tuple[int, int] = (0, 0),
    hear: Callable[[int, bytes], None] | None = None,
) -> Iterator[Chunk]:
    """The text of the files, in parts of about `size` bytes; no part has text of two files.

    Args:
        files: the files, in their order.
        size: how many bytes to read at once.
        whole_words: end a part only before the space or line end that follows a word, where no
            token of GPT-2's is cut in two.
        start: the number of a file and bytes in it, decompressed, as a part's `file` and `end`.
        hear: is given a file's number and all its bytes, decompressed, those before `start` too:
            with each part the bytes up to its end, and at the file's end none.

    Raises:
        UserError: a file that cannot be read, is damaged, or is not UTF-8.
    """
    hear = hear or (lambda number, block: None)
    for number, path in enumerate(files):
        blocks = _blocks(path, size)
        skip = start[1] if number == start[0] else 0
        if number < start[0]:
            for block in blocks:
                hear(number, block)
        else:
            yield from _parts_of(path, number, blocks, whole_words, skip, hear)
        hear(number, b"")


def _parts_of(
    path: Path,
    number: int,
    blocks: Iterator[bytes],
    whole_words: bool,
    skip: int,
    hear: Callable[[int, bytes], None],
) -> Iterator[Chunk]:
    read, unheard, pending, rest = 0, b"", b"", ""  # pending: of a character, rest: of a word
    begin, is_first, is_last = skip, skip == 0, False
    while read < skip and (block := next(blocks, b"")):
        hear(number, block[: skip - read])
        if skip < read + len(block):
            blocks = chain([block[skip - read :]], blocks)
        read = min(skip, read + len(block))
    while not is_last:
        block = next(blocks, b"")
        is_last = not block
        unheard += block
        raw = unheard[len(unheard) - len(pending) - len(block) :]
        try:
            text, used = codecs.utf_8_decode(raw, "strict", is_last)
        except UnicodeDecodeError as error:
            line = _line_of(path, read - len(pending) + error.start)
            raise UserError(
                f"{path}: not UTF-8 text (byte {raw[error.start]:#04x} in line {line}): "
                "convert it to UTF-8 first, for example with iconv"
            ) from None
        read, pending = read + len(block), raw[used:]
        if is_first and text:
            is_first = False
            if text[0] == "\ufeff":
                text, begin = text[1:], len(codecs.BOM_UTF8)
        text = rest + text
        cut = _last_word_end(text) if whole_words and not is_last else len(text)
        text, rest = text[:cut], text[cut:]
        if text:
            end = read - len(pending) - len(rest.encode("utf-8"))
            upto = len(unheard) - (read - end)
            hear(number, unheard[:upto])
            unheard = unheard[upto:]
            yield Chunk(number, end, end - begin, text)
            begin = end
    if unheard:  # a byte order mark and no more
        hear(number, unheard)


def _last_word_end(text: str) -> int:
    """Where the last space or line end that follows a word stands; 0 where there is none.

    GPT-2's pattern lets no piece go on from what is no white space to what is: a cut there leaves
    the pieces on either side as they are.
    """
    width = 1 << 8
    while True:
        start = max(0, len(text) - width)
        found = [match.start() for match in _WORD_ENDS.finditer(text, start)]
        if found or start == 0:
            return found[-1] if found else 0
        width <<= 4


def _line_of(path: Path, position: int) -> int:
    lines = 1
    for block in _blocks(path, PART):
        lines += block.count(b"\n", 0, position)
        position -= len(block)
        if position <= 0:
            break
    return lines


def is_large(files: Sequence[Path], limit: int) -> bool:
    """Whether the files hold `limit` bytes of text or more. Of compressed ones, as many are read.

    Raises `UserError` for a compressed file that is damaged.
    """
    total = 0
    for path in files:
        if is_compressed(path):
            for block in _blocks(path, PART):
                total += len(block)
                if total >= limit:
                    break
        else:
            total += path.stat().st_size
        if total >= limit:
            return True
    return False


def is_compressed(path: Path) -> bool:
    """Whether a file is decompressed when it is read, as its name says."""
    return path.suffix.lower() in (".gz", ".zst")


def compute_file_sha256(path: Path) -> str:
    """The SHA-256 of a file as it lies there."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    """The bytes of a file, decompressed, about `size` at a time; none is empty."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as file:
                yield from iter(lambda: file.read(size), b"")
        elif path.suffix.lower() == ".zst":
            yield from _grouped(_decompressed(path), size)
        else:
            with open(path, "rb", buffering=0) as file:
                yield from iter(lambda: file.read(size), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole {path.suffix} file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _grouped(blocks: Iterator[bytes], size: int) -> Iterator[bytes]:
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def _decompressed(path: Path) -> Iterator[bytes]:
    """What a .zst file holds, frame after frame, in pieces of any size."""
    import zstandard  # here, as few texts need it

    decompressor, frame = zstandard.ZstdDecompressor(), None
    try:
        with open(path, "rb") as file:
            while data := file.read(_COMPRESSED_PART):
                while data:
                    frame = frame or decompressor.decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("it ends within a frame")
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise UserError(
                f"{path}: reading it takes more than 128 MB of memory, as it was compressed with "
                "--long=28 or more: compress it again without"
            ) from None
        raise UserError(f"{path}: not a whole .zst file: {error}") from None
