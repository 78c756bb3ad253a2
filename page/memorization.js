// Stretches of a text that stand verbatim in the training text, found by hashes of it alone.

import { decodeBase64 } from "./base64.js";

/** Return the hash of the `length` UTF-16 code units from `start`: a polynomial, then the finalizer
 * of MurmurHash3. */
export function hashUnits(text, start, length) {
  let hash = 0;
  for (let i = start; i < start + length; i++) {
    hash = (Math.imul(hash, 0x01000193) + text.charCodeAt(i)) | 0;
  }
  hash ^= hash >>> 16;
  hash = Math.imul(hash, 0x85ebca6b);
  hash ^= hash >>> 13;
  hash = Math.imul(hash, 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

/** Return the set of the hashes: sorted, their differences as LEB128 numbers in base64. */
export function decodeHashes(base64) {
  const hashes = new Set();
  let hash = 0,
    difference = 0,
    shift = 0;
  for (const byte of decodeBase64(base64)) {
    difference += (byte & 0x7f) * 2 ** shift;
    shift += 7;
    if (byte < 0x80) {
      hashes.add((hash += difference));
      difference = shift = 0;
    }
  }
  return hashes;
}

/**
 * Return the stretches of a text that stand in the training text: [{ start, stop, isCopy }, …].
 *
 * hashes: of the stretches of `length` code units at every `stride`-th place of the training text.
 * Two matches that are `stride` apart are one copy, with what is between them.
 */
export function findStretches(text, hashes, { length, stride }) {
  const matches = new Set();
  for (let start = 0; start + length <= text.length; start++) {
    if (hashes.has(hashUnits(text, start, length))) matches.add(start);
  }
  const stretches = Array.from(matches, (match) => {
    const isCopy = matches.has(match - stride);
    return { start: isCopy ? match - stride : match, stop: match + length, isCopy };
  });
  return mergeOverlaps(stretches.sort((a, b) => a.start - b.start));
}

/** Merge stretches that overlap; the result is a copy if one of them is. */
function mergeOverlaps(stretches) {
  const merged = [];
  for (const stretch of stretches) {
    const last = merged.at(-1);
    if (last && stretch.start <= last.stop) {
      last.stop = Math.max(last.stop, stretch.stop);
      last.isCopy ||= stretch.isCopy;
    } else merged.push(stretch);
  }
  return merged;
}
