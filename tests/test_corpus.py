"""corpus.py: which files a text is, and its parts.

python -m pytest tests/test_corpus.py
"""

import gzip
import hashlib
import io
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from corpus import (
    find_data_problem,
    find_files,
    is_large,
    iter_chunks,
    keep_standard_input,
    resolve_data_path,
)
from utils.errors import UserError

TEXT = "Être, ou ne pas être:\nc'est là la question. 漢字 🙂\n" * 20


def text_of(files, **how) -> str:
    return "".join(part.text for part in iter_chunks([Path(file) for file in files], **how))


@pytest.fixture
def write(tmp_path):
    """Write a file of the working directory, compressed as its name says."""

    def to(name: str, text: str | bytes = TEXT) -> Path:
        raw = text.encode() if isinstance(text, str) else text
        raw = gzip.compress(raw) if name.lower().endswith(".gz") else raw
        raw = zstandard.compress(raw) if name.endswith(".zst") else raw
        path = tmp_path / "cwd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        return path

    return to


@pytest.fixture
def stdin(monkeypatch):
    def give(raw: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))

    return give


# Which files ----------------------------------------------------------------------------------


def test_a_directory_is_all_its_files_by_path_and_hidden_ones_are_none(write):
    for name in ("b/z.txt", "b/a.txt", "a.txt", "c.md", ".hidden", "b/.git/x", "b.txt"):
        write(f"texts/{name}")
    os.mkfifo("texts/pipe")
    Path("texts/gone").symlink_to("nowhere")
    names = [path.as_posix() for path in find_files("texts")]
    assert names == [f"texts/{name}" for name in ("a.txt", "b.txt", "b/a.txt", "b/z.txt", "c.md")]


def test_a_glob_is_the_files_it_matches_by_path(write):
    for name in ("b/z.txt", "a.txt", "c.md", "b/deep/x.txt", "b/.x.txt"):
        write(f"texts/{name}")
    for pattern, names in {
        "texts/*.txt": ["a.txt"],
        "texts/**/*.txt": ["a.txt", "b/deep/x.txt", "b/z.txt"],
        "texts/*": ["a.txt", "c.md"],
        "texts/[bc]*": ["c.md"],
    }.items():
        assert [path.as_posix() for path in find_files(pattern)] == [f"texts/{n}" for n in names]


def test_a_file_whose_name_looks_like_a_glob_is_itself(write):
    write("[a].txt")
    write("a.txt")
    assert find_files("[a].txt") == [Path("[a].txt")]
    assert find_data_problem("[a].txt") is None


def test_what_a_run_records_is_found_from_anywhere(write, tmp_path, monkeypatch):
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
    ("data", "problem"),
    [
        ("none.txt", "no such file"),
        ("void", "a directory, in which no file with text is found"),
        ("void/*.txt", "a pattern, for which no file with text is found"),
        ("only-empty", "a directory, in which no file with text is found"),
        ("empty.txt", "the file is empty"),
        ("null\0", "cannot be read: embedded null byte"),
    ],
)
def test_what_is_no_text_is_one_clear_line(write, data, problem):
    Path("void").mkdir()
    write("only-empty/a.txt", "")
    write("empty.txt", "")
    assert find_data_problem(data) == problem


def test_a_file_whose_name_is_no_text_is_named(write):
    write("names/caf\udce9.txt")
    with pytest.raises(UserError, match=r"names: a file's name is no text: .*caf.udce9"):
        find_files("names")


# Their text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.GZ", "a.zst"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 1 << 20])
def test_the_parts_are_the_text_whatever_their_size(write, name, size):
    path = write(name, "\ufeff" + TEXT)
    heard = []
    found = list(iter_chunks([path], size=size, hear=lambda _, block: heard.append(block)))
    assert "".join(part.text for part in found) == TEXT
    assert b"".join(heard) == ("\ufeff" + TEXT).encode()
    assert [part.size for part in found] == [len(part.text.encode()) for part in found]
    assert found[-1].end == len(("\ufeff" + TEXT).encode())


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.zst"])
def test_whoever_begins_at_the_end_of_a_part_reads_the_rest(write, name, whole_words):
    files = [write("before.txt"), write(name), write("after.txt", "\ufeffend")]
    how = {"whole_words": whole_words, "size": 50}
    found = list(iter_chunks(files, **how))
    for index in range(0, len(found), 7):
        start = (found[index].file, found[index].end)
        rest = "".join(part.text for part in iter_chunks(files, **how, start=start))
        assert rest == "".join(part.text for part in found[index + 1 :])


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("start", [(0, 0), (0, 20), (1, 0), (1, 300), (2, 6)])
def test_all_bytes_are_heard_and_with_a_part_those_up_to_its_end(write, whole_words, start):
    contents = ["\ufeff" + TEXT, TEXT, "\ufeffend", "\ufeff", ""]
    files = [write(name, text) for name, text in zip("abcde", contents, strict=True)]
    heard = [b""] * len(files)

    def hear(file: int, block: bytes) -> None:
        heard[file] += block

    for part in iter_chunks(files, size=50, whole_words=whole_words, start=start, hear=hear):
        before = [text.encode() for text in contents[: part.file]]
        assert heard[: part.file] == before
        assert heard[part.file] == contents[part.file].encode()[: part.end]
    assert heard == [text.encode() for text in contents]


def test_files_are_one_text_each_without_its_byte_order_mark(write):
    files = [write("a", "\ufeffone\r\n"), write("b", ""), write("c.gz", "\ufefftwo \ufeff")]
    assert text_of(files) == "one\r\ntwo \ufeff"
    assert [part.file for part in iter_chunks(files)] == [0, 2]


def test_several_frames_of_zstandard_are_one_text(write):
    raw = zstandard.compress(b"one ") + zstandard.compress(b"") + zstandard.compress(b"two")
    Path("a.zst").write_bytes(raw)
    assert text_of(["a.zst"]) == "one two"
    assert text_of(["a.zst"], start=(0, 2)) == "e two"


def test_a_small_file_that_holds_much_is_not_held_in_memory(write):
    path = write("zeros.zst", "0" * (1 << 25))
    assert path.stat().st_size < 5000
    assert max(len(part.text) for part in iter_chunks([path], size=1 << 16)) <= 1 << 16


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.zst"])
def test_what_is_not_utf8_names_file_and_line(write, name):
    path = write(name, b"\xef\xbb\xbf" + b"fine\n" * 9 + b"caf\xe9 \n")
    for size in (1, 3, 1000):
        with pytest.raises(UserError, match=rf"{name}: not UTF-8 text \(byte 0xe9 in line 10\).*"):
            text_of([write("good.txt"), path], size=size)


def test_half_a_character_at_the_end_is_not_utf8(write):
    with pytest.raises(UserError, match=r"byte 0xc3 in line 2"):
        text_of([write("a.txt", b"a\nb\xc3"), write("b.txt", b"\xa9")], size=2)


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
@pytest.mark.parametrize("damage", ["cut", "wrong"])
def test_a_damaged_file_is_named(write, name, damage):
    path = write(name, os.urandom(3000).hex())
    raw = path.read_bytes()
    path.write_bytes(raw[:-20] if damage == "cut" else b"no archive at all")
    with pytest.raises(UserError, match=rf"{name}: not a whole \.{name[2:]} file: "):
        text_of([path])


def test_a_window_that_is_too_large_is_said_to_be_one(write):
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    raw = stream.compress(TEXT.encode()) + stream.flush()
    path = write("wide", raw).rename("wide.zst")
    with pytest.raises(UserError, match=r"wide\.zst: .* more than 128 MB of memory, .*--long"):
        text_of([path])


def test_large_is_what_holds_much_text_compressed_or_not(write):
    for name in ("a.txt", "a.gz", "a.zst"):
        path = write(name, "0" * 100_000)
        assert is_large([path], 100_000)
        assert not is_large([path], 100_001)
        assert is_large([path, path], 100_001)


WHITE = st.sampled_from(list(" \n\t\r\u00a0\u3000\x1c\x85"))
PIECES = st.one_of(WHITE, st.sampled_from(["'s", "a", "B", "7", "é", "漢", "!", "'", "``", "🙂"]))


@given(text=st.lists(PIECES, max_size=60).map("".join), size=st.integers(1, 40))
def test_words_are_cut_only_before_a_space_that_follows_one(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "words.txt"
    path.write_bytes(text.encode())
    found = [part.text for part in iter_chunks([path], size=size, whole_words=True)]
    assert "".join(found) == text
    for before, after in pairwise(found):
        assert not before[-1].isspace()
        assert after[0] in " \n"


# Standard input -------------------------------------------------------------------------------


def test_standard_input_is_kept_under_its_sha256(stdin, tmp_path):
    stdin(TEXT.encode())
    path = keep_standard_input(tmp_path / "cache")
    assert path.name == hashlib.sha256(TEXT.encode()).hexdigest() + ".txt"
    assert path.read_bytes() == TEXT.encode()
    kept = path.stat()
    stdin(TEXT.encode())
    assert keep_standard_input(tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == kept.st_mtime_ns
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_standard_input_is_an_error_and_leaves_nothing(stdin, tmp_path):
    stdin(b"")
    with pytest.raises(UserError, match="standard input: there is no text in it"):
        keep_standard_input(tmp_path / "cache")
    assert list((tmp_path / "cache" / "stdin").iterdir()) == []


def test_a_cache_that_cannot_keep_standard_input_is_named(stdin, tmp_path):
    stdin(b"x")
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot be kept in .*cache: .*--cache-dir"):
        keep_standard_input(tmp_path / "cache")


def test_what_a_killed_process_left_of_standard_input_is_removed(stdin, tmp_path):
    (tmp_path / "cache" / "stdin").mkdir(parents=True)
    left = tmp_path / "cache" / "stdin" / f".{2**30}.tmp"
    left.touch()
    stdin(b"x")
    path = keep_standard_input(tmp_path / "cache")
    assert list(path.parent.iterdir()) == [path]
