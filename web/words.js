/** Buttons of a prompt's words: the attention to one that is pointed at, has the focus or was chosen lies over the image. */

import { overlay } from "./attention.js";
import { paint } from "./canvas.js";

export class Words {
  #chosen = null; // the text of a word; it stays chosen in the next image
  #image = null;

  /** @param {Record<string, HTMLElement>} parts `section` around the `buttons` and `said`; `canvas` over the image */
  constructor(parts) {
    Object.assign(this, parts);
    this.buttons.onkeydown = ({ key }) => {
      if (key === "Escape") this.#choose(null);
    };
  }

  /** An image is being made, of which nothing is known yet. */
  wait() {
    this.section.inert = this.canvas.hidden = true;
  }

  /** Offer the words of an image: {data, width, height, words: {text, map}[]}. */
  offer(image) {
    this.#image = image;
    this.section.inert = false;
    this.section.hidden = !image.words?.length;
    this.buttons.replaceChildren(...(image.words ?? []).map((word) => this.#button(word)));
    this.#choose(this.#chosen);
  }

  #button(word) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: word.text });
    button.onpointerenter = button.onfocus = () => this.#show(word);
    button.onpointerleave = button.onblur = () => this.#show();
    button.onclick = () => this.#choose(this.#chosen === word.text ? null : word.text);
    return button;
  }

  #choose(text) {
    this.#chosen = text;
    for (const button of this.buttons.children) button.setAttribute("aria-pressed", button.textContent === text);
    this.#show();
  }

  #show(word = this.#image.words?.find(({ text }) => text === this.#chosen)) {
    if (this.section.inert) return; // which takes pointer and focus from a button
    this.canvas.hidden = !word;
    const found = word ? `The attention to “${word.text}” is ${where(word.map)}.` : "";
    this.said.textContent = found && `${found} Red is high, grey low, each word on its own scale.`;
    if (word) paint(this.canvas, overlay(this.#image, word.map), found);
  }
}

/** Say in words where a map is highest and lowest. */
function where({ data, width, height }) {
  const third = (share) => Math.min(Math.floor(3 * share), 2);
  const place = (value) => {
    const at = data.indexOf(value);
    const row = ["top", "", "bottom"][third((Math.floor(at / width) + 0.5) / height)];
    const column = ["left", "", "right"][third(((at % width) + 0.5) / width)];
    return row || column ? `at the ${[row, column].filter(Boolean).join(" ")}` : "in the centre";
  };
  return `highest ${place(Math.max(...data))}, lowest ${place(Math.min(...data))}`;
}
