// @ts-check
/** The conversation as the page knows it, computed from the server's events. Pure: no elements, no sound, no clock. */

/** @typedef {import("./camera.js").Frame} Frame */
/** @typedef {import("./socket.js").Event} Event */
/** @typedef {{box: [number, number, number, number], label: string}} Mark top, left, bottom, right in thousandths */
/** @typedef {{start: number, end: number, ms: number}} Word characters of the text, and where it begins in the sound */
/** @typedef {{stages: Record<string, number>, waiting: number}} Times milliseconds after the turn's end */
/** @typedef {{start: number, end: number | null, sent: number}} Speech milliseconds of the sound that was sent */

/**
 * @typedef {object} UserMessage what the user said
 * @property {"user"} who
 * @property {string} id
 * @property {string | null} text null until it is known
 * @property {"open" | "said"} state
 * @property {Frame[]} frames that were looked at
 * @property {Speech | null} speech null where it was typed
 */

/**
 * @typedef {object} AssistantMessage
 * @property {"agent"} who
 * @property {string} id
 * @property {string} text
 * @property {"open" | "said" | "interrupted" | "failed"} state
 * @property {boolean} aloud
 * @property {Word[]} words
 * @property {number} samples of its sound that came
 * @property {number} shownTo characters whose word was begun
 * @property {number} heardTo characters of words that were heard to the end
 * @property {{frame: Frame | null, mark: Mark}[]} marks
 * @property {UserMessage | null} to
 * @property {Times | null} times
 * @property {number | null} silence milliseconds from the user's last word to the first sound, measured here
 */

/** @typedef {UserMessage | AssistantMessage} Entry */

const FRAMES = 64; // that were sent and may still be looked at
const HISTORY = 12; // entries of an earlier session that a new one is told

export class ConversationState {
  /** @type {Entry[]} */ entries = [];
  /** @type {Map<string, Frame>} */ #frames = new Map();
  /** @type {string | null} the response in progress */ response = null;
  /** @type {AssistantMessage | null} of the last response */ answer = null;
  #silent = false; // sound is not played: words do not wait until they are heard

  /** @param {{change: (entry: Entry) => void, gone: (entry: Entry) => void}} on */
  constructor(on) {
    this.on = on;
  }

  // -- what the page does

  /** @param {Frame} frame */
  sent(frame) {
    this.#frames.set(frame.id, frame);
    if (this.#frames.size <= FRAMES) return;
    const [oldest] = this.#frames.values();
    if (oldest) this.#forget(oldest);
  }

  /** @param {string} id @param {string} text */
  typed(id, text) {
    this.#add({ who: "user", id, text, state: "said", frames: [], speech: null });
  }

  /** The user holds the button, from `ms` of the sound on; `released` follows. @param {number} ms */
  pressed(ms) {
    this.#add({ who: "user", id: "", text: null, state: "open", frames: [], speech: { start: ms, end: null, sent: ms } });
  }

  /** @param {number | null} ms null: the press was too short, and is discarded */
  released(ms) {
    const entry = this.#pressed();
    if (!entry?.speech) return;
    if (ms === null) return this.#remove(entry);
    entry.speech.end = ms;
    this.on.change(entry);
  }

  /** Of the user's speech the sound up to `ms` was sent. @param {number} ms */
  taken(ms) {
    const entry = this.entries.findLast(({ who }) => who === "user");
    if (entry?.who !== "user" || entry.speech?.end !== null) return;
    entry.speech.sent = ms;
    this.on.change(entry);
  }

  /** @param {string} item @param {number} ms @param {boolean} idle the loudspeaker has nothing more */
  heard(item, ms, idle) {
    const entry = this.#answered(item);
    if (!entry || entry.state === "interrupted") return;
    const over = idle && entry.state !== "open";
    this.#advance(entry, over ? Infinity : ms);
    this.on.change(entry);
  }

  /** Sound is not played (any more): words are shown as they come, and count as heard. @param {boolean} silent */
  silence(silent) {
    this.#silent = silent;
    if (!silent) return;
    for (const entry of this.entries) {
      if (entry.who !== "agent" || entry.state === "interrupted") continue;
      this.#advance(entry, Infinity);
      this.on.change(entry);
    }
  }

  /** The user interrupted the answer after `ms` of it were played. @param {number} ms @returns {AssistantMessage | null} */
  interrupted(ms) {
    const entry = this.answer;
    if (!entry || entry.state !== "open") return null;
    if (entry.aloud) this.#advance(entry, ms);
    entry.state = "interrupted";
    this.on.change(entry);
    return entry;
  }

  /** The session is lost: open messages are closed, and `ms` of the answer were played. @param {number} ms */
  lost(ms) {
    this.response = null;
    this.interrupted(ms);
    for (const entry of this.entries.filter(({ state }) => state === "open")) {
      if (entry.who === "user" && entry.text === null) this.#remove(entry);
    }
  }

  /** The end of this conversation as items, for a new session after the socket was lost. */
  history() {
    const history = this.entries.slice(-HISTORY).map(({ who, text, ...entry }) => {
      const words = "heardTo" in entry && entry.state === "interrupted" ? [...(text ?? "")].slice(0, entry.heardTo).join("") : text;
      const type = who === "user" ? "input_text" : "output_text";
      const role = who === "user" ? "user" : "assistant";
      return words?.trim() ? { type: "message", role, content: [{ type, text: words.trim() }] } : null;
    });
    while (history.length && history.at(-1)?.role !== "assistant") history.pop(); // a question without its answer would be asked again
    return history.filter((item) => item !== null);
  }

  // -- what the server says

  /** @param {Event} event */
  receive(event) {
    switch (event.type) {
      case "input_audio_buffer.speech_started":
        return this.#started(event);
      case "input_audio_buffer.speech_stopped":
        return this.#stopped(event);
      case "input_audio_buffer.committed":
        return this.#committed(event.item_id);
      case "input_audio_buffer.cleared":
        return this.#cleared();
      case "conversation.item.input_audio_transcription.completed":
        return this.#captioned(event);
      case "attend.camera.looked":
        return this.#looked(event.frame_id);
      case "response.created":
        [this.response, this.answer] = [event.response.id, null];
        return undefined;
      case "response.output_item.added":
        return this.#answering(event.item);
      case "response.output_audio_transcript.delta":
      case "response.output_text.delta":
        return this.#wrote(event, event.type.includes("audio"));
      case "attend.words":
        return this.#words(event);
      case "attend.mark":
        return this.#marked(event);
      case "response.done":
        return this.#done(event.response);
      case "attend.timeline":
        return this.#timed(event);
    }
  }

  /** After attend.cleared: of this item nothing after `ms` was played, and it goes on from an earlier word. @param {string} item @param {number} ms */
  unplayed(item, ms) {
    const entry = this.#answered(item);
    if (entry) entry.words = entry.words.filter((word) => word.ms <= ms);
  }

  /** @param {Event} event */
  #started({ item_id, audio_start_ms }) {
    const speech = { start: audio_start_ms, end: null, sent: audio_start_ms };
    this.#add({ who: "user", id: item_id, text: null, state: "open", frames: [], speech });
  }

  /** @param {Event} event */
  #stopped({ item_id, audio_end_ms }) {
    const entry = this.entries.find(({ id }) => id === item_id);
    if (entry?.who !== "user" || !entry.speech) return;
    entry.speech.end = audio_end_ms;
    entry.state = "said";
    this.on.change(entry);
  }

  /** @param {string} id */
  #committed(id) {
    const entry = this.#pressed();
    if (entry && !this.entries.some((other) => other.id === id)) [entry.id, entry.state] = [id, "said"];
    if (entry) this.on.change(entry);
  }

  #cleared() {
    const entry = this.entries.findLast(({ who, text }) => who === "user" && text === null);
    if (entry && !("heardTo" in entry) && !entry.frames.length) this.#remove(entry);
  }

  /** @param {Event} event */
  #captioned({ item_id, transcript }) {
    const entry = this.entries.find(({ id }) => id === item_id);
    if (entry?.who !== "user") return;
    entry.text = transcript.trim();
    entry.state = "said";
    this.on.change(entry);
  }

  /** @param {string} id */
  #looked(id) {
    const frame = this.#frames.get(id);
    const entry = this.entries.findLast(({ who }) => who === "user");
    if (!frame || entry?.who !== "user" || entry.frames.includes(frame)) return;
    entry.frames.push(frame);
    this.on.change(entry);
  }

  /** @param {any} item */
  #answering({ id, type }) {
    if (type !== "message") return;
    const to = this.entries.findLast(({ who }) => who === "user");
    this.answer = {
      who: "agent", id, text: "", state: "open", aloud: false, words: [], samples: 0, shownTo: 0, heardTo: 0, marks: [],
      to: to?.who === "user" ? to : null, times: null, silence: null,
    };
    this.#add(this.answer);
  }

  /** @param {Event} event @param {boolean} aloud */
  #wrote({ item_id, delta }, aloud) {
    const entry = this.#answered(item_id);
    if (entry?.state !== "open") return;
    entry.text += delta;
    entry.aloud = aloud;
    if (!aloud || this.#silent) entry.shownTo = entry.heardTo = [...entry.text].length;
    this.on.change(entry);
  }

  /** @param {Event} event */
  #words({ item_id, words }) {
    const entry = this.#answered(item_id);
    if (!entry) return;
    const news = words.map((/** @type {any} */ word) => ({ start: word.start, end: word.end, ms: word.audio_ms }));
    entry.words = entry.words.filter(({ start }) => start < news[0]?.start).concat(news);
  }

  /** @param {Event} event */
  #marked({ frame_id, mark }) {
    const entry = this.answer;
    if (entry?.state !== "open") return;
    const frame = entry.to?.frames.find(({ id }) => id === frame_id) ?? this.#frames.get(frame_id) ?? null;
    entry.marks.push({ frame, mark: { box: mark.box_2d, label: mark.label } });
    this.on.change(entry);
  }

  /** @param {any} response */
  #done(response) {
    if (response.id === this.response) this.response = null;
    const entry = this.answer;
    if (entry?.state !== "open") return;
    entry.state = response.status === "cancelled" ? "interrupted" : response.status === "failed" ? "failed" : "said";
    this.on.change(entry);
  }

  /** @param {Event} event */
  #timed({ stages_ms, waiting }) {
    if (!this.answer) return;
    this.answer.times = { stages: stages_ms, waiting };
    this.on.change(this.answer);
  }

  // -- the rest

  /** @param {AssistantMessage} entry @param {number} ms */
  #advance(entry, ms) {
    const { words } = entry;
    const length = [...entry.text].length;
    let shownTo = 0;
    let heardTo = 0;
    if (ms === Infinity) shownTo = heardTo = length;
    else if (words.length) {
      words.forEach((word, n) => {
        if (word.ms <= ms) shownTo = word.end;
        if ((words[n + 1]?.ms ?? Infinity) <= ms) heardTo = word.end;
      });
    } else if (entry.samples) {
      shownTo = heardTo = Math.floor((length * ms * 24) / entry.samples); // a voice without word times: in proportion
    }
    entry.shownTo = Math.min(length, Math.max(entry.shownTo, shownTo));
    entry.heardTo = Math.min(length, Math.max(entry.heardTo, heardTo));
  }

  #pressed() {
    const entry = this.entries.findLast(({ who, id }) => who === "user" && !id);
    return entry?.who === "user" ? entry : null;
  }

  /** @param {string} id */
  #answered(id) {
    const entry = this.entries.findLast((entry) => entry.id === id);
    return entry?.who === "agent" ? entry : null;
  }

  /** @param {Entry} entry */
  #add(entry) {
    this.entries.push(entry);
    this.on.change(entry);
  }

  /** @param {Entry} entry */
  #remove(entry) {
    this.entries = this.entries.filter((other) => other !== entry);
    this.on.gone(entry);
  }

  /** @param {Frame} frame */
  #forget(frame) {
    this.#frames.delete(frame.id);
    if (!this.entries.some((entry) => entry.who === "user" && entry.frames.includes(frame))) URL.revokeObjectURL(frame.url);
  }
}
