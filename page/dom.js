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
  const element = create(
    "label",
    { className: "slider", title: hint ?? "" },
    create("span", {}, label),
    input,
    output,
  );
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

/** Return a CSS color for a surprise: pale blue at 0 bits, yellow, orange, and red from 8 bits. */
export function getHeat(bits) {
  const colors = [
    [214, 234, 255],
    [255, 243, 176],
    [255, 176, 92],
    [255, 92, 72],
  ];
  const place = (Math.min(Math.max(bits / 8, 0), 1) || 0) * (colors.length - 1);
  const below = Math.min(Math.floor(place), colors.length - 2);
  const mixed = colors[below].map((from, i) =>
    Math.round(from + (colors[below + 1][i] - from) * (place - below)),
  );
  return `rgb(${mixed.join(" ")})`;
}

/** Return a text with its line ends made visible, for a `pre`. */
export function showLineEnds(text) {
  return text.replaceAll("\n", "↵\n");
}
