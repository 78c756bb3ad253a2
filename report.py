"""Draw a run, or several side by side, as one HTML page that needs no network.

    python report.py last
    python report.py 20260131_235959_baseline
    python report.py 20260131_235959_baseline 20260201_101500_wider --output comparison.html
    python report.py last --output picture.svg             # curves and sample, for a README

Every run writes its page at its end: runs/<id>/report.html. This command draws it again from the
run's files.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bundle import find_directory, is_run, list_runs
from parameters import Settings
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.output import Output, run_command
from utils.report import write_report
from utils.run_manager import RunDirectory


class ReportConfig(Settings):
    """The place of runs."""

    runs_dir: str = "runs"
    """Directory of runs."""


ACTIONS = (Action("output", "File to write: .html, or .svg for a picture of one run.", "FILE"),)
OPERANDS = Action("runs", "A run's id or directory, or last for the newest.", "RUN")


def find_run(reference: str, runs_dir: Path) -> Path:
    """Return the directory of a run. Raises `UserError` if there is no such run."""
    if reference == "last":
        if not (runs := list_runs(runs_dir)):
            raise UserError(f"no run in {runs_dir} yet")
        return runs[0]
    run = find_directory(reference, runs_dir, runs_dir)
    if not is_run(run):
        raise UserError(f"{run} is not a run")
    return run


def main(argv: Sequence[str]) -> int:
    """Find the runs, write the report and print its path."""
    command_line = CommandLine(__doc__, ReportConfig, ACTIONS, operands=OPERANDS)
    flags, actions, problems = command_line.parse(argv)
    if problems:
        raise UserError(*problems)
    runs_dir = Path(ReportConfig(**flags).runs_dir)
    references = actions.get("runs") or ["last"]
    runs = list(dict.fromkeys(find_run(reference, runs_dir) for reference in references))
    default = RunDirectory(runs[0]).report if len(runs) == 1 else Path("comparison.html")
    target = Path(actions.get("output", default))
    try:
        write_report(target, runs)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    Output().print(str(target))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
