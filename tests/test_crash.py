"""A crash at any system call of a save leaves the old bundle or the new one.

A process is forked and killed before each call that changes the disk, or killed and its unsynced
data lost, or the call fails with "disk full". The directory must then load as the old bundle or
the new one, and the next save must leave no temporary files.

python -m pytest tests/test_crash.py
"""

import errno
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    DEAD_PROCESS,
    REAL_WRITE_WITH,
    Faults,
    count_calls,
    in_a_process_that_ends_at,
    killed,
    list_names,
    powerless,
    refused,
    save_bundle,
)
from safetensors.torch import load

from bundle import (
    BUNDLE_FILES,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    _host,
    clean_up,
    copy_bundle,
    is_bundle,
    read_bundle,
    remove_bundle,
)
from utils import files
from utils.errors import UserError

OLD, NEW, NEXT = 7, 8, 9  # the steps of three bundles


def assert_loads(directory: Path, *steps: int) -> int:
    """Assert that the directory loads as the bundle of one of these steps, and return its step."""
    bundle = read_bundle(directory, WEIGHTS_FILE)
    assert bundle.state.step in steps
    torch.manual_seed(bundle.state.step)
    reference = directory.parent / f"reference-{bundle.state.step}"
    expected = load((reference / WEIGHTS_FILE).read_bytes())
    weights = load(bundle.contents[WEIGHTS_FILE])
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    if bundle.state.optimizer_file:
        saved = read_bundle(directory, OPTIMIZER_FILE).contents[OPTIMIZER_FILE]
        assert saved == (reference / OPTIMIZER_FILE).read_bytes()
    return bundle.state.step


@pytest.fixture
def place(tmp_path) -> Path:
    """A directory to publish in, beside a reference bundle for each step."""
    for step in (OLD, NEW, NEXT):
        save_bundle(tmp_path / f"reference-{step}", step)
    return tmp_path / "model"


def save(directory: Path, step: int) -> None:
    save_bundle(directory, step)


def copy(directory: Path) -> None:
    copy_bundle(directory.parent / f"reference-{NEW}", directory)


def copy_export(directory: Path) -> None:
    copy_bundle(directory.parent / f"reference-{NEW}", directory, with_optimizer=False)


def publish_half(directory: Path) -> None:
    """Leave a committed bundle, half of its files moved up."""
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(killed).installed(patch)
        save(directory.with_name(f"elsewhere-{directory.name}"), OLD)
        names = faults.names
    middle = len(names) - 1 - names[::-1].index("replace") - 2  # two moves before the last
    in_a_process_that_ends_at(middle, killed, lambda: save(directory, OLD))
    assert list(directory.glob(".next-*/*")) and len(list(directory.glob(".next-*/*"))) < 5


SAVES = {
    "replace": (lambda d: save(d, OLD), lambda d: save(d, NEW)),
    "create": (lambda d: None, lambda d: save(d, NEW)),
    "replace a half published one": (publish_half, lambda d: save(d, NEW)),
    "copy": (lambda d: save(d, OLD), copy),
    "export over a checkpoint": (lambda d: save(d, OLD), copy_export),
}
HALF = "replace a half published one"  # has the most calls to fail at
SOME_SLOW = [
    pytest.param(*functions, id=name, marks=[pytest.mark.slow] if name == HALF else [])
    for name, functions in SAVES.items()
]


@pytest.mark.parametrize("strike", [killed, powerless])
@pytest.mark.parametrize(("before", "work"), SOME_SLOW)
def test_a_killed_save_leaves_the_old_or_the_new_bundle(place, before, work, strike, tmp_path):
    before(tmp_path / "counted")
    calls = count_calls(lambda: work(tmp_path / "counted"))
    assert calls > 15
    outcomes = []
    for at in range(calls):
        directory = tmp_path / f"model-{at}"
        before(directory)
        existed = is_bundle(directory)
        if existed:
            (directory / "notes.txt").write_text("notes", encoding="utf-8")
        in_a_process_that_ends_at(at, strike, lambda: work(directory))  # noqa: B023
        if existed or is_bundle(directory):
            outcomes.append(assert_loads(directory, OLD, NEW))
        save(directory, NEXT)  # works, and removes leftovers
        assert assert_loads(directory, NEXT) == NEXT
        own = ["notes.txt"] if existed else []
        assert list_names(directory) == sorted([*BUNDLE_FILES, *own])
        if own:
            assert (directory / "notes.txt").read_text(encoding="utf-8") == "notes"
    assert NEW in outcomes, "no process was killed after the commit"


@pytest.mark.parametrize(
    ("number", "lasting"),
    [
        pytest.param(errno.ENOSPC, True, id="disk full from then on"),
        pytest.param(errno.EIO, False, id="one I/O error"),
        pytest.param(errno.ENOSPC, False, id="disk full once", marks=pytest.mark.slow),
        pytest.param(errno.EIO, True, id="I/O errors from then on", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("before", "work"), SOME_SLOW)
def test_a_failed_call_leaves_the_old_or_the_new_bundle(
    place, before, work, number, lasting, tmp_path
):
    before(tmp_path / "counted")
    calls = count_calls(lambda: work(tmp_path / "counted"))
    failures = 0
    for at in range(calls):
        directory = tmp_path / f"model-{at}"
        before(directory)
        existed = is_bundle(directory)
        with pytest.MonkeyPatch.context() as patch:
            Faults(refused(number), at, lasting).installed(patch)
            try:
                work(directory)
            except OSError as error:
                assert error.errno == number
                failures += 1
        if existed or is_bundle(directory):
            assert_loads(directory, OLD, NEW)
        elif not lasting:
            assert not directory.exists() or list_names(directory) == []
        save(directory, NEXT)
        assert assert_loads(directory, NEXT) == NEXT
        assert list_names(directory) == sorted(BUNDLE_FILES)
    assert failures > 10


def test_a_killed_removal_leaves_the_whole_bundle_or_none(place, tmp_path):
    save(tmp_path / "counted", OLD)
    calls = count_calls(lambda: remove_bundle(tmp_path / "counted"))
    assert not (tmp_path / "counted").exists()
    for at in range(calls):
        directory = tmp_path / f"model-{at}"
        save(directory, OLD)
        in_a_process_that_ends_at(at, killed, lambda: remove_bundle(directory))  # noqa: B023
        if is_bundle(directory):
            assert_loads(directory, OLD)
            remove_bundle(directory)
        clean_up(directory)
        assert not directory.exists()


def test_faults_cover_every_call_that_changes_the_disk(place, tmp_path):
    """Python's audit hooks see the same calls in a save as `Faults`."""
    save(tmp_path / "model", OLD)
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        seen: list[str] = []
        changing = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}

        def hook(event: str, arguments: tuple) -> None:
            opened = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
            if event in changing or event.startswith("shutil.") or opened:
                seen.append(event)

        counted: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(killed).installed(patch)
            # Without the wrapper around the libraries, which truncates and writes itself.
            patch.setattr(files, "write_with", REAL_WRITE_WITH)
            sys.addaudithook(hook)
            save(tmp_path / "model", NEW)
            counted = faults.names
        events = {"mkdir": "os.mkdir", "replace": "os.rename", "unlink": "os.remove"}
        events |= {"rmdir": "os.rmdir", "chmod": "os.chmod", "write": "open"}
        # torch.save opens its file through Python, too.
        expected = sorted([*(events[name] for name in counted if name in events), "open"])
        os.write(write, b"same" if expected == sorted(seen) else f"{expected} {seen}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(process, 0)
    assert os.read(read, 10_000).decode() == "same"


def test_only_leftovers_of_ended_processes_are_removed(place):
    save(place, OLD)
    host, day = _host(), 86_400
    living, other_host = f".tmp-{os.getppid()}-{host}", ".tmp-1-elsewhere"
    dead, old = f".tmp-{DEAD_PROCESS}", ".tmp-2-elsewhere"
    for name in (living, other_host, dead, old, f".tmp-{os.getpid()}-{host}"):
        (place / name).mkdir()
        (place / name / WEIGHTS_FILE).touch()
        (place / name / ".tmp3CziYK").touch()  # a temporary file of safetensors
    os.utime(place / old, (0, time.time() - 2 * day))
    save(place, NEW)
    assert {path.name for path in place.glob(".tmp-*")} == {living, other_host}


def test_a_half_published_bundle_with_another_bundles_file_is_an_error(place, tmp_path):
    publish_half(place)
    other = (tmp_path / f"reference-{NEW}" / WEIGHTS_FILE).read_bytes()
    (place / WEIGHTS_FILE).write_bytes(other)
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        read_bundle(place, WEIGHTS_FILE)
