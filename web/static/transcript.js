// @ts-check
/** The conversation on the page: an element for each entry, changed in place. */

import { draw, named } from "./marks.js";
import * as timeline from "./timeline.js";

/** @typedef {import("./conversation.js").Entry} Entry */
/** @typedef {import("./conversation.js").UserMessage} UserMessage */
/** @typedef {import("./conversation.js").AssistantMessage} AssistantMessage */

export class TranscriptView {
  /** @type {Map<Entry, HTMLLIElement>} */ #items = new Map();

  /** @param {HTMLOListElement} list @param {HTMLElement} live what is read out */
  constructor(list, live) {
    this.list = list;
    this.live = live;
    for (const [event, lit] of /** @type {const} */ ([["pointerover", true], ["pointerout", false], ["focusin", true], ["focusout", false]])) {
      list.addEventListener(event, ({ target }) => target instanceof Element && light(target, lit));
    }
    list.addEventListener("click", ({ target }) => target instanceof Element && point(target));
  }

  /** @param {Entry} entry */
  show(entry) {
    const low = this.#low;
    let item = this.#items.get(entry);
    if (!item) {
      item = document.createElement("li");
      item.className = entry.who;
      this.#items.set(entry, item);
      this.list.append(item);
    }
    if (entry.who === "user") asked(item, entry);
    else this.#answered(item, entry);
    this.#say(item, entry);
    if (low) this.list.scrollTop = this.list.scrollHeight;
  }

  /** @param {Entry} entry */
  remove(entry) {
    this.#items.get(entry)?.remove();
    this.#items.delete(entry);
  }

  /** Whoever has scrolled up reads, and is left alone. */
  get #low() {
    return this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight < 80;
  }

  /** @param {HTMLElement} item @param {AssistantMessage} entry */
  #answered(item, entry) {
    const text = part(item, "p", "text");
    words(text, entry);
    const pictures = (entry.to && this.#items.get(entry.to)?.querySelectorAll("figure.seen")) ?? [];
    entry.marks.forEach(({ frame, mark }, number) => {
      const figure = [...pictures].find((figure) => figure instanceof HTMLElement && figure.dataset.frame === frame?.id);
      if (!figure || figure.querySelector(`[data-entry="${entry.id}"][data-mark="${number}"]`)) return;
      const button = draw(mark, number);
      button.dataset.entry = entry.id;
      figure.querySelector(".on")?.append(button);
    });
    if (entry.state === "failed") part(item, "p", "failed").textContent = "The answer could not be finished.";
    if (entry.times && item.dataset.timed !== `${entry.silence}`) {
      item.querySelector("figure.times")?.remove();
      const figure = timeline.draw(entry);
      if (figure) item.append(figure);
      item.dataset.timed = `${entry.silence}`;
    }
  }

  /** Read out once, when it is complete. @param {HTMLElement} item @param {Entry} entry */
  #say(item, entry) {
    if (entry.state === "open" || item.dataset.said || !entry.text) return;
    if (entry.who === "user" && entry.speech === null) return; // who typed it knows it
    item.dataset.said = "yes";
    const heard = entry.who === "agent" && entry.state === "interrupted" ? [...entry.text].slice(0, entry.heardTo).join("") : entry.text;
    const line = document.createElement("p");
    line.textContent = `${entry.who === "user" ? "You said" : "attend"}: ${heard}${heard === entry.text ? "" : " (interrupted)"}`;
    this.live.append(line);
    while (this.live.childElementCount > 4) this.live.firstElementChild?.remove();
  }
}

/** @param {HTMLElement} item @param {UserMessage} entry */
function asked(item, entry) {
  item.classList.toggle("open", entry.state === "open");
  const text = part(item, "p", "text");
  text.textContent = entry.text ?? (entry.state === "open" ? "Listening" : "Taking it down");
  text.classList.toggle("awaited", entry.text === null);
  if (entry.text === "") text.textContent = "(nothing that could be understood)";
  const { speech } = entry;
  if (entry.state === "open" && speech?.end === null) taking(part(item, "p", "taking"), Math.round((speech.sent - speech.start) / timeline.FRAME));
  else item.querySelector(".taking")?.remove();
  for (const frame of entry.frames) {
    if (item.querySelector(`[data-frame="${frame.id}"]`)) continue;
    const figure = document.createElement("figure");
    figure.className = "seen";
    figure.dataset.frame = frame.id;
    const on = document.createElement("div");
    on.className = "on";
    const image = document.createElement("img");
    Object.assign(image, { src: frame.url, alt: "The picture that was looked at", width: frame.width, height: frame.height });
    on.append(image);
    figure.append(on);
    item.append(figure);
  }
}

/** The frames that have gone in, while the user speaks. @param {HTMLElement} strip @param {number} frames */
function taking(strip, frames) {
  const count = Math.max(1, frames);
  strip.ariaHidden = "true";
  if (!strip.firstChild) strip.append(document.createElement("i"), "");
  strip.style.setProperty("--frames", String(count));
  if (strip.lastChild) strip.lastChild.textContent = count === 1 ? "1 frame" : `${count} frames`;
}

/** @type {WeakMap<HTMLElement, {text: string, marks: number, at: number, place: number}>} what stands there, and where its last word begins */
const written = new WeakMap();

/** A span for each word; what names a mark is a button. @param {HTMLElement} text @param {AssistantMessage} entry */
function words(text, entry) {
  const marks = entry.marks.map(({ mark }) => mark);
  const before = written.get(text);
  if (before?.text !== entry.text || before.marks !== marks.length) {
    const more = before && !before.marks && !marks.length && entry.text.startsWith(before.text); // a name may reach back
    /** @type {Element | null} the last word, which may have become longer */ let last = more ? text.lastElementChild : null;
    if (!more) text.replaceChildren();
    const names = named(entry.text, marks);
    let { at, place } = more ? before : { at: 0, place: 0 }; // in characters, as the server counts them, and in UTF-16
    let begun = { at, place };
    /** @type {HTMLElement | null} */ let name = null;
    for (const [piece] of entry.text.slice(place).matchAll(/\s*\S+\s*$|\s*\S+/gu)) {
      begun = { at, place };
      const word = last instanceof HTMLElement ? last : document.createElement("span");
      word.textContent = piece;
      word.dataset.at = String(at + (piece.length - piece.trimStart().length));
      const begin = place + (piece.length - piece.trimStart().length);
      const found = names.find(([start, end]) => begin < end && place + piece.length > start);
      if (!found) name = null;
      else if (name?.dataset.from !== String(found[0])) {
        name = document.createElement("button");
        Object.assign(name, { type: "button", className: "name" });
        Object.assign(name.dataset, { mark: found[2], entry: entry.id, colour: String(found[2] % 6), from: String(found[0]) });
        name.setAttribute("aria-pressed", "false");
        if (piece !== piece.trimStart()) text.append(" ");
        word.textContent = piece.trimStart();
        text.append(name);
      }
      if (word !== last) (name ?? text).append(word);
      last = null;
      at += [...piece].length;
      place += piece.length;
    }
    written.set(text, { text: entry.text, marks: marks.length, ...begun });
  }
  const interrupted = entry.state === "interrupted";
  for (const word of text.querySelectorAll("span")) {
    const at = Number(word.dataset.at);
    word.classList.toggle("coming", !interrupted && at >= entry.shownTo);
    word.classList.toggle("unheard", interrupted && at >= entry.heardTo);
  }
}

/** @param {Element} target @param {boolean} lit a mark and its words, whichever of them is pointed at */
function light(target, lit) {
  const at = target.closest("[data-mark]");
  if (!(at instanceof HTMLElement)) return;
  for (const each of both(at)) each.classList.toggle("lit", lit);
}

/** @param {Element} target a mark or its words were clicked: the other is brought into view */
function point(target) {
  const at = target.closest("[data-mark]");
  if (!(at instanceof HTMLElement)) return;
  const pressed = !at.classList.contains("kept");
  for (const each of at.closest("ol")?.querySelectorAll(".kept") ?? []) {
    each.classList.remove("kept");
    if (each.matches(".name")) each.setAttribute("aria-pressed", "false");
  }
  for (const each of both(at)) {
    each.classList.toggle("kept", pressed);
    if (each.matches(".name")) each.setAttribute("aria-pressed", String(pressed));
    if (pressed && each !== at) each.scrollIntoView({ block: "nearest" });
  }
}

/** @param {HTMLElement} one */
function both(one) {
  const { entry, mark } = one.dataset;
  return one.closest("ol")?.querySelectorAll(`[data-entry="${entry}"][data-mark="${mark}"]`) ?? [];
}

/** @param {HTMLElement} item @param {string} tag @param {string} name @returns {HTMLElement} the one there is, or a new one */
function part(item, tag, name) {
  const there = item.querySelector(`:scope > .${name}`);
  if (there instanceof HTMLElement) return there;
  const element = document.createElement(tag);
  element.className = name;
  item.append(element);
  return element;
}
