// View 1: type, and see what comes next.

import { STRINGS } from "../strings.js";
import { addArrowKeys, create, createSection, keepFocus, showContinuation } from "../dom.js";
import { computeSoftmax, filterLogits, sortTokens } from "../sampling.js";
import { SAMPLING_SETTINGS } from "../state.js";

const MAX_BARS = 150;
const SMALLEST_SCALE = 0.4; // probability of a bar of the whole width, so that even ones look small
const SLOW_INTERVAL = 150; // milliseconds between two tokens

export function createNextView(app) {
  const text = STRINGS.next;
  const { unit } = app.model.tokenizer;
  const button = (label, onclick) => create("button", { onclick }, label);
  const step = button(text.step, () => generate(1));
  const run = button(text.run, () => generate(app.state.get("count")));
  const stop = button(text.stop, () => {
    isRunning = false;
    app.generation.abort();
  });
  const slowly = create("input", { type: "checkbox" });
  const status = create("p.quiet", { role: "status" });
  const facts = create("p.quiet");
  const bars = create("ol.bars");
  const command = create("code.command");
  const hint = create("p.quiet", { hidden: true }, text.command, command);
  const sample = create("pre.sample.short", {
    tabIndex: 0,
    ariaLabel: text.generated,
  });
  const generated = create("div", { hidden: true }, create("h3", text.generated), sample);
  let isRunning = false;
  addArrowKeys(bars);

  function showButtons() {
    stop.disabled = !isRunning;
    step.disabled = run.disabled = isRunning;
  }

  /** Append generated tokens to the text, with the settings of the state. */
  async function generate(count) {
    const pressed = document.activeElement;
    isRunning = true;
    showButtons();
    if (count > 1) stop.focus();
    let result;
    if (count > 1 && slowly.checked) {
      for (let i = 0; i < count && isRunning; i++) {
        result = await app.generate(1, { isUndoable: i === 0 });
        if (!result) break;
        await showBars(new AbortController().signal);
        status.textContent = text.drawn(app.nameToken(result.ids[0]));
        const shown = app.getText();
        await new Promise((resolve) => setTimeout(resolve, SLOW_INTERVAL));
        if (app.getText() !== shown || !element.isConnected) break; // it was changed, or left
      }
    } else {
      result = await app.generate(count);
      if (result?.ids.length) {
        const { ids, seconds } = result;
        const name = app.nameToken(ids[0]);
        status.textContent = count > 1 ? text.rate(ids.length, unit, seconds) : text.drawn(name);
      }
    }
    isRunning = false;
    showButtons();
    await app.run(() => showBars(new AbortController().signal));
    if ([document.body, stop].includes(document.activeElement)) pressed.focus();
  }

  async function update(signal) {
    showGenerated();
    if (isRunning) return; // until it ends
    if (app.state.get("from") < 0) status.textContent = "";
    await showBars(signal);
  }

  /** Show the text with its generated part, and the command that generates it. */
  function showGenerated() {
    const from = app.state.get("from");
    generated.hidden = from < 0;
    if (from >= 0)
      showContinuation(sample, app.getText().slice(0, from), app.getText().slice(from));
    sample.scrollTop = sample.scrollHeight;
    showCommand();
  }

  async function showBars(signal) {
    const logits = await app.call("predict", app.getContext(), { signal });
    if (signal.aborted) return;
    const before = computeSoftmax(logits);
    const kept = filterLogits(logits, app.state.getSampling());
    const after = computeSoftmax(kept);
    const order = sortTokens(logits);
    const scale = Math.max(before[order[0]], after[order[0]], SMALLEST_SCALE);
    keepFocus(bars, () => {
      const items = Array.from(order.slice(0, MAX_BARS), (id) =>
        create("li", createBar(id, before[id], kept[id] === -Infinity ? null : after[id], scale)),
      );
      bars.replaceChildren(...items);
      bars.querySelector("button").tabIndex = 0;
    });
    const number = kept.reduce((sum, logit) => (logit === -Infinity ? sum : sum + 1), 0);
    const parts = [
      text.entropy(computeEntropy(before), computeEntropy(after)),
      text.left(number, before.length),
    ];
    if (order.length > MAX_BARS) parts.push(text.more(order.length - MAX_BARS));
    facts.textContent = parts.join(" ");
  }

  /** Create the bar of a token: its probability before and after the filters, null if it is cut. */
  function createBar(id, before, after, scale) {
    const name = app.nameToken(id);
    const shares = [STRINGS.percent(before), after === null ? null : STRINGS.percent(after)];
    const draw = (className, share) =>
      create("span", { className, style: { width: `${Math.max(0.4, (100 * share) / scale)}%` } });
    const bar = create(
      "button",
      {
        className: after === null ? "bar cut" : "bar",
        tabIndex: -1,
        title: text.append(name),
        ariaLabel: text.bar(name, ...shares),
        onclick: () => app.append(id),
      },
      create("span.token", app.model.tokenizer.label(id)),
      create("span.track", draw("before", before), after === null ? null : draw("after", after)),
      create("span.share", shares[1] ?? text.cut),
    );
    bar.dataset.stop = "";
    return bar;
  }

  /** Show the command that generates this text, if there is one: it needs the exported model. */
  function showCommand() {
    const { model, state } = app;
    const { prompt, generated } = app.getContext();
    const given = model.tokenizer.decode(prompt);
    const isExported = model.getCheckpoint(state.get("checkpoint")) === model.shown;
    const isSafe = !/[\\'\p{Cc}]/u.test(given.replaceAll("\n", "")) && given !== "-";
    hint.hidden = !generated.length || !model.run_id || !isExported || !isSafe;
    if (hint.hidden) return;
    const { step, kind } = model.checkpoints[model.shown];
    const bundle = kind === "best" ? model.run_id : text.bundle(model.run_id, step);
    const flags = SAMPLING_SETTINGS.filter((name) => !state.isDefault(name)).map(
      (name) => ` --${name.replace("_", "-")} ${state.get(name)}`,
    );
    command.textContent =
      `python inference.py ${bundle} --prompt '${given.replaceAll("\n", "\\n")}' ` +
      `--max-new-tokens ${generated.length}${flags.join("")}`;
  }

  showButtons();
  const element = createSection(
    text.title(unit),
    text.lead(unit),
    create("div.buttons", step, run, stop, create("label", slowly, text.slowly)),
    status,
    generated,
    facts,
    create(
      "p.legend",
      create("span.swatch.before"),
      text.before,
      create("span.swatch.after"),
      text.after,
    ),
    bars,
    hint,
  );
  const depends = ["text", "from", "checkpoint", ...SAMPLING_SETTINGS];
  return { element, update, usesText: true, usesSampling: true, depends };
}

/** Return the entropy of probabilities, in bits. */
function computeEntropy(probabilities) {
  return probabilities.reduce((sum, p) => (p > 0 ? sum - p * Math.log2(p) : sum), 0);
}
