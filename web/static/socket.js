// @ts-check
/** The websocket: it is opened again when it is lost, and `state` says what it waits for. Knows nothing of conversations. */

const ADDRESS = "v1/realtime?extensions=camera,marks,timeline,playback,notes,queue";
const FIRST = 500; // milliseconds until the next try, doubled each time
const LONGEST = 10_000;
const FULL = 1 << 20; // bytes that wait to be sent, beyond which sound is dropped: a minute late helps nobody

/**
 * @typedef {{type: string, [field: string]: any}} Event
 * @typedef {{kind: "off"} | {kind: "connecting"} | {kind: "loading", loaded: number} | {kind: "busy", before: number} | {kind: "open"}
 *   | {kind: "lost", seconds: number, why: string} | {kind: "token"}} State
 */

export class RealtimeSocket {
  /** @type {State} */ state = { kind: "off" };
  /** @type {WebSocket | null} */ #socket = null;
  #tries = 0;
  #timer = 0;
  dropped = 0;

  /** @param {{event: (event: Event) => void, state: (state: State) => void}} on */
  constructor(on) {
    this.on = on;
    addEventListener("online", () => this.state.kind === "lost" && this.start());
  }

  start() {
    clearTimeout(this.#timer);
    this.#socket?.close(1000);
    this.#set({ kind: "connecting" });
    const url = new URL(ADDRESS, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = (this.#socket = new WebSocket(url, "realtime"));
    let came = false;
    socket.onmessage = ({ data }) => {
      if (socket !== this.#socket) return;
      came = true;
      this.#take(JSON.parse(data));
    };
    socket.onclose = ({ reason }) => {
      if (socket === this.#socket) void this.#closed(came, reason);
    };
  }

  stop() {
    clearTimeout(this.#timer);
    this.#socket?.close(1000);
    this.#socket = null;
    this.#set({ kind: "off" });
  }

  /** @param {string} type @param {Record<string, unknown>} [fields] @returns {boolean} whether it was sent */
  send(type, fields) {
    const socket = this.#socket;
    if (this.state.kind !== "open" || socket?.readyState !== WebSocket.OPEN) return false;
    if (type === "input_audio_buffer.append" && socket.bufferedAmount > FULL) {
      this.dropped++;
      return false;
    }
    socket.send(JSON.stringify({ type, ...fields }));
    return true;
  }

  /** @param {Event} event */
  #take(event) {
    if (event.type === "attend.loading") return this.#set({ kind: "loading", loaded: event.loaded });
    if (event.type === "attend.queue") return this.#set({ kind: "busy", before: event.before });
    if (event.type === "session.created") {
      this.#tries = 0;
      this.#set({ kind: "open" });
    }
    this.on.event(event);
  }

  /** @param {boolean} came whether anything was heard of the server @param {string} reason */
  async #closed(came, reason) {
    this.#socket = null;
    if (!came && (await refusal()) === 401) return this.#set({ kind: "token" });
    const wait = Math.min(LONGEST, FIRST * 2 ** this.#tries++) * (0.8 + 0.4 * Math.random()); // not all pages at the same moment
    const why = reason || (came ? "The connection was lost." : "The server cannot be reached.");
    this.#set({ kind: "lost", seconds: Math.ceil(wait / 1000), why: why[0]?.toUpperCase() + why.slice(1) });
    this.#timer = setTimeout(() => this.start(), wait);
  }

  /** @param {State} state */
  #set(state) {
    this.state = state;
    this.on.state(state);
  }
}

/** A page is not told why its socket was refused; a plain request is. */
async function refusal() {
  try {
    return (await fetch("readyz")).status;
  } catch {
    return 0;
  }
}
