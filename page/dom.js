// Elements: small helpers over the browser's own functions.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Create an element. `properties` are set as properties if the element has them (`onclick`,
 * `textContent`, `className`, `value` …), else as attributes; `style` is an object.
 */
export function create(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Create an element of SVG; all properties are attributes. */
export function createSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "style") {
      for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    } else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Create a slider with its value beside it: { element, input, set(value) }. */
export function createSlider({ label, hint, min, max, step, value, format, onInput }) {
  const output = create("output", { textContent: format(value) });
  const input = create("input", { type: "range", min, max, step, value });
  input.setAttribute("aria-valuetext", format(value));
  const show = (number) => {
    output.textContent = format(number);
    input.setAttribute("aria-valuetext", format(number));
  };
  input.oninput = () => {
    show(Number(input.value));
    onInput(Number(input.value));
  };
  const set = (number) => {
    if (Number(input.value) !== number) input.value = number;
    show(number);
  };
  const element = create("label", { className: "slider", title: hint ?? "" }, create("span", {}, label), input, output);
  return { element, input, set };
}

/**
 * Let the arrow keys move the focus among the elements of a group, of which one is in the tab
 * order. `columns()` is how many stand in a row, for the keys up and down.
 */
export function addArrowKeys(group, columns = () => 1) {
  group.addEventListener("keydown", (event) => {
    const all = [...group.querySelectorAll("[data-stop]")];
    const index = all.indexOf(document.activeElement);
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() };
    let next = index + moves[event.key];
    if (event.key === "Home") next = 0;
    if (event.key === "End") next = all.length - 1;
    if (index < 0 || !all[next]) return;
    event.preventDefault();
    all[index].tabIndex = -1;
    all[next].tabIndex = 0;
    all[next].focus();
  });
}

/**
 * Draw lines over one axis: an SVG of `width` × `height` pixels.
 *
 * series: [{ points: [[x, y], …], name, color }], color a class. marks: vertical lines,
 * [{ at, label }].
 */
export function drawChart({ series, width, height = 240, xLabel, yLabel, marks = [], title }) {
  const points = series.flatMap((each) => each.points);
  const margin = { left: 46, right: 14, top: 24, bottom: 34 };
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const xRange = [Math.min(...xs), Math.max(...xs)], yRange = [Math.min(...ys), Math.max(...ys)];
  if (xRange[0] === xRange[1]) xRange[1] += 1;
  const ticks = chooseTicks(...yRange, 4);
  yRange[0] = Math.min(yRange[0], ticks[0]);
  yRange[1] = Math.max(yRange[1], ticks[ticks.length - 1]);
  if (yRange[0] === yRange[1]) yRange[1] += 1;
  const x = (value) => margin.left + ((value - xRange[0]) / (xRange[1] - xRange[0])) * (width - margin.left - margin.right);
  const y = (value) => height - margin.bottom - ((value - yRange[0]) / (yRange[1] - yRange[0])) * (height - margin.top - margin.bottom);
  const svg = createSvg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": title });
  const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 2 });
  for (const tick of ticks) {
    svg.append(createSvg("line", { x1: margin.left, x2: width - margin.right, y1: y(tick), y2: y(tick), class: "grid" }));
    svg.append(createSvg("text", { x: margin.left - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of chooseTicks(...xRange, width > 400 ? 6 : 4).filter((tick) => tick <= xRange[1])) {
    svg.append(createSvg("text", { x: x(tick), y: height - margin.bottom + 16, "text-anchor": "middle" }, number(tick)));
  }
  svg.append(createSvg("text", { x: width - margin.right, y: height - 3, "text-anchor": "end" }, xLabel));
  svg.append(createSvg("text", { x: 0, y: 11 }, yLabel));
  for (const { points, name, color } of series) {
    const path = points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    svg.append(createSvg("path", { d: path, class: `line ${color}` }));
    if (name) {
      const [a, b] = points[points.length - 1];
      svg.append(createSvg("text", { x: x(a) - 4, y: y(b) - 6, "text-anchor": "end", class: "label" }, name));
    }
  }
  for (const { at, label } of marks) {
    svg.append(createSvg("line", { x1: x(at), x2: x(at), y1: margin.top, y2: height - margin.bottom, class: "mark" }));
    const isRight = x(at) > width / 2;
    svg.append(createSvg("text", { x: x(at) + (isRight ? -4 : 4), y: margin.top + 8, "text-anchor": isRight ? "end" : "start", class: "label" }, label));
  }
  return svg;
}

/** Return about `number` round values over a range. */
function chooseTicks(low, high, number) {
  const rough = (high - low || 1) / number;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const ticks = [];
  for (let tick = Math.floor(low / step) * step; tick < high + step; tick += step) {
    ticks.push(Number(tick.toPrecision(12)));
    if (tick >= high) break;
  }
  return ticks;
}

/** Return a CSS color for a surprise: pale blue at 0 bits, yellow, orange, and red from 8 bits. */
export function getHeat(bits) {
  const colors = [[214, 234, 255], [255, 243, 176], [255, 176, 92], [255, 92, 72]];
  const place = (Math.min(Math.max(bits / 8, 0), 1) || 0) * (colors.length - 1);
  const below = Math.min(Math.floor(place), colors.length - 2);
  const mixed = colors[below].map((from, i) => Math.round(from + (colors[below + 1][i] - from) * (place - below)));
  return `rgb(${mixed.join(" ")})`;
}

/** Return a text with its line ends made visible, for a `pre`. */
export function showLineEnds(text) {
  return text.replaceAll("\n", "↵\n");
}
