"""Functions and constants that several tests share; fixtures are in conftest.py."""

import builtins
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_record
import train
import trainer as trainer_module
import utils.output as output_module
from bundle import (
    BUNDLE_FILES,
    OPTIMIZER_FILE,
    TRAINING_SETTINGS,
    WEIGHTS_FILE,
    Bundle,
    TrainingState,
    _host,
    find_usable_bundle,
    is_bundle,
    list_checkpoints,
    list_runs,
    read_bundle,
    read_state,
    write_bundle,
)
from callbacks import TrainResult
from checkpoint import CheckpointWriter
from config import ConfigLoader
from inference import load_model_from_bundle
from inspect_model import check_files
from model import LanguageModel
from optim import clip_gradients, create_optimizer, learning_rate_at, set_learning_rate
from parameters import ModelConfig
from resume import plan_run
from tokenizer import Tokenizer, create_tokenizer
from utils import files
from utils.output import Output, run_command
from utils.ranks import Ranks

CHECKOUT = Path(__file__).resolve().parent.parent

LINES = (
    "To be, or not to be, that is the question:\n"
    "Whether 'tis nobler in the mind to suffer\n"
    "The slings and arrows of outrageous fortune,\n"
    "Or to take arms against a sea of troubles.\n\n"
)

FEW_TOKENS = 40  # in a run's last sample: 400 would take half of a tiny run's time

DEAD_PROCESS = f"{2**30}-{_host()}"  # in names of temporary directories
BUNDLE_FILES_OF_EXPORT = [name for name in BUNDLE_FILES if name != OPTIMIZER_FILE]
BUNDLE_CONFIG = ModelConfig(
    architecture="gpt2",
    n_embd=8,
    n_head=2,
    n_layer=1,
    block_size=4,
    batch_size=3,
    optimizer="adamw",
    learning_rate=3e-3,
)


def save_bundle(directory: Path, step: int = 7, **changes) -> LanguageModel:
    """Save a small model after one update; each step has other weights."""
    torch.manual_seed(step)
    model = LanguageModel(BUNDLE_CONFIG, 3)
    optimizer = create_optimizer(model, BUNDLE_CONFIG)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 0]]))[1].backward()
    clip_gradients(model, BUNDLE_CONFIG.grad_clip)
    set_learning_rate(optimizer, learning_rate_at(step, BUNDLE_CONFIG))
    scaler.step(optimizer)
    scaler.update()
    settings = {name: getattr(BUNDLE_CONFIG, name) for name in TRAINING_SETTINGS}
    facts = {"start_step": 0, "best_step": step, "data_sha256": "0" * 64, "model_name": None}
    values = {
        "step": step,
        "optimizer_file": None,
        "best_val_loss": 1.5,
        "val_loss": 1.5,
        "run_id": "r",
        "lineage": [],
        "training_config": {**settings, **facts},
    }
    state = TrainingState(**{**values, **changes})
    tokenizer = create_tokenizer("abc")
    writer = CheckpointWriter(None, None, model, optimizer, scaler, tokenizer, BUNDLE_CONFIG)
    writer.write(directory, state)
    return model


def save_random_model(
    directory: Path, tokenizer: Tokenizer, std: float = 0.3, **settings
) -> LanguageModel:
    """Save a model with large random weights, whose tokens differ clearly in probability."""
    config = ModelConfig(**settings)
    torch.manual_seed(0)
    model = LanguageModel(config, tokenizer.vocab_size, tokenizer.num_tokens).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    state = TrainingState(
        step=7,
        optimizer_file=None,
        best_val_loss=1.5,
        val_loss=1.5,
        run_id="20260101_000000_other",
        lineage=[],
        training_config={name: getattr(config, name) for name in TRAINING_SETTINGS},
    )
    saved = Bundle(directory, config, tokenizer.vocab_size, "cpu", tokenizer.get_state(), state)
    write_bundle(saved, save_weights=model.save_safetensors, save_optimizer=Path.touch)
    (directory / OPTIMIZER_FILE).unlink()
    return model


def assert_same_bits(one: Path, other: Path) -> None:
    """Assert that two bundles have identical weights, optimizer and generator state, bit for bit.

    Their best steps may differ: these depend on the evaluation interval.
    """
    for name in ("config.json", "tokenizer.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    steps = [json.loads((b / "training_state.json").read_bytes())["step"] for b in (one, other)]
    assert steps[0] == steps[1]
    weights = [load_file(bundle / "model.safetensors") for bundle in (one, other)]
    assert_equal(*weights)
    states = [torch.load(bundle / "optimizer.pt", weights_only=True) for bundle in (one, other)]
    assert states[0]["state"], "there is something to compare"
    assert_equal(*states)


def assert_equal(one, other) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for values in zip(one, other, strict=True):
            assert_equal(*values)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def train_until(number: signal.Signals, *flags: str) -> tuple[int, str, str]:
    """Run train.py, send it a signal after its first printed step, and wait.

    Returns the exit status, and the rest of stdout and stderr.
    """
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    return process.returncode, out, error


TINY_FLAGS = (
    "--block-size=16 --n-embd=16 --n-head=2 --n-layer=1 --batch-size=4 --max-iters=4 "
    "--warmup-iters=1 --eval-interval=2 --eval-iters=1 --log-interval=2 --device=cpu "
    "--precision=fp32"
).split()


def loaded_step(directory: Path) -> int:
    """Load the model of a bundle, or of a run's export, and return its step."""
    bundle = read_bundle(find_usable_bundle(directory), WEIGHTS_FILE)
    load_model_from_bundle(bundle)
    return bundle.state.step


def resume_run(reference: Path | str, flags: Mapping | None = None, **options) -> TrainResult:
    """Resume a run, quietly, as `train.py --resume` with these settings does."""
    loaded, plan = plan_run(ConfigLoader(flags or {}), resume=str(reference))
    output = Output(quiet=True)
    return trainer_module.train(loaded.config, loaded=loaded, plan=plan, output=output, **options)


def list_names(directory: Path) -> list[str]:
    """Return the sorted names of everything below a directory."""
    return sorted(path.name for path in directory.rglob("*"))


def verify_bundle(directory: Path) -> int:
    """Read all files of a bundle, compare them with their hashes, and return its step."""
    check_files(directory)
    return read_state(directory).step


def verify_newest_step(runs_dir: Path) -> int:
    """Verify every bundle in `runs_dir`, and return the step of the newest, or 0."""
    steps = [0]
    for run in list_runs(runs_dir):
        bundles = [*list_checkpoints(run), *filter(is_bundle, [run / "artifacts" / "export"])]
        steps += [verify_bundle(bundle) for bundle in bundles]
    return max(steps)


def list_temporary_directories(*places: Path) -> list[Path]:
    """Return the `.tmp-*` and `.next-*` directories of saves below these places."""
    return [path for place in places for path in place.rglob(".[tn]*") if path.is_dir()]


def call_as_other_user(work: Callable[[], str]) -> str:
    """Return the result of `work`, or the error it raises, in a process of a user without rights.

    That user cannot enter pytest's directories: create files for it in a `shared_directory`.
    """
    if os.name == "nt":
        pytest.skip("no setuid")
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            signal.alarm(20)  # a blocked process ends
            result = work()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, result.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        result = file.read()
    _, status = os.waitpid(process, 0)
    assert not status, f"ended by signal {status}"
    return result


# Faults -----------------------------------------------------------------------------------------

CALLS = (
    "mkdir",
    "replace",
    "unlink",
    "rmdir",
    "chmod",
    "fsync",
)  # the system calls that change a disk


REAL_WRITE_WITH = files.write_with


class Faults:
    """Replaces `os` and `open` in `utils/files.py`, and injects a fault at one call.

    Args:
        strike: called with these faults at the call number `at`; it raises or ends the process.
        at: the number of that call; -1 only counts calls.
        lasting: whether all later calls fail, too.
    """

    def __init__(self, strike: Callable[["Faults"], None], at: int = -1, lasting: bool = False):
        self.strike, self.at, self.lasting = strike, at, lasting
        self.count = 0
        self.unsynced: set[Path] = set()
        self.names: list[str] = []

    def call(self, name: str) -> None:
        self.names.append(name)
        self.count += 1
        if self.count - 1 == self.at or (self.lasting and self.count - 1 > self.at >= 0):
            self.strike(self)

    # The replacements of `os` and `open` ...

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def called(*arguments, **options):
            self.call(name)
            result = real(*arguments, **options)
            if name == "replace":
                source, target = map(Path, arguments)
                moved = {path for path in self.unsynced if path.is_relative_to(source)}
                self.unsynced -= moved
                self.unsynced |= {target / path.relative_to(source) for path in moved}
            elif name == "fsync":
                synced = Path(f"/proc/self/fd/{arguments[0]}").resolve()
                self.unsynced = {path for path in self.unsynced if path.resolve() != synced}
            return result

        return called

    def open_file(self, path, mode="r", **options):
        file = builtins.open(path, mode, **options)
        if mode in ("r", "rb"):
            return file
        self.unsynced.add(Path(path))
        real = file.write

        def write_in_halves(data):
            real(data[: len(data) // 2])  # an interrupted write has written a part
            file.flush()
            self.call("write")
            return real(data[len(data) // 2 :])

        class Writer:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            write = staticmethod(write_in_halves)

        return Writer()

    # ... and a wrapper around the writers of safetensors and torch.

    def write_by_library(self, path, write, like):
        def interrupted(target):
            write(target)
            self.unsynced.add(Path(target))
            whole = target.read_bytes()
            os.truncate(target, len(whole) // 2)
            self.call("library")
            target.write_bytes(whole)

        return REAL_WRITE_WITH(path, interrupted, like)

    def installed(self, patch: pytest.MonkeyPatch) -> "Faults":
        patch.setattr(files, "os", self)
        patch.setattr(files, "open", self.open_file, raising=False)
        patch.setattr(files, "write_with", self.write_by_library)
        return self


def killed(faults: Faults) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def powerless(faults: Faults) -> None:
    """Lose the data that was not synced, as in a power failure, and end the process."""
    for path in faults.unsynced:
        if path.exists():
            os.truncate(path, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def refused(number: int) -> Callable[[Faults], None]:
    def strike(faults: Faults) -> None:
        raise OSError(number, os.strerror(number))

    return strike


def count_calls(work: Callable[[], None]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(killed).installed(patch)
        work()
    return faults.count


def in_a_process_that_ends_at(at: int, strike: Callable, work: Callable[[], None]) -> None:
    """Fork, and run `work` there until the call number `at`."""
    process = os.fork()
    if process == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                Faults(strike, at).installed(patch)
                work()
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), f"call {at} was never reached"


# Processes --------------------------------------------------------------------------------------

FORKING = multiprocessing.get_context("forkserver")
# Imports of a run, so that a forked process has them already; DDP and FSDP import the first two.
FORKING.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "helpers", "jinja2"])
SECONDS = 60  # processes that take longer hang
DEAD_WITHIN = 30  # seconds in which all processes must end after one has been killed
REAL_STEP = trainer_module.Trainer.training_step


@dataclass(frozen=True)
class ProcessResult:
    """How a process ended, and what it printed."""

    status: int
    out: str
    error: str


class Processes:
    """Processes that run `work(rank, *arguments)`, started as torchrun starts them."""

    def __init__(self, size: int, work: Callable, *arguments):
        # Bound until all have ended: no other process gets this port, and rank 0 may listen on it.
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
            # The server, which starts with the first process, imports from there.
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            for process in self.all:
                process.start()

    def meet(self) -> None:
        """Wait until all are connected: only torchrun notices a process that ends before that."""
        deadline = time.monotonic() + SECONDS
        while len(list(self.place.glob("met-*"))) < len(self.all):
            assert time.monotonic() < deadline, "not all processes connect"
            time.sleep(0.01)

    def end(self, within: float = SECONDS) -> list[ProcessResult]:
        deadline = time.monotonic() + within
        for process in self.all:
            process.join(max(0.0, deadline - time.monotonic()))
        still = [rank for rank, process in enumerate(self.all) if process.is_alive()]
        for rank in still:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.all[rank].pid, signal.SIGUSR1)
                time.sleep(1)  # for its stack trace
        for process in self.all:
            process.kill()
        self.port.close()
        said = [(self.place / f"{kind}-{rank}") for rank in still for kind in ("out", "error")]
        assert not still, (still, [path.read_text(encoding="utf-8") for path in said])
        return [
            ProcessResult(
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
    # For a process that hangs. A timer of faulthandler would dump the stacks of working ones,
    # too, without the GIL: one such dump in 26 ends in a segmentation fault.
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connect = torch.distributed.init_process_group

    def connect_and_report(*arguments, **options):
        connect(*arguments, **options)
        (place / f"met-{ranks.rank}").touch()

    torch.distributed.init_process_group = connect_and_report
    library = torch.library.Library("c10d", "IMPL")  # its implementations last as long as it
    _reject_long_names(library)
    sys.exit(work(ranks.rank, *arguments))


def _reject_long_names(library: torch.library.Library) -> None:
    """Make operations fail whose names could crash gloo: see "Sharded tensors", distributed.py."""

    def reject(*_):
        raise AssertionError("the name of this operation has more than 15 characters")

    with warnings.catch_warnings(action="ignore"):  # they replace other implementations
        for name in ("allgather_into_tensor", "reduce_scatter_tensor", "allgather", "allreduce"):
            library.impl(f"{name}_coalesced_", reject, "CPU", allow_override=True)


def run_ranks(
    size: int, work: Callable, *arguments, within: float = SECONDS
) -> list[ProcessResult]:
    return Processes(size, work, *arguments).end(within)


def run_train(
    rank: int, flags: Sequence[str], signals: Sequence[tuple[int, int, int]] = (), *own: list[str]
) -> int:
    """Run `python train.py`; `signals` lists (rank, step, number), sent by a rank to itself."""

    def training_step(trainer, index):
        for signalled_rank, step, number in signals:
            if (signalled_rank, step) == (rank, index + 1):
                os.kill(os.getpid(), number)
        return REAL_STEP(trainer, index)

    trainer_module.Trainer.training_step = training_step
    trainer_module.SAMPLE_TOKENS, run_record.LAST_SAMPLE_TOKENS = FEW_TOKENS // 4, FEW_TOKENS
    output_module.TORCHRUN_GRACE = 0.0  # no torchrun here that would end the others
    return run_command(train.main, [*flags, *(own[rank] if own else [])])
