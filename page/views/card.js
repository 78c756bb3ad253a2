// View 9: the card of the model.

import { STRINGS } from "../strings.js";
import { create } from "../dom.js";

export function createCardView(app) {
  const text = STRINGS.card;
  const { model } = app;
  const { card, config } = model;
  const list = (rows) =>
    create(
      "table.facts",
      create(
        "tbody",
        rows.map(([name, value]) =>
          create("tr", create("th", { scope: "row" }, name), create("td", value)),
        ),
      ),
    );
  const element = create(
    "section",
    create("h2", text.title),
    create("h3", text.facts),
    list(card.facts),
    card.settings.length ? [create("h3", text.settings), list(card.settings)] : null,
    create("h3", text.sample),
    create("pre.sample", { tabIndex: 0, ariaLabel: text.sample }, card.sample),
    create("p.quiet", card.overlap),
    create("h3", text.limits),
    create(
      "ul",
      text.limitTexts(model.tokenizer.unit, config.block_size).map((each) => create("li", each)),
    ),
    create("h3", text.words),
    list(text.glossary),
  );
  return { element, update: async () => {}, depends: [] };
}
