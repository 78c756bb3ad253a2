"""Draw a run, or several side by side, as one page that needs nothing else to be looked at.

    python report.py last
    python report.py 20260131_235959_baseline
    python report.py 20260131_235959_baseline 20260201_101500_wider --output comparison.html

Every run draws its own at its end: runs/<id>/report.html. The numbers are those of its
`logs/metrics.jsonl`, so that the page can be drawn again at any time.
"""

import contextlib
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bundle import Ancestor, find_directory, find_run_of, is_run, list_runs
from parameters import GROUPS, ModelConfig, Settings
from utils.charts import Line, Point, draw_line_chart
from utils.checks import format_value
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.files import write_atomic
from utils.output import Output, format_duration, pluralize, run_command
from utils.run_manager import RunDirectory, read_git_record, read_record
from utils.tracking.metrics import get_metric, get_tag

TEMPLATES = Path(__file__).resolve().parent / "templates"
COLORS = 6  # lines that a page tells apart
LONGEST = 200_000  # characters of a diff or of the console that a page holds
LARGEST = 1e30  # a number beyond it is no measurement
# What HTML has no place for, and a model may write all the same.
CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "�")

_F = TypeVar("_F", bound=BaseModel)


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
    references = actions.get("runs") or ["last"]
    runs = list(dict.fromkeys(_find_run(reference, runs_dir) for reference in references))
    beside = RunDirectory(runs[0]).report if len(runs) == 1 else Path("comparison.html")
    target = Path(actions.get("output", beside))
    try:
        write_report(target, runs)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    Output().print(str(target))
    return 0


def _find_run(reference: str, runs_dir: Path) -> Path:
    if reference == "last":
        if not (runs := list_runs(runs_dir)):
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
        "duration": lambda value: "–" if value is None else format_duration(value),
        "written": lambda value: format_value(value).strip('"'),
    }
    pages = [read_run(path) for path in runs]
    if len(pages) == 1:
        template, values = "report.html.jinja", page_of(pages[0])
    else:
        template, values = "comparison.html.jinja", comparison_of(pages)
    page = environment.get_template(template).render(values)
    write_atomic(target, page.translate(CONTROLS).encode("utf-8", "backslashreplace"))


# ----------------------------------------------------------------------------------------------
# What a run's files tell

TRAIN, VAL = get_tag("eval_loss", "train"), get_tag("eval_loss", "val")
VAL_BITS, STEP_LOSS = get_tag("bits_per_byte", "val"), get_tag("loss", "train")
SPEED = get_tag("tokens_per_second", "train")


class _Facts(BaseModel):
    """The part of a record that a page shows. An older one may lack any of it."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class TextFacts(_Facts):
    """The text that a run learned from."""

    name: str = "unknown"
    sha256: str = ""
    tokens: int | None = None
    vocab_size: int | None = None


class ResumedFrom(_Facts):
    """The step of a run that another one goes on with."""

    run_id: str | None = None
    step: int = 0
    path: str = ""


class RunFacts(_Facts):
    """The `run` of full_config.json."""

    argv: list[str] = []
    callbacks: list[dict[str, Any]] = []
    started: str | None = None
    model_name: str | None = None
    data: TextFacts = TextFacts()
    resumed_from: ResumedFrom | None = None
    lineage: list[Ancestor] = []
    parameters: int | None = None
    device: str | None = None
    processes: int = 1
    threads: int | None = None
    precision: str | None = None
    torch_compile: str | None = None
    torch_compile_reason: str | None = None


class ResultFacts(_Facts):
    """How a run ended: result.json."""

    seconds: float | None = None
    stopped_by: str | None = None
    exit_status: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """A run, as its files tell it. Losses are in nats per token, speed in tokens per second."""

    path: Path
    facts: RunFacts
    result: ResultFacts | None
    config: Mapping[str, Any]
    sources: Mapping[str, str]
    git: Mapping[str, str]
    diff: str
    environment: str
    console: str
    samples: Sequence[tuple[int, str]]
    steps: Sequence[Mapping[str, float]]  # the lines of metrics.jsonl that are of a step
    evaluations: Sequence[Mapping[str, float]]
    continued: Sequence[str]  # the ids of the runs that the first lines come from

    @property
    def name(self) -> str:
        """Its id."""
        return self.path.resolve().name

    @property
    def best(self) -> Mapping[str, float] | None:
        """The evaluation with the lowest val loss."""
        return min(self.evaluations, key=lambda line: line[VAL], default=None)

    @property
    def best_loss(self) -> float | None:
        """The lowest val loss."""
        return self.best and self.best[VAL]

    @property
    def best_bits(self) -> float | None:
        """The lowest val loss in bits per byte."""
        return self.best and self.best.get(VAL_BITS)

    @property
    def best_step(self) -> int | None:
        """The step that had it."""
        return self.best and int(self.best["step"])

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def seconds(self) -> float | None:
        """How long the training took, its earlier runs included."""
        logged = [line["seconds"] for line in self.steps if "seconds" in line]
        if self.result is not None and self.result.seconds is not None and not self.continued:
            return self.result.seconds
        return logged[-1] if logged else None

    @property
    def speed(self) -> float | None:
        """The median speed of its steps."""
        speeds = [line[SPEED] for line in self.steps if SPEED in line]
        return statistics.median(speeds) if speeds else None

    @property
    def ended(self) -> str:
        """How far it came, and why no further."""
        of = self.config.get("max_iters")
        done = pluralize(self.last_step, "step")
        if isinstance(of, int) and self.last_step < of:
            done += f" of {of:,}"
        if self.result is None:
            return f"{done}; not ended, or killed"
        why = self.result.error or self.result.stopped_by
        if not why and self.result.exit_status:
            why = "stopped by Ctrl-C or SIGTERM"
        return f"{done}: {why}" if why else done


def read_run(path: Path) -> Run:
    """Read a run's files. What it lacks, such as samples, is empty; so is an unfinished line.

    Raises `UserError` where there is no record of it, or a damaged one.
    """
    run, record = RunDirectory(path), read_record(path)
    facts = _checked(RunFacts, record["run"], run.meta / "full_config.json")
    lines, continued = _training_lines(path, facts, {path.resolve()})
    _, diff = read_git_record(run.meta / "git.txt")
    return Run(
        path=path,
        facts=facts,
        result=_read_result(run.meta / "result.json"),
        config=record["config"],
        sources=record["sources"],
        git=record["git"],
        diff=diff[:LONGEST],
        environment=_text(run.meta / "env.txt"),
        console=_text(run.console)[-LONGEST:],
        samples=_samples(run.samples),
        steps=[line for line in lines if STEP_LOSS in line],
        evaluations=[line for line in lines if VAL in line],
        continued=continued,
    )


def _checked(facts: type[_F], values: Any, path: Path) -> _F:
    try:
        return facts.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path} is damaged: {where}: {error.errors()[0]['msg']}") from None


def _read_result(path: Path) -> ResultFacts | None:
    """How the run ended; None where it has not, or was killed."""
    text = _text(path)
    try:
        return _checked(ResultFacts, json.loads(text), path) if text else None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None


def _training_lines(
    path: Path, facts: RunFacts, seen: set[Path]
) -> tuple[list[dict[str, float]], list[str]]:
    """The lines of metrics.jsonl; before them those of the run that this one goes on with.

    `seen` are the runs that are looked at already, as a damaged record may lead in a circle.
    """
    lines = _metrics(RunDirectory(path).metrics)
    before = facts.resumed_from
    if before is None:
        return lines, []
    beside = path.resolve().parent / str(before.run_id)
    earlier = (beside if is_run(beside) else find_run_of(Path(before.path)) or beside).resolve()
    if earlier in seen or not is_run(earlier):
        return lines, []
    try:
        earlier_facts = _checked(RunFacts, read_record(earlier)["run"], earlier)
    except UserError:
        return lines, []
    past, continued = _training_lines(earlier, earlier_facts, seen | {earlier})
    past = [line for line in past if line["step"] <= before.step]
    spent = max((line.get("seconds", 0) for line in past), default=0)
    for line in lines:
        if "seconds" in line:
            line["seconds"] += spent
    return past + lines, [*continued, earlier.name]


def _metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that have a step, each with the numbers in it."""
    lines = [
        {
            name: value
            for name, value in line.items()
            if isinstance(value, (int, float)) and abs(value) <= LARGEST
        }
        for line in _json_lines(path)
    ]
    return [line for line in lines if "step" in line]


def _samples(path: Path) -> list[tuple[int, str]]:
    """The steps and texts of samples.jsonl."""
    pairs = [(line.get("step"), line.get("text")) for line in _json_lines(path)]
    return [(s, text) for s, text in pairs if isinstance(s, int) and isinstance(text, str)]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; the last one of a killed run may be cut."""
    for text in _text(path).split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


def _text(path: Path) -> str:
    try:
        # A device that somebody put in its place might never end.
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""


# ----------------------------------------------------------------------------------------------
# What is drawn


def page_of(run: Run) -> dict[str, Any]:
    """What the page of one run shows."""
    best = run.best and (run.best["step"], run.best[VAL])
    losses = [
        Line("every step", _points(run.steps, STEP_LOSS), 0, noisy=True),
        Line("val", _points(run.evaluations, VAL), 2),
        Line("train", _points(run.evaluations, TRAIN), 1, dashed=True),
    ]
    rate, norm = get_tag("learning_rate", "train"), get_tag("grad_norm", "train")
    small = (
        ("Learning rate", Line("learning rate", _points(run.steps, rate), 1, noisy=True)),
        ("Gradient norm", Line("gradient norm", _points(run.steps, norm), 1, noisy=True)),
        ("Tokens per second", Line("tokens/s", _changes(_points(run.steps, SPEED)), 1)),
    )
    loss = draw_line_chart(
        losses, title="Loss", x_label="step", height=380, logarithmic=True, mark=best
    )
    return {
        "run": run,
        "unit": get_metric("eval_loss").unit,
        "command": shlex.join(["python", "train.py", *run.facts.argv]),
        "settings": settings_of(run),
        "details": [
            ("Changes to the code since that commit", run.diff),
            ("Python, system and packages", run.environment),
            ("What was printed", run.console),
        ],
        "loss": loss,
        "loss_lines": losses,
        "small_charts": [
            (title, draw_line_chart([line], title=title, x_label="step", width=340, height=220))
            for title, line in small
        ],
    }


def _points(
    lines: Sequence[Mapping[str, float]], tag: str, x: str = "step", scale: float = 1
) -> list[Point]:
    """(x, value) of every line that has both."""
    return [(line[x] * scale, line[tag]) for line in lines if x in line and tag in line]


def _changes(points: Sequence[Point]) -> list[Point]:
    """The last of neighbours with the same value, as the speed has one for each printed line."""
    return [list(group)[-1] for _, group in groupby(points, key=lambda point: point[1])]


def comparison_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page of several runs shows, each run in a colour of its own."""
    longest = max((run.seconds or 0 for run in runs), default=0)
    unit, scale = ("minutes", 1 / 60) if longest > 300 else ("seconds", 1)
    named = list(zip(_names(runs), runs, strict=True))
    by_step = [
        _line(index, name, _points(run.evaluations, VAL)) for index, (name, run) in enumerate(named)
    ]
    by_time = [
        _line(index, name, _points(run.evaluations, VAL, "seconds", scale))
        for index, (name, run) in enumerate(named)
    ]
    every_step = [
        _line(index, name, _points(run.steps, STEP_LOSS), noisy=True)
        for index, (name, run) in enumerate(named)
    ]
    charts = (
        ("Val loss by step", "step", by_step),
        ("Val loss by time", unit, by_time),
        ("Train loss of every step", "step", every_step),
    )
    return {
        "rows": list(zip(by_step, runs, strict=True)),
        "unit": get_metric("eval_loss").unit,
        "differences": differences(runs),
        "charts": [
            (title, draw_line_chart(lines, title=title, x_label=x, logarithmic=True))
            for title, x, lines in charts
        ],
    }


def _line(index: int, name: str, points: Sequence[Point], noisy: bool = False) -> Line:
    """The line of a page's run number `index`: a colour of its own, dashed when all are used."""
    return Line(name, points, index % COLORS + 1, noisy, dashed=index // COLORS % 2 == 1)


def _names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; their paths where two are called the same."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]


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
            "text SHA-256": run.facts.data.sha256[:12],
            "parameters": run.facts.parameters,
            "device": run.facts.device,
            "processes": run.facts.processes,
            "threads": run.facts.threads,
            "precision": run.facts.precision,
            "torch.compile": run.facts.torch_compile,
            "callbacks": ", ".join(str(each.get("name")) for each in run.facts.callbacks),
            "commit": run.git.get("commit", "unknown")[:12],
            "changes to the code": run.git.get("dirty", "unknown"),
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = [(name, [fact.get(name) for fact in facts]) for name in names]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values)]


if __name__ == "__main__":
    sys.exit(run_command(main))
