// Text ↔ token ids: characters, or byte-level BPE (a vocabulary of one's own, or GPT-2's).

/** Return the tokenizer of a page's data: { kind, chars } or { kind, tokens, merges }. */
export function createTokenizer(data) {
  return data.kind === "char"
    ? new CharTokenizer(data.chars)
    : new BPETokenizer(data.tokens, data.merges);
}

/** One id for each character of the training text. */
class CharTokenizer {
  constructor(chars) {
    this.unit = "character";
    this.chars = chars;
    this.ids = new Map(chars.map((char, id) => [char, id]));
  }

  /** Return the ids of a text; unknown characters are left out. */
  encode(text) {
    return Array.from(text, (char) => this.ids.get(char)).filter((id) => id !== undefined);
  }

  decode(ids) {
    return Array.from(ids, (id) => this.chars[id]).join("");
  }

  /** Return the distinct characters of a text that the vocabulary lacks. */
  findUnknown(text) {
    return [...new Set(text)].filter((char) => !this.ids.has(char));
  }

  /** Return the text of each token. */
  split(ids) {
    return Array.from(ids, (id) => this.chars[id]);
  }

  /** Return how many bytes of UTF-8 a token stands for. */
  countBytes(id) {
    return new TextEncoder().encode(this.chars[id]).length;
  }

  /** Return a token's text as a label: spaces and control characters are made visible. */
  label(id) {
    return makeVisible(this.chars[id]);
  }
}

// GPT-2's words. JavaScript's \s is not Unicode's White_Space, which the Python libraries use.
const WORDS =
  /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

const MAX_KNOWN_WORDS = 10_000;

/** Byte-level BPE (Sennrich et al. 2016, Radford et al. 2019). */
class BPETokenizer {
  /**
   * tokens: their bytes in the order of the ids, spelled in GPT-2's alphabet of 256 characters.
   * merges: pairs of ids, in the order in which they are applied.
   */
  constructor(tokens, merges) {
    this.unit = "token";
    const alphabet = listByteLevelAlphabet();
    const byteOf = new Map(alphabet.map((char, byte) => [char, byte]));
    this.bytes = tokens.map((token) => Uint8Array.from(token, (char) => byteOf.get(char)));
    const ids = new Map(tokens.map((token, id) => [token, id]));
    this.byteIds = alphabet.map((char) => ids.get(char));
    this.ranks = new Map(); // of a pair of ids, to { rank, id }
    merges.forEach(([first, second], rank) => {
      this.ranks.set(this.pairKey(first, second), {
        rank,
        id: ids.get(tokens[first] + tokens[second]),
      });
    });
    this.known = new Map(); // words that were encoded
  }

  pairKey(first, second) {
    return first * 2 ** 26 + second;
  }

  encode(text) {
    if (this.known.size > MAX_KNOWN_WORDS) this.known.clear();
    const ids = [];
    for (const [word] of text.matchAll(WORDS)) {
      if (!this.known.has(word)) this.known.set(word, this.encodeWord(word));
      for (const id of this.known.get(word)) ids.push(id);
    }
    return ids;
  }

  /** Merge the bytes of a word, the pair of the lowest rank first. */
  encodeWord(word) {
    let ids = Array.from(new TextEncoder().encode(word), (byte) => this.byteIds[byte]);
    while (true) {
      let best = null;
      for (let i = 0; i + 1 < ids.length; i++) {
        const merge = this.ranks.get(this.pairKey(ids[i], ids[i + 1]));
        if (merge && (best === null || merge.rank < best.rank)) best = merge;
      }
      if (best === null) return ids;
      const merged = [];
      for (let i = 0; i < ids.length; i++) {
        const isPair =
          i + 1 < ids.length && this.ranks.get(this.pairKey(ids[i], ids[i + 1])) === best;
        merged.push(isPair ? best.id : ids[i]);
        if (isPair) i++;
      }
      ids = merged;
    }
  }

  decode(ids) {
    return this.split(ids).join("");
  }

  findUnknown() {
    return []; // every byte has a token
  }

  /** Return the text of each token; "" if its last character is completed by the next token. */
  split(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const pieces = Array.from(ids, (id) => decoder.decode(this.bytes[id], { stream: true }));
    if (pieces.length) pieces[pieces.length - 1] += decoder.decode();
    return pieces;
  }

  countBytes(id) {
    return this.bytes[id].length;
  }

  label(id) {
    const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.bytes[id]);
    if (!text.includes("\ufffd")) return makeVisible(text);
    return Array.from(this.bytes[id], (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join(
      "",
    );
  }
}

/** Return GPT-2's character for each byte: itself if it is printable, else one from U+0100. */
export function listByteLevelAlphabet() {
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => {
    const isPrintable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    return String.fromCodePoint(isPrintable ? byte : next++);
  });
}

const SYMBOLS = new Map([
  [" ", "␣"],
  ["\n", "↵"],
  ["\t", "⇥"],
  ["\r", "␍"],
]);

/** Return a text with its spaces, line ends and control characters made visible. */
export function makeVisible(text) {
  return Array.from(text, (char) => {
    if (SYMBOLS.has(char)) return SYMBOLS.get(char);
    const isHidden = /[\p{C}\p{Z}]/u.test(char);
    return isHidden ? `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}` : char;
  }).join("");
}
