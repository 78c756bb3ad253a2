// The network of model.py, class by class, with a KV cache. All tensors are float32.
//
//     T  context: tokens that the model sees       H  attention heads
//     M  rows: tokens that are computed at once    D  head size, C / H
//     C  channels: the width                       L  layers
//     F  width of the MLP                          V  vocabulary size
//
// An array of shape (M, C) is a Float32Array with M rows of C numbers, one after another.

import { decodeHalves } from "./weights.js";

/** Return the shape of each tensor of a model, by name, in the order of model.py. */
export function listTensors(config, V) {
  const { block_size: T, n_embd: C, n_head: H, n_layer: L, hidden: F, ngram_rows: R } = config;
  const isModern = config.architecture !== "gpt2";
  const shapes = new Map([["token_embedding.weight", [V, C]]]);
  if (R) shapes.set("ngram_embedding.weight", [R, C]);
  if (!isModern) shapes.set("position_embedding.weight", [T, C]);
  // Add the weight of a norm or of a linear layer, and its bias.
  const add = (name, ...shape) => {
    shapes.set(`${name}.weight`, shape);
    if (config.bias) shapes.set(`${name}.bias`, [shape[0]]);
  };
  for (let layer = 0; layer < L; layer++) {
    const block = `blocks.${layer}`;
    add(`${block}.attention_norm`, C);
    add(`${block}.attention.qkv`, 3 * C, C);
    if (isModern) {
      add(`${block}.attention.queries_and_keys.query_norm`, C / H);
      add(`${block}.attention.queries_and_keys.key_norm`, C / H);
    }
    add(`${block}.attention.projection`, C, C);
    add(`${block}.mlp_norm`, C);
    if (isModern) add(`${block}.mlp.gate`, F, C);
    add(`${block}.mlp.expand`, F, C);
    add(`${block}.mlp.projection`, C, F);
  }
  add("final_norm", C);
  if (!config.tie_weights) shapes.set("head.weight", [V, C]);
  return shapes;
}

/** Return the number of elements of a shape. */
export function countElements(shape) {
  return shape.reduce((product, length) => product * length, 1);
}

/** Return the number of parameters, a tied head counted once. */
export function countParameters(config, V) {
  return [...listTensors(config, V).values()].reduce((sum, shape) => sum + countElements(shape), 0);
}

/** Return how many numbers a model needs in memory: weights, KV cache and intermediate results. */
export function countNumbers(config, V) {
  const { block_size: T, n_embd: C, n_layer: L, hidden: F } = config;
  const rows = L * (4 * C + F); // one row of each matrix, if these are float16
  return countParameters(config, V) + rows + 2 * L * T * C + T * (7 * C + 2 * F) + T + V;
}

/**
 * y = x Wᵀ + b: the weight W is (outputs, inputs), float32 or float16 (a Uint16Array), the bias b
 * (outputs,) or undefined.
 */
class Linear {
  constructor(kernels, weight, bias, inputs) {
    Object.assign(this, { kernels, weight, bias, inputs, outputs: weight.length / inputs });
    this.isHalf = weight instanceof Uint16Array;
    this.row = this.isHalf ? kernels.allocate(inputs) : null;
  }

  /** Compute y, (M, outputs), from x, (M, inputs). */
  forward(x, M, y) {
    const { kernels, weight, bias, inputs, outputs } = this;
    if (M === 1 && this.isHalf) {
      kernels.multiplyHalves(x.subarray(0, inputs), weight, y, outputs);
    } else if (M === 1) {
      kernels.multiply(x.subarray(0, inputs), weight, y, outputs, inputs, 1);
    } else {
      for (let n = 0; n < outputs; n++) {
        // One row of the weights times all rows of x: a column of y.
        let row = weight.subarray(n * inputs, (n + 1) * inputs);
        if (this.isHalf) row = decodeHalves(row, this.row);
        kernels.multiply(row, x, y.subarray(n), M, inputs, outputs);
      }
    }
    if (bias) for (let i = 0; i < M * outputs; i++) y[i] += bias[i % outputs];
    return y;
  }
}

/** Scale vectors to a root mean square of 1, times a weight. */
class RMSNorm {
  constructor(weight) {
    this.weight = weight;
  }

  /** Normalize each row of x, (M, C), into y. */
  forward(x, M, y) {
    const C = this.weight.length;
    for (let start = 0; start < M * C; start += C) {
      let square = 0;
      for (let c = 0; c < C; c++) square += x[start + c] ** 2;
      const scale = 1 / Math.sqrt(square / C + 1e-6);
      for (let c = 0; c < C; c++) y[start + c] = x[start + c] * scale * this.weight[c];
    }
    return y;
  }
}

/** Scale vectors to a mean of 0 and a variance of 1, times a weight, plus a bias. */
class LayerNorm {
  constructor(weight, bias) {
    Object.assign(this, { weight, bias });
  }

  forward(x, M, y) {
    const { weight, bias } = this;
    const C = weight.length;
    for (let start = 0; start < M * C; start += C) {
      let mean = 0;
      let square = 0;
      for (let c = 0; c < C; c++) mean += x[start + c] / C;
      for (let c = 0; c < C; c++) square += (x[start + c] - mean) ** 2;
      const scale = 1 / Math.sqrt(square / C + 1e-5);
      for (let c = 0; c < C; c++) {
        y[start + c] = (x[start + c] - mean) * scale * weight[c] + (bias ? bias[c] : 0);
      }
    }
    return y;
  }
}

const NGRAM_FACTORS = [
  [0, 0, 1273642419, 2038074743],
  [0, 1500450271, 715225739, 1299709],
  [472882027, 982451653, 334214459, 1076363779],
]; // as in parameters.py

/** A learned vector for the last two tokens at each position, for three and for four. */
class NgramEmbedding {
  constructor(weight, { block_size: T, n_embd: C, ngram_rows: R }) {
    Object.assign(this, { weight, C, R });
    this.ids = new Float64Array(3 + T); // plus 1, after zeros, which stand for no token
  }

  /** Append a token at a position, and add its vectors to x, (C,). */
  forward(id, position, x) {
    const { weight, C, R, ids } = this;
    ids[3 + position] = id + 1;
    for (const factors of NGRAM_FACTORS) {
      const sum = factors.reduce((total, factor, i) => total + factor * ids[position + i], 0);
      add(x, weight.subarray((sum % R) * C));
    }
  }
}

/** Query-key norm, then rotary position embedding. */
class NormedRotary {
  constructor(config, queryNorm, keyNorm) {
    const { block_size: T, rope_theta: theta } = config;
    const D = queryNorm.weight.length;
    Object.assign(this, { D, norms: [queryNorm, keyNorm] });
    this.cos = new Float32Array((T * D) / 2);
    this.sin = new Float32Array((T * D) / 2);
    for (let d = 0; d < D / 2; d++) {
      // Rounded as PyTorch does, since the error of a frequency grows with the position.
      const frequency = Math.fround(theta ** Math.fround((-2 * d) / D));
      for (let t = 0; t < T; t++) {
        const angle = Math.fround(t * frequency);
        this.cos[(t * D) / 2 + d] = Math.cos(angle);
        this.sin[(t * D) / 2 + d] = Math.sin(angle);
      }
    }
  }

  /** Normalize and rotate a query (kind 0) or key (kind 1), (D,), at a position, in place. */
  apply(x, kind, position) {
    const { D, cos, sin } = this;
    const half = D / 2;
    this.norms[kind].forward(x, 1, x);
    for (let d = 0; d < half; d++) {
      const first = x[d];
      const second = x[d + half];
      const c = cos[position * half + d];
      const s = sin[position * half + d];
      x[d] = first * c - second * s;
      x[d + half] = second * c + first * s;
    }
  }
}

/** Multi-head causal self-attention over the KV cache. */
class CausalSelfAttention {
  constructor(model, layer) {
    const { config, kernels } = model;
    const { n_head: H, n_embd: C, block_size: T } = config;
    const name = `blocks.${layer}.attention`;
    Object.assign(this, { model, layer, H, C, T, D: C / H });
    this.qkv = model.createLinear(`${name}.qkv`, C);
    this.projection = model.createLinear(`${name}.projection`, C);
    this.rotary = null; // gpt2 adds its positions to the embeddings
    if (config.architecture !== "gpt2") {
      const norms = ["query_norm", "key_norm"].map((each) =>
        model.createNorm(`${name}.queries_and_keys.${each}`),
      );
      this.rotary = new NormedRotary(config, ...norms);
    }
    this.keys = kernels.allocate(T * C); // (H, T, D)
    this.values = kernels.allocate(T * C); // (H, D, T): a mean of values is a product, too
  }

  /**
   * Append M tokens at `position`, (M, C), to the cache. Those from row `first` on attend to all of
   * it: y is (M - first, C).
   */
  forward(x, M, position, y, observer, first = 0) {
    const { model, layer, H, C, T, D, keys, values } = this;
    const { kernels } = model;
    const { qkv: allQkv, attended, scores } = model.buffers;
    const qkv = this.qkv.forward(x, M, allQkv); // (M, 3 C): queries, keys, values, each (H, D)
    for (let m = 0; m < M; m++) {
      const t = position + m;
      for (let h = 0; h < H; h++) {
        const start = m * 3 * C + h * D;
        const query = qkv.subarray(start, start + D);
        const key = qkv.subarray(start + C, start + C + D);
        if (this.rotary) {
          this.rotary.apply(query, 0, t);
          this.rotary.apply(key, 1, t);
        }
        keys.set(key, (h * T + t) * D);
        for (let d = 0; d < D; d++) values[(h * D + d) * T + t] = qkv[start + 2 * C + d];
      }
    }
    const factor = 1 / Math.sqrt(D);
    for (let m = first; m < M; m++) {
      const seen = position + m + 1; // a token attends to itself and those before it
      for (let h = 0; h < H; h++) {
        const output = attended.subarray(m * C + h * D, m * C + (h + 1) * D);
        if (observer?.isHeadOff?.(layer, h)) {
          output.fill(0);
          continue;
        }
        const query = qkv.subarray(m * 3 * C + h * D, m * 3 * C + (h + 1) * D);
        const weights = scores.subarray(0, seen);
        kernels.multiply(query, keys.subarray(h * T * D), weights, seen, D, 1);
        applySoftmax(weights, factor);
        kernels.multiply(weights, values.subarray(h * D * T), output, D, T, 1);
        observer?.onAttention?.(layer, h, position + m, weights);
      }
    }
    return this.projection.forward(attended.subarray(first * C), M - first, y);
  }
}

/** GPT-2's MLP: up projection to F channels, activation, down projection. */
class MLP {
  constructor(model, layer) {
    const { n_embd: C, hidden: F, activation } = model.config;
    const name = `blocks.${layer}.mlp`;
    Object.assign(this, { model, F, activate: ACTIVATIONS[activation] });
    this.expand = model.createLinear(`${name}.expand`, C);
    this.projection = model.createLinear(`${name}.projection`, F);
  }

  forward(x, M, y) {
    const hidden = this.expand.forward(x, M, this.model.buffers.hidden);
    for (let i = 0; i < M * this.F; i++) hidden[i] = this.activate(hidden[i]);
    return this.projection.forward(hidden, M, y);
  }
}

/** Gated MLP: the up projection times an activated gate. */
class GatedMLP extends MLP {
  constructor(model, layer) {
    super(model, layer);
    this.gate = model.createLinear(`blocks.${layer}.mlp.gate`, model.config.n_embd);
  }

  forward(x, M, y) {
    const hidden = this.expand.forward(x, M, this.model.buffers.hidden);
    const gate = this.gate.forward(x, M, this.model.buffers.gate);
    for (let i = 0; i < M * this.F; i++) hidden[i] *= this.activate(gate[i]);
    return this.projection.forward(hidden, M, y);
  }
}

/** A pre-norm transformer block. */
class Block {
  constructor(model, layer) {
    this.model = model;
    this.attentionNorm = model.createNorm(`blocks.${layer}.attention_norm`);
    this.attention = new CausalSelfAttention(model, layer);
    this.mlpNorm = model.createNorm(`blocks.${layer}.mlp_norm`);
    this.mlp = new (model.config.architecture === "gpt2" ? MLP : GatedMLP)(model, layer);
  }

  /** Add both residual branches to the rows of x, (M, C), from `first` on, in place. */
  forward(x, M, position, observer, first = 0) {
    const { normed, branch } = this.model.buffers;
    const { n_embd: C } = this.model.config;
    const rest = x.subarray(first * C, M * C);
    this.attentionNorm.forward(x, M, normed);
    add(rest, this.attention.forward(normed, M, position, branch, observer, first));
    this.mlpNorm.forward(rest, M - first, normed);
    add(rest, this.mlp.forward(normed, M - first, branch));
  }
}

/** Add y, or its beginning, to x, in place. */
function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** A transformer that predicts the next token at every position. */
export class LanguageModel {
  /**
   * config: the settings of the architecture, and `hidden`, F.
   * V: the number of tokens.
   * kernels: memory for at least `countNumbers(config, V)` numbers.
   * load(name, shape, target): writes a tensor into a Float32Array, or if it is float16 and
   *     `isHalf(name, shape)` into a Uint16Array.
   */
  constructor(config, V, kernels, load, isHalf = () => false) {
    const { block_size: T, n_embd: C, n_layer: L, hidden: F } = config;
    Object.assign(this, { config, V, kernels });
    this.tensors = new Map();
    for (const [name, shape] of listTensors(config, V)) {
      const tensor = kernels.allocate(countElements(shape), isHalf(name, shape));
      load(name, shape, tensor);
      this.tensors.set(name, tensor);
    }
    this.buffers = {
      x: kernels.allocate(T * C), // the residual stream
      normed: kernels.allocate(T * C),
      qkv: kernels.allocate(T * 3 * C),
      attended: kernels.allocate(T * C),
      branch: kernels.allocate(T * C), // what attention or MLP adds to the residual stream
      hidden: kernels.allocate(T * F),
      gate: kernels.allocate(T * F),
      scores: kernels.allocate(T),
      logits: kernels.allocate(V),
    };
    this.tokenEmbedding = this.tensors.get("token_embedding.weight");
    this.positionEmbedding = this.tensors.get("position_embedding.weight"); // gpt2
    const ngrams = this.tensors.get("ngram_embedding.weight"); // speedrun
    if (ngrams) this.ngramEmbedding = new NgramEmbedding(ngrams, config);
    this.blocks = Array.from({ length: L }, (_, layer) => new Block(this, layer));
    this.finalNorm = this.createNorm("final_norm");
    this.head = this.createLinear(config.tie_weights ? "token_embedding" : "head", C);
  }

  createLinear(name, inputs) {
    const bias = this.tensors.get(`${name}.bias`);
    return new Linear(this.kernels, this.tensors.get(`${name}.weight`), bias, inputs);
  }

  createNorm(name) {
    const weight = this.tensors.get(`${name}.weight`);
    if (this.config.architecture !== "gpt2") return new RMSNorm(weight);
    return new LayerNorm(weight, this.tensors.get(`${name}.bias`));
  }

  /**
   * Run tokens through all blocks, and append their keys and values to the cache.
   *
   * ids: M token ids, at `position` and after it; the cache holds the positions before.
   * observer: what to look at or change (all optional): `onAttention(layer, head, position,
   *     weights)`, `onResidual(layer, x)` before the first block and after each, and
   *     `isHeadOff(layer, head)`.
   * first: the first row whose result is needed. Of those before it, the last block computes only
   *     keys and values.
   *
   * Returns the residual stream, (M, C).
   */
  forward(ids, position, observer, first = 0) {
    const M = ids.length;
    const { n_embd: C } = this.config;
    const { x } = this.buffers;
    for (let m = 0; m < M; m++) {
      const row = x.subarray(m * C, (m + 1) * C);
      row.set(this.tokenEmbedding.subarray(ids[m] * C, (ids[m] + 1) * C));
      if (this.positionEmbedding) add(row, this.positionEmbedding.subarray((position + m) * C));
      this.ngramEmbedding?.forward(ids[m], position + m, row);
    }
    observer?.onResidual?.(0, x);
    this.blocks.forEach((block, layer) => {
      const isLast = layer === this.blocks.length - 1;
      block.forward(x, M, position, observer, isLast ? first : 0);
      observer?.onResidual?.(layer + 1, x);
    });
    return x;
  }

  /** Compute the logits, (V,), of the token after row m of a residual stream, (M, C). */
  computeLogits(x, m) {
    const { n_embd: C } = this.config;
    const { normed, logits } = this.buffers;
    this.finalNorm.forward(x.subarray(m * C, (m + 1) * C), 1, normed);
    return this.head.forward(normed, 1, logits);
  }
}

const LARGEST_EXPONENT = 127;
const POWERS_OF_TWO = Float64Array.from(
  { length: 2 * LARGEST_EXPONENT + 1 },
  (_, i) => 2 ** (i - LARGEST_EXPONENT),
);

/**
 * Compute e^x with a relative error below 2e-7, faster than Math.exp.
 *
 * e^x = 2^n e^r, n a whole number and r in ±ln(2) / 2, for which a few terms of the series suffice.
 */
export function computeExp(x) {
  x = Math.min(Math.max(x, -87), 87); // e^87 is nearly the largest float32
  const n = Math.round(x * Math.LOG2E);
  const r = x - n * Math.LN2;
  const series =
    1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720))))));
  return series * POWERS_OF_TWO[n + LARGEST_EXPONENT];
}

/** Replace scores by the softmax of factor * scores. */
export function applySoftmax(scores, factor) {
  let largest = -Infinity;
  let total = 0;
  for (let i = 0; i < scores.length; i++) largest = Math.max(largest, scores[i]);
  for (let i = 0; i < scores.length; i++) {
    total += scores[i] = computeExp((scores[i] - largest) * factor);
  }
  const scale = 1 / total;
  for (let i = 0; i < scores.length; i++) scores[i] *= scale;
}

/** 1 - erf(z) for z >= 0, within 2e-7: Abramowitz and Stegun, formula 7.1.26. */
function computeErfc(z) {
  const t = 1 / (1 + 0.3275911 * z);
  const polynomial =
    ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return polynomial * computeExp(-z * z);
}

export const ACTIVATIONS = {
  silu: (x) => x / (1 + computeExp(-x)),
  gelu_tanh: (x) => x / (1 + computeExp(-2 * Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  gelu: (x) => {
    const tail = 0.5 * computeErfc(Math.abs(x) * Math.SQRT1_2);
    return x * (x > 0 ? 1 - tail : tail);
  },
};
