"""Draw a run as a page: an HTML file that needs no network and no other file."""

import shlex
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from parameters import GROUPS
from utils.checks import format_value
from utils.files import write_atomic
from utils.output import format_duration
from utils.report.charts import Line, compute_chart
from utils.report.runs import SPEED, STEP_LOSS, TRAIN, VAL, Run
from utils.tracking.metrics import METRICS, get_tag

TEMPLATES = Path(__file__).resolve().parent / "templates"
# Characters that HTML or XML does not allow; a model may generate them all the same.
CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160), 65534, 65535), "�")


def write_report(target: Path, run_dir: Path) -> None:
    """Write the page of a run.

    Raises `UserError` if the run's record is missing or damaged, and `OSError` if `target` cannot
    be written.
    """
    run = Run(run_dir)
    rate, norm = get_tag("learning_rate", "train"), get_tag("grad_norm", "train")
    # A speed is measured per printed line and logged with each of its steps: keep the last one.
    speeds = [list(group)[-1] for _, group in groupby(run.get_points(SPEED), lambda p: p[1])]
    small = (
        Line("Learning rate", run.get_points(rate), 1, noisy=True),
        Line("Gradient norm", run.get_points(norm), 1, noisy=True),
        Line("Tokens per second", speeds, 1),
    )
    size = {"x_label": "step", "width": 340, "height": 220}
    values = {
        **compute_losses(run, height=380),
        "groups": GROUPS,
        "command": shlex.join(["python", "train.py", *run.facts.argv]),
        "small_charts": [compute_chart([line], title=line.label, **size) for line in small],
    }
    write_atomic(target, render("report.html.jinja", **values))


def render(template: str, **values: Any) -> bytes:
    """Return a template, filled in, as UTF-8 without control characters."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": lambda value, spec=",.0f": "–" if value is None else format(value, spec),
        "duration": lambda value: "–" if value is None else format_duration(value),
        "written": lambda value: format_value(value).strip('"'),
    }
    environment.globals |= {
        "VAL": VAL,
        "VAL_BITS": get_tag("bits_per_byte", "val"),
        "unit": METRICS["eval_loss"].unit,
    }
    page = environment.get_template(template).render(values)
    return page.translate(CONTROLS).encode("utf-8", "backslashreplace")


def compute_losses(run: Run, **size: int) -> dict[str, Any]:
    """Return the values with which a template draws a run's losses."""
    lines = [
        Line("train loss, each step", run.get_points(STEP_LOSS), 0, noisy=True),
        Line("val loss", run.get_points(VAL), 2),
        Line("train loss, evaluated", run.get_points(TRAIN), 1, dashed=True),
    ]
    mark = (run.best["step"], run.best[VAL]) if run.best else None
    options = {"title": "Loss", "x_label": "step", "logarithmic": True, "mark": mark}
    return {"run": run, "lines": lines, "loss_chart": compute_chart(lines, **options, **size)}
