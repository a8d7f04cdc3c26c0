// @ts-check
/** The settings: kept in this browser, changed in the dialog. */

import { CHOOSES_SPEAKER } from "./sound.js";

const NAME = "attend";

/** @typedef {import("./client.js").Choices & {look: boolean}} Choices */

/** @returns {Choices} */
export function remembered() {
  /** @type {Choices} */
  const usual = { microphone: "", camera: "", speaker: "", echo: true, aloud: true, press: false, look: true };
  try {
    const kept = JSON.parse(localStorage.getItem(NAME) ?? "{}");
    for (const [name, value] of Object.entries(kept)) {
      if (name in usual && typeof value === typeof usual[/** @type {keyof Choices} */ (name)]) Object.assign(usual, { [name]: value });
    }
  } catch {
    // a browser that keeps nothing, or something else's words: the usual choices do
  }
  return usual;
}

/** @param {Choices} choices */
export function remember(choices) {
  try {
    localStorage.setItem(NAME, JSON.stringify(choices));
  } catch {
    // then they hold until the page is left
  }
}

/**
 * @param {Choices} choices changed in place @param {import("./client.js").Server | null} server
 * @param {() => void} changed
 */
export async function ask(choices, server, changed) {
  const dialog = /** @type {HTMLDialogElement} */ (document.getElementById("settings"));
  const before = JSON.stringify(choices);
  const devices = (await navigator.mediaDevices?.enumerateDevices().catch(() => [])) ?? [];
  fill("microphone-choice", devices, "audioinput", choices.microphone);
  fill("camera-choice", devices, "videoinput", choices.camera);
  fill("speaker-choice", devices, "audiooutput", choices.speaker);
  named("speaker-label", HTMLLabelElement).hidden = !CHOOSES_SPEAKER;
  for (const name of /** @type {const} */ (["echo", "press", "aloud"])) named(name, HTMLInputElement).checked = choices[name];
  const voice = named("voice", HTMLElement);
  voice.textContent = !server ? "" : server.voice === "none" ? "This server has no voice." : `The server's voice: ${server.voice}.`;
  dialog.onclose = () => {
    choices.microphone = named("microphone-choice", HTMLSelectElement).value;
    choices.camera = named("camera-choice", HTMLSelectElement).value;
    choices.speaker = named("speaker-choice", HTMLSelectElement).value;
    for (const name of /** @type {const} */ (["echo", "press", "aloud"])) choices[name] = named(name, HTMLInputElement).checked;
    if (JSON.stringify(choices) === before) return;
    remember(choices);
    changed();
  };
  dialog.onclick = ({ target }) => {
    if (target === dialog) dialog.close(); // no value: a false one would undo every click within
  };
  dialog.showModal();
}

/** @template {HTMLElement} T @param {string} id @param {new () => T} kind */
function named(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${id}`);
  return found;
}

/** @param {string} id @param {MediaDeviceInfo[]} devices @param {MediaDeviceKind} kind @param {string} chosen */
function fill(id, devices, kind, chosen) {
  const select = named(id, HTMLSelectElement);
  const there = devices.filter((device) => device.kind === kind && device.deviceId && device.deviceId !== "default");
  select.replaceChildren(new Option("The usual one", ""));
  there.forEach(({ deviceId, label }, n) => select.append(new Option(label || `Number ${n + 1}`, deviceId)));
  select.value = there.some(({ deviceId }) => deviceId === chosen) ? chosen : "";
  select.disabled = there.length < 1;
}
