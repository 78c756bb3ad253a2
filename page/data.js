// The data of a page: this one's, or that of another page that was dropped on it.

import { createTokenizer } from "./tokenizer.js";
import { ACTIVATIONS, countNumbers, countParameters } from "./model.js";

const FORMAT_VERSION = 1;
const MAX_LAYERS = 1000;
const MAX_MODEL_NUMBERS = 2 ** 29; // in memory: 2 GB, as exporters/html.py

/** A page that is cut off, damaged, or no page of Folio. */
export class PageError extends Error {}

/** One model of a page: its data, its tokenizer, and the weights of its checkpoints. */
export class PageModel {
  /**
   * data: see exporters/page_data.py. It may be from a stranger's page, so it is checked.
   * getText(id): returns the text of an element of the page. prefix: unique among models.
   */
  constructor(data, getText, prefix) {
    checkModel(data);
    this.name = String(data.name);
    this.run_id = data.run_id;
    this.config = data.config;
    this.num_tokens = data.num_tokens;
    this.parameters = countParameters(data.config, data.num_tokens);
    this.default_prompt = String(data.default_prompt);
    this.dtype = String(data.dtype);
    this.checkpoints = data.checkpoints;
    this.shown = data.shown;
    this.curve = data.curve;
    this.overfitting = data.overfitting;
    this.card = data.card;
    this.memorization = data.memorization;
    this.memorization_reason = data.memorization_reason;
    this.tokenizer = createTokenizer(data.tokenizer);
    this.getText = getText;
    this.prefix = prefix;
  }

  /** Return the number of a checkpoint; -1 stands for the one that was exported. */
  getCheckpoint(index) {
    return index in this.checkpoints ? index : this.shown;
  }

  /** Return a key that names a checkpoint's weights in the engine. */
  getKey(index) {
    return `${this.prefix}/${index}`;
  }

  /** Return the weights of a checkpoint, base64. Throws PageError if they are cut off. */
  getWeights(index) {
    const { weights, bytes } = this.checkpoints[index];
    const text = this.getText(weights)?.trim() ?? "";
    if (text.length !== 4 * Math.ceil(bytes / 3)) throw new PageError();
    return text;
  }
}

/** Return the data of a document: { models: [PageModel], source }. Throws PageError. */
export function readPage(root, prefix = "own") {
  const getText = (id) => root.getElementById(id)?.textContent;
  try {
    const { format_version, models, source } = JSON.parse(getText("folio-page"));
    if (format_version !== FORMAT_VERSION) throw new PageError();
    const create = (data, index) => new PageModel(data, getText, `${prefix}-${index}`);
    return { models: models.map(create), source };
  } catch (error) {
    throw error instanceof PageError ? error : new PageError(error.message);
  }
}

/** Throw PageError if a model's data is not what the page can show. */
function checkModel({ config, num_tokens: V, tokenizer, checkpoints, shown, default_prompt }) {
  const { architecture, block_size: T, n_embd: C, n_head: H, n_layer: L, hidden: F } = config;
  const isCount = (value) => Number.isInteger(value) && value > 0 && value <= 2 ** 24;
  const isText = (value) => typeof value === "string";
  const rows = config.ngram_rows ?? null; // older pages have none
  const vocabulary = tokenizer.chars ?? tokenizer.tokens;
  const isValid =
    [V, T, C, H, L, F].every(isCount) &&
    C % H === 0 &&
    L <= MAX_LAYERS &&
    ["modern", "gpt2", "speedrun"].includes(architecture) &&
    (architecture === "speedrun" ? isCount(rows) : rows === null) &&
    Object.hasOwn(ACTIVATIONS, config.activation) &&
    Number.isFinite(config.rope_theta) &&
    config.rope_theta > 0 &&
    isText(default_prompt) &&
    countNumbers(config, V) <= MAX_MODEL_NUMBERS &&
    vocabulary.length === V &&
    vocabulary.every(isText) &&
    shown in checkpoints;
  if (!isValid) throw new PageError();
}
