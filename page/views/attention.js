// View 4: the attention of every head, and the loss without some of them.

import { STRINGS } from "../strings.js";
import { addArrowKeys, create, createSection, onToken, showLineEnds } from "../dom.js";

const MAX_TOKENS = 256; // of the maps

export function createAttentionView(app) {
  const text = STRINGS.attention;
  const { model } = app;
  const { tokenizer } = model;
  const { unit } = tokenizer;
  const { n_layer: L, n_head: H, block_size: T } = model.config;
  const facts = create("p", { role: "status" });
  const cut = create("p.quiet", { hidden: true });
  const grid = create("div.heads");
  const title = create("h3");
  const large = create("canvas.map", { role: "img" });
  const passage = create("div.passage", { role: "listbox", ariaLabel: text.passage });
  const reads = create("p.detail");
  const switchOn = () => app.state.set({ off: "" });
  const allOn = create("button", { onclick: switchOn }, text.allOn);
  const cells = [];
  // What was computed of a text: { key, ids, first, maps, means }. `means` has the mean surprise by
  // the heads that are off; `first` is the position of ids[0] in the text.
  let shown = { key: "" };
  addArrowKeys(passage);
  for (let layer = 1; layer <= L; layer++) grid.append(createLayer(layer));
  onToken(passage, ["click", "focusin"], (index) => {
    app.state.set({ at: shown.first + index });
    showPosition();
  });

  function createLayer(layer) {
    const heading = create("h3", text.layer(layer));
    const row = create("div.layer", { role: "group", ariaLabel: text.layer(layer) });
    row.append(heading);
    for (let head = 1; head <= H; head++) {
      const name = text.head(layer, head);
      const canvas = create("canvas.map", { ariaHidden: "true" });
      const score = create("span.score");
      const choose = create(
        "button",
        {
          ariaLabel: text.map(name),
          title: name,
          onclick: () => app.state.set({ layer, head }),
        },
        canvas,
      );
      const on = create("input", {
        type: "checkbox",
        checked: true,
        onchange: () => toggle(`${layer}.${head}`),
      });
      const label = create("label", on, text.headShort(head));
      cells.push({ layer, head, canvas, score, choose, on });
      row.append(create("div.cell", choose, label, score));
    }
    return row;
  }

  /** Return the heads that are switched off: ["layer.head", …]. */
  function getOff() {
    const off = app.state.get("off").split(",");
    return cells.map(({ layer, head }) => `${layer}.${head}`).filter((key) => off.includes(key));
  }

  function toggle(key) {
    const off = getOff();
    const others = off.filter((each) => each !== key);
    app.state.set({ off: (off.includes(key) ? others : [...off, key]).join(",") });
  }

  /** Return the attention weights from a position, (position + 1,). */
  function getWeights(layer, head, position) {
    const t = shown.ids.length;
    const start = (((layer - 1) * H + head - 1) * t + position) * t;
    return shown.maps.subarray(start, start + position + 1);
  }

  function getHead() {
    return [Math.min(app.state.get("layer"), L), Math.min(app.state.get("head"), H)];
  }

  async function update(signal) {
    const all = app.getPrompt();
    const ids = all.slice(-Math.min(T, MAX_TOKENS));
    cut.hidden = all.length === ids.length;
    cut.textContent = STRINGS.token.cut(ids.length, unit);
    const key = JSON.stringify([app.state.get("checkpoint"), ids]);
    if (shown.key !== key) {
      const maps = await app.call("attend", { ids }, { signal });
      const scores = await app.call("headScores", {}, { signal });
      if (signal.aborted) return;
      shown = { key, ids, first: all.length - ids.length, maps, means: new Map() };
      showMaps(scores);
    }
    const off = getOff();
    allOn.disabled = off.length === 0;
    for (const { layer, head, on } of cells) on.checked = !off.includes(`${layer}.${head}`);
    showHead();
    showPosition();
    const whole = await measure([], signal);
    const without = await measure(off, signal);
    if (signal.aborted) return;
    const parts = whole ? [text.loss(whole, unit)] : [];
    if (whole && off.length) parts.push(text.lossOff(without, off.length, without - whole));
    facts.textContent = parts.join(" ");
  }

  /** Return the mean surprise of the text in bits a token, with heads switched off. */
  async function measure(off, signal) {
    const { ids, means } = shown;
    if (!means.has(off.join())) {
      const mean = await app.measure({ ids, off }, { signal });
      if (!signal.aborted) means.set(off.join(), mean?.perToken ?? null);
    }
    return means.get(off.join());
  }

  /** Show the small maps, the scores of the heads, and the text. */
  function showMaps({ previous, induction }) {
    for (const { layer, head, canvas, score } of cells) {
      paint(canvas, shown.ids.length, (position) => getWeights(layer, head, position));
      const i = (layer - 1) * H + head - 1;
      score.textContent = text.scores(previous[i], induction[i]);
    }
    const pieces = tokenizer.split(shown.ids).map((piece, index) => {
      const options = { className: "piece", role: "option", tabIndex: -1 };
      const name = app.nameToken(shown.ids[index]);
      const element = create("span", { ...options, ariaLabel: name }, showLineEnds(piece));
      element.dataset.stop = index;
      return element;
    });
    passage.replaceChildren(...pieces);
  }

  /** Show the large map of the chosen head. */
  function showHead() {
    const [layer, head] = getHead();
    const name = text.head(layer, head);
    for (const each of cells) {
      const isChosen = each.layer === layer && each.head === head;
      each.choose.setAttribute("aria-pressed", isChosen);
    }
    title.textContent = name;
    large.setAttribute("aria-label", text.map(name));
    paint(large, shown.ids.length, (position) => getWeights(layer, head, position));
  }

  /** Colour the text by the chosen head's attention from the chosen token, by default the last. */
  function showPosition() {
    const { ids, first } = shown;
    const chosen = app.state.get("at") - first;
    const at = chosen < 0 || chosen >= ids.length ? ids.length - 1 : chosen;
    const weights = getWeights(...getHead(), at);
    const largest = Math.max(...weights);
    [...passage.children].forEach((piece, i) => {
      piece.tabIndex = i === at ? 0 : -1;
      piece.setAttribute("aria-selected", i === at);
      const share = i <= at ? weights[i] / largest : 0;
      piece.style.backgroundColor = `color-mix(in srgb, var(--look) ${Math.round(100 * share)}%, transparent)`;
    });
    const describe = (i) => `${app.nameToken(ids[i])} (${STRINGS.token.position(first + i)})`;
    const order = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]);
    const targets = order.slice(0, 4).map((i) => `${describe(i)} ${STRINGS.percent(weights[i])}`);
    reads.textContent = text.reads(describe(at), targets.join(", "));
  }

  const element = createSection(
    text.title,
    text.lead(unit),
    cut,
    create("div.buttons", allOn, facts),
    create("div.beside.even", grid, create("div", title, passage, reads, large)),
    create("p.quiet", text.scoresLong),
  );
  const depends = ["text", "checkpoint", "off", "layer", "head"];
  return { element, update, usesText: true, depends };
}

/** Paint a map of t × t weights; getRow(position) returns those of a row. */
function paint(canvas, t, getRow) {
  canvas.width = canvas.height = t;
  const context = canvas.getContext("2d");
  const image = context.createImageData(t, t);
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const [red, green, blue] = isDark ? [120, 180, 255] : [10, 68, 199];
  for (let row = 0; row < t; row++) {
    const weights = getRow(row);
    for (let column = 0; column <= row; column++) {
      const pixel = 4 * (row * t + column);
      image.data[pixel] = red;
      image.data[pixel + 1] = green;
      image.data[pixel + 2] = blue;
      image.data[pixel + 3] = Math.round(255 * Math.sqrt(weights[column]));
    }
  }
  context.putImageData(image, 0, 0);
}
