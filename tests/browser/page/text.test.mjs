// tokenizer.js, sampling.js, weights.js and memorization.js.

import assert from "node:assert/strict";
import { test } from "node:test";
import { decodeBase64 } from "../../../page/base64.js";
import { decodeHashes, findStretches, hashUnits } from "../../../page/memorization.js";
import { MersenneTwister, chooseToken, filterLogits } from "../../../page/sampling.js";
import { createTokenizer } from "../../../page/tokenizer.js";
import { decodeTensor, readSafetensors } from "../../../page/weights.js";
import { assertClose, readVectors } from "./vectors.mjs";

test("random numbers are those of numpy", () => {
  for (const [seed, draws] of Object.entries(readVectors("draws"))) {
    const random = new MersenneTwister(Number(seed));
    assert.deepEqual(
      draws.map(() => random.draw()),
      draws,
    );
  }
});

test("temperature and filters keep the tokens that PyTorch keeps", () => {
  for (const { logits, sampling, kept } of readVectors("samples")) {
    const found = filterLogits(Float32Array.from(logits), sampling);
    const words = JSON.stringify(sampling);
    assert.deepEqual(
      Array.from(found, (value) => value === -Infinity),
      kept.map((value) => value === null),
      words,
    );
    assertClose(
      found.filter((value) => value !== -Infinity),
      kept.filter((value) => value !== null),
      1e-6,
    );
  }
});

test("a draw chooses the token that PyTorch chooses", () => {
  for (const { logits, sampling, draws, tokens } of readVectors("samples")) {
    const kept = filterLogits(Float32Array.from(logits), sampling);
    assert.deepEqual(
      draws.map((draw) => chooseToken(kept, draw)),
      tokens,
      JSON.stringify(sampling),
    );
  }
});

for (const { data, texts, sizes } of readVectors("tokenizers")) {
  const tokenizer = createTokenizer(data);

  test(`ids of tricky texts: ${data.kind}`, () => {
    for (const { text, ids } of texts)
      assert.deepEqual(Array.from(tokenizer.encode(text)), ids, text);
  });

  test(`ids back to text, whole and token by token: ${data.kind}`, () => {
    for (const { ids, decoded } of texts) {
      assert.equal(tokenizer.decode(ids), decoded);
      assert.equal(tokenizer.split(ids).join(""), decoded);
      assert.equal(tokenizer.split(ids).length, ids.length);
    }
  });

  test(`unknown characters: ${data.kind}`, () => {
    for (const { text, unknown } of texts) assert.deepEqual(tokenizer.findUnknown(text), unknown);
  });

  test(`the bytes of each token: ${data.kind}`, () => {
    assert.deepEqual(
      sizes.map((_, id) => tokenizer.countBytes(id)),
      sizes,
    );
  });

  test(`a label is visible, and is there for each token: ${data.kind}`, () => {
    for (let id = 0; id < sizes.length; id++)
      assert.match(tokenizer.label(id), /^[^\p{C}\p{Z}]+$/u);
  });
}

test("a character that is cut by the end becomes U+FFFD, as in Python", () => {
  const tokenizer = createTokenizer(
    readVectors("tokenizers").find(({ data }) => data.kind === "bpe").data,
  );
  const ids = Array.from(new TextEncoder().encode("a👍")); // the bytes have the first ids
  assert.equal(tokenizer.decode(ids.slice(0, -1)), "a\ufffd");
});

test("all float16 numbers", () => {
  const bits = readVectors("halves");
  const bytes = new Uint8Array(Uint16Array.from(bits, (_, half) => half).buffer);
  const found = new Float32Array(bits.length);
  decodeTensor({ dtype: "F16", shape: [bits.length], bytes }, found);
  const expected = new Float32Array(Uint32Array.from(bits).buffer);
  const wrong = Array.from(found.keys()).filter((i) => !Object.is(found[i], expected[i]));
  assert.deepEqual(wrong.map((half) => half.toString(16)).slice(0, 5), []);
});

test("int8 numbers, times the scales of their rows", () => {
  const bytes = new Uint8Array(Int8Array.from([-127, 0, 127, 1, 2, 3]).buffer);
  const scale = {
    dtype: "F32",
    shape: [2],
    bytes: new Uint8Array(Float32Array.from([0.1, 0.3]).buffer),
  };
  const found = new Float32Array(6);
  decodeTensor({ dtype: "I8", shape: [2, 3], bytes }, found, scale);
  const expected = [-127, 0, 127, 1, 2, 3].map((value, i) =>
    Math.fround(value * Math.fround(i < 3 ? 0.1 : 0.3)),
  );
  assert.deepEqual(
    Array.from(found, (value) => value + 0),
    expected.map((value) => value + 0),
  );
});

/** Return a safetensors file: header, an object, and content, bytes. */
function createFile(header, content) {
  const text = new TextEncoder().encode(JSON.stringify(header));
  const file = new Uint8Array(8 + text.length + content);
  new DataView(file.buffer).setBigUint64(0, BigInt(text.length), true);
  file.set(text, 8);
  return file;
}

test("a safetensors file is read, and one that is cut or forged is refused", () => {
  const header = { __metadata__: {}, a: { dtype: "F32", shape: [2], data_offsets: [0, 8] } };
  assert.equal(readSafetensors(createFile(header, 8)).get("a").bytes.length, 8);
  const file = createFile(header, 8);
  for (let size = 0; size < file.length; size++)
    assert.throws(() => readSafetensors(file.subarray(0, size)));
  for (const change of [
    { shape: [3] },
    { dtype: "F64" },
    { dtype: "F16" },
    { data_offsets: [0, 80] },
    { data_offsets: [8, 0] },
  ]) {
    assert.throws(
      () => readSafetensors(createFile({ a: { ...header.a, ...change } }, 8)),
      JSON.stringify(change),
    );
  }
});

test("base64 is decoded with and without the browser's own function", () => {
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
  const own = Uint8Array.fromBase64;
  for (const each of [own, undefined, () => bytes]) {
    Uint8Array.fromBase64 = each;
    assert.deepEqual(decodeBase64(Buffer.from(bytes).toString("base64")), bytes);
  }
  if (own) Uint8Array.fromBase64 = own;
  else delete Uint8Array.fromBase64;
});

test("hashes of stretches are those of numpy", () => {
  const { text, hashes, data } = readVectors("memorization");
  assert.deepEqual(
    hashes.map((_, start) => hashUnits(text, start, data.length)),
    hashes,
  );
  const decoded = decodeHashes(data.hashes);
  assert.equal(decoded.size, data.count);
  assert.deepEqual(decoded, new Set([...hashes].sort((a, b) => a - b)));
});

test("a copied stretch is found, where it begins and ends", () => {
  const { text, data } = readVectors("memorization");
  const hashes = decodeHashes(data.hashes);
  const copied = text.slice(10, 50);
  const find = (each) =>
    findStretches(each, hashes, data).map(({ start, stop, isCopy }) => [start, stop, isCopy]);
  assert.deepEqual(find(`#####${copied}#####`), [[5, 45, true]]);
  assert.deepEqual(find(`${copied}#${copied}`), [
    [0, 40, true],
    [41, 81, true],
  ]);
  assert.deepEqual(find(text.slice(10, 10 + data.length)), [[0, data.length, false]]);
  assert.deepEqual(find(text.slice(10, 9 + data.length)), []);
  assert.deepEqual(find("the quick brown fox jumps over the lazy dog"), []);
});
