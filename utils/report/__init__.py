"""Draw a run as a page: an HTML file that needs no network and no other file."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from parameters import ARCHITECTURE_DEFAULTS, GROUPS
from utils.checks import format_value
from utils.files import write_atomic
from utils.output import format_duration, pluralize
from utils.report.charts import Line, compute_chart
from utils.report.runs import SPEED, STEP_LOSS, TRAIN, VAL, VAL_BITS, LoggedRun
from utils.tracking.metrics import get_tag

TEMPLATES = Path(__file__).resolve().parent / "templates"
# Characters that HTML or XML does not allow; a model may generate them all the same.
CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160), 65534, 65535), "�")
# Sizes of a large chart on a screen and on a phone; a page has both, and shows one.
WIDE, NARROW = {"width": 900, "height": 360}, {"width": 340, "height": 320}


class ReportedSetting(NamedTuple):
    """A setting of a run. `is_changed` unless the value is the default, or found by default."""

    group: str
    name: str
    value: Any
    default: Any
    source: str
    meaning: str
    is_changed: bool


def write_report(target: Path, run_dir: Path, exports: Sequence[Path] = ()) -> None:
    """Write the page of a run, with links to the pages that run its models.

    Raises `UserError` if the run's record is missing or damaged, and `OSError` if `target` cannot
    be written.
    """
    run = LoggedRun(run_dir)
    rate, norm = get_tag("learning_rate", "train"), get_tag("grad_norm", "train")
    # A speed is measured per printed line and logged with each of its steps: keep the last one.
    speeds = [list(group)[-1] for _, group in groupby(run.get_points(SPEED), lambda p: p[1])]
    small = (
        Line("Learning rate", run.get_points(rate), 1, noisy=True),
        Line("Gradient norm", run.get_points(norm), 1, noisy=True),
        Line(f"{run.unit.capitalize()}s per second", speeds, 1),
    )
    size = {"x_label": "step", "width": 340, "height": 220, "from_zero": True}
    settings = list(list_settings(run.record))
    values = {
        **compute_losses(run, **WIDE),
        "narrow_chart": compute_losses(run, **NARROW)["loss_chart"],
        "changed": [setting for setting in settings if setting.is_changed],
        "unchanged": [setting for setting in settings if not setting.is_changed],
        "val_losses": dict(run.get_points(VAL)),
        "exports": [
            (page.name, quote(Path(os.path.relpath(page, target.parent)).as_posix()))
            for page in exports
        ],
        "command": shlex.join(["python", "train.py", *run.facts.argv]),
        "small_charts": [compute_chart([line], title=line.label, **size) for line in small],
    }
    write_atomic(target, render("report.html.jinja", **values))


def list_settings(record: dict[str, Any]) -> Iterator[ReportedSetting]:
    """Yield the settings in a run's record, in the order of the schema."""
    config = record["config"]
    by_architecture = ARCHITECTURE_DEFAULTS.get(str(config.get("architecture")), {})
    for group, schema in GROUPS.items():
        for name, field in schema.model_fields.items():
            if name in config:
                default = by_architecture.get(name, field.default)
                source = record["sources"].get(name, "")
                is_changed = config[name] != default and source != "default"
                yield ReportedSetting(
                    group, name, config[name], default, source, field.description, is_changed
                )


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
        "count": lambda value, noun: f"– {noun}s" if value is None else pluralize(value, noun),
        "duration": lambda value: "–" if value is None else format_duration(value),
        "date": format_date,
        "written": lambda value: format_value(value).strip('"'),
    }
    environment.globals |= {"VAL": VAL, "VAL_BITS": VAL_BITS}
    page = environment.get_template(template).render(values)
    return page.translate(CONTROLS).encode("utf-8", "backslashreplace")


def format_date(moment: str) -> str:
    """Return `26 November 2026, 12:44` for an ISO 8601 date, and anything else unchanged."""
    with suppress(ValueError):
        date = datetime.fromisoformat(moment)
        return f"{date.day} {date:%B %Y, %H:%M}"
    return moment


def compute_losses(run: LoggedRun, **size: int) -> dict[str, Any]:
    """Return the values with which a template draws a run's losses."""
    lines = [
        Line("train loss, each step", run.get_points(STEP_LOSS), 0, noisy=True),
        Line("val loss", run.get_points(VAL), 2),
        Line("train loss, evaluated", run.get_points(TRAIN), 1, dash=1),
    ]
    mark = (run.best["step"], run.best[VAL]) if run.best else None
    options = {"title": "Loss", "x_label": "step", "logarithmic": True, "mark": mark}
    return {"run": run, "lines": lines, "loss_chart": compute_chart(lines, **options, **size)}
