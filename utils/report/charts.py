"""Line charts: the places of lines, ticks and labels, which chart.svg.jinja draws."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 50, 22, 12, 40  # margins in pixels
PIXELS_PER_POINT = 2.5  # of a drawn line, at least
LINE_HEIGHT = 15  # of a label
LETTER = 6.6  # width, about, in a label
COLORS = DASHES = 6  # of lines in chart.css

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    `color` n is the CSS variable `--line-n`, `dash` n the class `dash-n`. A `noisy` line is drawn
    as the mean of neighboring points; any other line has a dot at each point.
    """

    label: str
    points: Sequence[Point]
    color: int
    dash: int = 0
    noisy: bool = False


def compute_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    width: int,
    height: int,
    logarithmic: bool = False,
    from_zero: bool = False,
    mark: Point | None = None,
    labeled: bool = False,
) -> dict[str, Any]:
    """Return the values of chart.svg.jinja: lines over a common x-axis, with a ring at `mark`.

    A line alone has a band around its means, from minimum to maximum. `labeled` writes the label
    of each line at its end. Points that are not finite, and those below 0 on a logarithmic y-axis,
    are left out.
    """

    def is_drawable(point: Point) -> bool:
        return all(map(math.isfinite, point)) and (point[1] > 0 or not logarithmic)

    shown = [list(filter(is_drawable, line.points)) for line in lines]
    if not any(shown):
        return {"title": title}
    labels = [_shorten(line.label, int(width / 4 / LETTER)) if labeled else "" for line in lines]
    right = width - RIGHT - math.ceil(max(map(len, labels)) * LETTER)
    height = max(height, TOP + BOTTOM + LINE_HEIGHT * len(lines))
    bottom = height - BOTTOM
    xs, ys = zip(*chain(*shown), strict=True)
    x, x_ticks = _create_axis(xs, LEFT, right, 60, from_zero=3 * min(xs) < max(xs))
    y, y_ticks = _create_axis(ys, bottom, TOP, 45, logarithmic, from_zero, padding=0.04)
    drawn, data = [], []
    for line, points in zip(lines, shown, strict=True):
        spacing = PIXELS_PER_POINT * (4 if labeled else 1)  # smoother, as there are several
        thinned = list(_thin(points, math.floor((right - LEFT) / spacing)))
        places = [(x(px), *map(y, values)) for px, *values in thinned]
        has_band = line.noisy and not labeled and len(thinned) < len(points)
        drawn.append((line, places, has_band))
        values = [[px, float(f"{py:.5g}"), x(px)] for px, py, *_ in thinned]
        data.append({"label": line.label, "color": line.color, "points": values})
    ends = [(label, *each[:2]) for label, each in zip(labels, drawn, strict=True) if label]
    return {
        "title": title,
        "x_label": x_label,
        "width": width,
        "height": height,
        "edges": {"left": LEFT, "right": right, "top": TOP, "bottom": bottom},
        "x_ticks": list(zip(map(x, x_ticks), _format_ticks(x_ticks), strict=True)),
        "y_ticks": list(zip(map(y, y_ticks), _format_ticks(y_ticks), strict=True)),
        "lines": drawn,
        "labels": list(_place_labels(ends, bottom)),
        "data": json.dumps(data, separators=(",", ":")),
        "mark": _place_mark(x(mark[0]), y(mark[1]), drawn) if mark and is_drawable(mark) else None,
        "mark_value": mark and mark[1],
    }


def _create_axis(
    values: Sequence[float],
    first: float,
    last: float,
    spacing: float,
    logarithmic: bool = False,
    from_zero: bool = False,
    padding: float = 0,
) -> tuple[Callable[[float], float], list[float]]:
    """Return a map from values to pixels, and round values about `spacing` pixels apart."""
    low, high = min(values), max(values)
    if from_zero and low > 0:
        low = 0
    if low == high:
        margin = abs(low) * 0.1 or 1
        low, high = low - margin, high + margin
    scale = math.log if logarithmic else float
    start, end = scale(low), scale(high)
    margin = (end - start) * padding
    start, end = (start if low == 0 else start - margin), end + margin
    count = abs(last - first) / spacing
    ticks = (_get_log_ticks if logarithmic else _get_ticks)(low, high, count)
    if all(isinstance(value, int) for value in values):  # there is no step 1.5
        ticks = [tick for tick in ticks if tick == int(tick)]
    return lambda v: round(first + (scale(v) - start) / (end - start) * (last - first), 1), ticks


def _get_ticks(low: float, high: float, count: float) -> list[float]:
    """Return about `count` round numbers between `low` and `high`, three if there are."""
    power = 10.0 ** math.floor(math.log10(high - low))
    for step in (power * nice for nice in (5, 2.5, 2, 1, 0.5, 0.25, 0.2, 0.1, 0.05)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 >= max(3, 0.6 * count):
            break
    return [number * step for number in range(first, last + 1)]


def _get_log_ticks(low: float, high: float, count: float) -> list[float]:
    """Return round numbers that are about evenly spaced on a logarithmic axis, at least two."""
    if high / low < 3:
        return _get_ticks(low, high, count)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for nice in ((1,), (1, 3), (1, 1.5, 2, 3, 5), (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)):
        ticks = [10**e * n for e in exponents for n in nice if low <= 10**e * n <= high]
        if len(ticks) >= max(3, 0.6 * count):
            break
    return ticks


def _thin(points: Sequence[Point], limit: int) -> Iterator[tuple[float, float, float, float]]:
    """Yield at most `limit` of (x, mean y, minimum y, maximum y), each of as many neighbors."""
    size = max(1, math.ceil(len(points) / limit))
    for first in range(0, len(points), size):
        ys = [y for _, y in points[first : first + size]]
        yield points[first + len(ys) - 1][0], sum(ys) / len(ys), min(ys), max(ys)


def _place_labels(
    ends: Sequence[tuple[str, Line, Sequence[tuple[float, ...]]]], bottom: float
) -> list[tuple[str, Line, tuple[float, ...], float]]:
    """Return labels with their lines, the ends of these, and heights at which none overlap."""
    placed = sorted(((*end[:2], end[2][-1]) for end in ends if end[2]), key=lambda end: end[2][1])
    heights = []
    for *_, (_, y, *_) in placed:
        heights.append(max(y, heights[-1] + LINE_HEIGHT) if heights else y)
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], bottom)
        bottom = heights[index] - LINE_HEIGHT
    return [(*end, height) for end, height in zip(placed, heights, strict=True)]


def _place_mark(
    x: float, y: float, drawn: Sequence[tuple[Line, Sequence[tuple[float, ...]], bool]]
) -> tuple[float, float, float]:
    """Return the place of a ring, and the height of its label, on the side with fewer points."""
    near = [py - y for _, places, _ in drawn for px, py, *_ in places if abs(px - x) < 90]
    is_free_below = sum(0 < each < 30 for each in near) < sum(-30 < each < 0 for each in near)
    return x, y, y + (22 if is_free_below else -12)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _format_ticks(values: Sequence[float]) -> list[str]:
    """Return `0`, `0.002`, `2.5e-4`, `1.5`, `2,000`, `20k`, in one unit."""
    highest = max(map(abs, values), default=0)
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if highest >= 10 * unit:
            return [f"{value / unit:g}{suffix if value else ''}" for value in values]
    if 0 < highest < 1e-3:
        return [f"{v:.1e}".replace(".0e", "e").replace("e-0", "e-") if v else "0" for v in values]
    return [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}" for value in values]
