// View 6: two models side by side.

import { STRINGS } from "../strings.js";
import { create, showLineEnds } from "../dom.js";
import { readPage } from "../data.js";

export function createCompareView(app) {
  const text = STRINGS.compare;
  const message = create("p", { role: "status" });
  const columns = create("div", { className: "columns" });
  const input = create("input", {
    type: "file",
    accept: ".html,text/html",
    onchange: () => open(input.files[0]),
  });
  const drop = create(
    "div",
    { className: "drop" },
    create("p", {}, text.drop),
    create("label", {}, text.file, " ", input),
    create("p", { className: "quiet" }, text.pack),
    create("pre", { className: "command" }, text.command),
  );
  for (const type of ["dragover", "drop"]) {
    drop.addEventListener(type, (event) => {
      event.preventDefault();
      if (type === "drop") open(event.dataTransfer.files[0]);
    });
  }

  /** Take the first model of another page. Its scripts never run: DOMParser only parses. */
  async function open(file) {
    if (!file) return;
    try {
      const root = new DOMParser().parseFromString(await file.text(), "text/html");
      const { models } = readPage(root, `dropped-${Date.now()}`);
      models[0].getWeights(models[0].shown); // throws if the file is cut off
      app.addModel(models[0]);
      message.textContent = "";
    } catch {
      message.textContent = text.notAPage;
    }
  }

  async function update(signal) {
    if (app.models.length === 1) message.textContent = text.itself;
    const shown = app.models.map((model) => {
      const sample = create("pre", { className: "sample", tabIndex: 0, ariaLabel: model.name });
      const facts = create("p", { className: "quiet" });
      const element = create(
        "div",
        {},
        create("h3", {}, model.name),
        create(
          "p",
          { className: "quiet" },
          STRINGS.page.shape(model.parameters, model.config, model.tokenizer.unit),
        ),
        facts,
        sample,
      );
      return { model, sample, facts, element, generated: [] };
    });
    columns.replaceChildren(...shown.map(({ element }) => element));
    const { seed, count } = app.state.values;
    for (const each of shown) {
      const { model } = each;
      const { tokenizer } = model;
      const ids = tokenizer.encode(app.getText());
      const parts = [];
      if (ids.length > 1) {
        const { bits } = await app.call("score", { model, ids, top: 0 }, { signal });
        const bytes = ids.slice(1).reduce((sum, id) => sum + tokenizer.countBytes(id), 0);
        parts.push(text.text(bits.reduce((a, b) => a + b, 0) / bytes));
      }
      const unknown = tokenizer.findUnknown(app.getText());
      if (unknown.length) parts.push(text.unknown(unknown.slice(0, 20).join(" ")));
      each.facts.textContent = parts.join("; ");
      const prompt = ids.length ? ids : tokenizer.encode(model.default_prompt);
      const args = { model, prompt, count, seed, sampling: app.state.getSampling() };
      await app.call("generate", args, {
        signal,
        onPart: ({ ids }) => {
          each.generated.push(...ids);
          each.sample.replaceChildren(
            create("span", { className: "prompt" }, showLineEnds(tokenizer.decode(prompt))),
            showLineEnds(tokenizer.decode(each.generated)),
          );
        },
      });
      if (signal.aborted) return;
    }
    if (shown.length === 2) {
      const [a, b] = shown.map(({ model, generated }) => model.tokenizer.decode(generated));
      let same = 0;
      while (same < Math.min(a.length, b.length) && a[same] === b[same]) same++;
      message.textContent = text.same(same, "character");
    }
  }

  const element = create(
    "section",
    {},
    create("h2", {}, text.title),
    create("p", {}, text.lead),
    message,
    columns,
    drop,
  );
  return {
    element,
    update,
    depends: [
      "text",
      "from",
      "seed",
      "temperature",
      "top_k",
      "top_p",
      "min_p",
      "count",
      "models",
      "checkpoint",
    ],
  };
}
