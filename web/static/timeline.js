// @ts-check
/** A turn's time line: what was heard, when it was in the model, when the turn ended, what came after it. */

/** @typedef {import("./conversation.js").AssistantMessage} AssistantMessage */

export const FRAME = 40; // milliseconds of a position
const AFTER = 450; // milliseconds of the answer that are shown

/**
 * @typedef {object} Strip times in milliseconds from the beginning of speech; null: not reached, or not known
 * @property {number} speech how long it was spoken
 * @property {number} end of the turn
 * @property {number | null} token
 * @property {number | null} sound the server sent the first sound
 * @property {number | null} heard the first sound was played here
 * @property {number} waiting positions that were not in the model at the turn's end
 */

/** @param {AssistantMessage} entry @returns {Strip | null} null: nothing was measured */
export function strip({ to, times, silence }) {
  if (!times) return null;
  const { speech_end: ended = 0, first_token, first_sound } = times.stages;
  const speech = to?.speech?.end ? to.speech.end - to.speech.start : 0;
  const end = speech - ended;
  const after = (/** @type {number | undefined} */ stage) => (stage === undefined ? null : end + stage);
  const heard = silence === null ? null : speech + silence;
  return { speech, end, token: after(first_token), sound: after(first_sound), heard, waiting: times.waiting };
}

/** @param {Strip} strip @returns {string} the one sentence that it shows */
export function sentence({ speech, end, token, heard, waiting }) {
  if (!speech) return token === null ? "" : `First word ${round(token - end)} after you asked.`;
  const frames = Math.round(speech / FRAME);
  const left = waiting ? `${waiting} positions were still to be taken in` : "all of it was taken in";
  const sound = heard === null ? "" : ` You heard the answer ${round(heard - speech)} after your last word.`;
  return `You spoke for ${round(speech)}: ${frames} frames, and when your turn ended, ${left}.${sound}`;
}

/** @param {number} ms */
export function round(ms) {
  return ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

/** @param {AssistantMessage} entry @returns {HTMLElement | null} */
export function draw(entry) {
  const times = strip(entry);
  if (!times) return null;
  const { speech, end, token, sound, heard } = times;
  const whole = Math.max(end, token ?? 0, sound ?? 0, heard ?? 0) + AFTER;
  const at = (/** @type {number} */ ms) => `${(100 * ms) / whole}%`;

  const figure = make("figure", "times");
  figure.dataset.silence = entry.silence === null ? "" : String(Math.round(entry.silence));
  const bar = make("div", "bar");
  bar.setAttribute("aria-hidden", "true");
  for (const [name, from, to] of /** @type {[string, number, number | null][]} */ ([
    ["speech", 0, speech],
    ["pause", speech, end],
    ["thought", end, heard ?? sound ?? token],
    ["answer", heard ?? sound ?? token ?? end, whole],
  ])) {
    if (to === null || to <= from) continue;
    const part = make("span", name);
    part.style.left = at(from);
    part.style.width = at(to - from);
    if (name === "speech") part.style.backgroundSize = `${(100 * FRAME) / speech}% 100%`;
    bar.append(part);
  }
  const caption = make("figcaption");
  const list = make("dl");
  for (const [name, from, to] of /** @type {[string, number, number | null][]} */ ([
    ["you spoke", 0, speech || null],
    ["pause that ended the turn", speech, speech ? end : null],
    ["first token", end, token],
    ["first sound sent", end, sound],
    ["last word to heard", speech, heard],
  ])) {
    if (to === null) continue;
    const pair = make("div");
    pair.append(Object.assign(make("dt"), { textContent: name }), Object.assign(make("dd"), { textContent: round(to - from) }));
    list.append(pair);
  }
  caption.append(Object.assign(make("p"), { textContent: sentence(times) }), list);
  figure.append(bar, caption);
  return figure;
}

/** @param {string} tag @param {string} [name] */
function make(tag, name = "") {
  const element = document.createElement(tag);
  element.className = name;
  return element;
}
