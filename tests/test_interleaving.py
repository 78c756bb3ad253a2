"""Two processes may work in one directory in any order.

One process is paused before a system call that reads or changes the disk, another one does all of
its work, and the first continues: at each such call, one by one.

python -m pytest tests/test_interleaving.py
"""

import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import DEAD_PROCESS, list_names, save_bundle

from bundle import (
    BUNDLE_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    clean_up,
    copy_bundle,
    is_bundle,
    list_checkpoints,
    list_runs,
    read_bundle,
    remove_bundle,
)
from checkpoint import CheckpointWriter
from inference import find_newest_usable_bundle
from inspect_model import check_files, get_model_info
from parameters import ModelConfig
from resume import lock_named_model
from utils.errors import UserError
from utils.run_manager import RunDirectory

CALLS = (
    open,
    os.open,
    os.access,
    os.listdir,
    os.scandir,
    os.mkdir,
    os.replace,
    os.unlink,
    os.rmdir,
)
OLD, NEW = 7, 8  # the steps of two bundles
NEVER_REACHED = 3


def fork(work: Callable[[], object]) -> Callable[[], int]:
    """Fork, and return a function that runs `work` there and returns the exit status.

    The status is 1 if `work` raises. The process ends without work if that is never called.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(writer)
        try:
            if os.read(reader, 1):
                work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(reader)

    def do() -> int:
        os.write(writer, b"!")
        os.close(writer)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    return do


def run_interrupted(number: int, work: Callable[[], object], other: Callable[[], object]) -> int:
    """Run `work` in a process, pause it before the call `number`, run `other`, and continue."""

    def run() -> None:
        calls = itertools.count()
        run_other = fork(other)  # forked now: filelock allows no fork in its calls

        def hook(frame, event: str, function) -> None:
            about_to_call = event == "c_call" and function in CALLS
            if about_to_call and next(calls) == number and run_other():
                os._exit(2)

        sys.setprofile(hook)
        work()
        sys.setprofile(None)
        if next(calls) <= number:
            os._exit(NEVER_REACHED)

    return fork(run)()


@pytest.fixture
def place(tmp_path) -> Path:
    """The path of a run's checkpoint; the bundles that are copied there are in `tmp_path`."""
    for step in (OLD, NEW):
        save_bundle(tmp_path / f"saved-{step}", step)
    return RunDirectory(tmp_path / "runs" / "20260131_235959_other").get_checkpoint(NEW)


def get_runs_dir(checkpoint: Path) -> Path:
    return checkpoint.parents[3]


def get_saved(step: int, checkpoint: Path) -> Path:
    return get_runs_dir(checkpoint).parent / f"saved-{step}"


# Before


def leave_nothing(directory: Path) -> None:
    directory.parent.mkdir(parents=True)


def leave_empty(directory: Path) -> None:
    directory.mkdir(parents=True)


def publish_old(directory: Path) -> None:
    copy_bundle(get_saved(OLD, directory), directory)


def leave_unfinished(directory: Path) -> None:
    unfinished = directory / f".tmp-{DEAD_PROCESS}"
    unfinished.mkdir(parents=True)
    for name in (WEIGHTS_FILE, ".tmp3CziYK"):
        (unfinished / name).touch()


def leave_committed(directory: Path) -> None:
    shutil.copytree(get_saved(NEW, directory), directory / f".next-{DEAD_PROCESS}")


def leave_half_published(directory: Path) -> None:
    publish_old(directory)
    leave_committed(directory)
    (directory / f".next-{DEAD_PROCESS}" / CONFIG_FILE).replace(directory / CONFIG_FILE)


# The work of a process


def save(directory: Path) -> None:
    copy_bundle(get_saved(NEW, directory), directory)


def read(directory: Path) -> None:
    assert is_bundle(directory)
    assert read_bundle(directory, WEIGHTS_FILE).state.step in (OLD, NEW)
    check_files(directory)
    assert get_model_info(directory)["parameters"]["total"] == 848


def find_newest(directory: Path) -> None:
    assert list_checkpoints(directory.parents[2]) == [directory]
    assert find_newest_usable_bundle(get_runs_dir(directory)).path == directory


def list_all(directory: Path) -> None:
    for run in list_runs(get_runs_dir(directory)):
        list_checkpoints(run)


def start_saving(directory: Path) -> None:
    """Start saving in another run of the same `runs_dir`."""
    run = RunDirectory(get_runs_dir(directory) / "20260201_000000_own")
    CheckpointWriter(run, None, *[None] * 4, ModelConfig())._clean_up_runs()


def lock_name(directory: Path) -> None:
    """Lock the directory as a named model's."""
    try:
        with lock_named_model(directory):
            pass
    except UserError as error:
        assert "another process" in str(error)


def remove_run(directory: Path) -> None:
    shutil.rmtree(directory.parents[2])


# After


def assert_whole(directory: Path) -> None:
    assert list_names(directory) == sorted(BUNDLE_FILES)
    check_files(directory)


def assert_readable(directory: Path) -> None:
    check_files(directory)


def assert_gone(directory: Path) -> None:
    assert not directory.exists()


PAIRS = [
    (leave_nothing, save, clean_up, assert_whole),
    (publish_old, save, clean_up, assert_whole),
    (leave_empty, clean_up, save, assert_whole),
    (publish_old, clean_up, save, assert_whole),
    (leave_unfinished, save, clean_up, assert_whole),
    (leave_unfinished, clean_up, save, assert_whole),
    (leave_half_published, save, clean_up, assert_whole),
    (leave_unfinished, clean_up, clean_up, assert_gone),
    (leave_committed, clean_up, clean_up, assert_whole),
    (leave_half_published, clean_up, clean_up, assert_whole),
    (publish_old, clean_up, remove_bundle, assert_gone),
    (leave_half_published, clean_up, remove_bundle, assert_gone),
    (publish_old, remove_bundle, clean_up, assert_gone),
    (leave_half_published, remove_bundle, clean_up, assert_gone),
    (publish_old, start_saving, remove_run, assert_gone),
    (leave_half_published, start_saving, remove_run, assert_gone),
    (publish_old, list_all, remove_run, assert_gone),
    (leave_nothing, lock_name, lock_name, assert_gone),
    (publish_old, read, save, assert_readable),
    (leave_committed, read, clean_up, assert_readable),
    (leave_half_published, read, clean_up, assert_readable),
    (publish_old, find_newest, save, assert_readable),
    (leave_committed, find_newest, clean_up, assert_readable),
]


@pytest.mark.stress
@pytest.mark.parametrize(
    ("before", "work", "other", "check"),
    [pytest.param(*each, id="-".join(step.__name__ for step in each[:3])) for each in PAIRS],
)
def test_two_processes_in_one_directory_both_succeed(place, before, work, other, check, capfd):
    for number in itertools.count():
        shutil.rmtree(get_runs_dir(place), ignore_errors=True)
        before(place)
        status = run_interrupted(number, lambda: work(place), lambda: other(place))
        if status == NEVER_REACHED:
            break
        assert status == 0, f"at call {number}: {capfd.readouterr().err}"
        check(place)
    assert number > 1
