// View 5: the logit lens.

import { STRINGS } from "../strings.js";
import { addArrowKeys, create } from "../dom.js";

const COLUMNS = 64; // positions on display

export function createLensView(app) {
  const text = STRINGS.lens;
  const unit = app.model.tokenizer.unit;
  const { block_size: T } = app.model.config;
  const cut = create("p", { className: "quiet", hidden: true });
  const table = create("table", { className: "lens", ariaLabel: text.caption });
  const detail = create("p", { className: "detail", ariaLive: "polite" }, text.choose);
  const scroll = create("div", { className: "scroll" }, table);
  let columns = 1;
  addArrowKeys(table, () => columns);
  const choose = ({ target }) => {
    const cell = target.closest?.("[data-stop]");
    if (cell) detail.textContent = cell.getAttribute("aria-label");
  };
  table.addEventListener("focusin", choose);
  table.addEventListener("mouseover", choose);

  async function update(signal) {
    const { tokenizer } = app.model;
    const all = app.encodePrompt(app.getText());
    const ids = all.slice(-T);
    const layers = await app.call("lens", { ids }, { signal });
    if (signal.aborted) return;
    const first = Math.max(0, ids.length - COLUMNS);
    const shown = ids.slice(first);
    columns = shown.length;
    cut.hidden = all.length <= shown.length;
    cut.textContent = text.cut(shown.length, unit);
    const head = create(
      "tr",
      {},
      create("th", { scope: "col" }, text.text),
      shown.map((id) => create("th", { scope: "col", className: "token" }, tokenizer.label(id))),
    );
    const rows = layers.map((positions, layer) => {
      const name = layer === 0 ? text.embedding : text.layer(layer);
      return create(
        "tr",
        {},
        create("th", { scope: "row" }, name),
        positions.slice(first).map((top, i) => {
          const [id, probability] = top[0];
          const choices = top
            .map(([each, p]) => `${app.nameToken(each)} ${STRINGS.percent(p)}`)
            .join(", ");
          const isLast = layer === layers.length - 1 && i === shown.length - 1;
          const cell = create(
            "button",
            {
              type: "button",
              className: "token",
              tabIndex: isLast ? 0 : -1,
              ariaLabel: text.cell(name, app.nameToken(shown[i]), choices),
            },
            tokenizer.label(id),
          );
          cell.dataset.stop = "";
          cell.style.backgroundColor = `color-mix(in srgb, var(--look) ${Math.round(85 * probability)}%, transparent)`;
          return create("td", { className: id === shown[i + 1] ? "right" : "" }, cell);
        }),
      );
    });
    table.replaceChildren(create("thead", {}, head), create("tbody", {}, rows));
    scroll.scrollLeft = scroll.scrollWidth;
  }

  const element = create(
    "section",
    {},
    create("h2", {}, text.title),
    create("p", {}, text.lead),
    cut,
    scroll,
    detail,
  );
  return { element, update, depends: ["text", "checkpoint"] };
}
