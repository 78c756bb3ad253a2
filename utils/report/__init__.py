"""Draw runs as pages: HTML files that need no network and no other file."""

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from parameters import GROUPS
from utils.checks import format_value
from utils.errors import UserError
from utils.files import write_atomic
from utils.output import format_duration
from utils.report.charts import Line, Point, draw_line_chart
from utils.report.runs import SPEED, STEP_LOSS, TRAIN, VAL, Metrics, Run, read_run
from utils.tracking.metrics import get_metric, get_tag

TEMPLATES = Path(__file__).resolve().parent / "templates"
COLORS = 6  # colors of lines in the templates
# Characters that HTML or XML does not allow; a model may generate them all the same.
CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160), 65534, 65535), "�")


def write_report(target: Path, runs: Sequence[Path]) -> None:
    """Write the page of one run, the comparison of several, or one run's picture to an .svg file.

    Raises `UserError` if a run's record is missing or damaged, and `OSError` if `target` cannot be
    written.
    """
    loaded = [read_run(path) for path in runs]
    if target.suffix == ".svg" and len(runs) > 1:
        raise UserError(f"{target}: a picture shows one run; name an .html file for several")
    if target.suffix == ".svg":
        template, values = "picture.svg.jinja", _draw_picture(loaded[0])
    elif len(runs) == 1:
        template, values = "report.html.jinja", _draw_page(loaded[0])
    else:
        template, values = "comparison.html.jinja", _compare(loaded)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: "–" if value is None else f"{int(value):,}",
        "loss": lambda value: "–" if value is None else f"{value:.4f}",
        "bits": lambda value: "–" if value is None else f"{value:.3f}",
        "duration": lambda value: "–" if value is None else format_duration(value),
        "written": lambda value: format_value(value).strip('"'),
    }
    tags = {"VAL": VAL, "VAL_BITS": get_tag("bits_per_byte", "val")}
    unit = get_metric("eval_loss").unit
    page = environment.get_template(template).render(**values, **tags, unit=unit)
    write_atomic(target, page.translate(CONTROLS).encode("utf-8", "backslashreplace"))


def _draw_page(run: Run) -> dict[str, Any]:
    """Return the values of report.html.jinja."""
    rate, norm = get_tag("learning_rate", "train"), get_tag("grad_norm", "train")
    # A speed is measured per printed line and logged with each of its steps: keep the last one.
    speeds = [
        list(group)[-1] for _, group in groupby(_get_points(run.steps, SPEED), lambda p: p[1])
    ]
    small = (
        Line("Learning rate", _get_points(run.steps, rate), 1, noisy=True),
        Line("Gradient norm", _get_points(run.steps, norm), 1, noisy=True),
        Line("Tokens per second", speeds, 1),
    )
    size = {"x_label": "step", "width": 340, "height": 220}
    return {
        **_draw_losses(run, height=380),
        "groups": GROUPS,
        "command": shlex.join(["python", "train.py", *run.facts.argv]),
        "small_charts": [
            (line.label, draw_line_chart([line], title=line.label, **size)) for line in small
        ],
    }


def _draw_losses(run: Run, **size: int) -> dict[str, Any]:
    lines = [
        Line("train loss, each step", _get_points(run.steps, STEP_LOSS), 0, noisy=True),
        Line("val loss", _get_points(run.evaluations, VAL), 2),
        Line("train loss, evaluated", _get_points(run.evaluations, TRAIN), 1, dashed=True),
    ]
    mark = (run.best["step"], run.best[VAL]) if run.best else None
    options = {"title": "Loss", "x_label": "step", "logarithmic": True, "mark": mark}
    return {"run": run, "lines": lines, "loss_chart": draw_line_chart(lines, **options, **size)}


def _draw_picture(run: Run) -> dict[str, Any]:
    """Return the values of picture.svg.jinja: the loss curves and the last sample."""
    sample = run.samples[-1][1].strip().splitlines() if run.samples else []
    wrapped = [part for line in sample for part in textwrap.wrap(line, 46) or [""]]
    return {**_draw_losses(run, width=640, height=380), "sample": wrapped[:20]}


def _compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the values of comparison.html.jinja. Each run has its own color or dashes."""
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]
    keys = [
        Line(label, [], index % COLORS + 1, dashed=index // COLORS % 2 == 1)
        for index, label in enumerate(labels)
    ]
    is_long = max(run.seconds or 0 for run in runs) > 300
    unit, scale = ("minutes", 1 / 60) if is_long else ("seconds", 1)
    losses = [_get_points(run.evaluations, VAL) for run in runs]
    losses_by_time = [_get_points(run.evaluations, VAL, "seconds", scale) for run in runs]
    step_losses = [_get_points(run.steps, STEP_LOSS) for run in runs]
    charts = (
        ("Validation loss", "step", losses, False),
        ("Validation loss by time", unit, losses_by_time, False),
        ("Training loss, each step", "step", step_losses, True),
    )
    drawn = []
    for title, x_label, points, noisy in charts:
        lines = [replace(key, points=p, noisy=noisy) for key, p in zip(keys, points, strict=True)]
        chart = draw_line_chart(lines, title=title, x_label=x_label, logarithmic=True)
        drawn.append((title, chart))
    return {
        "rows": list(zip(keys, runs, strict=True)),
        "charts": drawn,
        "differences": _find_differences(runs),
    }


def _get_points(
    lines: Sequence[Metrics], tag: str, x: str = "step", scale: float = 1
) -> list[Point]:
    return [(line[x] * scale, line[tag]) for line in lines if x in line and tag in line]


def _find_differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
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
