// View 2: the surprise of every token of a text.

import { STRINGS } from "../strings.js";
import { computeMeans } from "../app.js";
import { drawChart } from "../chart.js";
import { addArrowKeys, create, createSection, getHeat, onToken, showLineEnds } from "../dom.js";

const MAX_POINTS = 600; // of the chart

export function createSurpriseView(app) {
  const text = STRINGS.surprise;
  const { tokenizer } = app.model;
  const { unit } = tokenizer;
  const facts = create("p", { role: "status" });
  const passage = create("div.passage", { role: "listbox", ariaLabel: text.passage });
  const detail = create("div.detail");
  const chart = create("figure");
  let scored = null; // { ids, bits, ranks, top } of the text on display
  addArrowKeys(passage);
  onToken(passage, ["click", "focusin"], (index) => choose(index));
  onToken(passage, ["mouseover"], (index) => {
    if (app.state.get("at") < 0) showDetail(index); // else a place is held
  });

  /** Hold a place. */
  function choose(index) {
    passage.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    passage.children[index].setAttribute("aria-selected", "true");
    app.state.set({ at: index });
    showDetail(index);
  }

  function showDetail(index) {
    const { ids, bits, ranks, top } = scored;
    const place = STRINGS.token.position(index);
    const title = create("h3", text.detail(app.nameToken(ids[index]), place));
    if (index === 0) {
      detail.replaceChildren(title, create("p", text.first));
      return;
    }
    const i = index - 1; // of its prediction
    const choices = top[i].map(([id, probability]) =>
      create("li", createChoice(id, probability, index)),
    );
    detail.replaceChildren(
      title,
      create("p", text.facts(STRINGS.percent(2 ** -bits[i]), bits[i], ranks[i])),
      create("p", text.top),
      create("ol.choices", choices),
    );
  }

  /** Create a button that replaces the text from a token on by another token. */
  function createChoice(id, probability, index) {
    const { ids } = scored;
    const name = text.branch(app.nameToken(id));
    return create(
      "button",
      {
        ariaLabel: `${name}, ${STRINGS.percent(probability)}`,
        title: name,
        className: id === ids[index] ? "true" : "",
        onclick: () => app.setIds([...ids.slice(0, index), id]),
      },
      create("span.token", tokenizer.label(id)),
      ` ${STRINGS.percent(probability)}`,
    );
  }

  async function update(signal) {
    const ids = app.getIds();
    scored = null;
    if (ids.length < 2) {
      passage.replaceChildren();
      detail.replaceChildren();
      chart.replaceChildren();
      facts.textContent = text.short(unit);
      return;
    }
    const scores = await app.call("score", { ids }, { signal });
    if (signal.aborted) return;
    scored = { ids, ...scores };
    const at = Math.min(app.state.get("at"), ids.length - 1);
    const pieces = tokenizer.split(ids);
    passage.replaceChildren(...pieces.map((piece, index) => createPiece(piece, index)));
    passage.children[Math.max(at, 0)].tabIndex = 0;
    if (at >= 0) choose(at);
    else detail.replaceChildren(create("p.quiet", text.choose));
    const { perToken, perByte } = computeMeans(scores.bits, ids, tokenizer);
    facts.textContent = [
      `${text.mean(perToken, scores.bits.length, unit)}, ${text.perByte(perByte)}.`,
      text.guessing(app.model.num_tokens),
    ].join(" ");
    showMeans(scores.bits);
  }

  function createPiece(piece, index) {
    const name = app.nameToken(scored.ids[index]);
    const bits = scored.bits[index - 1]; // undefined for the first
    const element = create(
      "span.piece",
      {
        role: "option",
        tabIndex: -1,
        ariaLabel: index === 0 ? name : `${name}, ${STRINGS.bits(bits)}`,
        ariaSelected: "false",
      },
      showLineEnds(piece),
    );
    element.dataset.stop = index;
    if (index > 0) element.style.backgroundColor = getHeat(bits);
    return element;
  }

  function showMeans(bits) {
    let sum = 0;
    const points = bits.map((each, i) => [i + 2, (sum += each) / (i + 1)]);
    const interval = Math.ceil(points.length / MAX_POINTS);
    const drawing = drawChart({
      width: chart.clientWidth || 640,
      height: 180,
      series: [{ points: points.filter((_, i) => i % interval === 0), color: "line-1" }],
      xLabel: text.position,
      yLabel: text.unit,
      title: text.chart,
    });
    chart.replaceChildren(create("figcaption", text.chart), drawing);
  }

  const colors = [0, 2, 4, 6, 8].map(getHeat).join(", ");
  const scale = { background: `linear-gradient(90deg, ${colors})` };
  const element = createSection(
    unit === "character" ? text.title : text.titleOfTokens,
    text.lead(unit),
    facts,
    create("p.legend", text.certain, create("span.scale", { style: scale }), text.surprised),
    create("div.beside", passage, detail),
    chart,
  );
  return { element, update, usesText: true, depends: ["text", "checkpoint"] };
}
