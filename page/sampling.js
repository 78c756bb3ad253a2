// Sampling: from logits to a token, step by step as in decode_torch.py, and the random numbers.

/** MT19937 (Matsumoto and Nishimura 1998), which numpy and PyTorch use: the same seed, the same text. */
export class MersenneTwister {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const previous = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, previous) + i;
    }
    this.index = 624;
  }

  /** Return a number in [0, 1): the 24 low bits of the next output, as torch.rand does. */
  draw() {
    if (this.index === 624) this.refill();
    let y = this.state[this.index++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    y ^= y >>> 18;
    return (y & 0xffffff) * 2 ** -24;
  }

  refill() {
    const { state } = this;
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.index = 0;
  }
}

/** Return e^(x - largest) / sum for each of the numbers, as a Float64Array; -Infinity gives 0. */
export function computeSoftmax(logits) {
  const probabilities = new Float64Array(logits.length);
  const largest = findLargest(logits).value;
  let total = 0;
  for (let v = 0; v < logits.length; v++) total += probabilities[v] = Math.exp(logits[v] - largest);
  for (let v = 0; v < logits.length; v++) probabilities[v] /= total;
  return probabilities;
}

/** Return the first largest of some numbers: { index, value }. */
export function findLargest(numbers) {
  let index = 0;
  for (let i = 1; i < numbers.length; i++) if (numbers[i] > numbers[index]) index = i;
  return { index, value: numbers[index] };
}

/** Return the ids of the tokens in descending order of their logits; ties by id. */
export function sortTokens(logits) {
  const order = Uint32Array.from(logits, (_, id) => id);
  return order.sort((a, b) => logits[b] - logits[a] || a - b);
}

/**
 * Apply temperature, top-k, top-p and min-p, in this order.
 *
 * sampling: { temperature, topK, topP, minP }; topK 0 keeps all tokens.
 *
 * Returns new logits, (V,) Float32Array, -Infinity for a token that was cut. A temperature of 0
 * keeps the likeliest token alone.
 */
export function filterLogits(logits, { temperature, topK, topP, minP }) {
  const { index: likeliest, value: largest } = findLargest(logits);
  const kept = new Float32Array(logits.length);
  if (temperature === 0) {
    kept.fill(-Infinity);
    kept[likeliest] = 0;
    return kept;
  }
  const divisor = Math.max(Math.fround(temperature), 2 ** -126);
  for (let v = 0; v < kept.length; v++) kept[v] = Math.fround(logits[v] - largest) / divisor;
  const isFilteredByK = topK > 0 && topK < kept.length;
  if (isFilteredByK || topP < 1) {
    const order = sortTokens(kept);
    if (isFilteredByK) cutBelow(kept, kept[order[topK - 1]]);
    if (topP < 1) filterTopP(kept, order, topP);
  }
  if (minP > 0) cutBelow(kept, Math.fround(Math.log(minP))); // the largest is 0
  return kept;
}

/** Keep the fewest of the likeliest tokens that have the probability p together. */
function filterTopP(logits, order, p) {
  const probabilities = computeSoftmax(logits);
  let before = 0; // probability of all likelier tokens
  for (const token of order) {
    if (before >= p && before > 0) logits[token] = -Infinity;
    before += probabilities[token];
  }
}

function cutBelow(logits, smallest) {
  for (let v = 0; v < logits.length; v++) if (logits[v] < smallest) logits[v] = -Infinity;
}

/** Return the token at which the cumulative distribution of the logits passes `draw`. */
export function chooseToken(logits, draw) {
  const cdf = new Float32Array(logits.length);
  let total = 0;
  computeSoftmax(logits).forEach((probability, v) => (cdf[v] = total += probability));
  // Rounding must not carry a draw past the end, to tokens of probability 0.
  const target = Math.fround(Math.min(draw, 1 - 2 ** -20) * cdf.at(-1));
  let token = 0;
  while (cdf[token] <= target) token++;
  return token;
}

/** Return the likeliest tokens in descending order: [[id, probability], …]. */
export function listLikeliest(logits, number) {
  const best = [];
  for (let v = 0; v < logits.length; v++) {
    if (best.length === number && logits[v] <= logits[best[number - 1]]) continue;
    let place = best.length;
    while (place > 0 && logits[best[place - 1]] < logits[v]) place--;
    best.splice(place, 0, v);
    best.length = Math.min(best.length, number);
  }
  return best.map((id) => [id, Math.exp(computeLogProbability(logits, id))]);
}

/** Return the log-probability of a token, in nats. */
export function computeLogProbability(logits, token) {
  const { value: largest } = findLargest(logits);
  let total = 0;
  for (let v = 0; v < logits.length; v++) total += Math.exp(logits[v] - largest);
  return logits[token] - largest - Math.log(total);
}
