// model.js and kernels.js, part by part.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Kernels } from "../../../page/kernels.js";
import {
  ACTIVATIONS,
  LanguageModel,
  computeExp,
  countNumbers,
  listTensors,
} from "../../../page/model.js";
import { decodeHalves } from "../../../page/weights.js";
import { PROGRAMS, assertClose, readVectors } from "./vectors.mjs";

const SPARE = 10_000; // numbers for the inputs and outputs of tests
const MODELS = readVectors("models");

/** Load a model of the vectors, and return it with a function that copies numbers to its memory. */
async function loadModel({ config, V, tensors }, program) {
  const kernels = await Kernels.create(program, countNumbers(config, V) + SPARE);
  assert.equal(kernels.hasHalves, program !== null);
  const model = new LanguageModel(config, V, kernels, (name, shape, target) =>
    target.set(tensors[name]),
  );
  const put = (numbers) => {
    const array = kernels.allocate(numbers.length);
    array.set(numbers);
    return array;
  };
  return { model, put };
}

/** Define a test for each model, with WebAssembly and without. */
function testModels(promise, check) {
  for (const [name, data] of Object.entries(MODELS)) {
    for (const [way, program] of Object.entries(PROGRAMS)) {
      test(`${promise}: ${name}, ${way}`, async () => check(data, await loadModel(data, program)));
    }
  }
}

for (const [way, program] of Object.entries(PROGRAMS)) {
  test(`products of all lengths, counts and strides: ${way}`, async () => {
    for (const { x, rows, y, count, rowStride, yStride } of readVectors("products")) {
      const size = x.length + rows.length + count * yStride;
      const kernels = await Kernels.create(program, size);
      const [a, b, c] = [x.length, rows.length, count * yStride].map((each) =>
        kernels.allocate(each),
      );
      a.set(x);
      b.set(rows);
      c.fill(7);
      kernels.multiply(a, b, c, count, rowStride, yStride);
      assertClose(
        c.filter((_, i) => i % yStride === 0),
        y,
      );
      assert.ok(
        c.every((value, i) => i % yStride === 0 || value === 7),
        "a number between was written",
      );
    }
  });
}

test("products of float16 rows are those of the same numbers in float32", async () => {
  // All finite float16 numbers, subnormal ones too, in rows of several lengths.
  const halves = Uint16Array.from({ length: 2 ** 16 }, (_, i) => i).filter(
    (half) => (half & 0x7c00) !== 0x7c00,
  );
  for (const K of [8, 24, 128]) {
    const count = Math.floor(halves.length / K);
    const kernels = await Kernels.create(
      PROGRAMS.WebAssembly,
      2 * halves.length + 2 * count + K + 8,
    );
    const rows = kernels.allocate(count * K, true);
    rows.set(halves.subarray(0, count * K));
    const wide = decodeHalves(rows, kernels.allocate(count * K));
    const x = kernels.allocate(K).map((_, k) => Math.sin(k));
    const input = kernels.allocate(K);
    input.set(x);
    const found = kernels.allocate(count);
    kernels.multiplyHalves(input, rows, found, count);
    for (let i = 0; i < count; i++) {
      const row = wide.subarray(i * K, (i + 1) * K);
      const exact = row.reduce((sum, value, k) => sum + value * x[k], 0);
      const size = row.reduce((sum, value, k) => sum + Math.abs(value * x[k]), 0);
      assert.ok(Math.abs(found[i] - exact) <= 1e-6 * size, `${found[i]}, not ${exact}, K = ${K}`);
    }
  }
});

test("both products round in the same way", async () => {
  const kernels = await Kernels.create(PROGRAMS.WebAssembly, SPARE);
  const plain = await Kernels.create(null, SPARE);
  for (const { x, rows, count, rowStride } of readVectors("products")) {
    const results = [kernels, plain].map((each) => {
      each.used = 0;
      const arrays = [x, rows, Array(count).fill(0)].map((values) => {
        const array = each.allocate(values.length);
        array.set(values);
        return array;
      });
      each.multiply(...arrays, count, rowStride, 1);
      return Array.from(arrays[2]);
    });
    assertClose(...results, 1e-6);
  }
});

test("activations are those of PyTorch within float32", () => {
  const { x, ...expected } = readVectors("activations");
  assert.deepEqual(Object.keys(ACTIVATIONS).sort(), Object.keys(expected).sort());
  for (const [name, values] of Object.entries(expected))
    assertClose(x.map(ACTIVATIONS[name]), values, 5e-7);
});

test("e^x is exact to 2e-7, and finite however large x is", () => {
  for (let x = -87; x <= 87; x += 0.013)
    assert.ok(Math.abs(computeExp(x) / Math.exp(x) - 1) < 2e-7, `${x}`);
  assert.equal(computeExp(0), 1);
  for (const x of [-1e9, -Infinity]) assert.ok(computeExp(x) < 1e-37);
  for (const x of [1e9, Infinity]) assert.ok(Number.isFinite(computeExp(x)));
});

test("the tensors of a model are those of PyTorch, in their sizes", () => {
  for (const { config, V, tensors } of Object.values(MODELS)) {
    const sizes = [...listTensors(config, V)].map(([name, shape]) => [
      name,
      shape.reduce((a, b) => a * b, 1),
    ]);
    const expected = Object.entries(tensors).map(([name, numbers]) => [name, numbers.length]);
    assert.deepEqual(sizes.sort(), expected.sort());
  }
});

testModels("the norm", ({ config, x, norm }, { model }) => {
  const input = Float32Array.from(x, (value) => 3 * value + 1);
  const output = new Float32Array(input.length);
  assertClose(model.finalNorm.forward(input, config.block_size, output), norm);
});

testModels("rotary positions with query and key norm", ({ config, qk, rotated }, { model }) => {
  const { block_size: T, n_embd: C, n_head: H, architecture } = config;
  const { rotary } = model.blocks[0].attention;
  if (architecture === "gpt2") return assert.equal(rotary, null);
  const D = C / H;
  const all = Float32Array.from(qk); // (2, T, D)
  for (const kind of [0, 1]) {
    for (let t = 0; t < T; t++) {
      const start = (kind * T + t) * D;
      rotary.apply(all.subarray(start, start + D), kind, t);
    }
  }
  assertClose(all, rotated);
});

testModels("attention, at once and in parts", ({ config, x, attention }, { model, put }) => {
  const { block_size: T, n_embd: C } = config;
  const layer = model.blocks[0].attention;
  const input = put(x);
  assertClose(layer.forward(input, T, 0, put(x)), attention);
  for (const [start, stop] of [
    [0, 4],
    [4, 5],
    [5, T],
  ]) {
    const part = layer.forward(
      input.subarray(start * C, stop * C),
      stop - start,
      start,
      put(x.slice(start * C, stop * C)),
    );
    assertClose(part, attention.slice(start * C, stop * C));
  }
});

testModels(
  "a head that is switched off adds nothing",
  ({ config, x, attention }, { model, put }) => {
    const { block_size: T, n_head: H } = config;
    const layer = model.blocks[0].attention;
    const off = layer.forward(put(x), T, 0, put(x), { isHeadOff: () => true });
    const bias = layer.projection.bias ?? new Float32Array(config.n_embd);
    assertClose(
      off,
      Array.from(off, (_, i) => bias[i % bias.length]),
    );
    const one = layer.forward(put(x), T, 0, put(x), { isHeadOff: (_, head) => head === H - 1 });
    assert.ok(one.some((value, i) => Math.abs(value - attention[i]) > 0.01));
  },
);

testModels("the MLP", ({ config, x, mlp }, { model, put }) => {
  assertClose(model.blocks[0].mlp.forward(put(x), config.block_size, put(x)), mlp, 2e-5);
});

testModels("a block", ({ config, x, block }, { model, put }) => {
  const stream = put(x);
  model.blocks[0].forward(stream, config.block_size, 0);
  assertClose(stream, block, 2e-5);
});

testModels("logits", ({ ids, V, logits }, { model }) => {
  const x = model.forward(ids, 0);
  ids.forEach((_, m) =>
    assertClose(model.computeLogits(x, m), logits.slice(m * V, (m + 1) * V), 2e-5),
  );
});

testModels("logits in parts, after those of another text", ({ ids, V, logits }, { model }) => {
  model.forward(ids.toReversed(), 0);
  for (const [start, stop] of [
    [0, 1],
    [1, 2],
    [2, 5],
    [5, ids.length],
  ]) {
    const x = model.forward(ids.slice(start, stop), start);
    const last = model.computeLogits(x, stop - start - 1);
    assertClose(last, logits.slice((stop - 1) * V, stop * V), 2e-5);
  }
});
