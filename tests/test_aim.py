"""utils/tracking/aim.py: Aim returns all that was logged, and its failures never stop a run.

python -m pytest tests/test_aim.py
"""

import contextlib
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import CHECKOUT, TINY_FLAGS, assert_equal, train_until
from safetensors.torch import load_file

import trainer as trainer_module
import utils.tracking.aim as module
from inference import load_model
from parameters import ModelConfig
from trainer import train
from utils.errors import RunError, UserError
from utils.run_manager import RunDirectory
from utils.tracking.aim import AimTracker, require_aim
from utils.tracking.histograms import Histogram
from utils.tracking.metrics import METRICS, get_tag

# A separate process: log ten losses, then close, be killed, or wait for a line and close.
RUN = """
import os, signal, sys, time
import aim  # outside the measured time
import utils.tracking.aim as module
repo, name, action = sys.argv[1:]
if "://" in repo:
    module.TIMEOUT = 3
start = time.monotonic()
try:
    tracker = module.AimTracker(repo, name)
except Exception as error:
    sys.exit(f"{time.monotonic() - start:.1f} {type(error).__name__} {error}")
tracker.log_config({"seed": 1}, {"run_id": name})
for step in range(1, 11):
    tracker.log_metrics({"loss": 1 / step}, step, "train")
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if action == "wait":
    print("ready", flush=True)
    sys.stdin.readline()
try:
    tracker.close()
except Exception as error:
    sys.exit(f"{type(error).__name__} {error}")
"""


def start(repo, name: str, action: str = "close") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(repo), name, action],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def repo(tmp_path) -> str:
    pytest.importorskip("aim")
    return str(tmp_path / "repo")


@pytest.fixture
def tracker(repo) -> AimTracker:
    return AimTracker(repo, "20260131_235959_baseline")


def find_runs(repo: str) -> dict:
    """Return the runs that `Repo.iter_runs` lists, by name."""
    import aim

    found = list(aim.Repo.from_path(repo).iter_runs())
    assert len({run.name for run in found}) == len(found)
    return {run.name: run for run in found}


def read_metrics(run) -> dict:
    """Return all numbers of a run: (name, subset) to pairs of step and value."""
    found = {}
    for metric in run.metrics():
        steps, (values, *_) = metric.data.numpy()
        pairs = list(zip(steps.tolist(), values.tolist(), strict=True))
        found[metric.name, metric.context.to_dict().get("subset")] = pairs
    return found


def find_locks(repo: str) -> list[Path]:
    return list(Path(repo, ".aim", "locks").glob("*.softlock"))


def read_sequence(sequence) -> list:
    steps, (values, *_) = sequence.data.items_list()
    return list(zip(steps, values, strict=True))


LOSSES = {("loss", "train"): [(step, 1 / step) for step in range(1, 11)]}


def test_every_number_is_read_back_once_with_its_name_step_and_subset(tracker, repo):
    for step in range(1, 61):
        tracker.log_metrics({"loss": 1 / step, "learning_rate": 0.1}, step, "train")
        if step % 30 == 0:
            tracker.log_metrics({"eval_loss": 3.0}, step, "train")
            tracker.log_metrics({"eval_loss": 4.0, "bits_per_byte": 2}, step, "val")
    tracker.close()
    (run,) = find_runs(repo).values()
    assert run.name == "20260131_235959_baseline"
    assert read_metrics(run) == {
        ("loss", "train"): [(step, 1 / step) for step in range(1, 61)],
        ("learning_rate", "train"): [(step, 0.1) for step in range(1, 61)],
        ("eval_loss", "train"): [(30, 3.0), (60, 3.0)],
        ("eval_loss", "val"): [(30, 4.0), (60, 4.0)],
        ("bits_per_byte", "val"): [(30, 2.0), (60, 2.0)],
    }


def test_numbers_that_are_not_finite_are_kept(tracker, repo):
    values = [1.0, math.nan, math.inf, -math.inf, 2.0]
    for step, value in enumerate(values):
        tracker.log_metrics({"loss": value}, step, "train")
    tracker.close()
    pairs = read_metrics(find_runs(repo)["20260131_235959_baseline"])["loss", "train"]
    assert repr(pairs) == repr(list(enumerate(values)))


def test_distributions_and_texts_are_read_back(tracker, repo):
    from aim.storage.context import Context

    histogram = Histogram(-1.5, 2.5, [1, 0, 5, 2**40], 3.0, 4.0, 0)
    texts = ["# no *markup*\n\ttab\0", "é 漢 🎭", ""]
    for step in (2, 4):
        tracker.log_histograms({"weights/h.0.attn": histogram, "other": histogram}, step)
    for step, text in enumerate(texts):
        tracker.log_text('sample/"ü" 1', text, step)
    tracker.log_text("broken", "half a pair: \ud83d", 1)
    tracker.close()
    (run,) = find_runs(repo).values()
    found = read_sequence(run.get_distribution_sequence("weights/h.0.attn", Context({})))
    assert [step for step, _ in found] == [2, 4]
    for _, distribution in found:
        counts, edges = distribution.to_np_histogram()
        assert counts.tolist() == histogram.counts
        assert edges.tolist() == [-1.5, -0.5, 0.5, 1.5, 2.5]
    found = read_sequence(run.get_text_sequence('sample/"ü" 1', Context({})))
    assert [(step, text.data) for step, text in found] == list(enumerate(texts))
    ((_, broken),) = read_sequence(run.get_text_sequence("broken", Context({})))
    assert broken.data == "half a pair: ?"


def test_config_and_metadata_come_back_equal_and_nothing_else_is_there(tracker, repo):
    config = {"n_layer": 2, "seed": 2**63 - 1, "lr": 1e-3, "bias": False, "compile": None, "x": "é"}
    metadata = {
        "git": {"commit": "7ec0410", "dirty": "yes (2 changed, 0 untracked)"},
        "lineage": [{"run_id": "a", "from": []}, {"run_id": "b", "from": [[1], {}]}],
        "resumed_from": None,
        "sources": {},
        "argv": [],
    }
    tracker.log_config(config, {**metadata, "shape": (1, (2,))})
    tracker.close()
    (run,) = find_runs(repo).values()
    # No environment, no packages, no system metrics, no terminal logs.
    assert run[...] == {"config": config, **metadata, "shape": [1, [2]]}
    assert read_metrics(run) == {}
    assert run.get_terminal_logs() is None


def test_an_empty_run_is_listed_and_leaves_no_thread_and_no_lock(repo):
    before = set(threading.enumerate())
    tracker = AimTracker(repo, "empty")
    assert len(find_locks(repo)) == 1
    tracker.close()
    assert set(threading.enumerate()) == before
    assert find_locks(repo) == []
    assert find_runs(repo)["empty"].end_time is not None


def test_another_process_lists_and_reads_a_running_run(tracker, repo):
    tracker.log_config({"seed": 1}, {})
    tracker.log_metrics({"loss": 2.0}, 1, "train")
    tracker.flush()
    tracker.log_metrics({"loss": 1.0}, 2, "train")  # after the flush
    code = (
        "import json, sys, aim\n"
        "(run,) = aim.Repo.from_path(sys.argv[1]).iter_runs()\n"
        "(metric,) = run.metrics()\n"
        "print(json.dumps([run.name, run.end_time, metric.data.numpy()[1][0].tolist()]))\n"
    )
    command = [sys.executable, "-c", code, repo]
    reader = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(reader.stdout) == ["20260131_235959_baseline", None, [2.0, 1.0]]
    tracker.close()
    assert find_runs(repo)["20260131_235959_baseline"].end_time is not None


def test_a_killed_run_stays_listed_and_does_not_block_the_next(repo):
    assert start(repo, "killed", "kill").wait(60) == -signal.SIGKILL
    AimTracker(repo, "next").close()
    found = find_runs(repo)
    assert found.keys() == {"killed", "next"}
    assert found["killed"]["config"] == {"seed": 1}
    assert found["killed"].end_time is None


@pytest.mark.slow
def test_several_runs_may_create_a_repository_at_once_and_print_nothing(repo):
    names = {f"run{number}" for number in range(4)}
    processes = [start(repo, name) for name in names]
    assert [process.communicate(timeout=60) for process in processes] == [("", "")] * 4
    assert [process.returncode for process in processes] == [0] * 4
    found = find_runs(repo)
    assert found.keys() == names
    assert all(read_metrics(run) == LOSSES for run in found.values())


def test_a_partly_created_repository_is_completed(repo, tmp_path):
    """Aim itself fails to open one, with an empty message."""
    (tmp_path / "repo" / ".aim" / "meta").mkdir(parents=True)
    AimTracker(repo, "run").close()
    assert find_runs(repo).keys() == {"run"}


def test_a_locked_index_is_skipped_by_flush_and_awaited_by_close(tracker, repo):
    code = (
        "import sys, aimrocks\n"
        "db = aimrocks.DB(sys.argv[1], aimrocks.Options())\n"
        "print('open', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, f"{repo}/.aim/meta/index"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"open\n"
    tracker.flush()
    threading.Timer(0.5, holder.communicate, [b"\n"]).start()
    tracker.close()
    assert holder.wait(10) == 0
    assert find_runs(repo).keys() == {"20260131_235959_baseline"}


def test_an_index_that_stays_locked_does_not_keep_a_run_from_closing(tracker, repo, monkeypatch):
    import aim
    from aim.sdk.index_manager import RepoIndexManager
    from aimrocks.errors import RocksIOError

    def locked(*_):
        raise RocksIOError(b"lock hold by another process")

    tracker.log_metrics({"loss": 1.0}, 1, "train")
    with monkeypatch.context() as patched:
        patched.setattr(module.time, "sleep", lambda seconds: None)
        patched.setattr(type(tracker._run.repo), "_get_index_tree", locked)
        tracker.close()
    assert find_locks(repo) == []
    opened = aim.Repo.from_path(repo)
    (run_hash,) = opened.list_all_runs()
    RepoIndexManager(opened).index(run_hash)  # as `aim up` does
    opened.close()
    (run,) = find_runs(repo).values()
    assert run.end_time is not None
    assert read_metrics(run) == {("loss", "train"): [(1, 1.0)]}


def test_a_server_that_blocks_close_raises_after_a_timeout(tracker, repo, monkeypatch):
    release = threading.Event()
    tracker._is_local = False
    monkeypatch.setattr(type(tracker._run), "close", lambda run: release.wait(60))
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    with pytest.raises(TimeoutError, match=r"closing .*repo .* 0.5 seconds"):
        tracker.close()
    release.set()
    assert find_runs(repo).keys() == {"20260131_235959_baseline"}


@pytest.mark.parametrize("where", ["file", "file/deep"])
def test_a_file_in_place_of_the_repository_raises_at_once(repo, tmp_path, where):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        AimTracker(str(tmp_path / where), "run")


@pytest.mark.parametrize(
    ("listens", "reason"),
    [
        (False, "RuntimeError Failed to connect to Aim Server"),
        pytest.param(True, "TimeoutError opening aim", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_does_not_answer_raises_within_seconds_and_prints_nothing(
    repo, listens, reason
):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"aim://127.0.0.1:{server.getsockname()[1]}"
        out, error = start(address, "run").communicate(timeout=60)
    seconds, message = error.split(" ", 1)
    assert message.startswith(reason)
    assert len(error.splitlines()) == 1
    assert out == ""
    assert float(seconds) < 8


@pytest.fixture
def server(tmp_path, repo):
    """Start an Aim server on the loopback; return its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "repo").mkdir()
    command = Path(sys.executable).with_name("aim")
    process = subprocess.Popen(
        [command, "server", "--host=127.0.0.1", f"--port={port}", f"--repo={repo}", "--yes"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it starts processes that must end with it
    )
    try:
        code = f"import socket; socket.create_connection(('127.0.0.1', {port})).close()"
        until = time.monotonic() + 60
        while subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode:
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.2)
        yield process, f"aim://127.0.0.1:{port}"
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_run_is_stored_on_a_server_and_a_killed_server_does_not_block_close(server, repo):
    process, address = server
    assert start(address, "remote").communicate(timeout=60) == ("", "")
    run = start(address, "abandoned", "wait")
    assert run.stdout.readline() == "ready\n"
    kill(process)
    began = time.monotonic()
    _, error = run.communicate("\n", timeout=60)
    assert error.startswith("TimeoutError closing 127.0.0.1:")
    assert len(error.splitlines()) == 1
    assert time.monotonic() - began < 10
    assert read_metrics(find_runs(repo)["remote"]) == LOSSES


def test_a_missing_aim_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        require_aim(ModelConfig())
    (line,) = str(raised.value).splitlines()
    for fact in ("aim_logging", "pip install '.[aim]'", "Python below 3.13", "--no-aim-logging"):
        assert fact in line


# A whole run ----------------------------------------------------------------------------------


def test_aim_has_everything_that_a_run_logs_once(tiny, quiet):
    pytest.importorskip("aim")
    from aim.storage.context import Context

    config = tiny(aim_logging=True, dropout=0.2, histogram_interval=2, sample_interval=3)
    result = train(config, argv=["--aim-logging"], output=quiet)
    assert "warning" not in RunDirectory(result.run_dir).console.read_text(encoding="utf-8")
    (run,) = find_runs(".").values()
    assert run.name == result.run_dir.name
    logged: dict = {}
    names = {get_tag(n, subset): (n, subset) for n, m in METRICS.items() for subset in m.subsets}
    for line in RunDirectory(result.run_dir).metrics.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        step = values.pop("step")
        del values["seconds"]
        for tag, value in values.items():
            logged.setdefault(names[tag], []).append((step, value))
    assert read_metrics(run) == logged
    assert {subset for _, subset in logged} == {"train", "val"}
    names = [name for name, _ in load_model(result.export_dir)[0].named_parameters()]
    expected = {f"{kind}/{name}" for kind in ("parameters", "gradients") for name in names}
    found = run.collect_sequence_info("distributions", skip_last_value=True)["distributions"]
    assert {sequence["name"] for sequence in found} == expected
    assert len(found) == len(expected)
    for name in expected:
        sequence = run.get_distribution_sequence(name, Context({}))
        assert [step for step, _ in read_sequence(sequence)] == [2, 4, 6]
    samples = RunDirectory(result.run_dir).samples.read_text(encoding="utf-8").splitlines()
    *samples, best = map(json.loads, samples)
    texts = read_sequence(run.get_text_sequence("sample", Context({})))
    assert [{"step": s, "text": text.data} for s, text in texts] == samples
    exported = read_sequence(run.get_text_sequence("sample_exported", Context({})))
    assert [(s, text.data) for s, text in exported] == [(best["step"], best["text"])]
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_bytes())
    assert run["config"] == record["config"]
    assert run["run_dir"] == str(result.run_dir.resolve())
    assert run["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run["git"].keys() >= {"commit", "branch", "dirty"}
    assert run["lineage"] == []
    assert run["argv"] == ["--aim-logging"]
    assert run.end_time is not None


def test_a_run_with_aim_is_bit_for_bit_identical(tiny, quiet):
    pytest.importorskip("aim")
    off = train(tiny(dropout=0.2), output=quiet)
    on = train(tiny(dropout=0.2, aim_logging=True), output=quiet)
    weights = [load_file(result.checkpoint / "model.safetensors") for result in (off, on)]
    assert_equal(*weights)


@pytest.mark.parametrize(
    "call", ["__init__", "log_config", "log_metrics", "log_histograms", "log_text", "close"]
)
def test_a_failing_aim_is_one_warning_and_the_run_is_bit_for_bit_identical(
    tiny, quiet, monkeypatch, call
):
    pytest.importorskip("aim")

    def broken(*_):
        raise RuntimeError("out of order")

    reference = train(tiny(), output=quiet)
    monkeypatch.setattr(AimTracker, call, broken)
    result = train(tiny(aim_logging=True, histogram_interval=2), output=quiet)
    console = RunDirectory(result.run_dir).console.read_text(encoding="utf-8")
    (warning,) = (line for line in console.splitlines() if line.startswith("warning:"))
    assert "Aim" in warning and "out of order" in warning
    weights = [load_file(r.checkpoint / "model.safetensors") for r in (reference, result)]
    assert_equal(*weights)


@pytest.mark.parametrize("error", [RunError, KeyboardInterrupt])
def test_a_failed_or_aborted_run_has_an_end_time_in_aim(tiny, quiet, monkeypatch, error):
    pytest.importorskip("aim")

    def fail(*_):
        raise error("x")

    monkeypatch.setattr(trainer_module.Trainer, "training_step", fail)
    with pytest.raises(error):
        train(tiny(aim_logging=True), output=quiet)
    (run,) = find_runs(".").values()
    assert run.end_time is not None
    assert find_locks(".") == []


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_is_complete_in_aim_and_prints_the_command_that_shows_it(
    text_file,
):
    pytest.importorskip("aim")
    flags = [*TINY_FLAGS, "--aim-logging", "--aim-repo", "elsewhere", "--max-iters=1000000"]
    status, out, _ = train_until(signal.SIGTERM, "--data", str(text_file), *flags)
    assert status == 143
    assert " up --repo elsewhere" in out
    (run,) = find_runs("elsewhere").values()
    assert run.end_time is not None
    steps = [step for step, _ in read_metrics(run)["loss", "train"]]
    assert steps == list(range(1, len(steps) + 1))


def test_a_missing_aim_fails_before_there_is_a_run_directory(tiny, quiet, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="aim_logging"):
        train(tiny(aim_logging=True), output=quiet)
    assert not Path("runs").exists()


def test_a_run_without_aim_never_imports_it(tiny, quiet, monkeypatch):
    monkeypatch.setitem(sys.modules, "aim", None)  # importing it fails
    assert train(tiny(), output=quiet).step == 6


def test_an_installed_aim_and_a_server_address_are_accepted(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    require_aim(ModelConfig(aim_repo="aim://127.0.0.1:53800"))


@pytest.mark.parametrize("repo", ["http://here", "s3://bucket", "file:///tmp/x"])
def test_a_repository_with_another_scheme_is_rejected_before_there_is_a_run_directory(
    tiny, quiet, repo
):
    with pytest.raises(UserError, match=f"aim_repo .*{repo}"):
        train(tiny(aim_logging=True, aim_repo=repo), output=quiet)
    assert not Path("runs").exists()
