// Put into the page before its own scripts. With `window.recorder`, the source of tap-worklet.js, it records what the microphone
// gives and what is given to the output, side by side, in the audio thread, which loses nothing however busy the page is.
(() => {
  const { connect } = AudioNode.prototype;
  const { addModule } = AudioWorklet.prototype;
  const pieces = [];
  let merger, rate;
  AudioWorklet.prototype.addModule = async function (...given) {
    if (window.recorder) await addModule.call(this, URL.createObjectURL(new Blob([window.recorder], { type: "text/javascript" })));
    return addModule.apply(this, given);
  };
  const tap = (context) => {
    if (merger?.context === context) return merger;
    rate = context.sampleRate;
    window.audio = context;
    merger = context.createChannelMerger(2);
    if (!window.recorder) return merger;
    const recorder = new AudioWorkletNode(context, "tap", { numberOfOutputs: 0, channelCount: 2, channelCountMode: "explicit" });
    recorder.port.onmessage = ({ data }) => pieces.push(data);
    connect.call(merger, recorder);
    return merger;
  };
  AudioNode.prototype.connect = function (to, ...more) {
    if (this instanceof MediaStreamAudioSourceNode) window.heard = this.mediaStream.getAudioTracks()[0];
    if (this instanceof MediaStreamAudioSourceNode) connect.call(this, tap(this.context), 0, 0);
    if (to === this.context.destination) connect.call(this, tap(this.context), 0, 1);
    return connect.call(this, to, ...more);
  };
  const base64 = (bytes) => {
    let text = "";
    for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
    return btoa(text);
  };
  const recorded = () => {
    const all = new Float32Array(pieces.reduce((sum, { length }) => sum + length, 0));
    let at = 0;
    for (const piece of pieces) {
      all.set(piece, at);
      at += piece.length;
    }
    return all; // microphone and output in turns
  };
  window.sink = () => merger?.context.sinkId;
  window.tapped = async () => ({ rate, pcm: base64(new Uint8Array(recorded().buffer)) });
  // Whether something was said to the microphone, and nothing in the half second since.
  window.spoken = () => {
    const heard = recorded().filter((_, n) => n % 2 === 0);
    const last = heard.findLastIndex((sample) => Math.abs(sample) > 0.02);
    return last >= 0 && heard.length - last > rate / 2;
  };
  // A blob's bytes by way of a canvas: the page's policy lets nobody fetch it.
  window.fetched = async (source) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
  };
  window.shifts = [];
  new PerformanceObserver((list) => window.shifts.push(...list.getEntries().filter((e) => !e.hadRecentInput).map((e) => e.value))).observe({ type: "layout-shift", buffered: true });
})();
