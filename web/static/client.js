// @ts-check
/** A realtime client in the browser: microphone, loudspeaker, camera and socket brought together. Of the page it knows the video alone. */

import { Webcam } from "./camera.js";
import { ConversationState } from "./conversation.js";
import { RealtimeSocket } from "./socket.js";
import { BrowserAudio, INPUT_RATE, MicrophoneInput, OUTPUT_RATE, SpeakerOutput, decode, encode } from "./sound.js";

const LOOK = 300; // milliseconds between the camera's frames while the user speaks; the model looks at the newest
const TAP = 200; // milliseconds: a shorter press of push-to-talk is discarded
const FRAME = 40; // milliseconds
const SILENCE = 1000; // milliseconds that are sent when the microphone is lost, so that the server's VAD ends the turn
const KEPT = 3000; // frames whose times are known: two minutes
const HARMLESS = ["response_cancel_not_active", "input_audio_buffer_commit_empty"]; // errors of harmless races, which are not shown

/** @typedef {import("./camera.js").Frame} Frame */
/** @typedef {import("./conversation.js").Entry} Entry */
/** @typedef {{microphone: string, camera: string, speaker: string, echo: boolean, aloud: boolean, press: boolean}} Choices */
/** @typedef {{model: string, voice: string}} Server */

/**
 * @typedef {object} Listener
 * @property {() => void} state something about the state has changed
 * @property {(entry: Entry) => void} change
 * @property {(entry: Entry) => void} gone
 * @property {(level: number, whose: "user" | "agent") => void} level
 * @property {(device: "microphone" | "camera") => void} lost
 * @property {(audible: boolean) => void} audible whether sound is played; without it answers come as text, and nothing is heard
 * @property {(sentence: string) => void} error
 */

export class VoiceClient {
  hearing = false; // the user speaks
  muted = false;
  pressed = false;
  audible = true;
  /** @type {Frame | null} a picture that the user gave, until it was looked at */ shown = null;
  /** @type {Server | null} */ server = null;
  /** @type {MicrophoneInput | null} */ microphone = null;
  /** @type {SpeakerOutput | null} */ #speaker = null;
  /** @type {Promise<BrowserAudio> | null} */ #audio = null;
  /** @type {{ms: number, at: number}[]} of the frames that were sent: where they end, and when (context time) */ #frames = [];
  #sent = 0; // milliseconds of sound in this session
  #pressedAt = 0;
  #responseWanted = false; // `response.create` follows when the response in progress is over
  /** @type {(() => void)[]} what the user did before there was a server */ #waiting = [];

  /** @param {HTMLVideoElement} video @param {Choices} choices read whenever they matter @param {Listener} on */
  constructor(video, choices, on) {
    this.choices = choices;
    this.on = on;
    this.camera = new Webcam(video, () => this.#lost("camera"));
    this.conversation = new ConversationState({ change: on.change, gone: on.gone });
    this.socket = new RealtimeSocket({ event: (event) => this.#receive(event), state: () => this.#state() });
  }

  // -- what the user does

  /** Call it in a click, or the browser plays nothing. */
  connect() {
    this.#audio ??= this.#open();
    this.#audio.catch(() => {}); // `audible` has said it; `listen` rejects too
    if (this.socket.state.kind === "off") this.socket.start();
  }

  /** @returns {Promise<void>} rejects as getUserMedia does */
  async listen() {
    this.#audio ??= this.#open();
    const audio = await this.#audio;
    this.microphone ??= new MicrophoneInput(audio, { frame: (...frame) => this.#sendSound(...frame), lost: () => this.#lost("microphone") });
    await this.microphone.use(this.choices.microphone, this.choices.echo);
    this.mute(this.muted);
  }

  stop() {
    this.#speaker?.flush();
    this.conversation.lost(this.#playedMs());
    this.socket.stop();
    this.camera.close();
    this.#waiting = [];
    this.#closeAudio();
    this.hearing = this.pressed = this.#responseWanted = false;
    this.on.state();
  }

  /** Opens microphone and loudspeaker anew, when their sound does not run. Call it in a click. @returns {Promise<void>} rejects as `listen` */
  async reopen() {
    const listening = this.microphone?.stream;
    this.#closeAudio();
    this.connect();
    if (listening) await this.listen();
  }

  /** @param {boolean} muted */
  mute(muted) {
    this.muted = muted;
    if (this.microphone) this.microphone.muted = muted;
    this.on.state();
  }

  /** @param {string} text */
  async type(text) {
    this.connect();
    const frame = await this.#currentPicture();
    this.#whenOpen(() => {
      this.interrupt();
      const id = `typed_${Date.now()}_${Math.floor(Math.random() * 1e6)}`;
      this.conversation.typed(id, text);
      if (frame) this.#sendFrame(frame);
      this.#item([{ type: "input_text", text }], id);
      this.#createResponse();
    });
  }

  /** Push to talk: what is said until `release` is the question. */
  press() {
    if (this.pressed || this.socket.state.kind !== "open") return;
    this.interrupt();
    this.pressed = this.hearing = true;
    this.#pressedAt = this.#sent;
    this.conversation.pressed(this.#sent);
    this.on.state();
  }

  async release() {
    if (!this.pressed) return;
    this.pressed = this.hearing = false;
    this.on.state();
    if (this.#sent - this.#pressedAt < TAP) {
      this.socket.send("input_audio_buffer.clear");
      return this.conversation.released(null);
    }
    this.conversation.released(this.#sent);
    const frame = await this.#currentPicture();
    if (frame) {
      this.conversation.sent(frame);
      this.#item([{ type: "input_image", image_url: frame.data }], frame.id);
    }
    this.socket.send("input_audio_buffer.commit");
    this.#createResponse();
  }

  /** Stops the answer where it is. @returns {boolean} whether there was one */
  interrupt() {
    const { answer, response } = this.conversation;
    if (!response) return false;
    const ms = this.#playedMs();
    this.#speaker?.flush();
    this.conversation.interrupted(ms);
    if (answer?.samples) this.#truncate(answer.id, ms);
    else this.socket.send("response.cancel");
    this.on.state();
    return true;
  }

  /** Sends the settings to the server, and the output device to the browser. */
  async configure() {
    const detection = this.choices.press ? null : { type: "server_vad" };
    const input = { format: { type: "audio/pcm", rate: INPUT_RATE }, transcription: { model: "attend" }, turn_detection: detection };
    const output = { format: { type: "audio/pcm", rate: OUTPUT_RATE } };
    const output_modalities = [this.choices.aloud && this.audible ? "audio" : "text"];
    this.socket.send("session.update", { session: { type: "realtime", output_modalities, audio: { input, output } } });
    await this.#speaker?.use(this.choices.speaker);
  }

  /** What the conversation is doing. @returns {"hearing" | "thinking" | "speaking" | "listening"} */
  get activity() {
    if (this.hearing) return "hearing";
    if (this.#speaker && !this.#speaker.idle) return "speaking";
    return this.conversation.response ? "thinking" : "listening";
  }

  // -- the server

  #state() {
    if (this.socket.state.kind !== "open") {
      this.#speaker?.flush();
      this.conversation.lost(this.#playedMs());
      this.hearing = this.pressed = this.#responseWanted = false;
    }
    this.on.state();
  }

  #opened() {
    this.#sent = 0;
    this.#frames = [];
    void this.configure();
    for (const item of this.conversation.history()) this.socket.send("conversation.item.create", { item });
    for (const act of this.#waiting.splice(0)) act();
  }

  /** @param {import("./socket.js").Event} event */
  #receive(event) {
    const { conversation } = this;
    const open = conversation.answer?.state === "open";
    conversation.receive(event);
    switch (event.type) {
      case "session.created":
        this.#opened();
        break;
      case "session.updated":
        this.server = { model: event.session.model, voice: event.session.audio.output.voice };
        break;
      case "input_audio_buffer.speech_started":
        this.hearing = true;
        void this.#sendFrames();
        break;
      case "input_audio_buffer.speech_stopped":
        this.hearing = false;
        break;
      case "attend.camera.looked":
        if (event.frame_id === this.shown?.id) this.shown = null;
        break;
      case "response.output_audio.delta":
        return this.#play(event.item_id, decode(event.delta));
      case "attend.cleared":
        this.#speaker?.flush();
        conversation.unplayed(event.item_id, this.#playedMs());
        break;
      case "response.done":
        if (open && conversation.answer?.state === "interrupted" && conversation.answer.samples) {
          this.#truncate(conversation.answer.id, this.#playedMs()); // the server can only estimate what was played
        }
        if (this.#responseWanted) this.#createResponse();
        break;
      case "error":
        this.#failed(event.error);
        break;
      case "attend.note":
        this.on.error(event.message);
        break;
      default:
        return;
    }
    this.on.state();
  }

  /** @param {{code: string, message: string}} error */
  #failed({ code, message }) {
    if (code === "conversation_already_has_active_response") this.#responseWanted = true;
    else if (!HARMLESS.includes(code)) this.on.error(message);
  }

  #createResponse() {
    this.#responseWanted = this.conversation.response !== null;
    if (!this.#responseWanted) this.socket.send("response.create");
  }

  /** @param {string} id @param {number} ms */
  #truncate(id, ms) {
    this.socket.send("conversation.item.truncate", { item_id: id, content_index: 0, audio_end_ms: Math.round(ms) });
  }

  /** @param {Record<string, unknown>[]} content @param {string} id */
  #item(content, id) {
    this.socket.send("conversation.item.create", { item: { id, type: "message", role: "user", content } });
  }

  /** Now, or as soon as there is a server. @param {() => void} act */
  #whenOpen(act) {
    if (this.socket.state.kind === "open") act();
    else this.#waiting.push(act);
  }

  // -- sound

  #open() {
    /** @type {Promise<BrowserAudio>} */
    const opening = BrowserAudio.open((running) => void (this.#audio === opening && this.#setAudible(running))).then(
      (sound) => {
        if (this.#audio === opening) this.#speaker = this.#loudspeaker(sound);
        return sound;
      },
      (error) => {
        if (this.#audio === opening) this.#setAudible(false);
        throw error;
      },
    );
    return opening;
  }

  /** @param {BrowserAudio} sound */
  #loudspeaker(sound) {
    return new SpeakerOutput(sound, {
      first: (item, at) => this.#firstSound(item, at),
      played: (item, ms, level, idle) => {
        this.on.level(idle ? 0 : level, "agent");
        this.conversation.heard(item, ms, idle);
        if (idle) this.on.state();
      },
    });
  }

  #closeAudio() {
    this.microphone?.close();
    void this.#audio?.then((sound) => sound.close(), () => {});
    this.microphone = this.#speaker = this.#audio = null;
    this.#setAudible(true);
  }

  /** @param {boolean} audible */
  #setAudible(audible) {
    if (audible === this.audible) return;
    this.audible = audible;
    this.#speaker?.flush(); // what waits there would be heard much later
    this.conversation.silence(!audible);
    if (this.socket.state.kind === "open") void this.configure();
    this.on.audible(audible);
    this.on.state();
  }

  /** @param {Int16Array} pcm @param {number} level @param {number} at */
  #sendSound(pcm, level, at) {
    const silent = this.muted || (this.choices.press && !this.pressed);
    this.on.level(silent ? 0 : level, "user");
    if (this.choices.press && !this.pressed) return;
    if (!this.socket.send("input_audio_buffer.append", { audio: encode(pcm) })) return;
    this.#sent += FRAME;
    this.#frames.push({ ms: this.#sent, at });
    if (this.#frames.length > KEPT) this.#frames.shift();
    if (this.hearing) this.conversation.taken(this.#sent);
  }

  /** @param {"microphone" | "camera"} device */
  #lost(device) {
    this[device]?.close();
    if (device === "microphone") this.#sendSilence();
    this.on.lost(device);
  }

  /** Nothing comes any more, and time is counted in samples: what was being said would never end. */
  #sendSilence() {
    const now = this.microphone?.audio.context.currentTime ?? 0;
    if (this.pressed) void this.release();
    else for (let ms = 0; ms < SILENCE; ms += FRAME) this.#sendSound(new Int16Array((FRAME * INPUT_RATE) / 1000), 0, now);
  }

  /** @param {string} item @param {Int16Array<ArrayBuffer>} pcm */
  #play(item, pcm) {
    const { answer } = this.conversation;
    if (answer?.id !== item || answer.state === "interrupted") return;
    const from = answer.samples;
    answer.samples += pcm.length; // before it is handed over, and has none any more
    const play = () => this.audible && answer.state !== "interrupted" && this.#speaker?.play(item, from, pcm);
    if (this.#speaker) play();
    else void this.#audio?.then(play, () => {}); // who typed at once has an answer before there is a loudspeaker
    if (!from) this.on.state();
  }

  /** The first sound of an answer was played, at this context time. @param {string} item @param {number} at */
  #firstSound(item, at) {
    const { answer } = this.conversation;
    const end = answer?.to?.speech?.end;
    const frame = this.#frames.find(({ ms }) => end && ms >= end);
    if (!answer || answer.id !== item || !end || !frame) return;
    answer.silence = (at - frame.at) * 1000 + (frame.ms - end);
    this.on.change(answer);
  }

  /** Milliseconds of the present answer that were heard. */
  #playedMs() {
    const { answer } = this.conversation;
    if (!this.audible) return answer ? (answer.samples * 1000) / OUTPUT_RATE : 0; // its words were shown
    const { played } = this.#speaker ?? {};
    return played && played.item === answer?.id ? played.ms : 0;
  }

  // -- pictures

  async #sendFrames() {
    while (this.hearing && this.socket.state.kind === "open" && !this.pressed) {
      const frame = await this.#currentPicture();
      if (frame) this.#sendFrame(frame);
      await new Promise((done) => setTimeout(done, LOOK));
    }
  }

  /** What the user shows now: a picture that was given goes before the camera. */
  async #currentPicture() {
    return this.shown ?? (await this.camera.frame());
  }

  /** @param {Frame} frame */
  #sendFrame(frame) {
    this.conversation.sent(frame);
    this.socket.send("attend.camera.frame", { frame_id: frame.id, image_url: frame.data });
  }
}
