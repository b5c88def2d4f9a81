/** Buttons of a prompt's words: one that is pointed at, has the focus or was chosen is the one that is shown. */

export class Words {
  #chosen = null; // the text of a word; it stays chosen in the next image
  #words = [];

  /**
   * @param {HTMLElement} place of the buttons
   * @param {(word: {text: string, map: object} | null) => void} show is called with the word to show
   */
  constructor(place, show) {
    Object.assign(this, { place, show });
    place.onkeydown = (event) => event.key === "Escape" && this.#choose(null);
  }

  /** Make the buttons of other words. */
  set(words) {
    this.#words = words;
    this.place.replaceChildren(...words.map((word) => this.#button(word)));
    this.#choose(this.#chosen);
  }

  #button(word) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: word.text });
    const leave = () => this.show(this.#word());
    button.onpointerenter = button.onfocus = () => this.show(word);
    button.onpointerleave = button.onblur = leave;
    button.onclick = () => this.#choose(this.#chosen === word.text ? null : word.text);
    return button;
  }

  #choose(text) {
    this.#chosen = text;
    for (const button of this.place.children) button.setAttribute("aria-pressed", button.textContent === text);
    this.show(this.#word());
  }

  #word() {
    return this.#words.find(({ text }) => text === this.#chosen) ?? null;
  }
}

/** Say in words where a map is highest and lowest. */
export function where({ data, width, height }) {
  const place = (value) => {
    const at = data.indexOf(value);
    const third = (share) => Math.min(Math.floor(3 * share), 2);
    const row = ["top", "", "bottom"][third((Math.floor(at / width) + 0.5) / height)];
    const column = ["left", "", "right"][third(((at % width) + 0.5) / width)];
    return row || column ? `at the ${[row, column].filter(Boolean).join(" ")}` : "in the centre";
  };
  return `most ${place(Math.max(...data))}, least ${place(Math.min(...data))}`;
}
