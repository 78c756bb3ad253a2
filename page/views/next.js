// View 1: type, and see what comes next.

import { STRINGS } from "../strings.js";
import { create } from "../dom.js";
import { computeSoftmax, filterLogits, sortTokens } from "../sampling.js";

const MAX_BARS = 150;

export function createNextView(app) {
  const text = STRINGS.next;
  const button = (label, onclick) => create("button", { type: "button", onclick }, label);
  const step = button(text.step, () => generate(1));
  const run = button(text.run, () => generate(app.state.get("count")));
  const stop = button(text.stop, () => running?.abort());
  const undo = button(text.undo, () => {
    const ids = app.encode().slice(0, -1);
    app.setText(app.model.tokenizer.decode(ids));
  });
  const status = create("p", { className: "quiet", role: "status" });
  const facts = create("p", { className: "quiet" });
  const bars = create("ol", { className: "bars" });
  const command = create("code", { className: "command" });
  const hint = create(
    "p",
    { className: "quiet", hidden: true },
    text.command(app.model.dtype),
    " ",
    command,
  );
  let running = null;

  const showButtons = () => {
    stop.disabled = running === null;
    step.disabled = run.disabled = undo.disabled = running !== null;
  };
  showButtons();

  /** Append generated tokens to the text, with the settings of the state. */
  async function generate(count) {
    if (running) return;
    running = new AbortController();
    showButtons();
    if (count > 1) stop.focus();
    const result = await app.attempt(() => app.generate(count, running.signal));
    running = null;
    showButtons();
    app.state.touch("text");
    if (result && count > 1) {
      status.textContent = text.rate(result.ids.length, app.model.tokenizer.unit, result.seconds);
      if (document.activeElement === document.body || document.activeElement === stop) run.focus();
    }
  }

  async function update(signal) {
    if (running) return; // until it ends
    const { state, model } = app;
    const logits = await app.call("predict", app.getContext(), { signal });
    if (signal.aborted) return;
    const before = computeSoftmax(logits);
    const kept = filterLogits(logits, state.getSampling());
    const after = computeSoftmax(kept);
    const order = sortTokens(logits);
    const scale = Math.max(before[order[0]], after[order[0]]);
    bars.replaceChildren(
      ...Array.from(order.slice(0, MAX_BARS), (id) => {
        const isCut = kept[id] === -Infinity;
        const name = app.nameToken(id);
        const shares = [STRINGS.percent(before[id]), isCut ? null : STRINGS.percent(after[id])];
        const bar = (className, share) =>
          create("span", {
            className,
            style: { width: `${Math.max(0.4, (100 * share) / scale)}%` },
          });
        return create(
          "li",
          {},
          create(
            "button",
            {
              type: "button",
              className: isCut ? "bar cut" : "bar",
              title: text.append(name),
              ariaLabel: text.bar(name, ...shares),
              onclick: () => append(id),
            },
            create("span", { className: "token" }, model.tokenizer.label(id)),
            create(
              "span",
              { className: "track" },
              bar("before", before[id]),
              isCut ? null : bar("after", after[id]),
            ),
            create("span", { className: "share" }, shares[1] ?? shares[0]),
          ),
        );
      }),
    );
    let entropy = 0;
    let number = 0;
    for (const p of before) if (p > 0) entropy -= p * Math.log2(p);
    for (const logit of kept) if (logit !== -Infinity) number++;
    const parts = [text.entropy(entropy, 2 ** entropy), text.left(number, before.length)];
    if (order.length > MAX_BARS) parts.push(text.more(order.length - MAX_BARS));
    facts.textContent = parts.join(" ");
    showCommand();
  }

  function append(id) {
    app.setText(app.getText() + app.model.tokenizer.decode([id]));
    bars.querySelector("button")?.focus();
  }

  /** Show the command that generates the same text; it is known while the text was only generated. */
  function showCommand() {
    const { state } = app;
    const prompt = app.getText().slice(0, state.get("from"));
    const count = app.getContext().generated.length;
    hint.hidden =
      count === 0 || !app.isGeneratedAsSet() || /[\\'\p{Cc}]/u.test(prompt.replaceAll("\n", ""));
    if (hint.hidden) return;
    const flags = [
      ["seed", 1337],
      ["temperature", 0.8],
      ["top_k", 0],
      ["top_p", 1],
      ["min_p", 0],
    ]
      .filter(([name, usual]) => state.get(name) !== usual)
      .map(([name]) => ` --${name.replace("_", "-")} ${state.get(name)}`);
    const run = app.model.run_id ? ` ${app.model.run_id}` : "";
    const quoted = prompt.replaceAll("\n", "\\n");
    command.textContent = `python inference.py${run} --prompt '${quoted}' --max-new-tokens ${count}${flags.join("")}`;
  }

  const unit = app.model.tokenizer.unit;
  const element = create(
    "section",
    {},
    create("h2", {}, text.title(unit)),
    create("p", {}, text.lead(unit)),
    create("div", { className: "buttons" }, step, run, stop, undo),
    status,
    facts,
    create(
      "p",
      { className: "legend" },
      create("span", { className: "swatch before" }),
      text.before,
      create("span", { className: "swatch after" }),
      text.after,
    ),
    bars,
    hint,
  );
  const leave = () => running?.abort();
  return {
    element,
    update,
    leave,
    depends: ["text", "from", "temperature", "top_k", "top_p", "min_p", "checkpoint"],
  };
}
