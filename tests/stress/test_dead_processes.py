"""Ranks of one training, killed at random moments: one of them, or both.

make test-stress
"""

import random
import signal
import time
from pathlib import Path

import pytest
from helpers import (
    DEAD_WITHIN,
    SECONDS,
    TINY_FLAGS,
    Processes,
    assert_same_bits,
    list_temporary_directories,
    run_ranks,
    run_train,
    verify_newest_step,
)

from bundle import list_checkpoints, list_runs, parse_step

KILLS = 25
STEPS = 10_000  # more than all processes together reach


def find_newest_step(runs_dir: Path) -> int:
    checkpoints = [path for run in list_runs(runs_dir) for path in list_checkpoints(run)]
    return max(map(parse_step, checkpoints), default=0)


@pytest.mark.stress
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_ranks_lose_no_checkpoint_and_end_bit_for_bit_identical(text_file, parallel, capsys):
    flags = [*TINY_FLAGS, f"--data={text_file}", "--dropout=0.2", f"--parallel={parallel}"]
    flags += ["--lr-decay-iters=100", "--checkpoint-interval=2", "--eval-interval=3"]
    chance = random.Random(parallel)
    step = in_publication = 0
    longest = 0.0
    for kill in range(KILLS):
        more = [f"--max-iters={STEPS}", "--runs-dir=killed", "--resume=auto"]
        processes = Processes(2, run_train, [*flags, *more])
        processes.meet()
        if kill % 2:  # on a slow machine, too, half of them save before they are killed
            deadline = time.monotonic() + SECONDS
            while find_newest_step(Path("killed")) <= step:
                assert time.monotonic() < deadline, "the processes save no checkpoint"
                time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 2.0))
        victims = chance.choice([[0], [1], [0, 1]])
        for rank in victims:
            processes.all[rank].kill()
        killed = time.monotonic()
        ended = processes.end(within=DEAD_WITHIN)
        longest = max(longest, time.monotonic() - killed)
        for rank, process in enumerate(ended):
            assert process.status == (-signal.SIGKILL if rank in victims else 1), ended
        in_publication += bool(list_temporary_directories(Path("killed")))
        reached = verify_newest_step(Path("killed"))
        assert reached >= step, "a checkpoint was lost"
        step = reached

    end = step + 5
    for place in ("killed", "uninterrupted"):
        more = [f"--max-iters={end}", f"--runs-dir={place}", "--resume=auto"]
        # "uninterrupted" runs all steps.
        ended = run_ranks(2, run_train, [*flags, *more], within=600)
        assert [process.status for process in ended] == [0, 0], ended
    last, uninterrupted = (
        list_checkpoints(list_runs(Path(d))[0])[-1] for d in ("killed", "uninterrupted")
    )
    assert_same_bits(uninterrupted, last)
    assert list_temporary_directories(Path("killed")) == []
    with capsys.disabled():
        print(f"\n{KILLS} kills, {in_publication} within a publication, {end} steps; ", end="")
        print(f"the others ended within {longest:.1f} s")
