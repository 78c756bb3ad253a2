// View 4: the attention of every head, and what the model is without some of them.

import { STRINGS } from "../strings.js";
import { addArrowKeys, create, showLineEnds } from "../dom.js";

const SMALL = 96; // tokens of the small maps

export function createAttentionView(app) {
  const text = STRINGS.attention;
  const { model } = app;
  const unit = model.tokenizer.unit;
  const { n_layer: L, n_head: H, block_size: T } = model.config;
  const facts = create("p", { role: "status" });
  const cut = create("p", { className: "quiet", hidden: true });
  const grid = create("div", { className: "heads" });
  const title = create("h3", {});
  const large = create("canvas", { className: "map", role: "img" });
  const passage = create("div", { className: "passage", role: "group" });
  const reads = create("p", { className: "detail", ariaLive: "polite" });
  const allOn = create(
    "button",
    { type: "button", onclick: () => app.state.set({ off: "" }) },
    text.allOn,
  );
  let shown = null; // { ids, t, maps }
  let scores = null;
  addArrowKeys(passage);
  const cells = [];
  for (let layer = 0; layer < L; layer++) {
    const row = create(
      "div",
      { className: "layer", role: "group", ariaLabel: text.layer(layer) },
      create("h3", {}, text.layer(layer)),
    );
    for (let head = 0; head < H; head++) {
      const name = text.head(layer, head);
      const canvas = create("canvas", { className: "map", ariaHidden: "true" });
      const score = create("span", { className: "score" });
      const choose = create(
        "button",
        {
          type: "button",
          ariaLabel: text.map(name),
          title: name,
          onclick: () => app.state.set({ layer, head }),
        },
        canvas,
      );
      const on = create("input", {
        type: "checkbox",
        checked: true,
        ariaLabel: text.switchOff(name),
        onchange: () => toggle(`${layer}.${head}`),
      });
      cells.push({ layer, head, canvas, score, choose, on });
      row.append(
        create("div", { className: "cell" }, choose, score, create("label", {}, on, text.on)),
      );
    }
    grid.append(row);
  }

  function getOff() {
    return app.state
      .get("off")
      .split(",")
      .filter((each) => cells.some(({ layer, head }) => each === `${layer}.${head}`));
  }

  function toggle(key) {
    const off = getOff();
    app.state.set({
      off: (off.includes(key) ? off.filter((each) => each !== key) : [...off, key]).join(","),
    });
  }

  passage.addEventListener("focusin", ({ target }) => look(target));
  passage.addEventListener("mouseover", ({ target }) => look(target));

  function look(target) {
    if (target.dataset?.stop === undefined || !shown) return;
    app.state.set({ at: shown.first + Number(target.dataset.stop) });
  }

  /** Return the attention weights from a position, (position + 1,). */
  function getWeights(layer, head, position) {
    const { t, maps } = shown;
    const start = ((layer * H + head) * t + position) * t;
    return maps.subarray(start, start + position + 1);
  }

  function getChosen() {
    return [Math.min(app.state.get("layer"), L - 1), Math.min(app.state.get("head"), H - 1)];
  }

  function showChosen() {
    const { ids, t, first } = shown;
    const [layer, head] = getChosen();
    const name = text.head(layer, head);
    for (const each of cells)
      each.choose.setAttribute("aria-pressed", each.layer === layer && each.head === head);
    title.textContent = name;
    large.setAttribute("aria-label", text.map(name));
    paint(large, t, (position) => getWeights(layer, head, position));
    const stop = app.state.get("at") - first;
    const at = stop < 0 || stop >= t ? t - 1 : stop;
    const weights = getWeights(layer, head, at);
    const largest = Math.max(...weights);
    [...passage.children].forEach((span, i) => {
      span.tabIndex = i === at ? 0 : -1;
      span.classList.toggle("chosen", i === at);
      const share = i <= at ? weights[i] / largest : 0;
      span.style.backgroundColor =
        share > 0.02
          ? `color-mix(in srgb, var(--look) ${Math.round(100 * share)}%, transparent)`
          : "transparent";
    });
    const order = Array.from(weights.keys())
      .sort((a, b) => weights[b] - weights[a])
      .slice(0, 4);
    const targets = order.map(
      (i) =>
        `${app.nameToken(ids[i])} (${STRINGS.token.position(first + i)}) ${STRINGS.percent(weights[i])}`,
    );
    reads.textContent = text.reads(
      `${app.nameToken(ids[at])} (${STRINGS.token.position(first + at)})`,
      targets.join(", "),
    );
  }

  async function update(signal, changed) {
    if (shown && !["text", "checkpoint", "off"].some((name) => changed.has(name))) {
      showChosen();
      return;
    }
    const all = app.encodePrompt(app.getText());
    const ids = all.slice(-T);
    const first = all.length - ids.length;
    cut.hidden = all.length <= T;
    cut.textContent = text.cut(ids.length, unit);
    const maps = await app.call("attend", { ids }, { signal });
    scores = await app.call("headScores", {}, { signal });
    if (signal.aborted) return;
    shown = { ids, t: ids.length, maps, first };
    const off = getOff();
    const small = Math.min(SMALL, ids.length);
    for (const { layer, head, canvas, score, on } of cells) {
      paint(canvas, small, (position) => getWeights(layer, head, position));
      score.textContent = text.scores(
        scores.previous[layer * H + head],
        scores.induction[layer * H + head],
      );
      on.checked = !off.includes(`${layer}.${head}`);
    }
    passage.replaceChildren(
      ...model.tokenizer.split(ids).map((piece, index) => {
        const span = create(
          "span",
          {
            className: "piece",
            role: "button",
            tabIndex: -1,
            ariaLabel: app.nameToken(ids[index]),
          },
          showLineEnds(piece),
        );
        span.dataset.stop = index;
        return span;
      }),
    );
    showChosen();
    if (ids.length < 2) {
      facts.textContent = "";
      return;
    }
    const mean = async (off) => {
      const { bits } = await app.call("score", { ids, off, top: 0 }, { signal });
      return bits.reduce((a, b) => a + b, 0) / bits.length;
    };
    const whole = await mean([]);
    const parts = [text.loss(whole, unit)];
    if (off.length) {
      const without = await mean(off);
      parts.push(text.lossOff(without, off.length, without - whole));
    }
    if (signal.aborted) return;
    facts.textContent = parts.join(" ");
    allOn.hidden = off.length === 0;
  }

  const element = create(
    "section",
    {},
    create("h2", {}, text.title),
    create("p", {}, text.lead(unit)),
    cut,
    facts,
    allOn,
    grid,
    create("p", { className: "quiet" }, text.scoresLong),
    title,
    create("div", { className: "beside" }, create("div", {}, passage, reads), large),
  );
  return { element, update, depends: ["text", "checkpoint", "off", "layer", "head", "at"] };
}

/** Paint a map of t × t weights; getRow(position) returns those of a row. */
function paint(canvas, t, getRow) {
  canvas.width = canvas.height = t;
  const context = canvas.getContext("2d");
  const image = context.createImageData(t, t);
  const ink = matchMedia("(prefers-color-scheme: dark)").matches ? [120, 180, 255] : [10, 68, 199];
  for (let row = 0; row < t; row++) {
    getRow(row).forEach((weight, column) => {
      const pixel = 4 * (row * t + column);
      image.data.set([...ink, Math.round(255 * Math.sqrt(weight))], pixel);
    });
  }
  context.putImageData(image, 0, 0);
}
