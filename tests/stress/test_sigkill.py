"""Hundreds of SIGKILLs at random moments of real training.

The children are forked from a process that has imported everything, so that they are killed while
they train: they save after every step or two, and each resumes the run of the last one.

make test-stress
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers import (
    BUNDLE_FILES_OF_EXPORT,
    assert_same_bits,
    list_names,
    list_temporary_directories,
    resume_run,
    verify_bundle,
    verify_newest_step,
)

from bundle import BUNDLE_FILES, is_bundle, list_runs
from trainer import train
from utils.output import Output

KILLS = 250
STEPS = 10_000  # more than all children together reach


def fork_training(flags: dict) -> int:
    """Fork a child that resumes or starts, and trains. Returns its process id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            resume_run("auto", flags)
            status = 0
        finally:
            os._exit(status)
    return process


@pytest.mark.stress
@pytest.mark.parametrize("named", [False, True], ids=["a run", "a named model"])
def test_hundreds_of_kills_lose_no_checkpoint_and_leave_no_temporary_files(tiny, named, capsys):
    flags = tiny(
        max_iters=STEPS,
        dropout=0.2,
        lr_decay_iters=100,
        checkpoint_interval=2,
        eval_interval=3,
        eval_iters=1,
        log_interval=1,
        runs_dir="killed",
    ).model_dump(exclude_unset=True)
    if named:
        flags["model_name"] = "dante"
    train(
        tiny(runs_dir="warm"), output=Output(quiet=True)
    )  # imports everything that the children need
    chance = random.Random(int(named))
    kills = in_publication = step = named_step = 0
    while kills < KILLS // 2:
        process = fork_training(flags)
        time.sleep(chance.uniform(0.02, 0.5))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "the child was not killed"
        kills += 1
        in_publication += bool(list_temporary_directories(Path("killed"), Path("checkpoints")))
        reached = verify_newest_step(Path("killed"))
        assert reached >= step, "a checkpoint was lost"
        step = reached
        if named and is_bundle(Path("checkpoints/dante")):
            reached = verify_bundle(Path("checkpoints/dante"))
            assert reached >= named_step, "the named model went back"
            named_step = reached

    end = step + 5
    last = resume_run("auto", {**flags, "max_iters": end})
    uninterrupted = train(
        tiny(**{**flags, "max_iters": end, "runs_dir": "uninterrupted", "model_name": None})
    )
    assert_same_bits(uninterrupted.checkpoint, last.checkpoint)
    assert list_temporary_directories(Path("killed"), Path("checkpoints")) == []
    for directory in Path("killed").glob("*/artifacts/checkpoints/*"):
        assert list_names(directory) == sorted(BUNDLE_FILES)
    for directory in Path("killed").glob("*/artifacts/export"):
        assert list_names(directory) == sorted(BUNDLE_FILES_OF_EXPORT)
    with capsys.disabled():
        runs = len(list_runs(Path("killed")))
        print(f"\n{kills} kills, {in_publication} within a publication, {runs} runs, {end} steps")
