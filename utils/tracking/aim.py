"""Aim: `aim up` shows the runs of a repository side by side. The package is optional."""

import atexit
import contextlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from parameters import ModelConfig
from utils.errors import UserError
from utils.tracking.histograms import Histogram

PATIENCE = 15  # seconds for Aim to open or close a run; on a local disk each takes a tenth of one

_Result = TypeVar("_Result")


def require_aim(config: ModelConfig) -> None:
    """Raise `UserError`, with the remedy, unless Aim is installed and `aim_repo` can be one."""
    scheme, colon, _ = (config.aim_repo or "").partition("://")
    if colon and scheme != "aim":
        raise UserError(f"aim_repo must be a directory or aim://host:port, got {config.aim_repo}")
    if importlib.util.find_spec("aim"):
        return
    remedy = "pip install '.[aim]'; or"
    if sys.platform == "win32" or sys.version_info >= (3, 13):
        remedy = "it has no wheels for Windows or for Python 3.13 and newer;"
    raise UserError(
        f"aim_logging needs Aim, which is not installed: {remedy} switch it off with "
        "--no-aim-logging"
    )


def get_aim_repo(config: ModelConfig) -> str:
    """Where Aim keeps the runs of these settings, as `aim up --repo` takes it."""
    return config.aim_repo or str(Path(config.runs_dir).resolve().parent)


class AimTracker:
    """Records one run of Folio as one run of Aim.

    Args:
        repo: the directory that holds `.aim`, or will, or a server: `aim://host:port`.
        name: the name of the run, as Aim shows it.

    Raises:
        Exception: the repository cannot be opened, or the server not within `PATIENCE`.
    """

    def __init__(self, repo: str, name: str):
        # Without a handler, Python prints the warnings of Aim's loggers on stderr.
        logging.getLogger("aim").addHandler(logging.NullHandler())
        # Here, as importing it takes a second.
        import aim
        from aim.ext.cleanup import AutoClean

        self._aim = aim
        self._is_local = "://" not in repo
        try:
            if self._is_local:
                self._run = _open(repo, name)
            else:  # a server that is silent is asked three times, for 10 s each, and more
                self._run = _within(PATIENCE, f"opening {repo}", lambda: _open(repo, name))
        finally:
            # At exit Aim starts a thread, which Python 3.12 forbids, and waits without end for a
            # server that is gone. `close` does all that it would do.
            atexit.unregister(AutoClean.cleanup)

    def log_config(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Set `run["config"]`, and each item of the metadata under its own key.

        Values come back equal, but for tuples, which come back as lists.
        """
        for key, value in {**metadata, "config": dict(config)}.items():
            self._run.set(key, value, strict=False)  # what Aim has no type for becomes its repr
        self.flush()  # a run is listed from its beginning

    def log_metrics(self, metrics: Mapping[str, float], step: int, subset: str) -> None:
        """Track each number under its name, in the context of the subset."""
        for name, value in metrics.items():
            # NaN and infinity as they are: Aim returns the same, and its pages show a gap.
            # float(): a sequence that begins with an integer changes its type at the first float.
            self._run.track(float(value), name=name, step=step, context={"subset": subset})

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Track each histogram as a distribution, from its counts."""
        for name, histogram in histograms.items():
            bins = (histogram.low, histogram.high)
            value = self._aim.Distribution(hist=histogram.counts, bin_range=bins)
            self._run.track(value, name=name, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Track a text."""
        # A lone surrogate has no UTF-8, which Aim stores.
        text = text.encode("utf-8", "replace").decode()
        self._run.track(self._aim.Text(text), name=name, step=step)

    def flush(self) -> None:
        """List the run in the repository's index, which is where readers look for runs.

        The numbers need nothing: each is in its file when `track` returns, even if the process is
        killed then. A run that is killed stays listed as of its last flush. A server's index is
        left to `close`, as it would have to be waited for.
        """
        if self._is_local:
            # Another process may be writing the index, as `aim up` does: the next flush does it.
            with contextlib.suppress(Exception):
                _index(self._run)

    def close(self) -> None:
        """End the run and list it as it is now."""
        run, self._run = self._run, None

        def close():
            try:
                # For the index; run.close() sets it once more.
                run.meta_run_tree["end_time"] = time.time()
                _index_patiently(run)
            finally:
                run.close()
                run.repo._resources.close()  # says goodbye to a server

        # Aim may wait without end for a server that is gone, and half a minute or without end, by
        # a race of its threads, for one that sleeps or has ended.
        try:
            _within(PATIENCE, f"closing {run.repo.root_path}", close)
        finally:
            if self._is_local:
                run._lock.release()  # what only the thread that took the lock can do


def _open(repo: str, name: str) -> Any:
    """An Aim run with nothing captured but what it is given."""
    import aim

    with _repository(repo) as where:
        run = aim.Run(
            repo=where,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        run.name = name
        return run


@contextlib.contextmanager
def _repository(repo: str) -> Iterator[Any]:
    """What `aim.Run` takes, created where it is missing, by one process at a time.

    Aim takes a repository for an outdated one while another process creates it, or for ever if
    that process is killed: until it has a VERSION.
    """
    from aim import Repo
    from aim.sdk.configs import get_aim_repo_name
    from aim.sdk.utils import clean_repo_path

    if "://" in repo:
        yield repo
        return
    directory = Path(clean_repo_path(repo), get_aim_repo_name())
    (directory / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "locks" / "folio", timeout=PATIENCE):
        yield Repo.from_path(repo, init=not (directory / "VERSION").exists())


def _index(run: Any) -> None:
    """Copy the run's settings and names, not its numbers, to the index of the repository.

    It is what Aim's own RepoIndexManager does, which would leave a thread behind.
    """
    run.meta_run_tree.finalize(index=run.repo._get_index_tree("meta", 0).view(()))


def _index_patiently(run: Any) -> None:
    """Index the run, though other processes write the index, for some hundredths of a second each.

    Raises:
        RuntimeError: one of them writes it for a third of `PATIENCE`.
    """
    from aimrocks.errors import RocksIOError

    until = time.monotonic() + PATIENCE / 3
    while True:
        try:
            return _index(run)
        except RocksIOError:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"the run is stored, but {run.repo.path} was busy: `aim up` lists it"
                ) from None
            time.sleep(0.05)


def _within(seconds: float, what: str, call: Callable[[], _Result]) -> _Result:
    """What `call` returns or raises; `TimeoutError` where it takes longer, and it is left alone."""
    outcome: list[_Result] = []
    errors: list[BaseException] = []

    def work():
        try:
            outcome.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"{what} took more than {seconds} seconds")
    if errors:
        raise errors[0]
    return outcome[0]
