// View 7: a diagram of the network, with its shapes, its parameters and its code.

import { STRINGS } from "../strings.js";
import { create, createSection } from "../dom.js";
import { countElements, listTensors } from "../model.js";

export function createMachineView(app) {
  const text = STRINGS.machine;
  const { model } = app;
  const { config, num_tokens: V } = model;
  const { block_size: T, n_embd: C, n_head: H, n_layer: L, hidden: F } = config;
  const isModern = config.architecture === "modern";
  const shapes = listTensors(config, V);
  const count = (pattern) => {
    const names = [...shapes.keys()].filter((name) => pattern.test(name));
    return names.reduce((sum, name) => sum + countElements(shapes.get(name)), 0);
  };

  /**
   * Create a box. shape: that of its output. pattern: matches the names of its tensors, in a block
   * those of the first block. parts: names of classes and functions in model.py.
   */
  function box(kind, shape, pattern, parts) {
    const [name, what] = text.parts[kind];
    const parameters = pattern ? count(pattern) : 0;
    const share = parameters / model.parameters;
    const size = pattern?.source.startsWith("^blocks")
      ? text.inBlocks(parameters, L, share)
      : text.parameters(parameters, share);
    const sources = parts.map((part) => [part, app.source[part]]).filter(([, source]) => source);
    return create(
      "div.box",
      create("h3", name),
      create("p", what),
      create("p.quiet", shape, " · ", size),
      sources.map(([part, { start, end, text: code }]) =>
        create(
          "details",
          create("summary", create("code", part), " ", text.lines(start, end)),
          create("pre.code", { tabIndex: 0, ariaLabel: part }, code),
        ),
      ),
    );
  }

  const norm = isModern ? ["RMSNorm"] : ["create_norm"];
  const block = (name) => new RegExp(`^blocks\\.0\\.${name}`);
  const residual = () => create("p.residual", text.add);
  const D = C / H;
  const element = createSection(
    text.title,
    text.lead,
    create("p", text.legend(T, C, H, D, V)),
    create("p", text.total(model.parameters, model.checkpoints[model.shown].bytes / 1e6)),
    create(
      "div.machine",
      box("tokens", `(T) = (${T})`, null, []),
      box("embedding", `(T, C) = (${T}, ${C}), from (V, C) = (${V}, ${C})`, /^token_embedding/, [
        "LanguageModel.forward",
      ]),
      isModern
        ? null
        : box("positions", `(T, C) = (${T}, ${C})`, /^position_embedding/, ["LearnedPositions"]),
      create(
        "div.block",
        create("h3", text.layer, " ", create("span.quiet", text.times(L))),
        box("norm", `(T, C) = (${T}, ${C})`, block("attention_norm"), norm),
        isModern
          ? box("rotary", `(H, T, D) = (${H}, ${T}, ${D})`, block("attention.queries_and_keys"), [
              "NormedRotary",
            ])
          : null,
        box(
          "attention",
          `(H, T, D) = (${H}, ${T}, ${D}), then (T, C)`,
          block("attention\\.(qkv|projection)"),
          ["CausalSelfAttention"],
        ),
        residual(),
        box("norm", `(T, C) = (${T}, ${C})`, block("mlp_norm"), norm),
        box(isModern ? "gated" : "mlp", `(T, C) → (T, F) → (T, C), F = ${F}`, block("mlp\\."), [
          isModern ? "GatedMLP" : "MLP",
          "create_activation",
        ]),
        residual(),
      ),
      box("finalNorm", `(T, C) = (${T}, ${C})`, /^final_norm/, norm),
      box(config.tie_weights ? "tied" : "head", `(T, V) = (${T}, ${V})`, /^head/, [
        "LanguageModel._compute_logits",
      ]),
      box("softmax", `(T, V) = (${T}, ${V})`, null, []),
    ),
  );
  return { element, update: async () => {}, depends: [] };
}
