// The state of the page: what a link to it holds. It is kept in the address, after the #.

const STATE_DEFAULTS = {
  view: "next",
  text: "",
  from: 0, // where the generated part of the text begins, in UTF-16 code units
  seed: 1337, // these are the defaults of inference.py
  temperature: 0.8,
  top_k: 0, // 0: all
  top_p: 1,
  min_p: 0,
  count: 300, // tokens to generate
  checkpoint: -1, // -1: the exported one
  layer: 0,
  head: 0,
  off: "", // heads that are switched off: "0.1,2.3"
  at: -1, // token that is looked at; -1: the last
};
const LIMITS = {
  seed: [0, 2 ** 32 - 1],
  temperature: [0, 2],
  top_k: [0, 1_000_000],
  top_p: [0.01, 1],
  min_p: [0, 0.99],
  count: [1, 5000],
};
const FRACTIONS = ["temperature", "top_p", "min_p"]; // all other numbers are integers
const MAX_LINK_TEXT = 2000; // characters

/** The values of the page's state by name; `set` changes some, and calls the listeners. */
export class State {
  constructor() {
    this.values = { ...STATE_DEFAULTS };
    this.listeners = [];
  }

  get(name) {
    return this.values[name];
  }

  /** Set values, and call the listeners with the names of those that changed. */
  set(changes) {
    const names = Object.keys(changes).filter((name) => this.values[name] !== changes[name]);
    if (names.length === 0) return;
    Object.assign(this.values, changes);
    this.touch(...names);
  }

  /** Call the listeners with names of values. */
  touch(...names) {
    for (const listener of this.listeners) listener(new Set(names));
  }

  /** Return the sampling settings as the engine's functions take them. */
  getSampling() {
    const { temperature, top_k: topK, top_p: topP, min_p: minP } = this.values;
    return { temperature, topK, topP, minP };
  }

  /** Return seed and sampling settings as one text, to compare. */
  formatSampling() {
    return JSON.stringify([this.values.seed, this.getSampling()]);
  }

  /** Return whether the text is short enough to be part of a link. */
  isTextInLink() {
    return this.values.text.length <= MAX_LINK_TEXT;
  }

  /** Return the state, with some changes, as the part of an address after the #; defaults are left
   * out. */
  format(changes = {}) {
    const parts = new URLSearchParams();
    for (const [name, value] of Object.entries({ ...this.values, ...changes })) {
      if (value === STATE_DEFAULTS[name]) continue;
      if ((name === "text" || name === "from") && !this.isTextInLink()) continue;
      parts.set(name, value);
    }
    return parts.toString();
  }

  /** Return the values of a link's URLSearchParams; unknown names and bad numbers are ignored. */
  parse(given) {
    const changes = { ...STATE_DEFAULTS };
    for (const [name, text] of given) {
      if (!Object.hasOwn(STATE_DEFAULTS, name)) continue;
      if (typeof STATE_DEFAULTS[name] === "string") {
        changes[name] = text;
        continue;
      }
      const value = FRACTIONS.includes(name) ? Number(text) : Math.round(Number(text));
      if (!Number.isFinite(value)) continue;
      const [low, high] = LIMITS[name] ?? [-1, Number.MAX_SAFE_INTEGER];
      changes[name] = Math.min(Math.max(value, low), high);
    }
    return changes;
  }
}
