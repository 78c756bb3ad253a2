// View 5: the logit lens.

import { STRINGS } from "../strings.js";
import { addArrowKeys, create, createSection, keepFocus } from "../dom.js";

const COLUMNS = 64; // positions on display

export function createLensView(app) {
  const text = STRINGS.lens;
  const { tokenizer, config } = app.model;
  const cut = create("p.quiet", { hidden: true });
  const table = create("table.lens", { ariaLabel: text.caption });
  const detail = create("p.detail", text.choose);
  const scroll = create("div.scroll", table);
  let columns = 1;
  addArrowKeys(table, () => columns);
  for (const event of ["focusin", "mouseover"]) {
    table.addEventListener(event, ({ target }) => {
      const cell = target.closest?.("[data-stop]");
      if (cell) detail.textContent = cell.getAttribute("aria-label");
    });
  }

  async function update(signal) {
    const all = app.getPrompt();
    const ids = all.slice(-config.block_size);
    const first = Math.max(0, ids.length - COLUMNS);
    const layers = await app.call("lens", { ids, first }, { signal });
    if (signal.aborted) return;
    const shown = ids.slice(first);
    columns = shown.length;
    cut.hidden = all.length === shown.length;
    cut.textContent = STRINGS.token.cut(shown.length, tokenizer.unit);
    const head = [
      createRow(
        text.after,
        shown.map((id) => createHeading(tokenizer.label(id))),
      ),
      createRow(
        text.next,
        shown.map((_, i) => createHeading(i + 1 < columns ? tokenizer.label(shown[i + 1]) : "")),
      ),
    ];
    const body = layers.map((positions, layer) => {
      const name = layer === 0 ? text.embedding : text.layer(layer);
      return createRow(
        name,
        positions.map((top, i) => createCell(name, top, shown[i], shown[i + 1])),
      );
    });
    keepFocus(table, () => {
      table.replaceChildren(create("thead", head), create("tbody", body));
      [...table.querySelectorAll("[data-stop]")].at(-1).tabIndex = 0;
    });
    detail.textContent = text.choose;
  }

  function createRow(name, cells) {
    return create("tr", create("th", { scope: "row" }, name), cells);
  }

  function createHeading(label) {
    return create("td.token", label);
  }

  /** Create the cell of a layer at a token: `top` are the likeliest next tokens. */
  function createCell(row, top, id, next) {
    const [likeliest, probability] = top[0];
    const list = top.map(([each, p]) => `${app.nameToken(each)} ${STRINGS.percent(p)}`).join(", ");
    const share = Math.round(85 * probability);
    const button = create(
      "button.token",
      {
        tabIndex: -1,
        ariaLabel: text.cell(row, app.nameToken(id), list),
        style: { "background-color": `color-mix(in srgb, var(--look) ${share}%, transparent)` },
      },
      tokenizer.label(likeliest),
    );
    button.dataset.stop = "";
    return create("td", { className: likeliest === next ? "right" : "" }, button);
  }

  const element = createSection(text.title, text.lead, cut, scroll, detail);
  return { element, update, usesText: true, depends: ["text", "checkpoint"] };
}
