"""Line charts as SVG: nothing but text, coloured by the page they stand in."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

MARGIN = {"left": 58, "right": 22, "top": 12, "bottom": 40}
PIXELS_PER_POINT = 2.5  # of a drawn line, at least
PIXELS_PER_TICK = {"x": 75, "y": 45}

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    `color` counts the page's colours `--line-1`, `--line-2`, … from 1. A `noisy` line is drawn as
    the mean of neighbours in the band from their least to their greatest; any other has a dot at
    each point.
    """

    label: str
    points: Sequence[Point]
    color: int
    noisy: bool = False
    dashed: bool = False


def draw_line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    width: int = 1040,
    height: int = 320,
    logarithmic: bool = False,
    mark: Point | None = None,
) -> str:
    """An `<svg>` of lines over a common x, with axes, a ring around `mark`, and its own data.

    Points that are not finite are left out; `logarithmic` is the y-axis. The data, as JSON in the
    attribute `data-lines`, are for a page that shows the values under the pointer.
    """
    lines = [_drawable(line, logarithmic) for line in lines]
    every = [point for line in lines for point in line.points]
    if not every:
        return f'<p class="nothing">No {escape(title.lower())} yet.</p>'
    right, bottom = width - MARGIN["right"], height - MARGIN["bottom"]
    x = _axis([p[0] for p in every], MARGIN["left"], right, PIXELS_PER_TICK["x"])
    y = _axis([p[1] for p in every], bottom, MARGIN["top"], PIXELS_PER_TICK["y"], logarithmic)
    parts = [*_grid(x, y, right, bottom)]
    parts.append(_text((MARGIN["left"] + right) / 2, height - 4, x_label, "middle", "label"))
    most = math.floor((right - MARGIN["left"]) / PIXELS_PER_POINT)
    for line in lines:
        parts += _drawn(line, x, y, most)
    if mark is not None and (mark[1] > 0 or not logarithmic):
        parts.append(
            f'<circle class="mark" cx="{x.at(mark[0]):.1f}" cy="{y.at(mark[1]):.1f}" r="6"/>'
        )
    data = [
        {
            "label": line.label,
            "color": line.color,
            "points": [
                [px, py, round(x.at(px), 1), round(y.at(py), 1)]
                for px, py, *_ in _thinned(line.points, most)
            ],
        }
        for line in lines
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" data-x="{escape(x_label)}" '
        f'data-top="{MARGIN["top"]}" data-bottom="{bottom}" '
        f'data-lines="{escape(json.dumps(data))}">' + "".join(parts) + "</svg>"
    )


@dataclass(frozen=True)
class _Axis:
    at: Callable[[float], float]  # a value's place in pixels
    ticks: list[float]


def _axis(
    values: Sequence[float], first: float, last: float, spacing: float, logarithmic: bool = False
) -> _Axis:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1
        low, high = low - margin, high + margin
    scale = math.log if logarithmic and low > 0 else float
    start, end = scale(low), scale(high)

    def at(value: float) -> float:
        return first + (scale(value) - start) / (end - start) * (last - first)

    number = max(2, abs(last - first) / spacing)
    ticks = _log_ticks(low, high, number) if scale is math.log else _ticks(low, high, number)
    return _Axis(at, ticks)


def _ticks(low: float, high: float, number: float) -> list[float]:
    """Round numbers between `low` and `high`, about `number` of them."""
    rough = (high - low) / number
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * nice for nice in (1, 2, 2.5, 5, 10) if size * nice >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, number: float) -> list[float]:
    """Round numbers that lie evenly on a logarithmic axis, where it is long enough for them."""
    if high / low < 1.5:
        return _ticks(low, high, number)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for nice in ((1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8), (1, 1.5, 2, 3, 5), (1, 3), (1,)):
        ticks = [10**e * n for e in exponents for n in nice if low <= 10**e * n <= high]
        if len(ticks) <= number * 1.5:
            break
    return ticks


def _grid(x: _Axis, y: _Axis, right: float, bottom: float) -> Iterator[str]:
    left = MARGIN["left"]
    for tick in y.ticks:
        at = y.at(tick)
        yield f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield _text(left - 8, at + 4, _short(tick), "end", "tick")
    for tick in x.ticks:
        yield _text(x.at(tick), bottom + 17, _short(tick), "middle", "tick")


def _drawn(line: Line, x: _Axis, y: _Axis, most: int) -> Iterator[str]:
    color = f'style="--color: var(--line-{line.color})"'
    points = list(_thinned(line.points, most))
    if line.noisy and len(points) < len(line.points):
        upper = [f"{x.at(px):.1f},{y.at(high):.1f}" for px, _, _, high in points]
        lower = [f"{x.at(px):.1f},{y.at(low):.1f}" for px, _, low, _ in reversed(points)]
        yield f'<polygon class="band" {color} points="{" ".join(upper + lower)}"/>'
    path = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py, *_ in points)
    kinds = ["line", *(["noisy"] if line.noisy else []), *(["dashed"] if line.dashed else [])]
    yield f'<polyline class="{" ".join(kinds)}" {color} points="{path}"/>'
    if not line.noisy and len(points) <= 60:
        for px, py, *_ in points:
            yield f'<circle class="dot" {color} cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3"/>'


def _drawable(line: Line, logarithmic: bool) -> Line:
    points = [
        (x, y)
        for x, y in line.points
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not logarithmic)
    ]
    return replace(line, points=points)


def _thinned(points: Sequence[Point], most: int) -> Iterator[tuple[float, float, float, float]]:
    """At most `most` of (x, mean y, least y, greatest y), each of as many neighbours."""
    size = max(1, math.ceil(len(points) / most))
    for first in range(0, len(points), size):
        group = points[first : first + size]
        ys = [y for _, y in group]
        yield group[-1][0], sum(ys) / len(ys), min(ys), max(ys)


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _short(value: float) -> str:
    """`0.002`, `1.5`, `20k`: a tick's number."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return (
        f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
    )
