// Elements: small helpers over the browser's own functions.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Create an element: "p.quiet" is a `p` of the class `quiet`. `properties`, an object that may be
 * left out, are set as properties if the element has them (`onclick`, `value` …), else as
 * attributes; `style` is an object, too. Children that are null are left out.
 */
export function create(tag, properties, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  element.classList.add(...classes);
  if (properties?.constructor !== Object) {
    children.unshift(properties ?? null);
    properties = {};
  }
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style") {
      for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    } else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** Create the element of a view: its title, a sentence on what it shows, and the rest. */
export function createSection(title, lead, ...children) {
  return create("section", create("h2", title), create("p", lead), ...children);
}

/** Create an element of SVG; all properties are attributes. */
export function createSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Create a slider with its value and a hint: { element, set(value) }. */
export function createSlider({ label, hint, min, max, step, format, onInput }) {
  const output = create("span.value", { ariaHidden: "true" });
  const input = create("input", { type: "range", min, max, step });
  const set = (value) => {
    const text = format(value);
    if (Number(input.value) !== value) input.value = value;
    if (output.textContent === text) return;
    output.textContent = text;
    input.setAttribute("aria-valuetext", text);
  };
  input.oninput = () => onInput(Number(input.value));
  const name = create("span", label);
  const element = create("label.slider", name, input, output);
  element.append(create("small", hint));
  return { element, set };
}

/** Call `handle(index)` at events on the elements with a number `data-stop` of a group. */
export function onToken(group, events, handle) {
  for (const event of events) {
    group.addEventListener(event, ({ target }) => {
      const { stop } = target.dataset ?? {};
      if (stop) handle(Number(stop));
    });
  }
}

/** Replace the elements of a group by `replace()`; if one had the focus, the first gets it. */
export function keepFocus(group, replace) {
  const hadFocus = group.contains(document.activeElement);
  replace();
  if (hadFocus) group.querySelector("[tabindex='0']")?.focus();
}

/** Show a prompt and, after it, its continuation. */
export function showContinuation(element, prompt, generated) {
  const given = create("span.prompt", showLineEnds(prompt));
  element.replaceChildren(given, showLineEnds(generated));
}

/**
 * Let the arrow keys move the focus among the elements `[data-stop]` of a group, of which one is in
 * the tab order. `columns()` is how many stand in a row, for the keys up and down.
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
