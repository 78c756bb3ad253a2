"""Training on several processes: the same losses, one record, and all ranks end together.

The processes are real and communicate over gloo. They are forked from a server that has imported
torch already; besides that, they start as torchrun starts them.

python -m pytest tests/test_distributed.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import (
    CHECKOUT,
    DEAD_WITHIN,
    TINY_FLAGS,
    Processes,
    ProcessResult,
    assert_same_bits,
    loaded_step,
    run_ranks,
    run_train,
)

import trainer as trainer_module
from bundle import is_bundle, list_checkpoints, list_runs
from config import ConfigLoader
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
from resume import lock_named_model, plan_run
from trainer import prepare_trainer
from utils.device import choose_device
from utils.errors import EndedOnAnotherRank, UserError
from utils.ranks import Ranks


@pytest.fixture
def flags(text_file) -> list[str]:
    """A run of six steps, without dropout, in fp32."""
    more = "--max-iters=6 --lr-decay-iters=6 --eval-interval=3 --checkpoint-interval=3"
    return [*TINY_FLAGS, *more.split(), f"--data={text_file}"]


def find_newest_run() -> Path:
    return list_runs(Path("runs"))[0]


def read_values(run: Path) -> dict[tuple[int, str], float]:
    rows = map(
        json.loads, (run / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    ignored = ("step", "seconds", "tokens_per_second")
    return {(row["step"], name): row[name] for row in rows for name in row if name not in ignored}


def assert_succeeded(results: Sequence[ProcessResult]) -> None:
    assert [process.status for process in results] == [0] * len(results), results
    assert not any(process.out or process.error for process in results[1:]), "only rank 0 prints"


KINDS = [
    pytest.param([f"--parallel={parallel}", f"--architecture={architecture}", *more], id=name)
    for parallel, architecture, more, name in (
        ("ddp", "modern", ["--optimizer=muon"], "ddp, modern, muon"),
        ("fsdp", "modern", ["--optimizer=muon"], "fsdp, modern, muon"),
        ("ddp", "gpt2", ["--optimizer=adamw", "--micro-batch-size=1"], "ddp, gpt2, adamw"),
        ("fsdp", "gpt2", ["--optimizer=adamw", "--micro-batch-size=1"], "fsdp, gpt2, adamw"),
        ("ddp", "speedrun", ["--ngram-rows=97"], "ddp, speedrun"),
        ("fsdp", "speedrun", ["--ngram-rows=97"], "fsdp, speedrun"),  # rows do not divide evenly
    )
]


SOME_SLOW = [
    pytest.param(*kind.values, id=kind.id, marks=[] if fast else [pytest.mark.slow])
    for kind, fast in zip(KINDS, (True, False, False, True, False, True), strict=True)
]


# The same training ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_two_processes_train_as_one_does_and_leave_one_record(flags, kind):
    flags = [*flags, *kind, "--sample-interval=3", "--histogram-interval=3"]
    assert_succeeded(run_ranks(1, run_train, flags))
    alone = find_newest_run()
    results = run_ranks(2, run_train, flags)
    assert_succeeded(results)
    assert "2 processes" in results[0].out
    both = find_newest_run()
    assert len(list_runs(Path("runs"))) == 2
    assert read_values(both).keys() == read_values(alone).keys()
    for key, value in read_values(alone).items():
        assert read_values(both)[key] == pytest.approx(value, abs=1e-5), key
    assert json.loads((both / "meta" / "result.json").read_bytes())["step"] == 6
    assert "2 processes" in (both / "report.html").read_text(encoding="utf-8")
    assert json.loads((both / "meta" / "full_config.json").read_bytes())["run"]["processes"] == 2
    names = [{p.name for p in (run / "artifacts/export").iterdir()} for run in (alone, both)]
    assert names[0] == names[1]
    assert loaded_step(both) == loaded_step(alone)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_two_and_four_processes_have_the_same_losses_over_100_steps(flags, parallel):
    flags = [*flags, f"--parallel={parallel}", "--max-iters=100", "--lr-decay-iters=100"]
    curves = []
    for size in (1, 2, 4):
        assert_succeeded(run_ranks(size, run_train, flags))
        curves.append(read_values(find_newest_run()))
    assert len(curves[0]) > 300
    for curve in curves[1:]:
        assert max(abs(curve[key] - value) for key, value in curves[0].items()) < 1e-4


def test_processes_share_one_token_store(flags):
    flags = [*flags, "--token-store=on", "--cache-dir=cache"]
    results = run_ranks(2, run_train, flags)
    assert_succeeded(results)
    assert len(list(Path("cache").rglob("*.bin"))) == 1
    both = read_values(find_newest_run())
    assert_succeeded(run_ranks(1, run_train, [*flags, "--token-store=off"]))
    assert both == pytest.approx(read_values(find_newest_run()), abs=1e-5)


def test_a_whole_split_is_evaluated_for_any_world_size(flags):
    # 31 windows and a shorter one are not divisible by two.
    flags = [*flags, "--eval-iters=0", "--max-iters=2", "--block-size=13"]
    losses = []
    for size in (1, 2):
        assert_succeeded(run_ranks(size, run_train, flags))
        losses.append(read_values(find_newest_run())[2, "eval/val_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def count_gradient_syncs(rank: int, flags: list[str]) -> int:
    """Count DDP's all-reduces in one step of two micro-batches: one per bucket of gradients."""
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 16, "device": "cpu"}
    loaded, plan = plan_run(
        ConfigLoader({"data": flags[0], "micro_batch_size": 1, "batch_size": 4, **shape})
    )
    buckets = []
    with open_world(loaded.config) as world:
        trainer = prepare_trainer(loaded.config, loaded, plan, world=world)

        def hook(_, bucket):
            buckets.append(bucket.index())
            return torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future(
            ).then(lambda done: done.value()[0])  # fmt: skip

        trainer.train_model.register_comm_hook(None, hook)
        trainer.training_step(0)
    assert buckets == sorted(set(buckets)) and buckets, buckets
    return 0


def test_gradient_accumulation_synchronizes_once_per_step(text_file):
    assert run_ranks(2, count_gradient_syncs, [str(text_file)]) == [ProcessResult(0, "", "")] * 2


def test_each_rank_has_its_own_dropout_masks(flags):
    assert_succeeded(run_ranks(2, run_train, [*flags, "--dropout=0.2", "--max-iters=2"]))
    saved = torch.load(list_checkpoints(find_newest_run())[-1] / "optimizer.pt", weights_only=True)
    (other,) = saved["other_generators"]
    assert not torch.equal(saved["generators"]["cpu"], other["cpu"])
    assert (
        derive_seed(1, 1, 0) != derive_seed(1, 2, 0) != derive_seed(1, 2, 9) != derive_seed(2, 2, 9)
    )


# Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_the_same_world_size_resumes_bit_for_bit(flags, kind):
    flags = [*flags, *kind, "--dropout=0.2"]
    assert_succeeded(run_ranks(2, run_train, flags))
    uninterrupted = find_newest_run()
    assert_succeeded(run_ranks(2, run_train, [*flags, "--max-iters=3"]))
    half = find_newest_run()
    results = run_ranks(2, run_train, [f"--resume={half}", "--device=cpu", "--max-iters=6"])
    assert_succeeded(results)
    assert "Note:" not in results[0].out
    assert_same_bits(list_checkpoints(uninterrupted)[-1], list_checkpoints(find_newest_run())[-1])
    assert {**read_values(half), **read_values(find_newest_run())} == read_values(uninterrupted)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_another_world_size_resumes_the_same_training_and_prints_a_note(
    flags, parallel, before, after
):
    flags = [*flags, f"--parallel={parallel}"]
    assert_succeeded(run_ranks(1, run_train, flags))
    uninterrupted = read_values(find_newest_run())
    assert_succeeded(run_ranks(before, run_train, [*flags, "--max-iters=3"]))
    results = run_ranks(after, run_train, ["--resume=last", "--device=cpu", "--max-iters=6"])
    assert_succeeded(results)
    (note,) = [line for line in results[0].out.splitlines() if line.startswith("Note:")]
    assert f"processes {before} → {after}" in note
    for key, value in read_values(find_newest_run()).items():
        assert value == pytest.approx(uninterrupted[key], abs=1e-5), key


# The end of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "number", "parallel"),
    [
        (1, signal.SIGTERM, "ddp"),
        pytest.param(0, signal.SIGINT, "fsdp", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_rank_stops_all_with_one_checkpoint(flags, rank, number, parallel):
    flags = [*flags, f"--parallel={parallel}", "--dropout=0.2"]
    assert_succeeded(run_ranks(2, run_train, flags))
    uninterrupted = find_newest_run()
    # A second signal, as when torchrun passes it on, changes nothing.
    signals = [(rank, 4, number), (rank, 4, number)]
    results = run_ranks(2, run_train, flags, signals)
    assert [process.status for process in results] == [128 + number] * 2, results
    assert "step 4" in results[0].out and results[1] == ProcessResult(128 + number, "", "")
    stopped = find_newest_run()
    assert [path.name for path in list_checkpoints(stopped)] == ["step_00000003", "step_00000004"]
    assert_succeeded(run_ranks(2, run_train, [f"--resume={stopped}", "--device=cpu"]))
    assert_same_bits(list_checkpoints(uninterrupted)[-1], list_checkpoints(find_newest_run())[-1])


def run_train_with_late_signal(rank: int, flags: list[str]) -> int:
    """Send rank 1 its signal just after all ranks have agreed not to stop after step 4."""
    agree_to_stop, calls = trainer_module.agree_to_stop, []

    def agree_then_signal(*arguments):
        answer = agree_to_stop(*arguments)
        calls.append(answer)
        if rank == 1 and len(calls) == 5:  # the fourth step's, as step 3 is evaluated too
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    trainer_module.agree_to_stop = agree_then_signal
    return run_train(rank, flags)


def test_a_signal_after_the_ranks_agreed_stops_all_after_the_next_step(flags):
    results = run_ranks(2, run_train_with_late_signal, flags)
    assert [process.status for process in results] == [128 + signal.SIGTERM] * 2, results
    assert list_checkpoints(find_newest_run())[-1].name == "step_00000005"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_and_the_last_checkpoint_resumes(flags, rank, parallel):
    flags = [*flags, f"--parallel={parallel}"]
    results = Processes(2, run_train, flags, [(rank, 5, signal.SIGKILL)]).end(within=DEAD_WITHIN)
    assert results[rank].status == -signal.SIGKILL
    living = results[1 - rank]
    assert living.status == 1
    (line,) = living.error.splitlines()
    assert line.startswith("error: rank 1: " if rank == 0 else "error: ")
    assert "another process" in line and "--resume" in line
    dead = find_newest_run()
    if rank == 1:
        assert "another process" in (dead / "meta" / "result.json").read_text(encoding="utf-8")
        assert "torchrun --nproc-per-node=2" in living.out and f"--resume {dead}" in living.out
    assert loaded_step(dead) == 3
    assert_succeeded(run_ranks(2, run_train, ["--resume=last", "--device=cpu"]))
    assert list_checkpoints(find_newest_run())[-1].name == "step_00000006"


def test_a_non_finite_loss_ends_all_ranks_with_one_line(flags):
    results = run_ranks(2, run_train, [*flags, "--learning-rate=1e20", "--max-iters=9"])
    assert [process.status for process in results] == [1, 1]
    assert len(results[0].error.splitlines()) == 1 and "step" in results[0].error
    assert results[1] == ProcessResult(1, "", "")


def test_early_stopping_on_rank_0_stops_all(flags):
    more = ["--early-stopping-patience=1", "--learning-rate=1e-30", "--min-lr=0", "--max-iters=30"]
    results = run_ranks(2, run_train, [*flags, *more, "--eval-interval=1"])
    assert_succeeded(results)
    assert "--early-stopping-patience" in results[0].out


@pytest.mark.slow
def test_max_minutes_stop_all_ranks_at_one_step(flags):
    flags = [flag for flag in flags if "iters" not in flag]
    results = run_ranks(2, run_train, [*flags, "--max-minutes=0.01"])
    assert_succeeded(results)
    assert "Done" in results[0].out or "Stopped" in results[0].out


@pytest.mark.slow
def test_torchrun_starts_stops_and_resumes_train_py(flags):
    """torchrun itself, which passes signals on and ends the other ranks when one has died."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def start(*more: str) -> subprocess.Popen:
        command = [*torchrun, str(CHECKOUT / "train.py"), *more]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    many = [*flags, "--max-iters=100000", "--log-interval=1"]
    for number in (signal.SIGTERM, signal.SIGKILL):  # to torchrun, and to a rank
        with start(*many) as process:
            lines = iter(process.stdout)
            next(line for line in lines if line.startswith("step      9/"))
            if number == signal.SIGTERM:
                process.send_signal(number)
            else:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                os.kill(int(children.read_text(encoding="utf-8").split()[1]), number)
            signalled = time.monotonic()
            rest = "".join(lines)
            assert process.wait(DEAD_WITHIN) != 0 and time.monotonic() - signalled < DEAD_WITHIN
        loaded_step(find_newest_run())
        stopped = number == signal.SIGTERM
        assert ("Stopped after step" if stopped else "another process of this run") in rest, rest
        assert "torchrun --nproc-per-node=2" in rest
    with start(*flags, "--batch-size=3") as process:
        assert "error: batch_size 3 " in process.stdout.read()
    step = int(list_checkpoints(find_newest_run())[-1].name.partition("_")[2])
    with start("--resume=last", "--device=cpu", f"--max-iters={step + 3}") as process:
        assert f"Done: {step + 3} steps" in process.stdout.read()
    assert process.returncode == 0


# Mistakes -------------------------------------------------------------------------------------


def test_a_batch_size_that_is_not_divisible_is_one_line_before_a_run_exists(flags):
    results = run_ranks(3, run_train, flags)
    assert [process.status for process in results] == [2, 2, 2]
    (line,) = results[0].error.splitlines()
    assert line.startswith("error: batch_size 4 ")
    assert all(fact in line for fact in ("3 processes", "3 or 6", "1 or 2 or 4"))
    assert results[1].error == results[0].error.replace("error: ", "error: rank 1: ")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"batch_size": 1}, "batch_size 1 .*2 processes.*batch_size to 2"),
        ({"parallel": "fsdp", "precision": "fp16"}, "fsdp.* precision fp16"),
        ({"parallel": "fsdp", "torch_compile": "on"}, "fsdp.* torch_compile on"),
    ],
)
def test_settings_that_two_processes_do_not_support_are_errors(changes, facts):
    with pytest.raises(UserError, match=facts):
        check_world_size(ModelConfig(**{"batch_size": 4, **changes}), 2)
    check_world_size(ModelConfig(batch_size=4), 2)


def test_other_settings_or_a_missing_text_on_one_rank_end_all(flags, text_file):
    results = run_ranks(2, run_train, flags, (), [], ["--seed=2"])
    assert [process.status for process in results] == [2, 2]
    assert "rank 1 " in results[0].error and not results[1].error
    assert len(results[0].error.splitlines()) == 1

    results = run_ranks(2, run_train_without_text, flags, str(text_file))
    assert [process.status for process in results] == [2, 2]
    assert f"rank 1: {text_file}: no such file" in results[0].error and not results[1].error
    assert not Path("runs").exists()


def run_train_without_text(rank: int, flags: list[str], text: str) -> int:
    if rank == 1:

        def fail(*_, **__):
            raise UserError(f"{text}: no such file")

        trainer_module.load_dataset = fail
    return run_train(rank, flags)


def test_a_locked_named_model_is_one_line(flags):
    with lock_named_model(Path("checkpoints/dante")):
        results = run_ranks(2, run_train, [*flags, "--model-name=dante"])
    assert [process.status for process in results] == [2, 2]
    assert "checkpoints/dante" in results[0].error and not results[1].error
    assert_succeeded(run_ranks(2, run_train, [*flags, "--model-name=dante"]))
    assert is_bundle(Path("checkpoints/dante"))


def test_a_dry_run_is_printed_once_and_writes_nothing(flags):
    results = run_ranks(2, run_train, [*flags, "--dry-run"])
    assert_succeeded(results)
    assert results[0].out.count("\nTime ") == 1 and not Path("runs").exists()


# Collectives ----------------------------------------------------------------------------------


def test_the_collectives_of_a_single_process_return_its_own_values():
    world = World()
    assert world.is_main and world.get_rows(8) == slice(0, 8)
    assert world.all_reduce_max(3, 4) == [3, 4] and world.all_gather("x") == ["x"]
    assert world.broadcast_from_main(lambda: 5) == world.run_on_all_ranks(lambda: 5) == 5
    with open_world(ModelConfig()) as opened:
        assert opened == world and not torch.distributed.is_initialized()


def test_the_rows_of_all_ranks_are_the_batch():
    rows = [World(rank, 4).get_rows(12) for rank in range(4)]
    assert [list(range(12))[part] for part in rows] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]


def check_collectives(rank: int) -> None:
    with open_world(ModelConfig()) as world:
        assert (world.rank, world.size, world.is_main) == (rank, 2, rank == 0)
        assert world.all_reduce_max(rank, -rank) == [1, 0]
        assert world.all_reduce_sum(torch.tensor(float(rank + 1))).item() == 3
        assert world.all_gather(rank) == [0, 1]
        assert world.broadcast_from_main(lambda: f"of {rank}") == "of 0"
        assert world.run_on_all_ranks(lambda: rank) == rank

        def fail():
            raise UserError("one", "two")

        for call in (world.broadcast_from_main, world.run_on_all_ranks):
            with pytest.raises(UserError if rank == 0 else EndedOnAnotherRank):
                call(fail)
        if rank == 0:
            with pytest.raises(UserError, match="rank 1: one\nrank 1: two"):
                world.run_on_all_ranks(lambda: 0)
        else:
            with pytest.raises(EndedOnAnotherRank):
                world.run_on_all_ranks(fail)


def test_collectives_return_results_and_share_failures():
    assert run_ranks(2, check_collectives) == [ProcessResult(0, "", "")] * 2


def check_sharded_tensors(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    with open_world(ModelConfig(batch_size=3)) as world:
        for rows in (1, 2, 3, 4, 7):  # the last rank has 0, 0, 1, 0 and 1 of them
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


def test_a_sharded_tensor_is_gathered_for_any_number_of_rows():
    assert run_ranks(3, check_sharded_tensors) == [ProcessResult(0, "", "")] * 3


def send_long_name(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    with open_world(ModelConfig()):
        layer = fully_shard(torch.nn.Linear(2, 2))
        with pytest.raises(AssertionError, match="more than 15 characters"):
            layer.weight.full_tensor()


def test_collectives_whose_names_corrupt_gloos_heap_fail_in_tests():
    assert run_ranks(2, send_long_name) == [ProcessResult(0, "", "")] * 2


def exit_early(rank: int) -> None:
    began = time.monotonic()
    with open_world(ModelConfig()):
        if rank == 0:
            time.sleep(1)
    assert time.monotonic() - began >= 1


def test_no_rank_exits_before_all_are_finished():
    """torchrun terminates the other ranks when one has exited."""
    assert run_ranks(2, exit_early) == [ProcessResult(0, "", "")] * 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        (
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            Ranks(1, 1, 2, 2),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks()),
        ({"RANK": "x", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, Ranks()),
    ],
)
def test_ranks_are_read_from_the_environment(monkeypatch, environment, expected):
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
        ("auto", 1, "2 processes .*1"),
        ("cuda:1", 2, "cuda:1.* 2 processes"),
        ("mps", 0, "mps.* 2 processes"),
    ],
)
def test_each_rank_chooses_its_own_device(monkeypatch, requested, devices, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    ranks = Ranks(1, 1, 2, 2)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            choose_device(requested, ranks)
    else:
        assert choose_device(requested, ranks) == torch.device(expected)
