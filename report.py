"""Draw a run, or several side by side, as one page that needs nothing else to be looked at.

    python report.py last
    python report.py 20260131_235959_baseline
    python report.py 20260131_235959_baseline 20260201_101500_wider --output comparison.html

Every run draws its own at its end: runs/<id>/report.html. The numbers are those of its
`logs/metrics.jsonl`, so that the page can be drawn again at any time.
"""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle import find_directory, is_run, runs_in
from parameters import GROUPS, ModelConfig, Settings
from utils.charts import Line, Point, line_chart
from utils.checks import as_written
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.files import write_atomic
from utils.metrics import tag_of
from utils.output import Output, duration, plural, run_command
from utils.run_manager import RunDirectory, read_git_record, read_record

TEMPLATES = Path(__file__).resolve().parent / "templates"
COLORS = 6  # lines that a page tells apart
LONGEST = 200_000  # characters of a diff or of the console that a page holds


class ReportConfig(Settings):
    """Where runs are looked for."""

    runs_dir: str = "runs"
    """Where runs are."""


ACTIONS = (Action("output", "Where to write; by default in the run, or here for several.", "FILE"),)
OPERANDS = Action("runs", "A run's id or directory, or last for the newest.", "RUN")


def main(argv: Sequence[str]) -> int:
    """The command: find the runs, draw them, and say where."""
    command_line = CommandLine(__doc__, ReportConfig, ACTIONS, operands=OPERANDS)
    flags, actions, problems = command_line.parse(argv)
    if problems:
        raise UserError(*problems)
    runs_dir = Path(ReportConfig(**flags).runs_dir)
    runs = [_find_run(reference, runs_dir) for reference in actions.get("runs") or ["last"]]
    beside = RunDirectory(runs[0]).report if len(runs) == 1 else Path("comparison.html")
    target = Path(actions.get("output", beside))
    try:
        write_report(target, runs)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    Output().line(str(target))
    return 0


def _find_run(reference: str, runs_dir: Path) -> Path:
    if reference == "last":
        if not (runs := runs_in(runs_dir)):
            raise UserError(f"no run in {runs_dir} yet")
        return runs[0]
    run = find_directory(reference, runs_dir, runs_dir)
    if not is_run(run):
        raise UserError(f"{run} is not a run")
    return run


def write_report(target: Path, runs: Sequence[Path]) -> None:
    """Write the page of one run, or one that compares several, to `target`.

    Raises `UserError` for a run whose record cannot be read, and OSError where nothing can be
    written.
    """
    # Here, as a run needs it at its end alone; torch brings it anyway.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: "–" if value is None else f"{value:,}",
        "loss": lambda value: "–" if value is None else f"{value:.4f}",
        "bits": lambda value: "–" if value is None else f"{value:.3f}",
        "duration": lambda value: "–" if value is None else duration(value),
        "written": lambda value: as_written(value).strip('"'),
    }
    pages = [read_run(path) for path in runs]
    if len(pages) == 1:
        template, values = "report.html.jinja", page_of(pages[0])
    else:
        template, values = "comparison.html.jinja", comparison_of(pages)
    page = environment.get_template(template).render(values)
    write_atomic(target, page.encode("utf-8", "backslashreplace"))


# ----------------------------------------------------------------------------------------------
# What a run's files tell


@dataclass(frozen=True)
class Run:
    """A run, as its files tell it. Losses are in nats per token, speed in tokens per second."""

    path: Path
    record: Mapping[str, Any]  # the `run` of full_config.json
    config: Mapping[str, Any]
    sources: Mapping[str, str]
    git: Mapping[str, str]
    diff: str
    environment: str
    console: str
    samples: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl that are of a step
    evaluations: Sequence[Mapping[str, Any]]
    continued: Sequence[str]  # the ids of the runs that the first lines come from

    @property
    def name(self) -> str:
        """Its id."""
        return self.path.resolve().name

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The evaluation with the lowest val loss."""
        known = [line for line in self.evaluations if _value(line, VAL) is not None]
        return min(known, key=lambda line: line[VAL], default=None)

    @property
    def best_loss(self) -> float | None:
        """The lowest val loss."""
        return self.best and self.best[VAL]

    @property
    def best_bits(self) -> float | None:
        """The lowest val loss in bits per byte."""
        return self.best and self.best.get(VAL_BITS)

    @property
    def text(self) -> str:
        """The name of the text that it learned from."""
        return Path((self.record["data"] or {}).get("name", "unknown")).name

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def seconds(self) -> float | None:
        """How long it took, the runs that it goes on with included."""
        last = [lines[-1] for lines in (self.steps, self.evaluations) if lines]
        return max((_value(line, "seconds") or 0 for line in last), default=None) or None

    @property
    def speed(self) -> float | None:
        """The median speed of its steps."""
        speeds = sorted(_present(line.get("tokens_per_second") for line in self.steps))
        return speeds[len(speeds) // 2] if speeds else None

    def points(self, lines: Sequence[Mapping[str, Any]], tag: str, x: str = "step") -> list[Point]:
        """(x, value) of every line that has both."""
        pairs = [(_value(line, x), _value(line, tag)) for line in lines]
        return [(a, b) for a, b in pairs if a is not None and b is not None]


# What the page shows of the record, and an older one may lack.
FACTS = (
    *("argv", "started", "model_name", "data", "resumed_from", "lineage"),
    *("parameters", "device", "torch_compile"),
)
TRAIN, VAL = tag_of("eval_loss", "train"), tag_of("eval_loss", "val")
VAL_BITS, STEP_LOSS = tag_of("bits_per_byte", "val"), tag_of("loss", "train")


def read_run(path: Path) -> Run:
    """Read a run's files. What it lacks, such as samples, is empty; so is an unfinished line.

    Raises `UserError` where there is no record of it.
    """
    run, record = RunDirectory(path), read_record(path)
    lines, continued = _training_lines(path, record["run"])
    _, diff = read_git_record(run.meta / "git.txt")
    return Run(
        path,
        {**dict.fromkeys(FACTS), **record["run"]},
        record["config"],
        record["sources"],
        record["git"],
        diff[:LONGEST],
        _text(run.meta / "env.txt"),
        _text(run.console)[-LONGEST:],
        _json_lines(run.samples),
        [line for line in lines if STEP_LOSS in line],
        [line for line in lines if VAL in line],
        continued,
    )


def _training_lines(
    path: Path, record: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl; before them those of the run that this one goes on with."""
    lines = _json_lines(RunDirectory(path).metrics)
    before = record.get("resumed_from")
    if not isinstance(before, dict):
        return lines, []
    earlier = path.resolve().parent / str(before.get("run_id"))
    if not is_run(earlier) or earlier == path.resolve():
        return lines, []
    try:
        past, continued = _training_lines(earlier, read_record(earlier)["run"])
    except UserError:
        return lines, []
    past = [line for line in past if line["step"] <= before["step"]]
    spent = max((line.get("seconds") or 0 for line in past), default=0)
    for line in lines:
        if "seconds" in line:
            line["seconds"] += spent
    return past + lines, [*continued, earlier.name]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last one of a killed run may be cut."""
    lines = []
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def _text(path: Path) -> str:
    try:
        # A device that somebody put in its place might never end.
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def _value(line: Mapping[str, Any], name: str) -> float | None:
    value = line.get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _present(values: Any) -> list[float]:
    return [value for value in values if value is not None]


# ----------------------------------------------------------------------------------------------
# What is drawn


def page_of(run: Run) -> dict[str, Any]:
    """What the page of one run shows."""
    best = run.best and (run.best["step"], run.best[VAL])
    losses = [
        Line("every step", run.points(run.steps, STEP_LOSS), 0, noisy=True),
        Line("train", run.points(run.evaluations, TRAIN), 1),
        Line("val", run.points(run.evaluations, VAL), 2),
    ]
    small = (
        ("Learning rate", "learning_rate", False),
        ("Gradient norm", "grad_norm", True),
        ("Tokens per second", "tokens_per_second", True),
    )
    return {
        "run": run,
        "ended": ended(run),
        "command": shlex.join(["python", "train.py", *(run.record["argv"] or [])]),
        "settings": settings_of(run),
        "details": [
            ("Changes to the code since that commit", run.diff),
            ("Python, system and packages", run.environment),
            ("What was printed", run.console),
        ],
        "loss": line_chart(
            losses, title="Loss", x_label="step", height=380, logarithmic=True, mark=best
        ),
        "loss_lines": losses,
        "small_charts": [
            (
                title,
                line_chart(
                    [Line(title, run.points(run.steps, tag), 1, noisy)],
                    title=title,
                    x_label="step",
                    width=340,
                    height=220,
                ),
            )
            for title, tag, noisy in small
        ],
    }


def comparison_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page of several runs shows, each run in a colour of its own."""

    def chart(title: str, x: str, x_label: str, which: str, tag: str, scale: float = 1) -> str:
        lines = [
            Line(
                run.name,
                [(a * scale, b) for a, b in run.points(getattr(run, which), tag, x)],
                index % COLORS + 1,
                noisy=which == "steps",
            )
            for index, run in enumerate(runs)
        ]
        return line_chart(lines, title=title, x_label=x_label, logarithmic=True)

    longest = max((run.seconds or 0 for run in runs), default=0)
    unit, scale = ("minutes", 1 / 60) if longest > 300 else ("seconds", 1)
    return {
        "runs": runs,
        "differences": differences(runs),
        "colors": {run.name: index % COLORS + 1 for index, run in enumerate(runs)},
        "charts": [
            ("Val loss by step", chart("Val loss", "step", "step", "evaluations", VAL)),
            ("Val loss by time", chart("Val loss", "seconds", unit, "evaluations", VAL, scale)),
            ("Train loss of every step", chart("Loss", "step", "step", "steps", STEP_LOSS)),
        ],
    }


def settings_of(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each group's settings, with their values and sources; those of the run itself left out."""
    groups = []
    for group, settings in GROUPS.items():
        rows = [
            {
                "name": name,
                "value": run.config[name],
                "source": run.sources.get(name, ""),
                "meaning": info.description,
                "is_default": run.config[name] == ModelConfig.model_fields[name].default,
            }
            for name, info in settings.model_fields.items()
            if name in run.config
        ]
        if rows:
            groups.append((group, rows))
    return groups


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """The settings, and facts, that are not the same in all runs."""
    facts = [
        {
            **run.config,
            "text SHA-256": (run.record.get("data") or {}).get("sha256", "")[:12],
            "parameters": run.record.get("parameters"),
            "device": run.record.get("device"),
            "commit": run.git.get("commit", "unknown")[:12],
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = [(name, [fact.get(name) for fact in facts]) for name in names]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values)]


def ended(run: Run) -> str:
    """How far a run came."""
    of = run.config.get("max_iters")
    done = plural(run.last_step, "step")
    return done if of is None or run.last_step >= of else f"{done} of {of:,}"


if __name__ == "__main__":
    sys.exit(run_command(main))
