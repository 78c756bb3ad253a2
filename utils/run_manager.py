"""A run's own directory, and the record in it of how the run was made.

runs/YYYYMMDD_HHMMSS_<tag>/
    artifacts/checkpoints/step_00001000/  artifacts/export/
    logs/tensorboard/  logs/metrics.jsonl  logs/samples.jsonl  logs/console.txt
    meta/git.txt  meta/env.txt  meta/full_config.json  meta/result.json
    report.html
"""

import contextlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from parameters import GROUPS, ModelConfig
from utils.checks import format_name
from utils.errors import UserError, format_reason
from utils.files import make_directory, read_regular, sync, write_atomic

RECORD_VERSION = 1  # of full_config.json
GIT_SECONDS = 10  # time limit of one git command
DIFF_LIMIT = 1_000_000  # bytes of the diff that are kept
UNTRACKED_LIMIT = 1_000  # names of untracked files that are listed
# Set by git for its hooks: they would select another repository.
REPOSITORY_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_DIFF_OPTS", "GIT_PREFIX")
# A diff that `git apply` accepts, regardless of the user's own diff settings.
DIFF_OPTIONS = (
    *("--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"),
    *("--unified=3", "--submodule=short", "--src-prefix=a/", "--dst-prefix=b/"),
)


def create_run_id(tag: str | None, now: datetime | None = None) -> str:
    """Name a run by the time, `now` or the local time, and its tag: `20260131_235959_baseline`."""
    stamp = (now or datetime.now()).strftime("%Y%m%d_%H%M%S")
    return "_".join(filter(None, (stamp, sanitize_tag(tag))))


def sanitize_tag(tag: str | None) -> str:
    """Return `tag` as a portable file name of letters, digits, `.`, `-` and `_`."""
    plain = unicodedata.normalize("NFKC", tag or "")
    return re.sub(r"[^\w.-]+", "-", plain).strip("-._")[:60].rstrip("-._")


def get_run_tag(run_id: str) -> str:
    """Return the tag in a run id, `baseline` in `20260131_235959_baseline`, or "" without one.

    A number alone is no tag: it counts the untagged runs of one second.
    """
    tag = re.sub(r"^\d{8}_\d{6}_?", "", run_id)
    return "" if tag.isdecimal() else tag


class RunDirectory:
    """Paths in a run directory."""

    def __init__(self, path: Path):
        self.path = path
        self.run_id = path.name
        self.checkpoints = path / "artifacts" / "checkpoints"
        self.export = path / "artifacts" / "export"  # the bundle of the best model
        self.tensorboard = path / "logs" / "tensorboard"
        self.metrics = path / "logs" / "metrics.jsonl"  # a line per step and per evaluation
        self.samples = path / "logs" / "samples.jsonl"  # a line per generated sample
        self.console = path / "logs" / "console.txt"
        self.meta = path / "meta"
        self.report = path / "report.html"

    def get_checkpoint(self, step: int) -> Path:
        """Return the path of a step's bundle."""
        return self.checkpoints / f"step_{step:08}"


def create_run_directory(runs_dir: Path, run_id: str) -> RunDirectory:
    """Create `run_id` in `runs_dir`, or `run_id_2`, `run_id_3`, … if that name is taken.

    Processes that create at once get different ones. Raises `UserError` if `runs_dir` cannot be
    written to.
    """
    try:
        make_directory(runs_dir)
        for number in itertools.count(1):
            run = RunDirectory(runs_dir / (f"{run_id}_{number}" if number > 1 else run_id))
            with contextlib.suppress(FileExistsError):
                run.path.mkdir()  # atomic: fails if another process has just created it
                break
        sync(runs_dir)
        for directory in (run.tensorboard, run.checkpoints, run.meta):
            make_directory(directory)  # durable, as the checkpoints in it will be
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot create a run directory in {format_name(str(runs_dir))}: {reason}; choose "
            "another with --runs-dir"
        ) from None
    return run


def write_metadata(
    meta: Path,
    checkout: Path,
    config: ModelConfig,
    sources: Mapping[str, str],
    run: Mapping[str, Any],
    machine: Mapping[str, str],
) -> None:
    """Write `meta/`. `machine` has the facts about the device that need torch."""
    write_atomic(meta / "git.txt", describe_git(checkout))
    write_atomic(meta / "env.txt", describe_environment(machine))
    write_full_config(meta / "full_config.json", config, sources, run)


def write_full_config(
    path: Path, config: ModelConfig, sources: Mapping[str, str], run: Mapping[str, Any]
) -> None:
    """Write `{"format_version": 1, "config": …, "sources": …, "run": …}`.

    `config` omits the settings of the run itself, such as its tag and place, so that
    `--config full_config.json` trains the same model again as another run.
    """
    names = GROUPS["run"].model_fields
    content = {
        "format_version": RECORD_VERSION,
        "config": config.model_dump(exclude=set(names)),
        "sources": {name: source for name, source in sources.items() if name not in names},
        "run": run,
    }
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write result.json: a run's result, or `{"error": …}`. A killed run has no such file."""
    write_atomic(path, json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n")


def read_record(run_dir: Path) -> dict[str, Any]:
    """Read `meta/`: `config`, `sources`, `run`, `git` (git.txt's heading) and `diff`.

    Raises `UserError` if there is no full_config.json, or it is damaged.
    """
    path = run_dir / "meta" / "full_config.json"
    try:
        record = json.loads(read_regular(path).decode("utf-8"))
        parts = {name: dict(record[name]) for name in ("config", "sources", "run")}
    except OSError as error:
        raise UserError(f"{run_dir} is not a run: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    try:
        content = read_regular(path.with_name("git.txt")).decode("utf-8", "replace")
    except OSError as error:
        content = f"git: unavailable: {error.strerror}"
    heading, _, diff = content.partition("\n\n")
    git = dict(line.split(": ", 1) for line in heading.splitlines() if re.match(r"\S.*: ", line))
    return {**parts, "git": git, "diff": diff}


def describe_environment(machine: Mapping[str, str]) -> str:
    """Return env.txt: Python, system, `machine`, packages; no variables, which hold passwords."""
    known = [dist.metadata for dist in metadata.distributions()]  # each access parses it again
    packages = {about["Name"].lower(): about["Version"] for about in known if about["Name"]}
    facts = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "machine": platform.machine(),
        "executable": Path(sys.executable).name,
        **machine,
    }
    lines = [f"{name}: {value}\n" for name, value in facts.items()]
    lines += ["\npackages:\n", *(f"  {name}=={packages[name]}\n" for name in sorted(packages))]
    return "".join(lines)


def describe_git(checkout: Path) -> bytes:
    """Return git.txt, or the reason why git failed: no run fails for its record."""
    try:
        return _describe_checkout(checkout)
    except FileNotFoundError:
        reason = "git is not installed"
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode("utf-8", "replace").partition("\n")[0] or "git failed"
        if "not a git repository" in reason:
            reason = "the code is not in a git repository"
    except (OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
        reason = format_reason(error)
    return f"git: unavailable: {reason}\n".encode("utf-8", "replace")


def _describe_checkout(checkout: Path) -> bytes:
    """Return commit, branch, number of changes and untracked files, then the diff."""
    words = ("--porcelain=v2", "--branch", "--untracked-files=normal", "--", ".")
    status = os.fsdecode(_run_git(checkout, "status", *words, limit=-1)).splitlines()
    headers = dict(line[2:].split(" ", 1) for line in status if line.startswith("# branch."))
    untracked = [line[2:] for line in status if line.startswith("? ")]
    untracked = [f'"{name}"' if " " in name and name[0] != '"' else name for name in untracked]
    extra = len(untracked) - UNTRACKED_LIMIT
    changed = sum(line.startswith(("1 ", "2 ", "u ")) for line in status)
    has_commits = headers["branch.oid"] != "(initial)"
    record = [
        f"commit: {headers['branch.oid'] if has_commits else '(none yet)'}",
        f"branch: {headers['branch.head']}",
        f"dirty: {'yes' if changed else 'no'} ({changed} changed, {len(untracked)} untracked)",
    ]
    if untracked:
        untracked[UNTRACKED_LIMIT:] = [f"… and {extra} more"] if extra > 0 else []
        record += ["untracked:", *(f"  {name}" for name in untracked)]
    diff = b""
    if changed and has_commits:
        diff = _run_git(checkout, "diff", "HEAD", *DIFF_OPTIONS, "--", ".", limit=DIFF_LIMIT + 1)
        size = f"{len(diff)} bytes"
        if len(diff) > DIFF_LIMIT:
            diff, size = diff[:DIFF_LIMIT], f"over {DIFF_LIMIT} bytes and cut there: won't apply"
        record.append(f"diff: {size}")
    return os.fsencode("\n".join([*record, "", ""])) + diff


def _run_git(directory: Path, *words: str, limit: int) -> bytes:
    """Return at most `limit` bytes of a git command's output. Raises what `subprocess.run` does."""
    environment = {name: v for name, v in os.environ.items() if name not in REPOSITORY_VARIABLES}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}  # write no index; English messages
    with tempfile.TemporaryFile() as output:  # a diff may be larger than memory
        options = {"env": environment, "stdout": output, "stderr": subprocess.PIPE}
        subprocess.run(["git", *words], cwd=directory, timeout=GIT_SECONDS, check=True, **options)
        output.seek(0)
        return output.read(limit)
