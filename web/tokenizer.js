/**
 * CLIP's byte-pair tokenizer with a model's own merges: the same ids as `ldm/conditioning/tokenizer.py`.
 *
 * A text is cleaned, split into words, and every word is written as bytes and merged pair by pair, lowest rank first.
 * Token ids: 256 bytes, the same 256 as ends of words, one token per merge, start of text, end of text.
 */

const WORDS = "'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^\\p{White_Space}\\p{L}\\p{N}]+";
const SPECIAL = { clip: ["<|startoftext|>", "<|endoftext|>"], openclip: ["<start_of_text>", "<end_of_text>"] };

export class Tokenizer {
  /** @param {{merges: string[], context_length: number, cleaning: string, pad: number}} settings of model.json */
  constructor({ merges, context_length, cleaning, pad }) {
    Object.assign(this, { contextLength: context_length, cleaning, pad });
    const bytes = byteLetters();
    this.letters = bytes;
    const names = [...bytes].sort((a, b) => a.codePointAt(0) - b.codePointAt(0));
    names.push(...names.map((name) => name + "</w>"));
    names.push(...merges.map((merge) => merge.replace(" ", "")));
    this.ids = new Map(names.map((name, id) => [name, id]));
    this.ranks = new Map(merges.map((merge, rank) => [merge, rank]));
    this.start = names.length;
    this.end = names.length + 1;
    const special = SPECIAL[cleaning].map(escaped).join("|");
    this.special = new RegExp(`(${special})`, "u");
    this.words = new RegExp(cleaning === "openclip" ? `${special}|${WORDS}` : WORDS, "gu");
    this.known = new Map();
  }

  /** Return the token ids of a text of any length, without start, end or padding. */
  encode(text) {
    text = text.toWellFormed ? text.toWellFormed() : text;
    const named = new Map(SPECIAL[this.cleaning].map((name, i) => [name, this.start + i]));
    // "clip" finds the names of special tokens in the text as it is, "openclip" where they are words of the clean text
    const parts = this.cleaning === "clip" ? text.split(this.special) : [text];
    return parts.flatMap((part) => {
      if (named.has(part)) return [named.get(part)];
      return (this.clean(part).match(this.words) ?? []).flatMap((word) => named.get(word) ?? this.merged(word));
    });
  }

  /** Clean a text as the model's training did. Of ftfy's repairs ("openclip") only straight quotes are made. */
  clean(text) {
    text = text.normalize("NFC");
    if (this.cleaning === "clip") {
      text = text.replace(/\p{White_Space}+/gu, " ");
      return [...text].map((letter) => letter.toLowerCase()).join("");
    }
    text = text.replace(/[‘’]/gu, "'").replace(/[“”]/gu, '"');
    return text.replace(/\p{White_Space}+/gu, " ").trim().toLowerCase();
  }

  /** Return the ids of one word. */
  merged(word) {
    if (!this.known.has(word)) this.known.set(word, this.#merge(word));
    return this.known.get(word);
  }

  #merge(word) {
    const parts = Array.from(new TextEncoder().encode(word), (byte) => this.letters[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => this.ids.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  /** Add start, end and padding to ids, at most contextLength - 2: contextLength ids. */
  frame(ids) {
    const framed = [this.start, ...ids, this.end];
    return framed.concat(Array(this.contextLength - framed.length).fill(this.pad));
  }
}

/** Return one printable letter for each byte, as GPT-2's vocabulary writes it. */
function byteLetters() {
  const printable = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let others = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : others++));
}

function escaped(text) {
  return text.replace(/[|\\{}()[\]^$+*?.]/g, "\\$&");
}
