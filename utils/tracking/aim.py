"""Aim: `aim up` shows the runs of a repository side by side. The package is optional."""

import atexit
import contextlib
import importlib.util
import logging
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from filelock import FileLock

from parameters import ModelConfig
from utils.errors import UserError
from utils.tracking.histograms import Histogram

TIMEOUT = 15  # seconds for Aim to open or close a run; on a local disk each takes 0.1 s


def require_aim(config: ModelConfig) -> None:
    """Raise `UserError` unless Aim is installed and `aim_repo` is a possible repository."""
    scheme, separator, _ = (config.aim_repo or "").partition("://")
    if separator and scheme != "aim":
        raise UserError(f"aim_repo must be a directory or aim://host:port, got {config.aim_repo}")
    if not importlib.util.find_spec("aim"):
        raise UserError(
            "aim_logging needs Aim, which is not installed: pip install '.[aim]' (Linux or macOS, "
            "Python below 3.13); or switch it off with --no-aim-logging"
        )


def get_aim_repo(config: ModelConfig) -> str:
    """Return the repository for these settings, in the form that `aim up --repo` takes."""
    return config.aim_repo or str(Path(config.runs_dir).resolve().parent)


class AimTracker:
    """Record one run of Folio as the Aim run `name`.

    `repo` is the directory that contains `.aim`, or will, or a server: `aim://host:port`. Raises
    an exception of Aim's, or `TimeoutError`, if it cannot be opened.
    """

    def __init__(self, repo: str, name: str):
        # Without a handler, Python prints the warnings of Aim's loggers on stderr.
        logging.getLogger("aim").addHandler(logging.NullHandler())
        # Imported late, as this takes a second.
        import aim
        from aim.ext.cleanup import AutoClean

        self._aim = aim
        self._is_local = "://" not in repo
        try:
            if self._is_local:
                self._run = _open_run(repo, name)
            else:  # Aim tries three times, for 10 s each and more, if a server does not answer
                self._run = _call_with_timeout(f"opening {repo}", lambda: _open_run(repo, name))
        finally:
            # Aim's exit handler starts a thread, which Python 3.12 forbids, and waits forever for
            # a server that is gone. `close` does all of its work.
            atexit.unregister(AutoClean.cleanup)

    def log_config(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Set `run["config"]`, and each item of the metadata under its own key.

        Values are read back equal, except that tuples become lists.
        """
        for key, value in {**metadata, "config": dict(config)}.items():
            self._run.set(key, value, strict=False)  # a type unknown to Aim becomes its repr
        self.flush()  # list the run from its start

    def log_metrics(self, metrics: Mapping[str, float], step: int, subset: str) -> None:
        """Track each number under its name, in the context of the subset."""
        for name, value in metrics.items():
            # NaN and infinity are stored as such, and shown as a gap.
            # float(), as the first value of a sequence decides its type.
            self._run.track(float(value), name=name, step=step, context={"subset": subset})

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Track each histogram as a distribution, from its counts."""
        for name, histogram in histograms.items():
            bins = (histogram.low, histogram.high)
            value = self._aim.Distribution(hist=histogram.counts, bin_range=bins)
            self._run.track(value, name=name, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Track a text."""
        # Aim stores UTF-8, which has no lone surrogates.
        text = text.encode("utf-8", "replace").decode()
        self._run.track(self._aim.Text(text), name=name, step=step)

    def flush(self) -> None:
        """List the run in the repository's index, from which readers list runs.

        The numbers need no flush: each is in its file when `track` returns, even if the process is
        killed then. On a server only `close` updates the index, as that takes a round trip.
        """
        if self._is_local:
            _update_index(self._run, attempts=1)

    def close(self) -> None:
        """End the run and list its final state."""
        run, self._run = self._run, None

        def close_run() -> None:
            with contextlib.closing(run.repo), contextlib.closing(run):
                run.meta_run_tree["end_time"] = time.time()  # for the index; closing sets it too
                _update_index(run, attempts=100)

        if self._is_local:
            close_run()  # in the thread that locked the run, as no other can unlock it
        else:  # Aim may wait forever for a server that is gone, or through a race of its threads
            _call_with_timeout(f"closing {run.repo.root_path}", close_run)


def _open_run(repo: str, name: str) -> Any:
    """Open an Aim run that captures nothing by itself, in a new repository if there is none.

    Processes take turns: until it has a VERSION file, Aim takes a repository that another process
    is creating, or was killed while creating, for an outdated one.
    """
    import aim
    from aim.sdk.configs import get_aim_repo_name
    from aim.sdk.utils import clean_repo_path

    with contextlib.ExitStack() as stack:
        opened = repo
        if "://" not in repo:
            directory = Path(clean_repo_path(repo), get_aim_repo_name())
            (directory / "locks").mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(directory / "locks" / "folio", timeout=TIMEOUT))
            opened = aim.Repo.from_path(repo, init=not (directory / "VERSION").exists())
        run = aim.Run(
            repo=opened,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        run.name = name
    return run


def _update_index(run: Any, attempts: int) -> None:
    """Copy a run's settings and names, but not its numbers, to the repository's index.

    Aim's own RepoIndexManager does the same, and leaves a thread running. `_get_index_tree` is a
    private name of Aim 3.29. Other processes lock the index for 0.05 s at a time. If it stays
    locked, the run is stored all the same, and `aim up` adds it to the index.
    """
    from aimrocks.errors import RocksIOError

    for _ in range(attempts):
        try:
            index = run.repo._get_index_tree("meta", 0).view(())
            return run.meta_run_tree.finalize(index=index)
        except RocksIOError:
            time.sleep(0.05)


def _call_with_timeout(what: str, call: Callable[[], Any]) -> Any:
    """Return `call()`; raise `TimeoutError` and leave its thread running after `TIMEOUT`."""
    with ThreadPool(1) as pool:
        try:
            return pool.apply_async(call).get(TIMEOUT)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"{what} took more than {TIMEOUT} seconds") from None
