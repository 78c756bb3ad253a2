"""A run's own directory, and the record in it of how the run was made.

runs/YYYYMMDD_HHMMSS_<tag>/
    artifacts/checkpoints/step_00001000/  artifacts/export/
    logs/tensorboard/  logs/metrics.jsonl  logs/samples.jsonl  logs/console.txt
    meta/git.txt  meta/env.txt  meta/full_config.json  meta/result.json
    report.html
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from parameters import GROUPS, ModelConfig
from utils.errors import UserError
from utils.files import make_directory, sync, write_atomic

RECORD_VERSION = 1  # of full_config.json
GIT_SECONDS = 10
DIFF_LIMIT = 1_000_000  # bytes of the diff that are kept
UNTRACKED_LIMIT = 1_000  # names of untracked files that are listed
REPOSITORY_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_DIFF_OPTS", "GIT_PREFIX")
# The form that `git apply` takes, whatever the user's own settings for diffs are.
PLAIN_DIFF = (
    *("--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"),
    *("--unified=3", "--submodule=short", "--src-prefix=a/", "--dst-prefix=b/"),
)


class RunIDGenerator:
    """Names runs by time and tag: `20260131_235959_baseline`."""

    @staticmethod
    def generate(tag: str | None = None, now: datetime | None = None) -> str:
        """The run id for `tag` at `now`, the local time by default."""
        stamp = (now or datetime.now()).strftime("%Y%m%d_%H%M%S")
        word = RunIDGenerator.sanitize(tag or "")
        return f"{stamp}_{word}" if word else stamp

    @staticmethod
    def sanitize(tag: str) -> str:
        """`tag` as a file name that every system takes: letters, digits, `.`, `-` and `_`."""
        plain = unicodedata.normalize("NFKC", tag)
        return re.sub(r"[^\w.-]+", "-", plain).strip("-._")[:60].rstrip("-._")


@dataclass(frozen=True)
class RunDirectory:
    """The paths inside one run directory."""

    path: Path

    @property
    def run_id(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where the bundles `step_00001000/` and so on are."""
        return self.path / "artifacts" / "checkpoints"

    def get_checkpoint(self, step: int) -> Path:
        """The bundle of that step."""
        return self.checkpoints / f"step_{step:08}"

    @property
    def export(self) -> Path:
        """The bundle of the best model."""
        return self.path / "artifacts" / "export"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's log directory."""
        return self.path / "logs" / "tensorboard"

    @property
    def metrics(self) -> Path:
        """One line of JSON for each step, and one for each evaluation."""
        return self.path / "logs" / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One line of JSON for each text that the model wrote on the way."""
        return self.path / "logs" / "samples.jsonl"

    @property
    def report(self) -> Path:
        """The run as a page."""
        return self.path / "report.html"

    @property
    def console(self) -> Path:
        """What was printed."""
        return self.path / "logs" / "console.txt"

    @property
    def meta(self) -> Path:
        """The record of how the run was made."""
        return self.path / "meta"


class RunDirectoryCreator:
    """Makes run directories in `runs_dir`, each of its own, whoever else is making some."""

    def __init__(self, runs_dir: Path):
        self.runs_dir = runs_dir

    def create(self, run_id: str) -> RunDirectory:
        """Make `run_id`, or `run_id_2`, `run_id_3`, … where that name is taken.

        Raises `UserError` where `runs_dir` cannot be written to.
        """
        try:
            make_directory(self.runs_dir)
            run = RunDirectory(self._made_exclusively(run_id))
            for directory in (run.tensorboard, run.checkpoints, run.meta):
                make_directory(directory)  # durable, as the checkpoints in it will be
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot make a run directory in {self.runs_dir}: {reason}; "
                "name another place with --runs-dir"
            ) from None
        return run

    def _made_exclusively(self, run_id: str) -> Path:
        number = 1
        while True:
            path = self.runs_dir / (run_id if number == 1 else f"{run_id}_{number}")
            try:
                path.mkdir()  # atomic: of two that try the same name, one fails
                sync(self.runs_dir)
                return path
            except FileExistsError:
                number += 1


class MetadataCapture:
    """Writes `meta/`: the code, the machine and the settings that a run was made with."""

    def __init__(self, meta: Path, checkout: Path):
        self.meta = meta
        self.checkout = checkout

    def capture(
        self,
        config: ModelConfig,
        sources: Mapping[str, str],
        run: Mapping[str, Any],
        machine: Mapping[str, str],
    ) -> None:
        """Write all three files. `machine` is what only a running torch knows of its device."""
        write_atomic(self.meta / "git.txt", describe_git(self.checkout))
        write_atomic(self.meta / "env.txt", describe_environment(machine))
        write_full_config(self.meta / "full_config.json", config, sources, run)


def write_full_config(
    path: Path, config: ModelConfig, sources: Mapping[str, str], run: Mapping[str, Any]
) -> None:
    """Write `{"format_version": 1, "config": …, "sources": …, "run": …}`.

    `config` holds what makes the model and nothing of what the run is called, so that
    `--config full_config.json` trains the same model again, as another run.
    """
    names = GROUPS["run"].model_fields
    content = {
        "format_version": RECORD_VERSION,
        "config": config.model_dump(exclude=set(names)),
        "sources": {name: source for name, source in sources.items() if name not in names},
        "run": run,
    }
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_record(run_dir: Path) -> dict[str, Any]:
    """What `meta/` tells of a run: `config`, `sources`, `run` and, from git.txt, `git`.

    Raises `UserError` where there is no such record, or a damaged one.
    """
    path = run_dir / "meta" / "full_config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: dict(record[name]) for name in ("config", "sources", "run")}
    except OSError as error:
        raise UserError(f"{run_dir} is not a run: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return {**parts, "git": read_git_record(run_dir / "meta" / "git.txt")[0]}


def read_git_record(path: Path) -> tuple[dict[str, str], str]:
    """The heading of a git.txt (`commit`, `branch`, `dirty`, … or `git`), and its diff."""
    try:
        heading, _, diff = path.read_bytes().decode("utf-8", "replace").partition("\n\n")
    except OSError as error:
        return {"git": f"unavailable: {error.strerror}"}, ""
    rows = [line.partition(": ") for line in heading.splitlines()]
    return {key: value for key, colon, value in rows if colon and not key.startswith(" ")}, diff


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write how a run ended: its result, or `{"error": …}`. A run that was killed has no such."""
    write_atomic(path, json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n")


def describe_environment(machine: Mapping[str, str]) -> str:
    """Python, system, device and installed packages: a list of what is asked for by name.

    Never the environment, where people keep their passwords.
    """
    known = [dist.metadata for dist in metadata.distributions()]  # parsed anew at each look
    packages = {about["Name"].lower(): about["Version"] for about in known if about["Name"]}
    lines = [
        f"python: {platform.python_version()} ({platform.python_implementation()})",
        f"system: {platform.platform()}",
        f"machine: {platform.machine()}",
        f"executable: {Path(sys.executable).name}",
        *(f"{name}: {value}" for name, value in machine.items()),
        "",
        "packages:",
        *(f"  {name}=={version}" for name, version in sorted(packages.items())),
    ]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------
# Git


def describe_git(checkout: Path) -> bytes:
    """The state of the code, as a file that `git apply` takes: a heading, then the diff.

    Whatever keeps git from answering is written down instead: no run fails for its record.
    """
    try:
        # GitPython refuses to be imported where there is no git program.
        import git
    except ImportError as error:
        return _unavailable(f"git is not installed ({str(error).strip().splitlines()[0]})")
    try:
        with git.Repo(checkout, search_parent_directories=True) as repo:
            return _describe_repository(repo, checkout)
    except git.InvalidGitRepositoryError:
        return _unavailable("the code is not in a git repository")
    except (_GitFailed, git.GitError, OSError, ValueError) as error:
        return _unavailable((str(error).strip() or type(error).__name__).splitlines()[0])


class _GitFailed(RuntimeError):
    """The git program did not answer, or answered with a complaint."""


def _unavailable(reason: str) -> bytes:
    return f"git: unavailable: {reason}\n".encode("utf-8", "replace")


def _describe_repository(repo: Any, checkout: Path) -> bytes:
    """Commit, branch, changes and untracked files of the folder `checkout`, and its diff."""
    status = _git(checkout, "status", "--porcelain=v1", "--untracked-files=normal", "--", ".")
    lines = os.fsdecode(status).splitlines()
    untracked = [line[3:] for line in lines if line.startswith("??")]
    changed = len(lines) - len(untracked)
    has_commits = repo.head.is_valid()
    record = [
        f"commit: {repo.head.commit.hexsha if has_commits else '(none yet)'}",
        f"branch: {'(detached)' if repo.head.is_detached else repo.active_branch.name}",
        f"dirty: {'yes' if changed else 'no'} ({changed} changed, {len(untracked)} untracked)",
    ]
    if untracked:
        record.append("untracked:")
        record += [f"  {name}" for name in untracked[:UNTRACKED_LIMIT]]
        if len(untracked) > UNTRACKED_LIMIT:
            record.append(f"  … and {len(untracked) - UNTRACKED_LIMIT} more")
    diff = b""
    if changed and has_commits:
        diff = _git(checkout, "diff", "HEAD", *PLAIN_DIFF, "--", ".", limit=DIFF_LIMIT + 1)
        size = f"{len(diff)} bytes"
        if len(diff) > DIFF_LIMIT:
            diff, size = diff[:DIFF_LIMIT], f"over {DIFF_LIMIT} bytes and cut there: won't apply"
        record.append(f"diff: {size}")
    return os.fsencode("\n".join([*record, "", ""])) + diff


def _git(directory: Path, *words: str, limit: int = -1) -> bytes:
    """What git says, at most `limit` bytes of it, within `GIT_SECONDS`. Raises `_GitFailed`.

    GitPython would wait for ever, or hold a diff of any size in memory.
    """
    # Variables such as GIT_DIR, which git sets for its hooks, would name another repository.
    environment = {name: v for name, v in os.environ.items() if name not in REPOSITORY_VARIABLES}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # look, and leave the index alone
    with tempfile.TemporaryFile() as complaint:
        process = subprocess.Popen(
            ["git", *words],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=complaint,
        )
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(GIT_SECONDS, give_up)
        timer.start()
        with process:
            assert process.stdout is not None
            answer = process.stdout.read(limit)
            was_cut = len(answer) == limit
            if was_cut:
                process.kill()
        timer.cancel()
        if timed_out.is_set():
            raise _GitFailed(f"git {words[0]} took over {GIT_SECONDS} seconds")
        if process.returncode != 0 and not was_cut:
            complaint.seek(0)
            raise _GitFailed(
                complaint.read().decode("utf-8", "replace") or f"git {words[0]} failed"
            )
    return answer
