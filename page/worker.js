// The commands that a page's worker runs, off the main thread. Without workers, the page runs them
// itself (client.js).

import { Kernels } from "./kernels.js";
import { LanguageModel, applySoftmax, countNumbers } from "./model.js";
import { MersenneTwister, computeLogProbability, computeSoftmax, sortTokens } from "./sampling.js";
import { Context, streamTokens } from "./generate.js";
import { decodeBase64, decodeTensor, readSafetensors } from "./weights.js";

const SLICE = 40; // milliseconds of computing between two looks at the messages
const MAX_NUMBERS = 2 ** 27; // of all models that are kept in memory: 512 MB

/** Models in memory, and the commands, which run one after another: a model has one KV cache. */
export class Engine {
  /** program: kernels.wasm, a Uint8Array, or null. */
  constructor(program) {
    this.program = program;
    this.models = new Map(); // by key, the one used last at the end
    this.last = Promise.resolve(); // the command before
  }

  /**
   * Run a command when those before have ended. call: { report(part), isCancelled() }.
   *
   * Returns a promise of the result, which fails with an Error.
   */
  run(name, args, call) {
    const result = this.last.then(() => {
      if (call.isCancelled()) throw new Error("cancelled");
      return COMMANDS[name](this, args, call);
    });
    this.last = result.catch(() => {});
    return result;
  }

  /** Return the model that `load` was given under a key. */
  get(key) {
    const model = this.models.get(key);
    if (!model) throw new Error(`the model ${key} is not loaded`);
    this.models.delete(key);
    this.models.set(key, model);
    return model;
  }

  /** Forget the models that were not used for longest, until `size` more numbers fit. */
  makeRoom(size) {
    let total = size;
    for (const model of this.models.values()) total += model.size;
    for (const [key, model] of this.models) {
      if (total <= MAX_NUMBERS) return;
      this.models.delete(key);
      total -= model.size;
    }
  }
}

/** Let the messages in, then go on. */
function pause() {
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
    engine.makeRoom(size);
    const kernels = await Kernels.create(engine.program, size);
    const model = new LanguageModel(config, V, kernels, (name, shape, target) => {
      const tensor = tensors.get(name);
      if (!tensor || tensor.shape.join() !== shape.join()) {
        throw new Error(`${name} is missing or has another shape than ${shape}`);
      }
      decodeTensor(tensor, target, tensors.get(`${name}.scale`));
    });
    engine.models.set(key, Object.assign(model, { size }));
  },

  /** Return whether a model is in memory. */
  async has(engine, { key }) {
    return engine.models.has(key);
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
    const context = new Context(engine.get(key), prompt);
    context.read(generated);
    return context.computeNextLogits().slice();
  },

  /**
   * Generate `count` tokens; reports { ids, bits } a few at a time: the surprise of each token
   * before sampling.
   *
   * Returns { ids, bits, seconds } of all.
   */
  async generate(engine, { key, prompt, generated = [], count, sampling, seed }, call) {
    const start = performance.now();
    const all = { ids: [], bits: [] };
    let part = { ids: [], bits: [] };
    let reported = start;
    for (const { token, logits } of streamTokens(
      engine.get(key),
      prompt,
      generated,
      sampling,
      seed,
    )) {
      if (all.ids.length === count) break; // only if count is 0
      const bits = -computeLogProbability(logits, token) / Math.LN2;
      for (const list of [all, part]) {
        list.ids.push(token);
        list.bits.push(bits);
      }
      const isLast = all.ids.length >= count;
      if (isLast || performance.now() - reported > SLICE) {
        call.report(part);
        await pause();
        if (call.isCancelled()) break;
        part = { ids: [], bits: [] };
        reported = performance.now();
      }
      if (isLast) break;
    }
    return { ...all, seconds: (performance.now() - start) / 1000 };
  },

  /**
   * Compute the surprise of each token of a text but the first.
   *
   * off: heads that are switched off, "layer.head". top: how many of the likeliest tokens to list.
   *
   * Reports, and returns of all, { bits, ranks, top: [[id, probability], …] of each token }. A rank
   * of 1 is the likeliest token.
   */
  async score(engine, { key, ids, off = [], top = 5 }, call) {
    const heads = new Set(off);
    const observer = { isHeadOff: (layer, head) => heads.has(`${layer}.${head}`) };
    const context = new Context(engine.get(key), ids.slice(0, 1), observer);
    const all = { bits: [], ranks: [], top: [] };
    for (let start = 1; start < ids.length; start += 256) {
      const part = { bits: [], ranks: [], top: [] };
      const tokens = ids.slice(start, start + 256);
      context.read(tokens, (i, logits) => {
        const logit = logits[tokens[i]];
        part.bits.push(-computeLogProbability(logits, tokens[i]) / Math.LN2);
        let rank = 1;
        for (let v = 0; v < logits.length; v++) if (logits[v] > logit) rank++;
        part.ranks.push(rank);
        if (top) part.top.push(listTop(logits, top));
      });
      for (const name in all) all[name].push(...part[name]);
      call.report(part);
      await pause();
      if (call.isCancelled()) break;
    }
    return all;
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
   * Logit lens: what the head makes of the residual stream after each layer, of at most T tokens.
   *
   * Returns [layer][position] → [[id, probability], …], the five likeliest; layer 0 is the
   * embedding.
   */
  async lens(engine, { key, ids }) {
    const model = engine.get(key);
    const layers = [];
    model.forward(ids, 0, {
      onResidual: (layer, x) => {
        layers.push(ids.map((_, m) => listTop(model.computeLogits(x, m), 5)));
      },
    });
    return layers;
  },
};

/** Return the likeliest tokens: [[id, probability], …]. */
function listTop(logits, number) {
  const probabilities = computeSoftmax(logits);
  const order = logits.length > 1000 ? findTop(probabilities, number) : sortTokens(probabilities);
  return Array.from(order.slice(0, number), (id) => [id, probabilities[id]]);
}

/** Return the ids of the largest numbers, in descending order, without sorting them all. */
function findTop(numbers, number) {
  const best = [];
  for (let v = 0; v < numbers.length; v++) {
    if (best.length === number && numbers[v] <= numbers[best[number - 1]]) continue;
    let place = best.length;
    while (place > 0 && numbers[best[place - 1]] < numbers[v]) place--;
    best.splice(place, 0, v);
    best.length = Math.min(best.length, number);
  }
  return best;
}

/**
 * Answer the messages of a page, as a worker: { program } once, then { id, name, args } or
 * { id, cancel }. Answers { id, part }, { id, result } or { id, error }.
 */
export function serve(scope) {
  let engine;
  const cancelled = new Set(); // ids of calls
  scope.onmessage = async ({ data: { program, id, name, args, cancel } }) => {
    if (id === undefined) {
      engine = new Engine(program);
    } else if (cancel) {
      cancelled.add(id);
    } else {
      const call = {
        report: (part) => scope.postMessage({ id, part }),
        isCancelled: () => cancelled.has(id),
      };
      try {
        scope.postMessage({ id, result: await engine.run(name, args, call) });
      } catch (error) {
        scope.postMessage({ id, error: error.message });
      }
      cancelled.delete(id);
    }
  };
}
