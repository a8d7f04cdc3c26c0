// Put into the page before its own scripts: records what the microphone gives and what is given to the output, side by side.
(() => {
  const connect = AudioNode.prototype.connect;
  const pieces = [];
  let recorder, merger, rate;
  const tap = (context) => {
    if (merger?.context === context) return merger;
    rate = context.sampleRate;
    merger = context.createChannelMerger(2);
    recorder = context.createScriptProcessor(4096, 2, 1);
    recorder.onaudioprocess = ({ inputBuffer }) => {
      const both = new Float32Array(2 * inputBuffer.length);
      const [left, right] = [inputBuffer.getChannelData(0), inputBuffer.getChannelData(1)];
      for (let n = 0; n < left.length; n++) [both[2 * n], both[2 * n + 1]] = [left[n], right[n]];
      pieces.push(both);
    };
    connect.call(merger, recorder);
    connect.call(recorder, context.destination);
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
  window.sink = () => merger?.context.sinkId;
  window.tapped = async () => {
    const all = new Float32Array(pieces.reduce((sum, { length }) => sum + length, 0));
    let at = 0;
    for (const piece of pieces) {
      all.set(piece, at);
      at += piece.length;
    }
    return { rate, pcm: base64(new Uint8Array(all.buffer)) };
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
