// View 6: two models side by side.

import { STRINGS } from "../strings.js";
import { create, createSection, showContinuation } from "../dom.js";
import { readPage } from "../data.js";
import { SAMPLING_SETTINGS } from "../state.js";

export function createCompareView(app) {
  const text = STRINGS.compare;
  const message = create("p", { role: "status" });
  const columns = create("div.columns");
  const select = create("select", {
    onchange: () => app.state.set({ other: Number(select.value) }),
  });
  const second = create("label.field", text.second, select);
  const input = create("input", {
    type: "file",
    accept: ".html,text/html",
    onchange: () => open(input.files[0]),
  });
  const drop = create(
    "div.drop",
    create("label", text.file, " ", input),
    create("p.quiet", text.pack),
    create("pre.command", text.command),
  );
  for (const type of ["dragover", "drop"]) {
    drop.addEventListener(type, (event) => {
      event.preventDefault();
      if (type === "drop") open(event.dataTransfer.files[0]);
    });
  }

  /** Compare with the first model of another page. Its scripts do not run: it is only parsed. */
  async function open(file) {
    if (!file) return;
    try {
      const root = new DOMParser().parseFromString(await file.text(), "text/html");
      const [model] = readPage(root, `dropped-${Date.now()}`).models;
      const weights = model.getWeights(model.shown);
      model.getText = () => weights; // the document is not needed any more
      await app.call("predict", { model, prompt: [0], generated: [] }); // loads it
      app.models.push(model);
      app.state.set({ other: listOthers().length - 1 });
      app.state.notify("models");
    } catch {
      message.textContent = text.notAPage;
    }
  }

  /** Return what can be compared with the exported model: { model, checkpoint, name }. */
  function listOthers() {
    const { model } = app;
    const nameStep = ({ step, kind }) => STRINGS.training.step(step, STRINGS.training.kinds[kind]);
    const ofRun = model.checkpoints.map((each, checkpoint) => {
      return { model, checkpoint, name: `${model.name}, ${nameStep(each)}` };
    });
    const others = app.models.slice(1).map((each) => {
      return { model: each, checkpoint: each.shown, name: each.name };
    });
    return [...ofRun.filter(({ checkpoint }) => checkpoint !== model.shown), ...others];
  }

  async function update(signal) {
    const { model, state } = app;
    const others = listOthers();
    const packed = app.models.length > 1 ? others.length - 1 : 0;
    const chosen = others[state.get("other")] ?? others[packed];
    const options = others.map(({ name }, value) => create("option", { value }, name));
    select.replaceChildren(...options);
    select.value = others.indexOf(chosen);
    second.hidden = others.length < 2;
    message.textContent = chosen ? "" : text.single;
    const left = { model, checkpoint: model.shown, name: model.name };
    const shown = [left, chosen].filter(Boolean).map(createColumn);
    columns.replaceChildren(...shown.map(({ element }) => element));
    for (const each of shown) {
      await fill(each, signal);
      if (signal.aborted) return;
    }
    if (shown.length === 2) {
      const [a, b] = shown.map(({ continuation }) => continuation);
      let same = 0;
      while (same < Math.min(a.length, b.length) && a[same] === b[same]) same++;
      message.textContent = text.same(same);
    }
  }

  function createColumn({ model, checkpoint, name }) {
    const { unit } = model.tokenizer;
    const sample = create("pre.sample", { tabIndex: 0, ariaLabel: name });
    const facts = create("p.quiet");
    const shape = STRINGS.page.shape(model.parameters, model.config, unit);
    const element = create("div", create("h3", name), create("p.quiet", shape), facts, sample);
    return { model, checkpoint, sample, facts, element, continuation: "" };
  }

  /** Compute a model's surprise at the text, and its continuation. */
  async function fill(column, signal) {
    const { model, checkpoint, facts, sample } = column;
    const { tokenizer } = model;
    const ids = tokenizer.encode(app.getText());
    const unknown = tokenizer.findUnknown(app.getText());
    if (unknown.length) facts.textContent = STRINGS.page.unknown(unknown.slice(0, 20).join(" "));
    else {
      const mean = await app.measure({ model, checkpoint, ids }, { signal });
      if (mean) facts.textContent = text.text(mean.perByte);
    }
    const { seed, count } = app.state.values;
    const prompt = ids.length ? ids : tokenizer.encode(model.default_prompt);
    const args = { model, checkpoint, prompt, count, seed, sampling: app.state.getSampling() };
    const generated = [];
    const onPart = ({ ids }) => {
      generated.push(...ids);
      column.continuation = tokenizer.decode(generated);
      showContinuation(sample, tokenizer.decode(prompt), column.continuation);
    };
    await app.call("generate", args, { signal, onPart });
  }

  const element = createSection(text.title, text.lead, second, message, columns, drop);
  const depends = ["text", "count", "models", "other", ...SAMPLING_SETTINGS];
  return { element, update, usesText: true, usesSampling: true, depends };
}
