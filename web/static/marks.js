// @ts-check
/** Marks on a picture: boxes, points and labels; and the words of a text that name them. */

/** @typedef {import("./conversation.js").Mark} Mark */

export const COLOURS = 6; // that style.css has

/**
 * @param {Mark} mark @param {number} number of it in its answer
 * @returns {HTMLButtonElement} to stand in an element of exactly the picture's extent
 */
export function draw(mark, number) {
  const [top, left, bottom, right] = mark.box;
  const button = document.createElement("button");
  const label = document.createElement("span");
  button.type = "button";
  button.className = top === bottom && left === right ? "mark point" : "mark box";
  if (top < 90) button.classList.add("high"); // no room for its label above it
  if (left > 700) button.classList.add("right");
  button.dataset.mark = String(number);
  button.dataset.colour = String(number % COLOURS);
  button.style.inset = `${top / 10}% ${100 - right / 10}% ${100 - bottom / 10}% ${left / 10}%`;
  button.style.zIndex = String(1000 - Math.round(((bottom - top) * (right - left)) / 1001)); // small ones can be reached
  label.textContent = mark.label;
  button.setAttribute("aria-label", `${mark.label || "point"}, ${place(mark)}: show its words`);
  button.append(label);
  return button;
}

/** @param {Mark} mark @returns {string} where it is, for who does not see it */
export function place({ box: [top, left, bottom, right] }) {
  const down = ["top", "middle", "bottom"][Math.min(2, Math.floor((top + bottom) / 667))];
  const across = ["left", "centre", "right"][Math.min(2, Math.floor((left + right) / 667))];
  return down === "middle" && across === "centre" ? "in the middle" : `${down} ${across}`;
}

/**
 * Which stretches of a text name which mark, as [start, end, number], in order and apart from one another. A mark is named by its
 * whole label, or where that does not occur by the label's last word ("the square", "two squares").
 * @param {string} text @param {Mark[]} marks @returns {[number, number, number][]}
 */
export function named(text, marks) {
  /** @type {[number, number, number][]} */
  const found = [];
  marks.forEach(({ label }, number) => {
    const names = [label, label.split(/\s+/).at(-1) ?? ""].filter(Boolean);
    for (const name of names) {
      const pattern = new RegExp(`(?<![\\p{L}\\p{N}])${name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}(?:s|es)?(?![\\p{L}\\p{N}])`, "giu");
      const places = [...text.matchAll(pattern)].filter(
        ({ index, 0: match }) => !found.some(([start, end]) => index < end && index + match.length > start),
      );
      if (!places.length) continue;
      places.forEach(({ index, 0: match }) => found.push([index, index + match.length, number]));
      break;
    }
  });
  return found.sort(([a], [b]) => a - b);
}
