// @ts-check
/** The page: what is clicked and typed goes to a `VoiceClient`, and its state and messages are shown. */

import { read } from "./camera.js";
import { ask, remember, remembered } from "./choices.js";
import { VoiceClient } from "./client.js";
import { draw } from "./marks.js";
import { Notice } from "./notice.js";
import { SuggestionBox } from "./suggestions.js";
import { TranscriptView } from "./transcript.js";

const LIVE = 4000; // milliseconds that a mark stays on the live picture

/** @template {HTMLElement} T @param {string} id @param {new () => T} kind @returns {T} */
function element(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${id}`);
  return found;
}

const button = (/** @type {string} */ id) => element(id, HTMLButtonElement);
const [start, hold, mute, look] = [button("start"), button("hold"), button("mute"), button("look")];
const video = element("video", HTMLVideoElement);
const shown = element("shown", HTMLImageElement);
const live = element("live", HTMLDivElement);
const text = element("text", HTMLInputElement);
const file = element("file", HTMLInputElement);
const status = element("status", HTMLParagraphElement);
const hello = element("hello", HTMLDivElement);

const choices = remembered();
const transcript = new TranscriptView(element("turns", HTMLOListElement), element("said", HTMLDivElement));
const notice = new Notice(element("notice", HTMLDivElement));
const suggestions = new SuggestionBox(element("suggestions", HTMLElement), {
  show: give,
  async ask(question, picture) {
    if (!client.shown) await give(picture);
    await client.type(question);
  },
});
let asking = false; // the browser asks for permission
const gone = new Set(); // devices that are wanted and not there
let spoke = 0; // marks of the last answer that are on the live picture

const client = new VoiceClient(video, choices, {
  state: render,
  change(entry) {
    hello.hidden = true;
    transcript.show(entry);
    if (entry.who === "agent") onto(entry);
  },
  gone: (entry) => transcript.remove(entry),
  level(level, whose) {
    if (whose === "agent" || client.activity !== "speaking") start.style.setProperty("--level", Math.min(1, level * 2.5).toFixed(2));
  },
  lost(device) {
    gone.add(device);
    notice.say(`The ${device} is gone. This page goes on with it as soon as there is one again.`, "gone");
    render();
  },
  audible: (audible) => (audible ? notice.clear("silent") : notice.silent(() => void take("microphone", () => client.reopen(), begin))),
  error: (sentence) => notice.say(sentence, "error"),
});

// -- start and stop

async function begin() {
  client.connect();
  notice.clear();
  if (!window.isSecureContext || !navigator.mediaDevices) {
    notice.insecure();
    return render();
  }
  asking = true;
  render();
  await hear();
  if (choices.look) await open();
  asking = false;
  render();
}

/** The microphone. */
const hear = () => take("microphone", () => client.listen(), begin);

/** The camera. */
const open = () => take("camera", () => client.camera.use(choices.camera), open);

/** @param {"microphone" | "camera"} device @param {() => Promise<void>} use @param {() => Promise<void>} again */
async function take(device, use, again) {
  try {
    await use();
    if (gone.delete(device)) notice.clear("gone");
  } catch (error) {
    if (error instanceof Error && ["NotFoundError", "OverconstrainedError"].includes(error.name)) gone.add(device);
    notice.refused(device, error, () => void again());
  }
  render();
}

start.addEventListener("click", () => {
  if (client.socket.state.kind === "off") return void begin();
  client.stop();
  notice.clear();
});

mute.addEventListener("click", () => client.mute(!client.muted));

look.addEventListener("click", () => {
  choices.look = !choices.look;
  remember(choices);
  if (!choices.look) client.camera.close();
  else if (client.socket.state.kind !== "off" && navigator.mediaDevices) void open();
  render();
});

navigator.mediaDevices?.addEventListener("devicechange", () => {
  if (client.socket.state.kind === "off" || asking) return;
  if (!client.audible) void take("microphone", () => client.reopen(), begin);
  else if (gone.has("microphone")) void hear();
  if (gone.has("camera") && choices.look) void open();
});

// -- words, pictures, keys

element("typing", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  const words = text.value.trim();
  if (!words) return;
  text.value = "";
  void client.type(words);
});

/** @param {Blob | null | undefined} picture */
async function give(picture) {
  if (!picture) return;
  try {
    client.shown = await read(picture);
    text.focus();
  } catch (error) {
    notice.say(error instanceof Error ? error.message : String(error), "error");
  }
  render();
}

button("give").addEventListener("click", () => file.click());
file.addEventListener("change", () => void give(file.files?.[0]).then(() => (file.value = "")));
button("unshow").addEventListener("click", () => {
  client.shown = null;
  render();
});
addEventListener("paste", (event) => void give([...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"))));
addEventListener("dragover", (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault());
addEventListener("drop", (event) => {
  const [dropped] = event.dataTransfer?.files ?? [];
  if (!dropped) return; // words, which the field takes itself
  event.preventDefault();
  void give(dropped);
});

let unmuted = false; // for as long as the space bar is held

function down() {
  if (choices.press) client.press();
  else if (client.muted) [unmuted] = [true, client.mute(false)];
}

function up() {
  if (choices.press) void client.release();
  else if (unmuted) [unmuted] = [false, client.mute(true)];
}

/** @param {EventTarget | null} target whether a key there means something else */
function elsewhere(target) {
  return target instanceof Element && target !== hold && target.closest("input, select, textarea, button, dialog, summary") !== null;
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !element("settings", HTMLDialogElement).open) client.interrupt();
  if (event.code !== "Space" || elsewhere(event.target)) return;
  event.preventDefault();
  if (!event.repeat) down();
});
addEventListener("keyup", (event) => event.code === "Space" && up());
addEventListener("blur", up);
hold.addEventListener("pointerdown", (event) => {
  hold.setPointerCapture(event.pointerId);
  down();
});
for (const end of ["pointerup", "pointercancel"]) hold.addEventListener(end, up);

button("configure").addEventListener("click", () =>
  ask(choices, client.server, () => {
    const { kind } = client.socket.state;
    if (kind === "open") void client.configure();
    if (client.microphone?.stream) void hear();
    if (client.camera.stream) void open();
    render();
  }),
);

// -- what is to be seen

/** Marks stand on the live picture for a moment too. @param {import("./conversation.js").AssistantMessage} entry */
function onto(entry) {
  if (client.conversation.answer !== entry || entry.marks.length === spoke) return;
  spoke = entry.marks.length;
  live.replaceChildren(...(client.camera.stream ? entry.marks.map(({ mark }, number) => draw(mark, number)) : []));
  for (const mark of live.querySelectorAll("button")) [mark.tabIndex, mark.disabled] = [-1, true]; // those in the conversation answer
  setTimeout(() => entry.marks.length === spoke && (live.replaceChildren(), (spoke = 0)), LIVE);
}

const ACTIVITIES = { listening: "Listening", hearing: "Hearing you", thinking: "Thinking", speaking: "Speaking" };

/** @returns {[string, string]} name of the state, and words for it */
function pageState() {
  const { state } = client.socket;
  if (asking) return ["asking", "Waiting for your permission"];
  if (state.kind !== "open") return [state.kind, { off: "", connecting: "Connecting", loading: "Loading the model", busy: "Waiting", lost: "Not connected", token: "Not let in" }[state.kind]];
  const { activity } = client;
  if (activity !== "listening") return [activity, ACTIVITIES[activity]];
  if (!client.microphone?.stream || !client.audible) return ["typing", "Type your question"];
  if (client.muted) return ["muted", "Muted"];
  return ["listening", choices.press ? "Hold to talk" : ACTIVITIES.listening];
}

function render() {
  const [state, words] = pageState();
  const on = client.socket.state.kind !== "off";
  document.body.dataset.state = state;
  if (status.textContent !== words) status.textContent = words;
  notice.connection(client.socket.state, () => client.socket.start());
  if (client.server?.voice === "none" && on) notice.once("This server has no voice: answers come as text.");
  label(start, on ? "stop" : "mic", on ? "Stop" : "Start");
  label(mute, client.muted ? "mic-off" : "mic");
  mute.setAttribute("aria-pressed", String(client.muted));
  mute.disabled = !client.microphone?.stream;
  label(look, choices.look ? "camera" : "camera-off");
  look.setAttribute("aria-pressed", String(choices.look));
  hold.hidden = !choices.press || !client.microphone?.stream;
  hold.setAttribute("aria-pressed", String(client.pressed));
  document.body.classList.toggle("sees", client.camera.stream !== null);
  document.body.classList.toggle("given", client.shown !== null);
  shown.hidden = button("unshow").hidden = !client.shown;
  if (client.shown && shown.src !== client.shown.url) shown.src = client.shown.url;
}

/** @param {HTMLElement} button @param {string} icon @param {string} [words] */
function label(button, icon, words) {
  const use = button.querySelector("use");
  if (use?.getAttribute("href") !== `#${icon}`) use?.setAttribute("href", `#${icon}`);
  const span = button.querySelector("span");
  if (span && words && span.textContent !== words) span.textContent = words;
}

element("server", HTMLElement).textContent = location.host;
video.addEventListener("resize", () => {
  const view = video.parentElement;
  if (view && video.videoWidth) view.style.aspectRatio = `${video.videoWidth} / ${video.videoHeight}`;
});
render();
void suggestions.load();
if (!window.isSecureContext) notice.insecure();
