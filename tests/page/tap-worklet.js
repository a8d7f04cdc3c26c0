// Of two channels: their samples in turns, 100 ms at a time.
registerProcessor(
  "tap",
  class extends AudioWorkletProcessor {
    #piece = new Float32Array(0);
    #filled = 0;

    process([[left, right]]) {
      for (let n = 0; n < (left?.length ?? 0); n++) {
        if (!this.#piece.length) this.#piece = new Float32Array(2 * Math.round(sampleRate / 10));
        this.#piece[this.#filled++] = left[n];
        this.#piece[this.#filled++] = right?.[n] ?? 0;
        if (this.#filled < this.#piece.length) continue;
        this.port.postMessage(this.#piece, [this.#piece.buffer]);
        this.#piece = new Float32Array(0);
        this.#filled = 0;
      }
      return true;
    }
  },
);
