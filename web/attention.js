/** Where each word of a prompt is attended to: as `ldm/editing/words.py` and `ldm/editing/maps.py`. */

import { cut, parsePrompt } from "./prompt.js";

const WORD = /<\S+>|[\p{L}\p{N}_]+|[^\p{L}\p{N}_\s]/gu;
const REDDEST = 200; // of 255, where a word is attended to most

/** Return the distinct words of a prompt without punctuation, {text, places} of its tokens in the conditioning. */
export function wordsOf(tokenizer, prompt) {
  const tokens = cut(tokenizer, prompt).flatMap((chunk) => tokenizer.frame(chunk.tokens));
  const around = new Set(tokenizer.frame([])); // start, end and padding
  const text = parsePrompt(prompt).flat().map((piece) => piece.text).join(" ");
  const found = [];
  let at = 0;
  for (const [word] of text.matchAll(WORD)) {
    const own = tokenizer.encode(word).filter((id) => !around.has(id));
    const start = tokens.findIndex((_, i) => i >= at && own.every((id, k) => id === tokens[i + k]));
    if (!own.length || start < 0) continue;
    at = start + own.length;
    found.push({ text: word, places: own.map((_, k) => start + k) });
  }
  const written = found.map(({ text: word }) => word).filter((word) => [...word].length > 1 || /[\p{L}\p{N}]/u.test(word));
  const same = (word) => found.filter((other) => other.text.toLowerCase() === word.toLowerCase());
  return [...new Set(written)].map((word) => ({ text: word, places: same(word).flatMap(({ places }) => places) }));
}

/** The mean over steps of the attention to each token. */
export class AttentionMaps {
  #sum = null;
  #steps = 0;

  /** Add what one call of the UNet returned, {data, dims} (b, n, h, w): its last image is the conditional one. */
  add({ data, dims }) {
    const own = data.subarray(data.length - data.length / dims[0]);
    this.dims = dims.slice(1);
    this.#sum = this.#sum ? this.#sum.map((value, i) => value + own[i]) : own.slice();
    this.#steps += 1;
  }

  /** Return the map {data, width, height} of each word, by its text; none if no call returned attention. */
  of(words) {
    if (!this.#sum) return [];
    const [, height, width] = this.dims;
    const sum = (places, i) => places.reduce((total, place) => total + this.#sum[place * height * width + i], 0);
    return words.map(({ text, places }) => {
      const data = Float32Array.from({ length: height * width }, (_, i) => sum(places, i) / this.#steps);
      return { text, map: { data, width, height } };
    });
  }
}

/** Return a grey copy of an image in which a map is red: not at its lowest place, fully at its highest. */
export function overlay({ data: pixels, width, height }, map) {
  const [low, high] = [Math.min(...map.data), Math.max(...map.data)];
  const heat = map.data.map((value) => (value - low) / Math.max(high - low, 1e-8));
  const [across, down] = [places(width, map.width), places(height, map.height)];
  const data = new Uint8ClampedArray(pixels.length);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const i = 4 * (y * width + x);
      const row = (at) => mixed(heat[at * map.width + across[x].first], heat[at * map.width + across[x].last], across[x].share);
      const share = Math.floor(REDDEST * mixed(row(down[y].first), row(down[y].last), down[y].share)) / 255;
      const grey = greyOf(...pixels.subarray(i, i + 3));
      data.set([mixed(grey, 255, share), mixed(grey, 0, share), mixed(grey, 0, share), 255], i);
    }
  return { data, width, height };
}

/** Return the brightness of a pixel as Pillow computes it. */
export function greyOf(red, green, blue) {
  return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
}

/** Return between which places of a map of `length` each of `size` pixels lies, for linear interpolation. */
function places(size, length) {
  return Array.from({ length: size }, (_, i) => {
    const at = Math.min(Math.max(((i + 0.5) * length) / size - 0.5, 0), length - 1);
    return { first: Math.floor(at), last: Math.min(Math.floor(at) + 1, length - 1), share: at - Math.floor(at) };
  });
}

function mixed(first, last, share) {
  return first + share * (last - first);
}
