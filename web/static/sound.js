// @ts-check
/** Microphone and loudspeaker, over one AudioContext at the device's own rate. */

import { capture } from "./device.js";

export const INPUT_RATE = 16_000; // samples a second that are sent: the model's own rate, so that nothing is resampled twice
export const OUTPUT_RATE = 24_000; // samples a second that come

const LOOK = 250; // milliseconds between two looks at the clock of the sound
const STILL = 8; // looks in a row at which it has not moved: they are counted, as a busy page looks late
// Firefox 153 with PulseAudio stopped for good in three of four runs when its latency was asked while a worklet played.
const LATENCY_IS_SAFE = !navigator.userAgent.includes("Firefox");

/**
 * The browser's audio clock, which microphone and loudspeaker share. Without a sound device, or where autoplay is blocked, it
 * stands still: nothing is played then, and nothing is heard.
 */
export class BrowserAudio {
  running = true; // as far as is known
  #still = 0;
  #time = -1;

  /** @param {AudioContext} context @param {(running: boolean) => void} changed */
  constructor(context, changed) {
    this.context = context;
    this.changed = changed;
    this.timer = setInterval(() => this.#look(), LOOK);
  }

  /** In a click, or nothing may be played. @param {(running: boolean) => void} changed */
  static async open(changed) {
    const audio = new BrowserAudio(new AudioContext({ latencyHint: "interactive" }), changed); // no rate of ours: Firefox then refuses the microphone
    try {
      await audio.context.audioWorklet.addModule("worklets.js");
    } catch (error) {
      void audio.close();
      throw error;
    }
    void audio.context.resume();
    return audio;
  }

  #look() {
    const { currentTime } = this.context;
    this.#still = currentTime > this.#time ? 0 : this.#still + 1;
    this.#time = currentTime;
    const running = this.#still < STILL;
    if (running === this.running) return;
    this.running = running;
    this.changed(running);
  }

  async close() {
    clearInterval(this.timer);
    if (this.context.state !== "closed") await this.context.close();
  }
}

export class MicrophoneInput {
  /** @type {MediaStream | null} */ stream = null;
  /** @type {MediaStreamAudioSourceNode | null} */ #source = null;
  #muted = false;

  /**
   * @param {BrowserAudio} audio
   * @param {{frame: (pcm: Int16Array, level: number, at: number) => void, lost: () => void}} on `at`: context time
   */
  constructor(audio, on) {
    this.audio = audio;
    this.on = on;
    this.node = new AudioWorkletNode(audio.context, "capture", {
      numberOfOutputs: 0,
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { rate: INPUT_RATE },
    });
    this.node.port.onmessage = ({ data }) => on.frame(data.pcm, data.level, data.at);
  }

  /** @param {string} device "" for the usual one @param {boolean} echo whether the loudspeaker is to be cancelled out */
  async use(device, echo) {
    const processing = { echoCancellation: echo, noiseSuppression: echo, autoGainControl: echo };
    const stream = await capture("audio", device, { channelCount: 1, ...processing });
    this.close();
    this.stream = stream;
    this.muted = this.#muted;
    this.#source = this.audio.context.createMediaStreamSource(stream);
    this.#source.connect(this.node);
    stream.getAudioTracks()[0]?.addEventListener("ended", () => stream === this.stream && this.on.lost());
  }

  /** A muted microphone goes on giving silence, by which the server sees that a sentence is over. */
  set muted(/** @type {boolean} */ muted) {
    this.#muted = muted;
    for (const track of this.stream?.getAudioTracks() ?? []) track.enabled = !muted;
  }

  close() {
    this.#source?.disconnect();
    this.stream?.getTracks().forEach((track) => track.stop());
    this.#source = this.stream = null;
  }
}

export class SpeakerOutput {
  #epoch = 0;
  /** What reached the ear: of `item` so many milliseconds. */
  played = { item: "", ms: 0 };
  idle = true;

  /**
   * @param {BrowserAudio} audio
   * @param {{played: (item: string, ms: number, level: number, idle: boolean) => void, first: (item: string, at: number) => void}} on
   */
  constructor(audio, on) {
    this.context = audio.context;
    this.node = new AudioWorkletNode(audio.context, "playback", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { rate: OUTPUT_RATE },
    });
    this.node.connect(audio.context.destination);
    this.node.port.onmessage = ({ data }) => {
      if (data.first !== undefined) return on.first(data.item, data.first);
      const ms = Math.max(0, (data.sample * 1000) / OUTPUT_RATE - (data.idle ? 0 : this.latency));
      this.played = { item: data.item, ms };
      this.idle = data.idle;
      on.played(data.item, ms, data.level, data.idle);
    };
  }

  /** Milliseconds from the page to the ear, as far as the browser knows. */
  get latency() {
    return ((LATENCY_IS_SAFE && this.context.outputLatency) || this.context.baseLatency || 0) * 1000;
  }

  /** @param {string} item @param {number} from sample of the item @param {Int16Array<ArrayBuffer>} pcm */
  play(item, from, pcm) {
    this.idle = false;
    this.node.port.postMessage({ epoch: this.#epoch, item, from, pcm }, [pcm.buffer]);
  }

  /** Silence, at once. */
  flush() {
    this.idle = true;
    this.node.port.postMessage({ flush: ++this.#epoch });
  }

  /** @param {string} device */
  async use(device) {
    const context = /** @type {AudioContext & {setSinkId?: (id: string) => Promise<void>}} */ (this.context);
    await context.setSinkId?.(device);
  }
}

export const CHOOSES_SPEAKER = "AudioContext" in globalThis && "setSinkId" in AudioContext.prototype;

/** @param {Int16Array} pcm @returns {string} base64 of little-endian samples, as every browser's machine has them */
export function encode(pcm) {
  return btoa(String.fromCharCode(...new Uint8Array(pcm.buffer, pcm.byteOffset, pcm.byteLength)));
}

/** @param {string} text @returns {Int16Array<ArrayBuffer>} */
export function decode(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Int16Array(bytes.buffer, 0, bytes.length >> 1);
}
