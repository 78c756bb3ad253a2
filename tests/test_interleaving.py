"""Processes that work in one directory do not trip over each other, whatever the order.

One process stops before a look at the disk, or a change of it; another does all of its work; the
first goes on. So at each of the calls of the operating system below, one by one.

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
from helpers import save_bundle

from bundle import (
    BUNDLE_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    _host,
    check_files,
    clean_up,
    copy_bundle,
    find_newest_usable_bundle,
    get_model_info,
    is_bundle,
    list_checkpoints,
    list_runs,
    read_bundle,
    remove_bundle,
)
from checkpoint import CheckpointWriter
from parameters import ModelConfig
from start import lock_named_model
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
DEAD = f"{2**30}-{_host()}"  # a process that is no more
NEVER_REACHED = 3


def in_another_process(work: Callable[[], object]) -> Callable[[], int]:
    """Fork. What is returned has `work` done there, and gives the exit status: 1 where it raises.

    Nothing is done where that is never called.
    """
    told, tell = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(tell)
        try:
            if os.read(told, 1):
                work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(told)

    def do() -> int:
        os.write(tell, b"!")
        os.close(tell)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    return do


def interrupted_at(number: int, work: Callable[[], object], other: Callable[[], object]) -> int:
    """Do `work` in a process, and before its call of this number `other` in another one."""

    def works() -> None:
        calls = itertools.count()
        does_other = in_another_process(other)  # forked now: filelock allows no fork in its calls

        def hook(frame, event: str, function) -> None:
            about_to_call = event == "c_call" and function in CALLS
            if about_to_call and next(calls) == number and does_other():
                os._exit(2)

        sys.setprofile(hook)
        work()
        sys.setprofile(None)
        if next(calls) <= number:
            os._exit(NEVER_REACHED)

    return in_another_process(works)()


@pytest.fixture
def place(tmp_path) -> Path:
    """Where a run's checkpoint is to be; what is copied there is in `tmp_path`."""
    for step in (OLD, NEW):
        save_bundle(tmp_path / f"saved-{step}", step)
    return RunDirectory(tmp_path / "runs" / "20260131_235959_other").get_checkpoint(NEW)


def runs_of(checkpoint: Path) -> Path:
    return checkpoint.parents[3]


def saved(step: int, checkpoint: Path) -> Path:
    return runs_of(checkpoint).parent / f"saved-{step}"


# What stands there before


def nothing(directory: Path) -> None:
    directory.parent.mkdir(parents=True)


def empty(directory: Path) -> None:
    directory.mkdir(parents=True)


def old(directory: Path) -> None:
    copy_bundle(saved(OLD, directory), directory)


def begun(directory: Path) -> None:
    unfinished = directory / f".tmp-{DEAD}"
    unfinished.mkdir(parents=True)
    for name in (WEIGHTS_FILE, ".tmp3CziYK"):
        (unfinished / name).touch()


def committed(directory: Path) -> None:
    shutil.copytree(saved(NEW, directory), directory / f".next-{DEAD}")


def half_published(directory: Path) -> None:
    old(directory)
    committed(directory)
    (directory / f".next-{DEAD}" / CONFIG_FILE).replace(directory / CONFIG_FILE)


# What one process does, and another one in the midst of it


def save(directory: Path) -> None:
    copy_bundle(saved(NEW, directory), directory)


def read(directory: Path) -> None:
    assert is_bundle(directory)
    assert read_bundle(directory, WEIGHTS_FILE).state.step in (OLD, NEW)
    check_files(directory)
    assert get_model_info(directory)["parameters"]["total"] == 848


def find(directory: Path) -> None:
    assert list_checkpoints(directory.parents[2]) == [directory]
    assert find_newest_usable_bundle(runs_of(directory)) == directory


def look_around(directory: Path) -> None:
    for run in list_runs(runs_of(directory)):
        list_checkpoints(run)


def begin_to_save(directory: Path) -> None:
    """In a run beside this one."""
    run = RunDirectory(runs_of(directory) / "20260201_000000_own")
    CheckpointWriter(run, None, *[None] * 4, ModelConfig())._clean_up_after_others()


def take_the_name(directory: Path) -> None:
    """As a named model's."""
    try:
        with lock_named_model(directory):
            pass
    except UserError as error:
        assert "is being trained by another process" in str(error)


def remove_run(directory: Path) -> None:
    shutil.rmtree(directory.parents[2])


# What is to stand there after


def is_whole(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == set(BUNDLE_FILES)
    check_files(directory)


def is_readable(directory: Path) -> None:
    check_files(directory)


def is_gone(directory: Path) -> None:
    assert not directory.exists()


MEETINGS = [
    (nothing, save, clean_up, is_whole),
    (old, save, clean_up, is_whole),
    (empty, clean_up, save, is_whole),
    (old, clean_up, save, is_whole),
    (begun, save, clean_up, is_whole),
    (begun, clean_up, save, is_whole),
    (half_published, save, clean_up, is_whole),
    (begun, clean_up, clean_up, is_gone),
    (committed, clean_up, clean_up, is_whole),
    (half_published, clean_up, clean_up, is_whole),
    (old, clean_up, remove_bundle, is_gone),
    (half_published, clean_up, remove_bundle, is_gone),
    (old, remove_bundle, clean_up, is_gone),
    (half_published, remove_bundle, clean_up, is_gone),
    (old, begin_to_save, remove_run, is_gone),
    (half_published, begin_to_save, remove_run, is_gone),
    (old, look_around, remove_run, is_gone),
    (nothing, take_the_name, take_the_name, is_gone),
    (old, read, save, is_readable),
    (committed, read, clean_up, is_readable),
    (half_published, read, clean_up, is_readable),
    (old, find, save, is_readable),
    (committed, find, clean_up, is_readable),
]


@pytest.mark.parametrize(
    ("before", "work", "other", "is_right"),
    [pytest.param(*each, id="-".join(step.__name__ for step in each[:3])) for each in MEETINGS],
)
def test_neither_of_two_processes_trips_over_the_other(place, before, work, other, is_right, capfd):
    for number in itertools.count():
        shutil.rmtree(runs_of(place), ignore_errors=True)
        before(place)
        status = interrupted_at(number, lambda: work(place), lambda: other(place))
        if status == NEVER_REACHED:
            break
        assert status == 0, f"at call {number}: {capfd.readouterr().err}"
        is_right(place)
    assert number > 1
