// @ts-check
/** One conversation as the page holds it: microphone, loudspeaker, camera and socket brought together. Knows no elements but the video. */

import { Camera } from "./camera.js";
import { Conversation } from "./conversation.js";
import { HEARD, Loudspeaker, Microphone, SPOKEN, Sound, decode, encode } from "./sound.js";
import { Wire } from "./wire.js";

const LOOK = 300; // milliseconds between the camera's frames while the user speaks: the newest is looked at
const TAP = 200; // milliseconds: a shorter press says nothing
const FRAME = 40; // milliseconds
const HUSH = 1000; // milliseconds of silence by which the server sees that a sentence is over
const KEPT = 3000; // frames whose times are known: two minutes
const SPOILED = ["response_cancel_not_active", "input_audio_buffer_commit_empty"]; // races that hurt nobody

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
 * @property {(sentence: string) => void} trouble
 */

export class Talk {
  hearing = false; // the user speaks
  muted = false;
  pressed = false;
  audible = true;
  /** @type {Frame | null} a picture that the user gave, until it was looked at */ shown = null;
  /** @type {Server | null} */ server = null;
  /** @type {Microphone | null} */ microphone = null;
  /** @type {Loudspeaker | null} */ #speaker = null;
  /** @type {Promise<Sound> | null} */ #sound = null;
  /** @type {{ms: number, at: number}[]} of the frames that were sent: where they end, and when (context time) */ #frames = [];
  #sent = 0; // milliseconds of sound in this session
  #pressedAt = 0;
  #wanted = false; // an answer, as soon as none is being given
  /** @type {(() => void)[]} what the user did before there was a server */ #waiting = [];

  /** @param {HTMLVideoElement} video @param {Choices} choices read whenever they matter @param {Listener} on */
  constructor(video, choices, on) {
    this.choices = choices;
    this.on = on;
    this.camera = new Camera(video, () => this.#lost("camera"));
    this.conversation = new Conversation({ change: on.change, gone: on.gone });
    this.wire = new Wire({ event: (event) => this.#take(event), state: () => this.#state() });
  }

  // -- what the user does

  /** In a click, or the browser plays nothing. */
  connect() {
    this.#sound ??= this.#open();
    this.#sound.catch(() => {}); // it was said, and who wants the microphone is told again
    if (this.wire.state.kind === "off") this.wire.start();
  }

  /** @returns {Promise<void>} rejects as getUserMedia does */
  async listen() {
    this.#sound ??= this.#open();
    const sound = await this.#sound;
    this.microphone ??= new Microphone(sound, { frame: (...frame) => this.#frame(...frame), lost: () => this.#lost("microphone") });
    await this.microphone.use(this.choices.microphone, this.choices.echo);
    this.mute(this.muted);
  }

  stop() {
    this.#speaker?.flush();
    this.conversation.lost(this.#played());
    this.wire.stop();
    this.camera.close();
    this.#waiting = [];
    this.#closeSound();
    this.hearing = this.pressed = this.#wanted = false;
    this.on.state();
  }

  /** In a click: microphone and loudspeaker from the beginning, as their sound does not run. @returns {Promise<void>} as `listen` */
  async reopen() {
    const listening = this.microphone?.stream;
    this.#closeSound();
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
    const frame = await this.#picture();
    this.#do(() => {
      this.interrupt();
      const id = `typed_${Date.now()}_${Math.floor(Math.random() * 1e6)}`;
      this.conversation.typed(id, text);
      if (frame) this.#show(frame);
      this.#item([{ type: "input_text", text }], id);
      this.#ask();
    });
  }

  /** Push to talk: what is said until `release` is the question. */
  press() {
    if (this.pressed || this.wire.state.kind !== "open") return;
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
      this.wire.send("input_audio_buffer.clear");
      return this.conversation.released(null);
    }
    this.conversation.released(this.#sent);
    const frame = await this.#picture();
    if (frame) {
      this.conversation.sent(frame);
      this.#item([{ type: "input_image", image_url: frame.data }], frame.id);
    }
    this.wire.send("input_audio_buffer.commit");
    this.#ask();
  }

  /** Stops the answer where it is. @returns {boolean} whether there was one */
  interrupt() {
    const { answer, response } = this.conversation;
    if (!response) return false;
    const ms = this.#played();
    this.#speaker?.flush();
    this.conversation.cut(ms);
    if (answer?.samples) this.#truncate(answer.id, ms);
    else this.wire.send("response.cancel");
    this.on.state();
    return true;
  }

  /** What the choices say, to the server and the loudspeaker. */
  async configure() {
    const detection = this.choices.press ? null : { type: "server_vad" };
    const input = { format: { type: "audio/pcm", rate: HEARD }, transcription: { model: "attend" }, turn_detection: detection };
    const output = { format: { type: "audio/pcm", rate: SPOKEN } };
    const output_modalities = [this.choices.aloud && this.audible ? "audio" : "text"];
    this.wire.send("session.update", { session: { type: "realtime", output_modalities, audio: { input, output } } });
    await this.#speaker?.use(this.choices.speaker);
  }

  /** What is going on. @returns {"hearing" | "thinking" | "speaking" | "listening"} */
  get mood() {
    if (this.hearing) return "hearing";
    if (this.#speaker && !this.#speaker.idle) return "speaking";
    return this.conversation.response ? "thinking" : "listening";
  }

  // -- the server

  #state() {
    if (this.wire.state.kind !== "open") {
      this.#speaker?.flush();
      this.conversation.lost(this.#played());
      this.hearing = this.pressed = this.#wanted = false;
    }
    this.on.state();
  }

  #opened() {
    this.#sent = 0;
    this.#frames = [];
    void this.configure();
    for (const item of this.conversation.retold()) this.wire.send("conversation.item.create", { item });
    for (const act of this.#waiting.splice(0)) act();
  }

  /** @param {import("./wire.js").Event} event */
  #take(event) {
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
        void this.#look();
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
        conversation.unplayed(event.item_id, this.#played());
        break;
      case "response.done":
        if (open && conversation.answer?.state === "cut" && conversation.answer.samples) {
          this.#truncate(conversation.answer.id, this.#played()); // the server can only reckon what was played
        }
        if (this.#wanted) this.#ask();
        break;
      case "error":
        this.#trouble(event.error);
        break;
      default:
        return;
    }
    this.on.state();
  }

  /** @param {{code: string, message: string}} error */
  #trouble({ code, message }) {
    if (code === "conversation_already_has_active_response") this.#wanted = true;
    else if (!SPOILED.includes(code)) this.on.trouble(message);
  }

  #ask() {
    this.#wanted = this.conversation.response !== null;
    if (!this.#wanted) this.wire.send("response.create");
  }

  /** @param {string} id @param {number} ms */
  #truncate(id, ms) {
    this.wire.send("conversation.item.truncate", { item_id: id, content_index: 0, audio_end_ms: Math.round(ms) });
  }

  /** @param {Record<string, unknown>[]} content @param {string} id */
  #item(content, id) {
    this.wire.send("conversation.item.create", { item: { id, type: "message", role: "user", content } });
  }

  /** Now, or as soon as there is a server. @param {() => void} act */
  #do(act) {
    if (this.wire.state.kind === "open") act();
    else this.#waiting.push(act);
  }

  // -- sound

  #open() {
    /** @type {Promise<Sound>} */
    const opening = Sound.open((running) => void (this.#sound === opening && this.#setAudible(running))).then(
      (sound) => {
        if (this.#sound === opening) this.#speaker = this.#loudspeaker(sound);
        return sound;
      },
      (error) => {
        if (this.#sound === opening) this.#setAudible(false);
        throw error;
      },
    );
    return opening;
  }

  /** @param {Sound} sound */
  #loudspeaker(sound) {
    return new Loudspeaker(sound, {
      first: (item, at) => this.#sounded(item, at),
      played: (item, ms, level, idle) => {
        this.on.level(idle ? 0 : level, "agent");
        this.conversation.heard(item, ms, idle);
        if (idle) this.on.state();
      },
    });
  }

  #closeSound() {
    this.microphone?.close();
    void this.#sound?.then((sound) => sound.close(), () => {});
    this.microphone = this.#speaker = this.#sound = null;
    this.#setAudible(true);
  }

  /** @param {boolean} audible */
  #setAudible(audible) {
    if (audible === this.audible) return;
    this.audible = audible;
    this.#speaker?.flush(); // what waits there would be heard much later
    this.conversation.silence(!audible);
    if (this.wire.state.kind === "open") void this.configure();
    this.on.audible(audible);
    this.on.state();
  }

  /** @param {Int16Array} pcm @param {number} level @param {number} at */
  #frame(pcm, level, at) {
    const silent = this.muted || (this.choices.press && !this.pressed);
    this.on.level(silent ? 0 : level, "user");
    if (this.choices.press && !this.pressed) return;
    if (!this.wire.send("input_audio_buffer.append", { audio: encode(pcm) })) return;
    this.#sent += FRAME;
    this.#frames.push({ ms: this.#sent, at });
    if (this.#frames.length > KEPT) this.#frames.shift();
    if (this.hearing) this.conversation.taken(this.#sent);
  }

  /** @param {"microphone" | "camera"} device */
  #lost(device) {
    this[device]?.close();
    if (device === "microphone") this.#hush();
    this.on.lost(device);
  }

  /** Nothing comes any more, and time is counted in samples: what was being said would never end. */
  #hush() {
    const now = this.microphone?.sound.context.currentTime ?? 0;
    if (this.pressed) void this.release();
    else for (let ms = 0; ms < HUSH; ms += FRAME) this.#frame(new Int16Array((FRAME * HEARD) / 1000), 0, now);
  }

  /** @param {string} item @param {Int16Array<ArrayBuffer>} pcm */
  #play(item, pcm) {
    const { answer } = this.conversation;
    if (answer?.id !== item || answer.state === "cut") return;
    const from = answer.samples;
    answer.samples += pcm.length; // before it is handed over, and has none any more
    const play = () => this.audible && answer.state !== "cut" && this.#speaker?.play(item, from, pcm);
    if (this.#speaker) play();
    else void this.#sound?.then(play, () => {}); // who typed at once has an answer before there is a loudspeaker
    if (!from) this.on.state();
  }

  /** The first sound of an answer was played, at this context time. @param {string} item @param {number} at */
  #sounded(item, at) {
    const { answer } = this.conversation;
    const end = answer?.to?.speech?.end;
    const frame = this.#frames.find(({ ms }) => end && ms >= end);
    if (!answer || answer.id !== item || !end || !frame) return;
    answer.silence = (at - frame.at) * 1000 + (frame.ms - end);
    this.on.change(answer);
  }

  /** Milliseconds of the present answer that were heard. */
  #played() {
    const { answer } = this.conversation;
    if (!this.audible) return answer ? (answer.samples * 1000) / SPOKEN : 0; // its words were shown
    const { played } = this.#speaker ?? {};
    return played && played.item === answer?.id ? played.ms : 0;
  }

  // -- pictures

  async #look() {
    while (this.hearing && this.wire.state.kind === "open" && !this.pressed) {
      const frame = await this.#picture();
      if (frame) this.#show(frame);
      await new Promise((done) => setTimeout(done, LOOK));
    }
  }

  /** What the user shows now: a picture that was given goes before the camera. */
  async #picture() {
    return this.shown ?? (await this.camera.frame());
  }

  /** @param {Frame} frame */
  #show(frame) {
    this.conversation.sent(frame);
    this.wire.send("attend.camera.frame", { frame_id: frame.id, image_url: frame.data });
  }
}
