// @ts-check
/** The camera: what it shows, and frames of it as JPEG. */

import { capture } from "./device.js";

const LARGEST = 960; // pixels of a frame's longer side: more than the model looks at
const QUALITY = 0.85;

/** @typedef {{id: string, data: string, url: string, width: number, height: number}} Frame `data`: as data: URI; `url`: to show */

export class Webcam {
  /** @type {MediaStream | null} */ stream = null;

  /** @param {HTMLVideoElement} video @param {() => void} lost */
  constructor(video, lost) {
    this.video = video;
    this.lost = lost;
  }

  /** @param {string} device "" for the one on the back of a telephone, or the usual one */
  async use(device) {
    const wanted = { facingMode: "environment", width: { ideal: 1280 }, height: { ideal: 960 } };
    const stream = await capture("video", device, wanted);
    this.close();
    this.stream = stream;
    stream.getVideoTracks()[0]?.addEventListener("ended", () => stream === this.stream && this.lost());
    this.video.srcObject = stream;
    await this.video.play();
  }

  close() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    this.video.srcObject = null;
  }

  /** @returns {Promise<Frame | null>} what it shows now; null as long as it shows nothing */
  async frame() {
    const { video, stream } = this;
    if (!stream || !video.videoWidth) return null;
    return still(video, video.videoWidth, video.videoHeight);
  }
}

let count = 0;

/**
 * @param {CanvasImageSource} source @param {number} width @param {number} height
 * @returns {Promise<Frame>}
 */
export async function still(source, width, height) {
  const scale = Math.min(1, LARGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d")?.drawImage(source, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", QUALITY));
  if (!(blob instanceof Blob)) throw new Error("the picture cannot be made a JPEG here");
  const data = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(String(reader.result));
    reader.readAsDataURL(blob);
  });
  return { id: `frame_${Date.now()}_${++count}`, data, url: URL.createObjectURL(blob), width: canvas.width, height: canvas.height };
}

/** @param {Blob} file @returns {Promise<Frame>} a picture of the user's; throws a sentence where it is none */
export async function read(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
    return await still(image, image.naturalWidth, image.naturalHeight);
  } catch {
    throw new Error("This file is no picture that your browser can read.");
  } finally {
    URL.revokeObjectURL(image.src);
  }
}
