"""What the README's figures come from. Each module's `run` prints its own."""

import subprocess
from pathlib import Path


def current_commit() -> str:
    """The commit that is measured, with `-dirty` where more than the leaderboard has changed."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--", ".", ":!docs/LEADERBOARD.md")
    return f"{commit}-dirty" if changed else commit


def _git(*words: str) -> str:
    command = ["git", *words]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()
