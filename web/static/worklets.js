// @ts-check
/**
 * Sound in and out, in the audio thread: `capture` makes frames of 40 ms of what the microphone gives, `playback` plays what
 * the server sends. One file without imports, as not every browser lets a worklet import.
 */

const FRAME = 640; // samples of a frame: 40 ms, one position of the model
const PHASES = 256;
const PREFILL = 0.06; // seconds that are there before playing begins
const PATIENCE = 0.15; // seconds after which what is there is played, however little
const GROWTH = 0.04; // seconds more after sound came too late
const LONGEST = 0.24;
const LATE = 0.25; // seconds: a longer silence is a pause, and no jitter
const FADE = 0.005; // seconds in which a flush falls silent, or it clicks
const LOUD = 0.004; // of full scale: what is heard as sound
const REPORT = 0.05; // seconds

/** A stream from one rate to another, by a windowed sinc of twelve crossings on either side (under 1 ms of delay). */
class SincResampler {
  /** @param {number} from @param {number} to samples a second */
  constructor(from, to) {
    const scale = Math.min(1, to / from) * 0.94;
    this.step = from / to;
    this.half = Math.ceil(12 / scale);
    this.past = new Float32Array(this.half);
    this.at = this.half;
    this.rows = Array.from({ length: PHASES + 1 }, (_, row) =>
      Float32Array.from({ length: 2 * this.half }, (_, tap) => {
        const x = tap - this.half + 1 - row / PHASES;
        if (Math.abs(x) >= this.half) return 0;
        const sinc = x === 0 ? 1 : Math.sin(Math.PI * x * scale) / (Math.PI * x * scale);
        return scale * sinc * (0.5 + 0.5 * Math.cos((Math.PI * x) / this.half));
      }),
    );
  }

  /** @param {Float32Array} input @returns {Float32Array} */
  push(input) {
    if (this.step === 1) return input.slice();
    const { half, step, rows, past } = this;
    const all = new Float32Array(past.length + input.length);
    all.set(past);
    all.set(input, past.length);
    const out = new Float32Array(Math.max(0, Math.ceil((all.length - half - this.at) / step)) + 1);
    let count = 0;
    for (; this.at + half < all.length; this.at += step) {
      const base = Math.floor(this.at);
      const row = /** @type {Float32Array} */ (rows[Math.round((this.at - base) * PHASES)]);
      let sum = 0;
      for (let tap = 0, place = base - half + 1; tap < row.length; tap++, place++) {
        sum += /** @type {number} */ (row[tap]) * /** @type {number} */ (all[place]);
      }
      out[count++] = sum;
    }
    const gone = Math.max(0, Math.floor(this.at) - half);
    this.past = all.slice(gone);
    this.at -= gone;
    return out.subarray(0, count);
  }
}

/** Out: `{pcm, level, at}`: a frame as Int16 at the rate that is sent, its loudest sample, and when it was complete (context time). */
class CaptureProcessor extends AudioWorkletProcessor {
  /** @param {{processorOptions: {rate: number}}} options */
  constructor(options) {
    super();
    this.resampler = new SincResampler(sampleRate, options.processorOptions.rate);
    this.frame = new Int16Array(FRAME);
    this.filled = 0;
    this.level = 0;
  }

  /** @param {Float32Array[][]} inputs */
  process(inputs) {
    const sound = inputs[0]?.[0]; // the node mixes down to one channel
    if (!sound) return true; // nothing is connected at the moment
    for (const sample of this.resampler.push(sound)) {
      const clamped = Math.max(-1, Math.min(1, sample)) || 0; // NaN is silence
      this.level = Math.max(this.level, Math.abs(clamped));
      this.frame[this.filled++] = clamped * 32767;
      if (this.filled === FRAME) this.emit();
    }
    return true;
  }

  emit() {
    const { frame: pcm, level } = this;
    this.port.postMessage({ pcm, level, at: currentTime }, [pcm.buffer]);
    this.frame = new Int16Array(FRAME);
    this.filled = this.level = 0;
  }
}

/**
 * In: `{epoch, item, from, pcm}`: sound of an item, beginning at its sample `from`; `{flush: epoch}`: nothing of earlier epochs
 * is played any more. Out: `{item, sample, level, idle}`: so much of the item was played; `{item, first}`: when its first sound
 * was (context time).
 */
class PlaybackProcessor extends AudioWorkletProcessor {
  /** @param {{processorOptions: {rate: number}}} options */
  constructor(options) {
    super();
    this.rate = options.processorOptions.rate;
    this.resampler = new SincResampler(this.rate, sampleRate);
    /** @type {{item: string, from: number, pcm: Float32Array, at: number}[]} */
    this.queue = [];
    this.tail = new Float32Array(0); // of what was flushed
    this.epoch = 0;
    this.playing = false;
    this.prefill = PREFILL;
    this.waiting = 0; // frames since the first sound that waits
    this.dry = 0; // frames since the last sound
    this.item = "";
    this.sample = 0;
    this.sounded = "";
    this.level = 0;
    this.sinceReport = 0;
    this.port.onmessage = ({ data }) => (data.flush === undefined ? this.take(data) : this.flush(data.flush));
  }

  /** @param {{epoch: number, item: string, from: number, pcm: Int16Array}} data */
  take({ epoch, item, from, pcm }) {
    if (epoch !== this.epoch) return;
    const sound = this.resampler.push(Float32Array.from(pcm, (sample) => sample / 32768));
    if (!this.playing && !this.queue.length) {
      if (item === this.item && this.dry < LATE * sampleRate) this.prefill = Math.min(LONGEST, this.prefill + GROWTH);
      if (item !== this.item) this.prefill = PREFILL;
      this.waiting = 0;
    }
    this.queue.push({ item, from, pcm: sound, at: 0 });
  }

  /** @param {number} epoch */
  flush(epoch) {
    const fading = new Float32Array(Math.round(FADE * sampleRate));
    if (this.playing) fading.forEach((_, n) => (fading[n] = this.next() * (1 - n / fading.length)));
    this.tail = fading;
    this.epoch = epoch;
    this.queue = [];
    this.playing = false;
    this.resampler = new SincResampler(this.rate, sampleRate);
    this.report();
  }

  /** @returns {number} the next sample; 0 where there is none */
  next() {
    const head = this.queue[0];
    if (!head) return 0;
    const sample = head.pcm[head.at++] ?? 0;
    this.item = head.item;
    this.sample = head.from + Math.round((head.at * this.rate) / sampleRate);
    if (head.at >= head.pcm.length) this.queue.shift();
    return sample;
  }

  /** @param {Float32Array[][]} _ @param {Float32Array[][]} outputs */
  process(_, outputs) {
    const out = /** @type {Float32Array} */ (outputs[0]?.[0]);
    if (!this.playing && this.queue.length) {
      const there = this.queue.reduce((sum, { pcm }) => sum + pcm.length, 0);
      this.waiting += out.length;
      this.playing = there >= this.prefill * sampleRate || this.waiting > PATIENCE * sampleRate;
    }
    for (let n = 0; n < out.length; n++) {
      if (this.playing && !this.queue.length) {
        this.playing = false;
        this.report();
      }
      const sample = this.playing ? this.next() : 0;
      const heard = sample + (this.tail[n] ?? 0);
      this.dry = this.playing ? 0 : this.dry + 1;
      this.level = Math.max(this.level, Math.abs(heard));
      if (Math.abs(sample) > LOUD && this.sounded !== this.item) {
        this.sounded = this.item;
        this.port.postMessage({ item: this.item, first: currentTime + n / sampleRate });
      }
      out[n] = heard;
    }
    this.tail = this.tail.subarray(out.length);
    this.sinceReport += out.length;
    if (this.playing && this.sinceReport >= REPORT * sampleRate) this.report();
    return true;
  }

  report() {
    this.port.postMessage({ item: this.item, sample: this.sample, level: this.level, idle: !this.playing });
    this.sinceReport = this.level = 0;
  }
}

registerProcessor("capture", CaptureProcessor);
registerProcessor("playback", PlaybackProcessor);
