// @ts-check
/** The line that says what is wrong and what to do about it, one at a time. */

/** @typedef {"connection" | "gone" | "refused" | "error" | "insecure" | "silent" | "once"} Cause */

const PASSING = 12_000; // milliseconds that a passing error is shown

export class Notice {
  /** @type {Cause | null} */ #cause = null;
  #timer = 0;
  /** @type {Set<string>} */ #told = new Set();
  #state = "";

  /** @param {HTMLElement} box */
  constructor(box) {
    this.box = box;
    /** @template {HTMLElement} T @param {string} query @returns {T} */
    const find = (query) => /** @type {T} */ (box.querySelector(query));
    this.words = find("p");
    this.token = find("form");
    this.loaded = /** @type {HTMLProgressElement} */ (find("progress"));
    this.remedy = /** @type {HTMLButtonElement} */ (find("#remedy"));
    this.dismiss = find("#dismiss");
    this.dismiss.addEventListener("click", () => this.clear());
  }

  /** @param {string} sentence @param {Cause} cause @param {[string, () => void]} [remedy] */
  say(sentence, cause, remedy) {
    clearTimeout(this.#timer);
    this.#cause = cause;
    this.words.textContent = sentence;
    this.box.dataset.cause = cause;
    this.box.hidden = false;
    this.token.hidden = this.loaded.hidden = true;
    this.remedy.hidden = !remedy;
    this.dismiss.hidden = cause === "connection";
    if (remedy) [this.remedy.textContent, this.remedy.onclick] = remedy;
    if (cause === "error" || cause === "once") this.#timer = setTimeout(() => this.clear(cause), PASSING);
  }

  /** @param {Cause} [cause] only what was said for this */
  clear(cause) {
    if (cause && this.#cause !== cause) return;
    clearTimeout(this.#timer);
    this.#cause = null;
    this.box.hidden = true;
  }

  /** @param {string} sentence */
  once(sentence) {
    if (this.#told.has(sentence) || this.#cause) return;
    this.#told.add(sentence);
    this.say(sentence, "once");
  }

  insecure() {
    const local = `http://localhost:${location.port || 80}`;
    this.say(
      `Your browser gives the microphone and the camera to secure pages alone, and ${location.origin} is none. On the server's own machine open ` +
        `${local}; for all others give attend serve a certificate (--tls-cert, --tls-key). Typing works here too.`,
      "insecure",
    );
  }

  /** @param {() => void} again */
  silent(again) {
    this.say(
      "This browser plays no sound at the moment: is a loudspeaker connected? Answers are shown as text, and the microphone is not heard.",
      "silent",
      ["Try again", again],
    );
  }

  /** @param {"microphone" | "camera"} device @param {unknown} error of getUserMedia @param {() => void} again */
  refused(device, error, again) {
    const name = error instanceof Error ? error.name : "";
    const instead = device === "microphone" ? "You can type." : "You can give pictures.";
    const why =
      name === "NotAllowedError"
        ? `This page may not use the ${device}: allow it in the browser's address bar. ${instead}`
        : name === "NotFoundError" || name === "OverconstrainedError"
          ? `There is no ${device} here. ${instead}`
          : name === "NotReadableError"
            ? `The ${device} is in use by another program. ${instead}`
            : `The ${device} cannot be used: ${error instanceof Error ? error.message : error}. ${instead}`;
    this.say(why, "refused", ["Try again", again]);
  }

  /** @param {import("./socket.js").State} state @param {() => void} again */
  connection(state, again) {
    const key = JSON.stringify(state);
    if (key === this.#state) return;
    this.#state = key;
    switch (state.kind) {
      case "loading":
        if (this.loaded.hidden || this.box.hidden) this.say("The model is being loaded. This page goes on by itself.", "connection"); // read out once
        this.loaded.hidden = false;
        if (state.loaded) this.loaded.value = state.loaded; // before, nobody knows how long it takes
        else this.loaded.removeAttribute("value");
        return;
      case "busy": {
        const before = state.before === 1 ? "One is before you." : `${state.before} are before you.`;
        return this.say(`All places are taken. ${state.before ? before : "You are next."} This page goes on by itself.`, "connection");
      }
      case "lost":
        return this.say(`${state.why} The next try is in ${state.seconds} s.`, "connection", ["Try now", again]);
      case "token":
        this.say("This server wants a token. Its owner has it.", "connection");
        this.token.hidden = false;
        return;
      case "off":
      case "open":
        this.clear("connection");
    }
  }
}
