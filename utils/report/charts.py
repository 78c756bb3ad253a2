"""Line charts: the places of lines and ticks, which chart.svg.jinja draws."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 58, 22, 12, 40  # margins in pixels
PIXELS_PER_POINT = 2.5  # of a drawn line, at least

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    `color` n is the CSS variable `--line-n`. A `noisy` line is drawn as the mean of neighboring
    points, in a band from their minimum to their maximum; any other line has a dot at each point.
    """

    label: str
    points: Sequence[Point]
    color: int
    noisy: bool = False
    dashed: bool = False


def compute_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    width: int = 1040,
    height: int = 320,
    logarithmic: bool = False,
    mark: Point | None = None,
) -> dict[str, Any]:
    """Return the values of chart.svg.jinja: lines over a common x-axis, with a ring at `mark`.

    Points that are not finite, and those below 0 on a logarithmic y-axis, are left out.
    """

    def is_drawable(point: Point) -> bool:
        return all(map(math.isfinite, point)) and (point[1] > 0 or not logarithmic)

    shown = [list(filter(is_drawable, line.points)) for line in lines]
    if not any(shown):
        return {"title": title}
    right, bottom = width - RIGHT, height - BOTTOM
    xs, ys = zip(*chain(*shown), strict=True)
    x, x_ticks = _create_axis(xs, LEFT, right, 75)
    y, y_ticks = _create_axis(ys, bottom, TOP, 45, logarithmic)
    drawn, data = [], []
    for line, points in zip(lines, shown, strict=True):
        thinned = list(_thin(points, math.floor((right - LEFT) / PIXELS_PER_POINT)))
        places = [(x(px), *map(y, values)) for px, *values in thinned]
        drawn.append((line, places, line.noisy and len(thinned) < len(points)))
        values = [[px, py, x(px), y(py)] for px, py, *_ in thinned]
        data.append({"label": line.label, "color": line.color, "points": values})
    return {
        "title": title,
        "x_label": x_label,
        "width": width,
        "height": height,
        "edges": {"left": LEFT, "right": right, "top": TOP, "bottom": bottom},
        "x_ticks": [(x(tick), _format_tick(tick)) for tick in x_ticks],
        "y_ticks": [(y(tick), _format_tick(tick)) for tick in y_ticks],
        "lines": drawn,
        "data": json.dumps(data),
        "mark": (x(mark[0]), y(mark[1])) if mark and is_drawable(mark) else None,
    }


def _create_axis(
    values: Sequence[float], first: float, last: float, spacing: float, logarithmic: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """Return a map from values to pixels, and round values about `spacing` pixels apart."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1
        low, high = low - margin, high + margin
    scale = math.log if logarithmic else float
    start, end = scale(low), scale(high)
    count = max(2, abs(last - first) / spacing)
    ticks = (_get_log_ticks if logarithmic else _get_ticks)(low, high, count)
    return lambda v: round(first + (scale(v) - start) / (end - start) * (last - first), 1), ticks


def _get_ticks(low: float, high: float, count: float) -> list[float]:
    """Return about `count` round numbers between `low` and `high`."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * nice for nice in (1, 2, 2.5, 5, 10) if size * nice >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _get_log_ticks(low: float, high: float, count: float) -> list[float]:
    """Return round numbers that are about evenly spaced on a logarithmic axis."""
    if high / low < 1.5:
        return _get_ticks(low, high, count)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for nice in ((1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8), (1, 1.5, 2, 3, 5), (1, 3), (1,)):
        ticks = [10**e * n for e in exponents for n in nice if low <= 10**e * n <= high]
        if len(ticks) <= count * 1.5:
            break
    return ticks


def _thin(points: Sequence[Point], limit: int) -> Iterator[tuple[float, float, float, float]]:
    """Yield at most `limit` of (x, mean y, minimum y, maximum y), each of as many neighbors."""
    size = max(1, math.ceil(len(points) / limit))
    for first in range(0, len(points), size):
        ys = [y for _, y in points[first : first + size]]
        yield points[first + len(ys) - 1][0], sum(ys) / len(ys), min(ys), max(ys)


def _format_tick(value: float) -> str:
    """Return `0.002`, `1.5` or `20k`."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.0e}".replace("e-0", "e-")
