// The state of the page: what a link to it holds. It is kept in the address, after the #.

const STATE_DEFAULTS = {
  view: "next",
  text: "",
  from: -1, // start of the generated part of the text, in UTF-16 code units; -1: none
  seed: 1337, // these are the defaults of inference.py
  temperature: 0.8,
  top_k: 0, // 0: all
  top_p: 1,
  min_p: 0,
  count: 300, // tokens to generate
  checkpoint: -1, // -1: the exported one
  layer: 1, // counted from 1, as in the page
  head: 1,
  off: "", // heads that are switched off: "1.2,3.4"
  other: -1, // number of the model to compare with; -1: the first choice
  at: -1, // index of the token that was chosen in the text; -1: none
};
export const LIMITS = {
  from: [-1, 1e9],
  seed: [0, 2 ** 32 - 1],
  temperature: [0, 2],
  top_k: [0, 1e6],
  top_p: [0.01, 1],
  min_p: [0, 0.99],
  count: [1, 5000],
  checkpoint: [-1, 1e6],
  layer: [1, 1e6],
  head: [1, 1e6],
  other: [-1, 1e6],
  at: [-1, 1e9],
};
const FRACTIONS = ["temperature", "top_p", "min_p"]; // all other numbers are integers
const MAX_LINK_TEXT = 2000; // characters

/** The settings that a generated text depends on. */
export const SAMPLING_SETTINGS = ["seed", "temperature", "top_k", "top_p", "min_p"];

/** The values of the page's state by name; `set` changes some, and calls the listeners. */
export class State {
  constructor() {
    this.values = { ...STATE_DEFAULTS };
    this.listeners = [];
  }

  get(name) {
    return this.values[name];
  }

  /** Return whether a value is the default. */
  isDefault(name) {
    return this.values[name] === STATE_DEFAULTS[name];
  }

  /** Set values, and call the listeners with the names of those that changed. */
  set(changes) {
    const names = Object.keys(changes).filter((name) => this.values[name] !== changes[name]);
    if (names.length === 0) return;
    Object.assign(this.values, changes);
    this.notify(...names);
  }

  /** Call the listeners with names of values. */
  notify(...names) {
    for (const listener of this.listeners) listener(new Set(names));
  }

  /** Return the sampling settings as the engine's functions take them. */
  getSampling() {
    const { temperature, top_k: topK, top_p: topP, min_p: minP } = this.values;
    return { temperature, topK, topP, minP };
  }

  /** Return whether the text is short enough to be part of a link. */
  isTextInLink() {
    return this.values.text.length <= MAX_LINK_TEXT;
  }

  /** Return the state, with some changes, as the part of an address after the #. Defaults are left
   * out, but for the text. */
  format(changes = {}) {
    const values = { ...this.values, ...changes };
    const parts = new URLSearchParams();
    for (const [name, value] of Object.entries(values)) {
      const isText = name === "text" || name === "from";
      if (isText ? !this.isTextInLink() : value === STATE_DEFAULTS[name]) continue;
      if (name !== "from" || value >= 0) parts.set(name, value);
    }
    return parts.toString();
  }
}

/** Return the values of a link's URLSearchParams; unknown names and bad numbers are ignored. */
export function parseLink(given) {
  const values = { ...STATE_DEFAULTS };
  for (const [name, text] of given) {
    if (!Object.hasOwn(STATE_DEFAULTS, name)) continue;
    if (typeof STATE_DEFAULTS[name] === "string") {
      values[name] = text;
      continue;
    }
    const value = FRACTIONS.includes(name) ? Number(text) : Math.round(Number(text));
    const [low, high] = LIMITS[name];
    if (text !== "" && Number.isFinite(value)) values[name] = Math.min(Math.max(value, low), high);
  }
  return values;
}
