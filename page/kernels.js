// Matrix products, which take most of the time: in WebAssembly's vector instructions (kernels.wat)
// or, in a browser without them, in JavaScript. Both multiply in the same order.

/**
 * Compute dot products: y[i * yStride] = x · rows[i * rowStride …], for i below count.
 *
 * x is (K,); rows holds count vectors of K numbers, rowStride apart. All are Float32Array.
 */
export function multiplyInJavaScript(x, rows, y, count, rowStride, yStride) {
  const K = x.length;
  const whole = K - (K % 4);
  for (let i = 0; i < count; i++) {
    const start = i * rowStride;
    let sum0 = 0,
      sum1 = 0,
      sum2 = 0,
      sum3 = 0;
    for (let k = 0; k < whole; k += 4) {
      sum0 += x[k] * rows[start + k];
      sum1 += x[k + 1] * rows[start + k + 1];
      sum2 += x[k + 2] * rows[start + k + 2];
      sum3 += x[k + 3] * rows[start + k + 3];
    }
    let sum = sum0 + sum1 + (sum2 + sum3);
    for (let k = whole; k < K; k++) sum += x[k] * rows[start + k];
    y[i * yStride] = sum;
  }
}

/** Memory for the arrays of one model, and the product of those arrays. */
export class Kernels {
  /**
   * Reserve memory for `size` numbers.
   *
   * `wasm` is kernels.wasm, a Uint8Array, or null for JavaScript alone.
   */
  static async create(wasm, size) {
    if (wasm && typeof WebAssembly === "object" && WebAssembly.validate(wasm)) {
      const bytes = 4 * size;
      const memory = new WebAssembly.Memory({ initial: Math.ceil(bytes / 65536) });
      const { instance } = await WebAssembly.instantiate(wasm, { page: { memory } });
      return new Kernels(memory.buffer, instance.exports);
    }
    return new Kernels(new ArrayBuffer(4 * size), null);
  }

  /** wasm: the functions of kernels.wat, or null. */
  constructor(buffer, wasm) {
    this.buffer = buffer;
    this.used = 0; // bytes
    this.hasHalves = wasm !== null;
    if (wasm) {
      const { multiply, multiply_halves } = wasm;
      // The rows are float16 numbers, a Uint16Array without gaps; K is a multiple of 8.
      this.multiplyHalves = (x, rows, y, count) =>
        multiply_halves(x.byteOffset, rows.byteOffset, y.byteOffset, count, x.length);
      this.multiply = (x, rows, y, count, rowStride, yStride) =>
        multiply(
          x.byteOffset,
          rows.byteOffset,
          y.byteOffset,
          count,
          x.length,
          4 * rowStride,
          4 * yStride,
        );
    } else {
      this.multiply = multiplyInJavaScript;
    }
  }

  /** Return an array of `size` zeros in the reserved memory, of float16 numbers if `isHalf`. */
  allocate(size, isHalf = false) {
    const array = new (isHalf ? Uint16Array : Float32Array)(this.buffer, this.used, size);
    this.used += 4 * Math.ceil(array.byteLength / 4);
    return array;
  }
}
