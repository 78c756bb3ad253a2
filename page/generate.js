// Generation and scoring of texts of any length, by the window rule of generate.py.

import { MersenneTwister, chooseToken, filterLogits } from "./sampling.js";

/**
 * Continues a text, and uses the model's KV cache for it.
 *
 * The model sees the last T tokens. When the cache is full, the newer half of them is computed anew
 * at positions from 0, and the older half is dropped.
 */
export class Decoder {
  /** prompt: one or more ids. */
  constructor(model, prompt, observer) {
    this.model = model;
    this.T = model.config.block_size;
    this.observer = observer;
    this.recent = Array.from(prompt).slice(-this.T);
    this.pending = this.recent; // tokens that are not in the cache
    this.position = 0; // of the first of them
  }

  /** Return the logits of the next token, (V,): valid until the next call. */
  computeNextLogits() {
    this.slideWindow();
    const last = this.pending.length - 1;
    const x = this.model.forward(this.pending, this.position, this.observer, last);
    const logits = this.model.computeLogits(x, last);
    this.position += this.pending.length;
    this.pending = [];
    return logits;
  }

  /** Append a token whose predecessors are all in the cache. */
  append(token) {
    this.recent.push(token);
    if (this.recent.length > 2 * this.T) this.recent = this.recent.slice(-this.T);
    this.pending = [token];
  }

  /**
   * Append tokens that are known, many at once. `onLogits(i, logits)` is called with what the model
   * predicted in the place of tokens[i].
   */
  prefill(tokens, onLogits) {
    let done = 0;
    while (done < tokens.length) {
      this.slideWindow();
      const t = this.pending.length;
      // The last token needs no place in the cache yet.
      const n = Math.min(this.T - this.position - t + 1, tokens.length - done);
      const known = tokens.slice(done, done + n);
      const x = this.model.forward(
        [...this.pending, ...known.slice(0, -1)],
        this.position,
        this.observer,
      );
      for (let i = 0; i < n; i++) onLogits?.(done + i, this.model.computeLogits(x, t - 1 + i));
      this.position += t + n - 1;
      this.recent = [...this.recent, ...known].slice(-this.T);
      this.pending = known.slice(-1);
      done += n;
    }
  }

  slideWindow() {
    if (this.position < this.T) return;
    this.pending = this.recent.slice(-this.T).slice(Math.floor(this.T / 2));
    this.position = 0;
  }
}

/**
 * Generate tokens without end.
 *
 * prompt: one or more ids. generated: what was generated after it before, with the same seed.
 */
export function* streamTokens(model, prompt, generated, sampling, seed) {
  const decoder = new Decoder(model, prompt);
  const random = new MersenneTwister(seed);
  for (let i = 0; i < generated.length; i++) random.draw();
  decoder.prefill(generated);
  while (true) {
    const logits = filterLogits(decoder.computeNextLogits(), sampling);
    const token = chooseToken(logits, random.draw());
    yield token;
    decoder.append(token);
  }
}
