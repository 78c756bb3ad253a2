// View 7: a diagram of the network, with its shapes, its parameters and its code.

import { STRINGS } from "../strings.js";
import { create, createSection } from "../dom.js";
import { countElements, listTensors } from "../model.js";

export function createMachineView(app) {
  const text = STRINGS.machine;
  const { model } = app;
  const { config, num_tokens: V } = model;
  const { block_size: T, n_embd: C, n_head: H, n_layer: L, hidden: F, ngram_rows: R } = config;
  const isModern = config.architecture !== "gpt2";
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
  const stream = `(T, C) = (${T}, ${C})`;
  const heads = `(H, T, D) = (${H}, ${T}, ${D})`;
  const logits = `(T, V) = (${T}, ${V})`;
  const element = createSection(
    text.title,
    text.lead,
    create("p", text.legend(T, C, H, D, V)),
    create("p", text.total(model.parameters, model.checkpoints[model.shown].bytes / 1e6)),
    create(
      "div.machine",
      box("tokens", `(T) = (${T})`, null, []),
      box("embedding", `${stream}, from (V, C) = (${V}, ${C})`, /^token_embedding/, [
        "LanguageModel.forward",
      ]),
      R
        ? box("ngrams", `${stream}, from (R, C) = (${R}, ${C})`, /^ngram_embedding/, [
            "NgramEmbedding",
          ])
        : null,
      isModern ? null : box("positions", stream, /^position_embedding/, ["LearnedPositions"]),
      create(
        "div.block",
        create("h3", text.layer, " ", create("span.quiet", text.times(L))),
        box("norm", stream, block("attention_norm"), norm),
        isModern
          ? box("rotary", heads, block("attention.queries_and_keys"), ["NormedRotary"])
          : null,
        box("attention", `${heads}, then (T, C)`, block("attention\\.(qkv|projection)"), [
          "CausalSelfAttention",
        ]),
        residual(),
        box("norm", stream, block("mlp_norm"), norm),
        box(isModern ? "gated" : "mlp", `(T, C) → (T, F) → (T, C), F = ${F}`, block("mlp\\."), [
          isModern ? "GatedMLP" : "MLP",
          "create_activation",
        ]),
        residual(),
      ),
      box("finalNorm", stream, /^final_norm/, norm),
      box(config.tie_weights ? "tied" : "head", logits, /^head/, ["LanguageModel._compute_logits"]),
      box("softmax", logits, null, []),
    ),
  );
  return { element, update: async () => {}, depends: [] };
}
