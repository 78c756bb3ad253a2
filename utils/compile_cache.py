"""Cache the code that numba compiles, for other checkouts and for other users of this one.

numba's own cache is keyed by the path of the source file, and each clone would compile anew. This
one is keyed by the content of the file, the processor and the versions: one ZIP file in the user's
cache directory, and the same beside the source, as Python's bytecode: the first user of a
shared checkout compiles for the others.
"""

import contextlib
import hashlib
import io
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from platformdirs import user_cache_path

from utils.files import is_own_directory, read_regular, write_atomic
from utils.garbage import pause_garbage_collection

MAX_BYTES = 1 << 26


class CompileCache:
    """Compiles one function, or loads what was compiled before.

    Args:
        function: the function in Python, all of whose callees are in the same file.
        options: those of `numba.njit`.
        variant: names the types of its arguments.
    """

    def __init__(self, function: Callable, options: dict[str, Any], variant: str):
        self._function, self._options = function, options
        source = Path(function.__code__.co_filename)
        processor = (
            llvmlite.binding.get_host_cpu_name(),
            llvmlite.binding.get_host_cpu_features().flatten(),
        )
        key = (source.read_bytes(), sys.version, numba.__version__, *processor)
        digest = hashlib.sha256(repr(key).encode("utf-8")).hexdigest()[:16]
        name = f"{source.stem}-{variant}-{digest}.zip"
        self._in_user_cache = user_cache_path("folio", appauthor=False) / "compiled" / name
        self._beside_source = source.parent / "__pycache__" / name
        self._files = self._read()

    @property
    def is_compiled(self) -> bool:
        """Whether it has been compiled before, so that `get` takes a fraction of a second."""
        return self._files is not None

    @property
    def is_writable(self) -> bool:
        """Whether the result of a compilation can be cached."""
        paths = (self._in_user_cache, self._beside_source)
        return any(_can_write_in(path.parent) for path in paths)

    def get(self, call: Callable[[Callable], object]) -> Callable:
        """Return the compiled function. `call(function)` calls it once, which compiles it."""
        dispatcher = numba.njit(**self._options)(self._function)
        try:
            with pause_garbage_collection(), tempfile.TemporaryDirectory(prefix="folio-") as place:
                _enable_caching(dispatcher, place)
                [directory] = Path(place).iterdir()
                for name, content in (self._files or {}).items():
                    (directory / name).write_bytes(content)
                call(dispatcher)
                if not dispatcher.stats.cache_hits:
                    self._write({path.name: path.read_bytes() for path in directory.iterdir()})
        except Exception:  # no directory for temporary files, a full disk, files that are no cache
            dispatcher = numba.njit(**self._options)(self._function)
            call(dispatcher)
        dispatcher.disable_compile()  # other types are a mistake, which would cost seconds each
        return dispatcher

    def _read(self) -> dict[str, bytes] | None:
        """Return numba's files by name, or None if there are none or they are damaged."""
        # Machine code that another user could have written is not run. A file beside the source is
        # trusted as the source is.
        if is_own_directory(self._in_user_cache.parent):
            if found := _unpack(self._in_user_cache):
                return found
        return _unpack(self._beside_source)

    def _write(self, contents: dict[str, bytes]) -> None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in contents.items():
                file.writestr(name, content)
        for path in (self._in_user_cache, self._beside_source):
            with contextlib.suppress(OSError):  # read-only or full: the other may be writable
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, archive.getvalue())


def _unpack(path: Path) -> dict[str, bytes] | None:
    """Return the files in a ZIP file, whose checksums are verified; None if it is not whole."""
    with contextlib.suppress(Exception):  # missing; or damaged, which may raise anything
        with zipfile.ZipFile(io.BytesIO(read_regular(path, MAX_BYTES))) as archive:
            if sum(entry.file_size for entry in archive.infolist()) <= MAX_BYTES:
                names = archive.namelist()
                return {Path(name).name: archive.read(name) for name in names} or None
    return None


def _can_write_in(directory: Path) -> bool:
    """Return whether a file can be created in a directory, or in its nearest parent that exists."""
    with contextlib.suppress(OSError):  # a parent may be another user's
        while not directory.exists() and directory != directory.parent:
            directory = directory.parent
        tempfile.TemporaryFile(dir=directory).close()
        return True
    return False


def _enable_caching(dispatcher: Callable, place: str) -> None:
    """Let a dispatcher cache its files in a new directory in `place`."""
    before = numba.config.CACHE_DIR  # NUMBA_CACHE_DIR in numba's manual
    numba.config.CACHE_DIR = place
    try:
        dispatcher.enable_caching()
    finally:
        numba.config.CACHE_DIR = before
