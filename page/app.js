// The models of the page, its state, and what all views share.

import { STRINGS } from "./strings.js";
import { decodeBase64 } from "./base64.js";
import { Client } from "./client.js";
import { State } from "./state.js";
import { readPage } from "./data.js";
import { NOT_LOADED } from "./worker.js";

const PLAIN_SAMPLING = { temperature: 1, topK: 0, topP: 1, minP: 0 };

/** What a view is given: the models, the state, and the engine. Throws PageError. */
export class App {
  constructor() {
    const { models, source } = readPage(document);
    this.models = models; // the first is the one that the views show, a second is compared with it
    this.source = source; // of model.py, by name
    this.model.getWeights(this.model.shown); // throws if the file is cut off
    const kernels = decodeBase64(document.getElementById("folio-kernels").textContent.trim());
    this.client = new Client(document.getElementById("folio-engine").textContent, kernels);
    this.state = new State();
    this.known = { text: "", ids: [], prompt: 0 }; // ids of a text; the first `prompt` are given
    this.undoable = []; // earlier texts: { text, from, known }
    this.generation = new AbortController(); // of the text that is being generated
    this.onError = () => {}; // called with an Error that an action of the user caused
  }

  get model() {
    return this.models[0];
  }

  /**
   * Call a command of the engine; load the model if it is not in memory.
   *
   * args: those of the command; `model`, a PageModel or its number, the first by default; and
   * `checkpoint`, its number, of the first model by default that of the state.
   */
  async call(name, { model = this.model, checkpoint, ...args } = {}, options = {}) {
    const chosen = typeof model === "number" ? this.models[model] : model;
    const ofState = chosen === this.model ? this.state.get("checkpoint") : -1;
    const index = chosen.getCheckpoint(checkpoint ?? ofState);
    const key = chosen.getKey(index);
    if (name === "generate") args.sampling = { ...PLAIN_SAMPLING, ...args.sampling };
    try {
      return await this.client.call(name, { key, ...args }, options);
    } catch (error) {
      if (error.message !== NOT_LOADED) throw error;
    }
    const { config, num_tokens: V } = chosen;
    await this.client.call("load", { key, config, V, weights: chosen.getWeights(index) });
    return this.client.call(name, { key, ...args }, options);
  }

  /** Run an action of the user. An error is shown, unless the action was cancelled. */
  async run(action) {
    try {
      return await action();
    } catch (error) {
      if (error.message !== "cancelled") this.onError(error);
    }
  }

  // ---- The text

  getText() {
    return this.state.get("text");
  }

  /** Return the ids of the text. */
  getIds() {
    const text = this.getText();
    return this.known.text === text ? this.known.ids : this.model.tokenizer.encode(text);
  }

  /** Return the ids of the text, or of the default prompt if it has none. */
  getPrompt() {
    const ids = this.getIds();
    return ids.length ? ids : this.model.tokenizer.encode(this.model.default_prompt);
  }

  /** Return the text as { prompt, generated }, ids. */
  getContext() {
    const { known } = this;
    const from = this.state.get("from");
    if (from < 0) return { prompt: this.getPrompt(), generated: [] };
    const { tokenizer, default_prompt } = this.model;
    let prompt = tokenizer.encode(this.getText().slice(0, from));
    let generated = tokenizer.encode(this.getText().slice(from));
    if (known.text === this.getText()) {
      prompt = known.ids.slice(0, known.prompt);
      generated = known.ids.slice(known.prompt);
    }
    return { prompt: prompt.length ? prompt : tokenizer.encode(default_prompt), generated };
  }

  /** Change the text: all of it is a prompt then. */
  setText(text) {
    this.generation.abort();
    this.state.set({ text, from: -1, at: -1 });
  }

  /** Change the text to that of some ids; it can be undone. */
  setIds(ids) {
    this.remember();
    const text = this.model.tokenizer.decode(ids);
    this.known = { text, ids, prompt: 0 };
    this.setText(text);
  }

  /** Append a token to the text. */
  append(id) {
    this.setIds([...this.getIds(), id]);
  }

  /** Remember the text for `undo`. */
  remember() {
    const { text, from } = this.state.values;
    if (this.undoable.at(-1)?.text === text) return;
    this.undoable.push({ text, from, known: this.known });
  }

  /** Return to the text before the last change that was not typed. */
  undo() {
    const { text, from, known } = this.undoable.pop() ?? {
      ...this.state.values,
      known: this.known,
    };
    this.generation.abort();
    this.known = known;
    this.state.set({ text, from, at: -1 });
  }

  /** Change a setting that a generated text depends on: the text is a prompt from now on. */
  setSampling(changes) {
    this.generation.abort();
    this.state.set({ ...changes, from: -1 });
  }

  /**
   * Append `count` generated tokens to the text. They use the random numbers after those of the
   * generated part of the text. Returns the result of the engine, or undefined after an error.
   */
  async generate(count, { isUndoable = true } = {}) {
    this.generation.abort();
    if (isUndoable) this.remember();
    const { signal } = (this.generation = new AbortController());
    const { prompt, generated } = this.getContext();
    const from = this.state.get("from") < 0 ? this.getText().length : this.state.get("from");
    const start = this.getText().slice(0, from);
    const given = from === 0 ? [] : prompt; // not the default prompt, which is no part of the text
    const ids = [...generated];
    const { seed } = this.state.values;
    const args = { prompt, generated, count, seed, sampling: this.state.getSampling() };
    const onPart = (part) => {
      ids.push(...part.ids);
      const text = start + this.model.tokenizer.decode(ids);
      this.known = { text, ids: [...given, ...ids], prompt: given.length };
      this.state.set({ text, from, at: -1 });
    };
    return this.run(() => this.call("generate", args, { signal, onPart }));
  }

  /**
   * Return the mean surprise of a text, { perToken, perByte } in bits, or null if it has fewer than
   * two tokens or the computation was cancelled. args: `ids`, and those of the command `score`.
   */
  async measure({ ids, model = this.model, ...args }, { signal }) {
    if (ids.length < 2) return null;
    const { bits } = await this.call("score", { model, ids, top: 0, ...args }, { signal });
    if (signal.aborted) return null;
    return computeMeans(bits, ids, model.tokenizer);
  }

  /** Return the name of a token, for people and screen readers. */
  nameToken(id) {
    const { tokenizer } = this.model;
    return STRINGS.token.names.get(tokenizer.decode([id])) ?? `“${tokenizer.label(id)}”`;
  }
}

/** Return the mean of the bits of all tokens but the first: { perToken, perByte }. */
export function computeMeans(bits, ids, tokenizer) {
  const total = bits.reduce((sum, each) => sum + each, 0);
  const bytes = ids.slice(1).reduce((sum, id) => sum + tokenizer.countBytes(id), 0);
  return { perToken: total / bits.length, perByte: total / bytes };
}
