"""Pickles that strangers wrote, which are checked before they are read: no code of theirs runs.

A pickle is a program: it can call any function, and claim any size. `pickletools` lists its
instructions without executing them, so that those which are not needed are refused.
"""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import IO, Any

from utils.files import open_regular

MAX_PICKLE_BYTES = 1 << 26
MAX_TUPLE = 1000  # values in a tuple and in those within it: its hash visits them all
# The instructions for text, numbers, lists and dictionaries; none calls a function.
_NAMES = """
    PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET BINUNICODE SHORT_BINUNICODE
    BININT BININT1 BININT2 BINFLOAT NONE NEWTRUE NEWFALSE EMPTY_DICT SETITEM SETITEMS EMPTY_LIST
    APPEND APPENDS
"""
PLAIN_VALUES = frozenset(_NAMES.split())
TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
# torch.save needs these, for tensors and the dictionary that is a state dict, and LONG1 for
# numbers of more than 32 bits.
TENSORS = PLAIN_VALUES | TUPLES | {"GLOBAL", "REDUCE", "BINPERSID", "BUILD", "LONG1"}
STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
TENSOR_GLOBALS = frozenset(
    ["torch._utils _rebuild_tensor_v2", "collections OrderedDict"]
    + [f"torch {name}Storage" for name in STORAGES]
)


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that finds no function and no class."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module}.{name}")


def load_plain_pickle(content: bytes) -> Any:
    """Return the text, numbers, lists and dictionaries of a pickle.

    Raises ValueError if there is anything else in it.
    """
    check_instructions(content, PLAIN_VALUES)
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a stack that is empty, a list as a key
        raise ValueError(str(error)) from None


def check_instructions(
    content: bytes, allowed: Set[str], allowed_globals: Set[str] = frozenset()
) -> None:
    """Raise ValueError if a pickle has an instruction, or names a global, that is not allowed.

    Nor may a tuple be large: as the key of a dictionary, a tuple of tuples could take years to
    hash, or overflow the stack.
    """
    sizes: list[int] = []  # of the values on the stack: 1 if it is no tuple
    marks: list[int] = []
    memo: dict[int, int] = {}
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name == "GLOBAL" and argument not in allowed_globals:
            raise ValueError(f"it names {argument.replace(' ', '.')}")
        if instruction.name not in allowed:
            raise ValueError(f"it has the pickle instruction {instruction.name}")
        # The unpickler's table of values grows to this index.
        if instruction.name.endswith("BINPUT") and argument > len(content):
            raise ValueError("it claims more values than it has bytes")
        try:
            _track_sizes(instruction, argument, sizes, marks, memo)
        except LookupError:
            raise ValueError("it takes a value that is not there") from None


def _track_sizes(
    instruction: pickletools.OpcodeInfo,
    argument: Any,
    sizes: list[int],
    marks: list[int],
    memo: dict[int, int],
) -> None:
    """Apply an instruction to the sizes of the values on the stack and in the memo."""
    name, before = instruction.name, instruction.stack_before
    if name == "MARK":
        marks.append(len(sizes))
    elif name == "MEMOIZE":
        memo[len(memo)] = sizes[-1]
    elif name.endswith("BINPUT"):
        memo[argument] = sizes[-1]
    elif name.endswith("BINGET"):
        sizes.append(memo[argument])
    else:
        has_mark = pickletools.markobject in before
        start = marks.pop() if has_mark else len(sizes) - len(before)
        taken = sizes[start:]
        del sizes[start - (before.index(pickletools.markobject) if has_mark else 0) :]
        size = 1 + sum(taken) if name in TUPLES else 1
        if size > MAX_TUPLE:
            raise ValueError(f"it has a tuple of more than {MAX_TUPLE:,} values")
        sizes.extend(size for _ in instruction.stack_after)


def check_archive(file: IO[bytes], size: int) -> zipfile.ZipFile:
    """Return the zip archive that torch.save wrote, in a file of `size` bytes.

    PyTorch compresses nothing: a small file may not unpack to gigabytes, neither by compression
    nor by entries that share their bytes.

    Raises ValueError, or zipfile.BadZipFile if it is no archive.
    """
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not is_stored or sum(entry.file_size for entry in entries) > size:
        raise ValueError("it is compressed, or its entries overlap")
    return archive


def load_tensors(path: Path) -> Any:
    """Return the content of a file of torch.save: tensors on the CPU, and plain values.

    The tensors are memory-mapped: those that are not used are not read.

    Raises ValueError if it is another kind of file, or has anything else in it.
    """
    import torch  # late: other commands import this module without it

    try:
        with open_regular(path) as file:
            archive = check_archive(file, path.stat().st_size)
            names = [entry.filename.lower() for entry in archive.infolist()]
            if len(set(names)) < len(names):  # PyTorch and zipfile could choose different ones
                raise ValueError("two of its entries have the same name")
            for entry in archive.infolist():
                if entry.filename.lower().endswith("data.pkl"):
                    if entry.file_size > MAX_PICKLE_BYTES:
                        raise ValueError("its pickle is larger than any of a state dict")
                    check_instructions(archive.read(entry), TENSORS, TENSOR_GLOBALS)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile:
        raise ValueError(
            "it is no zip archive: not a checkpoint, truncated, or written by PyTorch before 1.6"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a forged file may raise anything
        raise ValueError(str(error).strip().split("\n")[0] or type(error).__name__) from None
