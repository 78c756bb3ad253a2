// Weights: the tensors of a safetensors file (github.com/huggingface/safetensors) as float32.

const BYTES = { F32: 4, F16: 2, I8: 1 }; // of a number of each dtype
const MAX_HEADER = 10_000_000; // bytes

/**
 * Return the tensors of a safetensors file by name: Map of { dtype, shape, bytes }.
 *
 * Throws an Error if the file is cut off or its header is not valid.
 */
export function readSafetensors(file) {
  if (file.length < 8) throw new Error("the weights are cut off");
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = Number(view.getBigUint64(0, true));
  if (length > MAX_HEADER || 8 + length > file.length) throw new Error("the weights are cut off");
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, 8 + length)));
  const content = file.subarray(8 + length);
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [start, end] = offsets;
    const bytes = content.subarray(start, end);
    const size = shape.reduce((product, length) => product * length, 1);
    if (bytes.length !== end - start) throw new Error("the weights are cut off");
    if (!(dtype in BYTES) || bytes.length !== size * BYTES[dtype]) {
      throw new Error(`${name} is not a tensor of ${dtype} ${shape}`);
    }
    tensors.set(name, { dtype, shape, bytes });
  }
  return tensors;
}

/**
 * Write the numbers of a tensor into a Float32Array of its size, or those of a float16 tensor into
 * a Uint16Array. `scale` is a tensor, one number a row, that int8 numbers are multiplied by.
 */
export function decodeTensor({ dtype, shape, bytes }, target, scale) {
  const aligned = bytes.slice().buffer; // a view of wider numbers needs an aligned start
  if (target instanceof Uint16Array) target.set(new Uint16Array(aligned));
  else if (dtype === "F32") target.set(new Float32Array(aligned));
  else if (dtype === "F16") decodeHalves(new Uint16Array(aligned), target);
  else {
    const numbers = new Int8Array(aligned);
    const columns = shape[1];
    if (scale?.dtype !== "F32" || scale.shape.join() !== `${shape[0]}`) {
      throw new Error("a tensor of int8 has no scales");
    }
    const factors = new Float32Array(scale.bytes.slice().buffer);
    for (let i = 0; i < numbers.length; i++)
      target[i] = numbers[i] * factors[Math.floor(i / columns)];
  }
}

/** Convert float16 numbers, a Uint16Array, to float32. */
export function decodeHalves(halves, target) {
  for (let i = 0; i < halves.length; i++) {
    const sign = halves[i] & 0x8000 ? -1 : 1;
    const exponent = (halves[i] >> 10) & 0x1f;
    const fraction = halves[i] & 0x3ff;
    if (exponent === 0)
      target[i] = sign * fraction * 2 ** -24; // subnormal
    else if (exponent === 31) target[i] = fraction ? NaN : sign * Infinity;
    else target[i] = sign * (1 + fraction / 1024) * POWERS[exponent];
  }
  return target;
}

const POWERS = Array.from({ length: 32 }, (_, exponent) => 2 ** (exponent - 15));
