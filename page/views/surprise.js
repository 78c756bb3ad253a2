// View 2: the surprise of every token of a text.

import { STRINGS } from "../strings.js";
import { drawChart } from "../chart.js";
import { addArrowKeys, create, getHeat, showLineEnds } from "../dom.js";

export function createSurpriseView(app) {
  const text = STRINGS.surprise;
  const unit = app.model.tokenizer.unit;
  const facts = create("p", { role: "status" });
  const passage = create("div", { className: "passage", role: "group", ariaLabel: text.title });
  const detail = create("div", { className: "detail", ariaLive: "polite" });
  const chart = create("figure", {});
  addArrowKeys(passage);
  let shown = null; // { ids, pieces, bits, ranks, top } of the text on display

  passage.addEventListener("focusin", ({ target }) => choose(target));
  passage.addEventListener("mouseover", ({ target }) => choose(target));

  function choose(target) {
    if (target.dataset?.stop === undefined || !shown) return;
    const index = Number(target.dataset.stop);
    passage.querySelector(".chosen")?.classList.remove("chosen");
    target.classList.add("chosen");
    app.state.set({ at: index });
    showDetail(index);
  }

  function showDetail(index) {
    const { ids, bits, ranks, top } = shown;
    const title = create(
      "h3",
      {},
      text.detail(app.nameToken(ids[index]), STRINGS.token.position(index)),
    );
    if (index === 0) {
      detail.replaceChildren(title, create("p", {}, text.first));
      return;
    }
    const i = index - 1; // of its prediction
    const choices = top[i].map(([id, probability]) =>
      create(
        "li",
        {},
        create(
          "button",
          {
            type: "button",
            ariaLabel: `${text.branch(app.nameToken(id))}, ${STRINGS.percent(probability)}`,
            title: text.branch(app.nameToken(id)),
            className: id === ids[index] ? "true" : "",
            onclick: () => app.setText(app.model.tokenizer.decode([...ids.slice(0, index), id])),
          },
          create("span", { className: "token" }, app.model.tokenizer.label(id)),
          ` ${STRINGS.percent(probability)}`,
        ),
      ),
    );
    detail.replaceChildren(
      title,
      create("p", {}, text.facts(STRINGS.percent(2 ** -bits[i]), bits[i], ranks[i])),
      create("p", {}, text.top),
      create("ol", { className: "choices" }, choices),
    );
  }

  async function update(signal) {
    const ids = app.encode();
    const { tokenizer } = app.model;
    shown = null;
    chart.replaceChildren();
    if (ids.length < 2) {
      passage.replaceChildren();
      detail.replaceChildren();
      facts.textContent = text.short(unit);
      return;
    }
    const scored = await app.call("score", { ids }, { signal });
    if (signal.aborted) return;
    const pieces = tokenizer.split(ids);
    shown = { ids, pieces, ...scored };
    const start = Math.min(Math.max(app.state.get("at"), 0), ids.length - 1);
    const spans = pieces.map((piece, index) => {
      const bits = index === 0 ? null : scored.bits[index - 1];
      const span = create(
        "span",
        {
          className: "piece",
          role: "button",
          tabIndex: index === start ? 0 : -1,
          ariaLabel: `${app.nameToken(ids[index])}${bits === null ? "" : `, ${STRINGS.bits(bits)}`}`,
        },
        showLineEnds(piece),
      );
      span.dataset.stop = index;
      if (bits !== null) span.style.backgroundColor = getHeat(bits);
      return span;
    });
    passage.replaceChildren(...spans);
    if (app.state.get("at") >= 0) {
      spans[start].classList.add("chosen");
      showDetail(start);
    } else detail.replaceChildren(create("p", { className: "quiet" }, text.choose));
    const total = scored.bits.reduce((a, b) => a + b, 0);
    const bytes = ids.slice(1).reduce((sum, id) => sum + tokenizer.countBytes(id), 0);
    facts.textContent =
      `${text.mean(total / scored.bits.length, scored.bits.length, unit)}, ` +
      `${text.perByte(total / bytes)}. ${text.worse(app.model.num_tokens)}`;
    let sum = 0;
    const points = scored.bits.map((bits, i) => [i + 2, (sum += bits) / (i + 1)]);
    const thinned = points.filter((_, i) => i % Math.ceil(points.length / 600) === 0);
    chart.replaceChildren(
      create("figcaption", {}, text.chart),
      drawChart({
        width: chart.clientWidth || 640,
        series: [{ points: thinned, color: "line-1" }],
        height: 180,
        xLabel: text.position,
        yLabel: text.unit,
        title: text.chart,
      }),
    );
  }

  const scale = create("span", { className: "scale" });
  const element = create(
    "section",
    {},
    create("h2", {}, text.title),
    create("p", {}, text.lead(unit)),
    facts,
    create("p", { className: "legend" }, scale, text.legend),
    create("div", { className: "beside" }, passage, detail),
    chart,
  );
  return { element, update, depends: ["text", "checkpoint"] };
}
