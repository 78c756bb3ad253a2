// The page's side of the worker: calls, and the same without a worker.

import { Engine } from "./worker.js";

/** Calls commands of worker.js in a worker, or on this thread if the browser allows none. */
export class Client {
  /** code: the text of the engine's script. wasm: kernels.wasm, a Uint8Array. */
  constructor(code, wasm) {
    this.calls = new Map(); // by id: { name, args, options, resolve, reject }
    this.nextId = 0;
    this.wasm = wasm;
    try {
      const url = URL.createObjectURL(
        new Blob([code, "\nserve(self);"], { type: "text/javascript" }),
      );
      this.worker = new Worker(url);
      this.worker.onmessage = ({ data }) => this.receive(data);
      this.worker.onerror = () => this.runHere();
      this.worker.postMessage({ wasm });
    } catch {
      this.runHere(); // no workers
    }
  }

  /** Run commands on this thread from now on, those that wait for an answer included. */
  runHere() {
    this.worker?.terminate();
    this.worker = null;
    this.engine = new Engine(this.wasm);
    for (const id of this.calls.keys()) this.start(id);
  }

  /**
   * Call a command. `onPart` is called with parts of the result; `signal`, an AbortSignal, stops it
   * at its next part.
   *
   * Returns a promise of the result, which fails with an Error.
   */
  call(name, args, { onPart, signal } = {}) {
    const id = this.nextId++;
    return new Promise((resolve, reject) => {
      this.calls.set(id, { name, args, onPart, signal, resolve, reject });
      signal?.addEventListener("abort", () => {
        if (this.calls.has(id)) this.worker?.postMessage({ id, cancel: true });
      });
      this.start(id);
    });
  }

  async start(id) {
    const { name, args, signal } = this.calls.get(id);
    if (this.worker) {
      this.worker.postMessage({ id, name, args });
      return;
    }
    const call = {
      report: (part) => this.receive({ id, part }),
      isCancelled: () => Boolean(signal?.aborted),
    };
    try {
      this.receive({ id, result: await this.engine.run(name, args, call) });
    } catch (error) {
      this.receive({ id, error: error.message });
    }
  }

  receive(message) {
    const { id } = message;
    const call = this.calls.get(id);
    if (!call) return;
    if ("part" in message) {
      if (!call.signal?.aborted) call.onPart?.(message.part);
      return;
    }
    this.calls.delete(id);
    if ("error" in message) call.reject(new Error(message.error));
    else call.resolve(message.result);
  }
}
