// The data of a page: this one's, or that of another page that was dropped on it.

import { createTokenizer } from "./tokenizer.js";
import { countNumbers } from "./model.js";

const FORMAT_VERSION = 1;
const MAX_MODEL_NUMBERS = 2 ** 28; // in memory: 1 GB

/** One model of a page: its data, its tokenizer, and the weights of its checkpoints. */
export class PageModel {
  /** data: as exporters/html.py wrote it. getText(id): returns the text of an element. */
  constructor(data, getText, prefix) {
    checkModel(data);
    Object.assign(this, data);
    this.getText = getText;
    this.prefix = prefix;
    this.tokenizer = createTokenizer(data.tokenizer);
  }

  /** Return the number of a checkpoint; -1 stands for the one that was exported. */
  getCheckpoint(index) {
    return index in this.checkpoints ? index : this.shown;
  }

  /** Return a key that names a checkpoint's weights in the engine. */
  getKey(index) {
    return `${this.prefix}/${index}`;
  }

  /** Return the weights of a checkpoint, base64. Throws an Error if they are cut off. */
  getWeights(index) {
    const { weights, bytes } = this.checkpoints[index];
    const text = this.getText(weights)?.trim() ?? "";
    if (text.length !== 4 * Math.ceil(bytes / 3)) throw new DamagedPage();
    return text;
  }
}

/** A page that is cut off, or no page of Folio. */
export class DamagedPage extends Error {}

/** Return the data of a document: { models: [PageModel], source }. Throws DamagedPage. */
export function readPage(root, prefix = "own") {
  const getText = (id) => root.getElementById(id)?.textContent;
  let data;
  try {
    data = JSON.parse(getText("folio-page"));
  } catch {
    throw new DamagedPage();
  }
  if (data?.format_version !== FORMAT_VERSION) throw new DamagedPage();
  const models = data.models.map(
    (each, index) => new PageModel(each, getText, `${prefix}-${index}`),
  );
  return { ...data, models };
}

/** Throw DamagedPage if a model's data is not what the page can show: it may be a stranger's. */
function checkModel({ config, num_tokens: V, tokenizer, checkpoints, shown }) {
  const counts = ["block_size", "n_embd", "n_head", "n_layer", "hidden"].map(
    (name) => config?.[name],
  );
  const isCount = (value) => Number.isInteger(value) && value > 0 && value < 2 ** 24;
  if (![V, ...counts].every(isCount) || config.n_embd % config.n_head !== 0)
    throw new DamagedPage();
  if (countNumbers(config, V) > MAX_MODEL_NUMBERS) throw new DamagedPage();
  const vocabulary = tokenizer?.chars ?? tokenizer?.tokens;
  if (!Array.isArray(vocabulary) || vocabulary.length !== V) throw new DamagedPage();
  if (!Array.isArray(checkpoints) || !(shown in checkpoints)) throw new DamagedPage();
}
