"""What the README's figures come from. Each module's `run` prints its own."""

import subprocess
from pathlib import Path


def current_commit() -> str:
    """The commit that is measured, with `-dirty` where it has been changed since."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
