"""Draw a run, or several side by side, as one HTML page that needs no network.

    python report.py last
    python report.py 20260131_235959_baseline
    python report.py 20260131_235959_baseline 20260201_101500_wider        # runs/comparison.html
    python report.py last --output picture.svg             # curves and sample, for a README

Every run writes its page at its end: runs/<id>/report.html. This command draws it again from the
run's files, with links to its HTML exports in exports/; a comparison is written beside the runs.
"""

import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bundle import find_directory, is_run, list_runs
from exporters.record import find_pages
from parameters import Settings
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.files import write_atomic
from utils.output import Output, run_command
from utils.report import NARROW, WIDE, compute_losses, render, write_report
from utils.report.charts import COLORS, DASHES, Line, compute_chart
from utils.report.runs import STEP_LOSS, VAL, VAL_BITS, LoggedRun
from utils.run_manager import RunDirectory

CLOCKS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


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
    run = find_directory(reference, runs_dir, None)
    if not is_run(run):
        raise UserError(f"{run} is not a run")
    return run


def write_picture(target: Path, run: LoggedRun) -> None:
    """Write an SVG of a run's loss curves and its last sample."""
    sample = run.samples[-1].text.strip().splitlines() if run.samples else []
    wrapped = [part for line in sample for part in textwrap.wrap(line, 46) or [""]]
    values = compute_losses(run, width=640, height=380)
    write_atomic(target, render("picture.svg.jinja", sample=wrapped[:20], **values))


def write_comparison(target: Path, runs: Sequence[LoggedRun]) -> None:
    """Write a page of several runs. Each has its own color and dashes."""
    labels = choose_labels(runs)
    rows = [
        (Line(label, [], color=n % COLORS + 1, dash=(n + n // COLORS) % DASHES), run)
        for n, (label, run) in enumerate(zip(labels, runs, strict=True))
    ]
    is_mixed = any(run.tokenization != runs[0].tokenization for run in runs)
    unit = "token" if is_mixed else runs[0].unit
    seconds = max(run.seconds or 0 for run in runs)
    clock, scale = next(each for each in CLOCKS if seconds >= 5 * each[1] or each[1] == 1)
    if is_mixed:  # losses per token are comparable only if the tokens are
        val, measure = VAL_BITS, "bits per byte"
    else:
        val, measure = VAL, f"nats per {unit}"
    kinds = [
        ("Validation loss", val, "step", "step", 1),
        ("Validation loss by time", val, clock, "seconds", 1 / scale),
    ]
    if not is_mixed:
        kinds.append(("Training loss, each step", STEP_LOSS, "step", "step", 1))
    charts = []
    for title, tag, x_label, x, x_scale in kinds:
        noisy = tag == STEP_LOSS
        lines = [
            replace(key, points=run.get_points(tag, x, x_scale), noisy=noisy) for key, run in rows
        ]
        options = {"title": title, "x_label": x_label, "logarithmic": True, "labeled": True}
        charts.append([compute_chart(lines, **options, **size) for size in (WIDE, NARROW)])
    spec = ",".join(
        f"{label}:{RunDirectory(run.path).tensorboard}"
        for label, run in zip(labels, runs, strict=True)
    )
    values = {
        "rows": rows,
        "unit": unit,
        "measure": measure,
        "charts": charts,
        "differences": find_differences(runs),
        "tensorboard": f"tensorboard --logdir_spec {shlex.quote(spec)}",
    }
    write_atomic(target, render("comparison.html.jinja", **values))


def choose_labels(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the tag of each run, or its id or path if another run has the same tag."""
    tags, names = [run.tag or run.name for run in runs], [run.name for run in runs]
    return [
        tag if tags.count(tag) == 1 else run.name if names.count(run.name) == 1 else str(run.path)
        for tag, run in zip(tags, runs, strict=True)
    ]


def find_differences(runs: Sequence[LoggedRun]) -> list[tuple[str, list[Any]]]:
    """Return the settings and facts that are not the same in all runs."""
    facts = {"parameters", "device", "processes", "threads", "precision", "torch_compile"}
    columns = [
        {
            **run.record["config"],
            **run.facts.model_dump(include=facts),
            "data SHA-256": run.facts.data.sha256[:12],
            "callbacks": ", ".join(str(each.get("name")) for each in run.facts.callbacks),
            "commit": run.record["git"].get("commit", "unknown")[:12],
            "uncommitted changes": run.record["git"].get("dirty", "unknown"),
        }
        for run in runs
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name) for column in columns]) for name in names]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values)]


def main(argv: Sequence[str]) -> int:
    """Find the runs, write the report and print its path."""
    command_line = CommandLine(__doc__, ReportConfig, ACTIONS, operands=OPERANDS)
    flags, actions, problems = command_line.parse(argv)
    if problems:
        raise UserError(*problems)
    runs_dir = Path(ReportConfig(**flags).runs_dir)
    references = actions.get("runs") or ["last"]
    runs = list(dict.fromkeys(find_run(reference, runs_dir) for reference in references))
    is_one = len(runs) == 1
    first = runs[0] if runs[0].name not in ("", "..") else runs[0].resolve()  # of "." and ".."
    default = RunDirectory(first).report if is_one else first.parent / "comparison.html"
    target = Path(actions.get("output", default))
    if target.suffix == ".svg" and not is_one:
        raise UserError(f"{target}: a picture shows one run; name an .html file for several")
    try:
        if target.suffix == ".svg":
            write_picture(target, LoggedRun(runs[0]))
        elif is_one:
            write_report(target, runs[0], find_pages(first.name))
        else:
            write_comparison(target, [LoggedRun(run) for run in runs])
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    Output().print(str(target))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
