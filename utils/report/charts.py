"""Line charts as SVG text. The document that contains a chart sets its colors by CSS."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

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
    """Return an `<svg>` of lines over a common x-axis, with a ring around `mark`.

    Points that are not finite, and those below 0 on a logarithmic y-axis, are left out. The
    attribute `data-lines` has the points as JSON, for scripts that show the values at the pointer.
    """
    shown = [[p for p in line.points if _is_drawable(p, logarithmic)] for line in lines]
    if not any(shown):
        return f'<p class="nothing">No {escape(title.lower())} yet.</p>'
    right, bottom = width - RIGHT, height - BOTTOM
    xs, ys = zip(*(point for points in shown for point in points), strict=True)
    x, x_ticks = _create_axis(xs, LEFT, right, 75)
    y, y_ticks = _create_axis(ys, bottom, TOP, 45, logarithmic)
    parts = [_draw_text((LEFT + right) / 2, height - 4, x_label, "middle")]
    parts += [_draw_text(x(v), bottom + 17, _format_tick(v), "middle") for v in x_ticks]
    parts += [_draw_text(LEFT - 8, y(v) + 4, _format_tick(v), "end") for v in y_ticks]
    for at in map(y, y_ticks):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
    data = []
    for line, points in zip(lines, shown, strict=True):
        thinned = list(_thin(points, math.floor((right - LEFT) / PIXELS_PER_POINT)))
        parts += _draw_line(line, thinned, len(points), x, y)
        places = [[px, py, round(x(px), 1), round(y(py), 1)] for px, py, *_ in thinned]
        data.append({"label": line.label, "color": line.color, "points": places})
    if mark is not None and _is_drawable(mark, logarithmic):
        cx, cy = x(mark[0]), y(mark[1])
        parts.append(f'<circle class="mark" cx="{cx:.1f}" cy="{cy:.1f}" r="6"/>')
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" data-x="{escape(x_label)}" data-top="{TOP}" '
        f'data-bottom="{bottom}" data-lines="{escape(json.dumps(data))}">{"".join(parts)}</svg>'
    )


def _is_drawable(point: Point, logarithmic: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not logarithmic)


def _create_axis(
    values: Sequence[float], first: float, last: float, spacing: float, logarithmic: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """Return a map from values to pixels, and round values about `spacing` pixels apart."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1
        low, high = low - margin, high + margin
    scale = math.log if logarithmic and low > 0 else float
    start, end = scale(low), scale(high)
    count = max(2, abs(last - first) / spacing)
    ticks = (_get_ticks if scale is float else _get_log_ticks)(low, high, count)
    return lambda v: first + (scale(v) - start) / (end - start) * (last - first), ticks


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


def _draw_line(
    line: Line,
    points: Sequence[tuple[float, ...]],
    total: int,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> Iterator[str]:
    """Yield the band, the line and the dots of `points`, thinned from `total` points."""
    color = f'style="--color: var(--line-{line.color})"'
    at = [(f"{x(px):.1f}", *(f"{y(value):.1f}" for value in ys)) for px, *ys in points]
    if line.noisy and len(points) < total:
        band = [f"{px},{high}" for px, _, _, high in at]
        band += [f"{px},{low}" for px, _, low, _ in reversed(at)]
        yield f'<polygon class="band" {color} points="{" ".join(band)}"/>'
    kinds = "line" + " noisy" * line.noisy + " dashed" * line.dashed
    path = " ".join(f"{px},{py}" for px, py, *_ in at)
    yield f'<polyline class="{kinds}" {color} points="{path}"/>'
    if not line.noisy and len(at) <= 60:
        yield from (f'<circle class="dot" {color} cx="{px}" cy="{py}" r="3"/>' for px, py, *_ in at)


def _draw_text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _format_tick(value: float) -> str:
    """Return `0.002`, `1.5` or `20k`."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.0e}".replace("e-0", "e-")
