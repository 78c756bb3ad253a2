"""Benchmarks behind the README's figures. Each module's `run` prints its own."""

import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def get_commit() -> str:
    """Return the measured commit, with `-dirty` if more than the leaderboard has changed."""
    commit = _run_git("rev-parse", "--short", "HEAD") or "unknown"
    changes = _run_git("status", "--porcelain", "--", ".", ":!docs/LEADERBOARD.md")
    return f"{commit}-dirty" if changes else commit


def _run_git(*arguments: str) -> str:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip()
