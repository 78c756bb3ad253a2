"""A text as token ids: in memory, or, where it is large, in files that are mapped into it.

`open_corpus` opens what a `data` setting names. A small text is encoded in memory, anew in each run.
A large one has a directory in the cache:

    manifest.json                  its files (size, mtime, SHA-256), its characters, its encodings
    <text>-<tokenizer>/            an encoding, by the digests of the text, with where its files
                                   end, and of the tokenizer
        shard_00000.bin …          ids, little-endian, in the smallest type that holds them
        marks.bin                  rows of int64: after so many tokens, so many bytes of that file
        progress.json              how far an encoding has come that is not in the manifest yet

The text is read twice: once for its characters and its SHA-256, once for its ids. An encoding is
there when the manifest names it, which is replaced in one piece, and only if the second reading
had the SHA-256 of the first. Until then what was encoded is noted every 64 MB, with the SHA-256 of
the text so far; whoever comes next reads that again, and if it is the same goes on from there.
Where splits are cut is no part of a store: it is arithmetic on the number of tokens. Nothing here
needs torch.
"""

import bisect
import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from corpus import (
    STANDARD_INPUT,
    Chunk,
    compute_file_sha256,
    find_data_problem,
    find_files,
    find_overlap_problem,
    get_cache_dir,
    is_compressed,
    is_large,
    is_pattern,
    iter_chunks,
    keep_standard_input,
    resolve_data_path,
)
from parameters import Data
from tokenizer import GPT2Tokenizer, Tokenizer, collect_chars, create_tokenizer
from utils.checks import format_name
from utils.errors import RunError, UserError
from utils.files import (
    is_directory,
    make_directory,
    open_at,
    remove_file,
    remove_if_empty,
    sync,
    sync_file,
    write_atomic,
)
from utils.output import format_bytes

SPLITS = ("train", "val", "test")
MANIFEST_FILE, PROGRESS_FILE, MARKS_FILE = "manifest.json", "progress.json", "marks.bin"
LARGE = 64 << 20  # bytes of text, from which on `token_store` auto keeps a store
_COUNTED_AT_ONCE = 1 << 20  # tokens; bincount makes eight bytes of each
_MARK = np.dtype("<i8")
_MARK_SIZE = 3 * _MARK.itemsize
_NO_MARKS = np.zeros((0, 3), dtype=_MARK)


@dataclass(frozen=True)
class Sizes:
    """How a store is divided: tokens in a shard, bytes read at once, bytes from note to note."""

    shard: int = 1 << 30
    part: int = 1 << 20
    note: int = 64 << 20


# ----------------------------------------------------------------------------------------------
# Tokens


class ShardedTokens:
    """The ids of several shards as one array `(N,)` to read: slices, and gathering by index.

    Args:
        shards: arrays of one type, all but the last of `shard_size` ids.
        shard_size: in ids.
        start: where this view begins in the shards.
        size: N; all that follows `start` by default.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], shard_size: int, start: int = 0, size: int | None = None
    ):
        total = shard_size * (len(shards) - 1) + shards[-1].size
        self._shards, self._shard_size, self._start = shards, shard_size, start
        self.size = total - start if size is None else size
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        """A view for a slice, which is an array where it lies in one shard; else a copy."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self.size)
            assert step == 1, "only whole stretches are views"
            return self._view(self._start + start, self._start + max(start, stop))
        index = np.asarray(index)
        if index.size and (index.min() < 0 or index.max() >= self.size):
            raise IndexError(f"an index is not within the {self.size} tokens")
        shards, places = np.divmod(index + self._start, self._shard_size)
        ids = np.empty(index.shape, dtype=self.dtype)
        for shard in np.unique(shards):
            here = shards == shard
            ids[here] = self._shards[shard][places[here]]
        return ids[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        first, last = (
            self._start // self._shard_size,
            -(-(self._start + self.size) // self._shard_size),
        )
        whole = np.concatenate([np.asarray(shard) for shard in self._shards[first:last]])
        begins = self._start - first * self._shard_size
        return whole[begins : begins + self.size].astype(dtype or self.dtype, copy=False)

    def astype(self, dtype: Any) -> np.ndarray:
        """All ids as an array in memory."""
        return np.asarray(self, dtype=dtype)

    def _view(self, start: int, stop: int) -> "np.ndarray | ShardedTokens":
        shard, place = divmod(start, self._shard_size)
        if shard < len(self._shards) and place + stop - start <= self._shard_size:
            return self._shards[shard][place : place + stop - start]
        if start == stop:
            return self._shards[-1][:0]
        return ShardedTokens(self._shards, self._shard_size, start, stop - start)


Tokens = np.ndarray | ShardedTokens


@dataclass(frozen=True)
class EncodedCorpus:
    """A text's ids `(N,)`, and where its files end: `ends[i]` tokens have come by file i's end.

    `marks` has a row for each of some places in the text, `(M, 3)`: the number of a file, how many
    tokens there are up to here, and how many bytes of UTF-8 they stand for.
    """

    tokens: Tokens
    tokenizer: Tokenizer
    ends: Sequence[int]
    marks: np.ndarray = field(default_factory=lambda: _NO_MARKS)

    def count_bytes(self, start: int, stop: int) -> int:
        """The bytes of UTF-8 that the tokens from `start` to `stop` stand for.

        Between marks it is known; only what is left at either end is looked at.
        """
        places = self.marks[:, 1]
        first = int(np.searchsorted(places, start))
        last = int(np.searchsorted(places, stop, side="right")) - 1
        if first >= last:
            return self._counted(start, stop)
        between = int(self.marks[last, 2] - self.marks[first, 2])
        head = self._counted(start, int(places[first]))
        return head + between + self._counted(int(places[last]), stop)

    def _counted(self, start: int, stop: int) -> int:
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for begin in range(start, stop, _COUNTED_AT_ONCE):
            part = self.tokens[begin : min(begin + _COUNTED_AT_ONCE, stop)]
            counts += np.bincount(part, minlength=counts.size)
        return int(counts @ self.tokenizer.token_bytes)

    def split(self, config: Data) -> dict[str, tuple[int, int]]:
        """Where train, val and test begin and end, in tokens; any of them may be empty.

        Raises `UserError` where `config.split_by` is file, and there are too few files.
        """
        size = self.tokens.size
        train_end = int(size * config.train_split)
        val_end = size - int(size * config.test_split)
        if config.split_by == "file":
            train_end, val_end = cuts_between_files(self.ends, train_end, val_end)
        return dict(
            zip(SPLITS, ((0, train_end), (train_end, val_end), (val_end, size)), strict=True)
        )


def cuts_between_files(ends: Sequence[int], train_end: int, val_end: int) -> tuple[int, int]:
    """The ends of files, in tokens, that are nearest to where two cuts should be.

    The second is the text's end where it should be; else there are files on all three sides.
    """
    size = ends[-1]
    between = sorted({end for end in ends if 0 < end < size})
    needed = 1 if val_end == size else 2
    if len(between) < needed:
        files = len(between) + 1
        raise UserError(
            f"split_by file: there are {needed + 1} splits, and {files} "
            f"file{'s that have' if files > 1 else ' that has'} text: take more files, or "
            "split_by position"
        )
    if needed == 1:
        return _nearest(between, train_end), size
    first, second = _nearest(between, train_end), _nearest(between, val_end)
    if first < second:
        return first, second
    at = between.index(first)  # both want the same one: move the one that has less far to go
    pairs = [(between[i], between[i + 1]) for i in (at - 1, at) if 0 <= i < len(between) - 1]
    return min(pairs, key=lambda pair: abs(pair[0] - train_end) + abs(pair[1] - val_end))


def _nearest(ends: Sequence[int], wanted: int) -> int:
    at = bisect.bisect_left(ends, wanted)
    return min(ends[max(0, at - 1) : at + 1], key=lambda end: abs(end - wanted))


# ----------------------------------------------------------------------------------------------
# Texts


def open_corpus(
    data: str,
    *,
    cache_dir: str | None = None,
    token_store: str = "auto",
    tell: Callable[[str], None] | None = None,
    large: int = LARGE,
    sizes: Sizes | None = None,
    written: Mapping[str, str] | None = None,
) -> "MemoryCorpus | StoredCorpus":
    """Open the text that a `data` setting names.

    Args:
        data: a file, a directory, a glob, or `-`, which is read and kept.
        cache_dir: as the setting is.
        token_store: whether a store is kept: on, off, or auto, where the text is large.
        tell: hears of what takes a while, and of a store that is made again, and why.
        large: the bytes of text that are large.
        sizes: how a store is divided.
        written: directories that are written besides the cache, by their settings.

    Raises:
        UserError: no such text, an empty one, one that is not UTF-8, one that has a directory in
            it which is written, or a cache that cannot be written.
        RunError: the cache's disk is full.
    """
    cache, path, name = get_cache_dir(cache_dir), data, data
    if problem := find_data_problem(data):
        raise UserError(f"{format_name(data)}: {problem}")
    if data == STANDARD_INPUT:
        path, name = str(keep_standard_input(cache)), "standard input"
        if tell is not None:
            tell(f"Standard input is kept as {path}")
    files = find_files(path)
    places = [("cache_dir", place) for place in (cache, cache / "texts", cache / "stdin")]
    places += [(setting, Path(place)) for setting, place in (written or {}).items()]
    if problem := find_overlap_problem(path, files, places):
        raise UserError(f"{format_name(data)}: {problem}")
    try:
        is_kept = token_store == "on" or (token_store == "auto" and is_large(files, large))
    except OSError as error:  # a file was there a moment ago
        raise UserError(f"{format_name(data)}: cannot be read: {error.strerror}") from None
    if not is_kept:
        return MemoryCorpus.read(name, path, files)
    return StoredCorpus(name, path, files, cache / "texts", tell, sizes or Sizes())


@dataclass(frozen=True)
class MemoryCorpus:
    """A text in memory, by its files. `sha256` is of all bytes as they were read, decompressed."""

    name: str
    path: str | None
    texts: Sequence[str]
    sha256: str

    @classmethod
    def read(cls, name: str, path: str, files: Sequence[Path]) -> "MemoryCorpus":
        """Read a text. Raises `UserError` where it is empty, or a file is not UTF-8."""
        digest = hashlib.sha256()
        read: list[list[str]] = [[] for _ in files]
        for part in iter_chunks(files, hear=lambda _, block: digest.update(block)):
            read[part.file].append(part.text)
        if not any(read):
            raise empty(name, files)
        return cls(name, path, ["".join(texts) for texts in read], digest.hexdigest())

    def create_tokenizer(self, kind: str) -> Tokenizer:
        """The tokenizer of that `token_kind`; a character tokenizer knows this text's."""
        return create_tokenizer(self.texts, kind)

    def count_unknown(self, tokenizer: Tokenizer) -> dict[str, int]:
        """The text's characters that the tokenizer lacks, sorted, and how often each stands."""
        return count_unknown(tokenizer, self.texts)

    def encode(
        self, tokenizer: Tokenizer, left_out: Mapping[str, int] | None = None
    ) -> EncodedCorpus:
        """The ids, without the characters that the tokenizer lacks where `left_out` has these.

        Raises `UserError` where it lacks some, and `left_out` has none.
        """
        ids = [tokenizer.encode(text, bool(left_out)) for text in self.texts]
        ends = np.cumsum([part.size for part in ids]).tolist()
        return EncodedCorpus(ids[0] if len(ids) == 1 else np.concatenate(ids), tokenizer, ends)


def empty(name: str, files: Sequence[Path]) -> UserError:
    """What is said of a text without a character."""
    what = "the file is empty" if len(files) == 1 else "its files are empty"
    return UserError(f"{format_name(name)}: {what}")


def count_unknown(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """The characters that the tokenizer lacks, sorted, and how often each stands in the texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.count_unknown(text))
    return dict(sorted(counts.items()))


# ----------------------------------------------------------------------------------------------
# The store


_Number = Annotated[int, Field(ge=0)]  # of bytes or tokens, of which there may be very many


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(_Record):
    """A file of a text, as it was when the text was read.

    `path` is relative to the text's, if that is a directory; "" for a text of one file. `size` is
    in bytes, as it lies there, `bytes` decompressed.
    """

    path: str
    size: _Number
    bytes: _Number
    mtime_ns: int
    sha256: str


class Encoding(_Record):
    """A text's ids by one tokenizer, without the characters that are `left_out`.

    `text` is the manifest's `identity`. `ends` are the tokens up to the end of each file.
    """

    text: str
    tokenizer: dict[str, Any]
    left_out: dict[str, int]
    dtype: Literal["|u1", "<u2", "<u4"]
    shard: Annotated[int, Field(ge=1)]
    tokens: _Number
    marks: _Number
    ends: list[_Number]

    @model_validator(mode="after")
    def _files_end_one_after_another(self) -> Self:
        if not self.ends or self.ends != sorted(self.ends) or self.ends[-1] != self.tokens:
            raise ValueError("the files' ends are not those of the tokens")
        return self


class Manifest(_Record):
    """`manifest.json`. `sha256` and `bytes` are those of the text, decompressed."""

    format_version: Literal[1] = 1
    data: str
    sources: list[Source]
    sha256: str
    bytes: _Number
    characters: str
    encodings: dict[str, Encoding] = {}

    @cached_property
    def identity(self) -> str:
        """A digest of the text and of where its files end: the same ids and ends follow from it."""
        return _digest(json.dumps([self.sha256, *self.layout]))

    @property
    def layout(self) -> list[int]:
        """The bytes of each file, decompressed."""
        return [source.bytes for source in self.sources]


class Progress(_Record):
    """`progress.json`: the last place in the text up to which all is on the disk.

    `sha256` is that of the text's bytes up to there, from which the ids were made.
    """

    shard: int
    sha256: str
    file: _Number = 0
    end: _Number = 0
    tokens: _Number = 0
    bytes: _Number = 0
    marks: _Number = 0


class StoredCorpus:
    """A text with a directory in the cache. It is read where it has changed since the last time.

    Args:
        name: what to call it.
        path: what was asked for, which names the directory.
        files: its files.
        stores: where the directories are.
        tell: hears what takes a while, and why something is done again.
        sizes: how its encodings are divided.

    Raises:
        UserError: it is empty or not UTF-8, or the cache cannot be written.
        RunError: the disk is full.
    """

    def __init__(
        self,
        name: str,
        path: str,
        files: Sequence[Path],
        stores: Path,
        tell: Callable[[str], None] | None,
        sizes: Sizes,
    ):
        self.name, self.path = name, path
        self._files, self._sizes = files, sizes
        self._tell = tell if tell is not None else lambda line: None
        whole = resolve_data_path(path)
        word = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).name).strip("._") or "text"
        self.directory = stores / f"{word[:40]}-{_digest(whole)[:16]}"
        found = self._manifest(said=False)
        if found is None or self._as_it_was(found) != found:
            with self._locked():
                found = self._settled(whole)
        self._found = found

    @property
    def sha256(self) -> str:
        """Of all bytes of the text, decompressed."""
        return self._found.sha256

    def create_tokenizer(self, kind: str) -> Tokenizer:
        """The tokenizer of that `token_kind`; a character tokenizer knows this text's."""
        return create_tokenizer(self._found.characters, kind)

    def count_unknown(self, tokenizer: Tokenizer) -> dict[str, int]:
        """The text's characters that the tokenizer lacks, sorted, and how often each stands.

        The text is read where there are any, and it was not yet encoded without them.
        """
        if not tokenizer.count_unknown(self._found.characters):
            return {}
        known = self._found.encodings.get(self._encoding_name(tokenizer, drop=True))
        if known is not None and known.left_out:
            return known.left_out
        return count_unknown(tokenizer, (part.text for part in iter_chunks(self._files)))

    def encode(
        self, tokenizer: Tokenizer, left_out: Mapping[str, int] | None = None
    ) -> EncodedCorpus:
        """The ids, mapped; they are made first where they are not there, or not whole.

        Args:
            tokenizer: what makes the ids.
            left_out: the characters that it lacks, if they are to be left out, as `unknown` has
                them.

        Raises:
            UserError: the tokenizer lacks characters, and `left_out` has none; the text has just
                changed; or the cache cannot be written.
            RunError: the disk is full. What was encoded is kept.
        """
        if not left_out:
            tokenizer.encode(self._found.characters)  # raises where it lacks one of them
        name = self._encoding_name(tokenizer, drop=bool(left_out))
        with contextlib.suppress(OSError):  # of another process, which makes it again just now
            if self._problem(name, self._found.encodings.get(name), tokenizer) is None:
                return self._mapped(name, tokenizer)
        with self._locked():
            before, self._found = self._found, self._settled(self._found.data)
            if self._found.identity != before.identity:
                raise _ChangedError(self.name)
            known = self._found.encodings.get(name)
            if problem := self._problem(name, known, tokenizer):
                if known is not None:
                    self._tell(f"{self.directory / name}: {problem}: encoding {self.name} again")
                    self._withdraw(name)
                self._encode(name, tokenizer, dict(left_out or {}))
            return self._mapped(name, tokenizer)

    # The text

    def _manifest(self, said: bool = True) -> Manifest | None:
        path = self.directory / MANIFEST_FILE
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            if said:
                self._tell(f"{path} cannot be read: encoding {self.name} again")
            return None

    def _settled(self, whole: str) -> Manifest:
        """The manifest of the text as it is now, on the disk too. Only under the lock."""
        known = self._manifest()
        manifest = known and self._as_it_was(known)
        if manifest is None:
            if known is not None:
                self._tell(f"{self.name} has changed since it was encoded: encoding it again")
            manifest = self._read(whole, known.encodings if known else {})
        if manifest != known:
            self._publish(manifest)
        return manifest

    def _as_it_was(self, known: Manifest) -> Manifest | None:
        """The manifest with the times of now, if no file's content has changed since."""
        if [source.path for source in known.sources] != self._names():
            return None
        sources = []
        for path, source in zip(self._files, known.sources, strict=True):
            status = _status(path)
            is_same_time = status.st_mtime_ns == source.mtime_ns
            if status.st_size != source.size:
                return None
            if not is_same_time and compute_file_sha256(path) != source.sha256:
                return None
            sources.append(source.model_copy(update={"mtime_ns": status.st_mtime_ns}))
        return known.model_copy(update={"sources": sources})

    def _read(self, whole: str, encodings: dict[str, Encoding]) -> Manifest:
        """Look at all of the text once: its characters, its size, its SHA-256."""
        before = [_status(path) for path in self._files]
        self._tell(f"Reading {self.name}, which takes a while the first time …")
        digest, layout = hashlib.sha256(), [0] * len(self._files)
        hashes: list[Any] = [None] * len(self._files)

        def hear(file: int, block: bytes) -> None:
            layout[file] += len(block)
            digest.update(block)
            if len(self._files) > 1 and not is_compressed(self._files[file]):
                hashes[file] = hashes[file] or hashlib.sha256()
                hashes[file].update(block)
                if not block:  # the file's end
                    hashes[file] = hashes[file].hexdigest()

        texts = (part.text for part in iter_chunks(self._files, size=self._sizes.part, hear=hear))
        characters = "".join(collect_chars(texts))
        if not characters:
            raise empty(self.name, self._files)
        if len(self._files) == 1:
            hashes = [digest.hexdigest()]
        sources = [
            Source(
                path=name,
                size=status.st_size,
                bytes=size,
                mtime_ns=status.st_mtime_ns,
                sha256=compute_file_sha256(path) if is_compressed(path) else sha256,
            )
            for name, path, status, size, sha256 in zip(
                self._names(), self._files, before, layout, hashes, strict=True
            )
        ]
        manifest = Manifest(
            data=whole,
            sources=sources,
            sha256=digest.hexdigest(),
            bytes=sum(layout),
            characters=characters,
            encodings=encodings,
        )
        self._check_still(manifest)
        return manifest

    def _names(self) -> list[str]:
        """The files as the manifest has them: in the same words from whatever directory."""
        if is_directory(Path(self.path)):
            begin = len(str(Path(self.path, "x"))) - 1  # pathlib's own way takes seconds for many
            return [str(path)[begin:] for path in self._files]
        if is_pattern(self.path):
            return [str(path.absolute()) for path in self._files]
        return [""]

    def _check_still(self, manifest: Manifest) -> None:
        for path, source in zip(self._files, manifest.sources, strict=True):
            status = _status(path)
            if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
                raise _ChangedError(str(path))

    def _publish(self, manifest: Manifest) -> None:
        make_directory(self.directory)
        write_atomic(self.directory / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
        sync(self.directory)

    # An encoding

    def _problem(self, name: str, encoding: Encoding | None, tokenizer: Tokenizer) -> str | None:
        """What keeps an encoding from being used, or None. Looks at sizes alone."""
        if encoding is None:
            return "it is not there"
        if encoding.tokenizer != tokenizer.get_state():
            return "made with another tokenizer"
        if encoding.text != self._found.identity or len(encoding.ends) != len(self._files):
            return "made from another text"
        dtype = tokenizer.dtype.newbyteorder("<")
        if encoding.dtype != dtype.str:
            return f"its type is {encoding.dtype}, and should be {dtype.str}"
        for number, tokens in enumerate(_shard_sizes(encoding.tokens, encoding.shard)):
            path = self.directory / name / shard_name(number)
            size = path.stat().st_size if path.is_file() else 0
            if size != tokens * dtype.itemsize:
                wanted = tokens * dtype.itemsize
                return f"{path.name} has {size:,} bytes, and should have {wanted:,}"
        marks = self.directory / name / MARKS_FILE
        if not marks.is_file() or marks.stat().st_size != encoding.marks * _MARK_SIZE:
            return f"{MARKS_FILE} is not whole"
        return None

    def _mapped(self, name: str, tokenizer: Tokenizer) -> EncodedCorpus:
        encoding = self._found.encodings[name]
        dtype = np.dtype(encoding.dtype)
        shards = [
            np.asarray(
                np.memmap(self.directory / name / shard_name(number), dtype, "r", shape=size)
            )
            for number, size in enumerate(_shard_sizes(encoding.tokens, encoding.shard))
        ]
        tokens: Tokens = shards[0] if shards else np.empty(0, dtype)
        if len(shards) > 1:
            tokens = ShardedTokens(shards, encoding.shard)
        marks = _read_marks(self.directory / name)
        return EncodedCorpus(tokens, tokenizer, encoding.ends, marks)

    def _encoding_name(self, tokenizer: Tokenizer, drop: bool) -> str:
        identity = json.dumps([tokenizer.get_state(), drop], sort_keys=True)
        return f"{self._found.identity[:16]}-{_digest(identity)[:8]}"

    def _withdraw(self, name: str) -> None:
        """Take an encoding out of the manifest, and forget how it was made."""
        remove_file(self.directory / name / PROGRESS_FILE)
        known = {other: each for other, each in self._found.encodings.items() if other != name}
        self._found = self._found.model_copy(update={"encodings": known})
        self._publish(self._found)

    def _encode(self, name: str, tokenizer: Tokenizer, left_out: dict[str, int]) -> None:
        """Write the ids, from where an earlier try has come to, and publish them."""
        directory, manifest = self.directory / name, self._found
        make_directory(directory)
        writer = _Writer(directory, tokenizer.dtype.newbyteorder("<"), self._sizes, manifest)
        done = writer.progress
        since = f", of which {format_bytes(done.bytes)} are there" if done.tokens else ""
        self._tell(
            f"Encoding {self.name} ({format_bytes(manifest.bytes)}{since}) into {directory} …"
        )
        began = time.monotonic()
        with contextlib.closing(writer):
            try:
                self._write(writer, tokenizer, bool(left_out))
            except _ChangedError:
                writer.forget()
                raise
            writer.note()
            ends = writer.ends(len(self._files))
        encoding = Encoding(
            text=manifest.identity,
            tokenizer=tokenizer.get_state(),
            left_out=left_out,
            dtype=writer.dtype.str,
            shard=self._sizes.shard,
            tokens=writer.progress.tokens,
            marks=writer.progress.marks,
            ends=ends,
        )
        self._found = manifest.model_copy(update={"encodings": self._current() | {name: encoding}})
        self._publish(self._found)
        remove_file(directory / PROGRESS_FILE)
        self._clean_up()
        seconds = max(time.monotonic() - began, 1e-3)
        speed = format_bytes((manifest.bytes - done.bytes) / seconds)
        self._tell(f"Encoded {self.name}: {encoding.tokens:,} tokens, {speed} a second")

    def _write(self, writer: "_Writer", tokenizer: Tokenizer, drop: bool) -> None:
        """Have the ids written of all that is not yet there."""
        done, token_bytes = writer.progress, tokenizer.token_bytes
        try:
            for part in iter_chunks(
                self._files,
                size=self._sizes.part,
                whole_words=tokenizer.token_kind == GPT2Tokenizer.token_kind,
                start=(done.file, done.end),
                hear=writer.hear,
            ):
                ids = tokenizer.encode(part.text, drop)
                writer.add(part, ids, int(token_bytes[ids].sum()) if drop else part.size)
            if not writer.has_heard_all():
                remove_file(self.directory / MANIFEST_FILE)  # it may be what was read amid a change
                raise _ChangedError(self.name)
        except UserError:  # whatever it says, a file that has changed is to be said first
            self._check_still(self._found)
            raise

    def _current(self) -> dict[str, Encoding]:
        known = self._found.encodings
        return {name: each for name, each in known.items() if each.text == self._found.identity}

    def _clean_up(self) -> None:
        """Remove what killed processes left, and the encodings of what the text was before.

        Who has those mapped keeps them.
        """
        for left in self.directory.rglob(".*.tmp"):
            remove_file(left)
        for old in self.directory.iterdir():
            if old.is_dir() and not old.name.startswith(self._found.identity[:16]):
                for path in old.iterdir():
                    remove_file(path)
                remove_if_empty(old)

    # The cache

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's lock, and explain what the cache refuses."""
        try:
            make_directory(self.directory.parent)
            lock = FileLock(self.directory.with_name(f".{self.directory.name}.lock"))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                self._tell(f"Another process is encoding {self.name}: waiting for it …")
                lock.acquire()
            try:
                yield
            finally:
                lock.release()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise RunError(
                    f"{self.directory}: {error.strerror}: {self.name} is not all encoded; what "
                    "there is of it is kept, and the next try goes on from there: free some "
                    "space, or name another place with --cache-dir"
                ) from None
            if isinstance(error, IsADirectoryError):
                where = error.filename2 or error.filename
                raise UserError(
                    f"{where}: a directory, where a file is wanted: remove it"
                ) from None
            raise UserError(
                f"the cache {self.directory.parent.parent} cannot be written: "
                f"{error.strerror or error}; name another place with --cache-dir"
            ) from None


class _ChangedError(UserError):
    """A text is not the one any more that it was a moment ago."""

    def __init__(self, name: str):
        super().__init__(f"{format_name(name)} was changed while it was read: try again")


class _Writer:
    """Writes shards and marks, from where an earlier try has come to, and notes how far it comes.

    Args:
        directory: where.
        dtype: of the ids, little-endian.
        sizes: of shards, and from note to note.
        manifest: of the text.
    """

    def __init__(self, directory: Path, dtype: np.dtype, sizes: Sizes, manifest: Manifest):
        self.dtype = dtype
        self._directory, self._sizes, self._manifest = directory, sizes, manifest
        self._digest, self._heard = hashlib.sha256(), [0] * len(manifest.sources)
        self._begun = self.progress = self._noted()
        self._unnoted = 0  # bytes of text
        self._marks = open_at(directory / MARKS_FILE, self.progress.marks * _MARK_SIZE)
        self._shard: IO[bytes] | None = None

    def hear(self, file: int, block: bytes) -> None:
        """Take in the text's bytes from its beginning; before a part is added, those up to its end.

        Raises `_ChangedError` where ids that are there were made from others.
        """
        self._digest.update(block)
        self._heard[file] += len(block)
        is_there = (file, self._heard[file]) == (self._begun.file, self._begun.end)
        if is_there and self._digest.hexdigest() != self._begun.sha256:
            raise _ChangedError(self._manifest.data)

    def has_heard_all(self) -> bool:
        """Whether what was heard is the text that the manifest is of."""
        known = self._manifest
        return (self._digest.hexdigest(), self._heard) == (known.sha256, known.layout)

    def add(self, part: Chunk, ids: np.ndarray, size: int) -> None:
        """Write the ids `(n,)` of a part, which stand for `size` bytes of UTF-8."""
        done, shard = self.progress, self._sizes.shard
        ids, written = ids.astype(self.dtype, copy=False), 0
        while written < ids.size:
            number, place = divmod(done.tokens + written, shard)
            if self._shard is None:
                path = self._directory / shard_name(number)
                self._shard = open_at(path, place * self.dtype.itemsize)
            some = ids[written : written + shard - place]
            self._shard.write(some.data)
            written += some.size
            if place + some.size == shard:
                file, self._shard = self._shard, None
                with file:
                    sync_file(file)
        self.progress = Progress(
            shard=shard,
            sha256=self._digest.hexdigest(),
            file=part.file,
            end=part.end,
            tokens=done.tokens + ids.size,
            bytes=done.bytes + size,
            marks=done.marks + 1,
        )
        mark = (part.file, self.progress.tokens, self.progress.bytes)
        self._marks.write(np.array(mark, dtype=_MARK).data)
        self._unnoted += size
        if self._unnoted >= self._sizes.note:
            self.note()

    def note(self) -> None:
        """See what was written to the disk, and then the note of it."""
        for file in (self._shard, self._marks):
            if file is not None:
                sync_file(file)
        sync(self._directory)
        write_atomic(self._directory / PROGRESS_FILE, self.progress.model_dump_json())
        self._unnoted = 0

    def forget(self) -> None:
        """Leave no note of what was written."""
        self._unnoted = 0
        remove_file(self._directory / PROGRESS_FILE)

    def ends(self, files: int) -> list[int]:
        """How many tokens there are up to the end of each file."""
        self._marks.flush()
        marks = _read_marks(self._directory)
        last = np.searchsorted(marks[:, 0], np.arange(files), side="right")
        return np.concatenate(([0], marks[:, 1]))[last].tolist()

    def close(self) -> None:
        """Note how far it has come, and close the files; where the disk is full, as they are."""
        if self._unnoted:
            with contextlib.suppress(OSError):
                self.note()
        for file in (self._shard, self._marks):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def _noted(self) -> Progress:
        """How far an earlier try has come; nowhere, where what it noted is not there."""
        nowhere = Progress(shard=self._sizes.shard, sha256=self._digest.hexdigest())
        try:
            noted = Progress.model_validate_json((self._directory / PROGRESS_FILE).read_bytes())
            marks = _read_marks(self._directory)[: noted.marks]
            place = [noted.file, noted.tokens, noted.bytes]
            layout = self._manifest.layout
            if (
                noted.shard != self._sizes.shard
                or noted.file >= len(layout)
                or noted.end > layout[noted.file]
                or len(marks) != noted.marks
                or marks[-1:].tolist() != [place]
            ):
                return nowhere
            for number, ids in enumerate(_shard_sizes(noted.tokens, self._sizes.shard)):
                path = self._directory / shard_name(number)
                if path.stat().st_size < ids * self.dtype.itemsize:
                    return nowhere
            return noted
        except (OSError, ValidationError):
            return nowhere


def shard_name(number: int) -> str:
    """The name of a shard's file."""
    return f"shard_{number:05}.bin"


def _read_marks(directory: Path) -> np.ndarray:
    """The marks of an encoding, mapped: of a very large text there are many."""
    path = directory / MARKS_FILE
    rows = path.stat().st_size // _MARK_SIZE
    return np.asarray(np.memmap(path, _MARK, "r", shape=(rows, 3))) if rows else _NO_MARKS


def _shard_sizes(tokens: int, shard: int) -> Iterator[int]:
    return (min(shard, tokens - start) for start in range(0, tokens, shard))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
