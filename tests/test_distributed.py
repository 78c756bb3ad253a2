"""Several processes that train one model: the same training, one record, one end.

The processes are real, and so is what they say to one another over gloo; they are forked where
torch is imported already, which is all that torchrun would do otherwise.

python -m pytest tests/test_distributed.py
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, FEW_TOKENS, TINY_FLAGS, assert_same_bits, loaded_step

import train as train_module
import utils.output as output_module
from bundle import is_bundle, list_checkpoints, list_runs
from distributed import (
    World,
    check_world_size,
    derive_seed,
    gather_full_tensor,
    gather_to_main,
    open_world,
    to_local,
)
from parameters import ModelConfig
from prepare import set_up
from start import plan_run
from step import training_step
from utils.device import choose_device
from utils.errors import EndedOnAnotherRank, UserError
from utils.output import pluralize, run_command
from utils.ranks import ALONE, Ranks

FORKING = multiprocessing.get_context("forkserver")
# All that a run imports, so that what is forked has it; DDP and FSDP bring the first two.
FORKING.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "test_distributed", "jinja2", "git"]
)
SECONDS = 60  # a test whose processes take longer hangs
DEAD_WITHIN = 30  # seconds in which all must end when one is dead


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    status: int
    out: str
    error: str


class Processes:
    """Processes side by side, as torchrun would start them, each with its own work."""

    def __init__(self, size: int, work: Callable, *arguments):
        # Bound until all have ended: nobody else is given this port, and rank 0 may listen at it.
        self.port = socket.socket()
        self.port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port.bind(("127.0.0.1", 0))
        self.place = Path(tempfile.mkdtemp(prefix="printed-", dir=Path.cwd()))
        environment = dict(os.environ)
        self.all = [
            FORKING.Process(
                target=_begin,
                args=(
                    Ranks(rank, rank, size, size),
                    self.port.getsockname()[1],
                    self.place,
                    environment,
                    work,
                    arguments,
                ),
            )
            for rank in range(size)
        ]
        with pytest.MonkeyPatch.context() as patch:
            # Where the server that forks, and starts with the first, looks for what it imports.
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            for process in self.all:
                process.start()

    def meet(self) -> None:
        """Wait until all are connected: one that ends before that, torchrun alone would notice."""
        deadline = time.monotonic() + SECONDS
        while len(list(self.place.glob("met-*"))) < len(self.all):
            assert time.monotonic() < deadline, "they do not meet"
            time.sleep(0.01)

    def end(self, within: float = SECONDS) -> list[Ended]:
        deadline = time.monotonic() + within
        for process in self.all:
            process.join(max(0.0, deadline - time.monotonic()))
        still = [rank for rank, process in enumerate(self.all) if process.is_alive()]
        for rank in still:
            with contextlib.suppress(ProcessLookupError):  # it has just ended after all
                os.kill(self.all[rank].pid, signal.SIGUSR1)
                time.sleep(1)  # in which it writes where it hangs
        for process in self.all:
            process.kill()
        self.port.close()
        said = [(self.place / f"{kind}-{rank}") for rank in still for kind in ("out", "error")]
        assert not still, (still, [path.read_text(encoding="utf-8") for path in said])
        return [
            Ended(
                process.exitcode,
                (self.place / f"out-{rank}").read_text(encoding="utf-8"),
                (self.place / f"error-{rank}").read_text(encoding="utf-8"),
            )
            for rank, process in enumerate(self.all)
        ]


def _begin(ranks: Ranks, port: int, place: Path, environment, work: Callable, arguments) -> None:
    os.chdir(place.parent)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(ranks.rank),
        LOCAL_RANK=str(ranks.local_rank),
        WORLD_SIZE=str(ranks.size),
        LOCAL_WORLD_SIZE=str(ranks.local_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    for descriptor, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(place / f"{name}-{ranks.rank}", os.O_CREAT | os.O_WRONLY), descriptor)
    # For one that hangs. A timer of faulthandler's would read the stacks of one that works, too,
    # without Python's lock: one such dump in 26 ends it by a segmentation fault.
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connect = torch.distributed.init_process_group

    def connect_and_tell(*arguments, **options):
        connect(*arguments, **options)
        (place / f"met-{ranks.rank}").touch()

    torch.distributed.init_process_group = connect_and_tell
    library = torch.library.Library("c10d", "IMPL")  # what it is told lasts as long as it does
    _refuse_long_names(library)
    sys.exit(work(ranks.rank, *arguments))


def _refuse_long_names(library: torch.library.Library) -> None:
    """Let a message fail that could end a process, seldom: see above `gather_full_tensor` in distributed.py."""

    def refuse(*_):
        raise AssertionError("the name of this message has more than 15 characters")

    with warnings.catch_warnings(action="ignore"):  # that they did something else before
        for name in ("allgather_into_tensor", "reduce_scatter_tensor", "allgather", "allreduce"):
            library.impl(f"{name}_coalesced_", refuse, "CPU", allow_override=True)


def side_by_side(size: int, work: Callable, *arguments, within: float = SECONDS) -> list[Ended]:
    return Processes(size, work, *arguments).end(within)


def trains(
    rank: int, flags: Sequence[str], strikes: Sequence[tuple[int, int, int]] = (), *own: list[str]
) -> int:
    """What `python train.py` does; at a step, a rank may send itself a signal."""

    def struck(setup, step, *rest):
        for where, when, number in strikes:
            if (where, when) == (rank, step + 1):
                os.kill(os.getpid(), number)
        return training_step(setup, step, *rest)

    train_module.training_step = struck
    train_module.LAST_SAMPLE_TOKENS = FEW_TOKENS
    output_module.TORCHRUN_GRACE = 0.0  # nobody ends these when one has ended
    return run_command(train_module.main, [*flags, *(own[rank] if own else [])])


@pytest.fixture
def flags(text_file) -> list[str]:
    """A run of six steps, without dropout, in fp32."""
    more = "--max-iters=6 --lr-decay-iters=6 --eval-interval=3 --checkpoint-interval=3"
    return [*TINY_FLAGS, *more.split(), f"--data={text_file}"]


def newest() -> Path:
    return list_runs(Path("runs"))[0]


def logged(run: Path) -> dict[tuple[int, str], float]:
    rows = map(
        json.loads, (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    apart = ("step", "seconds", "tokens_per_second")
    return {(row["step"], name): row[name] for row in rows for name in row if name not in apart}


def assert_went_well(ended: Sequence[Ended]) -> None:
    assert [process.status for process in ended] == [0] * len(ended), ended
    assert not any(process.out or process.error for process in ended[1:]), "rank 0 alone speaks"


KINDS = [
    pytest.param([f"--parallel={parallel}", f"--architecture={architecture}", *more], id=name)
    for parallel, architecture, more, name in (
        ("ddp", "modern", ["--optimizer=muon"], "ddp, modern, muon"),
        ("fsdp", "modern", ["--optimizer=muon"], "fsdp, modern, muon"),
        ("ddp", "gpt2", ["--optimizer=adamw", "--micro-batch-size=1"], "ddp, gpt2, adamw"),
        ("fsdp", "gpt2", ["--optimizer=adamw", "--micro-batch-size=1"], "fsdp, gpt2, adamw"),
    )
]


SOME_SLOW = [
    pytest.param(*kind.values, id=kind.id, marks=[] if fast else [pytest.mark.slow])
    for kind, fast in zip(KINDS, (True, False, False, True), strict=True)
]


# The same training ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_two_processes_learn_what_one_does_and_leave_one_record(flags, kind):
    flags = [*flags, *kind, "--sample-interval=3", "--histogram-interval=3"]
    assert_went_well(side_by_side(1, trains, flags))
    alone = newest()
    ended = side_by_side(2, trains, flags)
    assert_went_well(ended)
    assert "2 processes" in ended[0].out
    both = newest()
    assert len(list_runs(Path("runs"))) == 2
    assert logged(both).keys() == logged(alone).keys()
    for key, value in logged(alone).items():
        assert logged(both)[key] == pytest.approx(value, abs=1e-5), key
    assert json.loads((both / "meta" / "result.json").read_bytes())["step"] == 6
    assert "2 processes" in (both / "report.html").read_text(encoding="utf-8")
    assert json.loads((both / "meta" / "full_config.json").read_bytes())["run"]["processes"] == 2
    names = [{p.name for p in (run / "artifacts/export").iterdir()} for run in (alone, both)]
    assert names[0] == names[1]
    assert loaded_step(both) == loaded_step(alone)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_loss_curves_of_one_two_and_four_processes_agree_over_100_steps(flags, parallel):
    flags = [*flags, f"--parallel={parallel}", "--max-iters=100", "--lr-decay-iters=100"]
    curves = []
    for size in (1, 2, 4):
        assert_went_well(side_by_side(size, trains, flags))
        curves.append(logged(newest()))
    assert len(curves[0]) > 300
    for curve in curves[1:]:
        assert max(abs(curve[key] - value) for key, value in curves[0].items()) < 1e-4


def test_processes_share_one_store_of_a_text_that_one_of_them_makes(flags):
    flags = [*flags, "--token-store=on", "--cache-dir=cache", "--window-order=shuffled"]
    ended = side_by_side(2, trains, flags)
    assert_went_well(ended)
    assert len(list(Path("cache").rglob("shard_*.bin"))) == 1
    both = logged(newest())
    assert_went_well(side_by_side(1, trains, [*flags, "--token-store=off"]))
    assert both == pytest.approx(logged(newest()), abs=1e-5)


def test_all_of_a_split_is_evaluated_however_many_share_it(flags):
    # 31 windows and a rest do not divide by two.
    flags = [*flags, "--eval-iters=0", "--max-iters=2", "--block-size=13"]
    losses = []
    for size in (1, 2):
        assert_went_well(side_by_side(size, trains, flags))
        losses.append(logged(newest())[2, "eval/val_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def counts_what_it_shares(rank: int, flags: list[str]) -> int:
    """One step of two micro-batches, in which DDP shares each bucket of gradients once."""
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 16, "device": "cpu"}
    loaded, start = plan_run({"data": flags[0], "micro_batch_size": 1, "batch_size": 4, **shape})
    shared = []
    with open_world(loaded.config) as world:
        setup = set_up(loaded.config, loaded, start, world=world)

        def hook(_, bucket):
            shared.append(bucket.index())
            return torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future(
            ).then(lambda done: done.value()[0])  # fmt: skip

        setup.learner.register_comm_hook(None, hook)
        training_step(setup, 0)
    assert shared == sorted(set(shared)) and shared, shared
    return 0


def test_accumulated_gradients_are_shared_once_a_step(text_file):
    assert side_by_side(2, counts_what_it_shares, [str(text_file)]) == [Ended(0, "", "")] * 2


def test_each_process_drops_out_other_activations(flags):
    assert_went_well(side_by_side(2, trains, [*flags, "--dropout=0.2", "--max-iters=2"]))
    saved = torch.load(list_checkpoints(newest())[-1] / "optimizer.pt", weights_only=True)
    (other,) = saved["other_generators"]
    assert not torch.equal(saved["generators"]["cpu"], other["cpu"])
    assert (
        derive_seed(1, 1, 0) != derive_seed(1, 2, 0) != derive_seed(1, 2, 9) != derive_seed(2, 2, 9)
    )


# Going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_as_many_processes_go_on_to_the_same_bits(flags, kind):
    flags = [*flags, *kind, "--dropout=0.2"]
    assert_went_well(side_by_side(2, trains, flags))
    whole = newest()
    assert_went_well(side_by_side(2, trains, [*flags, "--max-iters=3"]))
    half = newest()
    ended = side_by_side(2, trains, [f"--resume={half}", "--device=cpu", "--max-iters=6"])
    assert_went_well(ended)
    assert "not the same to the bit" not in ended[0].out
    assert_same_bits(list_checkpoints(whole)[-1], list_checkpoints(newest())[-1])
    assert {**logged(half), **logged(newest())} == logged(whole)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_with_the_same_training_and_says_so(
    flags, parallel, before, after
):
    flags = [*flags, f"--parallel={parallel}"]
    assert_went_well(side_by_side(1, trains, flags))
    whole = logged(newest())
    assert_went_well(side_by_side(before, trains, [*flags, "--max-iters=3"]))
    ended = side_by_side(after, trains, ["--resume=last", "--device=cpu", "--max-iters=6"])
    assert_went_well(ended)
    was, becomes = (pluralize(size, "process", "processes") for size in (before, after))
    assert (
        f"Note: computed by {was} until now, and by {becomes} from here on: as good, and not the "
        "same to the bit\n"
    ) in ended[0].out
    for key, value in logged(newest()).items():
        assert value == pytest.approx(whole[key], abs=1e-5), key


# Coming to an end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "number", "parallel"),
    [
        (1, signal.SIGTERM, "ddp"),
        pytest.param(0, signal.SIGINT, "fsdp", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_process_ends_all_with_one_bundle_to_go_on_with(
    flags, rank, number, parallel
):
    flags = [*flags, f"--parallel={parallel}", "--dropout=0.2"]
    assert_went_well(side_by_side(2, trains, flags))
    whole = newest()
    # A second one, as of torchrun, which passes them on, changes nothing.
    strikes = [(rank, 4, number), (rank, 4, number)]
    ended = side_by_side(2, trains, flags, strikes)
    assert [process.status for process in ended] == [128 + number] * 2, ended
    assert "Stopping after step 4" in ended[0].out and ended[1] == Ended(128 + number, "", "")
    stopped = newest()
    assert [path.name for path in list_checkpoints(stopped)] == ["step_00000003", "step_00000004"]
    assert_went_well(side_by_side(2, trains, [f"--resume={stopped}", "--device=cpu"]))
    assert_same_bits(list_checkpoints(whole)[-1], list_checkpoints(newest())[-1])


def is_late(rank: int, flags: list[str]) -> int:
    """Rank 1 gets its signal when all have just agreed to go on after step 4."""
    agreed, calls = train_module.agreed, []

    def then_signalled(*arguments):
        answer = agreed(*arguments)
        calls.append(answer)
        if rank == 1 and len(calls) == 5:  # the fourth step's, as step 3 is evaluated too
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    train_module.agreed = then_signalled
    return trains(rank, flags)


def test_a_signal_that_comes_too_late_for_a_step_ends_all_after_the_next(flags):
    ended = side_by_side(2, is_late, flags)
    assert [process.status for process in ended] == [128 + signal.SIGTERM] * 2, ended
    assert list_checkpoints(newest())[-1].name == "step_00000005"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_dead_process_ends_the_others_and_the_last_bundle_goes_on(flags, rank, parallel):
    flags = [*flags, f"--parallel={parallel}"]
    ended = Processes(2, trains, flags, [(rank, 5, signal.SIGKILL)]).end(within=DEAD_WITHIN)
    assert ended[rank].status == -signal.SIGKILL
    living = ended[1 - rank]
    who = "rank 1: " if rank == 0 else ""
    assert living.status == 1
    assert living.error.splitlines() == [
        f"error: {who}another process of this run has ended, and the others cannot go on without "
        "it; --resume goes on from the last checkpoint"
    ]
    dead = newest()
    if rank == 1:
        assert "another process" in (dead / "meta" / "result.json").read_text(encoding="utf-8")
        assert "go on from it with" in living.out and "torchrun --nproc-per-node=2" in living.out
    assert loaded_step(dead) == 3
    assert_went_well(side_by_side(2, trains, ["--resume=last", "--device=cpu"]))
    assert list_checkpoints(newest())[-1].name == "step_00000006"


def test_a_loss_that_is_not_finite_ends_all_in_one_line(flags):
    ended = side_by_side(2, trains, [*flags, "--learning-rate=1e30", "--max-iters=9"])
    assert [process.status for process in ended] == [1, 1]
    assert len(ended[0].error.splitlines()) == 1 and "the run cannot go on" in ended[0].error
    assert ended[1] == Ended(1, "", "")


def test_a_reason_to_stop_that_rank_0_has_stops_all(flags):
    more = ["--early-stopping-patience=1", "--learning-rate=1e-30", "--min-lr=0", "--max-iters=30"]
    ended = side_by_side(2, trains, [*flags, *more, "--eval-interval=1"])
    assert_went_well(ended)
    assert "no better val loss" in ended[0].out


@pytest.mark.slow
def test_a_limit_of_minutes_is_one_for_all(flags):
    flags = [flag for flag in flags if "iters" not in flag]
    ended = side_by_side(2, trains, [*flags, "--max-minutes=0.01"])
    assert_went_well(ended)
    assert "Done" in ended[0].out or "Stopped" in ended[0].out


@pytest.mark.slow
def test_torchrun_starts_it_ends_it_and_goes_on_with_it(flags):
    """The program itself, which passes signals on and ends what is left when a rank is dead."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def begin(*more: str) -> subprocess.Popen:
        command = [*torchrun, str(CHECKOUT / "train.py"), *more]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    many = [*flags, "--max-iters=100000", "--log-interval=1"]
    for number in (signal.SIGTERM, signal.SIGKILL):  # to torchrun, and to a rank
        with begin(*many) as process:
            told = iter(process.stdout)
            next(line for line in told if line.startswith("step      9/"))
            if number == signal.SIGTERM:
                process.send_signal(number)
            else:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                os.kill(int(children.read_text(encoding="utf-8").split()[1]), number)
            struck = time.monotonic()
            rest = "".join(told)
            assert process.wait(DEAD_WITHIN) != 0 and time.monotonic() - struck < DEAD_WITHIN
        loaded_step(newest())
        stopped = number == signal.SIGTERM
        assert ("Stopped after step" if stopped else "another process of this run") in rest, rest
        assert "torchrun --nproc-per-node=2" in rest
    with begin(*flags, "--batch-size=3") as process:
        assert "error: 2 processes cannot share a batch_size of 3" in process.stdout.read()
    step = int(list_checkpoints(newest())[-1].name.partition("_")[2])
    with begin("--resume=last", "--device=cpu", f"--max-iters={step + 3}") as process:
        assert f"Done: {step + 3} steps" in process.stdout.read()
    assert process.returncode == 0


# Mistakes -------------------------------------------------------------------------------------


def test_what_processes_cannot_share_is_one_line_before_anything_begins(flags):
    ended = side_by_side(3, trains, flags)
    assert [process.status for process in ended] == [2, 2, 2]
    assert ended[0].error.splitlines() == [
        "error: 3 processes cannot share a batch_size of 4: take a batch_size of 3 or 6, or start "
        "1, 2 or 4 processes"
    ]
    assert ended[1].error == ended[0].error.replace("error: ", "error: rank 1: ")  # if it lives on
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 1}, "a batch_size of 2, or start 1 processes"),
        ({"parallel": "fsdp", "precision": "fp16"}, "fsdp does not go with precision fp16"),
        ({"parallel": "fsdp", "torch_compile": "on"}, "fsdp does not go with torch_compile on"),
    ],
)
def test_settings_that_do_not_go_with_two_processes_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        check_world_size(ModelConfig(**{"batch_size": 4, **changes}), 2)
    check_world_size(ModelConfig(batch_size=4), 2)


def test_other_settings_or_a_missing_text_in_one_process_end_all(flags, text_file):
    ended = side_by_side(2, trains, flags, (), [], ["--seed=2"])
    assert [process.status for process in ended] == [2, 2]
    assert "rank 1 has other settings than rank 0" in ended[0].error and not ended[1].error
    assert len(ended[0].error.splitlines()) == 1

    ended = side_by_side(2, loses_its_text, flags, str(text_file))
    assert [process.status for process in ended] == [2, 2]
    assert ended[0].error == f"error: rank 1: {text_file}: no such file\n" and not ended[1].error
    assert not Path("runs").exists()


def loses_its_text(rank: int, flags: list[str], text: str) -> int:
    if rank == 1:

        def fail(*_, **__):
            raise UserError(f"{text}: no such file")

        import prepare

        prepare.load_data = fail
    return trains(rank, flags)


def test_a_model_that_somebody_else_trains_is_one_line(flags):
    from start import lock_named_model

    with lock_named_model(Path("checkpoints/dante")):
        ended = side_by_side(2, trains, [*flags, "--model-name=dante"])
    assert [process.status for process in ended] == [2, 2]
    assert "is being trained by another process" in ended[0].error and not ended[1].error
    assert_went_well(side_by_side(2, trains, [*flags, "--model-name=dante"]))
    assert is_bundle(Path("checkpoints/dante"))


def test_a_dry_run_is_told_once_and_leaves_nothing(flags):
    ended = side_by_side(2, trains, [*flags, "--dry-run"])
    assert_went_well(ended)
    assert ended[0].out.count("Time   about") == 1 and not Path("runs").exists()


# The parts ------------------------------------------------------------------------------------


def test_one_process_needs_no_others():
    world = World()
    assert world.is_main and world.get_rows(8) == slice(0, 8)
    assert world.all_reduce_max(3, 4) == [3, 4] and world.gather("x") == ["x"]
    assert world.broadcast_from_main(lambda: 5) == world.run_on_all_ranks(lambda: 5) == 5
    with open_world(ModelConfig()) as opened:
        assert opened == world and not torch.distributed.is_initialized()


def test_the_rows_of_all_processes_are_the_batch():
    rows = [World(rank, 4).rows(12) for rank in range(4)]
    assert [list(range(12))[part] for part in rows] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]


def talks(rank: int) -> None:
    with open_world(ModelConfig()) as world:
        assert (world.rank, world.size, world.is_main) == (rank, 2, rank == 0)
        assert world.all_reduce_max(rank, -rank) == [1, 0]
        assert world.all_reduce_sum(torch.tensor(float(rank + 1))).item() == 3
        assert world.gather(rank) == ([0, 1] if rank == 0 else [])
        assert world.broadcast_from_main(lambda: f"of {rank}") == "of 0"
        assert world.run_on_all_ranks(lambda: rank) == rank

        def refuse():
            raise UserError("one", "two")

        for gather in (world.broadcast_from_main, world.run_on_all_ranks):
            with pytest.raises(UserError if rank == 0 else EndedOnAnotherRank):
                gather(refuse)
        if rank == 0:
            with pytest.raises(UserError, match="rank 1: one\nrank 1: two"):
                world.run_on_all_ranks(lambda: 0)
        else:
            with pytest.raises(EndedOnAnotherRank):
                world.run_on_all_ranks(refuse)


def test_what_all_agree_on_and_how_a_failure_is_shared():
    assert side_by_side(2, talks) == [Ended(0, "", "")] * 2


def holds_some_rows(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    with open_world(ModelConfig(batch_size=3)) as world:
        for rows in (1, 2, 3, 4, 7):  # of which the last process has 0, 0, 1, 0 and 1
            layer = torch.nn.Linear(2, rows)
            before = [tensor.detach().clone() for tensor in layer.parameters()]
            fully_shard(layer)
            for tensor, expected in zip(layer.parameters(), before, strict=True):
                assert torch.equal(gather_full_tensor(to_local(tensor), tensor), expected)
                to_save = gather_to_main(tensor, world)
                assert (to_save is None) == (rank > 0)
                if to_save is not None:
                    assert torch.equal(to_save, expected)
                    assert to_save.untyped_storage().nbytes() == expected.nbytes
        assert gather_full_tensor(expected, expected) is gather_to_main(expected, world) is expected


def test_a_sharded_tensor_is_put_together_however_many_rows_each_has():
    assert side_by_side(3, holds_some_rows) == [Ended(0, "", "")] * 3


def sends_a_long_name(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    with open_world(ModelConfig()):
        layer = fully_shard(torch.nn.Linear(2, 2))
        with pytest.raises(AssertionError, match="more than 15 characters"):
            layer.weight.full_tensor()


def test_no_process_here_can_send_what_breaks_the_memory_of_gloo():
    assert side_by_side(2, sends_a_long_name) == [Ended(0, "", "")] * 2


def leaves_early(rank: int) -> None:
    began = time.monotonic()
    with open_world(ModelConfig()):
        if rank == 0:
            time.sleep(1)
    assert time.monotonic() - began >= 1


def test_nobody_leaves_before_all_are_done():
    """As torchrun ends whoever is left when one has left."""
    assert side_by_side(2, leaves_early) == [Ended(0, "", "")] * 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        (
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            Ranks(1, 1, 2, 2),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ALONE),
        ({"RANK": "x", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ALONE),
    ],
)
def test_the_ranks_are_those_of_the_environment(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == expected


@pytest.mark.parametrize(
    ("requested", "devices", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:1"),
        ("cuda", 2, "cuda:1"),
        ("cpu", 2, "cpu"),
        ("auto", 1, "need a CUDA device each, and PyTorch sees 1"),
        ("cuda:1", 2, "is one device, and there are 2 processes"),
        ("mps", 0, "is one device, and there are 2 processes"),
    ],
)
def test_each_process_takes_a_device_of_its_own(monkeypatch, requested, devices, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    ranks = Ranks(1, 1, 2, 2)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            choose_device(requested, ranks)
    else:
        assert choose_device(requested, ranks) == torch.device(expected)
