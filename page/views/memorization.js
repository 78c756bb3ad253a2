// View 8: stretches of the text that stand verbatim in the training text.

import { STRINGS } from "../strings.js";
import { create, showLineEnds } from "../dom.js";
import { decodeHashes, findStretches } from "../memorization.js";

export function createMemorizationView(app) {
  const text = STRINGS.memorization;
  const { model } = app;
  const unit = model.tokenizer.unit;
  const data = model.memorization;
  const facts = create("p", { role: "status" });
  const passage = create("pre", { className: "sample", tabIndex: 0, ariaLabel: STRINGS.page.text });
  const button = create("button", { type: "button" });
  let hashes = null; // decoded when they are needed first
  button.onclick = async () => {
    button.disabled = true;
    await app.attempt(() => app.generate(app.state.get("count")));
    button.disabled = false;
    button.focus();
  };

  async function update() {
    button.textContent = text.generate(app.state.get("count"), unit);
    if (!data) return;
    hashes ??= decodeHashes(data.hashes);
    const all = app.getText();
    const stretches = findStretches(all, hashes, data.length);
    let end = 0,
      covered = 0,
      longest = 0;
    const parts = [];
    for (const [start, stop] of stretches) {
      parts.push(
        showLineEnds(all.slice(end, start)),
        create("mark", {}, showLineEnds(all.slice(start, stop))),
      );
      covered += stop - start;
      longest = Math.max(longest, stop - start);
      end = stop;
    }
    passage.replaceChildren(...parts, showLineEnds(all.slice(end)));
    facts.textContent = text.found(stretches.length, longest, covered / Math.max(1, all.length));
  }

  const element = create(
    "section",
    {},
    create("h2", {}, text.title),
    data
      ? [
          create("p", {}, text.lead(data)),
          create("div", { className: "buttons" }, button),
          facts,
          passage,
          create("p", { className: "quiet" }, text.how(data)),
        ]
      : create("p", { className: "note" }, text.none(model.memorization_reason)),
  );
  return { element, update, depends: ["text", "count"] };
}
