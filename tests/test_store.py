"""store.py: a text as ids that are mapped, made again where they must be, and never half there.

python -m pytest tests/test_store.py
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from helpers import LINES, Faults, in_a_process_that_ends_at, killed, powerless, refused
from hypothesis import given
from hypothesis import strategies as st

import store
from parameters import Data
from store import EncodedCorpus, ShardedTokens, Sizes, StoredCorpus, cuts_between_files, open_corpus
from tokenizer import CharTokenizer, create_tokenizer
from utils.errors import RunError, UserError

TEXT = LINES * 3 + "Être ou ne pas être: 漢字.\n"
SMALL = Sizes(shard=97, part=60, note=150)


class Told(list):
    """The lines that were told; calling it adds one."""

    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def stored(data, told=None, sizes=SMALL) -> StoredCorpus:
    return open_corpus(str(data), token_store="on", tell=told, sizes=sizes)


def encoded(data, told=None, sizes=SMALL, tokenizer=None) -> EncodedCorpus:
    text = stored(data, told, sizes)
    return text.encode(tokenizer or text.create_tokenizer("char"))


def decoded(result: EncodedCorpus) -> str:
    return result.tokenizer.decode(np.asarray(result.tokens))


def files_of(directory: Path, pattern: str = "*.bin") -> list[Path]:
    return sorted((directory).rglob(pattern))


# What is stored -------------------------------------------------------------------------------


def test_the_store_has_the_ids_of_the_text_in_memory(text, tmp_path):
    for sizes in (SMALL, Sizes(), Sizes(shard=31, part=1, note=200)):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        in_memory = open_corpus(str(text), token_store="off")
        tokenizer = in_memory.create_tokenizer("char")
        expected, found = in_memory.encode(tokenizer), encoded(text, sizes=sizes)
        assert found.tokenizer.get_state() == tokenizer.get_state()
        assert found.tokens.dtype == expected.tokens.dtype == np.uint8
        assert np.asarray(found.tokens).tolist() == expected.tokens.tolist()
        assert list(found.ends) == list(expected.ends)
        assert stored(text).sha256 == in_memory.sha256


def test_a_directory_is_one_text_and_where_its_files_end_is_known(tmp_path, text):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in (("a", "aé"), ("b", ""), ("c", "\ufeffccc"), ("d", "")):
        (folder / name).write_text(content, encoding="utf-8")
    for token_store in ("on", "off"):
        found = open_corpus(str(folder), token_store=token_store, sizes=SMALL)
        result = found.encode(found.create_tokenizer("char"))
        assert decoded(result) == "aéccc"
        assert list(result.ends) == [2, 2, 5, 5]


def test_the_type_is_the_smallest_that_holds_the_vocabulary(tmp_path, text):
    assert encoded(text).tokens.dtype == np.uint8
    text.write_text("".join(map(chr, range(0x100, 0x300))), encoding="utf-8")
    result = encoded(text)
    assert result.tokens.dtype == np.uint16
    assert decoded(result) == text.read_text(encoding="utf-8")
    sizes = [path.stat().st_size for path in files_of(tmp_path / "cache", "shard_*")]
    assert sizes == [2 * 97] * 5 + [2 * 27]


def test_byte_pairs_are_those_of_the_whole_text(tmp_path, gpt2_vocabulary):
    tokenizer = create_tokenizer("", "gpt2")
    white = st.sampled_from(list(" \n\t\r\u00a0\u3000\x1c\x85"))
    words = st.sampled_from(["don't", "'s", "I", "ab", "7", "42", "é", "漢", "!?", "'", "``", "🙂"])
    path = tmp_path / "words.txt"

    @given(text=st.lists(st.one_of(white, words), min_size=1, max_size=40).map("".join))
    def check(text):
        path.write_bytes(text.encode())
        pieces = store.parts([path], size=7, whole_words=True)
        ids = np.concatenate([tokenizer.encode(part.text) for part in pieces])
        assert ids.tolist() == tokenizer.encode(text).tolist()

    check()
    path.write_text(TEXT * 5, encoding="utf-8")
    result = encoded(path, tokenizer=tokenizer)
    assert np.asarray(result.tokens).tolist() == tokenizer.encode(TEXT * 5).tolist()
    assert result.tokens.dtype == np.uint16
    assert result.count_bytes(0, result.tokens.size) == len((TEXT * 5).encode())


def test_small_texts_leave_nothing_and_large_ones_a_store(text, tmp_path):
    size = text.stat().st_size
    assert not isinstance(open_corpus(str(text), large=size + 1), StoredCorpus)
    assert not (tmp_path / "cache").exists()
    assert isinstance(open_corpus(str(text), large=size), StoredCorpus)
    assert not isinstance(open_corpus(str(text), large=size, token_store="off"), StoredCorpus)


def test_unknown_characters_are_counted_and_left_out(text, monkeypatch):
    tokenizer = CharTokenizer(sorted(set(TEXT) - set("Êê漢字")))
    found = stored(text)
    unknown = found.unknown(tokenizer)
    assert (
        unknown
        == open_corpus(str(text)).count_unknown(tokenizer)
        == {"Ê": 1, "ê": 1, "字": 1, "漢": 1}
    )
    with pytest.raises(UserError, match="the model does not know 'Ê'"):
        found.encode(tokenizer)
    result = found.encode(tokenizer, unknown)
    kept = "".join(char for char in TEXT if char not in unknown)
    assert decoded(result) == kept
    assert result.count_bytes(0, len(kept)) == len(kept.encode())
    monkeypatch.setattr(store, "iter_chunks", None)  # what is known is not counted again
    again = stored(text)
    assert again.unknown(tokenizer) == unknown
    assert decoded(again.encode(tokenizer, unknown)) == kept


def test_a_text_of_which_nothing_is_left_has_no_tokens(text):
    for token_store in ("on", "off"):
        found, tokenizer = open_corpus(str(text), token_store=token_store), CharTokenizer(["☃"])
        result = found.encode(tokenizer, found.unknown(tokenizer))
        assert (result.tokens.size, list(result.ends)) == (0, [0])


@pytest.mark.parametrize("sizes", [SMALL, Sizes(), Sizes(shard=64, part=7, note=9)])
def test_bytes_are_counted_over_any_stretch(text, sizes):
    result = encoded(text, sizes=sizes)
    lengths = [len(char.encode()) for char in TEXT]
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(TEXT) + 1, size=(100, 2))).tolist():
        assert result.count_bytes(start, stop) == sum(lengths[start:stop])
    assert result.count_bytes(0, len(TEXT)) == len(TEXT.encode())


def test_memory_is_that_of_a_part_and_not_of_the_text(tmp_path):
    peaks = []
    for repeats in (10, 40):
        path = tmp_path / f"{repeats}.txt"
        path.write_text(TEXT * 500 * repeats, encoding="utf-8")
        tracemalloc.start()
        result = encoded(path, sizes=Sizes(part=1 << 17))
        result.count_bytes(1000, result.tokens.size - 1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert result.tokens.size == len(TEXT) * 500 * repeats
    assert peaks[1] < peaks[0] + 200_000


# Later runs -----------------------------------------------------------------------------------


def test_later_runs_map_what_is_there_and_read_no_text(text, told, monkeypatch):
    first = encoded(text)
    monkeypatch.setattr(store, "iter_chunks", None)
    monkeypatch.setattr(store, "compute_file_sha256", None)
    again = encoded(text, told)
    assert told == []
    assert np.asarray(again.tokens).tolist() == np.asarray(first.tokens).tolist()
    monkeypatch.chdir(text.parent)
    assert decoded(encoded("text.txt", told)) == TEXT
    assert told == []
    assert not again.tokens[:5].flags.writeable


def test_a_file_that_was_only_touched_is_hashed_once(text, told, monkeypatch):
    encoded(text)
    hashed = []
    real = store.file_sha256
    monkeypatch.setattr(
        store, "compute_file_sha256", lambda path: hashed.append(path) or real(path)
    )
    monkeypatch.setattr(store, "iter_chunks", None)
    os.utime(text, (1, 1))
    for _ in range(2):
        assert decoded(encoded(text, told)) == TEXT
    assert hashed[:1] == hashed[-1:] == [text]
    assert len(hashed) <= 2  # at a look without the lock, and once more under it
    assert told == []


@pytest.mark.parametrize("change", ["content", "length", "another file", "a file less"])
def test_a_changed_text_is_encoded_again_and_said_so(tmp_path, told, change):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("abcab", encoding="utf-8")
    (folder / "b.txt").write_text("bcbcb", encoding="utf-8")
    old = encoded(folder)
    if change == "a file less":
        (folder / "b.txt").unlink()
    else:
        name = "c.txt" if change == "another file" else "a.txt"
        (folder / name).write_text({"content": "aXcab"}.get(change, "abcX"), encoding="utf-8")
        os.utime(folder / name, (1, 1))
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()))
    assert decoded(encoded(folder, told)) == text
    assert [line for line in told if "has changed" in line] == [
        f"{folder} has changed since it was encoded: encoding it again"
    ]
    assert decoded(old) == "abcabbcbcb"  # whoever has the old one mapped keeps it
    assert len(files_of(tmp_path / "cache", "marks.bin")) == 1


def test_encodings_by_other_tokenizers_stand_side_by_side(text, told, tmp_path):
    own, other = encoded(text), CharTokenizer(sorted(set(TEXT), reverse=True))
    assert decoded(encoded(text, told, tokenizer=other)) == TEXT
    assert any(line.startswith("Encoding ") for line in told)
    told.clear()
    assert decoded(encoded(text, told, tokenizer=other)) == TEXT
    assert np.asarray(encoded(text, told).tokens).tolist() == np.asarray(own.tokens).tolist()
    assert told == []
    assert len(files_of(tmp_path / "cache", "marks.bin")) == 2


def damaged_manifest(directory: Path, change) -> None:
    (path,) = directory.rglob("manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(next(iter(manifest["encodings"].values())))
    path.write_text(json.dumps(manifest), encoding="utf-8")


DAMAGES = {
    "a truncated shard": (
        lambda cache: os.truncate(files_of(cache, "shard_*")[2], 50),
        "shard_00002.bin has 50 bytes, and should have 97",
    ),
    "a shard that is gone": (
        lambda cache: files_of(cache, "shard_*")[-1].unlink(),
        "shard_00005.bin has 0 bytes, and should have 62",
    ),
    "marks that are gone": (
        lambda cache: files_of(cache, "marks*")[0].unlink(),
        "marks.bin is not whole",
    ),
    "another tokenizer": (
        lambda cache: damaged_manifest(cache, lambda known: known["tokenizer"]["chars"].reverse()),
        "made with another tokenizer",
    ),
    "another text": (
        lambda cache: damaged_manifest(cache, lambda known: known.update(text="0")),
        "made from another text",
    ),
    "another type": (
        lambda cache: damaged_manifest(cache, lambda known: known.update(dtype="<u4")),
        "its type is <u4, and should be |u1",
    ),
    "files that are not the text's": (
        lambda cache: damaged_manifest(cache, lambda known: known["ends"].append(known["tokens"])),
        "made from another text",
    ),
    "no manifest": (
        lambda cache: files_of(cache, "manifest.json")[0].write_text("{"),
        "manifest.json cannot be read: encoding",
    ),
    "a manifest of another version": (
        lambda cache: files_of(cache, "manifest.json")[0].write_text('{"format_version": 2}'),
        "manifest.json cannot be read: encoding",
    ),
}


WRONG = [
    ("shard", 0),
    ("tokens", -5),
    ("marks", -1),
    ("ends", []),
    ("ends", [600, 547]),
    ("ends", [546]),
    ("dtype", "<f4"),
]
for key, value in WRONG:
    DAMAGES[f"{key} {value}"] = (
        lambda cache, key=key, value=value: damaged_manifest(
            cache, lambda known: known.update({key: value})
        ),
        "manifest.json cannot be read: encoding",
    )


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_store_is_made_again_and_said_so_in_one_line(text, told, tmp_path, damage, words):
    encoded(text)
    damage(tmp_path / "cache")
    assert decoded(encoded(text, told)) == TEXT
    (line,) = [line for line in told if "again" in line]
    assert words in line
    assert "\n" not in line
    told.clear()
    assert decoded(encoded(text, told)) == TEXT
    assert told == []


# Whatever stops it ----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_an_encoding_killed_at_any_call_goes_on_to_the_same_ids(text, tmp_path, every):
    def work() -> None:
        encoded(text)

    with pytest.MonkeyPatch.context() as patch:
        calls = Faults(killed).installed(patch)
        work()
    assert calls.count > 40
    for strike in (killed, powerless):
        went_on = 0
        for at in range(0, calls.count, every):
            shutil.rmtree(tmp_path / "cache")
            in_a_process_that_ends_at(at, strike, work)
            told = Told()
            assert decoded(encoded(text, told)) == TEXT, at
            went_on += any("of which" in line for line in told)
            if any(line.startswith("Encoded") for line in told):
                assert not files_of(tmp_path / "cache", "progress.json")
                assert not files_of(tmp_path / "cache", "*.tmp")
        assert went_on > 2


def test_an_encoding_that_is_interrupted_goes_on_where_it_was(text, told, monkeypatch):
    real, calls = CharTokenizer.encode, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(CharTokenizer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoded(text, sizes=Sizes(part=60))
    assert decoded(encoded(text, told, sizes=Sizes(part=60))) == TEXT
    assert "of which 180 B are there" in told[0]


def unpublished(cache: Path) -> tuple[Path, dict]:
    """Take the encoding out of the manifest; its marks, and a note as it was made amid it."""
    (manifest,), (marks,) = files_of(cache, "manifest.json"), files_of(cache, "marks.bin")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**content, "encodings": {}}), encoding="utf-8")
    _, tokens, size = np.fromfile(marks, "<i8").reshape(-1, 3)[4].tolist()
    digest = hashlib.sha256(TEXT.encode()[:size]).hexdigest()
    place = {"file": 0, "end": size, "tokens": tokens, "bytes": size, "marks": 5}
    return marks, {"shard": 97, "sha256": digest, **place}


def test_what_is_not_on_the_disk_of_what_was_noted_is_encoded_again(text, told, tmp_path):
    encoded(text)
    marks, note = unpublished(tmp_path / "cache")
    for path in (None, marks, marks.with_name("shard_00001.bin"), marks.with_name("gone")):
        if path is not None and path.exists():
            os.truncate(path, 3)
        marks.with_name("progress.json").write_text(json.dumps(note), encoding="utf-8")
        assert decoded(encoded(text, told)) == TEXT
        assert ("of which 300 B are there" in told[0]) == (path is None or path.name == "gone")
        told.clear()
        unpublished(tmp_path / "cache")


@pytest.mark.parametrize(
    "change",
    [
        {"file": 9},
        {"file": -1},
        {"end": 10**9},
        {"end": 240},
        {"tokens": -5},
        {"tokens": 10**15},
        {"bytes": 1},
        {"marks": 0},
        {"marks": 4},
        {"sha256": ""},
    ],
    ids=str,
)
def test_a_damaged_note_never_makes_other_ids(text, tmp_path, change):
    encoded(text)
    marks, note = unpublished(tmp_path / "cache")
    marks.with_name("progress.json").write_text(json.dumps({**note, **change}), encoding="utf-8")
    with contextlib.suppress(UserError):
        encoded(text)
    assert decoded(encoded(text)) == TEXT


@pytest.mark.parametrize("name", ["manifest.json", "progress.json", "marks.bin", "shard_00002.bin"])
def test_a_directory_where_a_file_should_be_is_named(text, tmp_path, name):
    encoded(text)
    marks, _ = unpublished(tmp_path / "cache")
    at = marks.parent.parent / name if name == "manifest.json" else marks.with_name(name)
    at.unlink(missing_ok=True)
    at.mkdir()
    with pytest.raises(UserError, match=rf"/{name}: a directory, where a file is wanted: remove"):
        encoded(text)
    at.rmdir()
    assert decoded(encoded(text)) == TEXT


def test_what_folio_writes_is_never_among_what_it_reads(tmp_path):
    folder = tmp_path / "texts"
    (folder / "runs" / "1").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    written = {"runs_dir": str(folder / "runs")}
    for cache in ("", "cache", "deep/cache", ".."):
        with pytest.raises(
            UserError, match=r"texts: cache_dir .* lies in it, .* another cache_dir"
        ):
            open_corpus(str(folder), cache_dir=str(folder / cache))
    with pytest.raises(UserError, match=r"texts: runs_dir .*runs lies in it"):
        open_corpus(str(folder), written=written)
    pattern = str(folder / "**" / "*.txt")
    for data in (str(folder / "a.txt"), pattern):
        open_corpus(data, cache_dir=str(folder / "cache"), written=written)
    open_corpus(str(folder), cache_dir=str(folder / ".cache"))
    (folder / "runs" / "1" / "log.txt").touch()
    with pytest.raises(UserError, match=r"txt: runs_dir .*runs lies in it"):
        open_corpus(pattern, written=written)


def test_a_file_may_be_of_any_size():
    assert store.Source(path="", size=1 << 45, bytes=1 << 46, mtime_ns=0, sha256="").size == 1 << 45


def test_of_shards_of_another_size_nothing_is_of_use(text, told, tmp_path):
    encoded(text)
    marks, note = unpublished(tmp_path / "cache")
    marks.with_name("progress.json").write_text(json.dumps(note), encoding="utf-8")
    assert decoded(encoded(text, told, Sizes(shard=50, part=60))) == TEXT
    assert "of which" not in told[0]


OTHER = TEXT.translate(str.maketrans("et", "te"))  # as long, and of the same characters


def meanwhile(monkeypatch, *steps) -> None:
    """Call a step before each part that is encoded, as many as there are."""
    real, left = CharTokenizer.encode, [lambda: None, *steps]  # first, the characters are looked at

    def encode(self, *arguments):
        if left:
            left.pop(0)()
        return real(self, *arguments)

    monkeypatch.setattr(CharTokenizer, "encode", encode)


def rewrite(path: Path, content: str) -> None:
    """Change a file, and leave it the time that it had."""
    status = path.stat()
    path.write_text(content, encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_text_that_changes_and_is_put_back_is_never_published(text, tmp_path, monkeypatch):
    meanwhile(
        monkeypatch,
        lambda: rewrite(text, OTHER),
        *[lambda: None] * 4,
        lambda: rewrite(text, TEXT),
    )
    with pytest.raises(UserError, match=r"text\.txt was changed while it was read: try again"):
        encoded(text)
    assert not files_of(tmp_path / "cache", "progress.json")
    assert decoded(encoded(text)) == TEXT


def test_a_text_that_was_first_read_amid_a_change_is_read_again(text, monkeypatch):
    real = store.characters_in

    def changed(texts):
        rewrite(text, OTHER)
        found = real(texts)
        rewrite(text, TEXT)
        return found

    with monkeypatch.context() as patch, pytest.raises(UserError, match="try again"):
        patch.setattr(store, "collect_chars", changed)
        encoded(text)
    assert decoded(encoded(text)) == TEXT


def test_ids_of_what_the_text_never_was_are_not_gone_on_from(text, tmp_path, monkeypatch):
    meanwhile(monkeypatch, lambda: rewrite(text, OTHER), *[lambda: None] * 4, interrupt)
    with pytest.raises(KeyboardInterrupt):
        encoded(text)
    assert files_of(tmp_path / "cache", "progress.json")
    rewrite(text, TEXT)
    with pytest.raises(UserError, match=r"text\.txt was changed while it was read: try again"):
        encoded(text)
    assert decoded(encoded(text)) == TEXT


def test_a_text_that_grows_while_it_is_encoded_is_named_and_said_so(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(TEXT, encoding="utf-8")
    meanwhile(monkeypatch, lambda: (folder / "b").write_text(TEXT + "ζ", encoding="utf-8"))
    with pytest.raises(UserError, match=r"folder/b was changed while it was read: try again"):
        encoded(folder)
    assert not files_of(tmp_path / "cache", "progress.json")


@pytest.mark.parametrize("how", ["whole", "interrupted"])
def test_the_same_bytes_in_other_files_are_another_text(tmp_path, monkeypatch, how):
    folder = tmp_path / "folder"
    folder.mkdir()
    first, second = TEXT[:200], "\ufeff" + TEXT[200:]
    for parts in ((first, second), (first + second, ""), (first[:-9], first[-9:] + second)):
        for name, content in zip("ab", parts, strict=True):
            (folder / name).write_text(content, encoding="utf-8")
        if how == "interrupted":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                meanwhile(patch, *[lambda: None] * 5, interrupt)
                encoded(folder)
        in_memory = open_corpus(str(folder), token_store="off")
        expected = in_memory.encode(in_memory.create_tokenizer("char"))
        found = encoded(folder)
        assert decoded(found) == decoded(expected)
        assert list(found.ends) == list(expected.ends)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_full_disk_is_one_line_and_loses_nothing(text, tmp_path, lasting):
    good = tmp_path / "good.txt"
    good.write_text("good as gold", encoding="utf-8")
    encoded(good)
    with pytest.MonkeyPatch.context() as patch:
        calls = Faults(killed).installed(patch)
        encoded(text)
    went_on = 0
    for at in range(0, calls.count, 6):
        shutil.rmtree(next((tmp_path / "cache" / "folio" / "texts").glob("text.txt-*")))
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(refused(errno.ENOSPC), at, lasting).installed(patch)
            try:
                encoded(text)
            except RunError as error:
                assert "No space left on device: " in str(error)
                assert "what there is of it is kept" in str(error)
                assert "\n" not in str(error)
            else:
                assert "unlink" in faults.names[at:]  # a removal that failed hurts nobody
        told = Told()
        assert decoded(encoded(text, told)) == TEXT
        went_on += any("of which" in line for line in told)
        told.clear()
        assert decoded(encoded(good, told)) == "good as gold"
        assert told == []
    assert went_on > 2


def test_a_full_disk_leaves_the_store_of_the_text_as_it_was(text, tmp_path):
    encoded(text)
    (shard, *_) = files_of(tmp_path / "cache", "shard_*")
    text.write_text("another text", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        Faults(refused(errno.ENOSPC), 12, lasting=True).installed(patch)
        with pytest.raises(RunError):
            encoded(text)
    assert shard.exists()
    text.write_text(TEXT, encoding="utf-8")
    told = Told()
    assert decoded(encoded(text, told)) == TEXT
    assert not any(line.startswith("Encoding ") for line in told)  # what it was is there yet


def test_a_cache_that_cannot_be_written_is_a_mistake_that_names_the_setting(text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the cache .*file cannot be written: .*--cache-dir"):
        open_corpus(str(text), token_store="on", cache_dir=str(tmp_path / "file"))


def test_a_store_is_used_from_a_cache_that_cannot_be_written(text, tmp_path, monkeypatch):
    encoded(text)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store, "make_directory", refuse)
    monkeypatch.setattr(store, "write_atomic", refuse)
    assert decoded(encoded(text)) == TEXT


def test_a_text_that_changes_while_it_is_read_is_refused(text, monkeypatch):
    real = store.characters_in

    def meanwhile(texts):
        found = real(texts)
        text.write_text("shorter", encoding="utf-8")
        return found

    monkeypatch.setattr(store, "collect_chars", meanwhile)
    with pytest.raises(UserError, match=r"text.txt was changed while it was read: try again"):
        encoded(text)
    monkeypatch.undo()
    found = stored(text)
    text.write_text("another", encoding="utf-8")
    with pytest.raises(UserError, match="was changed while it was read: try again"):
        found.encode(found.create_tokenizer("char"))


def test_of_two_at_once_the_second_waits_and_maps(text, told):
    directory = stored(text).directory
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    results = []
    with lock:
        waiting = threading.Thread(target=lambda: results.append(decoded(encoded(text, told))))
        waiting.start()
        until = time.monotonic() + 20
        while not told and time.monotonic() < until:
            time.sleep(0.01)
        assert told == [f"Another process is encoding {text}: waiting for it …"]
        assert not results
    waiting.join(20)
    assert results == [TEXT]


def test_an_empty_text_is_an_error_and_leaves_no_store(tmp_path):
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    for token_store in ("on", "off"):
        with pytest.raises(UserError, match=r"mark\.txt: the file is empty"):
            open_corpus(str(tmp_path / "mark.txt"), token_store=token_store)
    assert not files_of(tmp_path, "manifest.json")


# Splits ---------------------------------------------------------------------------------------


def cut(ends, **settings) -> dict:
    tokens = np.zeros(ends[-1], dtype=np.uint8)
    return EncodedCorpus(tokens, CharTokenizer(["a"]), ends).splits(Data(**settings))


def test_a_text_is_cut_where_the_fractions_say():
    settings = {"train_split": 0.61, "test_split": 0.17}
    assert cut([100], **settings) == {"train": (0, 61), "val": (61, 83), "test": (83, 100)}


def test_files_are_cut_at_the_nearest_end_of_one():
    by_file = {"split_by": "file"}
    assert cut([10, 30, 88, 99, 100], **by_file)["val"] == (88, 100)
    assert cut([40, 100], train_split=0.9, **by_file)["train"] == (0, 40)
    two = {"train_split": 0.8, "test_split": 0.1, **by_file}
    assert cut([20, 78, 93, 100], **two) == {"train": (0, 78), "val": (78, 93), "test": (93, 100)}
    assert cut([20, 88, 100], **two) == {"train": (0, 20), "val": (20, 88), "test": (88, 100)}
    assert cut([0, 85, 85, 99, 100], **two)["val"] == (85, 99)  # both were nearest to 85


@pytest.mark.parametrize(
    ("ends", "test_split", "words"),
    [
        ([100], 0.0, "there are 2 splits, and 1 file that has text"),
        ([0, 100, 100], 0.0, "there are 2 splits, and 1 file that has text"),
        ([50, 100], 0.1, "there are 3 splits, and 2 files that have text"),
    ],
)
def test_too_few_files_are_a_mistake(ends, test_split, words):
    with pytest.raises(UserError, match=words):
        cut(ends, split_by="file", test_split=test_split)


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
    one, other = cuts_between_files(ends, train_end, val_end)
    assert 0 < one < other <= ends[-1]
    assert {one, other} <= set(ends)
    assert (other == ends[-1]) == (val_end == ends[-1])


# Shards ---------------------------------------------------------------------------------------


@given(size=st.integers(1, 50), shard=st.integers(1, 20), data=st.data())
def test_shards_are_read_as_one_array_is(size, shard, data):
    whole = np.arange(size, dtype=np.uint16)
    tokens = ShardedTokens([whole[i : i + shard] for i in range(0, size, shard)], shard)
    bound = st.integers(0, size)
    for _ in range(2):  # a view, and a view of a view
        start, stop = data.draw(bound), data.draw(bound)
        view, expected = tokens[start:stop], whole[start:stop]
        assert (len(view), view.size, view.dtype) == (expected.size, expected.size, expected.dtype)
        assert np.asarray(view).tolist() == view.astype("int64").tolist() == expected.tolist()
        if isinstance(view, np.ndarray):
            break
        places = np.array(data.draw(st.lists(st.integers(0, view.size - 1), max_size=12)), int)
        assert view[places].tolist() == expected[places].tolist()
        assert view[places.reshape(1, -1, 1)].shape == (1, places.size, 1)
        assert int(view[view.size - 1]) == expected[-1]
        for outside in (-1, view.size):
            with pytest.raises(IndexError):
                view[np.array([outside])]
        tokens, whole, bound = view, expected, st.integers(0, view.size)
