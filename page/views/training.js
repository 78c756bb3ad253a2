// View 3: the same prompt at different times of training.

import { STRINGS } from "../strings.js";
import { drawChart } from "../chart.js";
import { create, showLineEnds } from "../dom.js";

export function createTrainingView(app) {
  const text = STRINGS.training;
  const { model } = app;
  const unit = model.tokenizer.unit;
  const number = model.checkpoints.length;
  const name = (index) => {
    const { step, kind } = model.checkpoints[index];
    return text.step(step, text.kinds[kind]);
  };
  const slider = create("input", {
    type: "range",
    min: 0,
    max: number - 1,
    step: 1,
    ariaLabel: text.slider,
  });
  slider.oninput = () => app.state.set({ checkpoint: Number(slider.value) });
  const label = create("output", { className: "big" });
  const losses = create("p", {});
  const bits = create("p", { role: "status" });
  const sample = create("pre", { className: "sample", tabIndex: 0, ariaLabel: text.sample });
  const chart = create("figure", {});
  const ticks = create(
    "ol",
    { className: "ticks" },
    model.checkpoints.map((_, index) =>
      create(
        "li",
        {},
        create(
          "button",
          { type: "button", onclick: () => app.state.set({ checkpoint: index }) },
          name(index),
        ),
      ),
    ),
  );

  async function update(signal) {
    const index = model.getCheckpoint(app.state.get("checkpoint"));
    const { step, train_loss: train, val_loss: val } = model.checkpoints[index];
    slider.value = index;
    slider.setAttribute("aria-valuetext", name(index));
    [...ticks.querySelectorAll("button")].forEach((each, i) =>
      each.setAttribute("aria-pressed", i === index),
    );
    label.textContent = name(index);
    losses.textContent = text.losses(train, val);
    if (model.curve) {
      const series = ["train", "val"]
        .filter((each) => model.curve[each].length)
        .map((each, i) => ({
          points: model.curve[each],
          name: text[each],
          color: `line-${2 - i}`,
        }));
      chart.replaceChildren(
        create("figcaption", {}, text.chart),
        drawChart({
          width: chart.clientWidth || 640,
          series,
          xLabel: text.xLabel,
          yLabel: text.yLabel,
          title: text.chart,
          marks: [{ at: step, label: name(index) }],
        }),
      );
    } else chart.replaceChildren(create("p", { className: "quiet" }, text.noCurve));

    const ids = app.encode();
    const scored = ids.length > 1 ? await app.call("score", { ids, top: 0 }, { signal }) : null;
    if (signal.aborted) return;
    bits.textContent = scored
      ? text.text(scored.bits.reduce((a, b) => a + b, 0) / scored.bits.length, unit)
      : "";
    const prompt = app.encodePrompt(app.getPrompt());
    const { seed, count } = app.state.values;
    const args = { prompt, count, seed, sampling: app.state.getSampling() };
    let generated = [];
    const show = () =>
      sample.replaceChildren(
        create("span", { className: "prompt" }, showLineEnds(model.tokenizer.decode(prompt))),
        showLineEnds(model.tokenizer.decode(generated)),
      );
    show();
    await app.call("generate", args, {
      signal,
      onPart: ({ ids }) => {
        generated = [...generated, ...ids];
        show();
      },
    });
  }

  const isSingle = number === 1;
  const element = create(
    "section",
    {},
    create("h2", {}, text.title),
    create("p", {}, text.lead),
    isSingle
      ? create(
          "div",
          { className: "note" },
          create("p", {}, text.one),
          create("pre", { className: "command" }, text.commands),
        )
      : null,
    create("p", {}, label),
    isSingle
      ? null
      : create(
          "div",
          { className: "times" },
          slider,
          ticks,
          create("p", { className: "quiet" }, text.used),
        ),
    losses,
    bits,
    model.overfitting
      ? create(
          "p",
          { className: "note" },
          text.overfitting(model.overfitting.since, model.overfitting.rise),
        )
      : null,
    chart,
    create("h3", {}, text.sample),
    sample,
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
      "checkpoint",
    ],
  };
}
