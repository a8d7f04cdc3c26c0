// @ts-check
/** What a small model knows, and what to try with it, where its checkpoint says so: a line, a picture, and questions about it. */

const ADDRESS = "suggestions.json";
const AGAIN = 1500; // milliseconds until the server is asked again whose model is being loaded

/** @typedef {{about: string, picture: string, questions: string[]}} Suggested */

export class SuggestionBox {
  /**
   * @param {HTMLElement} box hidden until there is something to try
   * @param {{show: (picture: Blob) => Promise<void>, ask: (question: string, picture: Blob) => Promise<void>}} on
   */
  constructor(box, on) {
    this.box = box;
    this.on = on;
  }

  /** Asks the server until its model is loaded. */
  async load() {
    /** @type {Suggested | {loading: true} | null} null: this model suggests nothing */
    const suggested = await fetch(ADDRESS).then((answer) => (answer.ok ? answer.json() : null), () => null);
    if (!suggested) return;
    if ("loading" in suggested) return void setTimeout(() => void this.load(), AGAIN);
    const picture = await fetch(suggested.picture).then((answer) => answer.blob());
    const about = Object.assign(document.createElement("p"), { textContent: suggested.about });
    const row = Object.assign(document.createElement("div"), { className: "row" });
    const show = choice("", () => void this.on.show(picture));
    show.className = "example";
    show.append(Object.assign(new Image(), { src: suggested.picture, alt: "Show it this picture", title: "Show it this picture" }));
    row.append(show, ...suggested.questions.map((question) => choice(question, () => void this.on.ask(question, picture))));
    const how = Object.assign(document.createElement("p"), { textContent: "Tap a question about this picture; or tap the picture, and say it." });
    this.box.replaceChildren(about, how, row);
    this.box.hidden = false;
  }
}

/** @param {string} words @param {() => void} act */
function choice(words, act) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: words });
  button.addEventListener("click", act);
  return button;
}
