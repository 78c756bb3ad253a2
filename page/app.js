// The models of the page, its state, and what all views share.

import { STRINGS } from "./strings.js";
import { Client } from "./client.js";
import { State } from "./state.js";
import { readPage } from "./data.js";
import { decodeBase64 } from "./weights.js";

const SAMPLING = { temperature: 1, topK: 0, topP: 1, minP: 0 };

/** What a view is given: the models, the state, and the engine. Throws DamagedPage. */
export class App {
  constructor() {
    const { models, source } = readPage(document);
    this.models = models; // the first is the one that the views show, a second is compared with it
    this.source = source; // of model.py, by name
    const program = decodeBase64(document.getElementById("folio-kernels").textContent.trim());
    this.client = new Client(document.getElementById("folio-engine").textContent, program);
    this.state = new State();
    this.onError = () => {}; // called with an Error that a view's button met
    // How the text from state's `from` on was generated: its ids, and the settings.
    this.generated = { ids: null, settings: null };
  }

  get model() {
    return this.models[0];
  }

  /**
   * Call a command of the engine, with the model in memory.
   *
   * args: those of the command; `model`, a PageModel or its number, the first by default; and
   * `checkpoint`, its number, by default that of the state.
   */
  async call(name, { model = this.model, checkpoint, ...args } = {}, options = {}) {
    const chosen = typeof model === "number" ? this.models[model] : model;
    const shown = chosen === this.model ? this.state.get("checkpoint") : -1;
    const index = chosen.getCheckpoint(checkpoint ?? shown);
    const key = chosen.getKey(index);
    if (!(await this.client.call("has", { key }))) {
      const { config, num_tokens: V } = chosen;
      await this.client.call("load", { key, config, V, weights: chosen.getWeights(index) });
    }
    if (options.signal?.aborted) throw new Error("cancelled");
    if (name === "generate") args.sampling = { ...SAMPLING, ...args.sampling };
    return this.client.call(name, { key, ...args }, options);
  }

  /** Do what a button asks for; an error is shown, unless it was stopped. */
  async attempt(work) {
    try {
      return await work();
    } catch (error) {
      if (error.message !== "cancelled") this.onError(error);
    }
  }

  getText() {
    return this.state.get("text");
  }

  encode(text = this.getText()) {
    return this.model.tokenizer.encode(text);
  }

  /** Return the ids of a text, or of the default prompt if it has none. */
  encodePrompt(text) {
    const ids = this.encode(text);
    return ids.length ? ids : this.encode(this.model.default_prompt);
  }

  /** Return the part of the text that was not generated. */
  getPrompt() {
    return this.getText().slice(0, this.state.get("from"));
  }

  /** Return the text as { prompt, generated }, ids. */
  getContext() {
    const generated =
      this.generated.ids ?? this.encode(this.getText().slice(this.state.get("from")));
    return { prompt: this.encodePrompt(this.getPrompt()), generated };
  }

  /** Change the text: all of it is a prompt then. */
  setText(text) {
    this.generated = { ids: [], settings: null };
    this.state.set({ text, from: text.length, at: -1 });
  }

  /** Return whether the generated part of the text was generated with the settings of now. */
  isGeneratedAsSet() {
    return (
      this.generated.settings === null || this.generated.settings === this.state.formatSampling()
    );
  }

  /**
   * Append `count` generated tokens to the text. It goes on with the random numbers of the part
   * that was generated before, unless that had other settings. Returns the result of the engine.
   */
  async generate(count, signal) {
    if (!this.isGeneratedAsSet()) this.setText(this.getText());
    this.generated.settings = this.state.formatSampling();
    const context = this.getContext();
    const start = this.getPrompt();
    const ids = [...context.generated];
    const args = {
      ...context,
      count,
      seed: this.state.get("seed"),
      sampling: this.state.getSampling(),
    };
    return this.call("generate", args, {
      signal,
      onPart: (part) => {
        ids.push(...part.ids);
        this.generated.ids = ids;
        this.state.set({ text: start + this.model.tokenizer.decode(ids), at: -1 });
      },
    });
  }

  /** Compare with a model of another page. */
  addModel(model) {
    this.models = [this.model, model];
    this.state.touch("models");
  }

  /** Return the name of a token, for people and screen readers. */
  nameToken(id) {
    const { tokenizer } = this.model;
    return STRINGS.token.names[tokenizer.decode([id])] ?? `“${tokenizer.label(id)}”`;
  }
}
