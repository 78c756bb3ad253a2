// View 3: the same prompt at different times of training.

import { STRINGS } from "../strings.js";
import { drawChart } from "../chart.js";
import { create, createSection, showContinuation } from "../dom.js";
import { SAMPLING_SETTINGS } from "../state.js";

export function createTrainingView(app) {
  const text = STRINGS.training;
  const { model } = app;
  const { tokenizer } = model;
  const { unit } = tokenizer;
  const isSingle = model.checkpoints.length === 1;
  const name = (index) => {
    const { step, kind } = model.checkpoints[index];
    return text.step(step, text.kinds[kind]);
  };
  const choose = (index) => app.setSampling({ checkpoint: index === model.shown ? -1 : index });
  const slider = create("input", {
    type: "range",
    min: 0,
    max: model.checkpoints.length - 1,
    step: 1,
    ariaLabel: text.slider,
    oninput: () => choose(Number(slider.value)),
  });
  const label = create("p.big");
  const losses = create("p.losses");
  const bits = create("p", { role: "status" });
  const sample = create("pre.sample", { tabIndex: 0, ariaLabel: text.sample });
  const chart = create("figure");

  async function update(signal) {
    const index = model.getCheckpoint(app.state.get("checkpoint"));
    const { train_loss, val_loss } = model.checkpoints[index];
    slider.value = index;
    slider.setAttribute("aria-valuetext", name(index));
    label.textContent = name(index);
    losses.textContent = text.losses(train_loss, val_loss, unit);
    showCurve(index);
    const ids = app.getIds();
    const mean = await app.measure({ ids }, { signal });
    if (signal.aborted) return;
    bits.textContent = mean ? text.text(mean.perToken, unit) : "";
    const prompt = app.getPrompt();
    const { seed, count } = app.state.values;
    const args = { prompt, count, seed, sampling: app.state.getSampling() };
    const generated = [];
    showContinuation(sample, app.getText(), "");
    const onPart = ({ ids }) => {
      generated.push(...ids);
      showContinuation(sample, app.getText(), tokenizer.decode(generated));
    };
    await app.call("generate", args, { signal, onPart });
  }

  /** Draw the losses of the run, with the chosen checkpoint. */
  function showCurve(index) {
    const series = ["train", "val"].flatMap((split, i) => {
      const points = model.curve?.[split] ?? [];
      return points.length ? [{ points, name: text[split], color: `line-${2 - i}` }] : [];
    });
    if (series.length === 0) {
      chart.replaceChildren(create("p.quiet", text.noCurve));
      return;
    }
    const drawing = drawChart({
      width: chart.clientWidth || 640,
      series,
      marks: model.checkpoints.map(({ step }, i) => {
        return { at: step, label: i === index ? name(i) : "" };
      }),
      xLabel: text.xLabel,
      yLabel: text.yLabel,
      title: text.chart,
    });
    chart.replaceChildren(create("figcaption", text.chart), drawing);
  }

  const single = () => [create("p", text.one), create("pre.command", text.commands)];
  const { overfitting } = model;
  const element = createSection(
    text.title,
    text.lead,
    isSingle ? create("div.note", single()) : null,
    label,
    isSingle ? null : create("p.times", slider),
    losses,
    bits,
    overfitting ? create("p.note", text.overfitting(overfitting.since, overfitting.rise)) : null,
    chart,
    create("h3", text.sample),
    sample,
  );
  const depends = ["text", "count", "checkpoint", ...SAMPLING_SETTINGS];
  return { element, update, usesText: true, usesSampling: true, depends };
}
