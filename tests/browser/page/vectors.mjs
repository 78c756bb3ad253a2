// What the unit tests share: Python's vectors, and comparisons.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

/** Return the vectors that test_page_units.py wrote under a name. */
export function readVectors(name) {
  return JSON.parse(readFileSync(`${process.env.FOLIO_VECTORS}/${name}.json`, "utf-8"));
}

/** The two ways to multiply: kernels.wasm, and JavaScript. */
export const PROGRAMS = {
  WebAssembly: readFileSync(new URL("../../../page/kernels.wasm", import.meta.url)),
  JavaScript: null,
};

/** Assert that numbers differ by at most `tolerance`, relative to those above 1. */
export function assertClose(found, expected, tolerance = 1e-5) {
  assert.equal(found.length, expected.length);
  for (let i = 0; i < found.length; i++) {
    const difference = Math.abs(found[i] - expected[i]);
    const isClose = difference <= tolerance * Math.max(1, Math.abs(expected[i]));
    assert.ok(isClose, `${found[i]} at ${i}, not ${expected[i]}`);
  }
}
