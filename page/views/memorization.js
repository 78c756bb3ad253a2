// View 8: stretches of the text that stand verbatim in the training text.

import { STRINGS } from "../strings.js";
import { create, showLineEnds } from "../dom.js";
import { decodeHashes, findStretches } from "../memorization.js";

export function createMemorizationView(app) {
  const text = STRINGS.memorization;
  const { memorization: data, memorization_reason: reason, tokenizer } = app.model;
  const facts = create("p", { role: "status" });
  const passage = create("pre.sample", { tabIndex: 0, ariaLabel: text.passage });
  const button = create("button", { onclick: generate });
  let hashes = null; // decoded when they are needed first

  async function generate() {
    button.disabled = true;
    await app.generate(app.state.get("count"));
    button.disabled = false;
    button.focus();
  }

  async function update() {
    button.textContent = text.generate(app.state.get("count"), tokenizer.unit);
    if (!data) return;
    hashes ??= decodeHashes(data.hashes);
    const all = app.getText();
    const stretches = findStretches(all, hashes, data);
    let end = 0;
    const parts = [];
    for (const { start, stop, isCopy } of stretches) {
      const mark = create("mark", { className: isCopy ? "copy" : "" });
      mark.textContent = showLineEnds(all.slice(start, stop));
      parts.push(showLineEnds(all.slice(end, start)), mark);
      end = stop;
    }
    passage.replaceChildren(...parts, showLineEnds(all.slice(end)));
    const mark = passage.querySelector("mark"); // scroll to it within the passage
    if (mark) passage.scrollTop = mark.offsetTop - passage.offsetTop - passage.clientHeight / 2;
    const copies = stretches.filter(({ isCopy }) => isCopy);
    const longest = copies.reduce((most, { start, stop }) => Math.max(most, stop - start), 0);
    facts.textContent = text.found(copies.length, stretches.length - copies.length, longest);
  }

  const content = () => [
    create("p", text.lead(data)),
    create("div.buttons", button),
    facts,
    passage,
    create("p.quiet", text.how(data)),
  ];
  const element = create(
    "section",
    create("h2", text.title),
    data ? content() : create("p.note", text.none(reason)),
  );
  return { element, update, usesText: true, usesSampling: true, depends: ["text", "count"] };
}
