// The commands that a page's worker runs, off the main thread. Without workers, the page runs them
// itself (client.js).

import { Kernels } from "./kernels.js";
import { LanguageModel, countNumbers, countParameters } from "./model.js";
import { MersenneTwister, computeLogProbability, listLikeliest } from "./sampling.js";
import { Decoder, streamTokens } from "./generate.js";
import { decodeBase64 } from "./base64.js";
import { decodeTensor, readSafetensors } from "./weights.js";

const REPORT_INTERVAL = 40; // milliseconds between two parts of a generated text
const CHUNK = 256; // tokens that are scored between two looks at the messages
const MAX_NUMBERS = 2 ** 27; // of the models in memory, unless one alone has more: 512 MB
const HALVES_FROM = 2e6; // parameters: smaller models are faster in float32
const TOP = 5; // how many of the likeliest tokens to list

export const NOT_LOADED = "the model is not in memory";

/** Models in memory, and the commands, which run one after another: a model has one KV cache. */
export class Engine {
  /** wasm: kernels.wasm, a Uint8Array, or null. */
  constructor(wasm) {
    this.wasm = wasm;
    this.models = new Map(); // by key, the one used last at the end
    this.last = Promise.resolve(); // the command before
  }

  /**
   * Run a command when those before have ended. call: { report(part), isCancelled() }.
   *
   * Returns a promise of the result, which fails with an Error.
   */
  run(name, args, call) {
    const result = this.last.then(async () => {
      await yieldToMessages(); // one may cancel this command
      if (call.isCancelled()) throw new Error("cancelled");
      return COMMANDS[name](this, args, call);
    });
    this.last = result.catch(() => {});
    return result;
  }

  /** Return the model that `load` was given under a key. */
  get(key) {
    const model = this.models.get(key);
    if (!model) throw new Error(NOT_LOADED);
    this.models.delete(key);
    this.models.set(key, model);
    return model;
  }

  /** Evict the least recently used models until `size` more numbers fit. */
  evict(size) {
    let total = size;
    for (const model of this.models.values()) total += model.size;
    for (const [key, model] of this.models) {
      if (total <= MAX_NUMBERS) return;
      this.models.delete(key);
      total -= model.size;
    }
  }
}

/** Yield to the event loop, which handles the messages that have come meanwhile. */
function yieldToMessages() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

const COMMANDS = {
  /** Load a model from a safetensors file in base64. Does nothing if it is there already. */
  async load(engine, { key, config, V, weights }) {
    if (engine.models.has(key)) return;
    const tensors = readSafetensors(decodeBase64(weights));
    const size = countNumbers(config, V);
    engine.evict(size);
    const kernels = await Kernels.create(engine.wasm, size);
    // Reading the weights from memory takes most of a large model's time, so they stay as they are.
    const keepsHalves = kernels.hasHalves && countParameters(config, V) > HALVES_FROM;
    const isHalf = (name, [rows, columns]) =>
      keepsHalves &&
      name.startsWith("blocks.") &&
      columns % 8 === 0 &&
      tensors.get(name)?.dtype === "F16";
    const load = (name, shape, target) => {
      const tensor = tensors.get(name);
      if (!tensor || tensor.shape.join() !== shape.join()) {
        throw new Error(`${name} is missing or has another shape than ${shape}`);
      }
      decodeTensor(tensor, target, tensors.get(`${name}.scale`));
    };
    const model = new LanguageModel(config, V, kernels, load, isHalf);
    engine.models.set(key, Object.assign(model, { size }));
  },

  /** Return the logits (T, V) of at most T tokens, one row after another. */
  async logits(engine, { key, ids }) {
    const model = engine.get(key);
    const rows = new Float32Array(ids.length * model.V);
    const x = model.forward(ids, 0);
    for (let m = 0; m < ids.length; m++) rows.set(model.computeLogits(x, m), m * model.V);
    return rows;
  },

  /** Return the logits (V,) of the token after a prompt and what was generated from it. */
  async predict(engine, { key, prompt, generated }) {
    const decoder = new Decoder(engine.get(key), prompt);
    decoder.prefill(generated);
    return decoder.computeNextLogits().slice();
  },

  /**
   * Generate `count` tokens. Reports { ids } a few at a time.
   *
   * Returns { ids, seconds } of all.
   */
  async generate(engine, { key, prompt, generated = [], count, sampling, seed }, call) {
    const start = performance.now();
    const all = [];
    let part = [];
    let reported = start;
    for (const token of streamTokens(engine.get(key), prompt, generated, sampling, seed)) {
      all.push(token);
      part.push(token);
      const isLast = all.length >= count;
      if (isLast || performance.now() - reported > REPORT_INTERVAL) {
        call.report({ ids: part });
        await yieldToMessages();
        if (isLast || call.isCancelled()) break;
        part = [];
        reported = performance.now();
      }
    }
    return { ids: all, seconds: (performance.now() - start) / 1000 };
  },

  /**
   * Compute the surprise of each token of a text but the first.
   *
   * off: heads that are switched off, "layer.head", counted from 1. top: how many of the likeliest
   *     tokens to list.
   *
   * Returns { bits, ranks, top: [[id, probability], …] of each token }. A rank of 1 is the
   * likeliest token.
   */
  async score(engine, { key, ids, off = [], top = TOP }, call) {
    const heads = new Set(off);
    const observer = { isHeadOff: (layer, head) => heads.has(`${layer + 1}.${head + 1}`) };
    const decoder = new Decoder(engine.get(key), ids.slice(0, 1), observer);
    const scores = { bits: [], ranks: [], top: [] };
    for (let start = 1; start < ids.length && !call.isCancelled(); start += CHUNK) {
      const tokens = ids.slice(start, start + CHUNK);
      decoder.prefill(tokens, (i, logits) => {
        const logit = logits[tokens[i]];
        scores.bits.push(-computeLogProbability(logits, tokens[i]) / Math.LN2);
        let rank = 1;
        for (let v = 0; v < logits.length; v++) if (logits[v] > logit) rank++;
        scores.ranks.push(rank);
        if (top) scores.top.push(listLikeliest(logits, top));
      });
      await yieldToMessages();
    }
    return scores;
  },

  /** Return the attention weights (L, H, t, t) of a text of t tokens, at most T. */
  async attend(engine, { key, ids }) {
    const model = engine.get(key);
    const { n_layer: L, n_head: H } = model.config;
    const t = ids.length;
    const maps = new Float32Array(L * H * t * t);
    model.forward(ids, 0, {
      onAttention: (layer, head, position, weights) =>
        maps.set(weights, ((layer * H + head) * t + position) * t),
    });
    return maps;
  },

  /**
   * Score each head on a random text of t tokens that is repeated (arxiv.org/abs/2209.11895).
   *
   * Returns { previous, induction }, each (L, H): the mean attention of the second half to the
   * token before, and to the token after the same token's first occurrence.
   */
  async headScores(engine, { key }) {
    const model = engine.get(key);
    const { n_layer: L, n_head: H, block_size: T } = model.config;
    const t = Math.min(64, Math.floor(T / 2));
    const random = new MersenneTwister(1);
    const once = Array.from({ length: t }, () => Math.floor(random.draw() * model.V));
    const previous = new Float32Array(L * H);
    const induction = new Float32Array(L * H);
    model.forward([...once, ...once], 0, {
      onAttention: (layer, head, position, weights) => {
        if (position < t) return;
        previous[layer * H + head] += weights[position - 1] / t;
        induction[layer * H + head] += weights[position - t + 1] / t;
      },
    });
    return { previous, induction };
  },

  /**
   * Logit lens: what the LM head computes from the residual stream after each layer, for the tokens
   * from `first` on, of at most T.
   *
   * Returns [layer][position] → [[id, probability], …], the likeliest; layer 0 is the embedding.
   */
  async lens(engine, { key, ids, first }) {
    const model = engine.get(key);
    const layers = [];
    model.forward(ids, 0, {
      onResidual: (layer, x) => {
        const compute = (_, i) => listLikeliest(model.computeLogits(x, first + i), TOP);
        layers.push(Array.from({ length: ids.length - first }, compute));
      },
    });
    return layers;
  },
};

/**
 * Answer the messages of a page, as a worker: { wasm } once, then { id, name, args } or
 * { id, cancel }. Answers { id, part }, { id, result } or { id, error }.
 */
export function serve(scope) {
  let engine;
  const cancelled = new Set(); // ids of calls
  scope.onmessage = async ({ data: { wasm, id, name, args, cancel } }) => {
    if (id === undefined) {
      engine = new Engine(wasm);
    } else if (cancel) {
      cancelled.add(id);
    } else {
      const call = {
        report: (part) => scope.postMessage({ id, part }),
        isCancelled: () => cancelled.has(id),
      };
      try {
        const result = await engine.run(name, args, call);
        scope.postMessage({ id, result }, result instanceof Float32Array ? [result.buffer] : []);
      } catch (error) {
        scope.postMessage({ id, error: error.message });
      }
      cancelled.delete(id);
    }
  };
}
