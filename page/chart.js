// A chart: lines over one axis, in SVG.

import { createSvg } from "./dom.js";

const MARGIN = { left: 46, right: 14, top: 24, bottom: 34 };

/**
 * Draw lines over one axis: an SVG of `width` × `height` pixels.
 *
 * series: [{ points: [[x, y], …], name, color }], color a class. marks: vertical lines,
 * [{ at, label }]; those without a label are faint.
 */
export function drawChart({ series, width, height = 240, xLabel, yLabel, marks = [], title }) {
  const points = series.flatMap((each) => each.points);
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const xRange = getRange([...points.map(([x]) => x), ...marks.map(({ at }) => at)]);
  const yTicks = chooseTicks(...getRange(points.map(([, y]) => y)), 4);
  const x = createScale(xRange, [MARGIN.left, right]);
  const y = createScale([yTicks[0], yTicks.at(-1)], [bottom, MARGIN.top]);
  const svg = createSvg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "chart",
    role: "img",
    "aria-label": title,
  });
  const draw = (tag, attributes, ...children) =>
    svg.append(createSvg(tag, attributes, ...children));
  const write = (text, x, y, anchor, name = "") =>
    draw("text", { x, y, "text-anchor": anchor, class: name }, text);

  for (const tick of yTicks) {
    draw("line", { x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick), class: "grid" });
    write(formatTick(tick), MARGIN.left - 6, y(tick) + 4, "end");
  }
  for (const tick of chooseTicks(...xRange, width > 400 ? 6 : 4, 1)) {
    if (tick >= xRange[0] && tick <= xRange[1])
      write(formatTick(tick), x(tick), bottom + 16, "middle");
  }
  write(xLabel, right, height - 3, "end");
  write(yLabel, 0, 11, "start");
  for (const { points, name, color } of series) {
    const places = points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`);
    draw("polyline", { points: places.join(" "), class: `line ${color}` });
    const [a, b] = points.at(-1);
    if (name) write(name, x(a) - 4, y(b) - 6, "end", "label");
  }
  for (const { at, label } of marks) {
    const isRight = x(at) > width / 2;
    const name = label ? "mark" : "grid";
    draw("line", { x1: x(at), x2: x(at), y1: MARGIN.top, y2: bottom, class: name });
    write(label, x(at) + (isRight ? -4 : 4), MARGIN.top + 8, isRight ? "end" : "start", "label");
  }
  return svg;
}

function getRange(numbers) {
  const low = Math.min(...numbers);
  const high = Math.max(...numbers);
  return low === high ? [low, low + 1] : [low, high];
}

function createScale([from, to], [first, last]) {
  return (value) => first + ((value - from) / (to - from)) * (last - first);
}

/** Return about `number` round values that cover a range, at least `least` apart. */
function chooseTicks(low, high, number, least = 0) {
  const rough = Math.max((high - low) / number, least);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const first = Math.floor(low / step);
  const last = Math.ceil(high / step);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function formatTick(value) {
  return value.toLocaleString("en", { maximumFractionDigits: 2 });
}
